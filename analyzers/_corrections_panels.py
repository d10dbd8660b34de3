"""Panels on single judgements: intervals of several features, changes of an image; and their titles."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._corrections_runs import (
    FOUND,
    NEAREST,
    NONE_EXISTS,
    OPTIMAL,
    OUTCOMES,
    STABLE,
    TIMEOUT,
    UNSUPPORTED,
    JudgedRun,
)
from dynprobe.analyzers._corrections_sentences import change_text, least

Floats = NDArray[np.float64]

INK, GREY, PALE = "#222222", "#777777", "#dddddd"
BOX, CORRECTION_COLOUR, NEAREST_COLOUR = "#0072B2", "#D55E00", "#E69F00"
DIAMOND: dict[str, Any] = {
    "color": NEAREST_COLOUR,
    "marker": "D",
    "markersize": 3.6,
    "linestyle": "",
    "markeredgecolor": INK,
    "markeredgewidth": 0.4,
}
CORRECTION: dict[str, Any] = {
    "color": CORRECTION_COLOUR,
    "marker": "|",
    "markersize": 7,
    "linestyle": "",
    "markeredgewidth": 1.4,
}
MOST_OUTLINES = 100
"""Changed pixels up to which each is outlined."""
MOST_ROWS = 6
"""Features that a panel of intervals shows."""


def plain(text: str) -> str:
    """Text of the user's as matplotlib prints it literally."""
    return text.replace("$", r"\$")


def title_of(run: JudgedRun, sample: int, characters: int) -> str:
    """Which judgement, and how far its correction is, in lines of about so many characters."""
    name = f"{run.name}, sample" if run.name else "sample"
    transition = run.transition(sample)
    head = f"{name} {run.samples[sample]}" + (f": {transition}" if transition else "")
    told = _distance_text(run, sample)
    parts = [head, *([told] if len(told) <= characters else told.split("; "))]
    return plain("\n".join(line for part in parts for line in textwrap.wrap(part, characters)))


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
    if outcome == UNSUPPORTED and near:
        return f"nothing stable can be verified; {near}"
    words = {NONE_EXISTS: f"no correction{by} exists"}
    return words.get(outcome, OUTCOMES.get(outcome, "not judged"))


def has_box(run: JudgedRun, sample: int) -> bool:
    return bool(np.isfinite(run.numbers("box_low")[-1, sample]).all())


def rows_of_intervals(run: JudgedRun, sample: int) -> list[int]:
    """Features that a panel of intervals shows.

    Those that have to change and those that may vary with them; of many only those changed most; where there
    is no correction, those that may change.
    """
    correction = run.correction(sample)
    if not correction:
        return [int(j) for j in run.chosen[:MOST_ROWS]]
    if correction == NEAREST:
        return sorted(int(j) for j in run.moved(sample, NEAREST)[:MOST_ROWS])
    leaving, varying = run.leaving(sample).tolist(), run.varying(sample).tolist()
    return sorted(leaving + varying if len(leaving + varying) <= MOST_ROWS else leaving[:MOST_ROWS])


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
            mark = {STABLE: CORRECTION, NEAREST: DIAMOND | {"clip_on": False}}[correction]
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
    if correction == STABLE:
        changing, varying = run.leaving(sample), run.varying(sample)
    else:
        changing, varying = run.moved(sample, NEAREST) if correction else run.chosen, run.chosen[:0]
    said = [f"{n} more features"] if (n := len(np.setdiff1d(changing, rows))) else []
    more = "" if said else " more"
    said += [f"{n}{more} may vary"] if (n := len(np.setdiff1d(varying, rows))) else []
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
    if any(run.correction(i) == NEAREST for run, i in judgements):
        handles["nearest correction"] = Line2D([], [], **DIAMOND)
    if any(has_box(run, i) for run, i in found):
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
