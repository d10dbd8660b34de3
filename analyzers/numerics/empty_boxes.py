"""The largest box that contains a given box and none of many points: exact, by best-first branching.

Every box that avoids the points lies in one of the boxes of a queue. The largest of these has points inside
until it is the answer; one of them is chosen, and every face that can exclude it gives a smaller box.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dynprobe.analyzers.numerics.correction_problem import grid_slack
from dynprobe.analyzers.numerics.layered_network import Floats

# Features that points are compared in at a time: of many, the first already exclude most points.
_FEATURES = 32
# Numbers that the queue may hold: with many features every point gives as many boxes.
_MOST_NUMBERS = 40_000_000


@dataclass(frozen=True)
class BoxRange:
    """All boxes that lie in [low, high] and contain [inner_low, inner_high]; all arrays are (k,)."""

    low: Floats
    high: Floats
    inner_low: Floats
    inner_high: Floats

    def cut(self, feature: int, value: float, *, above: bool) -> BoxRange:
        """Those with nothing beyond `value`."""
        face = (self.high if above else self.low).copy()
        face[feature] = value
        return replace(self, high=face) if above else replace(self, low=face)

    def reaching(self, feature: int, value: float, *, above: bool) -> BoxRange:
        """Those that reach `value`."""
        face = (self.inner_high if above else self.inner_low).copy()
        face[feature] = value
        return replace(self, inner_high=face) if above else replace(self, inner_low=face)


class EmptyBoxes:
    """Boxes within a domain that contain an inner box and avoid points, the largest first.

    Features whose domain has no width do not count: neither for the volume, which is a share of that of the
    domain, nor for whether a point is inside.

    Args:
        low: Lower corner of the domain, (k,).
        high: Upper corner, (k,).
        inner_low: Lower corner of the box to contain, (k,).
        inner_high: Upper corner, (k,).
        spacing: Distance of the values that a face may have, (k,), 0 where all are allowed. The faces of the
            inner box are allowed in any case.
        origin: One such value for every feature, (k,).
    """

    def __init__(
        self,
        low: Floats,
        high: Floats,
        inner_low: Floats,
        inner_high: Floats,
        *,
        spacing: Floats | None = None,
        origin: Floats | None = None,
    ) -> None:
        k = len(low)
        self._wide = high > low
        self._size = np.where(self._wide, high - low, 1.0)
        self._spacing = np.zeros(k) if spacing is None or origin is None else spacing
        self._origin = np.zeros(k) if origin is None else origin
        self._step = np.where(self._spacing > 0, self._spacing, 1.0)
        self._slack = grid_slack(low, high, self._step, self._origin)
        self._count = itertools.count()
        self._queue: list[tuple[float, int, BoxRange]] = []
        self._points = np.empty((16, k))
        self.n_points = 0
        low, high = self.inwards(low, high, inner_low, inner_high)
        self._push(BoxRange(low, high, inner_low, inner_high), -1.0)

    @property
    def points(self) -> Floats:
        """The points to avoid, (n_points, k)."""
        return self._points[: self.n_points]

    @property
    def bound(self) -> float:
        """No box that contains the inner one and avoids the points is larger; 0 where there is none."""
        return -self._queue[0][0] if self._queue else 0.0

    def volume(self, low: Floats, high: Floats) -> float:
        """Share of the domain that a box takes, over features whose domain has a width."""
        return float(np.prod(((high - low) / self._size)[self._wide]))

    def inwards(
        self, low: Floats, high: Floats, inner_low: Floats, inner_high: Floats
    ) -> tuple[Floats, Floats]:
        """The largest box within another whose faces have allowed values, or those of the inner box."""
        step, slack = self._step, self._slack
        first = self._origin + step * np.ceil((low - self._origin) / step - slack)
        last = self._origin + step * np.floor((high - self._origin) / step + slack)
        return (
            np.where(self._spacing > 0, np.minimum(first, inner_low), low),
            np.where(self._spacing > 0, np.maximum(last, inner_high), high),
        )

    def add(self, points: Floats) -> None:
        """Avoid these points too, (n, k)."""
        while self.n_points + len(points) > len(self._points):
            self._points = np.concatenate([self._points, np.empty_like(self._points)])
        self._points[self.n_points : self.n_points + len(points)] = points
        self.n_points += len(points)

    def inside(self, low: Floats, high: Floats) -> Floats:
        """The points in a box, (n, k); those on its faces too."""
        left = self.points
        for first in range(0, len(low), _FEATURES):
            some = slice(first, first + _FEATURES)
            part = left[:, some]
            left = left[(((part >= low[some]) & (part <= high[some])) | ~self._wide[some]).all(1)]
        return left

    def largest(self, *, above: float = 0.0, deadline: float = float("inf")) -> BoxRange | None:
        """The range whose [low, high] is the largest empty box.

        Args:
            above: Boxes of at most this volume are of no interest and forgotten.
            deadline: As `time.monotonic()` gives it.

        Returns:
            None if there is no larger one than `above`, or if time or memory ran out before (then `bound` >
            `above`).
        """
        while self._queue and self.bound > above:
            node = self._queue[0][2]
            inside = self.inside(node.low, node.high)
            if not len(inside):
                return node
            full = 2 * len(self._queue) * len(node.low) > _MOST_NUMBERS  # two arrays each are not shared
            if full or time.monotonic() > deadline:
                return None
            heapq.heappop(self._queue)
            self._exclude(node, inside, above)
        return None

    def halve(self, above: float = 0.0) -> bool:
        """Split the largest range at the middle of its most undecided face; False if nothing is undecided."""
        node = self._queue[0][2]
        gap = np.concatenate([node.high - node.inner_high, node.inner_low - node.low])
        gap = np.where(np.tile(self._wide, 2), gap / np.tile(self._size, 2), 0.0)
        face = int(gap.argmax())
        if gap[face] <= 1e-9:
            return False
        heapq.heappop(self._queue)
        feature, is_above = face % len(node.low), face < len(node.low)
        outer, inner = (node.high, node.inner_high) if is_above else (node.low, node.inner_low)
        middle = float(outer[feature] + inner[feature]) / 2
        self._push(node.cut(feature, self._before(node, feature, middle, is_above), above=is_above), above)
        reach = self._reach(feature, middle, is_above)
        if (reach <= outer[feature]) if is_above else (reach >= outer[feature]):
            self._push(node.reaching(feature, reach, above=is_above), above)
        return True

    def _push(self, node: BoxRange, above: float) -> None:
        if (volume := self.volume(node.low, node.high)) > above:
            heapq.heappush(self._queue, (-volume, next(self._count), node))

    def _exclude(self, node: BoxRange, inside: Floats, above: float) -> None:
        """Put in the place of a range those of its boxes that avoid one of the points inside."""
        over, under = inside > node.inner_high, inside < node.inner_low
        face = (over | under) & self._wide
        if not face.any(1).all():  # a point that no face can exclude
            return
        width = node.high - node.low
        width = np.where(width > 0, width, 1.0)  # of features without width no face can exclude anything
        share = np.where(face, np.where(over, inside - node.low, node.high - inside) / width, 0.0)
        chosen = int((share.max(1) + 1e-3 * share.sum(1)).argmin())
        point = inside[chosen]
        # Parts without overlap: boxes cut at a face reach the point in all faces before it. The largest
        # part comes last, so that it has to reach farthest and is the next to be cut.
        for feature in sorted(np.flatnonzero(face[chosen]).tolist(), key=lambda j: float(share[chosen, j])):
            is_above = bool(over[chosen, feature])
            value = self._before(node, feature, float(point[feature]), is_above)
            self._push(node.cut(feature, value, above=is_above), above)
            reach = self._reach(feature, float(point[feature]), is_above)
            if reach > node.high[feature] or reach < node.low[feature]:
                return
            node = node.reaching(feature, reach, above=is_above)

    def _before(self, node: BoxRange, feature: int, value: float, above: bool) -> float:
        """The farthest value that a face may have on this side of a point."""
        step = self._spacing[feature]
        if step <= 0:
            return float(np.nextafter(value, -np.inf if above else np.inf))
        sign, origin = (1.0 if above else -1.0), float(self._origin[feature])
        grid = origin + sign * step * np.floor(sign * (value - origin) / step + self._slack[feature])
        if sign * (grid - value) >= 0:
            grid -= sign * step
        nearest: Callable[[float, float], float] = max if above else min
        return nearest(float(grid), float((node.inner_high if above else node.inner_low)[feature]))

    def _reach(self, feature: int, value: float, above: bool) -> float:
        """The nearest value that a face may have at or beyond a point."""
        step = self._spacing[feature]
        if step <= 0:
            return value
        sign, origin = (1.0 if above else -1.0), float(self._origin[feature])
        grid = origin + sign * step * np.floor(sign * (value - origin) / step + self._slack[feature])
        return float(grid if sign * (grid - value) >= 0 else grid + sign * step)
