"""Curves of the similarity within and between groups of networks, over depth and over steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._pair_table import PairTable
from dynprobe.analyzers._similarity_panels import COLUMN, GREY, WIDTH, label_axis, short
from dynprobe.analyzers._steps import space_steps

Floats = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NORMAL = 1.96
"""Standard errors of a 95 % band."""
LEVEL = 0.05


def draw_groups(table: PairTable, figure: Any, label: str) -> None:
    """Mean similarity within and between groups by depth at the last step, and over steps for the last layer.

    Args:
        table: The pairs, of a result with `group_similarity`.
        figure: An empty matplotlib figure.
        label: What the similarity is called.
    """
    result = table.result
    steps = np.asarray(result["group_step"], dtype=np.float64)
    mean, error = (
        np.asarray(result[name], dtype=np.float64) for name in ("group_similarity", "group_similarity_stderr")
    )
    layers = [str(x) for x in result["group_layer"]]
    several = len(steps) > 1
    figure.set_size_inches(WIDTH if several or len(layers) > 12 else COLUMN + 0.4, 2.9)
    panel = figure.add_subplot(1, 1 + several, 1)
    _draw_depth(panel, table, layers, mean[-1], error[-1])
    panel.set_ylabel(f"{label} of two networks")
    if np.isfinite(steps[-1]):
        panel.set_title(f"step {steps[-1]:g}", loc="left")
    if several:
        last = int(np.flatnonzero(np.isfinite(mean).any((0, 2)))[-1]) if np.isfinite(mean).any() else 0
        beside = figure.add_subplot(1, 2, 2, sharey=panel)
        _draw_bands(beside, table, steps, mean[:, last], error[:, last])
        beside.set_title(short(layers[last], 30), loc="left")
        beside.set_xlabel("step")
        space_steps(beside, steps)
    panel.legend(loc="best", frameon=True, facecolor="white", edgecolor="none", framealpha=0.85)


def _draw_depth(panel: Any, table: PairTable, layers: list[str], mean: Floats, error: Floats) -> None:
    _draw_bands(panel, table, np.arange(len(layers), dtype=np.float64), mean, error)
    label_axis(panel.xaxis, layers, length=18)
    panel.set_xlim(-0.4, len(layers) - 0.6)
    for text in panel.get_xticklabels():
        text.set(rotation=45, ha="right", rotation_mode="anchor")
    different = _different(table, len(layers))
    if different.any():
        top = panel.get_ylim()[1]
        marks: dict[str, Any] = {"linestyle": "", "marker": "$\\ast$", "markersize": 4, "color": "black"}
        x = np.flatnonzero(different)
        label = f"groups differ within, p ≤ {LEVEL}"
        panel.plot(x, np.full(len(x), top), **marks, clip_on=False, label=label)


def _different(table: PairTable, n_layers: int) -> NDArray[np.bool_]:
    """Layers where two groups differ at the last step after correction for the number of layers."""
    if "contrast_p_layers" not in table.result or len(table.result["contrast"]) != 2:
        return np.zeros(n_layers, dtype=bool)
    return np.asarray(table.result["contrast_p_layers"][-1, :, 0] <= LEVEL)


def _draw_bands(panel: Any, table: PairTable, x: Floats, mean: Floats, error: Floats) -> None:
    """One curve for each group pair: groups in colours, what is between them dashed."""
    panel.spines[["top", "right"]].set_visible(False)
    names = [str(name) for name in table.result["group_pair"]]
    n_groups = int((np.sqrt(8 * len(names) + 1) - 1) / 2)
    for i, name in enumerate(names):
        if not np.isfinite(mean[:, i]).any():  # a group of one network has nothing within it
            continue
        within = i < n_groups
        colour = COLOURS[i % len(COLOURS)] if within else GREY if len(names) == 3 else None
        line = "-" if within else "--"
        text = f"within {short(name)}" if within else f"between {short(name, 34)}"
        (drawn,) = panel.plot(
            x, mean[:, i], line, color=colour, marker="o", markersize=2.2, linewidth=1.0, label=text
        )
        spread = NORMAL * error[:, i]
        panel.fill_between(
            x, mean[:, i] - spread, mean[:, i] + spread, color=drawn.get_color(), alpha=0.18, linewidth=0
        )
