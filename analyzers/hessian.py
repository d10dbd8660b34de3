"""Largest and smallest eigenvalues of the loss Hessian, its trace and its spectral density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers import Measurement, OptionError, Range, Result, Var, analyzer
from dynprobe.analyzers._curvature import (
    GIGABYTE,
    Batches,
    Curvature,
    End,
    Problem,
    check_subsets,
    chosen_parameters,
    in_batches_of,
)
from dynprobe.analyzers._hessian_figure import draw_hessian
from dynprobe.analyzers._hessian_parts import Task
from dynprobe.analyzers._hessian_spectrum import Spectrum
from dynprobe.analyzers._sampling import check_repeatable, check_seed, subset_note
from dynprobe.analyzers._training import training_facts
from dynprobe.analyzers.numerics.evaluate import evaluate
from dynprobe.analyzers.numerics.grid import symmetric_axis
from dynprobe.analyzers.numerics.losses import as_loss
from dynprobe.analyzers.numerics.model_function import normalising_layers
from dynprobe.analyzers.numerics.params import frozen_eval

CURVATURE = "loss per squared parameter"
SUBSET = (
    ": the Hessian of a subset is another one, with eigenvalues biased upwards; this is the largest error of "
    "all, and --subsets shows it"
)


def _some(dims: tuple[str, ...], what: str, units: str = CURVATURE, error: str = "") -> Var:
    return Var(dims, units, what, error, optional=True)


RETURNS = {
    "rank": Var(("rank",), "", "Rank"),
    "eigenvalue": Var(("rank",), CURVATURE, "Eigenvalue", "error_bound"),
    "residual": Var(("rank",), CURVATURE, "‖Hv − λv‖ of the pair"),
    "error_bound": Var(("rank",), CURVATURE, "Bound on the error of the eigenvalue, on these data"),
    "eigenvalue_converged": Var(("rank",), "", "1 where the bound is within the tolerance"),
    "largest": Var((), CURVATURE, "Largest Ritz value: no more than the largest eigenvalue"),
    "largest_residual": Var((), CURVATURE, "Its ‖Hv − λv‖"),
    "smallest": Var((), CURVATURE, "Smallest Ritz value: no less than the smallest eigenvalue"),
    "smallest_residual": Var((), CURVATURE, "Its ‖Hv − λv‖"),
    "spectral_gap": _some((), "Largest ratio of one positive eigenvalue to the next", ""),
    "n_outliers": _some((), "Eigenvalues above that gap", ""),
    "discrepancy": Var((), CURVATURE, "Misfit of an independent product with all pairs"),
    "orthogonality": Var((), "", "Largest entry of |QᵀQ − I|"),
    "asymmetry": Var((), CURVATURE, "Largest |uᵀHv − vᵀHu| seen"),
    "n_parameters": Var((), "", "Parameters that the matrix is restricted to"),
    "n_samples": Var((), "", "Samples it is averaged over"),
    "loss": Var((), "", "Loss", "loss_stderr"),
    "loss_stderr": Var((), "", "Standard error over samples"),
    "stability_threshold": Var((), CURVATURE, "2/η, with momentum β 2(1 + β)/η"),
    "trace": _some((), "Trace", error="trace_stderr"),
    "trace_stderr": _some((), "Standard error over probes, 0 where exact"),
    "trace_probes": _some((), "Random vectors it was estimated from, 0 where exact", ""),
    "layer": _some(("layer",), "Layer", ""),
    "layer_trace": _some(("layer",), "Trace of the layer's block", error="layer_trace_stderr"),
    "layer_trace_stderr": _some(("layer",), "Standard error over probes"),
    "density": _some(("grid",), "Spectral density", "share per unit of eigenvalue", "density_stderr"),
    "density_stderr": _some(("grid",), "Standard error over probes", "share per unit of eigenvalue"),
    "density_at": _some(("grid",), "Eigenvalue where the density is given"),
    "density_width": _some((), "Standard deviation of the Gaussian it is smoothed with"),
    "node": _some(("probe", "node_index"), "Ritz value of a probe"),
    "node_weight": _some(("probe", "node_index"), "Eigenvalues that a Ritz value stands for", ""),
    "negative_share": _some(
        (), "Share of eigenvalues below −1 % of the largest magnitude", "", "negative_share_stderr"
    ),
    "negative_share_stderr": _some((), "Standard error over probes", ""),
    "negative_trace": _some((), "Sum of those eigenvalues", error="negative_trace_stderr"),
    "negative_trace_stderr": _some((), "Standard error over probes"),
    "layer_eigenvalue": _some(
        ("layer", "rank"), "Eigenvalue of the layer's block", error="layer_error_bound"
    ),
    "layer_residual": _some(("layer", "rank"), "‖Hv − λv‖ of the layer's pair"),
    "layer_error_bound": _some(("layer", "rank"), "Bound on the error of the layer's eigenvalue"),
    "epsilon": _some(("epsilon",), "Distance along the eigenvector", ""),
    **{
        f"along_{prefix}{metric}{suffix}": _some(
            ("along", "epsilon"), f"{what} along an eigenvector", "", error
        )
        for prefix, of in (("", ""), ("test_", "Test "))
        for metric in ("loss", "accuracy")
        for suffix, what, error in (
            ("", f"{of}{metric}".capitalize(), f"along_{prefix}{metric}_stderr"),
            ("_stderr", f"Standard error of the {of.lower()}{metric}", ""),
        )
    },
    "subset_eigenvalue": _some(("subset", "rank"), "Eigenvalue on a disjoint subset"),
    "subset_size": _some((), "Samples of a subset", ""),
    "eigenvalue_spread": _some(("rank",), "Standard deviation of the eigenvalue between disjoint subsets"),
    "eigenvalue_bias": _some(("rank",), "Upward bias of the eigenvalue on all samples, if it falls as 1/n"),
    "eigenvector": _some(("rank", "parameter"), "Eigenvector, in the order of the model's parameters", ""),
}

TABLE = (
    "eigenvalue",
    "smallest",
    "trace",
    "stability_threshold",
    "eigenvalue_spread",
    "negative_share",
    "n_outliers",
    "loss",
    "maximum",
    "maximum_step",
)


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    """Typical counts in products over all data: for all subsets, and each of 8 layers, as for the whole."""
    del n_checkpoints
    solve = 3 * int(options.get("top_k", 5)) + 15
    hvps = solve * (1 + bool(options.get("subsets", 0)) + 8 * bool(options.get("layers", False)))
    if options.get("density", False):
        hvps += int(options.get("density_probes", 5)) * int(options.get("density_steps", 32))
    if options.get("trace", False):
        hvps += 30
    return {"hvps": hvps, "forwards": 1 + int(options.get("along", 0)) * int(options.get("resolution", 41))}


def _skips(options: Mapping[str, Any]) -> Sequence[str]:
    return [] if options.get("along", 0) else ["test_batches"]


def _summary(result: Result) -> dict[str, Any]:
    """The largest eigenvalue over the run, and the step it is reached at; NaN if that end was not solved."""
    largest = np.atleast_1d(result["largest"]).astype(float)
    solved = (result.attributes.get("options") or {}).get("which") != "smallest"
    if not solved or not np.isfinite(largest).any():
        return {"maximum": math.nan, "maximum_step": math.nan}
    at = int(np.nanargmax(largest))
    steps = np.atleast_1d(result["step"]) if "step" in result else np.arange(len(largest))
    step = float(steps[at]) if steps.dtype.kind in "if" else math.nan
    return {"maximum": float(largest[at]), "maximum_step": step}


@analyzer(
    returns=RETURNS,
    figure=draw_hessian,
    table=TABLE,
    cost=_cost,
    skips=_skips,
    summary=_summary,
    summary_returns={
        "maximum": Var((), CURVATURE, "Largest eigenvalue over the run"),
        "maximum_step": Var((), "", "Step of that checkpoint"),
    },
)
def hessian(
    model: torch.nn.Module,
    batches: Any,
    loss: Any,
    test_batches: Any = None,
    step: Any = None,
    training: Any = None,
    partial: Any = None,
    progress: Any = None,
    *,
    top_k: Annotated[int, Range(min=1)] = 5,
    which: End = "largest",
    tol: Annotated[float, Range(min=0)] = 1e-4,
    curvature: Curvature = "hessian",
    trace: bool = False,
    trace_tol: Annotated[float, Range(min=0)] = 0.05,
    max_probes: Annotated[int, Range(min=4)] = 200,
    density: bool = False,
    density_probes: Annotated[int, Range(min=2)] = 5,
    density_steps: Annotated[int, Range(min=2)] = 32,
    params: str = "",
    layers: bool = False,
    along: Annotated[int, Range(min=0)] = 0,
    span: float = 0.5,
    resolution: Annotated[int, Range(min=3)] = 41,
    subsets: Annotated[int, Range(min=0)] = 0,
    mode: Literal["eval", "train"] = "eval",
    train_batch: Annotated[int, Range(min=0)] = 0,
    vectors: bool = False,
    learning_rate: Annotated[float, Range(min=0)] = 0.0,
    memory: Annotated[float, Range(min=0)] = 4.0,
    max_hvps: Annotated[int, Range(min=0)] = 0,
    seed: int = 0,
) -> Measurement:
    """Largest and smallest eigenvalues of the loss Hessian, its trace and its spectral density.

    H = ∇²L of the mean loss over samples with respect to all parameters, in eval mode, by Lanczos with full
    reorthogonalisation: an eigenvalue λ with vector v has the residual ‖Hv − λv‖, and a bound on its error,
    min(r, r²/gap). A further random start looks for eigenvalues that occur more than once. The same Krylov
    space takes the outliers out of the trace (Hutch++) and out of the density (stochastic Lanczos
    quadrature), so that probes are spent on the rest.

    The matrix is that of the data it is measured on: on a subset its eigenvalues are biased upwards, and no
    residual shows that. `subsets` does.

    Cost: 3 to 5 Hessian-vector products per pair, each 1.6 to 1.9 gradients while the graphs fit in memory.

    Args:
        model: The network; found unchanged afterwards, which is checked.
        batches: Pairs (inputs, targets), re-iterable.
        loss: The loss, or a callable such as `F.cross_entropy`.
        test_batches: Test data, for `along`.
        step: The checkpoint's step, for the learning rate.
        training: The manifest's [training], for the learning rate.
        partial: Where finished layers and subsets are kept.
        progress: Called with (done, total, what).
        top_k: How many eigenpairs; with which both, half from each end.
        which: largest, smallest (most negative first), largest-magnitude, or both ends. Whatever is chosen,
            largest and smallest of the Krylov space are reported beside, with their residuals.
        tol: Relative tolerance of the eigenvalues.
        curvature: hessian; ggn (generalised Gauss-Newton: without the curvature of the network itself); or
            fisher (labels drawn from the model; equal to ggn for cross-entropy).
        trace: Trace, whole and by layer: exact where the network is piecewise linear in each parameter
            tensor, estimated otherwise.
        trace_tol: Standard error of the trace to reach, relative to it.
        max_probes: Most random vectors for it.
        density: Spectral density and the negative part of the spectrum: the Ritz values of every probe with
            their weights, and a curve smoothed with a Gaussian of 1/100 of the range.
        density_probes: Random vectors for it.
        density_steps: Products for each of them.
        params: Regular expression; the block of the parameters whose names it finds.
        layers: The spectrum of each layer's own block as well.
        along: Loss and accuracy along so many eigenvectors, on training and on test data where there are any.
        span: How far, in both directions; eigenvectors have unit length.
        resolution: Points along each of them, odd.
        subsets: Solve again on so many disjoint random subsets, and report the spread.
        mode: train lets BatchNorm use each batch's own statistics; dropout stays off.
        train_batch: Samples in such a batch; 0 takes the batch size of the manifest's [training], else all
            samples.
        vectors: Store the eigenvectors in the report.
        learning_rate: For the stability threshold 2/η; 0 takes it from the manifest's [training].
        memory: Gigabytes for kept graphs and Krylov vectors; where they do not fit, graphs are built afresh
            and the space restarts.
        max_hvps: Most products for the eigenpairs; 0 allows 40 for each and 200 more.
        seed: Of start vectors, probes and subsets.

    Returns:
        Eigenvalues with residuals and bounds, and what else was asked for; see the report's long names.

    Raises:
        OptionError: If the options contradict each other, the network or the data.

    References:
        Yao, Gholami, Lei, Keutzer and Mahoney, "Hessian-based Analysis of Large Batch Training and Robustness
        to Adversaries", NeurIPS 2018.
        Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue
        Density", ICML 2019.
        Parlett, "The Symmetric Eigenvalue Problem" (1998), chapters 11 and 13.
    """
    check_seed(seed)
    _check_options(tol, subsets, along, top_k, max_hvps, train=mode == "train", train_batch=train_batch)
    axis = _axis(resolution, span) if along else np.zeros(1)
    loss = as_loss(loss)
    facts = training_facts(training, step, learning_rate=learning_rate)
    with frozen_eval(model):
        names = chosen_parameters(model, params)
        check_repeatable(model, batches)
        own = evaluate(model, batches, loss)["loss"]
        data: Batches = list(batches)
        notes = [*subset_note(batches, SUBSET), *facts.notes]
        if subsets:
            check_subsets(data, subsets)
        if mode == "train" and not normalising_layers(model):
            mode = "eval"
            notes.append("the network has no BatchNorm: it is the same in train and eval mode")
        if mode == "train":
            data = in_batches_of(data, train_batch or facts.batch_size or 0)
            notes.append(
                f"BatchNorm used the statistics of batches of {len(data[0][1])} samples, in the order of the "
                "data; the loss is that in eval mode"
            )
        asked = {"top_k": top_k, "trace": trace, "density": density, "subsets": subsets, "layers": layers}
        task = Task(
            Problem(model, loss, curvature, mode, memory * GIGABYTE),
            data,
            names,
            top_k,
            which,
            tol,
            seed,
            max_products=max_hvps,
            reserved=density_steps if density else 0,
            partial=partial,
            progress=progress,
            expected=_cost(asked, 1)["hvps"],
        )
        task.solve()
        if trace or density:
            Spectrum(task).measure(
                trace_tol if trace else None, max_probes, density_probes * density, density_steps
            )
        vector = task.pairs.eigenvector
        task.release()
        if layers:
            task.by_layer()
        if subsets:
            task.on_subsets(subsets)
        if along:
            task.along(test_batches, axis, along)
    values = task.values | {
        "loss": own.value,
        "loss_stderr": own.stderr,
        "stability_threshold": facts.stability_threshold,
    }
    if vectors:
        values["eigenvector"] = vector.float()
    task.spent["forwards"] += 1
    return Measurement(
        values,
        converged=not task.reasons,
        reason="; ".join(task.reasons),
        spent=task.spent,
        notes=[*notes, *task.notes],
    )


def _check_options(
    tol: float, subsets: int, along: int, top_k: int, max_hvps: int, *, train: bool, train_batch: int
) -> None:
    """No option is accepted and ignored, and none fails after the compute."""
    if not 0 < tol < 1:
        raise OptionError(f"tol {tol:g} is no relative tolerance.", "0.0001 asks for four digits.")
    if subsets == 1:
        raise OptionError("one subset is all of the data.", "Give --subsets 2 or more, or 0 for none.")
    if along > top_k:
        raise OptionError(f"along {along} needs so many eigenvectors.", f"Give --top-k {along}.")
    if 0 < max_hvps <= top_k:
        raise OptionError(f"max-hvps {max_hvps} cannot give {top_k} pairs.", f"Give more than {top_k}, or 0.")
    if train_batch and not train:
        raise OptionError("train-batch is for mode train.", "Add --mode train, or leave it out.")
    if train and along:
        raise OptionError(
            "along draws the loss in eval mode, and mode train measures another function.",
            "Leave one of the two out.",
        )


def _axis(resolution: int, span: float) -> NDArray[np.float64]:
    """Distances along an eigenvector.

    Raises:
        OptionError: If they cannot be as asked for.
    """
    try:
        return symmetric_axis(resolution, span)
    except ValueError as error:
        raise OptionError(str(error), "Change --resolution or --span.") from error
