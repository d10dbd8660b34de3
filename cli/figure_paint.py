"""Panels of curves on paper: colours, bands, marks for what is not finite, legend or colour bar."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.cli import style
from dynprobe.cli.figure_panels import chance_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"NaN": "x", "infinite": "^"}
MARKED_POINTS = 25
"""Up to so many points a curve shows each of them."""


@dataclass
class Curve:
    """Points of one curve; `colour` and `dash` are the legend labels that give it its look."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    colour: str = ""
    dash: str = ""


@dataclass
class Panel:
    """Curves that share their axes; panels of one `scale` share their vertical limits."""

    title: str
    y_label: str
    scale: str
    curves: list[Curve] = field(default_factory=list)
    log_y: bool = False
    chance: float | None = None


@dataclass
class Axis:
    """The horizontal axis: its dimension and where the points are."""

    dim: str
    values: np.ndarray
    label: str
    is_step: bool = False
    log: bool = False


class Look:
    """Colours and dashes by legend label, the same in every panel.

    Args:
        panels: All panels of the figure.
        ordered: Whether the colours stand for something ordered, like steps.
    """

    def __init__(self, panels: Sequence[Panel], *, ordered: bool) -> None:
        curves = [c for p in panels for c in p.curves]
        self.labels = list(dict.fromkeys(c.colour for c in curves))
        self.dashes = list(dict.fromkeys(c.dash for c in curves))
        if len(self.labels) == 1 and len(self.dashes) > 1:  # runs alone: colours tell them apart best
            for curve in curves:
                curve.colour, curve.dash = curve.dash, ""
            self.labels, self.dashes = self.dashes, [""]
        self.bar = len(self.labels) > style.MAXIMAL_LEGEND
        n = len(self.labels)
        self.colours: Sequence[Any] = (
            style.sequential(n).colors if self.bar or (ordered and n > 1) else style.CATEGORIES  # type: ignore[assignment]
        )

    def of(self, curve: Curve) -> dict[str, Any]:
        """Keyword arguments for `plot`."""
        dash = style.DASHES[self.dashes.index(curve.dash) % len(style.DASHES)]
        unnamed = not curve.colour and len(self.labels) > 1
        colour = style.INK if unnamed else self.colours[self.labels.index(curve.colour)]
        return {"color": colour, "linestyle": dash}


def paint_panels(
    figure: Figure,
    panels: Sequence[Panel],
    axis: Axis,
    *,
    ordered: bool,
    marks: Mapping[float, str] | None = None,
) -> None:
    """Draw the panels, two or three to a row, with one legend or colour bar for all.

    Args:
        figure: An empty figure.
        panels: What to draw.
        axis: The horizontal axis they share.
        ordered: Whether the curves are a sequence (checkpoints) rather than categories.
        marks: Places along the axis that have a name (θ* at zero).
    """
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    style.set_size(
        figure, style.SINGLE if columns == 1 else style.DOUBLE, {1: 2.3, 2: 2.3}.get(columns, 2.0) * rows
    )
    look, handles = Look(panels, ordered=ordered), dict[str, Any]()
    axes = []
    for i, panel in enumerate(panels):
        ax = figure.add_subplot(rows, columns, i + 1)
        axes.append(ax)
        _panel(ax, panel, axis, look, handles, marks or {})
        if i + columns >= len(panels):
            ax.set_xlabel(axis.label)
        else:
            ax.tick_params(labelbottom=False)
    for scale in {p.scale for p in panels}:
        _share_limits([(a, p) for a, p in zip(axes, panels, strict=True) if p.scale == scale])
    _legend(figure, axes, look, handles)


def _panel(
    ax: Any, panel: Panel, axis: Axis, look: Look, handles: dict[str, Any], marks: Mapping[float, str]
) -> None:
    ax.set_ylabel(panel.y_label)
    ax.set_title(style.escaped(panel.title), loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    if panel.log_y:
        ax.set_yscale("log")
    for curve in panel.curves:
        _curve(ax, curve, look)
        _mark_missing(ax, curve, look, handles)
    for place, name in marks.items():
        if axis.values.min() <= place <= axis.values.max():
            ax.axvline(place, color=style.PALE, linewidth=0.6, zorder=0)
            at = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 6}
            ax.annotate(style.escaped(name), (place, 1), **at)
    if panel.chance is not None:
        line = ax.axhline(panel.chance, color=style.GREY, linewidth=0.6, linestyle=(0, (1, 2)))
        handles[chance_text(panel.chance)] = line
    if axis.log:
        positive = axis.values[axis.values > 0]
        ax.set_xscale(
            "symlog", linthresh=float(positive.min()), linscale=0.3
        ) if axis.values.min() <= 0 else (ax.set_xscale("log"))
        _step_ticks(ax, axis.values)


def _curve(ax: Any, curve: Curve, look: Look) -> None:
    shade = look.of(curve)
    if np.isfinite(curve.low).any():
        low, high = (np.where(np.isfinite(v), v, np.nan) for v in (curve.low, curve.high))
        ax.fill_between(curve.x, low, high, color=shade["color"], alpha=0.22, linewidth=0)
    y = np.where(np.isfinite(curve.y), curve.y, np.nan)
    few = len(curve.x) <= MARKED_POINTS
    ax.plot(curve.x, y, marker="o" if few else "", **shade)


def _mark_missing(ax: Any, curve: Curve, look: Look, handles: dict[str, Any]) -> None:
    """A mark at the upper edge wherever the curve has no finite value: a gap must not go unseen."""
    for name, where in (("NaN", np.isnan(curve.y)), ("infinite", np.isinf(curve.y))):
        if where.any():
            colour = look.of(curve)["color"]
            ax.plot(
                curve.x[where],
                np.full(int(where.sum()), 0.985),
                linestyle="",
                marker=MARKS[name],
                markersize=3,
                markeredgewidth=0.7,
                color=colour,
                transform=ax.get_xaxis_transform(),
                clip_on=False,
            )
            handles[name] = _proxy(linestyle="", marker=MARKS[name], color=style.GREY, markersize=3)


def _proxy(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _step_ticks(ax: Any, steps: np.ndarray) -> None:
    """Ticks at zero and at powers of ten (with 2 and 5 when there are few), as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = steps[steps > 0].min(), steps.max()
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    subs = (1, 2, 5) if high / low < 30 else (1,)
    places = [m * 10.0**p for p in powers for m in subs if low <= m * 10.0**p <= high * 1.0001]
    ax.xaxis.set_major_locator(FixedLocator([0.0] * bool(steps.min() <= 0) + places))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(style.number))


def _share_limits(group: Sequence[tuple[Any, Panel]]) -> None:
    """One vertical range for panels of one scale, from what is finite (and positive on a log axis)."""
    curves = [c for _, p in group for c in p.curves]
    if not curves:
        return
    values = np.concatenate([np.concatenate([c.y, c.low, c.high]) for c in curves])
    chance = [p.chance for _, p in group if p.chance is not None]
    values = np.concatenate([values[np.isfinite(values)], chance])
    log = group[0][1].log_y
    if log:
        centres = np.concatenate([c.y for c in curves])
        centres = centres[np.isfinite(centres) & (centres > 0)]
        floor = centres.min() / 3 if centres.size else 0.0  # a band down to zero must not flatten the rest
        values = values[values > max(floor, 0.0)]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    for ax, _ in group:
        if log and high > low:
            pad = (high / low) ** 0.06
            ax.set_ylim(low / pad, high * pad)
            style.log_ticks(ax.yaxis, low, high)
        elif high > low:
            pad = 0.06 * (high - low)
            ax.set_ylim(low - pad, high + pad)


def _legend(figure: Figure, axes: list[Any], look: Look, handles: dict[str, Any]) -> None:
    entries: dict[str, Any] = {}
    if not look.bar:
        named = zip(look.labels, look.colours, strict=False)
        entries = {name: _proxy(color=colour) for name, colour in named if name}
    if len(look.dashes) > 1:
        dashes = zip(look.dashes, itertools.cycle(style.DASHES), strict=False)
        entries |= {name: _proxy(color=style.INK, linestyle=dash) for name, dash in dashes}
    entries |= handles
    if entries:
        style.legend(figure, entries)
    if look.bar:
        _colour_bar(figure, axes, look)


def _colour_bar(figure: Figure, axes: list[Any], look: Look) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    n = len(look.labels)
    shades = ScalarMappable(Normalize(-0.5, n - 0.5), style.sequential(n))
    ticks = np.unique(np.linspace(0, n - 1, min(n, 8)).round().astype(int))
    words = {text.rpartition(" ")[0] for text in look.labels}
    shared = words.pop() if len(words) == 1 else ""
    texts = [look.labels[i].removeprefix(shared).strip() for i in ticks]
    bar = figure.colorbar(shades, ax=axes, ticks=ticks, label=style.escaped(shared), aspect=30, pad=0.02)
    bar.ax.set_yticklabels([style.escaped(t) for t in texts])
    bar.outline.set_linewidth(0.5)
