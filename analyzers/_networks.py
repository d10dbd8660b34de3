"""Groups of networks: mean similarity within and between them, and its error.

Pairs share networks, so they are not independent: two groups of five from one population differ by a t-test
on their pairs at the 5 % level in a third of all cases. Here networks are drawn, never pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._pair_table import PairTable

Floats = NDArray[np.float64]
IntArray = NDArray[np.intp]

FEWEST = 3
"""Networks of a group from which an error over networks is estimated."""
CHUNK = 200
"""Draws whose sums are in memory at once."""


@dataclass(frozen=True)
class Networks:
    """The networks of several groups at one step, with the similarity of every two.

    Args:
        step: Step of the checkpoints.
        group: Group of every network, an index, shape (network,).
        first: One network of every pair, shape (pair,); `second` is the other.
        second: The other.
        value: Similarity of the layers of the same name, shape (pair, layer).
        effect: What each block of stimuli does to it, shape (pair, layer, block).
        runs: Name of every network.
    """

    step: float
    group: IntArray
    first: IntArray
    second: IntArray
    value: Floats
    effect: Floats
    runs: tuple[str, ...] = ()

    def of(self, *groups: int) -> Networks:
        """The networks of these groups alone, numbered anew from 0."""
        kept = np.isin(self.group, groups)
        number = np.cumsum(kept) - 1
        pairs = kept[self.first] & kept[self.second]
        return replace(
            self,
            group=np.searchsorted(groups, self.group[kept]),
            first=number[self.first[pairs]],
            second=number[self.second[pairs]],
            value=self.value[pairs],
            effect=self.effect[pairs],
            runs=tuple(run for run, keep in zip(self.runs, kept, strict=False) if keep),
        )

    def sizes(self, n_groups: int) -> IntArray:
        """How many networks every group has."""
        return np.bincount(self.group, minlength=n_groups)


def group_names(table: PairTable) -> list[str]:
    """The groups in the order in which they were given, else that of the pairs."""
    groups = table.groups
    if groups is None:
        return []
    given = table.result.attributes.get("groups")
    first = [str(name) for name in given] if isinstance(given, list | tuple) else []
    return [name for name in dict.fromkeys([*first, *np.stack(groups, 1).ravel().tolist()]) if name]


def networks_by_step(table: PairTable, names: list[str]) -> list[Networks]:
    """Pairs of different runs at the same step, step by step; unknown steps count as the same."""
    groups = table.groups
    if groups is None:
        return []
    a, b = table.step_a, table.step_b
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    usable = same & (table.run_a != table.run_b) & (groups[0] != "") & (groups[1] != "")
    effect = table.effect()
    found = []
    for step in np.unique(a[usable]):
        rows = np.flatnonzero(usable & ((a == step) | (np.isnan(a) & np.isnan(step))))
        found.append(_networks(table, effect, rows, float(step), names))
    return found


def _networks(table: PairTable, effect: Floats, rows: IntArray, step: float, names: list[str]) -> Networks:
    groups = table.groups
    assert groups is not None
    label: dict[str, str] = {}
    for i in rows:
        label.setdefault(str(table.run_a[i]), str(groups[0][i]))
        label.setdefault(str(table.run_b[i]), str(groups[1][i]))
    number = {run: i for i, run in enumerate(label)}
    once: dict[tuple[int, int], int] = {}
    for i in rows:  # a pair that was measured in both orders is one pair
        low, high = sorted((number[str(table.run_a[i])], number[str(table.run_b[i])]))
        once.setdefault((low, high), int(i))
    places, ends = list(once.values()), np.array(list(once), dtype=np.intp).reshape(-1, 2)
    return Networks(
        step=step,
        group=np.array([names.index(group) for group in label.values()], dtype=np.intp),
        first=ends[:, 0],
        second=ends[:, 1],
        value=table.same[places],
        effect=effect[places],
        runs=tuple(label),
    )


def group_pairs(n_groups: int) -> list[tuple[int, int]]:
    """Every group with itself, then every two groups."""
    return [(g, g) for g in range(n_groups)] + list(combinations(range(n_groups), 2))


def group_means(networks: Networks, n_groups: int) -> Floats:
    """Mean similarity within each group and between every two, shape (group pair, layer)."""
    ones = np.ones((1, len(networks.group)))
    return np.stack([_mean(networks, ones, g, h)[0] for g, h in group_pairs(n_groups)])


def drawn_means(networks: Networks, n_groups: int, weights: Floats, seed: int) -> Floats:
    """The same means under resampled networks and stimuli, shape (draw, group pair, layer).

    Networks are drawn with replacement inside every group, and a network is never paired with itself. Their
    counts are spread around 1 by √(n/(n−1)): drawing n of n makes the variance of a mean too small by
    (n−1)/n, a third for three networks. Stimuli are weighted the same for all pairs.

    Args:
        networks: The networks.
        n_groups: How many groups there are.
        weights: Multinomial weights of the blocks of stimuli, less 1, shape (draw, block).
        seed: Of the networks drawn.
    """
    counts = np.ones((len(weights), len(networks.group)))
    generator = np.random.default_rng([seed, 4])
    for g, size in enumerate(networks.sizes(n_groups)):
        if size > 1:
            drawn = generator.multinomial(size, np.full(size, 1 / size), len(weights))
            counts[:, networks.group == g] += math.sqrt(size / (size - 1)) * (drawn - 1.0)
    means = [_drawn_mean(networks, counts, g, h, weights) for g, h in group_pairs(n_groups)]
    too_few = [min(networks.sizes(n_groups)[[g, h]]) < FEWEST for g, h in group_pairs(n_groups)]
    found = np.stack(means, axis=1)
    found[:, too_few] = np.nan
    return found


def _drawn_mean(networks: Networks, counts: Floats, g: int, h: int, weights: Floats) -> Floats:
    n_layers, n_blocks = networks.effect.shape[1:]
    if weights.shape[1] != n_blocks:  # effects were not measured
        return np.full((len(counts), n_layers), np.nan)
    known = np.isfinite(networks.value)
    effect = np.where(known[..., None], networks.effect, 0.0).reshape(len(known), -1)
    parts = []
    for start in range(0, len(counts), CHUNK):
        chunk = slice(start, start + CHUNK)
        pairs = _pair_weights(networks, counts[chunk], g, h)
        shifts = np.einsum("dlb,db->dl", (pairs @ effect).reshape(-1, n_layers, n_blocks), weights[chunk])
        with np.errstate(divide="ignore", invalid="ignore"):
            shifts /= pairs @ known
        parts.append(_mean(networks, counts[chunk], g, h) + shifts)
    return np.concatenate(parts)


def _pair_weights(networks: Networks, counts: Floats, g: int, h: int) -> Floats:
    """The product of its networks' counts for every pair of the groups g and h, 0 for the others."""
    a, b = networks.group[networks.first], networks.group[networks.second]
    chosen = ((a == g) & (b == h)) | ((a == h) & (b == g))
    return np.asarray(counts[:, networks.first] * counts[:, networks.second] * chosen)


def _mean(networks: Networks, counts: Floats, g: int, h: int) -> Floats:
    """Mean over pairs weighted by the counts of their networks, shape (draw, network) to (draw, layer)."""
    known = np.isfinite(networks.value)
    pairs = _pair_weights(networks, counts, g, h)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((pairs @ np.where(known, networks.value, 0.0)) / (pairs @ known))
