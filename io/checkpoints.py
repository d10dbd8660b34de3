"""Folders, files and globs → ordered sequences of checkpoints; weights are read when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.io.errors import InputError, UnreadableCheckpoint
from dynprobe.io.hashing import content_hash
from dynprobe.io.header import Header, OpenedCheckpoint
from dynprobe.io.manifest import Manifest, find_manifest
from dynprobe.io.ordering import compiled_pattern, drop_aliases, set_steps
from dynprobe.io.readers import open_file
from dynprobe.io.run_folders import Listing, weight_files
from dynprobe.io.run_specs import run_labels, run_listings
from dynprobe.io.selection import select_steps
from dynprobe.io.state_search import NoSuchKey, NoWeights

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "LoadedState", "Sequence", "content_hash", "open_runs"]


COPY_BELOW = 2 * 2**30
"""Bytes up to which weights are copied off their file at once. A training run that writes its `last.pt` anew
would change, or cut off, memory that is only mapped; larger files stay mapped."""


@dataclass
class LoadedState:
    """The weights of one checkpoint.

    Attributes:
        state: Name → CPU tensor; of a large file memory-mapped, so copy before changing.
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
            state = opened.load()
            if self.size <= COPY_BELOW:
                state = {name: tensor.clone() for name, tensor in state.items()}
            return LoadedState(state, list(opened.header.notes))
        except InputError:
            raise
        except Exception as error:  # whatever torch or the disk says of damaged data, it is this file's fault
            what = f"{type(error).__name__}: {error}"
            raise UnreadableCheckpoint(f"{self.path}: its weights cannot be read ({what}).") from error


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
    listings = run_listings(specs)
    names = run_labels([listing.root for listing in listings])
    runs = []
    for name, listing in zip(names, listings, strict=True):
        manifest = find_manifest(listing.root)
        runs.append(_open_run(name, listing, manifest, key=key, ema=ema, pattern=step_pattern))
    return runs


def _open_run(
    name: str, listing: Listing, manifest: Manifest, *, key: str | None, ema: bool, pattern: str | None
) -> Sequence:
    asked_key = key or manifest.checkpoints.get("key")
    asked_ema = ema or bool(manifest.checkpoints.get("ema"))
    sequence = Sequence(name, listing.root, [], notes=list(listing.notes), manifest=manifest)
    weightless: list[Checkpoint] = []
    wrong_option: NoSuchKey | None = None
    for path in listing.paths:
        checkpoint = Checkpoint(path, name, key=asked_key, ema=asked_ema)
        error = _read_header(checkpoint, sequence.checkpoints)
        wrong_option = wrong_option or (error if isinstance(error, NoSuchKey) else None)
        (weightless if isinstance(error, NoWeights) else sequence.checkpoints).append(checkpoint)
    if wrong_option and all(checkpoint.problem for checkpoint in sequence.checkpoints):
        raise wrong_option
    if not sequence.checkpoints:  # then these are what the user means
        sequence.checkpoints, weightless = weightless, []
    if listing.left_out:
        sequence.notes.append(_without_weights(listing.left_out))
    if weightless:  # they look like checkpoints: the user expects them in the sequence
        sequence.warnings.append(_without_weights([checkpoint.path.name for checkpoint in weightless]))
    source = "command line" if pattern else "manifest"
    set_steps(sequence, compiled_pattern(pattern or manifest.checkpoints.get("step")), source)
    drop_aliases(sequence)
    _note_headers(sequence)
    return sequence


def _without_weights(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"left out {len(names)} without weights: {shown}"


def _read_header(checkpoint: Checkpoint, before: list[Checkpoint]) -> InputError | None:
    """Fill in what the header tells, or why it cannot be read; returns that error too."""
    try:
        checkpoint.size = sum(file.stat().st_size for file in weight_files(checkpoint.path))
        header = checkpoint.header()
    except InputError as error:
        checkpoint.problem = error.message
        return error
    except OSError as error:
        checkpoint.problem = f"{checkpoint.path}: {error.strerror or error}."
        return UnreadableCheckpoint(checkpoint.problem)
    checkpoint.format = header.format
    # A thousand checkpoints of one model hold one table of names, not a thousand.
    twin = before[-1]._header if before else None
    if twin is not None and twin.tensors == header.tensors:
        header.tensors = twin.tensors
    return None


def _note_headers(sequence: Sequence) -> None:
    """Say once what holds for all checkpoints, and by name what holds for some."""
    saying: dict[str, list[str]] = {}
    readable = [checkpoint for checkpoint in sequence.checkpoints if checkpoint._header is not None]
    for checkpoint in readable:
        for note in checkpoint.header().notes:
            saying.setdefault(note, []).append(checkpoint.path.name)
    for note, names in saying.items():
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        sequence.notes.append(note if len(names) == len(readable) else f"{note} ({some})")


def _open(checkpoint: Checkpoint) -> OpenedCheckpoint:
    return open_file(checkpoint.path, checkpoint.key, checkpoint.ema)
