"""Predictors from files: RDMs, feature tables and class labels, in `.npy`, `.npz`, `.mat` and `.csv`."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist

from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.rdm import Floats, Integers, condensed, n_entries

SUFFIXES = (".npy", ".npz", ".mat", ".csv")


@dataclass(frozen=True)
class _Table:
    """Numbers of a csv file, with the names of the columns where it has them."""

    values: Floats
    names: list[str]


Arrays = dict[str, "np.ndarray | _Table"]


@dataclass(frozen=True)
class Predictor:
    """What a network's RDMs are compared with.

    Attributes:
        name: What figures call it.
        rdms: Shape (1, m), or (n_subjects, m) of a stack.
        stacked: Whether it is a stack of subjects.
    """

    name: str
    rdms: Floats
    stacked: bool = False


def read_predictors(path: str, n: int) -> list[Predictor]:
    """The predictors in a file, each compared with the shapes that n stimuli allow.

    An array is an RDM if it is (n, n), symmetric with a zero diagonal, or has n(n−1)/2 entries; a stack of
    subjects if it is (n_subjects, n, n) or (n_subjects, n(n−1)/2); class labels if it is n strings or n
    integers, giving 0 within and 1 between classes; else n values or an (n, k) table of features, each column
    giving |x_i − x_j|, and all columns together, each divided by its standard deviation, their Euclidean
    distance. In a csv file a column of text, or one whose head ends in `:class`, has labels.

    Args:
        path: The file.
        n: Number of stimuli (samples, or conditions).

    Raises:
        OptionError: If the file is missing, unreadable, or fits n stimuli in none of these ways.
    """
    file = Path(path)
    found: list[Predictor] = []
    for name, array in _read(file, n).items():
        if isinstance(array, _Table) and array.names and array.values.shape != (n, n):
            if len(array.values) != n:
                raise _wrong_shape(str(file), array.values, n)
            found += of_table(file.stem, _finite(str(file), array.values), array.names)
        else:
            plain = array.values if isinstance(array, _Table) else array
            found += _predictors_of(file, name, plain, n)
    if not found:
        raise OptionError(f"{file}: there is no array in it.", "A predictor is an RDM, a table or labels.")
    return found


def read_labels(path: str, n: int) -> tuple[Integers, list[str]]:
    """The condition of every sample, and the conditions' names in order.

    Args:
        path: A `.npy` or `.csv` file of one integer or string for each sample.
        n: Number of samples.

    Returns:
        Shape (n,) from 0, and the names: integers ascending, strings by alphabet.

    Raises:
        OptionError: If the file has not one label for each sample.
    """
    file = Path(path)
    arrays = _read(file, n)
    if len(arrays) != 1:
        raise OptionError(
            f"{file}: {len(arrays)} arrays or columns ({', '.join(arrays)}), and conditions need one.",
            "Give a file with one label for each sample.",
        )
    array = next(iter(arrays.values()))
    array = np.squeeze(array.values if isinstance(array, _Table) else array)
    if array.ndim != 1 or array.dtype.kind not in "iuUSO":
        whole = array.ndim == 1 and array.dtype.kind == "f" and bool((array == np.round(array)).all())
        if not whole:
            raise OptionError(
                f"{file}: {array.dtype} values of shape {array.shape} are no labels.",
                "Conditions are one integer or string for each sample.",
            )
        array = array.astype(np.int64)
    if len(array) != n:
        raise OptionError(
            f"{file}: {len(array):,} labels, and {n:,} samples are measured.", _about_samples(len(array), n)
        )
    names, label = np.unique(array.astype(str) if array.dtype.kind in "SO" else array, return_inverse=True)
    return label.astype(np.int64), [str(name) for name in names]


def of_labels(name: str, labels: Any) -> Predictor:
    """0 between stimuli of one class, 1 between stimuli of two."""
    code = np.unique(np.asarray(labels), return_inverse=True)[1]
    return Predictor(name, pdist(code[:, None].astype(float), "hamming")[None])


def of_table(name: str, table: Floats, columns: list[str]) -> list[Predictor]:
    """Each column as |x_i − x_j|, and all of them together where there are several.

    Args:
        name: Of the table, for all columns together.
        table: Shape (n, k).
        columns: Their names.
    """
    found = [Predictor(c, pdist(table[:, i : i + 1], "cityblock")[None]) for i, c in enumerate(columns)]
    if len(columns) > 1:
        spread = table.std(0)
        scaled = table[:, spread > 0] / spread[spread > 0]
        found.append(Predictor(f"{name} (all)", pdist(scaled)[None] if scaled.size else 0 * found[0].rdms))
    return found


def distinct_names(predictors: list[tuple[str, Predictor]]) -> list[Predictor]:
    """Predictors of several files under names that differ: the file in front where two have one name.

    Args:
        predictors: Each with the word or file that it comes from.

    Raises:
        OptionError: If names agree even so.
    """
    plain = [p.name for _, p in predictors]
    named = [
        replace(p, name=f"{Path(origin).stem}:{p.name}") if plain.count(p.name) > 1 else p
        for origin, p in predictors
    ]
    names = [p.name for p in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"two predictors are called {twice[0]!r}.", "Name each file once, or rename one.")
    return named


def _predictors_of(file: Path, name: str, array: np.ndarray, n: int) -> list[Predictor]:
    """What one array is, by its shape and type."""
    where = f"{file}: {name!r}" if name != file.stem else str(file)
    m = n_entries(n)
    array = np.squeeze(array) if array.ndim > 1 and 1 in array.shape else array
    if array.dtype.kind in "USO" or (array.dtype.kind in "iub" and array.shape == (n,)):
        if array.shape != (n,):
            raise _wrong_shape(where, array, n)
        return [_checked_classes(where, of_labels(name, array.astype(str)), n)]
    if array.dtype.kind not in "iufb":
        raise OptionError(f"{where}: {array.dtype} values are no numbers.", "Save numbers or strings.")
    values = _finite(where, array.astype(np.float64))
    if values.shape == (n, n):
        return [Predictor(name, _one_rdm(where, values)[None])]
    if values.shape == (m,) and m != n:
        return [Predictor(name, values[None])]
    if values.ndim == 3 and values.shape[:2] == (n, n) and values.shape[2] != n:
        values = np.moveaxis(values, 2, 0)  # how MATLAB stacks
    if values.ndim == 3 and values.shape[1:] == (n, n):
        return [Predictor(name, np.stack([_one_rdm(where, one) for one in values]), len(values) > 1)]
    if values.ndim == 2 and values.shape[1] == m and len(values) != n:
        return [Predictor(name, values, len(values) > 1)]
    if values.shape == (n,):
        return of_table(name, values[:, None], [name])
    if values.ndim == 2 and len(values) == n:
        return of_table(name, values, [f"{name}[{i}]" for i in range(values.shape[1])])
    raise _wrong_shape(where, array, n)


def _finite(where: str, values: Floats) -> Floats:
    if bad := int((~np.isfinite(values)).sum()):
        raise OptionError(
            f"{where}: {bad} of {values.size} values are NaN or infinite.",
            "Leave those stimuli or columns out.",
        )
    return values


def _one_rdm(where: str, matrix: Floats) -> Floats:
    scale = np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > 1e-6 * scale:
        raise OptionError(
            f"{where}: a square matrix of {len(matrix)} stimuli that is not symmetric is no RDM.",
            "Save a table of features with another number of columns, or the RDM's upper triangle alone.",
        )
    if np.abs(np.diagonal(matrix)).max() > 1e-6 * scale:
        raise OptionError(
            f"{where}: an RDM of {len(matrix)} stimuli has zeros on its diagonal, this matrix has not.",
            "If it holds similarities such as correlations, save 1 minus them.",
        )
    return condensed((matrix + matrix.T) / 2)


def _checked_classes(where: str, predictor: Predictor, n: int) -> Predictor:
    if predictor.rdms.min() == 1:
        raise OptionError(
            f"{where}: all {n} labels differ, so that no two stimuli are of one class.",
            "Is it a column of names? Leave it out.",
        )
    return predictor


def _wrong_shape(where: str, array: np.ndarray, n: int) -> OptionError:
    return OptionError(
        f"{where}: shape {array.shape} fits {n} stimuli neither as an RDM ({n}, {n}) or {n_entries(n):,} "
        f"entries, nor as a stack of them, nor as labels or a table of {n} rows.",
        _about_samples(len(array) if array.ndim else 0, n),
    )


def _about_samples(rows: int, n: int) -> str:
    if rows > n:
        return "Its rows have to be those of the samples measured: leave out --samples, or save that part."
    return "Give one row for each sample measured (for each condition with --conditions), in their order."


def _read(file: Path, n: int) -> Arrays:
    """Arrays by name; nothing in a file is executed."""
    if file.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{file}: this kind of file is not read.", f"Give one of {', '.join(SUFFIXES)}.")
    if not file.is_file():
        raise OptionError(f"{file}: there is no such file.", "Several are separated by commas.")
    try:
        return _read_csv(file, n) if file.suffix.lower() == ".csv" else _READERS[file.suffix.lower()](file)
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

    arrays = {}
    for name, value in loadmat(str(file)).items():
        if name.startswith("__"):
            continue
        if value.dtype.kind == "O":  # a cell array of strings
            value = np.array([str(np.squeeze(cell)) for cell in value.ravel()])
        arrays[name] = np.char.strip(value) if value.dtype.kind == "U" else value
    return arrays


def _read_csv(file: Path, n: int) -> Arrays:
    """Numbers as one table, each column of text as labels; the first row is a head where rows are n + 1."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    if not rows:
        return {}
    width = len(rows[0])
    if ragged := next((i for i, row in enumerate(rows) if len(row) != width), None):
        raise OptionError(
            f"{file}: row {ragged + 1} has {len(rows[ragged])} entries, the first has {width}.",
            "Every row needs one value for each column.",
        )
    numeric = [[_is_number(cell) for cell in row] for row in rows]
    headed = len(rows) == n + 1 or (not any(numeric[0]) and any(map(any, numeric)))
    head = rows[0] if headed else [f"{file.stem}[{i}]" for i in range(width)]
    if len(set(head)) < len(head):
        raise OptionError(f"{file}: two columns have one name.", "Give every column a name of its own.")
    columns = np.array(rows[headed:])
    labels = [head[i].endswith(":class") or not all(row[i] for row in numeric[headed:]) for i in range(width)]
    numbers = [i for i in range(width) if not labels[i]]
    arrays: Arrays = {head[i].removesuffix(":class"): columns[:, i] for i in range(width) if labels[i]}
    if numbers:
        names = [head[i] for i in numbers] if headed else []
        arrays = {file.stem: _Table(columns[:, numbers].astype(np.float64), names), **arrays}
    return arrays


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


_READERS: Mapping[str, Any] = {".npy": _read_npy, ".npz": _read_npz, ".mat": _read_mat}
