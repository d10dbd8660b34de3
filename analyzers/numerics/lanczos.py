"""Extreme eigenpairs of a symmetric operator by Lanczos, with a residual for each.

Full reorthogonalisation (two passes of Gram-Schmidt against every basis vector): without it converged
eigenvalues come back as ghosts, 15 to 18 of a "top 20" in a peer. Residuals are made with one more product
each, so they hold whatever rounding did to the basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SECOND_START = 10
"""Products given to the search for a further copy: enough for a dominant eigenvalue to show itself."""

Which = Literal["LA", "SA", "LM", "BE"]
Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs and what vouches for them.

    Attributes:
        eigenvalue: Shape (k,), float64. Order: LA and BE descending, SA ascending, LM by magnitude.
        eigenvector: Shape (k, n), unit rows; the entry of largest magnitude is positive.
        residual: ‖Hv − λv‖ of each returned pair, from a product of its own. Shape (k,).
        error_bound: Bound on the distance to an exact eigenvalue: min(r, r²/gap), never under the rounding
            floor. That nothing lies beyond the end of the spectrum, no residual can prove. Shape (k,).
        converged: Which pairs meet the tolerance. Shape (k,), bool.
        n_matvec: Products spent, those for the residuals included.
        orthogonality: max |QᵀQ − I| of the Krylov basis.
    """

    eigenvalue: NDArray[np.float64]
    eigenvector: Tensor
    residual: NDArray[np.float64]
    error_bound: NDArray[np.float64]
    converged: NDArray[np.bool_]
    n_matvec: int
    orthogonality: float


def lanczos(
    matvec: Matvec,
    n: int,
    *,
    k: int = 1,
    which: Which = "LA",
    tol: float = 1e-4,
    max_iter: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    rounding: float | None = None,
    relative_to: Literal["pair", "norm"] = "pair",
    second_start: bool = True,
) -> Eigenpairs:
    """Computes k eigenpairs at the end(s) of the spectrum of a symmetric operator.

    Stops when every wanted pair's bound min(r, r²/gap) is below `tol` times |λ| (or times the spectral norm).
    With more than one pair wanted at an end, a second random start beside the found vectors looks for further
    copies of a multiple eigenvalue, which the Krylov space of one start vector cannot hold.

    Memory: one vector of length n per product. A start vector that misses an eigenvector exactly would never
    find it, so a warm `start` gets a random tenth added.

    Args:
        matvec: v ↦ Hv for a vector of shape (n,); H must be symmetric.
        n: Dimension.
        k: How many pairs; at most n.
        which: "LA" largest, "SA" smallest (most negative), "LM" largest magnitude, "BE" both ends
            (the larger half from the top).
        tol: Relative tolerance of the eigenvalues.
        max_iter: Largest number of basis vectors; n or 20 k + 100, whichever is smaller, when None.
        seed: Of the random start vectors (drawn on the CPU, the same on every device).
        dtype: Of the basis. Projected matrix and error bounds are float64 in any case.
        device: Of the basis.
        start: Warm start, shape (n,), e.g. the sum of a neighbour's eigenvectors.
        rounding: Relative noise of `matvec` (epsilon of the dtype it computes in); that of `dtype` when None.
        relative_to: What `tol` is relative to: each pair's |λ|, or the largest |λ| seen (for ratios such as
            λmin/λmax, where the small one may be near zero).
        second_start: Whether to look for further copies; costs max(k, 10) products.

    Returns:
        The pairs. `converged` is False for a pair that max_iter cut short, and for all if `matvec` is not
        finite (eigenvalues are then NaN).

    Raises:
        ValueError: k out of range, or an unknown `which`.

    References:
        Parlett, "The Symmetric Eigenvalue Problem" (1998), chapters 11 and 13.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the dimension {n}, got {k}.")
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f"`which` must be LA, SA, LM or BE, got {which!r}.")
    floor = rounding if rounding is not None else float(torch.finfo(dtype).eps)
    generator = torch.Generator().manual_seed(seed)
    space = _Krylov(matvec, n, dtype, torch.device(device), generator)
    space.restart(start)
    limit = min(n, max_iter if max_iter is not None else 20 * k + 100)
    stop = _Stop(k, which, tol, floor, relative_to)

    _expand(space, limit, stop)
    several = k > 2 or (k == 2 and which != "BE")
    while second_start and several and space.finite and space.size < limit:
        before = space.ritz()[0]
        space.restart(None)
        _expand(space, limit, stop, at_least=space.size + max(k, SECOND_START))
        if not space.finite or stop.unchanged(before, space.ritz()[0]):
            break
    return _finish(space, stop)


class _Krylov:
    """Orthonormal basis Q grown by products, with the projected matrix QᵀHQ and the residual block.

    A restart appends a new random chain to the same basis. The tail of the old chain (the part of H q outside
    the basis) is kept, so that Ritz residuals stay exact: H Q s − θ Q s is Σ tail · its entry of s.
    """

    def __init__(
        self, matvec: Matvec, n: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.matvec, self.n = matvec, n
        self.generator = generator
        self.basis = torch.empty((min(n, 32), n), dtype=dtype, device=device)
        self.projected = np.zeros((0, 0))
        self.size = 0
        self.n_matvec = 0
        self.finite = True
        self.tails: dict[int, Tensor] = {}
        self._next: Tensor | None = None
        self._from: int | None = None

    def restart(self, start: Tensor | None) -> None:
        """Begins a new chain at a random vector, or at a warm start mixed with one."""
        vector = torch.randn(self.n, generator=self.generator, dtype=torch.float64).to(self.basis)
        vector /= vector.norm()
        if start is not None and bool(torch.isfinite(start).all()) and float(start.norm()) > 0:
            warm = start.to(self.basis)
            vector = warm / warm.norm() + 0.1 * vector
        vector, _ = self._orthogonalised(vector)
        self._next, self._from = vector / vector.norm(), None

    def grow(self) -> None:
        """Adds one basis vector and its product."""
        if self._next is None:  # the last product lay in the basis: an invariant subspace, start elsewhere
            self.restart(None)
        assert self._next is not None
        if self.size == len(self.basis):
            more = torch.empty_like(self.basis[: min(self.size, self.n - self.size)])
            self.basis = torch.cat([self.basis, more])
        vector = self._next
        if self._from is not None:
            del self.tails[self._from]  # its direction is in the basis from now on
        self.basis[self.size] = vector
        self.size += 1
        product = self.matvec(vector).to(self.basis)
        self.n_matvec += 1
        if not bool(torch.isfinite(product).all()):
            self.finite = False
            return
        # Tails of older chains must stay outside the growing basis; what they lose is the symmetric entry of
        # the projected matrix, which the new product's coefficients hold already.
        for row, tail in self.tails.items():
            self.tails[row] = tail - (vector @ tail) * vector
        tail, coefficients = self._orthogonalised(product)
        projected = np.zeros((self.size, self.size))
        projected[:-1, :-1] = self.projected
        projected[-1, :] = projected[:, -1] = coefficients
        self.projected = projected
        length = float(tail.norm())
        if length <= 8 * torch.finfo(self.basis.dtype).eps * float(product.norm()) or self.size == self.n:
            self._next = self._from = None
        else:
            self._next, self._from = tail / length, self.size - 1
            self.tails[self.size - 1] = tail

    def _orthogonalised(self, vector: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
        basis = self.basis[: self.size]
        coefficients = np.zeros(self.size)
        for _ in range(2):  # "twice is enough" (Kahan, in Parlett §6.9)
            part = basis @ vector
            vector = vector - part @ basis
            coefficients += part.double().cpu().numpy()
        return vector, coefficients

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Ritz values ascending, their coordinates (columns), and their residual norms."""
        value, coordinate = np.linalg.eigh(self.projected)
        residual = np.zeros(self.size)
        if self.tails:
            block = torch.stack(list(self.tails.values())).double()
            gram = (block @ block.T).cpu().numpy()
            rows = coordinate[list(self.tails)]
            residual = np.sqrt(np.maximum(np.einsum("ik,ij,jk->k", rows, gram, rows), 0.0))
        return value, coordinate, residual

    def vectors(self, coordinate: NDArray[np.float64]) -> Tensor:
        """Unit vectors (rows) of the given coordinates (columns), the largest entry of each positive."""
        rows = torch.from_numpy(np.ascontiguousarray(coordinate.T)).to(self.basis) @ self.basis[: self.size]
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        scale: Tensor = torch.sign(largest) / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * scale


@dataclass(frozen=True)
class _Stop:
    """Which Ritz pairs are wanted, and whether they are good enough."""

    k: int
    which: Which
    tol: float
    floor: float
    relative_to: Literal["pair", "norm"]

    def indices(self, value: NDArray[np.float64]) -> NDArray[np.intp]:
        ascending = np.arange(len(value))
        if self.which == "SA":
            return ascending[: self.k]
        if self.which == "LM":
            return np.argsort(-np.abs(value), kind="stable")[: self.k]
        if self.which == "LA":
            return ascending[::-1][: self.k]
        low = min(self.k // 2, len(value) // 2)
        high = min(self.k - self.k // 2, len(value) - low)
        return np.concatenate([ascending[::-1][:high], ascending[:low][::-1]])

    def wanted(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        return value[self.indices(value)]

    def unchanged(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
        """Whether more products left the wanted values as they were, but for the tolerance and rounding."""
        noise = 10 * self.floor * float(np.abs(after).max())
        return np.allclose(self.wanted(after), self.wanted(before), rtol=10 * self.tol, atol=noise)

    def bounds(self, value: NDArray[np.float64], residual: NDArray[np.float64]) -> NDArray[np.float64]:
        """min(r, r²/gap) per Ritz value, gap to the nearest neighbour less that neighbour's own residual."""
        norm = float(np.abs(value).max(initial=0.0))
        gap = np.full(len(value), np.inf)
        step = np.diff(value)
        gap[:-1] = np.minimum(gap[:-1], step - residual[1:])
        gap[1:] = np.minimum(gap[1:], step - residual[:-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            squared = np.where(gap > 0, residual**2 / gap, np.inf)
        return np.maximum(np.minimum(residual, squared), self.floor * norm)

    def met(self, value: NDArray[np.float64], bound: NDArray[np.float64]) -> NDArray[np.bool_]:
        norm = float(np.abs(value).max(initial=0.0))
        scale = np.abs(value) if self.relative_to == "pair" else np.full(len(value), norm)
        # An eigenvalue of exactly zero has no relative accuracy: a few units of rounding of H have to do.
        return bound <= np.maximum(self.tol * scale, 4 * self.floor * norm)


def _expand(space: _Krylov, limit: int, stop: _Stop, at_least: int = 0) -> None:
    while space.size < limit:
        space.grow()
        if not space.finite:
            return
        if space.size < max(stop.k + 1, at_least) and space.size < limit:
            continue
        value, _, residual = space.ritz()
        index = stop.indices(value)
        if bool(stop.met(value, stop.bounds(value, residual))[index].all()):
            return


def _finish(space: _Krylov, stop: _Stop) -> Eigenpairs:
    if not space.finite:
        nothing = np.full(stop.k, math.nan)
        empty = torch.full((stop.k, space.n), math.nan, dtype=space.basis.dtype, device=space.basis.device)
        return Eigenpairs(
            nothing, empty, nothing, nothing, np.zeros(stop.k, dtype=np.bool_), space.n_matvec, math.nan
        )
    value, coordinate, residual = space.ritz()
    index = stop.indices(value)
    vector = space.vectors(coordinate[:, index])
    for place, row in zip(index, vector, strict=True):
        product = space.matvec(row).to(row)
        residual[place] = float((product.double() - value[place] * row.double()).norm())
    bound = stop.bounds(value, residual)
    basis = space.basis[: space.size].double()
    identity = torch.eye(space.size, dtype=basis.dtype, device=basis.device)
    return Eigenpairs(
        eigenvalue=value[index],
        eigenvector=vector,
        residual=residual[index],
        error_bound=bound[index],
        converged=stop.met(value, bound)[index],
        n_matvec=space.n_matvec + len(index),
        orthogonality=float((basis @ basis.T - identity).abs().max()),
    )
