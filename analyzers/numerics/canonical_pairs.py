"""Canonical correlations of all layers of one network with all layers of another, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers.numerics.canonical import Space

Floats = NDArray[np.float64]

CANONICAL = ("mean_rho", "mean_rho_squared", "pwcca_a", "pwcca_b", "pwcca")
STATISTICS = (*CANONICAL, "svcca", "procrustes")

WORKING = 64 * 2**20
"""Bytes of cross products in hand at once."""

FULL = 16
"""Dimensions up to which chance takes all draws; see `draws`."""
FEWEST = 3

RESOLVED = 1e-7
"""Below it, a correlation from a squared matrix is rounding, and has no direction."""


@dataclass(frozen=True)
class Comparison:
    """All layers of one network against all of another; a statistic that was not computed is NaN.

    Args:
        rho: `(layer_a, layer_b, component)`, canonical correlations, descending, NaN beyond the last.
        value: Each of `STATISTICS`, `(layer_a, layer_b)`.
        deleted: Likewise with each block left out, `(layer_a, layer_b, block)`; empty with one block.
        chance: Likewise, the mean over permutations of the rows; empty without any.
    """

    rho: Floats
    value: dict[str, Floats]
    deleted: dict[str, Floats]
    chance: dict[str, Floats]


@dataclass(frozen=True)
class _Side:
    """Layers of one network that have the same shape; V stands for all data, or for each block left out."""

    index: list[int]
    coordinate: Tensor  # (n, layers · r)
    loading: Tensor  # (layers, d, r)
    singular_value: Tensor  # (layers, V, r)
    rank: Tensor  # (layers, V)
    components: Tensor  # (layers, V)
    spread: Tensor | None = None  # (layers, V, r, r)


def compare(
    spaces_a: Sequence[Space | None],
    spaces_b: Sequence[Space | None],
    *,
    permutations: int = 0,
    seed: int = 0,
    force: bool = False,
) -> Comparison:
    """Compares every layer of one network with every layer of another.

    With M = U_a'U_b of the orthonormal coordinates, ρ are the singular values of M = P diag(ρ) Q'; PWCCA
    weighs ρ_i by the column sums of |X'h_i| = |loading · P|; SVCCA takes the leading corner of M; and
    Procrustes is Σ singular values of diag(σ_a) M diag(σ_b) / (‖σ_a‖ ‖σ_b‖). No step depends on n but M.

    Args:
        spaces_a: Layers of the first network, None for a constant one.
        spaces_b: Of the second, on the same samples and with the same blocks.
        permutations: Permutations of the rows (of whole samples, where these have several rows) for chance;
            of wide layers fewer, see `draws`.
        seed: Of these.
        force: Also where the ranks add up to n − 1 or more, and correlations of 1 say nothing.

    References:
        Björck and Golub, "Numerical methods for computing angles between linear subspaces",
        Math. Comp. 27 (1973).
    """
    shape = (len(spaces_a), len(spaces_b))
    widest = [max((s.rank for s in spaces if s is not None), default=0) for spaces in (spaces_a, spaces_b)]
    blocks = max((len(s.rows) for s in (*spaces_a, *spaces_b) if s is not None), default=1)
    rho = np.full((*shape, min(widest)), np.nan)
    value = {name: np.full(shape, np.nan) for name in STATISTICS}
    deleted = {name: np.full((*shape, blocks), np.nan) for name in STATISTICS} if blocks > 1 else {}
    chance = {name: np.full(shape, np.nan) for name in STATISTICS} if permutations else {}
    for index_a, index_b in _chunks(spaces_a, spaces_b, blocks):
        some_a = [space for i in index_a if (space := spaces_a[i]) is not None]
        some_b = [space for i in index_b if (space := spaces_b[i]) is not None]
        canonical = force or not refused(some_a[0].rank, some_b[0].rank, some_a[0].n_rows)
        a, b = _side(index_a, some_a), _side(index_b, some_b)
        at = np.ix_(index_a, index_b)
        parts = _cross(a, b, some_a[0].rows)
        found, correlation = _statistics(parts.sum(2, keepdim=True), a, b, canonical, exact=True)
        _put(value, at, {name: values[..., 0] for name, values in found.items()})
        if correlation is not None:
            rho[at[0], at[1], : correlation.shape[-1]] = correlation[:, :, 0].cpu().numpy()
        if deleted:
            _put(deleted, at, _deleted(parts, a, b, some_a, some_b, canonical))
        if chance:
            count = draws(permutations, some_a[0].rank, some_b[0].rank)
            _put(chance, at, _chance(a, b, _permutations(some_a[0], count, seed), canonical))
    return Comparison(rho, value, deleted, chance)


def refused(rank_a: int, rank_b: int, n_rows: int) -> bool:
    """Whether the two subspaces fill all that centred data of so many rows can span."""
    return rank_a + rank_b >= n_rows - 1


def draws(permutations: int, rank_a: int, rank_b: int) -> int:
    """Permutations for chance where m = min(rank_a, rank_b): in proportion to 1/m beyond `FULL`, at least 3.

    Mean ρ of unrelated layers varies by about 1/√(2 n m) between permutations, so the error of its mean
    stays the same, while wide layers, which cost the most, take a few.
    """
    return min(permutations, max(FEWEST, math.ceil(permutations * FULL / min(rank_a, rank_b))))


def comparable(a: Space, b: Space) -> bool:
    """Whether row i is the same sample, and the same place in it, in both."""
    return (a.n_rows, a.rows, a.cluster) == (b.n_rows, b.rows, b.cluster)


def _chunks(
    spaces_a: Sequence[Space | None], spaces_b: Sequence[Space | None], blocks: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Layers of equal shape on either side, few enough at a time to stay within `WORKING`."""
    for group_a in _groups(spaces_a):
        for group_b in _groups(spaces_b):
            a, b = spaces_a[group_a[0]], spaces_b[group_b[0]]
            if a is None or b is None or not comparable(a, b):
                continue
            pairs = max(1, WORKING // (8 * (1 + blocks) * max(a.rank, len(a.loading)) * b.rank))
            step_b = min(len(group_b), pairs)
            step_a = max(1, pairs // step_b)
            for i in range(0, len(group_a), step_a):
                for j in range(0, len(group_b), step_b):
                    yield group_a[i : i + step_a], group_b[j : j + step_b]


def _groups(spaces: Sequence[Space | None]) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, space in enumerate(spaces):
        if space is not None:
            shape = (space.rank, tuple(space.loading.shape), space.n_rows, space.rows, space.cluster)
            groups.setdefault(shape, []).append(i)
    return list(groups.values())


def _side(index: list[int], spaces: list[Space]) -> _Side:
    device = spaces[0].coordinate.device
    return _Side(
        index,
        torch.cat([space.coordinate for space in spaces], 1),
        torch.stack([space.loading for space in spaces]),
        torch.stack([space.singular_value for space in spaces])[:, None],
        torch.tensor([[space.rank] for space in spaces], device=device),
        torch.tensor([[space.components] for space in spaces], device=device),
    )


def _cross(a: _Side, b: _Side, rows: tuple[int, ...]) -> Tensor:
    """U_a'U_b of each block, `(layers_a, layers_b, block, r_a, r_b)`; their sum is that of all rows."""
    parts = [
        (x.mT @ y).view(len(a.index), -1, len(b.index), y.shape[1] // len(b.index))
        for x, y in zip(
            torch.split(a.coordinate, list(rows)), torch.split(b.coordinate, list(rows)), strict=True
        )
    ]
    return torch.stack(parts).permute(1, 3, 0, 2, 4)


def _deleted(
    parts: Tensor, a: _Side, b: _Side, spaces_a: list[Space], spaces_b: list[Space], canonical: bool
) -> dict[str, Tensor]:
    """Every statistic with each block left out, from the block's own sums."""
    rows = spaces_a[0].rows
    total_a, total_b = (
        torch.stack(
            [part.sum(0).view(len(side.index), -1) for part in torch.split(side.coordinate, list(rows))], 1
        )
        for side in (a, b)
    )
    left = sum(rows) - torch.tensor(rows, dtype=parts.dtype, device=parts.device)
    outer = torch.einsum("avr,bvs,v->abvrs", total_a, total_b, 1 / left)
    cross = parts.sum(2, keepdim=True) - parts - outer
    side_a, turn_a = _without(a, spaces_a)
    side_b, turn_b = _without(b, spaces_b)
    cross = torch.einsum("avrs,abvrt->abvst", turn_a, cross)
    cross = torch.einsum("abvst,bvtu->abvsu", cross, turn_b)
    return _statistics(cross, side_a, side_b, canonical, exact=False)[0]


def _without(side: _Side, spaces: list[Space]) -> tuple[_Side, Tensor]:
    deleted = [space.deleted for space in spaces if space.deleted is not None]
    found = _Side(
        side.index,
        side.coordinate,
        side.loading,
        torch.stack([one.singular_value for one in deleted]),
        torch.stack([one.rank for one in deleted]),
        torch.stack([one.components for one in deleted]),
        torch.stack([one.spread for one in deleted]),
    )
    return found, torch.stack([one.turn for one in deleted])


def _permutations(space: Space, count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(space.n_rows).view(-1, space.cluster)
    for _ in range(count):
        yield rows[torch.randperm(len(rows), generator=generator)].flatten().to(space.coordinate.device)


def _chance(a: _Side, b: _Side, permutations: Iterator[Tensor], canonical: bool) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    count = 0
    first, second = a.coordinate.float(), b.coordinate.float()  # a mean over draws needs no more digits
    for permutation in permutations:
        cross = (first.mT @ second[permutation]).double()
        cross = cross.view(len(a.index), -1, len(b.index), cross.shape[1] // len(b.index))
        found, _ = _statistics(cross.permute(0, 2, 1, 3)[:, :, None], a, b, canonical, exact=False)
        total = {name: total.get(name, 0) + values[..., 0] for name, values in found.items()}
        count += 1
    return {name: values / count for name, values in total.items()}


def _statistics(
    cross: Tensor, a: _Side, b: _Side, canonical: bool, *, exact: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The statistics `(layers_a, layers_b, V)` of products of orthonormal coordinates, and ρ."""
    found: dict[str, Tensor] = {}
    rho = None
    components = torch.minimum(a.components[:, None], b.components[None])
    corner = _corner(cross, a.components, b.components)
    found["svcca"] = _nuclear(corner, exact) / components
    weighed = a.singular_value[:, None, ..., None] * cross * b.singular_value[None, ..., None, :]
    norm_a, norm_b = (torch.linalg.vector_norm(side.singular_value, dim=-1) for side in (a, b))
    found["procrustes"] = _nuclear(weighed, exact) / (norm_a[:, None] * norm_b[None])
    if canonical:
        count = torch.minimum(a.rank[:, None], b.rank[None])
        left, rho, right = _singular(cross, exact)
        found["mean_rho"] = rho.sum(-1) / count
        found["mean_rho_squared"] = (cross**2).sum((-2, -1)) / count
        counts = torch.arange(rho.shape[-1], device=rho.device) < count[..., None]
        found["pwcca_a"] = _projected(left, rho, counts, a.loading, a.spread, "a")
        found["pwcca_b"] = _projected(right, rho, counts, b.loading, b.spread, "b")
        found["pwcca"] = (found["pwcca_a"] + found["pwcca_b"]) / 2
    return found, rho


def _corner(cross: Tensor, kept_a: Tensor, kept_b: Tensor) -> Tensor:
    """The products of the components that are kept; where fewer than the most, the others are zero."""
    most_a, most_b = int(kept_a.max()), int(kept_b.max())
    mask_a = torch.arange(most_a, device=cross.device) < kept_a[..., None]
    mask_b = torch.arange(most_b, device=cross.device) < kept_b[..., None]
    return cross[..., :most_a, :most_b] * mask_a[:, None, ..., None] * mask_b[None, ..., None, :]


def _projected(
    vector: Tensor, rho: Tensor, counts: Tensor, loading: Tensor, spread: Tensor | None, side: str
) -> Tensor:
    """Σ α_i ρ_i / Σ α_i, α_i = Σ_j |⟨h_i, x_j⟩| (Morcos et al. 2018, §2.1), all from loadings."""
    if spread is not None:
        vector = torch.einsum(f"{side}vrs,abvsm->abvrm", spread, vector)
    weight = torch.einsum(f"{side}dr,abvrm->abvdm", loading, vector).abs().sum(-2) * counts
    return (weight * rho).sum(-1) / weight.sum(-1)


def _singular(matrix: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, singular values, right vectors; not `exact`: by squaring, in half the time."""
    if exact:
        left, value, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, value, right.mT
    if matrix.shape[-2] > matrix.shape[-1]:
        right, value, left = _singular(matrix.mT, exact)
        return left, value, right
    square, left = torch.linalg.eigh(matrix @ matrix.mT)
    value, left = square.flip(-1).clamp(min=0).sqrt(), left.flip(-1)
    inverse = torch.where(value > RESOLVED, 1 / value, 0.0)
    return left, value, (matrix.mT @ left) * inverse[..., None, :]


def _nuclear(matrix: Tensor, exact: bool) -> Tensor:
    if exact:
        value: Tensor = torch.linalg.svdvals(matrix)
    else:
        tall = matrix.shape[-2] > matrix.shape[-1]
        square = matrix.mT @ matrix if tall else matrix @ matrix.mT
        value = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    return value.sum(-1)


def _put(into: dict[str, Floats], at: tuple[NDArray[np.intp], ...], found: dict[str, Tensor]) -> None:
    for name, values in found.items():
        into[name][at] = values.cpu().numpy()
