"""Linear functions that bound a network from below and above on boxes of its inputs, many boxes at a time.

Hidden neurons are bounded forwards by zonotopes, the outputs backwards through all layers too (CROWN: Zhang,
Weng, Chen, Hsieh and Daniel, "Efficient neural network robustness certification with general activation
functions", NeurIPS 2018). Both are exact where no neuron changes its slope within the box,
so that splitting boxes ends.

Arrays have the boxes last, so that every product with a weight matrix is one large product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers.numerics import zonotope
from dynprobe.analyzers.numerics.layered_network import (
    Activation,
    Floats,
    LayeredNetwork,
    Matrix,
    product,
)

# Error terms that are kept apart for a box, and entries of the largest array for some boxes at a time.
_ERRORS, _ENTRIES = 512, 5_000_000


@dataclass(frozen=True)
class LinearBounds:
    """Bounds of r outputs on n boxes: low_i(u) ≤ f_i(u) ≤ high_i(u) for all u in the box.

    Functions are given in coordinates t of the box, u = centre + radius t with t in [-1, 1]^k: entry 0 is the
    constant, the others are slopes.

    Args:
        low_function: (r, 1 + k, n).
        high_function: (r, 1 + k, n).
        low: Least value of the outputs, (r, n).
        high: Largest value, (r, n).
        neurons: For every hidden layer the least and the largest z, each (n_neurons, n).
    """

    low_function: Floats
    high_function: Floats
    low: Floats
    high: Floats
    neurons: tuple[tuple[Floats, Floats], ...]

    @property
    def n_unstable(self) -> np.ndarray:
        """How many neurons may change their slope within each box, (n,)."""
        n_boxes = self.low.shape[1]
        counts = [((least < 0) & (most > 0)).sum(0) for least, most in self.neurons]
        return np.sum(counts, axis=0, dtype=int) if counts else np.zeros(n_boxes, int)


def boxes_at_once(network: LayeredNetwork) -> int:
    """How many boxes `bound` may take at a time so that each of its arrays stays below 40 MB."""
    widest = max(network.n_inputs, *(layer.n_neurons for layer in network.layers))
    columns = max(1 + network.n_inputs + min(_ERRORS, network.n_hidden), network.n_outputs)
    return max(1, _ENTRIES // (widest * columns))


def bound(
    network: LayeredNetwork,
    low: Floats,
    high: Floats,
    *,
    backward: bool = False,
    reach: Callable[[Floats], Floats] | None = None,
) -> LinearBounds:
    """Bound the outputs of a network on boxes.

    Cost: a product with every weight matrix for each of the k inputs, for each neuron before it that may
    change its slope within the box, and for each output two backwards; with `backward` twice as many as there
    are neurons.

    Args:
        network: With k inputs and r outputs.
        low: Lower corners, (k, n).
        high: Upper corners, (k, n).
        backward: Bound hidden neurons backwards too.
        reach: For slopes (r, k, n) the largest value (r, n) of slopes · t, where only part of the boxes is
            allowed; by default that of the whole box.
    """
    reach = reach or _reach
    centre, radius = (low + high) / 2, (high - low) / 2
    k = len(centre)
    values = [zonotope.inputs(centre, radius)]
    neurons: list[tuple[Floats, Floats]] = []
    relaxations: list[Relaxation] = []
    n_columns = 1 + k + _ERRORS
    for i, layer in enumerate(network.layers[:-1]):
        assert layer.activation is not None
        z = zonotope.affine(layer, values)
        least, most = zonotope.extremes(z, k, reach)
        if backward and i:
            tight = _backward(network, i, np.eye(layer.n_neurons), centre, radius, relaxations)
            least = np.maximum(least, tight[0][:, 0] - reach(-tight[0][:, 1:]))
            most = np.minimum(most, tight[1][:, 0] + reach(tight[1][:, 1:]))
        neurons.append((least, most))
        relaxations.append(relax(layer.activation, least, most))
        values.append(zonotope.activated(layer.activation, z, least, most, n_columns=n_columns))
    outputs = zonotope.affine(network.layers[-1], values)
    least, most = zonotope.extremes(outputs, k, reach)
    last = len(network.layers) - 1
    if not last:
        return LinearBounds(outputs.form, outputs.form, least, most, ())
    under, over = _backward(network, last, np.eye(network.n_outputs), centre, radius, relaxations)
    return LinearBounds(
        under,
        over,
        np.maximum(least, under[:, 0] - reach(-under[:, 1:])),
        np.minimum(most, over[:, 0] + reach(over[:, 1:])),
        tuple(neurons),
    )


def _reach(slopes: Floats) -> Floats:
    return np.asarray(np.abs(slopes).sum(1))


@dataclass(frozen=True)
class Relaxation:
    """Lines below and above an activation: low_slope z + low_offset ≤ σ(z) ≤ high_slope z + high_offset.

    All arrays are (n_neurons, n_boxes) and hold for z within the neuron's bounds.
    """

    low_slope: Floats
    low_offset: Floats
    high_slope: Floats
    high_offset: Floats


def relax(activation: Activation, least: Floats, most: Floats) -> Relaxation:
    """Lines below and above an activation for z in [least, most]."""
    if activation.is_smooth:
        return _relax_smooth(activation, least, most)
    below, above = activation.below[:, None], activation.above[:, None]
    zero = np.zeros_like(least)
    slope = np.where(least >= 0, above, below) + zero  # right wherever the slope does not change
    unstable = (least < 0) & (most > 0)
    width = np.where(unstable, most - least, 1.0)
    chord = np.where(unstable, (above * most - below * least) / width, slope)
    offset = np.where(unstable, (below - chord) * least, 0.0)
    # Either slope gives a line on the other side; the one that leaves less room between it and the chord.
    line = np.where(unstable, np.where(most > -least, above, below), slope)
    convex = above >= below
    return Relaxation(
        np.where(convex, line, chord),
        np.where(convex, zero, offset),
        np.where(convex, chord, line),
        np.where(convex, offset, zero),
    )


def _relax_smooth(activation: Activation, least: Floats, most: Floats) -> Relaxation:
    """For tanh and the sigmoid: convex below zero, concave above, steepest at zero."""

    def slope_at(z: Floats) -> Floats:
        value = activation(z)
        return np.asarray(1 - value**2 if activation.kind == "tanh" else value * (1 - value))

    at_least, at_most = activation(least), activation(most)
    width = most - least
    middle = (least + most) / 2
    tangent = slope_at(middle)
    chord = np.where(width > 1e-12, (at_most - at_least) / np.where(width > 1e-12, width, 1.0), tangent)
    flat = np.minimum(slope_at(least), slope_at(most))  # no derivative in between is smaller
    convex, concave = most <= 0, least >= 0
    low_slope = np.where(concave, chord, np.where(convex, tangent, flat))
    high_slope = np.where(convex, chord, np.where(concave, tangent, flat))
    through_middle = activation(middle)
    low_value = np.where(concave, at_least - low_slope * least, at_least - flat * least)
    low_offset = np.where(convex, through_middle - tangent * middle, low_value)
    high_value = np.where(convex, at_most - high_slope * most, at_most - flat * most)
    high_offset = np.where(concave, through_middle - tangent * middle, high_value)
    return Relaxation(low_slope, low_offset, high_slope, high_offset)


def _backward(
    network: LayeredNetwork,
    index: int,
    rows: Floats,
    centre: Floats,
    radius: Floats,
    relaxations: list[Relaxation],
) -> tuple[Floats, Floats]:
    """Functions of t that bound `rows @ z` of a layer, substituting layer after layer."""
    shared = network, index, rows, centre, radius, relaxations
    return _substitute(*shared, lower=True), _substitute(*shared, lower=False)


def _substitute(
    network: LayeredNetwork,
    index: int,
    rows: Floats,
    centre: Floats,
    radius: Floats,
    relaxations: list[Relaxation],
    *,
    lower: bool,
) -> Floats:
    r, n = len(rows), centre.shape[1]
    constant = np.zeros((r, n))
    # what multiplies a_j of every layer, (n_neurons, r, n); layers are met from the last to the first
    pending: dict[int, Floats] = {}

    def spread(sources: tuple[tuple[int, Matrix], ...], bias: Floats, factors: Floats) -> None:
        nonlocal constant
        constant = constant + np.einsum("i,irn->rn", bias, factors)
        for j, matrix in sources:
            part = product(matrix.T, factors)
            pending[j] = pending[j] + part if j in pending else part

    first = network.layers[index]
    spread(first.sources, first.bias, np.repeat(rows.T[:, :, None], n, 2))
    for j in range(index, 0, -1):
        if j not in pending:
            continue
        factors, relaxation, layer = pending.pop(j), relaxations[j - 1], network.layers[j - 1]
        low, high = (
            (relaxation.low_slope, relaxation.low_offset),
            (relaxation.high_slope, relaxation.high_offset),
        )
        if not lower:
            low, high = high, low
        positive, negative = np.maximum(factors, 0), np.minimum(factors, 0)
        constant = constant + np.einsum("irn,in->rn", positive, low[1])
        constant = constant + np.einsum("irn,in->rn", negative, high[1])
        spread(layer.sources, layer.bias, positive * low[0][:, None] + negative * high[0][:, None])
    inputs = pending.get(0, np.zeros((len(centre), r, n)))
    function = np.empty((r, 1 + len(centre), n))
    function[:, 0] = constant + np.einsum("krn,kn->rn", inputs, centre)
    function[:, 1:] = (inputs * radius[:, None]).transpose(1, 0, 2)
    return function
