"""The dropout regulariser of a checkpoint beside its check by Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from dynprobe.analyzers.numerics.dropout_term import (
    LastLayer,
    dropout_gap,
    dropout_term,
    is_quadratic,
    last_layer,
    last_linear,
)
from dynprobe.analyzers.numerics.evaluate import Batch, Inputs, estimate
from dynprobe.analyzers.numerics.losses import Loss

NAMES = ("dropout_term", "dropout_term_stderr", "dropout_gap", "dropout_gap_stderr")
DISAGREE, WRONG = 3.0, 5.0
"""Standard errors of Monte Carlo: of a note, and where a formula that is exact cannot be right."""
SHARE = 0.5
"""Part of R₁ that the draws have to be able to see."""
SAME = 1e-9
"""Relative difference that is rounding."""


def dropout(
    model: nn.Module, data: Iterable[Batch], few: Inputs, loss: Loss, keep: float, draws: int, seed: int
) -> tuple[dict[str, float], list[str], list[str]]:
    """R₁ in closed form and by Monte Carlo.

    Args:
        model: In eval mode, float64.
        data: Pairs (inputs, targets), re-iterable.
        few: Inputs of a few samples.
        loss: The loss.
        keep: p, the probability that a feature is kept.
        draws: Masks per sample; 0 for none.
        seed: Of the masks.

    Returns:
        The values, notes, and reasons why they are not to be believed.
    """
    values = dict.fromkeys(NAMES, math.nan)
    name, why = last_linear(model, few)
    if not name:
        return values, [f"there is no dropout regulariser: {why}"], []
    last = last_layer(model, name, data)
    term = estimate(dropout_term(last, loss.per_sample, keep))
    values |= {"dropout_term": term.value, "dropout_term_stderr": term.stderr}
    exact = _is_exact(last, loss)
    notes = []
    if not exact:
        notes.append(
            f"for {loss.name} the dropout regulariser is the first term of an expansion, good where each "
            "feature adds little to the outputs; only for squared errors is it exact"
        )
    if not draws:
        return values, notes, []
    gap = dropout_gap(last, loss.per_sample, keep, draws, seed)
    values |= {"dropout_gap": gap.value, "dropout_gap_stderr": gap.stderr}
    reasons = []
    off, rounding = abs(gap.value - term.value), SAME * abs(term.value)
    if exact and off > WRONG * gap.stderr + rounding:
        reasons.append("the Monte Carlo check of the dropout regulariser is off by over 5 errors")
    elif off > DISAGREE * gap.stderr + rounding:
        notes.append(
            f"R₁ {term.value:.3g} disagrees with Monte Carlo {gap.value:.3g} ± {gap.stderr:.2g}: "
            "believe dropout_gap"
        )
    elif not exact and DISAGREE * gap.stderr > SHARE * abs(term.value):
        notes.append(
            f"the draws are too few to check R₁ {term.value:.3g}: Monte Carlo {gap.value:.3g} ± "
            f"{gap.stderr:.2g}; give more --draws"
        )
    return values, notes, reasons


def _is_exact(last: LastLayer, loss: Loss) -> bool:
    return loss.name == "mse" or is_quadratic(last, loss.per_sample)
