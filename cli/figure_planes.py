"""Planes of numbers, cut out of a result for small multiples that share one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.analyzers.core.result import Result
from dynprobe.cli import style
from dynprobe.cli.figure_curves import SPREAD
from dynprobe.cli.figure_panels import (
    MAXIMAL_PANELS,
    along,
    number_or_nan,
    piece_title,
    shown_pieces,
    step_text,
)
from dynprobe.io.errors import InputError

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure


@dataclass
class Plane:
    """One panel: values over (y, x), the piece they belong to, and what the panel is called."""

    z: np.ndarray
    title: str
    name: str
    piece: int


@dataclass
class Scale:
    """What all panels share: the range of finite values drawn, the colours, the contour levels."""

    low: float
    high: float
    norm: Normalize
    cmap: Any
    levels: np.ndarray
    log: bool
    clipped: str = ""


def planes(result: Result, names: Sequence[str], x: str, y: str) -> tuple[list[Plane], list[int]]:
    """The panels to show, checkpoints within variables, and the pieces they belong to.

    Raises:
        InputError: If no piece has a finite value.
    """
    stacks = {name: _stack(result, name, x, y) for name in names}
    finite = np.isfinite(stacks[names[0]][0]).any(axis=(1, 2, 3))
    if not finite.any():
        raise InputError(
            f"{result.analyzer}: {names[0]} has no finite value in any piece, so there is nothing to draw",
            tip="The report keeps the values as they are: dynprobe report show",
        )
    per_piece = stacks[names[0]][0].shape[1]
    room = max(1, (MAXIMAL_PANELS if len(names) == 1 else 4) // per_piece)
    lead_is_axis = finite.size == 1 and result.n_pieces > 1
    pieces = [0] if lead_is_axis else shown_pieces(result, np.flatnonzero(finite).tolist(), room)
    panels = []
    for name in names:
        values, labels = stacks[name]
        for piece in pieces:
            for k, text in enumerate(labels[:MAXIMAL_PANELS]):
                parts = [result.arrays[name].long_name or name] if len(names) > 1 else []
                parts += [] if lead_is_axis else [piece_title(result, piece)]
                panels.append(Plane(values[piece, k], ", ".join(filter(None, [*parts, text])), name, piece))
    return panels, list(range(result.n_pieces)) if lead_is_axis else pieces


def _stack(result: Result, name: str, x: str, y: str) -> tuple[np.ndarray, list[str]]:
    """Values as (piece, other, y, x), and what the entries of the other dimension are called."""
    array = result.arrays[name]
    dim_x, dim_y = _dim(result, x, name), _dim(result, y, name)
    values, dims = array.values.astype(float), list(array.dims)
    if SPREAD in dims and SPREAD not in (dim_x, dim_y):
        with np.errstate(invalid="ignore", over="ignore"):
            values = values.mean(axis=dims.index(SPREAD))
        dims.remove(SPREAD)
    lead = [d for d in dims if d == result.lead and d not in (dim_x, dim_y)]
    others = [d for d in dims if d not in (*lead, dim_x, dim_y)]
    values = np.transpose(values, [dims.index(d) for d in (*lead, *others, dim_y, dim_x)])
    sizes = values.shape[len(lead) : -2]
    labels = [
        ", ".join(f"{d} {_label_of(result, d, i)}" for d, i in zip(others, index, strict=True))
        for index in np.ndindex(*sizes)
    ]
    pieces = values.shape[0] if lead else 1
    return values.reshape(pieces, len(labels), *values.shape[-2:]), labels


def _label_of(result: Result, dim: str, index: int) -> str:
    labels = along(result, dim, dim, "step")
    return str(index) if labels is None else step_text(labels[index])


def _dim(result: Result, axis: str, name: str) -> str:
    """The dimension that a named axis (a coordinate, an index like the step) runs along."""
    dims = result.arrays[name].dims
    found = result.arrays.get(axis)
    dim = found.dims[0] if found is not None and len(found.dims) == 1 else axis
    if dim not in dims:
        raise InputError(
            f"{result.analyzer}: {name} has no axis {axis!r}, it has {', '.join(dims) or 'none'}"
        )
    return dim


def coordinate(result: Result, axis: str, name: str) -> tuple[np.ndarray, list[str]]:
    """Positions along an axis; and its labels where they are names rather than numbers."""
    dim = _dim(result, axis, name)
    found = result.arrays.get(axis)
    size = result[name].shape[result.arrays[name].dims.index(dim)]
    if found is None or found.values.shape != (size,):
        return np.arange(size, dtype=float), []
    positions = np.array([number_or_nan(v) for v in found.values.tolist()])
    apart = np.diff(positions)
    named = axis.startswith("step")  # saved at growing intervals as a rule: cells of one width
    if not named and np.all(np.isfinite(positions)) and (np.all(apart > 0) or np.all(apart < 0)):
        return positions, []
    return np.arange(size, dtype=float), [step_text(v) for v in found.values.tolist()]


def axis_label(result: Result, axis: str, inches: float) -> str:
    """The label of an axis that is so long; its name where the result has no such array."""
    found = result.arrays.get(axis)
    return style.label(found, axis, inches) if found is not None else axis


DECADES = 8.0
"""A range of more decades than that is cut around its lower quartile."""

BELOW, ABOVE = 1e-6, 1e5
"""How far below and above; the quartile is a low one because half a plane may explode."""


def shared_scale(panels: Sequence[Plane], *, log: bool) -> Scale:
    """One range for all panels; logarithmic if wanted and no value is negative.

    A network that explodes at the rim (1e30) or fits perfectly at one point (1e-12) would press all
    else into one colour, so a logarithmic range of many decades is cut, and the figure says so.
    """
    from matplotlib.colors import LogNorm, Normalize

    values = np.concatenate([p.z[np.isfinite(p.z)] for p in panels])
    log = log and bool(values.min() >= 0) and bool(values.max() > 0)
    values = values[values > 0] if log else values
    low, high, clipped = float(values.min()), float(values.max()), ""
    if log and high / low > 10**DECADES:
        anchor = float(np.quantile(values, 0.25, method="lower"))
        kept = values[(values >= anchor * BELOW) & (values <= anchor * ABOVE)]
        if kept.min() > low or kept.max() < high:
            clipped = f"colours and levels clipped, values reach {_rounded(low)} to {_rounded(high)}"
        low, high = float(kept.min()), float(kept.max())
    if high == low:
        high = low + (abs(low) or 1.0) * 1e-6
    norm = LogNorm(low, high) if log else Normalize(low, high)
    levels = style.nice_levels(low, high)
    return Scale(low, high, norm, style.sequential(256), levels, log, clipped)


def _rounded(value: float) -> str:
    return style.number(float(f"{value:.1e}"))


def grid(
    figure: Figure, n_panels: int, n_columns: int, aspect: float, extra: float = 0.0
) -> tuple[list[tuple[int, int, int]], float]:
    """Size the figure for small multiples.

    Args:
        figure: An empty figure.
        n_panels: How many panels.
        n_columns: How many to a row.
        aspect: Height over width of a panel.
        extra: Inches on the right that a colour bar takes.

    Returns:
        `(rows, columns, index)` of each panel, and the width of one in inches.
    """
    rows = -(-n_panels // n_columns)
    width = style.SINGLE if n_columns == 1 else style.DOUBLE
    panel = (width - 0.62 - extra - 0.24 * (n_columns - 1)) / n_columns
    labels = 0.75 if panel < 1.7 else 0.65  # under narrow panels they take two lines
    style.set_size(figure, width, rows * (panel * aspect + 0.24) + labels)
    return [(rows, n_columns, i) for i in range(n_panels)], panel


def columns_for(n_pieces: int, n_rows_of_variables: int) -> int:
    """Panels to a row: a row of small ones rather than a page of large ones."""
    if n_rows_of_variables > 1:
        return n_rows_of_variables if n_pieces == 1 else n_pieces
    return n_pieces if n_pieces <= 4 else 3


def dress_bar(bar: Any, scale: Scale) -> None:
    """Ticks of a colour bar at the contour levels."""
    bar.ax.minorticks_off()
    bar.set_ticks(scale.levels, labels=[style.number(v) for v in scale.levels])
    bar.outline.set_linewidth(0.5)
