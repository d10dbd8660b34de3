"""Trace of a symmetric operator, whole and by layer: exact inside a Krylov space, estimated outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dynprobe.analyzers.numerics.krylov import KrylovSpace

FEWEST = 4
"""Probes below which a standard error means too little to stop on."""


@dataclass(frozen=True)
class Trace:
    """A trace with its standard error.

    Attributes:
        value: The trace.
        stderr: Its standard error over probes, widened by Student's t: ± 2 of it covers 95 %.
        layer: Trace of each diagonal block, shape (n_layers,); they add up to the trace.
        layer_stderr: Likewise, shape (n_layers,).
        n_probes: Random vectors used.
    """

    value: float
    stderr: float
    layer: NDArray[np.float64]
    layer_stderr: NDArray[np.float64]
    n_probes: int

    def reached(self, tol: float) -> bool:
        """Whether the standard error is at most `tol` times the trace."""
        return self.n_probes >= FEWEST and self.stderr <= tol * abs(self.value)


@dataclass
class TraceEstimate:
    """Collects probes: tr H = tr(QHQᵀ-part), known exactly, + E[zᵀPHPz] with P = I − QᵀQ and z random signs.

    This is Hutch++ with the Krylov space of an eigenvalue computation as its sketch: that space holds the
    outliers, which cause most of Hutchinson's variance, and costs nothing more. Each diagonal block's trace
    comes from the same probes, Σ_{i in block} z_i (PHPz)_i plus the block's part of the exact diagonal.

    Args:
        space: Q, with T and the tails.
        sizes: Number of entries of each segment of a vector, in order.
        owner: Which block each segment belongs to, from 0; each is one of its own when None.

    References:
        Hutchinson, Commun. Stat. Simul. Comput. 19 (1990).
        Meyer, Musco, Musco and Woodruff, "Hutch++: Optimal stochastic trace estimation", SOSA 2021.
    """

    space: KrylovSpace
    sizes: Sequence[int]
    owner: Sequence[int] | None = None
    _inside: NDArray[np.float64] = field(init=False)
    _samples: list[NDArray[np.float64]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if sum(self.sizes) != self.space.n:
            raise ValueError(f"blocks of {sum(self.sizes)} entries do not make {self.space.n}")
        self._inside = self._by_block(self.space.diagonal_inside())

    def add(self, signs: Tensor, given: Tensor, image: Tensor) -> None:
        """Adds a probe.

        Args:
            signs: z, entries ±1, shape (n,).
            given: A vector that differs from z within the space only (z itself, or z less some Ritz vectors).
            image: H times `given`.
        """
        space = self.space
        inside = space.coefficients(given).double().cpu().numpy()
        outside = image.double() - space.image(inside).double()
        outside = outside - space.combination(space.coefficients(outside)).double()
        self._samples.append(self._by_block(signs.double() * outside))

    @property
    def n_probes(self) -> int:
        """Probes so far."""
        return len(self._samples)

    def result(self) -> Trace:
        """The trace from the probes so far; NaN for a standard error that fewer than two cannot give."""
        if self.space.complete:  # nothing lies outside
            nothing = np.zeros(len(self._inside))
            return Trace(float(self._inside.sum()), 0.0, self._inside, nothing, self.n_probes)
        samples = np.array(self._samples).reshape(-1, len(self._inside))
        layer = self._inside + (samples.mean(0) if len(samples) else math.nan)
        return Trace(
            float(layer.sum()),
            float(widened_stderr(samples.sum(1))),
            layer,
            np.array([widened_stderr(column) for column in samples.T]),
            self.n_probes,
        )

    def _by_block(self, values: Tensor) -> NDArray[np.float64]:
        owner = range(len(self.sizes)) if self.owner is None else self.owner
        sums: NDArray[np.float64] = np.zeros(max(owner) + 1)
        for block, part in zip(owner, torch.split(values.double(), list(self.sizes)), strict=True):
            sums[block] += float(part.sum())
        return sums


def widened_stderr(samples: NDArray[np.float64]) -> float:
    """Standard error of a mean, widened so that ± 1.96 of it is Student's 95 % interval; NaN below two."""
    n = len(samples)
    if n < 2:
        return math.nan
    widen = float(stats.t.ppf(0.975, n - 1)) / 1.959963984540054
    return widen * float(samples.std(ddof=1)) / math.sqrt(n)


def random_signs(n: int, seed: int, like: Tensor) -> Tensor:
    """A vector of ±1 (Rademacher), shape (n,), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(2, (n,), generator=generator) - 1).to(like)
