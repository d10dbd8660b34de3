"""A Krylov space of a symmetric operator: an orthonormal basis, the projected matrix, and what lies outside.

Full reorthogonalisation: without it converged eigenvalues come back as ghosts, 15 to 18 of a "top 20" in a
peer. Several chains may share one basis (a block of start vectors), and the basis may be compressed to its
wanted Ritz vectors when memory is short; the relation below holds throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Matvec = Callable[[Tensor], Tensor]

COLUMNS = 2**20
"""Columns of the basis that are converted or multiplied at once: temporary memory stays small."""


@dataclass
class _Tail:
    """A vector outside the basis, and how much of it the product of each basis vector contains."""

    vector: Tensor
    weight: Floats
    waited: bool = False


class KrylovSpace:
    """Basis Q (rows) of a symmetric operator H with H Qᵀ = Qᵀ T + Σ_j t_j w_jᵀ, the t_j orthogonal to Q.

    T is the projected matrix QHQᵀ. Each t_j (a *tail*) is the next vector of one chain; w_j says which
    products contain it. So the residual of a Ritz pair (θ, Qᵀs) is exactly Σ_j t_j (w_j·s), after restarts
    too. This is band Lanczos with a thick restart: one start vector gives Lanczos, b of them block Lanczos
    with blocks of b.

    Args:
        matvec: v ↦ Hv for a vector of shape (n,).
        n: Dimension.
        dtype: Of the basis. The projected matrix is float64 in any case, and the coefficients along the
            last vectors, which hold nearly all of it, are float64 products.
        device: Of the basis.
        seed: Of the random start vectors (drawn on the CPU, the same on every device).

    Attributes:
        size: Vectors in the basis.
        projected: T, shape (size, size), float64.
        n_matvec: Products made.
        finite: False once a product held NaN or infinity.
        asymmetry: Largest |qᵢ·Hqⱼ − qⱼ·Hqᵢ| over the basis: rounding, unless H is not symmetric.

    References:
        Ruhe, "Implementation aspects of band Lanczos algorithms", Math. Comp. 33 (1979).
        Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIMAX 22 (2000).
    """

    def __init__(
        self, matvec: Matvec, n: int, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> None:
        self._matvec, self.n = matvec, n
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = torch.empty((min(n, 32), n), dtype=dtype, device=device)
        self._tails: list[_Tail] = []
        self.projected: Floats = np.zeros((0, 0))
        self.size = 0
        self.n_matvec = 0
        self.finite = True
        self.asymmetry = 0.0

    @property
    def basis(self) -> Tensor:
        """Q, shape (size, n)."""
        return self._rows[: self.size]

    @property
    def complete(self) -> bool:
        """Whether the basis spans everything."""
        return self.size == self.n

    def product(self, vector: Tensor) -> Tensor:
        """One product of the operator, counted."""
        self.n_matvec += 1
        return self._matvec(vector)

    def add_start(self, start: Tensor | None = None) -> None:
        """Begins a further chain at a random vector, or at a warm start mixed with one.

        A start that misses an eigenvector exactly would never find it: a warm one gets a random tenth added.
        """
        vector = torch.randn(self.n, generator=self._generator, dtype=torch.float64).to(self._rows)
        vector /= vector.norm()
        if start is not None and bool(torch.isfinite(start).all()) and float(start.norm()) > 0:
            warm = start.to(self._rows)
            vector = warm / warm.norm() + 0.1 * vector
        vector = self._outside(self._outside(vector)[0])[0]
        self._tails.append(_Tail(vector / vector.norm(), np.zeros(self.size)))

    def grow(self) -> None:
        """Adds one basis vector, from the chain that has waited longest, and its product."""
        vector, expected = self._next_vector()
        if self.size == len(self._rows):
            more = self._rows.new_empty((min(max(self.size // 2, 16), self.n - self.size), self.n))
            self._rows = torch.cat([self._rows, more])
        self._rows[self.size] = vector
        self.size += 1
        product = self.product(vector)
        if not bool(torch.isfinite(product).all()):
            self.finite = False
            return
        # Tails of other chains must stay outside the growing basis; what they lose is the symmetric entry of
        # the projected matrix, which the new product's coefficients hold already.
        for tail in self._tails:
            tail.vector = tail.vector - (vector @ tail.vector) * vector
            tail.weight = np.append(tail.weight, 0.0)
            tail.waited = True
        scale = float(torch.linalg.vector_norm(product))
        rest, coefficient = self._coefficients(product)
        off = np.abs(coefficient[:-1] - expected).max(initial=0.0)
        self.asymmetry = max(self.asymmetry, float(off))
        projected = np.zeros((self.size, self.size))
        projected[:-1, :-1] = self.projected
        projected[-1, :] = projected[:, -1] = coefficient
        self.projected = projected
        if self.complete:
            self._tails.clear()
        elif float(rest.norm()) > 8 * torch.finfo(self._rows.dtype).eps * scale:
            weight = np.zeros(self.size)
            weight[-1] = 1.0
            self._tails.append(_Tail(rest, weight))

    def _next_vector(self) -> tuple[Tensor, Floats]:
        """The vector to add, and what its product's coefficients must be if H is symmetric."""
        while self._tails:
            tail = self._tails.pop(0)
            length = float(tail.vector.norm())
            vector = tail.vector / max(length, torch.finfo(tail.vector.dtype).tiny)
            if tail.waited:
                vector, left = self._outside(vector)
                if left <= 0.5:  # rounding, or what the other chains have reached as well: nothing to add
                    continue
                vector = vector / left
            parts = [float(vector @ other.vector) * other.weight for other in (tail, *self._tails)]
            return vector, np.sum(parts, axis=0)
        self.add_start()
        return self._tails.pop().vector, np.zeros(self.size)

    def _coefficients(self, product: Tensor) -> tuple[Tensor, Floats]:
        """What of a new product lies outside the basis, and its coefficients along the basis."""
        coefficient = np.zeros(self.size)
        window = slice(max(0, self.size - 2 * len(self._tails) - 3), self.size)
        last = self._rows[window].double()
        part = last @ product.double()
        coefficient[window] += part.cpu().numpy()
        rest = (product.double() - part @ last).to(self._rows)
        for _ in range(2):  # "twice is enough" (Kahan, in Parlett §6.9), once where the first took little
            before = float(rest.norm())
            more = self.basis @ rest
            rest = rest - more @ self.basis
            coefficient += more.double().cpu().numpy()
            if float(rest.norm()) > 0.7 * before:
                break
        return rest, coefficient

    def _outside(self, vector: Tensor) -> tuple[Tensor, float]:
        """A vector less its part in the basis, and the length of what is left."""
        if self.size:
            vector = vector - (self.basis @ vector) @ self.basis
        return vector, float(vector.norm())

    def ritz(self) -> tuple[Floats, Floats, Floats]:
        """Ritz values ascending, their coordinates (columns), and their residual norms."""
        value, coordinate = np.linalg.eigh(self.projected)
        tails = [tail for tail in self._tails if tail.weight.any()]
        if not tails:
            return value, coordinate, np.zeros(self.size)
        block = torch.stack([tail.vector.double() for tail in tails])
        gram = (block @ block.T).cpu().numpy()
        part = np.stack([tail.weight for tail in tails]) @ coordinate
        return value, coordinate, np.sqrt(np.maximum(np.einsum("ik,ij,jk->k", part, gram, part), 0.0))

    def vectors(self, coordinate: Floats) -> Tensor:
        """Unit vectors (rows) of the given coordinates (columns), the largest entry of each positive."""
        rows = self._combined(coordinate)
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        scale: Tensor = torch.sign(largest) / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * scale

    def image(self, coordinate: Floats) -> Tensor:
        """H Qᵀ s for a coordinate vector s of shape (size,), without a product; shape (n,)."""
        image = torch.from_numpy(self.projected @ coordinate).to(self._rows) @ self.basis
        for tail in self._tails:
            image = image + float(tail.weight @ coordinate) * tail.vector
        return image

    def diagonal_inside(self) -> Tensor:
        """Diagonal of H less that of (I − QᵀQ) H (I − QᵀQ): what the space knows of it, exactly. Float64."""
        found = torch.zeros(self.n, dtype=torch.float64, device=self._rows.device)
        matrix = torch.from_numpy(self.projected).to(found)
        weights = [(t.vector, torch.from_numpy(t.weight).to(found)) for t in self._tails if t.weight.any()]
        for start in range(0, self.n, COLUMNS):
            cut = slice(start, start + COLUMNS)
            rows = self.basis[:, cut].double()
            # QᵀQH + HQᵀQ − QᵀQHQᵀQ, with HQᵀ = QᵀT + tails
            image = matrix @ rows
            for vector, weight in weights:
                image += 2 * torch.outer(weight, vector[cut].double())
            found[cut] = (rows * image).sum(0)
        return found

    def compress(self, coordinate: Floats, value: Floats) -> None:
        """Keeps only the Ritz vectors of the given coordinates (columns): a thick restart."""
        kept = coordinate.shape[1]
        turn = torch.from_numpy(np.ascontiguousarray(coordinate.T)).to(self._rows)
        for start in range(0, self.n, COLUMNS):
            cut = slice(start, start + COLUMNS)
            self._rows[:kept, cut] = turn @ self._rows[: self.size, cut]
        self.size = kept
        self.projected = np.diag(value)
        for tail in self._tails:
            tail.weight = tail.weight @ coordinate
            tail.waited = True

    def orthogonality(self) -> float:
        """Largest entry of |QQᵀ − I|."""
        gram = torch.zeros((self.size, self.size), dtype=torch.float64, device=self._rows.device)
        for start in range(0, self.n, COLUMNS):
            rows = self.basis[:, start : start + COLUMNS].double()
            gram += rows @ rows.T
        return float((gram - torch.eye(self.size).to(gram)).abs().max())

    def residual_vector(self, coordinate: Floats) -> Tensor:
        """Σ t (w·s): what of H Qᵀ s lies outside the space, for s of shape (size,); shape (n,), float64."""
        found = torch.zeros(self.n, dtype=torch.float64, device=self._rows.device)
        for tail in self._tails:
            found += float(tail.weight @ coordinate) * tail.vector.double()
        return found

    def _combined(self, coordinate: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(coordinate.T)).to(self._rows) @ self.basis
