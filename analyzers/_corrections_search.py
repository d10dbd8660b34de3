"""The nearest correction over all allowed ways to change an input: a portfolio with one shared best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dynprobe.analyzers.numerics.correction_milp import n_binaries, nearest_by_milp
from dynprobe.analyzers.numerics.correction_problem import Bounds, Judgement, Norm
from dynprobe.analyzers.numerics.interval_bounds import excluded_distance
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.nearest_correction import NearestSearch, nearest_by_heuristic

FEW = 5
"""Features up to which branch and bound is exact in practice; its cost grows exponentially with them."""

_LEAST_FOR_MILP = 3
"""Features from which on a MILP may be the faster one; below, branch and bound always was."""

MAX_BINARIES = 150
"""Neurons of two slopes up to which a MILP is tried before branch and bound."""

SLICE = 0.25
"""Seconds for one way before the next most promising one has its turn."""

TOO_LARGE = 2e9
"""Multiplications for the bounds of a single box above which none are computed: about a second."""


@dataclass(eq=False)
class Way:
    """One way to change an input: which features, which category, towards which class.

    Args:
        columns: Positions in the table of the features that change.
        make: Makes the judgement, in units of their ranges; most ways are set aside before they need one.
        point: The judged input with this way's category, (n_inputs,).
        base: What the change of category costs.
        target: Class to be decided.
        norm: How costs add up.
        is_stable: Whether more than a point is asked for.
        categories: For every one-hot group the category's position.
        floor: A lower bound on its total distance that is known from the start.
        is_widest: Whether no other way changes these features and more.
        lead: Least output at the judged input: the nearer to the margin, the more promising.
    """

    columns: tuple[int, ...]
    make: Callable[[], Judgement] = field(repr=False)
    point: Floats
    base: float
    target: int
    norm: Norm
    is_stable: bool
    categories: tuple[int, ...] = ()
    floor: float = 0.0
    is_widest: bool = True
    lead: float = 0.0
    _search: dict[bool, Solver] = field(default_factory=dict, repr=False)

    @cached_property
    def judgement(self) -> Judgement:
        """What is asked, in units of the features' ranges."""
        return self.make()

    def known(self, *, stable: bool) -> Bounds:
        """What is known about it, for points or for stable corrections."""
        solver = self._search.get(stable)
        return solver.bounds if solver else Bounds(0.0, math.inf)

    def solver(self, *, stable: bool, seeds: Sequence[Floats], seed: int) -> Solver:
        """What finds out more; kept between calls."""
        if stable not in self._search:
            judgement = self.judgement if stable else self.judgement.for_points()
            self._search[stable] = Solver(judgement, seeds, seed)
        return self._search[stable]

    def total(self, distance: float) -> float:
        """Its distance with what the category costs."""
        return self.base + distance if self.norm == "l1" else max(self.base, distance)

    def remaining(self, total: float) -> float:
        """The distance that a total leaves to the features; negative where the category alone is dearer."""
        return total - self.base if self.norm == "l1" or total < self.base else total


class Solver:
    """Branch and bound where few features change, else a heuristic, a MILP and what bounds can be had.

    Args:
        judgement: What is asked.
        seeds: Points to try first.
        seed: Of the heuristics.

    Attributes:
        bounds: What is known so far.
        name: What found it.
    """

    def __init__(self, judgement: Judgement, seeds: Sequence[Floats], seed: int) -> None:
        self.judgement = judgement
        self.bounds = Bounds(0.0, math.inf)
        self.name = "none"
        self._seeds = list(seeds)
        self._seed = seed
        self._branching: NearestSearch | None = None
        self._tried_milp = False
        self._exhausted = False

    @property
    def exhausted(self) -> bool:
        """Whether more time would change nothing."""
        return self._exhausted

    def run(self, until: float, tolerance: float, cutoff: float, *, share: float) -> None:
        """Work until the gap is within the tolerance, nothing below `cutoff` is left, or time is up.

        Args:
            until: End of this turn, as `time.monotonic()` gives it.
            tolerance: Relative gap that is good enough.
            cutoff: Distances from here on are of no interest.
            share: Seconds that a MILP may take instead, since one that is interrupted starts again.
        """
        if not self.judgement.n_features:
            self._take(_of_single_point(self.judgement), "evaluation")
            return
        few = self.judgement.n_features <= FEW and not is_too_large(self.judgement)
        if not few and not self._tried_milp:
            now = time.monotonic()
            excluded = excluded_distance(self.judgement, now + 0.2 * share)
            self._take(Bounds(excluded, math.inf), "interval bounds")
            if excluded >= cutoff:
                return
            if not (self.judgement.is_stable and is_too_large(self.judgement)):  # which nothing could verify
                self._look(now + 0.5 * share)
            self._solve(0.5 * share, tolerance)
        elif few and self._branching is not None and not self._tried_milp:
            # what is still open after a turn may be one of the few that branching is slow on
            self._solve(share, tolerance)
        if self.bounds.closed(tolerance) or self.bounds.lower >= cutoff:
            return
        if is_too_large(self.judgement):
            self._exhausted = True
            return
        if self._branching is None:
            self._branching = NearestSearch(self.judgement, seeds=self._seeds, seed=self._seed)
        before = self._branching.bounds
        found = self._branching.run(deadline=until, tolerance=tolerance, cutoff=cutoff)
        # rounding may leave the bound a last digit below the cutoff for ever
        same = (found.lower, found.upper, found.n_boxes) == (before.lower, before.upper, before.n_boxes)
        self._exhausted = same and time.monotonic() < until
        self._take(found, "branch and bound")

    def _look(self, until: float) -> None:
        """A heuristic for many features."""
        point = nearest_by_heuristic(self.judgement, deadline=until, seed=self._seed)
        if point is not None:
            self._take(Bounds(0.0, float(self.judgement.distance(point)), point), "heuristic")
            self._seeds.append(point)

    def _solve(self, share: float, tolerance: float) -> None:
        """A MILP where few neurons may change their slope."""
        self._tried_milp = True
        judgement = self.judgement
        if judgement.n_features < _LEAST_FOR_MILP or judgement.network.is_smooth or is_too_large(judgement):
            return
        if n_binaries(judgement, within=self.bounds.upper) > MAX_BINARIES:
            return
        until = time.monotonic() + share
        if self._branching is not None:
            self._look(until - 0.7 * share)  # what branching does not close it may not find well
        found = nearest_by_milp(judgement, known=self.bounds, deadline=until, tolerance=tolerance)
        self._take(found, "milp")

    def _take(self, found: Bounds, name: str) -> None:
        """Keep the better of two lower and of two upper bounds."""
        better = found.upper < self.bounds.upper
        raises = found.lower > self.bounds.lower
        if better or (raises and self.bounds.centre is None):
            self.name = name
        self.bounds = Bounds(
            max(found.lower, self.bounds.lower),
            found.upper if better else self.bounds.upper,
            found.centre if better else self.bounds.centre,
            max(found.n_boxes, self.bounds.n_boxes),
        )


def _of_single_point(judgement: Judgement) -> Bounds:
    """Where nothing but a category changes there is one point to look at."""
    corrects = judgement.values(np.zeros((1, 0)))[0] >= judgement.margin
    return Bounds(0.0, 0.0, np.zeros(0), 1) if corrects else Bounds(math.inf, math.inf, None, 1)


def is_too_large(judgement: Judgement) -> bool:
    """Whether bounding a single box would take longer than a second or so."""
    return 4.0 * judgement.network.n_entries * (judgement.n_features + 1) > TOO_LARGE


@dataclass(frozen=True)
class Found:
    """The nearest correction over all ways.

    Args:
        lower: Nothing nearer is a correction; infinite where none exists.
        upper: Distance of what was found; infinite where nothing was.
        way: The way it was found by, or None.
        centre: The correction in units of that way's ranges.
        solver: What found it, or proved what is known.
        n_boxes: Boxes and nodes over all ways.
    """

    lower: float
    upper: float
    way: Way | None
    centre: Floats | None
    solver: str
    n_boxes: int

    def outcome(self, tolerance: float, *, smooth: bool) -> str:
        """`optimal`, `bounded`, `none_exists` or `timeout`; smooth activations are bounded at best."""
        if self.way is None:
            return "none_exists" if self.lower == math.inf else "timeout"
        close = self.upper - self.lower <= tolerance * self.upper + 1e-12
        return "optimal" if close and not smooth else "bounded"


def nearest(
    ways: Sequence[Way],
    *,
    stable: bool,
    deadline: float,
    tolerance: float,
    seed: int,
    seeds: Sequence[tuple[Way, Floats]] = (),
    floor: float = 0.0,
) -> Found:
    """The nearest correction over all ways, the most promising first, until none can be nearer.

    A way is left as soon as it cannot be nearer than the best of all by more than the tolerance.

    Args:
        ways: All ways; each keeps what is known of it for another call.
        stable: Whether the surroundings count.
        deadline: As `time.monotonic()` gives it.
        tolerance: Relative gap that is good enough.
        seed: Of the heuristics.
        seeds: Corrections of ways that may hold: those of the checkpoint before.
        floor: A lower bound that is known already.
    """
    known_points = {id(way): [point for owner, point in seeds if owner is way] for way in ways}
    lower = np.array([_lower(way, way.known(stable=stable)) for way in ways])
    upper = np.array([way.total(way.known(stable=stable).upper) for way in ways])
    started, exhausted = np.zeros(len(ways), bool), np.zeros(len(ways), bool)
    lead = np.array([way.lead for way in ways])
    solvers: dict[int, Solver] = {}
    first = [i for i, way in enumerate(ways) if known_points[id(way)]]
    while True:
        best = float(upper.min())
        enough = best * (1 - tolerance) if best < math.inf else math.inf
        open_ = np.flatnonzero((lower < enough) & ~exhausted)
        if not len(open_) or time.monotonic() > deadline:
            break
        told = first.pop(0) if first else None
        order = np.lexsort((-lead[open_], started[open_], lower[open_]))
        i = told if told is not None and told in open_ else int(open_[order[0]])
        way = ways[i]
        solver = solvers.setdefault(i, way.solver(stable=stable, seeds=known_points[id(way)], seed=seed))
        now = time.monotonic()
        few = len(way.columns) <= FEW
        n_waiting = 2 * len(open_) if few else max(int((~started[open_]).sum()), 1)
        share = (deadline - now) / n_waiting
        alone = len(open_) == 1 and (started[i] or not few)
        until = deadline if alone else min(deadline, now + (SLICE if few else share))
        solver.run(until, tolerance, way.remaining(enough), share=share)
        started[i], exhausted[i] = True, solver.exhausted
        lower[i], upper[i] = _lower(way, solver.bounds), way.total(solver.bounds.upper)
    n_boxes = sum(way.known(stable=stable).n_boxes for way in ways)
    winner = int(upper.argmin())
    if not math.isfinite(upper[winner]):
        known = max(float(lower.min()), floor)
        names = {s.name for s in solvers.values()} - {"none"}
        unsearched = "linear bounds" if known > 0 else "none"
        return Found(known, math.inf, None, None, ", ".join(sorted(names)) or unsearched, n_boxes)
    known = min(max(float(lower.min()), floor), float(upper[winner]))
    solver = ways[winner].solver(stable=stable, seeds=(), seed=seed)
    return Found(known, float(upper[winner]), ways[winner], solver.bounds.centre, solver.name, n_boxes)


def _lower(way: Way, known: Bounds) -> float:
    return max(way.total(known.lower), way.floor)
