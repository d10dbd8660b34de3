"""Loss and other metrics on a line or plane through a network's parameters, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynprobe.analyzers.numerics.batchnorm import batchnorm_layers, recompute_statistics
from dynprobe.analyzers.numerics.evaluate import Batch, call, move, resolve_metrics
from dynprobe.analyzers.numerics.losses import Loss, PerSample
from dynprobe.analyzers.numerics.params import private_copy, set_eval

BatchNorm = Literal["frozen", "recompute"]
Direction = Mapping[str, Tensor]
Row = dict[str, NDArray[np.float64]]


class Surface:
    """f(x, y) = L(θ* + x·d + y·e), evaluated fast and with an error bar at every point.

    All metrics come from one forward pass per point, as one value per sample; their mean is taken in
    float64. NaN and infinity stay what they are. The network is evaluated in eval mode on a private copy:
    the given model and the global random state are not touched, and only what the directions name moves.
    The value at (0, 0) is θ*'s own, since x = y = 0 changes no bit of the parameters.

    Args:
        model: The network at θ*.
        batches: Iterated once and kept: `(inputs, targets)`, inputs a tensor, a tuple or a dict.
        loss: Gives the metrics `loss` and `accuracy`.
        directions: One or two of name to tensor, names of parameters or floating-point buffers; what is not
            named stays. `random_directions` names no buffers; interpolation between two networks needs them.
        metrics: Names, or name to `(outputs, targets) -> (n_samples,)`.
        batchnorm: `frozen` keeps θ*'s running statistics; `recompute` estimates them anew at every point on
            `batches` (see `recompute_statistics`: cheapest when that is a single batch).
        test_batches: Evaluated beside the first set; its metrics have the prefix `test_`.
        device: Where to compute; default where the model is.
        dtype: To compute in; default the model's own.

    Attributes:
        n_samples: Of `batches`.
        forwards: Forward passes over all the data spent so far (a data set and a point each count one).
        notes: What was done to be fast, or why it was not, in words.

    Raises:
        ValueError: No data, or a direction that does not fit the model.

    References:
        Li et al. Visualizing the loss landscape of neural nets. NeurIPS 2018, arXiv:1712.09913.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Loss,
        directions: Sequence[Direction],
        *,
        metrics: Sequence[str] | Mapping[str, PerSample] = ("loss",),
        batchnorm: BatchNorm = "frozen",
        test_batches: Iterable[Batch] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(directions) not in (1, 2):
            raise ValueError(f"a surface has one or two directions, not {len(directions)}")
        if batchnorm not in get_args(BatchNorm):
            raise ValueError(f"batchnorm is one of {', '.join(get_args(BatchNorm))}, not {batchnorm!r}")
        self.notes: list[str] = []
        self.forwards = 0.0
        self._metrics = resolve_metrics(metrics, loss)
        device = torch.device(device) if device is not None else _device(model)
        self._data = {"": _hold(batches, device, dtype)}
        if test_batches is not None:
            self._data["test_"] = _hold(test_batches, device, dtype)
        self.n_samples = _count(self._data[""])
        self._model = private_copy(model).to(device=device, dtype=dtype)
        set_eval(self._model)
        self._recompute = batchnorm == "recompute" and bool(batchnorm_layers(self._model))
        self._two_dimensional = len(directions) == 2
        self._plane = Plane(self._model, directions)
        self._centre: dict[str, Tensor] | None = None

    def row(self, y: float, xs: Sequence[float]) -> Row:
        """Evaluate the points (x, y) for the given xs.

        Returns:
            float64 arrays of shape `(len(xs),)`. For each metric, with the prefix `test_` for the test data:
            `<metric>`, the mean over samples; `<metric>_stderr`, its standard error std(ddof=1)/√n; and
            `<metric>_difference_stderr`, that of the difference from the centre, paired by sample, which is
            what the shape of the surface depends on.
        """
        if y != 0 and not self._two_dimensional:
            raise ValueError("a surface along one direction has only the row y = 0")
        if self._centre is None:
            self._centre = {name: values[0] for name, values in self._values(0.0, [0.0]).items()}
        result: Row = {}
        for name, values in self._values(y, xs).items():
            result[name] = values.mean(1).numpy()
            result[f"{name}_stderr"] = _stderr(values)
            result[f"{name}_difference_stderr"] = _stderr(values - self._centre[name])
        return result

    def _values(self, y: float, xs: Sequence[float]) -> dict[str, Tensor]:
        """Per-sample values, shape `(len(xs), n_samples)`, float64 on the CPU; moved there once per row."""
        points: dict[str, list[Tensor]] = {f"{p}{m}": [] for p in self._data for m in self._metrics}
        with torch.inference_mode():
            self._plane.start_row(y)
            for x in xs:
                self._plane.move_to(x)
                if self._recompute:
                    self.forwards += recompute_statistics(self._model, self._data[""])
                for prefix, data in self._data.items():
                    for name, values in self._evaluate(data).items():
                        points[prefix + name].append(values)
        return {name: torch.stack(values).cpu().double().clone() for name, values in points.items()}

    def _evaluate(self, data: list[Batch]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in self._metrics}
        for inputs, targets in data:
            outputs = call(self._model, inputs)
            for name, metric in self._metrics.items():
                parts[name].append(metric(outputs, targets))
        self.forwards += 1
        return {name: torch.cat(values) for name, values in parts.items()}


class Plane:
    """θ* + x·d + y·e written into a model: a row's base θ* + y·e once, then one addition per point.

    Everything is computed from θ* anew, so nothing drifts, and memory is five copies of what moves whatever
    the number of points. All that moves and has one dtype lies in one flat buffer, of which the model's own
    tensors become views: a point is one vectorised addition, not one per tensor.
    """

    def __init__(self, model: nn.Module, directions: Sequence[Direction]) -> None:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        moving = _moving(tensors, directions)
        by_dtype: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name in moving:
            by_dtype.setdefault((tensors[name].device, tensors[name].dtype), {})[name] = tensors[name]
        self._parts = [_Flat(group, directions) for group in by_dtype.values()]

    def start_row(self, y: float) -> None:
        """Set the base of a row, θ* + y·e."""
        for part in self._parts:
            part.start_row(y)

    def move_to(self, x: float) -> None:
        """Move the model to the point x of the current row."""
        for part in self._parts:
            part.move_to(x)


class _Flat:
    """The moving tensors of one dtype and device, end to end."""

    def __init__(self, tensors: Mapping[str, Tensor], directions: Sequence[Direction]) -> None:
        first = next(iter(tensors.values()))
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._centre = _flatten(tensors, tensors, wide)
        self._steps = [_flatten(direction, tensors, wide) for direction in directions]
        self._base = self._centre.clone()
        self._point = self._centre.to(first.dtype, copy=True)
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


_ALIGNMENT = 16  # entries: each view starts on a boundary that vector instructions like


def _offsets(tensors: Mapping[str, Tensor]) -> list[int]:
    offsets = [0]
    for tensor in tensors.values():
        offsets.append(offsets[-1] + math.ceil(tensor.numel() / _ALIGNMENT) * _ALIGNMENT)
    return offsets


def _views(flat: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return views of the flat buffer with each tensor's shape and memory format (channels last stays so)."""
    return [
        flat.as_strided(tensor.shape, torch.empty_like(tensor).stride(), offset)
        for tensor, offset in zip(tensors.values(), _offsets(tensors), strict=False)
    ]


def _flatten(values: Mapping[str, Tensor], like: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Lay the named values out as `like` is laid out; a name without a value is zero."""
    first = next(iter(like.values()))
    flat = torch.zeros(_offsets(like)[-1], dtype=dtype, device=first.device)
    for name, view in zip(like, _views(flat, like), strict=True):
        if name in values:
            view.copy_(values[name].detach())
    return flat


def _moving(tensors: Mapping[str, Tensor], directions: Sequence[Direction]) -> list[str]:
    """Names, in the model's order, that some direction moves; raises where a direction does not fit."""
    for direction in directions:
        for name, step in direction.items():
            if name not in tensors:
                raise ValueError(f"a direction names {name!r}, which the model does not have")
            if step.shape != tensors[name].shape:
                shapes = f"{tuple(step.shape)}, the model's {tuple(tensors[name].shape)}"
                raise ValueError(f"the direction of {name!r} is {shapes}")
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and any(name in d and bool(d[name].any()) for d in directions)
    ]


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _hold(batches: Iterable[Batch], device: torch.device, dtype: torch.dtype | None) -> list[Batch]:
    data = [(move(inputs, device, dtype), targets.to(device)) for inputs, targets in batches]
    if not data:
        raise ValueError("there are no batches to evaluate on")
    return data


def _count(data: list[Batch]) -> int:
    return sum(len(targets) for _inputs, targets in data)


def _stderr(values: Tensor) -> NDArray[np.float64]:
    n = values.shape[1]
    if n < 2:
        return np.full(len(values), math.nan)
    return (values.std(1, correction=1) / math.sqrt(n)).numpy()
