"""Representational dissimilarity matrices: layers compared with layers, or with predictors from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from dynprobe.analyzers import InputFile, Measurement, OptionError, Range, Setting, Var, analyzer
from dynprobe.analyzers._rsa import Choice, blocks_of, compare_all, forms_of, represent, troubles
from dynprobe.analyzers._rsa_ceiling import CEILING_RETURNS, ceiling_between_runs
from dynprobe.analyzers._rsa_conditions import Conditions, conditions_of
from dynprobe.analyzers._rsa_figure import draw_rsa
from dynprobe.analyzers._rsa_predictors import WORDS, UnitChoice, against_predictors, collect_predictors
from dynprobe.analyzers._sampling import check_seed, subset_note
from dynprobe.analyzers._similarity import (
    SUMMARY_RETURNS,
    common_layers,
    same_layer,
    summary,
)
from dynprobe.analyzers.core.activations import Activations, as_activations, check_comparable
from dynprobe.analyzers.core.result import Result

_PAIR = ("layer_a", "layer_b")
_PREDICTED = ("layer", "predictor")
_SHOWN = ("cluster", "rank", "shown")
PERMUTATIONS, BOOTSTRAP, LEVEL = 10_000, 2000, 0.9


def _maybe(dims: tuple[str, ...], long_name: str, error: str = "") -> Var:
    return Var(dims, "", long_name, error, optional=True)


_BOTH = {
    "n_samples": Var((), "", "Samples"),
    "n_conditions": Var((), "", "Stimuli: conditions, or samples"),
    "condition": _maybe(("condition",), "Condition"),
    "input_hash": Var((), "", "Hash of the inputs and their order"),
}

PAIR_RETURNS = {
    "similarity": Var(_PAIR, "", "Similarity of the RDMs, 1 for equal ones", "similarity_stderr"),
    "similarity_stderr": Var(_PAIR, "", "Standard error over stimuli"),
    "similarity_chance": Var(_PAIR, "", "Mean similarity under permuted stimuli"),
    "p_value": _maybe(_PAIR, "p-value from permuting the stimuli of one network, one-sided"),
    "layer_a": Var(("layer_a",), "", "Layer of the first network"),
    "layer_b": Var(("layer_b",), "", "Layer of the second network"),
    "layer": _maybe(("layer",), "Layer that both networks have"),
    "block_effect": _maybe(
        ("layer", "block"), "Effect of each block of stimuli on the similarity of a layer to its namesake"
    ),
    "same_layer": Var(
        (), "", "Fraction of layers most similar to the layer of the same name", "same_layer_stderr"
    ),
    "same_layer_stderr": Var((), "", "Standard error over stimuli"),
    "n_features_a": Var(("layer_a",), "", "Features of the first network's layers"),
    "n_features_b": Var(("layer_b",), "", "Features of the second network's layers"),
    "treatment_a": Var(("layer_a",), "", "How outputs became patterns, first network"),
    "treatment_b": Var(("layer_b",), "", "How outputs became patterns, second network"),
    "self_similarity_a": _maybe(
        ("layer_a",), "Similarity of an RDM to itself (rho-a: below 1 with ties), first network"
    ),
    "self_similarity_b": _maybe(("layer_b",), "Similarity of an RDM to itself, second network"),
    "rdm_a": _maybe(("layer_a", "entry"), "RDM above its diagonal, row by row, first network"),
    "rdm_b": _maybe(("layer_b", "entry"), "RDM above its diagonal, row by row, second network"),
    **_BOTH,
}

PREDICTOR_RETURNS = {
    "similarity": Var(_PREDICTED, "", "Similarity of a layer's RDM to a predictor's", "similarity_stderr"),
    "similarity_stderr": Var(_PREDICTED, "", "Standard error over stimuli; over subjects for a stack"),
    "similarity_chance": Var(_PREDICTED, "", "Mean similarity under permuted stimuli"),
    "p_value": _maybe(_PREDICTED, "p-value from permuting the stimuli of the predictor, one-sided"),
    "layer": Var(("layer",), "", "Layer"),
    "predictor": Var(("predictor",), "", "Predictor"),
    "n_subjects": Var(("predictor",), "", "RDMs in the predictor: 1, or the subjects of a stack"),
    "ceiling_lower": Var(
        ("predictor",), "", "Similarity of a subject to all others pooled", "ceiling_lower_stderr"
    ),
    "ceiling_lower_stderr": Var(("predictor",), "", "Standard error over subjects"),
    "ceiling_upper": Var(
        ("predictor",), "", "Similarity of a subject to all pooled, itself included", "ceiling_upper_stderr"
    ),
    "ceiling_upper_stderr": Var(("predictor",), "", "Standard error over subjects"),
    "n_features": Var(("layer",), "", "Features"),
    "treatment": Var(("layer",), "", "How outputs became patterns"),
    "rdm": _maybe(("layer", "entry"), "RDM above its diagonal, row by row"),
    "predictor_rdm": _maybe(("predictor", "entry"), "The predictor's, mean over subjects"),
    "unit": _maybe(("unit",), "Unit, layer:index"),
    "unit_similarity": _maybe(("unit", "predictor"), "Similarity of a unit's RDM to a predictor's"),
    "unit_cluster": _maybe(("unit",), "Cluster of the unit by its similarities, the largest first"),
    "cluster": _maybe(("cluster",), "Cluster of units"),
    "n_clusters": _maybe((), "Clusters of units"),
    "silhouette": _maybe((), "Mean silhouette of the clusters, -1 to 1"),
    "rank": _maybe(("rank",), "Place in the order of distance from the cluster's centre"),
    "shown": _maybe(("shown",), "Place in the order of activation"),
    "central_unit": _maybe(("cluster", "rank"), "Units nearest to the cluster's centre"),
    "most_activating": _maybe(
        _SHOWN, "Stimuli that activate the central unit most, by index; -1 where others do as much"
    ),
    "most_activation": _maybe(_SHOWN, "Their activations"),
    "least_activating": _maybe(
        _SHOWN, "Stimuli that activate the central unit least, by index; -1 where others do as little"
    ),
    "least_activation": _maybe(_SHOWN, "Their activations"),
    **_BOTH,
}


def _under(options: Mapping[str, Any]) -> dict[str, Any]:
    """With predictors, one checkpoint at a time."""
    if options.get("predictors"):
        return {"grain": "checkpoint", "returns": PREDICTOR_RETURNS}
    return {}


def _skips(options: Mapping[str, Any]) -> Sequence[str]:
    """Targets and inputs themselves are needed only where an option asks for them."""
    named = [entry.strip() for entry in str(options.get("predictors") or "").split(",")]
    needed = options.get("conditions") == "targets" or any(word in named for word in WORDS)
    return () if needed else ("batches",)


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    """One pass for each checkpoint whatever the pairs, another for single units."""
    del n_checkpoints
    return {"forwards": 2 if options.get("units") else 1}


def _summary(result: Result) -> dict[str, Any]:
    if result.grain != "pair":
        return {}
    return {**summary("similarity")(result), **ceiling_between_runs(result)}


@analyzer(
    returns=PAIR_RETURNS,
    figure=draw_rsa,
    table=("similarity", "similarity_chance", "same_layer"),
    matrix="similarity",
    under=_under,
    skips=_skips,
    cost=_cost,
    summary=_summary,
    summary_of="call",
    summary_returns={**SUMMARY_RETURNS, **CEILING_RETURNS},
)
def rsa(
    activations_a: Any,
    activations_b: Any = None,
    batches: Any = None,
    *,
    predictors: Annotated[str, InputFile()] = "",
    classes: str = "",
    dissimilarity: Literal["correlation", "cosine", "euclidean", "sqeuclidean", "crossnobis"] = "correlation",
    compare: Literal["spearman", "rho-a", "pearson", "cosine", "whitened"] = "spearman",
    layers: str = "auto",
    maps: Literal["average", "flatten"] = "flatten",
    sequences: Literal["last", "mean", "first", "flatten", "per-step"] = "mean",
    conditions: Annotated[str, InputFile()] = "",
    folds: Annotated[int, Range(min=2)] = 2,
    noise: Literal["shrunk", "identity"] = "shrunk",
    units: bool = False,
    clusters: Annotated[int, Range(min=0)] = 0,
    inputs_shown: Annotated[int, Range(min=1)] = 5,
    jackknife_blocks: Annotated[int, Range(min=0)] = 10,
    stimulus_permutations: Annotated[int, Range(min=0)] = 0,
    save_rdms: bool = False,
    memory: Annotated[float, Range(min=0), Setting()] = 4.0,
    permutations: Annotated[int, Range(min=1), Setting()] = PERMUTATIONS,
    bootstrap: Annotated[int, Range(min=2), Setting()] = BOOTSTRAP,
    level: Annotated[float, Range(min=0, max=1), Setting()] = LEVEL,
    seed: int = 0,
) -> Measurement:
    """Representational dissimilarity matrices: layers compared with layers, or with predictors from files.

    An RDM says how different a layer finds every two stimuli, whatever its units are. Two of them are
    compared entry by entry: those of two networks, or with `--predictors` that of a layer and one made from
    features of the stimuli, class labels or measured elsewhere. 1 for equal RDMs; the mean under permuted
    stimuli stands beside (similarity_chance). Whitened cosine of squared distances is biased linear CKA.

    Cost: one forward pass per checkpoint; RDMs take n²/2 numbers a layer for n stimuli, and are compared anew
    without each block of stimuli.

    Args:
        activations_a: Of the first network, or of the only one; in a notebook also an array (n_samples,
            n_features), a dict of arrays by layer, or (model, batches).
        activations_b: Of the second network; None with predictors.
        batches: The data, where an option asks for targets or inputs.
        predictors: Files (.npy, .npz, .mat, .csv) with RDMs, stacks of them, feature tables or class labels,
            and the words targets (same class or not) and pixels (distance of the inputs), separated by
            commas; empty compares pairs of checkpoints.
        classes: Predictors in files whose numbers are class labels (same class or not), by name, separated by
            commas: otherwise numbers have distances, and only text has classes.
        dissimilarity: correlation (1 - r), cosine, euclidean, sqeuclidean, or crossnobis (cross-validated
            over repeats, needs conditions).
        compare: spearman, rho-a, pearson, cosine or whitened.
        layers: Names or globs separated by commas; auto; all.
        maps: What becomes of convolutional maps: flatten, or average over positions.
        sequences: What becomes of sequences: last, mean, first, flatten, or per-step (a layer for each step).
        conditions: targets, or a .npy or .csv file with one label for each sample: samples of one label are
            one stimulus, whose patterns are averaged. Empty: every sample is a stimulus.
        folds: Parts that a condition's samples are dealt into (crossnobis).
        noise: Noise covariance that distances are measured in (crossnobis): shrunk (Ledoit-Wolf) or identity.
        units: Compare every single unit with every predictor, and group units by what they respond to.
        clusters: Groups of units; 0 for the number of 2 to 10 with the largest silhouette.
        inputs_shown: Stimuli listed that activate a group's central units most and least.
        jackknife_blocks: Blocks of stimuli left out one by one for standard errors; 0 for none.
        stimulus_permutations: Permutations of stimuli for a p-value of each similarity; 0 for none.
        save_rdms: Keep the RDMs in the report.
        memory: Gigabytes for RDMs, beside the activations that they are made of; what was longest unused goes
            to a temporary file.
        permutations: Relabelings of networks for tests between groups, exact where there are no more.
        bootstrap: Draws of networks and stimuli for errors of group means.
        level: Similarity to the last checkpoint that counts as converged (`--against final`).
        seed: Of blocks, folds, permutations and clusters.

    Returns:
        Similarity with its standard error and chance level for every pair of layers, or every layer and
        predictor; what else was asked for.

    Raises:
        OptionError: If the networks saw different inputs, options contradict each other, or a file does not
            fit the stimuli.

    References:
        Kriegeskorte, Mur and Bandettini, "Representational similarity analysis", Front. Syst. Neurosci. 2
        (2008).
        Nili et al., "A toolbox for representational similarity analysis", PLoS Comput. Biol. 10 (2014).
        Schütt et al., "Statistical inference on representational geometries", eLife 12 (2023).
        van Assen, Nishida and Fleming, "Visual perception of liquids: Insights from deep neural networks",
        PLoS Comput. Biol. 16 (2020).
    """
    check_seed(seed)
    _check_options(
        predictors, classes, dissimilarity, conditions, folds, noise, units, clusters, inputs_shown
    )
    if predictors:
        _check_summary(permutations, bootstrap, level)
    if jackknife_blocks == 1:
        raise OptionError("jackknife-blocks 1 leaves nothing.", "Give 2 or more blocks, or 0 for no errors.")
    choice = Choice(
        *(layers, maps, sequences, dissimilarity, folds, noise, compare),
        *(jackknife_blocks, stimulus_permutations, save_rdms, memory, seed),
    )
    first = as_activations(activations_a)
    second = first if activations_b is None else as_activations(activations_b)
    before = _forwards(first, second)
    notes = [*subset_note(first), *check_comparable(first, second)]
    stimuli = conditions_of(conditions, batches, first.n_samples)
    if predictors:
        chosen = collect_predictors(predictors, classes, batches, stimuli, choice)
        unit_choice = UnitChoice(clusters, inputs_shown) if units else None
        values, found = against_predictors(first, chosen, stimuli, choice, unit_choice)
    elif activations_b is None:
        raise OptionError(
            "rsa of one checkpoint needs something to compare it with.",
            "Name --predictors, such as targets, or a second network.",
        )
    else:
        values, found = _compare(first, second, stimuli, choice)
    values |= {
        "n_samples": first.n_samples,
        "n_conditions": stimuli.n_stimuli,
        "input_hash": first.input_hash,
        **({"condition": stimuli.names} if stimuli.names else {}),
    }
    if jackknife_blocks and blocks_of(stimuli, choice) is None:
        found.append(f"{stimuli.n_stimuli} stimuli are too few for standard errors by leaving some out")
    return Measurement(values, spent={"forwards": _forwards(first, second) - before}, notes=[*notes, *found])


def _compare(
    first: Activations, second: Activations, stimuli: Conditions, choice: Choice
) -> tuple[dict[str, Any], list[str]]:
    """Every layer of one network with every layer of another."""
    a, b = represent(first, stimuli, choice), represent(second, stimuli, choice)
    sides = (("a", first, a), ("b", second, b))
    forms = [forms_of(one, side, stimuli, choice) for _half, one, side in sides]
    blocks = blocks_of(stimuli, choice)
    found = compare_all(forms[0], forms[1], blocks, choice)
    matched, matched_stderr = same_layer(found.similarity, found.effect, a.layers, b.layers, choice.seed)
    values: dict[str, Any] = {
        "similarity": found.similarity,
        "similarity_stderr": found.stderr,
        "similarity_chance": found.chance,
        "layer_a": a.layers,
        "layer_b": b.layers,
        "same_layer": matched,
        "same_layer_stderr": matched_stderr,
    }
    if found.p_value is not None:
        values["p_value"] = found.p_value
    for (half, _one, side), form in zip(sides, forms, strict=True):
        values[f"n_features_{half}"] = side.n_features
        values[f"treatment_{half}"] = side.treatment
        if side.rdms is not None:
            values[f"rdm_{half}"] = side.rdms
        if choice.compare == "rho-a":
            values[f"self_similarity_{half}"] = [float(row @ row) for row in form(-1).left]
    common = common_layers(a.layers, b.layers)
    if common and blocks is not None:
        at = [[side.layers.index(name) for name in common] for side in (a, b)]
        values |= {"layer": common, "block_effect": found.effect[at[0], at[1]].astype(np.float32)}
    if first is second or first.key == second.key:
        return values, troubles(("", a))
    names = [first.label, second.label]
    names = names if names[0] != names[1] else ["the first network", "the second network"]
    return values, troubles((names[0], a), (names[1], b))


def _forwards(first: Activations, second: Activations) -> int:
    return first.forwards + (0 if second is first else second.forwards)


def _check_options(
    predictors: str,
    classes: str,
    dissimilarity: str,
    conditions: str,
    folds: int,
    noise: str,
    units: bool,
    clusters: int,
    inputs_shown: int,
) -> None:
    """No option is accepted and ignored, and none fails after the compute."""
    if dissimilarity == "crossnobis" and not conditions:
        raise OptionError(
            "dissimilarity crossnobis needs repeats: samples of one condition.",
            "Say which with --conditions targets, or a file of labels.",
        )
    for name, given, needed, on in (
        ("folds", folds != 2, "--dissimilarity crossnobis", dissimilarity == "crossnobis"),
        ("noise", noise != "shrunk", "--dissimilarity crossnobis", dissimilarity == "crossnobis"),
        ("units", units, "--predictors", bool(predictors)),
        ("classes", bool(classes), "--predictors", bool(predictors)),
        ("clusters", clusters != 0, "--units", units),
        ("inputs-shown", inputs_shown != 5, "--units", units),
    ):
        if given and not on:
            raise OptionError(f"{name} has no effect without {needed}.", f"Add {needed}, or leave it out.")


def _check_summary(permutations: int, bootstrap: int, level: float) -> None:
    """Options of the summary over pairs, of which there are none."""
    for name, given in (
        ("permutations", permutations != PERMUTATIONS),
        ("bootstrap", bootstrap != BOOTSTRAP),
        ("level", level != LEVEL),
    ):
        if given:
            raise OptionError(
                f"{name} has no effect with --predictors, which compares no pairs of checkpoints.",
                "Leave it out; --stimulus-permutations gives p-values of similarities to predictors.",
            )
