"""Draws `rsa`: layers against layers as all similarities, layers and units against predictors, RDMs."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._rsa_panels import (
    MOST_RUNS,
    Rows,
    chosen_predictors,
    draw_rdms,
    draw_units,
    layers_of,
    runs_of,
    say_left_out,
    values_of,
)
from dynprobe.analyzers._similarity_figure import STYLES as PAIR_STYLES
from dynprobe.analyzers._similarity_figure import similarity_figure
from dynprobe.analyzers._similarity_names import label_axis, short, tell_apart
from dynprobe.analyzers._steps import space_steps, step_axis
from dynprobe.analyzers.core.result import Result

STYLES = ("auto", "steps", "depth", "units", "rdms")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
MOST_PREDICTORS = 6
CEILING = "#BBBBBB"
LINE = 0.15
"""Inches of a line in the legend."""


def draw_rsa(result: Result, figure: Any, style: str = "") -> None:
    """Draws what was measured: pairs of networks, or networks against predictors.

    Args:
        result: From `rsa`.
        figure: An empty matplotlib figure.
        style: With predictors auto (default), steps (similarity over training, a panel for each predictor),
            depth (over layers), units (a heat map), rdms. Of pairs those of all similarities, and rdms.

    Raises:
        OptionError: If the style is not known, or shows what was not measured.
    """
    style = style or "auto"
    known = STYLES if result.grain == "checkpoint" else (*PAIR_STYLES, "rdms")
    if style not in known:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(known)}.")
    if style == "rdms":
        if not {"rdm", "rdm_a"} & set(result.arrays):
            raise OptionError("the report holds no RDMs.", "Measure with --save-rdms.")
        draw_rdms(result, figure)
    elif result.grain != "checkpoint":
        similarity_figure("similarity", "RDM similarity")(result, figure, style)
    elif style == "units" or (style == "auto" and "unit_similarity" in result):
        if "unit_similarity" not in result:
            raise OptionError("no single units were measured.", "Measure with --units.")
        draw_units(result, figure)
    else:
        runs = runs_of(result)
        long = any(len(rows) > 1 for _name, rows in runs)
        draw = _draw_steps if style == "steps" or (style == "auto" and long) else _draw_depth
        shown, count = runs[:MOST_RUNS], len(result["predictor"])
        predictors = chosen_predictors(result, MOST_PREDICTORS)
        draw(result, figure, shown, predictors)
        say_left_out(figure, predictors=(len(predictors), count), runs=(len(shown), len(runs)))


def _draw_steps(result: Result, figure: Any, runs: list[tuple[str, Rows]], predictors: Rows) -> None:
    """A row of panels for each run, a panel for each predictor, a curve for each layer."""
    from matplotlib import colormaps

    layers, names = [_names(result, name) for name in ("layer", "predictor")]
    columns = min(len(predictors), 3)
    rows_each = -(-len(predictors) // columns)
    height = max(0.35 + 1.75 * rows_each * len(runs), LINE * len(layers))
    figure.set_size_inches(6.75 if columns > 1 else 3.6, height)
    grid = figure.add_gridspec(rows_each * len(runs), columns)
    colours = [colormaps["viridis"](x) for x in np.linspace(0.05, 0.9, len(layers))]
    panels: list[Any] = []
    for r, (run, rows) in enumerate(runs):
        place, what = step_axis(result, rows)
        for i, p in enumerate(predictors):
            at = grid[r * rows_each + i // columns, i % columns]
            panel = figure.add_subplot(at, sharey=panels[0] if panels else None)
            panels.append(panel)
            _ceiling(panel, result, rows[-1], p)
            for layer in layers_of(result, rows[-1]):
                values = values_of(result, "similarity", rows)[:, layer, p]
                error = values_of(result, "similarity_stderr", rows)[:, layer, p]
                colour, name = colours[layer], layers[layer]
                panel.plot(place[rows], values, color=colour, label=name, marker="o", markersize=2)
                panel.fill_between(
                    place[rows], values - error, values + error, color=colour, alpha=0.2, linewidth=0
                )
            _floor(panel, result, rows, p)
            space_steps(panel, place[rows])
            panel.set_title(names[p] if len(runs) == 1 else f"{short(run)}: {names[p]}")
            panel.set_ylabel("RDM similarity ± s.e." if i % columns == 0 else "")
            panel.tick_params(labelleft=i % columns == 0)
            panel.set_xlabel(what)
            panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, panels)


def _draw_depth(result: Result, figure: Any, runs: list[tuple[str, Rows]], predictors: Rows) -> None:
    """A panel for each run's last checkpoint: a curve over the layers for each predictor."""
    layers, names = [_names(result, name) for name in ("layer", "predictor")]
    figure.set_size_inches(3.6 if len(runs) == 1 else 6.75, 2.7 if len(runs) < 3 else 5.0)
    columns = min(len(runs), 2)
    grid = figure.add_gridspec(-(-len(runs) // columns), columns)
    panels: list[Any] = []
    for r, (run, rows) in enumerate(runs):
        at = grid[r // columns, r % columns]
        panel = figure.add_subplot(at, sharey=panels[0] if panels else None)
        panels.append(panel)
        own = layers_of(result, rows[-1])
        values, error = (values_of(result, n, rows)[-1] for n in ("similarity", "similarity_stderr"))
        for i, p in enumerate(predictors):
            panel.errorbar(
                *(np.arange(len(own)) + 0.06 * (i - (len(predictors) - 1) / 2), values[own, p]),
                yerr=np.nan_to_num(error[own, p]),
                color=COLOURS[i],
                label=names[p],
                marker="o",
                markersize=2.5,
                elinewidth=0.7,
            )
            _ceiling(panel, result, rows[-1], p, COLOURS[i] if len(predictors) > 1 else CEILING)
        _floor(panel, result, rows, None)
        label_axis(panel.xaxis, [layers[i] for i in own])
        panel.tick_params(axis="x", rotation=90)
        panel.set_xlabel("layer, in the order of depth")
        panel.set_ylabel("RDM similarity ± s.e.")
        panel.set_title(short(run) if len(runs) > 1 else "")
        panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, panels)


def _names(result: Result, name: str) -> list[str]:
    return tell_apart([str(text) for text in result[name]], 22)


def _ceiling(panel: Any, result: Result, row: np.intp, predictor: np.intp, colour: str = CEILING) -> None:
    """The band that a perfect model would reach, where the predictor is a stack of subjects."""
    rows = np.array([row])
    low, high = (values_of(result, f"ceiling_{side}", rows)[0, predictor] for side in ("lower", "upper"))
    if np.isfinite(low) and np.isfinite(high):
        panel.axhspan(low, high, color=colour, alpha=0.35, linewidth=0, label="noise ceiling")


def _floor(panel: Any, result: Result, rows: Rows, predictor: np.intp | None) -> None:
    """Similarity of permuted stimuli: of a layer's own where it depends on the RDMs."""
    level = values_of(result, "similarity_chance", rows)
    level = level if predictor is None else level[..., predictor]
    if np.isfinite(level).any():
        panel.axhline(float(np.nanmean(level)), color=GREY, linewidth=0.6, linestyle="--", label="chance")


def _legend(figure: Any, panels: list[Any]) -> None:
    each: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            each.setdefault(label, handle)
    figure.legend(each.values(), each.keys(), loc="outside right upper")
