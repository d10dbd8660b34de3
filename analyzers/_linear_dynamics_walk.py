"""Measures the checkpoints of a run one after the other against linear models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers._linear_dynamics_data import Samples, Space, as_rows, spread
from dynprobe.analyzers._linear_dynamics_model import Schedule, Trained
from dynprobe.analyzers.numerics.evaluate import estimate
from dynprobe.analyzers.numerics.linear_model import decompose, ratio_of_means, split_residual
from dynprobe.analyzers.numerics.losses import Loss


class Walk:
    """Residuals, distances from the linear models and shown outputs of every checkpoint.

    Args:
        samples: On which everything is compared.
        space: Of answers and targets.
        loss: The run's.
        schedule: Which checkpoints the linear models reach.
        models: The linear models, by the name of their features.
        start: Outputs at which they start, shape (n_samples, n_outputs).
        constant: Whether the constant is in V_lin.
        show: Of how many samples the outputs are kept.
    """

    def __init__(
        self,
        samples: Samples,
        space: Space,
        loss: Loss,
        schedule: Schedule,
        models: Mapping[str, Trained],
        start: Tensor,
        *,
        constant: bool,
        show: int,
    ) -> None:
        self._samples, self._space, self._loss = samples, space, loss
        self._schedule, self._models, self._start = schedule, models, start
        self._target = space.target(samples.targets)
        ones = [torch.ones(len(samples), 1, dtype=torch.float64)] if constant else []
        columns = torch.cat([samples.inputs, *ones], 1)
        self.basis = decompose(columns, rtol=10 * samples.eps).left
        self._constant = constant
        self._shown = spread(len(samples), show)
        self._features = {name: model.of(samples.inputs) for name, model in models.items()}
        self._optimum = {name: self._features[name] @ model.optimum for name, model in models.items()}
        self._rows: list[dict[str, Any]] = []
        self._diverged = False

    def add(self, place: int, outputs: Tensor) -> None:
        """Measure a checkpoint, given its outputs on the samples."""
        answer = self._space.answer(outputs)
        split = split_residual(self.basis, self._target - answer, self._target)
        mean, stderr, _ = estimate(self._loss.per_sample(outputs, self._samples.targets))
        row: dict[str, Any] = {
            "residual_linear": split.inside,
            "residual_linear_stderr": split.inside_stderr,
            "residual_complement": split.outside,
            "residual_complement_stderr": split.outside_stderr,
            "loss": mean,
            "loss_stderr": stderr,
            "weight_decay_part": math.nan,
        }
        if place in self._schedule.reached:
            row["weight_decay_part"] = self._schedule.decay[self._schedule.reached.index(place)]
        flat = as_rows(outputs)
        row["sample_output"] = flat[self._shown].numpy()
        row["linear_output"] = np.full_like(row["sample_output"], math.nan)
        for i, name in enumerate(self._models):
            self._compare(row, place, name, flat, answer, shown=i == 0)
        self._rows.append(row)

    def _compare(
        self, row: dict[str, Any], place: int, name: str, flat: Tensor, answer: Tensor, *, shown: bool
    ) -> None:
        optimum = self._optimum[name]
        _append(row, "optimum_mse", *ratio_of_means(_squares(answer - optimum), _squares(optimum)))
        if place not in self._schedule.reached:
            for variable in ("relative_mse", "linear_loss", "batch_noise"):
                _append(row, variable, math.nan, math.nan)
            row.setdefault("batch_noise_std", []).append(math.nan)
            return
        at = self._schedule.reached.index(place)
        model = self._models[name]
        change = self._features[name] @ model.weights[at]
        noise, noise_stderr, noise_std = self._noise(name, change, at)
        _append(row, "batch_noise", noise, noise_stderr)
        row.setdefault("batch_noise_std", []).append(noise_std)
        linear = self._start + change
        self._diverged |= not bool(torch.isfinite(linear).all())
        _append(row, "relative_mse", *ratio_of_means(_squares(flat - linear), _squares(change)))
        losses = self._loss.per_sample(linear.reshape(-1, *self._space.shape), self._samples.targets)
        _append(row, "linear_loss", *estimate(losses)[:2])
        if shown:
            row["linear_output"] = linear[self._shown].numpy()

    def _noise(self, name: str, change: Tensor, at: int) -> tuple[float, float, float]:
        """Relative distance of descents on batches from that on all samples: mean, its error, and spread."""
        if self._schedule.batch_size is None:
            return math.nan, math.nan, math.nan
        if not self._schedule.batch_size:
            return 0.0, 0.0, 0.0
        draws = [self._features[name] @ weights for weights in self._models[name].on_batches[:, at]]
        found = torch.tensor([ratio_of_means(_squares(one - change), _squares(change))[0] for one in draws])
        mean, stderr, n = estimate(found)
        return mean, stderr, stderr * math.sqrt(n)

    def values(self) -> dict[str, Any]:
        """All checkpoints, stacked, and the coordinates."""
        size = self._target.shape[1]
        labels = self._samples.targets[self._shown]
        named = not labels.is_floating_point() and labels.dim() == 1 and size > 1
        return {
            "feature_set": np.array(list(self._models), dtype=object),
            **{name: np.array([row[name] for row in self._rows], dtype=float) for name in self._rows[0]},
            "sample": self._shown.numpy(),
            "output": np.arange(size),
            "shown_output": labels.numpy() if named else np.zeros(len(self._shown), dtype=np.int64),
            "n_evaluated": len(self._samples),
            "v_lin_dimension": self.basis.shape[1],
            "v_lin_chance": self.basis.shape[1] / len(self._samples),
        }

    def notes(self, models: Mapping[str, Trained]) -> list[str]:
        """What a reader has to know of V_lin and of the linear models."""
        n, dimension = len(self._samples), self.basis.shape[1]
        inside = "with the constant" if self._constant else "without the constant"
        notes = [
            f"V_lin, {inside}, has {dimension} of {n} dimensions: {100 * dimension / n:.0f} % of a random "
            "residual would lie in it"
        ]
        if dimension >= n:
            notes.append(
                "residual_complement is NaN: V_lin is all there is on so few samples; raise --samples"
            )
        if 0 in self._schedule.steps:
            notes.append("relative_mse is NaN where the linear models start: they have not moved yet")
        unstable = [
            name for name, model in models.items() if model.sharpness > 2 * (1 + self._schedule.momentum)
        ]
        if unstable or self._diverged:
            which = f" ({', '.join(unstable)})" if unstable else ""
            notes.append(f"a linear model{which} diverges at this learning rate")
        return notes


def _append(row: dict[str, Any], name: str, value: float, stderr: float) -> None:
    row.setdefault(name, []).append(value)
    row.setdefault(f"{name}_stderr", []).append(stderr)


def _squares(difference: Tensor) -> Tensor:
    return (difference**2).sum(1)
