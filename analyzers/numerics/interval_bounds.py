"""Bounds by interval arithmetic: loose, and affordable for networks of any size and number of inputs."""

from __future__ import annotations

import time

import numpy as np

from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.layered_network import Activation, Floats, LayeredNetwork, product

_HALVINGS = 40


def interval_bound(network: LayeredNetwork, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Least and largest value that each output may have on boxes.

    Args:
        network: With k inputs and r outputs.
        low: Lower corners, (k, n).
        high: Upper corners, (k, n).

    Returns:
        Two arrays (r, n).
    """
    intervals = [(low, high)]
    for layer in network.layers:
        middle: Floats | float = 0.0
        spread: Floats | float = 0.0
        for j, matrix in layer.sources:
            least, most = intervals[j]
            middle = middle + product(matrix, (least + most) / 2)
            spread = spread + product(abs(matrix), (most - least) / 2)
        middle = middle + layer.bias[:, None]
        least, most = np.asarray(middle - spread), np.asarray(middle + spread)
        intervals.append(_through(layer.activation, least, most) if layer.activation else (least, most))
    return intervals[-1]


def _through(activation: Activation, least: Floats, most: Floats) -> tuple[Floats, Floats]:
    """What an activation makes of an interval; its extremes are at the ends, or at the kink."""
    ends = activation(least), activation(most)
    low, high = np.minimum(*ends), np.maximum(*ends)
    if activation.is_smooth:
        return low, high
    kink = (least < 0) & (most > 0)
    return np.where(kink, np.minimum(low, 0.0), low), np.where(kink, np.maximum(high, 0.0), high)


def excluded_distance(judgement: Judgement, deadline: float) -> float:
    """A distance below which there is no correction, found by interval bounds on the ball around the input.

    Args:
        judgement: Any.
        deadline: As `time.monotonic()` gives it.

    Returns:
        The distance, which is 0 where not even a tiny ball can be excluded, and infinite where the whole
        domain can.
    """

    def excludes(distance: float) -> bool:
        reach = distance / judgement.weights
        low = np.maximum(judgement.start - reach, judgement.low)
        high = np.minimum(judgement.start + reach, judgement.high)
        if (low > high).any():  # the nearest allowed value is farther away
            return True
        most = interval_bound(judgement.network, low[:, None], high[:, None])[1]
        rounding = 1e-10 * (1 + float(np.abs(most).max()))
        return bool((most + rounding < judgement.margin).any())

    corner = np.maximum(np.abs(judgement.low - judgement.start), np.abs(judgement.high - judgement.start))
    known, limit = 0.0, float((judgement.weights * corner).max())
    if excludes(limit):
        return np.inf
    for _ in range(_HALVINGS):
        if time.monotonic() > deadline or limit - known < 0.01 * known:
            break
        middle = (known + limit) / 2 if known else limit / 8  # balls that can be excluded are small
        known, limit = (middle, limit) if excludes(middle) else (known, middle)
    return known
