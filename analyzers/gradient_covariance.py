"""Covariance of the gradients, and the step at which SGD becomes unstable (break-even point)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dynprobe.analyzers import Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._curvature import GIGABYTE, Problem
from dynprobe.analyzers._gradient_covariance import (
    VECTOR,
    loss_change,
    of_batchnorm,
    of_covariance,
    of_curvature,
    of_hessian,
    of_minibatches,
    training_of,
)
from dynprobe.analyzers._gradient_covariance_figure import draw_gradient_covariance
from dynprobe.analyzers._hessian_parts import Task
from dynprobe.analyzers._hessian_spectrum import Spectrum
from dynprobe.analyzers._sampling import check_repeatable, check_seed, subset_note
from dynprobe.analyzers.core.result import Result
from dynprobe.analyzers.numerics.break_even import break_even_step
from dynprobe.analyzers.numerics.covariance import GradientCovariance, Partition, partition
from dynprobe.analyzers.numerics.covariance_routes import TooLittleMemory
from dynprobe.analyzers.numerics.covariance_routes import gradient_covariance as measure_covariance
from dynprobe.analyzers.numerics.directional import Directional, per_sample_curvature
from dynprobe.analyzers.numerics.lanczos import Eigenpairs
from dynprobe.analyzers.numerics.losses import as_loss
from dynprobe.analyzers.numerics.params import frozen_eval

Floats = NDArray[np.float64]

MINIBATCHES = 25
TRACE_TOL, MOST_PROBES = 0.05, 200
SQUARED = "squared loss per squared parameter"
CURVATURE = "loss per squared parameter"


def _number(what: str, units: str = "", error: str = "", *, optional: bool = False) -> Var:
    return Var((), units, what, error, optional)


def _with_stderr(name: str, what: str, units: str = "") -> dict[str, Var]:
    return {
        name: _number(what, units, f"{name}_stderr"),
        f"{name}_stderr": _number(f"Standard error of {name} over samples", units),
    }


RETURNS = {
    "eigenvalue": Var(
        ("rank",), SQUARED, "Eigenvalue of K, the covariance of the gradients", "eigenvalue_stderr"
    ),
    "eigenvalue_stderr": Var(("rank",), SQUARED, "Standard error of eigenvalue over samples"),
    "eigenvalue_residual": Var(
        ("rank",), SQUARED, "‖Kv − λv‖, not below rounding (route lanczos)", optional=True
    ),
    "rank": Var(("rank",), "", "Rank, largest first"),
    **_with_stderr("trace", "Trace of K", SQUARED),
    **_with_stderr("trace_ratio", "Trace of K over its largest eigenvalue"),
    "route": _number("How K was decomposed: gram or lanczos"),
    "minibatch_eigenvalue": _number("Largest eigenvalue of K from mini-batch gradients", SQUARED),
    "minibatch_trace": _number("Trace of K from mini-batch gradients", SQUARED),
    "minibatch_ratio": _number("Smallest nonzero over largest eigenvalue of K from mini-batch gradients"),
    "minibatch_size": _number("Samples in each of those mini-batches, S"),
    "minibatch_count": _number("How many mini-batches, L"),
    "hessian_eigenvalue": _number("Largest eigenvalue of the Hessian", CURVATURE, "hessian_residual"),
    "hessian_residual": _number("‖Hv − λv‖ of it, not below rounding", CURVATURE),
    "hessian_ratio": _number("k-th over largest eigenvalue of the Hessian, k = hessian_rank", optional=True),
    "hessian_rank": _number("k of hessian_ratio", optional=True),
    "hessian_trace": _number("Trace of the Hessian", CURVATURE, "hessian_trace_stderr", optional=True),
    "hessian_trace_stderr": _number("Standard error over probes, 0 where exact", CURVATURE, optional=True),
    "hessian_trace_ratio": _number("Trace of the Hessian over its largest eigenvalue", optional=True),
    "alignment": _number("|cosine| between the leading eigenvectors of H and K"),
    "alignment_chance": _number("The same for a random direction (root mean square)"),
    "per_sample_curvature_std": _number("Spread s of the samples' curvature along e_H", CURVATURE),
    "stability": _number("SGD's factor on E[x²] along e_H; unstable above 1", "", "stability_stderr"),
    "stability_stderr": _number("Standard error of stability, for the training set"),
    "critical_learning_rate": _number(
        "Learning rate at which stability is 1", "", "critical_learning_rate_stderr"
    ),
    "critical_learning_rate_stderr": _number("Standard error of it, for the training set"),
    "learning_rate": _number("Learning rate at this step"),
    "train_batch_size": _number("Samples in a training batch"),
    "train_samples": _number("Samples in the training set"),
    **_with_stderr("loss", "Loss"),
    **_with_stderr("gradient_norm", "Norm of the mean gradient"),
    **_with_stderr("minimum_distance", "Distance to the minimum along e_H in the quadratic model"),
    **_with_stderr("noise_scale", "Gradient noise scale tr Σ/‖G‖²", "samples"),
    "top_gradient_share": _number(
        "‖g₅‖/‖g‖ of a mini-batch gradient", "", "top_gradient_share_stderr", optional=True
    ),
    "top_gradient_share_stderr": _number("Standard error over mini-batches", optional=True),
    "batchnorm_norm": _number("‖γ‖ of the last BatchNorm layer", optional=True),
    "loss_change": _number("Change of the loss in the last step", "", "loss_change_stderr", optional=True),
    "loss_change_stderr": _number("Standard error of it, paired by sample", optional=True),
    "sample_loss": Var(("sample",), "", "Loss of each sample", optional=True),
    "measured_step": _number("Step that sample_loss belongs to", optional=True),
}

SUMMARY = {
    "break_even_step": _number("First step at which stability exceeds 1"),
    "break_even_low": _number("Certainly below 1 up to here"),
    "break_even_high": _number("Certainly above 1 here"),
    "break_even_state": _number("1 reached, 0 never, -1 already above 1 at the first checkpoint"),
    "max_eigenvalue": _number("Largest eigenvalue of K over the run", SQUARED),
    "max_trace_ratio": _number("Largest trace_ratio over the run"),
    "max_hessian_eigenvalue": _number("Largest eigenvalue of H over the run", CURVATURE),
}

STATES = {"reached": 1.0, "never": 0.0, "from the start": -1.0, "unknown": math.nan}

TABLE = (
    "eigenvalue",
    "trace_ratio",
    "minibatch_ratio",
    "hessian_eigenvalue",
    "alignment",
    "per_sample_curvature_std",
    "stability",
    "critical_learning_rate",
    "noise_scale",
    "loss",
    "loss_change",
    *SUMMARY,
)


def _summary(result: Result) -> dict[str, float]:
    step = result["step"] if result["step"].dtype.kind in "if" else np.full(result.n_pieces, math.nan)
    found = break_even_step(step, result["stability"], result["stability_stderr"])
    leading = result["eigenvalue"][..., 0]
    return {
        "break_even_step": found.step,
        "break_even_low": found.low,
        "break_even_high": found.high,
        "break_even_state": STATES[found.state],
        "max_eigenvalue": _largest(leading),
        "max_trace_ratio": _largest(result["trace_ratio"]),
        "max_hessian_eigenvalue": _largest(result["hessian_eigenvalue"]),
    }


def _largest(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else math.nan


def _skips(options: Mapping[str, Any]) -> Sequence[str]:
    return [] if options.get("consecutive", False) else ["previous"]


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    del n_checkpoints
    return {"forwards": 20, "hvps": 10 + 10 * int(options.get("hessian_top_k", 2))}


@analyzer(
    returns=RETURNS,
    figure=draw_gradient_covariance,
    summary=_summary,
    summary_returns=SUMMARY,
    cost=_cost,
    table=TABLE,
    skips=_skips,
)
def gradient_covariance(
    model: nn.Module,
    batches: Any,
    loss: Any,
    step: Any = None,
    training: Any = None,
    previous: Any = None,
    *,
    top_k: Annotated[int, Range(min=1)] = 10,
    minibatch: Annotated[int, Range(min=0)] = 128,
    minibatches: Annotated[int, Range(min=3)] = MINIBATCHES,
    hessian_top_k: Annotated[int, Range(min=1)] = 2,
    hessian_trace: bool = False,
    tol: Annotated[float, Range(min=0)] = 1e-4,
    learning_rate: Annotated[float, Range(min=0)] = 0.0,
    train_batch_size: Annotated[int, Range(min=0)] = 0,
    train_samples: Annotated[int, Range(min=0)] = 0,
    memory: Annotated[float, Range(min=0)] = 4.0,
    consecutive: bool = False,
    seed: int = 0,
) -> Measurement:
    """Covariance of the gradients, and the step at which SGD becomes unstable (break-even point).

    K = (1/n) Σ (g_i − ḡ)(g_i − ḡ)ᵀ over the gradients of single samples, from their inner products; the
    leading eigenpair (λ, e) of the Hessian by Lanczos; and H_i = eᵀ∇²ℓ_i e of every sample. With learning
    rate η, batch size S and N training samples, SGD along e is stable while

        (1 − ηλ)² + s²η²(N − S)/(S(N − 1)) ≤ 1,   s² = Var_i[H_i],

    and the first step where it exceeds 1 is the break-even point. The criterion is exact for a quadratic loss
    and samples drawn without replacement.

    Cost: one pass for the gradients (three to four times a gradient of the whole data), 10 to 25
    Hessian-vector products, and one pass for the curvatures of the samples.

    Args:
        model: At the checkpoint; found unchanged afterwards.
        batches: Pairs (inputs, targets), re-iterable.
        loss: The loss, or a callable such as `F.cross_entropy`.
        step: The checkpoint's step, for a schedule and for `consecutive`.
        training: The manifest's facts: learning_rate, batch_size, samples, optimizer, momentum.
        previous: What was measured at the checkpoint before, for `consecutive`.
        top_k: How many eigenvalues of K to report.
        minibatch: Samples per mini-batch for K as published, from mini-batch gradients, whatever the batch
            size of the training; 0 leaves it out.
        minibatches: Largest number of these mini-batches, which are disjoint.
        hessian_top_k: How many eigenvalues of the Hessian; from 2 on the ratio of the last to the first is
            reported.
        hessian_trace: The trace of the Hessian as well, exact where `dynprobe hessian` has it exact, else to
            5 % of itself.
        tol: Relative tolerance of eigenvalues by Lanczos: those of the Hessian, and of K where it does not
            fit in memory. Products with the Hessian go on to a tenth of it, for the sake of the leading
            eigenvector, which is accurate to about the square root.
        learning_rate: Of the training at every checkpoint; 0 takes what the manifest says.
        train_batch_size: Samples in a training batch; 0 takes what the manifest says.
        train_samples: Size of the training set; 0 takes what the manifest says, or else the size of the data.
        memory: Gigabytes for the factors of all gradients and their inner products; beyond that K is
            decomposed by Lanczos, whose vectors and kept graphs share them, as those for the Hessian do.
        consecutive: Report the change of the loss since the checkpoint before where that is one step earlier.
        seed: Of start vectors, mini-batches, and the groups left out for standard errors.

    Returns:
        Spectra of K and H, stability and what it rests on; see the report's long names.

    Raises:
        OptionError: If the options contradict each other or the data.

    References:
        Jastrzebski, Szymczak, Fort, Arpit, Tabor, Cho and Geras, "The Break-Even Point on Optimization
        Trajectories of Deep Neural Networks", ICLR 2020, §3 and appendix C.
        Wu, Ma and E, "How SGD Selects the Global Minima in Over-parameterized Learning", NeurIPS 2018.
    """
    check_seed(seed)
    _check_options(minibatch, minibatches, tol)
    n_samples = sum(len(targets) for _, targets in batches)
    if n_samples < 2:
        raise OptionError("a covariance needs at least two samples.", "Raise --samples.")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = training_of(
        training,
        step,
        n_measured=n_samples,
        n_source=int(getattr(batches, "n_total", n_samples)),
        learning_rate=learning_rate,
        batch_size=train_batch_size,
        n_training=train_samples,
    )
    notes = [*subset_note(batches), *facts.notes]
    groups = partition(n_samples, minibatch=minibatch, minibatches=minibatches, seed=seed)
    if minibatch and not len(groups.minibatch):
        notes.append(
            f"K from mini-batch gradients is NaN: fewer than 3 of {minibatch} fit in {n_samples} samples"
        )
    k = min(top_k, n_samples - 1, n_parameters)
    if k < top_k:
        notes.append(f"K of {n_samples} samples and {n_parameters} parameters has rank at most {k}")
    loss = as_loss(loss)
    with frozen_eval(model):
        check_repeatable(model, batches)
        problem = Problem(model, loss, memory=memory * GIGABYTE)
        sharp, along = _curvature(problem, batches, min(hessian_top_k, n_parameters), tol, seed)
        found = _covariance(problem, batches, groups, k, tol, seed)
        whole = _trace(problem, batches, seed) if hessian_trace else None
    rounding = max(torch.finfo(parameter.dtype).eps for parameter in model.parameters())
    values = of_hessian(sharp, rounding, notes) | of_curvature(sharp, tol, along, facts)
    values |= {
        **of_covariance(found, notes),
        **of_minibatches(found, minibatch, notes),
        "alignment": found.alignment(along.slope.numpy()),
        "alignment_chance": 1 / math.sqrt(n_parameters),
        **of_batchnorm(model),
    }
    if whole is not None:
        values |= {
            "hessian_trace": whole.values["trace"],
            "hessian_trace_stderr": whole.values["trace_stderr"],
            "hessian_trace_ratio": whole.values["trace"] / values["hessian_eigenvalue"],
        }
        notes += whole.notes
    if consecutive:
        change, stderr, note = loss_change(found.loss, step, previous)
        notes += [note] if note else []
        values |= {"loss_change": change, "loss_change_stderr": stderr, "sample_loss": found.loss}
        values["measured_step"] = math.nan if step is None else float(step)
    reasons = [*_unconverged(sharp, found, tol), *(whole.reasons if whole is not None else ())]
    trace_hvps = whole.spent["hvps"] if whole is not None else 0
    return Measurement(
        values,
        converged=not reasons,
        reason="; ".join(reasons),
        spent={"hvps": sharp.n_matvec + trace_hvps, "covariance_products": found.n_products},
        notes=notes,
    )


def _check_options(minibatch: int, minibatches: int, tol: float) -> None:
    """No option is accepted and ignored."""
    if minibatch == 1:
        raise OptionError("minibatch 1 is a single sample.", "K of these is reported anyway; 0 for no other.")
    if not minibatch and minibatches != MINIBATCHES:
        raise OptionError("minibatches would have no effect with minibatch 0.", "Leave it out.")
    if not 0 < tol < 1:
        raise OptionError(f"tol {tol:g} is no relative tolerance.", "1e-4 is a ten-thousandth.")


def _curvature(
    problem: Problem, batches: Any, k: int, tol: float, seed: int
) -> tuple[Eigenpairs, Directional]:
    """Leading eigenpairs of the Hessian, and each sample's slope and curvature along the first."""
    operator = problem.operator(batches)
    try:
        pairs = problem.eigenpairs(operator, k, tol=VECTOR * tol, seed=seed)
    except OptionError as error:  # the option is called differently here
        message, tip = (text.replace("top-k", "hessian-top-k") for text in (error.message, error.tip))
        raise OptionError(message, tip) from error
    direction = operator.as_dict(pairs.eigenvector[0])
    # Without the Krylov space, which keeps the operator and its graphs too.
    return replace(pairs, space=None), per_sample_curvature(problem.model, batches, problem.loss, direction)


def _trace(problem: Problem, batches: Any, seed: int) -> Task:
    """The Hessian's trace as `dynprobe hessian --trace` measures it."""
    names = [name for name, _ in problem.model.named_parameters()]
    task = Task(problem, list(batches), names, 1, "largest", 1e-3, seed)
    Spectrum(task).measure(TRACE_TOL, MOST_PROBES, 0, 1)
    return task


def _covariance(
    problem: Problem, batches: Any, groups: Partition, k: int, tol: float, seed: int
) -> GradientCovariance:
    """K by whichever route fits in memory."""
    given = problem.model, batches, problem.loss, groups
    try:
        return measure_covariance(*given, k=k, memory=problem.memory, tol=tol, seed=seed)
    except TooLittleMemory as error:
        needed = math.ceil(1000 * error.needed / GIGABYTE) / 1000
        raise OptionError(
            f"memory {problem.memory / GIGABYTE:g} GB holds neither all gradients nor the {error.vectors} "
            f"vectors that the eigenvalues of their covariance need: {error.room} fit in half of it.",
            f"Give --memory {needed:g} or more, a smaller --top-k, or fewer --samples.",
        ) from error


def _unconverged(pairs: Eigenpairs, found: GradientCovariance, tol: float) -> list[str]:
    reasons = []
    if not (pairs.error_bound <= tol * np.abs(pairs.eigenvalue)).all():
        reasons.append(f"Hessian eigenvalues missed the tolerance {tol:g}: see hessian_residual")
    if not found.converged:
        reasons.append("eigenvalues of K missed their tolerance: see eigenvalue_residual")
    return reasons
