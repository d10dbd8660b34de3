"""Linear models of a network: gradient descent by eigenmodes, least squares, and the span of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Rows = Tensor | slice
"""Which samples: their places, or all of them."""
FULL = 1e-9
"""A sample whose leverage is 1 up to this is the only one in some direction: its residual there is 0."""


class Decomposition(NamedTuple):
    """Thin singular value decomposition A = U diag(s) V, directions below the tolerance left out.

    Attributes:
        left: U, an orthonormal basis of the span of the columns, shape (n_samples, rank).
        singular: s, largest first, shape (rank,).
        right: V, shape (rank, n_features).
    """

    left: Tensor
    singular: Tensor
    right: Tensor


def decompose(features: Tensor, rtol: float = 1e-12) -> Decomposition:
    """Decompose a matrix of features, float64 of shape (n_samples, n_features).

    Args:
        features: One row per sample.
        rtol: Singular values below this part of the largest count as zero; the precision of the data is a
            good choice where they were rounded, since rounding alone makes dependent columns independent.
    """
    tall = features.shape[0] > features.shape[1]
    basis, triangle = torch.linalg.qr(features) if tall else (None, features)
    left, singular, right = torch.linalg.svd(triangle, full_matrices=False)
    keep = singular > rtol * singular[:1].sum()
    left = left[:, keep] if basis is None else basis @ left[:, keep]
    return Decomposition(left, singular[keep], right[keep])


def least_squares(found: Decomposition, targets: Tensor) -> Tensor:
    """Coefficients of smallest norm that minimise ‖Aβ − Y‖, shape (n_features, n_outputs)."""
    return found.right.T @ ((found.left.T @ targets) / found.singular[:, None])


def remaining(
    eigenvalues: Tensor, steps: Sequence[int], rates: Sequence[float], momentum: float, nesterov: bool
) -> Tensor:
    """What is left of the error in each eigenmode after so many steps of gradient descent.

    With one learning rate η and no momentum (1 − ηλ)^t; otherwise the recursion of the optimizer in each
    mode, v ← μv + λm, m ← m − ηv (Nesterov: m ← m − η(λm + μv)), from m = 1 and v = 0.

    Args:
        eigenvalues: λ of the Hessian of the loss, shape (n_modes,).
        steps: At which to report, ascending, from 0.
        rates: η of every step, at least `max(steps)` of them.
        momentum: μ.
        nesterov: Whether the momentum is Nesterov's, as PyTorch writes it.

    Returns:
        Factors, shape (n_steps, n_modes).
    """
    if not momentum and len(set(rates)) == 1:
        power = torch.tensor(list(steps), dtype=torch.float64)[:, None]
        return (1 - rates[0] * eigenvalues)[None, :] ** power
    left, velocity = torch.ones_like(eigenvalues), torch.zeros_like(eigenvalues)
    rows, wanted = [], set(steps)
    for step in range(max(steps) + 1):
        if step in wanted:
            rows.append(left)
        if step < max(steps):
            gradient = eigenvalues * left
            velocity = momentum * velocity + gradient
            left = left - rates[step] * (gradient + momentum * velocity if nesterov else velocity)
    index = {step: row for row, step in enumerate(sorted(wanted))}
    return torch.stack([rows[index[step]] for step in steps])


def descend_by_modes(
    found: Decomposition,
    error: Tensor,
    curvature: float,
    steps: Sequence[int],
    rates: Sequence[float],
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Tensor:
    """Gradient descent from β = 0 on the squared loss (c/2) ‖Aβ − E‖², without iterating over the samples.

    Args:
        found: Of the features A.
        error: E, targets minus where the model starts, shape (n_samples, n_outputs).
        curvature: c, the second derivative of the loss in one output of one sample: 2/(n_samples n_outputs)
            for the mean squared error.
        steps: At which to report, ascending, from 0.
        rates: Learning rate of every step.
        momentum: Heavy-ball coefficient.
        nesterov: Whether it is Nesterov's.

    Returns:
        Coefficients, shape (n_steps, n_features, n_outputs).
    """
    left = remaining(curvature * found.singular**2, steps, rates, momentum, nesterov)
    optimum = (found.left.T @ error) / found.singular[:, None]
    return torch.einsum("kf,tk,ko->tfo", found.right, 1 - left, optimum)


def descend(
    features: Tensor,
    start: Tensor,
    gradient: Callable[[Tensor, Rows], Tensor],
    steps: Sequence[int],
    rates: Sequence[float],
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    batches: Iterator[Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Gradient descent from β = 0 on any loss of the outputs start + Aβ, step by step.

    Args:
        features: A, shape (n_samples, n_features).
        start: Outputs at β = 0, shape (n_samples, n_outputs).
        gradient: `gradient(outputs, rows)`, of the mean loss over these samples by their outputs.
        steps: At which to report, ascending, from 0.
        rates: Learning rate of every step.
        momentum: Heavy-ball coefficient.
        nesterov: Whether it is Nesterov's.
        batches: The samples of each step; None takes all of them every time.
        progress: Called after every step with how many were made.

    Returns:
        Coefficients, shape (n_steps, n_features, n_outputs).
    """
    weights = torch.zeros(features.shape[1], start.shape[1], dtype=torch.float64)
    velocity = torch.zeros_like(weights)
    kept, wanted = {}, set(steps)
    for step in range(max(steps) + 1):
        if step in wanted:
            kept[step] = weights
        if step < max(steps):
            rows: Rows = slice(None) if batches is None else next(batches)
            slope = features[rows].T @ gradient(start[rows] + features[rows] @ weights, rows)
            velocity = momentum * velocity + slope
            weights = weights - rates[step] * (slope + momentum * velocity if nesterov else velocity)
            if progress is not None:
                progress(step + 1)
    return torch.stack([kept[step] for step in steps])


def shuffled(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of so many of n samples without end, in a new order every epoch, its last one smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(n, generator=generator), size)


class Split(NamedTuple):
    """Parts of a residual in a space and in its complement, over the squared norm of the target."""

    inside: float
    inside_stderr: float
    outside: float
    outside_stderr: float


def split_residual(basis: Tensor, residual: Tensor, target: Tensor) -> Split:
    """Compute ‖P r‖²/‖y‖² and ‖(1 − P) r‖²/‖y‖² with P the projection on the span of the basis.

    Standard errors are a jackknife over samples. Leaving one out changes the space too, which costs nothing:
    the squared norm outside falls by e_i²/(1 − h_i), with e = (1 − P) r and leverages h_i = P_ii.

    Args:
        basis: Orthonormal columns, shape (n_samples, dimension).
        residual: r, shape (n_samples, n_outputs).
        target: y, the same shape.

    Returns:
        NaN throughout where the target is zero, and outside where the space is everything.

    References:
        Hu, Xiao, Adlam and Pennington, "The Surprising Simplicity of the Early-Time Learning Dynamics of
        Neural Networks", NeurIPS 2020 (residuals in V_lin and in its complement).
    """
    n = len(residual)
    scale = float((target**2).sum())
    if not scale:
        return Split(math.nan, math.nan, math.nan, math.nan)
    error = residual - basis @ (basis.T @ residual)
    slack = 1 - (basis**2).sum(1)
    alone = slack < FULL
    drop = torch.where(alone, 0.0, (error**2).sum(1) / torch.where(alone, 1.0, slack))
    total, outside = float((residual**2).sum()), float((error**2).sum())
    scales = scale - (target**2).sum(1)
    outsides = outside - drop
    insides = total - (residual**2).sum(1) - outsides
    full = basis.shape[1] >= n
    return Split(
        (total - outside) / scale,
        _jackknife(insides / scales),
        math.nan if full else outside / scale,
        math.nan if full else _jackknife(outsides / scales),
    )


def _jackknife(without: Tensor) -> float:
    """Standard error from the values with each sample left out in turn."""
    n = len(without)
    if n < 2 or not bool(torch.isfinite(without).all()):
        return math.nan
    return math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))


def ratio_of_means(above: Tensor, below: Tensor) -> tuple[float, float]:
    """Compute Σa/Σb over samples with its standard error (first order), NaN where Σb is not positive."""
    n, total = len(above), float(below.sum())
    if not (total > 0 and math.isfinite(total)) or not bool(torch.isfinite(above).all()):
        return math.nan, math.nan
    ratio = float(above.sum()) / total
    if n < 2:
        return ratio, math.nan
    return ratio, math.sqrt(n / (n - 1) * float(((above - ratio * below) ** 2).sum())) / total
