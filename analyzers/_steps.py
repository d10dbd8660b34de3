"""The step axis of the figures that analyzers draw themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers.core.result import Result


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

    Args:
        panel: A matplotlib axes.
        steps: All steps drawn in it, in any order.
    """
    steps = np.unique(steps[np.isfinite(steps)])
    gaps = np.diff(steps)
    if len(steps) == 1:
        panel.set_xticks(steps)
    if len(gaps) < 2 or steps[0] < 0 or gaps[-1] <= 10 * gaps[0]:
        return
    first = float(steps[steps > 0].min())
    panel.set_xscale("symlog", linthresh=first, linscale=0.3)
    # the axis' own margins would show negative steps
    panel.set_xlim(-0.3 * first if steps[0] == 0 else steps[0] / 1.25, 1.25 * steps[-1])
    powers = 10.0 ** np.arange(np.ceil(np.log10(first)), np.floor(np.log10(steps[-1])) + 1)
    panel.set_xticks([*([0.0] if steps[0] == 0 else []), *(powers if len(powers) else [first])])
    panel.xaxis.set_major_formatter("{x:g}")
