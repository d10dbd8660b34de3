"""How well the Fisher information predicts the divergence that a small change of the weights makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import Estimate, estimate
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.model_function import ModelFunction
from dynprobe.analyzers.numerics.outer_products import FisherOperator
from dynprobe.analyzers.numerics.output_factor import position_share

SMALL = 0.1
"""A change of the outputs up to which the divergence is computed from the change: to all digits however small
it is. Beyond it that way overflows, and the difference of logarithms has digits enough."""


@dataclass(frozen=True)
class KlCheck:
    """Two sides of KL(p_w ‖ p_{w+δ}) ≈ ½ δᵀFδ for one random δ.

    Args:
        divergence: The left side, mean over samples with its standard error.
        quadratic: The right side.
    """

    divergence: Estimate
    quadratic: float

    @property
    def ratio(self) -> float:
        """Left over right; NaN where the right side is zero."""
        return self.divergence.value / self.quadratic if self.quadratic > 0 else math.nan


def kl_check(
    model: nn.Module,
    batches: Sequence[tuple[Any, Tensor]],
    loss: Loss,
    *,
    size: float = 1e-3,
    seed: int = 0,
) -> KlCheck:
    """Compare the divergence between the model's label distributions at w and w + δ with ½ δᵀFδ.

    δ is Gaussian, of length `size` times that of all weights, and zero in an embedding's row for padding: its
    gradient is zero by convention, though the outputs depend on it. The left side takes two forward passes
    and no derivative, the right side one Fisher-vector product.

    Args:
        model: Taken in eval mode.
        batches: Pairs (inputs, targets).
        loss: One that says which labels the model would draw, see `output_factor`.
        size: ‖δ‖/‖w‖.
        seed: Of δ.

    Raises:
        ValueError: If the loss is no such loss.
        NoSecondDerivative: If an operation of the model has none.
    """
    generator = torch.Generator().manual_seed(seed)
    here = ModelFunction(model)
    weights = {name: leaf.detach() for name, leaf in here.leaves.items()}
    noise = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in weights.items()
    }
    for name, row in _padding_rows(model):
        noise[name][row] = 0
    length = _norm(weights) / _norm(noise)
    there = {name: value + (size * length * noise[name]).to(value) for name, value in weights.items()}
    # what was really added, after rounding to the model's dtype
    delta = torch.cat([(there[name].double() - weights[name].double()).flatten() for name in weights])
    fisher = FisherOperator(model, batches, loss, memory=0)
    quadratic = 0.5 * float(delta @ fisher.matvec(delta))
    values = []
    with torch.no_grad():
        for inputs, targets in batches:
            values.append(divergence(loss, here(inputs), here(inputs, there), targets))
    return KlCheck(estimate(torch.cat(values).cpu()), quadratic)


def divergence(loss: Loss, before: Tensor, after: Tensor, targets: Tensor) -> Tensor:
    """KL(p ‖ q) between the label distributions that two sets of outputs stand for, per sample, float64.

    Several terms in a sample are averaged within it, as the loss does. Computed from the difference of the
    outputs, so that a small divergence keeps its digits.

    Args:
        loss: One that `output_factor` knows.
        before: Outputs z behind p, samples along dim 0.
        after: Outputs behind q, same shape.
        targets: Say only which positions the loss ignores.
    """
    before, change = before.double(), after.double() - before.double()
    if loss.name == "mse":  # Gaussians of variance D/2 in each of D outputs
        return change.reshape(len(change), -1).square().mean(1)
    if loss.name == "bce_with_logits":
        before, change = (torch.stack([t, torch.zeros_like(t)], 1) for t in (before, change))
        targets = torch.zeros_like(change[:, 0])
    elif loss.name == "causal_lm":
        before, change = (t[:, :-1].transpose(1, 2) for t in (before, change))
        targets = targets[:, 1:]
    log_p = before.log_softmax(1)
    p = log_p.exp()
    plain = (p * (log_p - (before + change).log_softmax(1))).sum(1, keepdim=True)
    change = change - (p * change).sum(1, keepdim=True)
    small = change.abs().amax(1, keepdim=True) < SMALL
    change = torch.where(small, change, 0.0)
    precise = torch.log1p((p * (torch.expm1(change) - change)).sum(1, keepdim=True))
    terms = torch.where(small, precise, plain)
    return (position_share(before, targets) * terms).flatten(1).sum(1)


def _padding_rows(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parameters that have a row for padding, and which it is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module.weight) in names:
            yield names[id(module.weight)], module.padding_idx


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
