"""Lightning's `.ckpt`: torch's file with `state_dict`, `global_step`, `epoch`, `hyper_parameters`."""

from __future__ import annotations

from pathlib import Path

from dynprobe.io.header import OpenedCheckpoint
from dynprobe.io.readers import torch_zip

NAME = "lightning"
_MARK = b"pytorch-lightning_version"
_MARK_WITHIN = 4096


def sniff(path: Path) -> bool:
    """Whether it is torch's zip and its pickle carries Lightning's version mark."""
    if not torch_zip.sniff(path):
        return False
    with path.open("rb") as stream:
        # The pickle comes first in the file, and in it epoch, global_step, the mark, then the weights.
        return _MARK in stream.read(_MARK_WITHIN)


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the pickle, not the storages.

    Raises:
        UnreadableCheckpoint: As `torch_zip.open`.
    """
    return torch_zip.open_as(NAME, path, key, ema)
