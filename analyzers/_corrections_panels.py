"""Panels on single judgements: the plane of two features, intervals of several, changes of an image."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._corrections_runs import FOUND, NONE_EXISTS, OPTIMAL, OUTCOMES, TIMEOUT, JudgedRun
from dynprobe.analyzers._corrections_sentences import change_text, least

Floats = NDArray[np.float64]

INK, GREY, PALE = "#222222", "#777777", "#dddddd"
TARGET_REGION, BOX, CORRECTED, NEAREST, POLYGON = "#E3EEF6", "#0072B2", "#D55E00", "#E69F00", "#009E73"
DIAMOND: dict[str, Any] = {
    "color": NEAREST,
    "marker": "D",
    "markersize": 3.6,
    "linestyle": "",
    "markeredgecolor": INK,
    "markeredgewidth": 0.4,
}
CORRECTION: dict[str, Any] = {
    "color": CORRECTED,
    "marker": "|",
    "markersize": 7,
    "linestyle": "",
    "markeredgewidth": 1.4,
}
MOST_EARLIER = 12
"""Boxes of earlier checkpoints that a panel outlines."""
MOST_OUTLINES = 100
"""Changed pixels up to which each is outlined."""
MOST_ROWS = 6
"""Features that a panel of intervals shows."""


def plain(text: str) -> str:
    """Text of the user's as matplotlib prints it literally."""
    return text.replace("$", r"\$")


def axes_of_plane(run: JudgedRun, sample: int) -> list[int]:
    """The two features of a judgement's margin map; none where it has no map."""
    if "margin_map" not in run or not np.isfinite(run.numbers("margin_map")[-1, sample]).any():
        return []
    features = run.chosen if len(run.chosen) == 2 else run.changed(sample)
    return [int(j) for j in features] if len(features) == 2 else []


def has_target(run: JudgedRun, sample: int) -> bool:
    """Whether the target is decided anywhere in the plane of the last checkpoint."""
    return bool(np.nanmax(run.numbers("margin_map")[-1, sample]) > 0)


def title_of(run: JudgedRun, sample: int, characters: int) -> str:
    """Which judgement, and how far its correction is, in lines of about so many characters."""
    name = f"{run.name}, sample" if run.name else "sample"
    transition = run.transition(sample)
    head = f"{name} {run.samples[sample]}" + (f": {transition}" if transition else "")
    lines = [*textwrap.wrap(head, characters), *textwrap.wrap(_distance_text(run, sample), characters)]
    return plain("\n".join(lines))


def _distance_text(run: JudgedRun, sample: int) -> str:
    outcome = str(run.outcomes()[-1, sample])
    if outcome not in FOUND:
        stable = "stable " if run.only_stable_excluded(sample) else ""
        words = {NONE_EXISTS: f"no {stable}correction exists", TIMEOUT: "undecided: nothing found in time"}
        return words.get(outcome, OUTCOMES.get(outcome, "not judged"))
    upper, lower = (run.numbers(n)[-1, sample] for n in ("stable_distance", "stable_lower_bound"))
    bound = f" (≥ {least(lower)} needed)" if outcome != OPTIMAL and lower > 0 else ""
    return f"distance {upper:.3g}" + (bound or f" ({OUTCOMES[outcome]})")


def draw_plane(panel: Any, run: JudgedRun, sample: int, colour_of: Any) -> None:
    """Where the target is decided, the judged point, its nearest and its stable correction, and the box.

    Args:
        panel: A matplotlib axes.
        run: Whose last checkpoint is shown; boxes of earlier ones are thin outlines.
        sample: Row of the judgement, with a margin map.
        colour_of: Step to colour of an earlier checkpoint's box.
    """
    x, y = axes_of_plane(run, sample)
    low, high = (run.numbers(f"feature_{end}")[-1][[x, y]] for end in ("low", "high"))
    margin = run.numbers("margin_map")[-1, sample]
    grids = [np.linspace(low[k], high[k], margin.shape[1 - k]) for k in (0, 1)]
    if has_target(run, sample):
        panel.contourf(*grids, margin, levels=[0, np.inf], colors=[TARGET_REGION], zorder=0)
        if np.nanmin(margin) < 0:
            panel.contour(*grids, margin, levels=[0], colors=[INK], linewidths=0.7, zorder=1)
    judged = run.numbers("value")[-1, sample][[x, y]]
    _limit(panel, low, high, judged)
    for t in earlier_boxes(run, sample):
        _outline(panel, run, t, sample, (x, y), edgecolor=colour_of(run.step[t]), linewidth=0.6, zorder=2)
    if run.found()[-1, sample]:
        _draw_correction(panel, run, sample, (x, y), judged)
    panel.plot(*judged, "o", color=INK, markersize=4, clip_on=False, zorder=6)
    panel.set_xlabel(plain(run.features[x]))
    panel.set_ylabel(plain(run.features[y]))


def _limit(panel: Any, low: Floats, high: Floats, judged: Floats) -> None:
    """The allowed ranges, and the judged point should it lie outside."""
    from matplotlib.ticker import MaxNLocator

    reach = np.array([np.minimum(low, judged), np.maximum(high, judged)])
    panel.set_xlim(*reach[:, 0])
    panel.set_ylim(*reach[:, 1])
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


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
    corner = run.numbers("polygon")[-1, sample] if "polygon" in run else np.empty((0, 2))
    corner = corner[np.isfinite(corner).all(-1)]
    if len(corner) > 2:
        filled = {"facecolor": to_rgba(POLYGON, 0.22), "edgecolor": POLYGON, "linewidth": 1.1}
        panel.add_patch(Polygon(corner, **filled, zorder=3))
    nearest, corrected = (run.numbers(n)[-1, sample][list(axes)] for n in ("nearest", "corrected"))
    if np.isfinite(corrected).all():
        moved = run.numbers("stability")[-1][list(axes)] * np.isin(axes, run.changed(sample))
        ends = [run.numbers(f"feature_{end}")[-1][list(axes)] for end in ("low", "high")]
        low = np.maximum(corrected - moved, np.minimum(ends[0], corrected))
        high = np.minimum(corrected + moved, np.maximum(ends[1], corrected))
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": CORRECTED, "linestyle": (0, (3, 1.2))}
        panel.add_patch(Rectangle((low[0], low[1]), *(high - low), **style, linewidth=0.8, zorder=4))
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 0.6, "mutation_scale": 5, "shrinkB": 2}
        panel.annotate("", corrected, judged, arrowprops=arrow, zorder=5)
        panel.plot(*corrected, "o", color=CORRECTED, markersize=3.6, clip_on=False, zorder=6)
    away = run.numbers("nearest")[-1, sample] != run.numbers("value")[-1, sample]
    if np.isfinite(nearest).all() and set(np.flatnonzero(away & np.isfinite(away))) <= set(axes):
        panel.plot(*nearest, **DIAMOND, clip_on=False, zorder=6)


def plane_handles(runs: list[JudgedRun], *, polygon: bool) -> dict[str, Any]:
    """What the marks of a plane mean."""
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    stable = any(run.is_stable() for run in runs)
    handles: dict[str, Any] = {
        "judged": Line2D([], [], color=INK, marker="o", linestyle="", markersize=4),
        "nearest correction": Line2D([], [], **DIAMOND),
    }
    if stable:
        handles["stable correction"] = Line2D(
            [], [], color=CORRECTED, marker="o", markersize=3.6, linewidth=0.8, linestyle=(0, (3, 1.2))
        )
    handles["verified box"] = Patch(facecolor=to_rgba(BOX, 0.22), edgecolor=BOX)
    if polygon:
        handles["verified polygon"] = Patch(facecolor=to_rgba(POLYGON, 0.22), edgecolor=POLYGON)
    handles["target is decided"] = Patch(facecolor=TARGET_REGION, edgecolor=INK, linewidth=0.7)
    return handles


def rows_of_intervals(run: JudgedRun, sample: int) -> list[int]:
    """Features that a panel of intervals shows: those changed most, else those that may change."""
    changed = run.changed(sample) if run.found()[-1, sample] else run.chosen
    span = (run.numbers("feature_high") - run.numbers("feature_low"))[-1]
    moved = np.abs(run.numbers("corrected") - run.numbers("value"))[-1, sample] / span
    most = np.argsort(-np.nan_to_num(moved[changed]), kind="stable")[:MOST_ROWS]
    return sorted(int(j) for j in changed[most])


def draw_intervals(panel: Any, run: JudgedRun, sample: int, room: int) -> None:
    """One row a feature: its allowed range, the judged value, and the interval that corrects it.

    Args:
        panel: A matplotlib axes.
        run: Whose last checkpoint is shown.
        sample: Row of the judgement.
        room: Rows to leave room for, so that panels side by side have one spacing.
    """
    rows = rows_of_intervals(run, sample)
    found = bool(run.found()[-1, sample])
    low, high = (run.numbers(f"feature_{end}")[-1] for end in ("low", "high"))

    def placed(name: str, j: int) -> float:
        return float((run.numbers(name)[-1, sample, j] - low[j]) / (high[j] - low[j]))

    for row, j in enumerate(rows):
        panel.plot([0, 1], [row, row], color=PALE, linewidth=4, solid_capstyle="butt", zorder=0)
        value = placed("value", j)
        if found:
            ends = placed("box_low", j), placed("box_high", j)
            corrected = placed("corrected", j)
            if np.isfinite(sum(ends)):
                panel.plot(ends, [row, row], color=BOX, linewidth=4, solid_capstyle="butt", zorder=1)
            panel.plot([value, corrected], [row, row], color=INK, linewidth=0.6, zorder=2)
            panel.plot(corrected, row, **CORRECTION, zorder=3)
            beside = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}
            panel.annotate(change_text(run, sample, j), (1.03, row), **beside, va="center", fontsize=6)
        panel.plot(value, row, "o", color=INK, markersize=3.5, clip_on=False, zorder=4)
    panel.set_yticks(range(len(rows)), [plain(run.features[j]) for j in rows])
    panel.set_ylim(room - 0.4, -0.6)
    panel.set_xlim(-0.02, 1.02)
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0)
    panel.spines[:].set_visible(False)
    left_out = len(run.changed(sample) if found else run.chosen) - len(rows)
    if left_out:
        panel.set_xlabel(f"and {left_out} more features", color=GREY, loc="left", fontsize=6)


def interval_handles() -> dict[str, Any]:
    """What the marks of an interval mean."""
    from matplotlib.lines import Line2D

    return {
        "allowed range": Line2D([], [], color=PALE, linewidth=4),
        "judged": Line2D([], [], color=INK, marker="o", linestyle="", markersize=3.5),
        "correction": Line2D([], [], **CORRECTION),
        "verified box": Line2D([], [], color=BOX, linewidth=4),
    }


def picture_shape(run: JudgedRun) -> tuple[int, ...]:
    """Channels, height and width of the inputs, or () where they are no images."""
    if "input" not in run or "input_shape" not in run:
        return ()
    raw = run.numbers("input_shape")[-1]
    shape = tuple(int(n) for n in raw[np.isfinite(raw)])
    shape = (1, *shape) if len(shape) == 2 else shape
    fits = len(shape) == 3 and int(np.prod(shape)) == run["input"].shape[-1] and min(shape[1:]) > 1
    return shape if fits else ()


def change_of_picture(run: JudgedRun, sample: int) -> Floats:
    """What the correction adds to every pixel, summed over channels, in shown units; (height, width)."""
    shape = picture_shape(run)
    change = np.zeros(int(np.prod(shape)))
    moved = (run.numbers("corrected") - run.numbers("value"))[-1, sample]
    where = np.isin(np.arange(len(moved)), run.changed(sample)) & np.isfinite(moved)
    change[run.numbers("feature_index")[-1][where].astype(int)] = moved[where]
    return np.asarray(change.reshape(shape).sum(0))


def draw_picture(panel: Any, run: JudgedRun, sample: int, largest: float) -> Any:
    """The judged image in grey, and what the correction adds to its pixels in colour.

    Args:
        panel: A matplotlib axes.
        run: With inputs that are images.
        sample: Row of the judgement.
        largest: Change that has the full colour.

    Returns:
        The coloured image, for a colour bar.
    """
    from matplotlib.patches import Rectangle

    shape = picture_shape(run)
    image = run.numbers("input")[-1, sample].reshape(shape).mean(0)
    ends = np.nanmin(image), np.nanmax(image)
    # dark strokes would hide the change: the grey scale starts at white and ends at a light grey
    panel.imshow(image, cmap="Greys", vmin=ends[0], vmax=ends[0] + 2.2 * max(ends[1] - ends[0], 1e-12))
    change = change_of_picture(run, sample)
    shown = np.ma.masked_where(change == 0, change)
    places = np.argwhere(change != 0)
    if len(places) <= MOST_OUTLINES:  # a small change is as pale as the image
        for y, x in places:
            panel.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="none", edgecolor=INK, linewidth=0.5)
            )
    drawn = panel.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_anchor("N")  # elsewhere the layout leaves no room for the title
    panel.spines[:].set_color(GREY)
    return drawn
