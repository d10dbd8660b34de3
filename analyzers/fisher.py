"""Fisher information: its trace by layer, exact or sampled, with the labels that the model itself draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch

from dynprobe.analyzers import Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._fisher_figure import draw_fisher
from dynprobe.analyzers._fisher_parts import SQUARED, Task
from dynprobe.analyzers._sampling import check_repeatable, check_seed, subset_note
from dynprobe.analyzers.core.result import Result
from dynprobe.analyzers.numerics.losses import as_loss
from dynprobe.analyzers.numerics.params import frozen_eval


def _of_layer(what: str, units: str = SQUARED, error: str = "", optional: bool = False) -> Var:
    return Var(("layer",), units, what, error, optional)


def _one(what: str, units: str = "", error: str = "", optional: bool = True) -> Var:
    return Var((), units, what, error, optional)


RETURNS = {
    "trace": _one("Trace of the Fisher information", SQUARED, "trace_stderr", optional=False),
    "trace_stderr": _one("Standard error over samples, random draws included", SQUARED, optional=False),
    "trace_draw_stderr": _one(
        "Standard error over random draws alone, 0 where exact", SQUARED, optional=False
    ),
    "draws": _one("Random draws per sample, 0 where exact", optional=False),
    "method": _one("How the trace was computed", optional=False),
    "empirical_trace": _one(
        "Trace of the empirical Fisher matrix, with the data's labels",
        SQUARED,
        "empirical_trace_stderr",
        False,
    ),
    "empirical_trace_stderr": _one("Standard error over samples", SQUARED, optional=False),
    "layer": Var(("layer",), "", "Layer"),
    "layer_trace": _of_layer("Trace of the layer's block", error="layer_trace_stderr"),
    "layer_trace_stderr": _of_layer("Standard error over samples, random draws included"),
    "layer_share": _of_layer("Share of the trace", ""),
    "layer_empirical_trace": _of_layer("Trace of the layer's block of the empirical Fisher matrix"),
    "gradient_mean_norm": _of_layer("Norm of the mean gradient", "loss per parameter"),
    "gradient_std": _of_layer("Standard deviation of the gradients of samples", "loss per parameter"),
    "kl": _one("KL divergence between the model and the model moved a little", "", "kl_stderr"),
    "kl_stderr": _one("Standard error over samples"),
    "kl_quadratic": _one("The same as the Fisher information predicts it, ½ δᵀFδ"),
    "kl_ratio": _one("KL divergence over prediction"),
    "kfac_log_determinant": _one("Log-determinant of the damped Kronecker-factored Fisher information"),
    "kfac_pseudo_log_determinant": _one("Sum of logarithms of its eigenvalues above the damping"),
    "effective_rank": _one("Its eigenvalues above the damping"),
    "kfac_damping": _one("ε: the damping times the largest eigenvalue of all layers", SQUARED),
    "kfac_coverage": _one("Share of the parameters that its layers hold"),
    "layer_log_determinant": _of_layer("Damped log-determinant", "", optional=True),
    "layer_pseudo_log_determinant": _of_layer("Pseudo-log-determinant", "", optional=True),
    "layer_effective_rank": _of_layer("Eigenvalues above the damping", "", optional=True),
    "layer_participation": _of_layer("Participation ratio of the eigenvalues", "", optional=True),
    "noise_trace": _one("Trace of the curvature felt by noise in the weights", SQUARED, "noise_trace_stderr"),
    "noise_trace_stderr": _one("Monte Carlo standard error", SQUARED),
    "layer_noise_trace": _of_layer("The same by layer", error="layer_noise_trace_stderr", optional=True),
    "layer_noise_trace_stderr": _of_layer("Monte Carlo standard error", optional=True),
}

TABLE = (
    "trace",
    "empirical_trace",
    "kl_ratio",
    "kfac_log_determinant",
    "effective_rank",
    "noise_trace",
    "peak_trace",
    "peak_step",
    "peak_step_low",
    "peak_step_high",
)


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    """For ten classes: a backward pass is some two forward passes."""
    del n_checkpoints
    columns = 10 if options.get("method", "auto") != "sampled" else 4
    passes = 1 + 2 * columns + 3 + (8 if options.get("kl_check", True) else 0)
    passes += (1 + 2 * columns) if options.get("kfac", False) else 0
    return {"forwards": passes + 6 * int(options.get("noise_injection", 0))}


def _summary(result: Result) -> dict[str, Any]:
    """The peak of the trace over the run, and between which checkpoints it lies."""
    trace = np.atleast_1d(result["trace"]).astype(float)
    error = np.nan_to_num(np.atleast_1d(result["trace_stderr"]).astype(float))
    steps = np.atleast_1d(result["step"]) if "step" in result else np.arange(len(trace))
    if not np.isfinite(trace).any() or steps.dtype.kind not in "if":
        return dict.fromkeys(("peak_trace", "peak_step", "peak_step_low", "peak_step_high"), math.nan)
    order = np.argsort(steps, kind="stable")
    order = order[np.isfinite(trace[order])]
    trace, error, steps = trace[order], error[order], steps[order].astype(float)
    peak = int(trace.argmax())
    near = np.flatnonzero(trace >= trace[peak] - 2 * np.hypot(error, error[peak]))
    return {
        "peak_trace": trace[peak],
        "peak_step": steps[peak],
        "peak_step_low": steps[max(near[0] - 1, 0)],
        "peak_step_high": steps[min(near[-1] + 1, len(steps) - 1)],
    }


@analyzer(
    returns=RETURNS,
    figure=draw_fisher,
    table=TABLE,
    cost=_cost,
    summary=_summary,
    summary_returns={
        "peak_trace": Var((), SQUARED, "Largest trace over the run"),
        "peak_step": Var((), "", "Step of that checkpoint"),
        "peak_step_low": Var((), "", "The peak is not before this step"),
        "peak_step_high": Var((), "", "The peak is not after this step"),
    },
)
def fisher(
    model: torch.nn.Module,
    batches: Any,
    loss: Any,
    progress: Any = None,
    *,
    method: Literal["auto", "exact", "sampled"] = "auto",
    tol: Annotated[float, Range(min=0)] = 0.02,
    max_draws: Annotated[int, Range(min=2)] = 256,
    max_columns: Annotated[int, Range(min=1)] = 128,
    kl_check: bool = True,
    kl_size: Annotated[float, Range(min=0)] = 1e-3,
    kfac: bool = False,
    damping: Annotated[float, Range(min=0)] = 1e-6,
    noise_injection: Annotated[int, Range(min=0)] = 0,
    noise_beta: Annotated[float, Range(min=0)] = 1e-7,
    seed: int = 0,
) -> Measurement:
    """Fisher information: its trace by layer, exact or sampled, with the labels that the model itself draws.

    F = E_x E_y[∇log p(y|x) ∇log p(y|x)ᵀ], y ~ p(y|x) of the model, in eval mode. Tr F = E_x‖JᵀS‖²_F with
    S Sᵀ = diag(p) − ppᵀ: one backward pass per class with the squared norm of every sample's gradient, no
    random number (exact), or a few random-sign combinations of the classes (sampled). The *empirical* trace,
    E‖∇ℓ‖² with the data's own labels, is another quantity and stands beside it under its own name.

    Cost: exact, one forward pass and per class one backward pass with norms, 6 gradients of the data for a
    multilayer perceptron with ten classes; sampled, a few backward passes.

    Args:
        model: The network; found unchanged afterwards, which is checked.
        batches: Pairs (inputs, targets), re-iterable.
        loss: cross_entropy, causal_lm, bce_with_logits or mse: one that says which labels the model draws.
        progress: Called with (done, total, what).
        method: exact, sampled, or auto: exact up to `max_columns` classes times positions where the gradients
            of single samples can be had in one backward pass, else sampled (where `vmap` cannot follow, as a
            GRU).
        tol: Relative standard error that the random draws may cause (sampled); it takes draws enough to tell.
        max_draws: Most random draws per sample (sampled).
        max_columns: Classes times positions up to which auto is exact.
        kl_check: Compare KL(p_w‖p_{w+δ}) for a small random δ with the prediction ½ δᵀFδ.
        kl_size: Length of δ over that of the weights.
        kfac: Kronecker-factored approximation per layer: damped log-determinant and effective rank.
        damping: ε over the largest eigenvalue of all layers' Kronecker products.
        noise_injection: Steps of noise injection, the estimate that needs no labels' distribution; 0 for
            none.
        noise_beta: Weight of the divergence there: the noise has the variance 2β/F.
        seed: Of random signs, of δ and of the noise.

    Returns:
        The trace whole and by layer with standard errors, and what else was asked for; see the report's long
        names.

    Raises:
        OptionError: If the loss defines no distribution over labels, the model has no parameters, or the
            options contradict each other.

    References:
        Achille, Rovere and Soatto, "Critical Learning Periods in Deep Networks", ICLR 2019.
        Martens, "New insights and perspectives on the natural gradient method", JMLR 21 (2020), §5, §9.
        Kunstner, Balles and Hennig, "Limitations of the empirical Fisher approximation", NeurIPS 2019.
    """
    check_seed(seed)
    _check_options(tol, kl_check, kl_size, kfac, damping, noise_injection, noise_beta)
    with frozen_eval(model):
        check_repeatable(model, batches)
        task = Task(model, list(batches), as_loss(loss), progress, seed)
        task.choose(method, max_columns, noise_injection)
        task.trace(tol, max_draws)
        task.empirical()
        if kl_check:
            task.kl(kl_size)
        if kfac:
            task.kfac(damping, max_columns)
        if noise_injection:
            task.noise(noise_injection, noise_beta)
    return Measurement(
        task.values,
        converged=not task.reasons,
        reason="; ".join(task.reasons),
        spent=task.spent,
        notes=[*subset_note(batches), *task.notes],
    )


def _check_options(
    tol: float,
    kl_check: bool,
    kl_size: float,
    kfac: bool,
    damping: float,
    noise_injection: int,
    noise_beta: float,
) -> None:
    """No option is accepted and ignored, and none fails after the compute."""
    if not 0 < tol < 1:
        raise OptionError(f"tol {tol:g} is no relative tolerance.", "0.02 asks for two percent.")
    if not 0 < kl_size < 1:
        raise OptionError(f"kl-size {kl_size:g} is no small length.", "0.001 moves the weights by 0.1 %.")
    if not 0 < damping < 1:
        raise OptionError(
            f"damping {damping:g} must be between 0 and 1.",
            "0.000001 is a millionth of the largest eigenvalue; without damping the determinant is zero.",
        )
    if not 0 < noise_beta < math.inf:
        raise OptionError(f"noise-beta {noise_beta:g} must be positive and finite.", "Try 1e-7.")
    if 0 < noise_injection < 16:
        raise OptionError(
            f"noise-injection {noise_injection} is too few steps to settle.", "Give 16 or more, or 0."
        )
    for name, given, needed, on in (
        ("kl-size", kl_size != 1e-3, "--kl-check", kl_check),
        ("damping", damping != 1e-6, "--kfac", kfac),
        ("noise-beta", noise_beta != 1e-7, "--noise-injection", bool(noise_injection)),
    ):
        if given and not on:
            raise OptionError(f"{name} has no effect without {needed}.", f"Add {needed}, or leave it out.")
