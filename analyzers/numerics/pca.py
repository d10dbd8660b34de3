"""The plane a run of checkpoints lies in: PCA of a trajectory too long to hold in memory.

The matrix M has one row θ_i − θ_n per checkpoint (Li et al. 2018, §7.1), so its Gram matrix M Mᵀ is small
however large the model: it is summed over blocks of parameters, in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weights = Mapping[str, Tensor]
Load = Callable[[int], Weights]
Center = Literal["last", "mean"]
Piece = tuple[str, int, int]  # a tensor's name, and where in it a run of entries starts and stops

HELD_BYTES = 256 * 2**20
"""Of weights in their own dtype, kept at once while inner products are summed."""
FLOAT64_BYTES = 64 * 2**20
"""Of one block of differences in float64."""


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
    load: Load, n_rows: int, reference: Weights, names: Sequence[str], *, held: int | None = None
) -> NDArray[np.float64]:
    """Inner products G_ij = ⟨θ_i − r, θ_j − r⟩ over the named tensors, in float64.

    Goes through the parameters in bands: of each checkpoint, one at a time, the band is copied into a buffer,
    so that all are loaded once per band. In memory at once: the buffer of `held` bytes, in the checkpoints'
    own dtype (the widest, if they have several), one checkpoint, and `FLOAT64_BYTES` of differences. The
    subtraction is done in float64: the difference of two float32 weights need not be a float32 number.

    Args:
        load: i ↦ state of checkpoint i (name → tensor).
        n_rows: How many checkpoints.
        reference: State that is subtracted from each, r.
        names: Which tensors count.
        held: Bytes of the buffer; when None, 256 MiB, or what four checkpoints take where that is more.

    Returns:
        G, shape (n_rows, n_rows), symmetric.
    """
    if held is None:
        held = max(HELD_BYTES, 4 * sum(reference[name].nbytes for name in names))
    dtype = functools.reduce(torch.promote_types, {reference[name].dtype for name in names})
    size = sum(reference[name].numel() for name in names)
    width = min(size, max(1, held // (max(n_rows, 1) * dtype.itemsize)))
    buffer = torch.empty((n_rows, width), dtype=dtype, device=reference[names[0]].device)
    total = torch.zeros((n_rows, n_rows), dtype=torch.float64)
    for band in _bands(reference, names, width):
        for i, row in enumerate(buffer):
            _copy(load(i), band, row)
        origin = torch.cat([_cut(reference, piece).to(dtype) for piece in band])
        columns = zip(
            torch.split(buffer[:, : len(origin)], _width(n_rows), 1),
            torch.split(origin, _width(n_rows)),
            strict=True,
        )
        for rows, part in columns:
            total += _products(rows, part)
    gram: NDArray[np.float64] = ((total + total.T) / 2).numpy()
    return gram


def _products(rows: Tensor, origin: Tensor) -> Tensor:
    block = _differences(rows, origin)
    return (block @ block.T).cpu()


def _differences(rows: Tensor, origin: Tensor) -> Tensor:
    """Rows less the origin in float64; promotion makes no float64 copy of the rows themselves."""
    return rows - origin.double()


def _width(n_rows: int) -> int:
    """Columns of a float64 block with so many rows."""
    return max(1, FLOAT64_BYTES // (8 * max(n_rows, 1)))


def _pieces(reference: Weights, names: Sequence[str], width: int) -> Iterator[Piece]:
    """All entries of the named tensors, at most `width` at a time."""
    for name in names:
        size = reference[name].numel()
        for start in range(0, size, width):
            yield name, start, min(start + width, size)


def _bands(reference: Weights, names: Sequence[str], width: int) -> Iterator[list[Piece]]:
    """The same in lists that have `width` entries together, the last one the rest."""
    band: list[Piece] = []
    free = width
    for name in names:
        start, size = 0, reference[name].numel()
        while start < size:
            stop = min(start + free, size)
            band.append((name, start, stop))
            free -= stop - start
            start = stop
            if not free:
                yield band
                band, free = [], width
    if band:
        yield band


def _cut(state: Weights, piece: Piece) -> Tensor:
    name, start, stop = piece
    return state[name].detach().flatten()[start:stop]


def _copy(state: Weights, band: Sequence[Piece], row: Tensor) -> None:
    place = 0
    for piece in band:
        cut = _cut(state, piece)
        row[place : place + len(cut)].copy_(cut)
        place += len(cut)


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
        {
            name: torch.zeros(reference[name].shape, dtype=torch.float64, device=reference[name].device)
            for name in names
        }
        for _ in range(n_components)
    ]
    for i in range(n_rows):
        state = load(i)
        for piece in _pieces(reference, names, _width(1)):
            row = _difference(state, reference, piece)
            for axis, weight in zip(axes, pca.mixing[i], strict=True):
                _cut(axis, piece).add_(row, alpha=float(weight))
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
    pieces = list(_pieces(reference, names, _width(count + 1)))
    for piece in pieces:
        rows, row = _stacked(directions, piece, reference), _difference(point, reference, piece)
        gram += (rows @ rows.T).cpu().numpy()
        product += (rows @ row).cpu().numpy()
    scale = np.sqrt(np.diag(gram))
    if not (scale > 0).all() or np.linalg.cond(gram / np.outer(scale, scale)) > 1e12:
        raise ValueError("These directions span no plane: one is zero, or they are parallel.")
    coordinate = np.linalg.solve(gram / np.outer(scale, scale), product / scale) / scale
    left = whole = 0.0
    weights = torch.from_numpy(coordinate)
    for piece in pieces:
        row = _difference(point, reference, piece)
        rest = row - weights.to(row.device) @ _stacked(directions, piece, reference)
        left += float(rest @ rest)
        whole += float(row @ row)
    return Projection(coordinate, math.sqrt(left), math.sqrt(whole))


def _difference(point: Weights, reference: Weights, piece: Piece) -> Tensor:
    return _differences(_cut(point, piece), _cut(reference, piece))


def _stacked(directions: Sequence[Weights], piece: Piece, reference: Weights) -> Tensor:
    """Rows of the directions in float64, zero where one lacks the tensor."""
    like = _cut(reference, piece)
    rows = torch.zeros((len(directions), len(like)), dtype=torch.float64, device=like.device)
    for row, direction in zip(rows, directions, strict=True):
        if piece[0] in direction:
            row.copy_(_cut(direction, piece))
    return rows
