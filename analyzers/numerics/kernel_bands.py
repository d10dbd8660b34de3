"""How far outputs are from a target in bands of eigenvectors of a Gaussian kernel, smooth ones first.

The eigenvectors of K_ij = exp(−|x_i − x_j|²/(2δ)) on the samples take the place of sinusoids: leading ones
vary slowly over the data, later ones ever faster. They need no direction and no grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers.numerics.covariance import leading_eigenpairs

Floats = NDArray[np.float64]
Band = tuple[int, int | None]

BANDS: tuple[Band, ...] = ((1, 10), (11, 50), (51, 200), (201, None))
LEAST_SHARE = 1e-4
"""A band with less of the target than this has no relative error worth the name."""
PARTS = 4
"""Disjoint parts of the samples, each in an eigenbasis of its own, that the standard errors come from."""


class KernelBands(TypedDict):
    """Errors by band, of outputs at t checkpoints.

    error: Root of Σ|residual|² over Σ|target|² in the band, shape (t, band). NaN where the band holds less
        than 1e-4 of the target, is empty, or reaches beyond `n_resolved`.
    error_stderr: Its standard error, from the spread over four disjoint parts of the samples; NaN where one
        of them has no such band.
    share: Part of the target's sum of squares in the band, shape (band,). NaN where the band is not defined.
    n_samples: Samples used.
    n_resolved: Of the eigenvalues that bands need, how many stand out of rounding; later ones are in no
        order.
    delta: δ, the median squared distance, in squared units of the inputs.
    """

    error: Floats
    error_stderr: Floats
    share: Floats
    n_samples: int
    n_resolved: int
    delta: float


def kernel_bands(
    inputs: Tensor,
    target: Tensor,
    output: Tensor,
    *,
    bands: Sequence[Band] = BANDS,
    max_samples: int = 3000,
    seed: int = 0,
) -> KernelBands:
    """Relative error of outputs within bands of eigenvectors of the Gaussian kernel of the inputs.

    Target, outputs and kernel are centred, so that the constant belongs to no band. A band without an end is
    what the ones before it leave, whether or not its own eigenvectors are resolved.

    Args:
        inputs: Shape (n, …), flattened to (n, d).
        target: Shape (n, c).
        output: Shape (t, n, c).
        bands: First and last eigenvector of each, counted from 1, last None for all the rest.
        max_samples: A subset of so many is drawn where there are more: cost grows as their cube (3.6 s of
            one core for 3000), memory as their square.
        seed: Of the subset and of the parts for the standard error.

    Returns:
        See `KernelBands`.

    Raises:
        ValueError: If inputs or targets are not finite, or more than half of the inputs are the same.

    References:
        Rahaman et al., "On the Spectral Bias of Neural Networks", ICML 2019, arXiv 1806.08734, section 4
        (spectrum in the eigenbasis of a Gaussian kernel; the width there is a constant of the data set).
    """
    if not (inputs.isfinite().all() and target.isfinite().all()):
        raise ValueError("kernel bands need inputs and targets without NaN or infinity")
    n = min(len(inputs), max_samples)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:n]
    squared = _squared_distances(inputs.detach()[order.to(inputs.device)].flatten(1))
    rows = order.to(target.device)
    values = torch.cat([target[rows][None].to(output.dtype), output[:, rows]])
    held = values.double().movedim(1, 0).cpu().numpy()  # (n, 1 + t, c), the target first
    delta = _median(squared)
    kernel = np.exp(squared / (-2 * delta))
    parts = [np.arange(i, n, PARTS) for i in range(PARTS)]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # outputs of a diverged network
        share, error, n_resolved = _in_bands(kernel, held, bands)
        apart = np.stack([_in_bands(kernel[np.ix_(part, part)], held[part], bands)[1] for part in parts])
    return {
        "error": error,
        "error_stderr": apart.std(0, ddof=1) / math.sqrt(PARTS),
        "share": share,
        "n_samples": n,
        "n_resolved": n_resolved,
        "delta": delta,
    }


def _squared_distances(x: Tensor) -> Floats:
    x = x.double() - x.mean(0, dtype=torch.float64)
    size = x.square().sum(1)
    squared = (size[:, None] + size).addmm_(x, x.T, alpha=-2).clamp_(min=0)
    found: Floats = squared.fill_diagonal_(0).cpu().numpy()
    return found


def _median(squared: Floats) -> float:
    if len(squared) < 2 or not (median := float(np.median(squared[np.triu_indices(len(squared), 1)]))) > 0:
        raise ValueError("kernel bands need inputs of which more than half differ")
    return median


def _in_bands(kernel: Floats, values: Floats, bands: Sequence[Band]) -> tuple[Floats, Floats, int]:
    """Share of the target and relative errors by band, and how many eigenvalues are resolved.

    Args:
        kernel: Shape (n, n).
        values: Target, then outputs, shape (n, 1 + t, c).
        bands: As in `kernel_bands`.

    Returns:
        Shapes (band,) and (t, band).
    """
    n = len(kernel)
    mean = kernel.mean(0)
    centred = kernel - mean - mean[:, None] + mean.mean()
    wanted = max((min(last, n - 1) if last else min(first - 1, n - 1)) for first, last in bands)
    eigenvalue, vector = leading_eigenpairs(centred, max(wanted, 1))
    n_resolved = int((eigenvalue > n * np.finfo(float).eps * eigenvalue[0]).sum())
    values = values - values.mean(0)
    target, residual = values[:, :1], values[:, 1:] - values[:, :1]
    both = np.concatenate([target, residual], 1)
    total = np.square(both).sum((0, 2))
    squares = np.square(np.tensordot(vector, both, (0, 0))).sum(2)
    power = np.full((len(bands), both.shape[1]), math.nan)
    for row, (first, last) in enumerate(bands):
        end = min(last, n - 1) if last else first - 1
        if first <= n - 1 and end <= n_resolved:
            inside = squares[first - 1 : end].sum(0)
            power[row] = inside if last else np.maximum(total - squares[:end].sum(0), 0.0)
    share = power[:, 0] / total[0]
    error = np.sqrt(power[:, 1:] / power[:, :1])
    error[~(share >= LEAST_SHARE)] = math.nan
    return share, error.T, n_resolved
