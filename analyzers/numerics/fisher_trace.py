"""Trace of the Fisher information per parameter tensor: exactly over the classes, or with random signs.

F = E_x E_y[∇log p(y|x) ∇log p(y|x)ᵀ] with labels y drawn by the *model*. With M = S Sᵀ the Fisher information
of a sample's outputs and J their Jacobian, Tr F = E_x‖JᵀS‖²_F, so a sum of squared norms of vector-Jacobian
products: one per column of S, or, since E‖JᵀS s‖² = ‖JᵀS‖²_F for random signs s, a few random ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import Estimate
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.output_factor import OutputFactor, draw_seeds, output_factor
from dynprobe.analyzers.numerics.per_sample import PerSamplePass, Routes, loss_cotangent, settle
from dynprobe.analyzers.numerics.sample_by_sample import grouped

GROUP = 16
"""Samples that share one random-sign backward pass where a model has no per-sample rules."""
FIRST_DRAWS = 4
"""Draws of the first round: enough for an estimate of their own spread, where there are groups enough."""
FREEDOM = 24
"""Degrees of freedom, groups times draws less one, from which on that estimate is trusted."""
FACTOR_BYTES = 2**30
"""What the factor of the outputs' Fisher information of one group of samples may take."""
FACTOR_COPIES = 8
"""Tensors of the size of the outputs in float64 that it holds at once."""

Progress = Callable[[str], None]
Batches = Iterable[tuple[Any, Tensor]]


@dataclass(frozen=True)
class SquaredNorms:
    """Squared norms per parameter tensor, for each sample or small group of samples.

    Args:
        names: Parameters.
        values: Mean over the samples of a group, shape (n_groups, n_parameters), float64, CPU.
        sizes: Samples in each group, shape (n_groups,); 1 where there are values for each sample.
        draws: Random draws behind each value; 0 for exact ones.
        draw_stderr: Standard error of the total that the draws alone cause.
        converged: Whether that met the tolerance.
        backwards: Backward passes over all data that it took.
    """

    names: tuple[str, ...]
    values: Tensor
    sizes: Tensor
    draws: int = 0
    draw_stderr: float = 0.0
    converged: bool = True
    backwards: int = 0

    def estimate(self, names: Sequence[str] | None = None) -> Estimate:
        """Mean over samples, summed over parameters (all when None), with its standard error over samples.

        The standard error counts what random draws add; NaN for a single group.
        """
        chosen = self.names if names is None else names
        columns = [self.names.index(name) for name in chosen]
        values, weight = self.values[:, columns].sum(1), self.sizes / self.sizes.sum()
        mean, n = (weight * values).sum(), len(values)
        scatter = (weight.square() * (values - mean).square()).sum()
        stderr = math.sqrt(float(scatter) * n / (n - 1)) if n > 1 else math.nan
        return Estimate(float(mean), stderr, int(self.sizes.sum()))

    @property
    def exact(self) -> bool:
        """Whether no random draw is in it."""
        return self.draws == 0


@dataclass(frozen=True)
class Moments:
    """First and second moment of the gradients ∇ℓ_i of the data's own labels.

    Args:
        squares: ‖∇ℓ_i‖², the trace of the *empirical* Fisher matrix.
        mean: ‖E ∇ℓ_i‖² per parameter tensor.
    """

    squares: SquaredNorms
    mean: dict[str, float]

    def mean_norm(self, names: Sequence[str]) -> float:
        """‖E g_i‖ over some parameters."""
        return math.sqrt(sum(self.mean[name] for name in names))

    def std(self, names: Sequence[str]) -> float:
        """√E‖g_i − E g_i‖² over some parameters."""
        second = self.squares.estimate(names).value
        return math.sqrt(max(second - sum(self.mean[name] for name in names), 0.0))


def exact_fisher_trace(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    parameters: Sequence[str] | None = None,
    routes: Routes | None = None,
    progress: Progress | None = None,
) -> SquaredNorms:
    """Tr F per parameter tensor and sample, without any random number.

    Cost: one forward pass, and per column of S (one per class and position) one backward pass with per-sample
    norms: 6 gradients of the data for a multilayer perceptron with 10 classes.

    Args:
        model: In eval mode.
        batches: Pairs (inputs, targets), re-iterable.
        loss: One that says which labels the model would draw, see `output_factor`.
        parameters: Names; all when None.
        routes: From `settle`; otherwise settled first.
        progress: Told of every backward pass.

    Raises:
        ValueError: If the loss is no such loss.
    """
    routes = settle(model, batches, parameters=parameters, routes=routes)
    found, columns = [], 0
    for inputs, targets in grouped(batches, _room(routes)):
        passed = PerSamplePass(model, inputs, parameters=parameters, routes=routes)
        factor = output_factor(loss, passed.outputs, targets)
        total = torch.zeros((), dtype=torch.float64)
        for column in factor.columns():
            total = total + _norms(passed, column)
            _tell(progress, "classes")
        found.append(total)
        columns = max(columns, factor.n_columns)
    values = torch.cat(found)
    return SquaredNorms(
        _names(model, parameters), values, torch.ones(len(values)).double(), backwards=columns
    )


def sampled_fisher_trace(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    tol: float = 0.02,
    max_draws: int = 256,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
    routes: Routes | None = None,
    progress: Progress | None = None,
) -> SquaredNorms:
    """Tr F per parameter tensor from random-sign combinations of the columns of S, until precise enough.

    Every draw takes one backward pass. Where all parameters have a per-sample rule, each sample's own squared
    norm is used. Elsewhere the signs are independent between samples too, so that E‖Σ_i g_i‖² = Σ_i‖g_i‖²,
    over groups of few samples: the fewer, the less the mixed terms scatter. Signs and groups follow the order
    of the data, not its batches (groups only where the samples of all batches have one shape).

    The error of the draws is pooled over samples or groups. With few of these and few draws it is itself
    left to chance, and two lucky draws would pass for precise: converged also takes 24 degrees of freedom.

    Args:
        model: In eval mode.
        batches: Pairs (inputs, targets), re-iterable.
        loss: One that says which labels the model would draw, see `output_factor`.
        tol: Relative standard error of the total, as far as the draws cause it.
        max_draws: Stop here, converged or not.
        seed: Of the signs.
        parameters: Names; all when None.
        routes: From `settle`; otherwise settled first.
        progress: Told of every backward pass.

    Raises:
        ValueError: If the loss is no such loss.
    """
    seeds = draw_seeds(seed, max_draws)
    routes = settle(model, batches, parameters=parameters, routes=routes)
    mean, squares, sizes = torch.zeros(()).double(), torch.zeros(()).double(), torch.ones(1).double()
    done, wanted, error, converged = 0, min(FIRST_DRAWS, max_draws), math.inf, False
    while done < wanted:
        found, sizes = _draws(model, batches, loss, seeds[done:wanted], parameters, routes, progress)
        mean = (mean * done + found.sum(0)) / wanted
        squares = squares + found.sum(2).square().sum(0)
        done = wanted
        error, total = _draw_error(mean.sum(1), squares, sizes, done)
        least = math.ceil(FREEDOM / len(sizes)) + 1
        converged = error <= tol * total and done >= least
        if not converged and done > 1 and math.isfinite(error):
            needed = math.ceil(1.1 * done * (error / (tol * total)) ** 2) if total > 0 else max_draws
            wanted = min(max_draws, max(done if error <= tol * total else done + 1, needed, least))
    return SquaredNorms(_names(model, parameters), mean, sizes, done, error, converged, done)


def gradient_moments(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    exact: bool = False,
    draws: int = 16,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
    routes: Routes | None = None,
    progress: Progress | None = None,
) -> Moments:
    """E‖∇ℓ_i‖² and ‖E∇ℓ_i‖² per parameter tensor, with the data's own labels.

    Cost: one forward and one backward pass. A parameter without a per-sample rule makes it `draws` backward
    passes with random signs over groups of few samples, as in `sampled_fisher_trace`, unless `exact`.

    Args:
        model: In eval mode.
        batches: Pairs (inputs, targets), re-iterable.
        loss: Any with one value per sample.
        exact: Take the slow route to such parameters instead, without any random number.
        draws: Random draws where they are needed.
        seed: Of the signs.
        parameters: Names; all when None.
        routes: From `settle`; otherwise settled first.
        progress: Told of every batch.
    """
    routes = settle(model, batches, parameters=parameters, routes=routes)
    names, random = _names(model, parameters), bool(routes.slow) and not exact
    signs = [torch.Generator().manual_seed(part) for part in draw_seeds(seed, draws if random else 0)]
    sums: dict[str, Tensor] = {}
    found, sizes, n = [], [], 0
    for inputs, targets in _groups(batches, routes) if random else batches:
        passed = PerSamplePass(model, inputs, parameters=parameters, routes=routes)
        losses, cotangent = loss_cotangent(loss, passed.outputs, targets)
        # a sample without a loss, whose targets are all ignored, has no gradient either
        cotangent[losses.isnan()] = math.nan
        if random:
            found.append(torch.stack([_mixed(passed, _flip(cotangent, generator)) for generator in signs]))
            sizes.append(torch.tensor([len(targets)]))
            gradient = {name: part.double() for name, part in passed.gradient(cotangent).items()}
        else:
            factors = passed.pull(cotangent)
            found.append(_stack([factors[name].squared_norm() for name in names])[None])
            sizes.append(torch.ones(len(targets)))
            ones = torch.ones(len(targets), device=cotangent.device)
            gradient = {name: factor.combine(ones) for name, factor in factors.items()}
        for name, part in gradient.items():
            sums[name] = sums[name] + part if name in sums else part
        n += len(targets)
        _tell(progress, "gradients")
    mean = {name: float(part.square().sum()) / n**2 for name, part in sums.items()}
    values, counts = torch.cat(found, 1), torch.cat(sizes).double()
    squares = values.sum(2).square().sum(0)
    error = _draw_error(values.mean(0).sum(1), squares, counts, draws)[0] if random else 0.0
    return Moments(SquaredNorms(names, values.mean(0), counts, len(signs), error, backwards=1), mean)


def _draws(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seeds: Sequence[int],
    parameters: Sequence[str] | None,
    routes: Routes,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """Squared norms, shape (draws, groups, parameters), and the groups' sizes."""
    signs = [torch.Generator().manual_seed(seed) for seed in seeds]
    found, sizes = [], []
    for inputs, targets in _groups(batches, routes):
        passed = PerSamplePass(model, inputs, parameters=parameters, routes=routes)
        factor = output_factor(loss, passed.outputs, targets)
        norms = _mixed if routes.slow else _norms
        found.append(torch.stack([norms(passed, factor.random(generator)) for generator in signs]))
        sizes.append(torch.tensor([len(targets)]) if routes.slow else torch.ones(len(targets)))
        _tell(progress, "random signs")
    return torch.cat(found, 1), torch.cat(sizes).double()


def _groups(batches: Batches, routes: Routes) -> Iterator[tuple[Any, Tensor]]:
    """Groups that share one backward pass where a parameter has no per-sample rule; else the batches."""
    room = _room(routes)
    return grouped(batches, min(GROUP, room), across=True) if routes.slow else grouped(batches, room)


def _room(routes: Routes) -> int:
    """Samples whose outputs' factor fits in the memory meant for it."""
    return max(1, FACTOR_BYTES // (FACTOR_COPIES * 8 * routes.entries))


def _norms(passed: PerSamplePass, cotangent: Tensor) -> Tensor:
    """‖g_i‖² per sample and parameter, shape (n, n_parameters)."""
    return _stack([factor.squared_norm() for factor in passed.pull(cotangent).values()])


def _mixed(passed: PerSamplePass, cotangent: Tensor) -> Tensor:
    """‖Σ_i g_i‖²/n per parameter, shape (1, n_parameters)."""
    parts = passed.gradient(cotangent).values()
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]
    return _stack([norm[None] / len(cotangent) for norm in norms])


def _stack(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(columns), 1).cpu()


def _flip(cotangent: Tensor, generator: torch.Generator) -> Tensor:
    """Each sample's with a random sign."""
    signs = torch.randint(2, (len(cotangent),), generator=generator, dtype=torch.int8) * 2 - 1
    return cotangent * signs.to(cotangent).reshape(-1, *[1] * (cotangent.dim() - 1))


def _draw_error(mean: Tensor, squares: Tensor, sizes: Tensor, draws: int) -> tuple[float, float]:
    """Standard error of the total over the draws, pooled over the groups, and the total."""
    weight = sizes / sizes.sum()
    total = float((weight * mean).sum())
    if draws < 2:
        return math.inf, total
    variance = (squares / draws - mean.square()).clamp_min(0) * draws / (draws - 1)
    return math.sqrt(float((weight.square() * variance).sum()) / draws), total


def _names(model: nn.Module, parameters: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_parameters()) if parameters is None else tuple(parameters)


def _tell(progress: Progress | None, what: str) -> None:
    if progress is not None:
        progress(what)


__all__ = [
    "Moments",
    "OutputFactor",
    "SquaredNorms",
    "exact_fisher_trace",
    "gradient_moments",
    "output_factor",
    "sampled_fisher_trace",
]
