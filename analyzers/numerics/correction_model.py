"""The mixed-integer linear program of a correction within a distance: what `correction_milp` has solved.

A stable correction is asked for at single offsets from its centre, with one copy of the network for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork
from dynprobe.analyzers.numerics.linear_bounds import LinearBounds, bound
from dynprobe.analyzers.numerics.network_milp import Indices, Program, Solution, add_network, unstable

# Beyond these binaries and non-zero coefficients the solver gets nowhere, and notices late that its time is
# up; beyond these entries of the affine maps of all neurons, building alone takes long.
_MOST_BINARIES, _MOST_COEFFICIENTS, _MOST_ENTRIES = 3000, 250_000, 20_000_000
# Multiplications that bounding hidden neurons backwards may take, about a second.
_BACKWARD_COST = 1e10
# Upper bound of the outputs as the solver sees them.
_LARGEST_OUTPUT = 100.0
# By what share of their largest values outputs have to exceed the margin, until a centre holds when computed.
_EXCESSES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Domain:
    """Where centres may lie: within a distance of the start.

    Args:
        judgement: What is asked for.
        within: The distance.
        low: (k,).
        high: (k,).
    """

    judgement: Judgement
    within: float
    low: Floats
    high: Floats

    @classmethod
    def of(cls, judgement: Judgement, within: float) -> Domain | None:
        """None where no centre is within that distance."""
        room = within / judgement.weights
        low = np.maximum(judgement.low, judgement.start - room)
        high = np.minimum(judgement.high, judgement.start + room)
        return cls(judgement, within, low, high) if (low <= high).all() else None

    def ends(self, offset: Floats) -> tuple[Floats, Floats]:
        """Where the points at an offset from the centre may lie, (k,) each."""
        return self.moved(self.low, offset), self.moved(self.high, offset)

    def moved(self, point: Floats, offset: Floats) -> Floats:
        """The point at an offset, within the allowed ranges."""
        return np.asarray(np.clip(point + offset, self.judgement.low, self.judgement.high))

    def bounds(self, offsets: list[Floats]) -> LinearBounds:
        """Bounds of the network on the domain, moved by each of the offsets."""
        low, high = (np.stack(ends, 1) for ends in zip(*map(self.ends, offsets), strict=True))
        network = self.judgement.network
        reach = None
        if self.judgement.norm == "l1" and np.isfinite(self.within):
            # moving and clipping never takes a point further from the start than it was
            starts = np.stack([self.moved(self.judgement.start, offset) for offset in offsets], 1)
            reach = reach_of_ball(starts, self.judgement.weights, self.within, low, high)
        return bound(
            network, low, high, backward=_backward_cost(network) * len(offsets) <= _BACKWARD_COST, reach=reach
        )


def _backward_cost(network: LayeredNetwork) -> float:
    """Multiplications per box of bounding the neurons of every hidden layer through all layers before."""
    widths = np.array([layer.n_neurons for layer in network.layers[:-1]], float)
    sizes = [
        sum(matrix.nnz if sparse.issparse(matrix) else matrix.size for _, matrix in layer.sources)
        for layer in network.layers[:-1]
    ]
    return float(2 * (widths * np.cumsum(np.array(sizes, float))).sum())


def reach_of_ball(
    starts: Floats, weights: Floats, within: float, low: Floats, high: Floats
) -> Callable[[Floats], Floats]:
    """Largest values of linear functions on the part of boxes with Σ w |u - start| ≤ within.

    Features are moved in the order of gain per cost until the distance is used up: a fractional knapsack.
    """
    radius = (high - low) / 2
    scale = np.where(radius > 0, radius, 1.0)
    origin = (np.clip(starts, low, high) - (low + high) / 2) / scale  # in the coordinates t of the boxes
    cost = weights[:, None] * scale

    def reach(slopes: Floats) -> Floats:
        room = np.where(slopes > 0, 1 - origin, 1 + origin) * cost
        rate = np.abs(slopes) / cost
        order = np.argsort(-rate, axis=1)
        room, rate = np.take_along_axis(room, order, 1), np.take_along_axis(rate, order, 1)
        left = np.maximum(within - (np.cumsum(room, 1) - room), 0)
        return np.asarray((slopes * origin).sum(1) + (rate * np.minimum(room, left)).sum(1))

    return reach


def n_unstable(domain: Domain, bounds: LinearBounds) -> int:
    """How many neurons may change their slope, in all copies."""
    layers = zip(domain.judgement.network.layers, bounds.neurons, strict=False)
    return sum(int(unstable(layer.activation, *ends).sum()) for layer, ends in layers if layer.activation)


@dataclass(frozen=True)
class Model:
    """A program whose solutions are centres at which the network holds at the offsets.

    Args:
        program: Minimises the distance.
        domain: Where centres may lie.
        offsets: (k,) each.
        centre: Columns of the centre, (k,).
        outputs: Rows that keep the outputs at the margin.
    """

    program: Program
    domain: Domain
    offsets: list[Floats]
    centre: Indices
    outputs: Indices

    def centre_of(self, values: Floats) -> Floats:
        """The centre (k,) that a solution stands for."""
        return self.domain.judgement.on_grid(values[self.centre])

    def holds(self, centre: Floats) -> bool:
        """Whether the network itself holds at all offsets from a centre."""
        points = np.stack([self.domain.moved(centre, offset) for offset in self.offsets])
        return bool((self.domain.judgement.values(points) >= self.domain.judgement.margin).all())

    def centres(self, solution: Solution, deadline: float) -> Iterator[Floats]:
        """Nearest centres with the same linear piece of the network, ever further inside of it."""
        assert solution.values is not None
        for excess in _EXCESSES:
            if time.monotonic() > deadline:
                return
            again = self.program.solve(
                deadline=deadline,
                fixed=solution.values,
                raised=(self.outputs, np.full(len(self.outputs), excess * _LARGEST_OUTPUT)),
            )
            if again.values is not None:
                yield self.centre_of(again.values)


def build(domain: Domain, offsets: list[Floats], bounds: LinearBounds) -> Model | None:
    """The program of the nearest centre at which the network holds at all offsets; None if too large.

    Args:
        domain: Where centres may lie.
        offsets: (k,) each.
        bounds: Of the network on the domain moved by each of them, `domain.bounds(offsets)`.
    """
    judgement, network = domain.judgement, domain.judgement.network
    n_binaries = n_unstable(domain, bounds)
    n_map = (n_binaries + judgement.n_features) * (network.n_hidden + network.n_outputs)
    if n_binaries > _MOST_BINARIES or n_map > _MOST_ENTRIES:
        return None
    program = Program()
    centre = _add_centre(program, domain)
    _add_distance(program, domain, centre)
    outputs = []
    for i, offset in enumerate(offsets):
        inputs = _add_moved(program, domain, centre, offset)
        neurons = tuple((least[:, i], most[:, i]) for least, most in bounds.neurons)
        columns, matrix, constant = add_network(program, network, inputs, neurons)
        # in units in which the solver's absolute tolerance is small against a margin
        unit = np.maximum(np.abs(bounds.high[:, i]), abs(judgement.margin)) / _LARGEST_OUTPUT
        low, rows = (judgement.margin - constant) / unit, matrix / unit[:, None]
        outputs.append(program.rows(low, np.inf, (columns, rows), n=network.n_outputs))
    if program.n_entries > _MOST_COEFFICIENTS:
        return None
    return Model(program, domain, offsets, centre, np.concatenate(outputs))


def _add_centre(program: Program, domain: Domain) -> Indices:
    judgement = domain.judgement
    centre = program.variables(domain.low, domain.high)
    if judgement.spacing is None or judgement.origin is None:
        return centre
    whole = np.flatnonzero(judgement.spacing > 0)
    step, origin = judgement.spacing[whole], judgement.origin[whole]
    first = np.ceil((domain.low[whole] - origin) / step - 1e-9)
    last = np.floor((domain.high[whole] - origin) / step + 1e-9)
    count = program.variables(first, last, integer=True)
    program.rows(origin, origin, (centre[whole], np.ones(len(whole))), (count, -step), n=len(whole))
    return centre


def _add_distance(program: Program, domain: Domain, centre: Indices) -> None:
    """The cost of a centre, at most that of the domain."""
    judgement = domain.judgement
    k, start, weights = judgement.n_features, judgement.start, judgement.weights
    furthest = weights * np.maximum(np.abs(domain.low - start), np.abs(domain.high - start))
    if judgement.norm == "l1":
        cost = program.variables(np.zeros(k), furthest, cost=1.0)
        program.rows(0.0, domain.within, (cost, np.ones((1, k))), n=1)
        each = np.eye(k)
    else:
        most = np.array([min(domain.within, furthest.max())])
        cost = program.variables(np.zeros(1), most, cost=1.0)
        each = np.ones((k, 1))
    program.rows(-weights * start, np.inf, (cost, each), (centre, -weights), n=k)
    program.rows(weights * start, np.inf, (cost, each), (centre, weights), n=k)


def _add_moved(program: Program, domain: Domain, centre: Indices, offset: Floats) -> Indices:
    """Points at an offset from the centre, clipped to the allowed ranges, exactly.

    A binary q is 1 where a point is clipped. At the upper end h, p = min(c + offset, h) is p ≤ c + offset,
    p ≤ h, p ≥ c + offset - q (highest c + offset - h) and p ≥ h - (1 - q) (h - lowest p).
    """
    low, high = domain.ends(offset)
    points = program.variables(low, high)
    one = np.ones(len(offset))
    sign = np.where(offset >= 0, one, -one)
    limit = np.where(offset >= 0, domain.judgement.high, domain.judgement.low)
    # along `sign`: how far the points may be clipped, and how far they may stay below the limit
    beyond = sign * (np.where(offset >= 0, domain.high, domain.low) + offset - limit)
    short = sign * (limit - np.where(offset >= 0, low, high))
    free = beyond <= 0
    program.rows(
        offset[free], offset[free], (points[free], one[free]), (centre[free], -one[free]), n=free.sum()
    )
    i = (beyond > 0) & (short > 0)
    if n := int(i.sum()):
        clipped = program.variables(np.zeros(n), np.ones(n), integer=True)
        along, signs = sign[i] * offset[i], sign[i]
        moved = (points[i], signs), (centre[i], -signs)
        program.rows(-np.inf, along, *moved, n=n)
        program.rows(along, np.inf, *moved, (clipped, beyond[i]), n=n)
        program.rows(signs * limit[i] - short[i], np.inf, (points[i], signs), (clipped, -short[i]), n=n)
    return points
