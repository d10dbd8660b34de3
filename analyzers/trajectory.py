"""The path of a run on a plane, with what the plane does not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers import Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._planes import random_plane, trajectory_axes
from dynprobe.analyzers._sampling import Floats, Meter, Sampler, check_seed, chosen_metrics
from dynprobe.analyzers._trajectory_figure import draw_trajectory
from dynprobe.analyzers.numerics.batchnorm import batchnorm_layers
from dynprobe.analyzers.numerics.directions import Direction, Normalization
from dynprobe.analyzers.numerics.evaluate import estimate, per_sample, resolve_metrics
from dynprobe.analyzers.numerics.grid import covering_axis
from dynprobe.analyzers.numerics.losses import Loss, as_loss
from dynprobe.analyzers.numerics.params import frozen_eval, weight_parameters
from dynprobe.analyzers.numerics.pca import Projection, project
from dynprobe.analyzers.numerics.surface import BatchNorm, Surface


def _along(what: str, units: str = "", error: str = "", optional: bool = False) -> Var:
    return Var(("checkpoint",), units, what, error, optional)


RETURNS = {
    "coordinate": Var(("checkpoint", "component"), "", "Coordinate, in units of the direction"),
    "component": Var(("component",), "", "Component"),
    "explained_variance": Var(("component",), "", "Share of the squared length of the path"),
    "random_walk": Var(("component",), "", "The same share for a random walk", optional=True),
    "direction_norm": Var(("component",), "", "Length of each direction"),
    "direction_seed": Var((), "", "Seed of the random directions", optional=True),
    "distance": _along("Distance from the last checkpoint", ""),
    "off_plane_distance": _along("Distance from the plane", ""),
    "off_plane_share": _along("Distance from the plane over distance from the last checkpoint", ""),
    "loss": _along("Loss of the checkpoint", error="loss_stderr"),
    "loss_stderr": _along("Standard error over samples"),
    "plane_loss": _along("Loss of its place on the plane", error="plane_loss_stderr"),
    "plane_loss_stderr": _along("Standard error over samples"),
    "accuracy": _along("Accuracy of the checkpoint", error="accuracy_stderr", optional=True),
    "accuracy_stderr": _along("Standard error over samples", optional=True),
    "plane_accuracy": _along(
        "Accuracy of its place on the plane", error="plane_accuracy_stderr", optional=True
    ),
    "plane_accuracy_stderr": _along("Standard error over samples", optional=True),
    "surface": Var(("y", "x"), "", "Loss on the plane", "surface_stderr", optional=True),
    "surface_stderr": Var(("y", "x"), "", "Standard error over samples", optional=True),
    "x": Var(("x",), "", "Along the first direction", optional=True),
    "y": Var(("y",), "", "Along the second direction", optional=True),
}


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    return {"forwards": 2 * n_checkpoints + int(options.get("grid", 25)) ** 2}


TABLE = (
    "coordinate",
    "distance",
    "off_plane_distance",
    "loss",
    "plane_loss",
    "explained_variance",
    "random_walk",
)


@analyzer(returns=RETURNS, figure=draw_trajectory, cost=_cost, table=TABLE)
def trajectory(
    checkpoints: Sequence[Any],
    batches: Any,
    loss: Any,
    partial: Any = None,
    progress: Any = None,
    *,
    plane: Literal["pca", "landscape"] = "pca",
    components: Annotated[int, Range(min=2)] = 2,
    center: Literal["last", "mean"] = "last",
    normalize: Normalization = "filter",
    ignore_1d: bool = True,
    grid: Annotated[int, Range(min=0)] = 25,
    batchnorm: BatchNorm = "frozen",
    seed: int = 0,
) -> Measurement:
    """The path of a run on a plane, with what the plane does not show.

    The plane goes through the last checkpoint θ_n, along the first two principal axes of the rows θ_i − θ_n
    or along the random directions of `dynprobe landscape`. A checkpoint is placed by least squares; how far
    it lies off the plane is reported, and its own loss beside the loss of its place on the plane, since the
    picture shows only the latter. Explained variance stands beside that of a pure random walk through the
    same steps, which already puts most of its length into two axes.

    Cost: two forward passes over the data per checkpoint and one per grid point; every checkpoint is read
    four times, one at a time, and once more for each 256 MiB that all of them together take beyond the first.

    Args:
        checkpoints: Of one run, in order; each with `step` and `model`.
        batches: Pairs (inputs, targets), re-iterable.
        loss: The loss, or a callable such as `F.cross_entropy`.
        partial: Where finished parts are kept.
        progress: Called with (done, total, what).
        plane: pca, or landscape for the random plane that landscape draws at the last checkpoint.
        components: How many principal axes to report; the first two span the plane.
        center: last takes the axes of the rows θ_i − θ_n as they are, so that the plane through θ_n is the
            best one; mean centres the rows first, as the code of Li et al. does (pca only).
        normalize: filter, layer or none (plane landscape only).
        ignore_1d: Keep biases and normalisation parameters out of the directions (plane landscape only).
        grid: Points per axis of the surface around the path; 0 leaves it out.
        batchnorm: frozen evaluates the plane with the last checkpoint's running statistics; recompute
            estimates them anew from the data at every point.
        seed: Of the random directions.

    Returns:
        Coordinates, distances and losses of every checkpoint, and the surface that holds the whole path.

    Raises:
        OptionError: If there are fewer than two distinct checkpoints, or an option would have no effect.

    References:
        Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS
        2018, §7.
        Antognini and Sohl-Dickstein, "PCA of high dimensional random walks with comparison to neural network
        training", NeurIPS 2018.
    """
    _check_options(plane, components, center, normalize, ignore_1d, grid, seed)
    if len(checkpoints) < 2:
        raise OptionError(
            "a trajectory needs at least two checkpoints.", "Give the whole run, or more --steps."
        )
    loss = as_loss(loss)
    meter = Meter(progress, 2 * len(checkpoints) + grid**2)
    found = _plane(checkpoints, plane, components, center, normalize, ignore_1d, seed)
    values, notes = found.values, found.notes

    model = checkpoints[-1].model
    with frozen_eval(model):
        metrics = chosen_metrics("auto", batches, loss, model)
    spots, own = _walk(checkpoints, batches, loss, metrics, found.directions, partial, meter)
    _add_distances(values, spots, found.directions, exact=plane == "pca")
    for name, column in own.items():
        values[name] = column

    model = checkpoints[-1].model  # filled with the others on the way
    with frozen_eval(model):
        shown = [
            {name: d[name].to(w) for name, w in weight_parameters(model).items()} for d in found.directions
        ]
        surface = Surface(model, batches, loss, shown, metrics=metrics, batchnorm=batchnorm)
        for i, spot in enumerate(spots):
            _place(values, surface, spot, i, len(spots))
            meter.add(1, "places on the plane")
        forwards = len(spots) + round(surface.forwards)
        if grid and len(shown) == 2:
            x, y = (covering_axis(c.min(), c.max(), grid) for c in values["coordinate"].T[:2])
            sampler = Sampler(lambda: surface, "surface", x, y, partial, meter)
            sampler.fill()
            forwards += sampler.forwards
            values |= {
                "x": x,
                "y": y,
                "surface": sampler.table["loss"],
                "surface_stderr": sampler.table["loss_stderr"],
            }
        if batchnorm_layers(model) and batchnorm == "frozen":
            notes.append("the plane's losses use the last checkpoint's BatchNorm statistics")
    return Measurement(values, spent={"forwards": forwards}, notes=notes)


def _check_options(
    plane: str, components: int, center: str, normalize: str, ignore_1d: bool, grid: int, seed: int
) -> None:
    """No option is accepted and ignored, and none fails after the compute."""
    check_seed(seed)
    if grid in (1, 2):
        raise OptionError(f"grid {grid} cannot hold a path.", "Give 3 or more points, or 0 for none.")
    for name, given, needed in (
        ("components", components != 2, "pca"),
        ("center mean", center != "last", "pca"),
        (f"normalize {normalize}", normalize != "filter", "landscape"),
        ("no-ignore-1d", not ignore_1d, "landscape"),
    ):
        if given and plane != needed:
            raise OptionError(
                f"{name} is for plane {needed}; with plane {plane} it would have no effect.", "Leave it out."
            )


class _Found:
    """The directions of the plane and what is known of them."""

    def __init__(self, directions: list[Direction], values: dict[str, Any], notes: list[str]) -> None:
        self.directions, self.values, self.notes = directions, values, notes


def _plane(
    checkpoints: Sequence[Any],
    plane: str,
    components: int,
    center: Literal["last", "mean"],
    normalize: Normalization,
    ignore_1d: bool,
    seed: int,
) -> _Found:
    if plane == "landscape":
        found = random_plane(checkpoints[-1].model, 2, seed=seed, kind=normalize, ignore_1d=ignore_1d)
        keep = ("direction_norm", "direction_seed")
        values = {name: found.values[name] for name in keep} | {"component": np.array([1, 2])}
        return _Found(found.directions, values, [])
    names = list(weight_parameters(checkpoints[-1].model))
    steps = [checkpoint.step for checkpoint in checkpoints]
    pca, axes = trajectory_axes(lambda i: _weights(checkpoints[i]), steps, names, components, center)
    notes = [] if len(axes) > 1 else ["the path is a straight line: one axis holds all of it"]
    count = len(axes)
    values = {
        "coordinate": pca.coordinate,
        "component": np.arange(1, count + 1),
        "explained_variance": pca.explained_variance,
        "random_walk": pca.random_walk,
        "direction_norm": np.ones(count),
    }
    return _Found(axes[:2], values, notes)


def _weights(checkpoint: Any) -> dict[str, torch.Tensor]:
    """A copy: the next checkpoint fills the same model."""
    return {name: tensor.clone() for name, tensor in weight_parameters(checkpoint.model).items()}


def _walk(
    checkpoints: Sequence[Any],
    batches: Any,
    loss: Loss,
    metrics: Sequence[str],
    directions: Sequence[Direction],
    partial: Any,
    meter: Meter,
) -> tuple[list[Projection], dict[str, Floats]]:
    """Place and own loss of every checkpoint, one in memory at a time."""
    reference = _weights(checkpoints[-1])
    spots: list[Projection] = []
    columns: dict[str, list[float]] = {}
    for i, checkpoint in enumerate(checkpoints):
        model = checkpoint.model
        spots.append(project(weight_parameters(model), reference, directions, list(reference)))
        stored = partial.get(f"loss-{i}") if partial is not None else None
        if stored is None:
            with frozen_eval(model):
                values = per_sample(model, batches, resolve_metrics(list(metrics), loss))
            stored = {}
            for name, value in values.items():
                mean, stderr, _ = estimate(value)
                stored |= {name: np.array(mean), f"{name}_stderr": np.array(stderr)}
            if partial is not None:
                partial.put(f"loss-{i}", stored)
        for name, number in stored.items():
            columns.setdefault(name, []).append(float(number))
        meter.add(1, "checkpoints")
    return spots, {name: np.array(numbers) for name, numbers in columns.items()}


def _add_distances(
    values: dict[str, Any], spots: Sequence[Projection], directions: Sequence[Direction], *, exact: bool
) -> None:
    """Coordinates and distances; the variance that a plane not made by PCA explains."""
    coordinate = np.stack([spot.coordinate for spot in spots])
    length = np.array([spot.length for spot in spots])
    off = np.array([spot.off_plane for spot in spots])
    with np.errstate(invalid="ignore"):
        share = off / length  # NaN at the last checkpoint, which has no distance to compare with
    values |= {"distance": length, "off_plane_distance": off, "off_plane_share": share}
    if exact:
        values["coordinate"][:, : coordinate.shape[1]] = coordinate
        return
    values["coordinate"] = coordinate
    values["explained_variance"] = _explained(coordinate, directions, float(length @ length))


def _explained(coordinate: Floats, directions: Sequence[Direction], total: float) -> NDArray[np.float64]:
    """Share of the squared length along each direction, the second counted orthogonal to the first."""
    flat = torch.stack([torch.cat([t.double().flatten() for t in d.values()]) for d in directions])
    orthonormal = coordinate @ np.linalg.cholesky((flat @ flat.T).cpu().numpy())
    shares: NDArray[np.float64] = (orthonormal**2).sum(0) / total
    return shares


def _place(values: dict[str, Any], surface: Surface, spot: Projection, i: int, count: int) -> None:
    """The metrics at a checkpoint's place on the plane."""
    height = float(spot.coordinate[1]) if len(spot.coordinate) > 1 else 0.0
    row = surface.row(height, [float(spot.coordinate[0])])
    for name, value in row.items():
        if not name.endswith("difference_stderr"):
            values.setdefault(f"plane_{name}", np.full(count, np.nan))[i] = value[0]
