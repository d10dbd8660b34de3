"""What a linear model descends on: the loss of a batch as the run's own criterion gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._linear_dynamics_data import as_rows, spread
from dynprobe.analyzers.numerics.losses import Loss, as_loss

Criterion = Callable[[Tensor, Tensor], Tensor]
PROBED = 8
"""Samples on which the mean squared error is recognised."""
COMPARED = 256
"""Samples on which the loss of a batch is compared with the mean of its samples."""
TOLERANCE = 1e-5
"""Relative difference up to which two ways of computing a loss agree; it may be computed in float32."""


@dataclass(frozen=True)
class Objective:
    """A loss and what the linear models descend on, both taking float64 outputs on the CPU.

    Attributes:
        loss: Per sample, as results report it.
        of_batch: Of a batch, a scalar.
        quadratic: Whether that is any multiple of the squared error.
        squared: Whether it is its mean over samples and outputs.
        refusal: Why nothing can descend on it, or "".
        notes: For the reader.
    """

    loss: Loss
    of_batch: Criterion
    quadratic: bool
    squared: bool
    refusal: str
    notes: tuple[str, ...]


def objective_of(given: Any, outputs: Tensor, targets: Tensor, target: Tensor, model: nn.Module) -> Objective:
    """Find out what a run's loss makes of a batch, by trying it on some samples.

    Args:
        given: A `Loss`, or a callable such as `nn.CrossEntropyLoss(weight=…)`.
        outputs: Of the network, float64 on the CPU, shape (n_samples, …).
        targets: As the loss takes them.
        target: In the space of the outputs, shape (n_samples, n_outputs).
        model: Says in which precision and where the run computed its loss.

    Raises:
        OptionError: If it cannot be computed of these outputs and targets.
    """
    loss = as_loss(given)
    rows = spread(len(outputs), COMPARED)
    some, their = outputs[rows], targets[rows]
    per_sample = _placed(loss.per_sample, loss.name, some, their, model)
    loss = Loss(loss.name, per_sample, loss.accuracy)
    criterion = _criterion(given)
    of_batch = loss if criterion is None else _placed(criterion, loss.name, some, their, model)
    refusal, notes = "", []
    with torch.no_grad():
        once, mean = of_batch(some, their), loss(some, their)
        if criterion is not None and once.dim():
            of_batch, once = loss, mean  # one value per sample: the run took their mean, as far as we know
        twice = of_batch(torch.cat([some, some]), torch.cat([their, their]))
    if _differ(once, twice):
        refusal = (
            f"the loss {loss.name} is no mean over the samples of a batch (the same samples twice give "
            f"{float(twice / once):.3g} times the loss), so that a learning rate for batches is none for all"
        )
    elif _differ(once, mean):
        notes.append(
            f"the loss {loss.name} of a batch is not the mean of its samples' losses (class weights?): the "
            "linear models descend on the former, as the run did; loss and linear_loss are the latter"
        )
    few = spread(len(outputs), PROBED)
    curvature, is_mean = _curvature(of_batch, outputs[few], targets[few], target[few])
    return Objective(loss, of_batch, curvature > 0, is_mean, refusal, tuple(notes))


def _criterion(given: Any) -> Criterion | None:
    """The callable that a run called on a batch, where a `Loss` was made of one; None for dynprobe's own."""
    return given.criterion if isinstance(given, Loss) else given


def _placed(function: Criterion, name: str, outputs: Tensor, targets: Tensor, model: nn.Module) -> Criterion:
    """The function for float64 outputs on the CPU, computed where and as precisely as it can be.

    A criterion with weights in float32, or on an accelerator, takes outputs like these only.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), outputs)
    refused: Exception | None = None
    for dtype, device in (
        (torch.float64, torch.device("cpu")),
        (torch.float32, torch.device("cpu")),
        (first.dtype, first.device),
    ):

        def placed(o: Tensor, t: Tensor, dtype: torch.dtype = dtype, device: Any = device) -> Tensor:
            t = t.to(device, dtype) if t.is_floating_point() else t.to(device)
            return function(o.to(device, dtype), t).cpu().double()

        try:
            with torch.no_grad():
                placed(outputs, targets)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            refused = refused or error
            continue
        return placed
    raise OptionError(
        f"the loss {name} takes no outputs of shape {tuple(outputs.shape)} with targets of shape "
        f"{tuple(targets.shape)}: {str(refused).splitlines()[0] if str(refused) else type(refused).__name__}",
        "Check --loss and --data.",
    ) from refused


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs() > TOLERANCE * torch.maximum(a.abs(), b.abs()))


def _curvature(function: Criterion, outputs: Tensor, targets: Tensor, target: Tensor) -> tuple[float, bool]:
    """Find c where the loss has the gradient c·(f − y) at three outputs, which makes it quadratic; else 0.

    Returns:
        c, and whether the loss is the mean over samples and outputs of (f − y)², in value and gradient.
    """
    scale = float((as_rows(outputs) - target).abs().max()) or 1.0
    generator = torch.Generator().manual_seed(0)
    found, is_mean = 0.0, True
    for size in (1.0, 3.0, 0.0):
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        leaf = (outputs + size * scale * noise).detach().requires_grad_()
        error = as_rows(leaf.detach()) - target
        with torch.enable_grad():
            value = function(leaf, targets)
            (slope,) = torch.autograd.grad(value, leaf, allow_unused=True)
        if slope is None:
            return 0.0, False
        slope = as_rows(slope)
        found = found or float((slope * error).sum() / (error**2).sum())
        if not bool((slope - found * error).abs().max() <= TOLERANCE * abs(found) * error.abs().max()):
            return 0.0, False
        is_mean &= not _differ(value.detach(), (error**2).mean())
    return found, is_mean and abs(found * target.numel() / 2 - 1) < TOLERANCE
