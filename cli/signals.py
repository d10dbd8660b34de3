"""SIGTERM and SIGINT: stop where it is safe, keep what is finished."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dynprobe.cli import errors

if TYPE_CHECKING:
    from types import FrameType


class Gate:
    """Holds a signal back from the moment a piece is written until it is counted as finished."""

    def __init__(self) -> None:
        self._closed = False
        self._waiting: int | None = None

    def arrived(self, number: int) -> None:
        """A signal is here: raise `Interrupted` now, or when the gate opens."""
        self._waiting = number
        if not self._closed:
            raise errors.Interrupted(number)

    def close(self) -> None:
        """From here on a signal waits."""
        self._closed = True

    def open(self) -> None:
        """Let signals through again, one that has waited first."""
        self._closed = False
        if self._waiting is not None:
            raise errors.Interrupted(self._waiting)


@contextmanager
def signals_raise() -> Iterator[Gate]:
    """SIGTERM and SIGINT raise `Interrupted` where the program stands; a second one ends it at once."""
    gate = Gate()

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        gate.arrived(number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield gate
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait(patience: float = 30.0) -> Iterator[None]:
    """While results are written, one signal waits until they are; after `patience` seconds it acts."""
    start = time.monotonic()
    arrived: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        del frame
        if arrived or time.monotonic() - start > patience:
            raise errors.Interrupted(number)
        arrived.append(number)

    before = {s: signal.signal(s, later) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
