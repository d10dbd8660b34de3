"""Saved activations in place of runs: `dynprobe cka a.npy b.npy`."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.cli.setup import PreparedRun, SharedData, Specs
from dynprobe.io.errors import InputError
from dynprobe.io.manifest import Manifest
from dynprobe.io.run_folders import list_run
from dynprobe.io.run_specs import run_labels
from dynprobe.io.saved_activations import SavedActivations, is_saved
from dynprobe.io.saved_arrays import READERS
from dynprobe.io.selection import select_steps

if TYPE_CHECKING:
    from dynprobe.cli.request import Request

OF_NETWORKS = ("model", "model_arg", "data", "data_arg", "samples", "key", "ema", "step_pattern")
"""Options that say how networks are found and run: with saved activations alone they would mean nothing."""


def told_apart(request: Request) -> list[tuple[list[str], list[Path]]]:
    """What was typed, in its order: stretches of runs of checkpoints and of files of saved activations.

    Raises:
        InputError: If an option was given that what was typed has no use for.
    """
    stretches: list[tuple[list[str], list[Path]]] = []
    for typed in request.runs:
        paths = [typed]
        if glob.has_magic(typed) and not Path(typed).exists():
            paths = sorted(glob.glob(typed, recursive=True))  # noqa: PTH207 (the pattern may be absolute)
        elif Path(typed).is_dir():
            paths = _saved_in(Path(typed), transpose=request.transpose) or [typed]
        files = [p for p in map(Path, paths) if p.is_file() and is_saved(p, transpose=request.transpose)]
        others = [p for p in paths if Path(p) not in files] if files else [typed]
        for runs, found in (([], files), (others, [])):
            last = stretches[-1] if stretches else None
            if not runs and not found:
                continue
            if last is not None and bool(last[1]) == bool(found):
                last[0].extend(runs)
                last[1].extend(found)
            else:
                stretches.append((list(runs), list(found)))
    _check_options(request, stretches)
    return stretches


def _check_options(request: Request, stretches: Sequence[tuple[list[str], list[Path]]]) -> None:
    if request.transpose and not any(files for _runs, files in stretches):
        raise InputError(
            "--transpose is about saved activations, and none are given.",
            "Networks are recorded as (n_samples, n_features).",
        )
    useless = [name for name in OF_NETWORKS if getattr(request, name)]
    if useless and not any(runs for runs, _files in stretches):
        raise InputError(
            f"--{useless[0].replace('_', '-')} says how networks are found and run, and there is none here.",
            "Leave it out, or give a folder of checkpoints.",
        )


def _saved_in(folder: Path, *, transpose: bool) -> list[str]:
    """The files of a folder of saved activations without checkpoints, as `--keep-activations` writes."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in READERS)
    try:
        if not files or not all(is_saved(p, transpose=transpose) for p in files):
            return []
        others = set(list_run(folder).paths) - set(files)
    except InputError:  # a report among checkpoints, or nothing that could be one
        others = set()
    return [] if others else [str(p) for p in files]


def prepare_saved(request: Request, files: Sequence[Path], shared: SharedData) -> list[PreparedRun]:
    """A run of one checkpoint for every file; files that belong to one series are one run.

    A series is what was kept of one run in one folder, or files of one folder whose names differ in nothing
    but their step.

    Raises:
        InputError: If a series has one step twice.
    """
    series: dict[tuple[str, ...], list[SavedActivations]] = {}
    for path in files:
        checkpoint = SavedActivations(path, transpose=request.transpose)
        kept, plain = checkpoint.run != path.stem, _STEP.sub("", path.stem)
        name = checkpoint.run if kept else plain if plain != path.stem else path.name
        series.setdefault((str(path.parent), name), []).append(checkpoint)
    prepared = []
    places = [
        checkpoints[0].path if len(checkpoints) == 1 else Path(*key) for key, checkpoints in series.items()
    ]
    for checkpoints, label in zip(series.values(), run_labels(places), strict=True):
        checkpoints.sort(key=lambda c: (c.step is None, c.step or 0))
        steps = [c.step for c in checkpoints]
        if len(set(steps)) < len(steps):
            raise InputError(
                f"{label}: one step is there twice, as files recorded with other --layers or --maps are.",
                "Name the files that are meant, or keep each recording in a folder of its own.",
            )
        for checkpoint in checkpoints:
            checkpoint.run = label
        specs = Specs(label, Manifest(), None, None, None, None)
        chosen = [0] if len(steps) == 1 else select_steps(request.steps, steps, label)
        run = Run(label, checkpoints, _setup(request, shared))
        prepared.append(PreparedRun(run, [checkpoints[i] for i in chosen], [], [], specs, shared))
    return prepared


_STEP = re.compile(r"[-_.]?(step|epoch|iter(ation)?)[-_=]?\d+", re.IGNORECASE)


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
