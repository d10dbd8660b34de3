"""The statistics of canonical correlations from products of orthonormal coordinates, in batches of layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESOLVED = 8.0
"""Times √eps: below it, a correlation from a squared matrix is rounding, and has no direction."""


@dataclass(frozen=True)
class Side:
    """Layers of one network that have the same shape, as one network of a pair."""

    index: list[int]
    coordinate: Tensor  # (n, layers · r)
    loading: Tensor  # (layers, d, r)
    singular_value: Tensor  # (layers, r)
    components: Tensor  # (layers,)

    @property
    def kept(self) -> Tensor:
        """Which components SVCCA keeps, `(layers, r)`."""
        return (
            torch.arange(self.singular_value.shape[-1], device=self.components.device)
            < (self.components[:, None])
        )


@dataclass(frozen=True)
class Triple:
    """A singular value decomposition: `left diag(value) right'`; vectors are empty where not asked for."""

    left: Tensor
    value: Tensor
    right: Tensor


@dataclass(frozen=True)
class Decomposed:
    """What a pair's statistics are made of.

    Args:
        cross: M = U_a'U_b, `(layers_a, layers_b, r_a, r_b)`.
        canonical: Of M; None where canonical correlations are refused.
        leading: Of the corner of M that SVCCA keeps.
        weighed: Of diag(σ_a) M diag(σ_b), σ of length 1.
    """

    cross: Tensor
    canonical: Triple | None
    leading: Triple
    weighed: Triple


def decompose(
    cross: Tensor, a: Side, b: Side, *, canonical: bool, vectors: bool, exact: bool = True
) -> Decomposed:
    """Decomposes the products of two networks' coordinates.

    Args:
        cross: U_a'U_b, `(layers_a, layers_b, r_a, r_b)`.
        a: The first network's layers.
        b: The second's.
        canonical: Whether canonical correlations are wanted.
        vectors: Whether the vectors of `leading` and `weighed` are.
        exact: False: by squaring, in half the time.
    """
    most_a, most_b = int(a.components.max()), int(b.components.max())
    corner = cross[..., :most_a, :most_b]
    corner = corner * a.kept[:, None, :most_a, None] * b.kept[None, :, None, :most_b]
    weight_a, weight_b = (
        side.singular_value / torch.linalg.vector_norm(side.singular_value, dim=-1, keepdim=True)
        for side in (a, b)
    )
    weighed = weight_a[:, None, :, None] * cross * weight_b[None, :, None, :]
    return Decomposed(
        cross,
        _singular(cross, True, exact) if canonical else None,
        _singular(corner, vectors, exact),
        _singular(weighed, vectors, exact),
    )


def statistics(found: Decomposed, a: Side, b: Side) -> dict[str, Tensor]:
    """The statistics by name, each `(layers_a, layers_b)`.

    Args:
        found: Of the two networks' layers.
        a: The first's.
        b: The second's.
    """
    fewest = torch.minimum(a.components[:, None], b.components[None])
    values = {"svcca": found.leading.value.sum(-1) / fewest, "procrustes": found.weighed.value.sum(-1)}
    if found.canonical is not None:
        rho = found.canonical.value
        values["mean_rho"] = rho.mean(-1)
        values["mean_rho_squared"] = (found.cross**2).sum((-2, -1)) / rho.shape[-1]
        values["pwcca_a"] = _projected(a.loading[:, None] @ found.canonical.left, rho)
        values["pwcca_b"] = _projected(b.loading[None] @ found.canonical.right, rho)
        values["pwcca"] = (values["pwcca_a"] + values["pwcca_b"]) / 2
    return values


def _projected(projection: Tensor, rho: Tensor) -> Tensor:
    """Σ α_i ρ_i / Σ α_i, α_i = Σ_j |⟨h_i, x_j⟩| (Morcos et al. 2018, §2.1), of ⟨h_i, x_j⟩ `(…, d, m)`."""
    weight = projection.abs().sum(-2)
    return (weight * rho).sum(-1) / weight.sum(-1)


def _singular(matrix: Tensor, vectors: bool, exact: bool) -> Triple:
    if exact and vectors:
        left, value, right = torch.linalg.svd(matrix, full_matrices=False)
        return Triple(left, value, right.mT)
    if matrix.shape[-2] > matrix.shape[-1]:
        turned = _singular(matrix.mT, vectors, exact)
        return Triple(turned.right, turned.value, turned.left)
    nothing = matrix.new_empty(0)
    if exact:
        return Triple(nothing, torch.linalg.svdvals(matrix), nothing)
    if not vectors:
        return Triple(nothing, torch.linalg.eigvalsh(matrix @ matrix.mT).clamp(min=0).sqrt(), nothing)
    square, left = torch.linalg.eigh(matrix @ matrix.mT)
    value, left = square.flip(-1).clamp(min=0).sqrt(), left.flip(-1)
    unresolved = RESOLVED * torch.finfo(value.dtype).eps ** 0.5
    inverse = torch.where(value > unresolved, 1 / value, 0.0)
    return Triple(left, value, (matrix.mT @ left) * inverse[..., None, :])
