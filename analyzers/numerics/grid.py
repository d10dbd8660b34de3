"""Axes that hit the points they must hit, coarse-to-fine evaluation, and the curvature of a sampled slice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def symmetric_axis(n: int, span: float) -> Floats:
    """Evenly spaced points on [−span, span], the middle one of the n exactly 0.

    Raises:
        ValueError: If n is even (no point would be 0; the neighbours are named), below 3, or span is not
            positive.
    """
    if n < 3 or n % 2 == 0:
        raise ValueError(
            f"{n} points on an axis leave none at 0, where the checkpoint is: "
            f"use {max(n - 1, 3)} or {max(n + 1, 5)}."
        )
    _require_positive(span)
    half = n // 2
    axis: Floats = span * (np.arange(-half, half + 1) / half)
    return axis


def interpolation_axis(n: int, span: float) -> Floats:
    """Evenly spaced points on [½ − span, ½ + span] that hit 0 and 1 exactly, at least n of them.

    A step that divides both [0, 1] and the overhang is needed, so n is rounded up where it allows none: for
    span 1, that is [−0.5, 1.5], from 51 to 53.

    Raises:
        ValueError: If n is below 2, which cannot be both 0 and 1, or span is below ½ or no simple fraction.
    """
    if n < 2:
        raise ValueError(f"a path between two checkpoints needs at least 2 points, not {n}.")
    if not span >= 0.5 or not math.isfinite(span):
        raise ValueError(f"a path between two checkpoints needs a span of at least 0.5, not {span:g}.")
    for steps in itertools.count(max(1, math.ceil((n - 1) / (2 * span) - 1e-9))):
        outside = steps * (span - 0.5)
        if abs(outside - round(outside)) < 1e-9:
            return np.arange(-round(outside), steps + round(outside) + 1) / steps
        if steps > 100 * n:
            break
    raise ValueError(
        f"no even spacing hits 0, 1 and both ends of a span of {span:g}: use a multiple of 0.25."
    )


def covering_axis(low: float, high: float, n: int, margin: float = 0.15) -> Floats:
    """Evenly spaced points that cover [low, high] and 0 with a margin on each side, one of them exactly 0.

    Raises:
        ValueError: If n is below 3, which cannot reach to both sides of 0.
    """
    if n < 3:
        raise ValueError(f"an axis around a path needs at least 3 points, not {n}.")
    low, high = min(low, 0.0), max(high, 0.0)
    room = margin * (high - low) if high - low > 1e-30 else 1.0
    step = (high - low + 2 * room) / (n - 1)
    while math.ceil((room - low) / step) + math.ceil((room + high) / step) > n - 1:
        step *= 1.01
    axis: Floats = step * (np.arange(n, dtype=np.float64) - math.ceil((room - low) / step))
    return axis


def _require_positive(span: float) -> None:
    if not span > 0 or not math.isfinite(span):
        raise ValueError(f"the span of an axis must be positive, not {span:g}.")


@dataclass(frozen=True)
class Refined:
    """A surface of which only some points were evaluated.

    Attributes:
        value: Evaluated where `evaluated`, interpolated elsewhere. Shape (n_y, n_x).
        evaluated: Where the function itself was asked.
        heldout_residual: Largest error of the interpolation at held-out points, which were evaluated after
            it; relative (of the value, or of the range where values are not all positive). NaN if there were
            no points left to hold out.
        relative: Whether errors are relative to each value (values all positive).
    """

    value: Floats
    evaluated: Mask
    heldout_residual: float
    relative: bool


def refine(
    evaluate: Callable[[Mask], Floats],
    shape: tuple[int, int],
    tol: float,
    *,
    seed: int = 0,
    coarse: int = 9,
    n_heldout: int = 32,
) -> Refined:
    """Evaluates a surface coarse to fine and interpolates where the error bound allows.

    Nested grids of 9, 17, 33, … points per axis, the middle and the edges on each. On every new level the
    cubic spline through the level before is compared with what is then evaluated; the next level evaluates
    only beside points where the two differ by more than `tol`. That difference bounds the error of the *next*
    spline only if the surface is smooth at this scale (on a rugged ResNet it was too small by up to 4), so
    held-out points are evaluated in the end and the largest error there is returned.

    Positive values are interpolated as logarithms, and `tol` is relative to each value; otherwise it is
    relative to the range. Points beside a value that is not finite are always evaluated.

    Args:
        evaluate: mask ↦ values, called with the points wanted next; entries outside the mask are ignored.
        shape: (n_y, n_x), each odd or 1.
        tol: Relative error allowed; 0 evaluates every point.
        seed: Which points are held out.
        coarse: Points per axis to begin with, odd.
        n_heldout: At most so many held-out points, and at most a tenth of those interpolated.
    """
    value, evaluated = np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_)

    def ask(mask: Mask) -> None:
        new = mask & ~evaluated
        if new.any():
            value[new] = evaluate(new)[new]
            evaluated[new] = True

    axes = [_nested(size, coarse) for size in shape]
    if tol <= 0:
        ask(np.ones(shape, dtype=np.bool_))
        return Refined(value, evaluated, math.nan, False)
    levels = max(len(axis) for axis in axes)
    rows, columns = (_level(axis, 0) for axis in axes)
    ask(_lattice(shape, rows, columns))
    wanted = np.ones(shape, dtype=np.bool_)
    for level in range(1, levels):
        predicted = _interpolated(value, rows, columns)
        rows, columns = (_level(axis, level) for axis in axes)
        fresh = _lattice(shape, rows, columns) & ~evaluated
        ask(fresh & wanted)
        wrong = evaluated & fresh & ~(_error(predicted, value, evaluated) <= tol)
        value[fresh & ~evaluated] = predicted[fresh & ~evaluated]
        wanted = _around(wrong, rows, columns)
    ask(np.isnan(value))
    return _held_out(ask, value, evaluated, np.random.default_rng(seed), n_heldout)


def _held_out(
    ask: Callable[[Mask], None],
    value: Floats,
    evaluated: Mask,
    generator: np.random.Generator,
    n_heldout: int,
) -> Refined:
    guessed = np.argwhere(~evaluated)
    positive = _positive(value[evaluated])
    if len(guessed) == 0:
        return Refined(value, evaluated, math.nan, positive)
    count = min(n_heldout, max(1, len(guessed) // 10))
    mask = np.zeros(value.shape, dtype=np.bool_)
    mask[tuple(guessed[generator.choice(len(guessed), count, replace=False)].T)] = True
    predicted = value.copy()
    ask(mask)
    residual = float(_error(predicted, value, evaluated)[mask].max())
    return Refined(value, evaluated, residual, positive)


def _nested(size: int, coarse: int) -> list[NDArray[np.intp]]:
    """Index sets from `coarse` entries to all `size`, each inside the next, symmetric about the middle."""
    sets = [np.unique(np.round(np.linspace(0, (size - 1) / 2, (coarse + 1) // 2)).astype(np.intp))]
    sets[0] = np.unique(np.concatenate([sets[0], size - 1 - sets[0]]))
    while len(sets[-1]) < size:
        last = sets[-1]
        left = last[last <= (size - 1) // 2]
        middles = (left[:-1] + left[1:]) // 2
        sets.append(np.unique(np.concatenate([last, middles, size - 1 - middles])))
    return sets


def _level(sets: list[NDArray[np.intp]], level: int) -> NDArray[np.intp]:
    return sets[min(level, len(sets) - 1)]


def _lattice(shape: tuple[int, int], rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Mask:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[np.ix_(rows, columns)] = True
    return mask


def _positive(values: Floats) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.size and (finite > 0).all())


def _error(predicted: Floats, value: Floats, evaluated: Mask) -> Floats:
    """|predicted − value| relative to the value, or to the range; infinite where either is not finite."""
    known = value[evaluated & np.isfinite(value)]
    with np.errstate(all="ignore"):
        if _positive(known):
            error = np.abs(predicted - value) / value
        else:
            error = np.abs(predicted - value) / (np.ptp(known) if known.size and np.ptp(known) > 0 else 1.0)
    error[~np.isfinite(error)] = np.inf
    return error


def _interpolated(value: Floats, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Floats:
    """Tensor-product cubic spline through the lattice, at every index; NaN beside what is not finite."""
    lattice = value[np.ix_(rows, columns)]
    finite = np.isfinite(lattice)
    if not finite.any():
        return np.full(value.shape, np.nan)
    logarithmic = _positive(lattice)
    filled = np.where(finite, lattice, lattice[finite].max())
    spline = _spline(np.log(filled) if logarithmic else filled, rows, value.shape[0], 0)
    spline = _spline(spline, columns, value.shape[1], 1)
    with np.errstate(over="ignore"):
        result = np.exp(spline) if logarithmic else spline
    holes = _lattice(value.shape, rows, columns)
    holes[np.ix_(rows, columns)] = ~finite
    result[_around(holes, rows, columns)] = np.nan
    return result


def _spline(values: Floats, places: NDArray[np.intp], size: int, axis: int) -> Floats:
    if len(places) == 1:
        return values
    spline: Floats = CubicSpline(places, values, axis=axis)(np.arange(size))
    return spline


def _around(points: Mask, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Mask:
    """All indices within one lattice spacing of a marked point."""
    mask = np.zeros(points.shape, dtype=np.bool_)
    reach_y = int(np.diff(rows).max(initial=0))
    reach_x = int(np.diff(columns).max(initial=0))
    for row, column in np.argwhere(points):
        mask[max(row - reach_y, 0) : row + reach_y + 1, max(column - reach_x, 0) : column + reach_x + 1] = (
            True
        )
    return mask


def slice_curvature(value: Floats, y: Floats | None, x: Floats) -> tuple[Floats, Floats]:
    """Largest and smallest curvature of a sampled slice, by central second differences.

    Eigenvalues of [[f_xx, f_xy], [f_xy, f_yy]] in units of the axes; on a line both are f_xx. On the border
    there is no central difference: NaN.

    Args:
        value: Shape (n_y, n_x), or (n_x,) with y None; evenly spaced.
        y: Axis, or None on a line.
        x: Axis.

    Returns:
        (largest, smallest), each shaped like `value`.
    """
    field = value[None] if y is None else value
    h_x = x[1] - x[0]
    f_xx = np.full(field.shape, np.nan)
    f_xx[:, 1:-1] = (field[:, 2:] - 2 * field[:, 1:-1] + field[:, :-2]) / h_x**2
    if y is None:
        return f_xx[0], f_xx[0]
    h_y = y[1] - y[0]
    f_yy, f_xy = np.full(field.shape, np.nan), np.full(field.shape, np.nan)
    f_yy[1:-1] = (field[2:] - 2 * field[1:-1] + field[:-2]) / h_y**2
    corners = field[2:, 2:] - field[2:, :-2] - field[:-2, 2:] + field[:-2, :-2]
    f_xy[1:-1, 1:-1] = corners / (4 * h_x * h_y)
    middle, radius = (f_xx + f_yy) / 2, np.hypot((f_xx - f_yy) / 2, f_xy)
    return middle + radius, middle - radius
