"""What the similarity analyzers share: errors over stimuli, and the numbers on a whole call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynprobe.analyzers._convergence import Convergence, convergence
from dynprobe.analyzers._findings import convergence_findings, group_findings
from dynprobe.analyzers._group_curves import GroupCurves, group_curves
from dynprobe.analyzers._pair_table import PairTable, most_similar
from dynprobe.analyzers.core.result import Result, Var

Floats = NDArray[np.float64]
IntArray = NDArray[np.int64]

BLOCKS = 32
"""Blocks that stimuli are resampled in; the relative error of a standard error from B of them is 1/√(2B)."""
DRAWS = 400
"""Draws behind the standard error of `same_layer`."""
MOST_VALUES = 2_000_000
"""Resampled similarities in memory at once."""

_CURVE, _GROUP, _CONTRAST = (
    ("curve_run", "curve_layer"),
    ("group_step", "group_layer", "group_pair"),
    ("group_step", "group_layer", "contrast"),
)


def _var(dims: tuple[str, ...], long_name: str, units: str = "", error: str = "") -> Var:
    return Var(dims, units, long_name, error, optional=True)


SUMMARY_RETURNS: dict[str, Var] = {
    "curve_run": _var(("curve_run",), "Run"),
    "curve_layer": _var(("curve_layer",), "Layer, in the order of depth"),
    "converged_step": _var(
        _CURVE,
        "Step from which on a layer stays at the level, NaN for never",
        "step",
        "converged_step_stderr",
    ),
    "converged_step_stderr": _var(_CURVE, "Standard error over stimuli", "step"),
    "converged_step_low": _var(_CURVE, "2.5 % quantile over stimuli, NaN for never", "step"),
    "converged_step_high": _var(_CURVE, "97.5 % quantile over stimuli, NaN for never", "step"),
    "converged": _var(_CURVE, "1 where the level was reached before the last checkpoint, else 0"),
    "depth_tau": _var(
        ("curve_run",),
        "Kendall's tau-b of depth and convergence, positive for bottom-up",
        "",
        "depth_tau_stderr",
    ),
    "depth_tau_stderr": _var(("curve_run",), "Standard error over stimuli"),
    "depth_tau_p": _var(("curve_run",), "Two-sided p-value from permuting the layers"),
    "group_step": _var(("group_step",), "Step", "step"),
    "group_layer": _var(("group_layer",), "Layer, in the order of depth"),
    "group_pair": _var(("group_pair",), "Within a group, or between two"),
    "group_similarity": _var(_GROUP, "Mean similarity of two networks", "", "group_similarity_stderr"),
    "group_similarity_stderr": _var(_GROUP, "Standard error over networks and stimuli"),
    "contrast": _var(("contrast",), "Difference between means"),
    "contrast_value": _var(_CONTRAST, "Difference between mean similarities", "", "contrast_stderr"),
    "contrast_stderr": _var(_CONTRAST, "Standard error over networks and stimuli"),
    "contrast_p": _var(_CONTRAST, "p-value from relabelling networks, of one layer"),
    "contrast_p_layers": _var(_CONTRAST, "The same, corrected for the number of layers"),
    "n_splits": _var(("group_step", "contrast"), "Relabelings of networks looked at"),
    "finding": _var(("finding",), "What was found, in words"),
}
"""Numbers on the whole call: convergence to the last checkpoint, and groups of networks."""


def stimulus_blocks(n_samples: int, seed: int = 0, n_blocks: int = BLOCKS) -> IntArray:
    """Assigns every sample to one of equally large blocks at random.

    Args:
        n_samples: How many samples there are.
        seed: Of the assignment.
        n_blocks: How many blocks; no more than there are samples.

    Returns:
        Block of every sample, shape (n_samples,); sizes differ by at most 1.
    """
    blocks = np.arange(n_samples, dtype=np.int64) % max(1, min(n_blocks, n_samples))
    return np.random.default_rng([seed, 1]).permutation(blocks)


def effects_of_deletions(deleted: ArrayLike) -> Floats:
    """What each block of stimuli does to a statistic, from leaving the blocks out one by one.

    −√((B−1)/B)·(θ₍₋b₎ − mean θ₍₋.₎): effects sum to 0 over the blocks, and their squares to the jackknife's
    variance (Efron and Stein 1981, eq. 1.4), so that the statistic under resampled stimuli is
    value + Σ_b (w_b − 1)·effect_b with multinomial weights w.

    Args:
        deleted: The statistic without each block, shape (…, n_blocks).

    Returns:
        Effects, shape (…, n_blocks); NaN where there is one block alone.

    References:
        Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9 (1981).
    """
    theta = np.asarray(deleted, dtype=np.float64)
    n_blocks = theta.shape[-1]
    if n_blocks < 2:
        return np.full(theta.shape, np.nan)
    return np.asarray(np.sqrt((n_blocks - 1) / n_blocks) * (theta.mean(-1, keepdims=True) - theta))


@cache
def stimulus_draws(n_blocks: int, draws: int, seed: int = 0) -> Floats:
    """Multinomial weights of the blocks, less 1: shape (draws, n_blocks)."""
    generator = np.random.default_rng([seed, 2])
    return np.asarray(generator.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), draws) - 1.0)


def common_layers(layers_a: Sequence[str], layers_b: Sequence[str]) -> list[str]:
    """The names that both networks have, in the order of the first."""
    there = set(layers_b)
    return [name for name in layers_a if name in there]


def same_layer(
    value: ArrayLike, effect: ArrayLike, layers_a: Sequence[str], layers_b: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """Fraction of layers whose most similar layer of the other network is the one of the same name.

    The accuracy of Kornblith et al. (2019, section 6.1), averaged over both directions. Layers without a
    value of their own (constant ones) are not counted. A layer shares the first place with those that are as
    similar up to rounding: dropout, in evaluation, hands on its input.

    Args:
        value: Similarities, shape (layer_a, layer_b).
        effect: Of each block of stimuli on them, shape (layer_a, layer_b, block).
        layers_a: Names of the layers of the first network.
        layers_b: Of the second.
        seed: Of the draws of stimuli.

    Returns:
        The fraction and its standard error over stimuli; NaN where no layer can be matched, or where there is
        no other layer to be mistaken for.

    References:
        Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited",
        ICML 2019.
    """
    value, effect = np.asarray(value, dtype=np.float64), np.asarray(effect, dtype=np.float64)
    names = common_layers(list(layers_a), list(layers_b))
    rows = np.array([list(layers_a).index(name) for name in names], dtype=int)
    columns = np.array([list(layers_b).index(name) for name in names], dtype=int)
    known = np.isfinite(value[rows, columns])
    rows, columns = rows[known], columns[known]
    if not len(rows) or value.size == 1:
        return float("nan"), float("nan")
    found = _fraction(value, rows, columns)
    used = np.isfinite(value)
    if not np.isfinite(effect[used]).all():
        return float(found), float("nan")
    weights = stimulus_draws(effect.shape[-1], DRAWS, seed)
    at_once = max(1, MOST_VALUES // value.size)
    drawn = [
        _fraction(value + np.moveaxis(effect @ part.T, -1, 0), rows, columns)
        for part in np.split(weights, range(at_once, DRAWS, at_once))
    ]
    fractions = np.concatenate(drawn)
    return float(found), float(np.std(fractions - fractions[0], ddof=1))  # exactly 0 where all agree


def _fraction(value: Floats, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Floats:
    """The fraction for each of several matrices, shape (…, layer_a, layer_b) to (…)."""
    own = value[..., rows, columns]
    forward = most_similar(own, np.nanmax(value[..., rows, :], -1))
    backward = most_similar(own, np.nanmax(value[..., :, columns], -2))
    return np.asarray((forward.mean(-1) + backward.mean(-1)) / 2)


def summary(value: str) -> Callable[[Result], dict[str, Any]]:
    """Makes the function that computes numbers on the whole call from all of its pairs.

    Args:
        value: Name of the main statistic, of shape (pair, layer_a, layer_b); `block_effect` is of it.

    Returns:
        A function of a result with every pair, giving what `SUMMARY_RETURNS` declares as far as the pairs
        allow: convergence where a run was compared with its last checkpoint, group means and tests where
        networks have groups.
    """

    def summarise(result: Result) -> dict[str, Any]:
        table = PairTable(result, value)
        options = {"permutations": 10_000, "bootstrap": 2000, "level": 0.9, "seed": 0} | table.options
        draws, seed, level = int(options["permutations"]), int(options["seed"]), float(options["level"])
        n_blocks = table.effect().shape[-1]
        weights = stimulus_draws(n_blocks, int(options["bootstrap"]), seed)
        runs = convergence(table, weights, level=level, draws=draws, seed=seed)
        curves = group_curves(table, weights, permutations=draws, seed=seed)
        findings = convergence_findings(runs, table.layers, level)
        findings += group_findings(curves) if curves else []
        found = {**_convergence_arrays(runs, table.layers), **(_group_arrays(curves) if curves else {})}
        return found | ({"finding": np.array(findings, dtype=object)} if findings else {})

    return summarise


def _convergence_arrays(runs: list[Convergence], layers: list[str]) -> dict[str, Any]:
    if not runs:
        return {}
    return {
        "curve_run": np.array([run.run for run in runs], dtype=object),
        "curve_layer": np.array(layers, dtype=object),
        "converged_step": np.stack([run.step for run in runs]),
        "converged_step_stderr": np.stack([run.stderr for run in runs]),
        "converged_step_low": np.stack([run.low for run in runs]),
        "converged_step_high": np.stack([run.high for run in runs]),
        "converged": np.stack([run.reached for run in runs]),
        "depth_tau": np.array([run.tau for run in runs]),
        "depth_tau_stderr": np.array([run.tau_stderr for run in runs]),
        "depth_tau_p": np.array([run.tau_p for run in runs]),
    }


def _group_arrays(curves: GroupCurves) -> dict[str, Any]:
    means = {
        "group_step": curves.step,
        "group_layer": np.array(curves.layers, dtype=object),
        "group_pair": np.array(curves.pair_names, dtype=object),
        "group_similarity": curves.mean,
        "group_similarity_stderr": curves.stderr,
    }
    if not curves.contrast_names:
        return means
    return means | {
        "contrast": np.array(curves.contrast_names, dtype=object),
        "contrast_value": curves.contrast,
        "contrast_stderr": curves.contrast_stderr,
        "contrast_p": curves.p,
        "contrast_p_layers": curves.p_layers,
        "n_splits": curves.n_splits,
    }
