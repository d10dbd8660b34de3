"""Panels on single judgements: the plane of two features, intervals of several, changes of an image."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._corrections_runs import (
    FOUND,
    NEAREST as NEAREST_POINT,
    NONE_EXISTS,
    OPTIMAL,
    OUTCOMES,
    STABLE,
    TIMEOUT,
    JudgedRun,
)
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
ARROW: dict[str, Any] = {"arrowstyle": "-|>", "color": INK, "lw": 0.6, "mutation_scale": 5, "shrinkB": 2}
UNREACHABLE: dict[str, Any] = {"facecolor": "none", "edgecolor": PALE, "hatch": "/////", "linewidth": 0}
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
        return _open_text(run, sample, outcome)
    upper, lower = (run.numbers(n)[-1, sample] for n in ("stable_distance", "stable_lower_bound"))
    bound = f" (≥ {least(lower)} needed)" if outcome != OPTIMAL and lower > 0 else ""
    return f"distance {upper:.3g}" + (bound or f" ({OUTCOMES[outcome]})")


def _open_text(run: JudgedRun, sample: int, outcome: str) -> str:
    most = run.at_most()
    by = f" by {most} of {len(run.chosen)} features" if most else ""
    point = run.numbers("distance")[-1, sample]
    near = f"nearest point {point:.3g}" if np.isfinite(point) else ""
    if outcome == NONE_EXISTS and run.only_stable_excluded(sample):
        return f"no stable correction{by}; {near}" if near else f"no stable correction{by} exists"
    if outcome == TIMEOUT:
        return f"undecided; {near}" if near else f"undecided: nothing{by} found in time"
    words = {NONE_EXISTS: f"no correction{by} exists"}
    return words.get(outcome, OUTCOMES.get(outcome, "not judged"))


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
        if run.correction(sample) == NEAREST_POINT:
            panel.annotate("", nearest, judged, arrowprops=ARROW, zorder=5)
        panel.plot(*nearest, **DIAMOND, clip_on=False, zorder=6)
    panel.plot(*judged, "o", color=INK, markersize=4, clip_on=False, zorder=6)
    panel.set_xlabel(plain(run.features[x]))
    panel.set_ylabel(plain(run.features[y]))


def nearest_in_plane(run: JudgedRun, sample: int) -> bool:
    """Whether the nearest correction lies in the plane that is drawn: it may change other features."""
    known = np.isfinite(run.numbers("distance")[-1, sample])
    return bool(known and set(run.moved(sample, NEAREST_POINT)) <= set(axes_of_plane(run, sample)))


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
                span(*sorted((ends[j], reaches[j])), **UNREACHABLE, zorder=1)


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
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": CORRECTED, "linestyle": (0, (3, 1.2))}
        panel.add_patch(Rectangle((low[0], low[1]), *(high - low), **style, linewidth=0.8, zorder=4))
        panel.annotate("", corrected, judged, arrowprops=ARROW, zorder=5)
        panel.plot(*corrected, "o", color=CORRECTED, markersize=3.6, clip_on=False, zorder=6)


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
            [], [], color=CORRECTED, marker="o", markersize=3.6, linewidth=0.8, linestyle=(0, (3, 1.2))
        )
    if any(_has_box(run, i) for run, i in found):
        handles["verified box"] = Patch(facecolor=to_rgba(BOX, 0.22), edgecolor=BOX)
    if any(len(run.polygon(i)) for run, i in found):
        handles["verified polygon"] = Patch(facecolor=to_rgba(POLYGON, 0.22), edgecolor=POLYGON)
    if any(has_target(run, i) for run, i in judgements):
        handles["target is decided"] = Patch(facecolor=TARGET_REGION, edgecolor=INK, linewidth=0.7)
    if any(is_directed(run, i) for run, i in judgements):
        handles["out of reach (direction)"] = Patch(**UNREACHABLE)
    return handles


def _has_box(run: JudgedRun, sample: int) -> bool:
    return bool(np.isfinite(run.numbers("box_low")[-1, sample]).all())


def rows_of_intervals(run: JudgedRun, sample: int) -> list[int]:
    """Features that a panel of intervals shows.

    Those that change and those that may vary with them; of many only those changed most; where there is no
    correction, those that may change.
    """
    correction = run.correction(sample)
    if not correction:
        return [int(j) for j in run.chosen[:MOST_ROWS]]
    moved = [int(j) for j in run.moved(sample, correction)]
    varying = [int(j) for j in run.varying(sample)] if correction == STABLE else []
    return sorted(moved + varying if len(moved + varying) <= MOST_ROWS else moved[:MOST_ROWS])


def draw_intervals(panel: Any, run: JudgedRun, sample: int, room: int) -> None:
    """One row a feature: its allowed range, the judged value, and the interval that corrects it.

    Args:
        panel: A matplotlib axes.
        run: Whose last checkpoint is shown; the nearest point where there is no stable correction.
        sample: Row of the judgement.
        room: Rows to leave room for, so that panels side by side have one spacing.
    """
    rows = rows_of_intervals(run, sample)
    correction = run.correction(sample)
    low, high = run.allowed(sample)
    reach = run.reachable(sample)

    def placed(value: float, j: int) -> float:
        return float((value - low[j]) / (high[j] - low[j])) if high[j] > low[j] else 0.5

    def told(name: str, j: int) -> float:
        return placed(run.numbers(name)[-1, sample, j], j)

    bar: dict[str, Any] = {"linewidth": 4, "solid_capstyle": "butt"}
    for row, j in enumerate(rows):
        panel.plot([placed(end[j], j) for end in reach], [row, row], color=PALE, **bar, zorder=0)
        value = told("value", j)
        if correction:
            ends = told("box_low", j), told("box_high", j)
            if correction == STABLE and np.isfinite(sum(ends)):
                panel.plot(ends, [row, row], color=BOX, **bar, zorder=1)
            panel.plot([value, told(correction, j)], [row, row], color=INK, linewidth=0.6, zorder=2)
            mark = {STABLE: CORRECTION, NEAREST_POINT: DIAMOND | {"clip_on": False}}[correction]
            panel.plot(told(correction, j), row, **mark, zorder=3)
            beside = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}
            panel.annotate(change_text(run, sample, j), (1.03, row), **beside, va="center", fontsize=6)
        panel.plot(value, row, "o", color=INK, markersize=3.5, clip_on=False, zorder=4)
    panel.set_yticks(range(len(rows)), [plain(run.features[j]) for j in rows])
    panel.set_ylim(room - 0.4, -0.6)
    panel.set_xlim(-0.02, 1.02)
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0)
    panel.spines[:].set_visible(False)
    panel.set_xlabel(_left_out(run, sample, rows), color=GREY, loc="left", fontsize=6)


def _left_out(run: JudgedRun, sample: int, rows: list[int]) -> str:
    """How many features a panel of intervals does not show."""
    correction = run.correction(sample)
    moved = np.setdiff1d(run.moved(sample, correction) if correction else run.chosen, rows)
    varying = np.setdiff1d(run.varying(sample), rows) if correction == STABLE else moved[:0]
    said = [f"{len(moved)} more features"] if len(moved) else []
    said += [f"{len(varying)}{'' if said else ' more'} may vary"] if len(varying) else []
    return f"and {', '.join(said)}" if said else ""


def interval_handles(judgements: list[tuple[JudgedRun, int]]) -> dict[str, Any]:
    """What the marks of some panels of intervals mean."""
    from matplotlib.lines import Line2D

    handles = {
        "allowed range": Line2D([], [], color=PALE, linewidth=4),
        "judged": Line2D([], [], color=INK, marker="o", linestyle="", markersize=3.5),
    }
    found = [(run, i) for run, i in judgements if run.correction(i) == STABLE]
    if found:
        stable = "stable " if any(run.is_stable() for run, _ in found) else ""
        handles[f"{stable}correction"] = Line2D([], [], **CORRECTION)
    if any(run.correction(i) == NEAREST_POINT for run, i in judgements):
        handles["nearest correction"] = Line2D([], [], **DIAMOND)
    if any(_has_box(run, i) for run, i in found):
        handles["verified box"] = Line2D([], [], color=BOX, linewidth=4)
    return handles


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
    """What the correction adds to every pixel, summed over channels, in shown units; (height, width).

    That of the nearest point where there is no stable one; 0 where there is neither.
    """
    shape = picture_shape(run)
    change = np.zeros(int(np.prod(shape)))
    if correction := run.correction(sample):
        moved = run.moved(sample, correction)
        added = (run.numbers(correction) - run.numbers("value"))[-1, sample, moved]
        change[run.numbers("feature_index")[-1][moved].astype(int)] = added
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
