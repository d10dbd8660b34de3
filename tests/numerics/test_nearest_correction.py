"""Claims of the search for the nearest stable correction, and of the heuristics that seed it."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from _layered_networks import random_network
from scipy.ndimage import minimum_filter

from dynprobe.analyzers.numerics.centre_bounds import bound_centres
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.correction_seeds import holds, least_output, polished
from dynprobe.analyzers.numerics.layered_network import Layer, LayeredNetwork, piecewise, smooth
from dynprobe.analyzers.numerics.nearest_correction import NearestSearch, nearest_by_heuristic


def _judgement(network, start, *, radius=0.0, margin=1e-6, weights=None, **more):
    k = len(start)
    return Judgement(
        network,
        np.asarray(start, float),
        np.zeros(k),
        np.ones(k),
        np.ones(k) if weights is None else np.asarray(weights, float),
        np.full(k, radius) if np.isscalar(radius) else np.asarray(radius, float),
        margin,
        **more,
    )


def _rejected(sizes, seed, *, share=0.7, **more):
    """A judgement of a random network whose outputs are all positive on about 1 - share of the domain."""
    network = random_network(sizes, seed=seed)
    points = np.random.default_rng(seed + 100).random((2000, sizes[0]))
    values = network(points).min(1)
    network = network.combined(np.eye(network.n_outputs), -np.quantile(values, share))
    start = points[(values < np.quantile(values, 0.2)).argmax()]
    return _judgement(network, start, **more)


def _run(judgement, *, tolerance=1e-3, seconds=10.0, **more):
    return NearestSearch(judgement).run(deadline=time.monotonic() + seconds, tolerance=tolerance, **more)


def _on_grid(judgement, n=241):
    """Distance of the nearest stable correction of two features on a grid, and how coarse that is."""
    axis = np.linspace(0, 1, n)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    good = (judgement.values(points) >= judgement.margin).reshape(n, n)
    reach = round(float(judgement.radius[0]) * (n - 1))
    if reach:
        good = minimum_filter(good, 2 * reach + 1, mode="constant", cval=1)
    distance = judgement.distance(points).reshape(n, n)
    return distance[good].min() if good.any() else np.inf, 3 * judgement.weights.max() / (n - 1)


def _linear(slopes, constant):
    return LayeredNetwork(
        len(slopes), (Layer(((0, np.array([slopes], float)),), np.array([constant]), None),)
    )


@pytest.mark.parametrize("radius", [0.0, 0.05])
def test_the_distance_of_a_linear_judgement_is_its_closed_form(radius):
    slopes, weights = np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.3, 2.0])
    start = np.array([0.4, 0.6, 0.5])
    judgement = _judgement(_linear(slopes, -0.5), start, radius=radius, margin=0.1, weights=weights)
    value = slopes @ start - 0.5
    gain = np.abs(slopes) / weights
    expected = (0.1 - value + radius * np.abs(slopes).sum()) / gain.max()
    found = _run(judgement, tolerance=1e-6)
    assert found.lower <= expected <= found.upper
    assert found.upper == pytest.approx(expected, rel=2e-6)


def test_the_largest_change_of_a_linear_judgement_is_its_closed_form():
    slopes, weights, start = np.array([2.0, -1.0]), np.array([1.0, 0.5]), np.array([0.3, 0.7])
    judgement = _judgement(_linear(slopes, -0.5), start, margin=0.1, weights=weights, norm="linf")
    value = slopes @ start - 0.5
    expected = (0.1 - value) / (np.abs(slopes) / weights).sum()
    found = _run(judgement, tolerance=1e-6)
    assert found.lower <= expected <= found.upper
    assert found.upper == pytest.approx(expected, rel=2e-6)


def test_surroundings_end_at_the_domain():
    # u_0 ≥ 0.98 is asked for; a box of half-width 0.1 around 1 would leave the domain if it were not clipped,
    # and u_1 at its lower end need not move.
    judgement = _judgement(_linear([1.0, -0.01], -0.8), [0.5, 0.0], radius=0.1, margin=0.0)
    found = _run(judgement, tolerance=1e-6)
    expected = 0.5 - 0.1 - 0.099
    assert found.lower - 1e-9 <= 0.901 - 0.5 <= found.upper + 1e-9
    assert found.upper == pytest.approx(expected + 0.1, rel=1e-4)
    assert found.centre[1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("radius", [0.0, 0.025])
def test_the_distance_for_two_features_is_that_of_a_dense_grid(radius, norm):
    for seed in range(6):
        judgement = _rejected([2, 16, 16, 1 + seed % 3], seed, radius=radius, norm=norm, weights=[1.0, 0.7])
        found = _run(judgement, tolerance=0.002)
        expected, step = _on_grid(judgement)
        assert found.closed(0.002)
        if np.isinf(expected):
            assert found.lower > 0.3
        else:
            assert found.lower <= expected
            assert found.upper >= expected - step
            assert holds(judgement, found.centre, deadline=np.inf).holds


def test_a_deep_network_is_solved_within_few_boxes():
    judgement = _rejected([2] + [100] * 8 + [1], 0, radius=0.025)
    found = _run(judgement, tolerance=0.01)
    assert found.closed(0.01)
    assert found.n_boxes < 2000


def test_a_nearer_component_that_the_gradient_leads_away_from_is_found():
    # Outputs over u_0: a high ridge at 0.9 whose slope reaches the start at 0.5, a narrow peak at 0.25.
    def hat(centre, half, height):
        return [(centre - half, height / half), (centre, -2 * height / half), (centre + half, height / half)]

    kinks = [*hat(0.9, 0.5, 2.0), *hat(0.25, 0.04, 2.0)]
    first = np.array([[1.0, 0.0]] * len(kinks))
    network = LayeredNetwork(
        2,
        (
            Layer(((0, first),), -np.array([k[0] for k in kinks]), piecewise(0.0, 1.0, len(kinks))),
            Layer(((1, np.array([[k[1] for k in kinks]])),), np.array([-1.0]), None),
        ),
    )
    judgement = _judgement(network, [0.45, 0.5], radius=[0.01, 0.3])
    assert least_output(network, judgement.start[None])[1][0, 0] > 0
    found = _run(judgement, tolerance=1e-3)
    assert found.centre[0] == pytest.approx(0.26, abs=1e-3)
    assert found.lower - 1e-6 <= 0.19 <= found.upper + 1e-6


def test_a_tip_of_the_stable_corrections_does_not_hold_up_the_search():
    # Two outputs whose stable corrections are a wedge that opens sideways, not away from the start.
    rows = np.array([[1.0, -0.12], [-0.8, 1.0]])
    network = LayeredNetwork(2, (Layer(((0, rows),), -rows @ np.array([0.6, 0.4]), None),))
    judgement = _judgement(network, [0.1, 0.35], radius=0.02, margin=0.0)
    found = _run(judgement, tolerance=1e-3)
    assert found.closed(1e-3)
    assert found.n_boxes < 500
    expected, step = _on_grid(judgement, 401)
    assert found.lower <= expected
    assert found.upper >= expected - step


def test_integer_features_are_those_of_an_enumeration():
    for seed, radius in itertools.product(range(4), (0.0, 0.03)):
        spacing, origin = np.array([0.125, 0.0]), np.array([0.06, 0.0])
        judgement = _rejected(
            [2, 12, 12, 1], seed, radius=[0.0, radius], spacing=spacing, origin=origin, share=0.8
        )
        found = _run(judgement, tolerance=1e-3)
        best = np.inf
        for value in np.arange(0.06, 1.0, 0.125):
            axis = np.linspace(0, 1, 4001)
            points = np.stack([np.full_like(axis, value), axis], 1)
            good = judgement.values(points) >= judgement.margin
            reach = round(radius * 4000)
            if reach:
                good = minimum_filter(good, 2 * reach + 1, mode="constant", cval=1)
            if good.any():
                best = min(best, judgement.distance(points)[good].min())
        assert found.lower <= best
        assert found.upper >= best - 1e-3
        assert found.closed(1e-3)
        if found.centre is not None:
            whole = (found.centre[0] - 0.06) / 0.125
            assert whole == pytest.approx(round(whole), abs=1e-9)


def test_only_integer_features_are_those_of_an_enumeration_exactly():
    spacing, origin = np.full(3, 0.2), np.zeros(3)
    for seed in range(4):
        judgement = _rejected([3, 12, 12, 2], seed, radius=0.1, spacing=spacing, origin=origin)
        points = np.array(list(itertools.product(np.arange(6) * 0.2, repeat=3)))
        stable = [p for p in points if holds(judgement, p, deadline=np.inf).holds]
        found = _run(judgement, tolerance=0.0)
        if stable:
            assert found.upper == pytest.approx(judgement.distance(np.array(stable)).min())
            assert found.lower == pytest.approx(found.upper)
        else:
            assert found.lower == np.inf


def test_no_correction_within_the_domain_is_told_from_none_found():
    network = random_network([3, 12, 12, 1])
    values = network(np.random.default_rng(0).random((5000, 3)))
    impossible = network.combined(np.ones((1, 1)), -values.max() - 0.2)
    found = _run(_judgement(impossible, np.full(3, 0.5)))
    assert found.exists is False
    assert found.lower == np.inf
    assert found.closed(0.0)
    early = NearestSearch(_judgement(impossible, np.full(3, 0.5)))
    assert early.run(deadline=time.monotonic() - 1, tolerance=0.01).exists is None


def test_a_radius_too_large_for_any_room_gives_no_stable_correction():
    judgement = _rejected([2, 16, 16, 1], 0)
    assert _run(judgement).exists is True
    wide = _judgement(judgement.network, judgement.start, radius=0.9)
    assert _run(wide).exists is False


def test_a_start_that_is_stable_has_distance_zero():
    judgement = _judgement(_linear([1.0, 1.0], -0.5), [0.6, 0.6], radius=0.05)
    found = _run(judgement)
    assert (found.lower, found.upper) == (0.0, 0.0)


def test_bounds_at_every_interruption_bracket_the_answer_and_only_get_better():
    judgement = _rejected([3, 16, 16, 1], 1, radius=0.02)
    answer = _run(judgement, tolerance=1e-3)
    search = NearestSearch(judgement)
    lower, upper = 0.0, np.inf
    for _ in range(500):
        found = search.run(deadline=time.monotonic() + 0.02, tolerance=1e-3)
        assert found.lower >= lower
        assert found.upper <= upper
        assert found.lower <= answer.upper
        assert found.upper >= answer.lower
        lower, upper = found.lower, found.upper
        if found.closed(1e-3):
            break
    assert search.bounds.closed(1e-3)


def test_a_cutoff_ends_the_search_and_a_later_call_goes_on():
    judgement = _rejected([2, 16, 16, 1], 2)
    answer = _run(judgement)
    search = NearestSearch(judgement)
    cut = search.run(deadline=time.monotonic() + 10, tolerance=1e-3, cutoff=answer.lower / 2)
    assert cut.lower >= answer.lower / 2
    assert cut.n_boxes <= answer.n_boxes
    assert search.run(deadline=time.monotonic() + 10, tolerance=1e-3).closed(1e-3)


def test_a_seed_that_is_a_correction_is_an_upper_bound_at_once():
    judgement = _rejected([3, 16, 16, 1], 1, radius=0.02)
    answer = _run(judgement)
    search = NearestSearch(judgement, seeds=[answer.centre, np.zeros(3)])
    found = search.run(deadline=time.monotonic() + 10, tolerance=1e-3, cutoff=0.0)
    assert found.upper <= answer.upper
    assert found.n_boxes == 0


def test_boxes_of_centres_have_no_stable_correction_below_their_bound():
    rng = np.random.default_rng(0)
    for seed, norm in itertools.product(range(4), ("l1", "linf")):
        judgement = _rejected([2, 12, 12, 2], seed, radius=0.03, norm=norm, weights=[1.0, 0.6])
        low = rng.random((2, 12)) * 0.8
        high = low + 0.2 * rng.random((2, 12))
        found = bound_centres(judgement, low, high)
        for j in range(12):
            centres = low[:, j] + (high - low)[:, j] * rng.random((60, 2))
            bottom, top = judgement.box_around(centres)
            t = np.array(list(itertools.product(np.linspace(0, 1, 5), repeat=2)))
            around = bottom[:, None] + t * (top - bottom)[:, None]
            values = judgement.values(around.reshape(-1, 2)).reshape(60, 25).min(1)
            stable = centres[values >= judgement.margin + 0.02]  # surely: the grid of points is coarse
            sure = np.array([holds(judgement, c, deadline=np.inf).holds is True for c in stable], bool)
            stable = stable[sure]
            assert (judgement.distance(stable) >= found.distance[j] - 1e-12).all()
            assert ((stable >= found.low[:, j] - 1e-12) & (stable <= found.high[:, j] + 1e-12)).all()
            if found.all_stable[j]:
                assert (values >= judgement.margin).all()


def test_the_gradient_is_that_of_automatic_differentiation():
    for activation in (
        lambda n: piecewise(0.2, 1.0, n),
        lambda n: smooth("tanh"),
        lambda n: smooth("sigmoid"),
    ):
        network = random_network([4, 9, 8, 3], activation=activation)
        points = np.random.default_rng(0).random((5, 4))
        values, slopes = least_output(network, points)
        for j in range(4):
            step = np.zeros(4)
            step[j] = 1e-6
            numeric = (network(points + step).min(1) - network(points - step).min(1)) / 2e-6
            np.testing.assert_allclose(slopes[:, j], numeric, atol=1e-6)
        np.testing.assert_allclose(values, network(points).min(1))


def test_polishing_drops_needless_changes():
    judgement = _judgement(_linear([1.0, 0.1, 0.0], -0.5), [0.2, 0.2, 0.2])
    centre = np.array([0.9, 0.9, 0.9])

    def accepts(point):
        return bool(judgement.values(point[None])[0] >= judgement.margin)

    found = polished(judgement, centre, accepts, deadline=np.inf)
    assert accepts(found)
    assert found[2] == 0.2
    assert judgement.distance(found) < 0.4


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_the_heuristic_finds_stable_corrections_not_far_from_the_nearest(norm):
    for seed in range(4):
        judgement = _rejected([3, 16, 16, 2], seed, radius=0.02, norm=norm)
        answer = _run(judgement)
        centre = nearest_by_heuristic(judgement, deadline=time.monotonic() + 5, seed=0)
        if centre is not None:
            assert holds(judgement, centre, deadline=np.inf).holds
            assert judgement.distance(centre) >= answer.lower
            assert judgement.distance(centre) <= 2 * answer.upper


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_the_heuristic_finds_a_correction_of_hundreds_of_features(norm):
    judgement = _rejected([300, 30, 30, 2], 0, norm=norm, share=0.9)
    centre = nearest_by_heuristic(judgement, deadline=time.monotonic() + 5, seed=0)
    assert judgement.values(centre[None])[0] >= judgement.margin
    assert ((centre >= 0) & (centre <= 1)).all()
    if norm == "l1":
        assert (centre != judgement.start).sum() < 30
    else:
        assert judgement.distance(centre) < 0.2


def test_the_heuristic_gives_the_same_for_the_same_seed_and_leaves_the_global_generators_alone():
    judgement = _rejected([20, 16, 16, 1], 0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, other = (nearest_by_heuristic(judgement, deadline=time.monotonic() + 9, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize("radius", [0.0, 0.01])
def test_no_correction_exists_where_an_integer_feature_has_no_allowed_value(radius):
    spacing, origin = np.array([0.2, 0.0]), np.zeros(2)
    judgement = _judgement(
        _linear([1.0, 1.0], -0.9), [0.66, 0.1], radius=radius, spacing=spacing, origin=origin
    )
    judgement = replace(judgement, low=np.array([0.65, 0.0]), high=np.array([0.7, 1.0]))
    start = time.monotonic()
    found = NearestSearch(judgement, seeds=[np.array([0.6, 0.9])]).run(deadline=start + 5, tolerance=0.01)
    assert (found.lower, found.upper, found.centre, found.exists) == (np.inf, np.inf, None, False)
    assert nearest_by_heuristic(judgement, deadline=start + 5, seed=0) is None
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("width", [1e3, 1e8, 1e9])
def test_an_integer_of_a_billion_steps_may_stay_at_the_end_of_its_range(width):
    rng = np.random.default_rng(0)
    for _ in range(20):
        low = float(rng.integers(-1000, 1000))
        own = float(rng.integers(0, int(width))) / width
        judgement = _judgement(
            _linear([1.0, 0.0], -0.5),
            [0.2, own],
            spacing=np.array([0.0, 1 / width]),
            origin=np.array([0.0, -low / width]),
        )
        judgement = replace(judgement, low=np.array([0.0, own]), high=np.array([1.0, own]))
        found = _run(judgement, tolerance=0.01)
        assert found.closed(0.01)
        assert found.upper == pytest.approx(0.300001, rel=0.01)
        assert found.centre[1] == pytest.approx(own, abs=1e-12)
