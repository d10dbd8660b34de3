"""Documentation that cannot lie: the reference is generated, examples run, links resolve."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dynprobe.analyzers.core import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def modules() -> list[str]:
    return sorted(
        "dynprobe." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in ("cli", "analyzers", "io")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__main__"
    )


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_reference_is_what_help_prints_today():
    command = [
        sys.executable,
        "-c",
        "import runpy; print(runpy.run_path('docs/make_reference.py')['reference']())",
    ]
    now = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs" / "reference.md").read_text().strip() == now.strip(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_resolve(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "name", [n for n, e in registry.listing().items() if e.origin.startswith("dynprobe.")]
)
def test_every_analyzer_has_a_page(name):
    page = ROOT / "docs" / f"{name}.md"
    assert page.exists()
    declaration = registry.load(name)
    text = page.read_text()
    for option in declaration.options:
        if option.name != "seed":
            assert f"--{option.name.replace('_', '-')}" in text, f"{page.name} does not mention {option.name}"


def examples(page: Path) -> list[str]:
    """The commands of a page's ```console blocks: lines after `$ `, with their continuations."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.S):
        joined = block.replace("\\\n", " ")
        found += [line[2:] for line in joined.splitlines() if line.startswith("$ dynprobe")]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_examples_of_the_pages_run_as_printed(page, tmp_path):
    (tmp_path / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    environment = ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in examples(page):
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
        for word in shlex.split(command, comments=True):
            if word.endswith((".png", ".pdf", ".svg", ".html", ".h5", ".vts")) and "-o" in command:
                assert word.startswith("docs/") or (tmp_path / word).exists() or "merge" in command, word
