"""Filter-normalised slices of the loss surface around a checkpoint, with error bars."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch

from dynprobe.analyzers import Contours, Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._landscape import Assembly
from dynprobe.analyzers._planes import (
    Normalize,
    Plane,
    checkpoint_seed,
    eigen_plane,
    far_end,
    path_to,
    pca_plane,
    random_plane,
    resolve_normalize,
    target_of,
)
from dynprobe.analyzers._sampling import (
    Floats,
    Meter,
    Sampler,
    Table,
    check_seed,
    chosen_metrics,
    named_metrics,
    stacked,
)
from dynprobe.analyzers.numerics.convexity import convexity_row
from dynprobe.analyzers.numerics.grid import interpolation_axis, symmetric_axis
from dynprobe.analyzers.numerics.losses import Loss, as_loss
from dynprobe.analyzers.numerics.params import frozen_eval
from dynprobe.analyzers.numerics.surface import BatchNorm, Surface

HVPS_PER_POINT = 12
"""Typical Hessian-vector products for both ends of the spectrum to 1 %, for the cost estimate."""
CONVEXITY_RESOLUTION = 11
"""Grid points per axis of the convexity map where none are given."""


def _metric(name: str, what: str, of: str) -> dict[str, Var]:
    """A metric on the grid with its standard error, and for a loss that of its difference from the centre."""
    dims: Any = {"dims": ("y", "x"), "alternatives": (("x",),), "optional": name != "loss"}
    found = {
        name: Var(long_name=what, error=f"{name}_stderr", **dims),
        f"{name}_stderr": Var(long_name=f"Standard error over {of}", **dims),
    }
    if name.endswith("loss"):
        paired = "Standard error of the difference from the centre, paired by sample"
        found[f"{name}_difference_stderr"] = Var(long_name=paired, **dims)
    return found


def _map(what: str, units: str = "", prefix: str = "", error: str = "") -> Var:
    dims = (f"{prefix}y", f"{prefix}x")
    return Var(dims, units, what, error, optional=True, alternatives=(dims[1:],))


RETURNS = {
    **_metric("loss", "Loss", "samples"),
    **_metric("accuracy", "Accuracy", "samples"),
    **_metric("test_loss", "Test loss", "test samples"),
    **_metric("test_accuracy", "Test accuracy", "test samples"),
    "x": Var(("x",), "", "Along the first direction"),
    "y": Var(("y",), "", "Along the second direction", optional=True),
    "center_loss": Var((), "", "Loss at the checkpoint", "center_loss_stderr"),
    "center_loss_stderr": Var((), "", "Standard error of the loss at the checkpoint"),
    "seed_loss": Var(
        ("seed", "y", "x"), "", "Loss on each plane", optional=True, alternatives=(("seed", "x"),)
    ),
    "loss_spread": _map("Standard deviation of the loss between planes"),
    "direction_seed": Var((), "", "Seed of the random directions", optional=True, alternatives=(("seed",),)),
    "direction_norm": Var(
        ("direction",), "", "Length of each direction", alternatives=(("seed", "direction"),)
    ),
    "direction_cosine": Var(
        (), "", "Cosine between the directions", optional=True, alternatives=(("seed",),)
    ),
    "direction_eigenvalue": Var(
        ("direction",),
        "loss per squared parameter",
        "Eigenvalue of each direction",
        "direction_residual",
        True,
    ),
    "direction_residual": Var(("direction",), "loss per squared parameter", "‖Hv − λv‖", optional=True),
    "explained_variance": Var(
        ("direction",), "", "Share of the trajectory along each direction", optional=True
    ),
    "random_walk": Var(("direction",), "", "The same share for a random walk", optional=True),
    "evaluated": _map("1 where evaluated, 0 where interpolated"),
    "heldout_residual": Var((), "", "Largest relative error at held-out points", optional=True),
    "barrier": Var(
        (), "", "Barrier: highest loss between the ends less the higher end", "barrier_stderr", True
    ),
    "barrier_stderr": Var((), "", "Standard error of the barrier, paired by sample", optional=True),
    "barrier_at": Var((), "", "Where on the path the loss is highest", optional=True),
    "test_barrier": Var((), "", "Barrier of the test loss", "test_barrier_stderr", True),
    "test_barrier_stderr": Var((), "", "Standard error of the test barrier", optional=True),
    "test_barrier_at": Var((), "", "Where on the path the test loss is highest", optional=True),
    "convexity": _map("|λmin/λmax| of the Hessian", "", "convexity_"),
    "lambda_max": _map(
        "Largest Hessian eigenvalue", "loss per squared parameter", "convexity_", "lambda_max_residual"
    ),
    "lambda_min": _map(
        "Smallest Hessian eigenvalue", "loss per squared parameter", "convexity_", "lambda_min_residual"
    ),
    "lambda_max_residual": _map("‖Hv − λmax v‖", "loss per squared parameter", "convexity_"),
    "lambda_min_residual": _map("‖Hv − λmin v‖", "loss per squared parameter", "convexity_"),
    "convexity_converged": _map("1 where both eigenvalues converged", "", "convexity_"),
    "convexity_x": Var(("convexity_x",), "", "Along the first direction", optional=True),
    "convexity_y": Var(("convexity_y",), "", "Along the second direction", optional=True),
    "slice_curvature_max": _map("Largest curvature of the slice", "loss per squared direction"),
    "slice_curvature_min": _map("Smallest curvature of the slice", "loss per squared direction"),
}


def _reads(options: Mapping[str, Any]) -> Sequence[str]:
    directions = str(options.get("directions", "random"))
    target = target_of(directions)
    return ["all"] if directions == "pca" else [target] if target else []


def _skips(options: Mapping[str, Any]) -> Sequence[str]:
    return [] if options.get("test", False) else ["test_batches"]


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    del n_checkpoints
    is_path = target_of(str(options.get("directions", "random"))) is not None
    plane = options.get("dims", 2) == 2 and not is_path
    n_x, n_y = _resolution(str(options.get("resolution", "51")), plane=plane)
    side = int(options.get("convexity_resolution", 0)) or CONVEXITY_RESOLUTION
    points = side ** (2 if plane else 1) if options.get("convexity", False) else 0
    copies = int(options.get("seeds", 1)) * (2 if options.get("test", False) else 1)
    hvps = points * HVPS_PER_POINT + (HVPS_PER_POINT if options.get("directions") == "eigen" else 0)
    return {"forwards": n_x * n_y * copies, "hvps": hvps}


TABLE = (
    "center_loss",
    "loss",
    "accuracy",
    "test_loss",
    "test_accuracy",
    "loss_spread",
    "barrier",
    "test_barrier",
    "convexity",
    "heldout_residual",
)


@analyzer(
    returns=RETURNS,
    figure=Contours(z="loss", x="x", y="y"),
    reads=_reads,
    cost=_cost,
    table=TABLE,
    skips=_skips,
)
def landscape(
    model: torch.nn.Module,
    batches: Any,
    loss: Any,
    test_batches: Any = None,
    step: Any = None,
    run: Any = None,
    partial: Any = None,
    progress: Any = None,
    *,
    directions: str = "random",
    resolution: str = "51",
    span: float = 1.0,
    dims: Annotated[int, Range(min=1, max=2)] = 2,
    normalize: Normalize = "auto",
    ignore_1d: bool = True,
    metrics: str = "auto",
    seeds: Annotated[int, Range(min=1)] = 1,
    draw: Literal["run", "checkpoint"] = "run",
    batchnorm: BatchNorm = "frozen",
    test: bool = False,
    convexity: bool = False,
    convexity_resolution: Annotated[int, Range(min=0)] = 0,
    adaptive: Annotated[float, Range(min=0)] = 0.0,
    seed: int = 0,
) -> Measurement:
    """Filter-normalised slices of the loss surface around a checkpoint, with error bars.

    f(x, y) = L(θ* + x·d + y·e), L the mean loss over the samples, in eval mode. Random directions are
    Gaussian with every filter scaled to the norm of the network's own, d_f ← d_f ‖w_f‖/‖d_f‖ (Li et al. 2018,
    §4), which makes surfaces of different networks comparable; running statistics are never part of one. θ*
    lies exactly on the grid. A slice that is not convex shows a loss that is not convex, never the converse.

    Cost: one forward pass over the data per grid point; with `convexity`, some 12 Hessian-vector products
    per point of its own grid.

    Args:
        model: The network at θ*; found unchanged afterwards, which is checked.
        batches: Pairs (inputs, targets), re-iterable.
        loss: The loss, or a callable such as `F.cross_entropy`.
        test_batches: Test data, for `test`.
        step: The checkpoint's step, for `draw` checkpoint.
        run: The run it belongs to, for directions pca and to.
        partial: Where finished rows are kept.
        progress: Called with (done, total, what).
        directions: random; pca (principal axes of the whole run); eigen (top Hessian eigenvectors); or
            to:CHECKPOINT, the straight path from here (0) to another one (1): first, last, a step, a file.
        resolution: Grid points per axis, odd; 51x31 gives 51 along x and 31 along y.
        span: The axes reach from -span to span, in units of the directions; a path from 0.5-span to 0.5+span.
        dims: 2 for a plane, 1 for a line; a path to a checkpoint is always a line.
        normalize: filter, layer or none; auto takes filter for random directions and none for the others,
            which have unit length (pca, eigen) or the length of the path (to).
        ignore_1d: Keep biases and normalisation parameters where they are (random directions only).
        metrics: loss, or loss,accuracy; auto adds accuracy where the targets are classes.
        seeds: How many random planes; the loss is their mean, and the spread between them is reported.
        draw: run draws the same random numbers for every checkpoint of a run, each scaled to its own
            filters, so that surfaces can be compared; checkpoint draws anew for each.
        batchnorm: frozen keeps the checkpoint's running statistics (a path interpolates them); recompute
            estimates them anew from the data at every point.
        test: Evaluate the test data beside the training data.
        convexity: Map |λmin/λmax| of the full Hessian by Lanczos, and the curvature of the slice itself.
        convexity_resolution: Grid points per axis of that map, odd; 0 takes 11.
        adaptive: Evaluate coarse to fine and interpolate where this relative error allows; 0 evaluates all.
        seed: First seed of the random directions, and of the points held out by adaptive.

    Returns:
        Loss and other metrics on the grid with standard errors over samples; see the report's long names.

    Raises:
        OptionError: If the options contradict each other or the data.

    References:
        Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.
        Goodfellow, Vinyals and Saxe, "Qualitatively characterizing neural network optimization problems",
        ICLR 2015 (interpolation).
    """
    if test and test_batches is None:
        raise OptionError("there are no test data.", "Name them with --test-data, or leave --test out.")
    if not test:
        test_batches = None
    _check_numbers(span, adaptive, seed)
    target = target_of(directions)
    _check_effect(directions, seeds > 1, draw, ignore_1d, bool(convexity_resolution) and not convexity)
    named_metrics(metrics)
    kind = resolve_normalize(directions, normalize)
    line = dims == 1 or target is not None
    x, y = _axes("resolution", resolution, span, line=line, path=target is not None)
    side_points = str(convexity_resolution or CONVEXITY_RESOLUTION) if convexity else resolution
    side, side_y = _axes("convexity-resolution", side_points, span, line=line, path=target is not None)
    n_planes = seeds if directions == "random" else 1
    loss = as_loss(loss)
    meter = Meter(progress, n_planes * len(x) * len(y) + (len(side) * len(side_y) if convexity else 0))
    first_seed = checkpoint_seed(seed, step) if draw == "checkpoint" else seed

    with frozen_eval(model):
        names = chosen_metrics(metrics, batches, loss, model)
        planes = _planes(
            model, batches, loss, run, directions, 1 if line else 2, kind, ignore_1d, first_seed, n_planes
        )

        def surface_of(net: torch.nn.Module, plane: Plane) -> Surface:
            return Surface(
                net,
                batches,
                loss,
                plane.directions,
                metrics=names,
                batchnorm=batchnorm,
                test_batches=test_batches,
            )

        samplers = [
            Sampler(functools.partial(surface_of, model, plane), f"plane{i}", x, y, partial, meter)
            for i, plane in enumerate(planes)
        ]
        refined = [sampler.fill(adaptive, seed) for sampler in samplers]
        result = Assembly(stacked([s.table for s in samplers], squeeze=line), planes, x, y, line=line)
        result.spent = {"forwards": sum(s.forwards for s in samplers), "hvps": sum(p.hvps for p in planes)}
        result.note_surface(samplers, batchnorm)
        if adaptive > 0:
            result.add_refinement(refined, adaptive)
        if target is not None:
            result.note_variances(model, planes[0], batchnorm)
            far = surface_of(far_end(run, model, target), planes[0])
            result.add_barrier(far, ["", "test_"] if test else [""])
        if convexity:
            rows = _convexity(model, batches, loss, planes[0], side, side_y, partial, meter)
            result.add_convexity(rows, side, side_y, frozen=batchnorm == "frozen", n_planes=n_planes)
    return result.measurement()


def _check_numbers(span: float, adaptive: float, seed: int) -> None:
    check_seed(seed)
    if not 0 < span < math.inf:
        raise OptionError(f"span {span:g} must be positive and finite.", "1 reaches from -1 to 1.")
    if not 0 <= adaptive < math.inf:
        raise OptionError(f"adaptive {adaptive:g} is no relative error.", "0.02 allows two percent.")


def _check_effect(directions: str, many: bool, draw: str, ignore_1d: bool, idle_resolution: bool) -> None:
    """No option is accepted and ignored."""
    if idle_resolution:
        raise OptionError("convexity-resolution is for the convexity map.", "Add --convexity.")
    for name, given in (("seeds", many), ("draw checkpoint", draw != "run"), ("no-ignore-1d", not ignore_1d)):
        if given and directions != "random":
            raise OptionError(
                f"{name} is for random directions; with directions {directions} it would have no effect.",
                "Leave it out.",
            )


def _resolution(text: str, *, plane: bool) -> tuple[int, int]:
    """`51` or `51x31` as (points along x, points along y); one along y on a line."""
    parts = str(text).lower().split("x")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) > 2:
        raise OptionError(
            f"resolution {text!r} is not a number of points.", "Give one, as 51, or two, as 51x31."
        )
    if len(parts) == 2 and not plane:
        raise OptionError(f"resolution {text} is for a plane, and this is a line.", f"Try {parts[0]}.")
    return int(parts[0]), int(parts[-1]) if plane else 1


def _axes(option: str, points: str, span: float, *, line: bool, path: bool) -> tuple[Floats, Floats]:
    n_x, n_y = _resolution(points, plane=not line)
    try:
        if path:
            return interpolation_axis(n_x, span), np.zeros(1)
        return symmetric_axis(n_x, span), np.zeros(1) if line else symmetric_axis(n_y, span)
    except ValueError as error:
        raise OptionError(f"{option} {points}, span {span:g}: {error}") from error


def _planes(
    model: torch.nn.Module,
    batches: Any,
    loss: Loss,
    run: Any,
    directions: str,
    dims: int,
    kind: Any,
    ignore_1d: bool,
    seed: int,
    seeds: int,
) -> list[Plane]:
    if directions == "random":
        return [
            random_plane(model, dims, seed=seed + i, kind=kind, ignore_1d=ignore_1d) for i in range(seeds)
        ]
    if directions == "eigen":
        return [eigen_plane(model, batches, loss, dims, kind=kind, seed=seed)]
    if directions == "pca":
        return [pca_plane(run, model, dims, kind=kind)]
    return [path_to(run, model, directions.removeprefix("to:"))]


def _convexity(
    model: torch.nn.Module,
    batches: Any,
    loss: Loss,
    plane: Plane,
    x: Floats,
    y: Floats,
    partial: Any,
    meter: Meter,
) -> Table:
    """The convexity map, one part per row."""
    rows = []
    for i, height in enumerate(y):
        part = f"convexity-{i}"
        row = partial.get(part) if partial is not None else None
        if row is None:
            row = convexity_row(model, batches, loss, plane.directions, float(height), x.tolist())
            if partial is not None:
                partial.put(part, row)
        rows.append(row)
        meter.add(len(x), "Hessian spectra")
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
