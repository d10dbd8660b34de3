"""Judges the same inputs at every checkpoint of a run, under rules that are fixed once for all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers._corrections import Before, Judge, Settings
from dynprobe.analyzers._corrections_boxes import ReportedBox
from dynprobe.analyzers._corrections_columns import Columns
from dynprobe.analyzers._corrections_features import FeatureTable
from dynprobe.analyzers._corrections_model import Classifier, flat_inputs, flatten
from dynprobe.analyzers._corrections_record import Record, counted, stacked
from dynprobe.analyzers._corrections_samples import choose_samples, class_labels
from dynprobe.analyzers._corrections_ways import Rules, domain
from dynprobe.analyzers.core.contract import Measurement, OptionError
from dynprobe.analyzers.numerics.correction_problem import Norm
from dynprobe.analyzers.numerics.layered_network import Floats

_N_PROBES = 1024
"""Random points at which the model is compared with the analysed layers, beside the judged inputs."""

_TIMES_ERROR = 4.1
"""Two outputs are compared, each may be off, and what was measured need not be the largest error."""

_LEAST = 1e-9
"""Of the outputs' size, the least margin: what float64 itself may be wrong by."""

_LARGEST_IMAGE = 4096
"""Entries up to which an image is kept in the report to be drawn."""


@dataclass(frozen=True)
class Call:
    """What one call asks for, the same at every checkpoint.

    Args:
        table: The features that may change.
        sample: As the option.
        samples: As the option.
        target: As the option.
        norm: How costs add up.
        max_changed: How many features may change at once.
        threshold: Of a network with one output.
        transfer: Whether boxes are tried on other runs.
        settings: How hard to try.
    """

    table: FeatureTable
    sample: str
    samples: str
    target: str
    norm: Norm
    max_changed: int
    threshold: float | None
    transfer: bool
    settings: Settings


@dataclass(frozen=True)
class _Chosen:
    """The judged inputs of a run, fixed for all its checkpoints.

    Args:
        index: Their numbers in the data.
        labels: Class in the data, -1 where there is none.
        targets: For each the classes of which one is to be decided.
        notes: What the reader should know.
    """

    index: np.ndarray
    labels: np.ndarray
    targets: list[list[int]]
    notes: list[str]


def judge_all(
    model: torch.nn.Module,
    batches: Any,
    call: Call,
    *,
    run: Any = None,
    previous: Any = None,
    partial: Any = None,
    progress: Any = None,
) -> Measurement:
    """All judgements at one checkpoint.

    Args:
        model: The checkpoint's network.
        batches: The data.
        call: What is asked for.
        run: The sequence; without it the network is its own last checkpoint.
        previous: The measurement of the checkpoint before.
        partial: Where finished judgements are kept.
        progress: Called with (done, total, what).

    Raises:
        OptionError: If the network, the data and the options do not go together.
    """
    inputs, targets = flat_inputs(batches)
    classifier = Classifier(model, inputs, call.threshold)
    names = _class_names(batches, classifier.n_classes)

    def choose() -> _Chosen:
        return _choose(call, classifier, inputs, targets, names, run)

    chosen = run.cached(("corrections", str(call)), choose) if run is not None else choose()
    points = flatten(inputs, chosen.index)
    error, margin = _margin(classifier, call.table, points, call.settings.seed)
    rules = Rules(call.table, call.norm, call.max_changed, margin)
    others, notes = _others(call, run, inputs, classifier, points)
    judge = Judge(classifier, rules, call.settings, others=list(others.values()))
    decided = classifier.decides(points)
    records = []
    for i, (sample, point) in enumerate(zip(chosen.index, points, strict=True)):
        if progress is not None:
            progress(i, len(points), f"sample {sample}")
        before = _before(previous, chosen.index, i)
        given = point, int(decided[i]), chosen.targets[i], before
        records.append(_kept(partial, f"sample {sample}", functools.partial(judge, *given)))
    values = stacked(records) | _facts(call, judge.columns, chosen, names, error)
    if call.transfer:
        values["other"] = np.array(list(others), dtype=object)
        values.setdefault("transfer", np.full((len(points), len(others)), math.nan))
    if len(classifier.shape) > 1 and points.shape[1] <= _LARGEST_IMAGE:
        values |= {"input": points.astype(np.float32), "input_shape": np.array(classifier.shape)}
    values |= counted(records, call.settings.tolerance)
    return _measurement(values, records, call, [*call.table.notes, *chosen.notes, *notes], len(points))


def _measurement(
    values: dict[str, Any], records: Sequence[Record], call: Call, notes: list[str], n: int
) -> Measurement:
    open_ = sum(record.is_open(call.settings.tolerance) for record in records)
    reason = (
        f"{open_} of {n} judgements are still open after {call.settings.budget:g} s each (raise --budget, or "
        "choose fewer features)"
        if open_
        else ""
    )
    boxes = [record.n_boxes for record in records if not math.isnan(record.n_boxes)]
    own = [note for record in records for note in record.notes]
    return Measurement(
        values,
        converged=not open_,
        reason=reason,
        spent={"boxes": int(sum(boxes))},
        notes=list(dict.fromkeys([*notes, *own])),
    )


def _facts(
    call: Call, columns: Columns, chosen: _Chosen, names: Sequence[str], error: float
) -> dict[str, Any]:
    table = call.table
    n_more = len(columns.names) - len(table.names)
    weights = [group.weight for group in table.groups for _ in group.names]
    return {
        "sample": chosen.index,
        "feature": np.array(columns.names, dtype=object),
        "class": np.array(names, dtype=object),
        "label": chosen.labels,
        "feature_low": np.concatenate([table.low, np.zeros(n_more)]),
        "feature_high": np.concatenate([table.high, np.ones(n_more)]),
        "feature_weight": np.concatenate([table.weight, weights]),
        "stability": np.concatenate([table.stability, np.zeros(n_more)]),
        "feature_index": columns.index,
        "direction": np.concatenate([table.direction, np.zeros(n_more, np.int64)]),
        # where all may change, that is all columns of a category too
        "max_changed": len(columns.names)
        if call.max_changed == len(table.names) + len(table.groups)
        else call.max_changed,
        "rounding_error": error,
    }


def _kept(partial: Any, name: str, judge: Callable[[], Record]) -> Record:
    """A judgement from the store of parts, or a new one, which is then stored."""
    stored = partial.get(name) if partial is not None else None
    if stored is not None:
        return Record.of_arrays(stored)
    record = judge()
    if partial is not None:
        partial.put(name, record.as_arrays())
    return record


# Which inputs, towards which class


def _choose(
    call: Call, classifier: Classifier, inputs: Tensor, targets: np.ndarray, names: Sequence[str], run: Any
) -> _Chosen:
    labels = class_labels(targets, classifier.n_classes)
    notes: list[str] = []
    everything = flatten(inputs, range(len(inputs)))
    last = classifier
    misclassified = call.samples.startswith("misclassified") and not call.sample
    asked = call.target
    if asked == "auto":
        asked = "label" if misclassified else "any"
    if run is not None and (misclassified or asked == "any"):
        last, notes = _last(run, inputs, call.threshold)
    decided = last.decides(everything)
    index = choose_samples(labels, decided, sample=call.sample, samples=call.samples, seed=call.settings.seed)
    chosen = labels[index] if labels is not None else np.full(len(index), -1)
    if asked == "label":
        if (chosen < 0).any():
            raise OptionError(
                "the data have no class for every judged sample, and --target label needs one.",
                "Name a class with --target, or give --target any.",
            )
        aims = [[int(label)] for label in chosen]
    elif asked == "any":
        aims = [[c for c in range(classifier.n_classes) if c != decided[i]] for i in index]
    else:
        aims = [[_class(asked, names)]] * len(index)
    return _Chosen(index, chosen, aims, notes)


def _class(text: str, names: Sequence[str]) -> int:
    """A class by its number or name.

    Raises:
        OptionError: If there is none.
    """
    if text in names:
        return list(names).index(text)
    if text.lstrip("-").isdecimal() and 0 <= int(text) < len(names):
        return int(text)
    raise OptionError(
        f"--target {text} is no class of the network.",
        f"Its classes are {', '.join(f'{i} ({n})' if n != str(i) else n for i, n in enumerate(names))}; "
        "label, any and auto are words for more.",
    )


def _class_names(batches: Any, n_classes: int) -> tuple[str, ...]:
    names = tuple(str(name) for name in getattr(batches, "class_names", ()) or ())
    return names if len(names) == n_classes else tuple(str(i) for i in range(n_classes))


def _last(run: Any, inputs: Tensor, threshold: float | None) -> tuple[Classifier, list[str]]:
    """The last checkpoint that can be used, which says what is misclassified and what the decision is.

    Raises:
        OptionError: If none can.
    """
    problem = ""
    for position in range(len(run) - 1, -1, -1):
        try:
            state = run.state(position)
            if all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point()):
                last = Classifier(run.model(position), inputs, threshold)
                left = f"the last checkpoint cannot be used ({problem}); " if problem else ""
                step = run.steps[position]
                notes = [f"{left}what is decided in the end is what step {step} decides"] if problem else []
                return last, notes
            problem = problem or "it holds NaN or infinite values"
        except OptionError:
            raise
        except Exception as error:
            problem = problem or str(error)
    raise OptionError(f"no checkpoint of {run.name} can be used: {problem}", "Name --target and --samples.")


# What is fixed at each checkpoint


def _rounding_error(classifier: Classifier, table: FeatureTable, points: Floats, seed: int) -> float:
    """Largest difference between the model and its layers at the judged inputs and around them."""
    generator = np.random.default_rng(seed)
    probes = points[generator.integers(0, len(points), _N_PROBES)].copy()
    for probe in probes:
        low, high = domain(table, probe)
        probe[table.index] = table.inputs(low + generator.random(len(low)) * (high - low))
    return classifier.rounding_error(np.concatenate([points, probes]))


def _margin(classifier: Classifier, table: FeatureTable, points: Floats, seed: int) -> tuple[float, float]:
    """The measured rounding error of a network, and the least lead of an output that counts there."""
    error = _rounding_error(classifier, table, points, seed)
    scale = float(np.abs(classifier.network(points)).max())
    return error, max(_TIMES_ERROR * error, _LEAST * max(scale, 1.0))


def _before(previous: Any, index: np.ndarray, i: int) -> Before | None:
    """What the checkpoint before said about the same input."""
    if previous is None or not np.array_equal(previous["sample"], index):
        return None
    target = int(previous["target"][i])
    if target < 0:
        return None
    box = ReportedBox(np.asarray(previous["box_low"][i]), np.asarray(previous["box_high"][i]))
    nearest, corrected = np.asarray(previous["nearest"][i]), np.asarray(previous["corrected"][i])
    return Before(nearest, int(previous["nearest_target"][i]), corrected, box, target)


def _others(
    call: Call, run: Any, inputs: Tensor, classifier: Classifier, points: Floats
) -> tuple[dict[str, tuple[Classifier, float] | None], list[str]]:
    """The last checkpoint of each run of the call, by the run's name; None where it cannot be used."""
    if not call.transfer:
        return {}, []
    runs = list(getattr(run, "others", ()) or ())
    if not runs:
        raise OptionError(
            "--transfer tries boxes on the runs of the call, and there are none.", "Leave it out."
        )

    def make() -> tuple[dict[str, tuple[Classifier, float] | None], list[str]]:
        found: dict[str, tuple[Classifier, float] | None] = {}
        notes = []
        for other in runs:
            try:
                there, more = _last(other, inputs, call.threshold)
                if there.n_classes != classifier.n_classes:
                    raise OptionError(f"it decides between {there.n_classes} classes", "")
                # measured now: the module that it holds is filled with the next run's weights
                found[other.name] = there, _margin(there, call.table, points, call.settings.seed)[1]
                notes += more
            except Exception as error:
                found[other.name] = None
                notes.append(f"boxes were not tried on {other.name}: {error}")
        return found, notes

    return run.cached(("corrections", "others", str(call)), make)  # type: ignore[no-any-return]
