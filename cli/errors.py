"""The one place where an exception becomes a message, a tip and an exit code."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.text import Text

DONE, SOME_FAILED, UNUSABLE = 0, 1, 2


class Interrupted(BaseException):
    """SIGTERM or SIGINT arrived; everything finished so far is kept.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process ended by that signal."""
        return 128 + self.number


def console() -> Console:
    """The terminal that people read: stderr, never cut, no colour where NO_COLOR or a pipe says so."""
    return Console(file=sys.stderr, soft_wrap=True, highlight=False)


def report_error(error: BaseException) -> int:
    """Print an error for the user; the exit code that goes with it."""
    out = console()
    out.print(Text("error: ", "bold red") + Text(str(error)))
    if tip := getattr(error, "tip", ""):
        lines = str(tip).splitlines()
        out.print(Text("tip: ", "bold yellow") + Text(lines[0]))
        for line in lines[1:]:
            out.print(Text("     " + line))
    return UNUSABLE


def warn(message: str) -> None:
    """Print one warning to stderr."""
    console().print(f"[yellow]warning:[/] {escape(message)}")


def note(message: str) -> None:
    """Print one remark to stderr."""
    console().print(f"[dim]{escape(message)}[/]")
