"""The loss that a gradient is small against: that of the best constant outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers.numerics.evaluate import Batch, call
from dynprobe.analyzers.numerics.losses import Loss


def loss_scale(model: nn.Module, batches: Iterable[Batch], loss: Loss, own: float) -> float:
    """Least loss over outputs that are the same for every sample: zero, the mean target, or its logarithm.

    For squared errors this is the variance of the targets, for classes the entropy of their frequencies. The
    loss of zero outputs alone would grow with an offset of regression targets, and call a network in the
    middle of training critical.

    Args:
        model: In eval mode, float64.
        batches: Pairs (inputs, targets), re-iterable.
        loss: The loss.
        own: The network's loss, which stands in where no constant has a finite one.
    """
    constants, values = _constants(model, batches), []
    with torch.no_grad():
        for constant in constants:
            rows = [
                loss.per_sample(constant.expand(len(targets), *constant.shape), targets).double()
                for _, targets in batches
            ]
            values.append(float(torch.cat(rows).mean()))
    known = [value for value in values if math.isfinite(value)]
    return min(known, default=own)


def _constants(model: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
    """Outputs for one sample."""
    with torch.no_grad():
        blank = torch.zeros_like(call(model, next(iter(batches))[0])[0])
    total, n = torch.zeros_like(blank), 0
    for _, targets in batches:
        numbers = _as_outputs(targets, blank)
        if numbers is None:
            return [blank]
        total += numbers.sum(0)
        n += len(numbers)
    mean = total / n
    found = [blank, mean]
    if bool((mean >= 0).all()):
        found.append(mean.clamp_min(torch.finfo(mean.dtype).tiny).log())
    return found


def _as_outputs(targets: Tensor, blank: Tensor) -> Tensor | None:
    """Targets as numbers in the shape of the outputs; None where they are neither such nor classes."""
    if targets[0].numel() == blank.numel():
        return targets.reshape(len(targets), *blank.shape).to(blank.dtype)
    classes = targets.dim() == 1 and not targets.is_floating_point() and blank.dim() == 1
    if not classes or not bool(((targets >= 0) & (targets < len(blank))).all()):
        return None
    return functional.one_hot(targets.long(), len(blank)).to(blank.dtype)
