"""Second derivatives of every sample's loss in its own input, and Newton directions from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers.numerics.hvp import NoSecondDerivative

CG_TOLERANCE = 1e-3
"""Residual, relative to the gradient, at which a sample's solve stops: the sign and the direction of the
solution are all that is used."""


class InputHessian:
    """Products v_i ↦ H_i v_i for all samples of a batch at once, H_i = ∇²ℓ_i(x_i) with respect to the input.

    The Hessian of Σ_i ℓ_i(x_i) is block diagonal, so one double backward pass gives every sample's product;
    no finite differences. The graph of the gradient is kept.

    Args:
        losses: Inputs of shape (n_samples, …) to the loss of each sample; no sample may see another.
        x: Where.

    Attributes:
        gradient: ∇ℓ_i(x_i), float64, shape (n_samples, n_features).
        n_matvec: Products made so far.

    Raises:
        NoSecondDerivative: An operation of the model cannot be differentiated twice.
    """

    def __init__(self, losses: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.detach().requires_grad_()
        self.n_matvec = 0
        with torch.enable_grad(), _twice_differentiable():
            total = losses(self._x).sum()
            if total.requires_grad:
                self._graph = torch.autograd.grad(total, self._x, create_graph=True, materialize_grads=True)[
                    0
                ]
            else:  # the outputs do not depend on the input
                self._graph = torch.zeros_like(self._x)
        self.gradient = self._graph.detach().double().flatten(1)

    def matvec(self, vectors: Tensor) -> Tensor:
        """H_i v_i for v of shape (n_samples, n_features), float64."""
        self.n_matvec += 1
        if not self._graph.requires_grad:  # the loss is linear in the input
            return torch.zeros_like(vectors)
        with _twice_differentiable():
            (product,) = torch.autograd.grad(
                self._graph,
                self._x,
                vectors.view_as(self._x).to(self._x),
                retain_graph=True,
                materialize_grads=True,
            )
        return product.double().flatten(1)


class Newton(NamedTuple):
    """Newton directions of a batch and what vouches for them; every field has one row per sample.

    Args:
        direction: (H + μI)⁻¹ĝ, ĝ the gradient at unit length; shape (n_samples, n_features), float64.
        residual: ‖(H + μI)s − ĝ‖ from a product of its own; NaN for a truncated solve or without gradient.
        truncated: Whether the curvature was not positive: the direction is the iterate before it showed,
            at the first step the gradient itself.
        iterations: Conjugate gradient steps taken.
        eigenvalue: Largest Ritz value of H from the same steps: a lower bound on its largest eigenvalue.
        damping: μ.
    """

    direction: Tensor
    residual: Tensor
    truncated: Tensor
    iterations: Tensor
    eigenvalue: Tensor
    damping: Tensor


def newton_direction(
    operator: InputHessian, *, damping: float, iterations: int, tol: float = CG_TOLERANCE
) -> Newton:
    """Solve (H_i + μ_i I) s_i = ĝ_i for every sample by conjugate gradients.

    μ_i = damping · |ĝ_i·H_i ĝ_i|, relative to the curvature along the gradient. A piecewise linear network
    with cross-entropy has H = Jᵀ(diag p − ppᵀ)J of rank C − 1 at most, which no solver inverts undamped.
    Where H + μI is not positive along a search direction, the solve stops before it (Steihaug's truncation),
    so that the direction always raises the loss.

    Args:
        operator: The Hessians.
        damping: μ relative to the curvature along the gradient; 0 for none.
        iterations: Largest number of steps; costs one product each and one for the residual.
        tol: Residual at which a sample is done.

    References:
        Steihaug, "The Conjugate Gradient Method and Trust Regions in Large Scale Optimization", SIAM J.
        Numer. Anal. 20 (1983).
    """
    length = torch.linalg.vector_norm(operator.gradient, dim=1)
    usable = (length > 0) & torch.isfinite(length)
    right = torch.where(usable[:, None], operator.gradient / torch.where(usable, length, 1.0)[:, None], 0.0)
    product = operator.matvec(right)
    mu = damping * (right * product).sum(1).abs()

    solution, residual, search = torch.zeros_like(right), right.clone(), right.clone()
    square = (residual * residual).sum(1)
    active, truncated = usable.clone(), torch.zeros_like(usable)
    taken = torch.zeros(len(right), dtype=torch.int64, device=right.device)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(iterations):
        if step:
            if not bool(active.any()):
                break
            product = operator.matvec(search)
        image = product + mu[:, None] * search
        curvature = (search * image).sum(1)
        bad = active & ~(curvature > 0)
        truncated |= bad
        active = active & ~bad
        alpha = torch.where(active, square / torch.where(active, curvature, 1.0), 0.0)
        solution += alpha[:, None] * search
        residual -= alpha[:, None] * image
        left = (residual * residual).sum(1)
        beta = torch.where(active, left / torch.where(square > 0, square, 1.0), 0.0)
        steps.append((alpha, beta, active))
        taken += active
        search = residual + beta[:, None] * search
        square = left
        active = active & (left > tol**2)
    misfit = right - operator.matvec(solution) - mu[:, None] * solution
    nothing = torch.full_like(mu, torch.nan)
    return Newton(
        torch.where((taken == 0)[:, None], right, solution),
        torch.where(usable & ~truncated, torch.linalg.vector_norm(misfit, dim=1), nothing),
        truncated,
        taken,
        torch.where(taken > 0, _largest_ritz(steps) - mu, nothing),
        mu,
    )


def _largest_ritz(steps: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Largest eigenvalue of the tridiagonal matrix that conjugate gradients share with Lanczos.

    T_kk = 1/α_k + β_{k−1}/α_{k−1} and T_{k,k+1} = √β_k/α_k (Saad, "Iterative Methods for Sparse Linear
    Systems", 2003, §6.7.3). Steps that a sample no longer took repeat its first diagonal entry, uncoupled.
    """
    alpha, beta, active = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    inverse = 1 / torch.where(active, alpha, 1.0)
    diagonal = inverse.clone()
    diagonal[:, 1:] += beta[:, :-1] * inverse[:, :-1]
    diagonal = torch.where(active, diagonal, inverse[:, :1])
    beside = torch.where(active[:, 1:], beta[:, :-1].sqrt() * inverse[:, :-1], 0.0)
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    largest: Tensor = torch.linalg.eigvalsh(matrix)[:, -1]
    return largest


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Kernels that have a second derivative; an operation without one is named."""
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    except RuntimeError as error:  # NotImplementedError is one
        if "derivative for" in str(error) and "not implemented" in str(error):
            raise NoSecondDerivative(
                f"The model uses an operation without a second derivative: {str(error).splitlines()[0]}"
            ) from error
        raise
