"""How near the stable corrections within a box of centres can be, many boxes at a time.

A centre c is a stable correction if every output is at least the margin in the whole box around c. An output
is at most a linear function a.u + a_0 on everything that those boxes cover, so its value at the worst point
around c, a.e(c) + a_0, must reach the margin. The ends e_j(c_j) = max(c_j - r_j, low_j) for a_j > 0 and
min(c_j + r_j, high_j) for a_j < 0 make a_j e_j a convex function of c_j, which its chord over the box bounds.
What remains, a linear inequality and a weighted distance, is a fractional knapsack with a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.linear_bounds import LinearBounds, bound

# Room left for rounding, as a part of the terms that were added: a bound may be loose, never wrong.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class CentreBounds:
    """What is known about n boxes of centres.

    Args:
        distance: Nothing in the box is nearer; infinite where it has no stable correction, (n,).
        candidate: The nearest centre that the linear functions do not exclude, (k, n).
        all_stable: Whether every centre in the box is a stable correction, (n,).
        low: Lower corners of what is left of the boxes, (k, n).
        high: Upper corners, (k, n).
        axis: The feature to split, (n,).
        descent: Slopes of the least output's lower bound, (k, n): where to look for counterexamples.
    """

    distance: Floats
    candidate: Floats
    all_stable: np.ndarray
    low: Floats
    high: Floats
    axis: np.ndarray
    descent: Floats


def bound_centres(
    judgement: Judgement, low: Floats, high: Floats, *, nearest_known: float = np.inf
) -> CentreBounds:
    """Bound the distance of the stable corrections with centres in boxes within the domain.

    Cost: one `bound` of the boxes grown by the radius.

    Args:
        judgement: With k features.
        low: Lower corners, (k, n).
        high: Upper corners, (k, n).
        nearest_known: Centres that are not nearer than this are of no interest and may be cut off.
    """
    radius = judgement.radius[:, None]
    bottom, top = judgement.low[:, None], judgement.high[:, None]
    grown_low, grown_high = np.maximum(low - radius, bottom), np.minimum(high + radius, top)
    bounds = bound(judgement.network, grown_low, grown_high)
    all_stable = bounds.low.min(0) >= judgement.margin

    middle, half = (grown_low + grown_high) / 2, (grown_high - grown_low) / 2
    unit = np.where(half > 0, half, 1.0)
    slopes = bounds.high_function[:, 1:].transpose(1, 0, 2)  # (k, r, n), for one half-width
    constant = bounds.high_function[:, 0]
    end_at_high = ((np.maximum(high - radius, bottom) - middle) / unit)[:, None]
    end_at_low = ((np.minimum(low + radius, top) - middle) / unit)[:, None]
    at_low = np.where(slopes > 0, -slopes, slopes * end_at_low)
    at_high = np.where(slopes > 0, slopes * end_at_high, slopes)
    rounding = _ROUNDING * (abs(constant) + np.abs(slopes).sum(0) + abs(judgement.margin))
    surplus = constant + np.maximum(at_low, at_high).sum(0) + rounding - judgement.margin
    possible = (surplus >= 0).all(0) & (bounds.high.min(0) + rounding.max(0) >= judgement.margin)

    start = judgement.start[:, None]
    nearest = np.clip(start, low, high)
    gap = np.abs(nearest - start)
    width = high - low
    rise = (at_high - at_low) / np.where(width > 0, width, 1.0)[:, None]
    here = constant + at_low.sum(0) + (rise * (nearest - low)[:, None]).sum(0)
    room = np.where(rise > 0, (high - nearest)[:, None], (nearest - low)[:, None])
    solve = _least_sum if judgement.norm == "l1" else _least_maximum
    need = judgement.margin - here
    cost, _ = solve(need - rounding, np.abs(rise), room, judgement.weights, gap)
    distance = cost.max(0)
    row = cost.argmax(0)
    boxes = np.arange(low.shape[1])
    # The candidate asks for a little more, so that rounding does not make it miss the margin.
    chosen = row[None], boxes[None]
    _, move = solve(
        (need + 2 * rounding)[chosen],
        np.abs(rise)[:, row, boxes][:, None],
        room[:, row, boxes][:, None],
        judgement.weights,
        gap,
    )
    candidate = nearest + np.sign(rise[:, row, boxes]) * move[:, 0]
    new_low, new_high = _contract(judgement, low, high, rise, surplus, gap, nearest_known)
    possible = (possible & (new_low <= new_high).all(0)) | all_stable
    return CentreBounds(
        np.where(possible, distance, np.inf),
        np.clip(candidate, low, high),
        all_stable,
        new_low,
        new_high,
        _axis(bounds, new_high - new_low, 2 * half),
        bounds.low_function[bounds.low.argmin(0), 1:, boxes].T,
    )


def _least_sum(
    need: Floats, rise: Floats, room: Floats, weights: Floats, gap: Floats
) -> tuple[Floats, Floats]:
    """The least cost Σ w (gap + move) with Σ rise * move ≥ need and move ≤ room: the steepest first.

    Args:
        need: (r, n).
        rise: (k, r, n).
        room: (k, r, n).
        weights: (k,).
        gap: What is already spent, (k, n).

    Returns:
        The cost, (r, n), and the moves, (k, r, n).
    """
    order = np.argsort(-(rise / weights[:, None, None]), axis=0, kind="stable")
    gains = np.take_along_axis(rise * room, order, 0)
    before = np.cumsum(gains, 0) - gains
    taken = np.clip(need - before, 0, gains)
    steepness = np.take_along_axis(rise, order, 0)
    moves = np.where(steepness > 0, taken / np.where(steepness > 0, steepness, 1.0), 0.0)
    move = np.empty_like(moves)
    np.put_along_axis(move, order, moves, 0)
    spent = (weights[:, None] * gap).sum(0)
    return spent + (weights[:, None, None] * move).sum(0), move


def _least_maximum(
    need: Floats, rise: Floats, room: Floats, weights: Floats, gap: Floats
) -> tuple[Floats, Floats]:
    """The least cost max w (gap + move) with Σ rise * move ≥ need: all move until their room ends.

    Shapes as for `_least_sum`.
    """
    price = weights[:, None, None]
    spent = (weights[:, None] * gap).max(0)
    ends = np.maximum(np.sort(price * (gap[:, None] + room), axis=0), spent)
    levels = np.concatenate([np.broadcast_to(spent, (1, *need.shape)), ends])

    def moves_at(level: Floats) -> Floats:
        moves: Floats = np.clip(level / price - gap[:, None], 0, room)
        return moves

    gained = np.stack([(rise * moves_at(level)).sum(0) for level in levels])
    enough = gained >= need
    after = np.where(enough.any(0), enough.argmax(0), len(levels) - 1)
    before = np.maximum(after - 1, 0)

    def pick(values: Floats, index: np.ndarray) -> Floats:
        return np.asarray(np.take_along_axis(values, index[None], 0)[0])

    start, end = pick(gained, before), pick(gained, after)
    part = np.where(end > start, (need - start) / np.where(end > start, end - start, 1.0), 0.0)
    left, right = pick(levels, before), pick(levels, after)
    level = np.where(after > 0, left + np.clip(part, 0, 1) * (right - left), left)
    return level, moves_at(level)


def _contract(
    judgement: Judgement,
    low: Floats,
    high: Floats,
    rise: Floats,
    surplus: Floats,
    gap: Floats,
    nearest_known: float,
) -> tuple[Floats, Floats]:
    """Cut off what the linear functions exclude, and what is not nearer than what is known."""
    steps = np.full(rise.shape, np.inf)
    np.divide(np.broadcast_to(np.maximum(surplus, 0), rise.shape), np.abs(rise), out=steps, where=rise != 0)
    new_low = np.maximum(low, np.where(rise > 0, high[:, None] - steps, -np.inf).max(1))
    new_high = np.minimum(high, np.where(rise < 0, low[:, None] + steps, np.inf).min(1))
    if nearest_known < np.inf:
        weights = judgement.weights[:, None]
        others = (weights * gap).sum(0) - weights * gap if judgement.norm == "l1" else 0.0
        reach = (nearest_known * (1 + _ROUNDING) - others) / weights
        start = judgement.start[:, None]
        new_low, new_high = np.maximum(new_low, start - reach), np.minimum(new_high, start + reach)
    return new_low, new_high


def _axis(bounds: LinearBounds, widths: Floats, grown: Floats) -> np.ndarray:
    """The feature whose split narrows the bounds most: as `split_axis`, but the radius is not split."""
    boxes = np.arange(widths.shape[1])
    worst = bounds.low.argmin(0)
    slopes = np.abs(bounds.low_function[worst, 1:, boxes]) + np.abs(bounds.high_function[worst, 1:, boxes])
    room = bounds.high[worst, boxes] - bounds.low[worst, boxes]
    share = widths / np.where(grown > 0, grown, 1.0)
    part = widths / np.maximum(grown.sum(0), 1e-300)
    return np.asarray((slopes.T / 2 * share + room * part).argmax(0))
