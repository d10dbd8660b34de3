"""Values as affine functions of the outputs of earlier layers: x = Σ_j M_j a_j + c, in float64.

The algebra from which the layers of a network are put together: every linear operation of a forward pass maps
such forms to such forms. Matrices are dense arrays or scipy sparse ones, whatever their operation gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from dynprobe.analyzers.numerics.layered_network import Floats, Matrix, product

Indices = np.ndarray[Any, np.dtype[np.int64]]

MOST_ENTRIES = 50_000_000
"""Stored entries of one matrix; beyond, memory would end before an analysis could begin."""


class TooLarge(Exception):
    """A matrix would have more than `MOST_ENTRIES` entries."""


@dataclass(frozen=True)
class Affine:
    """x = Σ_j M_j a_j + c.

    Args:
        parts: Matrix M_j, (n, n_source), of every source j: 0 is the input, j what layer j - 1 gives.
        constant: c, (n,).
    """

    parts: dict[int, Matrix]
    constant: Floats

    def __len__(self) -> int:
        return len(self.constant)

    @property
    def is_constant(self) -> bool:
        """Whether it depends on nothing."""
        return not self.parts

    def rows(self, index: Indices) -> Affine:
        """Entries in another order, some more than once or not at all; index is (n_new,)."""
        if len(index) == len(self) and np.array_equal(index, np.arange(len(self))):
            return self
        return Affine({j: matrix[index] for j, matrix in self.parts.items()}, self.constant[index])

    def scaled(self, factors: Floats | float) -> Affine:
        """Every entry times its factor, (n,), or all times one."""
        factors = np.broadcast_to(np.asarray(factors, np.float64), self.constant.shape)
        if not factors.any():
            return constant_form(factors * self.constant)
        parts = {j: _scaled_rows(matrix, factors) for j, matrix in self.parts.items()}
        return Affine(parts, factors * self.constant)

    def shifted(self, by: Floats | float) -> Affine:
        """Every entry plus a number, (n,), or all plus one."""
        return Affine(self.parts, self.constant + by)

    def plus(self, other: Affine) -> Affine:
        """The sum, entry by entry."""
        parts = dict(self.parts)
        for j, matrix in other.parts.items():
            parts[j] = _sum(parts[j], matrix) if j in parts else matrix
        return Affine(parts, self.constant + other.constant)

    def minus(self, other: Affine) -> Affine:
        """The difference, entry by entry."""
        return self.plus(other.scaled(-1.0))

    def through(self, matrix: Matrix) -> Affine:
        """`matrix @ x` for a matrix (n_new, n)."""
        parts = {j: _times(matrix, part) for j, part in self.parts.items()}
        return Affine(parts, np.asarray(product(matrix, self.constant)))


def constant_form(values: Floats) -> Affine:
    """Values that depend on nothing, (n,)."""
    return Affine({}, np.asarray(values, np.float64).reshape(-1))


def source_form(source: int, n: int) -> Affine:
    """The values of a source themselves."""
    return Affine({source: sparse.csr_array(sparse.eye(n))}, np.zeros(n))


def stacked(forms: Sequence[Affine]) -> Affine:
    """All entries of several forms, one form after the other."""
    if len(forms) == 1:
        return forms[0]
    parts: dict[int, Matrix] = {}
    for j in sorted({j for form in forms for j in form.parts}):
        width = next(form.parts[j].shape[1] for form in forms if j in form.parts)
        blocks = [form.parts.get(j, sparse.csr_array((len(form), width))) for form in forms]
        parts[j] = sparse.vstack([sparse.csr_array(block) for block in blocks], format="csr")
    return Affine(parts, np.concatenate([form.constant for form in forms]))


def require_entries(n: int) -> None:
    """Stop before a matrix of so many stored entries is made.

    Raises:
        TooLarge: They are more than `MOST_ENTRIES`.
    """
    if n > MOST_ENTRIES:
        raise TooLarge


def _scaled_rows(matrix: Matrix, factors: Floats) -> Matrix:
    if sparse.issparse(matrix):
        return sparse.csr_array(sparse.diags_array(factors) @ matrix)
    return factors[:, None] * matrix


def _sum(a: Matrix, b: Matrix) -> Matrix:
    if sparse.issparse(a) and sparse.issparse(b):
        return sparse.csr_array(a + b)
    return _dense(a) + _dense(b)


def _dense(matrix: Matrix) -> Floats:
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix)


def _times(a: Matrix, b: Matrix) -> Matrix:
    if not (sparse.issparse(a) and sparse.issparse(b)):
        require_entries(a.shape[0] * b.shape[1])
    if not sparse.issparse(b):
        return product(a, b)
    if not sparse.issparse(a):
        return np.asarray(a @ b)
    counts = np.diff(b.indptr)  # entries that row i of b adds to every row of the product that uses it
    require_entries(int(counts[a.indices].sum()))
    return sparse.csr_array(a @ b)
