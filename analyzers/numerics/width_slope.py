"""Slope of the distance that parameters travel against the width, on logarithmic scales, and the regime."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Floats = NDArray[np.float64]

FEWEST_WIDTHS = 3
"""Widths from which on the scatter about a line is known."""
CONFIDENCE = 0.95

LINEAR, CRITICAL, CONDENSED, UNDECIDED = "linear", "critical", "condensed", "undecided"


class Slope(NamedTuple):
    """A least-squares slope, its standard error and its 95 % interval."""

    value: float
    stderr: float
    low: float
    high: float


def width_slope(width: Floats, distance: Floats) -> Slope:
    """Fits S in log RD = S log m + constant by least squares, one point a network.

    The interval is that of Student's t with n − 2 degrees of freedom: with three networks it is 12.7 standard
    errors to either side.

    Args:
        width: Neurons m of the widened layers, shape (n,).
        distance: Their relative distances RD; those that are not positive and finite are left out.

    Returns:
        The slope S_w; all NaN with fewer than three different widths.

    References:
        Luo, Xu, Ma and Zhang, "Phase diagram for two-layer ReLU neural networks at infinite-width limit",
        JMLR 22 (2021), fig. 3.
    """
    known = np.isfinite(distance) & (distance > 0) & np.isfinite(width) & (width > 0)
    x, y = np.log(width[known]), np.log(distance[known])
    if len(np.unique(x)) < FEWEST_WIDTHS:
        return Slope(*[math.nan] * 4)
    centred = x - x.mean()
    value = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - value * centred
    freedom = len(x) - 2
    stderr = math.sqrt(float(rest @ rest) / freedom / float(centred @ centred))
    reach = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * stderr
    return Slope(value, stderr, value - reach, value + reach)


def regime(slope: Slope, margin: float) -> str:
    """Says in which regime networks are trained, if the slope's interval leaves no other one.

    Args:
        slope: From `width_slope`.
        margin: Slopes between −margin and margin count as 0: no finite set of widths shows that one is 0.

    Returns:
        linear (the interval lies below −margin), critical (within), condensed (above), or undecided.
    """
    if slope.high < -margin:
        return LINEAR
    if slope.low > margin:
        return CONDENSED
    if -margin <= slope.low and slope.high <= margin:
        return CRITICAL
    return UNDECIDED
