"""Corrections: what would have to change in an input for the network to decide otherwise, with bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch

from dynprobe.analyzers import InputFile, Measurement, Range, Var, analyzer
from dynprobe.analyzers._corrections import Settings
from dynprobe.analyzers._corrections_checkpoint import Call, judge_all
from dynprobe.analyzers._corrections_features import read_features
from dynprobe.analyzers._corrections_figure import draw_corrections
from dynprobe.analyzers._corrections_record import OUTCOMES
from dynprobe.analyzers._corrections_samples import USUAL
from dynprobe.analyzers._corrections_summary import SUMMARY_RETURNS, summarise
from dynprobe.analyzers._corrections_ways import most_changed
from dynprobe.analyzers._sampling import check_seed
from dynprobe.analyzers.numerics.params import frozen_eval


def _of_sample(what: str, units: str = "", error: str = "") -> Var:
    return Var(("sample",), units, what, error)


def _of_feature(what: str) -> Var:
    return Var(("sample", "feature"), "the feature's", what)


RETURNS = {
    "sample": _of_sample("Sample: its number in the data"),
    "feature": Var(("feature",), "", "Feature"),
    "class": Var(("class",), "", "Class"),
    "judged": Var((), "", "Inputs judged"),
    "correctable": Var((), "", "Of these, with a stable correction"),
    "not_correctable": Var((), "", "Of these, without one, numerically verified"),
    "still_open": Var((), "", "Of these, with a gap above the tolerance, or undecided"),
    "on_target": Var((), "", "Of these, decided for the target already"),
    "distance_median": Var((), "", "Median stable distance", "distance_median_gap"),
    "distance_median_gap": Var((), "", "Median stable distance less the median of its lower bounds"),
    "still_hold": Var((), "", "Part of the previous checkpoint's boxes that hold", "still_hold_stderr"),
    "still_hold_stderr": Var((), "", "Standard error over samples"),
    "distance": _of_sample("Distance of the nearest correction found"),
    "lower_bound": _of_sample("No correction is nearer"),
    "stable_distance": _of_sample("Distance of the nearest stable correction found"),
    "stable_lower_bound": _of_sample("No stable correction is nearer"),
    "outcome": _of_sample("Stable correction: " + ", ".join(OUTCOMES)),
    "nearest_target": _of_sample("Class of the nearest correction, which may be another one"),
    "nearest_outcome": _of_sample("Nearest correction: the same words"),
    "decided": _of_sample("Class that is decided"),
    "label": _of_sample("Class in the data; -1 where there is none"),
    "target": _of_sample("Class of the correction; -1 where there is none"),
    "volume": _of_sample("Part of the allowed ranges that the box takes"),
    "volume_bound": _of_sample("No box around this correction takes more"),
    "margin": _of_sample("Lead over other outputs that a correction must have"),
    "n_unstable": _of_sample("Neurons that may change their slope in the allowed ranges"),
    "n_boxes": _of_sample("Boxes and nodes that the search looked at"),
    "solver": _of_sample("What found the stable correction, or excluded one"),
    "n_sampled": _of_sample("Points of the box tried in the model's own dtype"),
    "sampled_failures": _of_sample("Of these, points that are not the target"),
    "previous_holds": _of_sample("Whether the previous checkpoint's box is all target here"),
    "overlap": _of_sample("Overlap with the previous checkpoint's box, intersection over union"),
    "value": _of_feature("Judged value"),
    "nearest": _of_feature("Nearest correction"),
    "corrected": _of_feature("Nearest stable correction"),
    "box_low": _of_feature("Lower end of the box of corrections"),
    "box_high": _of_feature("Upper end of the box of corrections"),
    "allowed_low": _of_feature("Least allowed value: of the range, or the judged value below it"),
    "allowed_high": _of_feature("Largest allowed value: of the range, or the judged value above it"),
    "changed": Var(("sample", "feature"), "", "Whether this correction may change the feature"),
    "feature_low": Var(("feature",), "the feature's", "Least allowed value"),
    "feature_high": Var(("feature",), "the feature's", "Largest allowed value"),
    "feature_weight": Var(("feature",), "per unit of the feature", "Cost of a change"),
    "stability": Var(("feature",), "the feature's", "Half-width in which a stable correction holds"),
    "feature_index": Var(("feature",), "", "Position in the flattened input"),
    "direction": Var(("feature",), "", "1: may only grow, -1: only shrink, 0: both"),
    "max_changed": Var((), "", "How many features may change at once"),
    "rounding_error": Var((), "", "Largest measured difference of the model from the analysed layers"),
    "polygon": Var(("sample", "vertex", "axis"), "the feature's", "Vertices of the polygon", optional=True),
    "margin_map": Var(
        ("sample", "grid_y", "grid_x"), "", "Lead of the target over two features", optional=True
    ),
    "other": Var(("other",), "", "Run on whose last checkpoint the boxes were tried", optional=True),
    "transfer": Var(("sample", "other"), "", "Whether the box is all target there", optional=True),
    "input": Var(("sample", "entry"), "", "Judged input", optional=True),
    "input_shape": Var(("input_axis",), "", "Shape of an input", optional=True),
}

TABLE = (
    "judged",
    "correctable",
    "not_correctable",
    "still_open",
    "on_target",
    "distance_median",
    "still_hold",
)


def _reads(options: Mapping[str, Any]) -> Sequence[str]:
    """The last checkpoint says which samples are misclassified, and what the others' decision is."""
    found = [] if _fixed_target(options) else ["last"]
    return [*found, *(["others"] if options.get("transfer", False) else [])]


def _fixed_target(options: Mapping[str, Any]) -> bool:
    target, samples = str(options.get("target", "auto")), str(options.get("samples", ""))
    return target not in ("auto", "any") and not samples.startswith("misclassified")


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    """What can be said before the samples are chosen: how many there are, and the limit that they have."""
    del n_checkpoints
    one, several = str(options.get("sample", "")), str(options.get("samples", ""))
    if one or "," in several:
        n_judged = len([part for part in (one or several).split(",") if part.strip()])
    elif several.isdecimal() or not several:
        n_judged = int(several or USUAL)
    else:
        return {}
    return {
        "judgements": n_judged,
        "seconds at most": math.ceil(n_judged * float(options.get("budget", 10.0))),
    }


@analyzer(
    returns=RETURNS,
    figure=draw_corrections,
    summary=summarise,
    summary_of="call",
    summary_returns=SUMMARY_RETURNS,
    cost=_cost,
    reads=_reads,
    table=TABLE,
    names=True,
)
def corrections(
    model: torch.nn.Module,
    batches: Any,
    run: Any = None,
    previous: Any = None,
    partial: Any = None,
    progress: Any = None,
    *,
    sample: str = "",
    samples: str = "",
    features: str = "all",
    target: str = "auto",
    stability: str = "2.5%",
    distance: Literal["l1", "linf"] = "l1",
    max_changed: Annotated[int, Range(min=0)] = 0,
    ranges: str = "0%:100%",
    feature_file: Annotated[str, InputFile()] = "",
    shape: Literal["box", "polygon"] = "box",
    slack: Annotated[float, Range(min=0, max=1)] = 0.0,
    tolerance: Annotated[float, Range(min=0, max=1)] = 0.01,
    budget: Annotated[float, Range(min=0.1)] = 10.0,
    threshold: float | None = None,
    sampled: Annotated[int, Range(min=0)] = 200_000,
    transfer: bool = False,
    seed: int = 0,
) -> Measurement:
    """Corrections: what would have to change in an input for the network to decide otherwise, with bounds.

    A correction changes chosen features of an input so that the network decides for the target; its distance
    is Σ w_i |d_i| with w_i = 1/range_i (or the largest term). It is stable if every input within ± the
    stability, and within the allowed values, decides so too. Around the nearest stable correction the largest
    box is found in which all inputs decide for the target. Distances are enclosed in [lower_bound, distance],
    and the volume of the box in [volume, volume_bound]: found by branch and bound with linear bounds of the
    network (CROWN), by a MILP where many features may change, and numerically verified: in float64, with a
    margin above the measured rounding error of the model.

    Outcomes: optimal (within the tolerance), bounded (found, the gap is open), none_exists (within the
    printed ranges, numerically verified), timeout (neither found nor excluded), unsupported, already_target.

    Needs a network of affine layers with ReLU-like activations, tanh or sigmoid; anything else is refused by
    name. Features, ranges, costs, samples and targets are fixed once for all checkpoints.

    Cost: at most about `budget` seconds for each sample at each checkpoint, usually far less for up to five
    features at once.

    Args:
        model: The network; found unchanged afterwards.
        batches: Pairs (inputs, targets), re-iterable, with one input of real numbers.
        run: The sequence, for its last checkpoint and the other runs.
        previous: The measurement of the checkpoint before.
        partial: Where finished judgements are kept.
        progress: Called with (done, total, what).
        sample: Number of the sample to be judged; several separated by commas.
        samples: How many samples, drawn by seed (10 if nothing is said); or numbers separated by commas; or
            misclassified, or misclassified:20, those that the last checkpoint gets wrong; or all.
        features: Which features may change: names, numbers or patterns, separated by commas; all.
        target: Class to be decided, by number or name; label for each sample's own; any for any other than
            the last checkpoint's; auto is label for misclassified samples, else any.
        stability: Half-width in which a stable correction holds, in per cent of each range or in the
            feature's units; of single features NAME=VALUE.
        distance: Costs of several features are added (l1), or the largest counts (linf).
        max_changed: How many of the features may change at once; all such subsets are searched. 0 for all of
            up to five features, two of up to 64, and all of more.
        ranges: Allowed values: quantiles of the data as 0%:100%, or LOW:HIGH; of single features
            NAME=LOW:HIGH.
        feature_file: TOML file of facts about features: range, weight, stability, integer, immutable,
            direction, unit, and one-hot features.
        shape: What is grown around a correction; a polygon needs two features that change.
        slack: Part of the stability that the box need not have around the correction: it touches the
            boundary there, and a little slack often makes a much larger box.
        tolerance: Relative gap below which a distance counts as optimal.
        budget: Seconds for each sample at each checkpoint. Bounds that stay open depend on it, and on the
            machine.
        threshold: Output above which a network with one output decides for class 1; 0, or 0.5 behind a
            sigmoid, by default.
        sampled: Points of each box that are tried in the model's own dtype, beside the verification.
        transfer: Try every box on the last checkpoint of each run of the call.
        seed: Of the draw of samples, of heuristics and of the points tried.

    Returns:
        Distances with bounds, boxes and what holds of them at other checkpoints; see the report's long names.

    Raises:
        OptionError: If the network has layers that cannot be analysed, or options contradict each other or
            the data.

    References:
        Zhang, Solar-Lezama and Singh, "Interpreting neural network judgments via minimal, stable, and
        symbolic corrections", NeurIPS 2018.
        Zhang, Weng, Chen, Hsieh and Daniel, "Efficient neural network robustness certification with general
        activation functions", NeurIPS 2018 (CROWN).
        Tjeng, Xiao and Tedrake, "Evaluating robustness of neural networks with mixed integer programming",
        ICLR 2019.
    """
    check_seed(seed)
    table = read_features(
        batches, features=features, feature_file=feature_file, ranges=ranges, stability=stability
    )
    call = Call(
        table,
        sample,
        samples,
        target,
        distance,
        most_changed(max_changed, table, shape),
        threshold,
        transfer,
        Settings(budget, tolerance, slack, shape, sampled, seed),
    )
    with frozen_eval(model):
        return judge_all(model, batches, call, run=run, previous=previous, partial=partial, progress=progress)
