"""Lightning's `.ckpt`: torch's file with `state_dict`, `global_step`, `epoch`, `hyper_parameters`."""

from __future__ import annotations

import zipfile
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
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            # Lightning writes epoch, global_step, the mark, then the weights: no parsing needed.
            return any(_MARK in archive.open(info).read(_MARK_WITHIN) for info in pickles[:1])
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError):
        return False


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the pickle, not the storages.

    Raises:
        UnreadableCheckpoint: As `torch_zip.open`.
    """
    return torch_zip.open_as(NAME, path, key, ema)
