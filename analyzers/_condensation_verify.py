"""Evaluates the smaller networks that are left when condensed neurons are merged."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._condensation import few
from dynprobe.analyzers._sampling import check_repeatable, chosen_metrics
from dynprobe.analyzers.numerics.evaluate import estimate, per_sample, protect_inputs, resolve_metrics
from dynprobe.analyzers.numerics.fold import LINEAR, fold_batchnorm, record
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.merging import merge
from dynprobe.analyzers.numerics.outgoing import Link, links
from dynprobe.analyzers.numerics.params import frozen_eval, private_copy

Bools = NDArray[np.bool_]


def verify(
    model: nn.Module,
    batches: Any,
    loss: Loss,
    layers: list[str],
    thresholds: tuple[float, ...],
    least_amplitude: float,
) -> tuple[dict[str, Any], list[str]]:
    """Merges the neurons of one direction, at each threshold, and evaluates what is left.

    Args:
        model: The network; read only.
        batches: Pairs (inputs, targets), re-iterable.
        loss: The loss.
        layers: Names of the layers, as they are reported.
        thresholds: Cosines above which two neurons have one direction.
        least_amplitude: Neurons below this part of a layer's largest amplitude are cut off.

    Returns:
        Loss and accuracy of the network and of the reduced ones, sizes, and notes.

    Raises:
        OptionError: If no layer's neurons can be merged, with the reason for each.
    """
    with frozen_eval(model):
        check_repeatable(model, batches)
        metrics = resolve_metrics(chosen_metrics("auto", batches, loss, model), loss)
        if "accuracy" in metrics and _has_classes(model, batches):
            metrics["prediction"] = lambda outputs, _targets: outputs.argmax(1)
        copy = private_copy(model)
        protect_inputs(copy, few(batches))
        before = per_sample(copy, batches, metrics)
    folded = len(list(_batchnorms(copy)))
    fold_batchnorm(copy, record(copy, few(batches)), [])
    found, refused = links(copy, few(batches))
    notes = [f"{layer} was not merged: {reason}" for layer, reason in refused.items()]
    if not found:
        raise OptionError(
            "the neurons of no layer can be merged" + (": " if refused else ", there is but one layer")
            + "; ".join(f"{layer}: {reason}" for layer, reason in refused.items()) + ".",
            "Leave out --verify.",
        )  # fmt: skip
    notes += _explained(found, folded - len(list(_batchnorms(copy))))
    values: dict[str, Any] = {}
    _add(values, "", before)
    reduced: dict[str, list[Any]] = {}
    for threshold in thresholds:
        smaller = private_copy(copy)
        kept = {name: merge(smaller, link, threshold, least_amplitude) for name, link in found.items()}
        after = per_sample(smaller, batches, metrics)
        row: dict[str, Any] = {"weights": _n_weights(smaller, found, kept)}
        row["neurons"] = [kept[name].sum() if name in kept else np.nan for name in layers]
        _add_change(row, before, after)
        for name, number in row.items():
            reduced.setdefault(name, []).append(number)
    values |= {f"reduced_{name}": np.array(column, dtype=float) for name, column in reduced.items()}
    values["reduced_neurons"] = values["reduced_neurons"].T
    values["n_weights"] = _n_weights(copy, {}, {})
    return values, notes


def _batchnorms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _has_classes(model: nn.Module, batches: Any) -> bool:
    """Whether there is one prediction a sample."""
    seen: list[int] = []

    def look(outputs: Tensor, _targets: Tensor) -> Tensor:
        seen.append(outputs.dim() if outputs.shape[-1] > 1 else 0)
        return outputs

    per_sample(model, [next(iter(batches))], {"outputs": look})
    return seen == [2]


def _explained(found: dict[str, Link], n_folded: int) -> list[str]:
    """What the merging of each layer is exact for."""
    scaled = [name for name, link in found.items() if link.homogeneous]
    others = [name for name, link in found.items() if not link.homogeneous]
    notes = []
    if scaled:
        notes.append(f"{', '.join(scaled)}: merged by direction, exact for parallel neurons")
    if others:
        notes.append(
            f"{', '.join(others)}: the activation is not positively homogeneous, so neurons were merged only "
            "where the weights themselves are close, exact for equal ones"
        )
    if n_folded:
        notes.append("merged are the neurons of the network with its BatchNorm folded into the weights")
    return notes


def _add(values: dict[str, Any], prefix: str, samples: dict[str, Tensor]) -> None:
    for name in ("loss", "accuracy"):
        if name in samples:
            value, stderr, _ = estimate(samples[name])
            values |= {f"{prefix}{name}": value, f"{prefix}{name}_stderr": stderr}


def _add_change(row: dict[str, Any], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Means of the reduced network, the change of the loss paired by sample, and how often both agree."""
    _add(row, "", after)
    value, stderr, _ = estimate(after["loss"] - before["loss"])
    row |= {"loss_change": value, "loss_change_stderr": stderr}
    if "prediction" in after:
        value, stderr, _ = estimate((after["prediction"] == before["prediction"]).double())
        row |= {"agreement": value, "agreement_stderr": stderr}


def _n_weights(model: nn.Module, found: dict[str, Link], kept: dict[str, Bools]) -> int:
    """Weights and biases of the linear and convolutional layers with only the neurons that are kept."""
    readers = {link.reader: name for name, link in found.items()}
    total = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, LINEAR):
            continue
        rows = float(kept[name].mean()) if name in kept else 1.0
        columns = float(kept[readers[name]].mean()) if name in readers else 1.0
        total += round(layer.weight.numel() * rows * columns)
        total += round(layer.bias.numel() * rows) if isinstance(layer.bias, torch.Tensor) else 0
    return total
