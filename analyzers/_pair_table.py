"""The pairs of a similarity result as statistics and figures read them: who, when, and layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers.core.result import FAILED, Result

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

Checkpoint = tuple[str, float, str]
"""Its run, its step (−∞ where unknown, which unlike NaN equals itself) and its file."""

CURVE = 3
"""Pairs that make a curve over steps."""
ROUNDING = 1e-6
"""What float32 leaves between similarities that are equal."""


class PairTable:
    """The good pairs of a result with the similarity of the layers of the same name.

    Args:
        result: Of an analyzer of pairs of networks.
        value: Name of its main statistic, of shape (pair, layer_a, layer_b).

    Attributes:
        run_a: Run of the first network of every pair; `run_b` of the second.
        step_a: Its step, NaN where unknown; `step_b` of the second.
        ends: Both checkpoints of every pair.
        layers: Names that both networks have, in the order of the first.
        same: Similarity of the layers of the same name, shape (pair, layer).
    """

    def __init__(self, result: Result, value: str) -> None:
        self.result, self.value = result, value
        self.rows: Rows = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)
        self.run_a, self.run_b = self._text("run_a"), self._text("run_b")
        self.step_a, self.step_b = self._number("step_a"), self._number("step_b")
        self.ends = list(zip(self._checkpoints("a"), self._checkpoints("b"), strict=True))
        layers_a, layers_b = [[str(x) for x in result[name]] for name in ("layer_a", "layer_b")]
        self.layers = [name for name in layers_a if name in set(layers_b)]
        self._at = (
            np.array([layers_a.index(name) for name in self.layers], dtype=np.intp),
            np.array([layers_b.index(name) for name in self.layers], dtype=np.intp),
        )
        self.same = self.of_layers(value)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the call."""
        return dict(self.result.attributes.get("options") or {})

    @property
    def groups(self) -> tuple[NDArray[np.str_], NDArray[np.str_]] | None:
        """The group of either network of every pair, "" where it has none; None without groups."""
        if "group_a" not in self.result or "group_b" not in self.result:
            return None
        a, b = self._text("group_a"), self._text("group_b")
        return (a, b) if (a != "").any() or (b != "").any() else None

    def of_layers(self, name: str) -> Floats:
        """A variable like the main statistic for the layers of the same name, shape (pair, layer)."""
        if name not in self.result:
            return np.full((len(self.rows), len(self.layers)), np.nan)
        values = np.asarray(self.result[name], dtype=np.float64)[self.rows]
        return np.asarray(values[:, self._at[0], self._at[1]], dtype=np.float64)

    def effect(self) -> Floats:
        """What each block of stimuli does, shape (pair, layer, block); NaN where it was not measured."""
        if "block_effect" not in self.result:
            return np.full((len(self.rows), len(self.layers), 1), np.nan)
        values = np.asarray(self.result["block_effect"], dtype=np.float64)[self.rows]
        names = [str(x) for x in self.result["layer"]]
        effect = np.full((len(self.rows), len(self.layers), values.shape[-1]), np.nan)
        for i, layer in enumerate(self.layers):
            if layer in names:
                effect[:, i] = values[:, names.index(layer)]
        return effect

    def runs_in_order(self) -> set[str]:
        """Runs that have one checkpoint a step; several networks side by side are no course of training."""
        files = dict.fromkeys(end for pair in self.ends for end in pair)
        times = Counter((run, step) for run, step, _ in files)
        return {run for run, _ in times} - {run for (run, _), count in times.items() if count > 1}

    def _checkpoints(self, half: str) -> list[Checkpoint]:
        steps = np.nan_to_num(self._number(f"step_{half}"), nan=-np.inf).tolist()
        runs, paths = (self._text(f"{name}_{half}").tolist() for name in ("run", "path"))
        return list(zip(runs, steps, paths, strict=True))

    def _text(self, name: str) -> NDArray[np.str_]:
        if name not in self.result:
            return np.full(len(self.rows), "", dtype=np.str_)
        return np.atleast_1d(self.result[name])[self.rows].astype(np.str_)

    def _number(self, name: str) -> Floats:
        if name not in self.result or self.result[name].dtype.kind not in "iuf":
            return np.full(len(self.rows), np.nan)
        return np.atleast_1d(self.result[name])[self.rows].astype(np.float64)


def most_similar(own: Floats, largest: Floats) -> NDArray[np.bool_]:
    """Whether a similarity is the largest, up to rounding."""
    return np.asarray(own >= largest - ROUNDING * np.abs(largest))


@dataclass(frozen=True)
class Family:
    """Pairs that make a curve over steps.

    Args:
        runs: The run, or the two runs.
        against: What each step is compared with, as the end of a sentence: `with step 1000`.
        rows: Pairs, by step.
        step: Their steps.
    """

    runs: tuple[str, ...]
    against: str
    rows: Rows
    step: Floats


def against_last(table: PairTable) -> list[Family]:
    """Of every run that was compared often enough with its last checkpoint: those pairs."""
    families, in_order = [], table.runs_in_order()
    for name in [run for run in dict.fromkeys(table.run_a.tolist()) if run in in_order]:
        rows = np.flatnonzero((table.run_a == name) & (table.run_b == name) & (table.step_a != table.step_b))
        found = _against(table, rows, (name,), last=True)
        families += [found] if found else []
    return families


def families(table: PairTable) -> tuple[list[Family], bool]:
    """All curves over steps that the pairs make, and whether every pair of two checkpoints is in one."""
    found: list[Family] = []
    in_order = table.runs_in_order()
    apart = np.array([a != b for a, b in table.ends], dtype=bool)
    for runs, rows in _by_runs(table, np.flatnonzero(apart)):
        if not in_order.issuperset(runs):
            continue
        family = (
            _same_step(table, rows, runs)
            or _against(table, rows, runs, last=False)
            or _consecutive(table, rows, runs)
            or _against(table, rows, runs, last=True)
        )
        found += [family] if family else []
    return found, sum(len(family.rows) for family in found) == int(apart.sum())


def _by_runs(table: PairTable, rows: Rows) -> Iterator[tuple[tuple[str, ...], Rows]]:
    names = [tuple(dict.fromkeys((table.run_a[i], table.run_b[i]))) for i in rows]
    for runs in dict.fromkeys(names):
        yield (
            tuple(str(run) for run in runs),
            rows[np.array([name == runs for name in names], dtype=bool)],
        )


def _family(runs: tuple[str, ...], against: str, rows: Rows, step: Floats) -> Family | None:
    """The rows in the order of their steps, one a step; None where they are too few."""
    steps, first = np.unique(step, return_index=True)
    if len(steps) < CURVE or not np.isfinite(steps).all():
        return None
    return Family(runs, against, rows[first], steps)


def _same_step(table: PairTable, rows: Rows, runs: tuple[str, ...]) -> Family | None:
    if (table.step_a[rows] != table.step_b[rows]).any() or len(runs) < 2:
        return None
    return _family(runs, "at the same step", rows, table.step_a[rows])


def _against(table: PairTable, rows: Rows, runs: tuple[str, ...], *, last: bool) -> Family | None:
    """Pairs with one checkpoint in common: the run's last, or whichever all of them have."""
    if not len(rows):
        return None
    a, b = table.step_a[rows], table.step_b[rows]
    if last:
        shared = float(np.max([a, b]))
        kept = (a == shared) | (b == shared)
        rows, a, b = rows[kept], a[kept], b[kept]
    else:
        candidates = [x for x in (b[0], a[0]) if ((a == x) | (b == x)).all()]
        if not candidates:
            return None
        shared = float(candidates[0])
    of = "" if len(runs) < 2 else f" of {runs[-1] if (b == shared).all() else runs[0]}"
    return _family(runs, f"with step {shared:g}{of}", rows, np.where(b == shared, a, b))


def _consecutive(table: PairTable, rows: Rows, runs: tuple[str, ...]) -> Family | None:
    low, high = (f(table.step_a[rows], table.step_b[rows]) for f in (np.minimum, np.maximum))
    order = np.argsort(low, kind="stable")
    if len(runs) > 1 or (high[order][:-1] > low[order][1:]).any():
        return None
    return _family(runs, "with the step before", rows, high)
