"""`rsa` of one checkpoint: its layers, and its single units, against predictors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.analyzers._predictors import Predictor, distinct_names, of_labels, read_predictors
from dynprobe.analyzers._rsa import (
    Choice,
    Conditions,
    Forms,
    blocks_of,
    check_memory,
    class_targets,
    forms_of,
    input_vectors,
    make_forms,
    represent,
    troubles,
)
from dynprobe.analyzers._similarity import effects_of_deletions
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.rdm import Floats, dissimilarities
from dynprobe.analyzers.numerics.rdm_compare import (
    Comparison,
    Form,
    chance,
    noise_ceiling,
    permutation_p,
)
from dynprobe.analyzers.numerics.rdm_units import cluster_units, unit_similarities

WORDS = ("targets", "pixels")
CENTRAL = 3
"""Units named for each cluster."""


@dataclass(frozen=True)
class UnitChoice:
    """What to do with single units."""

    clusters: int
    inputs_shown: int


def collect_predictors(option: str, batches: Any, conditions: Conditions) -> list[Predictor]:
    """What `--predictors` names, in order.

    Args:
        option: Files and the words targets and pixels, separated by commas.
        batches: The data, for the words.
        conditions: Of the samples.

    Raises:
        OptionError: If a file does not fit, or the data do not have what a word asks for.
    """
    found: list[tuple[str, Predictor]] = []
    for entry in (part.strip() for part in option.split(",")):
        if not entry:
            continue
        if entry == "targets":
            found.append((entry, _of_targets(batches, conditions)))
        elif entry == "pixels":
            patterns = conditions.mean(input_vectors(batches))
            found.append((entry, Predictor(entry, dissimilarities(patterns, "euclidean")[None])))
        else:
            found += [(entry, predictor) for predictor in read_predictors(entry, conditions.n_stimuli)]
    if not found:
        raise OptionError("predictors names nothing.", "Give files, targets or pixels, separated by commas.")
    return distinct_names(found)


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

    def __init__(self, predictors: list[Predictor], blocks: Any, compare: Comparison) -> None:
        self.names = [p.name for p in predictors]
        self.n_subjects = np.array([len(p.rdms) for p in predictors])
        self.stacked = np.array([p.stacked for p in predictors])
        self._compare = compare
        parts = [make_forms(p.rdms, blocks, compare) for p in predictors]
        self.subjects = [part.whole for part in parts]
        self.forms = Forms(
            _together([part.whole for part in parts]),
            [_together(list(deleted)) for deleted in zip(*(part.deleted for part in parts), strict=True)],
        )
        self.ceilings = [noise_ceiling(p.rdms, compare) if p.stacked else None for p in predictors]

    def trouble(self) -> list[str]:
        """A sentence for each predictor without similarity."""
        bad = np.isnan(self.forms.whole.left[:, 0])
        return [
            f"predictor {name}: no similarity, all its dissimilarities are equal"
            for name, unknown in zip(self.names, bad, strict=True)
            if unknown
        ]

    def over_subjects(self, layers: Form) -> Floats:
        """Standard error of the mean over subjects, shape (n_layers, n_predictors); NaN where none."""
        found = np.full((len(layers.left), len(self.names)), np.nan)
        for i, subjects in enumerate(self.subjects):
            if self.stacked[i]:
                values = layers @ subjects
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
    check_memory(sum(len(p.rdms) for p in predictors), conditions.n_stimuli, choice.memory)
    representation = represent(activations, conditions, choice)
    blocks = blocks_of(conditions, choice)
    pooled = Pooled(predictors, blocks, choice.compare)
    layers = forms_of(activations, representation, conditions, choice)
    similarity = layers.whole @ pooled.forms.whole
    stderr = np.full(similarity.shape, np.nan)
    if blocks is not None:
        pairs = zip(layers.deleted, pooled.forms.deleted, strict=True)
        effect = effects_of_deletions(np.stack([one @ other for one, other in pairs], -1))
        stderr = np.sqrt((effect**2).sum(-1))
    stderr[:, pooled.stacked] = pooled.over_subjects(layers.whole)[:, pooled.stacked]
    values: dict[str, Any] = {
        "similarity": similarity,
        "similarity_stderr": stderr,
        "similarity_chance": chance(layers.whole, pooled.forms.whole),
        "layer": representation.layers,
        "predictor": pooled.names,
        "n_subjects": pooled.n_subjects,
        "n_features": representation.n_features,
        "treatment": representation.treatment,
        **pooled.ceiling_arrays(),
    }
    if choice.stimulus_permutations:
        values["p_value"] = permutation_p(
            layers.whole, pooled.forms.whole, choice.stimulus_permutations, choice.seed
        )
    if choice.save_rdms:
        values["rdm"] = representation.rdms.astype(np.float32)
        values["predictor_rdm"] = np.stack([p.rdms.mean(0) for p in predictors]).astype(np.float32)
    notes = [*troubles(("", representation)), *pooled.trouble()]
    if units is not None:
        found, more = _units(activations, pooled.forms.whole, conditions, choice, units)
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
    shown = min(units.inputs_shown, len(activation))
    order = np.argsort(activation[:, np.maximum(clusters.central, 0)], axis=0, kind="stable")
    order = np.moveaxis(order, 0, -1)
    there = (clusters.central >= 0)[..., None]
    values = {
        "unit": labels,
        "unit_similarity": similarity.astype(np.float32),
        "unit_cluster": clusters.label,
        "cluster": np.arange(1, clusters.n_clusters + 1),
        "n_clusters": clusters.n_clusters,
        "silhouette": clusters.silhouette,
        "rank": np.arange(1, CENTRAL + 1),
        "shown": np.arange(1, shown + 1),
        "central_unit": np.where(clusters.central >= 0, labels[np.maximum(clusters.central, 0)], ""),
        "most_activating": np.where(there, order[..., ::-1][..., :shown], -1),
        "least_activating": np.where(there, order[..., :shown], -1),
    }
    constant = int((np.ptp(activation, axis=0) == 0).sum())
    notes = [f"{constant} of {len(labels)} units are constant: in no cluster"] if constant else []
    return values, notes
