"""Results in the formats of other programs."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from dynprobe.analyzers.core.result import Result
from dynprobe.cli.document import document
from dynprobe.cli.table import records
from dynprobe.io.atomic import write_atomically
from dynprobe.io.errors import InputError
from dynprobe.io.names import suggestion
from dynprobe.io.plain_json import dumps

REPORTS, PARAVIEW = (".nc", ".h5"), (".vts", ".vtp")


def export_result(
    results: Mapping[str, Result], suffix: str, output: Path | None, variable: str | None
) -> list[Path]:
    """Write results in the format that a suffix stands for.

    Args:
        results: By analyzer; a `.csv` and ParaView's files hold only one.
        suffix: `.csv`, `.json`, `.nc`, `.h5`, `.vts`, `.vtp`.
        output: The file; None for stdout (only `.csv` and `.json`).
        variable: For `.csv`, the variable to write as a long table; for ParaView, the height.

    Returns:
        The files written.

    Raises:
        InputError: If the format is not known or does not fit the results.
        CannotWrite: If a file cannot be written.
    """
    if suffix in REPORTS and output is not None:
        from dynprobe.io.report import write_results

        write_results(output, results)
        return [output]
    if suffix == ".json":
        return _emit(dumps([document(r) for r in results.values()], indent=2) + "\n", output)
    if suffix == ".csv":
        result = _only(results)
        return _emit(_csv(tidy(result, variable) if variable else _rows(records(result))), output)
    if suffix in PARAVIEW and output is not None:
        from dynprobe.cli.paraview import write_paraview

        return write_paraview(_only(results), output, variable=variable or "loss")
    known = ", ".join((".csv", ".json", *REPORTS, *PARAVIEW))
    raise InputError(f"{output or suffix}: no such format to export to.", f"The output ends in {known}.")


def tidy(result: Result, variable: str) -> Iterator[list[Any]]:
    """One variable as a long table: a heading, then a line for each value.

    The columns are its labels (run, step, path, status), each further dimension's coordinate or
    index, the value, and its error if it has one.

    Raises:
        InputError: If the result has no such variable.
    """
    if variable not in result.variables:
        tip = suggestion(variable, result.variables)
        raise InputError(f"{result.analyzer}: has no variable {variable!r}.", tip)
    array = result.arrays[variable]
    labels = {d: _labels(result, d, size) for d, size in zip(array.dims, array.values.shape, strict=True)}
    error = result.arrays.get(array.error)
    with_error = error is not None and error.dims == array.dims
    yield [*(n for names, _ in labels.values() for n in names), variable, *([array.error] * with_error)]
    for place in itertools.product(*(range(size) for size in array.values.shape)):
        row = [x for i, (_, rows) in zip(place, labels.values(), strict=True) for x in rows[i]]
        spread = [error.values[place].item()] if error is not None and with_error else []
        yield [*row, _item(array.values[place]), *spread]


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _labels(result: Result, dim: str, size: int) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names of the columns that tell where along a dimension a value stands, and their entries."""
    wanted = (*result.attributes.get("index", ()), "status")
    told = ("run", "checkpoint_run", "step", "path", "status")
    names = [n for n in wanted if n in result and result.arrays[n].dims == (dim,) and n.startswith(told)]
    if dim in result and result.arrays[dim].dims == (dim,) and dim not in names:
        names = [dim, *names]
    if not names:
        return [dim], [(i,) for i in range(size)]
    return names, list(zip(*(result[n].tolist() for n in names), strict=True))


def _only(results: Mapping[str, Result]) -> Result:
    if len(results) != 1:
        raise InputError(
            f"This format holds one result; the report has {', '.join(results) or 'none'}.",
            "Name one with --analyzer, or export to .json.",
        )
    return next(iter(results.values()))


def _rows(table: Mapping[str, list[Any]]) -> Iterator[list[Any]]:
    yield list(table)
    yield from map(list, zip(*table.values(), strict=True))


def _csv(rows: Iterator[list[Any]]) -> str:
    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _emit(text: str, output: Path | None) -> list[Path]:
    if output is None:
        print(text, end="")
        return []
    write_atomically(output, text.encode("utf-8", "backslashreplace"))
    return [output]
