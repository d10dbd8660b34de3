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
from dynprobe.analyzers.numerics.network_milp import (
    Indices,
    Program,
    Scaled,
    Solution,
    add_network,
    unstable,
)

# Beyond these binaries and non-zero coefficients the solver gets nowhere, and notices late that its time is
# up; beyond these entries of the affine maps of all neurons, building alone takes long.
_MOST_BINARIES, _MOST_COEFFICIENTS, _MOST_ENTRIES = 3000, 250_000, 20_000_000
# Most centres that are compared with what the solver claims, and multiplications that this may take.
_N_CHECKED, _CHECK_COST = 512, 1e8
# Multiplications that bounding hidden neurons backwards may take, about a second.
_BACKWARD_COST = 1e10
# Upper bound of the outputs as the solver sees them.
_LARGEST_OUTPUT = 100.0
# Least unit of outputs as a part of what they may be below zero: their coefficients stay moderate.
_LEAST_OUTPUT = 1e-4
# Most values of an integer feature that are told apart.
_MOST_VALUES = 1e4
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
        """None where no allowed centre is within that distance."""
        room = within / judgement.weights
        low = np.maximum(judgement.low, judgement.start - room)
        high = np.minimum(judgement.high, judgement.start + room)
        first, last = judgement.allowed(low, high)
        # an allowed value may lie between ends that rounding has swapped
        low, high = np.where(judgement.whole, np.minimum(low, high), low), np.maximum(low, high)
        return cls(judgement, within, low, high) if (first <= last).all() else None

    @property
    def unit(self) -> float:
        """What distances are measured in, so that the solver's tolerance is small against them."""
        return self.within if self.within > 0 else 1.0

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
        program: Minimises the distance, in units of the domain.
        domain: Where centres may lie.
        offsets: (k,) each.
        centre: The centre, (k,).
        outputs: Rows that keep the outputs at the margin.
    """

    program: Program
    domain: Domain
    offsets: list[Floats]
    centre: Scaled
    outputs: Indices

    def centre_of(self, values: Floats) -> Floats:
        """The centre (k,) that a solution stands for."""
        return self.domain.judgement.on_grid(self.centre.of(values))

    def holds(self, centres: Floats) -> np.ndarray:
        """Whether the network itself holds at all offsets from centres (n, k), (n,)."""
        points = np.concatenate([self.domain.moved(centres, offset) for offset in self.offsets])
        good = self.domain.judgement.values(points) >= self.domain.judgement.margin
        return np.asarray(good.reshape(len(self.offsets), -1).all(0))

    def contradicts(self, bound: float) -> bool:
        """Whether a centre that the solver excludes, nearer than `bound`, holds at all offsets.

        What it claims cannot be proven again at a moderate cost, but a gross error shows at single points.
        """
        centres = self._some_centres()
        near = self.domain.judgement.distance(centres) < bound * (1 - 1e-6)
        return bool(self.holds(centres[near]).any()) if near.any() else False

    def _some_centres(self) -> Floats:
        """Some allowed centres, (n, k): random ones, and ones that change one or two features only."""
        judgement, low, high = self.domain.judgement, self.domain.low, self.domain.high
        generator = np.random.default_rng(0)
        affordable = int(_CHECK_COST / (judgement.network.n_entries * len(self.offsets)))
        k, n = len(low), min(_N_CHECKED, max(affordable, 1))
        random = low + (high - low) * generator.random((n, k))
        ends = np.where(generator.random((n, k)) < 0.5, low, high)
        some = np.where(generator.random((n, 1)) < 0.5, random, ends)
        few = generator.random((n, k)).argsort(1) < generator.integers(1, 3, (n, 1))
        start = np.clip(judgement.start, low, high)
        half = np.arange(n)[:, None] < n // 2
        changed = np.where(few | half, some, start)
        return judgement.on_grid(start + generator.random((n, 1)) ** 0.5 * (changed - start))

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

    Neither is there one where the solver cannot deal with the size of a coefficient.

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
        below = _LEAST_OUTPUT * np.abs(bounds.low[:, i])
        unit = np.maximum(np.abs(bounds.high[:, i]), np.maximum(abs(judgement.margin), below))
        unit = np.where(unit > 0, unit, 1.0) / _LARGEST_OUTPUT
        low, rows = (judgement.margin - constant) / unit, matrix / unit[:, None]
        outputs.append(program.rows(low, np.inf, (columns, rows), n=network.n_outputs))
    if program.n_entries > _MOST_COEFFICIENTS or not program.is_moderate:
        return None
    return Model(program, domain, offsets, centre, np.concatenate(outputs))


def _add_between(program: Program, low: Floats, high: Floats) -> Scaled:
    """Values in [low, high], (k,), by variables in [0, 1]."""
    width = high - low
    columns = program.variables(np.zeros(len(low)), np.where(width > 0, 1.0, 0.0))
    return Scaled(columns, np.where(width > 0, width, 1.0), low)


def _add_centre(program: Program, domain: Domain) -> Scaled:
    judgement = domain.judgement
    centre = _add_between(program, domain.low, domain.high)
    # Of so many values the solver loses count. As any number they only allow more than there is.
    whole = np.flatnonzero(judgement.whole & (domain.high - domain.low <= _MOST_VALUES * judgement.step))
    if len(whole):
        step, unit, n = judgement.step[whole], centre.unit[whole], len(whole)
        first, last = (ends[whole] for ends in judgement.allowed(domain.low, domain.high))
        count = program.variables(np.zeros(n), np.round((last - first) / step), integer=True)
        # by less than their slack they may lie outside of the domain
        off = np.clip((first - centre.base[whole]) / unit, 0.0, 1.0)
        program.rows(off, off, (centre.columns[whole], np.ones(n)), (count, -step / unit), n=n)
    return centre


def _add_distance(program: Program, domain: Domain, centre: Scaled) -> None:
    """The cost of a centre, at most that of the domain, in its units."""
    judgement, k = domain.judgement, domain.judgement.n_features
    weights = judgement.weights / domain.unit
    furthest = weights * np.maximum(
        np.abs(domain.low - judgement.start), np.abs(domain.high - judgement.start)
    )
    most = domain.within / domain.unit
    if judgement.norm == "l1":
        cost = program.variables(np.zeros(k), furthest, cost=1.0)
        program.rows(0.0, most, (cost, np.ones((1, k))), n=1)
        each = np.eye(k)
    else:
        cost = program.variables(np.zeros(1), np.array([min(most, furthest.max())]), cost=1.0)
        each = np.ones((k, 1))
    slope, start = weights * centre.unit, weights * (judgement.start - centre.base)
    program.rows(-start, np.inf, (cost, each), (centre.columns, -slope), n=k)
    program.rows(start, np.inf, (cost, each), (centre.columns, slope), n=k)


def _add_moved(program: Program, domain: Domain, centre: Scaled, offset: Floats) -> Scaled:
    """Points at an offset from the centre, clipped to the allowed ranges, exactly.

    A binary q is 1 where a point is clipped. At the upper end h, p = min(c + offset, h) is p ≤ c + offset,
    p ≤ h, p ≥ c + offset - q (highest c + offset - h) and p ≥ h - (1 - q) (h - lowest p). All rows are in
    units of the centre's.
    """
    if not offset.any():
        return centre
    low, high = domain.ends(offset)
    points = _add_between(program, low, high)
    sign = np.where(offset >= 0, 1.0, -1.0)
    limit = np.where(offset >= 0, domain.judgement.high, domain.judgement.low)
    # along `sign`: how far the points may be clipped, and how far they may stay below the limit
    beyond = sign * (np.where(offset >= 0, domain.high, domain.low) + offset - limit)
    short = sign * (limit - np.where(offset >= 0, low, high))
    unit = centre.unit

    def in_units(values: Scaled, of: np.ndarray) -> tuple[Indices, Floats]:
        return values.columns[of], (sign * values.unit / unit)[of]

    def minus_centre(of: np.ndarray) -> tuple[Indices, Floats]:
        columns, factors = in_units(centre, of)
        return columns, -factors

    along = sign * (offset + centre.base - points.base) / unit
    free = beyond <= 0
    program.rows(along[free], along[free], in_units(points, free), minus_centre(free), n=int(free.sum()))
    i = (beyond > 0) & (short > 0)
    if n := int(i.sum()):
        clipped = program.variables(np.zeros(n), np.ones(n), integer=True)
        moved = in_units(points, i), minus_centre(i)
        program.rows(-np.inf, along[i], *moved, n=n)
        program.rows(along[i], np.inf, *moved, (clipped, (beyond / unit)[i]), n=n)
        least = (sign * (limit - points.base) - short)[i] / unit[i]
        program.rows(least, np.inf, in_units(points, i), (clipped, -(short / unit)[i]), n=n)
    return points
