"""The nearest correction of a judgement by mixed-integer linear programming, for piecewise linear networks.

Exact for any number of features, unlike splitting of boxes, but exponential in the number of neurons that may
change their slope. The encoding is that of Tjeng, Xiao and Tedrake, "Evaluating robustness of neural networks
with mixed integer programming", ICLR 2019 (section 4), with neurons bounded by linear functions on the ball
around the start within which a nearer correction lies. A stable correction is found by cutting sets (Mutapcic
and Boyd, "Cutting-set methods for robust convex optimization with pessimizing oracles", Optimization Methods
and Software 2009): one copy of the network per offset from the centre at which an earlier centre failed.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np

from dynprobe.analyzers.numerics.box_verifier import Verdict, verify
from dynprobe.analyzers.numerics.correction_model import Domain, Model, build, n_unstable
from dynprobe.analyzers.numerics.correction_problem import Bounds, Judgement
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.linear_bounds import LinearBounds
from dynprobe.analyzers.numerics.network_milp import Solution

# The solver holds rows and integers to 1e-6: its bounds are trusted to that much of the domain's size.
_SOLVER_ERROR = 1e-6
# A correction that is nearer than what was excluded, by a larger part, shows that the solver erred.
_CONTRADICTION = 1e-5
_BISECTIONS = 8
# Parts of a box that a verification may look at; less where an attempt is one of several.
_VERIFY_BOXES, _TRY_BOXES = 50_000, 3_000
# By how much the ball grows in which corrections are looked for, and its least size in terms of the largest.
_GROWTH, _SMALLEST = 1.5, 1e-3
# The first solve of a stable correction only shows where to look for offsets.
_FIRST_GAP = 0.1


def nearest_by_milp(judgement: Judgement, *, known: Bounds, deadline: float, tolerance: float) -> Bounds:
    """Bound the distance of the nearest (stable) correction with the solver HiGHS.

    Everything that the solver returns is checked: points with the network itself, stable ones by verifying
    their whole box. Its bounds hold up to its tolerances, 1e-6 of the distance looked at; where it is seen to
    err, as a correction is nearer than its bound, nothing that it said counts.

    Args:
        judgement: What is asked for; what is known is returned if its network is smooth, and hardly more if
            it is by far too large.
        known: Bounds to start from; a correction that is known confines the search to what is nearer.
        deadline: As `time.monotonic()` gives it.
        tolerance: Relative gap of the bounds that counts as closed.

    Returns:
        Bounds that are at least as tight as those known.
    """
    if judgement.network.is_smooth:
        return known
    search = _Search(judgement, known, deadline, tolerance)
    search.exclude_at_once()
    while not search.best.closed(tolerance) and time.monotonic() < deadline and search.step():
        pass
    return known if search.has_erred else search.best


def n_binaries(judgement: Judgement, *, within: float = np.inf) -> int:
    """How many neurons may change their slope, each of which is a binary variable.

    Args:
        judgement: Its network is piecewise linear.
        within: Only corrections up to this distance are looked for.
    """
    domain = Domain.of(judgement, within)
    return n_unstable(domain, domain.bounds([np.zeros(judgement.n_features)])) if domain else 0


class _Search:
    """Grows the ball in which corrections are looked for, and the offsets at which they have to hold."""

    def __init__(self, judgement: Judgement, known: Bounds, deadline: float, tolerance: float) -> None:
        self.judgement, self.deadline, self.tolerance = judgement, deadline, tolerance
        self.best = known
        self._offsets = [np.zeros(judgement.n_features)]
        self._is_first = judgement.is_stable
        self.has_erred = False
        low, high, start = judgement.low, judgement.high, judgement.start
        self._furthest = float(judgement.distance(np.where(high - start > start - low, high, low)))

    def exclude_at_once(self) -> None:
        """Raise the lower bound to what linear bounds of the network give without a solver, by bisection."""
        high = min(self.best.upper, self._furthest)
        low = min(self.best.lower, high)
        for _ in range(_BISECTIONS):
            if time.monotonic() > self.deadline:
                break
            middle = (low + high) / 2
            domain = Domain.of(self.judgement, middle)
            if domain is None or self._is_excluded(domain.bounds(self._offsets)):
                low = middle
            else:
                high = middle
        self.best = replace(self.best, lower=max(self.best.lower, low))

    def step(self) -> bool:
        """Solve in one ball; whether there is more to do."""
        # Neurons are bounded the better the smaller the ball, so that it grows only as it is excluded.
        nearer = min(self.best.upper * (1 - self.tolerance / 2), self._furthest)
        within = min(nearer, max(_GROWTH * self.best.lower, _SMALLEST * self._furthest))
        domain = Domain.of(self.judgement, within)
        bounds = domain.bounds(self._offsets) if domain else None
        if domain is None or bounds is None or self._is_excluded(bounds):
            return self._nothing(within, nearer)
        model = build(domain, self._offsets, bounds)
        if model is None:
            return False
        gap = _FIRST_GAP if self._is_first else self.tolerance / 2
        solution = model.program.solve(deadline=self.deadline, gap=gap)
        self.best = replace(self.best, n_boxes=self.best.n_boxes + solution.n_nodes)
        bound = within if solution.infeasible else min(solution.bound * domain.unit, within)
        if bound > self.best.lower and model.contradicts(bound):
            self.has_erred = True
            return False
        if solution.infeasible:
            return self._nothing(within, nearer)
        self._raise(bound, within)
        return not self.has_erred and solution.values is not None and self._use(model, solution)

    def _is_excluded(self, bounds: LinearBounds) -> bool:
        return bool((bounds.high < self.judgement.margin).any())

    def _nothing(self, within: float, nearer: float) -> bool:
        if within >= self._furthest and self.best.centre is None and self.best.upper == np.inf:
            self.best = replace(self.best, lower=np.inf)
        else:
            self._raise(within, within)
        return within < nearer and not self.has_erred

    def _raise(self, lower: float, within: float) -> None:
        if np.isfinite(lower):
            safe = max(self.best.lower, lower - _SOLVER_ERROR * (within + lower))
            self._expect(self.best.upper, safe)
            self.best = replace(self.best, lower=min(safe, self.best.upper))

    def _expect(self, upper: float, lower: float) -> None:
        self.has_erred |= lower > upper * (1 + _CONTRADICTION)

    def _use(self, model: Model, solution: Solution) -> bool:
        """Take the centre if it holds, else the offset at which it does not; whether that is news."""
        upper, was_first = self.best.upper, self._is_first
        offset = self._judge(model, solution)
        self._is_first = False
        if offset is not None and all(np.abs(offset - other).max() > 1e-9 for other in self._offsets):
            # That the centre itself holds is seldom what decides once an offset is known.
            self._offsets = [offset] if was_first else [*self._offsets, offset]
            return True
        return (was_first or self.best.upper < upper) and not self.has_erred

    def _judge(self, model: Model, solution: Solution) -> Floats | None:
        """The offset at which the centre of a solution fails; better ones nearby are kept."""
        judgement = self.judgement
        centres = model.centres(solution, self.deadline)
        centre = next((c for c in centres if model.holds(c[None])[0]), None)
        if centre is None:
            return None
        verdict = self._verdict(centre, _VERIFY_BOXES)
        if verdict.holds:
            self._keep(centre)
            return None
        if self.best.centre is not None:
            self._keep(self._towards(centre, self.best.centre))
        else:
            holding = (c for c in centres if self._verdict(c, _TRY_BOXES).holds)
            for further in itertools.islice(holding, 1):
                self._keep(further)
        if verdict.counterexample is None:
            return None
        return _offset(judgement, centre, verdict.counterexample)

    def _verdict(self, centre: Floats, max_boxes: int) -> Verdict:
        judgement = self.judgement
        if not judgement.is_stable:
            return Verdict(bool(judgement.values(centre[None])[0] >= judgement.margin))
        low, high = judgement.box_around(centre)
        end = self.deadline
        return verify(judgement.network, low, high, judgement.margin, deadline=end, max_boxes=max_boxes)

    def _keep(self, centre: Floats) -> None:
        distance = float(self.judgement.distance(centre))
        if distance < self.best.upper:
            self._expect(distance, self.best.lower)
            lower = min(self.best.lower, distance)
            self.best = replace(self.best, lower=lower, upper=distance, centre=centre)

    def _towards(self, failing: Floats, holding: Floats) -> Floats:
        """The nearest centre that holds between one that fails and one that holds."""
        near, far, found = 0.0, 1.0, holding
        for _ in range(_BISECTIONS):
            middle = (near + far) / 2
            centre = self.judgement.on_grid(failing + middle * (holding - failing))
            if self._verdict(centre, _TRY_BOXES).holds:
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
