"""Claims of the linear bounds of layered networks on boxes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from dynprobe.analyzers.numerics.layered_network import Layer, LayeredNetwork, piecewise, smooth
from dynprobe.analyzers.numerics.linear_bounds import bound, boxes_at_once

ACTIVATIONS = {
    "relu": lambda n: piecewise(0.0, 1.0, n),
    "leaky relu": lambda n: piecewise(0.1, 1.0, n),
    "absolute value": lambda n: piecewise(-1.0, 1.0, n),
    "concave": lambda n: piecewise(0.3, -0.5, n),
    "mixed": lambda n: piecewise(np.linspace(-1, 1, n), np.linspace(1, -0.5, n), n),
    "tanh": lambda n: smooth("tanh"),
    "sigmoid": lambda n: smooth("sigmoid"),
}


def _network(sizes, activation=ACTIVATIONS["relu"], seed=0):
    rng = np.random.default_rng(seed)
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weight = rng.normal(size=(n_out, n_in)) * np.sqrt(2 / n_in)
        last = i == len(sizes) - 2
        bias = 0.3 * rng.normal(size=n_out)
        layers.append(Layer(((i, weight),), bias, None if last else activation(n_out)))
    return LayeredNetwork(sizes[0], tuple(layers))


def _with_residuals(network, seed=1):
    rng = np.random.default_rng(seed)
    layers = list(network.layers)
    width = layers[2].n_neurons
    more = (
        (1, rng.normal(size=(width, layers[0].n_neurons))),
        (0, rng.normal(size=(width, network.n_inputs))),
    )
    layers[2] = replace(layers[2], sources=layers[2].sources + more)
    return replace(network, layers=tuple(layers))


def _boxes(k, n, width, seed=2):
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform(-1, 1, (k, n)), width * rng.random((k, n))
    return centre - half, centre + half


def _least_room(network, low, high, found, n_points=100):
    """The least distance between sampled outputs and their bounds: negative where a bound is wrong."""
    k, n = low.shape
    t = np.random.default_rng(3).uniform(-1, 1, (n_points, k, n))
    t[: 2**k] = np.array(np.meshgrid(*[[-1, 1]] * k)).reshape(k, -1).T[:, :, None]
    room = np.inf
    for j in range(n):
        y = network((low + high)[:, j] / 2 + (high - low)[:, j] / 2 * t[:, :, j])
        below = found.low_function[:, 0, j] + t[:, :, j] @ found.low_function[:, 1:, j].T
        above = found.high_function[:, 0, j] + t[:, :, j] @ found.high_function[:, 1:, j].T
        for gap in (y - below, above - y, y - found.low[:, j], found.high[:, j] - y):
            room = min(room, gap.min())
    return room


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_and_values_bound_the_outputs_in_every_box(name, backward):
    network = _with_residuals(_network([3, 10, 12, 8, 2], ACTIVATIONS[name]))
    for width in (0.02, 0.3, 2.0):
        low, high = _boxes(3, 15, width)
        assert _least_room(network, low, high, bound(network, low, high, backward=backward)) >= -1e-12


def test_sparse_matrices_give_the_bounds_of_dense_ones():
    dense = _network([3, 10, 12, 2])
    layers = [
        replace(layer, sources=tuple((j, sparse.csr_matrix(m)) for j, m in layer.sources))
        for layer in dense.layers
    ]
    low, high = _boxes(3, 9, 0.5)
    one, other = bound(dense, low, high), bound(replace(dense, layers=tuple(layers)), low, high)
    np.testing.assert_allclose(other.low, one.low, atol=1e-12)
    np.testing.assert_allclose(other.high_function, one.high_function, atol=1e-12)


def test_bounds_are_exact_where_no_neuron_changes_its_slope():
    network = _network([3, 10, 12, 8, 2])
    low, high = _boxes(3, 50, 1e-3)
    found = bound(network, low, high)
    exact = found.n_unstable == 0
    assert exact.sum() > 20
    np.testing.assert_allclose(found.low_function[:, :, exact], found.high_function[:, :, exact], atol=1e-12)
    corners = np.stack([np.where(np.array(s)[:, None], low, high) for s in np.ndindex(2, 2, 2)])
    values = np.array([network(c.T).T for c in corners])
    np.testing.assert_allclose(found.low[:, exact], values.min(0)[:, exact], atol=1e-12)
    np.testing.assert_allclose(found.high[:, exact], values.max(0)[:, exact], atol=1e-12)


def test_a_network_without_hidden_layers_is_bounded_exactly():
    network = _network([4, 3])
    low, high = _boxes(4, 5, 1.0)
    found = bound(network, low, high)
    weight = network.layers[0].sources[0][1]
    middle = network(((low + high) / 2).T).T
    np.testing.assert_allclose(found.high, middle + abs(weight) @ (high - low) / 2, atol=1e-12)


def test_hidden_neurons_bounded_backwards_too_have_no_wider_bounds():
    network = _network([2, 20, 20, 20, 2])
    low, high = _boxes(2, 30, 0.3)
    one, other = bound(network, low, high), bound(network, low, high, backward=True)
    for (low_a, high_a), (low_b, high_b) in zip(one.neurons[:2], other.neurons[:2], strict=True):
        assert (low_b >= low_a - 1e-12).all()
        assert (high_b <= high_a + 1e-12).all()
    assert (other.high - other.low).mean() <= (one.high - one.low).mean()


def test_bounds_of_a_deep_network_are_not_far_from_its_range():
    # One linear function above and one below each neuron, forwards, gives bounds 50 times the range here.
    network = _network([2] + [50] * 8 + [1])
    low, high = _boxes(2, 20, 0.03)
    found = bound(network, low, high)
    t = np.random.default_rng(0).random((200, 2, 1))
    y = network((low + t * (high - low)).transpose(2, 0, 1).reshape(-1, 2)).reshape(20, -1)
    assert (found.high - found.low).mean() < 2 * (y.max(1) - y.min(1)).mean()


def test_error_terms_beyond_those_that_are_kept_still_count(monkeypatch):
    monkeypatch.setattr("dynprobe.analyzers.numerics.linear_bounds._ERRORS", 5)
    for name in ("relu", "concave", "tanh"):
        network = _with_residuals(_network([3, 10, 12, 8, 2], ACTIVATIONS[name]))
        low, high = _boxes(3, 15, 0.3)
        assert _least_room(network, low, high, bound(network, low, high)) >= -1e-12


def test_a_box_is_bounded_the_same_alone_and_among_others():
    network = _network([3, 10, 12, 8, 2])
    low, high = _boxes(3, 10, 0.3)
    together = bound(network, low, high)
    for j in range(10):
        alone = bound(network, low[:, j : j + 1], high[:, j : j + 1])
        np.testing.assert_allclose(alone.low[:, 0], together.low[:, j], atol=1e-12)


def test_fewer_boxes_of_larger_networks_are_taken_at_once():
    assert boxes_at_once(_network([2, 100, 100, 1])) > 64
    assert boxes_at_once(_network([800, 1000, 1000, 1])) < 10


def test_bounds_hold_for_points_where_a_reach_says_so():
    # The part of the box with t_0 + t_1 ≤ 0: a triangle, whose largest values are at three corners.
    network = _network([2, 12, 12, 1])
    corners = np.array([[-1, -1], [-1, 1], [1, -1]], float)

    def reach(slopes):
        return np.einsum("rkn,ck->crn", slopes, corners).max(0)

    low, high = _boxes(2, 10, 0.5)
    found, whole = bound(network, low, high, reach=reach), bound(network, low, high)
    t = np.random.default_rng(0).uniform(-1, 1, (500, 2))
    t = t[t.sum(1) <= 0]
    for j in range(10):
        y = network((low + high)[:, j] / 2 + (high - low)[:, j] / 2 * t)[:, 0]
        assert found.low[0, j] - 1e-12 <= y.min()
        assert found.high[0, j] + 1e-12 >= y.max()
    assert (found.high - found.low).mean() < (whole.high - whole.low).mean()
