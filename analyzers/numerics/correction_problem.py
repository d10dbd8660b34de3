"""One judgement of a network and what may be changed about it, in units of the allowed ranges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork

Norm = Literal["l1", "linf"]


def grid_slack(low: Floats, high: Floats, step: Floats, origin: Floats) -> Floats:
    """Part of a step, (k,), by which a computed place on a grid may miss the value that it stands for.

    Of an origin far away, or of many small steps, rounding leaves more.

    Args:
        low: Least value, (k,).
        high: Largest value, (k,).
        step: Distance of the values of the grid, (k,), positive.
        origin: One of them, (k,).
    """
    rounding = 8 * np.finfo(np.float64).eps * np.maximum(np.abs(low - origin), np.abs(high - origin))
    return np.asarray(np.minimum(1e-9 + rounding / step, 0.25))


@dataclass(frozen=True)
class Judgement:
    """Which changes are allowed, what they cost, and when they are a correction.

    Coordinates u are units of the features' ranges: the domain of every one is within [0, 1]. A point u is
    a *correction* if every output of the network there is at least `margin`, and a *stable* one if that holds
    in the whole box `box_around(u)`, which is clipped to the domain.

    Args:
        network: k inputs; one output for every class that the target has to beat, f_target - f_other.
        start: The judged input, (k,).
        low: Least allowed value, (k,).
        high: Largest allowed value, (k,).
        weights: Cost of a change by one unit, (k,), positive.
        radius: Half-widths of the box in which a stable correction must hold, (k,); zeros for none.
        margin: Least output that counts; above the rounding error of the network as it is used.
        norm: `l1` adds the costs of all features, `linf` takes the largest.
        spacing: Distance between the allowed values of an integer feature, (k,); 0 where all are allowed.
        origin: One allowed value of every integer feature, (k,).
    """

    network: LayeredNetwork
    start: Floats
    low: Floats
    high: Floats
    weights: Floats
    radius: Floats
    margin: float
    norm: Norm = "l1"
    spacing: Floats | None = None
    origin: Floats | None = None

    @property
    def n_features(self) -> int:
        """How many features may change."""
        return len(self.start)

    @property
    def whole(self) -> np.ndarray:
        """Which features are integers, (k,)."""
        if self.spacing is None or self.origin is None:
            return np.zeros(self.n_features, bool)
        return np.asarray(self.spacing > 0)

    @property
    def step(self) -> Floats:
        """Distance between the allowed values of integer features, (k,); 1 for all others."""
        return np.ones(self.n_features) if self.spacing is None else np.where(self.whole, self.spacing, 1.0)

    @property
    def slack(self) -> Floats:
        """Part of a step by which a computed value may miss an allowed one, (k,)."""
        origin = np.zeros(self.n_features) if self.origin is None else self.origin
        return grid_slack(self.low, self.high, self.step, origin)

    @property
    def is_possible(self) -> bool:
        """Whether every feature has an allowed value at all."""
        low, high = self.allowed(self.low, self.high)
        return bool((low <= high).all())

    def allowed(self, low: Floats, high: Floats) -> tuple[Floats, Floats]:
        """The least and the largest allowed value in [low, high], (…, k) each; low > high where none is."""
        if self.spacing is None or self.origin is None:
            return low, high
        step, origin, slack = self.step, self.origin, self.slack
        first = origin + step * np.ceil((low - origin) / step - slack)
        last = origin + step * np.floor((high - origin) / step + slack)
        return np.where(self.whole, first, low), np.where(self.whole, last, high)

    @property
    def is_stable(self) -> bool:
        """Whether more than a point is asked for."""
        return bool((self.radius > 0).any())

    def distance(self, points: Floats) -> Floats:
        """Cost of points (…, k), shape (…)."""
        costs = self.weights * np.abs(points - self.start)
        return np.asarray(costs.sum(-1) if self.norm == "l1" else costs.max(-1))

    def box_around(self, centre: Floats) -> tuple[Floats, Floats]:
        """Lower and upper corner of the box in which a stable correction (…, k) must hold."""
        return np.maximum(centre - self.radius, self.low), np.minimum(centre + self.radius, self.high)

    def values(self, points: Floats) -> Floats:
        """Least output of the network at points (n, k), shape (n,)."""
        return np.asarray(self.network(points).min(1))

    def on_grid(self, points: Floats) -> Floats:
        """Points (…, k) with integer features at the nearest allowed value within the domain."""
        if self.spacing is None or self.origin is None:
            return np.clip(points, self.low, self.high)
        nearest = self.origin + self.step * np.round((points - self.origin) / self.step)
        return np.clip(np.where(self.whole, nearest, points), *self.allowed(self.low, self.high))

    def for_points(self) -> Judgement:
        """The same judgement with nothing asked of the surroundings."""
        return replace(self, radius=np.zeros_like(self.radius))


@dataclass(frozen=True)
class Bounds:
    """What is known about a least distance.

    Args:
        lower: Nothing nearer is a correction; infinite where none exists.
        upper: Distance of `centre`; infinite where none was found.
        centre: The nearest correction found, (k,), or None.
        n_boxes: Boxes looked at, or nodes of a solver.
    """

    lower: float
    upper: float
    centre: Floats | None = None
    n_boxes: int = 0

    @property
    def exists(self) -> bool | None:
        """Whether there is one: True if found, False if excluded, None if neither."""
        return True if self.centre is not None else False if self.lower == np.inf else None

    def closed(self, tolerance: float) -> bool:
        """Whether nothing is left to be found out: none exists, or the gap is within the tolerance."""
        if self.centre is None:
            return self.lower == np.inf
        return self.upper - self.lower <= tolerance * max(self.upper, 1e-12)
