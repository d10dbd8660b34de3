"""The report: one HDF5 file, one group per analyzer; read, written, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dynprobe.analyzers.core.result import FAILED, Piece, Result, unstack
from dynprobe.io import hdf5
from dynprobe.io.atomic import remove_leftovers, write_atomically
from dynprobe.io.errors import CannotWrite, DamagedReport, InputError
from dynprobe.io.pieces import Partial, PieceStore
from dynprobe.io.plain_json import dumps
from dynprobe.io.sealed import image, opened

__all__ = [
    "Partial",
    "PieceStore",
    "check_replaceable",
    "read_report",
    "result_pieces",
    "update_result",
    "write_result",
    "write_results",
]

LAYOUT = 1
"""Version of the layout, in the root attribute `dynprobe_layout`: what marks a file as a report."""

RESERVED = frozenset({"grain", "variables", "coordinates", "provenance", "checksum"})
"""Attributes of an analyzer's group that are not provenance copied out of `provenance`."""


def read_report(path: Path, only: Collection[str] = ()) -> dict[str, Result]:
    """The results a report holds, by analyzer.

    Args:
        path: The report.
        only: Names of the analyzers to read; empty for all.

    Raises:
        InputError: If there is no such file, or it is not a report.
        DamagedReport: If a result cannot be read or does not match its checksum.
    """
    with opened(path) as file:
        if "dynprobe_layout" not in file.attrs:
            raise InputError(f"{path}: is not a dynprobe report.", "Name the file given to -o earlier.")
        if int(file.attrs["dynprobe_layout"]) > LAYOUT:
            raise InputError(f"{path}: was written by a newer dynprobe.", "Update dynprobe to read it.")
        names = [n for n, item in file.items() if "provenance" in item.attrs and (not only or n in only)]
        return {name: _read_group(path, file[name], name) for name in names}


def _read_group(path: Path, group: h5py.Group, name: str) -> Result:
    provenance, grain = str(group.attrs["provenance"]), str(group.attrs["grain"])
    try:
        arrays = hdf5.read_arrays(group, [str(n) for n in group.attrs["variables"]])
    except Exception as error:  # damage surfaces as any of a dozen kinds
        raise DamagedReport(f"{path}: {name} is damaged: {error}", _TIP) from error
    if hdf5.checksum(arrays, grain + provenance) != group.attrs["checksum"]:
        raise DamagedReport(f"{path}: {name} does not match its checksum: it was damaged or altered", _TIP)
    attributes = json.loads(provenance)
    if "index" in attributes:
        attributes["index"] = tuple(attributes["index"])
    return Result(name, grain, arrays, attributes)


_TIP = "Move the file away and run the same command again: pieces that are still beside it are kept."


def result_pieces(path: Path, analyzer: str) -> dict[str, Piece]:
    """The finished pieces of one analyzer in a report by key, so that a second call need not repeat them.

    Failed pieces are left out, as they are to be tried again. No report, no pieces.

    Raises:
        InputError: If the file is not a report.
        DamagedReport: If the analyzer's group is damaged.
    """
    if not path.exists():
        return {}
    result = read_report(path, only=[analyzer]).get(analyzer)
    pieces = unstack(result) if result is not None else []
    return {piece.key: piece for piece in pieces if piece.key and piece.status != FAILED}


def write_result(path: Path, result: Result) -> None:
    """Put one analyzer's result into a report; what else the report holds is kept.

    Raises:
        CannotWrite: If it cannot be written, or the file there is not a report.
        DamagedReport: If the file there is damaged; it is left as it is.
    """
    write_results(path, {result.analyzer: result})


def write_results(path: Path, results: Mapping[str, Result]) -> None:
    """Put several results into a report at once, as `write_result` does."""
    remove_leftovers(path.parent, path.name)
    while not _replaced(path, lambda: results):
        pass  # another process has put its own result in meanwhile: take that along


def update_result(
    path: Path, analyzer: str, build: Callable[[Result | None], Result], *, fresh: bool = False
) -> Result:
    """Put one analyzer's result into a report together with what others put there until that moment.

    Args:
        path: The report.
        analyzer: Name of the result.
        build: Makes the result to be written from the one that is there, None if there is none. Called
            again whenever another process was faster.
        fresh: Replace what is there, even if it is damaged.

    Returns:
        The result that the report now holds.

    Raises:
        CannotWrite: If it cannot be written, or the file there is not a report.
        DamagedReport: If the file there is damaged; it is left as it is.
    """
    remove_leftovers(path.parent, path.name)
    check_replaceable(path)
    built: list[Result] = []

    def results() -> dict[str, Result]:
        replacing = fresh and not built  # what comes in afterwards is a neighbour's and stays
        older = None if replacing or not path.exists() else read_report(path, only=[analyzer]).get(analyzer)
        built.append(build(older))
        return {analyzer: built[-1]}

    while not (_replaced(path, results, over_damage=fresh) and _holds(path, built[-1])):
        pass
    return built[-1]


def _holds(path: Path, result: Result) -> bool:
    """Whether a report holds all pieces of a result, after other processes may have written to it."""
    there = read_report(path, only=[result.analyzer]).get(result.analyzer)
    wanted = [] if there is None else np.atleast_1d(there["key"]).tolist()
    return set(np.atleast_1d(result["key"]).tolist()) <= set(wanted)


def _replaced(path: Path, results: Callable[[], Mapping[str, Result]], *, over_damage: bool = False) -> bool:
    """Write results beside what the report holds; False if it changed meanwhile."""
    before = _fingerprint(path)
    made = results()
    content = image(lambda file: _build(file, path, made, over_damage))
    with _alone(path.parent):
        return write_atomically(path, content, unless=lambda: _fingerprint(path) != before)


@contextlib.contextmanager
def _alone(folder: Path, patience: float = 5.0) -> Iterator[None]:
    """Keep other writers out between a last look at the report and its rename, where the system can.

    Where it cannot, that gap is some microseconds, and `_holds` looks once more. The lock goes with the
    process, and nobody waits for long for one that is stopped.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            end = time.monotonic() + patience
            while time.monotonic() < end:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.01)
                else:
                    break
        yield


def check_replaceable(path: Path) -> None:
    """Refuse to write over a file that is there and is not a report, before anything is measured.

    Raises:
        CannotWrite: If it is some other file.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise CannotWrite(f"{path}: is not a file that could be replaced.", "Choose another name with -o.")
    try:
        with opened(path) as file:
            known = "dynprobe_layout" in file.attrs
    except DamagedReport:
        known = _was_report(path)
    if not known:
        raise _foreign(path)


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _build(file: h5py.File, path: Path, results: Mapping[str, Result], over_damage: bool) -> None:
    if path.exists():
        _keep_others(file, path, results, over_damage)
    for name, result in results.items():
        _write_group(file.create_group(name), result)
    everything = [json.loads(g.attrs["provenance"]) for g in file.values() if "provenance" in g.attrs]
    history = [f"{a.get('created', '')}: {a.get('command', '')}" for a in everything if "command" in a]
    shared = {
        k: v for k, v in everything[0].items() if k != "index" and all(a.get(k) == v for a in everything)
    }
    hdf5.write_attributes(file, shared)
    about = {"title": "dynprobe report", "history": "\n".join(sorted(history)), "dynprobe_layout": LAYOUT}
    hdf5.write_attributes(file, {"Conventions": "CF-1.11", **about, "provenance": dumps(shared)})


def _keep_others(file: h5py.File, path: Path, skip: Collection[str], over_damage: bool) -> None:
    check_replaceable(path)
    try:
        with opened(path) as old:
            hdf5.copy_tree(old, file, skip=skip)
    except DamagedReport as error:
        if not over_damage:
            raise DamagedReport(error.message, _TIP) from error
        for name in list(file):  # what was copied before the damage
            del file[name]


def _was_report(path: Path) -> bool:
    """Whether a damaged file is what is left of a report."""
    return b"dynprobe" in path.read_bytes()


def _foreign(path: Path) -> CannotWrite:
    return CannotWrite(
        f"{path}: exists and is not a dynprobe report, so it is not overwritten.",
        "Choose another name with -o.",
    )


def _write_group(group: h5py.Group, result: Result) -> None:
    provenance = dumps(result.attributes)
    hdf5.write_arrays(group, result.arrays)
    labels = [n for n, a in result.coordinates.items() if a.dims != (n,) and " " not in n]
    plain: dict[str, Any] = {k: v for k, v in result.attributes.items() if k not in RESERVED | {"index"}}
    hdf5.write_attributes(
        group,
        {
            **plain,
            "grain": result.grain,
            "variables": list(result.arrays),
            "coordinates": " ".join(labels),
            "provenance": provenance,
            "checksum": hdf5.checksum(result.arrays, result.grain + provenance),
        },
    )
