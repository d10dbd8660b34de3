"""Finds which layer reads the neurons of another one, and what lies between them.

Which layer reads a neuron is found by changing the neuron in one forward pass and looking where the change
arrives: that sees functional activations, pooling and flattening as well as modules, and it sees what mixes
neurons (a layer norm, attention), which no split survives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.evaluate import Inputs, call

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PER_NEURON = ("weight", "bias", "running_mean", "running_var")


class CannotSplit(ValueError):
    """A layer's neurons cannot be split; the message names the layer and says why."""


@dataclass(frozen=True)
class Hidden:
    """A layer whose neurons can be split, and what follows each of them.

    Attributes:
        name: The layer that computes the neurons: linear, or a convolution whose channels they are.
        reader: The linear layer or convolution that reads them.
        between: BatchNorm and PReLU layers in between that hold numbers of their own for every neuron.
        width: How many neurons there are.
        block: Inputs of the reader that belong to one neuron: 1, or the positions that were flattened.
    """

    name: str
    reader: str
    between: tuple[str, ...]
    width: int
    block: int

    @property
    def incoming(self) -> list[str]:
        """Parameters and buffers with one row a neuron, as far as the network has them."""
        return [f"{owner}.{part}" for owner in (self.name, *self.between) for part in PER_NEURON]

    @property
    def outgoing(self) -> str:
        """The weight whose columns read the neurons."""
        return f"{self.reader}.weight"


def layers_in_order(model: nn.Module, inputs: Inputs) -> list[str]:
    """Names of the linear layers and convolutions in the order of one forward pass, each once."""
    return [name for name in _given(model, inputs) if isinstance(model.get_submodule(name), LAYERS)]


def find_hidden(model: nn.Module, inputs: Inputs, name: str, neuron: int) -> Hidden:
    """Find what reads a neuron, by changing it.

    Args:
        model: In eval mode; not changed.
        inputs: A few samples.
        name: The layer.
        neuron: Its output unit or channel.

    Raises:
        CannotSplit: The layer is of another kind or the last one, is used more than once, shares or computes
            its weights, or what follows mixes neurons or reads them in a way that no wider layer can.
    """
    layer = _plain(model, name)
    width = layer.weight.shape[0]
    before = _given(model, inputs)
    if name not in before:
        raise CannotSplit(f"layer {name!r} is not used exactly once")
    after, touched = before, []
    for sign in (1.0, -1.0):  # one of them gets through whatever the activation clips
        after = _given(model, inputs, (name, neuron, sign))
        touched = [n for n in before if n in after and not torch.equal(before[n], after[n])]
        if touched:
            break
    following = list(before)[list(before).index(name) + 1 :]
    changed = [n for n in following if n in touched]
    reader = next((n for n in changed if isinstance(model.get_submodule(n), LAYERS)), None)
    if reader is None:
        raise CannotSplit(
            f"no linear layer or convolution after layer {name!r} depends on its neuron {neuron}"
        )
    return _hidden(model, name, neuron, width, changed[: changed.index(reader) + 1], before, after)


def _hidden(
    model: nn.Module,
    name: str,
    neuron: int,
    width: int,
    chain: Sequence[str],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> Hidden:
    reader = chain[-1]
    _plain(model, reader)
    blocks = [1]
    for place in chain:
        is_linear = isinstance(model.get_submodule(place), nn.Linear)
        axis = -1 if is_linear else 1
        block, rest = divmod(before[place].shape[axis], width)
        moved = (before[place] != after[place]).movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        own = (moved >= neuron * block) & (moved < (neuron + 1) * block)
        if rest or not bool(own.all()) or (block != 1 and not is_linear):
            raise CannotSplit(
                f"between layers {name!r} and {reader!r} something mixes neurons: a change of neuron "
                f"{neuron} reaches other inputs of {place!r} too"
            )
        blocks.append(block)
    between = tuple(n for n in chain[:-1] if _per_neuron(model.get_submodule(n)))
    return Hidden(name, reader, between, width, blocks[-1])


def _per_neuron(module: nn.Module) -> bool:
    """Whether the module holds numbers for every neuron."""
    return isinstance(module, _BatchNorm) or (isinstance(module, nn.PReLU) and module.num_parameters > 1)


def _plain(model: nn.Module, name: str) -> Any:
    """The layer, if its weight is a parameter of its own."""
    modules = dict(model.named_modules())
    layer = modules.get(name)
    if not isinstance(layer, LAYERS):
        kind = "there is none" if layer is None else f"it is a {type(layer).__name__}"
        raise CannotSplit(f"layer {name!r} is no linear layer or convolution: {kind}")
    if getattr(layer, "groups", 1) != 1:
        raise CannotSplit(f"layer {name!r} is a convolution in groups")
    if "weight" not in layer._parameters:
        raise CannotSplit(f"the weight of layer {name!r} is computed from other parameters")
    own = {id(parameter) for parameter in layer.parameters()}
    if sum(id(p) in own for _, p in model.named_parameters(remove_duplicate=False)) != len(own):
        raise CannotSplit(f"layer {name!r} shares its weight with another layer")
    return layer


def _given(
    model: nn.Module, inputs: Inputs, change: tuple[str, int, float] | None = None
) -> dict[str, Tensor]:
    """What layers, BatchNorms and PReLUs are given in one pass, in order; those called twice are left out.

    Args:
        model: The network.
        inputs: Of the pass.
        change: (layer, neuron, sign): add to its output more than it reaches by itself.
    """
    given: dict[str, list[Tensor]] = {}

    def leave(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], result: Any) -> Any:
            if arguments and isinstance(arguments[0], Tensor):
                given.setdefault(name, []).append(arguments[0].detach().clone())
            if change is None or change[0] != name:
                return None
            axis = -1 if isinstance(_module, nn.Linear) else 1
            moved = result.clone()
            moved.select(axis, change[1]).add_(change[2] * (1 + 2 * float(result.abs().max())))
            return moved

        return hook

    handles = [
        module.register_forward_hook(leave(name))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) or _per_neuron(module)
    ]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: values[0] for name, values in given.items() if len(values) == 1}
