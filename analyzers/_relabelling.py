"""Tests of whether groups of networks differ, by relabelling their networks.

Pairs share networks, so a test that takes them as independent finds a difference where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._networks import FEWEST, Networks, group_means
from dynprobe.analyzers._pair_table import ROUNDING

Floats = NDArray[np.float64]

CHUNK = 200
"""Relabelings whose sums are in memory at once."""
TIE = 1e-9
"""Relative: statistics of two relabelings this close are equal, and differ by the order of summation."""


@dataclass(frozen=True)
class Test:
    """Two groups compared by relabelling their networks.

    Args:
        difference: Mean within the first group less that within the second, shape (layer,).
        cohesion: Mean of both less the mean between them, shape (layer,).
        difference_p: Two-sided p-value, shape (layer,); NaN with fewer than three networks in a group.
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

    All of them where there are no more than `permutations`, else (1 + hits)/(1 + permutations) of random ones
    (Phipson and Smyth 2010). Where both groups have one size, exchanging their names changes nothing, so five
    and five networks have 126 distinct relabelings.

    Cohesion: the mean within both groups less that between them, from the pairs under every relabelling. Its
    p-value is exact where no network differs from another.

    Difference: a group with a network of the other in it would be filled with pairs between the groups, which
    say nothing about either and are far below both where groups are apart. So what is relabelled is one
    number for each network, its share in the mean of its own group: the jackknife's pseudo-value
    nθ − (n−1)θ₍₋ᵢ₎ of the mean θ over the pairs of n networks (Arvesen 1969). The statistic is Welch's t of
    the pseudo-values: with a plain difference, groups of different size and spread differ too often (Janssen
    1997). Simulated error rates at the 5 % level, groups of 3 to 8: 3 to 6 % where similarity varies between
    networks; about 1 % where it varies between pairs alone, a spread that the jackknife overestimates; up to
    10 % where one group varies three times as much as a larger one. It needs three networks in each group.

    Args:
        networks: The networks.
        g: The first group.
        h: The second.
        permutations: How many relabelings to look at.
        seed: Of random ones.

    References:
        Arvesen, "Jackknifing U-statistics", Annals of Mathematical Statistics 40 (1969). Janssen,
        "Studentized permutation tests for non-i.i.d. hypotheses and the generalized Behrens-Fisher problem",
        Statistics and Probability Letters 36 (1997). Phipson and Smyth, "Permutation P-values should never be
        zero", Statistical Applications in Genetics and Molecular Biology 9 (2010).
    """
    both = networks.of(g, h)
    own = both.group == 0
    sizes = int(own.sum()), int((~own).sum())
    n_splits, exact = _count(*sizes, permutations)
    splits = list(_splits(own, exact, n_splits, seed))
    first, second = group_means(both, 2)[:2]
    cohesion_p, cohesion_p_layers = _p_values(
        _cohesion(both, own[None])[0], np.concatenate([_cohesion(both, part) for part in splits]), exact
    )
    pseudo = _pseudo_values(both) if min(sizes) >= FEWEST else np.full((len(own), len(first)), np.nan)
    difference_p, difference_p_layers = _p_values(
        np.abs(_welch_t(pseudo, own[None])[0]),
        np.abs(np.concatenate([_welch_t(pseudo, part) for part in splits])),
        exact,
    )
    return Test(
        difference=first - second,
        cohesion=_cohesion(both, own[None])[0],
        difference_p=difference_p,
        cohesion_p=cohesion_p,
        difference_p_layers=difference_p_layers,
        cohesion_p_layers=cohesion_p_layers,
        n_splits=n_splits,
        smallest_p=1 / n_splits if exact else 1 / (1 + n_splits),
    )


def _p_values(own: Floats, found: Floats, exact: bool) -> tuple[Floats, Floats]:
    """p-values of each layer and corrected for all of them; large values speak for the claim.

    Args:
        own: The statistic with the networks' own labels, shape (layer,).
        found: Under relabelings, shape (split, layer); own among them where they are all.
        exact: Whether they are all.
    """
    # each layer in units of its own spread: else the layer that varies most decides for all
    known = np.isfinite(found)
    spread = np.sqrt(np.where(known, found**2, 0.0).sum(0) / np.maximum(known.sum(0), 1))
    spread = np.where(spread > 0, spread, 1.0)
    size = np.where(known, found, np.inf) / spread  # a split without a value counts against the claim
    size[:, ~np.isfinite(own)] = -np.inf
    own_size = own / spread
    own_size -= TIE * np.maximum(np.abs(own_size), 1)
    hits, layers_hits = ((x >= own_size).sum(0) for x in (size, size.max(1, initial=-np.inf)[:, None]))
    n_splits, drawn = len(found), not exact
    p, p_layers = (
        np.where(np.isfinite(own), (x + drawn) / (n_splits + drawn), np.nan) for x in (hits, layers_hits)
    )
    return p, p_layers


def _cohesion(both: Networks, splits: NDArray[np.bool_]) -> Floats:
    """Mean within less mean between for every split into two groups, shape (split, layer)."""
    x = splits.astype(np.float64)
    a, b = x[:, both.first], x[:, both.second]
    known = np.isfinite(both.value)
    value = np.where(known, both.value, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second, between = (
            (pairs @ value) / (pairs @ known) for pairs in (a * b, (1 - a) * (1 - b), a + b - 2 * a * b)
        )
    return np.asarray((first + second) / 2 - between)


def _pseudo_values(networks: Networks) -> Floats:
    """Share of every network in the mean of its own group, shape (network, layer); NaN without a pair."""
    within = networks.group[networks.first] == networks.group[networks.second]
    pairs = np.zeros((len(networks.group), int(within.sum())))
    for ends in (networks.first, networks.second):
        pairs[ends[within], range(pairs.shape[1])] = 1
    known = np.isfinite(networks.value[within]).astype(np.float64)
    total, count = pairs @ np.where(known > 0, networks.value[within], 0.0), pairs @ known
    same = (networks.group[:, None] == networks.group).astype(np.float64)
    n = same @ (count > 0)
    group_total, group_count = same @ total / 2, same @ count / 2  # every pair has two ends
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (group_total - total) / (group_count - count)
        pseudo = n * group_total / group_count - (n - 1) * without
    return np.where(count > 0, pseudo, np.nan)


def _welch_t(values: Floats, splits: NDArray[np.bool_]) -> Floats:
    """Welch's t between two groups of networks for every split, shape (network, layer) to (split, layer)."""
    known = np.isfinite(values)
    means, variances = [], []
    for x in (splits.astype(np.float64), (~splits).astype(np.float64)):
        n = x @ known
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (x @ np.where(known, values, 0.0)) / n
            apart = np.where(known, values - mean[:, None], 0.0)
            variances.append(np.einsum("sn,snl->sl", x, apart**2) / (n * (n - 1)))
        means.append(mean)
    return np.asarray((means[0] - means[1]) / np.sqrt(variances[0] + variances[1] + ROUNDING**2))


def n_relabelings(size: int, other: int) -> int:
    """How many distinct relabelings two groups of these sizes have."""
    return math.comb(size + other, size) // (2 if size == other else 1)


def _count(size: int, other: int, permutations: int) -> tuple[int, bool]:
    """How many relabelings to look at, and whether these are all."""
    if not size or not other:
        return 1, True
    count = n_relabelings(size, other)
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
    chosen = np.array(list(combinations(range(n), size)), dtype=np.intp)
    chosen = chosen.reshape(math.comb(n, size), size)[:n_splits]
    assert not fixed or size == 0 or (chosen[:, 0] == 0).all()
    for start in range(0, len(chosen), CHUNK):
        part = chosen[start : start + CHUNK]
        splits = np.zeros((len(part), n), dtype=bool)
        np.put_along_axis(splits, part, True, axis=1)
        yield splits
