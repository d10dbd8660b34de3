"""Evaluate a model on batches: per-sample values, their mean and their standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.losses import Loss, PerSample

Inputs = Any  # a tensor, a tuple of positional arguments, or a dict of keyword arguments
Batch = tuple[Inputs, Tensor]


class Estimate(NamedTuple):
    """A mean over samples with its standard error, std(ddof=1)/√n (NaN for a single sample)."""

    value: float
    stderr: float
    n_samples: int


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """Run the model: a dict as keywords, a tuple as positions; of its output take the logits.

    The output may be a tensor, a tuple or list (its first entry), or a mapping or object with `logits`, as
    Hugging Face models return.
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, from which no tensor of outputs can be taken"
        )
    return output


def resolve_metrics(metrics: Sequence[str] | Mapping[str, PerSample], loss: Loss) -> dict[str, PerSample]:
    """Return `name -> (outputs, targets) -> (n_samples,)`; `loss` and `accuracy` need no function."""
    known = {"loss": loss.per_sample, "accuracy": loss.accuracy}
    if isinstance(metrics, Mapping):
        return dict(metrics)
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise ValueError(f"no metric is called {unknown[0]!r}; there are {', '.join(known)}")
    return {name: known[name] for name in metrics}


def move(inputs: Inputs, device: torch.device | None, dtype: torch.dtype | None) -> Inputs:
    """Move a tensor, tuple or dict of tensors to a device; only floating-point tensors change dtype."""
    return map_tensors(
        lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None), inputs
    )


def protect_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Let a model that writes over its inputs (`nn.ReLU(inplace=True)` first, `x -= mean`) take copies.

    Otherwise every pass over data held in memory would see what the one before left. Found out by a call.
    """
    written: list[bool] = []

    def note(tensor: Tensor) -> Tensor:
        written.append(tensor._version > 0)
        return tensor

    inputs = map_tensors(lambda tensor: tensor[:2].clone(), inputs)
    with torch.no_grad():
        call(model, inputs)
    map_tensors(note, inputs)
    if any(written):
        model.register_forward_pre_hook(_copy_arguments, with_kwargs=True)


def _copy_arguments(_model: nn.Module, positions: Any, keywords: Any) -> tuple[Any, Any]:
    return map_tensors(torch.clone, positions), map_tensors(torch.clone, keywords)


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply a function to a tensor, or to every tensor of a tuple or dict; what is no tensor stays."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(function, value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(map_tensors(function, value) for value in inputs)
    return inputs


def per_sample(
    model: nn.Module, batches: Iterable[Batch], metrics: Mapping[str, PerSample]
) -> dict[str, Tensor]:
    """Return each metric's value for every sample, all from one forward pass, in the order of the batches.

    Args:
        model: Used in the mode it is in; put it in `eval()` first (see `params.frozen_eval`).
        batches: Any re-iterable of `(inputs, targets)`; the last may be smaller.
        metrics: From `resolve_metrics`.

    Returns:
        float64 tensors of shape `(n_samples,)` on the CPU, which an exact weighted mean needs whatever the
        sizes of the batches are.

    Raises:
        ValueError: The batches are empty.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in metrics}
    with torch.inference_mode():
        for inputs, targets in batches:
            outputs = call(model, inputs)
            for name, metric in metrics.items():
                parts[name].append(metric(outputs, targets))
    if any(not values for values in parts.values()):
        raise ValueError("there are no batches to evaluate on")
    return {name: torch.cat(values).cpu().double().clone() for name, values in parts.items()}


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of per-sample values, shape `(n_samples,)`; NaN and infinity stay."""
    values = values.double()
    n = values.numel()
    stderr = float(values.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(values.mean()), stderr, n)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    metrics: Sequence[str] | Mapping[str, PerSample] = ("loss",),
) -> dict[str, Estimate]:
    """Return the mean over all samples of each metric with its standard error, from one forward pass.

    Args:
        model: Used in the mode it is in.
        batches: Any re-iterable of `(inputs, targets)`.
        loss: Gives the metrics `loss` and `accuracy`.
        metrics: Their names, or `name -> (outputs, targets) -> (n_samples,)`.
    """
    values = per_sample(model, batches, resolve_metrics(metrics, loss))
    return {name: estimate(value) for name, value in values.items()}
