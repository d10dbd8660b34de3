"""Assembles what `gradient-covariance` reports, and what it takes for given of the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._training import training_facts
from dynprobe.analyzers.numerics.break_even import sgd_stability
from dynprobe.analyzers.numerics.covariance import GradientCovariance, minibatch_spectrum
from dynprobe.analyzers.numerics.directional import Directional
from dynprobe.analyzers.numerics.evaluate import estimate
from dynprobe.analyzers.numerics.lanczos import Eigenpairs

Floats = NDArray[np.float64]

SHARED_RANK = 5
"""Leading eigenvectors of K that mini-batch gradients are projected on (Jastrzebski et al. 2020: ‖g₅‖)."""
VECTOR = 0.1
"""How much further than the eigenvalues need the Hessian's eigenvectors are taken."""
CLOSE = 0.01
"""Relative gap of the two leading Hessian eigenvalues below which the leading eigenvector says little."""


@dataclass(frozen=True)
class Training:
    """How the run was trained at one step; NaN where nothing says.

    Attributes:
        learning_rate: η.
        batch_size: S.
        n_training: N.
        notes: What is missing or was assumed, for the reader.
    """

    learning_rate: float
    batch_size: float
    n_training: float
    notes: list[str] = field(default_factory=list)


def training_of(
    training: Mapping[str, Any] | None,
    step: float | None,
    *,
    n_measured: int,
    n_source: int,
    learning_rate: float = 0.0,
    batch_size: int = 0,
    n_training: int = 0,
) -> Training:
    """η, S and N: the options where they are not 0, else the manifest, N at last from the data source.

    Args:
        training: The manifest's `[training]`.
        step: Of the checkpoint, for a schedule of η.
        n_measured: Samples measured on.
        n_source: Samples of the data source that they are part of.
        learning_rate: From the command line.
        batch_size: From the command line.
        n_training: From the command line.

    Raises:
        OptionError: If the options cannot be true together, or with the samples measured.
    """
    facts = training_facts(training, step, learning_rate=learning_rate)
    notes = list(facts.notes)
    eta = facts.learning_rate if facts.learning_rate is not None else math.nan
    size = float(batch_size or facts.batch_size or math.nan)
    total = float(n_training or facts.n_samples or n_source)
    if n_training and n_training < n_measured:
        raise OptionError(
            f"train-samples {n_training} is fewer than the {n_measured} samples measured.",
            "Give the size of the whole training set, or measure on it.",
        )
    if size > total:
        found = f"a training batch of {size:.0f} samples is larger than the training set of {total:.0f}"
        if batch_size or n_training:
            raise OptionError(f"{found}.", "Check --train-batch-size and --train-samples.")
        notes.append(
            f"{found}, so stability and critical_learning_rate are NaN; give --train-batch-size or "
            "--train-samples"
        )
        size = math.nan
    elif math.isnan(size):
        notes.append(
            "stability and critical_learning_rate are NaN: the batch size is not known; give "
            "--train-batch-size"
        )
    if math.isnan(eta):
        notes.append("stability is NaN: the learning rate is not known; give --learning-rate")
    elif eta == 0:
        notes.append("stability is NaN where the learning rate is 0: nothing moves")
    if not facts.is_sgd or facts.momentum:
        how = "an optimizer other than SGD" if not facts.is_sgd else f"momentum {facts.momentum:g}"
        notes.append(f"stability is that of plain SGD, and the run used {how}")
    if total < n_measured:
        notes.append(f"the manifest's {total:.0f} training samples are fewer than the {n_measured} measured")
    elif total > n_measured:
        notes.append(f"stability rests on {n_measured} of {total:.0f} training samples")
    return Training(eta, size, total, notes)


def loss_change(
    loss: Floats, step: float | None, previous: Mapping[str, Any] | None
) -> tuple[float, float, str]:
    """L(θ_t) − L(θ_{t−1}) on the same samples with its paired standard error, or why there is none.

    Args:
        loss: ℓ_i at this checkpoint, shape (n,).
        step: Its step.
        previous: What was measured at the one before, or None.

    Returns:
        Change, standard error, and a note that is empty where they are numbers.
    """
    if previous is None:
        return math.nan, math.nan, "loss_change is NaN at the first checkpoint: there is none before it"
    before = float(previous["measured_step"])
    if step is None or not math.isfinite(before):
        return math.nan, math.nan, "loss_change is NaN: the checkpoints have no step"
    if step - before != 1:
        note = f"loss_change is NaN where the checkpoint before is {step - before:g} steps earlier, not 1"
        return math.nan, math.nan, note
    change = loss - np.asarray(previous["sample_loss"], dtype=float)
    return float(change.mean()), _stderr(change), ""


def minimum_distance(slope: Floats, curvature: Floats) -> tuple[float, float]:
    """|ḡ·e|/λ, how far the minimum along e lies in the local quadratic model, with its standard error.

    The standard error is first order in the samples, the direction held fixed. NaN where λ ≤ 0: there is no
    minimum along e.
    """
    height, width = float(slope.mean()), float(curvature.mean())
    if width <= 0:
        return math.nan, math.nan
    return abs(height) / width, _stderr(slope / width - height / width**2 * curvature)


def of_hessian(pairs: Eigenpairs, rounding: float, notes: list[str]) -> dict[str, Any]:
    """Leading eigenvalue of the Hessian, and the ratio of the last to it."""
    value = pairs.eigenvalue
    found = {
        "hessian_eigenvalue": value[0],
        "hessian_residual": _resolved(pairs.residual, value, rounding)[0],
    }
    if len(value) > 1:
        found |= {"hessian_ratio": value[-1] / value[0] if value[0] > 0 else math.nan}
        found |= {"hessian_rank": len(value)}
        if value[0] - value[1] < CLOSE * abs(value[0]):
            notes.append(
                "the two largest Hessian eigenvalues nearly coincide: alignment and stability are those of "
                "one vector of a plane"
            )
    return found


def of_curvature(pairs: Eigenpairs, tol: float, along: Directional, facts: Training) -> dict[str, Any]:
    """Stability and what else follows from each sample's slope and curvature along e_H."""
    slope, curvature = along.slope.numpy(), along.curvature.numpy()
    eigenvalue = float(pairs.eigenvalue[0])
    error = max(float(pairs.error_bound[0]), tol * abs(eigenvalue))  # the tolerance where it is met
    stable = sgd_stability(
        curvature,
        eigenvalue=eigenvalue,
        error=error,
        variance_error=math.sqrt(VECTOR * error / abs(eigenvalue)) if eigenvalue else 0.0,
        learning_rate=facts.learning_rate,
        batch_size=facts.batch_size,
        n_training=facts.n_training,
    )
    distance, distance_stderr = minimum_distance(slope, curvature)
    return {
        "per_sample_curvature_std": stable.curvature_std,
        "stability": stable.value,
        "stability_stderr": stable.stderr,
        "critical_learning_rate": stable.critical_learning_rate,
        "critical_learning_rate_stderr": stable.critical_learning_rate_stderr,
        "learning_rate": facts.learning_rate,
        "train_batch_size": facts.batch_size,
        "train_samples": facts.n_training,
        "minimum_distance": distance,
        "minimum_distance_stderr": distance_stderr,
    }


def _resolved(residual: Floats, eigenvalue: Floats, rounding: float) -> Floats:
    """Residuals no smaller than the rounding of a product: what is below says nothing."""
    resolved: Floats = np.maximum(residual, rounding * np.abs(eigenvalue).max())
    return resolved


def of_covariance(found: GradientCovariance, notes: list[str]) -> dict[str, Any]:
    """Spectrum and trace of K with their errors, noise scale, loss."""
    mean, stderr, _ = estimate(torch.from_numpy(found.loss))
    values = found.estimates() | {
        "rank": np.arange(1, len(found.eigenvalue) + 1),
        "route": found.route,
        "loss": mean,
        "loss_stderr": stderr,
    }
    if found.route == "lanczos":
        values["eigenvalue_residual"] = _resolved(found.residual, found.eigenvalue, found.rounding)
    if found.vanishes:
        notes.append("all gradients are equal but for rounding: K is zero, and its ratios and directions NaN")
        return values
    if len(found.loss) < 3:
        notes.append("standard errors of K and trace_ratio are NaN: they need three samples")
    elif math.isnan(values["trace_ratio_stderr"]):
        notes.append("trace_ratio_stderr is NaN: without some samples all gradients are equal")
    if math.isnan(values["noise_scale"]):
        notes.append("noise_scale is NaN: the mean gradient is not resolved from the noise of these samples")
    return values


def of_minibatches(found: GradientCovariance, size: int, notes: list[str]) -> dict[str, Any]:
    """K as published, from the gradients of disjoint mini-batches; NaN where fewer than three fit."""
    names = ("minibatch_eigenvalue", "minibatch_trace", "minibatch_ratio")
    count = len(found.partition.minibatch)
    values: dict[str, Any] = dict.fromkeys(names, math.nan)
    values |= {"minibatch_size": float(size) if size else math.nan, "minibatch_count": count or math.nan}
    shares = ("top_gradient_share", "top_gradient_share_stderr")
    if not count:
        return values | dict.fromkeys(shares, math.nan)
    spectrum = minibatch_spectrum(found.batch_gram, found.rounding)
    if math.isnan(spectrum.ratio) and not found.vanishes:
        notes.append("minibatch_ratio is NaN: the smallest eigenvalue is not above rounding")
    rank = min(SHARED_RANK, found.score.shape[1])
    mean, stderr, _ = estimate(torch.from_numpy(found.minibatch_share(rank)))
    if math.isnan(mean) and not found.vanishes:
        notes.append("top_gradient_share is NaN: the gradient of a mini-batch is zero")
    drawn = (spectrum.eigenvalue, spectrum.trace, spectrum.ratio)
    return values | dict(zip(names, drawn, strict=True)) | dict(zip(shares, (mean, stderr), strict=True))


def of_batchnorm(model: nn.Module) -> dict[str, float]:
    """‖γ‖ of the BatchNorm layer that comes last among the modules."""
    scales = [m.weight for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    scales = [scale for scale in scales if scale is not None]
    return {"batchnorm_norm": float(scales[-1].detach().double().norm())} if scales else {}


def _stderr(values: Floats) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
