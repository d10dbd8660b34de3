"""`rsa` of one checkpoint: its layers, and its single units, against predictors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.analyzers._predictors import Predictor, distinct_names, of_labels, read_predictors
from dynprobe.analyzers._rsa import (
    Choice,
    blocks_of,
    check_memory,
    compare_all,
    forms_of,
    one_form,
    represent,
    troubles,
)
from dynprobe.analyzers._rsa_conditions import Conditions, class_targets, input_vectors
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.rdm import Bools, Floats, Integers, dissimilarities
from dynprobe.analyzers.numerics.rdm_compare import (
    Comparison,
    Form,
    comparable,
    noise_ceiling,
)
from dynprobe.analyzers.numerics.rdm_units import cluster_units, unit_similarities

WORDS = ("targets", "pixels")
CENTRAL = 3
"""Units named for each cluster."""
NAMED = 6
"""Predictors named in one note."""


@dataclass(frozen=True)
class UnitChoice:
    """What to do with single units."""

    clusters: int
    inputs_shown: int


def collect_predictors(
    option: str, classes: str, batches: Any, conditions: Conditions, choice: Choice
) -> list[Predictor]:
    """What `--predictors` names, in order.

    Args:
        option: Files and the words targets and pixels, separated by commas.
        classes: Names of predictors in files whose numbers are classes, separated by commas.
        batches: The data, for the words.
        conditions: Of the samples.
        choice: The options.

    Raises:
        OptionError: If a file does not fit, the data do not have what a word asks for, or RDMs do not fit in
            memory.
    """
    found: list[tuple[str, Predictor]] = []
    labelled = _names(classes)

    def room(more: int) -> None:
        count = more + sum(len(predictor.rdms) for _entry, predictor in found)
        check_memory(count, f"{count} predictors", conditions.n_stimuli, choice)

    for entry in _names(option):
        if entry == "targets":
            found.append((entry, _of_targets(batches, conditions)))
        elif entry == "pixels":
            room(1)
            patterns = conditions.mean(input_vectors(batches))
            rdm = dissimilarities(patterns, "euclidean")
            found.append((entry, Predictor(entry, rdm[None], "Euclidean distance of the inputs")))
        else:
            read = read_predictors(entry, conditions.n_stimuli, labelled, room)
            found += [(entry, predictor) for predictor in read]
    if not found:
        raise OptionError("predictors names nothing.", "Give files, targets or pixels, separated by commas.")
    names = [predictor.name for _entry, predictor in found]
    if unknown := [name for name in labelled if name not in names]:
        raise OptionError(
            f"classes {unknown[0]}: no predictor is called so.", f"There are {', '.join(names[:20])}."
        )
    return distinct_names(found)


def _names(option: str) -> list[str]:
    return [name for name in (part.strip() for part in option.split(",")) if name]


def how_read(predictors: list[Predictor]) -> list[str]:
    """A sentence for each way in which predictors were read."""
    kinds: dict[str, list[str]] = {}
    for predictor in predictors:
        kinds.setdefault(predictor.kind, []).append(predictor.name)
    return [f"{_some(names)}: {kind}" for kind, names in kinds.items()]


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def _of_targets(batches: Any, conditions: Conditions) -> Predictor:
    classes = class_targets(batches, "predictors targets")
    if conditions.label is not None:
        of_condition = [np.unique(classes[conditions.label == c]) for c in range(conditions.n_stimuli)]
        if any(len(c) > 1 for c in of_condition):
            raise OptionError(
                "predictors targets: a condition has samples of several classes.",
                "Leave out --conditions, or give labels of the conditions in a file.",
            )
        classes = np.concatenate(of_condition)
        if len(np.unique(classes)) == len(classes):
            raise OptionError(
                "predictors targets: every condition is a class of its own, so that no two are alike.",
                "Leave out --conditions, or predict from other features.",
            )
    return of_labels("targets", classes)


class Pooled:
    """Predictors in the form in which they are compared; of a stack the mean over its subjects.

    Similarity is a product, so that the product with the mean of the subjects' forms is the mean of the
    similarities to the subjects.
    """

    def __init__(self, predictors: list[Predictor], blocks: Integers | None, compare: Comparison) -> None:
        self.names = [p.name for p in predictors]
        self.n_subjects = np.array([len(p.rdms) for p in predictors])
        self.stacked = np.array([p.stacked for p in predictors])
        self._blocks = blocks
        self._rdms = [comparable(p.rdms, compare) for p in predictors]
        self.ceilings = [noise_ceiling(p.rdms, compare) if p.stacked else None for p in predictors]

    def form(self, block: int = -1) -> Form:
        """All predictors in the form in which they are compared, without a block of stimuli (−1: whole)."""
        return _together([one_form(rdms, self._blocks, block) for rdms in self._rdms])

    def trouble(self) -> list[str]:
        """A sentence for each predictor without similarity."""
        found = []
        for name, rdms in zip(self.names, self._rdms, strict=True):
            flat = np.flatnonzero(np.isnan(rdms.form().left[:, 0])) + 1
            if len(flat):
                who = f"subject {', '.join(map(str, flat))} of {len(rdms.rdms)}: " * (len(rdms.rdms) > 1)
                found.append(f"predictor {name}: no similarity, {who}all dissimilarities are equal")
        return found

    def over_subjects(self, layers: Form) -> Floats:
        """Standard error of the mean over subjects, shape (n_layers, n_predictors); NaN where none."""
        found = np.full((len(layers.left), len(self.names)), np.nan)
        for i, subjects in enumerate(self._rdms):
            if self.stacked[i]:
                values = layers @ subjects.form()
                found[:, i] = values.std(1, ddof=1) / np.sqrt(values.shape[1])
        return found

    def ceiling_arrays(self) -> dict[str, Floats]:
        """Noise ceilings with their standard errors over subjects; NaN where there is one subject."""
        arrays: dict[str, Floats] = {}
        for side in ("lower", "upper"):
            each = [np.array([np.nan]) if c is None else getattr(c, side) for c in self.ceilings]
            arrays[f"ceiling_{side}"] = np.array([values.mean() for values in each])
            arrays[f"ceiling_{side}_stderr"] = np.array(
                [v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else np.nan for v in each]
            )
        return arrays


def _together(forms: list[Form]) -> Form:
    def mean(name: str) -> Floats:
        return np.stack([getattr(form, name).mean(0) for form in forms])

    whitened = forms[0].right is not None
    return Form(mean("left"), mean("right") if whitened else None, mean("chance"))


def against_predictors(
    activations: Activations,
    predictors: list[Predictor],
    conditions: Conditions,
    choice: Choice,
    units: UnitChoice | None,
) -> tuple[dict[str, Any], list[str]]:
    """Similarity of every layer's RDM to every predictor's.

    Returns:
        The variables, and sentences for the reader.
    """
    representation = represent(activations, conditions, choice)
    blocks = blocks_of(conditions, choice)
    pooled = Pooled(predictors, blocks, choice.compare)
    layers = forms_of(activations, representation, conditions, choice)
    compared = compare_all(layers, pooled.form, blocks, choice)
    stderr = compared.stderr
    stderr[:, pooled.stacked] = pooled.over_subjects(layers(-1))[:, pooled.stacked]
    values: dict[str, Any] = {
        "similarity": compared.similarity,
        "similarity_stderr": stderr,
        "similarity_chance": compared.chance,
        "layer": representation.layers,
        "predictor": pooled.names,
        "n_subjects": pooled.n_subjects,
        "n_features": representation.n_features,
        "treatment": representation.treatment,
        **pooled.ceiling_arrays(),
    }
    if compared.p_value is not None:
        values["p_value"] = compared.p_value
    if representation.rdms is not None:
        values["rdm"] = representation.rdms
        values["predictor_rdm"] = np.stack([p.rdms.mean(0) for p in predictors]).astype(np.float32)
    notes = [*how_read(predictors), *troubles(("", representation)), *pooled.trouble()]
    if units is not None:
        found, more = _units(activations, pooled.form(), conditions, choice, units)
        values |= found
        notes += more
    return values, notes


def _units(
    activations: Activations, predictors: Form, conditions: Conditions, choice: Choice, units: UnitChoice
) -> tuple[dict[str, Any], list[str]]:
    """Every unit against every predictor, clusters of units, and what their central units respond to."""
    found = activations.features(layers=choice.layers, maps="average", sequences=choice.sequences)
    patterns = {name: conditions.mean(layer.values).double().cpu().numpy() for name, layer in found.items()}
    similarity = np.concatenate(
        [unit_similarities(values, predictors, choice.compare) for values in patterns.values()]
    )
    # of a predictor without similarity no profile can have a part
    known = np.isfinite(predictors.left[:, 0])
    clusters = cluster_units(similarity[:, known], clusters=units.clusters, central=CENTRAL, seed=choice.seed)
    labels = np.array([f"{n}:{i}" for n, values in patterns.items() for i in range(values.shape[1])])
    activation = np.concatenate(list(patterns.values()), axis=1)
    there = clusters.central >= 0
    chosen = activation[:, np.maximum(clusters.central, 0)]
    most, least = (_extremes(sign * chosen, there, units.inputs_shown) for sign in (-1, 1))
    values = {
        "unit": labels,
        "unit_similarity": similarity.astype(np.float32),
        "unit_cluster": clusters.label,
        "cluster": np.arange(1, clusters.n_clusters + 1),
        "n_clusters": clusters.n_clusters,
        "silhouette": clusters.silhouette,
        "rank": np.arange(1, CENTRAL + 1),
        "shown": np.arange(1, least[0].shape[-1] + 1),
        "central_unit": np.where(there, labels[np.maximum(clusters.central, 0)], ""),
        "most_activating": most[0],
        "most_activation": -most[1],
        "least_activating": least[0],
        "least_activation": least[1],
    }
    constant = int((np.ptp(activation, axis=0) == 0).sum())
    notes = [f"{constant} of {len(labels)} units are constant: in no cluster"] if constant else []
    return values, notes


def _extremes(activation: Floats, there: Bools, shown: int) -> tuple[Integers, Floats]:
    """Stimuli of the smallest activations, and these, shape (cluster, rank, shown).

    −1 for the last ones if others that are not shown have the same activation: any would be as good.
    """
    order = np.moveaxis(np.argsort(activation, axis=0, kind="stable"), 0, -1)
    values = np.take_along_axis(np.moveaxis(activation, 0, -1), order, -1)
    shown = min(shown, values.shape[-1])
    first, rest = values[..., :shown], values[..., shown:]
    clear = there[..., None] & ~(first == rest[..., :1] if rest.size else False)
    return np.where(clear, order[..., :shown], -1), np.where(there[..., None], first, np.nan)
