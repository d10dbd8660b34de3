"""Measures the covariance K of per-sample gradients of a model: all inner products, or products with K."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from dynprobe.analyzers.numerics.lanczos import Eigenpairs, lanczos
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.outer_products import GradientCovarianceOperator
from dynprobe.analyzers.numerics.per_sample import loss_gradients

Batches = Iterable[tuple[Any, Tensor]]

COPIES = 3
"""Matrices of the Gram matrix's size that its decomposition holds at once."""
SPARE = 8
"""Vectors that Lanczos needs beside the wanted ones to make headway between restarts."""
DOUBLE = 8
"""Bytes of a float64."""


class TooLittleMemory(ValueError):
    """The vectors that products with K need do not fit in the memory.

    Attributes:
        room: Vectors that fit.
        vectors: Vectors that are needed.
        needed: Bytes with which they would fit.
    """

    def __init__(self, room: int, vectors: int, needed: float) -> None:
        super().__init__(f"{vectors} vectors are needed and {room} fit; {needed:.3g} bytes would do.")
        self.room, self.vectors, self.needed = room, vectors, needed


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
    products with K, half of the memory for its vectors and half for kept graphs; one more pass for norms and
    projections; and one for inner products of mean gradients, or several where not all of these fit at once.

    Args:
        model: Used in the mode it is in, and left unchanged.
        batches: Re-iterable pairs (inputs, targets).
        loss: Per-sample loss.
        groups: From `partition`.
        k: How many eigenvalues; at most min(n − 1, P).
        memory: Bytes. What one batch takes by itself comes on top.
        tol: Relative tolerance of the eigenvalues (Lanczos only).
        seed: Of the start vector (Lanczos only).
        at_least: How many eigenvectors to project on, where there are as many.

    Raises:
        TooLittleMemory: If neither the inner products nor the vectors of Lanczos fit.
    """
    n_parameters = sum(weight.numel() for weight in model.parameters())
    stored = _stored(model, batches, loss, len(groups.group), memory)
    if stored is not None:
        gram, losses = gram_matrix(stored[0]), stored[1]
        return from_gram(
            gram,
            losses,
            groups,
            k=k,
            at_least=at_least,
            n_parameters=n_parameters,
            rounding=_rounding(model),
        )
    wanted = min(max(k, at_least), len(groups.group) - 1, n_parameters)
    return _from_products(model, batches, loss, groups, k=k, wanted=wanted, tol=tol, seed=seed, memory=memory)


def _rounding(model: nn.Module) -> float:
    return max(torch.finfo(weight.dtype).eps for weight in model.parameters())


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
    pairs = _eigenpairs(model, batches, loss, k=wanted, tol=tol, seed=seed, memory=memory)
    raw, squared_norm, losses = _projected(model, batches, loss, pairs.eigenvector)
    n_groups = int(groups.group.max()) + 1
    averages = groups.weights()
    sets = [range(n_groups), range(n_groups, len(averages))]
    room = int((memory - pairs.eigenvector.nbytes) / (DOUBLE * pairs.eigenvector.shape[1]))
    inner = _inner_products(model, batches, loss, averages, _passes(sets, room))
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
        _rounding(model),
        pairs.n_matvec,
    )


def _eigenpairs(
    model: nn.Module, batches: Batches, loss: Loss, *, k: int, tol: float, seed: int, memory: float
) -> Eigenpairs:
    """Leading eigenpairs of K within the memory, without the Krylov space they come from."""
    weights = list(model.parameters())
    n = sum(weight.numel() for weight in weights)
    double = weights[0].dtype == torch.float64
    vector = n * (DOUBLE if double else DOUBLE // 2)
    room, vectors = int(memory / 2 / vector), min(n, k + SPARE) + k  # the eigenvectors come on top
    if room < vectors:
        raise TooLittleMemory(room, vectors, 2.0 * vectors * vector)
    operator = GradientCovarianceOperator(model, batches, loss, memory=memory / 2)
    pairs = lanczos(
        operator.matvec,
        n,
        k=k,
        tol=tol,
        seed=seed,
        dtype=torch.float64 if double else torch.float32,
        device=operator.device,
        rounding=operator.rounding,
        max_basis=min(room - k, n),
    )
    operator.release()
    return replace(pairs, space=None)


def _projected(
    model: nn.Module, batches: Batches, loss: Loss, vectors: Tensor
) -> tuple[Floats, Floats, Floats]:
    """One pass: g_i·e_a with the rows e_a, ‖g_i‖², and ℓ_i."""
    directions = [_as_dict(model, vector) for vector in vectors]
    scores, norms, losses = [], [], []
    for factors, values in loss_gradients(model, batches, loss):
        scores.append(torch.stack([_slopes(factors, direction) for direction in directions], 1))
        norms.append(torch.stack([factor.squared_norm() for factor in factors.values()]).sum(0))
        losses.append(values.detach().double())
    found = [torch.cat(parts).cpu().numpy() for parts in (scores, norms, losses)]
    return found[0], found[1], found[2]


def _as_dict(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """A vector as one tensor per parameter name."""
    named = dict(model.named_parameters())
    pieces = torch.split(vector, [weight.numel() for weight in named.values()])
    return {name: piece.view_as(named[name]) for name, piece in zip(named, pieces, strict=True)}


def _slopes(factors: Gradients, direction: Mapping[str, Tensor]) -> Tensor:
    """g_i·d of every sample, shape (n,)."""
    return torch.stack([factor.dot(direction[name]) for name, factor in factors.items()]).sum(0)


def _passes(sets: Sequence[range], room: int) -> list[list[int]]:
    """Which rows to hold at once, `room` at most, so that any two of a set are together in some pass."""
    if sum(len(rows) for rows in sets) <= room:
        return [[row for rows in sets for row in rows]]
    passes: list[list[int]] = []
    for rows in sets:
        size = len(rows) if len(rows) <= room else max(room // 2, 1)
        blocks = [list(rows[i : i + size]) for i in range(0, len(rows), max(size, 1))]
        pairs = itertools.combinations(blocks, 2)
        passes += blocks if len(blocks) < 2 else [one + other for one, other in pairs]
    return passes


def _inner_products(
    model: nn.Module, batches: Batches, loss: Loss, averages: Floats, passes: Sequence[Sequence[int]]
) -> Floats:
    """Inner products of the averages of gradients that the rows weigh; NaN for two never held together."""
    first, n_parameters = next(model.parameters()), sum(weight.numel() for weight in model.parameters())
    inner = np.full((len(averages), len(averages)), math.nan)
    for rows in passes:
        held, done = torch.zeros(len(rows), n_parameters, dtype=torch.float64, device=first.device), 0
        for factors, values in loss_gradients(model, batches, loss):
            part = torch.from_numpy(averages[rows, done : done + len(values)]).to(held.device)
            done += len(values)
            for row in torch.nonzero(part.any(1)).flatten().tolist():
                at = 0
                for factor in factors.values():
                    piece = factor.combine(part[row]).flatten()
                    held[row, at : at + len(piece)] += piece
                    at += len(piece)
        inner[np.ix_(rows, rows)] = (held @ held.T).cpu().numpy()
    return inner
