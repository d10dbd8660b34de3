"""Judges inputs: the nearest correction, the nearest stable one, a box around it, and where it holds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from dynprobe.analyzers._corrections_boxes import (
    ReportedBox,
    holds,
    overlap,
    polygon_holds,
    sample_box,
    sample_polygon,
)
from dynprobe.analyzers._corrections_columns import Columns
from dynprobe.analyzers._corrections_features import FeatureTable
from dynprobe.analyzers._corrections_model import Classifier
from dynprobe.analyzers._corrections_record import NAN, PADDING, Record
from dynprobe.analyzers._corrections_search import Found, Way, is_too_large, nearest
from dynprobe.analyzers._corrections_ways import Rules, domain, inputs_of, shown_of, units_of, ways_of
from dynprobe.analyzers.numerics.largest_box import largest_box
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.linear_bounds import bound
from dynprobe.analyzers.numerics.verified_polygon import largest_polygon

# Parts of the budget after which each stage ends; what one does not need is left to the next.
_SCREENING, _NEAREST, _STABLE, _BOX, _SAMPLED = 0.1, 0.25, 0.65, 0.9, 1.0
_GROWN = 0.1  # of the budget, for a polygon
_ELSEWHERE = 0.1  # of the budget, for each question whether a box holds at another checkpoint

_ROOM = 0.99
"""Of the margin that is searched for, what a box must have in the rounded numbers of the report."""

MAP_SIZE = 81
"""Points along each axis of the map of the decision in two features."""


@dataclass(frozen=True)
class Settings:
    """How hard to try, and what to report.

    Args:
        budget: Seconds for one judgement.
        tolerance: Relative gap below which a distance is optimal.
        slack: Part of the stability that the box need not have around the correction.
        shape: `box`, or `polygon` where two features change.
        n_sampled: Points of every box to be tried in the model's own dtype.
        seed: Of heuristics and sampling.
    """

    budget: float
    tolerance: float
    slack: float
    shape: Literal["box", "polygon"]
    n_sampled: int
    seed: int


@dataclass(frozen=True)
class Before:
    """What the checkpoint before said about the same input."""

    nearest: Floats
    nearest_target: int
    corrected: Floats
    box: ReportedBox
    target: int


@dataclass(frozen=True)
class Judge:
    """Judges inputs at one checkpoint.

    Args:
        classifier: The checkpoint's network.
        rules: What may change.
        settings: How hard to try.
        others: Networks on which the boxes are tried too, each with the margin for its own rounding error.
    """

    classifier: Classifier
    rules: Rules
    settings: Settings
    others: Sequence[tuple[Classifier, float] | None] = ()

    @property
    def _table(self) -> FeatureTable:
        return self.rules.table

    @property
    def _verified(self) -> float:
        return _ROOM * self.rules.margin

    @property
    def _grace(self) -> float:
        """Seconds for what must come after a search has used its time."""
        return max(0.3, 0.1 * self.settings.budget)

    @cached_property
    def columns(self) -> Columns:
        """What is reported of an input."""
        return Columns.of(self._table)

    def __call__(self, point: Floats, decided: int, targets: Sequence[int], before: Before | None) -> Record:
        """All about one judged input (n_inputs,).

        Args:
            point: The input.
            decided: Class the model decides for.
            targets: Classes of which one is to be decided.
            before: What the checkpoint before said, or None.
        """
        start = time.monotonic()
        record = Record(self.columns.shown(point), decided, margin=self.rules.margin)
        record.allowed_low, record.allowed_high = self._allowed(point)
        if before is not None and before.box.is_known:
            record.previous_holds = self._holds_here(point, before.box, before.target)
        if decided in targets:
            record.outcome = record.nearest_outcome = "already_target"
            record.target = decided
            return record
        if len(targets) == 1:
            record.target = targets[0]
        until = start + _SCREENING * self.settings.budget
        ways = ways_of(self.rules, self.classifier, point, targets, deadline=until)
        # a point that changes fewer features is one that changes more of them by nothing
        widest = [way for way in ways if way.is_widest]
        closest = self._nearest(widest, before, start, stable=False, floor=0.0)
        stable = closest
        if any(way.is_stable for way in ways):
            stable = self._nearest(ways, before, start, stable=True, floor=closest.lower, known=closest)
            if stable.upper < closest.upper:  # what is stable is a correction, and was not found in less time
                closest = replace(stable, lower=closest.lower)
        self._tell_nearest(record, closest)
        self._tell_stable(record, stable)
        fewest = min(ways, key=lambda way: len(way.columns))
        if record.outcome == "timeout" and fewest.is_stable and is_too_large(fewest.judgement):
            record.outcome = "unsupported"
            record.notes.append(
                "nothing stable can be verified: too many features change for a network of this size; choose "
                "fewer with --features or --max-changed, or --stability 0"
            )
        if stable.way is not None and stable.centre is not None and record.outcome != "timeout":
            self._add_box(record, stable.way, stable.centre, start)
        box = ReportedBox(record.box_low, record.box_high)
        if before is not None:
            record.overlap = overlap(box, before.box)
        shown = stable.way or closest.way or (ways[0] if len(ways) == 1 else None)
        self._add_map(record, shown)
        if self.others:
            record.transfer = np.array([self._holds_at(other, point, box, record) for other in self.others])
        return record

    def _allowed(self, point: Floats) -> tuple[Floats, Floats]:
        """The allowed range of every reported column for one input; categories are 0 or 1."""
        low, high = domain(self._table, point)
        n_more = len(self.columns.names) - len(low)
        return np.concatenate([low, np.zeros(n_more)]), np.concatenate([high, np.ones(n_more)])

    # The search

    def _nearest(
        self,
        ways: list[Way],
        before: Before | None,
        start: float,
        *,
        stable: bool,
        floor: float,
        known: Found | None = None,
    ) -> Found:
        settings = self.settings
        # where nothing is asked of the surroundings the first search is the only one
        share = _NEAREST if not stable and any(way.is_stable for way in ways) else _STABLE
        seeds = list(_seeds(self._table, self.columns, ways, before, stable=stable))
        if known is not None and known.way is not None and known.centre is not None:
            seeds.append((known.way, known.centre))
        if known is not None and known.way is None and known.lower == math.inf:
            return known  # where no point is a correction no stable one exists
        return nearest(
            ways,
            stable=stable,
            deadline=start + settings.budget * share,
            tolerance=settings.tolerance,
            seed=settings.seed,
            seeds=seeds,
            floor=floor,
        )

    def _tell_nearest(self, record: Record, found: Found) -> None:
        record.nearest_outcome = self._outcome(found)
        record.lower_bound = NAN if found.lower == math.inf else found.lower
        if found.way is None or found.centre is None:
            return
        point, shown = self._point(found.way, found.centre)
        if not self._confirmed(record, point, found.way.target):
            record.nearest_outcome = "timeout"
            return
        record.distance, record.nearest = found.upper, shown
        record.nearest_target = record.target = found.way.target

    def _tell_stable(self, record: Record, found: Found) -> None:
        record.outcome = self._outcome(found)
        record.stable_lower_bound = NAN if found.lower == math.inf else found.lower
        record.solver, record.n_boxes = found.solver, float(found.n_boxes)
        if found.way is None or found.centre is None:
            return
        point, shown = self._point(found.way, found.centre)
        if not self._confirmed(record, point, found.way.target):
            record.outcome = "timeout"
            return
        record.stable_distance, record.corrected, record.target = found.upper, shown, found.way.target
        record.changed = self._changed(found.way, record.value)
        k = found.way.judgement.n_features
        if is_too_large(found.way.judgement):
            return
        whole = bound(found.way.judgement.network, np.zeros((k, 1)), np.ones((k, 1)))
        record.n_unstable = float(whole.n_unstable[0])

    def _outcome(self, found: Found) -> str:
        return found.outcome(self.settings.tolerance, smooth=self.classifier.network.is_smooth)

    def _confirmed(self, record: Record, point: Floats, target: int) -> bool:
        """Whether the model itself, in its own dtype, decides for the target at a correction."""
        confirmed = int(self.classifier.decides(point[None])[0]) == target
        if not confirmed:
            record.notes.append(
                "a correction of the analysed layers was not confirmed by the model in its own dtype, "
                "and is left out"
            )
        return confirmed

    def _point(self, way: Way, units: Floats) -> tuple[Floats, Floats]:
        """A correction as an input and in the features' own units; what does not change keeps its bits."""
        table, changing = self._table, list(way.columns)
        values = shown_of(table, way, units)
        values = np.where(table.integer[changing], np.round(values), values)
        still = units == way.judgement.start
        point = way.point.copy()
        index = table.index[changing]
        point[index] = np.where(still, point[index], inputs_of(table, changing, values))
        shown = self.columns.shown(way.point)
        shown[changing] = np.where(still, shown[changing], values)
        return point, shown

    def _changed(self, way: Way, value: Floats) -> Floats:
        """1 for features that this correction may change, and for columns of a category that differs."""
        changed: Floats = np.asarray(self.columns.shown(way.point) != value, np.float64)
        changed[list(way.columns)] = 1.0
        return changed

    # The box

    def _add_box(self, record: Record, way: Way, centre: Floats, start: float) -> None:
        settings, judgement = self.settings, way.judgement
        if is_too_large(judgement):
            record.notes.append(
                "no box was searched around some corrections: too many features change for a network of "
                "this size; choose fewer with --features or --max-changed"
            )
            return
        deadline = start + settings.budget * _BOX
        around = judgement.radius * (1 - settings.slack)
        if judgement.spacing is not None:  # faces of the box are whole numbers too
            steps = np.floor(around / judgement.step + judgement.slack)
            around = np.where(judgement.whole, steps * judgement.step, around)
        inner_low = np.maximum(centre - around, judgement.low)
        inner_high = np.minimum(centre + around, judgement.high)
        found = largest_box(judgement, centre, inner_low, inner_high, deadline=deadline, tolerance=0.05)
        box = self._reported(way, found.low, found.high)
        checked = holds(
            self.classifier, self.columns, way.point, box, way.target, self._verified, deadline + self._grace
        )
        if not checked.holds:
            record.notes.append(
                "a box was left out: time ran out before it was verified as reported; raise --budget"
                if checked.holds is None
                else "a box was left out: rounding to the features' units has put it outside"
            )
            return
        record.box_low, record.box_high = box.low, box.high
        sides = judgement.high - judgement.low
        reach = float(np.prod(sides[sides > 0]))  # what directions leave of the allowed ranges
        if found.volume > 0 or (found.low == found.high).any():  # else too small for a number
            record.volume, record.volume_bound = reach * found.volume, reach * found.volume_bound
        has_area = judgement.n_features == 2 and bool((judgement.low < judgement.high).all())
        if settings.shape == "polygon" and has_area:
            # its bound is seldom within the tolerance, and more time then finds little more
            until = min(deadline, time.monotonic()) + max(self._grace, _GROWN * settings.budget)
            polygon = largest_polygon(
                judgement, centre, found.low, found.high, deadline=until, tolerance=0.05
            )
            vertices = np.stack([shown_of(self._table, way, vertex) for vertex in polygon.vertices])
            shape = self.classifier, self.columns, way.point, way.columns, vertices, way.target
            if polygon_holds(*shape, self._verified, until + self._grace).holds:
                record.polygon = vertices[:PADDING]
                record.volume, record.volume_bound = reach * polygon.area, reach * polygon.area_bound
                tried, failed = sample_polygon(
                    *shape, settings.n_sampled, settings.seed, until + 2 * self._grace
                )
                record.n_sampled, record.sampled_failures = float(tried), float(failed)
            else:
                record.notes.append("a polygon was left out: it was not verified as reported")
        tried, failed = sample_box(
            self.classifier,
            self.columns,
            way.point,
            box,
            way.target,
            settings.n_sampled,
            settings.seed,
            start + settings.budget * _SAMPLED + self._grace,
        )
        record.n_sampled = np.nan_to_num(record.n_sampled) + float(tried)
        record.sampled_failures = np.nan_to_num(record.sampled_failures) + float(failed)

    def _reported(self, way: Way, low: Floats, high: Floats) -> ReportedBox:
        own = self.columns.shown(way.point)
        corners = []
        for corner in (low, high):
            values = own.copy()
            changing = list(way.columns)
            shown = shown_of(self._table, way, corner)
            values[changing] = np.where(self._table.integer[changing], np.round(shown), shown)
            corners.append(values)
        return ReportedBox(corners[0], corners[1])

    def _add_map(self, record: Record, way: Way | None) -> None:
        """The margin over two features, for the picture."""
        if way is None or len(way.columns) != 2:
            return
        table, columns = self._table, list(way.columns)
        low, high = domain(table, way.point)
        low, high = low[columns], high[columns]
        axis = np.linspace(0, 1, MAP_SIZE)
        grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
        index = table.index[columns].tolist()
        network = self.classifier.margins(way.target).restricted(
            way.point, index, inputs_of(table, columns, low), inputs_of(table, columns, high)
        )
        record.margin_map = network(grid).min(1).reshape(MAP_SIZE, MAP_SIZE)

    # Elsewhere

    def _holds_here(self, point: Floats, box: ReportedBox, target: int) -> float:
        return self._answer(self.classifier, point, box, target, self._verified)

    def _holds_at(
        self, other: tuple[Classifier, float] | None, point: Floats, box: ReportedBox, record: Record
    ) -> float:
        if other is None or not box.is_known:
            return NAN
        classifier, margin = other
        return self._answer(classifier, point, box, record.target, _ROOM * margin)

    def _answer(
        self, classifier: Classifier, point: Floats, box: ReportedBox, target: int, margin: float
    ) -> float:
        deadline = time.monotonic() + _ELSEWHERE * self.settings.budget
        verdict = holds(classifier, self.columns, point, box, target, margin, deadline)
        return NAN if verdict.holds is None else float(verdict.holds)


def _seeds(
    table: FeatureTable, columns: Columns, ways: Sequence[Way], before: Before | None, *, stable: bool
) -> list[tuple[Way, Floats]]:
    """The correction of the checkpoint before, for the first way that can make it."""
    if before is None:
        return []
    values = before.corrected if stable else before.nearest
    target = before.target if stable else before.nearest_target
    if not np.isfinite(values).all():
        return []
    for way in ways:
        own = columns.shown(way.point)
        others = np.ones(len(own), bool)
        others[list(way.columns)] = False
        if way.target == target and (own[others] == values[others]).all():
            units = units_of(table, way, values[list(way.columns)])
            return [(way, np.clip(units, way.judgement.low, way.judgement.high))]
    return []
