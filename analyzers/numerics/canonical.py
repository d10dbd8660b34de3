"""One layer in orthonormal coordinates of its numerical rank: all that canonical correlations need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Weigh = Literal["variance", "sigma"]

SMALL = 256
"""Up to so many features or rows a singular value decomposition; beyond, Gram matrices for float32 layers."""
GRADED = 1e-5
"""Smallest σ relative to the largest that a Gram matrix in float64 resolves to at least five digits."""
SUMS = 8
"""Roundings of float32 (or float64) that a sum over a neuron's inputs may make, beside that of its result."""


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

    def kept(self, singular_value: Tensor) -> int:
        """How many of the singular values `(r,)`, in descending order, are kept."""
        if self.count is not None:
            return min(self.count, len(singular_value))
        weight = singular_value**2 if self.weigh == "variance" else singular_value
        below = weight.cumsum(0) < self.threshold * weight.sum() * (1 - 1e-12)
        return min(int(below.sum()) + 1, len(singular_value))


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
        lengths: Rows of each sample, in the order of the rows; empty where every sample has one.
    """

    coordinate: Tensor
    loading: Tensor
    singular_value: Tensor
    components: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The numerical rank."""
        return len(self.singular_value)

    @property
    def n_rows(self) -> int:
        """Rows of data."""
        return len(self.coordinate)


def reduced(values: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Centres a layer and finds orthonormal coordinates and singular values on its numerical rank.

    Rounding an entry changes it by a part of its own size, so what it makes of a direction v of the neurons
    is some ε (√n + √d) ‖v ∘ s‖, s the root mean square of every neuron, not centred: the norm of an n × d
    matrix of independent errors, as v weighs its columns. A direction whose singular value is above that
    counts, whatever the strongest one is. So copies of a neuron in float32, and neurons that the network
    computes as combinations of others, add nothing, and a weak neuron beside a strong one does count. ε is
    the precision of the values plus `SUMS` times that of the arithmetic, which is float32 at the least.

    Args:
        values: `(n_rows, n_features)`, floating point, not centred.
        eps: Precision of the type the network computed in; 0 for that of `values`.

    Returns:
        float64 U `(n_rows, r)` and σ `(r,)`, r = 0 for a constant layer, and the loadings `(n_features, r)`.

    References:
        Golub and Van Loan, "Matrix Computations", 4th ed., §5.4.1 (numerical rank); Davidson and Szarek,
        "Local operator theory, random matrices and Banach spaces", 2001, Theorem II.13 (√n + √d).
    """
    eps = eps or torch.finfo(values.dtype).eps
    values = values.double()
    n, d = values.shape
    scale = torch.linalg.vector_norm(values, dim=0) / math.sqrt(n)
    centred = values - values.mean(0)
    rounding = (eps + SUMS * min(eps, torch.finfo(torch.float32).eps)) * (math.sqrt(n) + math.sqrt(d))

    def resolved(left: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loading = centred.mT @ left
        floor = rounding * torch.linalg.vector_norm(scale[:, None] * loading, dim=0)
        smallest = max(n, d) * torch.finfo(sigma.dtype).eps * sigma[:1]  # of this very decomposition
        keep = sigma > torch.maximum(floor / torch.where(sigma > 0, sigma, 1.0), smallest)
        return left[:, keep], sigma[keep], loading[:, keep]

    if eps > torch.finfo(torch.float64).eps and min(n, d) > SMALL:
        found = resolved(*_by_gram(centred))
        if not len(found[1]) or found[1][-1] > GRADED * found[1][0]:
            return found
    return resolved(*torch.linalg.svd(centred, full_matrices=False)[:2])


def _by_gram(centred: Tensor) -> tuple[Tensor, Tensor]:
    """From the smaller of the two Gram matrices, several times faster; it squares the condition number."""
    n, d = centred.shape
    value, vector = torch.linalg.eigh(centred.mT @ centred if d <= n else centred @ centred.mT)
    sigma, vector = value.flip(-1).clamp(min=0).sqrt(), vector.flip(-1)
    if d <= n:
        vector = (centred @ vector) * torch.where(sigma > 0, 1 / sigma, 0.0)
    return vector, sigma


def space(
    values: Tensor,
    sample: Tensor | None,
    block: Tensor,
    components: Components,
    *,
    eps: float = 0.0,
    force: bool = False,
) -> Space | None:
    """Reduces a layer once for all the pairs it stands in; None for a constant layer.

    Args:
        values: `(n_rows, n_features)`, not centred, finite.
        sample: `(n_rows,)` sample of each row; None where row i is sample i.
        block: `(n_samples,)` block of each sample, 0 … n_blocks − 1; all zero for no blocks.
        components: Which principal components SVCCA keeps.
        eps: Precision of the type the network computed in; 0 for that of `values`.
        force: Keep loadings also where canonical correlations are refused with whatever other layer.
    """
    coordinate, sigma, loading = reduced(values, eps)
    if not len(sigma):
        return None
    block = block.to(values.device)
    sample = torch.arange(len(values), device=values.device) if sample is None else sample.to(values.device)
    order = torch.argsort(block[sample] * len(block) + sample, stable=True)
    rows = torch.bincount(block[sample], minlength=int(block.max()) + 1)
    count = torch.unique_consecutive(sample[order], return_counts=True)[1]
    # a wide layer's loadings are many times its coordinates, and nobody would ask for them
    wanted = force or len(sigma) < len(values) - 2
    return Space(
        coordinate[order],
        loading if wanted else loading.new_empty(0, len(sigma)),
        sigma,
        components.kept(sigma),
        tuple(rows.tolist()),
        tuple(count.tolist()) if bool((count > 1).any()) else (),
    )
