"""A result on stdout: a table for people, CSV or JSON for programs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import PurePath
from textwrap import indent
from typing import Any, TextIO

import numpy as np

from dynprobe.analyzers.core.result import Array, Result
from dynprobe.cli.document import document
from dynprobe.cli.matrix import print_matrices
from dynprobe.cli.numbers import number, with_error
from dynprobe.cli.plain_table import print_csv, print_rows
from dynprobe.io.plain_json import dumps

MAX_ENTRIES = 5
"""Up to how many entries of a variable are shown one by one; beyond, its range is."""


def print_result(result: Result, format: str = "table", file: TextIO | None = None) -> None:  # noqa: A002
    """Print a result.

    Args:
        result: What was measured.
        format: `table`; `json`, one document with every value; `csv`, one line a row of the table,
            with every digit.
        file: Where to; stdout by default. On a terminal, paths are shortened to file names.
    """
    with redirect_stdout(file or sys.stdout):
        if format == "json":
            print(dumps(document(result), indent=2))
        elif format == "csv":
            table = {
                n: [_printable(v) if isinstance(v, str) else v for v in c] for n, c in records(result).items()
            }
            print_csv(list(table), list(zip(*table.values(), strict=True)))
        else:
            _print_table(result)


@contextmanager
def closed_pipe_is_fine() -> Iterator[None]:
    """Let a reader of stdout that has seen enough (`| head`) end the printing without an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def row_dimension(result: Result) -> str:
    """What a row of the table stands for: a piece, or, for a result about whole runs, a checkpoint."""
    if result.grain in ("run", "group") and any("checkpoint" in a.dims for a in result.arrays.values()):
        return "checkpoint"
    return result.lead


def columns(result: Result, *, short: bool = False) -> dict[str, list[str]]:
    """The table's text, one entry a row: labels, status, then every variable with its error.

    A variable with up to five entries a row gets a column for each; a larger one shows its range, and
    the range of a `…_stderr` tells nobody anything, so it has none.

    Args:
        result: What was measured.
        short: Shorten paths to file names, and leave out a run's name that all rows share.
    """
    table = {}
    for name, values in _labels(result).items():
        if short and name.startswith(("run", "checkpoint_run")) and len(set(values)) == 1 < len(values):
            continue
        head = name.replace("path", "file")
        table[head] = [
            _printable(PurePath(str(v)).name if short and head != name else number(v)) for v in values
        ]
    measured = _measured(result)
    for name in _shown(result, measured):
        array, error = measured[name]
        for head, values, errors in _entries(result, name, array, error):
            if name.endswith("_stderr") and isinstance(values[0], np.ndarray):
                continue
            table[head] = [_cell(v, e) for v, e in zip(values, errors, strict=True)]
    return table


def blocks(table: Mapping[str, list[str]], width: int) -> list[list[str]]:
    """Columns in groups that are no wider than a terminal, each starting with run and step."""
    sizes = {name: 2 + max(len(cell) for cell in (name, *cells)) for name, cells in table.items()}
    keys = [name for name in table if name.startswith(("run", "checkpoint_run", "step"))]
    groups, used = [list(keys)], 0
    room = width - sum(sizes[name] for name in keys)
    for name in table:
        if name in keys:
            continue
        if used and used + sizes[name] > room:
            groups.append(list(keys))
            used = 0
        groups[-1].append(name)
        used += sizes[name]
    return groups


def records(result: Result) -> dict[str, list[Any]]:
    """The table's numbers with every digit, errors and bookkeeping in columns of their own."""
    table: dict[str, list[Any]] = dict(_labels(result))
    for name, (array, error) in _measured(result).items():
        for head, values, errors in _entries(result, name, array, error):
            if values and isinstance(values[0], np.ndarray):
                table[f"{head}.min"], table[f"{head}.max"] = map(list, zip(*map(_range, values), strict=True))
                continue
            table[head] = values
            if error is not None:
                table[f"{head}.error"] = errors
    rows = row_dimension(result)
    for name, array in result.arrays.items():
        if name not in table and name in result.coordinates and array.dims == ((rows,) if rows else ()):
            table[name] = np.atleast_1d(array.values).tolist()
    return table


def _shown(result: Result, names: Iterable[str]) -> list[str]:
    """Those of the names that the analyzer wants to see in a table, in its order; all if it has no wish."""
    wanted = result.attributes.get("table")
    return [n for n in wanted if n in set(names)] if wanted else list(names)


def _labels(result: Result) -> dict[str, list[Any]]:
    """Run, step, file and status along the rows."""
    rows = row_dimension(result)
    dims = (rows,) if rows else ()
    names = [
        n
        for n in (*result.attributes.get("index", ()), "status")
        if n in result and n.startswith(("run", "checkpoint_run", "step", "path", "status"))
    ]
    return {n: _per_row(result, n) for n in names if result.arrays[n].dims == dims or n == "status"}


def _per_row(result: Result, name: str) -> list[Any]:
    """A label or a piece's status for every row; the checkpoints of a run share the run's."""
    values: list[Any] = np.atleast_1d(result[name]).tolist()
    if row_dimension(result) == result.lead or result.arrays[name].dims == (row_dimension(result),):
        return values
    runs = np.atleast_1d(result["run"]).tolist() if "run" in result else [""]
    owners = result["checkpoint_run"].tolist() if "checkpoint_run" in result else []
    return [values[runs.index(owner) if owner in runs else 0] for owner in owners]


def _measured(result: Result) -> dict[str, tuple[Array, Array | None]]:
    """The variables that have a value in every row, each with its error; errors are none of their own."""
    rows = row_dimension(result)
    variables = {n: a for n, a in result.variables.items() if not rows or rows in a.dims}
    errors = {a.error for a in variables.values()}
    return {n: (a, variables.get(a.error)) for n, a in variables.items() if n not in errors}


def _entries(
    result: Result, name: str, array: Array, error: Array | None
) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """`(heading, values, errors)` of each column of a variable; a large one has arrays for values."""
    rows = row_dimension(result)
    values, dims = _rows_first(array, rows)
    errors = np.full(values.shape, np.nan)
    if error is not None and error.dims == array.dims and error.values.dtype.kind in "fiu":
        errors = _rows_first(error, rows)[0]
    if not dims or (len(dims) > 1 and values[0].size == 1):
        yield name, values.ravel().tolist(), errors.ravel().tolist()
    elif len(dims) == 1 and values.shape[1] <= MAX_ENTRIES:
        for i, label in enumerate(_entry_labels(result, dims[0], values.shape[1])):
            yield f"{name}{label}", values[:, i].tolist(), errors[:, i].tolist()
    else:
        yield name, list(values), [np.nan] * len(values)


def _rows_first(array: Array, rows: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if not rows:
        return array.values[np.newaxis], array.dims
    axis = array.dims.index(rows)
    return np.moveaxis(array.values, axis, 0), array.dims[:axis] + array.dims[axis + 1 :]


def _entry_labels(result: Result, dim: str, size: int) -> list[str]:
    if dim in result and result.arrays[dim].dims == (dim,):
        labels = result[dim].tolist()
        return [f"[{x}]" if isinstance(x, str) else f"[{dim}={number(x)}]" for x in labels]
    return [""] if size == 1 else [f"[{i}]" for i in range(size)]


def _cell(value: Any, error: float) -> str:
    if isinstance(value, np.ndarray):
        low, high = _range(value)
        return number(low) if low != low else f"{number(low)} … {number(high)}"  # NaN: nothing is known
    return with_error(value, error) if isinstance(value, float) else number(value)


def _range(values: np.ndarray) -> tuple[Any, Any]:
    """Smallest and largest value that is not missing; infinities count."""
    if values.dtype.kind not in "fiu":
        items = sorted(values.ravel().tolist())
        return (items[0], items[-1]) if items else ("", "")
    known = values[~np.isnan(values)]
    return (known.min().item(), known.max().item()) if known.size else (np.nan, np.nan)


def _print_table(result: Result) -> None:
    terminal = sys.stdout.isatty()
    print(f"{result.analyzer}: {result.attributes.get('title', '')}".rstrip(": "))
    table = columns(result, short=terminal)
    constant = _constant(table) if terminal else {}
    table = {name: cells for name, cells in table.items() if name not in constant}
    groups = blocks(table, shutil.get_terminal_size().columns) if terminal else [list(table)]
    for names in groups:
        print()
        right = [n for n in names if not n.startswith(("run", "checkpoint_run", "file", "status"))]
        print_rows(names, list(zip(*(table[n] for n in names), strict=True)), right=right)
    print_matrices(result)
    every_row = [", ".join(f"{name} {cell}" for name, cell in constant.items())] if constant else []
    for title, lines in {"in every row": every_row, **_below(result)}.items():
        if lines:
            print()
            print(title)
            print(indent(_printable("\n".join(lines)), "  "))


def _constant(table: Mapping[str, list[str]]) -> dict[str, str]:
    """Columns of measured values that say the same in every row."""
    labels = ("run", "checkpoint_run", "step", "file", "status")
    return {n: c[0] for n, c in table.items() if len(c) > 1 and len(set(c)) == 1 and not n.startswith(labels)}


def _below(result: Result) -> Mapping[str, list[str]]:
    """What stands under the table: numbers about whole runs, failures, notes."""
    found = result["finding"].astype(str).tolist() if "finding" in result else []
    notes = dict.fromkeys(n for text in np.atleast_1d(result["notes"]).tolist() for n in text.splitlines())
    failures = [f"{what}: {reason}" for what, reason in result.failures()]
    return {"found": found, "whole run": _summary(result), "not ok": failures, "notes": list(notes)}


def _summary(result: Result) -> list[str]:
    """One line for each variable that has no value per row: run-level numbers."""
    rows = row_dimension(result)
    if not rows:
        return []
    variables = {n: a for n, a in result.variables.items() if rows not in a.dims}
    errors = {a.error for a in variables.values()}
    lines = []
    for name in _shown(result, variables):
        array = variables[name]
        if name in errors:
            continue
        if array.dims[:1] == ("run",):
            lines += [
                line
                for i, run in enumerate(np.atleast_1d(result["run"]).tolist())
                for line in _summary_lines(f"{name} of {run}", result, variables, name, i)
            ]
            continue
        lines += _summary_lines(name, result, variables, name, None)
    return lines


def _summary_lines(
    head: str, result: Result, variables: Mapping[str, Array], name: str, piece: int | None
) -> list[str]:
    """The line of one run-level variable, or of one run's part of it."""
    array = variables[name]
    error = variables.get(array.error)
    values, dims = (array.values, array.dims) if piece is None else (array.values[piece], array.dims[1:])
    values = np.asarray(values)
    spread = np.full(values.shape, np.nan)
    if error is not None:
        spread = np.asarray(error.values if piece is None else error.values[piece])
    cells = [_cell(v, e) for v, e in zip(values.ravel().tolist(), spread.ravel().tolist(), strict=True)]
    if len(dims) == 1 and dims[0] in result:
        labels = [f"{dims[0].removeprefix('summary_')} {number(x)}" for x in result[dims[0]].tolist()]
        cells = [f"{cell} ({label})" for label, cell in zip(labels, cells, strict=True)]
    shown = ", ".join(cells) if len(cells) <= MAX_ENTRIES else _cell(values, np.nan)
    return [f"{head}: {shown}" + (f" {array.units}" if array.units not in ("", "1") else "")]


def _printable(text: str) -> str:
    """Text without what a terminal would obey or could not encode."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
