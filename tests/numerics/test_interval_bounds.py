"""Interval bounds enclose every value, and a ball that they exclude holds no correction."""

import itertools
import math
import time

import numpy as np
import pytest

from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.interval_bounds import excluded_distance, interval_bound
from dynprobe.analyzers.numerics.layered_network import Layer, LayeredNetwork, piecewise, smooth

ACTIVATIONS = {
    "relu": lambda n: piecewise(0.0, 1.0, n),
    "leaky": lambda n: piecewise(0.2, 1.0, n),
    "absolute value": lambda n: piecewise(-1.0, 1.0, n),
    "concave": lambda n: piecewise(0.5, -0.5, n),
    "tanh": lambda _n: smooth("tanh"),
    "sigmoid": lambda _n: smooth("sigmoid"),
}


def network(kind, sizes=(3, 8, 6, 1), seed=0):
    rng = np.random.default_rng(seed)
    layers = [
        Layer(
            ((i, rng.normal(size=(b, a)) / np.sqrt(a)),),
            rng.normal(size=b) * 0.3,
            ACTIVATIONS[kind](b) if i < len(sizes) - 2 else None,
        )
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    return LayeredNetwork(sizes[0], tuple(layers))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_in_a_box_lie_within_its_interval_bounds(kind):
    rng = np.random.default_rng(1)
    net = network(kind)
    low = rng.random((3, 20)) - 0.5
    high = low + rng.random((3, 20))
    least, most = interval_bound(net, low, high)
    for i in range(20):
        values = net(low[:, i] + rng.random((500, 3)) * (high - low)[:, i])[:, 0]
        assert least[0, i] - 1e-12 <= values.min()
        assert values.max() <= most[0, i] + 1e-12


def judgement(net, start, margin, norm="l1"):
    k = net.n_inputs
    ones = np.ones(k)
    return Judgement(net, start, np.zeros(k), ones, 0.5 + np.arange(k), np.zeros(k), margin, norm)


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_no_point_within_the_excluded_distance_is_a_correction(kind, norm):
    net = network(kind, seed=3)
    rng = np.random.default_rng(2)
    points = rng.random((20_000, 3))
    values = net(points)[:, 0]
    case = judgement(net, points[values.argmin()], float(np.quantile(values, 0.9)), norm)
    excluded = excluded_distance(case, time.monotonic() + 5)
    assert excluded > 0
    assert case.distance(points[values >= case.margin]).min() >= excluded


def test_a_margin_that_no_output_reaches_excludes_the_whole_domain():
    assert excluded_distance(judgement(network("relu"), np.zeros(3), 1e6), time.monotonic() + 5) == math.inf
