"""Per-sample parameter gradients of single layers, from a layer's input and the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.factors import Dense, Factor, Rows, joined, outer

Rule = Callable[[Any, Tensor, Tensor], dict[str, Factor]]
"""`(module, input, output gradient) -> factors by the module's own parameter names`, samples along dim 0."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KEPT_PATCHES = 2**28
"""Bytes of convolution patches that are kept for the next pull; more are made for few samples at a time."""


class Patches:
    """Makes what the convolutions of one forward pass see, and keeps it as far as memory allows."""

    def __init__(self) -> None:
        self._kept: dict[LayerUse, Tensor] = {}
        self._bytes = 0

    def of(self, use: LayerUse) -> Iterator[Tensor]:
        """Patches, shape (k, positions, entries), of some samples after the other; of all if kept."""
        if use not in self._kept:
            one = patches(use.module, use.inputs[:1]).nbytes
            if self._bytes + one * len(use.inputs) > KEPT_PATCHES:
                step = max(1, KEPT_PATCHES // (4 * one))  # the rule takes some copies of them
                yield from (patches(use.module, part) for part in torch.split(use.inputs, step))
                return
            self._kept[use] = patches(use.module, use.inputs)
            self._bytes += self._kept[use].nbytes
        yield self._kept[use]


@dataclass(eq=False)
class LayerUse:
    """One call of a layer in the forward pass.

    Args:
        module: The layer.
        inputs: What it was given.
        edge: Its output's place in the graph.
        names: Its parameters that are differentiated: own name to name in the model.
    """

    module: nn.Module
    inputs: Tensor
    edge: GradientEdge
    names: dict[str, str]

    def factors(self, delta: Tensor, n: int, made: Patches) -> dict[str, Factor]:
        """Per-sample gradients by the module's own parameter names; none if its rule cannot tell samples.

        Args:
            delta: Gradient at the output.
            n: Samples in the batch.
            made: Of the same forward pass.
        """
        module, inputs = self.module, self.inputs
        if len(inputs) != n or len(delta) != n:
            if not by_position(module) or not len(inputs) or len(inputs) % n or len(delta) % n:
                return {}
            inputs, delta = (t.reshape(n, -1, *t.shape[1:]) for t in (inputs, delta))
        if not isinstance(module, CONVOLUTIONS):
            rule = rule_for(module)
            return rule(module, inputs, delta) if rule is not None else {}
        parts, done = [], 0
        for seen in made.of(self):
            parts.append(convolution(module, seen, delta[done : done + len(seen)]))
            done += len(seen)
        return {local: joined([part[local] for part in parts]) for local in parts[0]}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module's type, None where there is none.

    A subclass with a `forward` of its own has none: it may do anything with its input. (A parametrised module
    is of a subclass that inherits it.)
    """
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        return None  # batch statistics: a sample has no gradient of its own
    for kind, rule in _RULES:
        if isinstance(module, kind):
            return rule if type(module).forward is kind.forward else None
    if type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None:
        return _transposed_linear  # GPT-2's, known by its name so that transformers need not be installed
    return None


def by_position(module: nn.Module) -> bool:
    """Whether the module treats every index but the last alike: samples and positions may be one index."""
    return not isinstance(module, (*CONVOLUTIONS, _BatchNorm, nn.GroupNorm))


def patches(module: Any, inputs: Tensor) -> Tensor:
    """What each output position of a convolution sees.

    Args:
        module: A Conv1d, Conv2d or Conv3d.
        inputs: Shape (n, channels, *sizes).

    Returns:
        Shape (n, positions, channels * kernel entries), ordered as the weight's entries are.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    dims = len(module.kernel_size)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        windows = windows.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    return windows.permute(order).flatten(1 + dims).flatten(1, dims)


def convolution(module: Any, seen: Tensor, delta: Tensor) -> dict[str, Factor]:
    """Factors of a convolution.

    Args:
        module: A Conv1d, Conv2d or Conv3d.
        seen: From `patches`.
        delta: Gradient at the output, shape (n, channels, *sizes).
    """
    delta = delta.flatten(2).mT  # (n, positions, channels)
    weight = module.weight
    if module.groups == 1:
        return {"weight": outer(delta, seen, weight.shape), "bias": Dense(delta.sum(1))}
    grouped = (*delta.shape[:2], module.groups, -1)
    one = delta.reshape(grouped).permute(0, 2, 3, 1)
    gradient = one @ seen.reshape(grouped).transpose(1, 2)
    return {"weight": Dense(gradient.reshape(-1, *weight.shape)), "bias": Dense(delta.sum(1))}


def _convolution(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    return convolution(module, patches(module, inputs), delta)


def _linear(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    inputs, delta = _positions(inputs), _positions(delta)
    return {"weight": outer(delta, inputs, module.weight.shape), "bias": Dense(delta.sum(1))}


def _transposed_linear(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    inputs, delta = _positions(inputs), _positions(delta)
    return {"weight": outer(inputs, delta, module.weight.shape), "bias": Dense(delta.sum(1))}


def _embedding(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    index, delta = inputs.reshape(len(inputs), -1), _positions(delta)
    if module.padding_idx is not None:
        delta = delta * (index != module.padding_idx)[..., None]
    return {"weight": Rows(index, delta, module.weight.shape)}


def _batch_norm(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    normal = functional.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)
    return _per_channel(normal, delta)


def _group_norm(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    return _per_channel(functional.group_norm(inputs, module.num_groups, eps=module.eps), delta)


def _per_channel(normal: Tensor, delta: Tensor) -> dict[str, Factor]:
    """Scale and shift of channels along dim 1."""
    positions = list(range(2, delta.dim()))
    scale = normal * delta
    return {
        "weight": Dense(scale.sum(positions) if positions else scale),
        "bias": Dense(delta.sum(positions) if positions else delta),
    }


def _layer_norm(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    normal = functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    return _per_entry(module, normal, delta)


def _rms_norm(module: Any, inputs: Tensor, delta: Tensor) -> dict[str, Factor]:
    return _per_entry(module, functional.rms_norm(inputs, module.normalized_shape, eps=module.eps), delta)


def _per_entry(module: Any, normal: Tensor, delta: Tensor) -> dict[str, Factor]:
    """Scale and shift of each entry of the last dimensions."""
    shape = module.normalized_shape
    scale = (normal * delta).reshape(len(delta), -1, *shape).sum(1)
    return {"weight": Dense(scale), "bias": Dense(delta.reshape(len(delta), -1, *shape).sum(1))}


def _positions(values: Tensor) -> Tensor:
    """Shape (n, positions, features)."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


_RULES: tuple[tuple[Any, Rule], ...] = (
    (nn.Linear, _linear),
    *((kind, _convolution) for kind in CONVOLUTIONS),
    (_BatchNorm, _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.RMSNorm, _rms_norm),
    (nn.Embedding, _embedding),
)
