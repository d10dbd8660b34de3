"""A piecewise linear network as rows of a mixed-integer linear program, which HiGHS solves."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, milp

from dynprobe.analyzers.numerics.layered_network import Activation, Floats, LayeredNetwork, product

Indices = np.ndarray[Any, np.dtype[np.intp]]
Neurons = tuple[tuple[Floats, Floats], ...]
"""Least and largest z of every hidden layer, each (n_neurons,)."""

# Shortest time that the solver is given: with none at all it may answer with nothing.
_SHORTEST = 0.01
# Non-zero coefficients beyond which the solver does without simplifying the program first: that may take
# seconds without a look at the clock.
_SIMPLIFY = 30_000
# Smaller coefficients the solver drops without a word (below 1e-9), and with larger ones it errs.
_LEAST_COEFFICIENT, _MOST_COEFFICIENT = 1e-8, 1e8


@dataclass(frozen=True)
class Solution:
    """What the solver says.

    Args:
        infeasible: Whether it excludes that there is a solution.
        values: Of all variables at the best solution found, (n_variables,), or None.
        bound: No solution costs less.
        n_nodes: Nodes of its search.
    """

    infeasible: bool
    values: Floats | None
    bound: float
    n_nodes: int


@dataclass(frozen=True)
class Scaled:
    """Values base + unit * variable: variables of moderate size whatever the size of the values.

    Args:
        columns: Of the variables, (k,).
        unit: (k,).
        base: (k,).
    """

    columns: Indices
    unit: Floats
    base: Floats

    def of(self, values: Floats) -> Floats:
        """The values, (k,), in a solution (n_variables,)."""
        return np.asarray(self.base + self.unit * values[self.columns])


class Program:
    """Variables, rows and costs of a mixed-integer linear program, to be minimised.

    The solver takes coefficients and errors as absolute, so that variables and rows should be of the order
    of one.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._low: list[Floats] = []
        self._high: list[Floats] = []
        self._cost: list[Floats] = []
        self._integer: list[np.ndarray] = []
        self._entries: list[tuple[Indices, Indices, Floats]] = []
        self._row_low: list[Floats] = []
        self._row_high: list[Floats] = []
        self.n_variables = 0
        self.n_rows = 0

    @property
    def n_entries(self) -> int:
        """How many coefficients are not zero."""
        return sum(len(entry[2]) for entry in self._entries)

    @property
    def is_moderate(self) -> bool:
        """Whether all coefficients are of a size that the solver can deal with."""
        return all(np.abs(entry[2]).max(initial=0.0) <= _MOST_COEFFICIENT for entry in self._entries)

    def variables(
        self, low: Floats, high: Floats, *, cost: Floats | float = 0.0, integer: bool = False
    ) -> Indices:
        """Add variables within [low, high], (n,), and give their columns."""
        n = len(low)
        self._low.append(np.asarray(low, np.float64))
        self._high.append(np.asarray(high, np.float64))
        self._cost.append(np.broadcast_to(np.asarray(cost, np.float64), (n,)))
        self._integer.append(np.full(n, integer))
        self.n_variables += n
        return np.arange(self.n_variables - n, self.n_variables)

    def rows(
        self, low: Floats | float, high: Floats | float, *terms: tuple[Indices, Floats], n: int
    ) -> Indices:
        """Add n rows low ≤ Σ terms ≤ high and give their indices.

        Args:
            low: (n,) or one number.
            high: (n,) or one number.
            terms: Columns with their coefficients: (m,) with (n, m), or, where row i has only column i, both
                (n,).
            n: How many rows.
        """
        added = np.arange(self.n_rows, self.n_rows + n)
        for columns, coefficients in terms:
            if coefficients.ndim == 1:
                self._entries.append((added, columns, coefficients))
            else:
                i, j = np.nonzero(coefficients)
                self._entries.append((added[i], columns[j], coefficients[i, j]))
        self._row_low.append(np.broadcast_to(np.asarray(low, np.float64), (n,)))
        self._row_high.append(np.broadcast_to(np.asarray(high, np.float64), (n,)))
        self.n_rows += n
        return added

    def solve(
        self,
        *,
        deadline: float,
        gap: float = 0.0,
        fixed: Floats | None = None,
        raised: tuple[Indices, Floats] | None = None,
    ) -> Solution:
        """Minimise the cost.

        Args:
            deadline: As `time.monotonic()` gives it.
            gap: Relative distance of cost and bound at which to stop.
            fixed: A solution, (n_variables,), whose integers are kept: a linear program remains.
            raised: Rows, and what to add to their lower ends.
        """
        low, high = np.concatenate(self._low), np.concatenate(self._high)
        integer = np.concatenate(self._integer)
        if fixed is not None:
            low[integer] = high[integer] = np.clip(np.round(fixed[integer]), low[integer], high[integer])
        row_low = np.concatenate(self._row_low)
        if raised is not None:
            row_low[raised[0]] += raised[1]
        is_linear = fixed is not None or not integer.any()
        constraint = self._constraint(row_low, np.concatenate(self._row_high))
        options = {
            "time_limit": max(deadline - time.monotonic(), _SHORTEST),
            "mip_rel_gap": gap,
            "presolve": self.n_entries <= _SIMPLIFY,
        }
        with _quiet():
            found = milp(
                np.concatenate(self._cost),
                integrality=None if is_linear else integer.astype(int),
                bounds=Box(low, high),
                constraints=constraint,
                options=options,
            )
        bound = found.fun if is_linear and found.status == 0 else found.get("mip_dual_bound")
        return Solution(
            found.status == 2,
            None if found.x is None else np.asarray(found.x),
            -np.inf if bound is None or (is_linear and found.status) else float(bound),
            int(found.get("mip_node_count") or 0),
        )

    def _constraint(self, row_low: Floats, row_high: Floats) -> LinearConstraint:
        """All rows, without tiny coefficients: by as much as these can matter, the rows are relaxed."""
        i, j, values = (np.concatenate([entry[a] for entry in self._entries]) for a in range(3))
        tiny = np.abs(values) < _LEAST_COEFFICIENT
        if tiny.any():
            low, high = np.concatenate(self._low), np.concatenate(self._high)
            ends = values[tiny] * low[j[tiny]], values[tiny] * high[j[tiny]]
            row_low = row_low - np.bincount(i[tiny], np.maximum(*ends), self.n_rows)
            row_high = row_high - np.bincount(i[tiny], np.minimum(*ends), self.n_rows)
            i, j, values = i[~tiny], j[~tiny], values[~tiny]
        matrix: Any = sparse.csr_array((values, (i, j)), shape=(self.n_rows, self.n_variables))
        return LinearConstraint(matrix, row_low, row_high)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what HiGHS prints off the standard output, which belongs to results.

    Where a solution misses a row by a rounding error, it prints a line that none of its options silences.
    """
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        libc.fflush(None)  # what is still in its buffer would come out later
        os.dup2(kept, 1)
        os.close(kept)


def unstable(activation: Activation, least: Floats, most: Floats) -> np.ndarray:
    """Which neurons may change their slope for z in [least, most]; any further axes are kept."""
    ends = (slice(None), *(None,) * (least.ndim - 1))
    return np.asarray((least < 0) & (most > 0) & (activation.below != activation.above)[ends])


def add_network(
    program: Program, network: LayeredNetwork, inputs: Scaled, neurons: Neurons
) -> tuple[Indices, Floats, Floats]:
    """Add a copy of a network and give its outputs as `matrix @ values[columns] + constant`.

    Only neurons that may change their slope become variables, one binary each. All others are linear in these
    and are substituted, so that their number does not count. Each variable is a neuron over the largest size
    that it may have: what it computes is the same, whatever the size of the weights before and after it.

    Args:
        program: Gets the variables and rows.
        network: With k inputs and r outputs.
        inputs: Its k inputs.
        neurons: Bounds of its hidden neurons.

    Returns:
        Columns (m,), matrix (r, m) and constant (r,).
    """
    hidden = [
        (layer.activation, *bounds)
        for layer, bounds in zip(network.layers, neurons, strict=False)
        if layer.activation
    ]
    masks = [unstable(*entry) for entry in hidden]
    k = len(inputs.columns)
    n_bent = sum(int(mask.sum()) for mask in masks)
    columns = np.concatenate([inputs.columns, np.empty(n_bent, np.intp)])
    forms = [(inputs.unit[:, None] * np.eye(k, len(columns)), inputs.base)]
    n = k
    for i, ((activation, least, most), mask) in enumerate(zip(hidden, masks, strict=True)):
        matrix, constant = _affine(network, i, forms)
        slope = np.where(most <= 0, activation.below, activation.above)
        form, offset = slope[:, None] * matrix, slope * constant
        if m := int(mask.sum()):
            bent = matrix[mask, :n], constant[mask], least[mask], most[mask], activation.of(mask)
            columns[n : n + m], unit = _add_bent(program, columns[:n], *bent)
            form[mask], offset[mask] = unit[:, None] * np.eye(m, len(columns), n), 0.0
            n += m
        forms.append((form, offset))
    return columns, *_affine(network, len(hidden), forms)


def _affine(network: LayeredNetwork, index: int, forms: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    layer = network.layers[index]
    matrix = np.zeros((layer.n_neurons, forms[0][0].shape[1]))
    constant = layer.bias
    for j, weight in layer.sources:
        matrix = matrix + product(weight, forms[j][0])
        constant = constant + product(weight, forms[j][1])
    return matrix, constant


def _add_bent(
    program: Program,
    columns: Indices,
    matrix: Floats,
    constant: Floats,
    least: Floats,
    most: Floats,
    activation: Activation,
) -> tuple[Indices, Floats]:
    """Neurons σ(z) of z in [least, most] around zero, with a binary d that is 1 for z ≥ 0.

    For a convex σ: x ≥ below z, x ≥ above z, x ≤ below z + (above - below) most d and
    x ≤ above z - (above - below) least (1 - d); the other way round for a concave one. All that holds as well
    of z and x over any positive numbers.

    Returns:
        Columns of the neurons over their units, and these, (n,).
    """
    n = len(constant)
    one = np.ones(n)
    size = np.maximum(-least, most)
    steepness = np.maximum(np.abs(activation.below), np.abs(activation.above))
    least, most = least / size, most / size
    below, above = activation.below / steepness, activation.above / steepness
    ends = np.stack([below * least, above * most, np.zeros(n)])
    z = program.variables(least, most)
    x = program.variables(ends.min(0), ends.max(0))
    d = program.variables(np.zeros(n), one, integer=True)
    program.rows(-constant / size, -constant / size, (columns, matrix / size[:, None]), (z, -one), n=n)
    sign = np.where(above > below, one, -one)
    bend = np.abs(above - below)
    program.rows(0.0, np.inf, (x, sign), (z, -sign * below), n=n)
    program.rows(0.0, np.inf, (x, sign), (z, -sign * above), n=n)
    program.rows(-np.inf, 0.0, (x, sign), (z, -sign * below), (d, -bend * most), n=n)
    program.rows(-np.inf, -bend * least, (x, sign), (z, -sign * above), (d, -bend * least), n=n)
    return x, size * steepness
