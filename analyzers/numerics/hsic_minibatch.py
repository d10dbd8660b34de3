"""HSIC summed over minibatches: the Grams of small batches alone, as the features pass by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynprobe.analyzers.numerics.hsic import centre, centre_gram, exponent, fourth_power, gram, rbf, vanishes

CHUNK = 8192
"""Products that are summed in the working type before they go to a float64 sum."""
HALVINGS = 16
"""Batches split at random in halves, at least, for the estimate of the deviation from the full sample."""


@dataclass(frozen=True)
class MinibatchKernels:
    """Upper triangles of the U-centred kernels of every batch.

    Attributes:
        packed: For each batch, (n_layers, b(b − 1)/2), row by row.
        sizes: b of each batch.
        exponent: Features are scaled by two to the minus this, by layer.
        width: σ of the RBF kernel by layer, in units of the features; 0 for the linear one.
        constant: Whether they are constant in every batch, by layer.
        alone: Whether so few samples differ that HSIC of the layer with itself is 0, by layer.
    """

    packed: list[Tensor]
    sizes: list[int]
    exponent: list[int]
    width: list[float]
    constant: list[bool]
    alone: list[bool]

    def total(self, batch: int) -> Tensor:
        """T of each layer with itself in a batch, (n_layers,)."""
        return _squares(self.packed[batch])


@dataclass
class MinibatchRecorder:
    """Takes the features of each layer, batch after batch, and keeps their kernels.

    Args:
        bandwidth: σ over the median distance for the RBF kernel, 0 for the linear kernel. The median is that
            of the first batch, a random sample.
    """

    bandwidth: float = 0.0
    layers: list[str] = field(default_factory=list)
    _exponent: dict[str, int] = field(default_factory=dict)
    _width: dict[str, float] = field(default_factory=dict)
    _fourth: dict[str, float] = field(default_factory=dict)
    _packed: list[Tensor] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _batch: list[Tensor] = field(default_factory=list)
    _triangle: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _start: int = 0

    def add(self, layer: str, start: int, values: Tensor) -> None:
        """One layer on one batch; layers come in the same order in each.

        Args:
            layer: Its name.
            start: Of the batch among the samples.
            values: (b, n_features); not kept.
        """
        if start != self._start:
            self._close()
            self._start = start
        features, largest = centre(values)
        if largest:
            kernel = self._kernel(layer, features, largest)
            fourth = fourth_power(kernel, of_rbf=bool(self.bandwidth))
            self._fourth[layer] = self._fourth.get(layer, 0.0) + fourth
        else:
            kernel = features.new_zeros(len(features), len(features))
        kernel = centre_gram(kernel, unbiased=True)
        if not self._packed:
            self.layers.append(layer)
        n = len(kernel)
        if len(self._triangle) != n * (n - 1) // 2:
            self._triangle = _triangle(n).to(kernel.device)
        self._batch.append(kernel.flatten()[self._triangle])

    def _kernel(self, layer: str, features: Tensor, largest: float) -> Tensor:
        power = self._exponent.setdefault(layer, exponent(largest))
        features.mul_(2.0**-power)
        if not self.bandwidth:
            return gram(features)
        if self._width.get(layer) == 0:
            return features.new_zeros(len(features), len(features))
        kernel, width = rbf(features, self.bandwidth, 0, self._width.get(layer, 0.0))
        self._width[layer] = width
        return kernel

    def _close(self) -> None:
        if self._batch:
            self._sizes.append((1 + math.isqrt(1 + 8 * len(self._batch[0]))) // 2)
            self._packed.append(torch.stack(self._batch))
            self._batch.clear()

    def finish(self) -> MinibatchKernels:
        """What was kept."""
        self._close()
        total = torch.stack([_squares(packed) for packed in self._packed]).sum(0)
        fourth = total.new_tensor([self._fourth.get(layer, 0.0) for layer in self.layers])
        alone = vanishes(total, fourth, max(self._sizes), self._packed[0].dtype, grams=True)
        return MinibatchKernels(
            self._packed,
            self._sizes,
            [self._exponent.get(layer, 0) for layer in self.layers],
            [math.ldexp(self._width.get(layer, 0.0), self._exponent.get(layer, 0)) for layer in self.layers],
            [layer not in self._exponent for layer in self.layers],
            [bool(one) for one in alone],
        )


def _triangle(n: int) -> Tensor:
    """Where the entries above the diagonal of an (n, n) matrix are in it, flattened."""
    row, column = torch.triu_indices(n, n, 1).unbind()
    return row * n + column


def _products(a: Tensor, b: Tensor) -> Tensor:
    """⟨K, L⟩ of packed kernels, (n_layers_a, n_layers_b) float64."""
    total = a.new_zeros(len(a), len(b), dtype=torch.float64)
    for left, right in zip(torch.split(a, CHUNK, 1), torch.split(b, CHUNK, 1), strict=True):
        total += left @ right.T
    return 2 * total


def _squares(a: Tensor) -> Tensor:
    return 2 * sum(
        (part.square().sum(1).double() for part in torch.split(a, CHUNK, 1)), a.new_zeros(()).double()
    )


def minibatch_terms(a: MinibatchKernels, b: MinibatchKernels) -> tuple[Tensor, Tensor, Tensor]:
    """Unbiased HSIC of every batch: between the layers, and of each layer with itself.

    Returns:
        (n_batches, n_layers_a, n_layers_b), (n_batches, n_layers_a), (n_batches, n_layers_b), float64 and in
        the scaled units of the kernels.
    """
    norm = [1 / (n * (n - 3)) for n in a.sizes]
    dtype = torch.promote_types(a.packed[0].dtype, b.packed[0].dtype)
    cross = [
        _products(k.to(dtype), q.to(dtype)) * c for k, q, c in zip(a.packed, b.packed, norm, strict=True)
    ]
    own_a, own_b = ([x.total(i) * c for i, c in enumerate(norm)] for x in (a, b))
    return torch.stack(cross), torch.stack(own_a), torch.stack(own_b)


def halves_deviation(
    a: MinibatchKernels, b: MinibatchKernels, terms: tuple[Tensor, Tensor, Tensor], seed: int
) -> Tensor:
    """How far CKA in batches is from that of all samples at once, as a standard deviation.

    What a batch misses are the products between batches. Halving the batches misses as much again: with
    batches of b out of n, the variance of the difference is 72ζ/(nb)·(1 − b/n) from full to batches and
    72ζ/(nb) from batches to halves, with one ζ. The latter is seen in the kernels that are there; each
    batch gives an independent difference, to first order in the ratio.

    Args:
        a: Kernels of one network.
        b: Of the other.
        terms: From `minibatch_terms`.
        seed: Of the halves.

    Returns:
        (n_layers_a, n_layers_b).

    References:
        Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the same things?", ICLR 2021, §3.
    """
    cross, own_a, own_b = terms
    scale_a, scale_b = own_a.sum(0), own_b.sum(0)
    scale = torch.outer(scale_a.sqrt(), scale_b.sqrt())
    value = cross.sum(0) / scale
    variance = torch.zeros_like(value)
    generator = torch.Generator().manual_seed(seed)
    splits = math.ceil(HALVINGS / len(a.sizes))
    for batch, n in enumerate(a.sizes):
        for _ in range(splits):
            order = torch.randperm(n, generator=generator)
            parts = [order[: n // 2].sort().values, order[n // 2 :].sort().values]
            halves = [_half_terms(a.packed[batch], b.packed[batch], n, part) for part in parts]
            both, first, second = (torch.stack(term).mean(0) for term in zip(*halves, strict=True))
            difference = (
                (both - cross[batch]) / scale
                - value * ((first - own_a[batch]) / scale_a)[:, None] / 2
                - value * ((second - own_b[batch]) / scale_b)[None, :] / 2
            )
            variance += difference**2 / splits
    n, largest = sum(a.sizes), max(a.sizes)
    return torch.sqrt(variance * (1 - largest / n))


def _half_terms(a: Tensor, b: Tensor, n: int, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unbiased HSIC of some samples of a batch, whose kernels are centred anew."""
    m = len(part)
    i, j = torch.triu_indices(m, m, 1)
    place = (part[i] * (2 * n - part[i] - 1) // 2 + part[j] - part[i] - 1).to(a.device)
    i, j = i.to(a.device), j.to(a.device)
    dtype = torch.promote_types(a.dtype, b.dtype)
    left, right = a[:, place].to(dtype), b[:, place].to(dtype)
    sums = [k.new_zeros(len(k), m).index_add_(1, i, k).index_add_(1, j, k).double() for k in (left, right)]
    (row_a, row_b), (all_a, all_b) = sums, (total.sum(1) for total in sums)

    def centred(products: Tensor, rows: Tensor, totals: Tensor) -> Tensor:
        """Song et al. 2012, eq. 5: the product of U-centred matrices from that of others."""
        return (products - 2 / (m - 2) * rows + totals / ((m - 1) * (m - 2))) / (m * (m - 3))

    return (
        centred(_products(left, right), row_a @ row_b.T, torch.outer(all_a, all_b)),
        centred(_squares(left), row_a.square().sum(1), all_a**2),
        centred(_squares(right), row_b.square().sum(1), all_b**2),
    )
