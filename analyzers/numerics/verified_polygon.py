"""The largest convex polygon of two features in which the network's outputs all count, with a bound.

Known violating points are cut off by lines; what is left holds, or has another violating point. Verified
polygons are then grown vertex by vertex.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers.numerics.convex_polygon import (
    added_triangles,
    area,
    contains,
    hull,
    rectangle,
)
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.empty_polygons import EmptyPolygons
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.polygon_verifier import verify_polygon

__all__ = ["LargestPolygon", "largest_polygon", "verify_polygon"]

_N_FIRST, _N_SECTORS, _MAX_CANDIDATE, _MAX_GROW = 48, 64, 20_000, 2_000
_PATH = np.linspace(0.0, 1.0, 65)
# How much smaller a polygon is tried again that did not hold: curved outlines take many points.
_SMALLER = (0.0, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class LargestPolygon:
    """A verified convex polygon.

    Args:
        vertices: Counter-clockwise, (n, 2).
        area: Share of the domain; NaN where that has no area, as one of its sides has no width.
        area_bound: No convex set that contains the inner box, lies in the domain and holds is larger; NaN
            where the area is.
    """

    vertices: Floats
    area: float
    area_bound: float


def largest_polygon(
    judgement: Judgement,
    centre: Floats,
    inner_low: Floats,
    inner_high: Floats,
    *,
    deadline: float,
    tolerance: float = 0.05,
    max_vertices: int = 12,
) -> LargestPolygon:
    """Find a convex polygon that contains a box and holds, as large as can be had until the deadline.

    Integer features are taken as any number. Cost: some ten to hundred verifications of a polygon.

    Args:
        judgement: Of two features.
        centre: A point of the inner box, (2,).
        inner_low: Lower corner of a box that is known to hold, (2,).
        inner_high: Its upper corner, (2,).
        deadline: As `time.monotonic()` gives it.
        tolerance: End when no convex set is larger by more than this share.
        max_vertices: Most vertices, unless the inner box needs more.
    """
    start = time.monotonic()
    inner = hull(rectangle(inner_low, inner_high))
    size = float(np.prod(judgement.high - judgement.low))
    if size == 0:
        return LargestPolygon(inner, np.nan, np.nan)
    search = _Search(judgement, np.asarray(centre, np.float64), inner)
    search.sample_domain()
    search.grow(start + 0.2 * (deadline - start), max_vertices)
    search.close(start + 0.7 * (deadline - start), tolerance)
    search.simplify(max_vertices)
    search.grow(start + 0.9 * (deadline - start), max_vertices)
    vertices = search.verified(deadline)
    found = area(vertices) / size
    return LargestPolygon(vertices, found, max(found, search.empty.bound / size))


class _Search:
    """The best polygon so far, and the points that every polygon has to avoid."""

    def __init__(self, judgement: Judgement, centre: Floats, inner: Floats) -> None:
        self.judgement, self.centre, self.inner = judgement, centre, inner
        self.polygon = inner
        self.empty = EmptyPolygons(judgement.low, judgement.high, inner)

    def sample_domain(self) -> None:
        """Find the first violating points, the nearest first."""
        low, high = self.judgement.low, self.judgement.high
        axes = [np.linspace(low[i], high[i], _N_FIRST) for i in range(2)]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
        points = points[self.judgement.values(points) < self.judgement.margin]
        away = points - np.clip(points, self.inner.min(0), self.inner.max(0))
        nearest = np.argsort(np.abs(away).sum(1), kind="stable")
        around = points[nearest] - self.inner.mean(0)
        sector = np.floor(np.arctan2(around[:, 1], around[:, 0]) / (2 * np.pi) * _N_SECTORS)
        self.avoid(points[nearest[np.unique(sector, return_index=True)[1]]])
        self.empty.focus()

    def avoid(self, points: Floats) -> int:
        """Keep violating points (n, 2), moved towards the inner box while they violate; how many are new."""
        goal = np.clip(points, self.inner.min(0), self.inner.max(0))
        for path in (_PATH, _PATH):
            tried = points[:, None] * (1 - path[:, None]) + goal[:, None] * path[:, None]
            bad = self.judgement.values(tried.reshape(-1, 2)) < self.judgement.margin
            bad = bad.reshape(tried.shape[:2])
            bad[:, 0] = True
            last = len(path) - 1 - bad[:, ::-1].argmax(1)
            rows = np.arange(len(points))
            points, goal = tried[rows, last], tried[rows, np.minimum(last + 1, len(path) - 1)]
        away = np.abs(points - np.clip(points, self.inner.min(0), self.inner.max(0))).sum(1)
        return self.empty.add(points[np.argsort(away, kind="stable")])

    def close(self, until: float, tolerance: float) -> None:
        """Try a large polygon, learn from its violating point, and halve what is undecided, in turns."""
        n_halved = 0
        while time.monotonic() < until and area(self.polygon) < (1 - tolerance) * self.empty.bound:
            often = n_halved & (n_halved - 1) == 0  # the dear part less and less often
            if often and self._try_large(until, tolerance):
                continue
            n_halved += 1
            if not self.empty.halve():
                return

    def _try_large(self, until: float, tolerance: float) -> bool:
        """Verify a large polygon that avoids all points; whether another one is worth a try."""
        network, margin = self.judgement.network, self.judgement.margin
        large = hull(np.concatenate([self.empty.large(tolerance / 5), self.inner]))
        new = False
        for part in _SMALLER:
            smaller = self.inner.mean(0) + (1 - part) * (large - self.inner.mean(0))
            polygon = hull(np.concatenate([smaller, self.inner]))
            if area(polygon) <= (1 + tolerance / 5) * area(self.polygon):
                break
            verdict = verify_polygon(network, polygon, margin, deadline=until, max_boxes=_MAX_CANDIDATE)
            if verdict.holds:
                self.polygon = polygon
                break
            if verdict.counterexample is not None:
                new |= self.avoid(verdict.counterexample[None]) > 0
        return new

    def simplify(self, max_vertices: int) -> None:
        """Drop the vertices that matter least."""
        while len(self.polygon) > max_vertices:
            fewer = [np.delete(self.polygon, i, 0) for i in range(len(self.polygon))]
            fewer = [polygon for polygon in fewer if contains(polygon, self.inner).all()]
            if not fewer:
                return
            self.polygon = max(fewer, key=area)

    def grow(self, until: float, max_vertices: int) -> None:
        """Move vertices outwards, and new ones from the middles of edges, until it hardly helps."""
        before = -1.0
        while area(self.polygon) > 1.005 * before and time.monotonic() < until:
            before = area(self.polygon)
            for start, direction in self._moves():
                self._extend(start, direction, until, max_vertices)

    def _moves(self) -> list[tuple[Floats, Floats]]:
        """Points of the outline and directions that lead away from it."""
        now = self.polygon
        if len(now) < 3:
            angles = np.arange(8) * np.pi / 4
            return [(p, np.array([np.cos(a), np.sin(a)])) for p in now for a in angles]
        before, after = np.roll(now, 1, 0), np.roll(now, -1, 0)
        along, back = now - before, now - after
        normal = np.stack([(after - now)[:, 1], -(after - now)[:, 0]], 1)
        moves = []
        for i in range(len(now)):
            for direction in (along[i], back[i], along[i] + back[i]):
                moves.append((now[i], direction))
            moves.append(((now[i] + after[i]) / 2, normal[i]))
        return moves

    def _extend(self, start: Floats, direction: Floats, until: float, max_vertices: int) -> None:
        low, high = self.judgement.low, self.judgement.high
        if not direction.any():
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(direction > 0, (high - start) / direction, (low - start) / direction)
        farthest = float(np.min(room[direction != 0]))
        done, limit, tried = 0.0, farthest, farthest
        for _ in range(6):
            point = np.clip(start + tried * direction, low, high)
            larger = hull(np.concatenate([self.polygon, point[None]]))
            if len(larger) <= max_vertices and area(larger) > area(self.polygon) and self._adds(point, until):
                self.polygon, done = larger, tried
                if tried == farthest:
                    return
            else:
                limit = tried
            tried = (done + limit) / 2
            if time.monotonic() > until or limit - done < 1e-3 * farthest:
                return

    def _adds(self, point: Floats, until: float) -> bool:
        """Whether the polygon with this point holds; only what is new has to be verified."""
        for triangle in added_triangles(self.polygon, point):
            if contains(triangle, self.empty.points).any():
                return False
            verdict = verify_polygon(
                self.judgement.network,
                triangle,
                self.judgement.margin,
                deadline=until,
                max_boxes=_MAX_GROW,
            )
            if verdict.counterexample is not None:
                self.avoid(verdict.counterexample[None])
            if not verdict.holds:
                return False
        return True

    def verified(self, deadline: float) -> Floats:
        """The polygon, verified once more as a whole; smaller if rounding makes a difference."""
        network, margin = self.judgement.network, self.judgement.margin
        for part in (0.0, 1e-9, 1e-6, 1e-3):
            smaller = self.polygon + part * (self.centre - self.polygon)
            vertices = hull(np.concatenate([smaller, self.inner]))
            # None: time ran out, and every part of the polygon was verified before
            if verify_polygon(network, vertices, margin, deadline=deadline).holds is not False:
                return vertices
        return self.inner
