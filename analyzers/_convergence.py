"""When each layer becomes what it is at the end, and whether layers do so in the order of their depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._pair_table import ROUNDING, Family, PairTable, against_last

Floats = NDArray[np.float64]

NEVER = 1e300
"""Instead of a step where the level was not reached in time; finite, so that differences exist."""
EXACT_LAYERS = 8
"""Up to this many layers all their orders are enumerated: 8! = 40,320."""
FEWEST_LAYERS = 3
CHUNK = 200
"""Draws whose curves are in memory at once."""


@dataclass(frozen=True)
class Convergence:
    """One run's convergence to its last checkpoint, layer by layer.

    Args:
        run: Name of the run.
        step: First step from which on a layer stays at the level, shape (layer,); NaN for never.
        stderr: Half the width of the middle 68 % under resampled stimuli, NaN where that is not finite.
        low: 2.5 % quantile under resampled stimuli, NaN for never.
        high: 97.5 % quantile.
        reached: 1 where the level was reached before the last checkpoint, else 0; NaN for unknown layers.
        first_known: First step with a similarity, shape (layer,); NaN for none.
        first_step: First step of the run.
        tau: Kendall's tau-b between depth and step.
        tau_stderr: Its standard error over stimuli.
        tau_p: Two-sided p-value from permuting the layers.
    """

    run: str
    step: Floats
    stderr: Floats
    low: Floats
    high: Floats
    reached: Floats
    first_known: Floats
    first_step: float
    tau: float
    tau_stderr: float
    tau_p: float


def convergence(
    table: PairTable, weights: Floats, *, level: float, draws: int, seed: int
) -> list[Convergence]:
    """Convergence of every run that was compared with its last checkpoint at three steps or more.

    The level is one similarity for all layers: relative to where a layer starts, one that is at 0.95 from the
    beginning would count as late. The last checkpoint equals itself by definition and is no evidence: a
    layer below the level just before it has never reached it.

    Args:
        table: The pairs.
        weights: Multinomial weights of the blocks of stimuli, less 1, shape (draw, block): the same for all
            steps and layers.
        level: Similarity to the last checkpoint that counts as reached.
        draws: Random orders of layers for the p-value where these are too many to enumerate.
        seed: Of those.
    """
    effect = table.effect()
    return [_of_run(table, effect, family, weights, level, draws, seed) for family in against_last(table)]


def _of_run(
    table: PairTable, effect: Floats, family: Family, weights: Floats, level: float, draws: int, seed: int
) -> Convergence:
    curve, shift = table.same[family.rows], effect[family.rows]
    found = reaching(curve, family.step, level)
    drawn = np.concatenate(
        [
            reaching(curve + np.moveaxis(shift @ part.T, -1, 0), family.step, level)
            for part in _chunks(weights, shift.shape[-1])
        ]
    )
    low, middle_low, middle_high, high = _quantiles(drawn, (2.5, 16, 84, 97.5))
    known = np.isfinite(found)
    tau, drawn_tau = kendall_tau(found[known]), kendall_tau(drawn[:, known])
    return Convergence(
        run=family.runs[0],
        step=_or_nan(found),
        stderr=(_or_nan(middle_high) - _or_nan(middle_low)) / 2,
        low=_or_nan(low),
        high=_or_nan(high),
        reached=np.where(known, (found < NEVER).astype(float), np.nan),
        first_known=np.where(np.isfinite(curve).any(0), family.step[np.isfinite(curve).argmax(0)], np.nan),
        first_step=float(family.step[0]),
        tau=float(tau),
        tau_stderr=float(np.std(drawn_tau, ddof=1)) if len(drawn_tau) > 1 else float("nan"),
        tau_p=tau_p_value(found[known], draws, seed),
    )


def reaching(curve: Floats, step: Floats, level: float) -> Floats:
    """First step from which on a curve stays at the level, between checkpoints linear in log(1 + step).

    A curve begins where it is first known: a layer that is constant in the untrained network has no
    similarity there.

    Args:
        curve: Similarities, shape (…, step, layer).
        step: Steps in rising order, shape (step,).
        level: What is to be reached.

    Returns:
        Steps, shape (…, layer); `NEVER` where the last value is below, NaN where a later value is missing.
    """
    known = np.isfinite(curve)
    begun = np.logical_or.accumulate(known, axis=-2)
    below = (curve < level) & (1 - curve > ROUNDING)
    n_steps = len(step)
    last_below = np.where(below, np.arange(n_steps)[:, None], -1).max(-2)
    before = np.clip(last_below, 0, n_steps - 2)[..., None, :]
    lower, upper = (np.take_along_axis(curve, before + i, -2)[..., 0, :] for i in (0, 1))
    place = np.log1p(step - min(step[0], 0.0))
    before = before[..., 0, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip((level - lower) / (upper - lower), 0, 1)
    found = np.expm1(place[before] + share * (place[before + 1] - place[before])) + min(step[0], 0.0)
    begin = step[begun.argmax(-2)]
    found = np.where(last_below < 0, begin, np.where(last_below == n_steps - 1, NEVER, found))
    return np.where(begun[..., -1, :] & (known == begun).all(-2), found, np.nan)


def kendall_tau(steps: Floats) -> Floats:
    """Kendall's tau-b between the order of the layers and their steps, shape (…, layer) to (…).

    Positive where earlier layers converge earlier. NaN for less than three layers, or where all steps are
    equal.
    """
    n_layers = steps.shape[-1]
    if n_layers < FEWEST_LAYERS:
        return np.full(steps.shape[:-1], np.nan)
    concordance, untied = np.zeros(steps.shape[:-1]), np.zeros(steps.shape[:-1])
    for i in range(n_layers - 1):
        sign = np.sign(steps[..., i + 1 :] - steps[..., i : i + 1])
        concordance += sign.sum(-1)
        untied += np.abs(sign).sum(-1)
    with np.errstate(invalid="ignore"):
        return np.asarray(concordance / np.sqrt(untied * (n_layers * (n_layers - 1) / 2)))


def tau_p_value(steps: Floats, draws: int, seed: int) -> float:
    """Two-sided p-value of `kendall_tau` under permutations of the layers, exact for up to eight.

    Args:
        steps: Step of each layer, shape (layer,).
        draws: Random permutations beyond eight layers.
        seed: Of those.
    """
    observed = abs(float(kendall_tau(steps)))
    if not math.isfinite(observed):
        return float("nan")
    if len(steps) <= EXACT_LAYERS:
        orders = np.array(list(permutations(range(len(steps)))))
        return float(np.mean(np.abs(kendall_tau(steps[orders])) >= observed - 1e-12))
    generator = np.random.default_rng([seed, 3])
    orders = generator.permuted(np.tile(np.arange(len(steps)), (draws, 1)), axis=1)
    hits = int((np.abs(kendall_tau(steps[orders])) >= observed - 1e-12).sum())
    return (1 + hits) / (1 + draws)


def _chunks(weights: Floats, n_blocks: int) -> Iterator[Floats]:
    """Parts of the draws; where effects are unknown (one block of NaN), draws that give NaN."""
    if weights.shape[1] != n_blocks:
        weights = np.zeros((len(weights), n_blocks))
    for start in range(0, len(weights), CHUNK):
        yield weights[start : start + CHUNK]


def _quantiles(drawn: Floats, percent: Sequence[float]) -> Floats:
    """Quantiles over draws without interpolation, which would mix a step with `NEVER`."""
    order = np.sort(drawn, axis=0)
    at = [round(p / 100 * (len(drawn) - 1)) for p in percent]
    quantiles = order[at]
    quantiles[:, ~np.isfinite(drawn).all(0) | (len(drawn) < 2)] = np.nan
    return quantiles


def _or_nan(steps: Floats) -> Floats:
    return np.where(steps < NEVER, steps, np.nan)
