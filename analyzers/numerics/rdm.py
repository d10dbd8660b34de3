"""Representational dissimilarity matrices (RDMs): how different a network finds every two stimuli.

An RDM of n stimuli is kept as the m = n(n−1)/2 entries above its diagonal, row by row, as in scipy's `pdist`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]
Measure = Literal["correlation", "cosine", "euclidean", "sqeuclidean"]

FEATURES_AT_ONCE = 4096
"""Features whose products are summed at once: bounds the float64 copy of what was recorded in float32."""
ROUNDING = 1e-13
"""A dissimilarity below this part of what it is a difference of is rounding: such patterns are equal."""


def n_entries(n_stimuli: int) -> int:
    """Number of pairs of n stimuli, n(n−1)/2."""
    return n_stimuli * (n_stimuli - 1) // 2


def n_stimuli(n_entries: int) -> int:
    """How many stimuli an RDM with so many entries has.

    Raises:
        ValueError: If no RDM has as many.
    """
    n = (1 + math.isqrt(1 + 8 * n_entries)) // 2
    if n * (n - 1) // 2 != n_entries or n_entries < 1:
        raise ValueError(f"{n_entries} is not n(n-1)/2 of a whole n")
    return n


def condensed(matrix: NDArray[np.floating]) -> Floats:
    """The entries above the diagonal of an (n, n) matrix, shape (n(n−1)/2,)."""
    upper: Floats = np.asarray(matrix, dtype=np.float64)[np.triu_indices(len(matrix), 1)]
    return upper


def entries_between(kept: Bools) -> Bools:
    """Which entries of an RDM are left when only some stimuli are kept, (n_stimuli,) to (n_entries,)."""
    return np.concatenate([kept[i] & kept[i + 1 :] for i in range(len(kept) - 1)])


def permuted_entries(order: Integers) -> Integers:
    """Where the entries of an RDM of permuted stimuli lie in the RDM, (n_stimuli,) to (n_entries,)."""
    n = len(order)
    rows, columns = np.triu_indices(n, 1)
    low, high = np.minimum(order[rows], order[columns]), np.maximum(order[rows], order[columns])
    places: Integers = low * (2 * n - low - 1) // 2 + high - low - 1
    return places


def row_sums(rdms: Floats) -> Floats:
    """Sum of each stimulus' dissimilarities to all others, (…, m) to (…, n)."""
    n = n_stimuli(rdms.shape[-1])
    sums = np.zeros((*rdms.shape[:-1], n))
    start = 0
    for i in range(n - 1):
        row = rdms[..., start : start + n - 1 - i]
        sums[..., i] += row.sum(-1)
        sums[..., i + 1 :] += row
        start += n - 1 - i
    return sums


def condition_means(values: Tensor, condition: Integers) -> Tensor:
    """Mean pattern of each condition, float64.

    Args:
        values: Patterns, shape (n_samples, n_features).
        condition: Which condition each sample belongs to, 0, 1, …, shape (n_samples,).

    Returns:
        Shape (n_conditions, n_features).
    """
    index = torch.as_tensor(condition, device=values.device)
    count = torch.bincount(index)
    sums = torch.zeros((len(count), values.shape[1]), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, index, values.double()) / count[:, None]


def dissimilarities(patterns: Tensor, measure: Measure) -> Floats:
    """How different every two patterns are.

    correlation is 1 − r and cosine 1 − cos of two patterns; sqeuclidean is their squared distance divided by
    the number of features, as in rsatoolbox, so that layers of different width have one scale; euclidean its
    root. Exactly 0 where two patterns are equal but for rounding.

    Args:
        patterns: Shape (n_stimuli, n_features), any floating-point type; products are summed in float64.
        measure: Which dissimilarity.

    Returns:
        Shape (m,). For correlation NaN where a pattern has one value in all its features (no variance), for
        cosine where it is zero.

    Raises:
        ValueError: If there are fewer than two patterns.

    References:
        Kriegeskorte, Mur and Bandettini, "Representational similarity analysis", Front. Syst. Neurosci. 2
        (2008).
        Walther et al., "Reliability of dissimilarity measures for multi-voxel pattern analysis", NeuroImage
        137 (2016).
    """
    if measure not in get_args(Measure):
        raise ValueError(f"no dissimilarity is called {measure!r}")
    if len(patterns) < 2:
        raise ValueError(f"{len(patterns)} pattern: an RDM needs two")
    of_distances = measure in ("euclidean", "sqeuclidean")
    gram = gram_of_patterns(patterns, "stimuli" if of_distances else "features", centre=measure != "cosine")
    squared = gram.diagonal().clone()
    upper = torch.ones_like(gram, dtype=torch.bool).triu(1)
    if of_distances:
        size = (squared[:, None] + squared)[upper]
        found = gram[upper].mul_(-2).add_(size)
        found[found < ROUNDING * size] = 0.0
        found /= patterns.shape[1]
        found = found.sqrt_() if measure == "euclidean" else found
    else:
        length = squared.sqrt()
        length[length <= ROUNDING * _uncentred_length(patterns)] = math.nan
        gram /= length[:, None] * length
        found = gram[upper].neg_().add_(1)
        found[found < ROUNDING] = 0.0
    return found.cpu().numpy()


def gram_of_patterns(
    patterns: Tensor, over: Literal["stimuli", "features"], *, centre: bool = True
) -> Tensor:
    """Inner products of centred patterns, shape (n_stimuli, n_stimuli), float64.

    Centring first keeps what products of large means would lose.

    Args:
        patterns: Shape (n_stimuli, n_features).
        over: Whose mean is taken off: every feature's over stimuli, or every pattern's over features.
        centre: Whether one is.
    """
    n, width = patterns.shape
    gram = torch.zeros((n, n), dtype=torch.float64, device=patterns.device)
    mean = patterns.mean(1, keepdim=True, dtype=torch.float64)
    for start in range(0, width, FEATURES_AT_ONCE):
        part = patterns[:, start : start + FEATURES_AT_ONCE].double()
        if centre:
            part = part - (mean if over == "features" else part.mean(0))
        gram.addmm_(part, part.T)
    return gram


def _uncentred_length(patterns: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(patterns, dim=1, dtype=torch.float64)
    return length
