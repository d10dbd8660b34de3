"""What an analysis yields: labelled arrays, a status for every piece, provenance. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Index = Mapping[str, Any]

OK, INCOMPLETE, NOT_CONVERGED, FAILED = "ok", "incomplete", "not converged", "failed"

LEAD = {"checkpoint": "checkpoint", "pair": "pair", "run": "run", "group": ""}
"""The leading dimension of a stacked variable, by the grain of its analyzer."""


@dataclass(frozen=True)
class Var:
    """One variable that an analyzer returns, as its author declares it.

    Args:
        dims: Names of the dimensions beyond the leading one, singular (`("y", "x")`). A variable
            whose name is its only dimension is a coordinate and belongs to the whole result.
        units: Units, `""` for a pure number.
        long_name: A short phrase for axis labels and table heads.
        error: Name of the variable that holds this one's standard error or bound.
        optional: Whether the analyzer may leave it out (it depends on an option).
        alternatives: Other dimensions it may have instead, told apart by their number.
    """

    dims: tuple[str, ...] = ()
    units: str = ""
    long_name: str = ""
    error: str = ""
    optional: bool = False
    alternatives: tuple[tuple[str, ...], ...] = ()

    def dims_for(self, ndim: int) -> tuple[str, ...] | None:
        """The declared dimensions that fit an array of `ndim` axes, or None."""
        return next((dims for dims in (self.dims, *self.alternatives) if len(dims) == ndim), None)


@dataclass(frozen=True)
class Array:
    """Values with the names of their axes; what `xarray.DataArray` would be without the dependency."""

    dims: tuple[str, ...]
    values: np.ndarray
    units: str = ""
    long_name: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if len(self.dims) != self.values.ndim:
            raise ValueError(f"{self.values.ndim} axes but dimensions {self.dims}")


@dataclass(frozen=True)
class Piece:
    """One finished unit of work: a checkpoint, a pair, a run or a group.

    Args:
        key: Content key; equal keys mean the same analyzer, options, code, checkpoint and data.
        index: Labels along the leading dimension (`run`, `step`, `path`, …).
        arrays: Variables and coordinates by name, without the leading dimension.
        status: `ok`, `incomplete` (a run measured without its broken checkpoints), `not converged`, `failed`.
        reason: Why it is not `ok`; empty otherwise.
        seconds: Wall-clock seconds spent on it.
        spent: Forwards, Hessian-vector products, … by name.
        notes: Sentences for the reader (a prefix stripped, a fallback taken).
    """

    key: str
    index: Index
    arrays: Mapping[str, Array] = field(default_factory=dict)
    status: str = OK
    reason: str = ""
    seconds: float = 0.0
    spent: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Everything one analyzer measured, stacked along its leading dimension.

    Args:
        analyzer: Its name, as typed.
        grain: `checkpoint`, `pair`, `run` or `group`.
        arrays: Variables and coordinates, leading dimension first.
        attributes: Provenance: options, versions, seeds, hashes; JSON-serialisable values.
    """

    analyzer: str
    grain: str
    arrays: Mapping[str, Array]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name].values

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    @property
    def lead(self) -> str:
        """The leading dimension of this result's variables; `""` for a single run or a group."""
        return self.arrays["status"].dims[0] if self.arrays["status"].dims else ""

    @property
    def n_pieces(self) -> int:
        """How many pieces are stacked."""
        return int(self["status"].size)

    @property
    def coordinates(self) -> dict[str, Array]:
        """The arrays that label a dimension: named like it, or an index along the leading one."""
        return {n: a for n, a in self.arrays.items() if a.dims == (n,) or n in self._index_names}

    @property
    def variables(self) -> dict[str, Array]:
        """The measured arrays: all that are not coordinates."""
        coordinates = self.coordinates
        return {n: a for n, a in self.arrays.items() if n not in coordinates}

    @property
    def _index_names(self) -> frozenset[str]:
        return frozenset(self.attributes.get("index", ())) | BOOKKEEPING

    def failures(self) -> list[tuple[str, str]]:
        """`(what, reason)` of every piece that is not `ok`."""
        status, reason = np.atleast_1d(self["status"]), np.atleast_1d(self["reason"])
        return [(self.label(i), f"{status[i]}: {reason[i]}") for i in range(len(status)) if status[i] != OK]

    def label(self, piece: int) -> str:
        """What a reader calls the piece: its path, else its run and step."""
        paths = [n for n in self.attributes.get("index", ()) if n.startswith("path")]
        own = [
            n
            for n in (*paths, "run", "runs", "step")
            if n in self and self.arrays[n].dims in ((), (self.lead,))
        ]
        found = [n for n in own if n in paths] or own
        return " | ".join(str(np.atleast_1d(self[n])[piece]) for n in found) or f"piece {piece}"

    @property
    def treatment(self) -> str:
        """What was made of maps and sequences to compare them: `flatten`, `average, mean`, or nothing."""
        texts = [t for n in ("treatment_a", "treatment_b", "treatment") if n in self for t in self[n].ravel()]
        return ", ".join(dict.fromkeys(str(t).replace(",", " ").split(" ")[0] for t in texts if t))

    def select(self, keep: np.ndarray) -> Result:
        """The result restricted to the pieces where the boolean or index array `keep` says so.

        Raises:
            ValueError: If a boolean `keep` does not have one entry for each piece.
        """
        if not self.lead:
            return self
        arrays = {n: _take(a, self.lead, keep) for n, a in self.arrays.items()}
        if self.grain == "run" and "checkpoint_run" in arrays:  # the checkpoints of the other runs go too
            mine = np.isin(self["checkpoint_run"].astype(str), arrays["run"].values.astype(str))
            arrays = {n: _take(a, "checkpoint", mine) for n, a in arrays.items()}
        return replace(self, arrays=arrays)


INTERNAL = frozenset({"index", "table", "matrix", "folders"})
"""Attributes that say how to read and print a result, not where it comes from."""

BOOKKEEPING = frozenset({"status", "reason", "seconds", "key", "notes"})


def _take(array: Array, dim: str, keep: np.ndarray) -> Array:
    if dim not in array.dims:
        return array
    axis = array.dims.index(dim)
    if keep.dtype == bool:
        if keep.shape != (array.values.shape[axis],):  # numpy would cut off the rest without a word
            raise ValueError(f"{keep.size} truth values for {array.values.shape[axis]} entries of {dim}")
        keep = np.flatnonzero(keep)
    return replace(array, values=np.take(array.values, keep, axis=axis))


def stack(analyzer: str, grain: str, pieces: Sequence[Piece], attributes: Mapping[str, Any]) -> Result:
    """Stack finished pieces into one result.

    Coordinates that differ between pieces are joined (outer join: numbers ascending, names first seen
    first); what a piece lacks there is NaN, as is everything of a failed piece.

    Args:
        analyzer: Name of the analyzer.
        grain: Its grain.
        pieces: Finished pieces in the order they are to have.
        attributes: Provenance to carry.

    Raises:
        ValueError: If there is no piece, two pieces give one variable different dimensions, or
            coordinates that have to be joined name one place twice.
    """
    if not pieces:
        raise ValueError("no piece to stack")
    lead = LEAD[grain] if (grain != "run" or len(pieces) > 1) else ""
    coordinates = _joined_coordinates(pieces)
    sizes = _sizes(pieces, coordinates)
    templates: dict[str, Array] = {}
    for piece in pieces:
        for name, array in piece.arrays.items():
            known = templates.setdefault(name, array)
            if known.dims != array.dims:
                raise ValueError(f"{name}: dimensions {known.dims} and {array.dims} in one result")
    arrays: dict[str, Array] = _index_arrays(pieces, lead)
    for name, template in templates.items():
        if name in coordinates and template.dims == (name,):
            arrays[name] = replace(template, values=coordinates[name])
        elif "checkpoint" in template.dims and grain == "run":
            arrays[name] = _concatenate(name, template, pieces, coordinates, sizes)
        else:
            arrays[name] = _stack_one(name, template, pieces, lead, coordinates, sizes)
    index = tuple(dict.fromkeys([*pieces[0].index, *(n for p in pieces for n in p.index)]))
    if grain == "run":
        index += tuple(n for n in ("step", "path", "checkpoint_run") if n in templates)
    spent = tuple(dict.fromkeys(n for p in pieces for n in p.spent))
    return Result(analyzer, grain, arrays, {**attributes, "index": (*index, *spent)})


def _joined_coordinates(pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
    """One array per labelled dimension: the union of the pieces' labels."""
    joined: dict[str, np.ndarray] = {}
    for piece in pieces:
        for name, array in piece.arrays.items():
            if array.dims != (name,):
                continue
            if name not in joined:
                joined[name] = array.values
            elif not np.array_equal(joined[name], array.values):
                for labels in (joined[name], array.values):
                    if len(set(labels.tolist())) < len(labels):
                        raise ValueError(f"{name}: two entries have one label, so pieces cannot be aligned")
                new = array.values[~np.isin(array.values, joined[name])]
                both = np.concatenate([joined[name], new])
                joined[name] = np.sort(both) if both.dtype.kind in "if" else both
    return joined


def _index_arrays(pieces: Sequence[Piece], lead: str) -> dict[str, Array]:
    dims = (lead,) if lead else ()
    shape = (len(pieces),) if lead else ()

    def column(values: Iterable[Any], long_name: str, units: str = "") -> Array:
        return Array(dims, tidy(list(values)).reshape(shape), units, long_name)

    arrays = {}
    for name in dict.fromkeys(n for p in pieces for n in p.index):
        arrays[name] = column((p.index.get(name) for p in pieces), name.replace("_", " "))
    arrays["status"] = column((p.status for p in pieces), "ok, incomplete, not converged or failed")
    arrays["reason"] = column((p.reason for p in pieces), "why it is not ok")
    arrays["seconds"] = column((p.seconds for p in pieces), "wall-clock time", "s")
    arrays["key"] = column((p.key for p in pieces), "content key of the piece")
    arrays["notes"] = column(("\n".join(p.notes) for p in pieces), "notes")
    for name in dict.fromkeys(n for p in pieces for n in p.spent):
        arrays[name] = column((p.spent.get(name, 0) for p in pieces), f"{name} spent", "1")
    return arrays


def tidy(values: list[Any]) -> np.ndarray:
    """A list as an array of integers, floats or text; `None` is NaN among numbers, else empty text."""
    known = [v for v in values if v is not None]
    if known and all(isinstance(v, (int, float, np.integer, np.floating)) for v in known):
        values = [np.nan if v is None else v for v in values]
    if all(isinstance(v, (bool, int, np.integer, np.bool_)) for v in values):
        return np.array(values, dtype=np.int64)
    if all(isinstance(v, (int, float, np.integer, np.floating)) for v in values):
        return np.array(values, dtype=np.float64)
    return np.array(["" if v is None else str(v) for v in values], dtype=object)


def _missing(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    if dtype.kind in "OUS":
        return np.full(shape, "", dtype=object)
    if dtype.kind in "iub":  # NaN needs a float, and a missing value is never a zero
        return np.full(shape, np.nan, dtype=np.float64)
    return np.full(shape, np.nan, dtype=dtype)


def _aligned(
    array: Array, piece: Piece, coordinates: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    """The values of `array` on the joined coordinates, padded with missing values."""
    if array.values.shape == shape and all(
        dim not in coordinates
        or dim not in piece.arrays
        or np.array_equal(piece.arrays[dim].values, coordinates[dim])
        for dim in array.dims
    ):
        return array.values
    out = _missing(shape, array.values.dtype)
    places = []
    for dim, size in zip(array.dims, array.values.shape, strict=True):
        if dim in coordinates and dim in piece.arrays:
            where = {label: i for i, label in enumerate(coordinates[dim].tolist())}
            places.append(np.array([where[label] for label in piece.arrays[dim].values.tolist()], dtype=int))
        else:
            places.append(np.arange(size))
    out[np.ix_(*places)] = array.values
    return out


def _sizes(pieces: Sequence[Piece], coordinates: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How long each dimension has to be to hold every piece, whichever of its variables has it."""
    sizes: dict[str, int] = {}
    for piece in pieces:
        for array in piece.arrays.values():
            for dim, size in zip(array.dims, array.values.shape, strict=True):
                sizes[dim] = max(size, sizes.get(dim, 0))
    return sizes | {dim: len(labels) for dim, labels in coordinates.items()}


def _stack_one(
    name: str,
    template: Array,
    pieces: Sequence[Piece],
    lead: str,
    coordinates: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
) -> Array:
    shape = tuple(sizes[dim] for dim in template.dims)
    rows = [
        _aligned(p.arrays[name], p, coordinates, shape)
        if name in p.arrays
        else _missing(shape, template.values.dtype)
        for p in pieces
    ]
    if not lead:
        return replace(template, values=rows[0])
    return replace(template, dims=(lead, *template.dims), values=np.stack(rows))


def _concatenate(
    name: str,
    template: Array,
    pieces: Sequence[Piece],
    coordinates: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
) -> Array:
    """Runs one after the other along `checkpoint`: each brings its own checkpoints."""
    axis = template.dims.index("checkpoint")
    full = [sizes[dim] for dim in template.dims]
    blocks = []
    for piece in pieces:
        count = next(
            (
                a.values.shape[a.dims.index("checkpoint")]
                for a in piece.arrays.values()
                if "checkpoint" in a.dims
            ),
            0,
        )
        shape = (*full[:axis], count, *full[axis + 1 :])
        blocks.append(
            _aligned(piece.arrays[name], piece, coordinates, shape)
            if name in piece.arrays
            else _missing(shape, template.values.dtype)
        )
    return replace(template, values=np.concatenate(blocks, axis=axis))


def unstack(result: Result) -> list[Piece]:
    """The pieces a result was stacked from; the inverse of `stack` up to padding.

    Run-level numbers that were added after stacking belong to no piece and are left out.
    """
    lead, spent_names = result.lead, _spent_names(result)
    index = [n for n in result.attributes.get("index", ()) if n in result and n not in spent_names]
    scalar_index = [n for n in index if result.arrays[n].dims in ((), (lead,))]
    measured = _arrays_of_pieces(result, [n for n in index if n not in scalar_index])
    pieces = []
    for i in range(result.n_pieces):

        def at(name: str, i: int = i) -> Any:
            return np.atleast_1d(result[name])[i]

        pieces.append(
            Piece(
                key=str(at("key")),
                index={n: _plain(at(n)) for n in scalar_index},
                arrays={}
                if str(at("status")) == FAILED
                else {n: _of_piece(result, array, i) for n, array in measured.items()},
                status=str(at("status")),
                reason=str(at("reason")),
                seconds=float(at("seconds")),
                spent={n: int(at(n)) for n in spent_names},
                notes=tuple(n for n in str(at("notes")).split("\n") if n),
            )
        )
    return pieces


def _arrays_of_pieces(result: Result, checkpoint_labels: Sequence[str]) -> dict[str, Array]:
    """Coordinates and variables that came from pieces, still stacked."""
    lead = result.lead
    of_pieces = {lead, "checkpoint"} if result.grain == "run" else {lead}
    variables = {n: a for n, a in result.variables.items() if not lead or of_pieces & set(a.dims)}
    later = {d for n, a in result.variables.items() if n not in variables for d in a.dims}
    later -= {d for a in variables.values() for d in a.dims}
    coordinates = {n: a for n, a in result.arrays.items() if a.dims == (n,) and n not in (lead, *later)}
    return {**coordinates, **{n: result.arrays[n] for n in checkpoint_labels}, **variables}


def _of_piece(result: Result, array: Array, piece: int) -> Array:
    lead = result.lead
    if lead and array.dims[:1] == (lead,):
        values = np.asarray(array.values[piece], dtype=array.values.dtype)
        return replace(array, dims=array.dims[1:], values=values)
    if result.grain == "run" and lead and "checkpoint" in array.dims:
        return _take(array, "checkpoint", result["checkpoint_run"] == result["run"][piece])
    return array


def _spent_names(result: Result) -> list[str]:
    return [
        n
        for n in result.attributes.get("index", ())
        if n in result and result.arrays[n].long_name == f"{n} spent"
    ]


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value  # an unknown step is NaN in a column of numbers
