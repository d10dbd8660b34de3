"""The nearest correction of a judgement by mixed-integer linear programming, for piecewise linear networks.

Exact for any number of features, unlike splitting of boxes, but exponential in the number of neurons that may
change their slope. The encoding is that of Tjeng, Xiao and Tedrake, "Evaluating robustness of neural networks
with mixed integer programming", ICLR 2019 (section 4), with neurons bounded by linear functions on the ball
around the start within which a nearer correction lies. A stable correction is found by cutting sets (Mutapcic
and Boyd, "Cutting-set methods for robust convex optimization with pessimizing oracles", Optimization Methods
and Software 2009): one copy of the network per offset from the centre at which an earlier centre failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from dynprobe.analyzers.numerics.box_verifier import Verdict, verify
from dynprobe.analyzers.numerics.correction_problem import Bounds, Judgement
from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork
from dynprobe.analyzers.numerics.linear_bounds import LinearBounds, bound
from dynprobe.analyzers.numerics.network_milp import Indices, Program, Solution, add_network, unstable

# Beyond these the solver gets nowhere, and building alone takes long.
_MOST_BINARIES, _MOST_ENTRIES = 3000, 20_000_000
# Multiplications that bounding hidden neurons backwards may take, about a second.
_BACKWARD_COST = 1e10
# The solver holds rows and integers to 1e-6: its bounds are trusted to that much.
_SOLVER_ERROR = 1e-6
# By what share of their largest values outputs have to exceed the margin, until a centre holds when computed.
_EXCESSES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_BISECTIONS = 8
# Parts of a box that a verification may look at; less where an attempt is one of several.
_VERIFY_BOXES, _TRY_BOXES = 50_000, 3_000
# By how much the ball grows in which corrections are looked for, and its least size in terms of the largest.
_GROWTH, _SMALLEST = 1.5, 1e-3
# The first solve of a stable correction only shows where to look for offsets.
_FIRST_GAP = 0.1
_NOTHING = Solution(infeasible=True, values=None, bound=np.inf, n_nodes=0)


def nearest_by_milp(judgement: Judgement, *, known: Bounds, deadline: float, tolerance: float) -> Bounds:
    """Bound the distance of the nearest (stable) correction with the solver HiGHS.

    Everything that the solver returns is checked: points with the network itself, stable ones by verifying
    their whole box. Its bounds hold up to its tolerances, 1e-6.

    Args:
        judgement: Returned as it is known if its network is smooth or by far too large.
        known: Bounds to start from; a correction that is known confines the search to what is nearer.
        deadline: As `time.monotonic()` gives it.
        tolerance: Relative gap of the bounds that counts as closed.

    Returns:
        Bounds that are at least as tight as those known.
    """
    if judgement.network.is_smooth:
        return known
    furthest = _furthest(judgement)
    best = _bounded_at_once(judgement, known, min(known.upper, furthest), deadline)
    offsets, is_first = [np.zeros(judgement.n_features)], judgement.is_stable
    while not best.closed(tolerance) and time.monotonic() < deadline:
        # Neurons are bounded the better the smaller the ball, so that it grows only as it is excluded.
        nearer = min(best.upper * (1 - tolerance / 2), furthest)
        within = min(nearer, max(_GROWTH * best.lower, _SMALLEST * furthest))
        domain = _Domain.of(judgement, within)
        bounds = domain and domain.bounds(offsets)
        if domain is None or bounds is None or (bounds.high < judgement.margin).any():
            solution = _NOTHING
        elif model := _build(domain, offsets, bounds):
            solution = model.program.solve(deadline=deadline, gap=_FIRST_GAP if is_first else tolerance / 2)
        else:
            break
        best = replace(best, n_boxes=best.n_boxes + solution.n_nodes)
        if solution.infeasible:
            best = _nothing_within(best, within, furthest)
            if within >= nearer:
                break
            continue
        best = _raised(best, min(solution.bound, within))
        if solution.values is None:
            break
        found, offset = _judge_solution(model, solution, best, deadline)
        is_known = offset is None or any(np.abs(offset - other).max() < 1e-9 for other in offsets)
        if is_known and found.upper >= best.upper and not is_first:
            break
        if not is_known:
            # That the centre itself holds is seldom what decides once an offset is known.
            offsets = [offset] if is_first else [*offsets, offset]
        best, is_first = found, False
    return best


def n_binaries(judgement: Judgement, *, within: float = np.inf) -> int:
    """How many neurons may change their slope, each of which is a binary variable.

    Args:
        judgement: Its network is piecewise linear.
        within: Only corrections up to this distance are looked for.
    """
    domain = _Domain.of(judgement, within)
    if domain is None:
        return 0
    return _n_unstable(domain, domain.bounds([np.zeros(judgement.n_features)]))


def _furthest(judgement: Judgement) -> float:
    """Distance that no allowed point exceeds."""
    corners = np.stack([judgement.low, judgement.high])
    each = judgement.weights * np.abs(corners - judgement.start).max(0)
    return float(each.sum() if judgement.norm == "l1" else each.max())


def _bounded_at_once(judgement: Judgement, known: Bounds, most: float, deadline: float) -> Bounds:
    """The lower bound that linear bounds of the network give without a search, by bisection."""
    low, high = min(known.lower, most), most
    for _ in range(_BISECTIONS):
        if time.monotonic() > deadline:
            break
        middle = (low + high) / 2
        domain = _Domain.of(judgement, middle)
        bounds = domain and domain.bounds([np.zeros(judgement.n_features)])
        if bounds is None or (bounds.high < judgement.margin).any():
            low = middle
        else:
            high = middle
    return replace(known, lower=max(known.lower, low))


def _nothing_within(best: Bounds, within: float, furthest: float) -> Bounds:
    if within >= furthest and best.upper == np.inf:
        return replace(best, lower=np.inf)
    return _raised(best, within)


def _raised(best: Bounds, lower: float) -> Bounds:
    safe = lower - _SOLVER_ERROR * (1 + abs(lower)) if np.isfinite(lower) else lower
    return replace(best, lower=min(max(best.lower, safe), best.upper))


def _n_unstable(domain: _Domain, bounds: LinearBounds) -> int:
    layers = zip(domain.judgement.network.layers, bounds.neurons, strict=False)
    return sum(int(unstable(layer.activation, *ends).sum()) for layer, ends in layers if layer.activation)


@dataclass(frozen=True)
class _Domain:
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
    def of(cls, judgement: Judgement, within: float) -> _Domain | None:
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
            reach = _reach_of_ball(starts, self.judgement.weights, self.within, low, high)
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


def _reach_of_ball(
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


@dataclass(frozen=True)
class _Model:
    """A program whose solutions are centres at which the network holds at the offsets.

    Args:
        program: Minimises the distance.
        domain: Where centres may lie.
        offsets: (k,) each.
        centre: Columns of the centre, (k,).
        outputs: Rows that keep the outputs at the margin.
        scale: Their largest values.
    """

    program: Program
    domain: _Domain
    offsets: list[Floats]
    centre: Indices
    outputs: Indices
    scale: Floats

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
                deadline=deadline, fixed=solution.values, raised=(self.outputs, excess * self.scale)
            )
            if again.values is not None:
                yield self.centre_of(again.values)


def _build(domain: _Domain, offsets: list[Floats], bounds: LinearBounds) -> _Model | None:
    """The program, or None where it would be too large."""
    judgement, network = domain.judgement, domain.judgement.network
    n_unstable = _n_unstable(domain, bounds)
    n_entries = (n_unstable + judgement.n_features) * (network.n_hidden + network.n_outputs)
    if n_unstable > _MOST_BINARIES or n_entries > _MOST_ENTRIES:
        return None
    program = Program()
    centre = _add_centre(program, domain)
    _add_distance(program, domain, centre)
    outputs, scales = [], []
    for i, offset in enumerate(offsets):
        inputs = _add_moved(program, domain, centre, offset)
        neurons = tuple((least[:, i], most[:, i]) for least, most in bounds.neurons)
        columns, matrix, constant = add_network(program, network, inputs, neurons)
        low = judgement.margin - constant
        outputs.append(program.rows(low, np.inf, (columns, matrix), n=network.n_outputs))
        scales.append(np.maximum(np.abs(bounds.high[:, i]), abs(judgement.margin)))
    return _Model(program, domain, offsets, centre, np.concatenate(outputs), np.concatenate(scales))


def _add_centre(program: Program, domain: _Domain) -> Indices:
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


def _add_distance(program: Program, domain: _Domain, centre: Indices) -> None:
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


def _add_moved(program: Program, domain: _Domain, centre: Indices, offset: Floats) -> Indices:
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


def _judge_solution(
    model: _Model, solution: Solution, best: Bounds, deadline: float
) -> tuple[Bounds, Floats | None]:
    """Better bounds from a solution, and the offset at which its centre fails."""
    judgement = model.domain.judgement
    centres = model.centres(solution, deadline)
    centre = next((c for c in centres if model.holds(c)), None)
    if centre is None:
        return best, None
    verdict = _verdict(judgement, centre, deadline, _VERIFY_BOXES)
    if verdict.holds:
        return _better(judgement, best, centre), None
    if best.centre is not None:
        best = _better(judgement, best, _towards(judgement, centre, best.centre, deadline))
    else:
        for further in centres:
            if _verdict(judgement, further, deadline, _TRY_BOXES).holds:
                best = _better(judgement, best, further)
                break
    if verdict.counterexample is None:
        return best, None
    return best, _offset(judgement, centre, verdict.counterexample)


def _verdict(judgement: Judgement, centre: Floats, deadline: float, max_boxes: int) -> Verdict:
    if not judgement.is_stable:
        return Verdict(bool(judgement.values(centre[None])[0] >= judgement.margin))
    low, high = judgement.box_around(centre)
    return verify(judgement.network, low, high, judgement.margin, deadline=deadline, max_boxes=max_boxes)


def _better(judgement: Judgement, best: Bounds, centre: Floats) -> Bounds:
    distance = float(judgement.distance(centre))
    if distance >= best.upper:
        return best
    return replace(best, lower=min(best.lower, distance), upper=distance, centre=centre)


def _towards(judgement: Judgement, failing: Floats, holding: Floats, deadline: float) -> Floats:
    """The nearest centre that holds between one that fails and one that holds."""
    near, far, found = 0.0, 1.0, holding
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        centre = judgement.on_grid(failing + middle * (holding - failing))
        if _verdict(judgement, centre, deadline, _TRY_BOXES).holds:
            far, found = middle, centre
        else:
            near = middle
    return found


def _offset(judgement: Judgement, centre: Floats, failing: Floats) -> Floats:
    """Offset from the centre of a point that fails, after moves along single features to where it fails most.

    At a face of the box it is the whole radius, so that it stays at that face where the allowed ranges clip.
    """
    low, high = judgement.box_around(centre)
    point = failing.copy()
    value = judgement.values(point[None])[0]
    for i in range(len(point)):
        moves = np.repeat(point[None], 2, 0)
        moves[:, i] = low[i], high[i]
        values = judgement.values(moves)
        if values.min() < value:
            point, value = moves[values.argmin()], values.min()
    at_face = np.where(point >= high, judgement.radius, np.where(point <= low, -judgement.radius, 0.0))
    return np.where(at_face != 0, at_face, point - centre)
