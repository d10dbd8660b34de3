"""Similarity within and between groups of networks at every step and layer, with the tests on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._networks import (
    Networks,
    drawn_means,
    group_means,
    group_names,
    group_pairs,
    networks_by_step,
)
from dynprobe.analyzers._pair_table import PairTable
from dynprobe.analyzers._relabelling import Test, relabelling_test

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GroupCurves:
    """What the groups of a call show.

    Args:
        groups: Their names.
        layers: Names of the layers that all networks have.
        step: Steps, shape (step,).
        pair_names: Each group, then every two.
        mean: Mean similarity, shape (step, layer, group pair).
        stderr: Its standard error over networks and stimuli.
        contrast_names: For every two groups their difference, and within less between.
        contrast: Shape (step, layer, contrast).
        contrast_stderr: Its standard error.
        p: p-value of one layer.
        p_layers: p-value corrected for the number of layers.
        n_splits: Relabelings looked at, shape (step, contrast).
        smallest_p: The smallest possible p-value, of the same shape.
        sizes: Networks of every group, shape (step, group).
        missing: Networks that are in no pair at some step, with those steps.
        shown: Index of the last step at which as many groups as ever can be described.
    """

    groups: list[str]
    layers: list[str]
    step: Floats
    pair_names: list[str]
    mean: Floats
    stderr: Floats
    contrast_names: list[str]
    contrast: Floats
    contrast_stderr: Floats
    p: Floats
    p_layers: Floats
    n_splits: Floats
    smallest_p: Floats
    sizes: NDArray[np.intp]
    missing: dict[str, Floats]
    shown: int


def group_curves(table: PairTable, weights: Floats, *, permutations: int, seed: int) -> GroupCurves | None:
    """Means, errors and tests of all groups; None without groups or without two runs at one step.

    Args:
        table: The pairs.
        weights: Multinomial weights of the blocks of stimuli, less 1, shape (draw, block).
        permutations: Relabelings of networks to look at; all of them if there are no more.
        seed: Of drawn networks and relabelings.
    """
    groups = group_names(table)
    by_step = networks_by_step(table, groups)
    if not by_step:
        return None
    two = list(combinations(range(len(groups)), 2))
    means = np.stack([group_means(networks, len(groups)) for networks in by_step])
    drawn = [drawn_means(networks, len(groups), weights, seed) for networks in by_step]
    tests = [[relabelling_test(networks, g, h, permutations, seed) for g, h in two] for networks in by_step]
    spread = np.stack([_spread(means_drawn) for means_drawn in drawn])
    contrast_spread = [_spread(_contrasts(means_drawn, len(groups))) for means_drawn in drawn]
    curves_mean, curves_stderr = np.moveaxis(means, 1, -1), np.moveaxis(spread, 1, -1)
    return GroupCurves(
        groups=groups,
        layers=table.layers,
        step=np.array([networks.step for networks in by_step]),
        pair_names=[
            groups[g] if g == h else f"{groups[g]} | {groups[h]}" for g, h in group_pairs(len(groups))
        ],
        mean=curves_mean,
        stderr=curves_stderr,
        contrast_names=_contrast_names(groups, two),
        contrast=np.moveaxis(_of_tests(tests, "difference", "cohesion", by_step), 1, -1),
        contrast_stderr=np.moveaxis(np.stack(contrast_spread), 1, -1),
        p=np.moveaxis(_of_tests(tests, "difference_p", "cohesion_p", by_step), 1, -1),
        p_layers=np.moveaxis(_of_tests(tests, "difference_p_layers", "cohesion_p_layers", by_step), 1, -1),
        n_splits=np.array([[test.n_splits for test in row for _ in range(2)] for row in tests], dtype=float),
        smallest_p=np.array([[test.smallest_p for test in row for _ in range(2)] for row in tests]),
        sizes=np.stack([networks.sizes(len(groups)) for networks in by_step]),
        missing=_missing(table, by_step),
        shown=shown_step(curves_mean, curves_stderr),
    )


def shown_step(mean: Floats, stderr: Floats) -> int:
    """The last step with as many means and errors of groups as there are at any step.

    Args:
        mean: Mean similarities, shape (step, layer, group pair).
        stderr: Their errors, of the same shape.
    """
    known = sum(np.isfinite(values).any(1).sum(-1) for values in (mean, stderr))
    return int(np.flatnonzero(known == np.max(known))[-1])


def _missing(table: PairTable, by_step: list[Networks]) -> dict[str, Floats]:
    """Steps at which each network of a group, failed ones too, is compared with no other."""
    result, found = table.result, {}
    labelled = (zip(result[f"run_{half}"], result[f"group_{half}"], strict=True) for half in "ab")
    for run in dict.fromkeys(str(run) for pair in labelled for run, group in pair if str(group)):
        absent = np.array([networks.step for networks in by_step if run not in networks.runs])
        if len(absent):
            found[run] = absent
    return found


def _of_tests(tests: list[list[Test]], first: str, second: str, by_step: list[Networks]) -> Floats:
    """Two fields of every test, one after the other, shape (step, contrast, layer)."""
    n_layers = by_step[0].value.shape[1]
    rows = [[getattr(test, name) for test in row for name in (first, second)] for row in tests]
    return np.array(rows, dtype=np.float64).reshape(len(by_step), -1, n_layers)


def _contrast_names(groups: list[str], two: list[tuple[int, int]]) -> list[str]:
    """`true − shuffled`, `within − between`, and so on for every two groups."""
    names = []
    for g, h in two:
        which = f": {groups[g]} | {groups[h]}" if len(two) > 1 else ""
        names += [f"{groups[g]} − {groups[h]}", f"within − between{which}"]
    return names


def _contrasts(means: Floats, n_groups: int) -> Floats:
    """The contrasts of means, shape (draw, group pair, layer) to (draw, contrast, layer)."""
    at = {pair: i for i, pair in enumerate(group_pairs(n_groups))}
    rows = []
    for g, h in combinations(range(n_groups), 2):
        a, b, between = means[:, at[g, g]], means[:, at[h, h]], means[:, at[g, h]]
        rows += [a - b, (a + b) / 2 - between]
    return np.stack(rows, axis=1) if rows else np.empty((len(means), 0, means.shape[-1]))


def _spread(drawn: Floats) -> Floats:
    return np.asarray(np.std(drawn, axis=0, ddof=1)) if len(drawn) > 1 else np.full(drawn.shape[1:], np.nan)
