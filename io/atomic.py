"""Files that are there whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dynprobe.io.errors import CannotWrite

STALE_AFTER = 24 * 3600.0
"""Seconds after which a temporary file of another machine counts as left behind."""

_HOST = re.sub(r"[^A-Za-z0-9]+", "", platform.node()) or "host"
_COUNTER = itertools.count()
_LEFTOVER = re.compile(r"^\..*\.(?P<host>[A-Za-z0-9]+)-(?P<pid>\d+)-\d+\.tmp$")

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the allowed file size",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EEXIST: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder",
}


def write_atomically(path: Path, content: bytes, *, unless: Callable[[], bool] | None = None) -> bool:
    """Write a file so that every other process sees either the old one or the new one, whole.

    Missing parent folders are made. A link is followed: the file it points to is replaced.

    Args:
        path: The file.
        content: All of it.
        unless: Asked right before the rename; if true, nothing is changed.

    Returns:
        Whether the file was replaced.

    Raises:
        CannotWrite: If the disk is full, the folder read-only, …; the old file is untouched.
    """
    target = Path(os.path.realpath(path))
    with explained(path):
        for _ in range(3):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name[:100]}.{_HOST}-{os.getpid()}-{next(_COUNTER)}.tmp")
            try:
                _write(temporary, content, mode=_mode(target))
                if unless is not None and unless():
                    return False
                os.replace(temporary, target)  # noqa: PTH105
            except FileNotFoundError:
                continue  # another process removed the folder as empty, or took our file for a dead one's
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
            return True
        raise OSError(errno.ENOENT, "its folder was removed while it was written")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an `OSError` met while writing `path` into a `CannotWrite` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        tip = "Free some space" if full else "Choose another place with -o, or make this one writable"
        raise CannotWrite(
            f"{path}: cannot be written: {reason}.",
            f"{tip}, then run the same command again: what is finished is kept and is not measured again.",
        ) from error


def remove_leftovers(folder: Path, name: str = "") -> list[Path]:
    """Remove temporary files of killed processes.

    A file goes if the process that named it no longer runs on this machine, or, for one from
    another machine, if nothing was written to it for a day.

    Args:
        folder: Where to look; it need not exist.
        name: Only those for a target of this name; empty for all.

    Returns:
        The files removed.
    """
    removed = []
    for path in sorted(folder.glob(f".{_escaped(name[:100])}.*.tmp" if name else ".*.tmp")):
        match = _LEFTOVER.match(path.name)
        with contextlib.suppress(OSError):
            if match and _is_abandoned(path, match["host"], int(match["pid"])):
                path.unlink()
                removed.append(path)
    return removed


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_abandoned(path: Path, host: str, pid: int) -> bool:
    if host == _HOST and not _runs(pid):
        return True
    return time.time() - path.stat().st_mtime > STALE_AFTER


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _write(path: Path, content: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:  # noqa: PTH123
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _mode(target: Path) -> int:
    """The permissions of the file that is replaced, else the usual ones."""
    try:
        return target.stat().st_mode & 0o777
    except OSError:
        return 0o666


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: Path) -> None:
    """Find out now, not after hours, that a file cannot be written; its folder is made if need be.

    Raises:
        CannotWrite: If the folder cannot be made or written to, or `path` is a folder.
    """
    target = Path(os.path.realpath(path))
    with explained(path):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name[:100]}.{_HOST}-{os.getpid()}-{next(_COUNTER)}.tmp")
        try:
            _write(probe, b"", mode=0o600)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
