"""The mean of HSIC over orders of the samples of one layer: what layers share that have nothing in common.

Where several rows belong to a sample (positions, tokens) an order of the samples moves whole blocks of rows,
and what blocks have in common whatever their samples, as the positions of a map, is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprobe.analyzers.numerics.hsic import Kernels

CHUNK = 2048
"""Rows whose products are summed in the working type before they go to a float64 sum."""


@dataclass(frozen=True)
class BlockSums:
    """Sums over samples of centred kernels K of each layer, of which K_st is the block of samples s and t.

    Attributes:
        same: Σ_s K_ss, (n_layers, rows, rows) with the rows of a sample, summed in float64 and kept in the
            precision of the kernels.
        other: Σ_{s≠t} K_st, (n_layers, rows, rows).
        n_samples: How many samples.
    """

    same: Tensor
    other: Tensor
    n_samples: int


def rows_per_sample(sample: Tensor | None, n_samples: int) -> int:
    """Rows of each sample where all have the same number, one sample after another; 0 where they differ.

    Args:
        sample: Sample of every row, (n_rows,); None where row i is sample i.
        n_samples: How many samples.
    """
    if sample is None:
        return 1
    rows = len(sample) // n_samples
    regular = torch.arange(n_samples, device=sample.device).repeat_interleave(rows)
    return rows if torch.equal(sample, regular) else 0


def block_sums(kernels: Kernels, n_samples: int) -> BlockSums:
    """Sums of the blocks of every layer, whose samples have the same number of rows each.

    Args:
        kernels: Of the layers.
        n_samples: How many samples.
    """
    if kernels.n_rows == n_samples:
        trace = kernels.diagonal.sum(0)[:, None, None]
        same = torch.zeros_like(trace) if kernels.unbiased else trace
        return BlockSums(same, -same, n_samples)  # centred: all sum to zero
    sums = (
        _of_grams(kernels.gram, n_samples) if kernels.gram is not None else _of_features(kernels, n_samples)
    )
    kept = [(same.to(kernels.dtype), (every - same).to(kernels.dtype)) for same, every in sums]
    return BlockSums(
        torch.stack([same for same, _ in kept]), torch.stack([other for _, other in kept]), n_samples
    )


def _of_grams(grams: Tensor, n_samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Σ_s K_ss and Σ_st K_st of matrices, (n_layers, n, n)."""
    rows = grams.shape[1] // n_samples
    for kernel in grams:
        same, every = (kernel.new_zeros(rows, rows, dtype=torch.float64) for _ in range(2))
        for index, strip in enumerate(torch.split(kernel, rows)):
            blocks = strip.view(rows, n_samples, rows)
            same += blocks[:, index]
            every += blocks.sum(1, dtype=torch.float64)
        yield same, every


def _of_features(kernels: Kernels, n_samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same from centred features, with no matrix n by n; U-centring as in `hsic.products`."""
    assert kernels.features is not None
    n = kernels.n_rows
    rows = n // n_samples
    for index, part in enumerate(torch.split(kernels.features, list(kernels.widths), 1)):
        samples = part.view(n_samples, rows, -1)
        same = part.new_zeros(rows, rows, dtype=torch.float64)
        for some in torch.split(samples, max(1, CHUNK // rows)):
            position = some.transpose(0, 1).flatten(1)
            same += position @ position.T
        mean = samples.sum(0, dtype=torch.float64)
        every = mean @ mean.T
        if kernels.unbiased:
            k = kernels.diagonal[:, index]
            c = -k.sum() / ((n - 1) * (n - 2))
            k = k.reshape(n_samples, rows).sum(0)
            u = (k[:, None] + k[None, :]) / (n - 2)
            same += u + n_samples * c
            every += n_samples * u + n_samples**2 * c
            every.diagonal().sub_(same.diagonal())  # the diagonal of K is zero
            same.fill_diagonal_(0)
        yield same, every


def mean_over_orders(a: BlockSums, b: BlockSums) -> Tensor:
    """T of every layer of a with every layer of b on average over all orders of the samples of one network.

    Two different samples of one meet any two different ones of the other, equally often, and a sample any:
    ⟨Σ_s K_ss, Σ_s L_ss⟩/n + ⟨Σ_{s≠t} K_st, Σ_{s≠t} L_st⟩/(n(n − 1)). With one row for each sample it is
    tr K tr L/(n − 1) with the diagonal, and 0 without.

    Args:
        a: Of one network.
        b: Of the other, on the same samples with as many rows each.

    Returns:
        (n_layers_a, n_layers_b), float64.
    """
    n = a.n_samples
    return _inner(a.same, b.same) / n + _inner(a.other, b.other) / (n * (n - 1))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return (a.flatten(1).to(dtype) @ b.flatten(1).to(dtype).T).double()
