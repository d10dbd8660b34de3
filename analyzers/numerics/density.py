"""Spectral density of a symmetric operator by stochastic Lanczos quadrature, beside known eigenvalues."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from dynprobe.analyzers.numerics.krylov import Floats, Matvec
from dynprobe.analyzers.numerics.trace import widened_stderr


@dataclass(frozen=True)
class Quadrature:
    """What one probe says: Σ_j w_j f(θ_j) estimates Σ_i f(λ_i) over the eigenvalues that are not locked.

    Attributes:
        node: θ_j, ascending, shape (n_steps,).
        weight: w_j in numbers of eigenvalues, shape (n_steps,).
        image: H times the start vector, which a trace can use.
        residual: Length of the last vector: how far the largest and smallest nodes may be off.
    """

    node: Floats
    weight: Floats
    image: Tensor
    residual: float


def quadrature(matvec: Matvec, start: Tensor, steps: int, locked: Tensor) -> Quadrature:
    """Runs Lanczos from one probe, orthogonal to eigenvectors that are known.

    Args:
        matvec: v ↦ Hv.
        start: z less its part along `locked`, z of random signs; shape (n,).
        steps: Products to spend; fewer where the probe's Krylov space ends.
        locked: Orthonormal eigenvectors, shape (k, n).

    References:
        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J.
        Matrix Anal. Appl. 38 (2017).
    """
    length = float(start.double().norm())
    rows = torch.empty((steps, len(start)), dtype=start.dtype, device=start.device)
    alpha, beta = [], list[float]()
    image, vector = start, start / length if length > 0 else start
    for j in range(steps if length > 0 else 0):
        rows[j] = vector
        product = matvec(vector)
        if j == 0:
            image = product * length
        alpha.append(float(vector.double() @ product.double()))
        rest = product.to(start)
        for _ in range(2):  # full reorthogonalisation, as in krylov.py
            rest = rest - (locked @ rest) @ locked
            rest = rest - (rows[: j + 1] @ rest) @ rows[: j + 1]
        beta.append(float(rest.double().norm()))
        if beta[-1] <= 8 * torch.finfo(start.dtype).eps * max(float(product.norm()), math.ulp(0.0)):
            break
        vector = rest / beta[-1]
    if not alpha:
        return Quadrature(np.zeros(0), np.zeros(0), image, 0.0)
    if not np.isfinite(alpha).all():
        nothing = np.full(len(alpha), math.nan)
        return Quadrature(nothing, nothing, image, math.nan)
    node, coordinate = eigh_tridiagonal(np.array(alpha), np.array(beta[:-1]))
    return Quadrature(node, length**2 * coordinate[0] ** 2, image, beta[-1])


@dataclass(frozen=True)
class Density:
    """A smoothed density on a grid, with the spread between probes.

    Attributes:
        at: Eigenvalues where it is given, shape (n_grid,).
        density: Share of eigenvalues per unit of eigenvalue, shape (n_grid,); its integral is 1.
        stderr: Standard error over probes, shape (n_grid,).
        width: Standard deviation of the Gaussian it is smoothed with.
    """

    at: Floats
    density: Floats
    stderr: Floats
    width: float


def density(found: Floats, probes: list[Quadrature], n: int, *, n_grid: int, width: float) -> Density:
    """Smooths eigenvalues and quadrature nodes with a Gaussian.

    Args:
        found: Eigenvalues that are locked, each counts as one; shape (k,).
        probes: Quadratures of what is left.
        n: Dimension.
        n_grid: Points of the grid, which reaches 4 widths beyond the smallest and largest node.
        width: Standard deviation of the Gaussian; 0 takes 1/100 of the range of the spectrum.
    """
    everything = np.concatenate([found, *(probe.node for probe in probes)])
    low, high = float(everything.min()), float(everything.max())
    if not width:
        width = max((high - low) / 100, 1e-12 * max(abs(low), abs(high)), np.finfo(float).tiny)
    at = np.linspace(low - 4 * width, high + 4 * width, n_grid)
    known = _smoothed(at, found, np.ones(len(found)), width)
    curves = np.array([(known + _smoothed(at, p.node, p.weight, width)) / n for p in probes])
    return Density(at, curves.mean(0), np.array([widened_stderr(column) for column in curves.T]), width)


def _smoothed(at: Floats, node: Floats, weight: Floats, width: float) -> Floats:
    distance = (at[:, None] - node[None, :]) / width
    curve: Floats = np.exp(-(distance**2) / 2) @ weight / (width * math.sqrt(2 * math.pi))
    return curve


def moments(found: Floats, probes: list[Quadrature], power: int) -> tuple[float, float]:
    """Moment tr H^power as the probes have it, and its standard error."""
    samples = np.array([p.weight @ p.node**power for p in probes])
    return float((found**power).sum() + samples.mean()), widened_stderr(samples)


@dataclass(frozen=True)
class Negative:
    """The negative part of a spectrum; standard errors are over probes.

    Attributes:
        share: Fraction of the eigenvalues that are below −cut.
        share_stderr: Its standard error.
        trace: Sum of those eigenvalues.
        trace_stderr: Its standard error.
    """

    share: float
    share_stderr: float
    trace: float
    trace_stderr: float


def negative_part(found: Floats, probes: list[Quadrature], n: int, *, cut: float) -> Negative:
    """How many eigenvalues are negative, and their sum.

    Args:
        found: Eigenvalues that are locked.
        probes: Quadratures of what is left.
        n: Dimension.
        cut: Eigenvalues between −cut and 0 count as zero: what rounding cannot tell from it.
    """

    def below(node: Floats, weight: Floats) -> tuple[float, float]:
        where = node < -cut
        return float(weight[where].sum()), float(weight[where] @ node[where])

    known = below(found, np.ones(len(found)))
    samples: NDArray[np.float64] = np.array([below(p.node, p.weight) for p in probes])
    share, total = (known[i] + samples[:, i].mean() for i in (0, 1))
    errors = [widened_stderr(samples[:, i]) for i in (0, 1)]
    return Negative(share / n, errors[0] / n, total, errors[1])
