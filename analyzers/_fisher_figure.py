"""Draws a Fisher measurement: the trace over the steps, and which layers it is in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._steps import space_steps, step_axis
from dynprobe.analyzers.core.result import FAILED, Result

STYLES = ("auto", "traces", "layers", "gradients")
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
MOST_STACKS = 4
"""Runs whose layer shares are drawn."""
MOST_LAYERS = 7
"""Layers that have a colour of their own; the smaller ones are drawn as one."""
DECADE = 10.0
"""A trace that varies by more than this is drawn on a logarithmic axis."""

Floats = NDArray[np.float64]


def draw_fisher(result: Result, figure: Any, style: str = "") -> None:
    """Trace over the steps on the left, shares of the layers on the right.

    Args:
        result: From `fisher`.
        figure: An empty matplotlib figure.
        style: auto (default) draws both; traces, layers, or gradients (mean and spread of the gradients with
            the data's labels, by layer).

    Raises:
        OptionError: If the style is not known.
    """
    style = style or STYLES[0]
    if style not in STYLES:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
    runs = _runs(result)
    if style == "traces":
        figure.set_size_inches(3.25, 2.5)
        _draw_trace(figure.add_subplot(), runs)
        return
    stacked = runs[:MOST_STACKS]
    paint = _draw_gradients if style == "gradients" else _draw_shares
    if style == "auto":
        figure.set_size_inches(6.75, max(2.6, 1.5 * len(stacked)))
        places = figure.add_gridspec(len(stacked), 2, width_ratios=(1, 1.15))
        _draw_trace(figure.add_subplot(places[:, 0]), runs)
        panels = [figure.add_subplot(places[i, 1]) for i in range(len(stacked))]
    else:
        figure.set_size_inches(3.6, max(2.5, 1.6 * len(stacked)))
        panels = [figure.add_subplot(len(stacked), 1, i + 1) for i in range(len(stacked))]
    layers = _leading_layers(stacked, "gradient_std" if style == "gradients" else "layer_share")
    alike = all(np.array_equal(run.step, stacked[0].step) for run in stacked)
    for i, (panel, run) in enumerate(zip(panels, stacked, strict=True)):
        paint(panel, run, layers, labelled=not alike or i == len(panels) - 1)
        if len(runs) > 1:
            panel.set_title(run.name, loc="left", color=run.colour)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[len(panels) // 2 if len(panels) > 2 else 0].legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1.03), borderaxespad=0
    )


class _Run:
    """The good checkpoints of one run, in order."""

    def __init__(self, result: Result, name: str, rows: NDArray[np.intp], colour: str) -> None:
        self._result = result
        self.name, self.colour = name.replace("$", r"\$"), colour
        place, self.step_name = step_axis(result, rows)
        self._rows = rows[np.argsort(place[rows], kind="stable")]
        self.step: Floats = place[self._rows]
        self.layers = [str(layer) for layer in result["layer"]]

    def __getitem__(self, name: str) -> Floats:
        values = np.asarray(self._result[name], dtype=float)
        return values[self._rows] if self._result.lead else values[None]


def _runs(result: Result) -> list[_Run]:
    good = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)
    names = np.atleast_1d(result["run"]).astype(str) if "run" in result else np.full(result.n_pieces, "")
    return [
        _Run(result, name, good[names[good] == name], RUN_COLOURS[i % len(RUN_COLOURS)])
        for i, name in enumerate(dict.fromkeys(names[good]))
    ]


def _draw_trace(panel: Any, runs: list[_Run]) -> None:
    several = len(runs) > 1
    for run in runs:
        for name, line, text in (
            ("trace", "-", "model's labels"),
            ("empirical_trace", "--", "data's labels"),
        ):
            mean, error = run[name], run[f"{name}_stderr"]
            label = run.name if several and name == "trace" else None if several else text
            true = name == "trace"
            panel.plot(
                run.step, mean, color=run.colour, linestyle=line, label=label, linewidth=1.1 if true else 0.7,
                marker="o" if true else "", markersize=2, alpha=1.0 if true else 0.8,
            )  # fmt: skip
            if true:
                low, high = np.maximum(mean - error, 0), mean + error
                panel.fill_between(run.step, low, high, color=run.colour, alpha=0.22, linewidth=0)
    if several:
        panel.plot([], [], color=GREY, label="Fisher information")
        panel.plot([], [], color=GREY, linestyle="--", linewidth=0.7, label="empirical (data's labels)")
    values = np.concatenate([run[name] for run in runs for name in ("trace", "empirical_trace")])
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > DECADE * positive.min():
        panel.set_yscale("log")
        panel.set_ylim(positive.min() / 1.8, positive.max() * 2.5)
    else:
        panel.set_ylim(bottom=0)
    panel.set_ylabel("trace of the Fisher information ± s.e.")
    panel.set_xlabel(runs[0].step_name)
    panel.legend(loc="best")
    space_steps(panel, np.concatenate([run.step for run in runs]))
    _open(panel)


def _leading_layers(runs: list[_Run], by: str) -> list[str]:
    """The layers that are drawn on their own, in the order of the network."""
    layers = runs[0].layers
    with np.errstate(invalid="ignore"):
        largest = np.nan_to_num(np.max([np.nan_to_num(run[by]).max(0) for run in runs], axis=0))
    chosen = set(np.argsort(-largest, kind="stable")[:MOST_LAYERS].tolist())
    return [layer for i, layer in enumerate(layers) if i in chosen]


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0.05, 0.95, count)]


def _draw_shares(panel: Any, run: _Run, layers: list[str], *, labelled: bool) -> None:
    share = np.nan_to_num(run["layer_share"])
    known = np.isfinite(run["layer_share"]).any(1)
    rows = [share[:, run.layers.index(layer)] for layer in layers]
    colours = _colours(len(layers))
    labels = [_short(layer) for layer in layers]
    if len(layers) < len(run.layers):
        rows.append(share.sum(1) - sum(rows))
        colours.append("#CCCCCC")
        labels.append(f"{len(run.layers) - len(layers)} others")
    if len(run.step) > 1:
        heights = [np.where(known, row, np.nan) for row in rows]
        panel.stackplot(run.step, *heights, colors=colours, labels=labels, linewidth=0.3, edgecolor="white")
        space_steps(panel, run.step)
        panel.set_xlim(run.step[0], run.step[-1])
    else:
        below = 0.0
        for row, colour, label in zip(rows, colours, labels, strict=True):
            panel.bar([0], row, bottom=below, color=colour, label=label, width=0.5)
            below += row[0]
        panel.set_xticks([0], [f"{run.step[0]:g}"])
        panel.set_xlim(-1, 1)
    panel.set_ylim(0, 1)
    panel.set_ylabel("share of the trace")
    _label_steps(panel, run, labelled=labelled)


def _draw_gradients(panel: Any, run: _Run, layers: list[str], *, labelled: bool) -> None:
    """The spread of the gradients (line) and the norm of their mean (dots)."""
    spread, mean = run["gradient_std"], run["gradient_mean_norm"]
    for layer, colour in zip(layers, _colours(len(layers)), strict=True):
        at = run.layers.index(layer)
        panel.plot(run.step, spread[:, at], color=colour, label=_short(layer), marker="o", markersize=2)
        panel.plot(run.step, mean[:, at], color=colour, linestyle=":")
    shown = np.concatenate([values[values > 0] for values in (spread, mean)])
    if shown.size:
        panel.set_yscale("log")
    panel.set_ylabel("gradient: std, mean (dotted)")
    space_steps(panel, run.step)
    _open(panel)
    _label_steps(panel, run, labelled=labelled)


def _short(layer: str) -> str:
    """The end of a long name, which tells layers apart."""
    text = layer if len(layer) <= 22 else f"…{layer[-21:]}"
    return text.replace("$", r"\$").lstrip("_") or layer


def _label_steps(panel: Any, run: _Run, *, labelled: bool) -> None:
    """Labels for the steps, unless a panel below has the same ones."""
    if labelled:
        panel.set_xlabel(run.step_name)
    else:
        panel.tick_params(labelbottom=False)


def _open(panel: Any) -> None:
    """Two axes instead of a box, around curves."""
    panel.spines[["top", "right"]].set_visible(False)
