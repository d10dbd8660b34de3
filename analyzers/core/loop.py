"""Walks checkpoints, pairs, runs or groups and yields finished pieces; a bad one never stops the rest."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from dynprobe.analyzers.core.contract import Declaration, DeclarationError, Measurement, OptionError, labelled
from dynprobe.analyzers.core.registry import source_files
from dynprobe.analyzers.core.result import FAILED, INCOMPLETE, NOT_CONVERGED, OK, Array, Piece, tidy
from dynprobe.analyzers.core.workspace import Run, Workspace

log = logging.getLogger("dynprobe")

Progress = Callable[[int, int, str], None]


class Partial(Protocol):
    """Keeps parts of an unfinished piece, so that a kill loses at most the part in hand."""

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """A part stored before, or None."""
        ...

    def put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store a part."""
        ...

    def clear(self) -> None:
        """Forget all parts of the piece."""
        ...


class Store(Protocol):
    """Where finished pieces go; `dynprobe.io.report.PieceStore` is one."""

    def get(self, key: str) -> Piece | None:
        """A finished piece with this key, or None."""
        ...

    def put(self, piece: Piece) -> None:
        """Keep a finished piece."""
        ...

    def partial(self, key: str) -> Partial:
        """The store for parts of the piece with this key."""
        ...


class MemoryStore:
    """Pieces and parts in memory: nothing survives the process, nothing is written."""

    def __init__(self) -> None:
        self._pieces: dict[str, Piece] = {}

    def get(self, key: str) -> Piece | None:
        """A piece finished earlier in this process, or None."""
        return self._pieces.get(key)

    def put(self, piece: Piece) -> None:
        """Keep a finished piece."""
        self._pieces[piece.key] = piece

    def partial(self, key: str) -> Partial:
        """A store for parts that forgets them with the piece."""
        del key
        return _MemoryPartial()


class _MemoryPartial:
    def __init__(self) -> None:
        self._parts: dict[str, dict[str, np.ndarray]] = {}

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        return self._parts.get(name)

    def put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._parts[name] = dict(arrays)

    def clear(self) -> None:
        self._parts.clear()


@dataclass
class Unit:
    """One piece to be measured.

    Args:
        index: Its labels along the leading dimension.
        workspaces: Its checkpoints, one, two or all of a run.
        runs: The runs of a group.
        problem: Why it cannot be measured, found before any compute; empty if it can.
        left_out: Sentences about checkpoints of a run or group that it goes on without.
    """

    index: dict[str, Any]
    workspaces: list[Workspace]
    runs: Sequence[Run] = ()
    problem: str = ""
    left_out: list[str] = field(default_factory=list)


@dataclass
class Job:
    """What all units of one call share.

    Args:
        declaration: The analyzer.
        options: Its keyword options.
        progress: Called with `(done, total, what)` inside a piece.
        fresh: Measure again even where a finished piece is stored.
        measured: How many pieces were measured so far.
    """

    declaration: Declaration
    options: Mapping[str, Any]
    progress: Progress = lambda _done, _total, _what: None
    fresh: bool = False
    measured: int = 0


def checkpoint_units(run: Run, chosen: Sequence[Any]) -> list[Unit]:
    """One unit per chosen checkpoint of a run."""
    return [Unit({"run": run.name, "step": c.step, "path": str(c.path)}, [Workspace(c, run)]) for c in chosen]


def run_unit(run: Run, chosen: Sequence[Any]) -> Unit:
    """One unit for a whole run."""
    return Unit({"run": run.name}, _shelved((run, chosen)), [run])


def pair_unit(
    run_a: Run, a: Any, run_b: Run, b: Any, shared: dict[tuple[int, str], Workspace] | None = None
) -> Unit:
    """One unit for two checkpoints, of one run or of two.

    Args:
        run_a: Run of the first.
        a: The first.
        run_b: Run of the second.
        b: The second.
        shared: Workspaces by run and path, for analyzers that never have both networks in memory: one for
            every checkpoint, whatever the number of its pairs.
    """
    index = {
        "run_a": run_a.name,
        "step_a": a.step,
        "path_a": str(a.path),
        "run_b": run_b.name,
        "step_b": b.step,
        "path_b": str(b.path),
    }
    if shared is None:
        return Unit(index, [Workspace(a, run_a, "a"), Workspace(b, run_b, "b")])
    places = ((run_a, a), (run_b, b))
    workspaces = [shared.setdefault((id(r), str(c.path)), Workspace(c, r)) for r, c in places]
    for workspace in workspaces:
        workspace.pairs += 1
    return Unit(index, workspaces)


def group_unit(chosen: Sequence[tuple[Run, Sequence[Any]]]) -> Unit:
    """One unit for several runs together, each with the checkpoints chosen of it."""
    runs = [Run(run.name, checkpoints, run.setup) for run, checkpoints in chosen]
    names = " ".join(run.name for run in runs)
    return Unit({"runs": names}, _shelved(*((run, run.checkpoints) for run in runs)), runs)


def _shelved(*chosen: tuple[Run, Sequence[Any]]) -> list[Workspace]:
    shelf: list[Workspace] = []
    shelf += [Workspace(c, run, shelf=shelf) for run, checkpoints in chosen for c in checkpoints]
    return shelf


def piece_key(job: Job, unit: Unit, previous: str = "") -> str:
    """Content key of a unit: analyzer, options, code, data and checkpoints, nothing about the machine.

    Cost: reads every checkpoint of the unit, and those that the analyzer reads beside them.

    Args:
        job: Analyzer and options.
        unit: What is measured; broken checkpoints of a run are dropped from it, see `left_out`.
        previous: Key of the run's previous piece, for an analyzer that asks for it.
    """
    leave_out_broken(unit)
    declaration = job.declaration
    needed = declaration.needed(job.options)
    runs = list({id(w.run): w.run for w in unit.workspaces}.values())
    if declaration.reads is not None:
        others = declaration.reads(job.options)
    else:
        others = ["all"] if "run" in needed else []
    hashes = [w.hash for w in unit.workspaces]
    hashes += [text for run in runs for which in others for text in run.content_hashes(which)]
    # Equal weights at two places are two measurements only where the place is part of the measurement.
    places = [
        [w.step if "step" in name else w.path for w in unit.workspaces]
        for name in needed
        if name.removesuffix("_a").removesuffix("_b") in ("step", "path")
    ]
    facts = [dict(run.setup.facts(declaration.decided_by(job.options))) for run in runs]
    chain = previous if "previous" in needed else ""
    options = declaration.deciding(job.options) | _contents(declaration, job.options)
    payload = [declaration.name, options, code_hash(declaration), facts, hashes, places, chain]
    text = json.dumps([*payload, unit.left_out], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _contents(declaration: Declaration, options: Mapping[str, Any]) -> dict[str, list[str]]:
    """For options that name files, what those files hold: moved files are the same, changed ones are not."""
    found: dict[str, list[str]] = {}
    for option in declaration.options:
        names = str(options.get(option.name) or "").split(",") if option.is_file else []
        paths = [Path(name.strip()) for name in names if name.strip()]
        if paths:
            found[option.name] = [
                hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
                if path.is_file()
                else str(path)
                for path in paths
            ]
    return found


_CODE: dict[Callable[..., Any], str] = {}


def code_hash(declaration: Declaration) -> str:
    """Hash of the source that decides what an analyzer computes."""
    if declaration.function not in _CODE:
        digest = hashlib.blake2b(digest_size=16)
        for path in source_files(declaration):
            digest.update(path.read_bytes())
        _CODE[declaration.function] = digest.hexdigest()
    return _CODE[declaration.function]


def measure(job: Job, units: Iterable[Unit], store: Store) -> Iterator[tuple[Piece, bool]]:
    """Measure units in order; the next one's checkpoints load while one is measured.

    Yields:
        `(piece, stored)` for each unit; `stored` is true where it was found finished. A failed piece
        is yielded like any other and is not stored, so that a second call tries it again.

    Raises:
        DeclarationError: If the analyzer breaks its own declaration: no piece could ever be right.
        OptionError: If the first piece to be measured finds that the options cannot be followed.
    """
    before: dict[str, Piece] = {}
    dims: dict[str, tuple[str, ...]] = {}
    with ThreadPoolExecutor(1, "dynprobe-load") as pool:
        todo = list(units)
        ahead: Future[Any] | None = None
        for position, unit in enumerate(todo):
            if ahead is not None:
                ahead.result()
            following = todo[position + 1] if position + 1 < len(todo) else None
            _prefetch(unit)
            ahead = pool.submit(_prefetch, following) if following else None
            run = unit.workspaces[0].run.name if unit.workspaces else ""
            piece, found = _one(job, unit, store, before.get(run))
            for workspace in unit.workspaces:
                workspace.release()
            if piece.status != FAILED:
                before[run] = piece
                _check_dims(job.declaration, piece, dims)
            yield piece, found


def _check_dims(declaration: Declaration, piece: Piece, seen: dict[str, tuple[str, ...]]) -> None:
    """Pieces are stacked in the end: what could not be is said at the first piece that does not fit."""
    for name, array in piece.arrays.items():
        if seen.setdefault(name, array.dims) != array.dims:
            raise DeclarationError(
                f"{declaration.name}: {name} has dimensions {array.dims} here and {seen[name]} before; "
                "within one call they must be the same"
            )


def _prefetch(unit: Unit) -> None:
    """Read a unit's checkpoint; an error is left for `_one` to meet and report."""
    if unit.problem or len(unit.workspaces) > 2:
        return
    for workspace in unit.workspaces:
        if workspace.is_large or workspace.visited:
            continue  # two large ones in memory may be one too many; one seen before may not be needed again
        try:
            _ = workspace.loaded
        except Exception as error:
            log.debug("%s: %s", workspace.path, error)


def _one(job: Job, unit: Unit, store: Store, before: Piece | None) -> tuple[Piece, bool]:
    start = time.perf_counter()
    notes: list[str] = []

    def failed(reason: str, key: str = "") -> tuple[Piece, bool]:
        for workspace in unit.workspaces[:1]:
            reason = reason.removeprefix(f"{workspace.path}: ")  # the piece is labelled with it already
        return Piece(
            key,
            unit.index,
            status=FAILED,
            reason=reason,
            seconds=time.perf_counter() - start,
            notes=tuple(notes),
        ), False

    key = ""
    try:
        if unit.problem:
            return failed(unit.problem)
        key = piece_key(job, unit, before.key if before else "")
        if job.fresh:
            store.partial(key).clear()
        elif (known := store.get(key)) is not None:
            return replace(known, index={**known.index, **unit.index}), True
        returned = job.declaration.function(*_arguments(job, unit, store, key, before), **job.options)
    except DeclarationError:
        raise
    except OptionError as error:
        if not job.measured:
            raise  # the first piece to be measured says so: no other can do better
        return failed(_sentence(error), key)
    except Exception as error:
        log.debug("%s", unit.index, exc_info=True)
        return failed(_sentence(error), key)
    finally:
        notes += [n for w in unit.workspaces for n in w.notes]
    if not isinstance(returned, Mapping):
        raise DeclarationError(f"{job.declaration.name} returned {type(returned).__name__}, not a dictionary")
    measurement = returned if isinstance(returned, Measurement) else Measurement(returned)
    arrays = labelled(job.declaration, measurement) | _checkpoint_labels(job.declaration, unit)
    piece = Piece(
        key,
        {**unit.index, **_hashes(unit)},
        arrays,
        INCOMPLETE if unit.left_out else OK if measurement.converged else NOT_CONVERGED,
        "; ".join([*unit.left_out, *([measurement.reason] if measurement.reason else [])]),
        time.perf_counter() - start,
        measurement.spent,
        tuple(dict.fromkeys([*notes, *measurement.notes])),
    )
    store.put(piece)
    job.measured += 1
    return piece, False


def leave_out_broken(unit: Unit) -> None:
    """Drop the checkpoints of a run or group that cannot be read or hold NaN; `left_out` says which and why.

    Raises:
        Exception: What is wrong, where nothing is left to measure (or one of a pair is broken).
    """
    whole: list[Workspace] = []
    last: Exception | None = None
    for workspace in unit.workspaces:
        try:
            if bad := workspace.non_finite():
                raise BrokenWeights(f"{workspace.path}: {bad}")
            whole.append(workspace)
        except Exception as error:
            if not unit.runs:
                raise
            last = error
            unit.left_out.append(f"left out {_sentence(error)}")
    if last is not None and not whole:
        raise last
    unit.workspaces[:] = whole


class BrokenWeights(ValueError):
    """A checkpoint holds NaN or infinity; `tip` marks it as a message for the user."""

    tip = "the run had diverged when it was saved; `dynprobe check` lists all such checkpoints"


def _hashes(unit: Unit) -> dict[str, str]:
    if unit.runs:
        return {}
    names = ("hash",) if len(unit.workspaces) == 1 else ("hash_a", "hash_b")
    return {name: workspace.hash for name, workspace in zip(names, unit.workspaces, strict=True)}


def _checkpoint_labels(declaration: Declaration, unit: Unit) -> dict[str, Array]:
    """Step and file along `checkpoint`, for an analyzer of whole runs."""
    dims = {d for var in declaration.returns.values() for d in var.dims}
    if declaration.grain != "run" or "checkpoint" not in dims:
        return {}
    columns: dict[str, tuple[list[Any], str]] = {
        "step": ([w.step for w in unit.workspaces], "step"),
        "path": ([w.path for w in unit.workspaces], "path"),
        "checkpoint_run": ([w.run.name for w in unit.workspaces], "run of the checkpoint"),
    }
    return {n: Array(("checkpoint",), tidy(values), "", text) for n, (values, text) in columns.items()}


def _arguments(job: Job, unit: Unit, store: Store, key: str, before: Piece | None) -> list[Any]:
    first = unit.workspaces[0]
    shared = {
        "previous": lambda: _as_measurement(before) if before else None,
        "training": lambda: first.run.setup.training,
        "groups": lambda: first.run.setup.groups,
        "run": lambda: first.run,
        "partial": lambda: store.partial(key),
        "progress": lambda: job.progress,
        "batches": lambda: first.run.setup.batches,
        "test_batches": lambda: first.run.setup.test_batches,
        "loss": lambda: first.run.setup.loss,
        "checkpoints": lambda: unit.workspaces,
        "runs": lambda: unit.runs,
    }

    needed = job.declaration.needed(job.options)

    def value(need: str) -> Any:
        if need not in needed:
            return None
        if need in shared:
            return cast("Any", shared[need])()
        workspace, name = first, need
        if need[-2:] in ("_a", "_b"):
            if need.endswith("_b") and len(unit.workspaces) == 1:
                return None
            workspace, name = unit.workspaces[need.endswith("_b")], need[:-2]
        return workspace.run.setup.batches if name == "batches" else getattr(workspace, name)

    return [value(need) for need in job.declaration.needs]


def _as_measurement(piece: Piece) -> Measurement:
    return Measurement(
        {n: a.values for n, a in piece.arrays.items()},
        converged=piece.status == OK,
        reason=piece.reason,
        spent=piece.spent,
    )


def _sentence(error: Exception) -> str:
    message = str(error).strip() or "no message"
    return message if hasattr(error, "tip") else f"{type(error).__name__}: {message}"
