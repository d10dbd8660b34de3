"""Torch's own files since 1.6: a zip of one pickle and one member per storage (.pt, .pth, .bin, .ckpt)."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.header import OpenedCheckpoint
from dynprobe.io.inert import InertUnpickler
from dynprobe.io.pickled import PickledCheckpoint
from dynprobe.io.tensor_refs import ITEM_SIZE, StorageRef

NAME = "torch"

MAX_PICKLE = 1 << 30
# Deflate reaches about 1000:1 on zeros; a pickle of real structure stays below 30:1.
MAX_RATIO = 200
_SMALL = 1 << 20
# What zipfile raises on archives that were cut off or tampered with.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ArithmeticError, ValueError, EOFError, RuntimeError)


def sniff(path: Path) -> bool:
    """Whether the file is a zip, whole or cut off, with a pickle as torch writes it."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        # The local header of the first member: torch writes NAME/data.pkl first, TorchScript too.
        head = stream.read(512)
    if head[:4] != b"PK\x03\x04":
        return False
    if b"/data.pkl" in head or b"/version" in head or b"/.format_version" in head:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the pickle, not the storages.

    Raises:
        UnreadableCheckpoint: Truncated, unsafe, TorchScript, a torch.export program, or without weights.
    """
    return open_as(NAME, path, key, ema)


def open_as(name: str, path: Path, key: str | None, ema: bool) -> OpenedCheckpoint:
    """Open under another format's name (Lightning's files are torch's with conventions)."""
    archive = read_archive(path)
    tree = archive.unpickler.load()
    return PickledCheckpoint(path, name, tree, archive.unpickler, key=key, ema=ema)


@dataclass
class Archive:
    """An opened zip: the bytes of its pickle and an unpickler that knows its storages."""

    data: bytes
    unpickler: InertUnpickler


def read_archive(path: Path, *, stream: BinaryIO | None = None, base: int = 0) -> Archive:
    """Read the zip's directory and its pickle, refusing bombs, TorchScript and inconsistent archives.

    Args:
        path: The file, for messages and storage references.
        stream: Read from here instead: a zip inside the file `path`.
        base: Where in `path` that inner zip starts.

    Raises:
        UnreadableCheckpoint: See `open`.
    """
    try:
        with zipfile.ZipFile(stream or path) as archive:
            members = _members(path, archive)
            prefix = _prefix(path, members)
            data = _pickle(path, archive, members[f"{prefix}/data.pkl"])
            order = members.get(f"{prefix}/byteorder")
            if order is not None and order.file_size < 16 and archive.read(order) == b"big":
                raise UnreadableCheckpoint(
                    f"{path}: was saved on a big-endian machine.",
                    tip="Load it with torch and save it again on this machine.",
                )
    except _UNREADABLE as error:
        raise UnreadableCheckpoint(
            f"{path}: the zip archive cannot be read ({error}).",
            tip="It is truncated or still being written. Copy it again, or leave it out.",
        ) from error
    storages = _Storages(path, prefix, members, _size(path, stream), base)
    return Archive(data, InertUnpickler(data, where=str(path), find_storage=storages.find))


class _Storages:
    """Finds the members that a pickle's persistent ids name, and checks their size."""

    def __init__(
        self, path: Path, prefix: str, members: dict[str, zipfile.ZipInfo], file_size: int, base: int
    ) -> None:
        self._path = path
        self._prefix = prefix
        self._members = members
        self._file_size = file_size
        self._base = base
        self._found: dict[tuple[Any, ...], StorageRef] = {}

    def find(self, saved_id: tuple[Any, ...]) -> StorageRef:
        if len(saved_id) != 5 or saved_id[0] != "storage":
            raise UnreadableCheckpoint(f"{self._path}: an unknown kind of reference in the pickle.")
        _, dtype, key, _, numel = saved_id
        known = self._found.get((dtype, key, numel))
        if known is not None:
            return known
        if not isinstance(dtype, str) or dtype not in ITEM_SIZE or not isinstance(key, str):
            raise UnreadableCheckpoint(f"{self._path}: a storage of an unknown type.")
        nbytes = numel * ITEM_SIZE[dtype] if type(numel) is int else -1
        member = self._members.get(f"{self._prefix}/data/{key}")
        if member is None:
            raise UnreadableCheckpoint(f"{self._path}: the data of storage '{key}' is missing.")
        end = member.header_offset + 30 + member.compress_size
        if nbytes < 0 or nbytes > member.file_size or end > self._file_size:
            raise UnreadableCheckpoint(
                f"{self._path}: storage '{key}' claims {numel} elements of {dtype}, "
                f"the file holds {member.file_size} bytes of it.",
                tip="The file is damaged or was made to do harm. Save it again from the original.",
            )
        kind = "zip" if member.compress_type == zipfile.ZIP_STORED else "deflated"
        position = self._base + member.header_offset
        found = StorageRef(self._path, key, dtype, nbytes, position, kind, member.filename)
        self._found[dtype, key, numel] = found
        return found


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        # Two readers may each take another one of two members of one name.
        if info.filename in members:
            raise UnreadableCheckpoint(f"{path}: the archive holds '{info.filename}' twice.")
        if info.file_size > _SMALL and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            what = f"'{info.filename}' would unpack to {info.file_size} bytes"
            raise UnreadableCheckpoint(f"{path}: {what}; refused.")
        if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
            raise UnreadableCheckpoint(f"{path}: the sizes of '{info.filename}' contradict each other.")
        members[info.filename] = info
    return members


def _prefix(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        kind = (
            "a torch.export program" if any("models/" in name for name in members) else "no torch checkpoint"
        )
        raise UnreadableCheckpoint(
            f"{path}: a zip archive, but {kind}.", tip="An exported program can be given as --model FILE.pt2."
        )
    prefix = pickles[0].split("/")[0]
    if f"{prefix}/constants.pkl" in members or any(name.startswith(f"{prefix}/code/") for name in members):
        raise UnreadableCheckpoint(
            f"{path}: is a TorchScript program, whose code would have to run to tell weights from the rest.",
            tip="Save its weights alone: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt').",
        )
    return prefix


def _pickle(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_PICKLE:
        raise UnreadableCheckpoint(f"{path}: its pickle is {info.file_size} bytes long; refused.")
    with archive.open(info) as stream:
        return stream.read(info.file_size)


def _size(path: Path, stream: BinaryIO | None) -> int:
    return path.stat().st_size if stream is None else stream.seek(0, os.SEEK_END)
