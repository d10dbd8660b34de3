"""The wheel holds what the tree holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("cli", "analyzers", "io")


def test_the_wheel_holds_every_module_of_the_tree_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (*PARTS, "_pkg"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tree,
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("dynprobe/")}
    expected = {f"dynprobe/{p.relative_to(ROOT)}" for part in PARTS for p in (ROOT / part).rglob("*.py")}
    expected |= {f"dynprobe/{p.name}" for p in (ROOT / "_pkg").iterdir() if p.is_file()}
    assert inside == expected
