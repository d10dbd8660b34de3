"""The parts of a Fisher measurement: trace, empirical trace, KL check, Kronecker factors, noise injection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._sampling import Meter
from dynprobe.analyzers.numerics import kfac as kronecker
from dynprobe.analyzers.numerics import noise_injection as noise
from dynprobe.analyzers.numerics.fisher_trace import (
    GROUP,
    SquaredNorms,
    exact_fisher_trace,
    gradient_moments,
    sampled_fisher_trace,
)
from dynprobe.analyzers.numerics.kl_check import kl_check
from dynprobe.analyzers.numerics.losses import IGNORED_TARGET, Loss
from dynprobe.analyzers.numerics.model_function import NoSecondDerivative
from dynprobe.analyzers.numerics.output_factor import output_factor
from dynprobe.analyzers.numerics.params import layers_of
from dynprobe.analyzers.numerics.per_sample import PerSamplePass, settle

SQUARED = "loss per squared parameter"
SLOW_BYTES = 2**30
"""What the gradients of a batch's samples may take where no layer rule makes them small."""
NOT_ONE = 1e-3
"""How far from one the soft labels of a sample may sum up."""
NAMED = 4
"""Parameters that a note names before it says how many more there are."""


class Task:
    """One checkpoint's measurement, and what has been found of it.

    Args:
        model: In eval mode.
        batches: The data.
        loss: The loss.
        progress: Called with (done, total, what), or None.
        seed: Of everything random.

    Raises:
        OptionError: If the model has no parameters.

    Attributes:
        values: By the names of the report.
        notes: For the reader.
        reasons: Why it is not converged.
        spent: Passes over all data.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[tuple[Any, Tensor]], loss: Loss, progress: Any, seed: int
    ) -> None:
        if not list(model.parameters()):
            raise OptionError(
                "the model has no parameters, and the Fisher information is about these.",
                "Are its weights buffers? Name another model with --model.",
            )
        self._model, self._batches, self._loss, self._seed = model, batches, loss, seed
        self._progress, self._meter = progress, Meter(progress, 0)
        self._layers = layers_of(name for name, _ in model.named_parameters())
        self._routes = settle(model, batches)
        self._exact, self._columns = True, 0
        self.values: dict[str, Any] = {"layer": np.array(list(self._layers), dtype=object)}
        self.notes: list[str] = []
        self.reasons: list[str] = []
        self.spent = {"forwards": 0, "backwards": 0}

    def choose(self, method: str, max_columns: int, noise_steps: int) -> None:
        """Exact or sampled, from the outputs of the first batch and the layers they come from.

        Raises:
            OptionError: If the loss defines no distribution over labels.
        """
        inputs, targets = self._batches[0]
        passed = PerSamplePass(self._model, inputs, routes=self._routes)
        try:
            factor = output_factor(self._loss, passed.outputs[:1], targets[:1])
        except ValueError as error:
            raise OptionError(str(error), "Choose one of these with --loss.") from error
        self._columns = factor.n_columns
        slow = [name for name, _ in self._model.named_parameters() if name in self._routes.slow]
        sizes = {name: p.numel() * p.element_size() for name, p in self._model.named_parameters()}
        room = len(passed.outputs) * sum(sizes[name] for name in slow) <= SLOW_BYTES
        quick = not slow or (self._routes.vectorised and room)
        self._exact = method == "exact" or (method == "auto" and self._columns <= max_columns and quick)
        if slow:
            self.notes.append(
                f"no layer rule for the gradients of single samples of {_listed(slow)}: "
                + (self._slow_route() if self._exact else f"random signs over groups of {GROUP} samples")
            )
        if passed.outputs.dim() > 2:
            self.notes.append(
                "a sample has several positions: the Fisher information is their mean, the empirical trace "
                "is that of the sample's mean gradient"
            )
        self._note_labels()
        passes = (self._columns if self._exact else 8) + 1
        self._meter = Meter(self._progress, passes * len(self._batches) + noise_steps)

    def _slow_route(self) -> str:
        return "vectorised over samples" if self._routes.vectorised else "one sample after the other"

    def _note_labels(self) -> None:
        """What is out of the ordinary with the data's labels."""
        targets = [t[:, 1:] if self._loss.name == "causal_lm" else t for _, t in self._batches]
        if not self._loss.name.startswith(("cross_entropy", "causal_lm")):
            return
        if not targets[0].is_floating_point():
            without = sum(int((t == IGNORED_TARGET).reshape(len(t), -1).all(1).sum()) for t in targets)
            if without:
                self.notes.append(
                    f"no traces: {without} of the samples have no target that counts, only {IGNORED_TARGET}"
                )
        elif any(float((t.double().sum(1) - 1).abs().max()) > NOT_ONE for t in targets):
            self.notes.append(
                "the soft labels of a sample do not sum to one: the trace of F is not that of the Hessian or "
                "the Gauss-Newton matrix of this loss"
            )

    def _tell(self, what: str) -> None:
        self._meter.add(1, what)

    def trace(self, tol: float, max_draws: int) -> None:
        """Tr F whole and by layer."""
        if self._exact:
            found = exact_fisher_trace(
                self._model, self._batches, self._loss, routes=self._routes, progress=self._tell
            )
            method = f"exact, {self._columns} columns"
        else:
            found = sampled_fisher_trace(
                self._model,
                self._batches,
                self._loss,
                tol=tol,
                max_draws=max_draws,
                seed=self._seed,
                routes=self._routes,
                progress=self._tell,
            )
            method = f"sampled, {found.draws} draws"
        total, groups = found.estimate(), len(found.sizes)
        if not found.converged:
            part = found.draw_stderr / total.value if total.value > 0 else math.nan
            self.reasons.append(
                f"after {found.draws} draws their standard error is {part:.2g} of the trace, above {tol:g}"
                if not part <= tol
                else f"draws and groups of samples are too few to tell the error: {found.draws} by {groups}"
            )
        if groups == 1:
            self.notes.append(
                "one sample: no standard error over samples"
                if total.n_samples == 1
                else f"{GROUP} samples or fewer: no standard error over samples; see trace_draw_stderr"
            )
        by_layer = [found.estimate(names) for names in self._layers.values()]
        traces = np.array([layer.value for layer in by_layer])
        if total.value == 0:
            self.notes.append("the trace is zero to all digits, so no layer has a share of it")
        elif not math.isfinite(total.value):
            self.notes.append("the trace is not finite: gradients or outputs of some samples are not")
        self.values |= {
            "trace": total.value,
            "trace_stderr": total.stderr,
            "trace_draw_stderr": found.draw_stderr,
            "draws": found.draws,
            "method": method,
            "layer_trace": traces,
            "layer_trace_stderr": np.array([layer.stderr for layer in by_layer]),
            "layer_share": traces / total.value if total.value > 0 else np.full(len(traces), math.nan),
        }
        self._count(found)

    def _count(self, found: SquaredNorms) -> None:
        self.spent["forwards"] += 1
        self.spent["backwards"] += found.backwards

    def empirical(self) -> None:
        """The second moment of the gradients with the data's labels, and their mean, by layer."""
        found = gradient_moments(
            self._model,
            self._batches,
            self._loss,
            exact=self._exact,
            seed=self._seed,
            routes=self._routes,
            progress=self._tell,
        )
        if found.squares.draws:
            self.notes.append(
                f"the empirical trace is sampled too: {found.squares.draws} draws, which cause a standard "
                f"error of {found.squares.draw_stderr:.2g}"
            )
        total, layers = found.squares.estimate(), self._layers.values()
        self.values |= {
            "empirical_trace": total.value,
            "empirical_trace_stderr": total.stderr,
            "layer_empirical_trace": np.array([found.squares.estimate(names).value for names in layers]),
            "gradient_mean_norm": np.array([found.mean_norm(names) for names in layers]),
            "gradient_std": np.array([found.std(names) for names in layers]),
        }
        self._count(found.squares)

    def kl(self, size: float) -> None:
        """The divergence that a small random change makes, beside its prediction."""
        try:
            found = kl_check(self._model, self._batches, self._loss, size=size, seed=self._seed)
        except NoSecondDerivative as error:
            self.notes.append(f"no KL check: {error}")
            self.values |= dict.fromkeys(("kl", "kl_stderr", "kl_quadratic", "kl_ratio"), math.nan)
            return
        if any(torch.finfo(p.dtype).bits < 32 for p in self._model.parameters()):
            self.notes.append("in half precision kl and kl_ratio are mostly rounding: use --dtype float32")
        self.values |= {
            "kl": found.divergence.value,
            "kl_stderr": found.divergence.stderr,
            "kl_quadratic": found.quadratic,
            "kl_ratio": found.ratio,
        }
        self.spent["forwards"] += 3
        self.spent["backwards"] += 2

    def kfac(self, damping: float, max_columns: int) -> None:
        """Kronecker factors per layer: determinant and rank with the damping ε of the whole network."""
        found = kronecker.kronecker_factors(
            self._model,
            self._batches,
            self._loss,
            max_columns=max_columns,
            seed=self._seed,
            routes=self._routes,
        )
        epsilon = found.damping(damping)
        known = [_of_module(found.layers, layer, names) for layer, names in self._layers.items()]
        if found.left_out:
            self.notes.append(
                f"Kronecker factors cover {found.covered:.1%} of the parameters; "
                f"not {_listed(found.left_out)}"
            )
        if not epsilon > 0:
            self.notes.append("no Kronecker factor has an eigenvalue above zero: no determinant")
        measures: dict[str, Callable[[kronecker.LayerFactors], float]] = {
            "log_determinant": lambda layer: layer.log_determinant(epsilon),
            "pseudo_log_determinant": lambda layer: layer.pseudo_log_determinant(epsilon),
            "effective_rank": lambda layer: layer.rank(epsilon),
            "participation": lambda layer: layer.participation,
        }
        by_layer = {
            name: np.array([measure(layer) if layer is not None else math.nan for layer in known])
            for name, measure in measures.items()
        }
        self.values |= {f"layer_{name}": values for name, values in by_layer.items()}
        self.values |= {
            "kfac_log_determinant": _sum_of_known(by_layer["log_determinant"]),
            "kfac_pseudo_log_determinant": _sum_of_known(by_layer["pseudo_log_determinant"]),
            "effective_rank": _sum_of_known(by_layer["effective_rank"]),
            "kfac_damping": epsilon,
            "kfac_coverage": found.covered,
        }
        self.spent["forwards"] += 1
        self.spent["backwards"] += min(self._columns, max_columns)

    def noise(self, steps: int, beta: float) -> None:
        """The curvature that noise in the weights feels."""
        try:
            found = noise.noise_injection(
                self._model,
                self._batches,
                self._loss,
                steps=steps,
                beta=beta,
                seed=self._seed,
                progress=self._tell,
            )
        except ValueError as error:
            raise OptionError(f"noise-injection: {error}", "Leave --noise-injection out.") from error
        if not found.converged:
            self.reasons.append(f"{steps} steps of noise injection did not settle to 5 %")

        def by_layer(parts: dict[str, float], names: Sequence[str], *, errors: bool) -> float:
            values = [parts[name] for name in names if name in parts]
            if not values:
                return math.nan
            return math.hypot(*values) if errors else sum(values)

        layers = self._layers.values()
        self.values |= {
            "noise_trace": found.total,
            "noise_trace_stderr": found.total_stderr,
            "layer_noise_trace": np.array([by_layer(found.trace, n, errors=False) for n in layers]),
            "layer_noise_trace_stderr": np.array([by_layer(found.stderr, n, errors=True) for n in layers]),
        }
        without = [(n, bool(p.any())) for n, p in self._model.named_parameters() if n not in found.trace]
        for what, some in (("parameters without filters", True), ("tensors that are zero", False)):
            if left_out := [name for name, any_entry in without if any_entry == some]:
                self.notes.append(f"noise injection leaves out {what}: {_listed(left_out)}")
        self.spent["forwards"] += 2 * steps
        self.spent["backwards"] += 2 * steps


def _of_module(
    layers: Mapping[str, kronecker.LayerFactors], layer: str, names: Sequence[str]
) -> kronecker.LayerFactors | None:
    """The Kronecker factors of a layer's module.

    In a model that is a single module each parameter is a layer: the weight stands for the module.
    """
    return layers.get("" if names == ["weight"] else layer)


def _sum_of_known(values: NDArray[np.float64]) -> float:
    """Sum over the layers that have a value; NaN if none has."""
    return float(np.nansum(values)) if np.isfinite(values).any() else math.nan


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
