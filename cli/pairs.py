"""Which checkpoints an analyzer of pairs compares, and which group of runs each belongs to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.analyzers.core.contract import Declaration
from dynprobe.analyzers.core.loop import Unit, pair_unit
from dynprobe.cli.setup import PreparedRun, prepare
from dynprobe.io.errors import InputError
from dynprobe.io.saved_activations import is_saved

if TYPE_CHECKING:
    from dynprobe.analyzers.core.workspace import Workspace
    from dynprobe.cli.request import Request

Place = tuple[PreparedRun, Any]


def pair_units(declaration: Declaration, prepared: list[PreparedRun], request: Request) -> list[Unit]:
    """The pairs of a call, in order.

    Raises:
        InputError: If there is none, or `--against` or `--group` names what is not there.
    """
    if request.group and request.against is not None:
        raise InputError(
            "--group compares runs with each other, --against compares each with one checkpoint.",
            "Give one of them.",
        )
    labels = group_labels(prepared, request.group)
    places = [[(p, c) for c in p.chosen] for p in prepared]
    if request.against is not None:
        if request.pairs != "auto":
            raise InputError(
                f"--against {request.against} and --pairs {request.pairs} both say what is compared.",
                "Give one of them.",
            )
        pairs = _against(declaration, places, request)
    else:
        pairs = _pairs(places, _meant(declaration, prepared, request.pairs))
    # Two networks in memory are needed only where the function is handed both.
    shared: dict[tuple[int, str], Workspace] | None = None if declaration.wants("model") else {}
    units: list[Unit] = []
    for (a, x), (b, y) in pairs:
        unit = pair_unit(a.run, x, b.run, y, shared)
        if labels:
            unit.index |= {"group_a": labels[a.run.name], "group_b": labels[b.run.name]}
        units.append(unit)
    if not units:
        raise InputError(
            f"{declaration.name} compares checkpoints, and "
            + (f"--against {request.against}" if request.against is not None else f"--pairs {request.pairs}")
            + " finds no two among those given.",
            "The runs have no step in common (see `dynprobe inspect`); --steps last takes the last of each."
            if len(prepared) > 1
            else "Give two runs, or a run with at least two checkpoints (see `dynprobe inspect`).",
        )
    return units


def _meant(declaration: Declaration, prepared: Sequence[PreparedRun], how: str) -> str:
    """What `auto` stands for."""
    if how != "auto":
        return how
    if len(prepared) > 1:
        return "between"
    alone = all(len(p.chosen) == 1 for p in prepared)
    return "self" if alone and declaration.wants("activations") else "consecutive"


def _pairs(places: list[list[Place]], how: str) -> Iterator[tuple[Place, Place]]:
    if how in ("between", "same-step"):
        for one, other in itertools.combinations(places, 2):
            yield from _between(one, other, same_step=how == "same-step")
    elif how == "all":
        yield from itertools.combinations([place for run in places for place in run], 2)
    elif how == "self":
        yield from ((place, place) for run in places for place in run)
    else:
        for run in places:
            if how == "consecutive":
                yield from itertools.pairwise(run)
            elif run:
                fixed = run[0] if how == "first" else run[-1]
                yield from ((place, fixed) for place in run if place is not fixed)


def _between(one: list[Place], other: list[Place], *, same_step: bool) -> Iterator[tuple[Place, Place]]:
    """The same step of two runs; all, where one is a file of saved activations or both are one checkpoint."""
    files = any(run and run[0][0].run.setup.saved and len(run) == 1 for run in (one, other))
    if not same_step and (files or len(one) == len(other) == 1):
        yield from itertools.product(one, other)
        return
    by_step = {c.step: (p, c) for p, c in other}
    yield from (((p, c), by_step[c.step]) for p, c in one if c.step in by_step)


def _against(
    declaration: Declaration, places: list[list[Place]], request: Request
) -> Iterator[tuple[Place, Place]]:
    """Every checkpoint with the one that `--against` names, in its own run or outside."""
    which = str(request.against)
    ends = {"final": -1, "last": -1, "first": 0}
    runs = [run[0][0] for run in places if run]
    steps = [[str(c.step) for c in prepared.run.checkpoints] for prepared in runs]
    if which in ends or all(which in known for known in steps):
        for run, prepared, known in zip([r for r in places if r], runs, steps, strict=True):
            fixed = prepared.run.checkpoints[ends[which] if which in ends else known.index(which)]
            yield from ((place, (prepared, fixed)) for place in run if place[1] is not fixed)
        return
    if not Path(which).exists():
        raise InputError(
            f"--against {which} is neither a step of every run nor a file.",
            f"Give final, first, a file, or a step: {', '.join(steps[0])}.",
        )
    transpose = request.transpose and is_saved(Path(which), transpose=True)
    other = prepare(replace(request, runs=[which], steps="last", transpose=transpose), declaration)[0]
    fixed_place = (other, other.chosen[-1])
    itself = Path(which).resolve()
    for run in places:
        yield from ((place, fixed_place) for place in run if Path(place[1].path).resolve() != itself)


def group_labels(prepared: Sequence[PreparedRun], asked: Sequence[str]) -> dict[str, str]:
    """The group of each run by its name; nothing if no groups were asked for.

    Args:
        prepared: The runs.
        asked: `NAME=GLOB`, several times, or one key of the manifests' `[groups]`.

    Raises:
        InputError: If a run is in no group or in two, or a glob matches none.
    """
    if not asked:
        return {}
    if all("=" in text for text in asked):
        return _by_glob(prepared, [tuple(text.split("=", 1)) for text in asked])
    if len(asked) > 1:
        raise InputError(
            f"--group {' --group '.join(asked)}: give NAME=GLOB for every group, or one key of [groups].",
            "For example --group seed, or --group 'true=runs/true*' --group 'shuffled=runs/shuffled*'.",
        )
    labels = {}
    for each in prepared:
        known = each.run.setup.groups
        if asked[0] not in known:
            raise InputError(
                f"--group {asked[0]}: the manifest of {each.run.name} has no such key under [groups]; "
                f"it has {', '.join(known) or 'none'}.",
                "Give NAME=GLOB for every group instead.",
            )
        labels[each.run.name] = str(known[asked[0]])
    return labels


def _by_glob(prepared: Sequence[PreparedRun], groups: Sequence[tuple[str, ...]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name, patterns in groups:
        for pattern in patterns.split(","):
            found = [p.run.name for p in prepared if _matches(p, pattern)]
            if not found:
                raise InputError(
                    f"--group {name}={pattern} matches none of the runs.",
                    f"They are {', '.join(p.run.name for p in prepared)}; files in one folder are one run.",
                )
            for run in found:
                if labels.setdefault(run, name) != name:
                    raise InputError(f"{run} would be in two groups, {labels[run]} and {name}.")
    if left := [p.run.name for p in prepared if p.run.name not in labels]:
        raise InputError(
            f"{', '.join(left)} would be in no group.", "Put every run into one, or leave it out of the call."
        )
    return labels


def _matches(prepared: PreparedRun, pattern: str) -> bool:
    """Whether a run is meant, by its label or by its folder as typed."""
    pattern = pattern.rstrip("/")
    path = Path(prepared.run.checkpoints[0].path)
    return any(fnmatchcase(text, pattern) for text in (prepared.run.name, str(path), str(path.parent)))
