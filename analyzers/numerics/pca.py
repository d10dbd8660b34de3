"""The plane a run of checkpoints lies in: PCA of a trajectory too long to hold in memory.

The matrix M has one row θ_i − θ_n per checkpoint (Li et al. 2018, §7.1), so its Gram matrix M Mᵀ is small
however large the model: it is summed over blocks of checkpoints and over parameters, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weights = Mapping[str, Tensor]
Load = Callable[[int], Weights]
Center = Literal["last", "mean"]


@dataclass(frozen=True)
class TrajectoryPCA:
    """Principal axes of a trajectory, as combinations of its rows.

    Attributes:
        explained_variance: Share of the squared length of all rows along each axis. Shape (n_components,).
        random_walk: The same shares for a random walk in many dimensions seen at the same steps.
        mixing: Axis k is Σ_i mixing[i, k] (θ_i − reference), of unit length. Shape (n_rows, n_components).
        coordinate: Of every row on the axes, relative to the reference. Shape (n_rows, n_components).
        center: "last" for axes through θ_n as they are, "mean" for rows centred first.
    """

    explained_variance: NDArray[np.float64]
    random_walk: NDArray[np.float64]
    mixing: NDArray[np.float64]
    coordinate: NDArray[np.float64]
    center: Center


def trajectory_gram(
    load: Load, n_rows: int, reference: Weights, names: Sequence[str], *, block: int | None = None
) -> NDArray[np.float64]:
    """Inner products G_ij = ⟨θ_i − r, θ_j − r⟩ over the named tensors, in float64.

    Holds at most 2 `block` checkpoints; with every pair of blocks visited, checkpoint i is loaded about
    n_rows / (2 block) times. The subtraction is done in float64: the difference of two float32 weights
    need not be a float32 number.

    Args:
        load: i ↦ state of checkpoint i (name → tensor).
        n_rows: How many checkpoints.
        reference: State that is subtracted from each, r.
        names: Which tensors count.
        block: Checkpoints per block; as many as a gigabyte holds when None.

    Returns:
        G, shape (n_rows, n_rows), symmetric.
    """
    if block is None:
        size = sum(reference[name].numel() * reference[name].element_size() for name in names)
        block = max(1, min(n_rows, int(5e8 / max(size, 1))))
    gram = np.zeros((n_rows, n_rows))
    starts = range(0, n_rows, block)
    for first in starts:
        rows = range(first, min(first + block, n_rows))
        states = [load(i) for i in rows]
        gram[rows.start : rows.stop, rows.start : rows.stop] = _products(states, states, reference, names)
        for second in starts:
            if second <= first:
                continue
            columns = range(second, min(second + block, n_rows))
            others = [load(i) for i in columns]
            product = _products(states, others, reference, names)
            gram[rows.start : rows.stop, columns.start : columns.stop] = product
            gram[columns.start : columns.stop, rows.start : rows.stop] = product.T
    return gram


def _products(
    left: Sequence[Weights], right: Sequence[Weights], reference: Weights, names: Sequence[str]
) -> NDArray[np.float64]:
    total = torch.zeros((len(left), len(right)), dtype=torch.float64)
    for name in names:
        origin = reference[name].detach().double().flatten()
        rows = torch.stack([state[name].detach().double().flatten() for state in left]) - origin
        columns = rows
        if right is not left:
            columns = torch.stack([state[name].detach().double().flatten() for state in right]) - origin
        total += (rows @ columns.T).cpu()
    return total.numpy()


def principal_axes(
    gram: NDArray[np.float64],
    n_components: int,
    *,
    steps: Sequence[float] | None = None,
    center: Center = "last",
) -> TrajectoryPCA:
    """PCA of a trajectory from its Gram matrix.

    With `center="last"` the axes maximise the squared length Σ_i ⟨θ_i − θ_n, d⟩²: the best plane *through
    θ_n*, so that explained variance is exactly one minus the share of the squared off-plane distances. With
    "mean" rows are centred first, as sklearn's PCA (and so the code of Li et al.) does.

    Args:
        gram: From `trajectory_gram` with θ_n as reference and as last row (which is zero).
        n_components: How many axes.
        steps: Training step of each row; evenly spaced when None.
        center: See above.

    Returns:
        Axes in order of explained variance, each turned so that the first row's coordinate is not negative.
        Fewer than n_components if the rows span fewer dimensions.

    Raises:
        ValueError: If there are no rows, or one is not finite, or all are the same point.

    References:
        Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, §7.
        Antognini and Sohl-Dickstein, "PCA of high dimensional random walks", NeurIPS 2018.
    """
    n = len(gram)
    if n == 0:
        raise ValueError("PCA needs at least one checkpoint besides the last.")
    if not np.isfinite(gram).all():
        bad = [i for i in range(n) if not np.isfinite(gram[i, i])]
        raise ValueError(f"PCA needs finite weights; checkpoints at positions {bad} hold NaN or infinity.")
    middle = np.eye(n) - (1.0 / n if center == "mean" else 0.0)
    value, vector = np.linalg.eigh(middle @ gram @ middle)
    value, vector = value[::-1], vector[:, ::-1]
    rank = int((value > n * np.finfo(np.float64).eps * max(value[0], 0.0)).sum())
    if rank == 0:
        raise ValueError("PCA needs checkpoints that differ; all of these are the same point.")
    kept = min(n_components, rank)
    mixing = middle @ vector[:, :kept] / np.sqrt(value[:kept])
    coordinate = gram @ mixing
    turn = np.where(coordinate[0] < 0, -1.0, 1.0)
    null = random_walk_spectrum(n, steps=steps, center=center)
    return TrajectoryPCA(
        explained_variance=value[:kept] / np.trace(middle @ gram @ middle),
        random_walk=null[:kept],
        mixing=mixing * turn,
        coordinate=coordinate * turn,
        center=center,
    )


def random_walk_spectrum(
    n_rows: int, *, steps: Sequence[float] | None = None, center: Center = "last"
) -> NDArray[np.float64]:
    """Explained variance of a pure random walk in many dimensions, for rows θ_i − θ_n.

    Uncorrelated steps make ⟨θ_i − θ_n, θ_j − θ_n⟩ proportional to min(t_n − t_i, t_n − t_j); the shares are
    the eigenvalues of that matrix. Even steps and many rows: 8/(π(2k−1))² = 81.1 %, 9.0 %, … through the last
    point, and 6/(πk)² = 60.8 %, 15.2 %, … centred. A trajectory has to beat this to be called flat.

    Args:
        n_rows: Rows, the last of them θ_n's own.
        steps: One number per row; evenly spaced when None.
        center: As in `principal_axes`.

    Returns:
        Shares in descending order, shape (n_rows,).
    """
    times = np.arange(float(n_rows)) if steps is None else np.asarray(steps, dtype=np.float64)
    ages = times[-1] - times
    middle = np.eye(n_rows) - (1.0 / n_rows if center == "mean" else 0.0)
    value = np.linalg.eigvalsh(middle @ np.minimum.outer(ages, ages) @ middle)[::-1]
    shares: NDArray[np.float64] = np.maximum(value, 0.0) / value.sum()
    return shares


def axis_directions(
    load: Load, pca: TrajectoryPCA, reference: Weights, names: Sequence[str]
) -> list[dict[str, Tensor]]:
    """The axes in parameter space, unit length, one pass over the checkpoints.

    Args:
        load: As in `trajectory_gram`.
        pca: From `principal_axes`.
        reference: θ_n.
        names: The same tensors as in the Gram matrix.

    Returns:
        One name → float64 tensor per axis.
    """
    n_rows, n_components = pca.mixing.shape
    axes = [
        {name: torch.zeros_like(reference[name], dtype=torch.float64) for name in names}
        for _ in range(n_components)
    ]
    for i in range(n_rows):
        state = load(i)
        for name in names:
            row = state[name].detach().double() - reference[name].detach().double()
            for axis, weight in zip(axes, pca.mixing[i], strict=True):
                axis[name].add_(row, alpha=float(weight))
    return axes


@dataclass(frozen=True)
class Projection:
    """A point seen from a plane.

    Attributes:
        coordinate: In units of the directions, shape (n_directions,).
        off_plane: ‖D − Σ_k c_k d_k‖, the part of the displacement that the plane does not show.
        length: ‖D‖.
    """

    coordinate: NDArray[np.float64]
    off_plane: float
    length: float


def project(
    point: Weights, reference: Weights, directions: Sequence[Weights], names: Sequence[str]
) -> Projection:
    """Least-squares coordinates of a point on the plane through `reference`.

    c = G⁻¹ ⟨D, d⟩ with G the Gram matrix of the directions and D = point − reference. Dividing ⟨D, d⟩ by ‖d‖
    instead is right for orthonormal directions only: on filter-normalised ones it is off by a factor ‖d‖.

    Args:
        point: State to place.
        reference: Origin of the plane.
        directions: Its directions, any length and angle; a name that one lacks counts as zero there.
        names: Which tensors count.

    Returns:
        Coordinates and what is left over, computed explicitly in float64.

    Raises:
        ValueError: If the directions do not span (one is zero, or two are parallel).
    """
    count = len(directions)
    gram, product = np.zeros((count, count)), np.zeros(count)
    for name in names:
        rows = _stacked(directions, name, reference[name])
        gram += (rows @ rows.T).cpu().numpy()
        product += (rows @ _difference(point, reference, name)).cpu().numpy()
    scale = np.sqrt(np.diag(gram))
    if not (scale > 0).all() or np.linalg.cond(gram / np.outer(scale, scale)) > 1e12:
        raise ValueError("These directions span no plane: one is zero, or they are parallel.")
    coordinate = np.linalg.solve(gram / np.outer(scale, scale), product / scale) / scale
    left = whole = 0.0
    weights = torch.from_numpy(coordinate)
    for name in names:
        row = _difference(point, reference, name)
        rest = row - weights.to(row.device) @ _stacked(directions, name, reference[name])
        left += float(rest @ rest)
        whole += float(row @ row)
    return Projection(coordinate, math.sqrt(left), math.sqrt(whole))


def _difference(point: Weights, reference: Weights, name: str) -> Tensor:
    return (point[name].detach().double() - reference[name].detach().double()).flatten()


def _stacked(directions: Sequence[Weights], name: str, like: Tensor) -> Tensor:
    zero = torch.zeros(like.numel(), dtype=torch.float64, device=like.device)
    return torch.stack([d[name].detach().double().flatten() if name in d else zero for d in directions])
