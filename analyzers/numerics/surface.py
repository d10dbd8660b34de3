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
from dynprobe.analyzers.numerics.evaluate import Batch, move, protect_inputs, resolve_metrics
from dynprobe.analyzers.numerics.losses import Loss, PerSample
from dynprobe.analyzers.numerics.params import private_copy, set_eval
from dynprobe.analyzers.numerics.plane import Direction
from dynprobe.analyzers.numerics.prepare import Piece, prepare_fast, prepare_plain

BatchNorm = Literal["frozen", "recompute"]
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
        forwards: Forward passes spent so far, each over one whole data set at one point.

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
        self.forwards = 0.0
        self._metrics = resolve_metrics(metrics, loss)
        device = torch.device(device) if device is not None else _device(model)
        data = {"": _hold(batches, device, dtype)}
        if test_batches is not None:
            data["test_"] = _hold(test_batches, device, dtype)
        self.n_samples = sum(len(piece.targets) for piece in data[""])
        model = private_copy(model).to(device=device, dtype=dtype)
        set_eval(model)
        self._recompute = batchnorm == "recompute" and bool(batchnorm_layers(model))
        prepare = prepare_plain if self._recompute else prepare_fast
        self._cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self._cuda):
            state = torch.get_rng_state()
            protect_inputs(model, data[""][0].inputs)
            self._stochastic = bool(self._cuda) or not torch.equal(state, torch.get_rng_state())
            self._network = prepare(model, data, directions)
        self._centre: dict[str, Tensor] | None = None

    @property
    def notes(self) -> list[str]:
        """What was done to be fast, and what could not be, in words."""
        return self._network.notes

    def row(self, y: float, xs: Sequence[float]) -> Row:
        """Evaluate the points (x, y) for the given xs.

        Returns:
            float64 arrays of shape `(len(xs),)`. For each metric, with the prefix `test_` for the test data:
            `<metric>`, the mean over samples; `<metric>_stderr`, its standard error std(ddof=1)/√n; and
            `<metric>_difference_stderr`, that of the difference from the centre, paired by sample, which is
            what the shape of the surface depends on.
        """
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
        network = self._network
        points: dict[str, list[Tensor]] = {
            f"{prefix}{name}": [] for prefix in network.data for name in self._metrics
        }
        with torch.inference_mode(), torch.random.fork_rng(self._cuda):
            network.plane.start_row(y)
            for x in xs:
                network.plane.move_to(x)
                if self._stochastic:  # a network that draws random numbers draws the same at every point
                    torch.manual_seed(0)
                if self._recompute:
                    batches = [(piece.inputs, piece.targets) for piece in network.data[""]]
                    self.forwards += recompute_statistics(network.model, batches)
                for prefix, pieces in network.data.items():
                    for name, values in self._evaluate(pieces).items():
                        points[prefix + name].append(values)
            rows = {name: torch.stack(values).cpu() for name, values in points.items()}
        return {name: values.to(torch.float64, copy=True) for name, values in rows.items()}

    def _evaluate(self, pieces: list[Piece]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in self._metrics}
        for piece in pieces:
            outputs = self._network.outputs(piece)
            for name, metric in self._metrics.items():
                parts[name].append(metric(outputs, piece.targets))
        self.forwards += 1
        return {name: torch.cat(values) for name, values in parts.items()}


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _hold(batches: Iterable[Batch], device: torch.device, dtype: torch.dtype | None) -> list[Piece]:
    data = [Piece(move(inputs, device, dtype), targets.to(device)) for inputs, targets in batches]
    if not data:
        raise ValueError("there are no batches to evaluate on")
    return data


def _stderr(values: Tensor) -> NDArray[np.float64]:
    n = values.shape[1]
    if n < 2:
        return np.full(len(values), math.nan)
    return (values.std(1, correction=1) / math.sqrt(n)).numpy()
