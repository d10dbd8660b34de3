"""The linear models that a network is compared with: which features, trained how, and what they predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._linear_dynamics_data import Samples, spread
from dynprobe.analyzers._linear_dynamics_loss import Objective
from dynprobe.analyzers._sampling import Meter
from dynprobe.analyzers._training import SGD, training_facts
from dynprobe.analyzers.numerics.affine_kernel import (
    AffineKernel,
    fit_affine,
    n_kernel_samples,
    tangent_kernel,
)
from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.linear_model import (
    Rows,
    decompose,
    descend,
    descend_by_modes,
    least_squares,
    shuffled,
)
from dynprobe.analyzers.numerics.two_layer import NotTwoLayer, early_features, recognise

PAPER, ABLATED, MEASURED = "paper", "paper without norm", "measured kernel"
FLOOR = 0.6
"""Relative mean squared error of a network of width m and its linear model is about this times d/m."""
NO_DESCENT = "there is no linear model by gradient descent: relative_mse and what follows from it are NaN"
DRAWS = 16
"""Descents on random batches."""
CENTRED = 0.1
"""Part of mean ‖x‖² that the mean input may have before a note says that inputs are not centred."""


@dataclass(frozen=True)
class Features:
    """What the features of the linear models are, from the network at the first checkpoint.

    Attributes:
        sets: Functions of inputs of shape (n_samples, n_inputs), by name.
        width: Hidden units of a two-layer network, else NaN.
        floor: Expected relative error of a network of that width, else NaN.
        kernel: How affine the network's tangent kernel is.
        notes: For the reader.
    """

    sets: Mapping[str, Callable[[Tensor], Tensor]]
    width: float
    floor: float
    kernel: AffineKernel
    notes: tuple[str, ...]


def features_of(model: nn.Module, batches: Any, samples: Samples) -> Features:
    """Make the feature sets from a network in eval mode.

    Args:
        model: At the first checkpoint.
        batches: The training data.
        samples: The same, gathered.

    Raises:
        OptionError: If nothing in it is trained.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if len(frozen) == len(list(model.parameters())):
        raise OptionError(
            "every parameter of the network is frozen (requires_grad is False): it learns nothing.",
            "Check --model.",
        )
    first = next(iter(batches))[0]
    notes: list[str] = []
    sets: dict[str, Callable[[Tensor], Tensor]] = {}
    width = floor = math.nan
    try:
        if not isinstance(first, Tensor):
            raise NotTwoLayer("its inputs are not one tensor")
        if frozen:
            raise NotTwoLayer(f"frozen: {', '.join(frozen)}; the theorem trains both layers")
        found = recognise(model, first)
        psi = early_features(model, found, first, samples.inputs)
        sets = {PAPER: psi, ABLATED: lambda inputs: psi(inputs, norm=False)}
        width = float(model.get_parameter(found.hidden).shape[0])
        floor = FLOOR * samples.inputs.shape[1] / width
        notes += _centring(samples.inputs)
    except NotTwoLayer as reason:
        notes.append(
            f"the network is not a two-layer fully connected one that is trained whole ({reason}): "
            f"the features of the paper and the expected floor are left out; {MEASURED} has the features "
            "√a·x, √b of the kernel's fit"
        )
    kernel = _kernel(model, batches, samples)
    sets[MEASURED] = kernel.features
    if math.isfinite(kernel.explained):
        notes.append(
            f"at the first checkpoint a·x·x' + b explains {100 * kernel.explained:.0f} % of the variance of "
            f"the tangent kernel over pairs of {kernel.n_samples} training samples"
        )
    return Features(sets, width, floor, kernel, tuple(notes))


def _centring(inputs: Tensor) -> list[str]:
    share = float((inputs.mean(0) ** 2).sum() / (inputs**2).sum(1).mean())
    if share <= CENTRED:
        return []
    return [
        f"the inputs are not centred ({100 * share:.0f} % of mean ‖x‖² is that of the mean input), which the "
        f"theorem behind the features of the paper assumes; {MEASURED} does not"
    ]


def _kernel(model: nn.Module, batches: Any, samples: Samples) -> AffineKernel:
    """From samples spread evenly over the data, whichever batches they are in."""
    n = n_kernel_samples(model, len(samples))
    rows = spread(len(samples), n)
    inside = samples.keep.nonzero()[:, 0][rows].tolist()
    picked, start = [], 0
    for inputs, targets in batches:
        here = [i - start for i in inside if start <= i < start + len(targets)]
        if here:
            picked.append(map_tensors(lambda t, here=here: t[here], inputs))  # type: ignore[misc]
        start += len(targets)
    kernel, n_gradients = tangent_kernel(model, _joined(picked))
    return fit_affine(kernel, samples.inputs[rows].numpy(), n_gradients)


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], Mapping):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@dataclass(frozen=True)
class Schedule:
    """How the linear models descend, and which checkpoints they reach.

    Attributes:
        origin: Step at which they start.
        reached: Places of the checkpoints that they reach.
        steps: Steps from the start at these.
        rates: Learning rate of each of these steps.
        momentum: Heavy-ball coefficient.
        nesterov: Whether it is Nesterov's.
        batch_size: Of the run: 0 for all samples, None where it is not known or cannot be drawn.
        decay: By which part weight decay shrinks the weights up to each reached checkpoint.
        notes: For the reader, with the reason where nothing is reached.
    """

    origin: float = math.nan
    reached: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    momentum: float = 0.0
    nesterov: bool = False
    batch_size: int | None = None
    decay: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default=())


def schedule_of(
    steps: Sequence[Any],
    training: Mapping[str, Any] | None,
    *,
    learning_rate: float,
    linear_steps: int,
    from_network: bool,
    n_samples: int,
    n_source: int,
) -> Schedule:
    """Read how the run was trained; where that is not known, the linear models descend nowhere, and why.

    Args:
        steps: Of the checkpoints.
        training: The manifest's facts.
        learning_rate: From the command line, 0 for the manifest's.
        linear_steps: How far to follow.
        from_network: Whether they start at the first checkpoint, else at step 0.
        n_samples: Training samples that they descend on.
        n_source: Training samples that the run had.
    """
    facts = dict(training or {})
    optimizer = str(facts.get("optimizer", "")).lower()
    missing = f"so {NO_DESCENT}"
    if not all(isinstance(s, int | float) and float(s).is_integer() and s >= 0 for s in steps):
        return Schedule(notes=(f"the checkpoints have no steps that are whole numbers, {missing}",))
    if optimizer not in SGD and not learning_rate:
        return Schedule(
            notes=(
                f"the run's optimizer is {optimizer}, not gradient descent, {missing}; give --learning-rate",
            )
        )
    origin = int(steps[0]) if from_network else 0
    reached = tuple(i for i, s in enumerate(steps) if 0 <= s - origin <= linear_steps)
    if not reached:
        return Schedule(
            notes=(f"no checkpoint is within --linear-steps {linear_steps} of the start, {missing}",)
        )
    after = tuple(int(steps[i]) - origin for i in reached)
    found = [
        training_facts(facts, origin + t, learning_rate=learning_rate) for t in range(max(1, max(after)))
    ]
    if (unknown := next((f for f in found if f.learning_rate is None), None)) is not None:
        why = f" ({unknown.notes[0]})" if unknown.notes else ""
        return Schedule(notes=(f"the learning rate is not known{why}, {missing}; give --learning-rate",))
    is_sgd = optimizer in SGD
    momentum = found[0].momentum if is_sgd else 0.0
    nesterov = bool(momentum) and (optimizer == "nesterov" or bool(facts.get("nesterov", False)))
    rates = tuple(float(f.learning_rate or 0.0) for f in found)
    size = found[0].batch_size
    if size is not None and size >= n_samples:
        size = 0 if n_samples >= n_source or size >= n_source else None
    notes = _training_notes(facts, size, n_samples, momentum, is_sgd=is_sgd, origin=origin)
    if len(reached) < len(steps):
        notes.append(
            f"the linear models are followed for {linear_steps} steps (--linear-steps): relative_mse is NaN "
            f"where checkpoints lie beyond ({len(steps) - len(reached)} of {len(steps)})"
        )
    strength = float(facts.get("weight_decay") or 0.0) / (1 - momentum if 0 <= momentum < 1 else 1.0)
    decay = tuple(strength * sum(rates[:t]) for t in after)
    return Schedule(float(origin), reached, after, rates, momentum, nesterov, size, decay, tuple(notes))


def _training_notes(
    facts: Mapping[str, Any], batch_size: int | None, n: int, momentum: float, *, is_sgd: bool, origin: int
) -> list[str]:
    notes = []
    if not is_sgd:
        notes.append(
            f"the run's optimizer is {facts.get('optimizer')}; the linear models use gradient descent"
        )
    if batch_size:
        notes.append(
            f"the run descended on batches of {batch_size}, the linear models on all {n:,} training samples: "
            "batch_noise is what batches alone would make of relative_mse"
        )
    elif batch_size is None:
        why = "is not known" if not facts.get("batch_size") else "is not below the number of samples measured"
        notes.append(f"batch_noise is NaN: the run's batch size {why}")
    if facts.get("weight_decay"):
        notes.append(f"weight decay {facts['weight_decay']:g} is not in the linear models")
    if momentum and origin:
        notes.append(f"the linear models start at step {origin} without the momentum gathered by then")
    return notes


@dataclass(frozen=True)
class Trained:
    """One linear model.

    Attributes:
        of: Its features.
        weights: Of gradient descent at the reached checkpoints, shape (n_reached, n_features, n_outputs).
        optimum: Of least squares to the targets, shape (n_features, n_outputs).
        on_batches: As `weights`, of several descents on random batches of the run's size, shape (n_draws,
            n_reached, n_features, n_outputs); none where that size is all samples or not known.
        sharpness: Largest learning rate times the largest eigenvalue of its Hessian (squared loss), else NaN.
    """

    of: Callable[[Tensor], Tensor]
    weights: Tensor
    optimum: Tensor
    on_batches: Tensor
    sharpness: float


def train(
    of: Callable[[Tensor], Tensor],
    samples: Samples,
    start: Tensor,
    target: Tensor,
    objective: Objective,
    shape: tuple[int, ...],
    schedule: Schedule,
    meter: Meter,
    seed: int,
) -> Trained:
    """Train a linear model on the run's loss, by eigenmodes where it is the mean squared error.

    Args:
        of: Makes features of inputs.
        samples: The training samples.
        start: Outputs at which it starts, shape (n_samples, n_outputs).
        target: In the outputs' space, the same shape.
        objective: What the run descended on.
        shape: Of the outputs of one sample.
        schedule: Steps and learning rates.
        meter: Told of every step.
        seed: Of the random batches.
    """
    features = of(samples.inputs)
    found = decompose(features, rtol=10 * samples.eps)
    optimum = least_squares(found, target)
    sharpness = math.nan
    nothing = torch.zeros(0, *optimum.shape, dtype=torch.float64)
    if not schedule.reached:
        return Trained(of, nothing, optimum, nothing[None][:0], sharpness)

    def gradient(outputs: Tensor, rows: Rows) -> Tensor:
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            value = objective.of_batch(leaf.reshape(-1, *shape), samples.targets[rows])
            (slope,) = torch.autograd.grad(value, leaf)
        return slope

    def iterate(batches: Iterator[Tensor] | None) -> Tensor:
        return descend(
            features,
            start,
            gradient,
            schedule.steps,
            schedule.rates,
            momentum=schedule.momentum,
            nesterov=schedule.nesterov,
            batches=batches,
            progress=lambda _: meter.add(1, "steps of the linear models"),
        )

    if objective.squared:
        curvature = 2 / target.numel()
        weights = descend_by_modes(
            found,
            target - start,
            curvature,
            schedule.steps,
            schedule.rates,
            momentum=schedule.momentum,
            nesterov=schedule.nesterov,
        )
        sharpness = max(schedule.rates) * curvature * float(found.singular[:1].sum()) ** 2
        meter.add(max(schedule.steps), "steps of the linear models")
    else:
        weights = iterate(None)
    draws = nothing[None][:0]
    if size := schedule.batch_size:
        draws = torch.stack([iterate(shuffled(len(samples), size, seed + i)) for i in range(DRAWS)])
    return Trained(of, weights, optimum, draws, sharpness)
