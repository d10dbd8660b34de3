"""Single units against predictors: which unit tells apart the stimuli that a predictor tells apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers.numerics.rdm import Floats, Integers, n_entries
from dynprobe.analyzers.numerics.rdm_compare import Comparison, Form, comparable

BLOCK_BYTES = 32e6
"""Of the RDMs of units that are there at once."""
MOST_CLUSTERS = 10
STARTS = 10
SCORED = 2000
"""Units that the silhouette is computed on, which takes the distance of every two."""


def unit_similarities(values: Floats, predictors: Form, compare: Comparison) -> Floats:
    """Similarity of the RDM of every single unit, |x_i − x_j|, to every predictor's RDM.

    RDMs of units are formed, used and dropped block by block: n_units × m numbers are never there.

    Args:
        values: Activations, shape (n_stimuli, n_units).
        predictors: Forms of the predictors' RDMs, under the same comparison.
        compare: See `rdm_compare.comparable`.

    Returns:
        Shape (n_units, n_predictors); NaN for a unit that is constant.
    """
    n, n_units = values.shape
    rows, columns = np.triu_indices(n, 1)
    at_once = max(1, int(BLOCK_BYTES / (8 * n_entries(n))))
    found = np.empty((n_units, len(predictors.left)))
    for start in range(0, n_units, at_once):
        part = np.ascontiguousarray(values[:, start : start + at_once].T)
        rdms = np.abs(part[:, rows] - part[:, columns])
        found[start : start + at_once] = comparable(rdms, compare).form() @ predictors
    return found


@dataclass(frozen=True)
class Clusters:
    """Units with like profiles of similarity to the predictors.

    Attributes:
        label: Cluster of each unit from 1, the largest first, shape (n_units,); NaN where the profile is.
        silhouette: Mean silhouette, −1 to 1; NaN for one cluster.
        central: Units nearest to each cluster's centre, nearest first, shape (n_clusters, n_central); −1
            where a cluster has fewer.
        n_clusters: How many.
    """

    label: Floats
    silhouette: float
    central: Integers
    n_clusters: int


def cluster_units(profiles: Floats, *, clusters: int = 0, central: int = 3, seed: int = 0) -> Clusters:
    """Groups units by k-means of their profiles, the best of several starts.

    Args:
        profiles: Similarity to each predictor, shape (n_units, n_predictors).
        clusters: How many; 0 for the number of 2 to 10 with the largest mean silhouette.
        central: How many units near each centre to name.
        seed: Of the starts.

    References:
        Rousseeuw, "Silhouettes", J. Computational and Applied Mathematics 20 (1987).
    """
    known = np.flatnonzero(np.isfinite(profiles).all(1))
    points = profiles[known]
    distinct = len(np.unique(points, axis=0)) if len(points) else 0
    counts = [clusters] if clusters else list(range(2, MOST_CLUSTERS + 1))
    counts = [k for k in counts if k <= distinct] or [min(distinct, max(counts))]
    best: tuple[float, NDArray[Any], int] = (-np.inf, np.zeros(len(points), dtype=np.int64), 1)
    for k in counts:
        label = _k_means(points, k, seed)
        score = _silhouette(points, label)
        if len(counts) == 1 or score > best[0]:
            best = score, label, k
    score, label, k = best
    order = np.argsort(-np.bincount(label, minlength=k), kind="stable")
    label = np.argsort(order)[label] if len(label) else label
    full = np.full(len(profiles), np.nan)
    full[known] = label + 1
    nearest = np.full((k, central), -1, dtype=np.int64)
    for cluster in range(k):
        mine = np.flatnonzero(label == cluster)
        distance = np.linalg.norm(points[mine] - points[mine].mean(0), axis=1) if len(mine) else mine
        chosen = known[mine[np.argsort(distance, kind="stable")[:central]]]
        nearest[cluster, : len(chosen)] = chosen
    return Clusters(full, score if np.isfinite(score) else np.nan, nearest, k)


def _k_means(points: Floats, k: int, seed: int) -> NDArray[Any]:
    """Labels of the best of several starts (k-means++, then Lloyd)."""
    if k < 2:
        return np.zeros(len(points), dtype=np.int64)
    best, least = np.zeros(len(points), dtype=np.int64), np.inf
    for start in range(STARTS):
        centre = _spread_centres(points, k, np.random.default_rng([seed, k, start]))
        label = np.full(len(points), -1)
        while True:
            distance = ((points[:, None] - centre) ** 2).sum(2)
            if np.array_equal(new := distance.argmin(1), label):
                break
            label = new
            for cluster in np.unique(label):
                centre[cluster] = points[label == cluster].mean(0)
        inertia = float(distance.min(1).sum())
        if inertia < least:
            best, least = label, inertia
    return np.unique(best, return_inverse=True)[1]


def _spread_centres(points: Floats, k: int, generator: np.random.Generator) -> Floats:
    """k-means++: each centre a point drawn in proportion to its squared distance from those before.

    References:
        Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    """
    centre = [points[generator.integers(len(points))]]
    for _ in range(k - 1):
        distance = ((points[:, None] - np.array(centre)) ** 2).sum(2).min(1)
        centre.append(points[generator.choice(len(points), p=distance / distance.sum())])
    return np.array(centre)


def _silhouette(points: Floats, label: NDArray[Any]) -> float:
    """Mean of (b − a)/max(a, b): distance to the nearest other cluster against that to one's own."""
    if len(np.unique(label)) < 2:
        return np.nan
    scored = np.linspace(0, len(points) - 1, min(len(points), SCORED)).astype(int)
    member = (label[:, None] == np.unique(label)).astype(float)
    size = member.sum(0)
    total = np.stack([np.linalg.norm(points - points[i], axis=1) @ member for i in scored])
    own = label[scored]
    place = np.searchsorted(np.unique(label), own)
    rows = np.arange(len(scored))
    within = total[rows, place] / np.maximum(size[place] - 1, 1)
    means = total / size
    means[rows, place] = np.inf
    between = means.min(1)
    score = (between - within) / np.maximum(np.maximum(between, within), 1e-300)
    return float(np.where(size[place] > 1, score, 0.0).mean())
