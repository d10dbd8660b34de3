"""The parts of a Hessian measurement: pairs, layers, subsets, and the loss along eigenvectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._curvature import Batches, End, Problem, disjoint_subsets
from dynprobe.analyzers._sampling import Meter, Sampler, chosen_metrics, stacked
from dynprobe.analyzers.numerics.batch_operator import BatchOperator
from dynprobe.analyzers.numerics.krylov import KrylovSpace
from dynprobe.analyzers.numerics.lanczos import ASYMMETRIC, INSIDE, Eigenpairs
from dynprobe.analyzers.numerics.params import layers_of
from dynprobe.analyzers.numerics.surface import Surface

Floats = NDArray[np.float64]
TOLERANCE_OF_A_PART = 1e-3
"""Relative tolerance on a subset of the data: its sampling error is larger by far."""


@dataclass
class Task:
    """One matrix to be measured, and what has been found of it.

    Args:
        problem: The matrix and the memory.
        batches: The data.
        names: The parameters it is restricted to.
        top_k: Pairs.
        end: Which end of the spectrum.
        tol: Relative tolerance of the eigenvalues.
        seed: Of everything random.
        max_products: Most products for the pairs; 0 for a default.
        reserved: Vectors that other things than the pairs will take.
        partial: Where finished layers and subsets are kept, or None.
        progress: Called with (done, total, what), or None.
        expected: Products that are likely to be needed, for progress.
    """

    problem: Problem
    batches: Batches
    names: list[str]
    top_k: int
    end: End
    tol: float
    seed: int
    max_products: int = 0
    reserved: int = 0
    partial: Any = None
    progress: Callable[[int, int, str], None] | None = None
    expected: int = 1
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    spent: dict[str, int] = field(default_factory=lambda: {"hvps": 0, "forwards": 0, "gradients": 0})

    @functools.cached_property
    def operator(self) -> BatchOperator[Any]:
        """The matrix on all of the data."""
        return self._counted(self.problem.operator(self.batches, self.names))

    def _counted(self, operator: BatchOperator[Any]) -> BatchOperator[Any]:
        operator.on_product = self._count
        return operator

    def _count(self) -> None:
        self.spent["hvps"] += 1
        if self.progress is not None:
            done = self.spent["hvps"]
            self.progress(done, max(done, self.expected), "products")

    def release(self) -> None:
        """Lets go of the whole matrix's graphs and Krylov vectors, before other matrices take the memory."""
        self.operator.release()
        self.pairs = replace(self.pairs, space=None)

    @functools.cached_property
    def pairs(self) -> Eigenpairs:
        """The eigenpairs on all of the data."""
        return self.problem.eigenpairs(
            self.operator,
            self.top_k,
            end=self.end,
            tol=self.tol,
            seed=self.seed,
            max_products=self.max_products,
            reserved=self.reserved,
        )

    def solve(self) -> None:
        """Eigenpairs, both ends of their Krylov space, and what vouches for them."""
        found = self.pairs
        self.values |= {
            "rank": np.arange(1, self.top_k + 1),
            "eigenvalue": found.eigenvalue,
            "residual": found.residual,
            "error_bound": found.error_bound,
            "eigenvalue_converged": found.converged,
            "discrepancy": found.discrepancy,
            "orthogonality": found.orthogonality,
            "asymmetry": found.asymmetry,
            "n_parameters": self.operator.n_parameters,
            "n_samples": self.operator.n_samples,
            **_ends(found.space),
        }
        if self.end == "largest" and self.top_k > 1:
            self.values |= gap(found.eigenvalue)
        allowed = max(self.tol, ASYMMETRIC * self.operator.rounding)
        if found.space is None:
            self.reasons.append("a product of the matrix is NaN or infinite")
        elif found.asymmetry > allowed * float(np.abs(found.eigenvalue).max()):
            self.reasons.append(
                f"the products are not those of a symmetric matrix (off by {found.asymmetry:.2g}): an "
                "operation of the network has a wrong second derivative, or is not the same every time"
            )
        elif not found.converged.all():
            self.reasons.append(
                f"{self._missed(found)} after {found.n_matvec} products; {self._limit(found)}"
            )
        self._note_the_other_end(found)

    def _missed(self, found: Eigenpairs) -> str:
        count, of = int((~found.converged).sum()), len(found.converged)
        return f"{count} of {of} eigenvalues missed the tolerance {self.tol:g}"

    def _limit(self, found: Eigenpairs) -> str:
        """What keeps the eigenvalues from being better known."""
        allowed = float(INSIDE * self.operator.rounding)
        if self.tol < 2 * allowed:
            name = str(self.operator.dtype).removeprefix("torch.")
            return f"rounding in {name} allows {allowed:.0e}, --dtype float64 less"
        worst = float((found.error_bound / np.maximum(np.abs(found.eigenvalue), 1e-300)).max())
        return f"the largest relative error bound is {worst:.1e}; --max-hvps allows more"

    def _note_the_other_end(self, found: Eigenpairs) -> None:
        """No choice of an end hides a larger eigenvalue at the other."""
        low, last = float(self.values["smallest"]), float(np.abs(found.eigenvalue).min())
        if self.end == "largest" and -low > last:
            self.notes.append(
                f"the most negative eigenvalue found, {low:.3g}, is larger in magnitude than one of the "
                f"{self.top_k} largest: see --which largest-magnitude or both"
            )

    def layers(self) -> dict[str, list[str]]:
        """The parameters by layer."""
        return layers_of(self.names)

    def by_layer(self) -> None:
        """The spectrum of each layer's own diagonal block."""
        layers = self.layers()
        columns: dict[str, list[Floats]] = {}
        for layer, members in layers.items():
            row = self._part(f"layer-{layer}", self.batches, members, self.tol)
            if not row.pop("converged").all():
                self.reasons.append(f"eigenvalues of layer {layer!r} missed the tolerance")
            for name, values in row.items():
                columns.setdefault(name, []).append(padded(values, self.top_k))
        self.values["layer"] = np.array(list(layers), dtype=object)
        self.values |= {f"layer_{name}": np.stack(column) for name, column in columns.items()}

    def on_subsets(self, count: int) -> None:
        """The same pairs on disjoint parts of the data: the largest error of all.

        Raises:
            OptionError: If there are too few samples.
        """
        parts = disjoint_subsets(self.batches, count, self.seed)
        tol = max(self.tol, TOLERANCE_OF_A_PART)
        found = [self._part(f"subset-{i}", part, self.names, tol) for i, part in enumerate(parts)]
        eigenvalue = np.stack([row["eigenvalue"] for row in found])
        if not all(row["converged"].all() for row in found):
            self.reasons.append("eigenvalues of a subset missed the tolerance")
        self.values |= {
            "subset_eigenvalue": eigenvalue,
            "subset_size": min(sum(len(targets) for _, targets in part) for part in parts),
            "eigenvalue_spread": eigenvalue.std(axis=0, ddof=1) if count > 1 else np.full(self.top_k, np.nan),
            # A bias c/n is c·count/n on a subset and c/n on all: their difference is (count − 1) c/n.
            "eigenvalue_bias": (eigenvalue.mean(0) - self.pairs.eigenvalue) / (count - 1)
            if count > 1
            else np.full(self.top_k, np.nan),
        }

    def _part(self, name: str, batches: Batches, names: Sequence[str], tol: float) -> dict[str, Any]:
        """Eigenpairs of a block or on a part of the data, from the store where they are finished."""
        stored: dict[str, Any] | None = self.partial.get(name) if self.partial is not None else None
        if stored is not None:
            self.spent["hvps"] += int(stored["hvps"])
            return {n: v for n, v in stored.items() if n != "hvps"}
        before = self.spent["hvps"]
        operator = self._counted(self.problem.operator(batches, names))
        found = self.problem.eigenpairs(
            operator,
            min(self.top_k, operator.n_parameters),
            end=self.end,
            tol=tol,
            seed=self.seed,
            max_products=self.max_products,
        )
        operator.release()
        row = {
            "eigenvalue": found.eigenvalue,
            "residual": found.residual,
            "error_bound": found.error_bound,
            "converged": found.converged,
        }
        if self.partial is not None:
            self.partial.put(name, row | {"hvps": np.array(self.spent["hvps"] - before)})
        return row

    def along(self, test_batches: Any, axis: Floats, count: int) -> None:
        """Loss and accuracy along the eigenvectors, on training and test data.

        Args:
            test_batches: The test data, or None.
            axis: Distances, in units of the eigenvectors.
            count: How many eigenvectors.
        """
        problem = self.problem
        metrics = chosen_metrics("auto", self.batches, problem.loss, problem.model)
        meter = Meter(self.progress, count * len(axis))
        tables = []
        for i in range(count):
            direction = self.operator.as_dict(self.pairs.eigenvector[i])
            make = functools.partial(
                Surface,
                problem.model,
                self.batches,
                problem.loss,
                [direction],
                metrics=metrics,
                test_batches=test_batches,
            )
            sampler = Sampler(make, f"along-{i}", axis, np.zeros(1), self.partial, meter)
            sampler.fill()
            self.spent["forwards"] += sampler.forwards
            tables.append(stacked([sampler.table], squeeze=True))
        keep = [n for n in tables[0] if not n.endswith("difference_stderr")]
        self.values["epsilon"] = axis
        self.values |= {f"along_{name}": np.stack([table[name] for table in tables]) for name in keep}


def gap(eigenvalue: Floats) -> dict[str, Any]:
    """The widest ratio between neighbours among the largest eigenvalues, and how many lie above it.

    NaN, and none, where fewer than two are positive.
    """
    positive = eigenvalue[eigenvalue > 0]
    if len(positive) < 2:
        return {"spectral_gap": np.nan, "n_outliers": np.nan}
    ratio = positive[:-1] / positive[1:]
    return {"spectral_gap": float(ratio.max()), "n_outliers": float(ratio.argmax() + 1)}


def _ends(space: KrylovSpace | None) -> dict[str, float]:
    """Both ends of the Krylov space with their residuals."""
    names = ("largest", "largest_residual", "smallest", "smallest_residual")
    if space is None:
        return dict.fromkeys(names, np.nan)
    value, _, residual = space.ritz()
    return dict(zip(names, (value[-1], residual[-1], value[0], residual[0]), strict=True))


def padded(values: Any, size: int) -> Floats:
    """NaN behind what a short row does not have."""
    row = np.full(size, np.nan)
    row[: len(values)] = values
    return row
