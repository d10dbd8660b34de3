"""Matrices of operations that slide a window over positions: convolutions, and which entries a pool sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from dynprobe.analyzers.numerics.affine_form import Indices, require_entries
from dynprobe.analyzers.numerics.layered_network import Floats, Matrix

Sizes = Sequence[int]


def sliding_windows(
    size: Sizes, n_windows: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Indices:
    """Which flat positions of a grid each window covers, (all windows, window size); -1 in the padding.

    Args:
        size: Of the grid, one number per dimension, as in all others.
        n_windows: How many windows there are.
        kernel: Size of a window.
        stride: Distance of neighbouring windows.
        padding: Positions added before the grid.
        dilation: Distance of neighbouring positions of a window.
    """
    axes = []
    for n, windows, k, step, pad, gap in zip(size, n_windows, kernel, stride, padding, dilation, strict=True):
        at = np.arange(windows)[:, None] * step - pad + np.arange(k) * gap
        axes.append(np.where((at >= 0) & (at < n), at, -1))
    return _combined(size, axes)


def adaptive_windows(size: Sizes, n_windows: Sizes) -> Indices:
    """The same for adaptive pooling: window i of m covers ⌊i n / m⌋ … ⌈(i + 1) n / m⌉ - 1."""
    axes = []
    for n, windows in zip(size, n_windows, strict=True):
        i = np.arange(windows)[:, None]
        first, end = i * n // windows, -((-(i + 1) * n) // windows)
        at = first + np.arange(int((end - first).max()))
        axes.append(np.where(at < end, at, -1))
    return _combined(size, axes)


def _combined(size: Sizes, axes: Sequence[Indices]) -> Indices:
    """Windows of a grid from those along each of its dimensions, (n_windows, kernel)."""
    flat = np.zeros((1, 1), np.int64)
    outside = np.zeros((1, 1), bool)
    for n, at in zip(size, axes, strict=True):
        shape = (flat.shape[0] * at.shape[0], flat.shape[1] * at.shape[1])
        both = flat[:, None, :, None] * n + at[None, :, None, :]
        outside = (outside[:, None, :, None] | (at < 0)[None, :, None, :]).reshape(shape)
        flat = both.reshape(shape)
    return np.where(outside, -1, flat)


def convolution_matrix(
    weight: Floats,
    size: Sizes,
    out_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Matrix:
    """Sparse matrix of a convolution of one sample, (n_out out_positions, n_in positions), without bias.

    Args:
        weight: (n_out, n_in / groups, *kernel).
        size: Of the input, one number per dimension.
        out_size: Of the output.
        stride: Of the windows.
        padding: Of the input.
        dilation: Of the windows.
        groups: Each part of the output channels sees only its own part of the input channels.

    Raises:
        TooLarge: The matrix has too many entries.
    """
    n_out, n_in = weight.shape[:2]
    windows = sliding_windows(size, out_size, weight.shape[2:], stride, padding, dilation)
    at, tap = np.nonzero(windows >= 0)
    require_entries(n_out * n_in * len(at))
    n_positions, n_windows = math.prod(size), len(windows)
    out_channel = np.arange(n_out)
    in_channel = (out_channel // (n_out // groups) * n_in)[:, None] + np.arange(n_in)
    rows = (out_channel * n_windows)[:, None, None] + np.broadcast_to(at, (1, n_in, len(at)))
    columns = (in_channel * n_positions)[:, :, None] + windows[at, tap]
    values = weight.reshape(n_out, n_in, -1)[:, :, tap]
    shape = (n_out * n_windows, n_in * groups * n_positions)
    return sparse.csr_array((values.ravel(), (rows.ravel(), columns.ravel())), shape=shape)
