"""What a linear model of a network is made from: inputs as a matrix, outputs, targets as outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.losses import IGNORED_TARGET, Loss

SQUARED = ("mse", "mse_loss", "MSELoss")
SIGMOID = ("bce_with_logits", "binary_cross_entropy_with_logits", "BCEWithLogitsLoss")


@dataclass(frozen=True)
class Samples:
    """Inputs and targets of all samples, on the CPU, in the order of the batches.

    Attributes:
        inputs: Flattened, float64, shape (n_samples, n_inputs).
        targets: As the loss takes them.
        eps: Precision that the inputs had.
        keep: Which samples have a target; those of index -100 are in nothing.
    """

    inputs: Tensor
    targets: Tensor
    eps: float
    keep: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def collect(batches: Iterable[Any]) -> Samples:
    """Gather what the batches hold.

    Raises:
        OptionError: If there is nothing, or the inputs are no numbers that a linear model could take.
    """
    inputs, targets, eps = [], [], 0.0
    for given, target in batches:
        matrix, precision = _matrix(given)
        inputs.append(matrix)
        targets.append(target.detach().cpu())
        eps = max(eps, precision)
    if not inputs:
        raise OptionError("there are no samples.", "Raise --samples.")
    target = torch.cat(targets)
    keep = torch.ones(len(target), dtype=torch.bool)
    if not target.is_floating_point() and target.dim() == 1:
        keep = target != IGNORED_TARGET
    return Samples(torch.cat(inputs)[keep], target[keep], eps, keep)


def _matrix(inputs: Any) -> tuple[Tensor, float]:
    tensors = [inputs] if isinstance(inputs, Tensor) else list(_tensors(inputs))
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not numbers:
        raise OptionError(
            "the inputs are no real numbers (tokens?), so there is no linear model of them.",
            "linear-dynamics measures networks on images, features or other floating-point inputs.",
        )
    flat = torch.cat([tensor.detach().flatten(1).cpu().double() for tensor in numbers], 1)
    return flat, max(torch.finfo(tensor.dtype).eps for tensor in numbers)


def _tensors(inputs: Any) -> Iterable[Tensor]:
    values = inputs.values() if hasattr(inputs, "values") else inputs
    return (value for value in values if isinstance(value, Tensor))


def outputs_of(model: nn.Module, batches: Iterable[Any], keep: Tensor) -> Tensor:
    """Outputs of a network in eval mode, float64 on the CPU, shape (n_samples, …)."""
    with torch.inference_mode():
        parts = [call(model, inputs).cpu().double() for inputs, _ in batches]
    return torch.cat(parts).clone()[keep]


def spread(n: int, count: int) -> Tensor:
    """Places of so many samples, evenly spread over all: data are often sorted."""
    return torch.tensor(sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(min(count, n))}))


def as_rows(values: Tensor) -> Tensor:
    """One row per sample: a vector becomes one column."""
    return values.flatten(1) if values.dim() > 1 else values[:, None]


@dataclass(frozen=True)
class Space:
    """The space in which a network's answer is compared with the target: probabilities, or outputs.

    Attributes:
        kind: softmax, sigmoid or identity.
        shape: Of the outputs of one sample.
    """

    kind: str
    shape: tuple[int, ...]

    def answer(self, outputs: Tensor) -> Tensor:
        """Probabilities where the loss has them, else the outputs; shape (n_samples, n_outputs)."""
        flat = as_rows(outputs)
        if self.kind == "softmax":
            return torch.softmax(flat, 1)
        return torch.sigmoid(flat) if self.kind == "sigmoid" else flat

    def target(self, targets: Tensor) -> Tensor:
        """Targets as float64 of shape (n_samples, n_outputs); class labels one-hot.

        Raises:
            OptionError: If they do not fit the outputs.
        """
        size = math.prod(self.shape)
        if not targets.is_floating_point() and targets.dim() == 1 and size > 1:
            if int(targets.min()) < 0 or int(targets.max()) >= size:
                raise OptionError(
                    f"the targets name classes up to {int(targets.max())}; the network has {size} outputs.",
                    "Check --data and --loss.",
                )
            return functional.one_hot(targets.long(), size).double()
        flat = as_rows(targets.double())
        if flat.shape[1] != size:
            raise OptionError(
                f"a sample has {size} outputs and a target of {flat.shape[1]} numbers.",
                "linear-dynamics needs one number, or one class, per output.",
            )
        return flat


def space_of(loss: Loss, outputs: Tensor, targets: Tensor) -> Space:
    """The space that belongs to a loss.

    Raises:
        OptionError: If a sample has several positions with a softmax each.
    """
    shape = tuple(outputs.shape[1:])
    classes = not targets.is_floating_point() and len(shape) == 1 and shape[0] > 1
    if loss.name in SQUARED:
        return Space("identity", shape)
    if loss.name in SIGMOID:
        return Space("sigmoid", shape)
    if loss.name in ("cross_entropy", "CrossEntropyLoss") or classes:
        if len(shape) != 1:
            raise OptionError(
                f"a sample has outputs of shape {shape}: one softmax for each of several positions.",
                "linear-dynamics needs one vector of class scores per sample.",
            )
        return Space("softmax", shape)
    if loss.name == "causal_lm":
        raise OptionError(
            "a language model has one softmax per token, which linear-dynamics does not measure.",
            "It needs one vector of outputs per sample.",
        )
    return Space("identity", shape)
