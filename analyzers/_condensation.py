"""Walks a run and counts the directions of every layer's neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.effective_directions import (
    Directions,
    chance_directions,
    cosines,
    effective_directions,
    orientation,
    principal_plane,
)
from dynprobe.analyzers.numerics.evaluate import Inputs, map_tensors
from dynprobe.analyzers.numerics.neurons import model_neurons, state_neurons
from dynprobe.analyzers.numerics.outgoing import Link, links, made_up_inputs, n_neurons, outgoing
from dynprobe.analyzers.numerics.params import frozen_eval, private_copy

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MOMENTS = ("first", "last")
CHANCE_DRAWS = 20
SAMPLES = 8
"""Samples on which it is tried out which layer reads another."""
USUAL = 0.95
"""The threshold of the papers; the nearest one measured is what tables and sentences are about."""
COLUMNS = ("distance", "weight_norm", "zero_neurons", "small_neurons", "amplitude_mean", "amplitude_max")
COUNTS = Directions._fields
"""What is reported of each count: `effective_directions`, `effective_directions_low`, and so on."""


@dataclass(frozen=True)
class Settings:
    """The options that decide what is counted."""

    thresholds: tuple[float, ...]
    orders: int
    least_amplitude: float
    max_neurons: int
    neurons: int
    seed: int


@dataclass
class Layer:
    """The neurons of one layer at one checkpoint.

    Args:
        vectors: Input weights with the bias, shape (n_neurons, fan_in).
        amplitude: |w|, or |a||w| where the layer that reads the neurons is known, shape (n_neurons,).
    """

    vectors: Floats
    amplitude: Floats

    def counted(self, least_amplitude: float) -> Bools:
        """Those with a direction: not zero, and not below this part of the largest amplitude."""
        largest = self.amplitude.max(initial=0.0)
        return np.asarray(self.nonzero & (self.amplitude >= least_amplitude * largest))

    @property
    def nonzero(self) -> Bools:
        """Those whose input weights are not all zero."""
        return np.asarray(self.vectors.any(1))


@dataclass
class Network:
    """How the weights of a run's checkpoints are read: by a model, or by names and shapes.

    Args:
        has_model: Whether there is a model.
        readers: By layer, the layer that reads it, where that is known.
        notes: What was left out.
    """

    has_model: bool
    readers: dict[str, Link] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def amplitude(self, layer: str) -> str:
        """What a layer's amplitude is."""
        return "|a||w|" if layer in self.readers else "|w|"

    def layers(self, checkpoint: Any) -> dict[str, Layer]:
        """The layers of one checkpoint by name."""
        if not self.has_model:
            return {
                name: Layer(vectors := _floats(tensor), np.linalg.norm(vectors, axis=1))
                for name, tensor in state_neurons(checkpoint.state).items()
            }
        model = checkpoint.model
        found = {}
        for name, tensor in model_neurons(model)[0].items():
            vectors = _floats(tensor)
            amplitude = np.linalg.norm(vectors, axis=1)
            if name in self.readers:
                reader = model.get_submodule(self.readers[name].reader)
                read = _floats(outgoing(reader, n_neurons(model.get_submodule(name))))
                amplitude = amplitude * np.sqrt((read**2).sum((0, 2)))
            found[name] = Layer(vectors, amplitude)
        return found


def _floats(tensor: Any) -> Floats:
    """A copy: the next checkpoint fills the same model."""
    return np.array(tensor.detach().cpu().double().numpy())


def network_of(checkpoints: Sequence[Any], batches: Any) -> Network:
    """Finds out how the run's weights are to be read, at its last checkpoint.

    Args:
        checkpoints: Of the run.
        batches: Data, or None: then the network is tried out on random inputs, if it takes them.

    Raises:
        OptionError: If there is no linear or convolutional layer.
    """
    last = checkpoints[-1]
    setup = getattr(getattr(last, "run", None), "setup", None)
    # `model` of a checkpoint whose run has none raises what the user would have to give.
    has_model = bool(setup.has_model) if setup is not None else hasattr(last, "model")
    network = Network(has_model)
    if has_model:
        model = last.model
        neurons, network.notes = model_neurons(model)
        network.readers = _readers(model, batches)
        network.readers = {layer: link for layer, link in network.readers.items() if layer in neurons}
    else:
        neurons = state_neurons(last.state)
        network.notes.append("no model: layers were told by the names and shapes of the weights alone")
    if not neurons:
        raise OptionError(
            "there is no linear or convolutional layer.", "Give --model if the weights have unusual names."
        )
    plain = [name for name in neurons if name not in network.readers]
    if network.readers and len(plain) > 1:
        network.notes.append(f"the amplitude is |w|, not |a||w|, at {', '.join(plain)}")
    elif not network.readers:
        network.notes.append(
            "the amplitude is |w|, not |a||w|: no layer is seen to be read by one other alone, through a "
            "function that is the same for all its neurons"
        )
    return network


def _readers(model: Any, batches: Any) -> dict[str, Link]:
    with frozen_eval(model):
        copy = private_copy(model)
    inputs = few(batches) if batches is not None else made_up_inputs(copy)
    if inputs is None:
        return {}
    if batches is not None:
        return links(copy, inputs)[0]
    # What networks raise for inputs that are not meant for them.
    with suppress(RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return links(copy, inputs)[0]
    return {}


def few(batches: Any) -> Inputs:
    """The inputs of a few samples, copied."""
    return map_tensors(lambda tensor: tensor[:SAMPLES].clone(), next(iter(batches))[0])


def walk(
    checkpoints: Sequence[Any], network: Network, settings: Settings, progress: Any
) -> tuple[dict[str, Any], list[str]]:
    """Measures every checkpoint, one in memory at a time beside the first.

    Returns:
        Values by the names that `condensation` declares, and notes.
    """
    first = network.layers(checkpoints[0])
    names, last = list(first), first
    shape = (len(checkpoints), len(names))
    table = _Table(shape, settings)
    for i, checkpoint in enumerate(checkpoints):
        last = first if i == 0 else network.layers(checkpoint)
        for j, name in enumerate(names):
            if name not in last or last[name].vectors.shape != first[name].vectors.shape:
                raise ValueError(f"{checkpoint.path}: {name} is not as large as at the first checkpoint")
            table.add(i, j, last[name], first[name])
        if progress is not None:
            progress(i + 1, len(checkpoints), "checkpoints")
    values: dict[str, Any] = {
        "layer": np.array(names, dtype=object),
        "threshold": np.array(settings.thresholds),
        "n_neurons": np.array([len(layer.vectors) for layer in first.values()]),
        "fan_in": np.array([layer.vectors.shape[1] for layer in first.values()]),
        "amplitude_kind": np.array([network.amplitude(name) for name in names], dtype=object),
        **table.values(),
        **_chance(last, settings),
    }
    if settings.neurons:
        values |= _pictures(first, last, settings)
    return values, _notes(names, first, settings)


def _notes(names: list[str], first: dict[str, Layer], settings: Settings) -> list[str]:
    notes = [
        f"{name}: its directions were not counted: {len(first[name].vectors):,} neurons are more than "
        f"--max-neurons {settings.max_neurons}"
        for name in names
        if len(first[name].vectors) > settings.max_neurons
    ]
    zero = [name for name in names if not first[name].vectors.any()]
    if zero:
        notes.append(f"no relative distance of {', '.join(zero)}: the first weights are all zero")
    return notes


class _Table:
    """What is known of every layer at every checkpoint."""

    def __init__(self, shape: tuple[int, int], settings: Settings) -> None:
        self._settings = settings
        counts = (*shape, len(settings.thresholds))
        self._counts = {
            f"effective_directions{sign}{'' if part == 'value' else f'_{part}'}": np.full(counts, np.nan)
            for sign in ("", "_unsigned")
            for part in COUNTS
        }
        self._columns = {name: np.full(shape, np.nan) for name in COLUMNS}
        self._n_neurons = np.full(shape, np.nan)

    def add(self, i: int, j: int, layer: Layer, first: Layer) -> None:
        """One layer at one checkpoint."""
        settings = self._settings
        counted = layer.counted(settings.least_amplitude)
        at = (i, j)
        self._n_neurons[at] = len(layer.vectors)
        self._columns["distance"][at] = np.linalg.norm(layer.vectors - first.vectors)
        self._columns["weight_norm"][at] = np.linalg.norm(layer.vectors)
        self._columns["zero_neurons"][at] = (~layer.nonzero).sum()
        self._columns["small_neurons"][at] = (layer.nonzero & ~counted).sum()
        self._columns["amplitude_mean"][at] = layer.amplitude.mean()
        self._columns["amplitude_max"][at] = layer.amplitude.max()
        if len(layer.vectors) > settings.max_neurons:
            return
        cosine = cosines(layer.vectors[counted])
        by_amplitude = np.argsort(-layer.amplitude[counted], kind="stable")
        # The same orders at every checkpoint, so that a change is one of the weights.
        rng = np.random.default_rng([settings.seed, j])
        orders = [by_amplitude, *(rng.permutation(len(cosine)) for _ in range(settings.orders))]
        for sign, values in (("", cosine), ("_unsigned", np.abs(cosine))):
            for k, threshold in enumerate(settings.thresholds):
                found = effective_directions(values, threshold, orders)
                for part, number in zip(COUNTS, found, strict=True):
                    name = f"effective_directions{sign}{'' if part == 'value' else f'_{part}'}"
                    self._counts[name][i, j, k] = number

    def values(self) -> dict[str, Floats]:
        """The columns under their declared names."""
        columns = dict(self._columns)
        distance, norm = columns.pop("distance"), columns["weight_norm"][0]
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.where(norm > 0, distance / norm, np.nan)
            together = np.linalg.norm(distance, axis=1) / np.linalg.norm(norm)
        counted = self._counts["effective_directions"][..., nearest(self._settings.thresholds)]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = counted / (self._n_neurons - columns["zero_neurons"] - columns["small_neurons"])
        columns["effective_ratio"] = np.where(np.isfinite(ratio), ratio, np.nan)
        return {**self._counts, "relative_distance": relative, "relative_distance_all": together, **columns}


def counted_neurons(arrays: Mapping[str, Any]) -> Floats:
    """Neurons with a direction, shape (checkpoint, layer): neither zero nor below the least amplitude."""
    left_out = np.asarray(arrays["zero_neurons"], dtype=float) + np.asarray(
        arrays["small_neurons"], dtype=float
    )
    return np.asarray(np.asarray(arrays["n_neurons"], dtype=float) - left_out)


def nearest(thresholds: ArrayLike) -> int:
    """The place of the threshold nearest to the papers'."""
    return int(np.argmin(np.abs(np.asarray(thresholds, dtype=float) - USUAL)))


def _chance(layers: dict[str, Layer], settings: Settings) -> dict[str, Floats]:
    """Numbers of directions of as many random ones: mean, least and largest of the draws."""
    shape = (len(layers), len(settings.thresholds))
    found = {f"chance_directions{sign}{part}": np.full(shape, np.nan) for sign, part in _CHANCE}
    for j, layer in enumerate(layers.values()):
        if len(layer.vectors) > settings.max_neurons:
            continue
        counted = int(layer.counted(settings.least_amplitude).sum())
        rng = np.random.default_rng([settings.seed, j, 1])
        drawn = chance_directions(counted, layer.vectors.shape[1], settings.thresholds, CHANCE_DRAWS, rng)
        for sign, part in _CHANCE:
            column = drawn[:, 1 if sign else 0]
            reduced = {"": column.mean(0), "_low": column.min(0), "_high": column.max(0)}
            found[f"chance_directions{sign}{part}"][j] = reduced[part]
    return found


_CHANCE = [(sign, part) for sign in ("", "_unsigned") for part in ("", "_low", "_high")]


def _pictures(first: dict[str, Layer], last: dict[str, Layer], settings: Settings) -> dict[str, Any]:
    """Neurons of the first and the last checkpoint one by one; of many the largest."""
    count = min(settings.neurons, max(len(layer.vectors) for layer in last.values()))
    shape = (len(MOMENTS), len(last), count)
    found = {name: np.full(shape, np.nan) for name in ("amplitude", "orientation", "orientation_share")}
    found["similarity"] = np.full((*shape, count), np.nan)
    found["neuron_index"] = np.full(shape[1:], np.nan)
    for j, name in enumerate(last):
        chosen = np.sort(np.argsort(-last[name].amplitude, kind="stable")[:count])
        n = len(chosen)
        found["neuron_index"][j, :n] = chosen
        plane = _plane(last[name])
        for moment, layer in enumerate((first[name], last[name])):
            found["amplitude"][moment, j, :n] = layer.amplitude[chosen]
            places, neurons = _of_nonzero(layer, chosen)
            if plane is None or not len(places):
                continue
            found["similarity"][moment, j, places[:, None], places] = cosines(layer.vectors[neurons])
            angle, share = orientation(layer.vectors[neurons], plane)
            found["orientation"][moment, j, places] = angle
            found["orientation_share"][moment, j, places] = share
    return found | {"moment": np.array(MOMENTS, dtype=object)}


def _of_nonzero(layer: Layer, chosen: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Places among the chosen, and numbers, of those that have a direction."""
    places = np.flatnonzero(layer.nonzero[chosen])
    return places, chosen[places]


def _plane(layer: Layer) -> Floats | None:
    """The plane of the orientations, from the neurons with a direction, weighted by amplitude."""
    there = layer.nonzero
    if not there.any():
        return None
    weights = layer.amplitude[there]
    return principal_plane(layer.vectors[there], weights if weights.any() else np.ones(len(weights)))
