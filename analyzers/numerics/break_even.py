"""Stability of SGD along the leading eigenvector of the Hessian, and the step at which a run loses it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
State = Literal["reached", "from the start", "never", "unknown"]

BAND = 2.0
"""Standard errors on either side that the interval of the break-even step allows for."""
ROUNDING = 1e-12
"""Stabilities that exceed 1 by less are 1: η times a curvature that vanishes leaves 1 but for rounding."""


@dataclass(frozen=True)
class Stability:
    """Second moment of SGD along one direction, per step, and the learning rate at which it stops shrinking.

    Attributes:
        curvature_std: s, standard deviation of the per-sample curvature over the training set.
        value: (1 − ηλ)² + s²η²(N − S)/(S(N − 1)); SGD is stable where it is at most 1. NaN where η is 0:
            nothing moves.
        stderr: Its standard error.
        critical_learning_rate: η_c, at which the value is 1; NaN where λ ≤ 0, when no η is stable.
        critical_learning_rate_stderr: Its standard error.
    """

    curvature_std: float
    value: float
    stderr: float
    critical_learning_rate: float
    critical_learning_rate_stderr: float


def noise_factor(batch_size: float, n_training: float) -> float:
    """(N − S)/(S(N − 1)), the variance of the mean of S of N samples drawn without replacement, over s²."""
    if batch_size >= n_training:
        return 0.0
    return (n_training - batch_size) / (batch_size * (n_training - 1))


def sgd_stability(
    curvature: Floats,
    *,
    eigenvalue: float,
    error: float = 0.0,
    variance_error: float = 0.0,
    learning_rate: float = math.nan,
    batch_size: float = math.nan,
    n_training: float = math.nan,
) -> Stability:
    """Computes whether SGD shrinks or amplifies a deviation along the leading eigenvector of the Hessian.

    On the quadratic L = (1/N) Σ H_i x²/2 a step of size η on a batch of S of the N samples, drawn without
    replacement, multiplies E[x²] by (1 − ηλ)² + s²η²(N − S)/(S(N − 1)), with λ = mean H_i and
    s² = (1/N) Σ (H_i − λ)². S = N leaves the η < 2/λ of gradient descent. From n < N samples s² is estimated
    without bias.

    The standard errors are those of λ and s² as estimates for the *training set*: they carry the finite
    population correction √(1 − n/N), so that measured on the whole of it only the errors of the eigenpair
    remain. First order, the direction held fixed.

    Args:
        curvature: H_i = eᵀ∇²ℓ_i e of the measured samples, shape (n,).
        eigenvalue: λ, the leading eigenvalue of the Hessian of the mean loss.
        error: Bound on the error of `eigenvalue`.
        variance_error: Bound on the relative error of s², which is first order in that of the eigenvector.
        learning_rate: η; NaN or 0 leaves the value NaN.
        batch_size: S; NaN leaves value and critical learning rate NaN.
        n_training: N; the measured samples are taken for the training set where it is NaN.

    References:
        Wu, Ma and E, "How SGD Selects the Global Minima in Over-parameterized Learning", NeurIPS 2018.
        Jastrzebski et al., "The Break-Even Point on Optimization Trajectories of Deep Neural Networks", ICLR
        2020, §3 (eq. 1 of the submission).
    """
    n = len(curvature)
    total = n_training if math.isfinite(n_training) else float(n)
    deviation = curvature - curvature.mean()
    variance = float(deviation @ deviation) / (n - 1) * (total - 1) / total if n > 1 else math.nan
    factor = noise_factor(batch_size, total)
    measured = max(1 - n / total, 0.0) if total >= n else 1.0
    learning_rate = learning_rate or math.nan

    def spread(by_eigenvalue: float, by_variance: float) -> float:
        influence = by_eigenvalue * deviation + by_variance * deviation**2
        sampling = float(np.var(influence, ddof=1)) / n * measured if n > 1 else math.nan
        solver = (by_eigenvalue * error) ** 2 + (by_variance * variance * variance_error) ** 2
        return math.sqrt(sampling + solver)

    value = (1 - learning_rate * eigenvalue) ** 2 + variance * learning_rate**2 * factor
    slope = -2 * learning_rate * (1 - learning_rate * eigenvalue)
    stderr = spread(slope, learning_rate**2 * factor)
    critical = critical_stderr = math.nan
    if eigenvalue > 0:
        square = eigenvalue**2 + variance * factor
        critical = 2 * eigenvalue / square
        slope = 2 * (variance * factor - eigenvalue**2) / square**2
        critical_stderr = spread(slope, -2 * eigenvalue * factor / square**2)
    return Stability(math.sqrt(variance), value, stderr, critical, critical_stderr)


@dataclass(frozen=True)
class BreakEven:
    """Where a run reaches the edge of stability for the first time.

    Attributes:
        state: reached (above 1 by more than its standard error after having been at 1 or below); from the
            start (at no checkpoint before that 1 or below); never; unknown.
        step: The crossing of 1 that leads there, the logarithm of the stability taken for linear in the step
            between checkpoints; NaN unless reached.
        low: Last checkpoint before which it is certainly below 1; the first one where none is.
        high: First checkpoint at which it is certainly above 1; NaN where none is.
    """

    state: State
    step: float = math.nan
    low: float = math.nan
    high: float = math.nan


def break_even_step(
    step: Sequence[float] | Floats, stability: Sequence[float] | Floats, stderr: Sequence[float] | Floats
) -> BreakEven:
    """Finds the first step at which the stability exceeds 1, with the interval in which it may lie.

    It counts where it exceeds 1 by more than its standard error and rounding. The interval joins the two
    sources of uncertainty: the checkpoints between which nothing is known, and two standard errors of the
    stability at each.

    Args:
        step: Of the checkpoints, in any order.
        stability: At each; NaN where unknown, which leaves the checkpoint out.
        stderr: Its standard error; NaN counts as none.
    """
    steps, values = np.asarray(step, dtype=float), np.asarray(stability, dtype=float)
    errors = np.nan_to_num(np.asarray(stderr, dtype=float), nan=0.0)
    known = np.flatnonzero(np.isfinite(values) & np.isfinite(steps))
    known = known[np.argsort(steps[known], kind="stable")]
    steps, values, errors = steps[known], values[known], errors[known]
    if not len(steps):
        return BreakEven("unknown")
    possible = np.flatnonzero(values + BAND * errors > 1 + ROUNDING)
    certain = np.flatnonzero(values - BAND * errors > 1 + ROUNDING)
    low = float(steps[max(possible[0] - 1, 0)]) if len(possible) else math.nan
    high = float(steps[certain[0]]) if len(certain) else math.nan
    above = np.flatnonzero(values - errors > 1 + ROUNDING)
    if not len(above):
        return BreakEven("never", math.nan, low, high)
    below = np.flatnonzero(values[: above[0]] <= 1 + ROUNDING)
    if not len(below):
        return BreakEven("from the start", math.nan, math.nan, high)
    return BreakEven("reached", _crossing(steps, values, int(below[-1])), low, high)


def _crossing(step: Floats, value: Floats, below: int) -> float:
    """Where the line through the logarithms there, last at or below 1, and at the next checkpoint is zero."""
    tiny = np.finfo(float).tiny
    before, after = (math.log(max(float(v), tiny)) for v in value[below : below + 2])
    share = max(-before, 0.0) / (after - before)
    return float(step[below] + share * (step[below + 1] - step[below]))
