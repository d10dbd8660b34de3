"""Counting directions: greedy, exact and bounded."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers.numerics.effective_directions import (
    chance_directions,
    cosines,
    effective_directions,
    orientation,
    principal_plane,
    representatives,
)
from dynprobe.analyzers.numerics.neurons import layer_neurons, model_neurons, state_neurons
from dynprobe.analyzers.numerics.width_slope import Slope, regime, width_slope

RNG = np.random.default_rng(0)


def on_circle(*degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def orders(n, count=30, seed=0):
    rng = np.random.default_rng(seed)
    return [np.arange(n), *(rng.permutation(n) for _ in range(count))]


def counted(vectors, threshold=0.95, *, unsigned=False):
    cosine = cosines(vectors)
    return effective_directions(np.abs(cosine) if unsigned else cosine, threshold, orders(len(vectors)))


def brute_force(close):
    n = len(close)
    for size in range(1, n + 1):
        for chosen in itertools.combinations(range(n), size):
            if close[list(chosen)].any(0).all():
                return size
    raise AssertionError


def test_planted_directions_are_found_whatever_the_order():
    base = np.linalg.qr(RNG.standard_normal((9, 9)))[0][:3]
    vectors = base[RNG.integers(0, 3, 40)] * RNG.uniform(0.1, 10, (40, 1))
    vectors += 1e-3 * np.linalg.norm(vectors, axis=1, keepdims=True) * RNG.standard_normal((40, 9))
    assert counted(vectors) == (3, 3, 3, 3, 3)


def test_signed_and_unsigned_numbers_differ_by_the_opposite_directions():
    base = np.eye(5)[:2]
    vectors = np.concatenate([base, -base, 3 * base])
    assert counted(vectors).value == 4
    assert counted(vectors, unsigned=True).value == 2


def test_the_greedy_number_of_a_chain_depends_on_the_order_and_its_range_says_so():
    chain = on_circle(0, 15, 30, 45, 60)  # cosine 0.95 is 18.2 degrees
    found = counted(chain)
    assert found.value == 3
    assert (found.low, found.high, found.least) == (2, 3, 2)
    assert found.bound <= found.least


@pytest.mark.parametrize("seed", range(12))
def test_the_least_number_is_that_of_brute_force_and_lies_within_the_bounds(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((11, 3)) * rng.uniform(0.5, 2, (11, 1))
    for threshold, sign in itertools.product((0.7, 0.8, 0.9), (False, True)):
        found = counted(vectors, threshold, unsigned=sign)
        cosine = np.abs(cosines(vectors)) if sign else cosines(vectors)
        close = (cosine > threshold) | np.eye(11, dtype=bool)
        assert found.least == brute_force(close)
        assert found.bound <= found.least <= found.low <= found.value <= found.high


def test_every_representative_covers_and_no_two_are_close():
    vectors = RNG.standard_normal((60, 4))
    close = cosines(vectors) > 0.8
    np.fill_diagonal(close, True)
    chosen = representatives(close, np.arange(60))
    assert close[chosen].any(0).all()
    assert close[np.ix_(chosen, chosen)].sum() == len(chosen)


def test_two_caps_farther_apart_than_twice_the_angle_cannot_share_any_direction():
    half = math.degrees(math.acos(0.95))
    assert counted(on_circle(0, 2 * half - 0.1)).bound == 1  # the direction between them covers both
    assert counted(on_circle(0, 2 * half + 0.1)).bound == 2
    assert counted(on_circle(0, 2 * half - 0.1)).least == 2  # it is that of no neuron


def test_no_neuron_has_no_direction():
    assert effective_directions(np.zeros((0, 0)), 0.95, [np.arange(0)]) == (0, 0, 0, 0, 0)


def test_random_neurons_in_a_plane_need_few_directions_and_in_many_dimensions_one_each():
    rng = np.random.default_rng(1)
    plane = chance_directions(200, 2, [0.95], 5, rng)
    assert 10 <= plane[:, 0].min() <= plane[:, 0].max() <= 19  # 360/18.2 at most
    assert (plane[:, 1] <= 10).all()
    np.testing.assert_array_equal(chance_directions(200, 500, [0.9, 0.95], 5, rng), 200.0)
    np.testing.assert_array_equal(chance_directions(30, 1, [0.95], 3, rng)[:, 0], 2.0)


def test_orientation_of_an_input_weight_and_a_bias_is_its_angle_and_tells_pi_from_zero():
    vectors = np.array([[2.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [-1.0, -0.0]])
    angle, share = orientation(vectors, principal_plane(vectors, np.ones(4)))
    np.testing.assert_allclose(angle, [0, math.pi, math.pi / 2, math.pi])
    np.testing.assert_allclose(share, 1)


def test_neurons_without_a_bias_have_orientations_of_both_signs():
    vectors = np.array([[2.0], [-3.0]])
    angle, share = orientation(vectors, principal_plane(vectors, np.ones(2)))
    np.testing.assert_allclose(angle, [0, math.pi])
    np.testing.assert_allclose(share, 1)


@pytest.mark.parametrize("shape", [(50, 7), (5, 30)])
def test_the_principal_plane_of_a_completely_condensed_layer_is_real_and_one_direction(shape):
    n, fan_in = shape
    direction = RNG.standard_normal(fan_in)
    vectors = RNG.uniform(0.5, 2, (n, 1)) * direction * RNG.choice([-1, 1], (n, 1))
    plane = principal_plane(vectors, np.ones(n))
    assert plane.dtype == np.float64
    assert abs(plane[0] @ direction) == pytest.approx(np.linalg.norm(direction))
    np.testing.assert_array_equal(plane[1], 0)
    angle, share = orientation(vectors, plane)
    np.testing.assert_allclose(share, 1)
    np.testing.assert_allclose(np.sort(np.unique(angle.round(9))), [0, math.pi], atol=1e-8)


def test_few_and_many_neurons_give_the_same_principal_plane():
    vectors = RNG.standard_normal((6, 9))
    weights = RNG.uniform(0.1, 1, 6)
    doubled = principal_plane(np.repeat(vectors, 3, 0), np.repeat(weights, 3))
    np.testing.assert_allclose(principal_plane(vectors, weights), doubled, atol=1e-9)


def test_neurons_of_convolutions_and_linear_layers_are_what_feeds_one_output():
    linear, transposed = nn.Linear(3, 2), nn.ConvTranspose2d(4, 5, 3)
    assert layer_neurons(linear).shape == (2, 4)
    assert torch.equal(layer_neurons(linear)[:, -1], linear.bias)
    assert layer_neurons(transposed).shape == (5, 4 * 9 + 1)
    assert torch.equal(layer_neurons(transposed)[2, :-1], transposed.weight[:, 2].flatten())
    assert layer_neurons(nn.Conv1d(4, 6, 3, bias=False)).shape == (6, 12)


def test_grouped_tied_and_computed_weights_are_left_out_with_a_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    found, notes = model_neurons(model)
    assert list(found) == ["1"]
    assert "grouped" in notes[0]
    assert "another layer" in notes[1]


def test_a_state_without_its_model_gives_the_same_neurons():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4, bias=False))
    by_name, by_model = state_neurons(model.state_dict()), model_neurons(model)[0]
    assert by_name.keys() == by_model.keys()
    for name in by_name:
        assert torch.equal(by_name[name], by_model[name])


def test_a_power_law_has_its_exponent_as_slope_and_no_error():
    width = np.array([10.0, 100, 1000, 1e4])
    found = width_slope(width, 3 * width**-0.5)
    assert found.value == pytest.approx(-0.5)
    assert found.stderr == pytest.approx(0, abs=1e-12)
    assert regime(found, 0.1) == "linear"


def test_the_interval_of_the_slope_covers_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(2)
    width = np.array([50.0, 100, 200, 400])
    slopes = [width_slope(width, width**0.372 * np.exp(0.1 * rng.standard_normal(4))) for _ in range(2000)]
    inside = np.mean([slope.low < 0.372 < slope.high for slope in slopes])
    assert inside == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.6, -0.4), "linear"),
        ((0.3, 0.5), "condensed"),
        ((-0.05, 0.06), "critical"),
        ((-0.4, 0.05), "undecided"),
        ((-0.5, 0.5), "undecided"),
    ],
)
def test_a_regime_is_said_only_if_the_whole_interval_lies_in_it(interval, verdict):
    low, high = interval
    assert regime(Slope((low + high) / 2, 0.01, low, high), 0.1) == verdict


def test_two_widths_or_distances_of_zero_give_no_slope_and_no_verdict():
    for width, distance in (([10, 20, 20], [1, 2, 2]), ([10, 20, 40], [1, 0, 2])):
        found = width_slope(np.array(width, float), np.array(distance, float))
        assert math.isnan(found.value)
        assert regime(found, 0.1) == "undecided"
