"""Draws `rsa`: layers against layers as all similarities, layers and units against predictors, RDMs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._rsa_panels import draw_rdms, draw_units
from dynprobe.analyzers._similarity_figure import STYLES as PAIR_STYLES
from dynprobe.analyzers._similarity_figure import similarity_figure
from dynprobe.analyzers._steps import space_steps, step_axis
from dynprobe.analyzers.core.result import FAILED, Result

STYLES = ("auto", "steps", "depth", "units", "rdms")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
MOST_PREDICTORS = 6
MOST_RUNS = 4
CEILING = "#BBBBBB"

Floats = NDArray[np.float64]


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
        runs = _runs(result)
        long = any(len(rows) > 1 for _name, rows in runs)
        (_draw_steps if style == "steps" or (style == "auto" and long) else _draw_depth)(result, figure, runs)


def _runs(result: Result) -> list[tuple[str, NDArray[np.intp]]]:
    """Rows of the good checkpoints of each run, in the order of their steps."""
    good = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)
    names = np.atleast_1d(result["run"]).astype(str) if "run" in result else np.full(len(good), "")
    place = step_axis(result)[0]
    found = []
    for name in dict.fromkeys(names[good].tolist()):
        rows = good[names[good] == name]
        found.append((name, rows[np.argsort(place[rows], kind="stable")]))
    return found[:MOST_RUNS]


def _draw_steps(result: Result, figure: Any, runs: list[tuple[str, NDArray[np.intp]]]) -> None:
    """A row of panels for each run, a panel for each predictor, a curve for each layer."""
    from matplotlib import colormaps

    layers, predictors = [_texts(result, name) for name in ("layer", "predictor")]
    predictors = predictors[:MOST_PREDICTORS]
    columns = min(len(predictors), 3)
    rows_each = -(-len(predictors) // columns)
    figure.set_size_inches(6.75 if columns > 1 else 3.6, 0.35 + 1.75 * rows_each * len(runs))
    grid = figure.add_gridspec(rows_each * len(runs), columns)
    colours = [colormaps["viridis"](x) for x in np.linspace(0.05, 0.9, len(layers))]
    first = None
    for r, (run, rows) in enumerate(runs):
        place, what = step_axis(result, rows)
        for p, predictor in enumerate(predictors):
            panel = figure.add_subplot(grid[r * rows_each + p // columns, p % columns], sharey=first)
            first = first or panel
            _ceiling(panel, result, rows[-1], p)
            for layer, (name, colour) in enumerate(zip(layers, colours, strict=True)):
                values = _values(result, "similarity", rows)[:, layer, p]
                error = _values(result, "similarity_stderr", rows)[:, layer, p]
                panel.plot(place[rows], values, color=colour, label=_short(name), marker="o", markersize=2)
                panel.fill_between(
                    place[rows], values - error, values + error, color=colour, alpha=0.2, linewidth=0
                )
            _floor(panel, result, rows, p)
            space_steps(panel, place[rows])
            panel.set_title(_short(predictor) if len(runs) == 1 else f"{_short(run)}: {_short(predictor)}")
            panel.set_ylabel("RDM similarity ± s.e." if p % columns == 0 else "")
            panel.tick_params(labelleft=p % columns == 0)
            panel.set_xlabel(what)
            panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, first)


def _draw_depth(result: Result, figure: Any, runs: list[tuple[str, NDArray[np.intp]]]) -> None:
    """A panel for each run's last checkpoint: a curve over the layers for each predictor."""
    layers, predictors = [_texts(result, name) for name in ("layer", "predictor")]
    predictors = predictors[: len(COLOURS)]
    figure.set_size_inches(3.6 if len(runs) == 1 else 6.75, 2.7 if len(runs) < 3 else 5.0)
    columns = min(len(runs), 2)
    grid = figure.add_gridspec(-(-len(runs) // columns), columns)
    first = None
    place = np.arange(len(layers))
    for r, (run, rows) in enumerate(runs):
        panel = figure.add_subplot(grid[r // columns, r % columns], sharey=first)
        first = first or panel
        values, error = (_values(result, n, rows)[-1] for n in ("similarity", "similarity_stderr"))
        for p, predictor in enumerate(predictors):
            offset = place + 0.06 * (p - (len(predictors) - 1) / 2)
            panel.errorbar(
                *(offset, values[:, p]),
                yerr=np.nan_to_num(error[:, p]),
                color=COLOURS[p],
                label=_short(predictor),
                marker="o",
                markersize=2.5,
                elinewidth=0.7,
            )
            _ceiling(panel, result, rows[-1], p, COLOURS[p] if len(predictors) > 1 else CEILING)
        _floor(panel, result, rows, None)
        panel.set_xticks(place, [_short(name) for name in layers], rotation=45, ha="right")
        panel.set_xlabel("layer, in the order of depth")
        panel.set_ylabel("RDM similarity ± s.e.")
        panel.set_title(_short(run) if len(runs) > 1 else "")
        panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, first)


def _values(result: Result, name: str, rows: NDArray[np.intp]) -> Floats:
    values = np.asarray(result[name], dtype=float)
    return values[rows] if result.lead else values[None]


def _texts(result: Result, name: str) -> list[str]:
    return [str(text) for text in result[name]]


def _ceiling(panel: Any, result: Result, row: np.intp, predictor: int, colour: str = CEILING) -> None:
    """The band that a perfect model would reach, where the predictor is a stack of subjects."""
    rows = np.array([row])
    low, high = (_values(result, f"ceiling_{side}", rows)[0, predictor] for side in ("lower", "upper"))
    if np.isfinite(low) and np.isfinite(high):
        panel.axhspan(low, high, color=colour, alpha=0.35, linewidth=0, label="noise ceiling")


def _floor(panel: Any, result: Result, rows: NDArray[np.intp], predictor: int | None) -> None:
    """Similarity of permuted stimuli: of a layer's own where it depends on the RDMs."""
    level = _values(result, "similarity_chance", rows)
    level = level if predictor is None else level[..., predictor]
    if np.isfinite(level).any():
        panel.axhline(float(np.nanmean(level)), color=GREY, linewidth=0.6, linestyle="--", label="chance")


def _legend(figure: Any, panel: Any) -> None:
    if panel is None:
        return
    handles, labels = panel.get_legend_handles_labels()
    each = dict(zip(labels, handles, strict=True))
    figure.legend(each.values(), each.keys(), loc="outside right upper")


def _short(name: str) -> str:
    text = name if len(name) <= 22 else f"…{name[-21:]}"
    return text.replace("$", r"\$").lstrip("_") or name
