"""Gradients of single samples for any model, by `vmap` or in a loop; batches cut into groups of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers.numerics.evaluate import map_tensors

Call = Callable[[dict[str, Tensor], Any], Tensor]
"""`(parameters by name, inputs) -> outputs`, samples along dim 0."""

Batch = tuple[Any, Tensor]
"""Inputs and targets."""


def vectorised(
    call: Call, leaves: Mapping[str, Tensor], names: Sequence[str], inputs: Any, cotangent: Tensor
) -> dict[str, Tensor]:
    """Gradients of c_i·f_i for every sample i, by `vmap` over the samples of a reverse pass.

    Args:
        call: The model as a function of its parameters.
        leaves: All parameters that it takes.
        names: Those to differentiate.
        inputs: The batch.
        cotangent: c, in the shape of the outputs.

    Returns:
        Shape (n, *parameter) by name. Whatever `vmap` raises on what it cannot follow is raised.
    """
    asked = {name: leaves[name].detach() for name in names}
    rest = {name: leaf.detach() for name, leaf in leaves.items() if name not in asked}
    batched, rebuild = _split(inputs, len(cotangent))

    def one(rows: list[Tensor], row: Tensor) -> dict[str, Tensor]:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            return call(rest | values, rebuild([t.unsqueeze(0) for t in rows]))[0]

        return torch.func.vjp(outputs, asked)[1](row)[0]  # type: ignore[no-any-return]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for vmap
        found = torch.func.vmap(one, randomness="same")(batched, cotangent)
    return {name: found[name].detach() for name in names}


class Loop:
    """One forward pass per sample, all graphs kept, to pull gradients from any number of times.

    Args:
        call: The model as a function of its parameters.
        leaves: All parameters that it takes, requiring gradients.
        inputs: The batch.
        n: Samples in it.
    """

    def __init__(self, call: Call, leaves: dict[str, Tensor], inputs: Any, n: int) -> None:
        self._leaves = leaves
        batched, rebuild = _split(inputs, n)
        with torch.enable_grad():
            self._outputs = [call(leaves, rebuild([t[i : i + 1] for t in batched])) for i in range(n)]

    def pull(self, names: Sequence[str], cotangent: Tensor) -> dict[str, Tensor]:
        """Gradients of c_i·f_i for every sample i, shape (n, *parameter) by name."""
        asked = [self._leaves[name] for name in names]
        rows = [
            torch.autograd.grad(
                outputs,
                asked,
                cotangent[i : i + 1].reshape(outputs.shape),
                retain_graph=True,
                materialize_grads=True,
            )
            for i, outputs in enumerate(self._outputs)
        ]
        return {name: torch.stack(part) for name, part in zip(names, zip(*rows, strict=True), strict=True)}


def grouped(batches: Iterable[Batch], size: int, *, across: bool = False) -> Iterator[Batch]:
    """The same samples in the same order, in groups of at most `size`.

    Args:
        batches: Pairs (inputs, targets).
        size: Samples in a group.
        across: Fill groups up beyond the end of a batch, so that they do not depend on how the data are split
            (unless the shapes of the samples differ between batches: then a group ends with its batch).
    """
    held: list[Tensor] = []
    along: list[bool] = []
    example: Any = None
    for inputs, targets in batches:
        tensors = [*_tensors(inputs), targets]
        mine = [bool(t.dim()) and len(t) == len(targets) for t in tensors]
        if held and (joined := _joined(held, tensors, along, mine)) is not None:
            # of one sample alone it cannot be told which tensors have one for each
            tensors, mine = joined, [one and other for one, other in zip(along, mine, strict=True)]
        elif held:
            yield _batch(example, held)
        held, along, example = [], mine, inputs
        n = len(tensors[-1])
        for first in range(0, n, size):
            part = [t[first : first + size] if own else t for t, own in zip(tensors, mine, strict=True)]
            if across and first + size > n:
                held = part
            else:
                yield _batch(inputs, part)
    if held:
        yield _batch(example, held)


def _joined(
    one: list[Tensor], other: list[Tensor], along: list[bool], others_along: list[bool]
) -> list[Tensor] | None:
    """The tensors of two batches as one; None where they do not fit together."""
    if len(one) != len(other):
        return None
    parts = []
    for a, b, own in zip(one, other, map(min, along, others_along), strict=True):
        if not own and not torch.equal(a, b):
            return None
        if own and (a.shape[1:] != b.shape[1:] or a.dtype != b.dtype):
            return None
        parts.append(torch.cat([a, b]) if own else a)
    return parts


def _batch(like: Any, tensors: list[Tensor]) -> Batch:
    """Inputs of the same form, and targets, from their tensors in order."""
    left = iter(tensors)
    return map_tensors(lambda _: next(left), like), tensors[-1]


def n_samples(inputs: Any) -> int:
    """Length of the first of the tensors; 1 without any."""
    return next((len(tensor) if tensor.dim() else 1 for tensor in _tensors(inputs)), 1)


def _tensors(inputs: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, inputs)
    return found


def _split(inputs: Any, n: int) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors that have samples along their first dimension, and how to put others in their place."""

    def has_samples(tensor: Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) == n

    batched = [tensor for tensor in _tensors(inputs) if has_samples(tensor)]

    def rebuild(parts: list[Tensor]) -> Any:
        left = iter(parts)
        return map_tensors(lambda tensor: next(left) if has_samples(tensor) else tensor, inputs)

    return batched, rebuild
