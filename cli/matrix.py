"""A similarity between layers as a small matrix for the screen, shaded on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

import numpy as np

from dynprobe.analyzers.core.result import FAILED, Result

SHOWN = 2
"""How many matrices are shown: the last ones; the report has all."""
CELL = 5


def print_matrices(result: Result) -> None:
    """Print the variable that the analyzer declares as its matrix, for the last pieces that have one.

    Nothing is printed where it would not fit: more columns than the terminal has room for.
    """
    name = str(result.attributes.get("matrix", ""))
    if name not in result or len(result.arrays[name].dims) < 2:
        return
    rows, columns = result.arrays[name].dims[-2:]
    values = result[name].reshape(-1, *result[name].shape[-2:])
    status = np.atleast_1d(result["status"])
    drawable = [i for i in range(len(values)) if status[i] != FAILED and np.isfinite(values[i]).any()]
    for i in drawable[-SHOWN:]:
        used = [~np.isnan(values[i]).all(axis=axis) for axis in (1, 0)]  # layers of the other pairs only
        matrix = values[i][np.ix_(*used)]
        labels = [_labels(result, d, keep) for d, keep in zip((rows, columns), used, strict=True)]
        lines, cell = _lines(matrix, *labels)
        if max(map(len, lines)) > shutil.get_terminal_size().columns and sys.stdout.isatty():
            continue
        if matrix.size == 1:
            continue
        print()
        treated = f" ({result.treatment})" if result.treatment else ""
        print(f"{name}{treated}: {_title(result, i, rows, columns)}")
        _print(lines, matrix, cell)


def _labels(result: Result, dim: str, keep: np.ndarray) -> list[str]:
    names = result[dim].astype(str) if dim in result else np.arange(len(keep)).astype(str)
    return [n if len(n) <= 24 else f"…{n[-23:]}" for n in names[keep].tolist()]


def _title(result: Result, piece: int, rows: str, columns: str) -> str:
    """What is down and what is across: two networks, or the layers of one and what they are compared with."""
    if "run_a" not in result:
        return f"{_network(result, piece, '')}, {rows}s (down) against {columns}s (across)"
    return f"{_network(result, piece, '_a')} (down) against {_network(result, piece, '_b')} (across)"


def _network(result: Result, piece: int, half: str) -> str:
    run, step = (np.atleast_1d(result[f"{n}{half}"])[piece] for n in ("run", "step"))
    known = isinstance(step, (int, float, np.number)) and np.isfinite(step)
    return f"{run} step {step:g}" if known else str(run)


def _lines(matrix: np.ndarray, down: Sequence[str], across: Sequence[str]) -> tuple[list[str], int]:
    """The lines, and how wide a cell is; columns that are called like the rows have their numbers."""
    same = list(down) == list(across)
    heads = [str(j + 1) for j in range(len(across))] if same else across
    cell = max(CELL, 2 + max(map(len, heads)))
    width, count = max(map(len, down)), len(str(len(down)))
    lines = [" " * (count + 1 + width) + "".join(h.rjust(cell) for h in heads)]
    for i, name in enumerate(down):
        cells = "".join(_cell(v).rjust(cell) for v in matrix[i])
        lines.append(f"{i + 1:>{count}} {name.ljust(width)}{cells}")
    return lines, cell


def _cell(value: float) -> str:
    """Two decimals without the zero before the point."""
    if np.isnan(value):
        return "·"
    return f"{value:.2f}".replace("0.", ".", 1)


def _print(lines: Sequence[str], matrix: np.ndarray, cell: int) -> None:
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(lines[0], style="bold"))
    for line, row in zip(lines[1:], matrix, strict=True):
        start = len(line) - cell * len(row)
        text = Text(line[:start])
        for j, value in enumerate(row):
            text.append(line[start + cell * j : start + cell * (j + 1)], style=_shade(float(value)))
        console.print(text, no_wrap=True, overflow="crop")


def _shade(value: float) -> str:
    """Dark for 0 to bright for 1, as in the figure."""
    if np.isnan(value):
        return "dim"
    level = int(232 + 23 * min(max(value, 0.0), 1.0))
    return f"{'black' if level > 243 else 'white'} on color({level})"
