"""Trace and spectral density of a matrix whose outliers are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers._curvature import Batches, rows
from dynprobe.analyzers._hessian_parts import Task, padded
from dynprobe.analyzers.numerics.density import Quadrature, density, negative_part, quadrature
from dynprobe.analyzers.numerics.fisher_trace import exact_fisher_trace
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.output_factor import output_factor
from dynprobe.analyzers.numerics.params import weight_parameters
from dynprobe.analyzers.numerics.per_sample import PerSamplePass
from dynprobe.analyzers.numerics.piecewise import linear_in_each_tensor
from dynprobe.analyzers.numerics.trace import TraceEstimate, random_signs

Floats = NDArray[np.float64]
GRID = 1001
NEGATIVE = 0.01
"""Of the largest magnitude: an eigenvalue this far below zero counts as negative. Most of a network's are
next to zero, and on which side of it a Ritz value falls that stands for thousands of them is an accident."""
MOST_COLUMNS = 128
"""Outputs of a network up to which an exact trace costs less than an estimated one."""


@dataclass
class Spectrum:
    """What probes say of the part of a spectrum that the eigenpairs leave.

    Args:
        task: The matrix with its eigenpairs; gets the values, notes and reasons.
    """

    task: Task

    def measure(self, trace_tol: float | None, max_probes: int, n_density: int, steps: int) -> None:
        """Trace to a relative standard error, and density from `n_density` probes of `steps` products.

        Args:
            trace_tol: None for no trace.
            max_probes: Most probes for it.
            n_density: 0 for no density.
            steps: Products of each of these.
        """
        space = self.task.pairs.space
        if space is None:
            return
        wanted = trace_tol is not None
        if wanted and self._exact_trace():
            wanted = False
        layers = self.task.layers()
        owner = [i for i, members in enumerate(layers.values()) for _ in members]
        by_layer = [name for members in layers.values() for name in members]
        estimate = TraceEstimate(
            space, self._sizes(), [owner[by_layer.index(name)] for name in self.task.names]
        )
        probes = [self._probe(seed, steps, estimate if wanted else None) for seed in range(n_density)]
        if probes:
            self._add_density(probes)
        if not wanted or trace_tol is None:
            return
        while not (space.complete or estimate.result().reached(trace_tol)) and estimate.n_probes < max_probes:
            signs = random_signs(space.n, self._probe_seed(estimate.n_probes), self.task.pairs.eigenvector)
            estimate.add(signs, signs, self.task.operator.matvec(signs))
        result = estimate.result()
        self._add_trace(result.value, result.stderr, result.layer, result.layer_stderr, result.n_probes)
        if not (space.complete or result.reached(trace_tol)):
            self.task.reasons.append(
                f"the trace's standard error is {result.stderr / abs(result.value):.1%} of it after "
                f"{result.n_probes} probes; --max-probes allows more"
            )

    def _probe_seed(self, index: int) -> int:
        """Probes are not the start vectors over again."""
        return int(np.random.SeedSequence([self.task.seed, 1, index]).generate_state(1)[0])

    def _probe(self, index: int, steps: int, estimate: TraceEstimate | None) -> Quadrature:
        locked = self.task.pairs.eigenvector
        signs = random_signs(self.task.operator.n_parameters, self._probe_seed(index), locked)
        start = signs - (locked @ signs) @ locked
        found = quadrature(self.task.operator.matvec, start, min(steps, len(signs)), locked)
        if estimate is not None:
            estimate.add(signs, start, found.image)
        return found

    def _sizes(self) -> list[int]:
        weights = weight_parameters(self.task.problem.model)
        return [weights[name].numel() for name in self.task.names]

    def _exact_trace(self) -> bool:
        """The trace where the outputs' gradients alone give it; False, with a note, where they do not."""
        why = self._no_exact_trace()
        if why:
            self.task.notes.append(f"the trace is estimated: {why}")
            return False
        model, loss = self.task.problem.model, self.task.problem.loss
        found = exact_fisher_trace(model, self.task.batches, loss, parameters=self.task.names)
        self.task.spent["gradients"] += found.backwards
        layer = np.array([found.estimate(members).value for members in self.task.layers().values()])
        self._add_trace(float(layer.sum()), 0.0, layer, np.zeros(len(layer)), 0)
        names = "tr H = tr GGN = tr F" if self.task.problem.curvature == "hessian" else "tr GGN = tr F"
        self.task.notes.append(f"the trace is exact, whole and by layer: {names} here")
        return True

    def _no_exact_trace(self) -> str:
        """Why the trace of the matrix is not the sum of squared gradients of few outputs; empty if it is."""
        if self.task.problem.mode == "train":
            return "BatchNorm in train mode mixes the samples"
        if self.task.problem.curvature != "fisher" and not _sum_to_one(
            self.task.problem.loss, self.task.batches
        ):
            return "the targets are not probabilities"
        inputs, targets = rows(self.task.batches[0][0], slice(2)), self.task.batches[0][1][:2]
        if self.task.problem.curvature == "hessian":
            linear, why = linear_in_each_tensor(self.task.problem.model, inputs, self.task.names)
            if not linear:
                return why
        try:
            passed = PerSamplePass(self.task.problem.model, inputs, parameters=self.task.names)
            columns = output_factor(self.task.problem.loss, passed.outputs, targets).n_columns
        except ValueError as error:
            return str(error)
        if passed.routes.slow:
            return f"no rule gives the gradients of {sorted(passed.routes.slow)[0]} sample by sample"
        return f"{columns} outputs are many" if columns > MOST_COLUMNS else ""

    def _add_trace(self, value: float, stderr: float, layer: Floats, layer_stderr: Floats, n: int) -> None:
        self.task.values |= {
            "trace": value,
            "trace_stderr": stderr,
            "trace_probes": n,
            "layer": np.array(list(self.task.layers()), dtype=object),
            "layer_trace": layer,
            "layer_trace_stderr": layer_stderr,
        }

    def _add_density(self, probes: list[Quadrature]) -> None:
        found, n = self.task.pairs.eigenvalue, self.task.operator.n_parameters
        everything = np.concatenate([found, *(probe.node for probe in probes)])
        if not np.isfinite(everything).all():
            self.task.reasons.append("the density is missing: a product is NaN or infinite")
            return
        largest = float(np.abs(everything).max())
        if largest == 0:
            self.task.notes.append("there is no density: the matrix is zero")
            return
        smooth = density(found, probes, n, n_grid=GRID, width=0.0)
        negative = negative_part(found, probes, n, cut=NEGATIVE * largest)
        longest = max(len(probe.node) for probe in probes)
        self.task.values |= {
            "density": smooth.density,
            "density_stderr": smooth.stderr,
            "density_at": smooth.at,
            "density_width": smooth.width,
            "node": np.stack([padded(probe.node, longest) for probe in probes]),
            "node_weight": np.stack([padded(probe.weight, longest) for probe in probes]),
            "negative_share": negative.share,
            "negative_share_stderr": negative.share_stderr,
            "negative_trace": negative.trace,
            "negative_trace_stderr": negative.trace_stderr,
        }


def _sum_to_one(loss: Loss, batches: Batches) -> bool:
    """Whether soft labels of a cross-entropy are probabilities, without which it has another curvature."""
    if loss.name != "cross_entropy":
        return True
    sums = [t.sum(1) for _, t in batches if t.is_floating_point()]
    return all(torch.allclose(total, torch.ones_like(total), atol=1e-5) for total in sums)
