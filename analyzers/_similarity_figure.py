"""Draws similarities of networks: layers by layers, over steps, between many checkpoints, and by groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._group_panels import draw_groups
from dynprobe.analyzers._pair_table import PairTable, families
from dynprobe.analyzers._similarity_panels import draw_curves, draw_heatmaps, draw_matrix
from dynprobe.analyzers.core.result import Result

STYLES = ("auto", "heatmap", "curves", "matrix", "groups")
MOST_HEATMAPS = 6
"""Pairs that each get a map of layers by layers."""
MOST_CURVES = 4
"""Families of curves that are drawn for themselves."""


def similarity_figure(value: str, label: str) -> Callable[[Result, Any, str], None]:
    """Makes the drawing function of an analyzer of pairs of networks.

    Args:
        value: Name of the main statistic, of shape (pair, layer_a, layer_b).
        label: What it is called on axes.

    Returns:
        A function that draws a result into an empty matplotlib figure, in a style: auto (the default) follows
        the pairs; heatmap, curves, matrix or groups. It raises `OptionError` for a style that is not known or
        that the pairs do not allow.
    """

    def draw(result: Result, figure: Any, style: str = "") -> None:
        table = PairTable(result, value)
        style = style or "auto"
        if not len(table):
            raise OptionError("No pair was measured, so there is nothing to draw.")
        if style not in STYLES:
            raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
        possible = _possible(table)
        if style != "auto" and style not in possible:
            raise OptionError(_why_not(style), f"This result can be drawn as {', '.join(possible)}.")
        chosen = _fitting(table, possible) if style == "auto" else style
        painters = {
            "heatmap": draw_heatmaps, "curves": draw_curves, "matrix": draw_matrix, "groups": draw_groups
        }  # fmt: skip
        named = f"{label} ({result.treatment})" if result.treatment else label
        painters[chosen](table, figure, named)

    return draw


def _possible(table: PairTable) -> list[str]:
    """The styles that these pairs allow."""
    found = ["heatmap"]
    if table.layers:
        found += ["curves"] if families(table)[0] else []
        found += ["matrix"] if len(table) > 1 else []
        found += ["groups"] if "group_similarity" in table.result else []
    return found


def _why_not(style: str) -> str:
    return {
        "curves": "There are no curves over steps: they need three pairs of a run, against one checkpoint "
        "or in a row, or three steps of two runs.",
        "matrix": "There is no matrix of checkpoints: it needs several pairs with layers of the same name.",
        "groups": "There are no groups of networks in this result.",
    }[style]


def _fitting(table: PairTable, possible: list[str]) -> str:
    """What shows most of these pairs."""
    if "groups" in possible:
        return "groups"
    curves, complete = families(table)
    few = len(curves) <= MOST_CURVES or all(len(family.runs) == 1 for family in curves)
    if "curves" in possible and complete and few:
        return "curves"
    return "matrix" if len(table) > MOST_HEATMAPS and "matrix" in possible else "heatmap"
