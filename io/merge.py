"""Shards of one analysis, and reports of different analyzers, put together into one report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynprobe.analyzers.core.result import Piece, Result, stack
from dynprobe.io.errors import InputError
from dynprobe.io.join import PER_RUN, Part, joined, once, relative_folders, shared_facts
from dynprobe.io.names import shortlist
from dynprobe.io.report import read_report, write_results

MAY_DIFFER = frozenset(
    {
        *("index", "shard", "shards", "missing_shards", "merged", "command", "created"),
        *("device", "platform", "batch_size", "threads", "python_version", "numpy_version"),
        *("folders", "earlier_commands", *PER_RUN),
    }
)
"""Provenance that shards of one analysis need not share: it does not decide the numbers, or goes by run."""

JOINED = frozenset({"index", "shard", "shards", "missing_shards", "merged", "folders", "earlier_commands"})
"""Provenance that is made anew; of the other that differs, all values are kept."""


def merge_reports(
    paths: Sequence[Path],
    output: Path,
    *,
    allow_missing: bool = False,
    finish: Callable[[Result], Result] = lambda result: result,
) -> dict[str, Result]:
    """Merge reports: shards of one analyzer become one result, different analyzers stand side by side.

    A piece that several reports hold is kept once, a finished one rather than a failed one; ordered by run
    and step. Runs of one name in different folders are told apart by longer names.

    Args:
        paths: The reports.
        output: The report to write; what it holds of other analyzers is kept.
        allow_missing: Go on without the shards that are missing, and record them as `missing_shards`.
        finish: Adds the run-level numbers to a result stacked anew.

    Returns:
        The merged results, by analyzer.

    Raises:
        InputError: If options, data, code or counts contradict each other, or a shard is missing.
        DamagedReport: If a report is damaged.
        CannotWrite: If the output cannot be written.
    """
    shares: dict[str, list[tuple[Path, Result]]] = {}
    for path in dict.fromkeys(paths):
        for name, result in read_report(path).items():
            shares.setdefault(name, []).append((path, result))
    if not shares:
        raise InputError("No report was given that holds a result.")
    merged = {name: _merge(name, found, output, allow_missing, finish) for name, found in shares.items()}
    write_results(output, merged)
    return merged


def _merge(
    name: str,
    shares: list[tuple[Path, Result]],
    output: Path,
    allow_missing: bool,
    finish: Callable[[Result], Result],
) -> Result:
    both = joined(_parts(name, shares))
    pieces = sorted(once(both), key=_place)
    attributes = {k: v for k, v in shares[0][1].attributes.items() if k not in MAY_DIFFER}
    for key in sorted(MAY_DIFFER - JOINED - set(PER_RUN)):
        values = [result.attributes[key] for _, result in shares if key in result.attributes]
        distinct = [v for i, v in enumerate(values) if v not in values[:i]]
        if distinct:
            attributes[key] = distinct[0] if len(distinct) == 1 else distinct
    earlier = [text for _, result in shares for text in result.attributes.get("earlier_commands", ())]
    if earlier:
        attributes["earlier_commands"] = list(dict.fromkeys(earlier))
    if both.folders:
        attributes["folders"] = relative_folders(both.folders, output)
    attributes |= shared_facts(both.facts)
    attributes["merged"] = [path.name for path, _ in shares]
    attributes |= _shard_facts(name, shares, len(pieces), allow_missing)
    if len(shares) == 1:  # nothing to stack again: run-level numbers stay
        result = shares[0][1]
        return Result(name, result.grain, result.arrays, {**attributes, "index": result.attributes["index"]})
    if shares[0][1].grain == "group" and len(pieces) > 1:
        raise InputError(
            f"{name}: these reports are about different groups of runs, and a report holds one.",
            "Keep these results in files of their own.",
        )
    return finish(stack(name, shares[0][1].grain, pieces, attributes))


def _parts(name: str, shares: list[tuple[Path, Result]]) -> list[Part]:
    """The reports' pieces; shards of one plan share its run names wherever their files are now.

    Raises:
        InputError: If two of them were not measured alike.
    """
    parts = [Part.of(result, path) for path, result in shares]
    if _sharded(shares):
        folders = {run: folder for part in reversed(parts) for run, folder in part.folders.items()}
        parts = [Part(part.pieces, folders, part.facts) for part in parts]
    for (path, result), part in zip(shares[1:], parts[1:], strict=True):
        _refuse_conflicts(name, shares, (path, result), _of_same_runs(parts[0], part))
    return parts


def _sharded(shares: list[tuple[Path, Result]]) -> bool:
    return any({"shard", "shards"} & set(result.attributes) for _, result in shares)


def _of_same_runs(one: Part, other: Part) -> list[str]:
    """How facts differ that two parts give for one run."""
    known = {one.root(run): facts for run, facts in one.facts.items()}
    return [
        line
        for run, facts in other.facts.items()
        for line in _difference("", known.get(other.root(run), facts), facts)
    ]


def _refuse_conflicts(
    name: str, shares: list[tuple[Path, Result]], share: tuple[Path, Result], lines: list[str]
) -> None:
    (first_path, first), (path, result) = shares[0], share
    free = MAY_DIFFER if _sharded(shares) else MAY_DIFFER | {"planned"}
    known = dict.fromkeys([*first.attributes, *result.attributes])
    lines = [
        *(
            line
            for key in known
            if key not in free
            for line in _difference(key, first.attributes.get(key), result.attributes.get(key))
        ),
        *dict.fromkeys(lines),
    ]
    if lines:
        listing = "\n".join(f"  {line}" for line in lines)
        raise InputError(
            f"{name}: {first_path} and {path} were not measured alike:\n{listing}",
            "Merge only shards of one command, or keep these results in files of their own.",
        )


def _difference(key: str, one: Any, other: Any) -> list[str]:
    if one == other:
        return []
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = dict.fromkeys([*one, *other])
        return [
            line for k in names for line in _difference(f"{key}.{k}".lstrip("."), one.get(k), other.get(k))
        ]
    return [f"{key}: {one} and {other}"]


def _place(piece: Piece) -> list[tuple[int, float, list[tuple[bool, int, str]]]]:
    """Runs in the order of their names, numbers in them as numbers; then by step."""
    labels = sorted(
        (k for k in piece.index if k.startswith(("run", "step"))),
        key=lambda k: (k[-2:] if k[-2] == "_" else "", k),
    )
    return [_sortable(piece.index[k]) for k in labels]


def _sortable(value: Any) -> tuple[int, float, list[tuple[bool, int, str]]]:
    if isinstance(value, (int, float)):
        return 0, value, []
    if value is None:
        return 2, 0, []
    parts = re.split(r"(\d+)", str(value))
    return 1, 0, [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _shard_facts(
    name: str, shares: list[tuple[Path, Result]], n_pieces: int, allow_missing: bool
) -> dict[str, Any]:
    """What is recorded about shards; refuses if one is missing or the counts do not agree.

    Shards are `I/N` with I from 0 to N-1, and each result says in `planned` how many pieces the whole
    plan has, so that also a lost piece of a shard that is there is noticed.
    """
    present: set[str] = set()
    for _, result in shares:
        present |= set(result.attributes.get("shards", ()))
        present |= {str(result.attributes["shard"])} if "shard" in result.attributes else set()
    planned = int(shares[0][1].attributes.get("planned", n_pieces))
    counts = {shard.partition("/")[2] for shard in present}
    if not counts or n_pieces >= planned:
        return {"planned": n_pieces}
    if len(counts) > 1:
        numbers = ", ".join(sorted(counts, key=int))
        raise InputError(f"{name}: these are shards of different divisions (into {numbers}).")
    total = int(counts.pop())
    missing = [f"{i}/{total}" for i in range(total) if f"{i}/{total}" not in present]
    if not allow_missing:
        what = (
            f"shard {shortlist(missing)} is missing"
            if missing
            else "every shard is there, but pieces are not"
        )
        raise InputError(
            f"{name}: {what}: {n_pieces} of {planned} pieces.",
            "Give its report too (run it again if it failed), or go on without it with --allow-missing.",
        )
    return {"shards": sorted(present), "missing_shards": missing}
