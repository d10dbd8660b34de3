"""Canonical correlations of all layers of one network with all layers of another, in batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers.numerics.canonical import Space
from dynprobe.analyzers.numerics.canonical_influence import WIDE, influences
from dynprobe.analyzers.numerics.canonical_statistics import Side, decompose, statistics

Floats = NDArray[np.float64]

CANONICAL = ("mean_rho", "mean_rho_squared", "pwcca_a", "pwcca_b", "pwcca")
STATISTICS = (*CANONICAL, "svcca", "procrustes")

WORKING = 64 * 2**20
"""Bytes of cross products in hand at once."""

FULL = 16
"""Dimensions up to which chance takes all draws; see `draws`."""
FEWEST = 3

FORMS = 32
"""Matrices of r_a × r_b in hand for a pair of layers with errors."""
ALONE = 0.02
"""Part of the rows that may be of samples with a length of their own, which stay where they are in chance."""


@dataclass(frozen=True)
class Comparison:
    """All layers of one network against all of another; a statistic that was not computed is NaN.

    Args:
        rho: `(layer_a, layer_b, component)`, canonical correlations, descending, NaN beyond the last.
        value: Each of `STATISTICS`, `(layer_a, layer_b)`.
        deleted: Likewise with each block left out, to first order (see `influences`),
            `(layer_a, layer_b, block)`; empty with one block.
        chance: Likewise, the mean over permutations of the samples; empty without any.
    """

    rho: Floats
    value: dict[str, Floats]
    deleted: dict[str, Floats]
    chance: dict[str, Floats]


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
    Procrustes is Σ singular values of diag(σ_a) M diag(σ_b) / (‖σ_a‖ ‖σ_b‖). No step depends on n but M and
    what blocks contribute to it.

    Args:
        spaces_a: Layers of the first network, None for a constant one.
        spaces_b: Of the second, on the same samples and with the same blocks.
        permutations: Permutations of the samples for chance, see `exchanges`; of wide layers fewer, see
            `draws`.
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
    for index_a, index_b in _chunks(spaces_a, spaces_b, FORMS if deleted else 2):
        some_a = [space for i in index_a if (space := spaces_a[i]) is not None]
        some_b = [space for i in index_b if (space := spaces_b[i]) is not None]
        one = some_a[0]
        canonical = force or not refused(one.rank, some_b[0].rank, one.n_rows)
        a, b = _side(index_a, some_a), _side(index_b, some_b)
        at = np.ix_(index_a, index_b)
        found = decompose(_cross(a, b), a, b, canonical=canonical, vectors=bool(deleted))
        values = statistics(found, a, b)
        _put(value, at, values)
        if found.canonical is not None:
            rho[at[0], at[1], : found.canonical.value.shape[-1]] = found.canonical.value.cpu().numpy()
        if deleted:
            _put(deleted, at, _deleted(values, influences(found, a, b, one.rows), one.rows))
        if chance and exchangeable(one):
            count = draws(permutations, one.rank, some_b[0].rank)
            _put(chance, at, _chance(a, b, exchanges(one, count, seed), canonical))
    return Comparison(rho, value, deleted, chance)


def work(
    spaces_a: Sequence[Space | None], spaces_b: Sequence[Space | None], permutations: int, force: bool
) -> dict[str, float]:
    """Floating-point operations that `compare` takes, in float64 ones, and its bytes at the widest pair.

    Args:
        spaces_a: As for `compare`.
        spaces_b: As for `compare`.
        permutations: As for `compare`.
        force: As for `compare`.

    Returns:
        `values`, `errors` and `chance`, in operations, and `bytes`.
    """
    total = dict.fromkeys(("values", "errors", "chance", "bytes"), 0.0)
    for a in spaces_a:
        for b in spaces_b:
            if a is None or b is None or not comparable(a, b):
                continue
            few, many = sorted((a.rank, b.rank))
            canonical = force or not refused(few, many, a.n_rows)
            cube, product = float(few**2 * many), 2.0 * a.n_rows * few * many
            total["values"] += product + (20 + 20 * canonical) * cube
            if len(a.rows) > 1:
                own = a.n_rows * float(few + many) ** 2
                total["errors"] += own + (30 + 40 * canonical) * cube
            total["chance"] += draws(permutations, few, many) * (product + (12 + 12 * canonical) * cube)
            total["bytes"] = max(total["bytes"], 8.0 * FORMS * many**2)
    return total


def refused(rank_a: int, rank_b: int, n_rows: int) -> bool:
    """Whether the two subspaces leave no room in the dimensions that centred data of so many rows have."""
    return rank_a + rank_b >= n_rows - 1


def draws(permutations: int, rank_a: int, rank_b: int) -> int:
    """Permutations for chance where m = min(rank_a, rank_b): in proportion to 1/m beyond `FULL`, at least 3.

    Mean ρ of unrelated layers varies by about 1/√(2 n m) between permutations, so the error of its mean
    stays the same, while wide layers, which cost the most, take a few.
    """
    return min(permutations, max(FEWEST, math.ceil(permutations * FULL / min(rank_a, rank_b))))


def comparable(a: Space, b: Space) -> bool:
    """Whether row i is the same sample, and the same place in it, in both."""
    return (a.n_rows, a.rows, a.lengths) == (b.n_rows, b.rows, b.lengths)


def exchangeable(space: Space) -> bool:
    """Whether almost all rows are of samples that have as many rows as another sample."""
    several = Counter(space.lengths)
    alone = sum(length for length, count in several.items() if count == 1)
    return alone <= ALONE * space.n_rows


def exchanges(space: Space, count: int, seed: int) -> Iterator[Tensor]:
    """Permutations of whole samples, as orders of the rows; where lengths differ, among equal ones.

    Args:
        space: A layer.
        count: How many.
        seed: Of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(space.lengths or [1] * space.n_rows)
    start = lengths.cumsum(0) - lengths
    rows = [start[lengths == n][:, None] + torch.arange(n) for n in sorted(set(lengths.tolist()))]
    for _ in range(count):
        order = torch.empty(space.n_rows, dtype=torch.int64)
        for same in rows:
            order[same] = same[torch.randperm(len(same), generator=generator)]
        yield order.to(space.coordinate.device)


def _chunks(
    spaces_a: Sequence[Space | None], spaces_b: Sequence[Space | None], copies: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Layers of equal shape on either side, few enough at a time to stay within `WORKING`."""
    for group_a in _groups(spaces_a):
        for group_b in _groups(spaces_b):
            a, b = spaces_a[group_a[0]], spaces_b[group_b[0]]
            if a is None or b is None or not comparable(a, b):
                continue
            pairs = max(1, WORKING // (8 * copies * max(a.rank, len(a.loading)) * b.rank))
            step_b = min(len(group_b), pairs)
            step_a = max(1, pairs // step_b)
            for i in range(0, len(group_a), step_a):
                for j in range(0, len(group_b), step_b):
                    yield group_a[i : i + step_a], group_b[j : j + step_b]


def _groups(spaces: Sequence[Space | None]) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, space in enumerate(spaces):
        if space is not None:
            shape = (space.rank, tuple(space.loading.shape), space.n_rows, space.rows, space.lengths)
            groups.setdefault(shape, []).append(i)
    return list(groups.values())


def _side(index: list[int], spaces: list[Space]) -> Side:
    device = spaces[0].coordinate.device
    return Side(
        index,
        torch.cat([space.coordinate for space in spaces], 1),
        torch.stack([space.loading for space in spaces]),
        torch.stack([space.singular_value for space in spaces]),
        torch.tensor([space.components for space in spaces], device=device),
    )


def _cross(a: Side, b: Side, order: Tensor | slice = slice(None)) -> Tensor:
    """U_a'U_b, `(layers_a, layers_b, r_a, r_b)`, the second's rows in some order."""
    product = a.coordinate.mT @ b.coordinate[order]
    sizes = len(a.index), a.singular_value.shape[-1], len(b.index), b.singular_value.shape[-1]
    return product.view(sizes).permute(0, 2, 1, 3)


def _deleted(
    values: dict[str, Tensor], influence: dict[str, Tensor], rows: tuple[int, ...]
) -> dict[str, Tensor]:
    """Every statistic with each block left out, to first order: the others weigh n/(n − n_b) then."""
    n = sum(rows)
    share = n / (n - torch.tensor(rows, dtype=torch.float64, device=next(iter(values.values())).device))
    return {name: value[..., None] - influence[name] * share for name, value in values.items()}


def _chance(a: Side, b: Side, orders: Iterator[Tensor], canonical: bool) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    count = 0
    # a mean over draws needs no more digits
    first, second = (replace(side, coordinate=side.coordinate.float()) for side in (a, b))
    if max(side.singular_value.shape[-1] for side in (a, b)) > WIDE:
        a, b = (
            replace(side, loading=side.loading.float(), singular_value=side.singular_value.float())
            for side in (a, b)
        )
    for order in orders:
        cross = _cross(first, second, order).to(a.loading.dtype)
        found = decompose(cross, a, b, canonical=canonical, vectors=False, exact=False)
        for name, value in statistics(found, a, b).items():
            total[name] = total.get(name, torch.zeros_like(value)) + value
        count += 1
    return {name: value / count for name, value in total.items()}


def _put(into: dict[str, Floats], at: tuple[NDArray[np.intp], ...], found: dict[str, Tensor]) -> None:
    for name, values in found.items():
        into[name][at] = values.cpu().numpy()
