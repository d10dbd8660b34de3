"""Covariance K of per-sample gradients, seen through their inner products.

K = (1/n) Σ (g_i − ḡ)(g_i − ḡ)ᵀ is P x P, but of rank below n: its spectrum is that of the centred Gram matrix
of the n gradients, and whatever else is asked of it (traces, mini-batch gradients, projections, errors by
deletion) follows from inner products too, so that no vector of length P is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers.numerics.factors import Factor

Floats = NDArray[np.float64]
Gradients = Mapping[str, Factor]

GROUPS = 10
"""Groups of samples that the errors are estimated from by leaving out one at a time."""
SUBSPACE = 40
"""Leading eigenvectors in which K is diagonalised again without a group: with 40 the standard errors agree
with those from whole decompositions to two percent."""
DENSE = 3000
"""Samples up to which the Gram matrix is decomposed directly; iteratively beyond, also to rounding."""


@dataclass(frozen=True)
class Partition:
    """How samples are grouped, by a seed, whatever batches they come in.

    Attributes:
        group: Which group each sample is left out with, shape (n,).
        minibatch: Samples of each disjoint mini-batch, shape (L, S); (0, S) where fewer than three fit.
    """

    group: NDArray[np.intp]
    minibatch: NDArray[np.intp]

    def weights(self) -> Floats:
        """Rows that average over each group, then over each mini-batch, shape (n_groups + L, n)."""
        rows = (self.group[None, :] == np.arange(self.group.max() + 1)[:, None]).astype(float)
        drawn = np.zeros((len(self.minibatch), len(self.group)))
        np.put_along_axis(drawn, self.minibatch, 1.0, axis=1)
        both = np.concatenate([rows, drawn])
        averages: Floats = both / both.sum(1, keepdims=True)
        return averages


def partition(n_samples: int, *, minibatch: int, minibatches: int, seed: int) -> Partition:
    """Draws ten groups of equal size (one sample each where there are fewer) and disjoint mini-batches.

    Args:
        n_samples: How many samples there are.
        minibatch: S, samples in each mini-batch; 0 for none.
        minibatches: Largest number of them.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order, other = (torch.randperm(n_samples, generator=generator).numpy() for _ in range(2))
    group = np.empty(n_samples, dtype=np.intp)
    group[order] = np.arange(n_samples) % min(GROUPS, n_samples)
    count = min(minibatches, n_samples // minibatch) if minibatch else 0
    count = count if count >= 3 else 0
    return Partition(group, other[: count * minibatch].reshape(count, minibatch))


@dataclass(frozen=True)
class GradientCovariance:
    """K of n per-sample gradients through inner products with its own leading eigenvectors e_a.

    Attributes:
        route: gram (all inner products) or lanczos (products with K).
        eigenvalue: Largest first, shape (k,).
        residual: ‖Ke − λe‖ of each, shape (k,); NaN in route gram, which decomposes a matrix.
        converged: Whether each residual is within its tolerance.
        score: (g_i − ḡ)·e_a, shape (n, m) with m ≥ k.
        mean_score: ḡ·e_a, shape (m,).
        squared_norm: ‖g_i‖², shape (n,).
        group_gram: Inner products of the mean gradients of the groups.
        batch_gram: Inner products of the mini-batch gradients, shape (L, L).
        loss: ℓ_i, shape (n,).
        partition: The groups and mini-batches.
        rounding: Machine epsilon of the gradients' dtype.
        n_products: Products with K spent.
    """

    route: Literal["gram", "lanczos"]
    eigenvalue: Floats
    residual: Floats
    converged: bool
    score: Floats
    mean_score: Floats
    squared_norm: Floats
    group_gram: Floats
    batch_gram: Floats
    loss: Floats
    partition: Partition
    rounding: float = float(np.finfo(float).eps)
    n_products: int = 0

    @property
    def vanishes(self) -> bool:
        """Whether all gradients are equal but for rounding, so that K is zero.

        Or so small that products with K underflow, which shows where λ is not the variance along its vector.
        """
        leading, along = float(self.eigenvalue[0]), float((self.score[:, 0] ** 2).mean())
        return not self._resolved(leading) or not 0.5 * leading < along < 2 * leading

    def _resolved(self, eigenvalue: Any) -> Any:
        """Which eigenvalues stand out of rounding: that of n products of gradients, as measured on nets."""
        return eigenvalue > len(self.loss) * self.rounding * self.squared_norm.mean()

    def estimates(self) -> dict[str, Any]:
        """Eigenvalues, trace, their ratio, ‖ḡ‖ and the noise scale, each with a jackknife standard error.

        The standard errors are those over samples drawn from a population, by leaving out a group at a time:
        se² = (g − 1)/g Σ_j (θ_(j) − mean θ)². They do not vanish when all of a training set is measured.
        Those of K are NaN where that leaves a single sample: its K is zero, whatever the samples are.

        Returns:
            `name` and `name_stderr` for eigenvalue (k,), trace, trace_ratio, gradient_norm, noise_scale. The
            noise scale is NaN where its standard error is: there the mean gradient is within its noise.

        References:
            Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 11.
            McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162
            (2018), eq. 2.9 and appendix A.1 (B_simple = tr Σ/‖G‖², both estimated without bias).
        """
        everything = self._moments(None)
        everything["eigenvalue"] = self.eigenvalue
        everything["trace_ratio"] = self._ratio(everything["trace"], float(self.eigenvalue[0]))
        n_groups = len(self.group_gram)
        without = [self._moments(group) for group in range(n_groups)]
        for name in list(everything):
            deleted = np.array([row[name] for row in without])
            spread = deleted - deleted.mean(0)
            everything[f"{name}_stderr"] = np.sqrt((n_groups - 1) / n_groups * (spread**2).sum(0))
        if self.vanishes or math.isnan(everything["noise_scale_stderr"]):
            everything["noise_scale"] = math.nan
        if self.vanishes:
            everything["trace_ratio"] = math.nan
        for name in ("trace_ratio", "noise_scale"):
            if math.isnan(everything[name]):
                everything[f"{name}_stderr"] = math.nan
        return everything

    def _moments(self, without: int | None) -> dict[str, Any]:
        """The same without a group."""
        group = self.partition.group
        keep = group != without if without is not None else np.ones(len(group), dtype=bool)
        n = int(keep.sum())
        share = np.bincount(group[keep], minlength=len(self.group_gram)) / n
        mean_squared = float(share @ self.group_gram @ share)
        norm = math.sqrt(max(mean_squared, 0.0))
        if n < 2:
            names = ("trace", "trace_ratio", "noise_scale")
            missing = np.full(len(self.eigenvalue), math.nan)
            return {"eigenvalue": missing, **dict.fromkeys(names, math.nan), "gradient_norm": norm}
        trace = max(float(self.squared_norm[keep].mean()) - mean_squared, 0.0)
        score = self.score[keep] - self.score[keep].mean(0)
        eigenvalue = np.linalg.eigvalsh(score.T @ score / n)[::-1][: len(self.eigenvalue)]
        noise = trace * n / (n - 1)
        signal = mean_squared - noise / n
        known = signal > 0 and self._resolved(eigenvalue[0])
        return {
            "eigenvalue": eigenvalue,
            "trace": trace,
            "trace_ratio": self._ratio(trace, float(eigenvalue[0])),
            "gradient_norm": norm,
            "noise_scale": noise / signal if known else math.nan,
        }

    def _ratio(self, trace: float, eigenvalue: float) -> float:
        return trace / eigenvalue if self._resolved(eigenvalue) else math.nan

    def alignment(self, slope: Floats) -> float:
        """|e·e_K| for a unit vector e of which only the slopes g_i·e are known, shape (n,).

        e_K = Σ (g_i − ḡ) score_i1/(nλ) lies in the span of the gradients, so no vector of length P is needed.
        NaN where K vanishes.
        """
        if self.vanishes:
            return math.nan
        projection = float(self.score[:, 0] @ (slope - slope.mean()))
        return abs(projection / (len(slope) * float(self.eigenvalue[0])))

    def minibatch_share(self, rank: int) -> Floats:
        """‖projection of a mini-batch gradient on the leading `rank` eigenvectors‖/‖it‖, shape (L,).

        Eigenvectors of eigenvalues that are zero but for rounding are any and are left out. NaN where K
        vanishes, and for a mini-batch whose gradient is zero.
        """
        squared = np.diag(self.batch_gram)
        if self.vanishes:
            return np.full(len(squared), math.nan)
        known = np.flatnonzero(self._resolved((self.score[:, :rank] ** 2).mean(0)))
        mean = self.score[self.partition.minibatch][..., known].mean(1) + self.mean_score[known]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares: Floats = np.sqrt((mean**2).sum(1) / squared)
        return shares


def gram_matrix(gradients: Sequence[Gradients]) -> Floats:
    """M_ij = g_i·g_j over all samples and parameters, shape (n, n), summed in float64."""
    sizes = [len(next(iter(factors.values())).squared_norm()) for factors in gradients]
    ends = np.cumsum(sizes)
    gram = np.empty((ends[-1], ends[-1]))
    for i, one in enumerate(gradients):
        rows = slice(ends[i] - sizes[i], ends[i])
        for j, other in enumerate(gradients[: i + 1]):
            columns = slice(ends[j] - sizes[j], ends[j])
            block = sum(one[name].gram(other[name]) for name in one)
            assert isinstance(block, Tensor)
            gram[rows, columns] = block.cpu().numpy()
            gram[columns, rows] = gram[rows, columns].T
    return gram


def from_gram(
    gram: Floats,
    loss: Floats,
    groups: Partition,
    *,
    k: int,
    at_least: int = 5,
    n_parameters: int | None = None,
    rounding: float = float(np.finfo(float).eps),
) -> GradientCovariance:
    """K from the inner products of all gradients.

    Args:
        gram: M_ij = g_i·g_j, shape (n, n).
        loss: ℓ_i, shape (n,).
        groups: From `partition`.
        k: How many eigenvalues; at most n − 1.
        at_least: How many eigenvectors to project on, where there are as many.
        n_parameters: P, which bounds the rank of K like n − 1 does.
        rounding: Machine epsilon of the gradients' dtype.
    """
    n = len(gram)
    wanted = min(n - 1, n_parameters or n, max(2 * k, at_least, SUBSPACE))
    value, vector = leading_eigenpairs(centred(gram) / n, wanted)
    length = np.sqrt(n * np.maximum(value, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_score = np.where(length > 0, (gram.mean(1) - gram.mean()) @ vector / length, 0.0)
    averages = groups.weights()
    inner = averages @ gram @ averages.T
    n_groups = int(groups.group.max()) + 1
    return GradientCovariance(
        "gram",
        value[:k],
        np.full(k, math.nan),
        True,
        vector * length,
        mean_score,
        np.diag(gram).copy(),
        inner[:n_groups, :n_groups],
        inner[n_groups:, n_groups:],
        loss,
        groups,
        rounding,
    )


def centred(gram: Floats) -> Floats:
    """PMP with P = I − 11ᵀ/n: inner products of the gradients less their mean."""
    mean = gram.mean(0)
    difference: Floats = gram - mean[None, :] - mean[:, None] + mean.mean()
    return difference


def leading_eigenpairs(matrix: Floats, k: int) -> tuple[Floats, Floats]:
    """The k largest eigenvalues of a symmetric matrix, descending, and their eigenvectors as columns."""
    n = len(matrix)
    if n <= DENSE or k >= n - 1:
        value, vector = scipy.linalg.eigh(matrix, subset_by_index=(n - k, n - 1))
    else:
        start = np.random.default_rng(0).standard_normal(n)
        value, vector = scipy.sparse.linalg.eigsh(matrix, k, which="LA", v0=start, tol=0)
        order = np.argsort(value)
        value, vector = value[order], vector[:, order]
    return value[::-1].copy(), vector[:, ::-1].copy()


@dataclass(frozen=True)
class MinibatchSpectrum:
    """Spectrum of K estimated from L mini-batch gradients.

    Attributes:
        eigenvalue: λ_K¹.
        smallest: λ*_K, the (L − 1)-th and last that is not zero by construction.
        trace: Tr K.
        ratio: λ*_K/λ_K¹; NaN where λ*_K is not above rounding.
    """

    eigenvalue: float
    smallest: float
    trace: float
    ratio: float


def minibatch_spectrum(batch_gram: Floats, rounding: float) -> MinibatchSpectrum:
    """Computes K of mini-batch gradients, (1/(L − 1)) Σ (g_b − ḡ)(g_b − ḡ)ᵀ, from their inner products.

    Args:
        batch_gram: Inner products of the L gradients, shape (L, L).
        rounding: Relative noise of the inner products.
    """
    count = len(batch_gram)
    value = np.linalg.eigvalsh(centred(batch_gram) / (count - 1))[::-1]
    largest, smallest = float(value[0]), float(value[count - 2])
    resolved = smallest > count * rounding * float(np.trace(batch_gram)) / (count - 1)
    ratio = smallest / largest if resolved else math.nan
    return MinibatchSpectrum(largest, smallest, float(value.sum()), ratio)
