"""Panels on all judgements of a run: distances, outcomes and holding boxes over the steps; transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._corrections_panels import GREY, INK, PALE, plain
from dynprobe.analyzers._corrections_runs import OUTCOMES, JudgedRun, outcome_text
from dynprobe.analyzers._corrections_summary import share, transfer_shares
from dynprobe.analyzers._steps import space_steps

Floats = NDArray[np.float64]

DISTANCE, HOLDING, OVERLAP = "#0072B2", "#009E73", "#CC79A7"
OUTCOME_COLOURS = dict(
    zip(OUTCOMES, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#777777", "#dddddd"), strict=True)
)
MOST_BANDS = 10
"""Judgements up to which every distance has a band down to its bound."""


def draw_distances(panel: Any, run: JudgedRun) -> None:
    """Stable distances over the steps with bands down to their bounds, and medians over judgements.

    Args:
        panel: A matplotlib axes.
        run: With at least one checkpoint.
    """
    stable = np.where(run.found(), run.numbers("stable_distance"), np.nan)
    lower = run.numbers("stable_lower_bound")
    drawn = np.flatnonzero(np.isfinite(stable).any(0))
    several = len(drawn) > 1  # else the median hides the one
    label = "one judgement" if several else ""
    for i in drawn:
        thin = {"color": DISTANCE, "linewidth": 0.5, "alpha": 0.55, "markersize": 2}
        _curve(panel, run.step, stable[:, i], label, **thin)
        if stable.shape[1] <= MOST_BANDS:
            panel.fill_between(run.step, lower[:, i], stable[:, i], color=DISTANCE, alpha=0.15, linewidth=0)
    kind = "stable correction" if run.is_stable() else "correction"
    _curve(panel, run.step, _median(stable), kind, color=DISTANCE, linewidth=1.4, markersize=2)
    if run.is_stable():
        # of the same judgements, so that the two medians can be compared
        nearest = np.where(run.found() | (len(drawn) == 0), run.numbers("distance"), np.nan)
        dashed = {"color": INK, "linewidth": 0.9, "linestyle": (0, (3, 1.2)), "markersize": 2}
        _curve(panel, run.step, _median(nearest), "nearest point", **dashed)
    panel.set_ylim(0, 1.1 * panel.dataLim.y1 if panel.lines and panel.dataLim.y1 > 0 else 1)
    panel.set_ylabel("distance (bold: median)" if several else "distance")
    if not len(drawn):
        if not panel.lines:
            panel.set_yticks([])
        words = "no stable correction found" if run.is_stable() else "no correction found"
        panel.text(0.5, 0.5, words, transform=panel.transAxes, ha="center", color=GREY)
    _finish(panel, run)


def has_distances(run: JudgedRun) -> bool:
    """Whether there is anything that `draw_distances` could draw."""
    return bool(np.isfinite(run.numbers("distance")).any() or run.found().any())


def _curve(panel: Any, step: Floats, values: Floats, label: str, **style: Any) -> None:
    """A line over the steps, with a mark where neither neighbour is known; nothing where nothing is."""
    known = np.isfinite(values)
    if not known.any():
        return
    beside = np.pad(known, 1)
    alone = np.flatnonzero(known & ~beside[:-2] & ~beside[2:])
    marks = {"marker": "o", "markevery": alone.tolist()} if len(alone) else {}
    panel.plot(step, values, **style, **marks, label=label or None)


def _median(values: Floats) -> Floats:
    """Over judgements, NaN where there is none."""
    return np.array(
        [np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in values]
    )


def _finish(panel: Any, run: JudgedRun) -> None:
    if len(run.step) > 1:
        space_steps(panel, run.step)
    else:
        panel.set_xticks(run.step)
    panel.set_xlabel(run.step_name)
    panel.spines[["top", "right"]].set_visible(False)


def draw_outcomes(panel: Any, run: JudgedRun) -> None:
    """How many judgements have which outcome, one stacked column a checkpoint."""
    outcomes = run.outcomes()
    place, below = np.arange(len(run.step)), np.zeros(len(run.step))
    for name in OUTCOMES:
        count = (outcomes == name).sum(1)
        if count.any():
            panel.bar(place, count, 0.86, below, color=OUTCOME_COLOURS[name], linewidth=0)
            below = below + count
    ticks = np.unique(np.linspace(0, len(place) - 1, min(4, len(place))).round().astype(int))
    panel.set_xticks(ticks, [f"{run.step[i]:g}" for i in ticks])
    panel.set_xlim(-0.6, max(len(place), 2) - 0.4)
    panel.set_ylim(0, max(float(below.max()), 1.0))
    panel.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    panel.set_xlabel(f"{run.step_name} (one column each)" if len(place) > len(ticks) else run.step_name)
    panel.set_ylabel("judgements", labelpad=4)
    panel.spines[["top", "right"]].set_visible(False)


def outcome_handles(runs: list[JudgedRun]) -> dict[str, Any]:
    """What the colours of the outcomes of some runs mean."""
    from matplotlib.patches import Patch

    seen = {str(name) for run in runs for name in np.unique(run.outcomes())}
    stable = any(run.is_stable() for run in runs)
    return {
        outcome_text(name, stable=stable): Patch(color=OUTCOME_COLOURS[name])
        for name in OUTCOMES
        if name in seen
    }


def draw_holding(panel: Any, run: JudgedRun) -> None:
    """Share of the boxes of the checkpoint before that still hold, and their overlap with the new ones."""
    holds = np.array([share(row)[:2] for row in run.numbers("previous_holds")])
    style = {"color": HOLDING, "marker": "o", "markersize": 2.5, "elinewidth": 0.6}
    panel.errorbar(run.step, holds[:, 0], holds[:, 1], **style, label="still hold (± s.e.)")
    overlap = _median(run.numbers("overlap"))
    panel.plot(run.step, overlap, color=OVERLAP, marker="s", markersize=2, label="overlap, median")
    panel.set_ylim(-0.03, 1.03)
    panel.set_ylabel("boxes of the step before")
    _finish(panel, run)


def draw_transfer(figure: Any, panel: Any, runs: list[JudgedRun], others: list[str]) -> None:
    """Which share of one run's boxes holds on another run's checkpoint, as a map with numbers.

    Args:
        figure: That the panel belongs to.
        panel: A matplotlib axes.
        runs: Whose boxes are looked at, one row each.
        others: Names of the runs they are looked at on, one column each.
    """
    shares = np.array([transfer_shares(run)[:, 0] for run in runs])
    panel.set_facecolor(PALE)
    image = panel.imshow(np.ma.masked_invalid(shares), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    if shares.size <= 64:
        for (i, j), value in np.ndenumerate(shares):
            known = np.isfinite(value)
            text, colour = (f"{value:.2f}", "white" if value < 0.6 else INK) if known else ("–", GREY)
            panel.text(j, i, text, ha="center", va="center", color=colour, fontsize=6)
    long = max(len(name) for name in others) * len(others) > 40
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}
    panel.set_xticks(range(len(others)), [plain(name) for name in others], **turned)
    panel.set_yticks(range(len(runs)), [plain(run.name) or "this run" for run in runs])
    panel.tick_params(length=0)
    panel.set_xlabel("verified again on")
    panel.set_ylabel("boxes of")
    figure.colorbar(image, ax=panel, label="share of boxes that hold")
