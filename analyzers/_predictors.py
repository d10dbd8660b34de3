"""Predictors from files: what an array is by its shape, an RDM, features or class labels."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist

from dynprobe.analyzers._predictor_files import Table, read_arrays
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.rdm import Floats, Integers, condensed, n_entries

Room = Callable[[int], None]
"""Raises where so many more RDMs would not fit in memory."""
DISTANCE = "|x_i - x_j|"


@dataclass(frozen=True)
class Predictor:
    """What a network's RDMs are compared with.

    Attributes:
        name: What figures call it.
        rdms: Shape (1, m), or (n_subjects, m) of a stack.
        kind: How it was read, as a reader is told.
    """

    name: str
    rdms: Floats
    kind: str

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of subjects."""
        return len(self.rdms) > 1


def read_predictors(
    path: str, n: int, classes: Collection[str] = (), room: Room | None = None
) -> list[Predictor]:
    """The predictors in a file, each compared with the shapes that n stimuli allow.

    An array is an RDM if it is (n, n), symmetric with a zero diagonal, or has n(n−1)/2 entries; a stack of
    subjects if it is (n_subjects, n, n) or (n_subjects, n(n−1)/2); class labels, 0 within and 1 between, if
    it is text; else n numbers or an (n, k) table of features, each column giving |x_i − x_j|, and all columns
    together, each divided by its standard deviation, their Euclidean distance. The rule is the same for all
    kinds of files: whole numbers are labels only where they are said to be.

    Args:
        path: The file.
        n: Number of stimuli (samples, or conditions).
        classes: Names of predictors whose numbers are class labels.
        room: Called with their number before RDMs are made.

    Raises:
        OptionError: If the file is missing, unreadable, or fits n stimuli in none of these ways.
    """
    file = Path(path)
    reader, content = _Reader(file, n, frozenset(classes), room or _any), read_arrays(file, n)
    found = [predictor for name, array in content.arrays.items() for predictor in reader.of(name, array)]
    if content.note:
        found = [replace(predictor, kind=f"{predictor.kind}, {content.note}") for predictor in found]
    if not found:
        raise OptionError(f"{file}: there is no array in it.", "A predictor is an RDM, a table or labels.")
    return found


def _any(more: int) -> None:
    """There is room for any number of RDMs."""
    del more


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
    arrays = read_arrays(file, n).arrays
    if len(arrays) != 1:
        raise OptionError(
            f"{file}: {len(arrays)} arrays or columns ({', '.join(arrays)}), and conditions need one.",
            "Give a file with one label for each sample.",
        )
    array = next(iter(arrays.values()))
    array = np.squeeze(array.values if isinstance(array, Table) else array)
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
            f"{file}: {len(array):,} labels, and {n:,} samples are measured.",
            "Give one label for each sample measured, in their order.",
        )
    names, label = np.unique(array.astype(str) if array.dtype.kind in "SO" else array, return_inverse=True)
    return label.astype(np.int64), [str(name) for name in names]


def of_labels(name: str, labels: Any) -> Predictor:
    """0 between stimuli of one class, 1 between stimuli of two."""
    found, code = np.unique(np.asarray(labels), return_inverse=True)
    rdm = pdist(code[:, None].astype(float), "hamming")
    return Predictor(name, rdm[None], f"classes ({len(found)})")


def of_numbers(name: str, values: Floats) -> Predictor:
    """|x_i − x_j| of one number for each stimulus."""
    whole = bool((values == np.round(values)).all()) and 2 < len(np.unique(values)) <= len(values) // 2
    kind = f"{DISTANCE} of whole numbers (where they are class labels, name them in --classes)"
    return Predictor(name, pdist(values[:, None], "cityblock")[None], kind if whole else DISTANCE)


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


@dataclass(frozen=True)
class _Reader:
    """What the arrays of a file are, by their shape and type."""

    file: Path
    n: int
    classes: frozenset[str]
    room: Room

    def of(self, name: str, array: np.ndarray | Table) -> list[Predictor]:
        """The predictors that an array is."""
        where = f"{self.file}: {name!r}" if name != self.file.stem else str(self.file)
        plain = array.values if isinstance(array, Table) else array
        if isinstance(array, Table) and array.names and plain.shape != (self.n, self.n):
            return self._columns(where, name, plain, array.names)
        found = self._of_plain(where, name, plain)
        if name in self.classes and not found[0].kind.startswith("classes"):
            raise OptionError(
                f"{where}: --classes {name}, and shape {plain.shape} is no list of labels.",
                "Labels are one for each stimulus; of a table, name the columns.",
            )
        return found

    def _of_plain(self, where: str, name: str, array: np.ndarray) -> list[Predictor]:
        n, m = self.n, n_entries(self.n)
        array = np.squeeze(array) if array.ndim > 1 and 1 in array.shape else array
        if array.dtype.kind in "US":
            if array.shape != (n,):
                raise _wrong_shape(where, array, n)
            self.room(1)
            return [_checked_classes(where, of_labels(name, array.astype(str)), n)]
        if array.dtype.kind not in "iufb":
            raise OptionError(f"{where}: {array.dtype} values are no numbers.", "Save numbers or strings.")
        values = array.astype(np.float64)
        if values.shape == (n, n):
            return self._rdms(where, name, values[None])
        if values.shape == (m,) and m != n:
            return self._rdms(where, name, values[None])
        if values.ndim == 3 and values.shape[:2] == (n, n) and values.shape[2] != n:
            values = np.moveaxis(values, 2, 0)  # how MATLAB stacks
        if values.ndim == 3 and values.shape[1:] == (n, n):
            return self._rdms(where, name, values)
        if values.ndim == 2 and values.shape[1] == m:
            if len(values) == n:
                raise OptionError(
                    f"{where}: shape {values.shape} is {n} RDMs, or a table of {m:,} features.",
                    f"Save RDMs as ({n}, {n}, {n}), or features with another number of columns.",
                )
            return self._rdms(where, name, values)
        if values.shape == (n,):
            return self._columns(where, name, values[:, None], [name])
        if values.ndim == 2:
            return self._columns(where, name, values, [f"{name}[{i}]" for i in range(values.shape[1])])
        raise _wrong_shape(where, array, n)

    def _rdms(self, where: str, name: str, values: Floats) -> list[Predictor]:
        """One RDM, or those of several subjects, each square or condensed."""
        self.room(len(values))
        _finite(where, values)
        rdms = np.stack([_one_rdm(where, one) for one in values]) if values.ndim == 3 else values
        return [Predictor(name, rdms, "RDM" if len(rdms) == 1 else f"RDMs of {len(rdms)} subjects")]

    def _columns(self, where: str, name: str, table: Floats, columns: list[str]) -> list[Predictor]:
        """Each column by itself, and those of numbers together where there are several."""
        if len(table) != self.n:
            raise _wrong_shape(where, table, self.n)
        self.room(len(columns) + 1)
        _finite(where, table)
        found, numbers = [], []
        for i, column in enumerate(columns):
            if column in self.classes:
                labels = of_labels(column, table[:, i])
                found.append(_checked_classes(f"{where}: {column}", labels, self.n))
            else:
                found.append(of_numbers(column, table[:, i]))
                numbers.append(i)
        if len(numbers) > 1:
            table = table[:, numbers]
            spread = table.std(0)
            scaled = table[:, spread > 0] / spread[spread > 0]
            rdm = pdist(scaled) if scaled.size else np.zeros(n_entries(self.n))
            kind = f"Euclidean distance of {len(numbers)} columns, each over its standard deviation"
            found.append(Predictor(f"{name} (all)", rdm[None], kind))
        return found


def _finite(where: str, values: Floats) -> None:
    if bad := int((~np.isfinite(values)).sum()):
        raise OptionError(
            f"{where}: {bad} of {values.size} values are NaN or infinite.",
            "Leave those stimuli or columns out.",
        )


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
        "Give one row for each sample measured (for each condition with --conditions), in their order.",
    )
