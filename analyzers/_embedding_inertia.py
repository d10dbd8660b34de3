"""Counts negative and zero eigenvalues of a Hessian: all of them, or the smallest of a large one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers.numerics.batch_operator import BatchOperator
from dynprobe.analyzers.numerics.lanczos import INSIDE, lanczos

Floats = NDArray[np.float64]

LANCZOS_TOL = 0.02
"""Relative tolerance of the eigenvalues at the lower end: only their signs are counted."""
MOST_PRODUCTS = 100
"""For each of them; where the smallest is zero, no number of products gives it a relative accuracy."""


@dataclass(frozen=True)
class Inertia:
    """Signs of the eigenvalues of a symmetric matrix.

    Attributes:
        negative: Eigenvalues below −tolerance; with `is_bound` at least so many.
        zero: Eigenvalues within the tolerance; NaN where not all eigenvalues are known.
        positive: Eigenvalues above it; likewise.
        tolerance: In units of the eigenvalues.
        smallest: The smallest eigenvalue.
        smallest_error: Bound on its error.
        smallest_nonzero: Least |λ| above the tolerance: how far the counts are from being others.
        eigenvalue: Those known, ascending.
        is_bound: Whether there may be more negative ones: nothing proves that none lies beyond those found.
        converged: Whether they met their tolerance.
    """

    negative: float
    zero: float
    positive: float
    tolerance: float
    smallest: float
    smallest_error: float
    smallest_nonzero: float
    eigenvalue: Floats
    is_bound: bool = False
    converged: bool = True


def count(eigenvalue: Floats, tolerance: float, error: float = 0.0) -> Inertia:
    """The signs of a full set of eigenvalues."""
    eigenvalue = np.sort(eigenvalue)
    size = np.abs(eigenvalue)
    return Inertia(
        negative=int((eigenvalue < -tolerance).sum()),
        zero=int((size <= tolerance).sum()),
        positive=int((eigenvalue > tolerance).sum()),
        tolerance=tolerance,
        smallest=float(eigenvalue[0]),
        smallest_error=error,
        smallest_nonzero=float(size[size > tolerance].min()) if (size > tolerance).any() else math.nan,
        eigenvalue=eigenvalue,
    )


def rounding(n: int) -> float:
    """Relative error of the eigenvalues of a float64 matrix of n rows, from products and decomposition."""
    return float((n + INSIDE) * np.finfo(np.float64).eps)


def dense_inertia(operator: BatchOperator[Any], zero_tol: float) -> Inertia:
    """All eigenvalues, from a product with every unit vector.

    Args:
        operator: In float64.
        zero_tol: Relative to the largest magnitude; never less than rounding allows.
    """
    n = operator.n_parameters
    matrix = torch.stack([operator.matvec(row) for row in torch.eye(n, dtype=torch.float64)]).cpu()
    eigenvalue = torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()
    norm = float(np.abs(eigenvalue).max())
    asymmetry = float((matrix - matrix.T).abs().max())
    error = rounding(n) * norm + asymmetry
    return count(eigenvalue, max(zero_tol * norm, error), error)


def lower_end(operator: BatchOperator[Any], k: int, zero_tol: float, seed: int) -> Inertia:
    """The k smallest eigenvalues by Lanczos: a lower bound of the negative ones, and nothing about zeros.

    Args:
        operator: In float64.
        k: How many.
        zero_tol: As in `dense_inertia`.
        seed: Of the start vector.
    """
    found = lanczos(
        operator.matvec,
        operator.n_parameters,
        k=k,
        which="SA",
        tol=LANCZOS_TOL,
        max_iter=MOST_PRODUCTS * k,
        seed=seed,
        device=operator.device,
        rounding=operator.rounding,
    )
    if found.space is None:
        nothing = count(np.full(k, math.nan), math.nan, math.nan)
        return replace(nothing, zero=math.nan, positive=math.nan, is_bound=True, converged=False)
    norm = float(np.abs(found.space.ritz()[0]).max())
    tolerance = max(zero_tol, rounding(operator.n_parameters)) * norm
    known = found.eigenvalue + found.error_bound < -tolerance
    return Inertia(
        negative=int(known.sum()),
        zero=math.nan,
        positive=math.nan,
        tolerance=tolerance,
        smallest=float(found.eigenvalue[0]),
        smallest_error=float(found.error_bound[0]),
        smallest_nonzero=math.nan,
        eigenvalue=np.sort(found.eigenvalue),
        is_bound=True,
        converged=bool(found.converged.all()),
    )
