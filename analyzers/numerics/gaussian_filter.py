"""Splits functions on samples into a smooth and a rough part by a Gaussian kernel, all in one pass.

Every function of the inputs that is known on the samples, the target and the residual of each checkpoint,
is a few columns of one matrix. Rows of the kernel are made in blocks, used for all columns and thrown away,
so that memory grows with samples × columns and never with samples².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

BLOCK_VALUES = 2**19
"""Kernel values in memory at once: 2 MiB, which was as fast as more."""
FEWEST_ROWS = 64
"""Rows in a block: with fewer a matrix product becomes slow."""
FLOAT64_FEATURES = 64
"""Up to so many features distances are computed in float64: there they cost nothing beside the products, and
two samples can be so close that float32 could not tell how close."""
ALL_INFLUENCE, INFLUENCE_ROWS = 10_000, 256
"""Up to so many samples all rows say what a sample does to the smooth parts of *other* samples; above it so
many rows do, which with 4,000 samples made standard errors 0.7 to 3.5 times as large."""
LEAST_PART = 1e-4
"""Below this share of its energy a part of the target is rounding and its relative error means nothing."""


@dataclass(frozen=True)
class Energies:
    """Energies of the smooth and rough parts, summed over outputs and samples, in float64.

    Attributes:
        total: Σ_i |v_i|², shape (n_functions,).
        low: Σ_i |v_i^low|², shape (n_deltas, n_functions).
        high: Σ_i |v_i − v_i^low|², shape (n_deltas, n_functions).
        low_sum: Σ_i v_i^low, shape (n_deltas, n_functions, n_outputs).
        neighbours: Mean over rows of Σ_j G_ij, the sample itself included; shape (n_deltas,).
        total_effect: First-order effect of each block of samples, shape (n_blocks, n_functions).
        low_effect: The same for `low`, shape (n_blocks, n_deltas, n_functions).
        high_effect: The same for `high`.
        n_rows: Rows of the kernel that were summed over; sums are scaled to all samples.
        n_samples: Samples in all.
    """

    total: Floats
    low: Floats
    high: Floats
    low_sum: Floats
    neighbours: Floats
    total_effect: Floats
    low_effect: Floats
    high_effect: Floats
    n_rows: int
    n_samples: int


def centred(inputs: Tensor) -> Tensor:
    """Inputs as a matrix without their mean, in float64 for few features, else in float32.

    Distances by the Gram matrix lose |x|²·ε: an offset of 10 standard deviations costs 4 % of a kernel value.

    Args:
        inputs: Shape (n_samples, …).
    """
    matrix = inputs.detach().flatten(1) if inputs.dim() > 1 else inputs.detach()[:, None]
    mean = matrix.mean(0, dtype=torch.float64)
    if matrix.shape[1] <= FLOAT64_FEATURES:
        return matrix.double() - mean
    # in the inputs' own precision: a mean rounded moves all samples alike
    return (matrix - mean.to(matrix.dtype)).float()


def squared_distances(inputs: Tensor, rows: Tensor) -> Tensor:
    """Squared distances of some samples to all, float32, exactly 0 of each to itself.

    Args:
        inputs: From `centred`, shape (n_samples, n_features).
        rows: Which samples, shape (n_rows,).

    Returns:
        Shape (n_rows, n_samples).
    """
    chosen = inputs[rows]
    square = inputs.square().sum(1)
    found = torch.addmm(square, chosen, inputs.T, alpha=-2.0)
    found.add_(square[rows, None]).clamp_(min=0)
    found[torch.arange(len(rows), device=rows.device), rows] = 0
    return found.float()


def sample_blocks(n_samples: int, n_blocks: int, seed: int) -> Tensor:
    """Assigns samples to blocks of equal size at random, shape (n_samples,), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(n_samples) % min(n_blocks, n_samples)
    return blocks[torch.randperm(n_samples, generator=generator)]


def sampled_rows(n_samples: int, n_rows: int, seed: int) -> Tensor:
    """Distinct samples in random order, shape (n_rows,), on the CPU."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randperm(n_samples, generator=generator)[:n_rows]


def filter_energies(
    inputs: Tensor,
    functions: Tensor,
    deltas: Sequence[float],
    *,
    rows: Tensor,
    blocks: Tensor,
    influence_rows: int | None = None,
) -> Energies:
    """Energy of the smooth and the rough part of every function at every scale, from one pass.

    v^low_i = Σ_j G_ij v_j / Σ_j G_ij with G_ij = exp(−|x_i − x_j|²/(2δ)), j = i included, and
    v^high = v − v^low. The sums over i run over the given rows, scaled to all samples; the sums over j always
    over all samples.

    The effect of a sample is its own row, and to first order what it does to the smooth parts of others as
    their neighbour, summed over the first `influence_rows` rows. Removing a block of samples changes a sum by
    minus its effect.

    Cost: n_rows·n_samples·(n_features + n_deltas·n_functions·n_outputs) multiplications in float32.

    Args:
        inputs: From `centred`, shape (n_samples, n_features).
        functions: Shape (n_samples, n_functions, n_outputs); used in float32, sums are float64.
        deltas: Variances δ of the kernel, in squared units of the inputs.
        rows: Samples to sum over, in random order, shape (n_rows,).
        blocks: Block of every sample, shape (n_samples,).
        influence_rows: By default all rows up to 10,000 samples, 256 above; 0 leaves out what samples do as
            neighbours.

    Returns:
        The energies, on the CPU.

    References:
        Xu, Zhang, Luo, Xiao and Ma, "Frequency Principle: Fourier Analysis Sheds Light on Deep Neural
        Networks", CiCP 28 (2020), section 4.2 (filtering method).
    """
    if influence_rows is None:
        influence_rows = len(rows) if len(inputs) <= ALL_INFLUENCE else INFLUENCE_ROWS
    sums = _Sums(inputs, functions, deltas, rows, blocks, influence_rows)
    size = max(FEWEST_ROWS, BLOCK_VALUES // len(inputs))
    for start in range(0, len(rows), size):
        sums.add(start, sums.rows[start : start + size])
    return sums.energies()


class _Sums:
    """Float64 sums over rows of the kernel, one block of rows after the other."""

    def __init__(
        self,
        inputs: Tensor,
        functions: Tensor,
        deltas: Sequence[float],
        rows: Tensor,
        blocks: Tensor,
        influence_rows: int,
    ) -> None:
        n, self.count, self.outputs = functions.shape
        device = inputs.device
        self.inputs, self.deltas = inputs, [float(delta) for delta in deltas]
        self.rows, self.blocks = rows.to(device), blocks.to(device)
        self.n_blocks = int(blocks.max()) + 1
        self.influence_rows = min(influence_rows, len(rows))
        # the last column gives the kernel's row sums in the same product
        self.table = torch.ones(n, self.count * self.outputs + 1, dtype=torch.float32, device=device)
        self.table[:, :-1] = functions.flatten(1)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        shape = self.n_blocks, len(deltas), self.count
        self.own_low, self.own_high = zeros(*shape), zeros(*shape)
        self.other_low, self.other_high = zeros(*shape), zeros(*shape)
        self.total = zeros(self.n_blocks, self.count)
        self.low_sum = zeros(len(deltas), self.count * self.outputs)
        self.neighbours = zeros(len(deltas))
        self.reached: dict[tuple[int, int], Tensor] = {}

    def add(self, start: int, rows: Tensor) -> None:
        """One block of rows, at every scale."""
        distance = squared_distances(self.inputs, rows)
        kernel = torch.empty_like(distance)
        own, place = self.table[rows, :-1], self.blocks[rows]
        self.total.index_add_(0, place, self._energy(own, own))
        for d, delta in enumerate(self.deltas):
            torch.mul(distance, -0.5 / delta, out=kernel)
            product = kernel.exp_() @ self.table
            weight = product[:, -1:]
            low = product[:, :-1] / weight
            high = own - low
            self.own_low[:, d].index_add_(0, place, self._energy(low, low))
            self.own_high[:, d].index_add_(0, place, self._energy(high, high))
            self.low_sum[d] += low.double().sum(0)
            self.neighbours[d] += weight.double().sum()
            if (used := self.influence_rows - start) > 0:
                self._add_influence(
                    d, kernel[:used], weight[:used], own[:used], low[:used], high[:used], place[:used]
                )

    def _energy(self, a: Tensor, b: Tensor) -> Tensor:
        """Products summed over outputs, (n_rows, n_functions) in float64."""
        return (a.double() * b).reshape(-1, self.count, self.outputs).sum(2)

    def _add_influence(
        self,
        d: int,
        kernel: Tensor,
        weight: Tensor,
        own: Tensor,
        low: Tensor,
        high: Tensor,
        place: Tensor,
    ) -> None:
        """What each sample does as a neighbour of others: ∂v^low_i/∂w_j = S_ij (v_j − v^low_i), S = C⁻¹G.

        Not of itself: its own row is gone when it is, and where neighbours are few that would outweigh it.
        """
        for which, part in enumerate((low, high)):
            smooth = (self._energy(part, low) / weight).float()
            reached = kernel.T @ torch.cat([part / weight, smooth], 1)
            key = (d, which)
            sums, sign = (self.other_high, 2.0) if which else (self.other_low, -2.0)
            sums[:, d].index_add_(0, place, sign * self._energy(part, own - low) / weight)
            self.reached[key] = self.reached[key].add_(reached) if key in self.reached else reached
        if len(self.inputs) > ALL_INFLUENCE:
            self._close_influence()  # few rows, and much memory

    def _close_influence(self) -> None:
        """Adds up what was reached, which is a sum over rows before it meets the neighbours' own values."""
        width = self.count * self.outputs
        for (d, which), reached in self.reached.items():
            effect = self._energy(reached[:, :width], self.table[:, :-1]) - reached[:, width:].double()
            sums, sign = (self.other_high, -2.0) if which else (self.other_low, 2.0)
            sums[:, d].index_add_(0, self.blocks, sign * effect)
        self.reached.clear()

    def energies(self) -> Energies:
        """The sums, scaled from the rows taken to all samples."""
        self._close_influence()
        n, taken = len(self.inputs), len(self.rows)
        scale, reach = n / taken, n / max(self.influence_rows, 1)

        def plain(tensor: Tensor) -> Floats:
            return np.asarray(tensor.cpu().numpy(), dtype=np.float64)

        return Energies(
            total=plain(scale * self.total.sum(0)),
            low=plain(scale * self.own_low.sum(0)),
            high=plain(scale * self.own_high.sum(0)),
            low_sum=plain(scale * self.low_sum.reshape(-1, self.count, self.outputs)),
            neighbours=plain(self.neighbours / taken),
            total_effect=plain(scale * self.total),
            low_effect=plain(scale * self.own_low + reach * self.other_low),
            high_effect=plain(scale * self.own_high + reach * self.other_high),
            n_rows=taken,
            n_samples=n,
        )
