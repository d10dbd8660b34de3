"""Landscapes: contour lines, filled contours, surfaces; small multiples on one shared scale."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.analyzers.core.contract import Contours
from dynprobe.analyzers.core.result import Result
from dynprobe.cli import style
from dynprobe.cli.figure_curves import draw_cuts
from dynprobe.cli.figure_panels import chance_level, chance_text, require
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
from dynprobe.cli.figure_surface import plot_surface

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ("contour", "filled", "surface")
ENOUGH_LEVELS = 3
"""A panel with fewer of the shared levels gets some of its own."""

SLICE = "A slice: a non-convex picture shows a non-convex loss, never the converse"


def draw_contours(
    result: Result, kind: Contours, figure: Figure, look: str
) -> tuple[list[str], list[int] | None]:
    """Draw a landscape; returns notes for the small print and the pieces shown."""
    require(result, kind.z)
    names = [n for n in (kind.z, f"test_{kind.z}") if n in result]
    if kind.y not in result.arrays[kind.z].dims:
        metrics = [
            n for n in ("accuracy", "test_accuracy") if n in result and kind.x in result.arrays[n].dims
        ]
        return [*draw_cuts(result, [*names, *metrics], kind.x, figure, log_y=kind.log_z), SLICE], None
    panels, shown = planes(result, names, kind.x, kind.y)
    scale = shared_scale(panels, log=kind.log_z)
    x, y = (coordinate(result, axis, kind.z)[0] for axis in (kind.x, kind.y))
    chance = chance_level(result, kind.z)
    painter = _Painter(figure, x, y, scale, chance, look or STYLES[0])
    extra = 0.0 if painter.look == "contour" else 0.6
    spread = np.ptp(y) / np.ptp(x) if np.ptp(x) else 1.0
    square = spread if 1 / 3 < spread < 3 else 1.0
    n_columns = columns_for(len(panels) // len(names), len(names))
    aspect = 0.8 if painter.look == "surface" else square
    places, inches = grid(figure, len(panels), n_columns, aspect, extra)
    labels = axis_label(result, kind.x, inches), axis_label(result, kind.y, inches * square)
    for plane, place in zip(panels, places, strict=True):
        painter.paint(plane, place, labels)
    quantity = result.arrays[kind.z]
    if len(names) > 1:  # the panels' titles say which
        quantity = replace(quantity, long_name=kind.z.replace("_", " ").capitalize())
    painter.finish(style.label(quantity, kind.z))
    return [scale.clipped, painter.note, SLICE], shown


class _Painter:
    """Paints planes one by one and collects what the legend must explain."""

    def __init__(
        self, figure: Figure, x: np.ndarray, y: np.ndarray, scale: Scale, chance: float | None, look: str
    ) -> None:
        self.figure, self.x, self.y, self.scale, self.chance, self.look = figure, x, y, scale, chance, look
        self.axes: list[Any] = []
        self.handles: dict[str, Any] = {}
        self.note = ""

    def paint(self, plane: Plane, place: tuple[int, int, int], labels: tuple[str, str]) -> None:
        rows, columns, i = place
        ax: Any = self.figure.add_subplot(
            rows, columns, i + 1, projection="3d" if self.look == "surface" else None
        )
        self.axes.append(ax)
        ax.set_title(style.escaped(plane.title), loc="left")
        if self.look == "surface":
            plot_surface(ax, self.x, self.y, plane.z, self.scale, labels)
            if not np.isfinite(plane.z).all():
                self.note = "holes: not finite"
            return
        self._flat(ax, plane, size=5.0 if columns < 3 else 4.2)
        ratio = np.ptp(self.y) / np.ptp(self.x)
        ax.set_aspect("equal" if 1 / 3 < ratio < 3 else "auto")
        last_row = i // columns == rows - 1
        ax.set_xlabel(labels[0] if last_row else "")
        ax.set_ylabel(labels[1] if i % columns == 0 else "")
        ax.tick_params(labelbottom=last_row, labelleft=i % columns == 0)
        style.few_ticks(ax)

    def _flat(self, ax: Any, plane: Plane, size: float) -> None:
        scale, z = self.scale, np.ma.masked_invalid(plane.z)
        inside = scale.levels[(scale.levels > z.min()) & (scale.levels < z.max())]
        ax.set_xlim(self.x.min(), self.x.max())
        ax.set_ylim(self.y.min(), self.y.max())
        lines: dict[str, Any] = {"cmap": scale.cmap, "norm": scale.norm, "linewidths": 0.7}
        if self.look == "filled":
            edges = np.concatenate([[scale.low], scale.levels, [scale.high]])
            clipped = np.ma.clip(z, scale.low, scale.high)
            ax.contourf(self.x, self.y, clipped, edges, norm=scale.norm, cmap=scale.cmap)
            lines = {"colors": "white", "linewidths": 0.25}
        if inside.size:
            drawn = ax.contour(self.x, self.y, z, inside, **lines)
            if self.look == "contour":
                self._label(ax, drawn, size)
        if inside.size < ENOUGH_LEVELS:
            self._own_levels(ax, z, size)
        self._chance(ax, z)
        self._mark_missing(ax, plane)
        if self._centred:
            cross = {"marker": "x", "markersize": 4, "linestyle": ""}
            ax.plot(0, 0, color="white", markeredgewidth=2, **cross)  # a rim, for dark colours below
            (self.handles["θ*"],) = ax.plot(0, 0, color="black", markeredgewidth=0.9, **cross)

    def _own_levels(self, ax: Any, z: Any, size: float) -> None:
        """Thin lines at levels of this panel alone, where the shared ones are too far apart for it."""
        from matplotlib.lines import Line2D

        levels = style.nice_levels(float(z.min()), float(z.max()), 6)
        levels = levels[~np.isin(levels, self.scale.levels)]
        if levels.size:
            colour = style.INK if self.look == "filled" else style.GREY
            drawn = ax.contour(self.x, self.y, z, levels, colors=colour, linewidths=0.35)
            self._label(ax, drawn, size)
            self.handles["levels of one panel"] = Line2D([], [], color=colour, linewidth=0.35)
        else:
            text = f"flat: {style.number(float(f'{z.mean():.4g}'))}"
            ax.text(0.5, 0.75, text, transform=ax.transAxes, ha="center", fontsize=size)

    def _label(self, ax: Any, drawn: Any, size: float) -> None:
        """Values on the contour lines long enough to carry them."""
        least = 0.035 * size * max(np.ptp(self.x), np.ptp(self.y))
        long_enough = [
            level
            for level, segments in zip(drawn.levels, drawn.allsegs, strict=True)
            if any(np.ptp(s, axis=0).max() > least for s in segments if len(s))
        ]
        if long_enough:
            ax.clabel(drawn, long_enough, fmt=style.number, fontsize=size, inline_spacing=2)

    def _chance(self, ax: Any, z: Any) -> None:
        from matplotlib.lines import Line2D

        if self.chance is not None and z.min() < self.chance < z.max():
            ax.contour(
                self.x, self.y, z, [self.chance], colors=style.INK, linewidths=0.8, linestyles="dashed"
            )
            self.handles[chance_text(self.chance)] = Line2D(
                [], [], color=style.INK, linewidth=0.8, linestyle="--"
            )

    @property
    def _centred(self) -> bool:
        return all(bool(v.min() <= 0 <= v.max()) for v in (self.x, self.y))

    def _mark_missing(self, ax: Any, plane: Plane) -> None:
        """Grey where infinite, hatched where NaN: contours stop there, and the reader must see why."""
        from matplotlib.patches import Patch

        for name, where, hatch in (("infinite", np.isinf(plane.z), ""), ("NaN", np.isnan(plane.z), "//////")):
            if where.any():
                colour = style.PALE if not hatch else "white"
                # A cell with one bad corner has no contour, so the area reaches to the neighbouring points.
                ax.contourf(
                    self.x, self.y, where.astype(float), [0.02, 1.5], colors=[colour], hatches=[hatch]
                )
                self.handles[name] = Patch(facecolor=colour, hatch=hatch, edgecolor=style.INK, linewidth=0.3)

    def finish(self, quantity: str) -> None:
        """Legend, and the colour bar of the styles that need one."""
        title = quantity if self.look == "contour" else ""
        if self.look != "contour":
            self._colour_bar(quantity)
        if self.handles:
            style.legend(self.figure, self.handles, title)
        elif title:
            self.figure.suptitle(title, fontsize=7)

    def _colour_bar(self, quantity: str) -> None:
        from matplotlib.cm import ScalarMappable

        bar = self.figure.colorbar(
            ScalarMappable(self.scale.norm, self.scale.cmap),
            ax=self.axes,
            label=quantity,
            aspect=30,
            pad=0.03,
        )
        dress_bar(bar, self.scale)
        if self.chance is not None and self.scale.low < self.chance < self.scale.high:
            bar.ax.axhline(self.chance, color=style.INK, linewidth=0.8, linestyle="--")
