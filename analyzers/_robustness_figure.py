"""Draws robustness: accuracy against the size of a perturbation, and over training beside the curvature."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._robustness import KINDS
from dynprobe.analyzers._steps import space_steps, step_axis
from dynprobe.analyzers.core.result import FAILED, Result

Floats = NDArray[np.float64]

COLOURS = {"steps": "#0072B2", "gradient": "#D55E00", "newton": "#009E73", "noise": "#777777"}
LABELS = {"fgsm": "FGSM", "l2grad": "L2GRAD", "fhsm": "FHSM", "l2hess": "L2HESS", "random-linf": "noise"}
LABELS |= {"pgd-linf": "PGD", "pgd-l2": "PGD", "random-l2": "noise"}
MARKERS = {"steps": "o", "gradient": "s", "newton": "^", "noise": ""}
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
NORMS = {"linf": "size ε in the largest entry (L∞)", "l2": "size ε in length (L2)"}
CURVATURE_COLOUR = "#CC79A7"
INK = "#222222"


def draw_robustness(result: Result, figure: Any, style: str = "") -> None:
    """Accuracy against ε for the last checkpoint of each run, and over the steps beside λ_max.

    Bands are Wilson's 95 % intervals, or the standard error where there is only a loss.

    Args:
        result: From `robustness`.
        figure: An empty matplotlib figure.
        style: None but the default is known.

    Raises:
        OptionError: If a style is asked for.
    """
    if style:
        raise OptionError(f"{style!r} is not a style of this figure.", "Leave it out, or name a variable.")
    data = _Measured(result)
    norms = [n for n in NORMS if any(KINDS[name].norm == n for name in data.attacks)]
    over_steps = any(len(pieces) > 1 for pieces in data.runs.values())
    count = len(norms) + over_steps
    figure.set_size_inches(6.75 if count > 1 or len(data.runs) > 1 else 3.25, 2.3)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for i, (panel, norm) in enumerate(zip(panels, norms, strict=False)):
        _draw_sizes(panel, data, norm)
        if i == 0:
            panel.set_ylabel(data.quantity)
    if over_steps:
        _draw_steps(panels[-1], data)
    _add_legend(figure, data)


class _Measured:
    """What the figure needs of a result, by run, without failed pieces."""

    def __init__(self, result: Result) -> None:
        self.attacks = [str(name) for name in result["attack"]]
        self.measure = "accuracy" if "accuracy" in result else "loss"
        self.quantity = f"{self.measure} under attack"
        several = bool(result.lead)

        def along(name: str) -> NDArray[Any]:
            return result[name] if several else result[name][None]

        self.epsilon, self.value = along("epsilon"), along(self.measure)
        if self.measure == "accuracy":
            self.low, self.high = along("accuracy_low"), along("accuracy_high")
        else:
            self.low = self.value - along("loss_stderr")
            self.high = self.value + along("loss_stderr")
        self.curvature = along("lambda_max") if "lambda_max" in result else None
        n = len(self.value)
        self.step, self.step_name = step_axis(result)
        names = along("run") if "run" in result else np.full(n, "")
        status = np.atleast_1d(result["status"])
        self.runs: dict[str, list[int]] = {}
        for i in range(n):
            if status[i] != FAILED:
                self.runs.setdefault(str(names[i]), []).append(i)
        for pieces in self.runs.values():
            pieces.sort(key=lambda i: self.step[i])

    def label(self, i: int) -> str:
        return f"{self.step_name} {self.step[i]:g}"


def _draw_sizes(panel: Any, data: _Measured, norm: str) -> None:
    for (_, pieces), dashes in zip(data.runs.items(), DASHES, strict=False):
        piece = pieces[-1]
        for row, name in enumerate(data.attacks):
            kind = KINDS[name]
            if kind.norm != norm:
                continue
            known = np.isfinite(data.epsilon[piece, row])
            x, y = data.epsilon[piece, row][known], data.value[piece, row][known]
            colour = COLOURS[kind.source]
            style: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": MARKERS[kind.source]}
            panel.plot(x, y, **style)
            low, high = data.low[piece, row][known], data.high[piece, row][known]
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    _space_sizes(panel, data, norm)
    panel.set_xlabel(NORMS[norm])
    if data.measure == "accuracy":
        panel.set_ylim(-0.02, 1.02)
    last = {data.label(pieces[-1]) for pieces in data.runs.values()}
    panel.set_title(last.pop() if len(last) == 1 else "last checkpoints", loc="left")


def _space_sizes(panel: Any, data: _Measured, norm: str) -> None:
    """Sizes over more than a decade are shown on a logarithmic axis that has a zero."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows = [i for i, name in enumerate(data.attacks) if KINDS[name].norm == norm]
    sizes = data.epsilon[:, rows]
    positive = sizes[np.isfinite(sizes) & (sizes > 0)]
    if positive.max() > 10 * positive.min():
        first = float(positive.min())
        panel.set_xscale("symlog", linthresh=first, linscale=0.4)
        top = np.log10(positive.max())
        decades = 10.0 ** np.arange(np.floor(np.log10(first)), np.ceil(top) + 1)
        candidates = np.concatenate([decades, 3 * decades]) if top - np.log10(first) < 2.5 else decades
        ticks = [0.0, *sorted(t for t in candidates if first * 0.999 <= t <= positive.max() * 1.001)]
        panel.set_xticks(ticks)
        panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.set_xlim(0, float(positive.max()))


def _middle(data: _Measured) -> tuple[int, int]:
    """An iterative attack, and the size at which it tells the checkpoints apart best."""
    order = ("steps", "gradient", "newton", "noise")
    row = min(range(len(data.attacks)), key=lambda i: order.index(KINDS[data.attacks[i]].source))
    shown = [i for pieces in data.runs.values() for i in pieces]
    values = data.value[shown, row]
    known = np.flatnonzero(np.isfinite(values).all(axis=0))
    if not known.size:  # a sample without a target leaves no mean
        return row, values.shape[1] // 2
    if data.measure == "loss":
        return row, int(known[len(known) // 2])
    center = np.median(values[:, known], axis=0)
    return row, int(known[np.abs(center - np.median(values[:, 0]) / 2).argmin()])


def _draw_steps(panel: Any, data: _Measured) -> None:
    row, level = _middle(data)
    name = data.attacks[row]
    colour = COLOURS[KINDS[name].source]
    beside = panel.twinx() if data.curvature is not None else None
    for pieces, dashes in zip(data.runs.values(), DASHES, strict=False):
        x = data.step[pieces]
        y, low, high = (a[pieces, row, level] for a in (data.value, data.low, data.high))
        panel.plot(x, y, color=colour, linestyle=dashes, marker="o", markersize=2)
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(x, data.value[pieces, row, 0], color=INK, linestyle=dashes, linewidth=0.5)
        if beside is not None and data.curvature is not None:
            shown = {"color": CURVATURE_COLOUR, "linestyle": dashes, "marker": "D", "markersize": 2}
            beside.plot(x, data.curvature[pieces], **shown)
    sizes = np.unique(data.epsilon[[p[0] for p in data.runs.values()], row, level])
    at = f"ε = {sizes[0]:.3g}" if len(sizes) == 1 else f"level {level}"
    norm = "L∞" if KINDS[name].norm == "linf" else "L2"
    panel.set_title(f"{LABELS[name]} ({norm}) at {at}; thin: clean", loc="left")
    panel.set_xlabel(data.step_name)
    panel.set_ylabel(data.quantity, color=colour)
    if data.measure == "accuracy":
        panel.set_ylim(-0.02, 1.02)
    if beside is not None and data.curvature is not None:
        beside.set_ylabel(r"$\lambda_{\max}$ of the loss Hessian", color=CURVATURE_COLOUR)
        positive = data.curvature[np.isfinite(data.curvature)]
        if positive.size and positive.min() > 0 and positive.max() > 30 * positive.min():
            beside.set_yscale("log")
    space_steps(panel, data.step)


def _add_legend(figure: Any, data: _Measured) -> None:
    """What the colours mean, and which line is which run where there are several."""
    from matplotlib.lines import Line2D

    handles, names = [], []
    for source, colour in COLOURS.items():
        used = [LABELS[name] for name in data.attacks if KINDS[name].source == source]
        if used:
            handles.append(Line2D([], [], color=colour, marker=MARKERS[source]))
            names.append(", ".join(dict.fromkeys(used)))
    if len(data.runs) > 1:
        for run, dashes in zip(data.runs, DASHES, strict=False):
            handles.append(Line2D([], [], color=INK, linestyle=dashes))
            names.append(run.replace("$", r"\$"))
        if len(data.runs) > len(DASHES):
            names[-1] += f" ({len(data.runs) - len(DASHES)} more not shown)"
    widest = max(3.5 * len(name) + 24 for name in names)  # points, at the legend's size
    columns = max(1, int(72 * figure.get_size_inches()[0] // widest))
    figure.legend(handles, names, loc="outside upper center", ncols=columns)
