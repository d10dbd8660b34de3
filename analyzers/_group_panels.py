"""Curves of the similarity within and between groups of networks, over depth and over steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._group_curves import shown_step
from dynprobe.analyzers._networks import group_names, networks_by_step
from dynprobe.analyzers._pair_table import PairTable
from dynprobe.analyzers._similarity_names import label_axis, short, tell_apart
from dynprobe.analyzers._similarity_panels import COLUMN, GREY, WIDTH
from dynprobe.analyzers._steps import space_steps

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREYS, DASHES = ("#777777", "#111111", "#AAAAAA"), ((5, 2), (2, 1.5), (8, 2, 2, 2))
"""Of curves between two groups."""
NORMAL = 1.96
"""Standard errors of a 95 % band."""
LEVEL = 0.05


def draw_groups(table: PairTable, figure: Any, label: str) -> None:
    """Mean similarity within and between groups by depth at a late step, and over steps for the last layer.

    The step is the last one with as many groups as ever. Steps with other networks are not joined by a line.

    Args:
        table: The pairs, of a result with `group_similarity`.
        figure: An empty matplotlib figure.
        label: What the similarity is called.
    """
    from matplotlib.patches import Patch

    result = table.result
    steps = np.asarray(result["group_step"], dtype=np.float64)
    mean, error = (
        np.asarray(result[name], dtype=np.float64) for name in ("group_similarity", "group_similarity_stderr")
    )
    layers = [str(x) for x in result["group_layer"]]
    several, at = len(steps) > 1, shown_step(mean, error)
    figure.set_size_inches(WIDTH if several or len(layers) > 12 else COLUMN + 0.4, 2.9)
    panel = figure.add_subplot(1, 1 + several, 1)
    _draw_depth(panel, table, layers, mean[at], error[at])
    _mark_different(panel, table, at)
    panel.set_ylabel(f"{label} of two networks")
    if np.isfinite(steps[at]):
        panel.set_title(f"step {steps[at]:g}", loc="left")
    if several:
        last = int(np.flatnonzero(np.isfinite(mean).any((0, 2)))[-1]) if np.isfinite(mean).any() else 0
        beside = figure.add_subplot(1, 2, 2, sharey=panel)
        for part in _same_networks(table, steps):
            _draw_bands(beside, table, steps[part], mean[part, last], error[part, last])
        beside.set_title(tell_apart(layers, 30)[last], loc="left")
        beside.set_xlabel("step")
        space_steps(beside, steps)
    handles, labels = panel.get_legend_handles_labels()
    if np.isfinite(error[at]).any():
        handles.append(Patch(facecolor=GREY, alpha=0.3))
        labels.append("95 % over networks\nand samples")
    panel.legend(
        handles, labels, loc="best", handlelength=3, frameon=True, facecolor="white", edgecolor="none",
        framealpha=0.85,
    )  # fmt: skip


def _same_networks(table: PairTable, steps: Floats) -> list[Rows]:
    """Steps in a row that have the same networks."""
    runs = {networks.step: set(networks.runs) for networks in networks_by_step(table, group_names(table))}
    at = [runs.get(float(step)) for step in steps]
    changes = [i for i in range(1, len(at)) if at[i] != at[i - 1]]
    return [np.asarray(part) for part in np.split(np.arange(len(at)), changes)]


def _draw_depth(panel: Any, table: PairTable, layers: list[str], mean: Floats, error: Floats) -> None:
    _draw_bands(panel, table, np.arange(len(layers), dtype=np.float64), mean, error)
    label_axis(panel.xaxis, layers, length=18)
    panel.set_xlim(-0.4, len(layers) - 0.6)
    for text in panel.get_xticklabels():
        text.set(rotation=45, ha="right", rotation_mode="anchor")


def _mark_different(panel: Any, table: PairTable, step: int) -> None:
    """A star over the layers where two groups differ after correction for the number of layers."""
    if "contrast_p_layers" not in table.result or len(table.result["contrast"]) != 2:
        return
    x = np.flatnonzero(table.result["contrast_p_layers"][step, :, 0] <= LEVEL)
    if len(x):
        marks: dict[str, Any] = {"linestyle": "", "marker": "$\\ast$", "markersize": 4, "color": "black"}
        top, label = panel.get_ylim()[1], f"groups differ within, p ≤ {LEVEL}"
        panel.plot(x, np.full(len(x), top), **marks, clip_on=False, label=label)


def _draw_bands(panel: Any, table: PairTable, x: Floats, mean: Floats, error: Floats) -> None:
    """One curve for each group pair: groups in colours, what is between them grey and dashed."""
    panel.spines[["top", "right"]].set_visible(False)
    names = [str(name) for name in table.result["group_pair"]]
    n_groups = int((np.sqrt(8 * len(names) + 1) - 1) / 2)
    for i, name in enumerate(names):
        if not np.isfinite(mean[:, i]).any():  # a group of one network has nothing within it
            continue
        within, other = i < n_groups, i - n_groups
        colour = COLOURS[i % len(COLOURS)] if within else GREYS[other % len(GREYS)]
        line: Any = "-" if within else (0, DASHES[other // len(GREYS) % len(DASHES)])
        text = f"within {short(name)}" if within else f"between {short(name, 34)}"
        panel.plot(
            x, mean[:, i], linestyle=line, color=colour, marker="o", markersize=2.2, linewidth=1.0, label=text
        )
        spread = NORMAL * error[:, i]
        panel.fill_between(x, mean[:, i] - spread, mean[:, i] + spread, color=colour, alpha=0.18, linewidth=0)
