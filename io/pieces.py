"""Finished pieces of work as small files beside the report, written by many processes without a lock."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np

from dynprobe.analyzers.core.result import Array, Piece
from dynprobe.io import hdf5
from dynprobe.io.atomic import remove_leftovers, write_atomically
from dynprobe.io.errors import DamagedReport, InputError
from dynprobe.io.plain_json import dumps
from dynprobe.io.sealed import image, opened

log = logging.getLogger("dynprobe")

PIECES = ".pieces"
"""What is added to the report's name for the folder of its unfinished work."""


class PieceStore:
    """Finished pieces of one analyzer, kept until its report holds them.

    Args:
        report: The report they are for; they live in the folder `<report>.pieces/<analyzer>`.
        analyzer: Name of the analyzer.
    """

    def __init__(self, report: Path, analyzer: str) -> None:
        self.folder = report.with_name(report.name + PIECES) / analyzer
        remove_leftovers(self.folder)
        for unfinished in self.folder.glob("*.parts"):
            remove_leftovers(unfinished)

    def get(self, key: str) -> Piece | None:
        """The finished piece of this key; None if there is none or its file is damaged."""
        path = self._path(key)
        if not path.exists():
            return None
        piece = _read(path)
        return piece if piece is not None and piece.key == key else None

    def put(self, piece: Piece) -> None:
        """Keep a finished piece; what was stored of it in parts goes.

        Raises:
            CannotWrite: If the disk is full, the folder read-only, …
        """
        path = self._path(piece.key)
        write_atomically(path, _image(piece))
        self.partial(piece.key).clear()

    def pieces(self) -> dict[str, Piece]:
        """All whole pieces by key."""
        found = (_read(path) for path in sorted(self.folder.glob("*.h5")))
        return {piece.key: piece for piece in found if piece is not None}

    def partial(self, key: str) -> Partial:
        """The store for parts of the piece of this key."""
        return Partial(self._path(key).with_suffix(".parts"))

    def clear(self, keys: Iterable[str]) -> None:
        """Remove pieces and their parts once the report holds them, and folders that are then empty.

        Args:
            keys: Which; other processes may still be adding theirs.
        """
        for key in set(keys):
            self.partial(key).clear()
            self._path(key).unlink(missing_ok=True)
        for folder in (self.folder, self.folder.parent):
            with contextlib.suppress(OSError):  # not empty: someone else's pieces
                folder.rmdir()

    def _path(self, key: str) -> Path:
        return self.folder / f"{_file_name(key)}.h5"


class Partial:
    """Parts of a piece that is not finished, so that a kill loses at most the part in hand.

    Args:
        folder: Where they are kept, one file each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays stored under this name; None if there are none or their file is damaged."""
        path = self._path(name)
        try:
            content = io.BytesIO(path.read_bytes())  # numpy leaves a damaged file open
            with np.load(content, allow_pickle=False) as stored:
                return {key[1:]: stored[key] for key in stored.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            log.warning("%s: part %r is damaged and is measured again (%s)", path, name, error)
            return None

    def put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store arrays (numbers or text) under a name.

        Raises:
            CannotWrite: If the disk is full, the folder read-only, …
        """
        buffer = io.BytesIO()
        marked = {f"_{key}": np.asarray(value) for key, value in arrays.items()}  # savez takes "file" itself
        np.savez(buffer, allow_pickle=False, **marked)
        write_atomically(self._path(name), buffer.getvalue())

    def clear(self) -> None:
        """Forget all parts."""
        for path in self.folder.glob("*.npz"):
            path.unlink(missing_ok=True)
        remove_leftovers(self.folder)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{_file_name(name)}.npz"


def _file_name(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def _image(piece: Piece) -> bytes:
    about = dumps(
        {
            "key": piece.key,
            "index": piece.index,
            "status": piece.status,
            "reason": piece.reason,
            "seconds": piece.seconds,
            "spent": piece.spent,
            "notes": piece.notes,
            "variables": list(piece.arrays),
        }
    )

    def build(file: h5py.File) -> None:
        hdf5.write_arrays(file, piece.arrays)
        text = {"piece": about, "checksum": hdf5.checksum(piece.arrays, about)}
        hdf5.write_attributes(file, text)

    return image(build)


def _read(path: Path) -> Piece | None:
    try:
        with opened(path, sealed=True) as file:
            about, digest = str(file.attrs["piece"]), file.attrs["checksum"]
            facts = json.loads(about)
            arrays: dict[str, Array] = hdf5.read_arrays(file, facts.pop("variables"))
            if hdf5.checksum(arrays, about) != digest:
                raise DamagedReport(f"{path}: its contents do not match its checksum")
        return Piece(arrays=arrays, **{**facts, "notes": tuple(facts["notes"])})
    except InputError as error:
        log.warning("%s; it is measured again", error.message)
        return None
