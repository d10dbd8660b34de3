"""Compare RDMs: every pair of two sets by one product of matrices, with chance level, error and ceiling."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
COUNTED = 16
"""Bits of the interval that the rank of one of a part of the entries is counted in."""


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


@dataclass(frozen=True)
class Ranking:
    """The order of an RDM's entries, from which ranks of any part of them follow without sorting again.

    Attributes:
        twice: Twice the rank of each entry from 1, a whole number: ties share their mean. Shape (m,).
        known: False if an entry is NaN or infinite.
    """

    twice: NDArray[np.signedinteger[Any]]
    known: bool

    def ranks(self, kept: Integers | None = None) -> Floats:
        """Ranks of all entries, or of some among themselves; NaN if any entry is not known.

        Those of some are counted in 2^`COUNTED` intervals of ranks, which a processor's cache holds. Entries
        of one interval become ties, which moves a correlation by less than 1e-7; those of an RDM with fewer
        than 2^(COUNTED - 1) entries are exact.

        Args:
            kept: Places of the entries; all when None.
        """
        twice = self.twice if kept is None else self.twice[kept]
        if not self.known:
            return np.full(len(twice), np.nan)
        if kept is None:
            return twice / 2
        interval = twice >> max(0, (2 * len(self.twice)).bit_length() - COUNTED)
        size = np.bincount(interval)
        ranks: Floats = (np.cumsum(size) - (size - 1) / 2)[interval]
        return ranks


def ranking(rdm: Floats) -> Ranking:
    """The order of an RDM's entries, shape (m,); values that differ by rounding are ties (`TIED`)."""
    m = len(rdm)
    twice: NDArray[np.signedinteger[Any]] = np.zeros(m, dtype=np.int32 if 2 * m < 2**31 else np.int64)
    order = np.argsort(rdm)
    ordered = rdm[order]
    if not np.isfinite(ordered[[0, -1]]).all():  # NaN comes last
        return Ranking(twice, known=False)
    new = np.diff(ordered) > TIED * np.abs(ordered[[0, -1]]).max()
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    ends = np.append(starts[1:], m)
    twice[order] = np.repeat(starts + ends + 1, ends - starts)
    return Ranking(twice, known=True)


@dataclass(frozen=True)
class Comparable:
    """RDMs of the same stimuli, to be compared whole or without some of the stimuli.

    Attributes:
        compare: See `comparable`.
        rdms: The RDMs, each of shape (m,), or for rank measures their rankings.
    """

    compare: Comparison
    rdms: list[Floats | Ranking]

    def form(self, without: Bools | None = None) -> Form:
        """What products give similarities of, without the stimuli marked, shape (n_stimuli,)."""
        kept = None if without is None else np.flatnonzero(entries_between(~without))
        first = next(iter(self.rdms), None)
        m = len(first.twice if isinstance(first, Ranking) else first) if first is not None else 0
        rdms = np.empty((len(self.rdms), m if kept is None else len(kept)))
        for row, rdm in zip(rdms, self.rdms, strict=True):
            if isinstance(rdm, Ranking):
                row[:] = rdm.ranks(kept)
            else:
                row[:] = rdm if kept is None else rdm[kept]
        return _whitened(rdms) if self.compare == "whitened" else _scaled(rdms, self.compare)


def comparable(rdms: Iterable[Floats], compare: Comparison) -> Comparable:
    """RDMs made ready to be compared.

    Args:
        rdms: Each of shape (m,), or all of shape (n_rdms, m); taken one by one, so that rank measures need
            not have them all at once.
        compare: spearman (correlation of ranks), rho-a (its mean over random orders of ties:
            12 Σ r s/(m³ − m) of centred ranks), pearson, cosine, or whitened: cosine after whitening with the
            covariance V of squared distances of patterns without structure.

    Raises:
        ValueError: If no comparison is called so.

    References:
        Nili et al., "A toolbox for representational similarity analysis", PLoS Comput. Biol. 10 (2014).
        Schütt et al., "Statistical inference on representational geometries", eLife 12 (2023) (rho-a, eq. 5).
        Diedrichsen et al., "Comparing representational geometries using whitened unbiased-distance-matrix
        similarity", Neurons, Behavior, Data analysis, and Theory 5 (2021) (V, and its relation to CKA).
    """
    if compare not in get_args(Comparison):
        raise ValueError(f"no comparison is called {compare!r}")
    by_rank = compare in ("spearman", "rho-a")
    return Comparable(compare, [ranking(rdm) if by_rank else np.asarray(rdm) for rdm in rdms])


def _scaled(rdms: Floats, compare: Comparison) -> Form:
    """Of length 1, or for rho-a of the length that ranks without ties have; in place."""
    m, level = rdms.shape[1], np.zeros(len(rdms))
    if compare == "cosine":
        length = _length(rdms, level)
        level = np.sqrt(m) * rdms.mean(1) / length
    else:
        scale = np.maximum(rdms.max(1, initial=0.0), -rdms.min(1, initial=0.0)) * np.sqrt(m)
        rdms -= rdms.mean(1, keepdims=True)
        length = _length(rdms, scale)
    if compare == "rho-a":
        length = np.where(np.isfinite(length), np.sqrt((float(m) ** 3 - m) / 12), np.nan)
    rdms /= length[:, None]
    return Form(rdms, None, level)


def _length(vectors: Floats, scale: Floats) -> Floats:
    """‖v‖; NaN where it is rounding of a vector of the given scale."""
    length = np.sqrt([row @ row for row in vectors])
    return np.where(length > 1e-12 * scale, length, np.nan)


def _whitened(rdms: Floats) -> Form:
    """V = 2I + AAᵀ, where A says which stimuli an entry is between, inverted in closed form.

    V⁻¹r = ½(r − A(nI + 11ᵀ)⁻¹Aᵀr), so that the n⁴/4 numbers of V are never there. For squared distances
    r·V⁻¹s is a multiple of the inner product of the double-centred Gram matrices: biased linear CKA. Under
    permuted stimuli it is tr K tr L/(n − 1) on average, and tr K is proportional to the sum of the RDM.
    """
    n = n_stimuli(rdms.shape[1])
    right, level = np.empty_like(rdms), np.empty(len(rdms))
    upper = np.triu(np.ones((n, n), dtype=bool), 1)
    for i, rdm in enumerate(rdms):
        sums = row_sums(rdm)
        weight = (sums - sums.sum() / (2 * n)) / n
        right[i] = (rdm - (weight[:, None] + weight)[upper]) / 2
        size = float(rdm @ right[i])
        length = np.sqrt(size) if size > 1e-24 * float(rdm @ rdm) else np.nan
        # rᵀV⁻¹s = ⟨K, L⟩ with K = −½HDH, and tr K = Σd/n
        level[i] = rdm.sum() / n / (length * np.sqrt(n - 1))
        rdm /= length
        right[i] /= length
    return Form(rdms, right, level)


def similarities(rdms_a: Floats, rdms_b: Floats, compare: Comparison) -> Floats:
    """Similarity of every RDM of one set to every one of another, shape (n_a, n_b).

    Args:
        rdms_a: Shape (n_a, m).
        rdms_b: Shape (n_b, m), of the same stimuli.
        compare: See `comparable`.
    """
    one = comparable(rdms_a, compare).form()
    return one @ (one if rdms_b is rdms_a else comparable(rdms_b, compare).form())


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
    (cosine) or to z-scores (pearson), as in rsatoolbox, or of RDMs scaled to one whitened length (whitened,
    where rsatoolbox scales as for cosine): what makes no model exceed the mean of `upper`. The mean of
    `upper` is exceeded by no model; that of `lower` is what the best model can be expected to reach.

    Args:
        rdms: Of the same stimuli, shape (n_networks, m), at least 2.
        compare: See `comparable`.

    Raises:
        ValueError: If there is one RDM.

    References:
        Nili et al., "A toolbox for representational similarity analysis", PLoS Comput. Biol. 10 (2014).
    """
    n = len(rdms)
    if n < 2:
        raise ValueError("a ceiling needs two RDMs")
    form = comparable(rdms, compare).form()
    # pooled as they are: ranks, not ranks of length one, which ties would make to differ
    parts = comparable(rdms, "rho-a").form().left if compare == "spearman" else form.left
    total = parts.sum(0)

    def to(pooled: Floats) -> Floats:
        return (form @ comparable([pooled], compare).form())[:, 0]

    lower = np.array([to(total - own)[i] for i, own in enumerate(parts)])
    return Ceiling(lower, to(total))


def ceiling_of_similarities(similarity: NDArray[np.floating]) -> Ceiling:
    """The ceiling from similarities of pairs alone, without the RDMs.

    With RDMs of length one, pooling is adding: the similarity of i to the pooled RDM of a set P is
    Σ_{j∈P} s_ij / √(Σ_{j,k∈P} s_jk). That is `noise_ceiling` for pearson, cosine and whitened; for spearman
    it compares with the mean of ranks as it is, not ranked again, which differs by little.

    Args:
        similarity: Of every two networks, on the diagonal of each to itself (1; below it for rho-a with
            ties), shape (n_networks, n_networks).
    """
    s = np.asarray(similarity, dtype=np.float64)
    sums, own = s.sum(1), np.diagonal(s)
    with np.errstate(invalid="ignore", divide="ignore"):
        upper = sums / np.sqrt(s.sum())
        lower = (sums - own) / np.sqrt(s.sum() - 2 * sums + own)
    return Ceiling(lower, upper)
