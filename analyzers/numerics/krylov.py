"""A Krylov space of a symmetric operator: an orthonormal basis, the projected matrix, and what lies outside.

Full reorthogonalisation: without it converged eigenvalues come back as ghosts, 15 to 18 of a "top 20" in a
peer. Several chains may share one basis (a block of start vectors), and the basis may be compressed to its
wanted Ritz vectors when memory is short; the relation below holds throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Matvec = Callable[[Tensor], Tensor]

ENTRIES = 2**22
"""Entries of the basis that are copied or converted at once: 32 MiB in float64."""
WINDOW = 9
"""Last vectors along which coefficients are float64 products: all of them for up to three chains."""
BLOCK = 32
"""Vectors that are allocated at once: an array that grows would for a moment be there twice."""


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
        most: Vectors that there will be at most.

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
        self,
        matvec: Matvec,
        n: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
        most: int | None = None,
    ) -> None:
        self._matvec, self.n, self._most = matvec, n, min(n, most or n)
        self._generator = torch.Generator().manual_seed(seed)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._blocks: list[Tensor] = []
        self._tails: list[_Tail] = []
        self.projected: Floats = np.zeros((0, 0))
        self.size = 0
        self.n_matvec = 0
        self.finite = True
        self.asymmetry = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the basis."""
        return self._like.dtype

    @property
    def n_allocated(self) -> int:
        """Vectors there is memory for."""
        return sum(len(block) for block in self._blocks)

    def rows(self) -> Iterator[Tensor]:
        """The basis in blocks of rows."""
        left = self.size
        for block in self._blocks:
            if left > 0:
                yield block[:left]
            left -= len(block)

    def coefficients(self, vector: Tensor) -> Tensor:
        """Qv, shape (size,)."""
        vector = vector.to(self._like)
        parts = [block @ vector for block in self.rows()]
        return torch.cat(parts) if parts else self._like

    def combination(self, coefficient: Tensor | Floats) -> Tensor:
        """Qᵀc for c of shape (size,), or (k, size) for k of them; shape (n,) or (k, n)."""
        c = torch.as_tensor(coefficient).to(self._like)
        found = torch.zeros((*c.shape[:-1], self.n), dtype=self.dtype, device=self._like.device)
        start = 0
        for block in self.rows():
            found += c[..., start : start + len(block)] @ block
            start += len(block)
        return found

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
        vector = torch.randn(self.n, generator=self._generator, dtype=torch.float64).to(self._like)
        vector /= vector.norm()
        if start is not None and bool(torch.isfinite(start).all()) and float(start.norm()) > 0:
            warm = start.to(self._like)
            vector = warm / warm.norm() + 0.1 * vector
        vector = self._outside(self._outside(vector)[0])[0]
        self._tails.append(_Tail(vector / vector.norm(), np.zeros(self.size)))

    def grow(self) -> None:
        """Adds one basis vector, from the chain that has waited longest, and its product."""
        vector, expected = self._next_vector()
        self._append(vector)
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
        elif float(rest.norm()) > 8 * torch.finfo(self.dtype).eps * scale:
            weight = np.zeros(self.size)
            weight[-1] = 1.0
            self._tails.append(_Tail(rest, weight))

    def _append(self, vector: Tensor) -> None:
        if self.size == self.n_allocated:
            count = max(1, min(BLOCK, self._most - self.size))
            self._blocks.append(self._like.new_empty((count, self.n)))
        self._blocks[self._place(self.size)[0]][self._place(self.size)[1]] = vector
        self.size += 1

    def _place(self, row: int) -> tuple[int, int]:
        """Block and row in it of a basis vector."""
        for i, block in enumerate(self._blocks):
            if row < len(block):
                return i, row
            row -= len(block)
        raise IndexError(row)

    def _last(self, count: int) -> Tensor:
        """A copy of the last vectors, shape (count, n)."""
        places = [self._place(row) for row in range(self.size - count, self.size)]
        return torch.stack([self._blocks[i][row] for i, row in places])

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
        count = min(self.size, 2 * len(self._tails) + 3, WINDOW)
        last = self._last(count).double()
        part = last @ product.double()
        coefficient[-count:] += part.cpu().numpy()
        rest = (product.double() - part @ last).to(self._like)
        for _ in range(2):  # "twice is enough" (Kahan, in Parlett §6.9), once where the first took little
            before = float(rest.norm())
            more = self.coefficients(rest)
            rest = rest - self.combination(more)
            coefficient += more.double().cpu().numpy()
            if float(rest.norm()) > 0.7 * before:
                break
        return rest, coefficient

    def _outside(self, vector: Tensor) -> tuple[Tensor, float]:
        """A vector less its part in the basis, and the length of what is left."""
        if self.size:
            vector = vector - self.combination(self.coefficients(vector))
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
        rows = self.combination(coordinate.T)
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        scale: Tensor = torch.sign(largest) / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows * scale

    def image(self, coordinate: Floats) -> Tensor:
        """H Qᵀ s for a coordinate vector s of shape (size,), without a product; shape (n,)."""
        image = self.combination(self.projected @ coordinate)
        for tail in self._tails:
            image = image + float(tail.weight @ coordinate) * tail.vector
        return image

    def diagonal_inside(self) -> Tensor:
        """Diagonal of H less that of (I − QᵀQ) H (I − QᵀQ): what the space knows of it, exactly. Float64."""
        found = torch.zeros(self.n, dtype=torch.float64, device=self._like.device)
        matrix = torch.from_numpy(self.projected).to(found)
        weights = [(t.vector, torch.from_numpy(t.weight).to(found)) for t in self._tails if t.weight.any()]
        for cut in self._cuts():
            rows = self._columns(cut).double()
            # QᵀQH + HQᵀQ − QᵀQHQᵀQ, with HQᵀ = QᵀT + tails
            image = matrix @ rows
            for vector, weight in weights:
                image += 2 * torch.outer(weight, vector[cut].double())
            found[cut] = (rows * image).sum(0)
        return found

    def compress(self, coordinate: Floats, value: Floats) -> None:
        """Keeps only the Ritz vectors of the given coordinates (columns): a thick restart."""
        kept = coordinate.shape[1]
        turn = torch.as_tensor(coordinate.T).to(self._like)
        for cut in self._cuts():
            turned, first = turn @ self._columns(cut), 0
            for block in self._blocks:
                part = turned[first : first + len(block)]
                block[: len(part), cut] = part
                first += len(block)
        self.size = kept
        self.projected = np.diag(value)
        for tail in self._tails:
            tail.weight = tail.weight @ coordinate
            tail.waited = True

    def orthogonality(self) -> float:
        """Largest entry of |QQᵀ − I|."""
        gram = torch.zeros((self.size, self.size), dtype=torch.float64, device=self._like.device)
        for cut in self._cuts():
            rows = self._columns(cut).double()
            gram += rows @ rows.T
        return float((gram - torch.eye(self.size).to(gram)).abs().max())

    def residual_vector(self, coordinate: Floats) -> Tensor:
        """Σ t (w·s): what of H Qᵀ s lies outside the space, for s of shape (size,); shape (n,), float64."""
        found = torch.zeros(self.n, dtype=torch.float64, device=self._like.device)
        for tail in self._tails:
            found += float(tail.weight @ coordinate) * tail.vector.double()
        return found

    def _cuts(self) -> Iterator[slice]:
        """Parts of the columns, so that a copy of one is small."""
        width = max(1, ENTRIES // max(self.size, 1))
        return (slice(start, start + width) for start in range(0, self.n, width))

    def _columns(self, cut: slice) -> Tensor:
        """Some columns of the whole basis, a copy."""
        return torch.cat([block[:, cut] for block in self.rows()])
