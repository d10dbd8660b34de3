"""Draws condensation: neurons before and after, directions over steps, distances over widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._condensation import counted_neurons, nearest
from dynprobe.analyzers._condensation_summary import TOGETHER
from dynprobe.analyzers._steps import space_steps
from dynprobe.analyzers.core.result import FAILED, Result, unstack

STYLES = ("auto", "neurons", "curves", "width")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BEFORE, AFTER = "#999999", "#0072B2"
MOST_ROWS = 3
"""Layers that are drawn neuron by neuron, and runs that get curves."""
DECADE = 10.0

Floats = NDArray[np.float64]


def draw_condensation(result: Result, figure: Any, style: str = "") -> None:
    """Neurons at the first and last checkpoint, curves over steps, or distances over widths.

    Args:
        result: From `condensation`.
        figure: An empty matplotlib figure.
        style: auto (default) draws distances over widths where there is a slope, else neurons; neurons
            (orientation and amplitude, similarity matrices), curves, or width.

    Raises:
        OptionError: If the style is not known, or the result does not hold what it shows.
    """
    style = style or "auto"
    if style not in STYLES:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
    runs = [_Run(piece.arrays, piece.index) for piece in unstack(result) if piece.status != FAILED]
    sloped = "width_slope" in result
    if style == "width" and not sloped:
        raise OptionError("there are not three runs of different width.", "Give more runs, or another style.")
    single = "similarity" in runs[0]
    if style == "neurons" and not single:
        raise OptionError("the report holds no single neurons.", "Measure with --neurons 64.")
    if style == "auto":
        style = "width" if sloped else "neurons" if single else "curves"
    if style == "width":
        _draw_widths(result, figure)
    elif style == "neurons":
        _draw_neurons(runs[0], figure, named=len(runs) > 1)
        _say_which(figure, runs, 1)
    else:
        _draw_curves(runs[:MOST_ROWS], figure)
        _say_which(figure, runs, MOST_ROWS)


def _say_which(figure: Any, runs: list[_Run], drawn: int) -> None:
    """A title where not all runs are drawn: what stands below the figure names all of them."""
    if len(runs) > drawn:
        which = f"{runs[0].name}: 1" if drawn == 1 else f"the first {drawn}"
        figure.suptitle(f"{which} of {len(runs)} runs", fontsize="medium")


class _Run:
    """The arrays of one run, of its own layers."""

    def __init__(self, arrays: Mapping[str, Any], index: Mapping[str, Any]) -> None:
        self._arrays = arrays
        self.name = _plain(str(index.get("run", "")))
        thresholds = np.asarray(self["threshold"], dtype=float)
        self.chosen = nearest(thresholds)
        self.threshold = float(thresholds[self.chosen])
        self.rows = np.flatnonzero(np.isfinite(self["n_neurons"].astype(float)))
        names = ("n_neurons", "zero_neurons", "small_neurons")
        self.counted = counted_neurons({name: self[name] for name in names})
        self.layers = [_plain(str(name)) for name in self["layer"]]

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name].values

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def step(self) -> tuple[Floats, str]:
        """Where the checkpoints stand along the axis, and what that is."""
        steps = self["step"] if "step" in self else np.arange(len(self["relative_distance"]))
        if steps.dtype.kind in "if" and np.isfinite(steps.astype(float)).all():
            return steps.astype(float), "step"
        return np.arange(len(steps), dtype=float), "checkpoint"

    def share(self, end: str = "") -> Floats:
        """Effective directions over the neurons that were counted, shape (checkpoint, layer)."""
        counts = self[f"effective_directions{end}"][..., self.chosen]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.asarray(counts / self.counted, dtype=float)
        return np.where(np.isfinite(share), share, np.nan)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _draw_neurons(run: _Run, figure: Any, *, named: bool) -> None:
    last = np.nan_to_num(run.share()[-1], nan=np.inf)
    rows = sorted(sorted(run.rows.tolist(), key=lambda j: float(last[j]))[:MOST_ROWS])
    figure.set_size_inches(6.75, 1.9 * len(rows) + 0.2)
    places = figure.add_gridspec(len(rows), 3, width_ratios=(1.35, 1, 1))
    image = None
    for i, j in enumerate(rows):
        panel = figure.add_subplot(places[i, 0])
        _draw_orientation(panel, run, j, labelled=i == len(rows) - 1, legend=i == 0)
        panel.set_title(f"{run.name} {run.layers[j]}" if named else run.layers[j], loc="left")
        matrices = [figure.add_subplot(places[i, column]) for column in (1, 2)]
        for moment, square in enumerate(matrices):
            image = _draw_similarity(square, run, j, moment)
            count, counted = run["effective_directions"][-moment, j, run.chosen], run.counted[-moment, j]
            some = " counted" if counted < run["n_neurons"][j] else ""
            square.set_title(f"{('first', 'last')[moment]}: {count:g} of {counted:g}{some}", loc="left")
        figure.colorbar(image, ax=matrices, shrink=0.8, label="cosine similarity" if i == 0 else None)


def _draw_orientation(panel: Any, run: _Run, j: int, *, labelled: bool, legend: bool) -> None:
    angle, amplitude = run["orientation"][:, j], run["amplitude"][:, j]
    for moment, colour, text in ((0, BEFORE, "first"), (1, AFTER, "last")):
        panel.scatter(
            angle[moment], amplitude[moment], s=9, facecolors="none" if moment == 0 else colour,
            edgecolors=colour, linewidths=0.6, label=text, alpha=0.9,
        )  # fmt: skip
    positive = amplitude[np.isfinite(amplitude) & (amplitude > 0)]
    if positive.size and positive.max() > DECADE * positive.min():
        panel.set_yscale("log")
    panel.set_xlim(-np.pi * 1.05, np.pi * 1.05)
    panel.set_xticks([-np.pi, 0, np.pi], ["−π", "0", "π"])
    panel.set_ylabel(f"amplitude {run['amplitude_kind'][j]}")
    if labelled:
        panel.set_xlabel("orientation in the principal plane")
    if legend:
        panel.legend(loc="best")
    panel.spines[["top", "right"]].set_visible(False)


def _draw_similarity(panel: Any, run: _Run, j: int, moment: int) -> Any:
    cosine = run["similarity"][moment, j]
    there = np.isfinite(np.diag(cosine))
    cosine = cosine[np.ix_(there, there)]
    order = _ordered(cosine)
    panel.set_xticks([])
    panel.set_yticks([])
    return panel.imshow(cosine[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")


def _ordered(cosine: Floats) -> NDArray[np.intp]:
    """Neurons by their angle in the plane of the two leading eigenvectors: like ones side by side."""
    if len(cosine) < 2:
        return np.arange(len(cosine))
    _, vectors = np.linalg.eigh(cosine)
    one = vectors[:, -1] * np.sign(vectors[np.argmax(np.abs(vectors[:, -1])), -1])
    return np.argsort(np.arctan2(vectors[:, -2], one), kind="stable")


def _draw_curves(runs: list[_Run], figure: Any) -> None:
    figure.set_size_inches(6.75, 2.0 * len(runs) + 0.2)
    places = figure.add_gridspec(len(runs), 2)
    for i, run in enumerate(runs):
        left, right = (figure.add_subplot(places[i, column]) for column in (0, 1))
        step, name = run.step
        low, high = run.share("_low"), run.share("_high")
        for k, j in enumerate(run.rows):
            colour = COLOURS[k % len(COLOURS)]
            left.plot(step, run.share()[:, j], color=colour, label=run.layers[j], marker="o", markersize=2)
            left.fill_between(step, low[:, j], high[:, j], color=colour, alpha=0.2, linewidth=0)
            distance = run["relative_distance"][:, j]
            seen = distance > 0
            right.plot(step[seen], distance[seen], color=colour, marker="o", markersize=2)
        left.set_ylim(0, 1.05)
        left.set_ylabel(f"directions per counted\nneuron (cosine {run.threshold:g})")
        right.set_yscale("log")
        right.set_ylabel("relative distance")
        left.set_title(run.name if len(runs) > 1 else "", loc="left")
        for panel in (left, right):
            space_steps(panel, step)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlabel(name if i == len(runs) - 1 else "")
        left.legend(loc="best", ncols=2 if len(run.rows) > 4 else 1)


def _draw_widths(result: Result, figure: Any) -> None:
    figure.set_size_inches(3.25, 2.7)
    panel = figure.add_subplot()
    width, distance = result["run_width"].astype(float), result["run_distance"].astype(float)
    for k, layer in enumerate(str(name) for name in result["slope_layer"]):
        y = distance[:, k]
        known = np.isfinite(y) & (y > 0)
        if not known.any():
            continue
        all_of_them = layer == TOGETHER
        colour = "#000000" if all_of_them else COLOURS[(k - 1) % (len(COLOURS) - 1)]
        slope, error = result["width_slope"][k], result["width_slope_stderr"][k]
        text = f"{_plain(layer)}: {slope:.2f} ± {error:.2f}, {result['regime'][k]}"
        panel.plot(
            width[known], y[known], "o", color=colour, markersize=4 if all_of_them else 2, label=text
        )  # fmt: skip
        if np.isfinite(slope):
            middle = np.exp(np.log(y[known]).mean() + slope * (np.log(width) - np.log(width[known]).mean()))
            order = np.argsort(width)
            panel.plot(width[order], middle[order], color=colour, linewidth=1.2 if all_of_them else 0.6)
    panel.set_xscale("log")
    panel.set_yscale("log")
    widths = np.unique(width)
    panel.set_xticks(widths, [f"{x:.4g}" for x in widths])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("width of the widened layers")
    panel.set_ylabel("relative distance")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), title="slope S_w")
    panel.spines[["top", "right"]].set_visible(False)
