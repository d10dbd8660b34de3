"""Claims of the complete verifier of boxes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from _layered_networks import random_network

from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.layered_network import piecewise, smooth


def _grid(low, high, n):
    axes = [np.linspace(a, b, n) for a, b in zip(low, high, strict=True)]
    return np.array(list(itertools.product(*axes)))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["relu", "absolute value", "tanh"])
def test_the_verdict_is_that_of_a_dense_grid(kind, k):
    activations = {
        "relu": lambda n: piecewise(0.0, 1.0, n),
        "absolute value": lambda n: piecewise(-1.0, 1.0, n),
        "tanh": lambda n: smooth("tanh"),
    }
    for seed in range(5):
        network = random_network([k, 12, 12, 2], activation=activations[kind], seed=seed)
        low, high = np.full(k, 0.2), np.full(k, 0.7)
        values = network(_grid(low, high, 2000 if k == 1 else 120)).min(1)
        room = 0.05 * np.ptp(values)
        above = verify(network, low, high, values.min() - room)
        below = verify(network, low, high, values.min() + room)
        assert above.holds is True
        assert above.counterexample is None
        assert below.holds is False
        point = below.counterexample
        assert ((point >= low) & (point <= high)).all()
        assert network(point[None]).min() < values.min() + room


def test_a_deep_network_is_decided_near_its_least_value():
    network = random_network([2] + [50] * 6 + [1])
    low, high = np.array([0.3, 0.4]), np.array([0.35, 0.45])
    values = network(_grid(low, high, 100))
    room = 0.01 * np.ptp(values)
    verdict = verify(network, low, high, values.min() - room)
    assert verdict.holds is True
    assert verdict.n_boxes < 500


def test_a_box_without_width_is_its_point():
    network = random_network([3, 8, 2])
    point = np.array([0.1, 0.2, 0.3])
    value = network(point[None]).min()
    assert verify(network, point, point, value).holds is True
    assert verify(network, point, point, value + 1e-9).holds is False


def test_a_feature_without_width_is_not_split():
    network = random_network([2, 16, 16, 1])
    low, high = np.array([0.2, 0.5]), np.array([0.9, 0.5])
    values = network(_grid(low, high, 300))
    assert verify(network, low, high, values.min() - 0.01 * np.ptp(values)).holds is True


def test_time_that_is_over_gives_no_verdict():
    network = random_network([2, 16, 16, 1])
    low, high = np.zeros(2), np.ones(2)
    least = network(_grid(low, high, 50)).min()
    assert verify(network, low, high, least - 1, deadline=time.monotonic() - 1).holds is None
    verdict = verify(network, low, high, least - 1e-7, max_boxes=1)
    assert verdict.holds is None
    assert verdict.n_boxes <= 1


def test_an_undecidable_box_ends_at_its_deadline():
    network = random_network([6] + [40] * 4 + [1])
    low, high = np.zeros(6), np.ones(6)
    least = network(np.random.default_rng(0).random((2000, 6))).min()
    began = time.monotonic()
    verify(network, low, high, least - 1.0, deadline=began + 0.3)
    assert time.monotonic() - began < 1.5
