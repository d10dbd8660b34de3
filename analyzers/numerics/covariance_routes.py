"""Measures the covariance K of per-sample gradients of a model: all inner products, or products with K."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.covariance import (
    Floats,
    GradientCovariance,
    Gradients,
    Partition,
    from_gram,
    gram_matrix,
)
from dynprobe.analyzers.numerics.lanczos import lanczos
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.outer_products import GradientCovarianceOperator
from dynprobe.analyzers.numerics.per_sample import loss_gradients

Batches = Iterable[tuple[Any, Tensor]]

COPIES = 3
"""Matrices of the Gram matrix's size that its decomposition holds at once."""


def gradient_covariance(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    groups: Partition,
    *,
    k: int,
    memory: float = 4e9,
    tol: float = 1e-4,
    seed: int = 0,
    at_least: int = 5,
) -> GradientCovariance:
    """Measures the covariance of the per-sample gradients.

    All inner products where they and the factors of the gradients fit in `memory`: one pass for the
    gradients, then n² inner products, and the spectrum is that of a matrix in float64. Otherwise Lanczos on
    products with K, and one more pass for norms and projections.

    Args:
        model: Used in the mode it is in, and left unchanged.
        batches: Re-iterable pairs (inputs, targets).
        loss: Per-sample loss.
        groups: From `partition`.
        k: How many eigenvalues; at most min(n − 1, P).
        memory: Bytes.
        tol: Relative tolerance of the eigenvalues (Lanczos only).
        seed: Of the start vector (Lanczos only).
        at_least: How many eigenvectors to project on, where there are as many.
    """
    n_parameters = sum(weight.numel() for weight in model.parameters())
    stored = _stored(model, batches, loss, len(groups.group), memory)
    if stored is not None:
        gram, losses = gram_matrix(stored[0]), stored[1]
        return from_gram(gram, losses, groups, k=k, at_least=at_least, n_parameters=n_parameters)
    wanted = min(max(k, at_least), len(groups.group) - 1, n_parameters)
    return _from_products(model, batches, loss, groups, k=k, wanted=wanted, tol=tol, seed=seed, memory=memory)


def _stored(
    model: nn.Module, batches: Batches, loss: Loss, n_samples: int, memory: float
) -> tuple[list[Gradients], Floats] | None:
    """All gradients as factors, with the losses; None as soon as they will clearly not fit."""
    spare = memory - COPIES * 8.0 * n_samples**2
    if spare < 0:
        return None
    gradients: list[Gradients] = []
    losses: list[Floats] = []
    held = seen = 0
    for factors, values in loss_gradients(model, batches, loss):
        held += sum(factor.nbytes for factor in factors.values())
        seen += len(values)
        if held * n_samples > spare * seen:
            return None
        gradients.append(factors)
        losses.append(values.detach().double().cpu().numpy())
    return gradients, np.concatenate(losses)


def _from_products(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    groups: Partition,
    *,
    k: int,
    wanted: int,
    tol: float,
    seed: int,
    memory: float,
) -> GradientCovariance:
    operator = GradientCovarianceOperator(model, batches, loss)
    pairs = lanczos(
        operator.matvec,
        operator.n_parameters,
        k=wanted,
        tol=tol,
        seed=seed,
        device=operator.device,
        rounding=operator.rounding,
        max_basis=max(wanted + 20, int(memory / (8 * operator.n_parameters))),
    )
    directions = [operator.as_dict(vector) for vector in pairs.eigenvector]
    raw, squared_norm, inner, losses = _projected(model, batches, loss, groups.weights(), directions)
    n_groups = int(groups.group.max()) + 1
    return GradientCovariance(
        "lanczos",
        pairs.eigenvalue[:k],
        pairs.residual[:k],
        bool(pairs.converged[:k].all()),
        raw - raw.mean(0),
        raw.mean(0),
        squared_norm,
        inner[:n_groups, :n_groups],
        inner[n_groups:, n_groups:],
        losses,
        groups,
        pairs.n_matvec,
    )


def _projected(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    averages: Floats,
    directions: Sequence[Mapping[str, Tensor]],
) -> tuple[Floats, Floats, Floats, Floats]:
    """One pass: g_i·e_a, ‖g_i‖², inner products of the averages of gradients that the rows weigh, and ℓ_i."""
    scores, norms, losses = [], [], []
    means: list[Tensor | None] = [None] * len(averages)
    weights, done = torch.from_numpy(averages), 0
    for factors, values in loss_gradients(model, batches, loss):
        part, done = weights[:, done : done + len(values)], done + len(values)
        for row in torch.nonzero(part.any(1)).flatten().tolist():
            sums = [factor.combine(part[row].to(values.device)).flatten() for factor in factors.values()]
            before = means[row]
            means[row] = torch.cat(sums) if before is None else before + torch.cat(sums)
        scores.append(torch.stack([_slopes(factors, direction) for direction in directions], 1))
        norms.append(torch.stack([factor.squared_norm() for factor in factors.values()]).sum(0))
        losses.append(values.detach().double())
    rows = [mean for mean in means if mean is not None]
    inner = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    found = [torch.cat(parts).cpu().numpy() for parts in (scores, norms, losses)]
    return found[0], found[1], inner.cpu().numpy(), found[2]


def _slopes(factors: Gradients, direction: Mapping[str, Tensor]) -> Tensor:
    """g_i·d of every sample, shape (n,)."""
    return torch.stack([factor.dot(direction[name]) for name, factor in factors.items()]).sum(0)
