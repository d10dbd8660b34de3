"""The step axis of the figures that analyzers draw themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers.core.result import Result

FEW = 5
"""Up to this many steps are themselves the ticks."""
READABLE = 0.1
"""Least distance of two labelled steps, as a part of that of the first and the last."""


def step_axis(result: Result, pieces: NDArray[np.intp] | None = None) -> tuple[NDArray[np.float64], str]:
    """Where each piece stands along the axis, and what that is: its step, or its place where one has none.

    Args:
        result: With a leading dimension or a single piece.
        pieces: Those that need a step; all when None.
    """
    steps = np.atleast_1d(result["step"]) if "step" in result else np.arange(result.n_pieces)
    needed = steps if pieces is None else steps[pieces]
    if steps.dtype.kind in "if" and bool(np.isfinite(needed.astype(float)).all()):
        return steps.astype(float), "step"
    return np.arange(result.n_pieces, dtype=float), "checkpoint"


def space_steps(panel: Any, steps: NDArray[Any]) -> None:
    """Shows steps that were saved at growing intervals on a logarithmic axis that has a zero.

    A few steps are themselves the ticks, as far as their labels do not touch.

    Args:
        panel: A matplotlib axes.
        steps: All steps drawn in it, in any order.
    """
    steps = np.unique(steps[np.isfinite(steps)])
    gaps = np.diff(steps)
    few = 0 < len(steps) <= FEW
    if len(gaps) < 2 or steps[0] < 0 or gaps[-1] <= 10 * gaps[0]:
        if few:
            panel.set_xticks(_apart(panel, steps))
        return
    first = float(steps[steps > 0].min())
    panel.set_xscale("symlog", linthresh=first, linscale=0.3)
    # the axis' own margins would show negative steps
    panel.set_xlim(-0.3 * first if steps[0] == 0 else steps[0] / 1.25, 1.25 * steps[-1])
    powers = 10.0 ** np.arange(np.ceil(np.log10(first)), np.floor(np.log10(steps[-1])) + 1)
    few = few or len(powers) < 2
    panel.set_xticks(_apart(panel, steps) if few else [*([0.0] if steps[0] == 0 else []), *powers])
    panel.xaxis.set_major_formatter("{x:g}")


def _apart(panel: Any, steps: NDArray[Any]) -> list[float]:
    """Of the measured steps, from the last, those far enough apart on the axis to be read."""
    place = panel.xaxis.get_transform().transform(steps.astype(float))
    kept = [len(steps) - 1]
    for i in range(len(steps) - 2, -1, -1):
        if place[kept[-1]] - place[i] >= READABLE * (place[-1] - place[0]):
            kept.append(i)
    return [float(steps[i]) for i in kept[::-1]]
