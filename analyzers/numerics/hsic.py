"""HSIC of layers on the same samples, exact and with every sample's part in it, from Grams or from features.

K is the kernel matrix of one layer on n rows, L that of another. Both are centred once per layer; what two
layers share is then T = Σ_ij k_ij l_ij, and HSIC = T/(n(n − 3)) (unbiased) or T/(n − 1)² (biased). The sums
r_i = Σ_j k_ij l_ij say what T would be without row i, which gives a jackknife for the price of T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

STRIP = 256
"""Rows of a Gram matrix that are summed in float64, or computed other than on a CPU, at a time."""
CHUNK = 2048
"""Rows whose products are summed in the working type before they go to a float64 sum."""
MEDIAN_OF = 4_000_000
"""Distances up to which their median is exact."""
ROUNDING = 16
"""A unit that varies by less than this many roundings of its mean is constant."""
MODERATE = 8
"""Binary digits of the largest magnitude of features that need no scaling, nor need their inverses."""


def centre(values: Tensor, *, in_place: bool = False) -> tuple[Tensor, float]:
    """Features less their mean over the rows, and the largest of them in magnitude.

    A mean larger than all that is left is subtracted twice: the first difference is nearly exact, and the
    second removes what rounding of the mean left. A float32 layer with |mean|/std = 10⁴ is centred to the
    last digit of its values with no float64 copy.

    Args:
        values: (n_rows, n_features).
        in_place: Overwrite the values, in single or double precision, instead of taking as much memory again.

    Returns:
        Features of the same type (float32 for half precision), and the largest magnitude: 0 where they are
        constant but for rounding, NaN or infinity where some are.
    """
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    mean = values.mean(0)
    features = values.sub_(mean) if in_place else values - mean
    largest = _largest(features)
    size = mean.abs()
    if float(size.amax()) > largest:
        features -= features.mean(0)
        noise = ROUNDING * torch.finfo(values.dtype).eps * size
        still = torch.maximum(features.amax(0), -features.amin(0)) <= noise
        features[:, still] = 0.0
        largest = _largest(features)
    return features, largest


def _largest(features: Tensor) -> float:
    low, high = torch.aminmax(features)
    return max(-float(low), float(high))


def exponent(largest: float) -> int:
    """The power of two to divide features by so that products of four of them neither over- nor underflow."""
    power = math.frexp(largest)[1] if 0 < largest < math.inf else 0
    return power if abs(power) > MODERATE else 0


def gram(features: Tensor, out: Tensor | None = None) -> Tensor:
    """All inner products X Xᵀ of rows, (n, n), in `out` if given; one half is computed, one mirrored."""
    n = len(features)
    products = features.new_empty(n, n) if out is None else out
    if features.device.type == "cpu":
        x = features.numpy()
        np.matmul(x, x.T, out=products.numpy())  # numpy asks BLAS for one half, torch for all of it
        return products
    return _gram_in_strips(features, products)


def _gram_in_strips(features: Tensor, products: Tensor) -> Tensor:
    n = len(features)
    for start in range(0, n, STRIP):
        stop = min(start + STRIP, n)
        torch.mm(features[start:stop], features[start:].T, out=products[start:stop, start:])
        products[stop:, start:stop] = products[start:stop, stop:].T
    return products


def median_distance(squared: Tensor, seed: int, most: int = MEDIAN_OF) -> float:
    """Median of the distances between different rows; of a seeded sample where there are more than `most`.

    Args:
        squared: Squared distances, (n, n).
        seed: Of the sample.
        most: Distances up to which the median is exact.
    """
    n = len(squared)
    if n * (n - 1) // 2 <= most:
        distances = torch.cat([row[i + 1 :] for i, row in enumerate(squared)]).sqrt_()
    else:
        generator = torch.Generator().manual_seed(seed)
        i, j = torch.randint(n, (2, most), generator=generator).to(squared.device)
        distances = squared[i, j][i != j].sqrt_()
    middle = (len(distances) + 1) // 2
    low = float(distances.kthvalue(middle).values)
    if len(distances) % 2:
        return low
    return (low + float(distances.kthvalue(middle + 1).values)) / 2


def squared_distances(features: Tensor, out: Tensor | None = None) -> Tensor:
    """|x_i − x_j|² of all rows, (n, n), in `out` if given, of features from `centre`."""
    squared = gram(features, out)
    length = squared.diagonal().clone()
    squared.mul_(-2).add_(length[:, None]).add_(length[None, :]).clamp_(min=0)
    return squared.fill_diagonal_(0)


def rbf(squared: Tensor, width: float) -> Tensor:
    """exp(−|x_i − x_j|²/(2σ²)) − 1 from squared distances, in place.

    The 1 less changes nothing once it is centred, and keeps the digits of kernels that are all close to 1.

    Args:
        squared: From `squared_distances`.
        width: σ, more than 0.
    """
    return squared.div_(-2 * width**2).expm1_()


def fourth_power(kernel: Tensor, *, of_rbf: bool) -> float:
    """Σ k_ii² of a kernel that is not centred; n times the largest k_ij² of `rbf`, whose k_ii are zero."""
    if of_rbf:
        return len(kernel) * _largest(kernel) ** 2
    return float(kernel.diagonal().double().square().sum())


def centre_gram(kernel: Tensor, *, unbiased: bool) -> Tensor:
    """A kernel matrix centred in place: U-centred with zero diagonal (unbiased), or HKH (biased).

    U-centred, k_ij − a_i/(n−2) − a_j/(n−2) + A/((n−1)(n−2)) with a_i = Σ_{j≠i} k_ij and A = Σ a_i, every row
    sums to zero and a constant added to the features or to the kernel changes nothing.

    References:
        Székely and Rizzo, "Partial distance correlation with methods for dissimilarities", Annals of
        Statistics 42 (2014), definition 2.
    """
    n = len(kernel)
    if unbiased:
        kernel.fill_diagonal_(0)
    row = kernel.new_empty(n, dtype=torch.float64)
    for strip, into in _chunks(kernel, row, size=STRIP):
        into.copy_(strip.sum(1, dtype=torch.float64))
    if unbiased:
        shift, constant = row / (n - 2), row.sum() / ((n - 1) * (n - 2))
    else:
        shift, constant = row / n, row.sum() / n**2
    kernel -= (shift - constant / 2).to(kernel.dtype)[:, None]
    kernel -= (shift - constant / 2).to(kernel.dtype)[None, :]
    return kernel.fill_diagonal_(0) if unbiased else kernel


@dataclass(frozen=True)
class Kernels:
    """Centred kernels of the layers of a network that share their rows, in one of two formulations.

    Attributes:
        unbiased: How they are centred.
        gram: The matrices themselves, (n_layers, n, n); None where features are kept.
        features: Centred features side by side, (n, Σ widths); None where Grams are kept.
        widths: Width of each layer in `features`.
        diagonal: k_ii of X Xᵀ of the centred features, or of HKH, (n, n_layers); zero for unbiased Grams.
        total: T of each layer with itself, (n_layers,).
        row: r_i of each layer with itself, (n, n_layers).
    """

    unbiased: bool
    gram: Tensor | None
    features: Tensor | None
    widths: tuple[int, ...]
    diagonal: Tensor
    total: Tensor
    row: Tensor

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return len(self.row)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is kept, in which products are made."""
        held = self.features if self.gram is None else self.gram
        assert held is not None
        return held.dtype


def from_grams(grams: Tensor, widths: Sequence[int], *, unbiased: bool) -> Kernels:
    """Kernels from centred matrices, (n_layers, n, n)."""
    row = grams.new_empty(grams.shape[1], len(grams), dtype=torch.float64)
    for index, kernel in enumerate(grams):
        for part, into in _chunks(kernel, row[:, index], size=STRIP):
            into.copy_((part * part).sum(-1))
    diagonal = grams.diagonal(dim1=1, dim2=2).T.double()
    return Kernels(unbiased, grams, None, tuple(widths), diagonal, row.sum(0), row)


def from_features(features: Tensor, widths: Sequence[int], *, unbiased: bool) -> Kernels:
    """Linear kernels from centred features side by side, (n, Σ widths)."""
    parts = torch.split(features, list(widths), 1)
    squared = [torch.linalg.vector_norm(part, dim=1).double() ** 2 for part in parts]
    kernels = Kernels(
        unbiased,
        None,
        features,
        tuple(widths),
        torch.stack(squared, 1),
        features.new_zeros(len(widths), dtype=torch.float64),
        features.new_zeros(len(features), len(widths), dtype=torch.float64),
    )
    for index, part in enumerate(parts):
        one = replace(kernels, features=part, widths=(part.shape[1],), diagonal=kernels.diagonal[:, [index]])
        total, row = next(_feature_products(one, one))
        kernels.total[index], kernels.row[:, index] = total[0], row[:, 0]
    return kernels


def as_grams(kernels: Kernels) -> Kernels:
    """The same kernels as matrices."""
    if kernels.gram is not None or kernels.features is None:
        return kernels
    n = kernels.n_rows
    grams = kernels.features.new_empty(len(kernels.widths), n, n)
    for out, part in zip(grams, torch.split(kernels.features, list(kernels.widths), 1), strict=True):
        centre_gram(gram(part, out), unbiased=kernels.unbiased)
    return from_grams(grams, kernels.widths, unbiased=kernels.unbiased)


def vanishes(total: Tensor, fourth: Tensor, n: int, dtype: torch.dtype, *, grams: bool) -> Tensor:
    """Whether the T of layers with themselves is nothing but rounding, though they are not constant.

    Without bias a layer in which a single sample differs from the others has T = 0: no two samples have
    anything in common.

    Args:
        total: T, (n_layers,).
        fourth: From `fourth_power`, (n_layers,).
        n: Rows.
        dtype: In which products were made.
        grams: Whether T is a sum of squares, or a difference of larger numbers.
    """
    noise = ROUNDING * torch.finfo(dtype).eps
    return total <= (n * noise**2 if grams else noise) * fourth


def products(a: Kernels, b: Kernels) -> Iterator[tuple[Tensor, Tensor]]:
    """For each layer of a: T with every layer of b, (n_layers_b,) float64, and r_i, (n, n_layers_b)."""
    if a.features is not None and b.features is not None:
        yield from _feature_products(a, b)
        return
    left, right = as_grams(a).gram, as_grams(b).gram
    assert left is not None
    assert right is not None
    dtype = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(dtype), right.to(dtype)
    row = torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0))  # a product for each sample
    for of_layer in row.unbind(1):
        yield of_layer.sum(0, dtype=torch.float64), of_layer


def _feature_products(a: Kernels, b: Kernels) -> Iterator[tuple[Tensor, Tensor]]:
    """The same from features: T = ‖XᵀY‖² less what the diagonals put in it, and no matrix n by n.

    With centred features a_i = −k_ii, so that k^U_ij = k_ij + u_i + u_j + c with u = k_ii/(n−2) and
    c = −tr K/((n−1)(n−2)); r_i follows by expanding the product.
    """
    assert a.features is not None
    assert b.features is not None
    n = a.n_rows
    dtype = torch.promote_types(a.features.dtype, b.features.dtype)
    other = b.features.to(dtype)
    widths_b = list(b.widths)
    for index, part in enumerate(torch.split(a.features, list(a.widths), 1)):
        part = part.to(dtype)
        cross = _cross(part, other)
        total = torch.stack([block.square().sum() for block in torch.split(cross, widths_b, 1)])
        shift = torch.zeros(len(other.T), dtype=torch.float64, device=part.device)
        if a.unbiased:
            k, v = a.diagonal[:, index], b.diagonal / (n - 2)
            u, c = k / (n - 2), -k.sum() / ((n - 1) * (n - 2))
            total = total - n / (n - 2) * (k @ b.diagonal) + k.sum() * b.diagonal.sum(0) / ((n - 1) * (n - 2))
            shift = _weighted(other, u[:, None])[:, 0]
        cross, shift = cross.to(dtype), shift.to(dtype)
        row = part.new_empty(n, len(widths_b), dtype=torch.float64)
        for x, y, into in _chunks(part, other, row):
            into.copy_(_row_products(x @ cross + shift, y, widths_b))
        if a.unbiased:
            row += (part @ _weighted(part, v).to(dtype)) - (k + u)[:, None] * (b.diagonal + v)
            row += (u + c)[:, None] * (v.sum(0) - v - b.diagonal) + u @ v
        yield total, row


def _chunks(*matrices: Tensor, size: int = CHUNK) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each. Results go into one tensor: kept among temporaries they would scatter memory."""
    return zip(*(torch.split(matrix, size) for matrix in matrices), strict=True)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """XᵀY, products in the working type, chunks of rows summed in float64."""
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for left, right in _chunks(x, y):
        total += left.T @ right
    return total


def _row_products(x: Tensor, y: Tensor, widths: list[int]) -> Tensor:
    """x_i·y_i over the features of each layer, (rows, n_layers)."""
    return torch.stack([block.sum(1) for block in torch.split(x * y, widths, 1)], 1)


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Xᵀ W in float64."""
    total = x.new_zeros(x.shape[1], weights.shape[1], dtype=torch.float64)
    for left, right in _chunks(x, weights):
        total += left.double().T @ right
    return total


def without_one(total: Tensor, row: Tensor, diagonal_product: Tensor, n: int, *, unbiased: bool) -> Tensor:
    """T when one row is left out and the rest centred anew, for every row; exact.

    The submatrix of a U-centred K has the row sums −k_ij, its total is 0, and what U-centring takes off is
    therefore (2/(m−2)) r_i with m = n − 1. For HKH likewise, with the diagonal.

    Args:
        total: T, shape (…,).
        row: r_i, shape (n, …).
        diagonal_product: k_ii l_ii, shape (n, …); not used when unbiased.
        n: Rows.
        unbiased: How K is centred.
    """
    m = n - 1
    if unbiased:
        return total - 2 * row * (m - 1) / (m - 2)
    return total - 2 * row * (m + 1) / m + diagonal_product * (1 + 1 / m) ** 2
