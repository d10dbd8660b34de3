"""Writes docs/reference.md from `--help`: the reference cannot say anything else than the program.

Run it with `make docs`; a test compares its output with the file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

WIDTH = "100"
os.environ |= {"TERMINAL_WIDTH": WIDTH, "COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}

from typer.main import get_command  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from dynprobe.cli.app import app  # noqa: E402  (the width is read when typer is imported)

REPORT_COMMANDS = ("show", "export", "merge", "plot", "diff")
TARGET = Path(__file__).with_name("reference.md")

HEAD = """# Command reference

What `dynprobe COMMAND --help` prints, for every command. Written by `make docs`; do not edit.
"""


def help_of(*command: str) -> str:
    """The help text of a command, without colours and trailing blanks."""
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="dynprobe")
    if result.exit_code:
        raise RuntimeError(f"dynprobe {' '.join(command)} --help: {result.output}")
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def commands() -> list[tuple[str, ...]]:
    """Every command, the group itself first."""
    names = [(name,) for name in get_command(app).commands]  # type: ignore[attr-defined]
    reports = [("report", name) for name in REPORT_COMMANDS]
    return [(), *sorted(n for n in names if n != ("run",)), *reports]


def reference() -> str:
    """The whole page."""
    sections = []
    for command in commands():
        title = " ".join(("dynprobe", *command))
        sections.append(f"## `{title}`\n\n```text\n{help_of(*command)}\n```\n")
    return HEAD + "\n" + "\n".join(sections)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
