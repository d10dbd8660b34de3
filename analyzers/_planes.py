"""The directions of a loss surface: random, principal axes of the run, Hessian eigenvectors, a checkpoint."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.directions import Direction, Normalization, normalise, random_directions
from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.lanczos import lanczos
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.params import filter_axis, private_copy, weight_parameters
from dynprobe.analyzers.numerics.pca import TrajectoryPCA, axis_directions, principal_axes, trajectory_gram

Normalize = Literal["auto", "filter", "layer", "none"]


@dataclass
class Plane:
    """One or two directions from a checkpoint, and the evidence for them.

    Args:
        directions: Name to tensor, one dict each.
        values: Variables that go into the result.
        notes: Sentences for the reader.
        hvps: Hessian-vector products spent.
        problem: Why the directions are not what was asked for; empty if they are.
    """

    directions: list[Direction]
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hvps: int = 0
    problem: str = ""


def target_of(directions: str) -> str | None:
    """Which checkpoint a path leads to; None for planes.

    Raises:
        OptionError: If the directions are not known.
    """
    kind, colon, target = directions.partition(":")
    if (kind == "to" and target) or (not colon and kind in ("random", "pca", "eigen")):
        return target or None
    raise OptionError(f"directions {directions!r} is not known.", "Give random, pca, eigen or to:CHECKPOINT.")


def resolve_normalize(directions: str, normalize: Normalize) -> Normalization:
    """Filter normalisation for random directions; the others already have a length that means something.

    Raises:
        OptionError: A path to a checkpoint cannot be rescaled without missing it.
    """
    if directions.startswith("to:") and normalize not in ("auto", "none"):
        raise OptionError(
            f"normalize {normalize} with directions {directions} would rescale the path, which then "
            "misses the other end.",
            "Leave the option out.",
        )
    if normalize == "auto":
        return "filter" if directions == "random" else "none"
    return normalize


def random_plane(model: nn.Module, dims: int, *, seed: int, kind: Normalization, ignore_1d: bool) -> Plane:
    """Gaussian directions scaled to the network's filters (Li et al. 2018)."""
    directions = random_directions(model, dims, seed=seed, normalize=kind, ignore_1d=ignore_1d)
    return _measured(Plane(directions, {"direction_seed": seed}))


def checkpoint_seed(seed: int, step: Any) -> int:
    """A seed of a checkpoint's own, from the run's seed and its step."""
    return int(np.random.SeedSequence([seed, zlib.crc32(repr(step).encode())]).generate_state(1)[0])


def eigen_plane(
    model: nn.Module, batches: Any, loss: Loss, dims: int, *, kind: Normalization, seed: int
) -> Plane:
    """Eigenvectors of the largest Hessian eigenvalues at the checkpoint, unit length unless normalised."""
    operator = HessianOperator(model, batches, loss)
    found = lanczos(
        operator,
        operator.n_parameters,
        k=dims,
        which="LA",
        tol=1e-3,
        seed=seed,
        device=operator.device,
        rounding=operator.rounding,
    )
    plane = Plane([operator.as_dict(vector) for vector in found.eigenvector], hvps=found.n_matvec)
    plane.values = {"direction_eigenvalue": found.eigenvalue, "direction_residual": found.residual}
    if not found.converged.all():
        plane.problem = "the Hessian's eigenvectors, which are the directions, did not converge"
    return _measured(_normalised(plane, model, kind))


def pca_plane(run: Any, model: nn.Module, dims: int, *, kind: Normalization) -> Plane:
    """Principal axes of the run's trajectory, unit length unless normalised; made once per run."""
    if run is None:
        raise OptionError("directions pca need the whole run.", "Pass `run`, or use directions random.")
    names = list(weight_parameters(model))
    pca, axes, left_out = run.cached(("landscape pca", dims), lambda: _run_axes(run, names, dims))
    if len(axes) < dims:
        raise OptionError(
            f"the run has too few distinct checkpoints for {dims} principal axes.",
            "Use dims 1 or more checkpoints.",
        )
    like = weight_parameters(model)
    directions = [{name: axis[name].to(like[name]) for name in names} for axis in axes]
    reach = ", ".join(f"{low:.3g} to {high:.3g}" for low, high in zip(*_reach(pca), strict=True))
    notes = [f"the run's path reaches from {reach} along the axes: choose the span accordingly"]
    values = {"explained_variance": pca.explained_variance, "random_walk": pca.random_walk}
    return _measured(_normalised(Plane(directions, values, notes + left_out), model, kind))


def _reach(pca: TrajectoryPCA) -> tuple[list[float], list[float]]:
    return np.minimum(pca.coordinate.min(0), 0).tolist(), np.maximum(pca.coordinate.max(0), 0).tolist()


def _run_axes(run: Any, names: Sequence[str], dims: int) -> tuple[TrajectoryPCA, list[Direction], list[str]]:
    """Axes of all readable, finite checkpoints of a run, relative to the last of them."""
    good, bad = [], []
    for i in range(len(run)):
        try:
            state = run.state(i)
        except Exception as error:
            bad.append(f"step {run.steps[i]} ({error})")
            continue
        if all(bool(torch.isfinite(state[name]).all()) for name in names):
            good.append(i)
        else:
            bad.append(f"step {run.steps[i]} (NaN or infinite weights)")
    if len(good) < 2:
        raise OptionError("directions pca need at least two sound checkpoints.", "See `dynprobe check`.")
    notes = [f"left out of the principal axes: {', '.join(bad)}"] if bad else []
    pca, axes = trajectory_axes(lambda i: run.state(good[i]), [run.steps[i] for i in good], names, dims)
    return pca, axes, notes


def trajectory_axes(
    load: Callable[[int], Mapping[str, Tensor]],
    steps: Sequence[float | None],
    names: Sequence[str],
    n_components: int,
    center: Literal["last", "mean"] = "last",
) -> tuple[TrajectoryPCA, list[Direction]]:
    """PCA of the rows θ_i − θ_n, streamed; the random-walk null uses the steps where all are known.

    Raises:
        OptionError: If the checkpoints have no axes: one is not finite, or all are the same point.
    """
    last = {name: tensor.detach().clone() for name, tensor in load(len(steps) - 1).items() if name in names}
    gram = trajectory_gram(load, len(steps), last, names)
    times = [float(s) for s in steps if s is not None]
    known = len(times) == len(steps) and all(a < b for a, b in itertools.pairwise(times))
    try:
        pca = principal_axes(gram, n_components, steps=times if known else None, center=center)
    except ValueError as error:
        raise OptionError(str(error), "See `dynprobe check`.") from error
    return pca, axis_directions(load, pca, last, names)


def path_to(run: Any, model: nn.Module, target: str) -> Plane:
    """The straight path to another checkpoint, θ' − θ, running statistics included; not normalised.

    Raises:
        OptionError: If there is no run to find it in, or its weights are not finite.
    """
    if run is None:
        raise OptionError(f"directions to:{target} need a run to find it in.", "Pass `run`.")
    state = run.state(target)
    if bad := [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]:
        raise OptionError(
            f"directions to:{target} lead nowhere: {bad[0]!r} there holds NaN or infinity.",
            "Name another checkpoint; see `dynprobe check`.",
        )
    own = {**weight_parameters(model), **dict(model.named_buffers())}
    direction = {
        name: (state[name].double().to(tensor.device) - tensor.double()).to(tensor)
        for name, tensor in own.items()
        if tensor.is_floating_point()
    }
    plane = Plane([direction])
    if not any(bool(step.any()) for step in direction.values()):
        plane.notes.append(f"{target} holds the same weights as this checkpoint: the path is a single point")
    return _measured(plane)


def far_end(run: Any, model: nn.Module, target: str) -> nn.Module:
    """A copy of the model that holds the other checkpoint, bit for bit."""
    copy = private_copy(model)
    copy.load_state_dict(run.state(target))
    return copy


def _normalised(plane: Plane, model: nn.Module, kind: Normalization) -> Plane:
    if kind != "none":
        weights, axes = weight_parameters(model), filter_axis(model)
        plane.directions = [normalise(d, weights, axes, kind) for d in plane.directions]
    return plane


def _measured(plane: Plane) -> Plane:
    """Records how long the directions are and how far from orthogonal."""
    flat = [torch.cat([t.detach().double().flatten() for t in d.values()]) for d in plane.directions]
    plane.values["direction_norm"] = np.array([float(f.norm()) for f in flat])
    if len(flat) == 2:
        product = float(flat[0] @ flat[1])
        lengths = float(flat[0].norm() * flat[1].norm())
        plane.values["direction_cosine"] = product / lengths if lengths > 0 else math.nan
    return plane
