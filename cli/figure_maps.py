"""Surfaces over two directions, and heat maps, as small multiples on one shared scale."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.analyzers.core.contract import Contours, Heatmap
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
    grid,
    planes,
    shared_scale,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ("contour", "filled", "surface")
SLICE = "A slice: a non-convex picture shows a non-convex loss, never the converse"


def draw_contours(result: Result, kind: Contours, figure: Figure, look: str) -> tuple[list[str], list[int] | None]:
    """Draw a landscape; returns notes for the small print and the pieces shown."""
    require(result, kind.z)
    names = [n for n in (kind.z, f"test_{kind.z}") if n in result]
    if kind.y not in result.arrays[kind.z].dims:
        metrics = [n for n in ("accuracy", "test_accuracy") if n in result and kind.x in result.arrays[n].dims]
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
            self._surface(ax, plane, labels)
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
            self._chance(ax, z)
        else:
            ends = f"{style.number(float(f'{z.min():.2g}'))} to {style.number(float(f'{z.max():.2g}'))}"
            ax.text(0.5, 0.75, f"between levels:\n{ends}", transform=ax.transAxes, ha="center", fontsize=size)
        self._mark_missing(ax, plane)
        if self._centred:
            cross = {"marker": "x", "markersize": 4, "linestyle": ""}
            ax.plot(0, 0, color="white", markeredgewidth=2, **cross)  # a rim, for dark colours below
            (self.handles["θ*"],) = ax.plot(0, 0, color="black", markeredgewidth=0.9, **cross)

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
            ax.contour(self.x, self.y, z, [self.chance], colors=style.INK, linewidths=0.8, linestyles="dashed")
            self.handles[chance_text(self.chance)] = Line2D([], [], color=style.INK, linewidth=0.8, linestyle="--")

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
                ax.contourf(self.x, self.y, where.astype(float), [0.02, 1.5], colors=[colour], hatches=[hatch])
                self.handles[name] = Patch(facecolor=colour, hatch=hatch, edgecolor=style.INK, linewidth=0.3)

    def _surface(self, ax: Any, plane: Plane, labels: tuple[str, str]) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        scale = self.scale
        z = np.clip(np.where(np.isfinite(plane.z), plane.z, np.nan), scale.low, scale.high)
        height = np.log10(z) if scale.log else z
        ends = (np.log10(scale.low), np.log10(scale.high)) if scale.log else (scale.low, scale.high)
        ax.plot_surface(
            *np.meshgrid(self.x, self.y),
            height,
            facecolors=shaded(scale.cmap(scale.norm(np.ma.masked_invalid(z))), (height - ends[0]) / np.ptp(ends)),
            rcount=100,
            ccount=100,
            shade=False,
            linewidth=0,
            antialiased=False,
            rasterized=True,  # thousands of polygons would show hairlines and weigh megabytes
        )
        ax.set_zlim(*ends)
        ax.zaxis.set_major_locator(MaxNLocator(4, integer=bool(scale.log and ends[1] - ends[0] > 2)))
        power = (lambda v: float(f"{10**v:.2g}")) if scale.log else float
        ax.zaxis.set_major_formatter(FuncFormatter(lambda v, _: style.number(power(v))))
        dress_box(ax, labels)
        if not np.isfinite(plane.z).all():
            self.note = "holes: not finite"

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
            ScalarMappable(self.scale.norm, self.scale.cmap), ax=self.axes, label=quantity, aspect=30, pad=0.03
        )
        dress_bar(bar, self.scale)
        if self.chance is not None and self.scale.low < self.chance < self.scale.high:
            bar.ax.axhline(self.chance, color=style.INK, linewidth=0.8, linestyle="--")


def shaded(colours: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Colours a little darker on slopes that face away from the light, so that a surface has relief."""
    from matplotlib.colors import LightSource

    n_y, n_x = height.shape
    filled = np.where(np.isfinite(height), height, 0.0)
    light = LightSource(azdeg=300, altdeg=50).hillshade(filled, dx=1.5 / n_x, dy=1.5 / n_y)
    out = colours.copy()
    out[..., :3] *= 0.75 + 0.25 * light[..., None]
    return out


def dress_box(ax: Any, labels: tuple[str, str]) -> None:
    """Three-dimensional axes with thin lines, few ticks and labels close to them."""
    from matplotlib.ticker import MaxNLocator

    for axis, text in ((ax.xaxis, labels[0]), (ax.yaxis, labels[1]), (ax.zaxis, "")):
        axis._axinfo["grid"].update(linewidth=0.3, color=style.PALE)
        axis.set_pane_color((1, 1, 1, 0))
        axis.line.set_linewidth(0.5)
        axis.set_tick_params(pad=-4, labelsize=5)
        axis.labelpad = -10
        axis.set_label_text("\n".join(textwrap.wrap(text.replace("\n", " "), 26)), fontsize=5)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(style.number)
    ax.view_init(elev=30, azim=-55)
    ax.set_box_aspect((1, 1, 0.75), zoom=1.0)


def dress_bar(bar: Any, scale: Scale) -> None:
    """Ticks of a colour bar at the contour levels."""
    bar.ax.minorticks_off()
    bar.set_ticks(scale.levels, labels=[style.number(v) for v in scale.levels])
    bar.outline.set_linewidth(0.5)


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
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.cmap), ax=axes, label=quantity, aspect=30, pad=0.02)
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]
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


def _heat(ax: Any, plane: Plane, x: tuple[np.ndarray, list[str]], y: tuple[np.ndarray, list[str]], scale: Scale) -> None:
    ax.set_facecolor(style.PALE)
    ax.pcolormesh(
        x[0], y[0], np.ma.masked_invalid(plane.z), norm=scale.norm, cmap=scale.cmap, shading="nearest", rasterized=True
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
                column, row, f"{value:.2g}", ha="center", va="center", fontsize=5, color="white" if dark else "black"
            )
