"""The plane of two features: where the target is decided, both corrections, the box and the polygon."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._corrections_panels import BOX, CORRECTION_COLOUR, DIAMOND, INK, PALE, has_box, plain
from dynprobe.analyzers._corrections_runs import NEAREST, JudgedRun

Floats = NDArray[np.float64]

TARGET_REGION, POLYGON = "#E3EEF6", "#009E73"
ARROW: dict[str, Any] = {"arrowstyle": "-|>", "color": INK, "lw": 0.6, "mutation_scale": 5, "shrinkB": 2}
UNREACHABLE: dict[str, Any] = {"facecolor": "none", "edgecolor": PALE, "hatch": "/////", "linewidth": 0}
MOST_EARLIER = 12
"""Boxes of earlier checkpoints that a panel outlines."""


def axes_of_plane(run: JudgedRun, sample: int) -> list[int]:
    """The two features of a judgement's margin map; none where it has no map."""
    if "margin_map" not in run or not np.isfinite(run.numbers("margin_map")[-1, sample]).any():
        return []
    features = run.chosen if len(run.chosen) == 2 else run.changed(sample)
    if not len(features):
        features = run.moved(sample, NEAREST)
        ends = [run.numbers(name)[-1, sample][features] for name in ("value", "nearest")]
        if np.isin(ends, (0, 1)).all():  # two categories, over which no map is made
            return []
    return [int(j) for j in features] if len(features) == 2 else []


def has_target(run: JudgedRun, sample: int) -> bool:
    """Whether the target is decided anywhere in the plane of the last checkpoint."""
    return bool(np.nanmax(run.numbers("margin_map")[-1, sample]) > 0)


def draw_plane(panel: Any, run: JudgedRun, sample: int, colour_of: Any) -> None:
    """Where the target is decided, the judged point, its nearest and its stable correction, and the box.

    Args:
        panel: A matplotlib axes.
        run: Whose last checkpoint is shown; boxes of earlier ones are thin outlines.
        sample: Row of the judgement, with a margin map.
        colour_of: Step to colour of an earlier checkpoint's box.
    """
    x, y = axes_of_plane(run, sample)
    low, high = (end[[x, y]] for end in run.allowed(sample))
    margin = run.numbers("margin_map")[-1, sample]
    grids = [np.linspace(low[k], high[k], margin.shape[1 - k]) for k in (0, 1)]
    if has_target(run, sample):
        panel.contourf(*grids, margin, levels=[0, np.inf], colors=[TARGET_REGION], zorder=0)
        if np.nanmin(margin) < 0:
            panel.contour(*grids, margin, levels=[0], colors=[INK], linewidths=0.7, zorder=1)
    _limit(panel, low, high)
    _shade_directions(panel, run, sample, (x, y))
    for t in earlier_boxes(run, sample):
        _outline(panel, run, t, sample, (x, y), edgecolor=colour_of(run.step[t]), linewidth=0.6, zorder=2)
    judged = run.numbers("value")[-1, sample][[x, y]]
    if run.found()[-1, sample]:
        _draw_correction(panel, run, sample, (x, y), judged)
    if nearest_in_plane(run, sample):
        nearest = run.numbers("nearest")[-1, sample][[x, y]]
        if run.correction(sample) == NEAREST:
            panel.annotate("", nearest, judged, arrowprops=ARROW, zorder=5)
        panel.plot(*nearest, **DIAMOND, clip_on=False, zorder=6)
    panel.plot(*judged, "o", color=INK, markersize=4, clip_on=False, zorder=6)
    panel.set_xlabel(plain(run.features[x]))
    panel.set_ylabel(plain(run.features[y]))


def nearest_in_plane(run: JudgedRun, sample: int) -> bool:
    """Whether the nearest correction lies in the plane that is drawn: it may change other features."""
    known = np.isfinite(run.numbers("distance")[-1, sample])
    if "nearest_target" in run:  # of several classes that were allowed it may have found another one
        known &= run["nearest_target"][-1, sample] == run["target"][-1, sample]
    return bool(known and set(run.moved(sample, NEAREST)) <= set(axes_of_plane(run, sample)))


def _limit(panel: Any, low: Floats, high: Floats) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlim(low[0], high[0])
    panel.set_ylim(low[1], high[1])
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def is_directed(run: JudgedRun, sample: int) -> bool:
    """Whether a feature of the plane may only grow or only shrink."""
    axes = axes_of_plane(run, sample)
    pairs = zip(run.allowed(sample), run.reachable(sample), strict=True)
    return any((end[axes] != reach[axes]).any() for end, reach in pairs)


def _shade_directions(panel: Any, run: JudgedRun, sample: int, axes: tuple[int, int]) -> None:
    """Hatch what a feature cannot reach that may only grow or only shrink."""
    for ends, reaches in zip(run.allowed(sample), run.reachable(sample), strict=True):
        for span, j in zip((panel.axvspan, panel.axhspan), axes, strict=True):
            if ends[j] != reaches[j]:
                span(*sorted((ends[j], reaches[j])), **UNREACHABLE, zorder=0.5)


def earlier_boxes(run: JudgedRun, sample: int) -> NDArray[np.intp]:
    """Checkpoints before the last whose box is outlined, evenly among those that have one."""
    shown = axes_of_plane(run, sample)
    found = np.flatnonzero(run.found()[:-1, sample])
    found = found[[set(run.changed(sample, int(t))) <= set(shown) for t in found]] if len(found) else found
    if len(found) <= MOST_EARLIER:
        return found
    some: NDArray[np.intp] = found[np.linspace(0, len(found) - 1, MOST_EARLIER).round().astype(int)]
    return some


def _outline(panel: Any, run: JudgedRun, t: int, sample: int, axes: tuple[int, int], **style: Any) -> None:
    """The box of checkpoint `t`; nothing where none was measured."""
    from matplotlib.patches import Rectangle

    low, high = (run.numbers(f"box_{end}")[t, sample][list(axes)] for end in ("low", "high"))
    if np.isfinite(low + high).all():
        style = {"facecolor": "none"} | style
        panel.add_patch(Rectangle((low[0], low[1]), *(high - low), **style))


def _draw_correction(panel: Any, run: JudgedRun, sample: int, axes: tuple[int, int], judged: Floats) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Polygon, Rectangle

    filled: dict[str, Any] = {"facecolor": to_rgba(BOX, 0.22), "edgecolor": BOX, "linewidth": 1.1}
    _outline(panel, run, -1, sample, axes, **filled, zorder=3)
    if len(corners := run.polygon(sample)):
        filled = {"facecolor": to_rgba(POLYGON, 0.22), "edgecolor": POLYGON, "linewidth": 1.1}
        panel.add_patch(Polygon(corners, **filled, zorder=3))
    corrected = run.numbers("corrected")[-1, sample][list(axes)]
    if np.isfinite(corrected).all():
        wide = run.numbers("stability")[-1][list(axes)] * np.isin(axes, run.changed(sample))
        lowest, highest = (end[list(axes)] for end in run.reachable(sample))
        low = np.maximum(corrected - wide, np.minimum(lowest, corrected))
        high = np.minimum(corrected + wide, np.maximum(highest, corrected))
        style: dict[str, Any] = {
            "facecolor": "none",
            "edgecolor": CORRECTION_COLOUR,
            "linestyle": (0, (3, 1.2)),
        }
        panel.add_patch(Rectangle((low[0], low[1]), *(high - low), **style, linewidth=0.8, zorder=4))
        panel.annotate("", corrected, judged, arrowprops=ARROW, zorder=5)
        panel.plot(*corrected, "o", color=CORRECTION_COLOUR, markersize=3.6, clip_on=False, zorder=6)


def plane_handles(judgements: list[tuple[JudgedRun, int]]) -> dict[str, Any]:
    """What the marks of some planes mean."""
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = [(run, i) for run, i in judgements if run.found()[-1, i]]
    handles: dict[str, Any] = {"judged": Line2D([], [], color=INK, marker="o", linestyle="", markersize=4)}
    if any(nearest_in_plane(run, i) for run, i in judgements):
        handles["nearest correction"] = Line2D([], [], **DIAMOND)
    if any(run.is_stable() for run, _ in found):
        handles["stable correction"] = Line2D(
            [],
            [],
            color=CORRECTION_COLOUR,
            marker="o",
            markersize=3.6,
            linewidth=0.8,
            linestyle=(0, (3, 1.2)),
        )
    if any(has_box(run, i) for run, i in found):
        handles["verified box"] = Patch(facecolor=to_rgba(BOX, 0.22), edgecolor=BOX)
    if any(len(run.polygon(i)) for run, i in found):
        handles["verified polygon"] = Patch(facecolor=to_rgba(POLYGON, 0.22), edgecolor=POLYGON)
    if any(has_target(run, i) for run, i in judgements):
        handles["target is decided"] = Patch(facecolor=TARGET_REGION, edgecolor=INK, linewidth=0.7)
    if any(is_directed(run, i) for run, i in judgements):
        handles["out of reach (direction)"] = Patch(**UNREACHABLE)
    return handles
