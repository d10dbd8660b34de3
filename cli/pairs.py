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

if TYPE_CHECKING:
    from dynprobe.analyzers.core.workspace import Workspace
    from dynprobe.cli.request import Request

Place = tuple[PreparedRun, Any]


def pair_units(declaration: Declaration, prepared: list[PreparedRun], request: Request) -> list[Unit]:
    """The pairs of a call, in order.

    Raises:
        InputError: If there is none, or `--against` or `--group` names what is not there.
    """
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
            f"{declaration.name} compares checkpoints, and `--pairs {request.pairs}` finds no two among "
            "those given.",
            "The runs have no step in common (see `dynprobe inspect`); --steps last takes the last of each."
            if len(prepared) > 1
            else "Give two runs, or a run with at least two checkpoints (see `dynprobe inspect`).",
        )
    return units


def _meant(declaration: Declaration, prepared: Sequence[PreparedRun], how: str) -> str:
    """What `auto` stands for."""
    if how != "auto":
        return how
    if any(p.run.setup.saved and len(p.chosen) == 1 for p in prepared):
        return "across"
    alone = all(len(p.chosen) == 1 for p in prepared)
    if len(prepared) > 1:
        return "across" if alone else "same-step"  # one of each run: whatever the steps
    return "self" if alone and declaration.wants("activations") else "consecutive"


def _pairs(places: list[list[Place]], how: str) -> Iterator[tuple[Place, Place]]:
    if how == "same-step":
        for one, other in itertools.combinations(places, 2):
            by_step = {c.step: (p, c) for p, c in other}
            yield from (((p, c), by_step[c.step]) for p, c in one if c.step in by_step)
    elif how == "across" and len(places) > 1:
        for one, other in itertools.combinations(places, 2):
            yield from itertools.product(one, other)
    elif how == "all":
        yield from itertools.combinations([place for run in places for place in run], 2)
    elif how in ("self", "across"):
        yield from ((place, place) for run in places for place in run)
    else:
        for run in places:
            if how == "consecutive":
                yield from itertools.pairwise(run)
            elif run:
                fixed = run[0] if how == "first" else run[-1]
                yield from ((place, fixed) for place in run if place is not fixed)


def _against(
    declaration: Declaration, places: list[list[Place]], request: Request
) -> Iterator[tuple[Place, Place]]:
    """Every checkpoint with the one that `--against` names, in its own run or outside."""
    which = str(request.against)
    if which in ("final", "last", "first"):
        yield from _pairs(places, "first" if which == "first" else "last")
        return
    if all(any(str(c.step) == which for c in p.run.checkpoints) for run in places for p, _c in run[:1]):
        for run in places:
            prepared = run[0][0]
            fixed = next(c for c in prepared.run.checkpoints if str(c.step) == which)
            yield from ((place, (prepared, fixed)) for place in run if place[1] is not fixed)
        return
    if not Path(which).exists():
        steps = ", ".join(str(c.step) for c in places[0][0][0].run.checkpoints)
        raise InputError(
            f"--against {which} is neither a step of every run nor a file.",
            f"Give final, first, a file, or a step: {steps}.",
        )
    other = prepare(replace(request, runs=[which], steps="last", transpose=False), declaration)[0]
    fixed_place = (other, other.chosen[-1])
    known = Path(which).resolve()
    for run in places:
        yield from ((place, fixed_place) for place in run if Path(place[1].path).resolve() != known)


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
