"""HDF5 files as bytes: built in memory, sealed with a checksum, opened only if the seal holds.

Built in memory, so that a full disk is met by plain file output (`dynprobe.io.atomic`) and never leaves
the HDF5 library with a half-written file to close.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from dynprobe.io.errors import DamagedReport, InputError

LIBVER = ("v110", "v110")  # newer layouts cannot be read by HDF5 1.10 and the netCDF library built on it

SUPERBLOCK = 48
"""Bytes at the start in which HDF5 marks a file as open for writing, for good if that program is killed."""

SEAL = b"dynprobe sealed\n"
"""Stands after the last byte that HDF5 knows of, followed by the SHA-256 of all before and the superblock."""


def image(build: Callable[[h5py.File], None]) -> bytes:
    """The bytes of the HDF5 file that `build` fills, sealed; equal contents give equal bytes."""
    name = uuid.uuid4().hex  # two open files of one name would be taken for the same file
    with h5py.File(name, "w", driver="core", backing_store=False, libver=LIBVER) as file:
        build(file)
        file.flush()
        content = bytes(file.id.get_file_image())
    return content + SEAL + hashlib.sha256(content).digest() + content[:SUPERBLOCK]


@contextmanager
def opened(path: Path, *, sealed: bool = False) -> Iterator[h5py.File]:
    """A file open for reading, whatever locks other processes hold on it.

    The seal is checked before the HDF5 library sees a byte: a flipped bit in its text heap, which has
    no checksum of its own, can send the library into an endless loop.

    Args:
        path: The file.
        sealed: Whether a file without seal is damaged. One that another program has added to has
            lost its seal and is still a report.

    Raises:
        InputError: If there is no such file, or it may not be read.
        DamagedReport: If it is not a whole HDF5 file, or reading fails inside the block.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file.", "Is the path right?") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    content = _unsealed(path, content, sealed)
    try:
        file = h5py.File(h5py.h5f.open_file_image(content))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    with file:
        try:
            yield file
        except InputError:
            raise
        except Exception as error:  # damage surfaces as any of a dozen kinds
            raise _damaged(path, error) from error


def _unsealed(path: Path, content: bytes, sealed: bool) -> bytes:
    """What was sealed, with the superblock as it was, if the seal is there and holds."""
    end = len(content) - len(SEAL) - hashlib.sha256().digest_size - SUPERBLOCK
    seal, digest = content[end : end + len(SEAL)], content[end + len(SEAL) : -SUPERBLOCK]
    if seal != SEAL and not sealed:
        return content
    original = content[-SUPERBLOCK:] + content[SUPERBLOCK : max(end, 0)]
    if seal != SEAL or hashlib.sha256(original).digest() != digest:
        raise DamagedReport(f"{path}: does not match its checksum: it was damaged or altered")
    return original


def _damaged(path: Path, error: Exception) -> DamagedReport:
    del error  # what libhdf5 says means nothing to a user; it stays the cause
    return DamagedReport(f"{path}: is not an HDF5 file, or is damaged.")
