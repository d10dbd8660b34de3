"""Splits a hidden neuron of a network, or adds one: a wider network that computes the same function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.hidden_layer import PER_NEURON, Hidden
from dynprobe.analyzers.numerics.params import private_copy


def widened(tensor: Tensor, axis: int, entries: slice, kept: float, copied: float) -> Tensor:
    """Append a copy of some entries along an axis, the old ones times `kept`, the new ones times `copied`."""
    old = tensor.detach().clone()
    part = old.movedim(axis, 0)[entries]
    new = part.clone().movedim(0, axis) * copied
    part.mul_(kept)
    return torch.cat([old, new], dim=axis)


def split(model: nn.Module, hidden: Hidden, neuron: int, alpha: float) -> nn.Module:
    """Return a network with one more neuron: a copy of `neuron` that takes the part α of what it feeds on.

    Incoming weights are copied, outgoing ones become (1 − α)a and αa. The output does not change, for any α.

    Args:
        model: Not changed.
        hidden: From `find_hidden`.
        neuron: Which one.
        alpha: The part of the copy; may lie outside 0 and 1.

    References:
        Zhang, Zhang, Luo and Xu, "Embedding Principle of Loss Landscape of Deep Neural Networks", NeurIPS
        2021, definition 1 (one-step embedding).
    """
    wide = private_copy(model)
    rows = slice(neuron, neuron + 1)
    _replace(wide, hidden, lambda tensor: widened(tensor, 0, rows, 1, 1), _columns(hidden, neuron, alpha))
    return wide


def widened_gradient(
    gradient: Mapping[str, Tensor], hidden: Hidden, neuron: int, alpha: float
) -> dict[str, Tensor]:
    """The gradient that a split must give: (1 − α, α) times the incoming one, the outgoing one twice.

    By the chain rule it follows from the gradient of the narrow network; it is zero where that is.
    """
    rows = slice(neuron, neuron + 1)
    found = dict(gradient)
    for name in hidden.incoming:
        if name in found:
            found[name] = widened(found[name], 0, rows, 1 - alpha, alpha)
    columns = slice(neuron * hidden.block, (neuron + 1) * hidden.block)
    found[hidden.outgoing] = widened(found[hidden.outgoing], 1, columns, 1, 1)
    return found


def add_null(model: nn.Module, hidden: Hidden, generator: torch.Generator | None) -> nn.Module:
    """Return a network with one more neuron whose outgoing weights are zero (null embedding).

    Args:
        model: Not changed.
        hidden: From `find_hidden`.
        generator: On the CPU; draws incoming weights as large as those of the other neurons. None makes
            them zero.

    References:
        Zhang, Li, Zhang, Luo and Xu, "Embedding Principle: a hierarchical structure of loss landscape of deep
        neural networks", Journal of Machine Learning 1 (2022), null embedding.
    """
    wide = private_copy(model)

    def row(tensor: Tensor) -> Tensor:
        values = torch.zeros_like(tensor[:1])
        if generator is not None:
            size = math.sqrt(float(tensor.double().square().mean()))
            values = torch.randn(values.shape, generator=generator, dtype=torch.float64) * size
        return torch.cat([tensor, values.to(tensor)])

    def neutral(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.ones_like(tensor[:1])])

    def unread(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.zeros_like(tensor[:, : hidden.block])], dim=1)

    _replace(wide, hidden, row, unread, neutral)
    return wide


def _columns(hidden: Hidden, neuron: int, alpha: float) -> Any:
    columns = slice(neuron * hidden.block, (neuron + 1) * hidden.block)
    return lambda tensor: widened(tensor, 1, columns, 1 - alpha, alpha)


def _replace(wide: nn.Module, hidden: Hidden, row: Any, column: Any, scale: Any = None) -> None:
    """Enlarge the layers by one neuron; `scale` makes the entry of a norm's scales and variances."""
    with torch.no_grad():
        for owner in (hidden.name, *hidden.between):
            module = wide.get_submodule(owner)
            for part in PER_NEURON:
                tensor = getattr(module, part, None)
                if isinstance(tensor, Tensor):
                    of_norm = scale is not None and owner != hidden.name
                    make = scale if of_norm and part in ("weight", "running_var") else row
                    if of_norm and part in ("bias", "running_mean"):
                        make = _append_zero
                    _set(module, part, make(tensor.detach()))
            _count_up(module, ("out_features", "out_channels", "num_features", "num_parameters"), 1)
        reader = wide.get_submodule(hidden.reader)
        weight = cast(Tensor, reader.weight)
        _set(reader, "weight", column(weight.detach()))
        _count_up(reader, ("in_features", "in_channels"), hidden.block)


def _append_zero(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.zeros_like(tensor[:1])])


def _set(module: nn.Module, part: str, value: Tensor) -> None:
    """A parameter or a buffer in place of the smaller one."""
    if part in module._parameters:
        setattr(module, part, nn.Parameter(value))
    else:
        setattr(module, part, value)


def _count_up(module: nn.Module, names: Sequence[str], by: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, getattr(module, name) + by)


@dataclass(frozen=True)
class SplitDirections:
    """Orthonormal directions in which a split network differs from all networks that are no wider.

    With neuron and copy at incoming weights w − αd and w + (1 − α)d and outgoing ones (1 − α)a − b and
    αa + b, the function has no term of first order in (d, b). The Hessian is therefore, in the coordinates
    of the narrow network and (d, b), exactly block diagonal at *every* point, and by Sylvester's law the
    numbers of negative, zero and positive eigenvalues of the wide network are those of the narrow one plus
    those of the block of (d, b).

    Attributes:
        names: The parameters that the neuron has a part in, in the order of the model.
        entries: Places of a weight and of its copy in the flat vector of these parameters, shape (k, 2):
            incoming weights (d) first, then outgoing ones (b).
        parts: The direction's two entries there, shape (k, 2), float64.
        n_parameters: Length of that vector.
    """

    names: list[str]
    entries: Tensor
    parts: Tensor
    n_parameters: int

    def block(self, matvec: Callable[[Tensor], Tensor]) -> Tensor:
        """The Hessian restricted to the directions, shape (k, k), from k products.

        Args:
            matvec: Of the Hessian with respect to the parameters `names`.
        """
        rows = []
        for entries, parts in zip(self.entries, self.parts, strict=True):
            direction = torch.zeros(self.n_parameters, dtype=torch.float64)
            direction[entries] = parts
            rows.append((matvec(direction).cpu()[self.entries] * self.parts).sum(1))
        found = torch.stack(rows)
        return (found + found.T) / 2


def split_directions(wide: nn.Module, hidden: Hidden, neuron: int, alpha: float) -> SplitDirections:
    """Return the directions of a split.

    Args:
        wide: From `split`.
        hidden: From `find_hidden`.
        neuron: The neuron that was split; its copy is the last one.
        alpha: The part of the copy.
    """
    start, block = 0, hidden.block
    incoming: list[Tensor] = []
    outgoing: list[Tensor] = []
    parameters = dict(wide.named_parameters())
    names = [name for name in parameters if name in hidden.incoming or name == hidden.outgoing]
    for name in names:
        parameter = parameters[name]
        place = start + torch.arange(parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
        if name in hidden.incoming:
            incoming.append(torch.stack([place[neuron].flatten(), place[-1].flatten()], 1))
        if name == hidden.outgoing:
            own = place[:, neuron * block : (neuron + 1) * block]
            outgoing.append(torch.stack([own.flatten(), place[:, -block:].flatten()], 1))
    entries = torch.cat(incoming + outgoing)
    of_d = torch.tensor([-alpha, 1 - alpha], dtype=torch.float64) / math.hypot(alpha, 1 - alpha)
    of_b = torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.sqrt(0.5)
    n_incoming = sum(len(pairs) for pairs in incoming)
    parts = torch.cat([of_d.expand(n_incoming, 2), of_b.expand(len(entries) - n_incoming, 2)])
    return SplitDirections(names, entries, parts, start)
