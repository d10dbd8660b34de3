"""Arrays and tables in `.npy`, `.npz`, `.mat` and `.csv` files; nothing in a file is executed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.rdm import Floats

SUFFIXES = (".npy", ".npz", ".mat", ".csv")
DELIMITERS = {";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Table:
    """Numbers of a csv file, shape (rows, columns), with the names of the columns where it has them."""

    values: Floats
    names: list[str]


Arrays = dict[str, "np.ndarray | Table"]


@dataclass(frozen=True)
class Content:
    """What is in a file.

    Attributes:
        arrays: By name; of a csv file its numbers as one table, and each column of text by itself.
        note: What was left out, for the reader; empty where nothing was.
    """

    arrays: Arrays
    note: str = ""


def read_arrays(file: Path, n: int) -> Content:
    """What is in a file.

    Args:
        file: The file.
        n: Number of stimuli, which tells whether a csv file has a head.

    Raises:
        OptionError: If the file is missing or unreadable, or a csv file is no table of numbers and text.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{file}: this kind of file is not read.", f"Give one of {', '.join(SUFFIXES)}.")
    if not file.is_file():
        raise OptionError(f"{file}: there is no such file.", "Several are separated by commas.")
    try:
        if file.suffix.lower() == ".csv":
            return _read_csv(file, n)
        return Content(_READERS[file.suffix.lower()](file))
    except OptionError:
        raise
    except NotImplementedError as error:  # scipy's word for MATLAB 7.3
        raise OptionError(f"{file}: {error}", "Save it with -v7, or as .npy.") from error
    except Exception as error:
        raise OptionError(
            f"{file}: it cannot be read: {type(error).__name__}: {error}",
            "Arrays of Python objects are refused; save plain numbers or strings.",
        ) from error


def _read_npy(file: Path) -> Arrays:
    return {file.stem: np.load(file, allow_pickle=False)}


def _read_npz(file: Path) -> Arrays:
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_mat(file: Path) -> Arrays:
    from scipy.io import loadmat
    from scipy.sparse import issparse

    arrays: Arrays = {}
    for name, value in loadmat(str(file)).items():
        if name.startswith("__"):
            continue
        array = value.toarray() if issparse(value) else value
        if array.dtype.kind == "O":
            array = _strings(f"{file}: {name!r}", array)
        arrays[name] = np.char.strip(array) if array.dtype.kind == "U" else array
    return arrays


def _strings(where: str, cells: np.ndarray) -> np.ndarray:
    """A cell array of strings as an array of them."""
    if any(np.asarray(cell).dtype.kind != "U" or np.size(cell) > 1 for cell in cells.ravel()):
        raise OptionError(
            f"{where}: a cell array or struct of anything but strings has no shape to be read by.",
            "Save numbers as a matrix; RDMs of several subjects as (n, n, subjects).",
        )
    return np.array([str(np.squeeze(cell)) if np.size(cell) else "" for cell in cells.ravel()])


def _read_csv(file: Path, n: int) -> Content:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    if not rows:
        return Content({})
    width = len(rows[0])
    for delimiter, name in DELIMITERS.items():
        if all(delimiter in row[0] for row in rows):
            raise OptionError(
                f"{file}: its values are separated by {name}.",
                "Separate them by commas, with points in numbers.",
            )
    if ragged := next((i for i, row in enumerate(rows) if len(row) != width), None):
        raise OptionError(
            f"{file}: row {ragged + 1} has {len(rows[ragged])} entries, the first has {width}.",
            "Every row needs one value for each column.",
        )
    headed = _has_head(rows, n)
    head = rows[0] if headed else [f"{file.stem}[{i}]" for i in range(width)]
    named_rows = headed and not head[0] and width > 1  # as pandas writes them
    if named_rows:
        head, rows = head[1:], [row[1:] for row in rows]
    if len(set(head)) < len(head):
        raise OptionError(f"{file}: two columns have one name.", "Give every column a name of its own.")
    columns = list(zip(*rows[headed:], strict=True))
    text = [_is_text(f"{file}: column {head[i]!r}", column, 1 + headed) for i, column in enumerate(columns)]
    numbers = [i for i, textual in enumerate(text) if not textual]
    arrays: Arrays = {}
    if numbers:
        values = np.array([columns[i] for i in numbers]).T.astype(np.float64)
        arrays[file.stem] = Table(values, [head[i] for i in numbers] if headed else [])
    arrays |= {head[i]: np.array(columns[i]) for i, textual in enumerate(text) if textual}
    return Content(arrays, "the file's unnamed first column left out" if named_rows else "")


def _has_head(rows: list[list[str]], n: int) -> bool:
    """Whether the first row has the columns' names.

    It has where it alone has no numbers, or where there is one row more than stimuli and it has what is
    neither a number nor a label below, or numbers the columns (0, 1, …).
    """
    first, rest = rows[0], rows[1:]
    if not any(map(_is_number, first)) and any(_is_number(cell) for row in rest for cell in row):
        return True
    numbered = first == [str(i) for i in range(len(first))]
    names = [i for i, cell in enumerate(first) if not _is_number(cell)]
    repeated = any(row[i] == first[i] for row in rest for i in names)
    return len(rows) == n + 1 and (numbered or (bool(names) and not repeated))


def _is_text(where: str, column: tuple[str, ...], first_row: int) -> bool:
    """Whether a column is text and not numbers.

    Raises:
        OptionError: If it is both, or a cell is empty.
    """
    numeric = [_is_number(cell) for cell in column]
    if "" in column:
        raise OptionError(
            f"{where}: row {column.index('') + first_row} is empty.", "Leave that stimulus or column out."
        )
    if any(numeric) and not all(numeric):
        few = 2 * sum(numeric) < len(numeric)  # numbers are fewer than text
        odd = numeric.index(few)
        raise OptionError(
            f"{where}: row {odd + first_row} is {column[odd]!r}, among {'text' if few else 'numbers'}.",
            "A column is all numbers, or all text (class labels).",
        )
    return not all(numeric)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


_READERS: Mapping[str, Any] = {".npy": _read_npy, ".npz": _read_npz, ".mat": _read_mat}
