"""Noise ceilings between runs: how similar a perfect model of a layer could be, from pairs of networks."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.analyzers.core.result import FAILED, Result, Var
from dynprobe.analyzers.numerics.rdm import Floats
from dynprobe.analyzers.numerics.rdm_compare import ceiling_of_similarities

FEWEST = 3
"""Networks that a ceiling needs: with two, all others are one."""


def _var(long_name: str, error: str = "", dims: tuple[str, ...] = ("ceiling_layer",), units: str = "") -> Var:
    return Var(dims, units, long_name, error, optional=True)


CEILING_RETURNS: dict[str, Var] = {
    "ceiling_layer": _var("Layer"),
    "ceiling_step": _var("Step of the networks of the noise ceiling", dims=(), units="step"),
    "ceiling_networks": _var("Networks of the noise ceiling", dims=()),
    "network_ceiling_lower": _var(
        "Mean similarity of a network to all others pooled", "network_ceiling_lower_stderr"
    ),
    "network_ceiling_lower_stderr": _var("Standard error over stimuli"),
    "network_ceiling_upper": _var(
        "Mean similarity of a network to all pooled, itself included", "network_ceiling_upper_stderr"
    ),
    "network_ceiling_upper_stderr": _var("Standard error over stimuli"),
}


def ceiling_between_runs(result: Result) -> dict[str, Any]:
    """Noise ceiling of every layer that the runs have in common, at the last step that all pairs have.

    From the similarities of pairs alone, which suffice where pooling is adding (`ceiling_of_similarities`).
    Nothing where fewer than three runs were compared, each with each, at one step.

    Args:
        result: Of all pairs.
    """
    if "layer" not in result or not result.lead:
        return {}
    for step in sorted(_steps(result), reverse=True):
        rows, runs = _pairs_at(result, step)
        if len(runs) >= FEWEST and len(rows) == len(runs) * (len(runs) - 1) // 2:
            return _ceilings(result, step, rows, runs)
    return {}


def _steps(result: Result) -> set[float]:
    steps = np.atleast_1d(result["step_a"])
    return {float(s) for s in steps if np.isfinite(s)} if steps.dtype.kind in "if" else set()


def _pairs_at(result: Result, step: float) -> tuple[dict[tuple[str, str], int], list[str]]:
    """The pairs of different runs at a step, each once, and the runs."""
    rows: dict[tuple[str, str], int] = {}
    for i, status in enumerate(np.atleast_1d(result["status"])):
        a, b = str(result["run_a"][i]), str(result["run_b"][i])
        if status != FAILED and a != b and result["step_a"][i] == step == result["step_b"][i]:
            rows.setdefault((min(a, b), max(a, b)), i)
    return rows, sorted({run for pair in rows for run in pair})


def _ceilings(
    result: Result, step: float, rows: dict[tuple[str, str], int], runs: list[str]
) -> dict[str, Any]:
    layers = [str(layer) for layer in result["layer"]]
    at_a, at_b = (
        [list(result[f"layer_{half}"].astype(str)).index(layer) for layer in layers] for half in "ab"
    )
    found = np.full((len(layers), 4), np.nan)
    for k in range(len(layers)):
        values = {pair: float(result["similarity"][i, at_a[k], at_b[k]]) for pair, i in rows.items()}
        effects = {
            pair: result["block_effect"][i, k] if "block_effect" in result else np.array([np.nan])
            for pair, i in rows.items()
        }
        own = _self_similarities(result, rows, runs, at_a[k], at_b[k])
        lower, upper = _means(values, own, runs)
        moved = np.array(
            [
                _means({pair: values[pair] + float(effects[pair][b]) for pair in values}, own, runs)
                for b in range(len(next(iter(effects.values()))))
            ]
        )
        spread = np.sqrt(((moved - [lower, upper]) ** 2).sum(0))
        found[k] = lower, spread[0], upper, spread[1]
    names = [f"network_ceiling_{side}{end}" for side in ("lower", "upper") for end in ("", "_stderr")]
    columns: list[Floats] = list(found.T)
    return {
        "ceiling_layer": np.array(layers, dtype=object),
        "ceiling_step": step,
        "ceiling_networks": len(runs),
        **dict(zip(names, columns, strict=True)),
    }


def _self_similarities(
    result: Result, rows: dict[tuple[str, str], int], runs: list[str], at_a: int, at_b: int
) -> Floats:
    """Of a layer's RDM in every run to itself: 1, but for rho-a with ties."""
    found = np.ones(len(runs))
    if "self_similarity_a" in result:
        for i in rows.values():
            for half, at in (("a", at_a), ("b", at_b)):
                found[runs.index(str(result[f"run_{half}"][i]))] = result[f"self_similarity_{half}"][i, at]
    return found


def _means(values: dict[tuple[str, str], float], own: Floats, runs: list[str]) -> tuple[float, float]:
    matrix = np.diag(own)
    for (a, b), value in values.items():
        i, j = runs.index(a), runs.index(b)
        matrix[i, j] = matrix[j, i] = value
    ceiling = ceiling_of_similarities(matrix)
    return float(ceiling.lower.mean()), float(ceiling.upper.mean())
