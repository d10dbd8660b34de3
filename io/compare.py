"""How far two results agree: piece by piece, variable by variable, in units of their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynprobe.analyzers.core.result import INTERNAL, Array, Piece, Result, unstack


@dataclass
class Agreement:
    """How one variable of two results agrees.

    Args:
        variable: Its name.
        entries: How many numbers were compared.
        absolute: Largest |a − b|.
        relative: Largest |a − b| / max(|a|, |b|).
        in_errors: Largest |a − b| / √(error_a² + error_b²); NaN where no error is known.
        within: Whether |a − b| ≤ atol + rtol·|b| for every entry.
    """

    variable: str
    entries: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    in_errors: float = np.nan
    within: bool = True


@dataclass
class Comparison:
    """What two results of one analyzer have in common, and what not.

    Args:
        variables: Agreement of what both have.
        differences: Sentences about what cannot be compared: a piece or variable of only one, a
            changed status, other coordinates.
        provenance: `{name: (value in a, value in b)}` of what differs.
    """

    variables: list[Agreement] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    provenance: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether all values agree within the tolerances; provenance may differ."""
        return not self.differences and all(v.within for v in self.variables)


def compare(a: Result, b: Result, *, rtol: float, atol: float) -> Comparison:
    """Compare two results of one analyzer.

    Pieces are matched by run and step, or by step alone where no run has the same name. NaN agrees
    with NaN, an infinity with itself.
    """
    found = Comparison(provenance=_provenance(a.attributes, b.attributes))
    pairs = _matched(unstack(a), unstack(b), found)
    agreements: dict[str, Agreement] = {}
    for label, one, other in pairs:
        if one.status != other.status:
            found.differences.append(f"{label}: {one.status} in the first, {other.status} in the second")
        elif one.arrays:
            _compare_arrays(label, one.arrays, other.arrays, found, agreements, rtol, atol)
    if a.lead:  # run-level numbers stand beside the pieces
        _compare_arrays("run level", _run_level(a), _run_level(b), found, agreements, rtol, atol)
    found.variables = list(agreements.values())
    return found


def _run_level(result: Result) -> dict[str, Array]:
    along = {result.lead, "checkpoint"} if result.grain == "run" else {result.lead}
    return {n: a for n, a in result.variables.items() if not along & set(a.dims)}


def _provenance(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [n for n in dict.fromkeys([*a, *b]) if n not in INTERNAL]
    return {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)}


def _matched(a: list[Piece], b: list[Piece], found: Comparison) -> list[tuple[str, Piece, Piece]]:
    for kinds in (("run", "step"), ("step",)):
        first, second = (_labelled(pieces, kinds) for pieces in (a, b))
        if first.keys() & second.keys():
            break
    found.differences += [f"{label}: only in the first" for label in first if label not in second]
    found.differences += [f"{label}: only in the second" for label in second if label not in first]
    return [(label, piece, second[label]) for label, piece in first.items() if label in second]


def _labelled(pieces: list[Piece], kinds: tuple[str, ...]) -> dict[str, Piece]:
    """Pieces by label; those of one run and step (an alias beside the file) by their order."""
    found: dict[str, Piece] = {}
    for piece in pieces:
        label, count = _label(piece, kinds), 2
        while label in found:
            label, count = f"{_label(piece, kinds)} ({count})", count + 1
        found[label] = piece
    return found


def _label(piece: Piece, kinds: tuple[str, ...]) -> str:
    return ", ".join(f"{k} {v}" for k, v in piece.index.items() if k.startswith(kinds)) or "the result"


def _compare_arrays(
    label: str,
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    found: Comparison,
    agreements: dict[str, Agreement],
    rtol: float,
    atol: float,
) -> None:
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            text = f"{name}: only in the {'first' if name in a else 'second'}"
        elif a[name].dims != b[name].dims or a[name].values.shape != b[name].values.shape:
            text = f"{label}: {name}: shape {a[name].values.shape} and {b[name].values.shape}"
        elif a[name].values.dtype.kind not in "fiu":
            text = "" if np.array_equal(a[name].values, b[name].values) else f"{label}: {name}: other text"
        else:
            errors = [_error(arrays, name) for arrays in (a, b)]
            agreement = agreements.setdefault(name, Agreement(name))
            _extend(agreement, a[name].values, b[name].values, errors, rtol, atol)
            continue
        if text and text not in found.differences:
            found.differences.append(text)


def _error(arrays: Mapping[str, Array], name: str) -> np.ndarray:
    error = arrays.get(arrays[name].error)
    fits = error is not None and error.dims == arrays[name].dims
    return error.values if error is not None and fits else np.full(arrays[name].values.shape, np.nan)


def _extend(
    agreement: Agreement, a: np.ndarray, b: np.ndarray, errors: list[np.ndarray], rtol: float, atol: float
) -> None:
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        equal = (a == b) | (np.isnan(a) & np.isnan(b))
        gap = np.where(equal, 0.0, np.abs(a - b))
        gap = np.where(np.isnan(gap), np.inf, gap)  # a number against NaN
        relative = np.where(equal, 0.0, gap / np.maximum(np.abs(a), np.abs(b)))
        within = equal | (np.isfinite(gap) & (gap <= atol + rtol * np.abs(b)))
        in_errors = np.where(equal, 0.0, gap / np.hypot(*errors))
    in_errors = in_errors[np.isfinite(np.hypot(*errors))]
    relative = np.where(np.isnan(relative), np.inf, relative)
    agreement.entries += a.size
    agreement.absolute = max(agreement.absolute, float(gap.max(initial=0.0)))
    agreement.relative = max(agreement.relative, float(relative.max(initial=0.0)))
    if in_errors.size:
        agreement.in_errors = float(np.fmax(agreement.in_errors, in_errors.max()))
    agreement.within &= bool(within.all())
