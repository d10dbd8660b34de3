"""Pieces of several reports side by side: one label for one run, each piece once, facts by run."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynprobe.analyzers.core.result import FAILED, INCOMPLETE, Piece, Result, unstack
from dynprobe.io.run_specs import run_labels

EACH = "of each run"
"""Key of a fact that the runs of a result do not share; below it stand the values by run."""

PER_RUN = ("measured_on", "data", "n_samples", "n_samples_of", "n_classes")
"""Attributes that may differ between the runs of one result."""

HALVES = ("", "_a", "_b")


@dataclass(frozen=True)
class Part:
    """Pieces of one report or call, with what tells its runs from those of another.

    Args:
        pieces: The pieces.
        folders: The folder of each run by label; a run without one is told by its label alone.
        facts: `PER_RUN` attributes by run.
    """

    pieces: Sequence[Piece]
    folders: Mapping[str, Path]
    facts: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, result: Result, report: Path, pieces: Sequence[Piece] | None = None) -> Part:
        """A result that stands, or is to stand, in the report at this path."""
        base = Path(os.path.realpath(report)).parent
        names = result.attributes.get("folders", {})
        folders = {run: Path(os.path.normpath(base / folder)) for run, folder in names.items()}
        found = unstack(result) if pieces is None else pieces
        return cls(found, folders, facts_by_run(result.attributes, runs_of(result)))

    def root(self, run: str) -> Path:
        """What tells a run from others: its folder, else its label."""
        return self.folders.get(run, Path(run))

    def place(self, piece: Piece) -> tuple[Any, ...]:
        """What tells a piece from others, whatever its run is called and however its path was typed."""
        found: list[Any] = []
        for half in HALVES:
            if (run := piece.index.get(f"run{half}")) is not None:
                path, step = (piece.index.get(f"{n}{half}") for n in ("path", "step"))
                found += [self.file(str(run), str(path)) if path else (self.root(str(run)), step)]
        return tuple(found) or tuple(piece.index.items())

    def file(self, run: str, path: str) -> Path:
        """A checkpoint's file, from the folder of its run and the path that was typed."""
        folder = self.folders.get(run)
        parts = [part for part in Path(path).parts if part not in (os.sep, ".", "..")]
        if folder is None:
            return Path(path)
        if not parts or folder.name == parts[-1]:  # the run is this one file or folder
            return folder
        below = parts[parts.index(folder.name) + 1 :] if folder.name in parts else parts
        return folder.joinpath(*below)


def joined(parts: Sequence[Part]) -> Part:
    """All pieces of several parts, with runs relabelled where two share a label or one has two.

    The pieces stay what they are; `once` and `kept_beside` decide which of them go.
    """
    names = _names(parts)
    pieces: list[Piece] = []
    folders: dict[str, Path] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for part in parts:
        new = {run: names[owner(part.root(run), names)] for run in _runs(part)}
        pieces += [_relabelled(piece, new) for piece in part.pieces]
        folders |= {new[run]: owner(folder, names) for run, folder in part.folders.items()}
        facts |= {new[run]: of_run for run, of_run in part.facts.items()}
    return Part(pieces, folders, facts)


def owner(root: Path, known: Collection[Path]) -> Path:
    """The run that a run belongs to: itself, or, named as a single file, the one of its folder."""
    return root.parent if root.parent in known else root


def _runs(part: Part) -> list[str]:
    labels = [str(p.index[f"run{h}"]) for p in part.pieces for h in HALVES if f"run{h}" in p.index]
    return list(dict.fromkeys([*labels, *part.folders, *part.facts]))


def _names(parts: Sequence[Part]) -> dict[Path, str]:
    """A label for each run: the first it had, unless another run has that too."""
    first: dict[Path, str] = {}
    for part in parts:
        for run in _runs(part):
            first.setdefault(part.root(run), run)
    first = {root: label for root, label in first.items() if owner(root, first) == root}
    labels = list(first.values())
    longer = dict(zip(first, run_labels(list(first)), strict=True))
    return {root: longer[root] if labels.count(label) > 1 else label for root, label in first.items()}


def _relabelled(piece: Piece, names: Mapping[str, str]) -> Piece:
    runs = {n: names.get(str(v), v) for n, v in piece.index.items() if n in {f"run{h}" for h in HALVES}}
    if all(piece.index[n] == run for n, run in runs.items()):
        return piece
    arrays = dict(piece.arrays)
    if (owners := arrays.get("checkpoint_run")) is not None:
        values = np.array([names.get(str(v), v) for v in owners.values.tolist()], dtype=object)
        arrays["checkpoint_run"] = replace(owners, values=values)
    return replace(piece, index={**piece.index, **runs}, arrays=arrays)


def kept_beside(older: Part, new: Part) -> list[Piece]:
    """The older pieces that new ones do not replace.

    Replaced is what was measured on the same file, and what has the same content at a place that is
    gone: its folder was renamed. A copy that is still there is a checkpoint of its own.
    """
    places = {new.place(piece) for piece in new.pieces}
    keys = {piece.key for piece in new.pieces if piece.key}

    def moved(piece: Piece) -> bool:
        files = [f for f in older.place(piece) if isinstance(f, Path) and f.is_absolute()]
        return piece.key in keys and bool(files) and not all(file.exists() for file in files)

    return [p for p in older.pieces if older.place(p) not in places and not moved(p)]


def once(part: Part) -> list[Piece]:
    """Each piece once; a failed one only where no other was measured in its place.

    One content under several labels (an alias, two seeds that start alike) is several pieces.
    """
    kept: dict[Any, Piece] = {}
    for piece in sorted(part.pieces, key=lambda p: (FAILED, INCOMPLETE).count(p.status)):
        kept.setdefault((piece.key, part.place(piece)), piece)
    good = {place for (_, place), piece in kept.items() if piece.status != FAILED}
    return [p for (_, place), p in kept.items() if p.status != FAILED or place not in good]


def relative_folders(folders: Mapping[str, Path], report: Path) -> dict[str, str]:
    """Folders of runs as a report keeps them: relative to its own, so that both can be moved together."""
    base = Path(os.path.realpath(report)).parent
    return {run: os.path.relpath(folder, base) for run, folder in folders.items()}


def run_folder(run: str, path: Path) -> Path:
    """The folder (or file) that a run's label was made from, given one of its checkpoints."""
    ending = tuple(run.split("/"))
    for absolute in (path.resolve(), path.absolute()):
        for folder in (absolute, *absolute.parents):
            if folder.parts[-len(ending) :] == ending:
                return folder
    return path.resolve().parent


def runs_of(result: Result) -> list[str]:
    """Labels of the runs that a result speaks of."""
    columns = [result[n] for n in ("run", "run_a", "run_b") if n in result]
    named = [str(run) for column in columns for run in np.atleast_1d(column).tolist()]
    return list(dict.fromkeys([*named, *result.attributes.get("folders", ())])) or [""]


def facts_by_run(attributes: Mapping[str, Any], runs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The `PER_RUN` attributes of a result, by run."""
    facts: dict[str, dict[str, Any]] = {run: {} for run in runs}
    for name in PER_RUN:
        if name in attributes:
            value = attributes[name]
            each = (
                value[EACH] if isinstance(value, Mapping) and EACH in value else dict.fromkeys(facts, value)
            )
            for run, own in each.items():
                facts.setdefault(run, {})[name] = own
    return facts


def shared_facts(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Facts by run as attributes: the value where all runs share it, by run otherwise."""
    attributes: dict[str, Any] = {}
    for name in PER_RUN:
        values = {run: of_run[name] for run, of_run in facts.items() if name in of_run}
        if not values:
            continue
        first = next(iter(values.values()))
        same = len(values) == len(facts) and all(value == first for value in values.values())
        attributes[name] = first if same else {EACH: values}
    return attributes
