"""Crossnobis: squared distances between conditions that are zero on average where there is no difference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers.numerics.rdm import Floats, Integers, condition_means


@dataclass(frozen=True)
class ShrunkNoise:
    """Σ = scale·(ridge·I + RᵀR) of within-condition residuals R, never formed: it is as wide as the layer.

    Attributes:
        residual: R, shape (n_samples, n_features), float64.
        scale: Of the sum.
        ridge: What shrinkage puts on the diagonal, in units of the sums of squares.
        shrinkage: Weight of the identity, 0 to 1.
    """

    residual: Tensor
    scale: float
    ridge: float
    shrinkage: float

    def precision_products(self, patterns: Tensor) -> Tensor:
        """Σ⁻¹ times each pattern, (n, n_features) to (n, n_features).

        By Woodbury's identity where there are fewer residuals than features.
        """
        n, width = self.residual.shape
        if width <= n:
            inner = self.residual.T @ self.residual
            inner.diagonal().add_(self.ridge)
            product: Tensor = torch.linalg.solve(inner, patterns.T).T / self.scale
            return product
        inner = self.residual @ self.residual.T
        inner.diagonal().add_(self.ridge)
        weight: Tensor = torch.linalg.solve(inner, self.residual @ patterns.T)
        return (patterns - weight.T @ self.residual) / (self.scale * self.ridge)


def shrunk_noise(values: Tensor, group: Integers) -> ShrunkNoise:
    """Noise covariance within groups of samples, shrunk towards a multiple of the identity.

    Σ = n/(n − C)·[ρμI + (1 − ρ)S] with S = RᵀR/n, μ = tr S/d and ρ = min(β², δ²)/δ², where
    β² = (Σ_k ‖r_k‖⁴/n − ‖S‖²)/n and δ² = ‖S − μI‖² (Ledoit and Wolf 2004, Lemmas 3.2 to 3.4); all from the
    n × n products of residuals. C is the number of groups, whose means cost degrees of freedom.

    Args:
        values: Patterns, shape (n_samples, n_features).
        group: Group of each sample, 0, 1, …, shape (n_samples,).

    Raises:
        ValueError: If nothing varies within groups.

    References:
        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J.
        Multivariate Analysis 88 (2004).
        Walther et al., "Reliability of dissimilarity measures for multi-voxel pattern analysis", NeuroImage
        137 (2016).
    """
    means = condition_means(values, group)
    residual = values.double() - means[torch.as_tensor(group, device=values.device)]
    (n, width), degrees = residual.shape, len(values) - len(means)
    gram = residual @ residual.T
    squares = gram.diagonal()
    size = float((gram**2).sum()) / n**2
    mean_variance = float(squares.sum()) / (n * width)
    if degrees < 1 or mean_variance <= 1e-24 * float((values.double() ** 2).mean()):
        raise ValueError("nothing varies within conditions and folds")
    delta = size - mean_variance**2 * width
    beta = min((float((squares**2).sum()) / n - size) / n, delta)
    shrinkage = beta / delta if delta > 0 else 1.0
    if shrinkage >= 1:  # the identity alone
        return ShrunkNoise(torch.zeros_like(residual[:1]), n / degrees, mean_variance, 1.0)
    if shrinkage <= 0:
        raise ValueError(
            "the residuals within conditions and folds are all alike: their covariance has no inverse"
        )
    kept = (1 - shrinkage) / n
    return ShrunkNoise(residual, kept * n / degrees, shrinkage * mean_variance / kept, shrinkage)


def deal_folds(condition: Integers, folds: int, seed: int = 0) -> Integers:
    """Deals each condition's samples into folds of equal size at random, shape (n_samples,).

    Raises:
        ValueError: If a condition has fewer samples than there are folds.
    """
    fewest = int(np.bincount(condition).min())
    if fewest < folds:
        raise ValueError(f"a condition has {fewest} samples, fewer than {folds} folds")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(condition), generator=generator).numpy()
    fold = np.empty(len(condition), dtype=np.int64)
    for label in range(int(condition.max()) + 1):
        mine = order[condition[order] == label]
        fold[mine] = np.arange(len(mine)) % folds
    return fold


def crossnobis(values: Tensor, condition: Integers, fold: Integers, *, shrink: bool = True) -> Floats:
    """Cross-validated squared Mahalanobis distance between the conditions' mean patterns.

    d_ij = mean over pairs of folds A ≠ B of (x_i − x_j)ᴬ P (x_i − x_j)ᴮ / n_features. The noise of different
    folds is independent, so that it does not add up as in a squared distance: the mean is 0 where two
    conditions do not differ, and entries may be negative (Walther et al. 2016, eq. 5; divided by the number
    of features as in rsatoolbox).

    Args:
        values: Patterns, shape (n_samples, n_features).
        condition: Condition of each sample, 0, 1, …, shape (n_samples,).
        fold: From `deal_folds`.
        shrink: P is the inverse of the shrunk noise covariance within conditions and folds (`shrunk_noise`);
            else the identity.

    Returns:
        Shape (m,) of the conditions.

    Raises:
        ValueError: If there is one condition, or nothing varies within conditions and folds.

    References:
        Walther et al., "Reliability of dissimilarity measures for multi-voxel pattern analysis", NeuroImage
        137 (2016).
        Diedrichsen et al., "Comparing representational geometries using whitened unbiased-distance-matrix
        similarity", Neurons, Behavior, Data analysis, and Theory 5 (2021).
    """
    n_folds = int(fold.max()) + 1
    centred = values.double() - values.double().mean(0)
    means = [
        condition_means(centred[_where(fold == f, values)], condition[fold == f]) for f in range(n_folds)
    ]
    if len(means[0]) < 2:
        raise ValueError("one condition: an RDM needs two")
    stacked = torch.stack([torch.stack(means).sum(0), *means])
    right = stacked
    if shrink:
        # around the means of the parts: about the whole condition's, residuals of different parts would have
        # the parts' differences in common, and the noise in P would not be independent of theirs
        noise = shrunk_noise(centred, condition * n_folds + fold)
        right = noise.precision_products(stacked.flatten(0, 1)).view_as(stacked)
    products = stacked @ right.mT
    cross = products[0] - products[1:].sum(0)  # over ordered pairs of different folds
    own = cross.diagonal()
    distance = own[:, None] + own[None, :] - cross - cross.T
    rows, columns = torch.triu_indices(len(own), len(own), 1, device=own.device)
    pairs = n_folds * (n_folds - 1) * values.shape[1]
    return (distance[rows, columns] / pairs).cpu().numpy()


def _where(mask: np.ndarray, values: Tensor) -> Tensor:
    return torch.as_tensor(np.flatnonzero(mask), device=values.device)
