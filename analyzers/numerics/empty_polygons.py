"""Convex sets in the plane that contain a polygon and avoid points: a bound on their area, and large ones.

A convex set avoids a point if a line through the point has the set on one side. Its normal lies in an
interval, since the inner polygon is on that side too. Halving such intervals, best first, gives the bound:
what lies beyond the line for all normals of an interval is excluded.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers.numerics.convex_polygon import area, clip, contains, rectangle
from dynprobe.analyzers.numerics.layered_network import Floats

# Cells along either side of the grid on which areas are counted, from above.
_N_CELLS = 128
# Every fourth cell along either side decides which interval to halve.
_SCORED = 4
_N_ANGLES, _NARROWEST = 9, 0.02


@dataclass(frozen=True)
class _Sets:
    """All convex sets whose lines have normals within these intervals, for the first n points.

    Args:
        first: First angle of every interval, (n,).
        width: Width of every interval, (n,).
        excluded: Cells that none of the sets meets.
    """

    first: Floats
    width: Floats
    excluded: np.ndarray


class EmptyPolygons:
    """Convex sets within a box that contain an inner polygon and avoid points.

    Args:
        low: Lower corner of the box, (2,).
        high: Upper corner, (2,).
        inner: Vertices of the inner polygon, (m, 2).
    """

    def __init__(self, low: Floats, high: Floats, inner: Floats) -> None:
        self.low, self.high, self.inner = low, high, inner
        self.points = np.empty((0, 2))
        self._first, self._width = np.empty(0), np.empty(0)
        self._count = itertools.count()
        self._grid(low, high)

    def _grid(self, low: Floats, high: Floats) -> None:
        self._ticks = np.linspace(low, high, _N_CELLS + 1)
        self._cell = float(np.prod((high - low) / _N_CELLS))
        none = np.zeros((_N_CELLS, _N_CELLS), bool)
        self._queue: list[tuple[int, int, _Sets]] = []
        self._push(_Sets(np.empty(0), np.empty(0), none))

    @property
    def bound(self) -> float:
        """No such set has a larger area."""
        return -self._queue[0][0] * self._cell

    def add(self, points: Floats) -> int:
        """Avoid these points too, (n, 2); how many of them are new and not behind another one."""
        n_before = len(self.points)
        for point in points:
            if self._behind(point) or (interval := self._normals(point)) is None:
                continue
            self.points = np.concatenate([self.points, point[None]])
            self._first = np.append(self._first, interval[0])
            self._width = np.append(self._width, interval[1])
        return len(self.points) - n_before

    def _behind(self, point: Floats) -> bool:
        """Whether every convex set with the inner polygon and this point has another point to avoid."""
        away = point - self.points
        ends = np.stack([self._first, self._first + self._width])
        return bool(((np.cos(ends) * away[:, 0] + np.sin(ends) * away[:, 1]) >= 0).all(0).any())

    def _normals(self, point: Floats) -> tuple[float, float] | None:
        """First angle and width of the interval of normals with the inner polygon behind the line."""
        towards = self.inner - point
        if not towards.any(1).all():
            return None
        angles = np.arctan2(towards[:, 1], towards[:, 0])
        turned = (angles - angles[0] + np.pi) % (2 * np.pi) - np.pi
        spread = float(turned.max() - turned.min())
        if spread >= np.pi:  # within the inner polygon
            return None
        return float(angles[0] + turned.max() + np.pi / 2), np.pi - spread

    def focus(self) -> None:
        """Count areas only where convex sets can be, in smaller cells; starts the search anew."""
        self._refresh()
        open_ = ~self._queue[0][2].excluded
        rows, columns = np.flatnonzero(open_.any(1)), np.flatnonzero(open_.any(0))
        low = np.array([self._ticks[rows[0], 0], self._ticks[columns[0], 1]])
        high = np.array([self._ticks[rows[-1] + 1, 0], self._ticks[columns[-1] + 1, 1]])
        self._grid(low, high)
        self._refresh()

    def _refresh(self) -> None:
        """Make the first of the queue know all points."""
        while len((sets := self._queue[0][2]).first) < len(self.points):
            heapq.heappop(self._queue)
            new = slice(len(sets.first), None)
            excluded = sets.excluded.copy()
            for point, first, width in zip(self.points[new], self._first[new], self._width[new], strict=True):
                excluded |= self._beyond(point, first, width)
            self._push(
                _Sets(
                    np.append(sets.first, self._first[new]),
                    np.append(sets.width, self._width[new]),
                    excluded,
                )
            )

    def _push(self, sets: _Sets) -> None:
        n_open = sets.excluded.size - int(np.count_nonzero(sets.excluded))
        heapq.heappush(self._queue, (-n_open, next(self._count), sets))

    def _beyond(self, point: Floats, first: float, width: float) -> np.ndarray:
        """Cells beyond the line through a point for all normals of an interval."""
        x, y = (self._ticks - point).T
        beyond = np.ones((len(x), len(y)), bool)
        for angle in (first, first + width):
            beyond &= np.cos(angle) * x[:, None] >= -np.sin(angle) * y
        return beyond[:-1, :-1] & beyond[1:, :-1] & beyond[:-1, 1:] & beyond[1:, 1:]

    def halve(self) -> bool:
        """Halve the interval of one point where that lowers the bound most; False if all are narrow."""
        self._refresh()
        sets = self._queue[0][2]
        score = np.where(sets.width > _NARROWEST, self._open_after_halving(sets), np.inf)
        if not len(score) or not np.isfinite(score.min()):
            return False
        i = int(score.argmin())
        heapq.heappop(self._queue)
        half = sets.width[i] / 2
        for start in (sets.first[i], sets.first[i] + half):
            first, width = sets.first.copy(), sets.width.copy()
            first[i], width[i] = start, half
            self._push(_Sets(first, width, sets.excluded | self._beyond(self.points[i], start, half)))
        return True

    def _open_after_halving(self, sets: _Sets) -> Floats:
        """For every point how much stays open in the worse half of its interval, from some cells, (n,)."""
        some = slice(_SCORED // 2, None, _SCORED)
        open_ = ~sets.excluded[some, some]
        x, y = ((self._ticks[:-1] + self._ticks[1:]) / 2)[some].T
        angles = sets.first + sets.width * np.array([[0.0], [0.5], [1.0]])
        along = np.cos(angles)[..., None] * (x - self.points[:, :1])
        across = np.sin(angles)[..., None] * (y - self.points[:, 1:])
        beyond = along[..., None] >= -across[..., None, :]
        n_open = [(open_ & ~(beyond[j] & beyond[j + 1])).sum((1, 2)) for j in range(2)]
        return np.asarray(np.maximum(*n_open) + 0.1 * np.minimum(*n_open))

    def large(self, slack: float) -> Floats:
        """The vertices of a large polygon that avoids all points, among the sets of largest bound.

        Lines are chosen one after the other, then each again with the others as they are.

        Args:
            slack: How far every line stays before its point, as a share of the way to the inner polygon.
        """
        self._refresh()
        sets = self._queue[0][2]
        away = np.abs(self.points - np.clip(self.points, self.inner.min(0), self.inner.max(0))).sum(1)
        found = [self._cut_out(sets, order, slack) for order in (np.argsort(away), np.argsort(-away))]
        return max(found, key=area)

    def _cut_out(self, sets: _Sets, order: np.ndarray, slack: float) -> Floats:
        start = rectangle(self.low, self.high)
        polygon, lines = start, {}
        inside = self._inside(polygon)
        for i in order:
            if inside[i]:
                lines[i], polygon = max(self._cuts(polygon, sets, i, slack), key=lambda cut: area(cut[1]))
                inside = self._inside(polygon)
        for i in lines:
            others = start
            for j, line in lines.items():
                others = clip(others, *line) if j != i else others
            for line, cut in self._cuts(others, sets, i, slack):
                if area(cut) > area(polygon) and not self._inside(cut).any():
                    lines[i], polygon = line, cut
        return polygon

    def _cuts(
        self, polygon: Floats, sets: _Sets, i: int, slack: float
    ) -> list[tuple[tuple[Floats, float], Floats]]:
        """Lines before a point, and what they leave of a polygon."""
        found = []
        for angle in sets.first[i] + sets.width[i] * np.linspace(0, 1, _N_ANGLES):
            normal = np.array([np.cos(angle), np.sin(angle)])
            at_point, at_inner = float(normal @ self.points[i]), float((self.inner @ normal).max())
            offset = at_point - slack * max(at_point - at_inner, 0.0)
            found.append(((normal, offset), clip(polygon, normal, offset)))
        return found

    def _inside(self, polygon: Floats) -> np.ndarray:
        return contains(polygon, self.points, slack=-1e-9)
