"""Per-sample gradients of one parameter in the form a layer gives them: products of small factors.

A layer's gradient of one sample is a sum of outer products over positions, g_i = Σ_p l_ip r_ipᵀ. Norms, inner
products and weighted sums follow from the factors l and r, mostly without ever forming g_i.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 2**23
"""Entries of a temporary matrix: 64 MB in float64."""
KEPT = 2**26
"""Entries of gradients that are formed once and kept: 256 MB in float32."""


class Factor(Protocol):
    """Per-sample gradients g_i of one parameter tensor, for n samples."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it keeps."""

    @property
    def n_entries(self) -> int:
        """Entries of all n gradients when they are formed."""

    def squared_norm(self) -> Tensor:
        """‖g_i‖², shape (n,), float64."""

    def gram(self, other: Factor) -> Tensor:
        """g_i·h_j with the samples of another factor of the same parameter, shape (n, m), float64."""

    def dot(self, vector: Tensor) -> Tensor:
        """g_i·v for v in the parameter's shape, shape (n,), float64."""

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_i w_i g_i in the parameter's shape, float64."""

    def blocks(self) -> Iterator[Tensor]:
        """The gradients themselves, some samples at a time, shapes (k, n_entries)."""


class Dense:
    """Gradients kept as they are.

    Args:
        gradients: Shape (n, *parameter).
    """

    def __init__(self, gradients: Tensor) -> None:
        self._rows = gradients.reshape(len(gradients), -1)
        self._shape = gradients.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it keeps."""
        return self._rows.nbytes

    @property
    def n_entries(self) -> int:
        """Entries of all n gradients when they are formed."""
        return self._rows.numel()

    def squared_norm(self) -> Tensor:
        """‖g_i‖², shape (n,), float64."""
        return _squared(self._rows)

    def gram(self, other: Factor) -> Tensor:
        """g_i·h_j with the samples of another factor of the same parameter, shape (n, m), float64."""
        return _explicit_gram(self, other)

    def dot(self, vector: Tensor) -> Tensor:
        """g_i·v for v in the parameter's shape, shape (n,), float64."""
        return (self._rows @ vector.to(self._rows).reshape(-1)).double()

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_i w_i g_i in the parameter's shape, float64."""
        return (weights.to(self._rows) @ self._rows).double().reshape(self._shape)

    def blocks(self) -> Iterator[Tensor]:
        """The gradients themselves, shape (n, n_entries)."""
        yield self._rows

    def __add__(self, other: Dense) -> Dense:
        return Dense((self._rows + other._rows).reshape(-1, *self._shape))


class Outer:
    """Gradients g_i = Σ_p l_ip r_ipᵀ, kept as their factors.

    One position (a Linear layer on vectors) makes ‖g_i‖² = ‖l_i‖²‖r_i‖² and g_i·h_j = (l_i·l'_j)(r_i·r'_j);
    several make double sums over positions ("ghost" norms), or are formed block by block where that takes
    fewer operations.

    Args:
        left: Shape (n, positions, rows).
        right: Shape (n, positions, columns).
        shape: The parameter's, of rows x columns entries.

    References:
        Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799 (2015), for one position.
        Li, Tramèr, Liang and Hashimoto, "Large language models can be strong differentially private
        learners", ICLR 2022, §4 (ghost clipping), for several.
    """

    def __init__(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> None:
        self.left, self.right, self._shape = left, right, tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it keeps."""
        return self.left.nbytes + self.right.nbytes

    @property
    def n_entries(self) -> int:
        """Entries of all n gradients when they are formed."""
        return len(self.left) * math.prod(self._shape)

    def squared_norm(self) -> Tensor:
        """‖g_i‖², shape (n,), float64."""
        if self.left.shape[1] == 1:
            return _squared(self.left[:, 0]) * _squared(self.right[:, 0])
        if not self._ghost(self.left.shape[1]):
            return torch.cat([_squared(block) for block in self.blocks()])
        left, right = self.left @ self.left.mT, self.right @ self.right.mT
        return (left.double() * right.double()).sum((1, 2))

    def gram(self, other: Factor) -> Tensor:
        """g_i·h_j with the samples of another factor of the same parameter, shape (n, m), float64."""
        if not isinstance(other, Outer) or not self._ghost(other.left.shape[1]):
            return _explicit_gram(self, other)
        positions = self.left.shape[1]
        m, others, _ = other.left.shape
        their_left, their_right = other.left.flatten(0, 1).mT, other.right.flatten(0, 1).mT
        step = max(1, BLOCK // max(1, positions * m * others))
        found = []
        for left, right in zip(torch.split(self.left, step), torch.split(self.right, step), strict=True):
            pairs = (left.flatten(0, 1) @ their_left).double() * (right.flatten(0, 1) @ their_right).double()
            found.append(pairs.reshape(len(left), positions, m, others).sum((1, 3)))
        return torch.cat(found)

    def dot(self, vector: Tensor) -> Tensor:
        """g_i·v for v in the parameter's shape, shape (n,), float64."""
        matrix = vector.to(self.left).reshape(self.left.shape[2], self.right.shape[2])
        return ((self.left @ matrix).double() * self.right.double()).sum((1, 2))

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_i w_i g_i in the parameter's shape, float64."""
        left = (self.left * weights.to(self.left)[:, None, None]).flatten(0, 1)
        return (left.mT @ self.right.flatten(0, 1)).double().reshape(self._shape)

    def blocks(self) -> Iterator[Tensor]:
        """The gradients themselves, some samples at a time, shapes (k, n_entries)."""
        step = max(1, BLOCK // max(1, self.left.shape[2] * self.right.shape[2]))
        for left, right in zip(torch.split(self.left, step), torch.split(self.right, step), strict=True):
            yield (left.mT @ right).flatten(1)

    def _ghost(self, others: int) -> bool:
        """Whether sums over pairs of positions cost less than the gradients' own entries."""
        rows, columns = self.left.shape[2], self.right.shape[2]
        return self.left.shape[1] * others * (rows + columns) <= rows * columns or others <= 1


class Rows:
    """Gradients with few rows that are not zero, as of an embedding: row index_ip of g_i gains values_ip.

    Args:
        index: Shape (n, positions), whole numbers below the number of rows.
        values: Shape (n, positions, columns).
        shape: The parameter's, (rows, columns).
    """

    def __init__(self, index: Tensor, values: Tensor, shape: Sequence[int]) -> None:
        self.index, self.values, self._shape = index, values, tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it keeps."""
        return self.index.nbytes + self.values.nbytes

    @property
    def n_entries(self) -> int:
        """Entries of all n gradients when they are formed."""
        return len(self.index) * math.prod(self._shape)

    def squared_norm(self) -> Tensor:
        """‖g_i‖², shape (n,), float64."""
        sample, _, rows = self._merged()
        return rows.new_zeros(len(self.index)).index_add_(0, sample, rows.square().sum(1))

    def gram(self, other: Factor) -> Tensor:
        """g_i·h_j with the samples of another factor of the same parameter, shape (n, m), float64."""
        if not isinstance(other, Rows):
            return _explicit_gram(self, other)
        sample, row, values = self._merged()
        their_sample, their_row, theirs = other._merged()
        theirs = theirs.to(other.values.dtype).mT
        found = values.new_zeros(len(self.index), len(other.index))
        step = max(1, BLOCK // max(1, len(their_row)))
        for first in range(0, len(row), step):
            part = slice(first, first + step)
            pairs = (values[part].to(self.values.dtype) @ theirs).double()
            pairs *= row[part, None] == their_row
            by_sample = pairs.new_zeros(len(pairs), len(other.index)).index_add_(1, their_sample, pairs)
            found.index_add_(0, sample[part], by_sample)
        return found

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that are not zero, those of one sample at one index added up: samples, indices, values."""
        n = len(self.index)
        place = torch.arange(n, device=self.index.device)[:, None] * self._shape[0] + self.index.long()
        places, where = torch.unique(place.flatten(), return_inverse=True)
        rows = self.values.new_zeros(len(places), self.values.shape[2], dtype=torch.float64)
        rows.index_add_(0, where, self.values.flatten(0, 1).double())
        return places // self._shape[0], places % self._shape[0], rows

    def dot(self, vector: Tensor) -> Tensor:
        """g_i·v for v in the parameter's shape, shape (n,), float64."""
        return (vector.to(self.values)[self.index] * self.values).double().sum((1, 2))

    def combine(self, weights: Tensor) -> Tensor:
        """Σ_i w_i g_i in the parameter's shape, float64."""
        rows = (self.values.double() * weights.to(self.values.device).double()[:, None, None]).flatten(0, 1)
        return rows.new_zeros(self._shape).index_add_(0, self.index.flatten(), rows)

    def blocks(self) -> Iterator[Tensor]:
        """The gradients themselves, some samples at a time, shapes (k, n_entries)."""
        return self.as_outer().blocks()

    def as_outer(self) -> Outer:
        """The same with the rows as unit vectors."""
        unit = self.values.new_zeros(*self.index.shape, self._shape[0])
        return Outer(unit.scatter_(2, self.index.long()[..., None], 1), self.values, self._shape)


def outer(left: Tensor, right: Tensor, shape: Sequence[int]) -> Factor:
    """Σ_p l_ip r_ipᵀ in whichever form takes less memory: the factors, or the gradients themselves.

    Args:
        left: Shape (n, positions, rows).
        right: Shape (n, positions, columns).
        shape: The parameter's.
    """
    positions, rows, columns = left.shape[1], left.shape[2], right.shape[2]
    if positions > 1 and rows * columns <= positions * (rows + columns):
        return Dense((left.mT @ right).reshape(-1, *shape))
    return Outer(left, right, shape)


def nothing(n: int, like: Tensor) -> Factor:
    """Gradients that are zero, for n samples of a parameter: a sum over no positions."""
    rows = like.shape[0] if like.dim() else 1
    empty = like.detach().new_zeros(n, 0, 1)
    return Outer(empty.expand(n, 0, rows), empty.expand(n, 0, like.numel() // max(1, rows)), like.shape)


def total(factors: Sequence[Factor]) -> Factor:
    """The sum of the contributions of several uses of one parameter (a tied weight, a layer called twice)."""
    if len(factors) == 1:
        return factors[0]
    rows = [factor for factor in factors if isinstance(factor, Rows)]
    if len(rows) == len(factors):
        index = torch.cat([factor.index for factor in rows], 1)
        return Rows(index, torch.cat([factor.values for factor in rows], 1), rows[0]._shape)
    factors = [factor.as_outer() if isinstance(factor, Rows) else factor for factor in factors]
    outers = [factor for factor in factors if isinstance(factor, Outer)]
    if len(outers) == len(factors):
        left = torch.cat([factor.left for factor in outers], 1)
        return outer(left, torch.cat([factor.right for factor in outers], 1), outers[0]._shape)
    dense = [factor if isinstance(factor, Dense) else _formed(factor) for factor in factors]
    return functools.reduce(operator.add, dense)


def joined(factors: Sequence[Factor]) -> Factor:
    """One factor for the samples of several of the same form, in order."""
    outers = [factor for factor in factors if isinstance(factor, Outer)]
    if not outers:
        dense = [factor for factor in factors if isinstance(factor, Dense)]
        return Dense(torch.cat([factor._rows for factor in dense]).reshape(-1, *dense[0]._shape))
    left, right = (torch.cat([getattr(factor, side) for factor in outers]) for side in ("left", "right"))
    return Outer(left, right, outers[0]._shape)


def _formed(factor: Factor) -> Dense:
    assert isinstance(factor, Outer)
    return Dense(torch.cat(list(factor.blocks())).reshape(-1, *factor._shape))


def _squared(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norm.square()


def _explicit_gram(one: Factor, other: Factor) -> Tensor:
    """Of the gradients themselves; those of the second factor are formed once where they are few enough."""
    theirs = list(other.blocks()) if other.n_entries <= KEPT else None
    mine = theirs if theirs is not None and one is other else one.blocks()
    rows = []
    for a in mine:
        rows.append(
            torch.cat([(a @ b.mT).double() for b in (other.blocks() if theirs is None else theirs)], 1)
        )
    return torch.cat(rows)
