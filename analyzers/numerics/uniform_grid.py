"""Whether inputs of one or two dimensions are a uniform grid, and their values in its order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST = 4
"""Points along an axis below which there is no spectrum to speak of."""
TOLERANCE = 1e-3
"""How far a point may be from its place, over the spacing: more would be a phase error of the same size."""
SAME = 1e-5
"""Difference of the values at both ends of a closed grid, over the target's range."""


@dataclass(frozen=True)
class UniformGrid:
    """Evenly spaced points that cover one period, without the point that begins the next.

    Attributes:
        place: Where the samples lie in the grid's order (first axis slowest), shape (n,).
        full: Points along each axis, with the last one of a closed axis.
        closed: Whether the last point of each axis repeats the first and is left out.
        period: Length of each axis, in units of the inputs.
    """

    place: NDArray[np.int64]
    full: tuple[int, ...]
    closed: tuple[bool, ...]
    period: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Points of one period along each axis."""
        return tuple(n - last for n, last in zip(self.full, self.closed, strict=True))

    def arrange(self, values: Floats) -> Floats:
        """Values in the grid's order, one period, (n, c) to (*shape, c)."""
        ordered = np.empty_like(values)
        ordered[self.place] = values
        inside = ordered.reshape(*self.full, values.shape[1])
        return inside[tuple(slice(n) for n in self.shape)]


def find_uniform_grid(inputs: Floats, target: Floats) -> UniformGrid | None:
    """Places samples on the uniform grid that their inputs are, or returns None.

    Every point is compared with its place. The mean of second differences, which published code looks at,
    telescopes to a difference of the ends and calls [0, 1, 1.3, 2.7, 3.1, 5, 6] uniform.

    Args:
        inputs: Shape (n, 1) or (n, 2), in any order.
        target: Shape (n, c). An axis is closed where all values at both of its ends agree, and
            not with the next ones too.
    """
    if inputs.shape[1] not in (1, 2) or not np.isfinite(inputs).all():
        return None
    axes = [_axis(column) for column in inputs.T]
    found = [axis for axis in axes if axis is not None]
    full = tuple(int(index.max()) + 1 for index, _ in found)
    if len(found) < len(axes) or math.prod(full) != len(inputs):
        return None
    place = np.ravel_multi_index(tuple(index for index, _ in found), full).astype(np.int64)
    if len(np.unique(place)) < len(place):
        return None
    whole = UniformGrid(place, full, (False,) * len(full), (1.0,) * len(full)).arrange(target)
    closed = tuple(_ends_agree(np.moveaxis(whole, axis, 0)) for axis in range(len(full)))
    period = tuple((n - last) * step for n, last, (_, step) in zip(full, closed, found, strict=True))
    return UniformGrid(place, full, closed, period)


def _axis(column: Floats) -> tuple[NDArray[np.int64], float] | None:
    """Place of each coordinate along its axis, and the spacing; None where they are not evenly spaced."""
    low, high = float(column.min()), float(column.max())
    gaps = np.diff(np.sort(column))
    # Coordinates that differ by rounding are one point of the axis.
    rounding = 1e-6 * max(high - low, abs(low), abs(high))
    count = int((gaps > rounding).sum()) + 1
    if count < LEAST:
        return None
    step = (high - low) / (count - 1)
    index = np.rint((column - low) / step).astype(np.int64)
    if np.abs(column - low - index * step).max() > TOLERANCE * step + rounding:
        return None
    return index, step


def _ends_agree(values: Floats) -> bool:
    """Whether the last point repeats the first, and not because nothing changes from point to point there."""
    tolerance = SAME * np.ptp(values)
    apart = np.abs(values[[-1, 1]] - values[0]).reshape(2, -1).max(1)
    return bool(apart[0] <= tolerance < apart[1])
