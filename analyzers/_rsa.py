"""What `rsa` keeps of a checkpoint: the RDMs of its layers, in the forms whose products are similarities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers._rsa_conditions import Conditions
from dynprobe.analyzers._similarity import effects_of_deletions, stimulus_blocks
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.activations import non_finite
from dynprobe.analyzers.numerics.rdm import Floats, Integers, dissimilarities, n_entries
from dynprobe.analyzers.numerics.rdm_compare import (
    Comparable,
    Comparison,
    Form,
    chance,
    comparable,
    permutation_p,
)
from dynprobe.analyzers.numerics.rdm_crossnobis import crossnobis, deal_folds

log = logging.getLogger("dynprobe")

GIGABYTE = 1e9
RANKED, WHOLE = 4, 8
"""Bytes of an entry as it is kept for rank measures, and for the others."""
KEPT = 1 / 3
"""Part of the memory for what is remembered between pairs; RDMs of two networks in a form take the rest."""
REMEMBERED = 1 / 8
"""Part of the memory that the forms of one checkpoint may take to be remembered, else they are made anew."""
BEYOND = 1e150
"""Activations whose squares, or those of their inverses, are more than float64 holds."""


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

    @property
    def rdm_key(self) -> tuple[Any, ...]:
        """Tells RDMs of one network under these options from those under others."""
        return (
            *(self.layers, self.maps, self.sequences, self.dissimilarity, self.folds, self.noise),
            *(self.compare, self.save_rdms, self.seed),
        )

    @property
    def kept_bytes(self) -> float:
        """What may be remembered."""
        return KEPT * self.memory * GIGABYTE


@dataclass(frozen=True)
class Representation:
    """The RDMs of one network's layers.

    Attributes:
        layers: Names.
        treatment: How each output became patterns.
        n_features: Of each.
        comparable: The RDMs as they are compared; NaN where there is none.
        rdms: Shape (n_layers, m), float32, for the report; None where it does not want them.
        trouble: Why an RDM is not there or all its entries are one value; empty text where all is well.
    """

    layers: list[str]
    treatment: list[str]
    n_features: list[int]
    comparable: Comparable
    rdms: NDArray[np.float32] | None
    trouble: list[str]


Forms = Callable[[int], Form]
"""RDMs in a form whose products are similarities: without block b of the stimuli, or whole at b = −1."""


def represent(activations: Activations, conditions: Conditions, choice: Choice) -> Representation:
    """The RDMs of a checkpoint's layers, remembered for the other pairs it stands in."""
    key = ("rsa rdms", choice.rdm_key, conditions.digest)
    return activations.remembered(
        key, lambda: _represent(activations, conditions, choice), limit=choice.kept_bytes
    )


def _represent(activations: Activations, conditions: Conditions, choice: Choice) -> Representation:
    n = conditions.n_stimuli
    if n < 3:
        raise OptionError(
            f"{n} stimuli: RDMs of fewer than 3 have nothing to compare.", "Measure more --samples."
        )
    fold = _folds(conditions, choice) if choice.dissimilarity == "crossnobis" else None
    found = activations.features(layers=choice.layers, maps=choice.maps, sequences=choice.sequences)
    check_memory(len(found), f"{len(found)} layers", n, choice)
    layers = list(found)
    treatment: list[str] = []
    n_features: list[int] = []
    trouble: list[str] = []
    saved = np.empty((len(found), n_entries(n)), dtype=np.float32) if choice.save_rdms else None

    def one_by_one() -> Iterator[Floats]:
        for i, name in enumerate(layers):
            layer = found.pop(name)  # lets go of it
            rdm, reason = _rdm(layer.values, conditions, fold, choice)
            treatment.append(layer.treatment)
            n_features.append(layer.values.shape[1])
            trouble.append(reason)
            if saved is not None:
                saved[i] = rdm
            yield rdm

    made = comparable(one_by_one(), choice.compare)
    return Representation(layers, treatment, n_features, made, saved, trouble)


def _folds(conditions: Conditions, choice: Choice) -> Integers:
    assert conditions.label is not None
    counts = np.bincount(conditions.label)
    if counts.min() < choice.folds:
        raise OptionError(
            f"condition {conditions.names[int(counts.argmin())]} has {counts.min()} samples, and crossnobis "
            f"deals each condition's samples into {choice.folds} folds.",
            "Give fewer --folds or more --samples, or leave that condition out of the data.",
        )
    if choice.noise == "shrunk" and counts.max() == choice.folds:
        raise OptionError(
            f"every fold has one sample of each condition (--folds {choice.folds}), which says nothing of "
            "the noise within.",
            "Give fewer --folds, more --samples, or --noise identity.",
        )
    return deal_folds(conditions.label, choice.folds, choice.seed)


def check_memory(n_rdms: int, what: str, n_stimuli: int, choice: Choice) -> None:
    """Raises before RDMs are made that would not fit.

    Counted are the RDMs of two networks, and one form of each (two where whitened).

    Args:
        n_rdms: How many there are.
        what: What they are of, as in "5 layers".
        n_stimuli: Of each.
        choice: The options.

    Raises:
        OptionError: If they take more than `memory` gigabytes.
    """
    kept = RANKED if choice.compare in ("spearman", "rho-a") else WHOLE
    forms = (2 if choice.compare == "whitened" else 1) * WHOLE
    needed = 2 * (kept + forms) * n_rdms * n_entries(n_stimuli) / GIGABYTE
    if needed > choice.memory:
        raise OptionError(
            f"RDMs of {n_stimuli:,} stimuli for {what} take {needed:.1f} GB to compare, more than "
            f"--memory {choice.memory:g}.",
            "They grow with the square of the stimuli: measure fewer --samples, layers or predictors.",
        )


def _rdm(
    values: torch.Tensor, conditions: Conditions, fold: Integers | None, choice: Choice
) -> tuple[Floats, str]:
    """RDM of one layer, and what is wrong with it."""
    missing = np.full(n_entries(conditions.n_stimuli), np.nan)
    if bad := non_finite(values):
        return missing, f"it has {bad}"
    if bool((values == values[0]).all()):
        return missing, "it is constant over the samples"
    largest = float(values.abs().max())
    if not 1 / BEYOND < largest < BEYOND:
        return missing, f"its largest activation is {largest:.0e}, whose square is not a float64"
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
        n, without = conditions.n_stimuli, _undefined(found, conditions.n_stimuli)
        what = "one value in all features" if choice.dissimilarity == "correlation" else "no activation"
        return missing, (
            f"{without} of {n} patterns have {what}, whose {choice.dissimilarity} is undefined "
            "(euclidean is defined)"
        )
    largest = max(found.max(), -found.min())
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
    """RDMs as they are compared, whole or without a block of stimuli; all remembered if small.

    Otherwise one form at a time is made, when it is asked for.
    """
    blocks = blocks_of(conditions, choice)
    make = partial(one_form, representation.comparable, blocks)
    n_blocks = n_of(blocks)
    width = (2 if choice.compare == "whitened" else 1) * WHOLE * n_entries(conditions.n_stimuli)
    size = (1 + n_blocks) * len(representation.layers) * width
    if size > REMEMBERED * choice.memory * GIGABYTE:
        log.debug("%.1f GB of RDMs are compared anew for every pair (--memory)", size / GIGABYTE)
        return make
    key = ("rsa forms", choice.rdm_key, conditions.digest, n_blocks)
    held = activations.remembered(
        key, lambda: [make(b) for b in range(-1, n_blocks)], limit=choice.kept_bytes
    )
    return lambda block: held[block + 1]


def one_form(rdms: Comparable, blocks: Integers | None, block: int) -> Form:
    """RDMs without a block of stimuli, or whole at −1."""
    return rdms.form(None if blocks is None or block < 0 else np.asarray(blocks == block))


def n_of(blocks: Integers | None) -> int:
    """Number of blocks; 0 for None."""
    return 0 if blocks is None else int(blocks.max()) + 1


@dataclass(frozen=True)
class Compared:
    """Two sets of RDMs, each with each.

    Attributes:
        similarity: Shape (n_rdms, n_others).
        effect: Of each block of stimuli on it, shape (n_rdms, n_others, n_blocks); NaN without blocks.
        chance: Mean similarity under permuted stimuli.
        p_value: From permuting the stimuli of the others; None where there were no permutations.
    """

    similarity: Floats
    effect: Floats
    chance: Floats
    p_value: Floats | None

    @property
    def stderr(self) -> Floats:
        """Standard error over stimuli; NaN without blocks."""
        return np.asarray(np.sqrt((self.effect**2).sum(-1)))


def compare_all(one: Forms, other: Forms, blocks: Integers | None, choice: Choice) -> Compared:
    """Similarities with their errors over stimuli, one block after the other so that few forms are there."""
    similarity, level, p_value = _whole(one(-1), other(-1), choice)
    effect = np.full((*similarity.shape, 1), np.nan)
    if blocks is not None:
        deleted = np.empty((*similarity.shape, n_of(blocks)))
        for block in range(deleted.shape[-1]):
            deleted[..., block] = one(block) @ other(block)
        effect = effects_of_deletions(deleted)
    return Compared(similarity, effect, level, p_value)


def _whole(one: Form, other: Form, choice: Choice) -> tuple[Floats, Floats, Floats | None]:
    count = choice.stimulus_permutations
    p_value = permutation_p(one, other, count, choice.seed) if count else None
    return one @ other, chance(one, other), p_value


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
