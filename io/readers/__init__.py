"""Checkpoint formats: a module here is one format, with `sniff(path)` and `open(path, key, ema)`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from dynprobe.io.errors import InputError, UnreadableCheckpoint
from dynprobe.io.header import OpenedCheckpoint

FORMATS = (
    "safetensors_file",
    "lightning",
    "torch_zip",
    "torch_legacy",
    "distributed",
    "deepspeed",
    "huggingface",
)
"""The formats' modules, in the order in which they are asked; the first whose `sniff` says yes opens it."""


class Reader(Protocol):
    """What a module of this package offers."""

    NAME: str

    def sniff(self, path: Path) -> bool:
        """Whether the file or folder is of this format, by content before extension."""
        ...

    def open(self, path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:
        """Read the header, not the weights."""
        ...


def find_reader(path: Path) -> Reader | None:
    """Return the format of a file or folder; None where none knows it."""
    for name in FORMATS:
        reader: Reader = import_module(f"dynprobe.io.readers.{name}")
        if reader.sniff(path):
            return reader
    return None


def open_file(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:
    """Open a checkpoint of any format.

    Args:
        path: File, or folder of a sharded format.
        key: Dotted path of the weights inside it.
        ema: Prefer an averaged copy.

    Returns:
        The checkpoint with its header read.

    Raises:
        UnreadableCheckpoint: No format knows it, or it is damaged or unsafe.
        NoSuchKey: It does not hold what `key` or `ema` asks for.
    """
    try:
        reader = find_reader(path)
    except OSError as error:
        raise UnreadableCheckpoint(f"{path}: {error.strerror or error}.") from error
    if reader is None:
        if path.is_file() and path.stat().st_size == 0:
            raise UnreadableCheckpoint(f"{path}: is empty.", tip="Its saving was cut off; leave it out.")
        raise UnreadableCheckpoint(
            f"{path}: is of no known format.",
            tip="Known: torch (.pt, .pth, .bin, .ckpt, old and new), safetensors, Hugging Face and "
            "torch.distributed.checkpoint folders, Lightning, DeepSpeed.",
        )
    try:
        return reader.open(path, key, ema)
    except InputError:
        raise
    except (
        Exception
    ) as error:  # a file made or damaged in a way that no check foresaw is one more damaged file
        what = f"{type(error).__name__}: {error}"
        raise UnreadableCheckpoint(f"{path}: is damaged, or no {reader.NAME} file ({what}).") from error
