"""Draws what a run learns first: errors of the smooth and rough part over the steps, and by frequency."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._steps import space_steps
from dynprobe.analyzers.core.result import FAILED, Result

STYLES = ("auto", "errors", "frequencies", "layers")
LOW, HIGH, GREY = "#0072B2", "#D55E00", "#777777"
MOST_RUNS = 4
FLOOR = 0.01
"""Errors below this are drawn as this in the heat map."""

Floats = NDArray[np.float64]


def draw_fourier(result: Result, figure: Any, style: str = "") -> None:
    """One row per run: errors of the smooth and rough part at each width, and the error by frequency.

    Args:
        result: From `fourier`.
        figure: An empty matplotlib figure.
        style: auto (default) draws both; errors, frequencies, or layers (LFR of the target over each layer).

    Raises:
        OptionError: If the style is not known or the result does not hold what it draws.
    """
    style = style or STYLES[0]
    if style not in STYLES:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
    if style == "layers" and "layer_lfr" not in result:
        raise OptionError("there are no layers in this result.", "Measure with --layers auto.")
    good = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)
    runs = [_Run(result, int(i)) for i in good[:MOST_RUNS]]
    if style == "layers":
        figure.set_size_inches(3.6, 2.4 * len(runs))
        for row, run in enumerate(runs):
            _draw_layers(figure.add_subplot(len(runs), 1, row + 1), run)
        return
    map_ = style != "errors" and (style == "frequencies" or any(_frequencies(run) for run in runs))
    _draw_runs(figure, runs, curves=style != "frequencies", map_=map_)
    if len(good) > MOST_RUNS:
        figure.suptitle(
            f"first {MOST_RUNS} of {len(good)} runs", color=GREY, fontsize="medium", x=0.01, ha="left"
        )


def _draw_runs(figure: Any, runs: list[_Run], *, curves: bool, map_: bool) -> None:
    most = max((len(run.own) for run in runs), default=1) if curves else 0
    figure.set_size_inches(6.75 if curves else 3.6, 2.1 * len(runs))
    widths = [1.0] * most + ([1.7] if map_ else [])
    places = figure.add_gridspec(len(runs), max(len(widths), 1), width_ratios=widths or None)
    for row, run in enumerate(runs):
        first, limits = None, _limits(run)
        for column, d in enumerate(run.own if curves else ()):
            panel = figure.add_subplot(places[row, column], sharey=first)
            _draw_errors(panel, run, int(d), first=first is None, limits=limits)
            first = first or panel
        if first is not None and run.title:
            first.annotate(run.title, (0, 1.17), xycoords="axes fraction", color=GREY, annotation_clip=False)
        if map_:
            _draw_map(figure, figure.add_subplot(places[row, -1]), run)


class _Run:
    """One run's part of a result."""

    def __init__(self, result: Result, run: int) -> None:
        several = bool(result.lead)
        name = str(np.atleast_1d(result["run"])[run]) if "run" in result else ""
        mine: Any = slice(None)
        if several and "checkpoint_run" in result:
            mine = np.flatnonzero(result["checkpoint_run"].astype(str) == name)
        self._result, self._run, self._mine, self._several = result, run, mine, several
        self.title = name.replace("$", r"\$") if several else ""
        raw = self.along("step") if "step" in result else np.arange(len(self.along("e_low")))
        numeric = raw.dtype.kind in "if" and bool(np.isfinite(raw.astype(float)).all())
        self.step: Floats = raw.astype(float) if numeric else np.arange(len(raw), dtype=float)
        self.step_name = "step" if numeric else "checkpoint"
        self.lfr = np.asarray(self.whole("lfr_target"), dtype=float)
        self.own = np.flatnonzero(np.isfinite(self.lfr))
        self.own = self.own[np.argsort(self.lfr[self.own])]

    def __contains__(self, name: str) -> bool:
        return name in self._result

    def along(self, name: str) -> NDArray[Any]:
        """A variable of the checkpoints."""
        values: NDArray[Any] = self._result[name][self._mine]
        return values

    def whole(self, name: str) -> NDArray[Any]:
        """A variable of the run."""
        values: NDArray[Any] = self._result[name]
        return values[self._run] if self._several else values

    def labels(self, name: str) -> NDArray[Any]:
        """A coordinate."""
        return np.asarray(self._result[name])


def _limits(run: _Run) -> tuple[float, float]:
    """From half of the smallest error to twice the largest or 1: bands reach further down, even below 0."""
    values = np.concatenate([run.along(name)[:, run.own].ravel() for name in ("e_low", "e_high")])
    values = values[np.isfinite(values) & (values > 0)]
    levels = run.labels("level").astype(float)
    least = min([*values, *levels])
    return float(least / 2), float(max([*values, 1.0]) * 1.5)


def _draw_errors(panel: Any, run: _Run, d: int, *, first: bool, limits: tuple[float, float]) -> None:
    for name, colour, text in (("e_low", LOW, "smooth part"), ("e_high", HIGH, "rough part")):
        value, error = run.along(name)[:, d], np.nan_to_num(run.along(f"{name}_stderr")[:, d])
        panel.plot(run.step, value, color=colour, label=text, marker="o", markersize=1.8, linewidth=1.0)
        low = np.where(np.isnan(value), np.nan, np.maximum(value - error, limits[0] / 10))
        panel.fill_between(run.step, low, value + error, color=colour, alpha=0.25, linewidth=0)
    for level in run.labels("level"):
        panel.axhline(level, color=GREY, linewidth=0.4, linestyle=":", zorder=0)
    panel.set_yscale("log")
    panel.set_ylim(limits)
    space_steps(panel, run.step)
    panel.set_xlabel(run.step_name)
    panel.spines[["top", "right"]].set_visible(False)
    verdict = str(run.whole("verdict")[d])
    panel.set_title(f"LFR {run.lfr[d]:.2g}\n{verdict}")
    if first:
        panel.set_ylabel("relative error ± s.e.")
        panel.legend(loc="lower left", handlelength=1.2)
    else:
        panel.tick_params(labelleft=False)


def _draw_map(figure: Any, panel: Any, run: _Run) -> None:
    """Step × frequency, coloured by the relative error: on a grid, along a direction, or by kernel band."""
    from matplotlib.colors import LogNorm

    shown = _frequencies(run)
    if shown is None:
        panel.set_axis_off()
        return
    error, labels, name = shown
    image = panel.pcolormesh(
        np.arange(len(run.step) + 1) - 0.5,
        np.arange(len(labels) + 1) - 0.5,
        np.clip(np.ma.masked_invalid(error.T), FLOOR, 1.0),
        norm=LogNorm(FLOOR, 1.0),
        cmap="viridis",
        rasterized=True,
    )
    panel.set_facecolor("#DDDDDD")
    ticks = np.unique(np.linspace(0, len(run.step) - 1, min(5, len(run.step))).round().astype(int))
    panel.set_xticks(ticks, [f"{run.step[i]:g}" for i in ticks])
    chosen = np.unique(np.linspace(0, len(labels) - 1, min(8, len(labels))).round().astype(int))
    panel.set_yticks(chosen, [labels[i] for i in chosen])
    panel.set_xlabel(f"{run.step_name} (one column each)")
    panel.set_ylabel(name)
    bar = figure.colorbar(image, ax=panel, pad=0.02)
    bar.set_label("relative error")
    bar.ax.set_yticks([0.01, 0.1, 1.0], ["≤0.01", "0.1", "≥1"])


def _frequencies(run: _Run) -> tuple[Floats, list[str], str] | None:
    """Errors (n_checkpoints, n_frequencies) at the frequencies the target has, their labels, and the axis."""
    if "grid_error" in run:
        return _grid_frequencies(run)
    if "projection_error" in run:
        error = run.along("projection_error")[:, 0]
        known = np.isfinite(error).any(0)
        if known.sum() > 1:
            frequency = run.labels("frequency")
            top = int(np.flatnonzero(known)[-1]) + 1
            return (
                error[:, :top],
                [f"{k:g}" for k in frequency[:top]],
                "frequency along first PC",
            )
    if "band_error" in run:
        return run.along("band_error"), [str(b) for b in run.labels("band")], "eigenvectors of the kernel"
    return None


def _grid_frequencies(run: _Run) -> tuple[Floats, list[str], str]:
    """In one dimension every frequency up to the last that the target has, so that the axis has a scale."""
    error, frequency = run.along("grid_error"), np.asarray(run.whole("grid_frequency"), dtype=float)
    known = np.isfinite(error).any(0)
    if run.whole("grid_wavenumber").shape[-1] == 1 and known.any():
        top = int(np.flatnonzero(known)[-1]) + 1
        return error[:, :top], [f"{k:g}" for k in np.round(frequency[:top], 2)], "periods on the grid"
    labels = [f"{k:g}" for k in np.round(frequency[known], 2)]
    return error[:, known], labels, "periods on the grid's longest side\n(one row each, not to scale)"


def _draw_layers(panel: Any, run: _Run) -> None:
    from matplotlib import colormaps

    names = [str(name) for name in run.labels("layer")]
    value, error = run.along("layer_lfr"), run.along("layer_lfr_stderr")
    for i, name in enumerate(names):
        colour = colormaps["viridis"](0.92 * i / max(len(names) - 1, 1))
        panel.plot(
            run.step, value[:, i], color=colour, label=name.replace("$", r"\$"), marker="o", markersize=2
        )
        panel.fill_between(
            run.step,
            value[:, i] - error[:, i],
            value[:, i] + error[:, i],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    panel.set_xlabel(run.step_name)
    panel.set_ylabel("LFR of the target over the layer")
    space_steps(panel, run.step)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(run.title, loc="left")
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), borderaxespad=0)
