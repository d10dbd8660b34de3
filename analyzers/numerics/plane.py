"""θ* + x·d + y·e written into the tensors of a network, point by point and without drift."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

Direction = Mapping[str, Tensor]

_ALIGNMENT = 16  # entries: each tensor starts on a boundary that vector instructions like


class Plane:
    """Moves tensors along one or two directions: a row's base θ* + y·e once, then one addition per point.

    Every point is computed from θ* anew, so nothing drifts, and memory is five copies of what moves whatever
    the number of points. All that moves and has one dtype lies in one flat buffer, of which the given tensors
    become views: a point is one vectorised addition, not one per tensor. x = y = 0 gives θ* bit for bit.

    Args:
        tensors: By name, at θ*; those that move get new memory, the others are left alone.
        directions: One or two; a name that one lacks does not move along it.
        overwritten: Names of tensors that the network writes over, so that each point must write them anew
            even if no direction moves them.

    Raises:
        ValueError: A direction names a tensor that is not there, or has another shape.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        directions: Sequence[Direction],
        overwritten: Collection[str] = (),
    ) -> None:
        self._two_dimensional = len(directions) == 2
        groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name in _moving(tensors, directions, overwritten):
            groups.setdefault((tensors[name].device, tensors[name].dtype), {})[name] = tensors[name]
        self._parts = [_Flat(group, directions) for group in groups.values()]

    def start_row(self, y: float) -> None:
        """Set the base of a row, θ* + y·e."""
        if y != 0 and not self._two_dimensional:
            raise ValueError("along one direction there is only the row y = 0")
        for part in self._parts:
            part.start_row(y)

    def move_to(self, x: float) -> None:
        """Move to the point x of the current row."""
        for part in self._parts:
            part.move_to(x)


class _Flat:
    """The moving tensors of one dtype and device, end to end."""

    def __init__(self, tensors: Mapping[str, Tensor], directions: Sequence[Direction]) -> None:
        dtype = next(iter(tensors.values())).dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._centre = _flatten(tensors, tensors, wide)
        self._steps = [_flatten(direction, tensors, wide) for direction in directions]
        self._base = self._centre.clone() if len(directions) == 2 else self._centre
        self._point = self._centre.to(dtype, copy=True)
        for tensor, view in zip(tensors.values(), _views(self._point, tensors), strict=True):
            tensor.data = view

    def start_row(self, y: float) -> None:
        if len(self._steps) == 2:
            torch.add(self._centre, self._steps[1], alpha=y, out=self._base)

    def move_to(self, x: float) -> None:
        if self._point.dtype == self._base.dtype:
            torch.add(self._base, self._steps[0], alpha=x, out=self._point)
        else:  # half precision: the sum in float32, rounded once
            self._point.copy_(torch.add(self._base, self._steps[0], alpha=x))


def _offsets(tensors: Mapping[str, Tensor]) -> list[int]:
    offsets = [0]
    for tensor in tensors.values():
        offsets.append(offsets[-1] + math.ceil(tensor.numel() / _ALIGNMENT) * _ALIGNMENT)
    return offsets


def _views(flat: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return views of the flat buffer with each tensor's shape and memory format (channels last stays so)."""
    return [
        flat.as_strided(tensor.shape, torch.empty_like(tensor).stride(), offset)
        for tensor, offset in zip(tensors.values(), _offsets(tensors)[:-1], strict=True)
    ]


def _flatten(values: Mapping[str, Tensor], like: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Lay the named values out as `like` is laid out; a name without a value is zero."""
    first = next(iter(like.values()))
    flat = torch.zeros(_offsets(like)[-1], dtype=dtype, device=first.device)
    for name, view in zip(like, _views(flat, like), strict=True):
        if name in values:
            view.copy_(values[name].detach())
    return flat


def _moving(
    tensors: Mapping[str, Tensor], directions: Sequence[Direction], overwritten: Collection[str]
) -> list[str]:
    """Names, in the tensors' order, that some direction moves or the network writes over."""
    for direction in directions:
        for name, step in direction.items():
            if name not in tensors:
                raise ValueError(f"a direction names {name!r}, which the model does not have")
            if step.shape != tensors[name].shape:
                shapes = f"{tuple(step.shape)}, the model's is {tuple(tensors[name].shape)}"
                raise ValueError(f"the direction of {name!r} has shape {shapes}")
    return [
        name
        for name, tensor in tensors.items()
        if name in overwritten
        or (tensor.is_floating_point() and any(name in d and bool(d[name].any()) for d in directions))
    ]
