"""Saved activations in place of checkpoints: files of arrays, one per layer, rows or columns the samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import InputError, UnusableData
from dynprobe.io.hashing import content_hash
from dynprobe.io.kept_activations import SAMPLE, is_kept, read_kept
from dynprobe.io.names import shortlist
from dynprobe.io.readers.safetensors_file import read_header
from dynprobe.io.saved_arrays import HDF5, IDS, READERS, readable, refuse_report, text_of
from dynprobe.io.step_names import counts_in_name

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_SHAPE = "Activations are (n_samples, n_features), one array per layer."
_FACTS = ("input_hash", "treatments")
"""Metadata that say a safetensors file holds activations."""


@dataclass
class LoadedActivations:
    """The activations in one file.

    Attributes:
        state: Layer → float32 or float64 tensor `(n_samples, …)`, of as many dimensions as the file has;
            `(n_rows, n_features)` where `sample` has the layer.
        notes: What was left out, and what looks wrong.
        input_hash: Of the inputs and their order as the file states it, or `sample_ids:` and a hash of its
            sample ids; "" where it says neither.
        treatment: What was made of maps and sequences, by layer; without those of which nothing is known.
        sample: Which sample every row belongs to, for layers with several rows per sample.
    """

    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    input_hash: str = ""
    treatment: dict[str, str] = field(default_factory=dict)
    sample: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """The content hash: the same for the same activations in every file format."""
        return content_hash(self.state | {name + SAMPLE: rows for name, rows in self.sample.items()})


class SavedActivations:
    """A file of activations, where others have a checkpoint.

    Args:
        path: The file; its suffix says what it is.
        run: Label of its run; by default what the file says, else its name without suffix.
        transpose: The arrays are `(n_features, n_samples)`.

    Attributes:
        step: As the file says, or its name; else None.
        size: Bytes on disk.
        problem: Empty: what is wrong is said when it is read.
    """

    problem = ""

    def __init__(self, path: Path, *, run: str = "", transpose: bool = False) -> None:
        facts = _kept_facts(path)
        self.path = path
        self.run = run or facts.get("run") or path.stem
        self.transpose = transpose
        self.step = _number(facts.get("step", "")) if facts else _step_in_name(path)
        self.size = path.stat().st_size if path.exists() else 0

    def load(self) -> LoadedActivations:
        """Read the arrays.

        Raises:
            InputError: There is no such file; it is damaged, empty, or a report; an array is no table of
                numbers with one row per sample, or holds NaN; layers have different numbers of samples.
        """
        if not self.path.is_file():
            raise UnusableData(f"{self.path}: there is no such file.", "Is the path right?")
        with readable(self.path):
            if _kept_facts(self.path):
                return self._load_kept()
            arrays, facts = READERS[self.path.suffix.lower()](self.path)
        return _loaded(self.path, arrays, facts, self.transpose)

    def _load_kept(self) -> LoadedActivations:
        kept = read_kept(self.path)
        if self.transpose:
            raise UnusableData(
                f"{self.path}: was written by dynprobe, with samples as rows.", "Leave out --transpose."
            )
        state = {name: values for name, (values, _sample, _treatment) in kept.layers.items()}
        return LoadedActivations(
            state,
            input_hash=kept.facts.get("input_hash", ""),
            treatment={name: treatment for name, (_v, _s, treatment) in kept.layers.items()},
            sample={name: sample for name, (_v, sample, _t) in kept.layers.items() if sample is not None},
        )


def is_saved(path: Path, *, transpose: bool = False) -> bool:
    """Whether a file holds activations and no weights, by its suffix and header; reads no data.

    No checkpoint is an `.npy`, `.npz` or HDF5 file. A safetensors file holds activations if it says so by
    `input_hash` or `treatments` in its metadata or by sample ids, or if all its tensors have at least two
    dimensions and the same number of samples, and none is called `weight`.

    Args:
        path: The file.
        transpose: The samples are along the last dimension, not the first.

    Raises:
        InputError: It is a dynprobe report.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS or not path.is_file():
        return False
    if suffix in HDF5:
        refuse_report(path)
    if suffix != ".safetensors":
        return True
    try:
        infos, facts = read_header(path)
    except (InputError, OSError):  # the readers of checkpoints say what is wrong with it
        return False
    if is_kept(facts) or any(name in facts for name in _FACTS) or any(name in infos for name in IDS):
        return True
    layers = {name: info.shape for name, info in infos.items()}
    sizes = {shape[-1 if transpose else 0] if len(shape) > 1 else -1 for shape in layers.values()}
    weights = any(name.rpartition(".")[2] == "weight" for name in layers)
    return len(sizes) == 1 and -1 not in sizes and not weights


def _kept_facts(path: Path) -> dict[str, str]:
    """The metadata of activations that dynprobe kept; empty for every other file."""
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return {}
    try:
        _infos, facts = read_header(path)
    except (InputError, OSError):
        return {}
    return facts if is_kept(facts) else {}


def _step_in_name(path: Path) -> int | float | None:
    """The step in a file's name; an epoch or a bare number where it has none."""
    counts = {count.unit: count.value for count in counts_in_name(path.stem)}
    return next((counts[unit] for unit in ("step", "epoch", "number") if unit in counts), None)


def _number(text: str) -> int | float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else value


def _loaded(
    path: Path, arrays: Mapping[str, Any], facts: Mapping[str, str], transpose: bool
) -> LoadedActivations:
    """Check the arrays of a file and bring the samples to the front."""
    layers = {name: array for name, array in arrays.items() if name not in IDS}
    if not layers:
        raise UnusableData(f"{path}: holds no arrays.", _SHAPE)
    beside = {} if _may_be_weights(path, transpose) else {n: a for n, a in layers.items() if len(a.shape) < 2}
    if len(beside) == len(layers):
        beside = {}
    tensors = {name: _tensor(path, name, array) for name, array in layers.items() if name not in beside}
    if transpose:
        _check_matrices(path, tensors)
    _check_samples(path, tensors, transpose)
    state = {name: (tensor.T if transpose else tensor).contiguous() for name, tensor in tensors.items()}
    for name, tensor in state.items():
        _check_finite(path, name, tensor)
    notes = [] if transpose else _orientation(path, tensors)
    if beside:
        left_out = shortlist((f"{name} {tuple(array.shape)}" for name, array in beside.items()), 8)
        notes.append(f"{path.name}: left out, since a layer has two dimensions or more: {left_out}")
    treatment = {name: text for name, text in _treatments(path, facts).items() if name in tensors}
    ids = {name: arrays[name] for name in IDS if name in arrays}
    return LoadedActivations(state, notes, _input_hash(path, ids, facts, state), treatment)


def _may_be_weights(path: Path, transpose: bool) -> bool:
    """Whether vectors beside matrices may be biases."""
    return path.suffix.lower() == ".safetensors" and not is_saved(path, transpose=transpose)


def _check_matrices(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim > 2:
            raise UnusableData(
                f"{path}: {name!r} has the shape {tuple(tensor.shape)}, and --transpose takes matrices only.",
                "Save maps and sequences with the samples first, and leave out --transpose.",
            )


def _tensor(path: Path, name: str, array: Any) -> Tensor:
    """An array of real numbers as float32, or float64 where the file has more than that."""
    import numpy as np
    import torch

    if isinstance(array, torch.Tensor):
        tensor = array.clone()  # off its file, which is only mapped
    elif array.dtype.kind in "biuf":
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        # torch has no longer floats, and of unsigned integers hardly more than bytes
        foreign = native.dtype.itemsize > 8 or (native.dtype.kind == "u" and native.dtype.itemsize > 1)
        tensor = torch.from_numpy(np.ascontiguousarray(native.astype(np.float64) if foreign else native))
    else:
        raise UnusableData(f"{path}: {name!r} holds {_kind(array)}, not real numbers.", _SHAPE)
    if tensor.is_complex():
        raise UnusableData(f"{path}: {name!r} holds complex numbers, not real numbers.", _SHAPE)
    if np.ndim(array) < 2:
        raise UnusableData(
            f"{path}: {name!r} has the shape {tuple(array.shape)}.",
            f"{_SHAPE} A single feature is array[:, None].",
        )
    if not tensor.numel():
        raise UnusableData(f"{path}: {name!r} is empty: its shape is {tuple(tensor.shape)}.", _SHAPE)
    exact = tensor.dtype in (torch.float64, torch.int64, torch.int32)
    return tensor.to(torch.float64 if exact else torch.float32)


def _kind(array: np.ndarray) -> str:
    return {"c": "complex numbers", "V": "records", "O": "objects", "U": "text", "S": "text"}.get(
        array.dtype.kind, f"values of type {array.dtype}"
    )


def _check_samples(path: Path, tensors: Mapping[str, Tensor], transpose: bool) -> None:
    axis, other = (-1, 0) if transpose else (0, -1)
    if len({tensor.shape[axis] for tensor in tensors.values()}) == 1:
        return
    sizes = shortlist((f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()), 8)
    tip = "All layers of a file are computed on the same samples."
    if len({tensor.shape[other] for tensor in tensors.values()}) == 1:
        where = "rows: leave out --transpose" if transpose else "columns: give --transpose"
        tip = f"The samples seem to be the {where}."
    raise UnusableData(f"{path}: its layers have different numbers of samples: {sizes}.", tip)


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise UnusableData(
            f"{path}: {name!r} holds {bad:,} values that are NaN or infinite (of {tensor.numel():,}).",
            "Leave that layer out of the file, or the samples with such values out of all files.",
        )


def _orientation(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """A warning where every matrix is wider than it is long; arrays with more dimensions are left aside."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    if not matrices or any(matrix.shape[0] >= matrix.shape[1] for matrix in matrices):
        return []
    rows, columns = matrices[0].shape
    return [
        f"{path.name} has {rows:,} rows and {columns:,} columns: rows are taken as samples; "
        "if they are neurons (as google/svcca stores them) give --transpose"
    ]


def _treatments(path: Path, facts: Mapping[str, str]) -> dict[str, str]:
    """What the file's metadata `treatments`, a JSON table by layer, says."""
    try:
        table = json.loads(facts.get("treatments", "{}"))
        return {str(name): str(text) for name, text in table.items()}
    except (ValueError, AttributeError) as error:
        raise UnusableData(
            f"{path}: its metadata 'treatments' is no JSON table by layer.",
            'It is text like {"conv1": "average"}; leave it out if nothing is known.',
        ) from error


def _input_hash(
    path: Path, ids: Mapping[str, Any], facts: Mapping[str, str], state: Mapping[str, Tensor]
) -> str:
    """What the file says of its inputs."""
    stated = facts.get("input_hash") or (text_of(ids["input_hash"]) if "input_hash" in ids else "")
    if stated:
        return stated
    n_samples = len(next(iter(state.values())))
    for name in ("sample_id", "sample_ids", "ids"):
        if name in ids:
            listed = ids[name].tolist()
            values = [str(value) for value in listed] if isinstance(listed, list) else []
            if len(values) != n_samples:
                raise UnusableData(
                    f"{path}: {name!r} has {len(values)} entries, the layers have {n_samples} samples.",
                    "Save one id per sample, in the order of the rows.",
                )
            return "sample_ids:" + hashlib.sha256("\0".join(values).encode()).hexdigest()[:32]
    return ""
