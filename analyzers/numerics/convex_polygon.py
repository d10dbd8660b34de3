"""Convex polygons in the plane: vertices (n, 2) in counter-clockwise order."""

from __future__ import annotations

import numpy as np

from dynprobe.analyzers.numerics.layered_network import Floats


def rectangle(low: Floats, high: Floats) -> Floats:
    """The vertices of a box, (4, 2)."""
    return np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]], np.float64)


def area(vertices: Floats) -> float:
    """Area; 0 for points and segments."""
    x, y = (vertices - vertices[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def clip(vertices: Floats, normal: Floats, offset: float) -> Floats:
    """The part with `normal · x ≤ offset`, (m, 2); (0, 2) if there is none.

    References:
        Sutherland and Hodgman, "Reentrant polygon clipping", Communications of the ACM 17 (1974).
    """
    beyond = vertices @ normal - offset
    kept = beyond <= 0
    if kept.all():
        return vertices
    if not kept.any():
        return np.empty((0, 2))
    found = []
    for i in range(len(vertices)):
        j = (i + 1) % len(vertices)
        if kept[i]:
            found.append(vertices[i])
        if kept[i] != kept[j]:
            share = beyond[i] / (beyond[i] - beyond[j])
            found.append(vertices[i] + share * (vertices[j] - vertices[i]))
    return np.array(found)


def hull(points: Floats) -> Floats:
    """The convex hull of points (n, 2), without vertices on its edges.

    References:
        Andrew, "Another efficient algorithm for convex hulls in two dimensions", Inf. Proc. Letters 9 (1979).
    """
    ordered = np.unique(points, axis=0)
    if len(ordered) < 3:
        return ordered

    def chain(points: Floats) -> list[Floats]:
        found: list[Floats] = []
        for point in points:
            while len(found) > 1 and cross(found[-1] - found[-2], point - found[-1]) <= 0:
                found.pop()
            found.append(point)
        return found[:-1]

    return np.array(chain(ordered) + chain(ordered[::-1]))


def cross(a: Floats, b: Floats) -> Floats:
    """a_x b_y - a_y b_x for vectors (…, 2), shape (…)."""
    return np.asarray(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])


def contains(vertices: Floats, points: Floats, *, slack: float = 0.0) -> np.ndarray:
    """Whether points (n, 2) lie in the polygon or on its edges, (n,).

    Args:
        vertices: Of a polygon with an area.
        points: Points.
        slack: Distance from an edge by which a point outside still counts.
    """
    edges = np.roll(vertices, -1, 0) - vertices
    lengths = np.maximum(np.hypot(*edges.T), 1e-300)
    return np.asarray((cross(edges, points[:, None] - vertices) >= -slack * lengths).all(1))


def added_triangles(vertices: Floats, point: Floats) -> list[Floats]:
    """What the hull of a polygon and a point outside has more than the polygon: triangles (3, 2)."""
    ends = np.roll(vertices, -1, 0)
    seen = cross(ends - vertices, point - vertices) < 0
    return [np.array([ends[i], vertices[i], point]) for i in np.flatnonzero(seen)]
