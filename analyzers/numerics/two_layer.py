"""Recognises a fully connected network with one hidden layer, and the linear model that it starts as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

REACH, NODES = 8.0, 4096
"""Gaussian expectations are midpoint sums of this many nodes over ± so many standard deviations."""
AGREE = 1e-3
"""Largest deviation of the recognised formula from the network, relative to its outputs."""
MOST_VALUES = 20_000_000
"""Numbers that the inputs, or the hidden units, of one probe may take."""
MOST_UNITS = 256
"""Hidden units with which formula and network are compared."""


class NotTwoLayer(Exception):
    """The network is no f(x) = V Φ(W x + β b) + γ c; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class TwoLayer:
    """A network f(x) = V Φ(W x + β b) + γ c, where Φ holds the activation and all constant factors.

    Attributes:
        hidden: Name of W, shape (width, n_inputs).
        output: Name of V, shape (n_outputs, width).
        hidden_bias: Name of b, or "".
        output_bias: Name of c, or "".
        hidden_bias_scale: β.
        output_bias_scale: γ.
    """

    hidden: str
    output: str
    hidden_bias: str
    output_bias: str
    hidden_bias_scale: float = 0.0
    output_bias_scale: float = 0.0


def recognise(model: nn.Module, inputs: Tensor) -> TwoLayer:
    """Find out whether a network is a two-layer fully connected one, from its parameters and by probing it.

    Parameters are replaced by zeros and ones in calls of the model, which shows Φ and the factors of the
    biases whatever the code between the layers is; the formula is then compared with the network itself.

    Args:
        model: In eval mode; left as it is.
        inputs: A few samples, whatever their shape; flattened they are x.

    Raises:
        NotTwoLayer: If it is none.
    """
    names = _names(model, inputs)
    try:
        with torch.enable_grad():
            beta, gamma = _bias_scales(model, names, inputs)
        found = TwoLayer(names.hidden, names.output, names.hidden_bias, names.output_bias, beta, gamma)
        largest, scale = _deviation(model, found, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NotTwoLayer("it cannot be called with single weights") from error
    if not largest <= AGREE * scale:
        raise NotTwoLayer("it does more than two linear maps and an activation of each unit")
    return found


def _names(model: nn.Module, inputs: Tensor) -> TwoLayer:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    if len(matrices) != 2 or len(matrices) + len(vectors) != len(shapes) or len(vectors) > 2:
        raise NotTwoLayer("its parameters are not two matrices, with or without biases")
    hidden, output = matrices
    if shapes[hidden][1] != inputs[0].numel() or shapes[output][1] != shapes[hidden][0]:
        raise NotTwoLayer("its matrices do not follow each other from inputs to outputs")
    width, n_outputs = shapes[hidden][0], shapes[output][0]
    hidden_bias = next((v for v in vectors if shapes[v][0] == width), "")
    output_bias = next((v for v in vectors if v != hidden_bias and shapes[v][0] == n_outputs), "")
    if len(vectors) != bool(hidden_bias) + bool(output_bias):
        raise NotTwoLayer("its vectors are no biases of the two layers")
    if (
        width == n_outputs
        and len(vectors) == 1
        and list(shapes).index(hidden_bias) > list(shapes).index(output)
    ):
        hidden_bias, output_bias = "", hidden_bias  # of equal sizes, what follows V belongs to V
    return TwoLayer(hidden, output, hidden_bias, output_bias)


def _probe(
    model: nn.Module, names: TwoLayer, inputs: Tensor, values: Tensor, biases: Mapping[str, Tensor]
) -> Tensor:
    """First output of the network with one unit, weights 1, on inputs (value, 0, 0, …)."""
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name in (names.hidden, names.output):
        zeros[name][0, 0] = 1.0
    flat = torch.nn.functional.pad(values[:, None], (0, inputs[0].numel() - 1))
    outputs = torch.func.functional_call(
        model, {**zeros, **biases}, (flat.reshape(-1, *inputs.shape[1:]).to(inputs),)
    )
    if not isinstance(outputs, Tensor):
        raise NotTwoLayer("it does not return a tensor")
    return outputs.reshape(len(values), -1)[:, 0]


def _bias_scales(model: nn.Module, names: TwoLayer, inputs: Tensor) -> tuple[float, float]:
    """β and γ: the derivatives by a bias over those by what it is added to."""
    values = torch.linspace(0.25, 2.0, 8, dtype=inputs.dtype, device=inputs.device, requires_grad=True)
    biases = {
        name: torch.zeros_like(model.get_parameter(name)).requires_grad_()
        for name in (names.hidden_bias, names.output_bias)
        if name
    }
    total = _probe(model, names, inputs, values, biases).sum()
    slope, *by_bias = torch.autograd.grad(total, [values, *biases.values()])
    found = {name: float(g[0]) for name, g in zip(biases, by_bias, strict=True)}
    beta = found.get(names.hidden_bias, 0.0) / float(slope.sum()) if names.hidden_bias else 0.0
    return beta, found.get(names.output_bias, 0.0) / len(values)


def activation(model: nn.Module, found: TwoLayer, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Φ and Φ' at values of any shape, in the precision of the network."""
    width = model.get_parameter(found.hidden).shape[0]
    rows = max(1, MOST_VALUES // max(inputs[0].numel(), width))
    parts = []
    for part in torch.split(values.detach().flatten().to(inputs), rows):
        at = part.requires_grad_()
        with torch.enable_grad():
            phi = _probe(model, found, inputs, at, {})
            (slope,) = torch.autograd.grad(phi.sum(), at)
        parts.append((phi.detach(), slope))
    phis, slopes = (torch.cat(column).reshape(values.shape) for column in zip(*parts, strict=True))
    return phis, slopes


def _deviation(model: nn.Module, found: TwoLayer, inputs: Tensor) -> tuple[float, float]:
    """Largest difference between formula and network with some of its units, and the size of its terms."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    width = weights[found.hidden].shape[0]
    units = torch.linspace(0, width - 1, min(width, MOST_UNITS)).round().long()
    mask = torch.zeros(width).to(inputs)
    mask[units] = 1
    few = inputs[:4]
    before = few.flatten(1) @ weights[found.hidden][units].T
    if found.hidden_bias:
        before = before + found.hidden_bias_scale * weights[found.hidden_bias][units]
    phi, _ = activation(model, found, inputs, before)
    outputs = phi @ weights[found.output][:, units].T
    # a symmetric start has outputs that cancel: what counts is the size of the terms
    size = max(
        float(outputs.abs().max()), float(weights[found.output][:, units].abs().max() * phi.abs().max())
    )
    if found.output_bias:
        outputs = outputs + found.output_bias_scale * weights[found.output_bias]
    with torch.no_grad():
        masked = {**weights, found.output: weights[found.output] * mask}
        own = torch.func.functional_call(model, masked, (few,))
    return float((outputs - own.reshape(len(few), -1)).abs().max()), size


@dataclass(frozen=True)
class EarlyFeatures:
    """Factors of ψ(x) = [√a x, √c, t₀ + t₁ρ + t₂ρ²], ρ = s(x)/s − 1, in units of the network's parameters.

    s(x)² = σ_w²‖x‖² + β²σ_b² is the variance of a hidden unit's input at x, s² its mean over the samples.

    Attributes:
        linear: a.
        constant: c.
        norm: t₀, t₁, t₂.
        weight_variance: σ_w².
        bias_variance: β²σ_b².
        scale: s.
    """

    linear: float
    constant: float
    norm: tuple[float, float, float]
    weight_variance: float
    bias_variance: float
    scale: float

    def __call__(self, inputs: Tensor, *, norm: bool = True) -> Tensor:
        """ψ of inputs of shape (n_samples, n_inputs), shape (n_samples, n_inputs + 2).

        Args:
            inputs: One row per sample.
            norm: Whether the terms with ρ are there; otherwise t₀ stands alone.
        """
        size = (self.weight_variance * (inputs**2).sum(1) + self.bias_variance).sqrt()
        rho = (size / self.scale - 1) * norm
        first, second, third = self.norm
        last = first + second * rho + third * rho**2
        constant = torch.full_like(last, math.sqrt(self.constant))
        return torch.cat([math.sqrt(self.linear) * inputs, constant[:, None], last[:, None]], 1)


def early_features(model: nn.Module, found: TwoLayer, sample: Tensor, inputs: Tensor) -> EarlyFeatures:
    """Compute the features of the linear model that a two-layer network follows early in training.

    The tangent kernel of both layers and their biases, expanded in the correlation of two inputs: to first
    order in a product of derivatives, to second in one of activations. For f = m^(−1/2) Σ v_r φ(w_r·x/√d)
    with w ~ N(0, 1), v = ±1 and mean ‖x‖² = d these are the features of the paper,

        ψ = [√(2/d) ζ x, √(3/(2d)) ν, ϑ₀ + ϑ₁ρ + ϑ₂ρ²],  ρ = ‖x‖/√d − 1,
        ζ = E φ'(g), ν = E[gφ'(g)] √(Tr Σ²/d), ϑ₀ = E φ(g), ϑ₁ = E[gφ'(g)], ϑ₂ = E[(g³/2 − g)φ'(g)];

    other scalings of weights, inputs and activation, and biases, are accounted for in the same expansion. It
    assumes inputs of mean zero, weights drawn independently, and the sum over units close to its mean, which
    costs a relative error of about 0.6 d/m.

    Args:
        model: At its initialisation, in eval mode.
        found: From `recognise`.
        sample: A batch of inputs in the shape that the model takes.
        inputs: The training inputs, float64 of shape (n_samples, n_inputs) on the CPU.

    References:
        Hu, Xiao, Adlam and Pennington, NeurIPS 2020, theorems 3.2, 3.5 and the one for both layers.
    """
    weights = {name: p.detach().double().cpu() for name, p in model.named_parameters()}
    width = weights[found.hidden].shape[0]
    weight_variance = float((weights[found.hidden] ** 2).mean())
    gain = float((weights[found.output] ** 2).sum(1).mean())
    bias = weights.get(found.hidden_bias)
    bias_variance = 0.0 if bias is None else found.hidden_bias_scale**2 * float((bias**2).mean())
    trace = float((inputs**2).sum(1).mean())
    variance = weight_variance * trace + bias_variance
    scale = math.sqrt(variance)

    step = 2 * REACH / NODES
    g = torch.arange(NODES, dtype=torch.float64) * step + step / 2 - REACH
    density = torch.exp(-(g**2) / 2) / math.sqrt(2 * math.pi) * step
    phi, dphi = (values.double().cpu() for values in activation(model, found, sample, scale * g))

    def mean(values: Tensor) -> float:
        return float((values * density).sum())

    zeta, first = mean(dphi), mean(g * dphi)
    square = second_moment_trace(inputs)
    beta2 = found.hidden_bias_scale**2
    both = gain + width * weight_variance
    linear = zeta**2 * both
    linear += gain * first**2 * (beta2 * weight_variance + bias_variance) / variance
    constant = first**2 * weight_variance * square * (gain + width * weight_variance / 2) / variance
    constant += gain * beta2 * (zeta**2 + first**2 * bias_variance / variance)
    constant += width * zeta**2 * bias_variance + found.output_bias_scale**2
    root = math.sqrt(width)
    third = scale * mean((g**3 / 2 - g) * dphi)
    norm = (root * mean(phi), root * scale * first, root * third)
    return EarlyFeatures(linear, constant, norm, weight_variance, bias_variance, scale)


def second_moment_trace(inputs: Tensor) -> float:
    """Estimate Tr Σ², Σ = E xxᵀ, without bias: the mean of (x·x')² over pairs of different samples."""
    n = len(inputs)
    gram = inputs.T @ inputs if inputs.shape[1] <= n else inputs @ inputs.T
    own = float(((inputs**2).sum(1) ** 2).sum())
    return max(float((gram**2).sum()) - own, 0.0) / (n * (n - 1)) if n > 1 else math.nan
