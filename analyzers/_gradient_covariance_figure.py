"""Draws spectra and stability of runs over their steps, with the break-even point."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._steps import space_steps, step_axis
from dynprobe.analyzers.core.result import Result
from dynprobe.analyzers.numerics.break_even import break_even_step

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
MAXIMAL_RUNS = len(COLOURS)

Floats = NDArray[np.float64]


def draw_gradient_covariance(result: Result, figure: Any) -> None:
    """Four panels over the steps: largest eigenvalues of K and H, Tr K over λ_K¹, and stability.

    Args:
        result: From `gradient-covariance`.
        figure: An empty matplotlib figure.
    """
    runs = list(dict.fromkeys(result["run"].astype(str).tolist()))
    figure.set_size_inches(6.75, 3.9)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2, sharex=True)
    drawn = [_Run(result, run, colour) for colour, run in zip(COLOURS, runs, strict=False)]
    for mine in drawn:
        mine.draw(top_left, "eigenvalue", rank=0)
        mine.draw(top_right, "hessian_eigenvalue")
        mine.draw_threshold(top_right)
        mine.draw(bottom_left, "trace_ratio")
        mine.draw(bottom_right, "stability")
        mine.draw_break_even(bottom_right)
    for panel, text in (
        (top_left, r"$\lambda_K^1$ of the gradients ± s.e."),
        (top_right, r"$\lambda_H^1$ of the Hessian"),
        (bottom_left, r"Tr $K$ / $\lambda_K^1$ ± s.e."),
        (bottom_right, "stability (1: break-even)"),
    ):
        panel.set_ylabel(text)
    for panel in (top_left, top_right):
        panel.set_yscale("log")
    bottom_left.set_ylim(bottom=0)
    _finish_stability(result, bottom_right)
    if np.isfinite(result["learning_rate"].astype(float)).any():
        many = any(len(mine.step) > 1 for mine in drawn)
        style = ":" if many else "-"
        line = top_right.plot([], [], color=GREY, linewidth=0.7, linestyle=style, label=r"2/$\eta$")
        top_right.legend(handles=line)
    if len(runs) > 1:
        top_left.legend()
    steps, name = step_axis(result)
    for panel in (bottom_left, bottom_right):
        panel.set_xlabel(name)
        space_steps(panel, steps)
    if len(runs) > MAXIMAL_RUNS:
        top_left.set_title(f"the first {MAXIMAL_RUNS} of {len(runs)} runs", loc="left")


class _Run:
    """One run's part of a result, in its colour."""

    def __init__(self, result: Result, name: str, colour: str) -> None:
        self._result, self._colour = result, colour
        self._name = name.replace("$", r"\$")
        steps = step_axis(result)[0]
        mine = np.flatnonzero(result["run"].astype(str) == name)
        self._mine = mine[np.argsort(steps[mine], kind="stable")]
        self.step = steps[self._mine]

    def along(self, name: str, rank: int | None = None) -> Floats:
        """A variable over the run's steps."""
        values: Floats = self._result[name].astype(float)[self._mine]
        return values if rank is None else values[:, rank]

    def draw(self, panel: Any, name: str, rank: int | None = None) -> None:
        """Draw a variable, with one standard error where it has one: a band, or a bar for a single step."""
        values = self.along(name, rank)
        style = {"color": self._colour, "marker": "o", "markersize": 2, "label": self._name}
        error = self.along(f"{name}_stderr", rank) if f"{name}_stderr" in self._result else None
        if len(self.step) == 1:
            panel.errorbar(self.step, values, error, capsize=2, elinewidth=0.7, linestyle="", **style)
            return
        panel.plot(self.step, values, **style)
        if error is not None:
            low, high = values - error, values + error
            panel.fill_between(self.step, low, high, color=self._colour, alpha=0.22, linewidth=0)

    def draw_threshold(self, panel: Any) -> None:
        """2/η, above which descent without noise is unstable: a dotted line, or a dash at a single step."""
        rate = self.along("learning_rate")
        bound = 2 / np.where(rate > 0, rate, np.nan)
        dash = {"marker": "_", "markersize": 14, "markeredgewidth": 0.7} if len(self.step) == 1 else {}
        panel.plot(self.step, bound, color=self._colour, linewidth=0.7, linestyle=":", **dash)

    def draw_break_even(self, panel: Any) -> None:
        """The break-even step, and the interval in which it lies."""
        found = break_even_step(self.step, self.along("stability"), self.along("stability_stderr"))
        if np.isfinite(found.step):
            panel.axvline(found.step, color=self._colour, linewidth=0.7, linestyle="--")
            text = f"{found.step:.3g}" if found.step < 1000 else f"{found.step:.0f}"
            panel.annotate(
                f" {text}",
                (found.step, 0.97),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=6,
                color=self._colour,
            )
        if np.isfinite(found.step) and np.isfinite(found.low) and np.isfinite(found.high):
            panel.axvspan(found.low, found.high, color=self._colour, alpha=0.15, linewidth=0)


def _finish_stability(result: Result, panel: Any) -> None:
    known = result["stability"].astype(float)
    known = known[np.isfinite(known)]
    if not known.size:
        panel.text(0.5, 0.5, "not known: see the notes", transform=panel.transAxes, ha="center", color=GREY)
        return
    panel.axhline(1, color=GREY, linewidth=0.6)
    if known.max() > 20 * known.min() > 0:
        panel.set_yscale("log")
    else:
        panel.set_ylim(0, 1.15 * max(1.0, float(known.max())))
