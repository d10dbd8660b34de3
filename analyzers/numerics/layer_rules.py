"""Per-sample parameter gradients of single layers, from a layer's input and the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.factors import Dense, Factor, Rows, outer

Rule = Callable[[Any, Tensor, Tensor], dict[str, Factor]]
"""`(module, input, output gradient) -> factors by the module's own parameter names`, samples along dim 0."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module's type, None where there is none."""
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        return None  # batch statistics: a sample has no gradient of its own
    for kinds, rule in _RULES:
        if isinstance(module, kinds):
            return rule
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
    (CONVOLUTIONS, _convolution),
    (_BatchNorm, _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.RMSNorm, _rms_norm),
    (nn.Embedding, _embedding),
)
