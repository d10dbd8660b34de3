"""Until when a network learns like a linear model, and what of the residual a linear function can remove."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch

from dynprobe.analyzers import Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._linear_dynamics_data import Samples, Space, as_rows, collect, outputs_of, space_of
from dynprobe.analyzers._linear_dynamics_figure import draw_linear_dynamics
from dynprobe.analyzers._linear_dynamics_findings import findings
from dynprobe.analyzers._linear_dynamics_loss import objective_of
from dynprobe.analyzers._linear_dynamics_model import (
    DRAWS,
    NO_DESCENT,
    Features,
    Schedule,
    features_of,
    schedule_of,
    train,
)
from dynprobe.analyzers._linear_dynamics_walk import Walk
from dynprobe.analyzers._sampling import Meter, check_repeatable, check_seed, subset_note
from dynprobe.analyzers.numerics.break_even import break_even_step
from dynprobe.analyzers.numerics.losses import as_loss
from dynprobe.analyzers.numerics.params import frozen_eval

_SETS = ("checkpoint", "feature_set")
_SHOWN = ("checkpoint", "sample", "output")


def _pair(name: str, dims: tuple[str, ...], what: str, units: str = "") -> dict[str, Var]:
    return {
        name: Var(dims, units, what, f"{name}_stderr"),
        f"{name}_stderr": Var(dims, units, f"Standard error of {name} over samples"),
    }


RETURNS = {
    "feature_set": Var(("feature_set",), "", "Features of the linear model"),
    **_pair("residual_linear", ("checkpoint",), "Part of ‖y‖² that the residual has in V_lin"),
    **_pair("residual_complement", ("checkpoint",), "Part of ‖y‖² that it has outside V_lin"),
    **_pair("relative_mse", _SETS, "‖network − linear model‖²/‖change of the linear model‖²"),
    "batch_noise": Var(_SETS, "", "relative_mse that random batches alone would give", "batch_noise_stderr"),
    "batch_noise_stderr": Var(_SETS, "", "Standard error of batch_noise over draws of the batches"),
    "batch_noise_std": Var(_SETS, "", "Standard deviation of that number between draws of the batches"),
    "weight_decay_part": Var(
        ("checkpoint",),
        "",
        "Part by which weight decay, which is not in the linear models, shrinks the weights",
    ),
    **_pair("optimum_mse", _SETS, "‖network − least squares‖²/‖least squares‖²"),
    **_pair("loss", ("checkpoint",), "Loss of the network"),
    **_pair("linear_loss", _SETS, "Loss of the linear model"),
    "expected_floor": Var((), "", "Expected relative_mse of a network of this width, 0.6 d/width"),
    "width": Var((), "", "Hidden units of a two-layer network"),
    "n_inputs": Var((), "", "Input features, d"),
    "v_lin_dimension": Var((), "", "Dimension of V_lin"),
    "v_lin_chance": Var((), "", "Part of a random residual that lies in V_lin"),
    "n_evaluated": Var((), "", "Samples on which network and linear model are compared"),
    "agreement_step": Var(("feature_set",), "step", "Step at which relative_mse exceeds the level"),
    "agreement_low": Var(("feature_set",), "step", "Certainly not above the level before"),
    "agreement_high": Var(("feature_set",), "step", "Certainly above the level here"),
    "agreement_state": Var(("feature_set",), "", "reached, never, from the start, or unknown"),
    **_pair("kernel_slope", (), "a of the fit a·x·x' + b to the tangent kernel at the first checkpoint"),
    **_pair("kernel_constant", (), "b of that fit"),
    "kernel_explained": Var((), "", "Part of the tangent kernel's variance that the fit explains"),
    "sample": Var(("sample",), "", "Place of a shown sample in the data"),
    "output": Var(("output",), "", "Output"),
    "shown_output": Var(("sample",), "", "The output that is drawn: the label's, or the first"),
    "sample_output": Var(_SHOWN, "", "Outputs of the network on the shown samples"),
    "linear_output": Var(_SHOWN, "", "Outputs of the linear model on them (first feature set)"),
}

TABLE = (
    "residual_linear",
    "residual_complement",
    "relative_mse",
    "batch_noise",
    "optimum_mse",
    "expected_floor",
    "agreement_step",
)


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    del options
    return {"forwards": n_checkpoints + 1}


@analyzer(
    returns=RETURNS,
    figure=draw_linear_dynamics,
    cost=_cost,
    table=TABLE,
    summary=findings,
    summary_of="call",
    summary_returns={"finding": Var(("finding",), "", "What was found, in words", optional=True)},
)
def linear_dynamics(
    checkpoints: Sequence[Any],
    batches: Any,
    loss: Any,
    test_batches: Any = None,
    training: Any = None,
    progress: Any = None,
    *,
    constant: bool = True,
    start: Literal["network", "zero"] = "network",
    level: Annotated[float, Range(min=0)] = 0.1,
    linear_steps: Annotated[int, Range(min=1)] = 1000,
    learning_rate: Annotated[float, Range(min=0)] = 0.0,
    show: Annotated[int, Range(min=1)] = 3,
    seed: int = 0,
) -> Measurement:
    """Until when a network learns like a linear model, and what of the residual a linear function can remove.

    The residual r = y − f of every checkpoint is split into its part in V_lin, the span of the input features
    over the samples (with the constant), and the part outside, which no linear function can remove; both over
    ‖y‖². f is the output for the mean squared error, the probabilities for classification. Beside it, linear
    models are trained on the run's own loss at its own learning rate for its own number of steps,

        f_lin(x) = f_0(x) + β·ψ(x),  β = 0 at the start,

    with the features ψ of Hu et al. for a two-layer fully connected network (with and without the terms in
    ‖x‖), and for every network with ψ = (√a x, √b), a·x·x' + b being the best such fit to its tangent kernel
    at the first checkpoint. `relative_mse` is Σ|f − f_lin|²/Σ|f_lin − f_0|² over the samples, of the outputs
    before any softmax; `batch_noise` is the same of a linear model trained on random batches of the run's
    size. Test data are used where there are any, else the training data.

    Cost: one forward pass over the data per checkpoint, at most 480 gradients of single samples, and one or
    two decompositions of the features; a loss other than the mean squared error, and the descents on batches,
    go step by step.

    Args:
        checkpoints: Of one run, in order; each with `step` and `model`.
        batches: The training data, pairs (inputs, targets), re-iterable.
        loss: The loss, or a callable such as `F.cross_entropy`.
        test_batches: Test data, on which network and linear models are compared; else the training data.
        training: The manifest's facts: learning_rate, schedule, optimizer, momentum, nesterov, batch_size,
            weight_decay.
        progress: Called with (done, total, what).
        constant: Whether the constant function is in V_lin.
        start: network starts the linear models at the outputs of the first checkpoint, as a network needs
            whose outputs are not zero there; zero starts them from nothing at step 0, as in the paper, whose
            networks have outputs zero at the start.
        level: Relative mean squared error up to which network and linear model count as agreeing.
        linear_steps: How many steps the linear models are followed.
        learning_rate: Of gradient descent on the linear models; 0 takes what the manifest says.
        show: Of how many samples the outputs are reported and drawn.
        seed: Of the random batches with which the noise of batches is estimated.

    Returns:
        Residuals, relative errors and where they exceed the level, each with its error over samples.

    Raises:
        OptionError: If the data or the options leave nothing to compare.

    References:
        Hu, Xiao, Adlam and Pennington, "The Surprising Simplicity of the Early-Time Learning Dynamics of
        Neural Networks", NeurIPS 2020, §3 (theorems) and §4 (experiments).
    """
    if level <= 0:
        raise OptionError(f"level {level:g} is never reached.", "Give a number above 0, such as 0.1.")
    check_seed(seed)
    own = collect(batches)
    seen_batches = batches if test_batches is None else test_batches
    seen = own if test_batches is None else collect(test_batches)
    if min(len(own), len(seen)) < 2:
        raise OptionError("a linear model needs at least two samples.", "Raise --samples.")
    if own.inputs.shape[1] != seen.inputs.shape[1]:
        raise OptionError(
            f"test inputs have {seen.inputs.shape[1]} features and training inputs {own.inputs.shape[1]}.",
            "Check --test-data-arg.",
        )
    steps = [checkpoint.step for checkpoint in checkpoints]
    schedule = schedule_of(
        steps,
        training,
        learning_rate=learning_rate,
        linear_steps=linear_steps,
        from_network=start == "network",
        n_samples=len(own),
        n_source=int(getattr(batches, "n_total", len(own))),
    )

    model = checkpoints[0].model
    with frozen_eval(model):
        check_repeatable(model, batches)
        features = features_of(model, batches, own)
        first = outputs_of(model, batches, own.keep)
        space = space_of(as_loss(loss), first, own.targets)
        target = space.target(own.targets)
        objective = objective_of(loss, first, own.targets, target, model)
        if objective.quadratic:  # whatever its name is
            space = Space("identity", space.shape)
        if schedule.reached and objective.refusal:
            schedule = Schedule(notes=(f"{objective.refusal}: {NO_DESCENT}",))
        first_seen = first if seen is own else outputs_of(model, seen_batches, seen.keep)
    last = max(schedule.steps, default=0)
    descents = len(features.sets) * (1 + DRAWS * bool(schedule.batch_size))
    meter = Meter(progress, len(checkpoints) + descents * last)
    flat, flat_seen = as_rows(first), as_rows(first_seen)
    if start == "zero":
        flat, flat_seen = torch.zeros_like(flat), torch.zeros_like(flat_seen)
    models = {
        name: train(of, own, flat, target, objective, space.shape, schedule, meter, seed)
        for name, of in features.sets.items()
    }
    walk = Walk(seen, space, objective.loss, schedule, models, flat_seen, constant=constant, show=show)
    for i, checkpoint in enumerate(checkpoints):
        model = checkpoint.model
        with frozen_eval(model):
            outputs = outputs_of(model, seen_batches, seen.keep)
        walk.add(i, outputs)
        meter.add(1, "checkpoints")
    values = walk.values() | _of_run(features, own)
    values |= _agreement(steps, values, level, len(models))
    notes = [
        "compared on the training data: there are no test data"
        if test_batches is None
        else f"compared on {len(seen):,} test samples; the linear models are trained on {len(own):,}",
        *subset_note(batches, ": the linear models are trained on this part"),
        *features.notes,
        *objective.notes,
        *schedule.notes,
        *walk.notes(models),
    ]
    spent = {"forwards": len(checkpoints) + 1 + (seen is not own), "gradients": features.kernel.n_gradients}
    return Measurement(values, spent=spent | {"linear_steps": last * descents}, notes=notes)


def _of_run(features: Features, own: Samples) -> dict[str, Any]:
    kernel = features.kernel
    return {
        "expected_floor": features.floor,
        "width": features.width,
        "n_inputs": own.inputs.shape[1],
        "kernel_slope": kernel.slope,
        "kernel_slope_stderr": kernel.slope_stderr,
        "kernel_constant": kernel.constant,
        "kernel_constant_stderr": kernel.constant_stderr,
        "kernel_explained": kernel.explained,
    }


def _agreement(steps: Sequence[Any], values: Mapping[str, Any], level: float, n_sets: int) -> dict[str, Any]:
    """The first step at which each linear model and the network are further apart than the level."""
    place = [float(step) if isinstance(step, int | float) else math.nan for step in steps]
    found = [
        break_even_step(
            place, values["relative_mse"][:, i] / level, values["relative_mse_stderr"][:, i] / level
        )
        for i in range(n_sets)
    ]
    return {
        "agreement_step": np.array([one.step for one in found]),
        "agreement_low": np.array([one.low for one in found]),
        "agreement_high": np.array([one.high for one in found]),
        "agreement_state": np.array([one.state for one in found], dtype=object),
    }
