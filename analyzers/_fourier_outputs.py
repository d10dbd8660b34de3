"""What a run's checkpoints say on the samples: inputs, targets and residuals as matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.input_samples import tensors_of
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.params import frozen_eval

PROBABILITIES = "probabilities: softmax of the outputs, against labels as 0 and 1"
SIGMOID = "probabilities: sigmoid of the outputs, against labels as 0 and 1"
RAW = "outputs as they are, against the targets"

KINDS = {
    "cross_entropy": "softmax",
    "CrossEntropyLoss": "softmax",
    "nll_loss": "softmax",  # of log-probabilities, which gives the probabilities
    "NLLLoss": "softmax",
    "bce_with_logits": "sigmoid",
    "binary_cross_entropy_with_logits": "sigmoid",
    "BCEWithLogitsLoss": "sigmoid",
    "multilabel_soft_margin_loss": "sigmoid",
    "MultiLabelSoftMarginLoss": "sigmoid",
    "mse": "raw",
    "mse_loss": "raw",
    "MSELoss": "raw",
    "l1_loss": "raw",
    "L1Loss": "raw",
    "smooth_l1_loss": "raw",
    "SmoothL1Loss": "raw",
    "huber_loss": "raw",
    "HuberLoss": "raw",
    "binary_cross_entropy": "raw",  # of probabilities
    "BCELoss": "raw",
}
"""What the outputs are compared as, by dynprobe's and PyTorch's names of losses."""


@dataclass(frozen=True)
class Track:
    """A run on its samples.

    Attributes:
        inputs: (n_samples, n_features).
        target: y, (n_samples, n_outputs) float64.
        residual: y − h, (n_checkpoints, n_samples, n_outputs) float32; the difference is taken in float64.
        compared: What h is.
        notes: Sentences for the reader.
    """

    inputs: Tensor
    target: Tensor
    residual: Tensor
    compared: str
    notes: list[str] = field(default_factory=list)

    @property
    def output(self) -> Tensor:
        """h, (n_checkpoints, n_samples, n_outputs)."""
        return (self.target - self.residual).to(self.residual.dtype)


def record(checkpoints: Sequence[Any], batches: Any, loss: Loss, told: Callable[[], None]) -> Track:
    """One forward pass of every checkpoint over the samples, in eval mode and a fixed order.

    Args:
        checkpoints: Of one run; only one is in memory.
        batches: Pairs (inputs, targets), re-iterable.
        loss: Says what the outputs are compared with.
        told: Called after each checkpoint.

    Raises:
        OptionError: If inputs or targets are none that the analysis can be made for.
    """
    inputs = _inputs(batches)
    residual, target, compared = None, None, ""
    for t, checkpoint in enumerate(checkpoints):
        model = checkpoint.model
        with frozen_eval(model), torch.inference_mode():
            start = 0
            for x, y in batches:
                output = call(model, x)
                wanted, found, compared = comparable(output, y, loss)
                if residual is None or target is None:
                    shape = (len(inputs), wanted.shape[1])
                    target = torch.empty(shape, dtype=torch.float64, device=wanted.device)
                    residual = torch.empty((len(checkpoints), *shape), device=wanted.device)
                end = start + len(wanted)
                target[start:end] = wanted
                residual[t, start:end] = wanted - found
                start = end
        told()
    if residual is None or target is None:
        raise OptionError("there are no samples.", "Give data with --data.")
    if not bool(target.isfinite().all()):
        raise OptionError(
            "the targets hold NaN or infinity.", "Look at the data, or leave those samples out."
        )
    # tensors made in inference mode could not be used by anything that needs gradients later
    track = Track(inputs.to(target.device), target.clone(), residual.clone(), compared)
    if compared == RAW and _kind(loss) == "":
        _check_unknown(track, loss)
    return track


def _kind(loss: Loss) -> str:
    """How outputs are compared under a loss; empty for one that is not known."""
    return KINDS.get(loss.name.replace(":", ".").rsplit(".", 1)[-1], "")


def _check_unknown(track: Track, loss: Loss) -> None:
    """Logits against 0 and 1 would be measured as if a perfect fit were far off.

    Raises:
        OptionError: If the targets are all 0 or 1 and outputs are not between them.
    """
    target, output = track.target, track.output
    outside = bool(((output < -1e-3) | (output > 1.001)).any())
    if not (outside and bool(((target >= 0) & (target <= 1)).all())):
        return
    if bool(((target == 0) | (target == 1)).all()):
        raise OptionError(
            f"the targets are 0 and 1, outputs are not between them, and loss {loss.name!r} does not say "
            "whether they are logits.",
            "Give --loss bce_with_logits or cross_entropy, or mse to compare outputs as they are.",
        )
    track.notes.append(
        f"targets are between 0 and 1 and outputs are not: under loss {loss.name!r} they are compared as "
        "they are; if they are logits, give --loss bce_with_logits or cross_entropy"
    )


def _inputs(batches: Any) -> Tensor:
    """All floating-point inputs of every sample in one row."""
    parts = []
    for inputs, _targets in batches:
        every = [t for t in tensors_of(inputs) if t.dim()]
        found = [t for t in every if t.is_floating_point()]
        if not found:
            raise OptionError(
                "the inputs are whole numbers, as token ids are: distances between them mean nothing.",
                "Frequencies can be analysed for inputs of real numbers.",
            )
        if len(found) < len(every):
            raise OptionError(
                "the inputs hold whole numbers, as token ids or masks are, beside real ones: distances would "
                "leave them out.",
                "Frequencies can be analysed where all inputs are real numbers.",
            )
        parts.append(torch.cat([t.detach().reshape(len(t), -1).to(found[0]) for t in found], 1))
    if not parts:
        raise OptionError("there are no samples.", "Give data with --data.")
    if len({part.shape[1] for part in parts}) > 1:
        raise OptionError(
            "samples have different sizes, so distances between them are not defined.",
            "Pad all of them alike.",
        )
    inputs = torch.cat(parts)
    if not bool(inputs.isfinite().all()):
        raise OptionError("the inputs hold NaN or infinity.", "Look at the data with `dynprobe inspect`.")
    if len(inputs) < 3 or bool((inputs == inputs[:1]).all()):
        raise OptionError(
            "frequencies need at least three samples with different inputs.", "Give more --samples."
        )
    return inputs


def comparable(outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor, str]:
    """Target and output of one batch in the same units: labels against probabilities, or both as they are.

    Residuals of logits would mean nothing: a network that fits perfectly has logits far from 0 and 1.

    Args:
        outputs: Of the network, (n_samples, …).
        targets: Of the data.
        loss: `cross_entropy` takes the softmax over dimension 1, `bce_with_logits` the sigmoid, `mse`
            neither, and PyTorch's losses likewise (`KINDS`); under another loss whole-number targets are
            taken for classes where there are several outputs.

    Returns:
        Target and output, (n_samples, n_outputs) float64, and what they are.

    Raises:
        OptionError: If they do not fit together, or the loss has no one target for each sample.
    """
    outputs = outputs.detach().double()
    if loss.name == "causal_lm":
        raise OptionError(
            "a language model's targets are its own inputs: there is no map from inputs to targets.",
            "Frequencies can be analysed for classification and regression.",
        )
    kind = _kind(loss)
    labels = not targets.is_floating_point() and targets.dim() == outputs.dim() - 1
    if labels and kind != "sigmoid" and (outputs.shape[1] > 1 or kind == "softmax"):
        targets = _one_hot(targets, outputs.shape[1])
        kind = kind or "softmax"
    text = RAW
    if kind == "softmax":
        if outputs.dim() < 2 or outputs.shape[1] < 2:
            raise OptionError(
                "the network has one output, whose softmax is always 1.",
                "Give the loss that it was trained with: --loss bce_with_logits or mse.",
            )
        outputs, text = outputs.softmax(1), PROBABILITIES
    elif kind == "sigmoid":
        outputs, text = outputs.sigmoid(), SIGMOID
    wanted = targets.detach().double().reshape(len(targets), -1)
    found = outputs.reshape(len(outputs), -1)
    if wanted.shape != found.shape:
        raise OptionError(
            f"outputs are {tuple(outputs.shape)}, but targets are {tuple(targets.shape)}.",
            "Frequencies need a target for every output.",
        )
    return wanted, found, text


def _one_hot(targets: Tensor, classes: int) -> Tensor:
    """Class indices as 0 and 1 along dimension 1."""
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise OptionError(
            f"targets are not all classes from 0 to {classes - 1}; an ignored position has no target.",
            "Leave such samples out.",
        )
    return functional.one_hot(targets.long(), classes).movedim(-1, 1)
