"""How convex the loss is along a row of a surface: both ends of the Hessian's spectrum at every point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.lanczos import lanczos
from dynprobe.analyzers.numerics.params import weight_parameters

TOLERANCE = 1e-2
"""Of λmin and λmax relative to the larger: the tolerance of the authors' own map."""

ROW_NAMES = ("lambda_max", "lambda_min", "lambda_max_residual", "lambda_min_residual", "converged", "hvps")


def convexity_row(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    directions: Sequence[Mapping[str, Tensor]],
    y: float,
    xs: Sequence[float],
    *,
    tol: float = TOLERANCE,
    max_iter: int = 150,
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """Largest and smallest eigenvalue of the Hessian at θ* + x·d + y·e for the xs of one row.

    H is the Hessian of the mean loss over samples with respect to all parameters, in eval mode with θ*'s
    BatchNorm statistics. Both ends come from one Krylov space; each point starts from the sum of its left
    neighbour's two eigenvectors, the first of a row from a random vector (so that a resumed map equals an
    uninterrupted one).

    Args:
        model: The network at θ*; not changed.
        batches: Sized, re-iterable.
        loss: Mean loss over the samples of a batch.
        directions: One or two of name to tensor.
        y: Coordinate along the second direction; 0 where there is one.
        xs: Coordinates along the first.
        tol: Of both eigenvalues, relative to the larger in magnitude.
        max_iter: Largest Krylov space.
        seed: Of the random start.

    Returns:
        Arrays of shape (len(xs),): `lambda_max`, `lambda_min`, `lambda_max_residual`, `lambda_min_residual`
        (‖Hv − λv‖), `converged` (1 or 0), `hvps` spent. NaN, and not converged, where H is not finite.

    References:
        Li et al., NeurIPS 2018, §6 and appendix; they restrict H to tensors with more than one dimension.
    """
    batches = list(batches)
    weights = weight_parameters(model)
    columns: dict[str, list[float]] = {name: [] for name in ROW_NAMES}
    start: Tensor | None = None
    for x in xs:
        at = {name: _moved(name, value, directions, (x, y)) for name, value in weights.items()}
        operator = HessianOperator(model, batches, loss, at=at)
        found = lanczos(
            operator,
            operator.n_parameters,
            k=min(2, operator.n_parameters),
            which="BE",
            tol=tol,
            relative_to="norm",
            max_iter=max_iter,
            seed=seed,
            device=operator.device,
            start=start,
            rounding=operator.rounding,
        )
        start = found.eigenvector.sum(0)
        row = (found.eigenvalue[0], found.eigenvalue[-1], found.residual[0], found.residual[-1])
        for name, number in zip(ROW_NAMES, (*row, found.converged.all(), found.n_matvec), strict=True):
            columns[name].append(float(number))
    return {name: np.array(values) for name, values in columns.items()}


def _moved(
    name: str, value: Tensor, directions: Sequence[Mapping[str, Tensor]], place: tuple[float, float]
) -> Tensor:
    for direction, coordinate in zip(directions, place, strict=False):
        if name in direction and coordinate != 0:
            value = value + coordinate * direction[name].to(value)
    return value
