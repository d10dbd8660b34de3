"""Put the checkpoints of a run in order, and drop copies (`last`, `best`) of the same moment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.io.errors import InputError
from dynprobe.io.header import Count
from dynprobe.io.step_axis import Claims, agree
from dynprobe.io.step_names import counts_in_name, is_alias

if TYPE_CHECKING:
    from dynprobe.io.checkpoints import Checkpoint, Sequence


def compiled_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile `--step-pattern` or the manifest's step regex; None stays None.

    Raises:
        InputError: It is no regular expression, or has no group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--step-pattern {pattern}: is no regular expression ({error}).") from error
    if not compiled.groups:
        raise InputError(
            f"--step-pattern {pattern}: has no group.", tip=r"Put the number in brackets: 'step_(\d+)\.pt'."
        )
    return compiled


def set_steps(sequence: Sequence, pattern: re.Pattern[str] | None, source: str) -> None:
    """Put every checkpoint on one axis; those that have no place on it are left out, by name."""
    claims = [_claims(sequence.root, checkpoint, pattern, source) for checkpoint in sequence.checkpoints]
    axis = agree(claims)
    sequence.unit = axis.unit
    sequence.notes += axis.notes
    kept = []
    for checkpoint, place in zip(sequence.checkpoints, axis.places, strict=True):
        checkpoint.step_unit = axis.unit
        if place is not None:
            checkpoint.step, checkpoint.step_source = place.value, place.source
        elif axis.unit != "order" and not checkpoint.problem:
            sequence.notes.append(f"left out {checkpoint.path.name}: nothing tells its {axis.unit}")
            continue
        kept.append(checkpoint)
    sequence.checkpoints = kept
    if axis.unit == "order":
        _order_by_time(sequence)
    sequence.checkpoints.sort(key=lambda c: (c.step is None, c.step or 0, natural_order(c.path.name)))


def _claims(root: Path, checkpoint: Checkpoint, pattern: re.Pattern[str] | None, source: str) -> Claims:
    relative = checkpoint.path.name
    if checkpoint.path.is_relative_to(root) and checkpoint.path != root:
        relative = checkpoint.path.relative_to(root).as_posix()
    if pattern is not None:
        match = pattern.search(relative)
        counts = [_count_of_match(match, source)] if match else []
    else:
        counts = list(checkpoint._header.counts) if checkpoint._header is not None else []
        counts += counts_in_name(relative)
    return Claims(relative, counts, readable=not checkpoint.problem)


def _count_of_match(match: re.Match[str], source: str) -> Count:
    groups = match.groupdict()
    unit = "epoch" if groups.get("epoch") is not None and groups.get("step") is None else "step"
    text = groups.get(unit) or match[1]
    try:
        value = float(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"{match.string}: the step pattern finds '{text}', which is no number.") from error
    return Count(int(value) if value == int(value) else value, unit, source)


def _order_by_time(sequence: Sequence) -> None:
    """Number the checkpoints by modification time: the last resort, since copies lose it."""
    if len(sequence.checkpoints) < 2:
        sequence.unit = "step"
        for checkpoint in sequence.checkpoints:
            checkpoint.step_unit = "step"
        return
    ranked = sorted(
        sequence.checkpoints, key=lambda c: (c.path.stat().st_mtime_ns, natural_order(c.path.name))
    )
    for position, checkpoint in enumerate(ranked):
        checkpoint.step, checkpoint.step_source = position, "modification time"
    sequence.warnings.append(
        f"{sequence.root}: nothing tells the steps; ordered by modification time, which copying changes. "
        r"Give --step-pattern 'step_(\d+)', or a step regex in dynprobe.toml."
    )


def drop_aliases(sequence: Sequence) -> None:
    """Drop `last`, `best` and other copies of a checkpoint at the same step, after comparing the weights."""
    by_step: dict[object, list[Checkpoint]] = {}
    for checkpoint in sequence.checkpoints:
        if checkpoint.step is not None and not checkpoint.problem:
            by_step.setdefault(checkpoint.step, []).append(checkpoint)
    for step, twins in by_step.items():
        twins.sort(key=lambda c: (_is_alias(sequence.root, c), natural_order(c.path.name)))
        kept = twins[0]
        for twin in twins[1:]:
            place = f"{sequence.unit} {step}"
            if _same_weights(kept, twin):
                same = f"the same weights as {kept.path.name} ({place})"
                sequence.notes.append(f"left out {twin.path.name}: {same}")
            elif _is_alias(sequence.root, twin):
                claim = f"claims {place} as {kept.path.name} does, with other weights"
                sequence.warnings.append(f"left out {twin.path.name}: {claim}")
            else:
                sequence.warnings.append(f"{kept.path.name} and {twin.path.name} both claim {place}")
                continue
            sequence.checkpoints.remove(twin)


def _is_alias(root: Path, checkpoint: Checkpoint) -> bool:
    return checkpoint.path == root or (
        is_alias(checkpoint.path.name) and not counts_in_name(checkpoint.path.name)
    )


def _same_weights(first: Checkpoint, second: Checkpoint) -> bool:
    if first.path.samefile(second.path):
        return True
    if first.header().tensors != second.header().tensors:
        return False
    try:
        return first.load().hash == second.load().hash
    except InputError:
        return False


def natural_order(name: str) -> list[tuple[int, str]]:
    """Key that sorts `ckpt_9` before `ckpt_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
