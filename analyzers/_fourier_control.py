"""The control of `fourier`: residuals that keep their sizes and classes, and lose where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 8
"""Of the control: two draws more change the joint error of a difference by a hundredth."""
FEWEST = 5
"""Samples with the same target, on average, from which on they are a class."""
BINS, BIN = 10, 20
"""Least bins of a target that has no classes, by its quantiles, and samples in one where there are more."""


def classes_of(target: Tensor) -> Tensor:
    """Class of each sample: samples of the same target, or else of the same quantiles of it.

    A target of several outputs without classes is binned along its first principal direction.

    Args:
        target: Shape (n_samples, n_outputs).

    Returns:
        Shape (n_samples,).
    """
    n = len(target)
    place: Tensor
    different, place = torch.unique(target, dim=0, return_inverse=True)
    if len(different) * FEWEST <= n:
        return place
    values = target - target.mean(0)
    if values.shape[1] > 1:
        values = values @ torch.linalg.eigh(values.T @ values).eigenvectors[:, -1:]
    _values, tied, counts = torch.unique(values[:, 0], return_inverse=True, return_counts=True)
    # the middle of their ranks for all that are equal: else the order of the samples would part them
    rank = (counts.cumsum(0) - (counts + 1) / 2)[tied]
    bins = max(1, min(max(BINS, n // BIN), n // FEWEST))
    return torch.div(rank * bins, n, rounding_mode="floor").long()


def permuted_within(classes: Tensor, seed: int) -> Tensor:
    """A permutation of the samples that moves each to a place of its own class, shape (n_samples,)."""
    n = len(classes)
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(classes.device)
    found = torch.empty(n, dtype=torch.int64, device=classes.device)
    # both lists run through the classes in the same order, the second at random within each
    found[classes.argsort(stable=True)] = drawn[classes[drawn].argsort(stable=True)]
    return found
