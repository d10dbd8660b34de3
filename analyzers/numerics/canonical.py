"""One layer in orthonormal coordinates of its numerical rank: all that canonical correlations need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weigh = Literal["variance", "sigma"]

SMALL = 256
"""Up to so many features or rows a singular value decomposition; beyond, Gram matrices for float32 layers."""


@dataclass(frozen=True)
class Components:
    """How many principal components SVCCA keeps.

    Args:
        threshold: Part of Σσ² (or of Σσ) that they have to reach.
        weigh: `variance` for Σσ², `sigma` for Σσ.
        count: So many instead, or all where there are fewer.
    """

    threshold: float = 0.99
    weigh: Weigh = "variance"
    count: int | None = None

    def kept(self, singular_value: Tensor, rank: Tensor) -> Tensor:
        """Components kept of singular values `(…, r)` in descending order, of which `rank (…)` count."""
        if self.count is not None:
            return rank.clamp(max=self.count)
        weight = singular_value**2 if self.weigh == "variance" else singular_value
        total = weight.sum(-1, keepdim=True)
        below = weight.cumsum(-1) < self.threshold * total * (1 - 1e-12)
        return torch.minimum(below.sum(-1) + 1, rank)


@dataclass(frozen=True)
class Deletions:
    """A layer with each block of rows left out, in terms of its coordinates on all rows.

    Args:
        turn: `(n_blocks, r, r)`; the other rows' centred coordinates times this are orthonormal, principal
            components first; columns beyond the rank are zero.
        spread: `(n_blocks, r, r)`; `loading @ spread` are the loadings of what is left.
        singular_value: `(n_blocks, r)`, descending, zero beyond the rank.
        rank: `(n_blocks,)`.
        components: `(n_blocks,)`, kept by SVCCA.
    """

    turn: Tensor
    spread: Tensor
    singular_value: Tensor
    rank: Tensor
    components: Tensor


@dataclass(frozen=True)
class Space:
    """A layer in float64: its centred values are `coordinate @ loading.T`.

    Args:
        coordinate: `(n_rows, r)`, orthonormal columns, the principal component with most variance first; the
            rows of a block lie together, and within it those of a sample.
        loading: `(n_features, r)`, principal axes times singular values; without rows where not kept.
        singular_value: `(r,)`, descending, of the centred values; r is the numerical rank.
        components: Kept by SVCCA.
        rows: Rows of each block.
        cluster: Rows that belong to one sample, where all samples have the same number; otherwise 1.
        deleted: With each block left out; None where there is a single block.
    """

    coordinate: Tensor
    loading: Tensor
    singular_value: Tensor
    components: int
    rows: tuple[int, ...]
    cluster: int
    deleted: Deletions | None

    @property
    def rank(self) -> int:
        """The numerical rank."""
        return len(self.singular_value)

    @property
    def n_rows(self) -> int:
        """Rows of data."""
        return len(self.coordinate)


def reduced(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres a layer and finds orthonormal coordinates and singular values on its numerical rank.

    A singular value counts if it is above eps · max(max(n, d) · σ₁, ‖X‖_F), with eps of the type the
    values came in: the first is the usual tolerance, the second what rounding of uncentred values can make.
    So exact and float32 copies of a neuron, and neurons that are combinations of others, add nothing.

    Args:
        values: `(n_rows, n_features)`, floating point, not centred.

    Returns:
        float64 U `(n_rows, r)` and σ `(r,)`, r = 0 for a constant layer, and the centred values.

    References:
        Golub and Van Loan, "Matrix Computations", 4th ed., §5.4.1 (numerical rank).
    """
    eps = torch.finfo(values.dtype).eps
    coarse = values.dtype != torch.float64
    values = values.double()
    raw = float(torch.linalg.vector_norm(values))
    centred = values - values.mean(0)
    n, d = centred.shape
    if coarse and min(n, d) > SMALL:
        left, sigma = _by_gram(centred)
    else:
        left, sigma, _ = torch.linalg.svd(centred, full_matrices=False)
    largest = float(sigma[0]) if len(sigma) else 0.0
    r = int((sigma > eps * max(max(n, d) * largest, raw)).sum())
    return left[:, :r].contiguous(), sigma[:r].contiguous(), centred


def _by_gram(centred: Tensor) -> tuple[Tensor, Tensor]:
    """From the smaller of the two Gram matrices, several times faster.

    It squares the condition number. That costs digits only in directions that are near the tolerance of
    float32 values, where their rounding has already cost more.
    """
    n, d = centred.shape
    value, vector = torch.linalg.eigh(centred.mT @ centred if d <= n else centred @ centred.mT)
    sigma, vector = value.flip(-1).clamp(min=0).sqrt(), vector.flip(-1)
    if d <= n:
        vector = (centred @ vector) * torch.where(sigma > 0, 1 / sigma, 0.0)
    return vector, sigma


def space(
    values: Tensor, sample: Tensor | None, block: Tensor, components: Components, *, force: bool = False
) -> Space | None:
    """Reduces a layer once for all the pairs it stands in; None for a constant layer.

    Args:
        values: `(n_rows, n_features)`, not centred, finite.
        sample: `(n_rows,)` sample of each row; None where row i is sample i.
        block: `(n_samples,)` block of each sample, 0 … n_blocks − 1; all zero for no deletions.
        components: Which principal components SVCCA keeps.
        force: Keep loadings also where canonical correlations are refused with whatever other layer.
    """
    block = block.to(values.device)
    sample = torch.arange(len(values), device=values.device) if sample is None else sample.to(values.device)
    order = torch.argsort(block[sample] * len(block) + sample, stable=True)
    count = torch.bincount(sample, minlength=len(block))
    rows = torch.bincount(block[sample], minlength=int(block.max()) + 1).tolist()
    coordinate, sigma, centred = reduced(values)
    r = len(sigma)
    if not r:
        return None
    # a wide layer's loadings are many times its coordinates, and nobody would ask for them
    loading = centred.mT @ coordinate if force or r < len(values) - 2 else centred.new_empty(0, r)
    coordinate = coordinate[order]
    floor = _floor(values, len(values) - max(rows))
    return Space(
        coordinate,
        loading,
        sigma,
        int(components.kept(sigma, torch.tensor(r, device=sigma.device))),
        tuple(rows),
        int(count[0]) if bool((count == count[0]).all()) else 1,
        _deletions(coordinate, sigma, rows, floor, components) if len(rows) > 1 else None,
    )


def _floor(values: Tensor, n_rows: int) -> tuple[float, float]:
    """The tolerance of `reduced` with a block left out: relative to σ₁, and absolute."""
    eps = torch.finfo(values.dtype).eps
    return eps * max(n_rows, values.shape[1]), eps * float(torch.linalg.vector_norm(values.double()))


def _deletions(
    coordinate: Tensor, sigma: Tensor, rows: list[int], floor: tuple[float, float], components: Components
) -> Deletions:
    """Solves the layer without each block in r dimensions, from sums over the block alone.

    S = I − U_b'U_b − u_b u_b'/(n − n_b), u_b = Σ rows of U_b, is what the other rows' centred coordinates
    multiply to, as all rows are centred. With S = W D W' and the SVD D^½ W' diag(σ) = Z diag(σ_b) E',
    the columns of (U − mean) W D^-½ Z are the orthonormal principal coordinates of the other rows.
    """
    n, r = coordinate.shape
    scatter = torch.eye(r, dtype=coordinate.dtype, device=coordinate.device).repeat(len(rows), 1, 1)
    for b, part in enumerate(torch.split(coordinate, rows)):
        total = part.sum(0)
        scatter[b] -= part.mT @ part + torch.outer(total, total) / (n - rows[b])
    value, vector = torch.linalg.eigh(scatter)
    live = value > n * torch.finfo(value.dtype).eps
    root = torch.where(live, value, 0.0).sqrt()
    left, singular, _ = torch.linalg.svd(root[..., None] * vector.mT * sigma)
    relative, absolute = floor
    counts = singular > torch.clamp(relative * singular[:, :1], min=absolute)
    inverse = torch.where(live, 1 / torch.where(live, root, 1.0), 0.0)
    turn = (vector * inverse[:, None, :]) @ left * counts[:, None, :]
    rank = counts.sum(-1)
    singular = torch.where(counts, singular, 0.0)
    return Deletions(turn, scatter @ turn, singular, rank, components.kept(singular, rank))
