"""Whether a network's outputs are all at least a margin in a whole box: complete, by splitting the box."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork
from dynprobe.analyzers.numerics.linear_bounds import LinearBounds, bound, boxes_at_once

# Boxes bounded at once: large enough that products are efficient, small enough that the worst come first.
_BATCH = 64


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Args:
        holds: Whether the outputs are at least the margin in the whole box; None if time ran out before.
        counterexample: A point (k,) where they are not.
        n_boxes: Parts of the box that were bounded.
    """

    holds: bool | None
    counterexample: Floats | None = None
    n_boxes: int = 0


def verify(
    network: LayeredNetwork,
    low: Floats,
    high: Floats,
    margin: float,
    *,
    deadline: float = float("inf"),
    max_boxes: int = 1_000_000,
) -> Verdict:
    """Decide whether every output is at least `margin` for all u in [low, high].

    The worst parts of the box are split first, along the feature to which their bound is most sensitive. The
    arithmetic is float64 with rounding to nearest: numerically verified, not proven.

    Args:
        network: k inputs, r outputs.
        low: Lower corner, (k,).
        high: Upper corner, (k,).
        margin: Least output that counts.
        deadline: As `time.monotonic()` gives it.
        max_boxes: Give up after so many parts.
    """
    corners = np.array([low, high, (np.asarray(low) + high) / 2])
    if (bad := _violating(network, corners, margin)) is not None:
        return Verdict(False, bad)
    if (np.asarray(low) >= high).all():
        return Verdict(True)  # a point, which was just evaluated
    at_once = min(_BATCH, boxes_at_once(network))
    heap: list[tuple[float, int, Floats, Floats]] = [(-np.inf, 0, np.asarray(low), np.asarray(high))]
    n_boxes = 0
    while heap:
        if n_boxes >= max_boxes or time.monotonic() > deadline:
            return Verdict(None, None, n_boxes)
        batch = [heapq.heappop(heap) for _ in range(min(at_once, len(heap)))]
        lows, highs = np.stack([b[2] for b in batch], 1), np.stack([b[3] for b in batch], 1)
        bounds = bound(network, lows, highs)
        n_boxes += len(batch)
        open_ = np.flatnonzero(bounds.low.min(0) < margin)
        if not len(open_):
            continue
        lows, highs = lows[:, open_], highs[:, open_]
        if (bad := _violating(network, _suspects(bounds, open_, lows, highs), margin)) is not None:
            return Verdict(False, bad, n_boxes)
        axis = split_axis(bounds, open_, highs - lows)
        rank = bounds.low.min(0)[open_]
        for i, j in enumerate(axis):
            middle = (lows[j, i] + highs[j, i]) / 2
            if not lows[j, i] < middle < highs[j, i]:  # as small as numbers allow, and still undecided
                return Verdict(None, None, n_boxes)
            for side in (0, 1):
                a, b = lows[:, i].copy(), highs[:, i].copy()
                (b if side == 0 else a)[j] = middle
                n = n_boxes * 2 * _BATCH + 2 * i + side  # unique: ties never compare arrays
                heapq.heappush(heap, (float(rank[i]), n, a, b))
    return Verdict(True, None, n_boxes)


def split_axis(bounds: LinearBounds, boxes: np.ndarray, widths: Floats) -> np.ndarray:
    """For each of the boxes the feature to split, (n,).

    What a split gains is either the slope of the bounding functions, or their distance, which shrinks with
    the box. Slopes alone mislead: they vanish where a relaxation takes the flat line for every neuron.

    Args:
        bounds: Of the outputs on all boxes.
        boxes: Which of them.
        widths: Their widths, (k, n).
    """
    worst = bounds.low[:, boxes].argmin(0)
    slopes = np.abs(bounds.low_function[worst, 1:, boxes]) + np.abs(bounds.high_function[worst, 1:, boxes])
    room = bounds.high[worst, boxes] - bounds.low[worst, boxes]
    return np.asarray((slopes.T / 2 + room * widths / np.maximum(widths.sum(0), 1e-300)).argmax(0))


def _suspects(bounds: LinearBounds, boxes: np.ndarray, lows: Floats, highs: Floats) -> Floats:
    """Where the lower bound of each box is least, and the middle of the box, (2 n, k)."""
    worst = bounds.low[:, boxes].argmin(0)
    slopes = bounds.low_function[worst, 1:, boxes].T
    corner = np.where(slopes > 0, lows, highs)
    return np.asarray(np.concatenate([corner.T, ((lows + highs) / 2).T]))


def _violating(network: LayeredNetwork, points: Floats, margin: float) -> Floats | None:
    values = network(points).min(1)
    worst = int(values.argmin())
    return points[worst] if values[worst] < margin else None
