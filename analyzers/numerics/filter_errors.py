"""Relative errors of smooth and rough parts, how sure they are, and the steps at which they fall."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers.numerics.gaussian_filter import LEAST_PART, Energies

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class WithError:
    """Numbers with what becomes of them without each block of samples.

    Attributes:
        value: Any shape.
        deleted: Shape (n_blocks, …).
    """

    value: Floats
    deleted: Floats

    @property
    def stderr(self) -> Floats:
        """Standard error over samples by the delete-a-block jackknife; NaN where a value or deletion is."""
        n_blocks = len(self.deleted)
        with np.errstate(invalid="ignore"):
            spread = (self.deleted - self.deleted.mean(0)) ** 2
        found: Floats = np.sqrt((n_blocks - 1) / n_blocks * spread.sum(0))
        return np.where(np.isfinite(found) & (n_blocks > 1), found, np.nan)


@dataclass(frozen=True)
class FilterErrors:
    """What the filter says of a target (function 0) and of residuals (the others).

    Attributes:
        low: e_low, shape (n_residuals, n_deltas); NaN where the target has no such part.
        high: e_high, likewise.
        lfr: Share of low frequencies of target and residuals, shape (n_functions, n_deltas).
    """

    low: WithError
    high: WithError
    lfr: WithError


def filter_errors(energies: Energies) -> FilterErrors:
    """Relative errors e = (Σ|r^part|²/Σ|y^part|²)^½ of both parts, and LFR = Σ|v^low|²/Σ|v|².

    Errors follow from the first-order effects of blocks of samples, whose removal takes away their own rows
    and their part in the averages of their neighbours.

    Args:
        energies: Of the target and the residuals, the target first.

    References:
        Xu, Zhang, Luo, Xiao and Ma, CiCP 28 (2020), eqs. 18 and 19.
        Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9 (1981).
    """
    low = np.maximum(np.concatenate([energies.low[None], energies.low - energies.low_effect]), 0)
    high = np.maximum(np.concatenate([energies.high[None], energies.high - energies.high_effect]), 0)
    total = np.concatenate([energies.total[None], energies.total - energies.total_effect])[:, None]
    return FilterErrors(_relative(low, total), _relative(high, total), _ratio(low / _positive(total)))


def _relative(part: Floats, total: Floats) -> WithError:
    enough = part[0, :, :1] >= LEAST_PART * total[0, :, :1]
    found = np.sqrt(part[..., 1:] / _positive(part[..., :1]))
    return _ratio(np.where(enough, found, np.nan))


def _ratio(values: Floats) -> WithError:
    """From (1 + n_blocks, n_deltas, n_functions), the whole first."""
    swapped = values.swapaxes(1, 2)
    return WithError(swapped[0], swapped[1:])


def _positive(values: Floats) -> Floats:
    return np.where(values > 0, values, np.nan)


def settled(error: Floats, level: float, axis: int = -1) -> Bools:
    """Whether an error is under a level at a checkpoint and still is at the next one, if there is one.

    A wave that passes through the target's amplitude and phase on its way elsewhere is not learned.

    Args:
        error: Any shape.
        level: The level.
        axis: That of the checkpoints.
    """
    under = np.moveaxis(error < level, axis, -1)
    later = np.concatenate([under[..., 1:], np.ones_like(under[..., :1])], -1)
    return np.moveaxis(under & later, -1, axis)


def first_below(step: Floats, error: Floats, level: float) -> Floats:
    """The step at which an error is first `settled` under a level, between checkpoints by a power law.

    ln e is linear in ln step; in step itself up to the first step above 0.

    Args:
        step: Ascending, shape (n_checkpoints,).
        error: Shape (…, n_checkpoints); a checkpoint without an error is passed over.
        level: The level.

    Returns:
        Shape (…,): infinity for never, NaN where the error is under the level from the start, so that it is
        not known since when, or where the first checkpoint has no error.
    """
    under = settled(error, level)
    at = under.argmax(-1)
    places = np.where(np.isnan(error), 0, np.arange(error.shape[-1]))
    last_known = np.maximum.accumulate(places, -1)
    before = np.take_along_axis(last_known, np.maximum(at - 1, 0)[..., None], -1)[..., 0]

    def taken(place: NDArray[np.intp]) -> Floats:
        return np.take_along_axis(error, place[..., None], -1)[..., 0]

    with np.errstate(divide="ignore", invalid="ignore"):
        high, low = np.log(taken(before)), np.log(np.maximum(taken(at), np.finfo(float).tiny))
        part = (high - np.log(level)) / (high - low)
        start, end = step[before], step[at]
        power = np.exp(np.log(start) + part * (np.log(end) - np.log(start)))
        found = np.where(start > 0, power, start + part * (end - start))
    found = np.where(under.any(-1), found, np.inf)
    return np.where((at == 0) & under[..., 0] | np.isnan(error[..., 0]), np.nan, found)


def surely_later(
    late: Floats, late_stderr: Floats, early: Floats, early_stderr: Floats, level: float, errors: float
) -> Bools:
    """Whether one error falls under a level at a later checkpoint than another, beyond standard errors.

    There has to be a checkpoint at which `early` is settled under the level by more than so many standard
    errors, and up to which `late` was always above it by more than as many. Nothing is interpolated, so that
    two that cross between the same checkpoints are never told apart; and nothing is said where one starts
    below.

    Args:
        late: Shape (n_checkpoints, …).
        late_stderr: Its standard error.
        early: As `late`.
        early_stderr: Its standard error.
        level: The level.
        errors: How many standard errors.

    Returns:
        Shape (…,).
    """
    with np.errstate(invalid="ignore"):
        under = (early + errors * early_stderr < level) & settled(early, level, 0)
        above = np.logical_and.accumulate(late - errors * late_stderr > level, axis=0)
        started = (early[0] > level) & (late[0] > level)
    found: Bools = started & (under & above).any(0)
    return found
