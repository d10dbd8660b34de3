"""Into how many directions the neurons of a layer have condensed: a covering problem, with its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse.csgraph import connected_components
from scipy.special import betainc

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Order = NDArray[np.intp]

EXACT = 64
"""Neurons that are linked to one another, directly or not, up to which the least number is computed."""
NODES = 2000
"""Nodes of the branch and bound; a limit on time would not give the same answer twice."""
NEVER = 1e-6
"""Expected number of close pairs below which random directions are all taken to be apart."""


class Directions(NamedTuple):
    """A number of directions that cover all neurons.

    Attributes:
        value: Greedy, in the order given.
        low: Least over the orders tried.
        high: Largest over the orders tried.
        least: The least possible where every direction is that of a neuron; NaN where it was not computed.
        bound: No fewer directions can do, whatever they are.
    """

    value: float
    low: float
    high: float
    least: float
    bound: float


def cosines(vectors: Floats) -> Floats:
    """Returns the cosine similarity of every two rows, none of them zero: shape (n, n), in [−1, 1]."""
    unit = unit_vectors(vectors)
    return np.asarray(np.clip(unit @ unit.T, -1, 1))


def unit_vectors(vectors: Floats) -> Floats:
    """Returns the rows divided by their length."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def effective_directions(cosine: Floats, threshold: float, orders: Sequence[Order]) -> Directions:
    """Counts the directions such that every neuron has a cosine above the threshold with one of them.

    Each neuron in turn that no direction covers yet becomes one. The number depends on the order: hence the
    range over several, and two bounds. For the unsigned number, which takes w and −w for one direction, give
    the absolute values of the cosines.

    Args:
        cosine: Of every two neurons, shape (n, n).
        threshold: In (0, 1).
        orders: Permutations of the neurons; the first gives `value`.

    Returns:
        The number with its range over the orders, the least with neurons as directions, and a bound.

    References:
        Luo, Xu, Ma and Zhang, "Phase diagram for two-layer ReLU neural networks at infinite-width limit",
        JMLR 22 (2021).
    """
    n = len(cosine)
    if n == 0:
        return Directions(0, 0, 0, 0, 0)
    close = cosine > threshold
    np.fill_diagonal(close, True)
    counts = [len(representatives(close, order)) for order in orders]
    # Two neurons in the cap of one direction are less than 2 acos(threshold) apart.
    together = cosine > 2 * threshold**2 - 1
    np.fill_diagonal(together, True)
    bound = len(representatives(together, np.argsort(together.sum(1), kind="stable")))
    low = min(counts)
    least = float(low) if low == bound else _least(close)
    return Directions(counts[0], low, max(counts), least, bound)


def representatives(close: Bools, order: Order) -> list[int]:
    """Returns the neurons that become directions when they are gone through in an order.

    They are pairwise not close, and every neuron is close to one of them.
    """
    free = np.ones(len(close), dtype=bool)
    chosen = []
    for neuron in order.tolist():
        if free[neuron]:
            chosen.append(neuron)
            free &= ~close[neuron]
            if not free.any():
                break
    return chosen


def _least(close: Bools) -> float:
    """The least number of neurons that are close to all: each connected part by branch and bound."""
    n_parts, part = connected_components(close, directed=False)
    total = 0.0
    for i in range(n_parts):
        inside = np.flatnonzero(part == i)
        block = close[np.ix_(inside, inside)]
        if block.all(1).any():
            total += 1
        elif len(inside) > EXACT:
            return float("nan")
        else:
            total += _least_cover(block)
    return total


def _least_cover(close: Bools) -> float:
    cover = _reduced(close)
    n = cover.shape[1]
    found = milp(
        np.ones(n),
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(cover.astype(float), lb=1),
        options={"node_limit": NODES},
    )
    return float(round(found.fun)) if found.status == 0 else float("nan")


def _reduced(cover: Bools) -> Bools:
    """The same covering problem, shape (neurons to cover, directions), without what decides nothing.

    A direction that covers no more than another one is not needed, and a neuron is covered with any one whose
    directions are all among its own. Of neurons in a plane this leaves a handful.
    """
    while True:
        size = cover.shape
        cover = cover[:, _maximal(cover.T)]
        cover = cover[~_implied(cover)]
        if cover.shape == size:
            return cover


def _maximal(sets: Bools) -> Bools:
    """Which rows are contained in no other one; of equal ones the first."""
    inside = (sets.astype(float) @ (~sets).T.astype(float)) == 0
    earlier = np.tri(len(sets), k=-1, dtype=bool)
    return np.asarray(~((inside & (~inside.T | earlier)).any(1)))


def _implied(sets: Bools) -> Bools:
    """Which rows contain another one; of equal ones all but the first."""
    inside = (sets.astype(float) @ (~sets).T.astype(float)) == 0
    later = np.tri(len(sets), k=-1, dtype=bool)
    contains = inside.T & (~inside | later)
    np.fill_diagonal(contains, False)
    return np.asarray(contains.any(1))


def chance_directions(
    n_neurons: int, fan_in: int, thresholds: Sequence[float], draws: int, rng: np.random.Generator
) -> Floats:
    """Counts the directions of as many neurons whose directions are uniformly distributed.

    In few dimensions even these need few directions: in a plane, about 2π/acos(threshold) at most.

    Args:
        n_neurons: How many.
        fan_in: Dimensions.
        thresholds: As for `effective_directions`.
        draws: Independent repetitions.
        rng: Draws the directions.

    Returns:
        Signed and unsigned numbers, shape (draws, 2, n_thresholds).
    """
    pairs = n_neurons * (n_neurons - 1)
    if fan_in > 1 and pairs * _close_probability(fan_in, min(thresholds)) < NEVER:
        return np.full((draws, 2, len(thresholds)), float(n_neurons))
    counts = np.empty((draws, 2, len(thresholds)))
    order = np.arange(n_neurons)
    for draw in range(draws):
        cosine = cosines(rng.standard_normal((n_neurons, fan_in)))
        for sign, values in enumerate((cosine, np.abs(cosine))):
            counts[draw, sign] = [len(representatives(values > t, order)) for t in thresholds]
    return counts


def _close_probability(fan_in: int, threshold: float) -> float:
    """Of two uniform directions, of either sign: (1 − cos²) is beta distributed."""
    return float(betainc((fan_in - 1) / 2, 0.5, 1 - threshold**2))


def principal_plane(vectors: Floats, weights: Floats) -> Floats:
    """Finds the plane that holds most of the directions: the angle in it is a neuron's orientation.

    Of two dimensions, an input weight and a bias, it is the plane itself, as in the papers' pictures; else
    the two leading eigenvectors of Σ_k weight_k ŵ_k ŵ_kᵀ, ŵ = w/|w|. Uses `eigh`: an eigensolver for general
    matrices returns complex numbers for a layer that has condensed completely.

    Args:
        vectors: Shape (n, fan_in), no row zero.
        weights: Of each neuron, not negative, shape (n,).

    Returns:
        Orthonormal rows, shape (2, fan_in); the second is zero where there is only one direction.
    """
    fan_in = vectors.shape[1]
    if fan_in <= 2:
        return np.eye(2)[:, :fan_in]
    scaled = unit_vectors(vectors) * np.sqrt(weights / weights.sum())[:, None]
    few = len(vectors) < fan_in
    values, columns = np.linalg.eigh(scaled @ scaled.T if few else scaled.T @ scaled)
    plane = np.zeros((2, fan_in))
    for row, at in enumerate((-1, -2)):
        if len(values) < -at or values[at] <= 1e-12 * values[-1]:
            continue
        axis = scaled.T @ columns[:, at] / np.sqrt(values[at]) if few else columns[:, at]
        plane[row] = axis * np.sign(axis[np.argmax(np.abs(axis))])
    return plane


def orientation(vectors: Floats, plane: Floats) -> tuple[Floats, Floats]:
    """Returns each neuron's angle in a plane, and how much of its direction lies in it.

    The published sign(b)·acos(w/|w|) is 0 for every neuron with b = 0, whichever way it points; this is
    atan2, which tells 0 from π.

    Args:
        vectors: Shape (n, fan_in), no row zero.
        plane: From `principal_plane`.

    Returns:
        Angles in (−π, π], shape (n,), and squared lengths of the unit vectors' projections, in [0, 1].
    """
    x, y = (unit_vectors(vectors) @ plane.T).T
    y = np.where(y == 0, 0.0, y)  # atan2(−0, −1) is −π
    return np.arctan2(y, x), x**2 + y**2
