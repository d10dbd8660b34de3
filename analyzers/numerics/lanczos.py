"""Extreme eigenpairs of a symmetric operator, with a residual and an error bound for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers.numerics.krylov import Floats, KrylovSpace, Matvec

VERIFY = 10
"""Fewest products given to a further random start; a quarter of what the search took where that is more. In a
dense spectrum a second copy takes long to show itself: after a search of 74 products, 14 of 20 seeds missed
it with 10 more, one with 20, none with 30."""

INSIDE = 30.0
"""Units of rounding by which an eigenvalue may be off although all products agree: the rounding inside the
operator, the same each time. Against float64, float32 networks were off by 0.5 (MLP), 4 (BatchNorm CNN) and
23 units (LSTM over 28 rows)."""

ASYMMETRIC = 1000.0
"""Units of rounding up to which products are those of a symmetric matrix."""

Which = Literal["LA", "SA", "LM", "BE"]


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs and what vouches for them.

    Attributes:
        eigenvalue: Shape (k,), float64. Order: LA and BE descending, SA ascending, LM by magnitude.
        eigenvector: Shape (k, n), unit rows; the entry of largest magnitude is positive.
        residual: ‖Hv − λv‖ of each returned pair. Shape (k,).
        error_bound: Bound on the distance to an exact eigenvalue: min(r, r²/gap), never under what rounding
            does: an allowance for that inside the operator, and the eigenvalue's part of the discrepancy.
            That nothing lies beyond the end of the spectrum, no residual can prove. Shape (k,).
        converged: Which pairs meet the tolerance. Shape (k,), bool.
        n_matvec: Products spent, those for verification included.
        orthogonality: max |QᵀQ − I| of the Krylov basis.
        asymmetry: Largest |qᵢ·Hqⱼ − qⱼ·Hqᵢ| over the basis: rounding, unless H is not symmetric; then no
            eigenvalue is better known than this.
        discrepancy: Length by which one product with a random combination of the pairs misses what their
            values and residuals say it is; at the rounding of the operator if all is well.
        space: The Krylov space, for a trace or a density at no further cost; None if H was not finite.
    """

    eigenvalue: NDArray[np.float64]
    eigenvector: Tensor
    residual: NDArray[np.float64]
    error_bound: NDArray[np.float64]
    converged: NDArray[np.bool_]
    n_matvec: int
    orthogonality: float
    asymmetry: float = math.nan
    discrepancy: float = math.nan
    space: KrylovSpace | None = None


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
    verify: bool = True,
    max_basis: int | None = None,
) -> Eigenpairs:
    """Computes k eigenpairs at the end(s) of the spectrum of a symmetric operator.

    Stops when every wanted pair's bound min(r, r²/gap) is below `tol` times |λ| (or times the spectral norm).
    With more than one pair wanted at an end, a further random start beside the found vectors looks for copies
    of a multiple eigenvalue, which the Krylov space of one start vector cannot hold; as long as it finds any,
    twice as many starts follow (block Lanczos).

    Memory: one vector of length n per product, `max_basis` of them at most: then the wanted Ritz vectors are
    kept and the space grows anew from them (thick restart). Residuals come from the space itself; one product
    with a random combination of all pairs checks them, and where it disagrees each gets a product of its own.

    Args:
        matvec: v ↦ Hv for a vector of shape (n,); H must be symmetric.
        n: Dimension.
        k: How many pairs; at most n.
        which: "LA" largest, "SA" smallest (most negative), "LM" largest magnitude, "BE" both ends
            (the larger half from the top).
        tol: Relative tolerance of the eigenvalues.
        max_iter: Largest number of products that grow the space; 40 k + 200 when None.
        seed: Of the random start vectors (drawn on the CPU, the same on every device).
        dtype: Of the basis. Projected matrix and error bounds are float64 in any case.
        device: Of the basis.
        start: Warm start, shape (n,), e.g. the sum of a neighbour's eigenvectors; a random tenth is added.
        rounding: Relative noise of `matvec` (epsilon of the dtype it computes in); that of `dtype` when None.
        relative_to: What `tol` is relative to: each pair's |λ|, or the largest |λ| seen (for ratios such as
            λmin/λmax, where the small one may be near zero).
        verify: Whether to look for further copies; costs a quarter of the search, at least 10 products.
        max_basis: Most vectors in memory, at least k + 8; no limit when None.

    Returns:
        The pairs. `converged` is False for a pair that max_iter cut short, and for all if `matvec` is not
        finite (eigenvalues are then NaN).

    Raises:
        ValueError: k or max_basis out of range, or an unknown `which`.

    References:
        Parlett, "The Symmetric Eigenvalue Problem" (1998), chapters 11 and 13.
        Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIMAX 22 (2000).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the dimension {n}, got {k}.")
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f"`which` must be LA, SA, LM or BE, got {which!r}.")
    if max_basis is not None and max_basis < min(n, k + 8):
        raise ValueError(f"{k} pairs need room for at least {min(n, k + 8)} vectors, not {max_basis}.")
    floor = rounding if rounding is not None else float(torch.finfo(dtype).eps)
    space = KrylovSpace(matvec, n, dtype=dtype, device=device, seed=seed, most=max_basis)
    space.add_start(start)
    stop = _Stop(k, which, tol, floor, relative_to)
    search = _Search(space, stop, max_basis or n, max_iter if max_iter is not None else 40 * k + 200)
    proven = search.expand()
    starts = 1
    while verify and (k > 2 or (k == 2 and which != "BE")) and search.may_go_on:
        before = space.ritz()[0]
        for _ in range(min(starts, n - space.size)):
            space.add_start()
        search.spend(max(VERIFY * starts, space.n_matvec // 4))
        if not space.finite or stop.unchanged(before, space.ritz()[0]):
            break
        proven = search.expand()
        starts = min(2 * starts, k)
    return _finish(space, stop, proven)


@dataclass(frozen=True)
class _Stop:
    """Which Ritz pairs are wanted, and whether they are good enough."""

    k: int
    which: Which
    tol: float
    floor: float
    relative_to: Literal["pair", "norm"]

    def indices(self, value: Floats, count: int | None = None) -> NDArray[np.intp]:
        """Places of the wanted values, the first `count` of them, in order."""
        count = min(self.k if count is None else count, len(value))
        ascending = np.arange(len(value))
        if self.which == "SA":
            return ascending[:count]
        if self.which == "LM":
            return np.argsort(-np.abs(value), kind="stable")[:count]
        if self.which == "LA":
            return ascending[::-1][:count]
        low = min(count // 2, len(value) // 2)
        high = min(count - count // 2, len(value) - low)
        return np.concatenate([ascending[::-1][:high], ascending[:low][::-1]])

    def unchanged(self, before: Floats, after: Floats) -> bool:
        """Whether more products left the wanted values as they were, but for the tolerance and rounding."""
        old, new = before[self.indices(before)], after[self.indices(after)]
        noise = 10 * self.floor * float(np.abs(after).max())
        return len(old) == len(new) and np.allclose(new, old, rtol=10 * self.tol, atol=noise)

    def bounds(self, value: Floats, residual: Floats) -> Floats:
        """min(r, r²/gap) per Ritz value, gap to the nearest neighbour less that neighbour's own residual."""
        norm = float(np.abs(value).max(initial=0.0))
        gap = np.full(len(value), np.inf)
        step = np.diff(value)
        gap[:-1] = np.minimum(gap[:-1], step - residual[1:])
        gap[1:] = np.minimum(gap[1:], step - residual[:-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            squared = np.where(gap > 0, residual**2 / gap, np.inf)
        return np.maximum(np.minimum(residual, squared), self.floor * norm)

    def met(self, value: Floats, bound: Floats, everything: Floats) -> NDArray[np.bool_]:
        """Whether values, some of `everything` that was seen, are as accurate as asked for."""
        norm = float(np.abs(everything).max(initial=0.0))
        scale = np.abs(value) if self.relative_to == "pair" else np.full(len(value), norm)
        # An eigenvalue of exactly zero has no relative accuracy: a few units of rounding of H have to do.
        return bound <= np.maximum(self.tol * scale, 4 * self.floor * norm)


@dataclass
class _Search:
    """Grows a space until the wanted pairs are good enough, within limits of memory and products."""

    space: KrylovSpace
    stop: _Stop
    max_basis: int
    max_iter: int

    @property
    def may_go_on(self) -> bool:
        return self.space.finite and not self.space.complete and self.space.n_matvec < self.max_iter

    def expand(self) -> Floats:
        """Grows until all wanted pairs meet the tolerance; returns their bounds."""
        bound = np.zeros(0)
        while self.may_go_on:
            self._grow()
            if not self.space.finite:
                break
            if self.space.size > self.stop.k or self.space.complete:
                value, _, residual = self.space.ritz()
                wanted = self.stop.indices(value)
                bound = self.stop.bounds(value, residual)[wanted]
                if bool(self.stop.met(value[wanted], bound, value).all()):
                    break
        return bound

    def spend(self, products: int) -> None:
        """Grows by so many products."""
        until = self.space.n_matvec + products
        while self.may_go_on and self.space.n_matvec < until:
            self._grow()

    def _grow(self) -> None:
        if self.space.size >= self.max_basis:
            self._restart()
        self.space.grow()

    def _restart(self) -> None:
        """Keeps the wanted pairs and half as many others as there is room for, those next in line."""
        value, coordinate, _ = self.space.ritz()
        kept = self.stop.indices(value, self.stop.k + max(1, (self.max_basis - self.stop.k) // 2))
        self.space.compress(coordinate[:, kept], value[kept])


def _finish(space: KrylovSpace, stop: _Stop, proven: Floats) -> Eigenpairs:
    """The pairs; where more products left them as they were, what was proven of them before still holds.

    Ritz values at an end move towards the eigenvalues only, so an earlier bound bounds the later error.
    """
    if not space.finite:
        nothing = np.full(stop.k, math.nan)
        empty = torch.full_like(space.combination(np.zeros((stop.k, space.size))), math.nan)
        missed = np.zeros(stop.k, dtype=np.bool_)
        return Eigenpairs(nothing, empty, nothing, nothing, missed, space.n_matvec, math.nan)
    value, coordinate, residual = space.ritz()
    index = stop.indices(value)
    found, vector = value[index], space.vectors(coordinate[:, index])
    discrepancy = _discrepancy(space, found, coordinate[:, index])
    size = float(np.linalg.norm(found))
    bound = stop.bounds(value, residual)[index]
    if len(proven) == len(bound):
        bound = np.minimum(bound, proven)
    if discrepancy > stop.tol * size:
        for place, row in zip(index, vector, strict=True):
            residual[place] = float((space.product(row).double() - value[place] * row.double()).norm())
        bound = stop.bounds(value, residual)[index]
    noise = INSIDE * stop.floor + (discrepancy / size if size > 0 else 0.0)
    bound = np.maximum(bound, noise * np.abs(found))  # rounding errors are in proportion to what is computed
    if space.asymmetry > ASYMMETRIC * stop.floor * float(np.abs(value).max()):
        bound = np.maximum(bound, space.asymmetry)
    return Eigenpairs(
        eigenvalue=found,
        eigenvector=vector,
        residual=residual[index],
        error_bound=bound,
        converged=stop.met(found, bound, value),
        n_matvec=space.n_matvec,
        orthogonality=space.orthogonality(),
        asymmetry=space.asymmetry,
        discrepancy=discrepancy,
        space=space,
    )


def _discrepancy(space: KrylovSpace, value: Floats, coordinate: Floats) -> float:
    """How far one product is from what the space says of a combination of all pairs, signs by turns.

    The product of Σ ±v_i must be Σ ±λ_i v_i plus the tails' part. Vectors carry the sign of their largest
    entry, which their coordinates do not, so the combination is made of the coordinates.
    """
    sign = np.where(np.arange(len(value)) % 2 == 0, 1.0, -1.0)
    combined = coordinate @ sign
    direction = space.combination(combined)
    expected = space.combination(coordinate @ (sign * value)).double() + space.residual_vector(combined)
    found = space.product(direction).double()
    return float((found - expected).norm())
