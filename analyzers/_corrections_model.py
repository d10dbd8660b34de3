"""A checkpoint's network as it decides: classes, margins, and how far the analysed layers are from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.extract_network import UnsupportedNetwork, extract
from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork

_CHUNK = 8192
"""Points in one forward pass."""

_SATURATED = 1e-3
"""Probabilities nearer to 0 or 1 do not tell in float32 what the outputs before were."""

_UNTOLD = 1e-5
"""Of the outputs, their error where few probabilities tell them: a hundred units of float32."""

_OFTEN = 0.05
"""Part of the probabilities that must tell them to be relied on alone."""


class Classifier:
    """A network that decides between classes, in its own dtype and as float64 layers.

    A network with one output decides for class 1 where its output is at least the threshold.

    Args:
        model: In eval mode.
        inputs: All inputs of the data, (n, …), where the network sees them.
        threshold: Of a network with one output; None for 0, or 0.5 where it ends with a sigmoid.

    Raises:
        OptionError: If the network has layers that cannot be analysed, naming them, or a threshold means
            nothing to it.
    """

    def __init__(self, model: torch.nn.Module, inputs: Tensor, threshold: float | None) -> None:
        self.model = model
        self.shape = tuple(inputs.shape[1:])
        self._like = inputs[:1]
        try:
            with torch.inference_mode():
                call(model, inputs[:1])
        except Exception as error:
            shape = tuple(inputs.shape[1:])
            raise OptionError(
                f"the model does not take these inputs, of shape {shape}: {str(error).splitlines()[0]}",
                "Do --data and --model belong together?",
            ) from error
        try:
            self._extracted = extract(model, inputs[:1], check=inputs[:64])
        except UnsupportedNetwork as error:
            raise OptionError(
                f"the network cannot be analysed: {error}",
                "Corrections need affine layers with ReLU-like activations, tanh or sigmoid.",
            ) from error
        self.network: LayeredNetwork = self._extracted.network
        self._dropped = self._extracted.dropped
        if threshold is not None and self.network.n_outputs > 1:
            raise OptionError(
                f"the network has {self.network.n_outputs} outputs, and --threshold is for one.",
                "Leave --threshold out; the largest output decides.",
            )
        self._level = _level(threshold, self._dropped)

    @property
    def n_classes(self) -> int:
        """Number of classes it decides between."""
        return max(self.network.n_outputs, 2)

    def outputs(self, points: Floats) -> Floats:
        """Outputs of the model itself, in its own dtype, (n, n_outputs), at points (n, n_inputs)."""
        found = []
        with torch.inference_mode():
            for start in range(0, len(points), _CHUNK):
                part = torch.from_numpy(np.ascontiguousarray(points[start : start + _CHUNK]))
                inputs = part.to(self._like.device, self._like.dtype).reshape(-1, *self.shape)
                found.append(call(self.model, inputs).double().cpu().reshape(len(part), -1).numpy())
        return np.concatenate(found)

    def decides(self, points: Floats) -> np.ndarray:
        """Class that the model itself decides for at points (n, n_inputs)."""
        outputs = self.outputs(points)
        if outputs.shape[1] > 1:
            return np.asarray(outputs.argmax(1))
        return np.asarray((_undone(outputs, self._dropped)[:, 0] >= self._level).astype(int))

    def margins(self, target: int) -> LayeredNetwork:
        """The network whose outputs are all at least 0 where the target is decided: f_target - f_other."""
        if target not in self._margins:
            k = self.network.n_outputs
            if k == 1:
                sign = 1.0 if target == 1 else -1.0
                self._margins[target] = self.network.combined(np.array([[sign]]), -sign * self._level)
            else:
                rows = -np.delete(np.eye(k), target, axis=0)
                rows[:, target] = 1.0
                self._margins[target] = self.network.combined(rows)
        return self._margins[target]

    @cached_property
    def _margins(self) -> dict[int, LayeredNetwork]:
        return {}

    def rounding_error(self, points: Floats) -> float:
        """Largest difference of the model's outputs from the float64 layers', at points (n, n_inputs).

        The model sees the points rounded to its own dtype, the layers as they are. Where a softmax or sigmoid
        at the end was dropped, the outputs before it are compared, at probabilities that still tell them.
        """
        own, layers = self.outputs(points), self.network(points)
        if not self._dropped:
            return float(np.abs(own - layers).max())
        own, told = _undone(own, self._dropped), _telling(own, self._dropped)
        if self._dropped.endswith("softmax"):  # known up to a constant
            largest = own.argmax(1)[:, None]
            own = own - np.take_along_axis(own, largest, 1)
            layers = layers - np.take_along_axis(layers, largest, 1)
            np.put_along_axis(told, largest, False, 1)  # whose difference is none
        measured = float(np.abs(own - layers)[told].max()) if told.any() else 0.0
        return measured if told.mean() > _OFTEN else max(measured, float(_UNTOLD * np.abs(layers).max()))


def _level(threshold: float | None, dropped: str) -> float:
    """The threshold as an output of the layers, before a sigmoid at the end.

    Raises:
        OptionError: If it is no probability where the network gives one.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise OptionError(f"--threshold {threshold:g} is not finite.", "An output that decides is.")
    if not dropped.endswith("sigmoid"):
        return 0.0 if threshold is None else threshold
    level = 0.5 if threshold is None else threshold
    if not 0 < level < 1:
        raise OptionError(
            f"--threshold {level:g} is no probability, and the network ends with a sigmoid.", "Try 0.5."
        )
    return math.log(level / (1 - level))


def _undone(outputs: Floats, dropped: str) -> Floats:
    """What was there before a sigmoid or softmax at the end; of a softmax up to a constant."""
    if not dropped:
        return outputs
    with np.errstate(divide="ignore"):
        logs = outputs if dropped.startswith("log_") else np.log(outputs)
    if dropped.endswith("softmax"):
        return np.asarray(logs)
    if dropped.endswith("sigmoid"):
        with np.errstate(divide="ignore"):
            return np.asarray(logs - np.log(-np.expm1(logs)))
    raise AssertionError(dropped)


def _telling(outputs: Floats, dropped: str) -> np.ndarray:
    """Which probabilities are neither so small nor so large that rounding hides what was before."""
    probabilities = np.exp(outputs) if dropped.startswith("log_") else outputs
    told = probabilities > _SATURATED
    return told if dropped.endswith("softmax") else told & (probabilities < 1 - _SATURATED)


def flat_inputs(batches: Any) -> tuple[Tensor, np.ndarray]:
    """All inputs as one tensor (n, …) where the network sees them, and the targets.

    Raises:
        OptionError: If an input is not one floating-point tensor.
    """
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for x, y in batches:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise OptionError(
                "corrections need one input of real numbers; these data have several inputs, or tokens.",
                "Tokens have no corrections in a range of numbers.",
            )
        inputs.append(x)
        targets.append(y)
    return torch.cat(inputs), torch.cat(targets).detach().cpu().numpy()


def flatten(inputs: Tensor, samples: Sequence[int] | np.ndarray) -> Floats:
    """Chosen inputs as float64 (n_samples, n_inputs)."""
    chosen = inputs[torch.as_tensor(list(samples), device=inputs.device)]
    return np.asarray(chosen.detach().cpu().double().reshape(len(chosen), -1).numpy())
