"""What is found out about one judged input at one checkpoint, and how it is kept and stacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from dynprobe.analyzers.numerics.layered_network import Floats

NAN = math.nan

OUTCOMES = ("optimal", "bounded", "none_exists", "timeout", "unsupported", "already_target")
"""How a search ended: closed, found with a gap, excluded, undecided, not to be analysed, nothing to do."""

PADDING = 16
"""Vertices that a polygon has room for in a report."""

_DIGITS = 1e-6
"""Of a distance, what its bounds are never closer than: more digits would be those of rounding."""


@dataclass
class Record:
    """One judgement; numbers that do not exist are NaN.

    Args:
        value: Judged values in the features' own units, (n_reported,).
        decided: Class the model decides for.
        target: Class of the correction; -1 where there is none.
    """

    value: Floats
    decided: int
    target: int = -1
    outcome: str = "unsupported"
    nearest_outcome: str = "unsupported"
    distance: float = NAN
    lower_bound: float = NAN
    stable_distance: float = NAN
    stable_lower_bound: float = NAN
    volume: float = NAN
    volume_bound: float = NAN
    nearest_target: int = -1
    margin: float = NAN
    n_unstable: float = NAN
    n_boxes: float = NAN
    n_sampled: float = NAN
    sampled_failures: float = NAN
    previous_holds: float = NAN
    overlap: float = NAN
    solver: str = ""
    nearest: Floats = field(default_factory=lambda: np.empty(0))
    corrected: Floats = field(default_factory=lambda: np.empty(0))
    box_low: Floats = field(default_factory=lambda: np.empty(0))
    box_high: Floats = field(default_factory=lambda: np.empty(0))
    allowed_low: Floats = field(default_factory=lambda: np.empty(0))
    allowed_high: Floats = field(default_factory=lambda: np.empty(0))
    changed: Floats = field(default_factory=lambda: np.empty(0))
    polygon: Floats = field(default_factory=lambda: np.empty((0, 2)))
    margin_map: Floats = field(default_factory=lambda: np.empty((0, 0)))
    transfer: Floats = field(default_factory=lambda: np.empty(0))
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("nearest", "corrected", "box_low", "box_high", "allowed_low", "allowed_high"):
            if not getattr(self, name).size:
                setattr(self, name, np.full(len(self.value), NAN))
        if not self.changed.size:
            self.changed = np.zeros(len(self.value))

    def is_open(self, tolerance: float) -> bool:
        """Whether more time could tell more about the stable correction."""
        gap = self.stable_distance - self.stable_lower_bound
        return self.outcome == "timeout" or gap > tolerance * self.stable_distance + 1e-12

    def as_arrays(self) -> dict[str, np.ndarray]:
        """As arrays, for the store of parts."""
        return {
            f.name: np.asarray("\n".join(self.notes) if f.name == "notes" else getattr(self, f.name))
            for f in fields(self)
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Record:
        """The inverse of `as_arrays`."""
        values: dict[str, Any] = {}
        for f in fields(cls):
            array = np.asarray(arrays[f.name])
            values[f.name] = array if array.ndim else array.item()
        for name in ("solver", "outcome", "nearest_outcome", "notes"):
            text = values[name]
            values[name] = text.decode() if isinstance(text, bytes) else str(text)
        values["notes"] = [line for line in values["notes"].split("\n") if line]
        return cls(**values)


def stacked(records: Sequence[Record]) -> dict[str, Any]:
    """The variables of a report, sample first; optional ones only where some record has them."""
    found: dict[str, Any] = {}
    for f in fields(Record):
        values = [getattr(record, f.name) for record in records]
        if f.name in ("notes", "polygon", "margin_map", "transfer"):
            continue
        found[f.name] = np.array(values)
    found["changed"] = found["changed"].astype(int)
    if any(len(record.polygon) for record in records):
        found["polygon"] = np.stack([_padded(record.polygon) for record in records])
    if sizes := [record.margin_map.shape for record in records if record.margin_map.size]:
        empty = np.full(sizes[0], NAN)
        maps = [record.margin_map if record.margin_map.size else empty for record in records]
        found["margin_map"] = np.stack(maps).astype(np.float32)
    if widths := [len(record.transfer) for record in records if record.transfer.size]:
        none = np.full(widths[0], NAN)
        found["transfer"] = np.stack([r.transfer if r.transfer.size else none for r in records])
    return found


def counted(records: Sequence[Record], tolerance: float) -> dict[str, float]:
    """How the judgements of one checkpoint ended, in numbers."""
    outcomes = [record.outcome for record in records]
    found = [record for record in records if not math.isnan(record.stable_distance)]
    median = float(np.median([record.stable_distance for record in found])) if found else NAN
    least = float(np.median([record.stable_lower_bound for record in found])) if found else NAN
    held = np.array([r.previous_holds for r in records if not math.isnan(r.previous_holds)])
    share = float(held.mean()) if len(held) else NAN
    return {
        "judged": len(records),
        "correctable": len(found),
        "not_correctable": outcomes.count("none_exists"),
        "still_open": sum(record.is_open(tolerance) for record in records),
        "on_target": outcomes.count("already_target"),
        "distance_median": median,
        "distance_median_gap": max(median - least, _DIGITS * median),
        "still_hold": share,
        # that of n + 4 judgements, half of which hold: 0 of 3 is no certainty
        "still_hold_stderr": _agresti(held),
    }


def _agresti(held: Floats) -> float:
    """Standard error of a share of 0s and 1s, after Agresti and Coull; NaN of none."""
    if not len(held):
        return NAN
    n = len(held) + 4
    share = (held.sum() + 2) / n
    return math.sqrt(share * (1 - share) / n)


def _padded(polygon: Floats) -> Floats:
    full = np.full((PADDING, 2), NAN)
    full[: len(polygon)] = polygon
    return full
