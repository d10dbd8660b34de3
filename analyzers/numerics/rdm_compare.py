"""Compare RDMs: every pair of two sets by one product of matrices, with chance level, error and ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers.numerics.rdm import (
    Bools,
    Floats,
    Integers,
    entries_between,
    n_stimuli,
    permuted_entries,
    row_sums,
)

Comparison = Literal["spearman", "rho-a", "pearson", "cosine", "whitened"]
TIED = 1e-12
"""Dissimilarities closer than this part of the largest are ties: rounding would rank equal ones at random."""


@dataclass(frozen=True)
class Form:
    """RDMs in a form whose products are similarities: similarity = left of one · right of the other.

    Attributes:
        left: Shape (n_rdms, m); NaN where an RDM has no direction (all its entries are one value).
        right: The same where None.
        chance: Factor of each RDM in the similarity that permuted stimuli have on average, shape (n_rdms,).
    """

    left: Floats
    right: Floats | None
    chance: Floats

    def __matmul__(self, other: Form) -> Floats:
        """Similarity of every RDM to every one of another set, shape (n_rdms, n_others)."""
        similarity: Floats = self.left @ (other.left if other.right is None else other.right).T
        return similarity

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.left.nbytes + (0 if self.right is None else self.right.nbytes)


class Ranking:
    """The order of an RDM's entries, from which ranks of any part of them follow without sorting again."""

    def __init__(self, rdm: Floats) -> None:
        self._order = np.argsort(rdm)
        ordered = rdm[self._order]
        scale = np.abs(ordered[[0, -1]]).max()
        self._new = np.concatenate([[False], np.diff(ordered) > TIED * scale])
        self._known = bool(np.isfinite(ordered).all())

    def ranks(self, kept: Bools | None = None) -> Floats:
        """Ranks from 1, ties share their mean; of the kept entries among themselves; NaN if any entry is."""
        if not self._known:
            return np.full(len(self._order) if kept is None else int(kept.sum()), np.nan)
        order, starts = self._order, np.flatnonzero(self._new)
        if kept is not None:
            chosen = kept[order]
            order = (np.cumsum(kept) - 1)[order[chosen]]
            starts = np.flatnonzero(np.diff(np.cumsum(self._new)[chosen])) + 1
        ends = np.append(starts, len(order))  # of the groups of ties
        sizes = np.diff(ends, prepend=0)
        ranks = np.empty(len(order))
        ranks[order] = np.repeat(ends - (sizes - 1) / 2, sizes)
        return ranks


class Comparable:
    """RDMs of the same stimuli, to be compared whole or without some of the stimuli.

    Args:
        rdms: Shape (n_rdms, m).
        compare: spearman (correlation of ranks), rho-a (its mean over random orders of ties:
            12 Σ r s/(m³ − m) of centred ranks), pearson, cosine, or whitened: cosine after whitening with the
            covariance V of squared distances of patterns without structure.

    References:
        Nili et al., "A toolbox for representational similarity analysis", PLoS Comput. Biol. 10 (2014).
        Schütt et al., "Statistical inference on representational geometries", eLife 12 (2023) (rho-a, eq. 5).
        Diedrichsen et al., "Comparing representational geometries using whitened unbiased-distance-matrix
        similarity", Neurons, Behavior, Data analysis, and Theory 5 (2021) (V, and its relation to CKA).
    """

    def __init__(self, rdms: Floats, compare: Comparison) -> None:
        if compare not in get_args(Comparison):
            raise ValueError(f"no comparison is called {compare!r}")
        self.rdms = np.atleast_2d(rdms)
        self.compare: Comparison = compare
        by_rank = compare in ("spearman", "rho-a")
        self._rankings = [Ranking(rdm) for rdm in self.rdms] if by_rank else []

    def form(self, without: Bools | None = None) -> Form:
        """What products give similarities of, without the stimuli marked, shape (n_stimuli,)."""
        kept = None if without is None else entries_between(~without)
        if self._rankings:
            ranks = [ranking.ranks(kept) for ranking in self._rankings]
            rdms = np.stack(ranks) if ranks else np.zeros((0, self.rdms.shape[1]))
        else:
            rdms = self.rdms if kept is None else self.rdms[:, kept]
        return _form(rdms, self.compare)


def _form(rdms: Floats, compare: Comparison) -> Form:
    m = rdms.shape[1]
    if compare == "whitened":
        return _whitened(rdms)
    if compare == "cosine":
        length = _length(rdms, np.zeros(len(rdms)))
        return Form(rdms / length, None, np.sqrt(m) * rdms.mean(1) / length[:, 0])
    centred = rdms - rdms.mean(1, keepdims=True)
    length = _length(centred, np.abs(rdms).max(1, initial=0.0) * np.sqrt(m))
    if compare == "rho-a":
        scale = np.sqrt(12 / (float(m) ** 3 - m)) if m > 1 else np.nan
        length = np.where(np.isfinite(length), 1 / scale, np.nan)
    return Form(centred / length, None, np.zeros(len(rdms)))


def _length(vectors: Floats, scale: Floats) -> Floats:
    """‖v‖ as a column; NaN where it is rounding of a vector of the given scale."""
    length = np.linalg.norm(vectors, axis=1)
    return np.where(length > 1e-12 * scale, length, np.nan)[:, None]


def _whitened(rdms: Floats) -> Form:
    """V = 2I + AAᵀ, where A says which stimuli an entry is between, inverted in closed form.

    V⁻¹r = ½(r − A(nI + 11ᵀ)⁻¹Aᵀr), so that the n⁴/4 numbers of V are never there. For squared distances
    r·V⁻¹s is a multiple of the inner product of the double-centred Gram matrices: biased linear CKA. Under
    permuted stimuli it is tr K tr L/(n − 1) on average, and tr K is proportional to the sum of the RDM.
    """
    n = n_stimuli(rdms.shape[1])
    sums = row_sums(rdms)
    weight = (sums - sums.sum(1, keepdims=True) / (2 * n)) / n
    rows, columns = np.triu_indices(n, 1)
    right = rdms - weight[:, rows]
    right -= weight[:, columns]
    right /= 2
    size = np.einsum("ij,ij->i", rdms, right)
    length = np.sqrt(np.where(size > 1e-24 * (rdms**2).sum(1), size, np.nan))[:, None]
    # rᵀV⁻¹s = ⟨K, L⟩ with K = −½HDH, and tr K = Σd/n
    trace = rdms.sum(1) / n
    return Form(rdms / length, right / length, trace / (length[:, 0] * np.sqrt(n - 1)))


def similarities(rdms_a: Floats, rdms_b: Floats, compare: Comparison) -> Floats:
    """Similarity of every RDM of one set to every one of another, shape (n_a, n_b).

    Args:
        rdms_a: Shape (n_a, m).
        rdms_b: Shape (n_b, m), of the same stimuli.
        compare: See `Comparable`.
    """
    one = Comparable(rdms_a, compare).form()
    return one @ (one if rdms_b is rdms_a else Comparable(rdms_b, compare).form())


def chance(one: Form, other: Form) -> Floats:
    """Mean of the similarity over all permutations of the stimuli of one side, shape (n_rdms, n_others).

    0 for spearman, pearson and rho-a; the product of means over that of lengths, times m, for cosine;
    tr K tr L/((n − 1)‖K‖‖L‖) of the double-centred matrices for whitened.
    """
    level: Floats = np.outer(one.chance, other.chance)
    return level + 0.0 * (one.left[:, :1] + other.left[:, :1].T)  # unknown where the similarity is


def permutation_p(one: Form, other: Form, permutations: int, seed: int = 0) -> Floats:
    """How often permuted stimuli give as large a similarity: (1 + hits)/(1 + permutations), one-sided.

    Args:
        one: RDMs whose stimuli stay.
        other: RDMs whose stimuli are permuted, all alike.
        permutations: How many are drawn.
        seed: Of the draws.

    Returns:
        Shape (n_rdms, n_others).
    """
    observed = one @ other
    generator = torch.Generator().manual_seed(seed)
    right = other.left if other.right is None else other.right
    n, hits = n_stimuli(right.shape[1]), np.zeros(observed.shape)
    for _ in range(permutations):
        entries = permuted_entries(torch.randperm(n, generator=generator).numpy())
        hits += one.left @ right[:, entries].T >= observed - 1e-12
    return np.where(np.isfinite(observed), (1 + hits) / (1 + permutations), np.nan)


@dataclass(frozen=True)
class Ceiling:
    """How similar a perfect model could be, given that the RDMs differ between subjects or networks.

    Attributes:
        lower: Similarity of each RDM to the pooled RDM of all others, shape (n_networks,).
        upper: To the pooled RDM of all, itself included, shape (n_networks,).
    """

    lower: Floats
    upper: Floats


def noise_ceiling(rdms: Floats, compare: Comparison) -> Ceiling:
    """Similarity of each RDM to the pooled ones, of all (upper) and of all others (lower).

    Pooled is the mean of ranks (spearman, rho-a; ranked again), of RDMs scaled to one root mean square
    (cosine), to one whitened length (whitened) or to z-scores (pearson), as in rsatoolbox. The mean of
    `upper` is exceeded by no model; that of `lower` is what the best model can be expected to reach.

    Args:
        rdms: Of the same stimuli, shape (n_networks, m), at least 2.
        compare: See `Comparable`.

    Raises:
        ValueError: If there is one RDM.

    References:
        Nili et al., "A toolbox for representational similarity analysis", PLoS Comput. Biol. 10 (2014).
    """
    n = len(rdms)
    if n < 2:
        raise ValueError("a ceiling needs two RDMs")
    form = Comparable(rdms, compare).form()
    # pooled as they are: ranks, not ranks of length one, which ties would make to differ
    parts = Comparable(rdms, "rho-a").form().left if compare == "spearman" else form.left
    total = parts.sum(0)

    def to(pooled: Floats) -> Floats:
        return (form @ Comparable(pooled, compare).form())[:, 0]

    lower = np.array([to(total - own)[i] for i, own in enumerate(parts)])
    return Ceiling(lower, to(total))


def ceiling_of_similarities(similarity: NDArray[np.floating]) -> Ceiling:
    """The ceiling from similarities of pairs alone, without the RDMs.

    With RDMs of length one, pooling is adding: the similarity of i to the pooled RDM of a set P is
    Σ_{j∈P} s_ij / √(Σ_{j,k∈P} s_jk). That is `noise_ceiling` for pearson, cosine and whitened; for spearman
    it compares with the mean of ranks as it is, not ranked again, which differs by little.

    Args:
        similarity: Of every two networks, 1 on the diagonal, shape (n_networks, n_networks).
    """
    s = np.asarray(similarity, dtype=np.float64)
    sums, own = s.sum(1), np.diagonal(s)
    with np.errstate(invalid="ignore", divide="ignore"):
        upper = sums / np.sqrt(s.sum())
        lower = (sums - own) / np.sqrt(s.sum() - 2 * sums + own)
    return Ceiling(lower, upper)


def jackknife(one: Comparable, other: Comparable, block: Integers) -> Floats:
    """The similarities with each block of stimuli left out, shape (n_rdms, n_others, n_blocks).

    Args:
        one: RDMs.
        other: RDMs of the same stimuli.
        block: Block of each stimulus, shape (n_stimuli,).
    """
    return np.stack([one.form(block == b) @ other.form(block == b) for b in range(int(block.max()) + 1)], -1)
