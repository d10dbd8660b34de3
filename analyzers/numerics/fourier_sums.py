"""Fourier sums of many columns over unevenly spaced positions, and how large those of permuted labels get."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Complex = NDArray[np.complex128]

TABLE = 2**18
"""Numbers in the table of cosines and sines at a time, so that it stays in a core's cache."""
COLUMNS = 2**24
"""Permuted labels gathered at a time."""
LEVEL = 0.99
"""Quantile of the largest amplitude of permuted labels, over frequencies and outputs, that a significant
one exceeds."""


def fourier_sums(phase: Tensor, columns: Callable[[slice], Tensor], n_frequencies: int) -> Complex:
    """(1/n) Σ_i y_i exp(−2πi k p_i) for k = 1, …, K and many columns y at once.

    With B ≈ √K, exp(i(aB + b)p) = exp(iaBp)·exp(ibp): 2√K cosines and sines of a sample give all K by one
    complex multiplication each, three roundings from exact, where a recurrence of 32 steps adds up 32.

    Args:
        phase: p, in cycles, shape (n,), float64.
        columns: Rows of y as a (rows, m) tensor in float32 or float64; products are in that type, and sums of
            blocks of rows in float64.
        n_frequencies: K.

    Returns:
        Shape (K, m). Cost: 4·n·K·m operations in one matrix product a block, and O(n√K) cosines.
    """
    small = math.isqrt(n_frequencies - 1) + 1
    large = -(-n_frequencies // small)
    step = torch.arange(1, small + 1, dtype=torch.float64, device=phase.device)
    stride = small * torch.arange(large, dtype=torch.float64, device=phase.device)
    total: Tensor | None = None
    for rows in _blocks(len(phase), max(64, TABLE // (2 * small * large))):
        y = columns(rows)
        table = _table(phase[rows], step, stride, y.dtype)
        part = (table.flatten(0, 2) @ y).double()
        total = part if total is None else total.add_(part)
    assert total is not None
    cosine, sine = total.cpu().numpy().reshape(2, small * large, -1)[:, :n_frequencies] / len(phase)
    sums: Complex = cosine - 1j * sine
    return sums


def permutation_floor(
    phase: Tensor, target: Tensor, n_frequencies: int, *, permutations: int, seed: int
) -> Floats:
    """Amplitude that labels without any relation to the inputs exceed somewhere once in a hundred.

    Somewhere is any frequency of any output: amplitudes are taken over the standard deviation of their
    output, and the largest of all is compared.

    Args:
        phase: In cycles, shape (n,).
        target: Of zero mean, shape (n, c).
        n_frequencies: K; the maximum over k = 1, …, K is taken.
        permutations: Draws.
        seed: Of the draws.

    Returns:
        99 % quantile over the draws of max |F_k|/σ over k and outputs, times σ of each output, shape (c,);
        the next larger draw where the quantile is between two.
    """
    n, n_outputs = target.shape
    generator = torch.Generator().manual_seed(seed)
    largest = []
    sigma: Floats = target.double().square().mean(0).sqrt().cpu().numpy()
    labels = target.float()  # a quantile of 200 draws is known to a few percent
    for draws in _blocks(permutations, max(1, COLUMNS // (n * n_outputs))):
        count = min(draws.stop, permutations) - draws.start
        order = torch.stack([torch.randperm(n, generator=generator) for _ in range(count)], 1)
        shuffled = labels[order.to(labels.device)].flatten(1)
        sums = fourier_sums(phase, shuffled.__getitem__, n_frequencies)
        amplitude = np.abs(sums).max(0).reshape(count, n_outputs)
        largest.append((amplitude / np.where(sigma > 0, sigma, np.inf)).max(1))
    floor: Floats = sigma * np.quantile(np.concatenate(largest), LEVEL, method="higher")
    return floor


def _table(phase: Tensor, step: Tensor, stride: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of 2π(stride + step)·phase, shape (2, n_strides, n_steps, n)."""
    (cos_a, sin_a), (cos_b, sin_b) = (
        [part.to(dtype) for part in _cosine_and_sine(multiple, phase)] for multiple in (stride, step)
    )
    shape = (2, len(stride), len(step), len(phase))
    table = torch.empty(shape, dtype=dtype, device=phase.device)
    torch.mul(cos_a[:, None], cos_b, out=table[0])
    table[0].addcmul_(sin_a[:, None], sin_b, value=-1)
    torch.mul(sin_a[:, None], cos_b, out=table[1])
    table[1].addcmul_(cos_a[:, None], sin_b)
    return table


def _cosine_and_sine(multiple: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    cycles = multiple[:, None] * phase
    angle = cycles.sub_(cycles.round()).mul_(2 * math.pi)
    return angle.cos(), angle.sin()


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
