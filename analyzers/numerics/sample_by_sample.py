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
    held: Batch | None = None
    for batch in batches:
        both = None if held is None else _joined(held, batch)
        if held is not None and both is None:
            yield held
        inputs, targets = both or batch
        n, held = len(targets), None
        for first in range(0, n, size):
            rows = slice(first, first + size)
            part = (_rows(inputs, n, rows), targets[rows]) if n > size else (inputs, targets)
            if across and first + size > n:
                held = part
            else:
                yield part
    if held is not None:
        yield held


def n_samples(inputs: Any) -> int:
    """Length of the first of the tensors; 1 without any."""
    return next((len(tensor) if tensor.dim() else 1 for tensor in _tensors(inputs)), 1)


def _rows(inputs: Any, n: int, rows: slice) -> Any:
    """These samples' rows of every tensor that has one for each sample."""
    return map_tensors(lambda t: t[rows] if t.dim() and len(t) == n else t, inputs)


def _joined(one: Batch, other: Batch) -> Batch | None:
    """Two batches as one; None where they do not fit together."""
    sizes = len(one[1]), len(other[1])
    first, second = [*_tensors(one[0]), one[1]], [*_tensors(other[0]), other[1]]
    if len(first) != len(second):
        return None
    parts = []
    for a, b in zip(first, second, strict=True):
        if [bool(t.dim() and len(t) == n) for t, n in zip((a, b), sizes, strict=True)] == [True, True]:
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                return None
            parts.append(torch.cat([a, b]))
        elif not torch.equal(a, b):
            return None
    return _split(one[0], sizes[0])[1](parts[:-1]), parts[-1]


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
