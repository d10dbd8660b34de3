"""Saved activations in place of runs: `dynprobe cka a.npy b.npy`."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.cli.setup import PreparedRun, SharedData, Specs
from dynprobe.io.errors import InputError
from dynprobe.io.manifest import Manifest
from dynprobe.io.run_specs import run_labels
from dynprobe.io.selection import select_steps

if TYPE_CHECKING:
    from dynprobe.cli.request import Request

SUFFIXES = (".npy", ".npz", ".h5", ".hdf5", ".safetensors")
OF_NETWORKS = ("model", "model_arg", "data", "data_arg", "samples")
"""Options that say how a network is run: with saved activations alone they would mean nothing."""


def told_apart(request: Request) -> tuple[list[str], list[Path]]:
    """What was typed, as runs of checkpoints and as files of saved activations.

    Raises:
        InputError: If an option was given that what was typed has no use for.
    """
    from dynprobe.io.saved_activations import is_saved

    runs: list[str] = []
    files: list[Path] = []
    for typed in request.runs:
        paths = [typed]
        if glob.has_magic(typed) and not Path(typed).exists():
            paths = sorted(glob.glob(typed, recursive=True))  # noqa: PTH207 (the pattern may be absolute)
        elif Path(typed).is_dir():
            paths = _saved_in(Path(typed)) or [typed]
        found = [p for p in map(Path, paths) if p.is_file() and is_saved(p, transpose=request.transpose)]
        files += found
        runs += [p for p in paths if Path(p) not in found] if found else [typed]
    if request.transpose and not files:
        raise InputError(
            "--transpose is about saved activations, and none are given.",
            "Networks are recorded as (n_samples, n_features).",
        )
    useless = [name for name in OF_NETWORKS if getattr(request, name)]
    if files and not runs and useless:
        raise InputError(
            f"--{useless[0].replace('_', '-')} says how a network is run, and saved activations need none.",
            "Leave it out, or give a folder of checkpoints.",
        )
    return runs, files


def _saved_in(folder: Path) -> list[str]:
    """The files of a folder that holds saved activations and nothing else, as `--keep-activations` writes."""
    from dynprobe.io.saved_activations import is_saved

    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    try:
        return [str(p) for p in files] if files and all(map(is_saved, files)) else []
    except InputError:  # a report among checkpoints
        return []


def prepare_saved(request: Request, files: Sequence[Path], shared: SharedData) -> list[PreparedRun]:
    """A run of one checkpoint for every file; files that were kept of one run are one run again."""
    from dynprobe.io.saved_activations import SavedActivations

    runs: dict[str, list[SavedActivations]] = {}
    for path, label in zip(files, run_labels(list(files)), strict=True):
        checkpoint = SavedActivations(path, transpose=request.transpose)
        if checkpoint.run == path.stem:  # else the file says of which run it is
            checkpoint.run = label
        runs.setdefault(checkpoint.run, []).append(checkpoint)
    prepared = []
    for label, checkpoints in runs.items():
        checkpoints.sort(key=lambda c: (c.step is None, c.step or 0))
        specs = Specs(label, Manifest(), None, None, None, None)
        steps = [c.step for c in checkpoints]
        chosen = [0] if steps == [None] else select_steps(request.steps, steps, label)
        run = Run(label, checkpoints, _setup(request, shared))
        prepared.append(PreparedRun(run, [checkpoints[i] for i in chosen], [], [], specs, shared))
    return prepared


def _setup(request: Request, shared: SharedData) -> Setup:
    def facts(_needs: Sequence[str]) -> Mapping[str, Any]:
        return {"saved": "transposed" if request.transpose else "as saved"}

    return Setup(
        make_model=_no("a model"),
        fit=_no("a model"),
        make_batches=_no("data"),
        make_test_batches=_no("data"),
        make_loss=_no("a loss"),
        open_other=_no("other checkpoints"),
        device=shared.device,
        dtype=shared.dtype,
        facts=facts,
        has_model=False,
        saved=True,
    )


def _no(what: str) -> Any:
    def refuse(*_arguments: Any) -> NoReturn:
        raise InputError(
            f"saved activations come without {what}, which what was asked for needs.",
            "Give a folder of checkpoints, or leave that option out.",
        )

    return refuse
