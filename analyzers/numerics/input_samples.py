"""Samples whatever their batches: their hash, and the same samples cut into other batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dynprobe.analyzers.numerics.evaluate import Batch, Inputs, map_tensors
from dynprobe.analyzers.numerics.layouts import LayerError


def n_samples_of(batches: Any) -> int:
    """How many samples there are: `batches.n_samples`, else counted in the inputs by walking them.

    Raises:
        LayerError: The inputs of a batch have no sample dimension.
    """
    found = getattr(batches, "n_samples", None)
    return sum(batch_size(inputs) for inputs, _targets in batches) if found is None else int(found)


def batch_size(inputs: Inputs) -> int:
    """How many samples a batch holds: the first dimension of its first tensor that has one.

    Raises:
        LayerError: There is no such tensor, it is not dense, or it is empty.
    """
    for tensor in tensors_of(inputs):
        if not tensor.ndim:
            continue
        if not _dense(tensor).shape[0]:
            raise LayerError("a batch holds no samples.", "Leave empty batches out.")
        return len(tensor)
    raise LayerError("the inputs hold no tensor with a sample dimension.", "Give batches (inputs, targets).")


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """All tensors of the inputs, in their order."""
    return [value for _name, value in _named(inputs, "") if isinstance(value, Tensor)]


def _dense(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise LayerError("the inputs hold a sparse or nested tensor.", "Give dense ones: tensor.to_dense().")
    return tensor


def input_hash(batches: Iterable[Batch]) -> str:
    """32 hexadecimal digits over the inputs: names, dtypes, shape of a sample, bytes and order.

    Neither the targets nor the split into batches are part of it. A tensor without dimensions counts as a
    setting, not as samples.

    Raises:
        LayerError: A tensor is sparse or nested.
    """
    digests: dict[str, Any] = {}
    headers: dict[str, str] = {}
    for inputs, _targets in batches:
        for name, value in _named(inputs, "inputs"):
            digest = digests.setdefault(name, hashlib.sha256())
            is_samples = isinstance(value, Tensor) and value.ndim > 0
            header = f"{value.dtype} {tuple(value.shape[1:])}" if is_samples else repr(value)
            if headers.get(name) != header:
                headers[name] = header
                digest.update(f"\0{header}\0".encode())
            if is_samples:
                digest.update(_bytes(value))
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name].hexdigest()}\n".encode())
    return whole.hexdigest()[:32]


def _named(inputs: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(inputs, Mapping):
        for key, value in inputs.items():
            yield from _named(value, f"{name}.{key}")
    elif isinstance(inputs, tuple | list):
        for position, value in enumerate(inputs):
            yield from _named(value, f"{name}.{position}")
    else:
        yield name, inputs


def _bytes(tensor: Tensor) -> Any:
    flat = _dense(tensor).detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


@dataclass(frozen=True)
class Recut:
    """Samples in another order, cut into batches whose sizes differ by at most one.

    Attributes:
        inputs: Of all samples.
        targets: One per sample; None where they could not be joined.
        order: Positions of the samples, (n_samples,); None: as they are.
        bounds: Where the batches start, and n_samples.
        n_total: Size of the source these samples are a subset of.
        move: Brings a tensor where the network is.
    """

    inputs: Inputs
    targets: Any
    order: Tensor | None
    bounds: tuple[int, ...]
    n_total: int
    move: Callable[[Tensor], Tensor] | None = None

    @property
    def n_samples(self) -> int:
        """Number of samples in all batches together."""
        return self.bounds[-1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> tuple[Inputs, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} batches")
        start, stop = list(pairwise(self.bounds))[index]
        return map_tensors(self._part(start, stop), self.inputs), map_tensors(
            self._part(start, stop), self.targets
        )

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]:
        return (self[index] for index in range(len(self)))

    def _part(self, start: int, stop: int) -> Callable[[Tensor], Tensor]:
        def part(tensor: Tensor) -> Tensor:
            if not tensor.ndim:
                return tensor
            if self.order is None:
                rows = tensor[start:stop]
            else:
                rows = tensor[self.order[start:stop].to(tensor.device)]
            return self.move(rows) if self.move else rows

        return part


def recut(batches: Iterable[Batch], size: int, order: Any = None) -> Recut:
    """The same samples, permuted and cut evenly into batches of at most `size`.

    Args:
        batches: Any iterable of `(inputs, targets)`. Of one that holds its data whole, as `inputs` and
            `targets`, rows are taken when they are wanted; others are gathered once.
        size: Samples per batch, at least 1.
        order: Positions of the samples, (n_samples,), each once; None: as they are.

    Raises:
        ValueError: `size` is less than 1, or `order` is no permutation.
        LayerError: There are no samples, or inputs of different shapes or settings cannot be joined.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}")
    if hasattr(batches, "inputs") and hasattr(batches, "targets"):
        inputs, targets, move = batches.inputs, batches.targets, getattr(batches, "move", None)
        n = int(batches.n_samples) if hasattr(batches, "n_samples") else batch_size(inputs)
    else:
        parts = list(batches)
        if not parts:
            raise LayerError("there are no samples.", "Give batches (inputs, targets).")
        inputs, targets = _joined([part[0] for part in parts]), _targets([part[1] for part in parts])
        n, move = batch_size(inputs), None
    if isinstance(batches, Recut) and batches.order is not None:
        order = batches.order if order is None else batches.order[torch.as_tensor(order)]
    if order is not None:
        order = torch.as_tensor(order).long().cpu()
        if not torch.equal(order.sort().values, torch.arange(n)):
            raise ValueError(f"`order` must hold each of 0 … {n - 1} once")
    count = -(-n // size)
    bounds = tuple(part * n // count for part in range(count + 1))
    return Recut(inputs, targets, order, bounds, int(getattr(batches, "n_total", n)), move)


def _targets(parts: Sequence[Any]) -> Any:
    try:
        return _joined(parts)
    except (
        LayerError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # of any kind, and what a network computes needs none
        return None


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        if len({part.shape[1:] for part in parts}) > 1:
            raise LayerError(
                "the batches are padded to different lengths and cannot be cut anew.",
                "Pad all samples to the same length.",
            )
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(first)))
    if len({repr(part) for part in parts}) > 1:
        raise LayerError(
            f"the batches hold different settings ({first!r} in the first) and cannot be cut anew.",
            "Give all batches the same.",
        )
    return first
