"""Folders, files and globs → ordered sequences of checkpoints; weights are read when asked for."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.io.errors import InputError, UnreadableCheckpoint
from dynprobe.io.hashing import content_hash
from dynprobe.io.header import Count, Header, OpenedCheckpoint
from dynprobe.io.manifest import Manifest, find_manifest
from dynprobe.io.readers import open_file
from dynprobe.io.run_folders import Listing, list_run, weight_files
from dynprobe.io.selection import select_steps
from dynprobe.io.state_search import NoSuchKey, NoWeights
from dynprobe.io.step_axis import Claims, agree
from dynprobe.io.step_names import counts_in_name, is_alias

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "LoadedState", "Sequence", "content_hash", "open_runs"]


@dataclass
class LoadedState:
    """The weights of one checkpoint.

    Attributes:
        state: Name → CPU tensor, memory-mapped where the format allows: copy before changing.
        notes: What was chosen, stripped or skipped on the way.
    """

    state: dict[str, torch.Tensor]
    notes: list[str]

    @cached_property
    def hash(self) -> str:
        """The content hash: the same for the same weights in every format. Reads all bytes once."""
        return content_hash(self.state)


@dataclass
class Checkpoint:
    """One checkpoint of a run.

    Attributes:
        path: The file, or the folder of a sharded format.
        run: Label of its run.
        step: Its place on the run's axis; None where nothing tells it.
        step_source: Who says so: "in-file global_step", "trainer_state.json global_step", "file name", …
        step_unit: "step", "epoch", or "order" (place by modification time).
        format: The reader's name; empty if no format knows the file.
        size: Bytes on disk of all its weight files.
        problem: Why its header cannot be read; empty if it can.
        key: Dotted path of the weights inside it, as asked for.
        ema: Whether an averaged copy was asked for.
    """

    path: Path
    run: str = ""
    step: int | float | None = None
    step_source: str = ""
    step_unit: str = "step"
    format: str = ""
    size: int = 0
    problem: str = ""
    key: str | None = None
    ema: bool = False
    _header: Header | None = field(default=None, repr=False, compare=False)

    def header(self) -> Header:
        """Return names, shapes, dtypes and facts; reads no weights, and the file once only.

        Raises:
            UnreadableCheckpoint: The file is damaged, unsafe, or of no known format.
        """
        if self._header is None:
            self._header = _open(self).header
        return self._header

    def load(self) -> LoadedState:
        """Read the weights.

        Raises:
            UnreadableCheckpoint: As `header`, or the data behind the header is damaged.
        """
        opened = _open(self)
        try:
            return LoadedState(opened.load(), list(opened.header.notes))
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise UnreadableCheckpoint(f"{self.path}: its weights cannot be read ({error}).") from error


@dataclass
class Sequence:
    """The checkpoints of one run, sorted by step; damaged ones stay in, those without a step come last.

    Attributes:
        name: Shortest label that tells it from the other runs.
        root: The folder (or file) that was given.
        checkpoints: In order.
        unit: What `Checkpoint.step` counts: "step", "epoch" or "order".
        notes: What was left out or chosen.
        warnings: What may make results wrong.
        manifest: What the run's `dynprobe.toml` says; empty if there is none.
    """

    name: str
    root: Path
    checkpoints: list[Checkpoint]
    unit: str = "step"
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    manifest: Manifest = field(default_factory=Manifest)

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def select(self, steps: str) -> list[Checkpoint]:
        """Return the checkpoints that `--steps` names.

        Args:
            steps: "all", "first", "last", steps "0,100,200", index slices "::5", step ranges "100:2000"
                (both ends included), or several of them joined by commas.

        Raises:
            InputError: A step does not exist, or the text means nothing; lists the steps that exist.
        """
        positions = select_steps(steps, [checkpoint.step for checkpoint in self.checkpoints], self.name)
        return [self.checkpoints[position] for position in positions]


def open_runs(
    specs: Iterable[str], *, key: str | None = None, ema: bool = False, step_pattern: str | None = None
) -> list[Sequence]:
    """Open runs: read the headers of all checkpoints, no weights, and put them in order.

    Weights are read only to compare checkpoints that claim the same step (`last`, `best`).

    Args:
        specs: Each a folder of checkpoints, one checkpoint, a glob, or "-" (paths on stdin, one a line).
            Checkpoints named one by one form one run per folder they lie in.
        key: Dotted path of the weights inside each file.
        ema: Prefer averaged copies of the weights.
        step_pattern: Regular expression for the path relative to the run; its first group, or the one named
            `step` or `epoch`, is the place on the axis.

    Returns:
        One sequence per run, in the order given.

    Raises:
        InputError: Nothing is found, a pattern is no regular expression, or `key` is in no checkpoint.
    """
    listings = _listings(specs)
    names = _labels([listing.root for listing in listings])
    runs = []
    for name, listing in zip(names, listings, strict=True):
        manifest = find_manifest(listing.root)
        runs.append(_open_run(name, listing, manifest, key=key, ema=ema, pattern=step_pattern))
    return runs


# -- from what was typed to lists of paths -------------------------------------------------------------------


def _listings(specs: Iterable[str]) -> list[Listing]:
    """Return one listing per run; checkpoints named one by one are gathered by folder."""
    listings: list[Listing] = []
    gathered: dict[Path, Listing] = {}
    for path in _expand(specs):
        listing = _list_one(path)
        if listing.paths != [path]:
            listings.append(listing)
        elif path.parent not in gathered:
            gathered[path.parent] = listing
            listings.append(listing)
        else:
            gathered[path.parent].paths.append(path)
    for parent, listing in gathered.items():
        if len(listing.paths) > 1:
            listing.root = parent
            listing.paths = list(dict.fromkeys(listing.paths))
    return listings


def _list_one(path: Path) -> Listing:
    if path.is_file():
        return Listing(path, [path])
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder.")
    manifest = find_manifest(path)
    pattern = manifest.checkpoints.get("glob")
    if pattern:
        paths = sorted(path.glob(str(pattern)))
        if not paths:
            raise InputError(f"{path}: nothing matches '{pattern}', the glob in {manifest.path}.")
        return Listing(path, paths)
    data = [Path(spec.name) for spec in (manifest.data, manifest.test_data) if spec is not None]
    return list_run(path, exclude=[file for file in data if file.is_file()])


def _expand(specs: Iterable[str]) -> Iterator[Path]:
    for spec in specs:
        if spec == "-":
            yield from _expand(line.strip() for line in sys.stdin if line.strip() not in ("", "-"))
        elif glob.has_magic(spec) and not Path(spec).exists():
            matches = sorted(glob.glob(spec, recursive=True))
            if not matches:
                raise InputError(f"{spec}: nothing matches this pattern.")
            yield from (Path(match) for match in matches)
        else:
            yield Path(spec)


def _labels(roots: list[Path]) -> list[str]:
    """Return the shortest path endings that tell the runs apart."""
    parts = [root.resolve().parts for root in roots]
    labels = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        labels.append("/".join(own[-depth:]))
    return labels


# -- from paths to an ordered sequence -----------------------------------------------------------------------


def _open_run(
    name: str, listing: Listing, manifest: Manifest, *, key: str | None, ema: bool, pattern: str | None
) -> Sequence:
    asked_key = key or manifest.checkpoints.get("key")
    asked_ema = ema or bool(manifest.checkpoints.get("ema"))
    sequence = Sequence(name, listing.root, [], notes=list(listing.notes), manifest=manifest)
    weightless = []
    for path in listing.paths:
        checkpoint = Checkpoint(path, name, key=asked_key, ema=asked_ema)
        if _read_header(checkpoint, sequence.checkpoints):
            sequence.checkpoints.append(checkpoint)
        else:
            weightless.append(checkpoint)
    if not sequence.checkpoints:  # then these are what the user means
        sequence.checkpoints, weightless = weightless, []
    left_out = [*listing.left_out, *(checkpoint.path.name for checkpoint in weightless)]
    if left_out:
        shown = ", ".join(left_out[:8]) + (", …" if len(left_out) > 8 else "")
        sequence.notes.append(f"left out {len(left_out)} without weights: {shown}")
    source = "command line" if pattern else "manifest"
    pattern = pattern or manifest.checkpoints.get("step")
    _set_steps(sequence, _compiled(pattern), source)
    _drop_aliases(sequence)
    _note_headers(sequence)
    return sequence


def _read_header(checkpoint: Checkpoint, before: list[Checkpoint]) -> bool:
    """Fill in what the header tells, or why it cannot be read; False if the file holds no weights at all."""
    try:
        checkpoint.size = sum(file.stat().st_size for file in weight_files(checkpoint.path))
        header = checkpoint.header()
    except (NoWeights, NoSuchKey, UnreadableCheckpoint) as error:
        if isinstance(error, NoSuchKey) and not before:
            raise  # a wrong option, not a wrong file
        checkpoint.problem = error.message
        return not isinstance(error, NoWeights)
    except OSError as error:
        checkpoint.problem = f"{checkpoint.path}: {error.strerror or error}."
        return True
    checkpoint.format = header.format
    # A thousand checkpoints of one model hold one table of names, not a thousand.
    twin = before[-1]._header if before else None
    if twin is not None and twin.tensors == header.tensors:
        header.tensors = twin.tensors
    return True


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
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


def _set_steps(sequence: Sequence, pattern: re.Pattern[str] | None, source: str) -> None:
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
    sequence.checkpoints.sort(key=lambda c: (c.step is None, c.step or 0, _natural(c.path.name)))


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
    ranked = sorted(sequence.checkpoints, key=lambda c: (c.path.stat().st_mtime_ns, _natural(c.path.name)))
    for position, checkpoint in enumerate(ranked):
        checkpoint.step, checkpoint.step_source = position, "modification time"
    sequence.warnings.append(
        f"{sequence.root}: nothing tells the steps; ordered by modification time, which copying changes. "
        r"Give --step-pattern 'step_(\d+)', or a step regex in dynprobe.toml."
    )


def _drop_aliases(sequence: Sequence) -> None:
    """Drop `last`, `best` and other copies of a checkpoint at the same step; weights are compared to be sure."""
    by_step: dict[object, list[Checkpoint]] = {}
    for checkpoint in sequence.checkpoints:
        if checkpoint.step is not None and not checkpoint.problem:
            by_step.setdefault(checkpoint.step, []).append(checkpoint)
    for step, twins in by_step.items():
        twins.sort(key=lambda c: (_is_alias(sequence.root, c), _natural(c.path.name)))
        kept = twins[0]
        for twin in twins[1:]:
            place = f"{sequence.unit} {step}"
            if _same_weights(kept, twin):
                sequence.notes.append(f"left out {twin.path.name}: the same weights as {kept.path.name} ({place})")
            elif _is_alias(sequence.root, twin):
                sequence.warnings.append(f"left out {twin.path.name}: claims {place} as {kept.path.name} does")
            else:
                sequence.warnings.append(f"{kept.path.name} and {twin.path.name} both claim {place}")
                continue
            sequence.checkpoints.remove(twin)


def _is_alias(root: Path, checkpoint: Checkpoint) -> bool:
    return checkpoint.path == root or (is_alias(checkpoint.path.name) and not counts_in_name(checkpoint.path.name))


def _same_weights(first: Checkpoint, second: Checkpoint) -> bool:
    if first.path.samefile(second.path):
        return True
    if first.header().tensors != second.header().tensors:
        return False
    try:
        return first.load().hash == second.load().hash
    except InputError:
        return False


def _note_headers(sequence: Sequence) -> None:
    """Say once what holds for all checkpoints, and by name what holds for some."""
    saying: dict[str, list[str]] = {}
    readable = [checkpoint for checkpoint in sequence.checkpoints if checkpoint._header is not None]
    for checkpoint in readable:
        for note in checkpoint.header().notes:
            saying.setdefault(note, []).append(checkpoint.path.name)
    for note, names in saying.items():
        some = "" if len(names) == len(readable) else f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        sequence.notes.append(note + some)


def _natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts `ckpt_9` before `ckpt_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open(checkpoint: Checkpoint) -> OpenedCheckpoint:
    return open_file(checkpoint.path, checkpoint.key, checkpoint.ema)
