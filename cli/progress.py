"""Progress on stderr: pieces, and the parts of the piece in hand, with rate and time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOW_AFTER = 1.0  # seconds: what takes less needs no bar
PLAIN_EVERY = 10.0  # seconds between lines where stderr is not a terminal


class Bar:
    """Shows how far a call is. A bar on a terminal, a line now and then in a log, nothing when quiet.

    Args:
        what: What is being measured.
        total: Number of pieces.
        quiet: Show nothing.
    """

    def __init__(self, what: str, total: int, *, quiet: bool = False) -> None:
        self._what = what
        self._total = total
        self._quiet = quiet
        self._start = self._last_line = time.monotonic()
        self._done = 0
        self._measured = 0
        self._fraction = 0.0
        self._live: Progress | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def piece_done(self, *, measured: bool = True) -> None:
        """One more piece is finished; `measured` is false where it was stored before."""
        self._done += 1
        self._measured += measured
        self._fraction = 0.0
        self._show("")

    def part(self, done: int, total: int, what: str) -> None:
        """`done` of `total` parts of the piece in hand are finished."""
        self._fraction = min(done / total, 0.999) if total else 0.0
        self._show(f"{what} {done}/{total}")

    def _show(self, detail: str) -> None:
        now = time.monotonic()
        if self._quiet or now - self._start < SHOW_AFTER:
            return
        if sys.stderr.isatty():
            self._show_bar(detail)
        elif now - self._last_line >= PLAIN_EVERY:
            self._last_line = now
            print(
                f"{self._what}: {self._done}/{self._total} {detail}{self._left(now)}",
                file=sys.stderr,
                flush=True,
            )

    def _show_bar(self, detail: str) -> None:
        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
            )
            self._live = Progress(*columns, console=Console(file=sys.stderr), transient=True)
            self._live.start()
            self._live.add_task(self._what, total=self._total, detail="")
        self._live.update(self._live.task_ids[0], completed=self._done + self._fraction, detail=detail)

    def _left(self, now: float) -> str:
        finished = self._measured + self._fraction
        if not finished:
            return ""
        rate = finished / (now - self._start)
        left = (self._total - self._done - self._fraction) / rate
        return f", {rate * 60:.3g} pieces a minute, {left:.0f} s left"
