"""Draws residuals in and outside V_lin, network against linear models, and outputs of single samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._linear_dynamics_findings import RunView, runs_of
from dynprobe.analyzers._steps import space_steps
from dynprobe.analyzers.core.result import Result

STYLES = ("auto", "residuals", "agreement", "outputs")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
MOST_RUNS = 4
"""Runs that are drawn, one row each."""

Floats = NDArray[np.float64]


def draw_linear_dynamics(result: Result, figure: Any, style: str = "") -> None:
    """One row per run: residuals, distance from the linear models, outputs of a few samples.

    Args:
        result: From `linear_dynamics`.
        figure: An empty matplotlib figure.
        style: auto (default) draws all three; residuals, agreement or outputs one of them.

    Raises:
        OptionError: If the style is not known.
    """
    style = style or STYLES[0]
    if style not in STYLES:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
    runs = runs_of(result)[:MOST_RUNS]
    painters = {"residuals": _residuals, "agreement": _agreement, "outputs": _outputs}
    chosen = list(painters) if style == "auto" else [style]
    figure.set_size_inches(2.4 * len(chosen) + 0.8 * (len(chosen) == 1), 2.3 * len(runs))
    panels = figure.subplots(len(runs), len(chosen), squeeze=False)
    for row, run in zip(panels, runs, strict=True):
        for panel, name in zip(row, chosen, strict=True):
            painters[name](panel, run)
            panel.set_xlabel(run.step_name)
            space_steps(panel, run.step)
            panel.spines[["top", "right"]].set_visible(False)
        if len(runs) > 1:
            row[0].set_title(run.name.replace("$", r"\$"), loc="left")


def _line(panel: Any, run: RunView, values: Floats, errors: Floats, label: str, colour: str) -> None:
    panel.plot(run.step, values, color=colour, label=label, linewidth=1.1, marker="o", markersize=2)
    panel.fill_between(run.step, values - errors, values + errors, color=colour, alpha=0.2, linewidth=0)


def _residuals(panel: Any, run: RunView) -> None:
    for name, label, colour in (
        ("residual_linear", "in V_lin", COLOURS[0]),
        ("residual_complement", "outside", COLOURS[1]),
    ):
        values = run.along(name).astype(float)
        if np.isfinite(values).any():
            _line(panel, run, values, run.along(f"{name}_stderr").astype(float), label, colour)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("residual² / target² ± s.e.")
    panel.legend(loc="best")


def _agreement(panel: Any, run: RunView) -> None:
    values, errors = run.along("relative_mse").astype(float), run.along("relative_mse_stderr").astype(float)
    drawn = []
    for (i, name), colour in zip(run.sets, COLOURS, strict=False):
        if np.isfinite(values[:, i]).any():
            drawn.append(values[:, i])
            _line(panel, run, values[:, i], errors[:, i], name, colour)
    noise = run.along("batch_noise").astype(float)[:, run.sets[0][0]]
    if (noise > 0).any():
        panel.plot(run.step, noise, color=GREY, linestyle="--", linewidth=0.8, label="batches alone")
        drawn.append(noise)
    floor = float(run.of_run("expected_floor"))
    if np.isfinite(floor):
        panel.axhline(floor, color=GREY, linestyle=":", linewidth=0.8, label="0.6 d/width")
        drawn.append(np.array([floor]))
    if not drawn:
        panel.text(0.5, 0.5, "no linear model\n(see the notes)", ha="center", transform=panel.transAxes)
        return
    positive = np.concatenate(drawn)
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if len(positive):
        panel.set_yscale("log")
        panel.set_ylim(positive.min() / 2, positive.max() * 2)
    panel.set_ylabel("network − linear, relative MSE")
    panel.legend(loc="best")


def _outputs(panel: Any, run: RunView) -> None:
    network, linear = run.along("sample_output").astype(float), run.along("linear_output").astype(float)
    shown = np.atleast_1d(run.of_run("shown_output")).astype(float)
    samples = np.flatnonzero(np.isfinite(shown))
    drawn = np.empty(0)
    for place, colour in zip(samples, COLOURS, strict=False):
        output = int(shown[place])
        drawn = np.concatenate([drawn, network[:, place, output]])
        panel.plot(run.step, network[:, place, output], color=colour, linewidth=1.1)
        panel.plot(run.step, linear[:, place, output], color=colour, linewidth=0.9, linestyle="--")
    panel.plot([], [], color=GREY, label="network")
    panel.plot([], [], color=GREY, linestyle="--", label="linear model")
    if np.isfinite(drawn).any():  # a linear model that diverges would hide the network
        drawn = drawn[np.isfinite(drawn)]
        margin = 0.3 * float(np.ptp(drawn)) or 1.0
        panel.set_ylim(float(drawn.min()) - margin, float(drawn.max()) + margin)
    some = f" ({len(COLOURS)} of {len(samples)})" if len(samples) > len(COLOURS) else ""
    panel.set_ylabel(f"output of a sample{some}")
    panel.legend(loc="best")
