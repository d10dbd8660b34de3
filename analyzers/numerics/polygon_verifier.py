"""Whether a network's outputs are all at least a margin in a convex polygon: complete, by splitting it."""

from __future__ import annotations

import heapq
import itertools
import time

import numpy as np

from dynprobe.analyzers.numerics.box_verifier import Verdict, split_axis
from dynprobe.analyzers.numerics.convex_polygon import clip
from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork
from dynprobe.analyzers.numerics.linear_bounds import LinearBounds, bound

_BATCH = 64


def verify_polygon(
    network: LayeredNetwork,
    vertices: Floats,
    margin: float,
    *,
    deadline: float = float("inf"),
    max_boxes: int = 1_000_000,
) -> Verdict:
    """Decide whether every output is at least `margin` in a convex polygon.

    Each part of it is bounded on its bounding box, and the linear function that bounds an output from below
    is least at a vertex of the part. Numerically verified, as in `box_verifier.verify`.

    Args:
        network: Two inputs, r outputs.
        vertices: In order, (n, 2); may lie on a line or be a single point.
        margin: Least output that counts.
        deadline: As `time.monotonic()` gives it.
        max_boxes: Give up after so many parts.
    """
    vertices = np.asarray(vertices, np.float64)
    if (bad := _violating(network, vertices, margin)) is not None:
        return Verdict(False, bad)
    count = itertools.count()
    heap: list[tuple[float, int, Floats]] = [(-np.inf, next(count), vertices)]
    n_boxes = 0
    while heap:
        if n_boxes >= max_boxes or time.monotonic() > deadline:
            return Verdict(None, None, n_boxes)
        parts = [heapq.heappop(heap)[2] for _ in range(min(_BATCH, len(heap)))]
        lows = np.stack([part.min(0) for part in parts], 1)
        highs = np.stack([part.max(0) for part in parts], 1)
        bounds = bound(network, lows, highs)
        n_boxes += len(parts)
        least, where = _least(bounds, parts, lows, highs)
        open_ = np.flatnonzero(least < margin)
        if not len(open_):
            continue
        middles = np.array([parts[i].mean(0) for i in open_])
        if (bad := _violating(network, np.concatenate([where[open_], middles]), margin)) is not None:
            return Verdict(False, bad, n_boxes)
        axes = split_axis(bounds, open_, highs[:, open_] - lows[:, open_])
        for i, axis in zip(open_, axes, strict=True):
            middle = (lows[axis, i] + highs[axis, i]) / 2
            if not lows[axis, i] < middle < highs[axis, i]:  # as small as numbers allow, still undecided
                return Verdict(None, None, n_boxes)
            normal = np.eye(2)[axis]
            for sign in (1.0, -1.0):
                if len(part := clip(parts[i], sign * normal, sign * middle)):
                    heapq.heappush(heap, (float(least[i]), next(count), part))
    return Verdict(True, None, n_boxes)


def _least(bounds: LinearBounds, parts: list[Floats], lows: Floats, highs: Floats) -> tuple[Floats, Floats]:
    """Lower bound of the least output in each part, (n,), and the vertex where it is attained, (n, 2)."""
    longest = max(len(part) for part in parts)
    corners = np.stack([np.pad(part, ((0, longest - len(part)), (0, 0)), "edge") for part in parts])
    centre, radius = (lows + highs).T[:, None] / 2, (highs - lows).T[:, None] / 2
    place = np.where(radius > 0, (corners - centre) / np.where(radius > 0, radius, 1.0), 0.0)
    function = bounds.low_function
    values = function[:, 0, :, None] + np.einsum("rjn,nmj->rnm", function[:, 1:], place)
    vertex = values.min(0).argmin(1)
    least = np.maximum(values.min(2), bounds.low).min(0)
    return least, corners[np.arange(len(parts)), vertex]


def _violating(network: LayeredNetwork, points: Floats, margin: float) -> Floats | None:
    values = network(points).min(1)
    worst = int(values.argmin())
    return np.asarray(points[worst]) if values[worst] < margin else None
