"""Who may import whom, and what a quick command may not wait for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules a file imports; those under `if TYPE_CHECKING` do not count."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(a.name for a in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.add(child.module)
            if not (top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
                walk(child)

    walk(ast.parse(path.read_text()))
    return found


def starting_with(names: set[str], *prefixes: str) -> list[str]:
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in prefixes))


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("analyzers"), ids=lambda p: str(p.relative_to(ROOT)))
def test_an_analyzer_never_touches_files_or_screens(path):
    assert not starting_with(imports(path), "dynprobe.io", "dynprobe.cli", "h5py", "typer", "rich")
    assert not starting_with(imports(path, top_level_only=True), "matplotlib")


@pytest.mark.parametrize("path", sources("analyzers/numerics"), ids=lambda p: p.name)
def test_the_numerics_could_be_lifted_out_whole(path):
    ours = starting_with(imports(path), "dynprobe")
    assert not [n for n in ours if not n.startswith("dynprobe.analyzers.numerics")]


@pytest.mark.parametrize("path", sources("io"), ids=lambda p: str(p.relative_to(ROOT)))
def test_io_knows_of_the_analyzers_only_what_a_result_is(path):
    assert not starting_with(imports(path), "dynprobe.cli")
    assert not [
        n for n in starting_with(imports(path), "dynprobe.analyzers") if n != "dynprobe.analyzers.core.result"
    ]


@pytest.mark.parametrize("path", [p for f in ("analyzers", "io", "cli") for p in sources(f)], ids=str)
def test_nothing_is_imported_by_the_bare_name_of_a_folder(path):
    """`import analyzers` from the repository's root would load every module a second time."""
    assert not starting_with(imports(path), "analyzers", "cli")
    assert not [n for n in imports(path) if n.startswith("io.")]


def loaded_after(*argv: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a command."""
    code = (
        "import sys; sys.argv = ['dynprobe', *sys.argv[1:]]\n"
        "from dynprobe.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print('LOADED', *{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["analyzers"], ["report", "--help"], ["inspect", "--help"]]
)
def test_help_does_not_wait_for_torch(argv):
    assert not loaded_after(*argv) & {"torch", "scipy", "matplotlib", "h5py"}
