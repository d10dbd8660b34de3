"""Draws an embedding: the spectra before and after, and the norms of the gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._steps import step_axis
from dynprobe.analyzers.core.result import FAILED, Result

STYLES = ("auto", "spectrum", "block", "gradient")
EIGENVALUES = {"spectrum": "eigenvalue", "block": "block_eigenvalue"}
GREY = "#777777"
MOST_LINES = 8
"""Checkpoints, and networks, that have a line of their own."""


def draw_embedding(result: Result, figure: Any, style: str = "") -> None:
    """Eigenvalues of the last checkpoint's Hessian on the left, gradient norms of all on the right.

    Args:
        result: From `embedding`.
        figure: An empty matplotlib figure.
        style: auto (default) draws spectrum, or block where not all eigenvalues are known, and gradient;
            spectrum (of the networks), block (of what each split adds), or gradient.

    Raises:
        OptionError: If the style is not known, or there is nothing to draw.
    """
    style = style or STYLES[0]
    if style not in STYLES:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
    measured = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)
    if not len(measured):
        raise OptionError("every checkpoint failed: there is nothing to draw.", "")
    panels = [style] if style != "auto" else [*_eigenvalues(result), "gradient"]
    if style in ("spectrum", "block") and EIGENVALUES[style] not in result:
        raise OptionError(f"no eigenvalues for the style {style} were measured.", "See --max-dense.")
    figure.set_size_inches(3.5 * len(panels), 2.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, name in zip(axes, panels, strict=True):
        if name == "gradient":
            _draw_gradient(panel, result, measured)
        else:
            _draw_eigenvalues(panel, result, measured[-1], name)
        panel.spines[["top", "right"]].set_visible(False)


def _eigenvalues(result: Result) -> list[str]:
    """Which eigenvalues are worth a panel: all of the networks', else those of the blocks."""
    counted = "zero" in result and bool(np.isfinite(result["zero"]).any())
    return ["spectrum"] if counted else ["block"] if EIGENVALUES["block"] in result else []


def _per_piece(result: Result, name: str) -> NDArray[np.float64]:
    """With the pieces along the first axis, also where there is a single one."""
    values = np.asarray(result[name], dtype=np.float64)
    return values if result.lead else values[np.newaxis]


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0.05, 0.85, count)]


def _draw_eigenvalues(panel: Any, result: Result, piece: int, style: str) -> None:
    """Sorted eigenvalues; what is within the tolerance lies in the linear part of the axis."""
    spectra = _per_piece(result, EIGENVALUES[style])[piece]
    shown = [k for k in range(len(spectra)) if np.isfinite(spectra[k]).any()][:MOST_LINES]
    names = ("checkpoint", "1 neuron more") if style == "spectrum" else ("split 1", "split 2")
    for k, colour in zip(shown, _colours(len(shown)), strict=True):
        values = spectra[k][np.isfinite(spectra[k])]
        label = names[k] if k < 2 else f"{k} neurons more" if style == "spectrum" else f"split {k + 1}"
        panel.plot(np.arange(1, len(values) + 1), values, ".", markersize=2.5, color=colour, label=label)
    if shown:
        _scale(panel, spectra, _tolerance(result, piece, spectra))
    steps, what = step_axis(result)
    panel.set_title(f"{what} {steps[piece]:g}", loc="left")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("rank from below")
    panel.set_ylabel("eigenvalue" if style == "spectrum" else "eigenvalue of the block added")
    panel.legend(loc="best")


def _tolerance(result: Result, piece: int, spectra: NDArray[np.float64]) -> float:
    """Magnitude up to which an eigenvalue is zero; where none was stated, a small part of the largest."""
    stated = _per_piece(result, "zero_tolerance")[piece] if "zero_tolerance" in result else np.full(1, np.nan)
    known = stated[np.isfinite(stated)]
    return float(known.max()) if len(known) else 1e-10 * float(np.nanmax(np.abs(spectra)))


def _scale(panel: Any, spectra: NDArray[np.float64], tolerance: float) -> None:
    if not tolerance > 0:
        return
    panel.set_yscale("symlog", linthresh=tolerance, linscale=0.5)
    panel.axhspan(-tolerance, tolerance, color=GREY, alpha=0.2, linewidth=0)
    largest = float(np.nanmax(np.abs(spectra)))
    decades = np.arange(np.ceil(np.log10(tolerance)) + 1, np.floor(np.log10(max(largest, tolerance))) + 1)
    powers = 10.0 ** decades[:: -max(1, len(decades) // 3)]
    panel.set_yticks([*(-powers if np.nanmin(spectra) < -tolerance else []), 0.0, *powers])
    panel.minorticks_off()


def _draw_gradient(panel: Any, result: Result, measured: NDArray[np.intp]) -> None:
    norms = _per_piece(result, "gradient_norm")
    added = np.arange(norms.shape[1])
    chosen = measured[np.unique(np.linspace(0, len(measured) - 1, MOST_LINES).astype(int))]
    steps, what = step_axis(result)
    for piece, colour in zip(chosen, _colours(len(chosen)), strict=True):
        label = f"{what} {steps[piece]:g}"
        panel.plot(added, norms[piece], "o-", markersize=3, linewidth=1, color=colour, label=label)
    threshold = np.atleast_1d(result["gradient_threshold"])[measured]
    panel.axhspan(0, float(np.nanmax(threshold)), color=GREY, alpha=0.2, linewidth=0)
    panel.axhline(
        float(np.nanmax(threshold)), color=GREY, linestyle="--", linewidth=0.8, label="critical below"
    )
    if (norms[measured] > 0).any():
        panel.set_yscale("log")
    panel.set_xticks(added)
    panel.set_xlabel("neurons added")
    panel.set_ylabel("norm of the gradient")
    panel.legend(loc="best")
