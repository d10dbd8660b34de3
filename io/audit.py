"""Is a sequence of checkpoints sound? One pass over the weights, one checkpoint in memory at a time."""

from __future__ import annotations

import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.io.errors import InputError
from dynprobe.io.findings import Finding, Seen, place_of
from dynprobe.io.hashing import content_hash, tensor_hash
from dynprobe.io.header import TensorInfo
from dynprobe.io.mixed_shards import find_mixed
from dynprobe.io.run_folders import weight_files
from dynprobe.io.spacing import missing_steps, out_of_time_order
from dynprobe.io.step_names import counts_in_name

if TYPE_CHECKING:
    import torch

    from dynprobe.io.checkpoints import Checkpoint, Sequence

# A tensor this small may return to earlier values by chance (a bias, a counter).
_SMALLEST_TELLING = 4


def audit(sequence: Sequence, progress: Callable[[Checkpoint], None] | None = None) -> list[Finding]:
    """Check one run.

    Args:
        sequence: The run.
        progress: Called before each checkpoint is read.

    Returns:
        What was found, those about single files first; empty for a sound run.
    """
    findings = [Finding("order", sequence.name, "", warning) for warning in sequence.warnings]
    seen: list[Seen] = []
    for checkpoint in sequence.checkpoints:
        if progress is not None:
            progress(checkpoint)
        findings += _look_at(checkpoint, seen)
    findings += _checksums(sequence)
    findings += _drift(sequence)
    findings += _step_mismatches(sequence)
    findings += _duplicates(sequence, seen)
    findings += find_mixed(sequence.name, seen)
    findings += _gaps(sequence)
    findings += _time_order(sequence)
    return findings


# -- one checkpoint ------------------------------------------------------------------------------------------


def _look_at(checkpoint: Checkpoint, seen: list[Seen]) -> Iterator[Finding]:
    """Read one checkpoint: damaged, not finite; remember its hashes."""
    path = str(checkpoint.path)
    if checkpoint.problem:
        yield Finding("damaged", checkpoint.run, path, checkpoint.problem)
        return
    try:
        state = checkpoint.load().state
    except InputError as error:
        yield Finding("damaged", checkpoint.run, path, error.message)
        return
    hashes = {name: tensor_hash(tensor) for name, tensor in state.items()}
    telling = {name for name, tensor in state.items() if _is_telling(tensor)}
    seen.append(Seen(checkpoint, content_hash(state, hashes), hashes, telling))
    bad = {name: count for name, tensor in state.items() if (count := _n_not_finite(tensor))}
    if bad:
        worst = max(bad, key=lambda name: bad[name])
        yield Finding(
            "not finite",
            checkpoint.run,
            path,
            f"{path}: NaN or infinity in {len(bad)} of {len(state)} tensors; "
            f"'{worst}' has {bad[worst]} such elements of {state[worst].numel()}.",
        )


def _checksums(sequence: Sequence) -> Iterator[Finding]:
    """Find storages whose bytes do not fit the checksum that torch saved with them.

    Torch can be told to save without (`set_crc32_options`); then all files fail, which says nothing.
    """
    failed: dict[Path, str] = {}
    n_archives = 0
    for file in (file for checkpoint in sequence.checkpoints for file in _files(checkpoint)):
        try:
            with zipfile.ZipFile(file) as archive:
                n_archives += 1
                member = archive.testzip()
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
            continue  # no archive (another format), or one that was reported as damaged
        if member is not None:
            failed[file] = member
    if len(failed) < n_archives:
        for file, member in failed.items():
            message = f"{file}: the bytes of '{member}' do not fit their checksum; some were changed."
            yield Finding("damaged", sequence.name, str(file), message)


def _n_not_finite(tensor: torch.Tensor) -> int:
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return 0
    if tensor.dtype.itemsize == 1:  # float8: isfinite is not defined for all of them
        tensor = tensor.to(torch.float32)
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def _is_telling(tensor: torch.Tensor) -> bool:
    """Whether equal contents mean the same moment: floating point, not tiny, not constant."""
    if not tensor.is_floating_point() or tensor.numel() < _SMALLEST_TELLING:
        return False
    flat = tensor.reshape(-1)
    return bool((flat != flat[0]).any())


# -- the sequence --------------------------------------------------------------------------------------------


def _drift(sequence: Sequence) -> Iterator[Finding]:
    """Find checkpoints whose names, shapes or dtypes are not those of most others."""
    readable = [checkpoint for checkpoint in sequence.checkpoints if not checkpoint.problem]
    tables = [frozenset(checkpoint.header().tensors.items()) for checkpoint in readable]
    if len(set(tables)) < 2:
        return
    usual = dict(Counter(tables).most_common(1)[0][0])
    for checkpoint in readable:
        difference = _difference(checkpoint.header().tensors, usual)
        if difference:
            message = f"{checkpoint.path}: {difference}."
            yield Finding("drift", sequence.name, str(checkpoint.path), message)


def _difference(own: Mapping[str, TensorInfo], usual: Mapping[str, TensorInfo]) -> str:
    parts = []
    changed = [name for name in own if name in usual and own[name] != usual[name]]
    if changed:
        name = changed[0]
        mine, theirs = own[name], usual[name]
        what = (mine.shape, theirs.shape) if mine.shape != theirs.shape else (mine.dtype, theirs.dtype)
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        parts.append(f"'{name}' is {what[0]}, in most others {what[1]}{more}")
    for label, names in (
        ("lacks", [name for name in usual if name not in own]),
        ("also has", [name for name in own if name not in usual]),
    ):
        if names:
            parts.append(f"{label} '{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return "; ".join(parts)


def _step_mismatches(sequence: Sequence) -> Iterator[Finding]:
    """Find files whose name says another step than their contents."""
    for unit in ("step", "epoch"):
        pairs = [(c, pair) for c in sequence.checkpoints if (pair := _claimed_twice(c, unit)) is not None]
        if not pairs:
            continue
        shifts = Counter(inside - named for _, (inside, named, _) in pairs)
        usual, count = shifts.most_common(1)[0]
        # Counting from 0 in one place and from 1 in the other is a convention, not a mistake.
        convention = usual if abs(usual) <= 1 and count * 2 > len(pairs) else 0
        agreed = shifts[convention] * 2 > len(pairs)
        for checkpoint, (inside, named, is_explicit) in pairs:
            if inside - named != convention and (is_explicit or agreed):
                message = f"{checkpoint.path}: its name says {unit} {named}, the file says {inside}."
                yield Finding("step mismatch", sequence.name, str(checkpoint.path), message)


def _claimed_twice(checkpoint: Checkpoint, unit: str) -> tuple[int | float, int | float, bool] | None:
    """Return (in-file value, value in the name, whether the name says which unit)."""
    if checkpoint.problem or checkpoint.step_unit != unit:
        return None
    inside = next((count for count in checkpoint.header().counts if count.unit == unit), None)
    named = counts_in_name(checkpoint.path.name)
    in_name = next((count for count in named if count.unit in (unit, "number")), None)
    if inside is None or in_name is None:
        return None
    return inside.value, in_name.value, in_name.unit == unit and inside.source != "optimizer state"


def _duplicates(sequence: Sequence, seen: list[Seen]) -> Iterator[Finding]:
    """Find checkpoints at different steps with the same weights."""
    by_hash: dict[str, list[Seen]] = defaultdict(list)
    for entry in seen:
        by_hash[entry.hash].append(entry)
    for same in by_hash.values():
        if len(same) > 1:
            first = same[0].checkpoint
            others = ", ".join(str(entry.checkpoint.path) for entry in same[1:])
            message = f"{first.path} ({place_of(first)}): the same weights as {others}."
            yield Finding("duplicate", sequence.name, str(first.path), message)


def _gaps(sequence: Sequence) -> Iterator[Finding]:
    if sequence.unit == "order":
        return
    steps = sorted({checkpoint.step for checkpoint in sequence.checkpoints if checkpoint.step is not None})
    missing = missing_steps(steps)
    if missing:
        shown = ", ".join(str(step) for step in missing[:10]) + (", …" if len(missing) > 10 else "")
        message = (
            f"{sequence.root}: no checkpoint at {sequence.unit} {shown}; the spacing is regular otherwise."
        )
        yield Finding("missing", sequence.name, "", message)


def _time_order(sequence: Sequence) -> Iterator[Finding]:
    placed = [c for c in sequence.checkpoints if c.step is not None and not c.problem]
    if sequence.unit == "order":
        return
    times = [max(file.stat().st_mtime_ns for file in _files(checkpoint)) for checkpoint in placed]
    for position in out_of_time_order([checkpoint.path for checkpoint in placed], times):
        checkpoint = placed[position]
        message = (
            f"{checkpoint.path} ({place_of(checkpoint)}): was written out of order, by its modification time."
        )
        yield Finding("order", sequence.name, str(checkpoint.path), message)


def _files(checkpoint: Checkpoint) -> list[Path]:
    try:
        return weight_files(checkpoint.path)
    except InputError:
        return [checkpoint.path]
