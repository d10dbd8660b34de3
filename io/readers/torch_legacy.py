"""Torch files before 1.6 (and `_use_new_zipfile_serialization=False`): five pickles, then raw storages."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.header import OpenedCheckpoint
from dynprobe.io.inert import InertUnpickler
from dynprobe.io.pickle_scan import scan_pickle
from dynprobe.io.pickled import PickledCheckpoint
from dynprobe.io.tensor_refs import ITEM_SIZE, StorageRef

NAME = "torch-legacy"

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC_NUMBER.to_bytes(10, "little")
_TAR_MAGIC = b"ustar"


def sniff(path: Path) -> bool:
    """Whether the file starts with the pickled magic number, or is the tar of torch before 0.1.10."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(512)
    is_old_tar = head[257:262] == _TAR_MAGIC and head.split(b"\0")[0] in {b"storages", b"./storages"}
    return (head[:1] == b"\x80" and _MAGIC_BYTES in head[:32]) or is_old_tar


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the pickles and where each storage starts, not the storages.

    Raises:
        UnreadableCheckpoint: Truncated, damaged, older than torch 0.1.10, or without weights.
    """
    where = str(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:1] != b"\x80":
            raise UnreadableCheckpoint(
                f"{where}: a tar file of torch before 0.1.10.",
                tip="Load it with an old torch and save it again.",
            )
        ends = [0]
        for _ in range(5):  # magic number, protocol version, system facts; the object; the table of storages
            ends.append(scan_pickle(content, where, ends[-1]))
        data, table = content[ends[3] : ends[4]], content[ends[4] : ends[5]]
        keys = InertUnpickler(table, where=where).load()
        claimed = _claimed_storages(data, where)
        storages = _locate(content, ends[5], path, keys, claimed)
    unpickler = InertUnpickler(
        data, where=where, find_storage=lambda saved_id: _find(saved_id, storages, where)
    )
    return PickledCheckpoint(path, NAME, unpickler.load(), unpickler, key=key, ema=ema)


def _claimed_storages(data: bytes, where: str) -> dict[str, tuple[str, int]]:
    """Run the pickle once for the type and size of each storage: the file's table has only their order."""
    claimed: dict[str, tuple[str, int]] = {}

    def note(saved_id: tuple[Any, ...]) -> object:
        if saved_id[0] == "module":
            return saved_id[1]
        key, dtype, numel = _parts(saved_id, where)
        claimed.setdefault(key, (dtype, numel))
        return StorageRef(Path(where), key, dtype, numel * ITEM_SIZE[dtype], 0)

    InertUnpickler(data, where=where, find_storage=note).load()
    return claimed


def _parts(saved_id: tuple[Any, ...], where: str) -> tuple[str, str, int]:
    if len(saved_id) != 6 or saved_id[0] != "storage":
        raise UnreadableCheckpoint(f"{where}: an unknown kind of reference in the pickle.")
    _, dtype, key, _, numel, _ = saved_id
    known = isinstance(dtype, str) and dtype in ITEM_SIZE
    if not known or not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 2**60:
        raise UnreadableCheckpoint(f"{where}: a storage of an unknown type or size.")
    return key, str(dtype), numel


def _locate(
    content: mmap.mmap, position: int, path: Path, keys: object, claimed: dict[str, tuple[str, int]]
) -> dict[str, StorageRef]:
    """Walk over the raw storages behind the pickles: 8 bytes of length, then the data, in table order."""
    size = len(content)
    storages = {}
    for key in keys if isinstance(keys, list) else []:
        if key not in claimed:
            raise UnreadableCheckpoint(f"{path}: storage '{key}' is in the table, but nothing uses it.")
        dtype, numel = claimed[key]
        head = content[position : position + 8]
        nbytes = numel * ITEM_SIZE[dtype]
        if len(head) < 8 or struct.unpack("<q", head)[0] != numel or position + 8 + nbytes > size:
            raise UnreadableCheckpoint(
                f"{path}: cut off or damaged at storage '{key}' ({numel} elements of {dtype}, "
                f"{max(size - position - 8, 0)} bytes left).",
                tip="It is truncated or still being written. Copy it again, or leave it out.",
            )
        storages[key] = StorageRef(path, key, dtype, nbytes, position + 8)
        position += 8 + nbytes
    return storages


def _find(saved_id: tuple[Any, ...], storages: dict[str, StorageRef], where: str) -> object:
    if saved_id[0] == "module":  # (class, source file, source text): the class, a stub, is enough
        return saved_id[1]
    key, dtype, numel = _parts(saved_id, where)
    storage = storages.get(key)
    if storage is None:
        raise UnreadableCheckpoint(f"{where}: the data of storage '{key}' is missing.")
    view = saved_id[5]
    if view is None:
        return storage
    # Files before 0.4 could store a storage as a part of another: (key, first element, number of elements).
    if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or type(view[2]) is not int:
        raise UnreadableCheckpoint(f"{where}: storage '{key}' has a damaged view.")
    view_key, first, count = view
    item = ITEM_SIZE[dtype]
    if first < 0 or count < 0 or (first + count) * item > storage.nbytes or numel < 0:
        raise UnreadableCheckpoint(f"{where}: a part of storage '{key}' reaches outside it.")
    return StorageRef(storage.path, f"{key}/{view_key}", dtype, count * item, storage.position + first * item)
