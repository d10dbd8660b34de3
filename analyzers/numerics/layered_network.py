"""A network as affine maps and activations of single neurons, in float64: what can be analysed exactly.

Layer i computes z_i = Σ_j W_ij a_j + b_i and a_i = σ_i(z_i), where a_0 is the input and j < i: residual
connections are layers with more than one source. The last layer has no activation and gives the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy import sparse
from scipy.special import expit

Floats = np.ndarray[Any, np.dtype[np.float64]]
Matrix = Any
"""A dense array or a scipy sparse matrix, (n_neurons, n_source)."""

Kind = Literal["piecewise linear", "tanh", "sigmoid"]

# Below this share of entries, and from this size on, a matrix is kept sparse: those of convolutions.
_SPARSE_SHARE, _SPARSE_SIZE = 0.1, 100_000


@dataclass(frozen=True)
class Activation:
    """An activation of single neurons.

    Args:
        kind: `piecewise linear` has one slope below zero and one above; `tanh` and `sigmoid` are smooth.
        below: Slope of each neuron for z < 0, (n_neurons,); empty for smooth ones.
        above: Slope of each neuron for z ≥ 0, (n_neurons,); empty for smooth ones.
    """

    kind: Kind
    below: Floats
    above: Floats

    @property
    def is_smooth(self) -> bool:
        """Whether it is not piecewise linear."""
        return self.kind != "piecewise linear"

    def __call__(self, z: Floats) -> Floats:
        """σ(z) for z of shape (n_neurons, n_points)."""
        if self.kind == "tanh":
            return np.asarray(np.tanh(z))
        if self.kind == "sigmoid":
            return np.asarray(expit(z))
        return np.where(z >= 0, self.above[:, None] * z, self.below[:, None] * z)

    def of(self, neurons: np.ndarray) -> Activation:
        """The same for some of the neurons."""
        return self if self.is_smooth else replace(self, below=self.below[neurons], above=self.above[neurons])


def piecewise(below: float | Floats, above: float | Floats, n_neurons: int) -> Activation:
    """An activation with these slopes: ReLU has (0, 1), the absolute value (-1, 1)."""

    def slopes(value: float | Floats) -> Floats:
        return np.array(np.broadcast_to(np.asarray(value, np.float64), (n_neurons,)))

    return Activation("piecewise linear", slopes(below), slopes(above))


def smooth(kind: Literal["tanh", "sigmoid"]) -> Activation:
    """A smooth activation."""
    return Activation(kind, np.empty(0), np.empty(0))


@dataclass(frozen=True)
class Layer:
    """An affine map of earlier layers, then an activation.

    Args:
        sources: Pairs (j, matrix): a_0 is the input, a_j what layer j - 1 of the network gives.
        bias: (n_neurons,).
        activation: None for the outputs.
        name: The module that it was made of, for messages.
    """

    sources: tuple[tuple[int, Matrix], ...]
    bias: Floats
    activation: Activation | None
    name: str = ""

    @property
    def n_neurons(self) -> int:
        """How many neurons it has."""
        return len(self.bias)


@dataclass(frozen=True)
class LayeredNetwork:
    """Layers in order of computation.

    Args:
        n_inputs: Length of the flattened input.
        layers: The last one has no activation.
    """

    n_inputs: int
    layers: tuple[Layer, ...]

    @property
    def n_outputs(self) -> int:
        """Number of outputs."""
        return self.layers[-1].n_neurons

    @property
    def n_hidden(self) -> int:
        """Number of neurons with an activation."""
        return sum(layer.n_neurons for layer in self.layers[:-1])

    @property
    def n_entries(self) -> int:
        """Number of weights, or of entries that are not zero where matrices are sparse."""
        matrices = [matrix for layer in self.layers for _, matrix in layer.sources]
        return max(sum(int(m.nnz if sparse.issparse(m) else m.size) for m in matrices), 1)

    @property
    def is_smooth(self) -> bool:
        """Whether any activation is not piecewise linear."""
        return any(layer.activation is not None and layer.activation.is_smooth for layer in self.layers)

    def __call__(self, points: Floats) -> Floats:
        """Outputs (n_points, n_outputs) for points (n_points, n_inputs), in float64."""
        values = [np.ascontiguousarray(np.asarray(points, np.float64).T)]
        for layer in self.layers:
            z = sum(product(matrix, values[j]) for j, matrix in layer.sources) + layer.bias[:, None]
            values.append(z if layer.activation is None else layer.activation(z))
        return np.asarray(values[-1].T)

    def combined(self, rows: Floats, offset: Floats | float = 0.0) -> LayeredNetwork:
        """The network whose outputs are `rows @ outputs + offset`; rows are (n_rows, n_outputs)."""
        last = self.layers[-1]
        sources = tuple((j, as_matrix(rows @ matrix)) for j, matrix in last.sources)
        changed = replace(last, sources=sources, bias=rows @ last.bias + offset)
        return replace(self, layers=(*self.layers[:-1], changed))

    def restricted(self, point: Floats, features: Sequence[int], low: Floats, high: Floats) -> LayeredNetwork:
        """The network of u in [0, 1]^k: `features` are low + u (high - low), all others those of `point`.

        The cost of what follows then depends on the number of these features, not on that of all inputs.

        Args:
            point: (n_inputs,).
            features: Indices of the k features.
            low: Value at u = 0, (k,).
            high: Value at u = 1, (k,).
        """
        chosen = list(features)
        start = np.array(point, np.float64)
        start[chosen] = low
        scale = np.asarray(high, np.float64) - low

        def change(layer: Layer) -> Layer:
            sources, bias = [], layer.bias
            for j, matrix in layer.sources:
                if j == 0:
                    bias = bias + matrix @ start
                    part = matrix[:, chosen]
                    sources.append((0, (part.toarray() if sparse.issparse(part) else part) * scale))
                else:
                    sources.append((j, matrix))
            return replace(layer, sources=tuple(sources), bias=bias)

        return LayeredNetwork(len(chosen), tuple(change(layer) for layer in self.layers))

    def without(self, dead: Sequence[np.ndarray]) -> LayeredNetwork:
        """The network without neurons that give zero.

        Args:
            dead: For every layer but the last, a mask (n_neurons,).
        """
        kept = [np.arange(self.n_inputs), *(np.flatnonzero(~mask) for mask in dead)]
        layers = []
        for i, layer in enumerate(self.layers):
            rows = kept[i + 1] if i < len(dead) else np.arange(layer.n_neurons)
            sources = tuple(
                (j, as_matrix(_cut(matrix, rows, kept[j])))
                for j, matrix in layer.sources
                if j == 0 or len(kept[j])
            )
            activation = layer.activation.of(rows) if layer.activation else None
            layers.append(replace(layer, sources=sources, bias=layer.bias[rows], activation=activation))
        return LayeredNetwork(self.n_inputs, tuple(layers))


def _cut(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> Matrix:
    return matrix[rows][:, columns]


def as_matrix(matrix: Matrix) -> Matrix:
    """Sparse where most entries of a large matrix are zero, else a contiguous dense array."""
    size = matrix.shape[0] * matrix.shape[1]
    n_used = matrix.nnz if sparse.issparse(matrix) else np.count_nonzero(matrix)
    if size >= _SPARSE_SIZE and n_used < _SPARSE_SHARE * size:
        return sparse.csr_matrix(matrix)
    return np.ascontiguousarray(matrix.toarray() if sparse.issparse(matrix) else matrix, np.float64)


def product(matrix: Matrix, values: Floats) -> Floats:
    """`matrix @ values` for values (n_source, …), whose further axes are kept.

    By torch, whose number of threads is what the caller set: numpy's takes all cores for matrices so small
    that a second thread only costs.
    """
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    if sparse.issparse(matrix):
        found = matrix @ flat
    else:
        found = (torch.from_numpy(matrix) @ torch.from_numpy(np.ascontiguousarray(flat))).numpy()
    return np.asarray(found.reshape(matrix.shape[0], *values.shape[1:]))
