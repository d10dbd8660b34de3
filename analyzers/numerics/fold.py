"""Exact rewrites of an eval-mode network that save work at every point of a surface.

They keep the function: what is constant is folded (`fold_batchnorm`), what is linear in the coordinates is
computed once (`first_layer`, `layer_outputs`).

Which module feeds which is read off one forward pass on real data, not from a symbolic trace: that works for
networks with branches on shapes, where `torch.fx` gives up. What a pass cannot show, a second reader of a
value outside any module, would change the outputs: whoever rewrites a network compares them afterwards.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.evaluate import Inputs, call

Direction = dict[str, Tensor]

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass
class Call:
    """One call of a submodule without children: what it was given and what it returned.

    The versions count how often a tensor has been written to, so that a value that was changed in between
    (an in-place ReLU, `+=`) is not taken for what the module returned.
    """

    name: str
    module: nn.Module
    given: Tensor
    given_version: int
    result: Tensor
    result_version: int

    def feeds(self, other: Call) -> bool:
        """Whether the other module was given exactly what this one returned."""
        return other.given is self.result and other.given_version == self.result_version


def record(model: nn.Module, inputs: Inputs) -> list[Call]:
    """Run the model once and return the calls of its leaf modules that map one tensor to one, in order."""
    calls: list[Call] = []
    versions: list[int] = []

    def enter(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        given = arguments[0] if len(arguments) == 1 else None
        versions.append(given._version if isinstance(given, Tensor) else -1)

    def leave(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            version = versions.pop()
            if version >= 0 and isinstance(result, Tensor):
                calls.append(Call(name, module, arguments[0], version, result, result._version))

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_pre_hook(enter) for _name, module in leaves]
    handles += [module.register_forward_hook(leave(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def fold_batchnorm(
    model: nn.Module, calls: Sequence[Call], directions: Sequence[Mapping[str, Tensor]]
) -> list[Direction]:
    """Fold every BatchNorm that directly follows a convolution or linear layer into it, in place.

    BN(Wu + b) = (sW)u + s(b − mean) + β with s = γ/√(var + ε), which holds along a direction too if BN's own
    parameters stay: the directions of weight and bias are scaled by the same s. Layers whose BatchNorm
    moves, that are used more than once or share their weight are left alone.

    Args:
        model: In eval mode; folded layers get new parameters, their BatchNorm becomes an identity.
        calls: From `record`.
        directions: Name to tensor.

    Returns:
        The directions of the folded network. Its number of BatchNorm layers tells what was folded.
    """
    moved = [dict(direction) for direction in directions]
    for norm_call in calls:
        norm = norm_call.module
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or _moves(norm_call.name, moved):
            continue
        before = [other for other in calls if other.feeds(norm_call)]
        readers = [other for other in calls if before and other.given is before[0].result]
        if not before or len(readers) > 1:
            continue
        layer, name = before[0].module, before[0].name
        if not (
            isinstance(layer, LINEAR) and _is_alone(layer, model, calls) and _is_alone(norm, model, calls)
        ):
            continue
        if isinstance(layer, nn.Linear) and norm_call.given.dim() != 2:
            continue  # of (n, positions, features) BatchNorm1d normalises dim 1, which are no outputs
        scale = _fold_into(layer, norm)
        for direction in moved:
            for part in _NORM_TENSORS:
                direction.pop(f"{norm_call.name}.{part}", None)
            for entry in (f"{name}.weight", f"{name}.bias"):
                if entry in direction:
                    step = direction[entry]
                    factor = scale.reshape(-1, *[1] * (step.dim() - 1))
                    direction[entry] = (step.double() * factor).to(step.dtype)
        model.set_submodule(norm_call.name, nn.Identity())
    return moved


def _moves(module: str, directions: Sequence[Mapping[str, Tensor]]) -> bool:
    entries = [f"{module}.{part}" for part in _NORM_TENSORS]
    return any(bool(d[entry].any()) for entry in entries for d in directions if entry in d)


def _is_alone(module: nn.Module, model: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether the module is called once and shares no parameter with another module."""
    own = {id(parameter) for parameter in module.parameters()}
    holders = sum(id(p) in own for _name, p in model.named_parameters(remove_duplicate=False))
    return sum(other.module is module for other in calls) == 1 and holders == len(own)


def _fold_into(layer: nn.Linear | nn.Module, norm: _BatchNorm) -> Tensor:
    """Replace the layer's weight and bias; returns the scale of each output channel, in float64."""
    assert isinstance(layer, LINEAR)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = layer.weight
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    folded = weight.detach().double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    return scale


def first_layer(model: nn.Module, calls: Sequence[Call], inputs: Inputs) -> str | None:
    """Name the first linear layer or convolution if what it is given are the data themselves, or a view.

    Such a layer's output is linear in its weights, hence in the coordinates: at every point it is
    (Wu + b) + x·(Du + d_b) + y·(Eu + e_b), three arrays that `layer_outputs` computes once. A model that
    writes over its inputs must have been given copies (see `evaluate.protect_inputs`).
    """
    if not isinstance(inputs, Tensor):
        return None
    for layer in calls:
        if isinstance(layer.module, LINEAR):
            the_data = layer.given.data_ptr() == inputs.data_ptr() and layer.given.numel() == inputs.numel()
            return layer.name if the_data and _is_alone(layer.module, model, calls) else None
    return None


class Given(nn.Module):
    """Stands for the first layer: returns its output for the piece of data that is being evaluated."""

    output: Tensor

    def forward(self, _inputs: Tensor) -> Tensor:
        """Return the output that was set; a reader may write over it, it is computed anew at every point."""
        return self.output


class _Reached(Exception):
    """The layer has its input: the rest of the forward pass is not needed."""


def layer_input(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """Run the model up to the named layer and return what it is given."""
    captured: list[Tensor] = []

    def capture(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        captured.append(arguments[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(capture)
    try:
        with torch.no_grad(), contextlib.suppress(_Reached):
            model(inputs)
    finally:
        handle.remove()
    return captured[0]


def layer_outputs(
    layer: nn.Module, name: str, directions: Sequence[Mapping[str, Tensor]], inputs: Tensor
) -> list[Tensor]:
    """Return the layer's output at the centre, then its change per unit of each direction.

    Computed in float64 and rounded once, which is closer to the exact value than the layer itself comes.
    """
    wide = copy.deepcopy(layer).double()
    wide_inputs = inputs.double()
    with torch.no_grad():
        outputs = [wide(wide_inputs).to(inputs.dtype)]
        for direction in directions:
            for part, parameter in wide.named_parameters():
                step = direction.get(f"{name}.{part}")
                parameter.copy_(torch.zeros_like(parameter) if step is None else step)
            outputs.append(wide(wide_inputs).to(inputs.dtype))
    return outputs
