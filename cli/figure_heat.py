"""Heat maps: values as colours over two axes, one panel a piece, on one shared scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.analyzers.core.contract import Heatmap
from dynprobe.analyzers.core.result import Result
from dynprobe.cli import style
from dynprobe.cli.figure_panels import require
from dynprobe.cli.figure_planes import (
    Plane,
    Scale,
    axis_label,
    columns_for,
    coordinate,
    dress_bar,
    grid,
    planes,
    shared_scale,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_heatmap(result: Result, kind: Heatmap, figure: Figure) -> tuple[list[str], list[int]]:
    """Draw values as colours over two axes; returns notes for the small print and the pieces shown."""
    require(result, kind.z)
    panels, shown = planes(result, [kind.z], kind.x, kind.y)
    scale = shared_scale(panels, log=kind.log_z)
    if scale.low < 0 < scale.high:
        _make_diverging(scale)
    x, y = coordinate(result, kind.x, kind.z), coordinate(result, kind.y, kind.z)
    n_columns = columns_for(len(panels), 1)
    categorical = bool(x[1] and y[1])
    aspect = min(2.0, max(0.4, len(y[0]) / len(x[0]))) if categorical else 0.75
    places, inches = grid(figure, len(panels), n_columns, aspect, 0.7)
    names = axis_label(result, kind.x, inches), axis_label(result, kind.y, inches * aspect)
    axes: list[Any] = []
    for plane, (rows, columns, i) in zip(panels, places, strict=True):
        ax = figure.add_subplot(rows, columns, i + 1)
        axes.append(ax)
        _heat(ax, plane, x, y, scale)
        ax.set_title(style.escaped(plane.title), loc="left")
        outer = i // columns == rows - 1, i % columns == 0
        ax.set_xlabel(names[0] if outer[0] else "")
        ax.set_ylabel(names[1] if outer[1] else "")
        ax.tick_params(labelbottom=outer[0], labelleft=outer[1])
    from matplotlib.cm import ScalarMappable

    quantity = style.label(result.arrays[kind.z], kind.z)
    bar = figure.colorbar(
        ScalarMappable(scale.norm, scale.cmap), ax=axes, label=quantity, aspect=30, pad=0.02
    )
    bar.outline.set_linewidth(0.5)
    if scale.log:
        dress_bar(bar, scale)
    return [scale.clipped, _missing_note(panels)], shown


def _make_diverging(scale: Scale) -> None:
    import matplotlib
    from matplotlib.colors import Normalize

    reach = max(-scale.low, scale.high)
    scale.norm, scale.cmap = Normalize(-reach, reach), matplotlib.colormaps["RdBu_r"]


def _missing_note(panels: Sequence[Plane]) -> str:
    return "grey: not finite" if any(not np.isfinite(p.z).all() for p in panels) else ""


def _heat(
    ax: Any, plane: Plane, x: tuple[np.ndarray, list[str]], y: tuple[np.ndarray, list[str]], scale: Scale
) -> None:
    ax.set_facecolor(style.PALE)
    ax.pcolormesh(
        x[0],
        y[0],
        np.ma.masked_invalid(plane.z),
        norm=scale.norm,
        cmap=scale.cmap,
        shading="nearest",
        rasterized=True,
    )
    for axis, (positions, labels) in ((ax.xaxis, x), (ax.yaxis, y)):
        if labels:
            every = -(-len(labels) // 24)
            axis.set_ticks(positions[::every], labels=[style.escaped(t) for t in labels[::every]])
    if x[1] and max(map(len, x[1])) > 3:
        ax.tick_params(axis="x", rotation=90)
    if x[1] and y[1] and len(x[0]) <= 8 and len(y[0]) <= 8:
        _write_values(ax, plane, scale)


def _write_values(ax: Any, plane: Plane, scale: Scale) -> None:
    for (row, column), value in np.ndenumerate(plane.z):
        if np.isfinite(value):
            red, green, blue = scale.cmap(scale.norm(value))[:3]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ax.text(
                column,
                row,
                f"{value:.2g}",
                ha="center",
                va="center",
                fontsize=5,
                color="white" if dark else "black",
            )
