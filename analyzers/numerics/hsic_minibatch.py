"""HSIC summed over minibatches: the Grams of small batches alone, as the features pass by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprobe.analyzers.numerics.hsic import (
    centre,
    centre_gram,
    exponent,
    fourth_power,
    gram,
    rbf,
    squared_distances,
    vanishes,
)

CHUNK = 8192
"""Products that are summed in the working type before they go to a float64 sum."""
HALVINGS = 16
"""Batches split at random in halves, at least, for the estimate of the deviation from the full sample."""


@dataclass(frozen=True)
class BatchKernels:
    """U-centred kernels of all layers of a network on one batch, and what of them is needed for its halves.

    Attributes:
        packed: Their upper triangles, row by row, (n_layers, b(b − 1)/2).
        hsic: Of each layer with itself, (n_layers,) float64.
        signs: 1 for the samples of one half and −1 for those of the other, (n_splits, b).
        hsic_halves: Of each layer with itself in the halves, (n_splits, n_layers) float64.
        row: Sums of k_ij over the samples j of the half of i, (n_splits, n_layers, b).
    """

    packed: Tensor
    hsic: Tensor
    signs: Tensor
    hsic_halves: Tensor
    row: Tensor

    @property
    def size(self) -> int:
        """b, the samples."""
        return self.signs.shape[1]


class MinibatchRecorder:
    """Takes the features of each layer, batch after batch, and hands on the kernels of every batch.

    Args:
        take: Called with the kernels of each batch.
        splits: How often to split each batch in halves; see `splits_of`.
        seed: Of the halves.
        widths: σ of the RBF kernel by layer, 0 or missing where there is none; None for the linear kernel.

    Attributes:
        layers: Their names, in order.
        exponent: Features are scaled by two to the minus this, by layer; a layer that is constant in every
            batch is not there.
    """

    def __init__(
        self,
        take: Callable[[BatchKernels], None],
        splits: int,
        seed: int = 0,
        widths: Mapping[str, float] | None = None,
    ) -> None:
        self.layers: list[str] = []
        self.exponent: dict[str, int] = {}
        self._take, self._splits, self._widths = take, splits, widths
        self._generator = torch.Generator().manual_seed(seed)
        self._start = 0
        self._sizes: list[int] = []
        self._packed = torch.empty(0, 0)
        self._batch: list[tuple[Tensor, Tensor, Tensor]] = []
        self._total: list[Tensor] = []
        self._fourth: dict[str, float] = {}

    def add(self, layer: str, start: int, values: Tensor) -> bool:
        """One layer on one batch; layers come in the same order in each.

        Args:
            layer: Its name.
            start: Of the batch among the samples.
            values: (b, n_features); not kept.

        Returns:
            Whether they are finite; if not, a kernel of zeros takes their place.
        """
        if start != self._start:
            self._close()
            self._start = start
        features, largest = centre(values)
        if not self._batch:
            self._begin(features)
        if not self._total:
            self.layers.append(layer)
        finite = math.isfinite(largest)
        if finite and largest:
            kernel = self._kernel(layer, features, largest)
            fourth = fourth_power(kernel, of_rbf=self._widths is not None)
            self._fourth[layer] = self._fourth.get(layer, 0.0) + fourth
        else:
            kernel = features.new_zeros(len(features), len(features))
        self._keep(centre_gram(kernel, unbiased=True))
        return finite

    def _begin(self, features: Tensor) -> None:
        """Make room for the kernels of a batch, and draw its halves, the same in every network."""
        n, device = len(features), features.device
        order = torch.stack([torch.randperm(n, generator=self._generator) for _ in range(self._splits)])
        self._signs = (1.0 - 2.0 * (order < n // 2)).to(device)
        self._triangle = _triangle(n, device)
        self._sizes.append(n)
        self._packed = features.new_empty(len(self.layers), len(self._triangle))

    def _kernel(self, layer: str, features: Tensor, largest: float) -> Tensor:
        power = self.exponent.setdefault(layer, exponent(largest))
        if power:
            features.mul_(2.0**-power)
        if self._widths is None:
            return gram(features)
        width = self._widths.get(layer, 0.0)
        if not width:
            return features.new_zeros(len(features), len(features))
        return rbf(squared_distances(features), math.ldexp(width, -power))

    def _keep(self, kernel: Tensor) -> None:
        """What is needed of a kernel: its triangle, Σ k², and that and Σ_j k_ij within halves.

        With signs s the kernel within the halves is (K + s sᵀ∘K)/2, and the rows of K sum to zero.
        """
        signs, square = self._signs.T.to(kernel.dtype), kernel * kernel
        total = square.sum(1).double().sum()
        within = (signs * (square @ signs)).sum(0, dtype=torch.float64)
        row = (signs * (kernel @ signs)).T / 2
        at = len(self._batch)
        if at == len(self._packed):  # in the first batch, when nobody knows how many layers there are
            room = self._packed.new_empty(max(1, at), self._packed.shape[1])
            self._packed = torch.cat([self._packed, room])
        self._packed[at] = kernel.flatten().index_select(0, self._triangle)
        self._batch.append((total, (total + within) / 2, row))

    def _close(self) -> None:
        if not self._batch:
            return
        total, within, row = (torch.stack(part) for part in zip(*self._batch, strict=True))
        packed, row = self._packed, row.transpose(0, 1)
        if len(packed) > len(self._batch):
            packed = packed[: len(self._batch)].clone()
        self._batch.clear()
        n = self._signs.shape[1]
        own = row[:, :, None]  # each layer a network of its own
        halves = _hsic_halves(within.T[:, :, None, None], own, own, self._signs)[:, :, 0, 0]
        self._total.append(total)
        self._take(BatchKernels(packed, total / (n * (n - 3)), self._signs, halves, row))

    def finish(self) -> list[bool]:
        """Hands on the last batch.

        Returns:
            Whether so few samples differ that HSIC of the layer with itself is 0, by layer.
        """
        self._close()
        total = torch.stack(self._total).sum(0)
        fourth = total.new_tensor([self._fourth.get(layer, 0.0) for layer in self.layers])
        alone = vanishes(total, fourth, max(self._sizes), self._packed.dtype, grams=True)
        return [bool(one) for one in alone]


def splits_of(n_batches: int) -> int:
    """How often each of so many batches is split in halves."""
    return math.ceil(HALVINGS / n_batches)


def _triangle(n: int, device: torch.device) -> Tensor:
    """Where the entries above the diagonal of an (n, n) matrix are in it, flattened."""
    row, column = torch.triu_indices(n, n, 1, device=device).unbind()
    return row * n + column


def _products(a: Tensor, b: Tensor, signs: Tensor) -> Tensor:
    """Σ_ij k_ij l_ij s_i s_j of packed kernels, (n_signs, n_layers_a, n_layers_b) float64."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    outer = (signs[:, :, None] * signs[:, None, :]).flatten(1).to(dtype)
    weights = outer.index_select(1, _triangle(signs.shape[1], a.device))
    total = a.new_zeros(len(b), len(signs) * len(a), dtype=torch.float64)
    for left, right, weight in zip(*(torch.split(x, CHUNK, 1) for x in (a, b, weights)), strict=True):
        total += right.to(dtype) @ (weight[:, None] * left).flatten(0, 1).T
    return 2 * total.view(len(b), len(signs), len(a)).permute(1, 2, 0)


def _hsic_halves(within: Tensor, row_a: Tensor, row_b: Tensor, signs: Tensor) -> Tensor:
    """Unbiased HSIC of layers in the halves of a batch, each centred anew; halves weigh as their pairs.

    Song et al. 2012, eq. 5, gives the product of U-centred matrices from that of others.

    Args:
        within: Σ k_ij l_ij over i and j in the same half, (n_splits, …, n_layers_a, n_layers_b).
        row_a: Sums of k_ij within halves, (n_splits, …, n_layers_a, b).
        row_b: Likewise, (n_splits, …, n_layers_b, b).
        signs: As in `BatchKernels`.
    """
    total, pairs = within, 0
    for sign in (1.0, -1.0):
        there = (signs == sign).double()
        m = int(there[0].sum())
        there = there.reshape(len(signs), *[1] * (row_a.ndim - 2), -1)
        a, b = (row.double() * there for row in (row_a, row_b))
        sums = a.sum(-1)[..., :, None] * b.sum(-1)[..., None, :]
        total = total - 2 / (m - 2) * (a @ b.mT) + sums / ((m - 1) * (m - 2))
        pairs += m * (m - 3)
    return total / pairs


class MinibatchTerms:
    """Unbiased HSIC of every batch between the layers of two networks, and of each layer with itself.

    Args:
        a: Kernels of one network, those of each batch.

    Attributes:
        cross: (n_layers_a, n_layers_b) float64 of each batch, in the scaled units of the kernels.
        own_a: (n_layers_a,).
        own_b: (n_layers_b,).
    """

    def __init__(self, a: list[BatchKernels]) -> None:
        self._a = a
        self.cross: list[Tensor] = []
        self.own_a: list[Tensor] = []
        self.own_b: list[Tensor] = []
        self._gaps: list[tuple[Tensor, Tensor, Tensor]] = []  # of halves and batch, for each of these

    def add(self, b: BatchKernels) -> None:
        """The next batch of the other network."""
        a = self._a[len(self.cross)]
        signs, n = torch.cat([torch.ones_like(a.signs[:1]), a.signs]), a.size
        products = _products(a.packed, b.packed, signs)
        cross = products[0] / (n * (n - 3))
        halves = _hsic_halves((products[0] + products[1:]) / 2, a.row, b.row, a.signs)
        self.cross.append(cross)
        self.own_a.append(a.hsic)
        self.own_b.append(b.hsic)
        self._gaps.append((halves - cross, a.hsic_halves - a.hsic, b.hsic_halves - b.hsic))

    def deviation(self) -> Tensor:
        """How far CKA in batches is from that of all samples at once, as a standard deviation.

        What a batch misses are the products between batches. Halving the batches misses as much again: with
        batches of b out of n, the variance of the difference is 72ζ/(nb)·(1 − b/n) from full to batches and
        72ζ/(nb) from batches to halves, with one ζ. The latter is seen in the kernels that are there; each
        batch gives an independent difference, to first order in the ratio.

        Returns:
            (n_layers_a, n_layers_b).

        References:
            Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the same things?", ICLR 2021, §3.
        """
        scale_a, scale_b = (torch.stack(own).sum(0) for own in (self.own_a, self.own_b))
        scale = torch.outer(scale_a.sqrt(), scale_b.sqrt())
        value = torch.stack(self.cross).sum(0) / scale
        variance = torch.zeros_like(value)
        for both, first, second in self._gaps:
            own = (first / scale_a)[:, :, None] + (second / scale_b)[:, None, :]
            variance += (both / scale - value * own / 2).square().mean(0)
        sizes = [batch.size for batch in self._a]
        return torch.sqrt(variance * (1 - max(sizes) / sum(sizes)))
