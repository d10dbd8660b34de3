"""Losses per sample: a mean with a standard error needs one number for each sample, not one per batch."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PerSample = Callable[[Tensor, Tensor], Tensor]

IGNORED_TARGET = -100  # PyTorch's default `ignore_index`: such a position is in no average

# PyTorch's CPU softmax is not vectorised along so few classes; along the samples
# instead it is 4 to 6 times faster.
SHORT = 16


@dataclass(frozen=True)
class Loss:
    """A loss as one value per sample; calling it gives their mean.

    A sample is one row of the batch: an image, a sequence. A loss with several terms per sample (pixels,
    tokens, outputs) averages them within the sample first, so that every sample has the same weight however
    the data are split into batches.

    Args:
        name: What results and messages call it.
        per_sample: `(outputs, targets)` to the loss of each sample, shape `(n_samples,)`.
        accuracy: `(outputs, targets)` to the fraction that is right in each sample, shape `(n_samples,)`.
        criterion: The callable that it was made of, as a run calls it on a batch; None for a loss of our own.
    """

    name: str
    per_sample: PerSample
    accuracy: PerSample
    criterion: Callable[..., Tensor] | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over samples, a scalar tensor through which gradients flow."""
        return self.per_sample(outputs, targets).mean()


def get_loss(name: str) -> Loss:
    """Return the loss of that name.

    Args:
        name: `cross_entropy` (class indices or class probabilities, extra dimensions averaged; positions of
            index -100 are not counted, and a sample that has no other is NaN), `mse` (same
            shape as the outputs, or class indices, which are one-hot encoded), `bce_with_logits`, or
            `causal_lm` (each token predicts the next one; targets are the token ids, -100 is not counted).

    Raises:
        ValueError: No such loss; the message lists them.
    """
    if name not in _LOSSES:
        raise ValueError(f"no loss is called {name!r}; there are {', '.join(_LOSSES)}")
    return _LOSSES[name]


def as_loss(function: Callable[..., Tensor], name: str = "") -> Loss:
    """Make a `Loss` of a callable `(outputs, targets) -> scalar`, such as `F.cross_entropy` or a criterion.

    The value of each sample is what the callable gives with `reduction="none"`, averaged within the sample.
    A callable without `reduction` is called on each sample alone, as a batch of one: always right for a mean
    over samples, but one call per sample.

    Args:
        function: A function, or a module with a `reduction` attribute such as `nn.CrossEntropyLoss()`. Class
            weights multiply each sample's loss; the mean then divides by the number of samples.
        name: What to call it; by default the callable's own name.

    Returns:
        The loss. A `Loss` is returned as it is.
    """
    if isinstance(function, Loss):
        return function
    name = name or str(getattr(function, "__name__", type(function).__name__))
    if isinstance(function, torch.nn.Module) and hasattr(function, "reduction"):
        criterion = copy.copy(function)
        setattr(criterion, "reduction", "none")  # noqa: B010 - as an attribute mypy takes it for a tensor
        unreduced: Callable[..., Tensor] = criterion
    elif _takes_reduction(function):

        def unreduced(outputs: Tensor, targets: Tensor) -> Tensor:
            return function(outputs, targets, reduction="none")

    else:
        return Loss(name, _one_by_one(function), _class_accuracy, function)

    def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        return _mean_within_sample(unreduced(outputs, targets))

    return Loss(name, per_sample, _class_accuracy, function)


def _takes_reduction(function: Callable[..., Tensor]) -> bool:
    try:
        return "reduction" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _one_by_one(function: Callable[..., Tensor]) -> PerSample:
    def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        pairs = zip(torch.split(outputs, 1), torch.split(targets, 1), strict=True)
        return torch.stack([function(output, target).reshape(()) for output, target in pairs])

    return per_sample


def _mean_within_sample(terms: Tensor) -> Tensor:
    return terms if terms.dim() == 1 else terms.flatten(1).mean(1)


def _at_least_float32(outputs: Tensor) -> Tensor:
    """Logits of half precision lose the loss's digits in the softmax: the loss is computed in float32."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = _at_least_float32(outputs)
    if targets.is_floating_point():
        return _mean_within_sample(
            functional.cross_entropy(outputs, targets.to(outputs.dtype), reduction="none")
        )
    if outputs.dim() == 2 and outputs.shape[1] < SHORT:
        log_probability = functional.log_softmax(outputs.t().contiguous(), 0).t()
        return _counted(functional.nll_loss(log_probability, targets, reduction="none"), targets)
    terms = functional.cross_entropy(outputs, targets, reduction="none")
    return _counted(terms, targets)


def _counted(terms: Tensor, targets: Tensor) -> Tensor:
    """Mean over the positions of each sample whose target is not ignored."""
    if terms.dim() > 1:
        return _mean_where(terms, targets != IGNORED_TARGET)
    ignored = targets == IGNORED_TARGET
    return torch.where(ignored, math.nan, terms) if bool(ignored.any()) else terms


def _mean_where(terms: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted positions of each sample; NaN for a sample that has none, never a zero."""
    counted = counted.flatten(1)
    return torch.where(counted, terms.flatten(1), 0.0).sum(1) / counted.sum(1)


def _class_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Fraction right of each sample: the largest output against a class index, or a class distribution."""
    if outputs.dim() < 2:
        raise ValueError(
            f"accuracy needs one output per class; the model returns shape {tuple(outputs.shape)}"
        )
    if targets.shape == outputs.shape and outputs.shape[1] > 1:
        return _mean_within_sample((outputs.argmax(1) == targets.argmax(1)).to(_value_dtype(outputs)))
    if targets.is_floating_point() or targets.dim() != outputs.dim() - 1:
        raise ValueError(
            f"accuracy needs class targets; outputs are {tuple(outputs.shape)}, "
            f"targets {tuple(targets.shape)} of {targets.dtype}"
        )
    right = (outputs.argmax(1) == targets).to(_value_dtype(outputs))
    return _counted(right, targets)


def _value_dtype(outputs: Tensor) -> torch.dtype:
    return torch.float64 if outputs.dtype == torch.float64 else torch.float32


def _match(outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets in the outputs' shape and dtype; never broadcast, which would average all pairs of samples."""
    if targets.dim() == outputs.dim() - 1 and outputs.shape[-1] == 1:
        targets = targets.unsqueeze(-1)
    elif targets.dim() == outputs.dim() - 1 == 1 and not targets.is_floating_point():
        targets = functional.one_hot(targets.long(), outputs.shape[1])
    elif targets.dim() == outputs.dim() + 1 and targets.shape[-1] == 1:
        targets = targets.squeeze(-1)
    if targets.shape != outputs.shape:
        raise ValueError(f"outputs are {tuple(outputs.shape)}, but targets are {tuple(targets.shape)}")
    return targets.to(outputs.dtype)


def _mse(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = _at_least_float32(outputs)
    return _mean_within_sample((outputs - _match(outputs, targets)).square())


def _bce(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = _at_least_float32(outputs)
    terms = functional.binary_cross_entropy_with_logits(outputs, _match(outputs, targets), reduction="none")
    return _mean_within_sample(terms)


def _binary_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    right = (outputs > 0) == (_match(outputs, targets) > 0.5)
    return _mean_within_sample(right.to(_value_dtype(outputs)))


def _next_token(per_position: PerSample) -> PerSample:
    """Position t predicts token t + 1: shift, with the classes moved to dim 1."""

    def shifted(outputs: Tensor, targets: Tensor) -> Tensor:
        return per_position(outputs[:, :-1].transpose(1, 2), targets[:, 1:])

    return shifted


_LOSSES = {
    "cross_entropy": Loss("cross_entropy", _cross_entropy, _class_accuracy),
    "mse": Loss("mse", _mse, _class_accuracy),
    "bce_with_logits": Loss("bce_with_logits", _bce, _binary_accuracy),
    "causal_lm": Loss("causal_lm", _next_token(_cross_entropy), _next_token(_class_accuracy)),
}
