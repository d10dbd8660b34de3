"""Condensation: into how few directions the neurons of a layer have come together, and how far they went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from dynprobe.analyzers import Measurement, OptionError, Range, Setting, Var, analyzer
from dynprobe.analyzers._condensation import Settings, network_of, walk
from dynprobe.analyzers._condensation_figure import draw_condensation
from dynprobe.analyzers._condensation_summary import SUMMARY_RETURNS, summarise
from dynprobe.analyzers._condensation_verify import verify as verify_merging
from dynprobe.analyzers._sampling import check_seed, subset_note
from dynprobe.analyzers.numerics.losses import as_loss

_COUNT = ("checkpoint", "layer", "threshold")


def _of_layer(what: str) -> Var:
    return Var(("layer",), "", what)


def _at_checkpoint(what: str) -> Var:
    return Var(("checkpoint", "layer"), "", what)


def _of_neuron(what: str, units: str = "") -> Var:
    return Var(("moment", "layer", "neuron"), units, what, optional=True)


def _verified(name: str, what: str, dims: tuple[str, ...] = ()) -> dict[str, Var]:
    stderr = f"{name}_stderr"
    return {
        name: Var(dims, "", what, stderr, optional=True),
        stderr: Var(dims, "", "Standard error over samples", optional=True),
    }


def _directions(name: str, kind: str) -> dict[str, Var]:
    return {
        name: Var(_COUNT, "", f"{kind} that cover all neurons, greedy by amplitude"),
        f"{name}_low": Var(_COUNT, "", f"{kind}, least over random orders"),
        f"{name}_high": Var(_COUNT, "", f"{kind}, most over random orders"),
        f"{name}_least": Var(_COUNT, "", f"{kind}, the least possible with those of neurons"),
        f"{name}_bound": Var(_COUNT, "", f"{kind}, no fewer can do"),
    }


def _by_chance(name: str, kind: str) -> dict[str, Var]:
    dims = ("layer", "threshold")
    return {
        name: Var(dims, "", f"{kind} of as many random neurons, mean"),
        f"{name}_low": Var(dims, "", f"{kind} of as many random neurons, least"),
        f"{name}_high": Var(dims, "", f"{kind} of as many random neurons, most"),
    }


RETURNS = {
    "layer": _of_layer("Layer"),
    "threshold": Var(("threshold",), "", "Cosine above which a neuron has a direction"),
    **_directions("effective_directions", "Directions"),
    **_directions("effective_directions_unsigned", "Directions up to sign"),
    "effective_ratio": _at_checkpoint("Directions per counted neuron, at the threshold nearest 0.95"),
    **_by_chance("chance_directions", "Directions"),
    **_by_chance("chance_directions_unsigned", "Directions up to sign"),
    "n_neurons": _of_layer("Neurons, or filters"),
    "fan_in": _of_layer("Input weights of a neuron, with the bias"),
    "amplitude_kind": _of_layer("Amplitude: |w|, or |a||w| where the layer after it is known"),
    "relative_distance": _at_checkpoint("Distance from the first checkpoint over the norm there"),
    "relative_distance_all": Var(("checkpoint",), "", "The same of all these layers together"),
    "weight_norm": _at_checkpoint("Norm of the weights and biases"),
    "amplitude_mean": _at_checkpoint("Mean amplitude of the neurons"),
    "amplitude_max": _at_checkpoint("Largest amplitude of a neuron"),
    "zero_neurons": _at_checkpoint("Neurons whose input weights are all zero; they are not counted"),
    "small_neurons": _at_checkpoint("Neurons below the least amplitude; they are not counted"),
    "moment": Var(("moment",), "", "Checkpoint: first or last", optional=True),
    "neuron_index": Var(("layer", "neuron"), "", "Number of the neuron in its layer", optional=True),
    "amplitude": _of_neuron("Amplitude"),
    "orientation": _of_neuron("Angle in the plane of the last checkpoint's directions", "rad"),
    "orientation_share": _of_neuron("Part of the squared unit vector that lies in that plane"),
    "similarity": Var(("moment", "layer", "neuron", "other"), "", "Cosine similarity", optional=True),
    **_verified("loss", "Loss at the last checkpoint"),
    **_verified("accuracy", "Accuracy at the last checkpoint"),
    **_verified("reduced_loss", "Loss of the reduced network", ("threshold",)),
    **_verified("reduced_loss_change", "Loss of the reduced network less that of the whole", ("threshold",)),
    **_verified("reduced_accuracy", "Accuracy of the reduced network", ("threshold",)),
    **_verified("reduced_agreement", "Samples both networks classify alike", ("threshold",)),
    "reduced_neurons": Var(("layer", "threshold"), "", "Neurons of the reduced network", optional=True),
    "n_weights": Var((), "", "Weights and biases of these layers", optional=True),
    "reduced_weights": Var(("threshold",), "", "The same of the reduced network", optional=True),
}

TABLE = (
    "effective_ratio",
    "relative_distance",
    "loss",
    "accuracy",
    "reduced_loss",
    "reduced_accuracy",
    "reduced_agreement",
    "reduced_neurons",
    "reduced_weights",
    "width_slope",
    "regime",
)


def _skips(options: Mapping[str, Any]) -> Sequence[str]:
    return [] if options.get("verify", False) else ["batches", "loss"]


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    del n_checkpoints
    return {"forwards": 1 + len(_thresholds(options))} if options.get("verify", False) else {"forwards": 0}


def _thresholds(options: Mapping[str, Any]) -> list[str]:
    return str(options.get("thresholds", "0.9,0.95,0.99")).split(",")


@analyzer(
    returns=RETURNS,
    figure=draw_condensation,
    summary=summarise,
    summary_returns=SUMMARY_RETURNS,
    summary_of="call",
    cost=_cost,
    table=TABLE,
    skips=_skips,
)
def condensation(
    checkpoints: Sequence[Any],
    batches: Any = None,
    loss: Any = None,
    progress: Any = None,
    *,
    thresholds: str = "0.9,0.95,0.99",
    orders: Annotated[int, Range(min=1)] = 20,
    least_amplitude: Annotated[float, Range(min=0, max=1)] = 0.0,
    max_neurons: Annotated[int, Range(min=1)] = 4096,
    neurons: Annotated[int, Range(min=0)] = 64,
    verify: bool = False,
    critical_slope: Annotated[float, Range(min=0), Setting()] = 0.1,
    seed: int = 0,
) -> Measurement:
    """Condensation: into how few directions the neurons of a layer have come together, and how far they went.

    A neuron's vector w is its input weights and bias; a filter is a neuron. The effective number of
    directions is the least number such that each neuron has a cosine above a threshold with one of them. It
    is found greedily by amplitude, with its range over random orders and a lower bound, signed and up to
    sign, and stands beside that of as many random neurons: in few dimensions even these need few. The
    relative distance is |θ(t) − θ(0)|/|θ(0)| of a layer's weights and biases; over runs of at least three
    widths its slope S_w on logarithmic scales tells the regime: linear (below 0), critical, or condensed.

    Needs weights alone. With a model, the layers are known and not guessed, and the amplitude is |a||w| where
    it can be told which layer reads the neurons.

    Cost: one product of a layer's weights with itself per layer and checkpoint; each checkpoint is read once,
    the last one twice.

    Args:
        checkpoints: Of one run, in order; each with `step`, `state` and, if there is one, `model`.
        batches: Pairs (inputs, targets), re-iterable; only for `verify`.
        loss: The loss; only for `verify`.
        progress: Called with (done, total, what).
        thresholds: Cosines above which a neuron counts as having a direction, separated by commas.
        orders: How many random orders of the neurons, beside that by amplitude, the range is taken over.
        least_amplitude: Leave neurons below this part of a layer's largest amplitude out of the counts, and
            cut them off with `verify`.
        max_neurons: Of layers with more neurons no directions are counted; the matrix of their cosines has
            this number squared of entries.
        neurons: How many neurons of a layer, those of largest amplitude, are kept in the report one by one,
            with their similarity matrix; 0 for none.
        verify: Merge the neurons of one direction at the last checkpoint, and evaluate the reduced networks
            on the data.
        critical_slope: S_w within this of 0 counts as critical.
        seed: Of the random orders and of the random neurons.

    Returns:
        Numbers of directions, distances and amplitudes of every layer; see the report's long names.

    Raises:
        OptionError: If there are no layers, or options contradict each other or what was given.

    References:
        Luo, Xu, Ma and Zhang, "Phase diagram for two-layer ReLU neural networks at infinite-width limit",
        JMLR 22 (2021).
        Zhou, Zhou, Luo, Zhang and Xu, "Towards understanding the condensation of neural networks at initial
        training", NeurIPS 2022.
        Zhang, Li, Zhang, Luo and Xu, "Embedding principle of loss landscape of deep neural networks",
        NeurIPS 2021.
    """
    del critical_slope  # the summary's
    check_seed(seed)
    cosines = _parsed(thresholds)
    settings = Settings(cosines, orders, least_amplitude, max_neurons, neurons, seed)
    if verify and (batches is None or loss is None):
        raise OptionError("verify evaluates the reduced network and needs data and a loss.", "Give both.")
    network = network_of(checkpoints, batches if verify else None)
    if verify and not network.has_model:
        raise OptionError("verify needs the model, and nothing says how to build it.", "Give --model.")
    values, notes = walk(checkpoints, network, settings, progress)
    notes = [*network.notes, *notes]
    spent: dict[str, int] = {}
    if verify:
        given = checkpoints[-1].model, batches, as_loss(loss), list(values["layer"])
        found, more = verify_merging(*given, cosines, least_amplitude)
        values |= found
        notes += [*subset_note(batches), *more]
        spent["forwards"] = 1 + len(cosines)
    return Measurement(values, spent=spent, notes=notes)


def _parsed(text: str) -> tuple[float, ...]:
    """The thresholds, ascending.

    Raises:
        OptionError: If one is no cosine between 0 and 1, or there twice.
    """
    try:
        values = sorted(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"thresholds {text!r} are not numbers.", "Give 0.9,0.95,0.99.") from error
    if not all(0 < value < 1 for value in values) or len(set(values)) < len(values):
        raise OptionError(
            f"thresholds {text!r} must be different cosines above 0 and below 1.", "Give 0.9,0.95,0.99."
        )
    return tuple(values)
