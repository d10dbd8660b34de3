"""`dynprobe init`: propose a manifest for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynprobe.cli import errors


def init(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of checkpoints, or one checkpoint.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the proposal; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a dynprobe.toml that is there.")] = False,
) -> None:
    """Write a `dynprobe.toml` proposed from what the run holds: names, shapes, configuration."""
    from dynprobe.io.atomic import write_atomically
    from dynprobe.io.checkpoints import open_runs
    from dynprobe.io.errors import InputError
    from dynprobe.io.manifest import FILE_NAME
    from dynprobe.io.propose import propose_manifest

    path = _folder(run) / FILE_NAME
    if path.exists() and not (force or dry_run):
        raise InputError(
            f"{path} is there already.", "Print a proposal with --dry-run, or replace the file with --force."
        )
    sequences = open_runs([run])
    text = propose_manifest(sequences[0])
    if dry_run:
        print(text, end="")
        return
    write_atomically(path, text.encode())
    errors.note(f"wrote {path}; check it and fill in what is commented out")


def _folder(run: str) -> Path:
    path = Path(run)
    return path if path.is_dir() else path.parent
