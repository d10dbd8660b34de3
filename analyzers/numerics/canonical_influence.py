"""What each block of samples does to the statistics of canonical correlations, to first order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dynprobe.analyzers.numerics.canonical_statistics import Decomposed, Side, Triple

WIDE = 256
"""Ranks beyond which derivatives, which need few digits, are computed in float32."""
MIXING = 2.0
"""Times 1/n: the square of a rotation between two directions that samples cannot tell apart."""


def influences(found: Decomposed, a: Side, b: Side, rows: tuple[int, ...]) -> dict[str, Tensor]:
    """The derivative of every statistic by the weight of each block of samples.

    With weights w, a statistic is a function of S_a = U_a'WU_a, S_b and C = U_a'WU_b, at w = 1 I, I and M.
    Its derivatives there, Θ_a, Θ_b and Θ, are found once; a block's influence is ⟨Θ_a, S_a⟩ + ⟨Θ_b, S_b⟩ +
    ⟨Θ, C⟩ of its own rows. No block needs a decomposition of its own. The number of components and the ranks
    are those of all samples. Directions i and j with eigenvalues λ turn into each other by x/(λ_i − λ_j); two
    that n samples do not tell apart, for which that has no meaning, by x(λ_i − λ_j)/((λ_i − λ_j)² + δ²),
    δ² = 2/n of their size.

    Args:
        found: Decompositions of all samples, with vectors.
        a: The first network's layers.
        b: The second's.
        rows: Rows of each block.

    Returns:
        By statistic `(layers_a, layers_b, n_blocks)`; they add up to 0 over the blocks.

    References:
        Romanazzi, "Influence in canonical correlation analysis", Psychometrika 57 (1992).
        Efron, "The Jackknife, the Bootstrap and Other Resampling Plans", 1982, §6 (infinitesimal jackknife).
    """
    dtype = torch.float32 if max(found.cross.shape[-2:]) > WIDE else torch.float64
    names, forms = _forms(found, a, b, sum(rows))
    of_a, of_b, of_cross = (torch.stack(part).to(dtype) for part in zip(*forms, strict=True))
    blocks = []
    for x, y in zip(
        *(
            torch.split(side.coordinate.to(dtype).view(sum(rows), len(side.index), -1), list(rows))
            for side in (a, b)
        ),
        strict=True,
    ):
        blocks.append(
            torch.einsum("fabrs,abrs->fab", of_cross, torch.einsum("nar,nbs->abrs", x, y))
            + torch.einsum("fabrs,ars->fab", of_a, torch.einsum("nar,nas->ars", x, x))
            + torch.einsum("fabrs,brs->fab", of_b, torch.einsum("nbr,nbs->brs", y, y))
        )
    values = dict(zip(names, torch.stack(blocks, -1).double(), strict=True))
    if "pwcca_a" in values:
        values["pwcca"] = (values["pwcca_a"] + values["pwcca_b"]) / 2
    return values


Form = tuple[Tensor, Tensor, Tensor]
"""Derivatives by S_a, S_b and C."""


def _forms(found: Decomposed, a: Side, b: Side, n: int) -> tuple[list[str], list[Form]]:
    forms = {"svcca": _leading(found, a, b, n), "procrustes": _weighed(found.weighed, a, b)}
    if found.canonical is not None:
        cross, parts = found.cross, found.canonical
        size = parts.value.shape[-1]
        forms["mean_rho"] = _whitened(parts.left @ parts.right.mT / size, cross)
        forms["mean_rho_squared"] = _whitened(2 * cross / size, cross)
        turned = Triple(parts.right, parts.value, parts.left)
        by_cross, own = _projected(a.loading[:, None], parts, n)
        of_a, of_b, of_cross = _whitened(by_cross, cross)
        forms["pwcca_a"] = of_a + own, of_b, of_cross
        by_cross, own = _projected(b.loading[None], turned, n)
        of_a, of_b, of_cross = _whitened(by_cross.mT, cross)
        forms["pwcca_b"] = of_a, of_b + own, of_cross
    return list(forms), list(forms.values())


def _whitened(by_cross: Tensor, cross: Tensor) -> Form:
    """From the derivative by S_a^-½ C S_b^-½."""
    return -0.5 * by_cross @ cross.mT, -0.5 * cross.mT @ by_cross, by_cross


def _weighed(parts: Triple, a: Side, b: Side) -> Form:
    """Of ‖X'WY‖_* / (‖W^½X‖ ‖W^½Y‖): nothing is whitened, but norms change."""
    value = parts.value.sum(-1)[..., None]
    weight_a, weight_b = (
        side.singular_value / torch.linalg.vector_norm(side.singular_value, dim=-1, keepdim=True)
        for side in (a, b)
    )
    by_cross = weight_a[:, None, :, None] * (parts.left @ parts.right.mT) * weight_b[None, :, None, :]
    norms = (-0.5 * value * weight[..., :] ** 2 for weight in (weight_a[:, None], weight_b[None]))
    of_a, of_b = (torch.diag_embed(norm) for norm in norms)
    return of_a, of_b, by_cross


def _leading(found: Decomposed, a: Side, b: Side, n: int) -> Form:
    """Of the mean correlation of the leading components, which turn towards the others."""
    cross, fewest = found.cross, torch.minimum(a.components[:, None], b.components[None])[..., None, None]
    count = torch.arange(found.leading.value.shape[-1], device=cross.device) < fewest[..., 0]
    left, right = (
        pad(vector * count[..., None, :], (0, 0, 0, size - vector.shape[-2])) / fewest.sqrt()
        for vector, size in zip((found.leading.left, found.leading.right), cross.shape[-2:], strict=True)
    )
    rho = found.leading.value[..., None, :]
    by_cross = left @ right.mT
    of_a = _turning(a, n)[:, None] * (cross @ by_cross.mT) - 0.5 * (left * rho) @ left.mT
    of_b = _turning(b, n)[None] * (cross.mT @ by_cross) - 0.5 * (right * rho) @ right.mT
    return of_a, of_b, by_cross


def _turning(side: Side, n: int) -> Tensor:
    """How much of component l comes into kept component k, `(layers, l, k)`, per ⟨u_l, W u_k⟩."""
    square = (side.singular_value / side.singular_value[:, :1]) ** 2
    gap = square[:, None, :] - square[:, :, None]
    blurred = MIXING / n * square[:, None, :] * square[:, :, None]
    between = side.kept[:, None, :] & ~side.kept[:, :, None]
    return torch.where(between, square[:, :, None] * gap / (gap**2 + blurred), 0.0)


def _projected(loading: Tensor, parts: Triple, n: int) -> tuple[Tensor, Tensor]:
    """Of PWCCA with the weights of the left layer: by S_a^-½ C S_b^-½, and by S_a through the weights.

    ⟨h_k, x_j⟩ = (L S_a^½ p_k)_j, where p_k turn with M: p_l comes into p_k by (dN_lk ρ_k + ρ_l dN_kl) /
    (ρ_k² − ρ_l²), dN = P'dM Q, and what is outside of P by dM q_k / ρ_k.
    """
    left, rho, right = parts.left, parts.value, parts.right
    projection = loading @ left
    weight = projection.abs().sum(-2)
    total = weight.sum(-1, keepdim=True)
    value = (weight * rho).sum(-1, keepdim=True) / total
    slope = ((rho - value) / total)[..., None, :]  # by a weight
    back = (loading.mT @ projection.sign()) * slope  # by S_a^½ P
    turned = left.mT @ back
    square = rho**2
    gap = square[..., None, :] - square[..., :, None]
    blurred = MIXING / n * (square[..., None, :] + square[..., :, None])
    rotation = gap / (gap**2 + blurred).clamp(min=torch.finfo(rho.dtype).tiny) * (turned - turned.mT)
    inside = torch.diag_embed(weight / total) + rotation * rho[..., None, :]
    outside = (back - left @ turned) * (rho / (square + MIXING / n))[..., None, :]
    return (left @ inside + outside) @ right.mT, 0.5 * back @ left.mT
