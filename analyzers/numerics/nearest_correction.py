"""The nearest stable correction, with a lower bound of its distance at any time: branch and bound.

The search is over boxes of centres, nearest first. A box is bounded once (`bound_centres`): it is dropped if
no centre in it is a stable correction, gives its nearest point if all are, and is split otherwise. Points
where an output misses the margin exclude every centre whose box contains them. Good for few features,
whatever the size of the network: the cost is exponential in the features and mild in all else.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence

import numpy as np

from dynprobe.analyzers.numerics.centre_bounds import bound_centres
from dynprobe.analyzers.numerics.correction_problem import Bounds, Judgement
from dynprobe.analyzers.numerics.correction_seeds import (
    holds,
    least_output,
    nearest_by_heuristic,
    scattered_seeds,
    suspects,
)
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.linear_bounds import boxes_at_once

__all__ = ["NearestSearch", "nearest_by_heuristic"]

_BATCH = 64
# Up to so many features random points find what a gradient does not.
_SCATTERED_FEATURES = 4
# Counterexamples that are kept: every new box is compared with all of them.
_KEPT = 512
# Candidates of a batch that are verified, nearest first, and parts that a verification may take.
_VERIFIED, _PARTS = 2, 512
# Nearest boxes of a batch of which all corners are looked at, for few features.
_ALL_CORNERS = 8
# Every so many batches a centre that just fails is tried to improve, in at most so many steps.
_CLIMB_EVERY, _CLIMBS = 4, 8
# Narrower boxes, in units of the allowed range, are not split; they keep their lower bound.
_NARROWEST = 1e-9


class NearestSearch:
    """Search for the nearest stable correction of a judgement; it can be stopped and go on at any time.

    Args:
        judgement: What is asked.
        seeds: Centres (k,) that may be corrections, as those of an earlier checkpoint; they are verified.
        seed: Of the random points that are tried first.
    """

    def __init__(self, judgement: Judgement, *, seeds: Sequence[Floats] = (), seed: int = 0) -> None:
        self._judgement = judgement
        self._seeds: list[Floats] | None = [np.asarray(s, np.float64) for s in seeds]
        self._generator = np.random.default_rng(seed)
        self._batch = min(_BATCH, boxes_at_once(judgement.network))
        self._heap: list[tuple[float, int, Floats, Floats]] = []
        self._n_pushed = 0
        self._n_boxes = 0
        self._n_tried = 0
        self._unresolved = np.inf  # the least lower bound of boxes that are too narrow to split
        self._distance = np.inf
        self._centre: Floats | None = None
        self._bad = np.empty((0, judgement.n_features))
        if not judgement.is_possible:
            self._seeds = None
            return
        self._push(*_to_allowed(judgement, judgement.low[:, None], judgement.high[:, None]), np.zeros(1))

    @property
    def bounds(self) -> Bounds:
        """What is known so far."""
        queued = self._heap[0][0] if self._heap else np.inf
        lower = min(queued, self._unresolved, self._distance)
        return Bounds(lower, self._distance, self._centre, self._n_boxes)

    def run(self, *, deadline: float, tolerance: float, cutoff: float = np.inf) -> Bounds:
        """Search until the gap is closed, the lower bound reaches a cutoff, or time is over.

        Args:
            deadline: As `time.monotonic()` gives it.
            tolerance: Relative gap between the bounds that counts as closed.
            cutoff: Corrections that are not nearer than this are of no interest.
        """
        if self._seeds is not None and time.monotonic() < deadline:
            self._try_seeds(self._seeds, deadline)
            self._seeds = None
        while self._heap and time.monotonic() < deadline:
            known = self.bounds
            if known.closed(tolerance) or known.lower >= cutoff:
                break
            self._step(deadline, tolerance)
        return self.bounds

    def _try_seeds(self, seeds: list[Floats], deadline: float) -> None:
        judgement = self._judgement
        found = [judgement.on_grid(judgement.start), *(judgement.on_grid(seed) for seed in seeds)]
        if judgement.n_features <= _SCATTERED_FEATURES:
            found += scattered_seeds(judgement, self._generator)
        centres = np.array(found)
        self._try(centres, suspects(judgement, centres), deadline, at_most=len(centres))

    def _step(self, deadline: float, tolerance: float) -> None:
        lower, low, high = self._pop()
        if not len(lower):
            return
        judgement = self._judgement
        found = bound_centres(judgement, low, high, nearest_known=self._distance)
        self._n_boxes += len(lower)
        if found.all_stable.any():
            # The corners of boxes are allowed values, so the nearest allowed value is in the box.
            nearest = judgement.on_grid(np.clip(judgement.start[:, None], low, high)[:, found.all_stable].T)
            self._improve(nearest[judgement.distance(nearest).argmin()])
        lower = np.maximum(lower, found.distance)
        left = np.flatnonzero((lower < self._distance) & ~found.all_stable)
        self._try_near(found.candidate[:, left].T, found.descent[:, left].T, deadline, tolerance)
        low, high = _to_allowed(judgement, found.low[:, left], found.high[:, left])
        self._exclude_within(low, high, found.descent[:, left])
        self._split(lower[left], low, high, found.axis[left], deadline)

    def _pop(self) -> tuple[Floats, Floats, Floats]:
        """The nearest boxes that no counterexample excludes: lower bounds (n,), corners (k, n)."""
        taken: list[tuple[float, int, Floats, Floats]] = []
        while self._heap and len(taken) < self._batch and self._heap[0][0] < self._distance:
            taken.append(heapq.heappop(self._heap))
        if not taken:
            self._heap.clear()  # nothing left is nearer than what was found
            return np.empty(0), np.empty(0), np.empty(0)
        lower = np.array([t[0] for t in taken])
        low, high = np.stack([t[2] for t in taken], 1), np.stack([t[3] for t in taken], 1)
        if len(self._bad):
            low, high = self._cut(low, high)
            low, high = _to_allowed(self._judgement, low, high)
        left = (low <= high).all(0)
        return lower[left], low[:, left], high[:, left]

    def _push(self, low: Floats, high: Floats, lower: Floats) -> None:
        for i in np.flatnonzero((low <= high).all(0)):
            self._n_pushed += 1  # unique: ties never compare arrays
            heapq.heappush(self._heap, (float(lower[i]), self._n_pushed, low[:, i], high[:, i]))

    def _cut(self, low: Floats, high: Floats) -> tuple[Floats, Floats]:
        """Cut off centres whose surroundings contain a counterexample; low > high where none is left.

        A counterexample p excludes the box of all c with |c - p| ≤ radius. Where that covers a box in all
        features but one, it cuts off an end of the box.
        """
        reach = self._judgement.radius
        from_, to = (self._bad - reach)[:, :, None], (self._bad + reach)[:, :, None]
        over_low, over_high = (from_ <= low) & (low <= to), (from_ <= high) & (high <= to)
        covered = over_low & over_high
        n_covered = covered.sum(1, keepdims=True)
        only = (n_covered - covered) == len(low) - 1  # all others are covered
        new_low = np.maximum(low, np.where(only & over_low, to, -np.inf).max(0))
        new_high = np.minimum(high, np.where(only & over_high & ~over_low, from_, np.inf).min(0))
        gone = (n_covered[:, 0] == len(low)).any(0)
        return np.where(gone, np.inf, new_low), np.where(gone, -np.inf, new_high)

    def _try_near(self, candidates: Floats, descent: Floats, deadline: float, tolerance: float) -> None:
        """Try what the linear functions do not exclude, (n, k), and a little more than that.

        Where they are almost exact the outputs hardly reach the margin, which takes many parts to verify and
        fails by rounding. Half the tolerance further on the way from the start they are above it.
        """
        judgement = self._judgement
        further = judgement.start + (1 + min(tolerance, 1) / 2) * (candidates - judgement.start)
        if not judgement.is_stable:
            points = judgement.on_grid(np.concatenate([candidates, further]))
            self._try(points, points[:, None], deadline, at_most=1)
            return
        centres = judgement.on_grid(further)
        low, high = judgement.box_around(centres)
        around = np.stack([centres, np.where(descent > 0, low, high)], 1)
        self._try(centres, around, deadline, at_most=_VERIFIED)
        self._n_tried += 1
        if len(centres) and self._n_tried % _CLIMB_EVERY == 0:
            nearest = candidates[judgement.distance(candidates).argmin()]
            self._try_inward(judgement.on_grid(nearest), deadline, tolerance)

    def _try_inward(self, centre: Floats, deadline: float, tolerance: float) -> None:
        """Climb from a centre that just fails, up the gradient at the worst point known around it.

        Where stable corrections begin with a tip, the way on from the start leaves them.
        """
        judgement = self._judgement
        step = tolerance / 4 * float(judgement.distance(centre)) / judgement.weights
        for _ in range(_CLIMBS):
            known = (np.abs(self._bad - centre) <= judgement.radius).all(1)
            around = np.concatenate([suspects(judgement, centre[None])[0], self._bad[known]])
            values, slopes = least_output(judgement.network, around)
            if judgement.distance(centre) >= self._distance:
                return
            if values.min() >= judgement.margin:
                self._try(centre[None], centre[None, None], deadline, at_most=1)
                return
            slope = slopes[values.argmin()]
            size = np.linalg.norm(slope)
            if size == 0:
                return
            centre = judgement.on_grid(centre + step * slope / size)

    def _try(self, centres: Floats, around: Floats, deadline: float, *, at_most: int) -> None:
        """Verify the nearest of centres (n, k) with good outputs at points around them (n, n_points, k)."""
        judgement = self._judgement
        distance = judgement.distance(centres)
        use = np.flatnonzero(distance < self._distance)
        use = use[np.argsort(distance[use], kind="stable")]
        if not len(use):
            return
        around = around[use]
        values = judgement.values(around.reshape(-1, around.shape[-1])).reshape(around.shape[:2])
        good = (values >= judgement.margin).all(1)
        self._remember(around[np.arange(len(use)), values.argmin(1)][~good])
        for centre in centres[use[good]][:at_most]:
            verdict = holds(judgement, centre, deadline=deadline, max_boxes=_PARTS)
            if verdict.holds:
                self._improve(centre)
                return  # the others are further away
            if verdict.counterexample is not None:
                self._remember(verdict.counterexample[None])

    def _remember(self, points: Floats) -> None:
        if self._judgement.is_stable:
            self._bad = np.concatenate([self._bad, points])[-_KEPT:]

    def _improve(self, centre: Floats) -> None:
        distance = float(self._judgement.distance(centre))
        if distance < self._distance:
            self._distance, self._centre = distance, centre

    def _exclude_within(self, low: Floats, high: Floats, descent: Floats) -> None:
        """Look for counterexamples among the points that the surroundings of all centres in a box share."""
        judgement = self._judgement
        if not judgement.is_stable:
            return
        shared_low = np.maximum(high - judgement.radius[:, None], judgement.low[:, None])
        shared_high = np.minimum(low + judgement.radius[:, None], judgement.high[:, None])
        some = (shared_low <= shared_high).all(0) & (low <= high).all(0)
        if not some.any():
            return
        points = np.where(descent > 0, shared_low, shared_high)[:, some].T
        if judgement.n_features <= _SCATTERED_FEATURES:
            # The bounds point to one corner; where several matter, that one may be hardly violated.
            ends = shared_low[:, some][:, :_ALL_CORNERS], shared_high[:, some][:, :_ALL_CORNERS]
            corners = [
                np.where(np.array(upper)[:, None], ends[1], ends[0]).T
                for upper in itertools.product((False, True), repeat=judgement.n_features)
            ]
            points = np.concatenate([points, *corners])
        self._remember(points[judgement.values(points) < judgement.margin])

    def _split(self, lower: Floats, low: Floats, high: Floats, axis: np.ndarray, deadline: float) -> None:
        some = (low <= high).all(0)
        lower, low, high, axis = lower[some], low[:, some], high[:, some], axis[some]
        width = high - low
        narrow = (width <= _NARROWEST).all(0)
        for i in np.flatnonzero(narrow):
            self._settle(float(lower[i]), low[:, i], high[:, i], deadline)
        lower, low, high, axis, width = (x[..., ~narrow] for x in (lower, low, high, axis, width))
        boxes = np.arange(len(lower))
        axis = np.where(width[axis, boxes] > _NARROWEST, axis, width.argmax(0))
        at = _between_allowed(self._judgement, (low + high)[axis, boxes] / 2, axis)
        left_high, right_low = high.copy(), low.copy()
        left_high[axis, boxes] = at
        right_low[axis, boxes] = at
        for a, b in ((low, left_high), (right_low, high)):
            self._push(*_to_allowed(self._judgement, a, b), lower)

    def _settle(self, lower: float, low: Floats, high: Floats, deadline: float) -> None:
        """Decide about a box that is as good as a point, or keep its lower bound."""
        centre = self._judgement.on_grid(np.clip(self._judgement.start, low, high))
        verdict = holds(self._judgement, centre, deadline=deadline, max_boxes=100 * _PARTS)
        if verdict.holds:
            self._improve(centre)
        is_point = bool((low == high).all())
        if verdict.holds is None and time.monotonic() > deadline:
            self._push(low[:, None], high[:, None], np.array([lower]))
        elif verdict.holds is None or not is_point:
            self._unresolved = min(self._unresolved, lower)


def _to_allowed(judgement: Judgement, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Shrink boxes (k, n) to the allowed values of integer features; low > high where there are none."""
    first, last = judgement.allowed(low.T, high.T)
    return first.T, last.T


def _between_allowed(judgement: Judgement, values: Floats, features: np.ndarray) -> Floats:
    """Where to split boxes: for integer features between two allowed values."""
    if judgement.spacing is None or judgement.origin is None:
        return values
    step, origin, slack = judgement.step[features], judgement.origin[features], judgement.slack[features]
    between = origin + step * (np.floor((values - origin) / step + slack) + 0.5)
    return np.where(judgement.whole[features], between, values)
