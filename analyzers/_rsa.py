"""What `rsa` keeps of a checkpoint: the RDMs of its layers, in the forms whose products are similarities."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynprobe.analyzers._predictors import read_labels
from dynprobe.analyzers._similarity import stimulus_blocks
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.activations import Layer
from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.rdm import Floats, Integers, condition_means, dissimilarities, n_entries
from dynprobe.analyzers.numerics.rdm_compare import Comparable, Comparison, Form
from dynprobe.analyzers.numerics.rdm_crossnobis import crossnobis, deal_folds

log = logging.getLogger("dynprobe")

GIGABYTE = 1e9
COPIES = 3
"""RDMs in memory at once for each that is measured: as it is, and in two forms."""
REMEMBERED = 1 / 8
"""Part of the memory that the forms of one checkpoint may take to be remembered, else they are made anew."""


@dataclass(frozen=True)
class Choice:
    """The options that decide the RDMs, and how they are compared."""

    layers: str
    maps: str
    sequences: str
    dissimilarity: str
    folds: int
    noise: str
    compare: Comparison
    jackknife_blocks: int
    stimulus_permutations: int
    save_rdms: bool
    memory: float
    seed: int


@dataclass(frozen=True)
class Conditions:
    """Which samples are repeats of one stimulus.

    Attributes:
        label: Condition of each sample, shape (n_samples,); None where every sample is a stimulus.
        names: Of the conditions.
        n_samples: How many samples there are.
    """

    label: Integers | None
    names: list[str]
    n_samples: int

    @property
    def n_stimuli(self) -> int:
        """Conditions, or samples."""
        return self.n_samples if self.label is None else len(self.names)

    @property
    def digest(self) -> str:
        """Tells these conditions from others."""
        text = b"" if self.label is None else self.label.tobytes()
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Patterns of the stimuli, (n_samples, n_features) to (n_stimuli, n_features)."""
        return values if self.label is None else condition_means(values, self.label)


@dataclass(frozen=True)
class Representation:
    """The RDMs of one network's layers.

    Attributes:
        layers: Names.
        treatment: How each output became patterns.
        n_features: Of each.
        rdms: Shape (n_layers, m); NaN where there is none.
        trouble: Why an RDM is not there or all its entries are one value; empty text where all is well.
    """

    layers: list[str]
    treatment: list[str]
    n_features: list[int]
    rdms: Floats
    trouble: list[str]


@dataclass(frozen=True)
class Forms:
    """Of all stimuli, and without each block of them."""

    whole: Form
    deleted: list[Form]


def conditions_of(option: str, batches: Any, n_samples: int) -> Conditions:
    """What `--conditions` says.

    Args:
        option: "", targets, or a file.
        batches: The data, for targets.
        n_samples: Of the activations.

    Raises:
        OptionError: If there are no classes to read, or the file does not fit.
    """
    if not option:
        return Conditions(None, [], n_samples)
    if option != "targets":
        label, names = read_labels(option, n_samples)
    else:
        found, label = np.unique(class_targets(batches, "conditions targets"), return_inverse=True)
        label, names = label.astype(np.int64), [str(name) for name in found]
    if len(names) < 3:
        raise OptionError(
            f"conditions {option}: {len(names)} conditions, and an RDM needs 3 to be compared.",
            "Leave out --conditions to take every sample as a stimulus.",
        )
    return Conditions(label, names, n_samples)


def class_targets(batches: Any, option: str) -> Integers:
    """The class of every sample.

    Raises:
        OptionError: If there are no data, or targets are no classes.
    """
    if batches is None:
        raise OptionError(
            f"{option} needs the data, and saved activations come without.",
            "Give a .npy or .csv file with one label for each sample.",
        )
    targets = torch.cat([torch.as_tensor(targets) for _inputs, targets in batches]).cpu()
    if targets.ndim != 1 or targets.is_floating_point():
        raise OptionError(
            f"{option}: the targets are {targets.dtype} of shape {tuple(targets.shape)}, no classes.",
            "Give a .npy or .csv file with one label for each sample.",
        )
    return targets.numpy().astype(np.int64)


def input_vectors(batches: Any) -> torch.Tensor:
    """The first input of every sample as a vector, shape (n_samples, n_values).

    Raises:
        OptionError: If there are no data, or they are no numbers that have distances.
    """
    if batches is None:
        raise OptionError(
            "predictors pixels needs the data, and saved activations come without.",
            "Give the inputs as a .npy table instead.",
        )
    parts: list[torch.Tensor] = []
    for inputs, _targets in batches:
        tensors: list[torch.Tensor] = []
        map_tensors(lambda t, to=tensors: to.append(t) or t, inputs)  # type: ignore[misc]
        floating = [t for t in tensors if t.is_floating_point()]
        if not floating:
            raise OptionError(
                "predictors pixels: the inputs are integers (tokens), which have no distances.",
                "Give a table of features instead.",
            )
        parts.append(floating[0].flatten(1).cpu())
    return torch.cat(parts)


def represent(activations: Activations, conditions: Conditions, choice: Choice) -> Representation:
    """The RDMs of a checkpoint's layers, remembered for the other pairs it stands in."""
    key = (
        "rsa rdms",
        *(choice.layers, choice.maps, choice.sequences, choice.dissimilarity, choice.folds, choice.noise),
        *(conditions.digest, choice.seed, choice.compare),
    )
    return activations.remembered(
        key, lambda: _represent(activations, conditions, choice), limit=choice.memory * GIGABYTE
    )


def _represent(activations: Activations, conditions: Conditions, choice: Choice) -> Representation:
    n = conditions.n_stimuli
    if n < 3:
        raise OptionError(
            f"{n} stimuli: RDMs of fewer than 3 have nothing to compare.", "Measure more --samples."
        )
    found = activations.features(layers=choice.layers, maps=choice.maps, sequences=choice.sequences)
    check_memory(len(found), n, choice.memory)
    fold = _folds(conditions, choice) if choice.dissimilarity == "crossnobis" else None
    rdms, trouble = np.full((len(found), n_entries(n)), np.nan), []
    for i, layer in enumerate(found.values()):
        rdms[i], reason = _rdm(layer, conditions, fold, choice)
        trouble.append(reason)
    return Representation(
        list(found),
        [layer.treatment for layer in found.values()],
        [layer.values.shape[1] for layer in found.values()],
        rdms,
        trouble,
    )


def _folds(conditions: Conditions, choice: Choice) -> Integers:
    assert conditions.label is not None
    counts = np.bincount(conditions.label)
    if counts.min() < choice.folds:
        raise OptionError(
            f"condition {conditions.names[int(counts.argmin())]} has {counts.min()} samples, and crossnobis "
            f"deals each condition's samples into {choice.folds} folds.",
            "Give fewer --folds or more --samples, or leave that condition out of the data.",
        )
    return deal_folds(conditions.label, choice.folds, choice.seed)


def check_memory(n_rdms: int, n_stimuli: int, memory: float) -> None:
    """Raises before RDMs are made that would not fit.

    Raises:
        OptionError: If they take more than `memory` gigabytes.
    """
    needed = COPIES * n_rdms * n_entries(n_stimuli) * 8 / GIGABYTE
    if needed > memory:
        raise OptionError(
            f"RDMs of {n_stimuli:,} stimuli in {n_rdms} layers take {needed:.1f} GB, more than "
            f"--memory {memory:g}.",
            "They grow with the square of the stimuli: measure fewer --samples, or fewer --layers.",
        )


def _rdm(layer: Layer, conditions: Conditions, fold: Integers | None, choice: Choice) -> tuple[Floats, str]:
    """RDM of one layer, and what is wrong with it."""
    values = layer.values
    missing = np.full(n_entries(conditions.n_stimuli), np.nan)
    if bool((values == values[0]).all()):
        return missing, "it is constant over the samples"
    if choice.dissimilarity == "crossnobis":
        assert conditions.label is not None
        assert fold is not None
        try:
            found = crossnobis(values, conditions.label, fold, shrink=choice.noise == "shrunk")
        except ValueError as error:
            return missing, str(error)
    else:
        found = dissimilarities(conditions.mean(values), choice.dissimilarity)  # type: ignore[arg-type]
    if np.isnan(found).any():
        n, without = conditions.n_stimuli, int(_undefined(found, conditions.n_stimuli))
        what = "one value in all features" if choice.dissimilarity == "correlation" else "no activation"
        return missing, (
            f"{without} of {n} patterns have {what}, whose {choice.dissimilarity} is undefined "
            "(euclidean is defined)"
        )
    largest = np.abs(found).max()
    directed = choice.compare in ("cosine", "whitened") and largest > 0
    if np.ptp(found) <= 1e-12 * largest and not directed:
        return found, "all its dissimilarities are equal"
    return found, ""


def _undefined(rdm: Floats, n: int) -> int:
    """How many stimuli have no dissimilarity to any other."""
    rows, columns = np.triu_indices(n, 1)
    bad = np.isnan(rdm)
    counts = np.bincount(rows[bad], minlength=n) + np.bincount(columns[bad], minlength=n)
    return int((counts == n - 1).sum())


def forms_of(
    activations: Activations, representation: Representation, conditions: Conditions, choice: Choice
) -> Forms:
    """RDMs as they are compared, whole and without each block of stimuli; remembered if small."""
    blocks = blocks_of(conditions, choice)
    n_forms = 1 + (0 if blocks is None else int(blocks.max()) + 1)
    size = n_forms * representation.rdms.nbytes * (2 if choice.compare == "whitened" else 1)

    def make() -> Forms:
        return make_forms(representation.rdms, blocks, choice.compare)

    if size > REMEMBERED * choice.memory * GIGABYTE:
        log.debug("%.1f GB of RDMs are compared anew for every pair (--memory)", size / GIGABYTE)
        return make()
    key = (
        *("rsa forms", choice.layers, choice.maps, choice.sequences, choice.dissimilarity, choice.folds),
        *(choice.noise, conditions.digest, choice.seed, choice.compare, n_forms),
    )
    return activations.remembered(key, make, limit=choice.memory * GIGABYTE)


def make_forms(rdms: Floats, blocks: Integers | None, compare: Comparison) -> Forms:
    """Of RDMs of shape (n_rdms, m).

    Args:
        rdms: The RDMs.
        blocks: Block of each stimulus; None for no deletions.
        compare: See `rdm_compare.Comparable`.
    """
    comparable = Comparable(rdms, compare)
    if blocks is None:
        return Forms(comparable.form(), [])
    return Forms(comparable.form(), [comparable.form(blocks == b) for b in range(int(blocks.max()) + 1)])


def blocks_of(conditions: Conditions, choice: Choice) -> Integers | None:
    """Block of each stimulus; None without a jackknife, or where it would leave fewer than 3 stimuli."""
    n = conditions.n_stimuli
    if not choice.jackknife_blocks or n < 5:
        return None
    return stimulus_blocks(n, choice.seed, choice.jackknife_blocks)


def troubles(*sides: tuple[str, Representation]) -> list[str]:
    """A sentence for each layer without similarity.

    Args:
        sides: Each network with its name, "" where there is one.
    """
    return [
        f"{layer}{f' of {side}' if side else ''}: no similarity, {reason}"
        for side, found in sides
        for layer, reason in zip(found.layers, found.trouble, strict=True)
        if reason
    ]
