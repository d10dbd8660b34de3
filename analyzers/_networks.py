"""Groups of networks: mean similarity within and between them, its error, and tests that relabel networks.

Pairs share networks, so they are not independent: two groups of five from one population differ by a t-test
on their pairs at the 5 % level in a third of all cases. Here networks are drawn and relabelled, never pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
ROUNDING = 1e-12


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
    """

    step: float
    group: IntArray
    first: IntArray
    second: IntArray
    value: Floats
    effect: Floats

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
        )

    def sizes(self, n_groups: int) -> IntArray:
        """How many networks every group has."""
        return np.bincount(self.group, minlength=n_groups)


def group_names(table: PairTable) -> list[str]:
    """The groups, in the order in which they were named first."""
    groups = table.groups
    if groups is None:
        return []
    return [str(name) for name in dict.fromkeys(np.stack(groups, 1).ravel().tolist()) if name]


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
    known = np.isfinite(networks.value)
    pairs = _pair_weights(networks, counts, g, h)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((pairs @ np.where(known, networks.value, 0.0)) / (pairs @ known))


@dataclass(frozen=True)
class Test:
    """Two groups compared by relabelling their networks.

    Args:
        difference: Mean within the first group less that within the second, shape (layer,).
        cohesion: Mean of both less the mean between them, shape (layer,).
        difference_p: Two-sided p-value, shape (layer,).
        cohesion_p: One-sided p-value, shape (layer,).
        difference_p_layers: The same, corrected for the number of layers: against the largest of any layer,
            each in units of its own spread over relabelings.
        cohesion_p_layers: Likewise.
        n_splits: Relabelings that were looked at.
        smallest_p: The smallest p-value they allow.
    """

    difference: Floats
    cohesion: Floats
    difference_p: Floats
    cohesion_p: Floats
    difference_p_layers: Floats
    cohesion_p_layers: Floats
    n_splits: int
    smallest_p: float


def relabelling_test(networks: Networks, g: int, h: int, permutations: int, seed: int) -> Test:
    """Compares two groups under all distinct relabelings of their networks, or under random ones.

    All of them where there are no more than `permutations`: then the p-value is exact. Else
    (1 + hits)/(1 + permutations) of random ones (Phipson and Smyth 2010). Where both groups have one size,
    exchanging their names changes nothing, so five and five networks have 126 distinct relabelings.

    Args:
        networks: The networks.
        g: The first group.
        h: The second.
        permutations: How many relabelings to look at.
        seed: Of random ones.

    References:
        Phipson and Smyth, "Permutation P-values should never be zero", Statistical Applications in Genetics
        and Molecular Biology 9 (2010).
    """
    both = networks.of(g, h)
    own = both.group == 0
    n_splits, exact = _count(int(own.sum()), int((~own).sum()), permutations)
    observed = _statistics(both, own[None])[:, 0]
    found = np.concatenate(
        [_statistics(both, splits) for splits in _splits(own, exact, n_splits, seed)], axis=1
    )
    # each layer in units of its own spread: else the layer that varies most decides for all
    known = np.isfinite(found)
    spread = np.sqrt(np.where(known, found**2, 0.0).sum(1) / np.maximum(known.sum(1), 1))
    spread = np.where(spread > ROUNDING, spread, 1.0)[:, None]
    # a split whose mean is undefined counts against the claim
    size = np.where(known, np.stack([np.abs(found[0]), found[1]]), np.inf) / spread
    size[:, :, ~np.isfinite(observed).all(0)] = -np.inf
    own_size = (np.stack([np.abs(observed[0]), observed[1]])[:, None] - ROUNDING) / spread
    hits = (size >= own_size).sum(1).astype(float)
    layers_hits = (size.max(2, initial=-np.inf)[..., None] >= own_size).sum(1).astype(float)
    p, p_layers = ((x + (not exact)) / (n_splits + (not exact)) for x in (hits, layers_hits))
    for values in (p, p_layers):
        values[~np.isfinite(observed)] = np.nan
    smallest = 1 / n_splits if exact else 1 / (1 + n_splits)
    return Test(observed[0], observed[1], p[0], p[1], p_layers[0], p_layers[1], n_splits, smallest)


def _statistics(both: Networks, splits: NDArray[np.bool_]) -> Floats:
    """Difference and cohesion for every split into two groups, shape (2, split, layer)."""
    x = splits.astype(np.float64)
    a, b = x[:, both.first], x[:, both.second]
    known = np.isfinite(both.value)
    value = np.where(known, both.value, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second, between = (
            (pairs @ value) / (pairs @ known) for pairs in (a * b, (1 - a) * (1 - b), a + b - 2 * a * b)
        )
    return np.stack([first - second, (first + second) / 2 - between])


def _count(size: int, other: int, permutations: int) -> tuple[int, bool]:
    """How many relabelings to look at, and whether these are all."""
    if not size or not other:
        return 1, True
    count = math.comb(size + other, size) // (2 if size == other else 1)
    return (count, True) if count <= permutations else (permutations, False)


def _splits(own: NDArray[np.bool_], exact: bool, n_splits: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Memberships of the first group, in chunks of shape (split, network)."""
    n, size = len(own), int(own.sum())
    if not exact:
        generator = np.random.default_rng([seed, 5])
        for start in range(0, n_splits, CHUNK):
            yield generator.permuted(np.tile(own, (min(CHUNK, n_splits - start), 1)), axis=1)
        return
    fixed = 2 * size == n  # either half may be called the first
    chosen = np.array(list(combinations(range(n), size)), dtype=np.intp).reshape(-1, size)[:n_splits]
    assert not fixed or size == 0 or (chosen[:, 0] == 0).all()
    for start in range(0, len(chosen), CHUNK):
        part = chosen[start : start + CHUNK]
        splits = np.zeros((len(part), n), dtype=bool)
        np.put_along_axis(splits, part, True, axis=1)
        yield splits
