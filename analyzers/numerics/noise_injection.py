"""Curvature felt by noise in the weights: the variance per filter that training with noise would settle at.

Minimised over σ (one per filter) and λ (one per tensor), the weights θ fixed:

    E_ε L(θ + σ∘ε) + β Σ_j [θ_j²/λ_l² + σ_j²/λ_l² + log λ_l² − log σ_j² − 1],   ε ~ N(0, I),

the loss of the authors' code, with twice the Kullback-Leibler divergence of N(θ, σ²) from N(0, λ²) behind β.
At the minimum E_ε ∂²L/∂θ_j², averaged over a filter, is F_f = 2β(σ_f⁻² − λ_l⁻²), and λ_l² = mean_l(θ² + σ²).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.model_function import ModelFunction
from dynprobe.analyzers.numerics.params import FilterAxis, filter_axis

PROBE = 0.01
"""Noise over the weights' size in the probes that find a place to start from."""
PROBES = 4
RATE = 0.1
"""Largest step in log σ² at first, falling to a tenth of it: bounded, so that no outlier throws σ off."""
TINY = 1e-12
BLOCKS = 8
"""Batch means over the second half, for a standard error that allows for correlation between steps."""


@dataclass(frozen=True)
class NoiseInjection:
    """What the noise settled at.

    Args:
        trace: Σ_j F_jj per parameter tensor that got noise, mean over the second half of the steps.
        stderr: Its Monte Carlo standard error, from batch means.
        total: The same for all tensors together.
        total_stderr: Its standard error.
        sigma: Final standard deviations per filter, per tensor.
        converged: Whether the error is within the tolerance and the two halves of the second half agree.
        steps: Pairs of noisy gradients that were taken.
    """

    trace: dict[str, float]
    stderr: dict[str, float]
    total: float
    total_stderr: float
    sigma: dict[str, Tensor]
    converged: bool
    steps: int


class _Tensor:
    """One parameter tensor: its filters, the logarithm of their noise, and Adam's two running means of it."""

    def __init__(self, value: Tensor, axis: FilterAxis, beta: float) -> None:
        self.axis, self.beta = axis, beta
        self.square = float(value.double().square().mean())
        self.numel = value.numel()
        self.filters = value.shape[axis]
        self.log_variance = torch.full(
            (self.filters,), math.log(PROBE**2 * self.square + TINY), dtype=torch.float64, device=value.device
        )
        self.mean = torch.zeros_like(self.log_variance)
        self.spread = torch.zeros_like(self.log_variance)

    @property
    def variance(self) -> Tensor:
        """σ² per filter."""
        return self.log_variance.exp()

    @property
    def prior(self) -> float:
        """λ² where it is stationary: the mean of θ² + σ²."""
        return self.square + float(self.variance.mean()) + TINY

    def sigma(self, value: Tensor) -> Tensor:
        """Standard deviations in the shape that multiplies the tensor."""
        shape = [1] * value.dim()
        shape[self.axis] = self.filters
        return self.variance.sqrt().to(value).reshape(shape)

    def curvature(self, noise: Tensor, difference: Tensor) -> Tensor:
        """Mean over each filter of ε (g⁺ − g⁻)/(2σ): an unbiased estimate of E ∂²L/∂θ_j²."""
        terms = (noise * difference).double().movedim(self.axis, 0).flatten(1).mean(1)
        return terms / (2 * self.variance.sqrt())

    def start(self, curvature: float) -> None:
        """All filters where they would be stationary for one curvature."""
        precision = max(curvature, 0.0) / (2 * self.beta) + 1 / (self.square + TINY)
        self.log_variance.fill_(-math.log(precision))

    def descend(self, felt: Tensor, step: int, rate: float) -> None:
        """One step of Adam along the objective's derivative by log σ², in units of β per weight."""
        slope = self.variance * (felt / (2 * self.beta) + 1 / self.prior) - 1
        self.mean = 0.9 * self.mean + 0.1 * slope
        self.spread = 0.99 * self.spread + 0.01 * slope.square()
        mean, spread = self.mean / (1 - 0.9**step), self.spread / (1 - 0.99**step)
        self.log_variance -= rate * mean / (spread.sqrt() + 1e-8)


def noise_injection(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss,
    *,
    steps: int,
    beta: float = 1e-7,
    tol: float = 0.05,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> NoiseInjection:
    """Trace of the curvature per tensor, as the noise feels it that minimises the objective above.

    Each step takes the gradients at θ + σ∘ε and θ − σ∘ε: of their difference nothing is left but curvature,
    so the gradient itself adds no variance. log σ² descends by Adam as in the authors' code, from where a few
    probes put it; λ follows in closed form. As there, only tensors with filters (two or more dimensions)
    get noise, one variance per filter; and of these no tensor that is zero throughout, for which λ, and with
    it σ, has no scale to go by.

    The curvature is that of the loss with the data's labels, smoothed over the noise: the Fisher information
    only where that equals the Hessian. β sets the size of the noise: σ² ≈ 2β/F,
    which raises the loss by β for each parameter.

    Cost: two gradients of the whole data per step, and eight to start.

    Args:
        model: Taken in eval mode, and left as it is.
        batches: Pairs (inputs, targets), re-iterable.
        loss: Any with one value per sample.
        steps: Pairs of gradients; the first half is for settling.
        beta: Weight of the divergence.
        tol: Relative standard error of the total that counts as converged.
        seed: Of the noise.
        progress: Told of every step.

    Raises:
        ValueError: If no parameter has filters and is not zero throughout.

    References:
        Achille, Rovere and Soatto, "Critical learning periods in deep networks", ICLR 2019, §3.
        Achille et al., "Task2Vec: task embedding for meta-learning", ICCV 2019, and its code, aws-cv-task2vec
        `variational.py`. Here the weights' own noise is drawn, not that of the layers' outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    given = dict(model.named_parameters())
    filters = filter_axis(model).items()
    axes = {name: axis for name, axis in filters if axis is not None and bool(given[name].any())}
    if not axes:
        raise ValueError("no parameter has two or more dimensions and is not zero, so none gets noise.")
    function = ModelFunction(model, parameters=list(axes))
    values = {name: leaf.detach().clone() for name, leaf in function.leaves.items()}
    tensors = {name: _Tensor(value, axes[name], beta) for name, value in values.items()}
    history: dict[str, list[float]] = {name: [] for name in tensors}

    def felt() -> dict[str, Tensor]:
        """Curvature of one pair of noisy gradients, per filter of each tensor."""
        noise = {
            name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            for name, value in values.items()
        }
        moves = {name: tensors[name].sigma(value) * noise[name] for name, value in values.items()}
        ahead = _gradient(function, batches, loss, {n: values[n] + moves[n] for n in values})
        behind = _gradient(function, batches, loss, {n: values[n] - moves[n] for n in values})
        return {name: t.curvature(noise[name], ahead[name] - behind[name]) for name, t in tensors.items()}

    probes = [felt() for _ in range(PROBES)]
    for name, tensor in tensors.items():
        tensor.start(sum(float(probe[name].mean()) for probe in probes) / PROBES)
    for step in range(steps):
        for name, curvature in felt().items():
            tensor = tensors[name]
            history[name].append(float(curvature.sum()) * tensor.numel / tensor.filters)
            tensor.descend(curvature, step + 1, RATE * (1 - 0.9 * step / steps))
        if progress is not None:
            progress("noise")
    second = {name: rows[steps // 2 :] for name, rows in history.items()}
    both = [sum(parts) for parts in zip(*second.values(), strict=True)]
    total, error = _batch_means(both)
    half = len(both) // 2
    (early, early_error), (late, late_error) = _batch_means(both[:half]), _batch_means(both[half:])
    drift = abs(early - late) <= 3 * math.hypot(early_error, late_error)
    found = {name: _batch_means(rows) for name, rows in second.items()}
    return NoiseInjection(
        trace={name: mean for name, (mean, _) in found.items()},
        stderr={name: stderr for name, (_, stderr) in found.items()},
        total=total,
        total_stderr=error,
        sigma={name: tensor.variance.sqrt() for name, tensor in tensors.items()},
        converged=bool(error <= tol * abs(total)) and drift,
        steps=steps,
    )


def _gradient(
    function: ModelFunction,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss,
    at: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all samples, float64."""
    leaves = {name: value.requires_grad_() for name, value in at.items()}
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in at.items()}
    n = 0
    for inputs, targets in batches:
        with torch.enable_grad():
            losses = loss.per_sample(function(inputs, leaves), targets)
        parts = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        for name, part in zip(leaves, parts, strict=True):
            total[name] += part
        n += len(targets)
    return {name: value / n for name, value in total.items()}


def _batch_means(series: list[float]) -> tuple[float, float]:
    """Mean and its standard error from the scatter of means over blocks; NaN for fewer than two values."""
    values = torch.tensor(series, dtype=torch.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    blocks = values.tensor_split(min(BLOCKS, len(values)))
    means = torch.stack([block.mean() for block in blocks])
    return float(values.mean()), float(means.std()) / math.sqrt(len(blocks))
