"""Fourier components of a target and of a network's outputs, and how far apart they are at each frequency.

Frequencies are those of the map from inputs to outputs ("response" frequencies), not of pixels in an image.
Samples seldom lie on a grid, so the sum F_k = (1/n) Σ_i y_i exp(−2πi k t_i/L) is taken over their positions t
along one direction, L being the range of t; where the inputs are a uniform grid, it is the exact DFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers.numerics.covariance import leading_eigenpairs
from dynprobe.analyzers.numerics.fourier_sums import fourier_sums, permutation_floor
from dynprobe.analyzers.numerics.uniform_grid import UniformGrid, find_uniform_grid

Floats = NDArray[np.float64]
Complex = NDArray[np.complex128]

PART = 1e-4
"""On a grid, where there is no sampling noise: least amplitude, over the target's root mean square, at which
a relative error is one of the network and not of float32."""
ROWS = 4096
"""Samples whose float64 copy is made at a time."""
DIRECT = 2000
"""Features or samples, whichever are fewer, up to which principal directions come from a dense matrix."""


@dataclass(frozen=True)
class Spectrum:
    """Target and outputs by frequency, of c outputs at t checkpoints.

    With F the target's component and H that of the output, both less their own means.

    Attributes:
        frequency: |k|, in units of `resolution`, ascending, shape (k,).
        amplitude_target: |F|, half the amplitude of a sinusoid, in units of the target, shape (k, c).
        complex_error: |H − F|/|F|, shape (t, k, c). NaN where |F| is zero but for rounding.
        amplitude_error: ||H| − |F||/|F|, blind to phase and so never above the complex one.
        floor: What |F| has to exceed to be significant, shape (c,). Along a direction the 99 % quantile of
            max |F| of permuted labels, see `permutation_floor`; on a grid 1e-4 of the target's root mean
            square.
        significant: Where it does, shape (k, c): elsewhere the errors are relative to noise.
        resolution: 1/L, in cycles per unit of the inputs: finer differences cannot be told apart.
        wavenumber: k itself, shape (k, 1 or 2).
        closed: For each axis of a grid, whether its last point repeated the first and was left out; empty
            along a direction.
    """

    frequency: Floats
    amplitude_target: Floats
    complex_error: Floats
    amplitude_error: Floats
    floor: Floats
    significant: NDArray[np.bool_]
    resolution: float
    wavenumber: NDArray[np.int64]
    closed: tuple[bool, ...] = ()


def projected_spectrum(
    position: Tensor,
    target: Tensor,
    output: Tensor,
    *,
    n_frequencies: int,
    permutations: int = 200,
    seed: int = 0,
) -> Spectrum:
    """Compares target and outputs at the frequencies k/L, k = 1, 2, …, along one direction of the inputs.

    A target that varies across the direction too shows up as noise at every frequency, as do finitely many
    samples; the floor says how much. The window of samples (1/n) Σ exp(−2πi k t_i/L) is not zero for uneven
    samples, so means are taken off first: they would leak into every frequency.

    Args:
        position: t, place of each sample along the direction, shape (n,).
        target: Shape (n, c).
        output: Shape (t, n, c). In float64 all is computed in it; otherwise products are in float32, phases
            and sums in float64.
        n_frequencies: Largest k.
        permutations: Draws of permuted labels for the floor.
        seed: Of the draws.

    Returns:
        The spectrum; wavenumber and frequency are 1, 2, …, n_frequencies.

    Raises:
        ValueError: If positions are all the same or not finite, targets are not finite, or a count is < 1.

    References:
        Xu, Zhang, Luo, Xiao and Ma, "Frequency Principle: Fourier Analysis Sheds Light on Deep Neural
        Networks", Commun. Comput. Phys. 28 (2020), arXiv 1901.06523, section 4 (projection method).
    """
    phase, length = _phase(position)
    if n_frequencies < 1 or permutations < 1:
        raise ValueError("a spectrum needs at least one frequency and one draw of permuted labels")
    _require_finite(target)
    y = _centred(target, output.dtype)
    component = fourier_sums(phase, y.__getitem__, n_frequencies)
    means = output.mean(1, dtype=torch.float64)

    def outputs(rows: slice) -> Tensor:
        return (output[:, rows] - means[:, None]).to(y.dtype).movedim(0, 1).flatten(1)

    found = fourier_sums(phase, outputs, n_frequencies).reshape(n_frequencies, len(output), -1)
    k = np.arange(1, n_frequencies + 1)
    floor = permutation_floor(phase, y, n_frequencies, permutations=permutations, seed=seed)
    rounding = _rounding(target, y.dtype)
    return _compared(
        k[:, None], k.astype(float), component, found.swapaxes(0, 1), floor, rounding, 1 / length
    )


def grid_spectrum(inputs: Tensor, target: Tensor, output: Tensor) -> Spectrum | None:
    """Compares target and outputs at every frequency of a uniform grid of one- or two-dimensional inputs.

    The DFT is exact there: a sinusoid with a whole number of periods leaks nothing. On n points h apart the
    period is n·h. Where target values at both ends of an axis agree but differ from their neighbours', as on
    `linspace(-pi, pi, n)`, the last point is the first of the next period: it is left out, and `closed` says
    so. A function that is not periodic has the components of its periodic continuation, with the step at the
    edge.

    Args:
        inputs: Shape (n, 1) or (n, 2), in any order.
        target: Shape (n, c).
        output: Shape (t, n, c).

    Returns:
        The spectrum, with all pairs k, −k once; None where the inputs are no uniform grid.

    Raises:
        ValueError: If targets are not finite.
    """
    _require_finite(target)
    grid = find_uniform_grid(inputs.detach().double().cpu().numpy(), target.double().cpu().numpy())
    if grid is None:
        return None
    wavenumber, keep = _half_plane(grid.shape)

    def transform(values: Tensor) -> Complex:
        y = grid.arrange(values.double().cpu().numpy())
        axes = tuple(range(len(grid.shape)))
        with np.errstate(invalid="ignore", over="ignore"):
            found = np.fft.rfftn(y - y.mean(axes), axes=axes) / math.prod(grid.shape)
        return found.reshape(-1, y.shape[-1])[keep]

    longest = max(grid.period)
    frequency = np.sqrt(((wavenumber / np.array(grid.period)) ** 2).sum(1)) * longest
    order = np.argsort(np.round(frequency, 9), kind="stable")
    component = transform(target)[order]
    found = np.stack([transform(one)[order] for one in output])
    inside = grid.arrange(target.double().cpu().numpy()).reshape(-1, target.shape[1])
    floor = PART * inside.std(0)
    rounding = _rounding(target, torch.float64)
    return _compared(
        wavenumber[order], frequency[order], component, found, floor, rounding, 1 / longest, grid
    )


def principal_positions(inputs: Tensor, r: int) -> tuple[Tensor, Floats]:
    """Places samples along the leading principal directions of their inputs.

    Each direction is turned so that its entry of largest magnitude is positive.

    Args:
        inputs: Shape (n, …), flattened to (n, d).
        r: How many directions.

    Returns:
        Positions of zero mean, float64 on the inputs' device, shape (r, n), and the share of the variance
        along each, shape (r,). Fewer where the inputs span fewer dimensions.

    Raises:
        ValueError: If r is below 1, or inputs are not finite or all the same.
    """
    x = inputs.detach().flatten(1)
    if r < 1:
        raise ValueError(f"{r} principal directions: at least one is needed")
    mean = x.mean(0, dtype=torch.float64)
    variance = sum(float(part.square().sum()) for part in _centred_parts(x, mean)) / len(x)
    if not math.isfinite(variance):
        raise ValueError("principal directions need inputs without NaN or infinity")
    value, direction = _principal_directions(x, mean, min(r, *x.shape))
    kept = value > max(x.shape) * torch.finfo(torch.float64).eps * variance
    if not kept.any():
        raise ValueError("principal directions need inputs that differ")
    axes = torch.from_numpy(np.ascontiguousarray(direction[:, kept])).to(x.device)
    position = torch.cat([part @ axes for part in _centred_parts(x, mean)]).T
    return position.contiguous(), value[kept] / variance


def _phase(position: Tensor) -> tuple[Tensor, float]:
    """Positions in units of their range, float64, and the range."""
    t = position.detach().double()
    length = float(t.max() - t.min())
    if not math.isfinite(length) or length <= 0:
        raise ValueError("a spectrum needs positions that are finite and differ")
    return (t - t.min()) / length, length


def _centred(target: Tensor, output: torch.dtype) -> Tensor:
    dtype = torch.float64 if output == torch.float64 else torch.float32
    return (target.double() - target.double().mean(0)).to(dtype)


def _require_finite(target: Tensor) -> None:
    if not target.isfinite().all():
        raise ValueError("a spectrum needs targets without NaN or infinity")


def _rounding(target: Tensor, dtype: torch.dtype) -> Floats:
    """Amplitudes below this are rounding of the target's values."""
    largest: Floats = target.double().abs().amax(0).cpu().numpy()
    return largest * 16 * torch.finfo(dtype).eps


def _compared(
    wavenumber: NDArray[np.int64],
    frequency: Floats,
    target: Complex,
    output: Complex,
    floor: Floats,
    rounding: Floats,
    resolution: float,
    grid: UniformGrid | None = None,
) -> Spectrum:
    amplitude = np.abs(target)
    present = amplitude > rounding
    size = np.where(present, amplitude, np.nan)
    with np.errstate(invalid="ignore", over="ignore"):  # outputs of a diverged network
        complex_error, amplitude_error = np.abs(output - target), np.abs(np.abs(output) - amplitude)
    return Spectrum(
        frequency=frequency,
        amplitude_target=amplitude,
        complex_error=complex_error / size,
        amplitude_error=amplitude_error / size,
        floor=floor,
        significant=present & (amplitude > floor),
        resolution=resolution,
        wavenumber=wavenumber.astype(np.int64),
        closed=grid.closed if grid else (),
    )


def _half_plane(shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Wavenumbers that `rfftn` returns, one of each pair ±k and without zero, and their places in it."""
    axes = [np.fft.fftfreq(n, 1 / n) for n in shape[:-1]] + [np.fft.rfftfreq(shape[-1], 1 / shape[-1])]
    every = np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], 1).round().astype(np.int64)
    size = np.array(shape)
    # On the faces k_last = 0 and Nyquist both k and −k are there: the one first in order is kept.
    own, mirror = every % size, -every % size
    first = (own[:, 0] <= mirror[:, 0]) | (own[:, -1] != mirror[:, -1])
    keep = np.flatnonzero(first & (every != 0).any(1))
    return every[keep], keep


def _principal_directions(x: Tensor, mean: Tensor, r: int) -> tuple[Floats, Floats]:
    """Largest eigenvalues of the covariance of (n, d) rows, and unit eigenvectors (d, r), signs fixed."""
    n, d = x.shape

    if d <= DIRECT:
        covariance = torch.zeros((d, d), dtype=torch.float64, device=x.device)
        for part in _centred_parts(x, mean):
            covariance.addmm_(part.T, part)
        value, direction = leading_eigenpairs((covariance / n).cpu().numpy(), r)
    elif n <= DIRECT:
        rows = torch.cat(list(_centred_parts(x, mean)))
        value, mixing = leading_eigenpairs((rows @ rows.T / n).cpu().numpy(), r)
        direction = (rows.T @ torch.from_numpy(mixing).to(x.device)).cpu().numpy()
        direction /= np.linalg.norm(direction, axis=0)
    else:

        def product(vector: Floats) -> Floats:
            v = torch.from_numpy(np.ascontiguousarray(vector.ravel())).to(x.device)
            image = torch.zeros_like(v)
            for part in _centred_parts(x, mean):
                image.addmv_(part.T, part @ v)
            covered: Floats = (image / n).cpu().numpy()
            return covered

        operator = scipy.sparse.linalg.LinearOperator((d, d), matvec=product, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(d)
        value, direction = scipy.sparse.linalg.eigsh(operator, r, which="LA", v0=start, tol=1e-8)
        value, direction = value[::-1], direction[:, ::-1]
    # Entries of one magnitude but for rounding: the first of them decides.
    leading = (np.abs(direction) > (1 - 1e-6) * np.abs(direction).max(0)).argmax(0)
    return value, direction * np.where(np.take_along_axis(direction, leading[None], 0)[0] < 0, -1.0, 1.0)


def _centred_parts(x: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """Rows less their mean in float64, some at a time."""
    return (x[start : start + ROWS] - mean for start in range(0, len(x), ROWS))
