"""Whether a run learns low frequencies first, and with what evidence it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers.numerics.filter_errors import (
    FilterErrors,
    WithError,
    first_below,
    settled,
    surely_later,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ERRORS = 3.0
"""Standard errors that count as beyond chance: 0.05 over 12 comparisons needs 2.9."""
HOLDS, REVERSED, UNDECIDED = "holds", "reversed", "undecided"


@dataclass(frozen=True)
class Order:
    """When the smooth and the rough part of the target are learned, by level and width of the filter.

    Attributes:
        low: Step at which e_low is first under the level, (n_levels, n_deltas); infinity for never.
        high: The same of e_high.
        ratio: high/low: infinity where only high is never under it, 0 where only low is; NaN where neither.
        high_later: Whether high frequencies are later beyond the errors, (n_levels, n_deltas).
        low_later: Whether low frequencies are.
        least: ln of the ratio with the last step of the run in place of infinity, so that it is the nearest
            to 0 that the ratio can be; NaN where neither is ever under the level.
    """

    low: Floats
    high: Floats
    ratio: WithError
    high_later: Bools
    low_later: Bools
    least: WithError

    @property
    def sign(self) -> NDArray[np.int64]:
        """1 where high frequencies are later beyond the errors, -1 where low ones are, else 0."""
        return self.high_later.astype(np.int64) - self.low_later

    @property
    def ratio_stderr(self) -> Floats:
        """Standard error over samples; NaN where the ratio is not a finite number with or without a block."""
        return np.where(np.isfinite(self.ratio.value), self.ratio.stderr, np.nan)

    def beyond(self, control: Control) -> NDArray[np.int64]:
        """`sign` where the ratio also is beyond the control's by 3 joint standard errors, else 0."""
        sign = self.sign
        spread = control.log_spread * np.sqrt(1 + 1 / control.n_draws)
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = sign * (self.least.value - np.log(control.ratio))
            beyond = difference > ERRORS * np.hypot(self.least.stderr, spread)  # never where NaN
        return np.where(beyond, sign, 0)


@dataclass(frozen=True)
class Control:
    """Ratios of steps without any order in space beyond that of the classes.

    Attributes:
        ratio: Geometric mean over draws, (n_levels, n_deltas); NaN where any has none.
        log_spread: Standard deviation of ln of the ratio over draws.
        n_draws: How many.
    """

    ratio: Floats
    log_spread: Floats
    n_draws: int

    @property
    def known(self) -> Bools:
        """Where there is a ratio."""
        found: Bools = np.isfinite(self.ratio)
        return found

    @property
    def spread(self) -> Floats:
        """Standard deviation over draws, to first order."""
        return self.ratio * self.log_spread


def order(step: Floats, errors: FilterErrors, levels: Sequence[float]) -> Order:
    """Compares the steps at which e_low and e_high fall under levels.

    Args:
        step: Of the checkpoints, ascending; NaN where unknown.
        errors: Of their residuals.
        levels: Between 0 and 1.
    """
    low = _crossings(step, errors.low.value, levels)
    high = _crossings(step, errors.high.value, levels)
    high_deleted = _crossings(step, errors.high.deleted, levels).swapaxes(0, 1)
    low_deleted = _crossings(step, errors.low.deleted, levels).swapaxes(0, 1)
    ratio = WithError(_ratio(high, low), _ratio(high_deleted, low_deleted))
    least = WithError(_least(step, high, low), _least(step, high_deleted, low_deleted))
    return Order(
        low,
        high,
        ratio,
        _later(errors.high, errors.low, levels) | _distinct(errors.high, errors.low, levels, ratio, 1),
        _later(errors.low, errors.high, levels) | _distinct(errors.low, errors.high, levels, ratio, -1),
        least,
    )


def _later(late: WithError, early: WithError, levels: Sequence[float]) -> Bools:
    """Without any interpolation, so also where one of them is never under the level."""
    rows = [surely_later(late.value, late.stderr, early.value, early.stderr, x, ERRORS) for x in levels]
    return np.array(rows)


def _distinct(
    late: WithError, early: WithError, levels: Sequence[float], ratio: WithError, sign: int
) -> Bools:
    """Both are under the level first at different checkpoints, and the ratio of steps is beyond its error.

    Between the same two checkpoints the order is one of interpolation, whatever the ratio's error.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log = WithError(np.log(ratio.value), np.log(ratio.deleted))
        beyond = sign * log.value > ERRORS * log.stderr
    rows = [settled(late.value, x, 0).argmax(0) > settled(early.value, x, 0).argmax(0) for x in levels]
    found: Bools = np.array(rows) & beyond & np.isfinite(log.value)
    return found


def _crossings(step: Floats, error: Floats, levels: Sequence[float]) -> Floats:
    """(n_levels, …, n_deltas) from errors (…, n_checkpoints, n_deltas)."""
    if not np.isfinite(step).all():
        return np.full((len(levels), *error.shape[:-2], error.shape[-1]), np.nan)
    return np.stack([first_below(step, error.swapaxes(-1, -2), level) for level in levels])


def _ratio(high: Floats, low: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(high / low, dtype=np.float64)  # inf/inf is NaN: neither is ever under the level


def _least(step: Floats, high: Floats, low: Floats) -> Floats:
    neither = np.isinf(high) & np.isinf(low)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(np.minimum(high, step[-1])) - np.log(np.minimum(low, step[-1]))
    return np.where(neither, np.nan, found)


def control_of(draws: Sequence[Order]) -> Control:
    """Mean and spread over draws; a cell is undefined where any draw has no ratio."""
    ratio = np.array([draw.ratio.value for draw in draws])
    known = (np.isfinite(ratio) & (ratio > 0)).all(0)
    log = np.log(np.where(known, ratio, np.nan))
    centre = log.mean(0)
    return Control(np.exp(centre), log.std(0, ddof=1), len(draws))


def verdicts(found: Order, control: Control) -> list[str]:
    """For every width: holds, reversed or undecided.

    A level counts where the order is outside the errors and the ratio is beyond the control's; all levels
    that count have to agree.

    Args:
        found: Of the run.
        control: Of its residuals permuted among samples of a class.
    """
    sign = found.beyond(control)
    high, low = np.asarray((sign > 0).any(0)), np.asarray((sign < 0).any(0))
    return [
        HOLDS if h and not w else REVERSED if w and not h else UNDECIDED
        for h, w in zip(high.tolist(), low.tolist(), strict=True)
    ]


def overall(by_delta: Sequence[str]) -> str:
    """One verdict on a run: what more than half of the widths say and none contradicts."""
    for verdict, opposite in ((HOLDS, REVERSED), (REVERSED, HOLDS)):
        if by_delta.count(verdict) * 2 > len(by_delta) and opposite not in by_delta:
            return verdict
    return UNDECIDED


def reason(
    step: Floats, errors: FilterErrors, found: Order, control: Control, levels: Sequence[float]
) -> str:
    """Why a run is undecided, in words."""
    low, high = errors.low.value, errors.high.value
    sign, beyond = found.sign, found.beyond(control)
    if (beyond != 0).any():
        return "the widths that tell an order are no more than half of them, or contradict each other"
    if not (np.isfinite(low[0]) & np.isfinite(high[0])).any():
        return "at no width do both parts have an error at the first checkpoint"
    if not np.isfinite(step).all():
        return "steps are not known, or not ascending"
    if np.isinf(found.low).all() and np.isinf(found.high).all():
        return f"neither e_low nor e_high falls under {max(levels):g} within the run"
    if np.isnan(found.low).all() or np.isnan(found.high).all():
        part = "e_low" if np.isnan(found.low).all() else "e_high"
        return f"{part} is under every level at the first checkpoint already"
    if (sign != 0).any():
        if not (control.known & (sign != 0)).any():
            return "where there is an order the control has no ratio of steps to compare with"
        return "no ratio of steps is beyond that of the control by 3 joint standard errors"
    return (
        "at no width and level is one part learned at an earlier checkpoint than the other beyond 3 standard "
        "errors"
    )
