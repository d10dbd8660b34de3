"""What dropout before the last layer adds to the loss: in closed form, and by Monte Carlo to check it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import Batch, Inputs, call
from dynprobe.analyzers.numerics.losses import PerSample

CHUNK = 512
"""Samples at a time, whatever the batches: the random masks then do not depend on them."""
FEW = 16
"""Samples on which it is tried out whether a loss is quadratic."""
ROUNDING = 1e-10
"""Relative size of a third difference that is zero."""


@dataclass(frozen=True)
class LastLayer:
    """What the last linear layer is given and makes of it, for all samples, float64.

    Attributes:
        features: Shape (n_samples, n_features).
        weight: Shape (n_outputs, n_features).
        outputs: Shape (n_samples, n_outputs).
        targets: As the loss takes them.
    """

    features: Tensor
    weight: Tensor
    outputs: Tensor
    targets: Tensor


class Gap(NamedTuple):
    """Mean over draws with its standard error over them."""

    value: float
    stderr: float


def last_linear(model: nn.Module, inputs: Inputs) -> tuple[str, str]:
    """Name the linear layer whose result is the output of the network; else an empty name and the reason.

    Args:
        model: In eval mode.
        inputs: A few samples.
    """
    results: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _module, _arguments, result: results.__setitem__(name, result.detach().clone())

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(keep(name)) for name, module in linear]
    try:
        with torch.no_grad():
            outputs = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if outputs.dim() != 2:
        return "", f"the outputs have {outputs.dim()} dimensions, not (samples, outputs)"
    same = [n for n, value in results.items() if value.shape == outputs.shape and torch.equal(value, outputs)]
    return (same[-1], "") if same else ("", "the outputs are not those of a linear layer")


def last_layer(model: nn.Module, name: str, batches: Iterable[Batch]) -> LastLayer:
    """Record the last layer over all batches.

    Args:
        model: In eval mode.
        name: From `last_linear`.
        batches: Pairs (inputs, targets).
    """
    features: list[Tensor] = []
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(
        lambda _module, arguments: features.append(arguments[0].detach().clone())
    )
    try:
        with torch.no_grad():
            for given, target in batches:
                outputs.append(call(model, given))
                targets.append(target)
    finally:
        handle.remove()
    weight = dict(layer.named_parameters())["weight"].detach().double()
    return LastLayer(torch.cat(features).double(), weight, torch.cat(outputs).double(), torch.cat(targets))


def dropout_term(layer: LastLayer, per_sample: PerSample, keep: float) -> Tensor:
    """What dropout before the last layer adds to the expected loss of each sample, without a random number.

    R₁ = (1 − p)/(2p) Σ_j f_j² W_jᵀ H W_j with the Hessian H of the sample's loss with respect to the outputs.
    For squared errors, where H is constant, the expected loss under dropout is *exactly* the loss plus the
    mean of R₁; for the loss ½‖f − y‖² it is the paper's (1 − p)/(2np) Σ_i Σ_j ‖W_j f_j(x_i)‖². For other
    losses it is the first term of an expansion in W_j f_j, what one feature adds to the outputs. How good it
    is does not depend on p: a dropped feature is missing as a whole, so that all moments of the noise are of
    the first order in 1 − p.

    Args:
        layer: From `last_layer`.
        per_sample: The loss of each sample.
        keep: p, the probability that a feature is kept (torch's `Dropout(q)` has q = 1 − p).

    Returns:
        Shape (n_samples,), float64, in units of the loss.

    Raises:
        ValueError: If `keep` is not above 0 and at most 1.

    References:
        Zhang and Xu, "Implicit Regularization of Dropout", IEEE TPAMI 2024, lemma 1 (R₁).
    """
    _check(keep)
    weight, parts = layer.weight, []
    for at in range(0, len(layer.features), CHUNK):
        rows = slice(at, at + CHUNK)
        outputs = layer.outputs[rows].detach().requires_grad_()
        squared = layer.features[rows].square()
        with torch.enable_grad():
            value = per_sample(outputs, layer.targets[rows]).sum()
            gradient = torch.autograd.grad(value, outputs, create_graph=True)[0]
        total = torch.zeros(len(squared), dtype=torch.float64, device=squared.device)
        if gradient.requires_grad:
            for row in range(weight.shape[0]):
                curved = torch.autograd.grad(gradient[:, row].sum(), outputs, retain_graph=True)[0]
                total += (squared * weight[row] * (curved @ weight)).sum(1)
        parts.append(total)
    return torch.cat(parts) * (1 - keep) / (2 * keep)


def is_quadratic(layer: LastLayer, per_sample: PerSample) -> bool:
    """Whether the loss of a sample is a quadratic function of its outputs, by its values and not its name.

    At steps of 1 to 1000 times the size of the outputs, along a random direction: for a quadratic function
    alone, L(f + 2v) − 3L(f + v) + 3L(f) − L(f − v) = 0 everywhere.

    Args:
        layer: From `last_layer`; its first samples are used.
        per_sample: The loss of each sample.
    """
    outputs, targets = layer.outputs[:FEW].detach(), layer.targets[:FEW]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
    size = float(outputs.square().mean().sqrt()) or 1.0
    with torch.no_grad():
        for scale in (1.0, 30.0, 1000.0):
            step = scale * size * direction
            two, one, here, back = (
                per_sample(outputs + k * step, targets).double() for k in (2.0, 1.0, 0.0, -1.0)
            )
            third = two - 3 * one + 3 * here - back
            if not bool((third.abs() <= ROUNDING * (two.abs() + 3 * one.abs() + 3 * here.abs())).all()):
                return False
    return True


def dropout_gap(layer: LastLayer, per_sample: PerSample, keep: float, draws: int, seed: int) -> Gap:
    """Expected loss under dropout before the last layer less the loss without, by Monte Carlo.

    Args:
        layer: From `last_layer`.
        per_sample: The loss of each sample.
        keep: p, the probability that a feature is kept; kept ones are divided by p.
        draws: Independent masks for every sample.
        seed: Of the masks, drawn on the CPU.

    Returns:
        The mean over samples and draws, with its standard error over draws (the samples are fixed).

    Raises:
        ValueError: If `keep` is not above 0 and at most 1, or there are fewer than 2 draws.
    """
    _check(keep)
    if draws < 2:
        raise ValueError(f"a standard error needs at least 2 draws, not {draws}")
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(draws, dtype=torch.float64)
    n = len(layer.features)
    with torch.no_grad():
        for at in range(0, n, CHUNK):
            rows = slice(at, at + CHUNK)
            features, outputs, targets = layer.features[rows], layer.outputs[rows], layer.targets[rows]
            plain = per_sample(outputs, targets).double()
            for draw in range(draws):
                kept = torch.rand(features.shape, generator=generator, dtype=torch.float32) < keep
                noise = kept.to(features.device).double() / keep - 1
                noisy = per_sample(outputs + (noise * features) @ layer.weight.T, targets).double()
                means[draw] += float((noisy - plain).sum()) / n
    return Gap(float(means.mean()), float(means.std(correction=1)) / math.sqrt(draws))


def _check(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"a probability to keep a feature lies above 0 and at most at 1, got {keep:g}")
