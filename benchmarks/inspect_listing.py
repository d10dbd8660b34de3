"""How long `dynprobe inspect` takes on 1,000 checkpoints, against reading them all; and peak memory.

Run: `python benchmarks/inspect_listing.py [--count 1000] [--width 256] [--format torch|safetensors]`

Each measurement is a process of its own, on files that are in the page cache. Ratios are what counts: the
machine's seconds are not. Peak memory and bytes read come from /proc, so this needs Linux. Bytes read count
read calls; the safetensors library maps files instead, so its "read all" shows none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

REPORT = """
import json, pathlib, sys, time
started = time.perf_counter()
{body}
seconds = time.perf_counter() - started
def counter(file, name):
    (line,) = [l for l in pathlib.Path("/proc/self", file).read_text().splitlines() if l.startswith(name)]
    return int(line.split()[1])
print(json.dumps({{"seconds": seconds, "cpu": time.process_time(), "peak_kib": counter("status", "VmHWM"),
                  "read": counter("io", "rchar"), "torch": "torch" in sys.modules}}))
"""

INSPECT = """
from contextlib import redirect_stdout
from io import StringIO
from dynprobe.cli.sequence import inspect
with redirect_stdout(StringIO()) as out:
    inspect([sys.argv[1]])
assert len(out.getvalue().splitlines()) == int(sys.argv[2]) + 1
"""

READ_ALL = """
import torch
from safetensors.torch import load_file
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]
    for tensor in state.values():
        tensor.sum()
"""

IMPORT_TORCH = "import torch"


def write_run(folder: Path, count: int, width: int, file_format: str) -> int:
    """Save `count` checkpoints of a small MLP with Adam's state; returns the bytes on disk."""
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(8)])
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, width)).sum().backward()
    optimizer.step()
    for step in range(count):
        if file_format == "safetensors":
            save_file(model.state_dict(), folder / f"step_{step}.safetensors", metadata={"step": str(step)})
        else:
            tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(tree, folder / f"step_{step}.pt")
    return sum(file.stat().st_size for file in folder.iterdir())


def measure(body: str, *arguments: object) -> dict[str, float]:
    """Run a piece of code in a process of its own; returns seconds, peak memory, bytes read."""
    command = [sys.executable, "-c", REPORT.format(body=body), *(str(argument) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--format", choices=("torch", "safetensors"), default="torch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        total = write_run(Path(name), options.count, options.width, options.format)
        runs = {
            "import torch": measure(IMPORT_TORCH),
            "read all": measure(READ_ALL, name),
            "inspect": measure(INSPECT, name, options.count),
        }
    print(f"{options.count} {options.format} checkpoints, {total / 2**20:.0f} MiB in all")
    for label, row in runs.items():
        print(
            f"{label:14s} {row['seconds']:7.2f} s   CPU {row['cpu']:7.2f} s   "
            f"peak {row['peak_kib'] / 1024:6.0f} MiB   read {row['read'] / 2**20:8.1f} MiB"
        )
    inspected, read_all, imported = runs["inspect"], runs["read all"], runs["import torch"]
    for clock in ("seconds", "cpu"):
        whole = inspected[clock] / read_all[clock]
        warm = inspected[clock] / (read_all[clock] - imported[clock])
        print(f"inspect / read all, {clock}: {whole:.3f} ({warm:.3f} without the time to import torch)")
    print(f"inspect / read all, peak memory: {inspected['peak_kib'] / read_all['peak_kib']:.3f}")
    print(f"inspect reads {inspected['read'] / total:.4f} of the bytes on disk")
    print(f"inspect imports torch: {'yes' if inspected['torch'] else 'no'}")


if __name__ == "__main__":
    main()
