"""Draws a Hessian measurement: eigenvalues over steps, spectral density, loss along eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._steps import space_steps, step_axis
from dynprobe.analyzers.core.result import FAILED, Result

STYLES = ("auto", "eigenvalues", "density", "along", "layers")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
LEGEND: dict[str, Any] = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.85}
MOST_CURVES = 4
"""Checkpoints whose density or slice is drawn; the first and the last are among them."""

Floats = NDArray[np.float64]


def draw_hessian(result: Result, figure: Any, style: str = "") -> None:
    """One panel for each thing measured, up to three in a row.

    Args:
        result: From `hessian`.
        figure: An empty matplotlib figure.
        style: auto (default) draws everything there is; or eigenvalues, density, along, layers.

    Raises:
        OptionError: If the style is not known, or was not measured.
    """
    panels: dict[str, Callable[[Any, _Run], None]] = {"eigenvalues": _draw_eigenvalues}
    for name, needed, paint in (
        ("density", "density", _draw_density),
        ("along", "along_loss", _draw_along),
        ("layers", "layer_eigenvalue", _draw_layers),
        ("layers", "layer_trace", _draw_layers),
    ):
        if needed in result and name not in panels:
            panels[name] = paint
    chosen = list(panels) if style in ("", "auto") else [style]
    if missing := [name for name in chosen if name not in panels]:
        known = style in STYLES
        raise OptionError(
            f"{missing[0]!r} was not measured." if known else f"{style!r} is not a style of this figure.",
            f"This result can be drawn as {', '.join(panels)}.",
        )
    run = _Run(result)
    columns = {1: 1, 3: 3}.get(len(chosen), 2)
    lines = math.ceil(len(chosen) / columns)
    figure.set_size_inches(3.25 if columns == 1 else 6.75, 2.4 * lines)
    for i, name in enumerate(chosen):
        panel = figure.add_subplot(lines, columns, i + 1)
        panel.spines[["top", "right"]].set_visible(False)
        panels[name](panel, run)


class _Run:
    """A result's checkpoints in order, by run."""

    def __init__(self, result: Result) -> None:
        self.result = result
        chosen = (result.attributes.get("options") or {}).get("curvature", "hessian")
        self.matrix = {"ggn": "Gauss–Newton matrix", "fisher": "Fisher matrix"}.get(chosen, "Hessian")
        status = np.atleast_1d(result["status"])
        self.good = np.flatnonzero(status != FAILED)
        self.step, self.step_name = step_axis(result, self.good)
        names = np.atleast_1d(result["run"]).astype(str) if "run" in result else np.full(len(status), "")
        self.runs = {name: self.good[names[self.good] == name] for name in dict.fromkeys(names[self.good])}

    def __getitem__(self, name: str) -> Floats:
        return np.asarray(self.result[name], dtype=float)

    def shown(self) -> list[int]:
        """A few checkpoints, the first and the last among them, spread over the steps' logarithm."""
        chosen: list[int] = []
        for rows in self.runs.values():
            count = max(2, MOST_CURVES // len(self.runs))
            place = np.log1p(self.step[rows] - self.step[rows].min())
            at = [int(np.abs(place - x).argmin()) for x in np.linspace(place.min(), place.max(), count)]
            chosen += [int(rows[i]) for i in dict.fromkeys(at)]
        return chosen

    def label(self, piece: int) -> str:
        """What a curve of one checkpoint is called."""
        text = f"{self.step_name} {self.step[piece]:g}"
        if len(self.runs) > 1:
            name = next(name for name, rows in self.runs.items() if piece in rows)
            text = f"{name}, {text}"
        return text.replace("$", r"\$")


def _draw_eigenvalues(panel: Any, run: _Run) -> None:
    if all(len(rows) == 1 for rows in run.runs.values()):
        _draw_spectrum(panel, run)
        return
    eigenvalue, bound = run["eigenvalue"], run["error_bound"]
    for colour, (name, rows) in zip(_colours(len(run.runs)), run.runs.items(), strict=True):
        steps = run.step[rows]
        for rank in range(eigenvalue.shape[1])[::-1]:
            y, e = eigenvalue[rows, rank], bound[rows, rank]
            first = rank == 0
            label = name.replace("$", r"\$") if first and len(run.runs) > 1 else None
            panel.plot(
                steps, y, color=colour, linewidth=1.2 if first else 0.5, alpha=1.0 if first else 0.45,
                marker="o" if first else "", markersize=2, label=label,
            )  # fmt: skip
            panel.fill_between(steps, y - e, y + e, color=colour, alpha=0.2, linewidth=0)
        negative = -np.minimum(run["smallest"][rows], 0.0)
        panel.plot(
            steps, np.where(negative > 0, negative, np.nan), color=colour, linewidth=0.7, linestyle=":"
        )
        limit = run["stability_threshold"][rows]
        if np.isfinite(limit).any():
            panel.plot(steps, limit, color=colour, linewidth=0.7, linestyle="--")
    _explain_lines(panel, run)
    _scale(panel, eigenvalue[run.good].ravel())
    panel.set_ylabel(f"eigenvalue of the {run.matrix}")
    panel.set_xlabel(run.step_name)
    space_steps(panel, run.step[run.good])
    panel.legend(fontsize=5, **LEGEND)


def _explain_lines(panel: Any, run: _Run) -> None:
    if run["eigenvalue"].shape[1] > 1:
        panel.plot([], [], color=GREY, linewidth=1.2, label="first")
        panel.plot([], [], color=GREY, linewidth=0.5, alpha=0.6, label="further ranks")
    panel.plot([], [], color=GREY, linewidth=0.7, linestyle=":", label="smallest, negated")
    if np.isfinite(run["stability_threshold"][run.good]).any():
        panel.plot([], [], color=GREY, linewidth=0.7, linestyle="--", label="stability threshold 2/η")


def _draw_spectrum(panel: Any, run: _Run) -> None:
    """One checkpoint per run: eigenvalues over their rank."""
    ranks = np.asarray(run.result["rank"], dtype=float)
    for colour, (name, rows) in zip(_colours(len(run.runs)), run.runs.items(), strict=True):
        y, e = run["eigenvalue"][rows[0]], run["error_bound"][rows[0]]
        label = name.replace("$", r"\$") if len(run.runs) > 1 else None
        panel.errorbar(ranks, y, e, color=colour, fmt="o-", markersize=2.5, linewidth=0.6, label=label)
        limit = float(run["stability_threshold"][rows[0]])
        if math.isfinite(limit):
            panel.axhline(limit, color=colour, linewidth=0.7, linestyle="--")
    _scale(panel, run["eigenvalue"][run.good].ravel())
    if np.isfinite(run["stability_threshold"][run.good]).any():
        panel.plot([], [], color=GREY, linewidth=0.7, linestyle="--", label="stability threshold 2/η")
    panel.set_xlabel("rank")
    panel.set_ylabel(f"eigenvalue of the {run.matrix}")
    panel.xaxis.get_major_locator().set_params(integer=True)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=5, **LEGEND)


def _draw_density(panel: Any, run: _Run) -> None:
    count, highest = run["n_parameters"], 1.0
    shown = [piece for piece in run.shown() if np.isfinite(run["density"][piece]).any()]
    for colour, piece in zip(_colours(len(shown)), shown, strict=True):
        width = run["density_width"][piece]
        # in eigenvalues per width of the smoothing: 1 is a single eigenvalue's height, times √(2π)
        scale = count[piece] * width * math.sqrt(2 * math.pi)
        x, y, e = (run[n][piece] for n in ("density_at", "density", "density_stderr"))
        panel.plot(x, y * scale, color=colour, linewidth=0.8, label=run.label(piece))
        panel.fill_between(x, (y - e) * scale, (y + e) * scale, color=colour, alpha=0.2, linewidth=0)
        highest = max(highest, float(np.nanmax(y)) * scale)
    panel.set_yscale("log")
    panel.set_ylim(0.3, 3 * highest)
    panel.set_xlabel("eigenvalue")
    panel.set_ylabel("eigenvalues (smoothed count)")
    panel.legend(fontsize=5, **LEGEND)


def _draw_along(panel: Any, run: _Run) -> None:
    epsilon = np.asarray(run.result["epsilon"], dtype=float)
    shown = run.shown()
    for colour, piece in zip(_colours(len(shown)), shown, strict=True):
        for name, line in (("along_loss", "-"), ("along_test_loss", "--")):
            if name not in run.result:
                continue
            y, e = run[name][piece, 0], run[f"{name}_stderr"][piece, 0]
            label = run.label(piece) if line == "-" else None
            panel.plot(epsilon, y, color=colour, linestyle=line, linewidth=0.9, label=label)
            panel.fill_between(epsilon, y - e, y + e, color=colour, alpha=0.2, linewidth=0)
    if "along_test_loss" in run.result:
        panel.plot([], [], color=GREY, linestyle="--", linewidth=0.9, label="test")
    panel.set_yscale("log")
    panel.set_xlabel("distance along the first eigenvector")
    panel.set_ylabel("loss ± s.e.")
    panel.legend(fontsize=5, **LEGEND)


def _draw_layers(panel: Any, run: _Run) -> None:
    solved = "layer_eigenvalue" in run.result
    values = run["layer_eigenvalue"][..., 0] if solved else run["layer_trace"]
    rows = next(iter(run.runs.values()))  # layers are many: of one run, which the title names
    layers = [i for i in range(values.shape[1]) if np.isfinite(values[rows, i]).any()]
    for colour, i in zip(_colours(len(layers)), layers, strict=True):
        name = str(run.result["layer"][i])
        style = {"color": colour, "linewidth": 0.8, "marker": "o", "markersize": 2}
        panel.plot(run.step[rows], values[rows, i], label=name, **style)
    _scale(panel, values[rows].ravel())
    panel.set_ylabel("largest eigenvalue of the layer" if solved else "trace of the layer")
    panel.set_xlabel(run.step_name)
    if len(run.runs) > 1:
        panel.set_title(next(iter(run.runs)).replace("$", r"\$"), loc="left")
    space_steps(panel, run.step[run.good])
    panel.legend(fontsize=4.5, ncols=2 if len(layers) > 6 else 1, **LEGEND)


def _colours(count: int) -> list[Any]:
    """As many colours as there are curves; beyond the few that are told apart by name, in order."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count)))


def _scale(panel: Any, values: Floats) -> None:
    """Logarithmic where all is positive; else linear up to the smallest magnitudes, logarithmic beyond."""
    values = values[np.isfinite(values)]
    if not values.size or np.ptp(values) == 0:
        return
    if values.min() > 0:
        if values.max() > 10 * values.min():
            panel.set_yscale("log")
        return
    positive = values[values > 0]
    if positive.size and positive.max() > 100 * np.median(np.abs(values)):
        panel.set_yscale("symlog", linthresh=float(max(np.median(np.abs(values)), 1e-3 * positive.max())))
