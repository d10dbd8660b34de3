"""The whole command, as a user types it: streams, exit codes, resuming, kills, workers, shards."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end import dynprobe
from safetensors.torch import save_file

from dynprobe.io.report import read_report

MANIFEST = """
[model]
factory = "builtin:mlp"
args = { inputs = 64, width = 8, depth = 2, classes = 10 }
[data]
source = "sklearn:digits"
args = { split = "train" }
[loss]
name = "cross_entropy"
"""

MINE = '''"""My own."""
import os, time
from dynprobe.analyzers import Lines, Var, analyzer


@analyzer(returns={"norm": Var((), "1", "Norm of all weights")}, figure=Lines(y="norm"))
def weight_norm(state, step, *, order: int = 2, sleep: float = 0.0, die_at: int = -1):
    """Norm of all weights.

    Args:
        order: Which norm.
        sleep: Seconds to wait.
        die_at: The step at which the process kills itself.
    """
    if step == die_at:
        os.kill(os.getpid(), 9)
    time.sleep(sleep)
    return {"norm": sum(float(v.norm(order)) ** order for v in state.values()) ** (1 / order)}
'''

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)


def model_state(step: int) -> dict[str, torch.Tensor]:
    from dynprobe.io.models import build_model
    from dynprobe.io.spec import Spec

    model = build_model(Spec("builtin:mlp", {"inputs": 64, "width": 8, "depth": 2, "classes": 10}))
    generator = torch.Generator().manual_seed(step)
    return {n: 0.3 * torch.randn(v.shape, generator=generator) for n, v in model.state_dict().items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of ten checkpoints in the current folder, and an analyzer of one's own beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for step in STEPS:
        save_file(model_state(step), tmp_path / "run" / f"step_{step}.safetensors")
    (tmp_path / "run" / "dynprobe.toml").write_text(MANIFEST)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def started(*argv: str, **kwargs) -> subprocess.Popen:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "dynprobe.cli", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


NORM = ("run", "mine.py:weight_norm", "run")
SMALL = ("landscape", "run", "--resolution", "3", "--samples", "64")


def test_one_command_gives_a_table_a_report_and_a_figure(folder, capsys):
    code, out, err = dynprobe(capsys, *SMALL, "--steps", "last")
    assert code == 0, err
    assert "500" in out
    assert "loss" in out
    assert read_report(folder / "dynprobe-run.h5")["landscape"]["loss"].shape == (1, 3, 3)
    assert (folder / "dynprobe-run-landscape.png").stat().st_size > 5000
    assert sorted(p.name for p in folder.iterdir()) == [
        "dynprobe-run-landscape.png",
        "dynprobe-run.h5",
        "mine.py",
        "run",
    ], "nothing else is left behind"


def test_one_truncated_checkpoint_among_ten_gives_nine_surfaces_a_named_failure_and_exit_1(folder, capsys):
    victim = folder / "run" / "step_50.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    code, _, err = dynprobe(capsys, *SMALL)
    assert code == 1
    assert "step_50.safetensors" in err
    result = read_report(folder / "dynprobe-run.h5")["landscape"]
    finite = np.isfinite(result["loss"]).all(axis=(1, 2))
    assert finite.sum() == 9
    assert result["status"][6] == "failed"
    assert "step_50.safetensors" in result["path"][6]
    assert "the file has" in result["reason"][6]
    assert np.isnan(result["loss"][6]).all()


def test_a_malicious_pickle_runs_nothing_and_is_a_named_failure(folder, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'owned'}",)

    (folder / "run" / "step_700.pt").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": model_state(3), "extra": Evil()}, folder / "run" / "step_800.pt")
    code, _, err = dynprobe(capsys, *SMALL, "--steps", "700,800")
    assert not (folder / "owned").exists()
    assert code == 1
    assert "step_700.pt" in err
    assert read_report(folder / "dynprobe-run.h5")["landscape"]["status"].tolist() == ["failed", "ok"]


def test_json_is_one_document_on_stdout_and_nothing_else(folder, capsys):
    code, out, _ = dynprobe(capsys, *NORM, "--format", "json", "--steps", "0,1")
    assert code == 0
    assert json.loads(out)


def test_without_model_or_manifest_the_error_shows_what_to_write(folder, capsys):
    (folder / "run" / "dynprobe.toml").unlink()
    code, out, err = dynprobe(capsys, *SMALL)
    assert (code, out) == (2, "")
    assert "--model" in err
    assert "[model]" in err


def test_a_model_that_fits_no_checkpoint_is_refused_before_any_compute(folder, capsys):
    code, out, err = dynprobe(capsys, *SMALL, "--model-arg", "classes=7")
    assert (code, out) == (2, "")
    assert "step_0.safetensors" in err
    assert "classes=10" in err
    assert not (folder / "dynprobe-run.h5").exists()


def test_code_named_by_a_manifest_needs_trust_and_the_message_says_what_would_run(folder, capsys):
    text = MANIFEST.replace('name = "cross_entropy"', 'name = "evil.py:loss"')
    (folder / "run" / "dynprobe.toml").write_text(text)
    (folder / "run" / "evil.py").write_text(
        f"import pathlib; pathlib.Path({str(folder / 'owned')!r}).touch()\n"
        "from torch.nn.functional import cross_entropy as loss\n"
    )
    code, _, err = dynprobe(capsys, *SMALL, "--steps", "last")
    assert code == 2
    assert "evil.py" in err
    assert "--trust" in err
    assert not (folder / "owned").exists()
    assert dynprobe(capsys, *SMALL, "--steps", "last", "--trust")[0] == 0
    assert (folder / "owned").exists()


def test_a_second_call_takes_what_is_there_and_measures_only_what_is_new(folder, capsys):
    assert dynprobe(capsys, *NORM, "--steps", "0,1,2")[0] == 0
    code, out, _ = dynprobe(capsys, *NORM, "--steps", "0,1,2,5", "--dry-run", "--format", "csv")
    assert code == 0
    assert [line.rsplit(",", 1)[1] for line in out.split()[1:]] == ["stored", "stored", "stored", "measure"]
    assert dynprobe(capsys, *NORM, "--steps", "5,10")[0] == 0
    kept = read_report(folder / "dynprobe-run.h5")["weight-norm"]
    assert kept["step"].tolist() == [0, 1, 2, 5, 10], "an earlier call's results stay in the report"


def test_other_options_do_not_overwrite_a_report_unless_asked(folder, capsys):
    assert dynprobe(capsys, *NORM)[0] == 0
    code, _, err = dynprobe(capsys, *NORM, "--order", "3")
    assert code == 2
    assert "order" in err
    assert "--fresh" in err
    assert dynprobe(capsys, *NORM, "--order", "3", "--fresh")[0] == 0


def test_two_analyzers_share_a_report(folder, capsys):
    assert dynprobe(capsys, *NORM)[0] == 0
    assert dynprobe(capsys, *SMALL, "--steps", "last")[0] == 0
    assert set(read_report(folder / "dynprobe-run.h5")) == {"weight-norm", "landscape"}


def test_an_output_that_cannot_be_written_is_said_before_anything_is_measured(folder, capsys):
    (folder / "file").write_text("not a folder")
    code, _, err = dynprobe(capsys, *NORM, "-o", "file/report.h5")
    assert code == 2
    assert "file/report.h5" in err
    code, _, err = dynprobe(capsys, *NORM, "--figure", "picture.gif")
    assert code == 2
    assert ".png" in err


def test_worker_processes_give_the_same_numbers(folder, capsys):
    assert dynprobe(capsys, *NORM, "-o", "one.h5")[0] == 0
    code, _, err = dynprobe(capsys, *NORM, "-o", "two.h5", "--workers", "2")
    assert code == 0, err
    one, two = (read_report(folder / f"{n}.h5")["weight-norm"] for n in ("one", "two"))
    np.testing.assert_array_equal(one["norm"], two["norm"])
    np.testing.assert_array_equal(one["step"], two["step"])


def test_a_checkpoint_that_kills_its_worker_is_named_and_the_others_are_measured(folder, capsys):
    code, _, err = dynprobe(capsys, *NORM, "--workers", "2", "--die-at", "20", "--steps", "10,20,50")
    assert code == 1
    assert "step_20" in err
    assert "SIGKILL" in err
    result = read_report(folder / "dynprobe-run.h5")["weight-norm"]
    assert result["status"].tolist() == ["ok", "failed", "ok"]


def test_shards_merge_into_the_report_of_one_call(folder, capsys):
    assert dynprobe(capsys, *NORM, "-o", "whole.h5")[0] == 0
    for index in range(3):
        assert dynprobe(capsys, *NORM, "-o", "part.h5", "--shard", f"{index}/3")[0] == 0
    parts = sorted(str(p) for p in folder.glob("part.shard-*.h5"))
    assert len(parts) == 3
    code, _, err = dynprobe(capsys, "report", "merge", *parts, "-o", "merged.h5")
    assert code == 0, err
    merged, whole = (read_report(folder / f"{n}.h5")["weight-norm"] for n in ("merged", "whole"))
    np.testing.assert_array_equal(merged["norm"], whole["norm"])
    np.testing.assert_array_equal(merged["step"], whole["step"])
    code, _, err = dynprobe(capsys, "report", "merge", *parts[:2], "-o", "torn.h5")
    assert code == 2
    assert "2/3" in err


@pytest.mark.parametrize("shard", ["3/3", "x/2", "1"])
def test_a_shard_that_does_not_exist_is_a_usage_error(folder, capsys, shard):
    code, _, err = dynprobe(capsys, *NORM, "--shard", shard)
    assert code == 2
    assert "0 to N-1" in err


def finished(folder: Path, report: str = "dynprobe-run.h5") -> int:
    return len(list((folder / f"{report}.pieces").rglob("*.h5")))


def wait_until(condition, seconds=30.0):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_readable_report_and_a_second_call_resumes(folder, number, code):
    process = started(*NORM, "--sleep", "0.3")
    wait_until(lambda: finished(folder) >= 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "resumes" in err
    done = read_report(folder / "dynprobe-run.h5")["weight-norm"]
    assert 2 <= done["norm"].size < 10
    assert np.isfinite(done["norm"]).all()
    again = started(*NORM, "--sleep", "0.3")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert read_report(folder / "dynprobe-run.h5")["weight-norm"]["step"].tolist() == list(STEPS)


def test_killed_for_real_again_and_again_nothing_finished_is_lost(folder, capsys):
    seen = 0
    for _ in range(4):
        process = started(*NORM, "--sleep", "0.15")
        target = min(seen + 2, 9)
        wait_until(
            lambda target=target, process=process: finished(folder) >= target or process.poll() is not None
        )
        process.kill()
        process.communicate()
        now = finished(folder)
        assert now >= seen, "a finished piece was lost"
        seen = now
    assert seen >= 6
    code, _, err = dynprobe(capsys, *NORM, "--sleep", "0.15", "--quiet")
    assert code == 0, err
    result = read_report(folder / "dynprobe-run.h5")["weight-norm"]
    expected = [sum(float(v.norm()) ** 2 for v in model_state(s).values()) ** 0.5 for s in STEPS]
    np.testing.assert_allclose(result["norm"], expected, rtol=1e-6)
    assert not (folder / "dynprobe-run.h5.pieces").exists()


def test_a_reader_that_stops_reading_is_no_error(folder):
    ours = f"{sys.executable} -m dynprobe.cli run mine.py:weight_norm run --format csv"
    command = f"{ours} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_plug_in_joins_by_entry_point(folder):
    """A distribution on the path with an entry point in `dynprobe.analyzers` is listed and runs."""
    info = folder / "site" / "plug-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "site" / "plugged.py").write_text(MINE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dynprobe.analyzers]\nweight-norm = plugged:weight_norm\n")
    environment = os.environ | {"PYTHONPATH": str(folder / "site")}
    listing = started("analyzers", env=environment).communicate()[0]
    assert "weight-norm" in listing
    assert "(from plug)" in listing
    process = started("weight-norm", "run", "--format", "csv", env=environment)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("\n") == 11


def test_paths_come_from_stdin_too(folder):
    process = started("run", "mine.py:weight_norm", "-", "--format", "csv", stdin=subprocess.PIPE)
    out, err = process.communicate("run/step_0.safetensors\nrun/step_5.safetensors\n")
    assert process.returncode == 0, err
    assert out.count("\n") == 3


def parts(folder: Path) -> dict[str, int]:
    """The finished rows of the surface in hand, with when each was written."""
    found = (folder / "dynprobe-run.h5.pieces").rglob("*.npz")
    return {str(p): p.stat().st_mtime_ns for p in found if not p.name.startswith(".")}


def test_a_surface_killed_for_real_keeps_its_rows_and_ends_as_if_never_killed(folder, capsys):
    command = ("landscape", "run", "--steps", "last", "--resolution", "81", "--no-figure", "--threads", "1")
    kept: dict[str, int] = {}
    for _ in range(2):
        process = started(*command)
        enough = len(kept) + 5
        wait_until(lambda enough=enough: len(parts(folder)) >= enough)
        process.kill()
        process.communicate()
        now = parts(folder)
        assert all(now[name] == written for name, written in kept.items()), "a finished row was done again"
        kept = now
    assert len(kept) < 81
    assert dynprobe(capsys, *command)[0] == 0
    assert dynprobe(capsys, *command, "-o", "whole.h5")[0] == 0
    killed, whole = (read_report(folder / n)["landscape"] for n in ("dynprobe-run.h5", "whole.h5"))
    np.testing.assert_array_equal(killed["loss"], whole["loss"])
    again = killed["forwards"] - whole["forwards"]
    assert 0 <= again <= 3, "each new start evaluates the centre once more, and nothing else"


def test_worker_processes_take_paths_from_stdin_and_from_a_folder_that_grows(folder):
    process = started(*NORM[:2], "-", "--workers", "2", "--format", "csv", stdin=subprocess.PIPE)
    out, err = process.communicate("run/step_0.safetensors\nrun/step_5.safetensors\n")
    assert process.returncode == 0, err
    assert out.count("\n") == 3
    process = started(*NORM, "--workers", "2", "--sleep", "0.1", "-o", "grows.h5")
    wait_until(lambda: finished(folder, "grows.h5") >= 1)
    save_file(model_state(3), folder / "run" / "step_3.safetensors")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert read_report(folder / "grows.h5")["weight-norm"]["step"].tolist() == list(STEPS)


def test_an_edited_model_or_loss_file_is_measured_anew(folder, capsys):
    (folder / "loss.py").write_text(
        "from torch.nn.functional import cross_entropy\n\n"
        "def loss(outputs, targets):\n    return 1 * cross_entropy(outputs, targets)\n"
    )
    command = (*SMALL, "--steps", "last", "--loss", "loss.py:loss", "--metrics", "loss")
    assert dynprobe(capsys, *command)[0] == 0
    text = (folder / "loss.py").read_text().replace("1 *", "5 *")
    (folder / "loss.py").write_text(text)
    process = started(*command)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "loss was loss.py:loss [" in err


def test_what_an_analyzer_prints_does_not_reach_stdout(folder, capsys):
    text = MINE.replace("    time.sleep(sleep)", "    print('here')")
    (folder / "mine.py").write_text(text)
    code, out, err = dynprobe(capsys, *NORM, "--steps", "0", "--format", "json")
    assert code == 0
    assert json.loads(out)
    assert "here" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_here\n", "mine.py, line 1: ModuleNotFoundError"),
        ("def (\n", "mine.py, line 1: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_the_line(folder, capsys, text, message):
    (folder / "mine.py").write_text(text)
    code, out, err = dynprobe(capsys, *NORM)
    assert (code, out) == (2, "")
    assert message in err


def test_a_model_that_cannot_run_is_a_failure_of_each_checkpoint_and_no_traceback(folder, capsys):
    (folder / "net.py").write_text(
        "from dynprobe.io.nets import *\nimport torch\n\n"
        "def broken():\n"
        "    from dynprobe.io.models import build_model\n"
        "    from dynprobe.io.spec import Spec\n"
        "    net = build_model(Spec('builtin:mlp', {'inputs': 64, 'width': 8, 'depth': 2, 'classes': 10}))\n"
        "    net.forward = lambda inputs: 1 / 0\n"
        "    return net\n"
    )
    command = (*SMALL, "--model", "net.py:broken", "--steps", "0,1")
    code, _, err = dynprobe(capsys, *command)
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
    assert dynprobe(capsys, *command, "--dry-run")[0] == 0


@pytest.mark.parametrize("options", [("--workers", "0"), ("--batch-size", "0"), ("--shard", "²/3")])
def test_numbers_that_mean_nothing_are_usage_errors(folder, capsys, options):
    code, out, _ = dynprobe(capsys, *SMALL, *options)
    assert (code, out) == (2, "")


def test_a_file_damaged_after_it_was_measured_is_a_failure_but_its_numbers_stay_in_the_report(folder, capsys):
    assert dynprobe(capsys, *NORM)[0] == 0
    before = read_report(folder / "dynprobe-run.h5")["weight-norm"]["norm"]
    victim = folder / "run" / "step_50.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    code, out, _ = dynprobe(capsys, *NORM)
    assert code == 1
    assert "failed" in out
    np.testing.assert_array_equal(read_report(folder / "dynprobe-run.h5")["weight-norm"]["norm"], before)
