"""BatchNorm statistics of a whole data set, exact however it is split into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.evaluate import Batch, call


class _Reached(Exception):
    """The layer in question has its input: the rest of this forward pass is not needed."""


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def recompute_statistics(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Set every BatchNorm's running mean and variance to those of its input over the whole data set.

    Each layer's statistics are those it has when all earlier layers use theirs: what one training-mode
    forward pass over all the data in a single batch normalises with (population variance, not the unbiased
    one). A cumulative average over batches (`momentum=None`) differs from it twice: it weights a ragged last
    batch like a full one, and it leaves out the variance between batches.

    Cost: one forward pass when the data are a single batch; with several, one (shortened) pass per layer, so
    that memory stays that of one batch.

    Args:
        model: In eval mode; its running statistics are overwritten in place.
        batches: Re-iterable `(inputs, targets)`.

    Returns:
        Passes over the data, a shortened one counted by the share of layers it reached.

    Raises:
        ValueError: A layer is used twice in one forward pass; it then has no single input distribution.
    """
    batches = batches if isinstance(batches, list) else list(batches)
    layers = batchnorm_layers(model)
    if not layers or not batches:
        return 0.0
    with torch.no_grad():
        if len(batches) == 1:
            _one_pass(model, layers, batches[0])
            return 1.0
        order = _call_order(model, layers, batches[0])
        for layer in order:
            _one_layer(model, layer, batches)
    return sum(range(1, len(order) + 1)) / len(order)


class _Moments:
    """Sum and sum of squares per channel, in float64."""

    def __init__(self, layer: _BatchNorm) -> None:
        self._mean, self._variance = _statistics(layer)
        self._count = 0
        self._total = torch.zeros_like(self._mean, dtype=torch.float64)
        self._squares = torch.zeros_like(self._total)

    def add(self, values: Tensor) -> None:
        dims = [dim for dim in range(values.dim()) if dim != 1]
        wide = values.detach().double()
        self._count += values.numel() // values.shape[1]
        self._total += wide.sum(dims)
        self._squares += wide.square().sum(dims)

    def store(self) -> None:
        mean = self._total / self._count
        variance = self._squares / self._count - mean.square()
        self._mean.copy_(mean)
        # Rounding may leave a tiny negative variance for a constant channel; NaN passes through clamp.
        self._variance.copy_(variance.clamp(min=0))


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("a BatchNorm layer keeps no running statistics")
    return layer.running_mean, layer.running_var


Hook = Callable[[_BatchNorm, Tensor], None]


def _run_with_hook(model: nn.Module, layers: list[_BatchNorm], hook: Hook, inputs: Any) -> None:
    handles = [
        layer.register_forward_pre_hook(lambda module, arguments: hook(module, arguments[0]))
        for layer in layers
    ]
    try:
        call(model, inputs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _one_pass(model: nn.Module, layers: list[_BatchNorm], batch: Batch) -> None:
    seen: set[int] = set()

    def set_before_use(layer: _BatchNorm, values: Tensor) -> None:
        _refuse_second_use(layer, seen)
        moments = _Moments(layer)
        moments.add(values)
        moments.store()

    _run_with_hook(model, layers, set_before_use, batch[0])


def _call_order(model: nn.Module, layers: list[_BatchNorm], batch: Batch) -> list[_BatchNorm]:
    order: list[_BatchNorm] = []
    seen: set[int] = set()

    def note(layer: _BatchNorm, _values: Tensor) -> None:
        _refuse_second_use(layer, seen)
        order.append(layer)

    _run_with_hook(model, layers, note, batch[0])
    return order


def _one_layer(model: nn.Module, layer: _BatchNorm, batches: list[Batch]) -> None:
    moments = _Moments(layer)

    def accumulate(_layer: _BatchNorm, values: Tensor) -> None:
        moments.add(values)
        raise _Reached

    for inputs, _targets in batches:
        _run_with_hook(model, [layer], accumulate, inputs)
    moments.store()


def _refuse_second_use(layer: _BatchNorm, seen: set[int]) -> None:
    if id(layer) in seen:
        raise ValueError(
            "a BatchNorm layer is used twice in one forward pass: its statistics are not defined"
        )
    seen.add(id(layer))
