"""Which layer reads a layer's neurons and through which function, found out by what the network does.

Names and module trees do not say what `forward` does with a value. A pass over a few samples does: whatever
is claimed here of a pair of layers was tried out with random weights, and put back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import Inputs, call
from dynprobe.analyzers.numerics.fold import LINEAR, record

TOLERANCE = 1e-4
"""Relative difference of values that count as equal; what is tried changes them by about 1."""
LEVELS = (1e-2, 8.0, 1e3)
"""Largest inputs of an activation under test: tanh is linear, to rounding, for small ones, a clipped ReLU
up to where it is clipped, and a shrinking one far beyond what it takes away."""
BEYOND = 8.0
"""How far beyond the inputs that it has with the network's own weights an activation is tried out as well."""


@dataclass(frozen=True)
class Link:
    """A layer whose neurons are read by one other layer, and by nothing else.

    Every neuron is given to the reader by itself, through one function g that is the same for all.

    Args:
        layer: Name of the layer.
        reader: Name of the layer that reads it.
        homogeneous: Whether g(cz) = c g(z) for c > 0, as for ReLU and pooling.
        odd: Whether g(−z) = −g(z), as for tanh.
    """

    layer: str
    reader: str
    homogeneous: bool
    odd: bool


def links(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Link], dict[str, str]]:
    """Finds for every linear layer and convolution the one layer that reads it.

    Args:
        model: In eval mode. Its weights are changed and put back: lend a copy.
        inputs: A few samples.

    Returns:
        Links by layer, in the order of the forward pass; and for the layers without one the reason. The last
        layer, which gives the outputs, is in neither.
    """
    calls = [each for each in record(model, inputs) if isinstance(each.module, LINEAR)]
    modules = [each.module for each in calls]
    found: dict[str, Link] = {}
    refused: dict[str, str] = {}
    for this, following in pairwise(calls):
        if any(sum(m is each.module for m in modules) > 1 for each in (this, following)):
            refused[this.name] = "it, or the layer after it, is called more than once"
        elif any(_is_shared(each.module, model) for each in (this, following)):
            refused[this.name] = "it, or the layer after it, shares its weight with another module"
        else:
            pair = _Pair(model, inputs, this.module, following.module)
            with pair.put_back():
                refusal = pair.refusal(following.name)
                if refusal:
                    refused[this.name] = refusal
                else:
                    found[this.name] = Link(this.name, following.name, pair.homogeneous(), pair.odd())
    return {name: link for name, link in found.items() if name not in refused}, refused


def _is_shared(module: nn.Module, model: nn.Module) -> bool:
    own = {id(parameter) for parameter in module.parameters()}
    holders = sum(id(p) in own for _name, p in model.named_parameters(remove_duplicate=False))
    return holders != len(own)


def n_neurons(layer: nn.Module) -> int:
    """Returns how many neurons, or filters, a linear layer or convolution has."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])


def outgoing(reader: nn.Module, n: int) -> Tensor:
    """Returns the weights with which a layer reads each of n neurons: shape (n_outputs, n, per neuron)."""
    weight = reader.weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(weight.shape[0], n, -1)


class _Pair:
    """Two layers in a network, the weights of which may be tried out."""

    def __init__(self, model: nn.Module, inputs: Inputs, layer: nn.Module, reader: nn.Module) -> None:
        assert isinstance(layer, LINEAR)
        assert isinstance(reader, LINEAR)
        self._model, self._inputs, self._layer, self._reader = model, inputs, layer, reader
        self._n = n_neurons(layer)
        self._generator = torch.Generator().manual_seed(0)
        self._given = self._made = torch.empty(0)
        self._seen = 0.0

    @contextlib.contextmanager
    def put_back(self) -> Iterator[None]:
        """Restores the weights of both layers on leaving."""
        tensors = [*self._layer.parameters(), *self._reader.parameters()]
        values = [tensor.detach().clone() for tensor in tensors]
        try:
            with torch.no_grad():
                self._outputs(values[: len(list(self._layer.parameters()))])
                self._seen = float(self._made.abs().max()) if self._made.numel() else 0.0
                yield
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.data.copy_(value)

    def refusal(self, reader: str) -> str:
        """Why the reader is not the only one, or not of every neuron by itself; empty if it is."""
        if self._layer.weight is None or getattr(self._reader, "groups", 1) != 1:
            return f"{reader} is a grouped convolution"
        if getattr(self._layer, "groups", 1) != 1:
            return "it is a grouped convolution, whose filters see different inputs"
        if self._reader.weight.shape[1] % self._n:
            return f"{reader}, called after it, does not have as many inputs as it has neurons"
        if not self._alone():
            return f"not only {reader} depends on it"
        if not self._apart():
            return f"{reader} is not given each of its neurons by itself (a normalisation layer?)"
        if not self._alike():
            return (
                "its neurons do not all pass through the same function (a BatchNorm that cannot be folded?)"
            )
        return ""

    def homogeneous(self) -> bool:
        """Whether twice the inputs of the activation are twice what the reader is given."""
        return all(
            _equal(self._blocks(_scaled(weights, 2 * sign)), 2 * self._blocks(_scaled(weights, sign)))
            for weights in self._levels
            for sign in (1, -1)
        )

    def odd(self) -> bool:
        """Whether minus the inputs of the activation are minus what the reader is given."""
        return all(
            _equal(self._blocks(_scaled(weights, -1)), -self._blocks(weights)) for weights in self._levels
        )

    def _alone(self) -> bool:
        """With the reader's weights at 0 the outputs do not depend on the layer."""
        weight = self._reader.weight.detach().clone()
        self._reader.weight.data.zero_()
        one, two = (self._outputs(self._random()) for _ in range(2))
        self._reader.weight.data.copy_(weight)
        return torch.equal(one, two)

    def _apart(self) -> bool:
        """Changing those neurons whose number has a certain bit leaves what is given of the others as it is.

        Any two numbers differ in a bit: tried with every bit, set or not, this holds for single neurons.
        """
        one, two = self._random(), self._random()
        before = self._blocks(one)
        number = torch.arange(self._n)
        for bit in range(max(1, math.ceil(math.log2(self._n)))):
            for side in (0, 1):
                changed = (number >> bit) % 2 == side
                mixed = [_mixed(changed, a, b) for a, b in zip(one, two, strict=True)]
                rest = (~changed).to(before.device)
                if not _equal(self._blocks(mixed)[rest], before[rest]):
                    return False
        return True

    def _alike(self) -> bool:
        """Neurons with the same weights give the reader the same."""
        for weights in self._levels:
            same = [tensor[:1].expand_as(tensor) for tensor in weights]
            both = [self._blocks(_scaled(same, sign)) for sign in (1, -1)]
            if not all(_equal(blocks, blocks[:1].expand_as(blocks)) for blocks in both):
                return False
        return True

    @cached_property
    def _levels(self) -> list[list[Tensor]]:
        """Weights with which the layer's outputs reach each of `LEVELS`, and beyond what they are."""
        weights = self._random()
        self._outputs(weights)
        largest = float(self._made.abs().max())
        levels = sorted({*LEVELS, *([BEYOND * self._seen] if 0 < self._seen < math.inf else [])})
        return [_scaled(weights, level / largest if largest > 0 else 1.0) for level in levels]

    def _random(self) -> list[Tensor]:
        """Random weights, and biases where there are any."""
        return [
            torch.randn(p.shape, generator=self._generator).to(p.device, p.dtype)
            / math.sqrt(max(1, p[0].numel()))
            for p in self._layer.parameters()
        ]

    def _outputs(self, weights: list[Tensor]) -> Tensor:
        for parameter, value in zip(self._layer.parameters(), weights, strict=True):
            parameter.data.copy_(value)

        def keep_given(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._given = arguments[0].detach().clone()

        def keep_made(_module: nn.Module, _arguments: tuple[Tensor, ...], result: Tensor) -> None:
            self._made = result.detach().clone()

        handles = [
            self._reader.register_forward_pre_hook(keep_given),
            self._layer.register_forward_hook(keep_made),
        ]
        try:
            return call(self._model, self._inputs).detach().clone()
        finally:
            for handle in handles:
                handle.remove()

    def _blocks(self, weights: list[Tensor]) -> Tensor:
        """What the reader is given of each neuron, shape (n_neurons, values)."""
        self._outputs(weights)
        at = -1 if isinstance(self._reader, nn.Linear) else 1
        return self._given.movedim(at, 0).reshape(self._n, -1)


def _scaled(weights: list[Tensor], factor: float) -> list[Tensor]:
    return [factor * tensor for tensor in weights]


def _mixed(changed: Tensor, kept: Tensor, new: Tensor) -> Tensor:
    rows = changed.to(kept.device).reshape(-1, *[1] * (kept.dim() - 1))
    return torch.where(rows, new, kept)


def _equal(one: Tensor, two: Tensor) -> bool:
    scale = float(two.abs().max()) if two.numel() else 0.0
    return torch.allclose(one, two, rtol=0, atol=TOLERANCE * scale)


def made_up_inputs(model: nn.Module) -> Tensor | None:
    """Makes random inputs in a shape that the first layer takes, to see where its neurons go.

    Returns:
        Four samples on the model's device, shape (4, features) or (4, channels, 32, 32) and the like; None
        where there is no such layer.
    """
    for layer in model.modules():
        if isinstance(layer, LINEAR):
            size: tuple[int, ...] = (layer.weight.shape[1],)
            if not isinstance(layer, nn.Linear):
                size = (layer.in_channels, *{1: (64,), 2: (32, 32), 3: (16, 16, 16)}[len(layer.kernel_size)])
            inputs = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
            return inputs.to(layer.weight.device, layer.weight.dtype)
    return None
