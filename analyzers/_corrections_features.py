"""The features that a correction may change: their ranges, costs, stability and units, fixed by the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._corrections_feature_choice import Choice, choose_features, left_out_note
from dynprobe.analyzers._corrections_feature_file import (
    FeatureFile,
    Group,
    half_width,
    interval,
    read_feature_file,
)
from dynprobe.analyzers._corrections_feature_names import (
    Amount,
    FeatureNames,
    Given,
    input_names,
    listed,
    read_given,
)
from dynprobe.analyzers._corrections_feature_table import WHOLE, FeatureTable, Floats, OneHot
from dynprobe.analyzers.numerics.input_samples import tensors_of

__all__ = ["FeatureTable", "OneHot", "read_features"]

# Rounding of a standardised float32 value, as part of the largest one.
_ROUNDING = 1e-6
# So that 2.5 % of 40 is 1 and not 0.999….
_SLACK = 1e-9


def read_features(
    batches: Any,
    *,
    features: str = "all",
    feature_file: str = "",
    ranges: str = "0%:100%",
    stability: str = "2.5%",
) -> FeatureTable:
    """The features that may change, with the facts about them that hold for a whole sequence.

    What a feature is told by its name on the command line goes before the feature file, and that before what
    the command line says for all features. Names come from the data; see `input_names` for data without.

    Args:
        batches: Pairs (inputs, targets), with one tensor of inputs; may carry `feature_names`,
            `feature_offset` and `feature_scale`.
        features: Names, numbers, patterns and one-hot features, separated by commas; `all`.
        feature_file: A TOML file of facts about features; see `read_feature_file`.
        ranges: What values are allowed: quantiles of the data, `1%:99%`, or numbers, `0:1`; of single
            features `NAME=LOW:HIGH`.
        stability: Half-widths, in per cent of the ranges or in the features' units; of single features
            `NAME=VALUE`. Features that are not named have none if there is no value for all.

    Returns:
        The table. Immutable features, and those that do not vary in the data, are left out with a note.

    Raises:
        OptionError: If a name or a value cannot be used, a feature that is named alone is immutable or does
            not vary, or the data have no features that can be changed.
    """
    names = feature_names(batches)
    file = read_feature_file(feature_file, names)
    given = {"ranges": read_given(ranges, names, "ranges")}
    given["stability"] = read_given(stability, names, "stability")
    facts = _Facts(names, file, given["ranges"], given["stability"])
    chosen = choose_features(features, names, file)
    for option, values_of in given.items():
        if values_of.of and not set(values_of.of) & set(chosen.columns):
            raise OptionError(
                f"{option} {listed([names.names[column] for column in values_of.of], 4)}: not among the "
                "features that may change.",
                "Add it to --features, or leave it out.",
            )
    offset, scale = _conversion(batches, len(names), file)
    columns = [*chosen.columns, *(column for group in chosen.groups for column in group.columns)]
    values = dict(zip(columns, _columns(batches, columns, names).T, strict=True))
    found = [facts.of(column, offset[column] + scale[column] * values[column]) for column in chosen.columns]
    notes = _constant_notes(chosen, found, names)
    rows = [row for row in found if row is not None]
    groups = tuple(_one_hot(group, names, offset, scale) for group in chosen.groups)
    for group in groups:
        group.category_of(np.stack([values[column] for column in group.index], 1))
    if not rows and not groups:
        raise OptionError("features: none of them varies in the data.", "Give ranges, such as --ranges 0:1.")
    index = np.array([row.column for row in rows], np.int64)
    return FeatureTable(
        names=tuple(names.names[row.column] for row in rows),
        index=index,
        low=np.array([row.low for row in rows]),
        high=np.array([row.high for row in rows]),
        weight=np.array([row.weight for row in rows]),
        stability=np.array([row.stability for row in rows]),
        integer=np.array([row.integer for row in rows], bool),
        direction=np.array([row.direction for row in rows], np.int64),
        unit=tuple(row.unit for row in rows),
        offset=offset[index],
        scale=scale[index],
        groups=groups,
        notes=(*chosen.notes, *notes, *(row.note for row in rows if row.note)),
    )


@dataclass(frozen=True)
class _Row:
    """One feature of the table."""

    column: int
    low: float
    high: float
    weight: float
    stability: float
    integer: bool
    direction: int
    unit: str
    note: str


@dataclass(frozen=True)
class _Facts:
    """Where the facts about a feature come from, the most specific source first."""

    names: FeatureNames
    file: FeatureFile
    ranges: Given
    stability: Given

    def of(self, column: int, values: Floats) -> _Row | None:
        """The row of a feature with these values in the data, shown units; None if it has no range."""
        name = self.names.names[column]
        integer = self.file.of(column, "integer", False)
        if integer:
            values = _whole(values, name)
        low, high = self._range(column, values)
        if integer:
            low, high = float(np.ceil(low)), float(np.floor(high))
        if not high > low:
            return None
        radius = self._stability(column).of(high - low)
        whole = float(np.floor(radius + _SLACK)) if integer else radius
        lost = integer and radius > 0 and whole == 0
        return _Row(
            column,
            low,
            high,
            self.file.of(column, "weight", 1 / (high - low)),
            whole,
            integer,
            self.file.of(column, "direction", 0),
            self.file.of(column, "unit", ""),
            f"{name} takes whole numbers: a stability of {radius:.3g} is none" if lost else "",
        )

    def _range(self, column: int, values: Floats) -> tuple[float, float]:
        if (text := self.ranges.of.get(column)) is not None:
            ends, where = interval(text, "ranges"), "ranges"
        elif (said := self.file.of(column, "range", None)) is not None:
            ends, where = said, "range"
        else:
            ends, where = interval(self.ranges.everywhere or "0%:100%", "ranges"), "ranges"
        low, high = (float(np.quantile(values, e.value)) if e.is_part else e.value for e in ends)
        if high < low:
            raise OptionError(
                f"{where}: {self.names.names[column]!r} ends at {high:g}, below its start at {low:g}.",
                "Give both ends in the feature's units.",
            )
        return low, high

    def _stability(self, column: int) -> Amount:
        if (text := self.stability.of.get(column)) is not None:
            return half_width(text, "stability")
        said: Amount | None = self.file.of(column, "stability", None)
        return said if said is not None else half_width(self.stability.everywhere or "0", "stability")


def _whole(values: Floats, name: str) -> Floats:
    """Values of an integer feature, without the rounding of the inputs.

    Raises:
        OptionError: If one is no whole number.
    """
    whole = np.round(values)
    wrong = np.abs(values - whole) > WHOLE + _ROUNDING * np.abs(values).max()
    if wrong.any():
        raise OptionError(
            f"{name!r} is said to take whole numbers, and a sample has {values[wrong][0]:.6g}.",
            "Give its offset and scale (or mean and std) in the feature file, or remove integer.",
        )
    return np.asarray(whole)


def feature_names(batches: Any) -> FeatureNames:
    """Names of the entries of the flattened input: those of the data, else by their place.

    Raises:
        OptionError: If the inputs are not one tensor of real numbers, or there are not as many names.
    """
    inputs, _targets = next(iter(batches))
    tensors = tensors_of(inputs)
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].ndim < 2:
        kinds = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
        raise OptionError(
            f"the inputs must be one tensor (n_samples, …) of real numbers, and a batch has {kinds}.",
            "Token ids, and inputs of several tensors, cannot be changed little by little.",
        )
    shape = tuple(tensors[0].shape[1:])
    given = tuple(map(str, getattr(batches, "feature_names", ()) or ()))
    return FeatureNames(given or input_names(shape))


def _conversion(batches: Any, n_inputs: int, file: FeatureFile) -> tuple[Floats, Floats]:
    """Offset and scale of every entry of the flattened input; the file goes before the data."""
    found = []
    for key, other, usual in (("offset", "scale", 0.0), ("scale", "offset", 1.0)):
        own = getattr(batches, f"feature_{key}", None)
        values = np.full(n_inputs, usual) if own is None else np.array(own, np.float64).reshape(n_inputs)
        for column, facts in file.facts.items():
            if key in facts or other in facts:
                values[column] = facts.get(key, usual)
        found.append(values)
    return found[0], found[1]


def _columns(batches: Any, columns: Sequence[int], names: FeatureNames) -> Floats:
    """These entries of all flattened inputs, (n_samples, n_columns)."""
    index, parts = list(columns), []
    for inputs, _targets in batches:
        flat = tensors_of(inputs)[0].detach().flatten(1)
        parts.append(flat[:, index].cpu().double().numpy())
    values = np.concatenate(parts)
    if not (finite := np.isfinite(values).all(0)).all():
        name = names.names[index[int(np.argmin(finite))]]
        raise OptionError(f"{name!r} is NaN or infinite in some samples.", "Leave those samples out.")
    return values


def _constant_notes(chosen: Choice, rows: Sequence[_Row | None], names: FeatureNames) -> tuple[str, ...]:
    """A sentence on features that have no range.

    Raises:
        OptionError: If one of them was named alone.
    """
    constant = [column for column, row in zip(chosen.columns, rows, strict=True) if row is None]
    for column in constant:
        if column in chosen.named:
            name = names.names[column]
            raise OptionError(
                f"features: {name!r} has one value only.",
                f"Leave it out, or say what is allowed: --ranges {name}=LOW:HIGH.",
            )
    return left_out_note((names.names[column] for column in constant), "as they do not vary in the data")


def _one_hot(group: Group, names: FeatureNames, offset: Floats, scale: Floats) -> OneHot:
    index = np.array(group.columns, np.int64)
    named = tuple(names.names[column] for column in group.columns)
    return OneHot(group.name, index, named, group.weight, group.has_baseline, offset[index], scale[index])
