"""Curves with bands: Lines, Bands, and landscapes along one direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from dynprobe.analyzers.core.contract import Bands, Lines
from dynprobe.analyzers.core.result import Array, Result
from dynprobe.cli import style
from dynprobe.cli.figure_paint import Axis, Curve, Panel, paint_panels
from dynprobe.cli.figure_panels import (
    MAXIMAL_PANELS,
    along,
    chance_level,
    fact,
    number_or_nan,
    piece_title,
    require,
    several_runs,
    step_text,
)
from dynprobe.io.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPREAD = "seed"
"""A dimension that is not drawn: its mean is the curve and its range the band."""

Bounds = tuple[str, str] | None


def draw_lines(result: Result, kind: Lines | Bands, figure: Figure) -> list[str]:
    """Draw curves over the step or a coordinate; returns notes for the small print."""
    names = (kind.y,) if isinstance(kind.y, str) else kind.y
    bounds: dict[str, Bounds] = {}
    if isinstance(kind, Bands):
        bounds[kind.y] = (kind.low, kind.high)
    for name in (*names, *(b for pair in bounds.values() if pair for b in pair)):
        require(result, name)
    axis = horizontal(result, kind.x, result.arrays[names[0]])
    axis.log = _crowded(axis) or (isinstance(kind, Lines) and kind.log_x and bool(axis.values.max() > 0))
    panels = _panels(result, names, axis, bounds)
    for panel in panels:
        panel.log_y = kind.log_y
    if _belong_together(result, names, panels):
        panels = [_merged(result, names, panels)]
    paint_panels(figure, panels, axis, ordered=_ordered_curves(result, names[0], axis))
    return list(dict.fromkeys(_band_note(result, name, bounds.get(name)) for name in names))


def draw_cuts(result: Result, names: Sequence[str], x: str, figure: Figure, *, log_y: bool) -> list[str]:
    """Draw a landscape along one direction: a panel for each variable, a colour for each checkpoint.

    Args:
        result: The measured landscape.
        names: Variables to show; the first gives the quantity that `log_y` speaks of.
        x: Name of the coordinate along the direction.
        figure: Where to draw.
        log_y: Whether the quantity is drawn on a logarithmic scale.
    """
    axis = horizontal(result, x, result.arrays[names[0]])
    panels = _panels(result, names, axis, {})
    for panel, name in zip(panels, names, strict=True):
        panel.chance = chance_level(result, name)
        panel.scale = name.removeprefix("test_")
        panel.log_y = log_y and panel.scale == names[0]
    marks = {0.0: "θ*"}
    if (directions := str(fact(result, "directions") or "")).startswith("to:"):
        marks[1.0] = PurePath(directions.removeprefix("to:")).name
    paint_panels(figure, panels, axis, ordered=_ordered_curves(result, names[0], axis), marks=marks)
    return list(dict.fromkeys(_band_note(result, name, None) for name in names))


def horizontal(result: Result, x: str, array: Array) -> Axis:
    """The axis that a curve of `array` runs along: the named one, the step by default."""
    for name in (x,) if x else ("step", "step_b", "step_a"):
        found = result.arrays.get(name)
        if found is None or len(found.dims) != 1 or found.dims[0] not in array.dims:
            continue
        values = np.array([number_or_nan(v) for v in found.values.tolist()])
        if np.all(np.isfinite(values)):
            is_step = name.startswith("step")
            unit = str(np.atleast_1d(result["step_unit"])[0]) if "step_unit" in result else "step"
            return Axis(found.dims[0], values, unit if is_step else style.label(found, name), is_step)
    dim = x if x in array.dims else (array.dims[0] if array.dims else "")
    size = array.values.shape[array.dims.index(dim)] if dim else 1
    return Axis(dim, np.arange(size, dtype=float), dim)


def _crowded(axis: Axis) -> bool:
    """Whether steps were saved at growing intervals, so that a linear axis squeezes the first ones."""
    steps = np.unique(axis.values)
    if not axis.is_step or len(steps) < 4 or steps[0] < 0:
        return False
    gaps = np.diff(steps)
    return bool(gaps[-1] > 10 * gaps[0] and np.mean(np.diff(gaps) >= 0) >= 0.8)


def _ordered_curves(result: Result, name: str, axis: Axis) -> bool:
    """Whether the curves are checkpoints, and so have an order."""
    return bool(result.lead) and result.lead in result.arrays[name].dims and axis.dim != result.lead


def _panels(result: Result, names: Sequence[str], axis: Axis, bounds: Mapping[str, Bounds]) -> list[Panel]:
    panels = [p for name in names for p in _panels_of(result, name, axis, bounds.get(name))]
    if not any(panel.curves for panel in panels):
        raise InputError(
            f"{result.analyzer}: {names[0]} has no value in any piece, so there is nothing to draw",
            tip="The report keeps the values as they are: dynprobe report show",
        )
    return panels


def _panels_of(result: Result, name: str, axis: Axis, bounds: Bounds) -> list[Panel]:
    """The curves of one variable; a third dimension makes one panel for each of its labels."""
    others = [d for d in result.arrays[name].dims if d not in (axis.dim, SPREAD)]
    y, low, high = (_ordered(v, axis, others) for v in _with_band(result, name, bounds))
    split = list(zip(others[1:], y.shape[1:-1], strict=True))
    labels = _labels(result, others[0], y.shape[0]) if others else [""]
    panels = []
    for index in list(np.ndindex(*y.shape[1:-1]))[:MAXIMAL_PANELS]:
        place = [_labels(result, d, n)[i] for (d, n), i in zip(split, index, strict=True)]
        panel = Panel(", ".join(place), style.label(result.arrays[name], name), name)
        for row, text in enumerate(labels):
            at = (row, *index)
            if np.any(~np.isnan(y[at])):
                panel.curves += _by_run(result, axis, y[at], low[at], high[at], text)
        panels.append(panel)
    return panels


def _with_band(result: Result, name: str, bounds: Bounds) -> tuple[Array, Array, Array]:
    """The variable with its lower and upper edge; the edges are NaN where it has no error."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinity ± infinity has no band
        return _values_and_edges(result, name, bounds)


def _values_and_edges(result: Result, name: str, bounds: Bounds) -> tuple[Array, Array, Array]:
    array = result.arrays[name]
    values = array.values.astype(float)
    if bounds is not None:
        low, high = (result[b].astype(float) for b in bounds)
    elif error_name := _error_of(result, name):
        error = result[error_name].astype(float)
        low, high = values - error, values + error
    else:
        low = high = np.full(values.shape, math.nan)
    dims = array.dims
    if SPREAD in dims:
        seeds = dims.index(SPREAD)
        low, high, values = values.min(seeds), values.max(seeds), values.mean(seeds)
        dims = tuple(d for d in dims if d != SPREAD)
    return Array(dims, values), Array(dims, low), Array(dims, high)


def _ordered(array: Array, axis: Axis, others: Sequence[str]) -> np.ndarray:
    """Values with the curves' dimension first and the horizontal one last."""
    values = np.transpose(array.values, [array.dims.index(d) for d in (*others, axis.dim) if d])
    values = values if axis.dim else values[..., None]
    return values if others else values[None]


def _labels(result: Result, dim: str, size: int) -> list[str]:
    """What the entries of a dimension are called."""
    if dim == result.lead:
        return [piece_title(result, i) for i in range(result.n_pieces)]
    labels = along(result, dim, dim, "step")
    texts = [step_text(v) for v in labels.tolist()] if labels is not None else [str(i) for i in range(size)]
    numeric = labels is None or labels.dtype.kind in "iuf"
    return [f"{dim} {text}" for text in texts] if numeric else texts


def _by_run(
    result: Result, axis: Axis, y: np.ndarray, low: np.ndarray, high: np.ndarray, text: str
) -> list[Curve]:
    """One curve, or one for each run when the points along the axis belong to several."""
    runs = along(result, axis.dim, "run", "checkpoint_run", "run_b")
    names = np.full(len(axis.values), "") if runs is None or not several_runs(result) else runs.astype(str)
    curves = []
    for run in dict.fromkeys(names.tolist()):
        mine = np.flatnonzero(names == run)
        mine = mine[np.argsort(axis.values[mine], kind="stable")]
        curves.append(Curve(axis.values[mine], y[mine], low[mine], high[mine], text, run))
    return curves


def _belong_together(result: Result, names: Sequence[str], panels: Sequence[Panel]) -> bool:
    """Whether the variables are plain curves in the same units, to be compared on one pair of axes."""
    units = {result.arrays[n].units for n in names}
    plain = all(len({c.colour for c in p.curves}) <= 1 for p in panels)
    return len(panels) == len(names) > 1 and len(units) == 1 and plain


def _merged(result: Result, names: Sequence[str], panels: Sequence[Panel]) -> Panel:
    """Variables on one pair of axes, told apart by colour."""
    for panel, name in zip(panels, names, strict=True):
        for curve in panel.curves:
            curve.colour = result.arrays[name].long_name or name.replace("_", " ")
    units = result.arrays[names[0]].units
    curves = [c for p in panels for c in p.curves]
    return Panel("", "" if units in ("", "1") else units, names[0], curves, panels[0].log_y)


def _band_note(result: Result, name: str, bounds: Bounds) -> str:
    array = result.arrays[name]
    if bounds is not None:
        return "band: " + " to ".join(b.replace("_", " ") for b in bounds)
    if SPREAD in array.dims:
        return f"band of {name}: range over {array.values.shape[array.dims.index(SPREAD)]} seeds"
    error = _error_of(result, name)
    text = result.arrays[error].long_name or error.replace("_", " ") if error else ""
    return f"band of {name.replace('_', ' ')}: ± {text[0].lower()}{text[1:]}" if text else ""


def _error_of(result: Result, name: str) -> str:
    """What the band of a variable shows: its spread between random directions if known, else its error.

    The spread tells whether another drawing would give another picture, so it is the more honest of the two.
    """
    array = result.arrays[name]
    for error in (f"{name}_spread", array.error):
        if error in result and result.arrays[error].dims == array.dims:
            return error
    return ""
