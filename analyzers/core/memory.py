"""Remembers what is costly to make, within a limit of memory; what exceeds it waits in temporary files."""

from __future__ import annotations

import atexit
import itertools
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("dynprobe")

T = TypeVar("T")
Key = tuple[int, Hashable]


class Memory:
    """Values by key, the least recently used of them in temporary files once they exceed a limit."""

    def __init__(self) -> None:
        self._values: OrderedDict[Key, tuple[Any, int]] = OrderedDict()
        self._spilled: dict[Key, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self, key: Key, make: Callable[[], T], limit: float) -> T:
        """The value of a key, made where there is none.

        Args:
            key: Owner and name.
            make: Makes it: tensors, arrays and plain values in dataclasses, dicts, lists or tuples.
            limit: Bytes that all values together may take.
        """
        if key not in self._values:
            if key in self._spilled:
                # our own file, written a moment ago: weights_only could not read dataclasses
                value = torch.load(self._spilled[key], weights_only=False)
            else:
                value = make()
            self._values[key] = value, _nbytes(value)
        self._values.move_to_end(key)
        while len(self._values) > 2 and sum(size for _value, size in self._values.values()) > limit:
            self._spill()
        found: T = self._values[key][0]
        return found

    def _spill(self) -> None:
        key, (value, size) = self._values.popitem(last=False)
        if key in self._spilled:
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dynprobe-")
            atexit.register(self._folder.cleanup)
        path = Path(self._folder.name) / f"{next(_numbers)}.pt"
        log.debug("%.0f MB of representations go to a temporary file (--memory)", size / 1e6)
        torch.save(value, path)
        self._spilled[key] = path

    def forget(self, owner: int) -> None:
        """Let go of all values of an owner, and of their files."""
        for key in [k for k in self._values if k[0] == owner]:
            del self._values[key]
        for key in [k for k in self._spilled if k[0] == owner]:
            self._spilled.pop(key).unlink(missing_ok=True)


def _nbytes(value: Any) -> int:
    """Bytes of all tensors and arrays in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if is_dataclass(value):
        return sum(_nbytes(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, Mapping):
        return sum(_nbytes(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_nbytes(v) for v in value)
    return 0


_numbers = itertools.count()
