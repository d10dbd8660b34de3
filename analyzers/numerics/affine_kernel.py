"""How close a network's tangent kernel is to an affine function of the inputs' inner products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import Inputs, call

MOST_SAMPLES, FEWEST_SAMPLES = 48, 8
MOST_OUTPUTS = 10
MOST_VALUES = 200_000_000
"""Numbers that the gradients of one output at all samples may take."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AffineKernel:
    """The fit K(x, x') ≈ a x·x' + b over pairs of different samples, with a, b ≥ 0.

    Attributes:
        slope: a.
        slope_stderr: Its standard error, a jackknife over samples.
        constant: b.
        constant_stderr: Likewise.
        explained: Part of the kernel's variance over pairs that the fit explains; NaN where it has none.
        n_samples: Samples whose pairs were used.
        n_gradients: Gradients that were computed.
    """

    slope: float
    slope_stderr: float
    constant: float
    constant_stderr: float
    explained: float
    n_samples: int
    n_gradients: int

    def features(self, inputs: Tensor) -> Tensor:
        """√a x and √b, whose inner products are the fit: shape (n_samples, n_inputs + 1)."""
        constant = torch.full((len(inputs), 1), math.sqrt(self.constant), dtype=inputs.dtype)
        return torch.cat([math.sqrt(self.slope) * inputs, constant], 1)


def n_kernel_samples(model: nn.Module, n: int) -> int:
    """How many samples the kernel is computed on: fewer for a network with very many parameters."""
    n_parameters = sum(p.numel() for p in model.parameters())
    return min(n, MOST_SAMPLES, max(FEWEST_SAMPLES, MOST_VALUES // max(n_parameters, 1)))


def tangent_kernel(model: nn.Module, inputs: Inputs) -> tuple[Floats, int]:
    """Compute K(x, x') = Σ_k ∇f_k(x)·∇f_k(x') / n_outputs by automatic differentiation.

    Args:
        model: In eval mode; its `.grad` is not touched.
        inputs: A batch; every sample costs one gradient per output, of at most 10 outputs evenly chosen.

    Returns:
        The kernel, shape (n_samples, n_samples), and how many gradients it took.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        outputs = call(model, inputs).flatten(1)
        chosen = np.unique(np.linspace(0, outputs.shape[1] - 1, MOST_OUTPUTS).round().astype(int)).tolist()
        kernel = torch.zeros(len(outputs), len(outputs), dtype=torch.float64)
        for k in chosen:
            rows = [_gradient(outputs[i, k], parameters) for i in range(len(outputs))]
            stacked = torch.stack(rows)
            kernel += (stacked @ stacked.T).double().cpu() / len(chosen)
    return kernel.numpy(), len(outputs) * len(chosen)


def _gradient(output: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def fit_affine(kernel: Floats, inputs: Floats, n_gradients: int = 0) -> AffineKernel:
    """Fit a x·x' + b to a kernel, over pairs of different samples.

    The diagonal is left out: there the kernel holds the variance over directions that x·x' has no part in.

    Args:
        kernel: Shape (n_samples, n_samples).
        inputs: Shape (n_samples, n_inputs).
        n_gradients: For the record.

    References:
        Hu, Xiao, Adlam and Pennington, NeurIPS 2020: the tangent kernel at initialisation is close to an
        affine transform of the data kernel, for two layers by theorem, for deeper networks by measurement.
    """
    n = len(kernel)
    products = inputs @ inputs.T
    pairs = ~np.eye(n, dtype=bool)
    slope, constant = _nonnegative(products[pairs], kernel[pairs])
    rest = kernel[pairs] - slope * products[pairs] - constant
    spread = float(((kernel[pairs] - kernel[pairs].mean()) ** 2).sum())
    explained = 1 - float((rest**2).sum()) / spread if spread > 0 else math.nan
    without = []
    for i in range(n if n > FEWEST_SAMPLES else 0):
        keep = pairs.copy()
        keep[i, :] = keep[:, i] = False
        without.append(_nonnegative(products[keep], kernel[keep]))
    errors = (
        np.sqrt((n - 1) / n * ((np.array(without) - np.mean(without, axis=0)) ** 2).sum(0))
        if without
        else np.full(2, math.nan)
    )
    return AffineKernel(slope, float(errors[0]), constant, float(errors[1]), explained, n, n_gradients)


def _nonnegative(products: Floats, values: Floats) -> tuple[float, float]:
    scale = float(np.abs(products).max(initial=0.0)) or 1.0
    (slope, constant), _ = nnls(np.stack([products / scale, np.ones_like(products)], 1), values)
    return float(slope / scale), float(constant)
