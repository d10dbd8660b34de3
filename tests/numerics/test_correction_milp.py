"""The nearest correction by mixed-integer programming, against closed forms and brute force."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import minimum_filter
from scipy.optimize import linprog

from dynprobe.analyzers.numerics import correction_milp, correction_model, network_milp
from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.correction_milp import n_binaries, nearest_by_milp
from dynprobe.analyzers.numerics.correction_problem import Bounds, Judgement
from dynprobe.analyzers.numerics.layered_network import Layer, LayeredNetwork, piecewise, smooth
from dynprobe.analyzers.numerics.nearest_correction import NearestSearch
from dynprobe.analyzers.numerics.network_milp import Program

UNKNOWN = Bounds(0.0, np.inf)
SLOPES = {"relu": (0.0, 1.0), "leaky": (0.1, 1.0), "absolute": (-1.0, 1.0), "concave": (0.3, -0.5)}


def solve(judgement, *, known=UNKNOWN, seconds=20.0, tolerance=0.01):
    deadline = time.monotonic() + seconds
    return nearest_by_milp(judgement, known=known, deadline=deadline, tolerance=tolerance)


def random_network(sizes, slopes="relu", *, seed=0, residual=False):
    rng = np.random.default_rng(seed)
    layers = []
    for i, (n_before, n) in enumerate(itertools.pairwise(sizes)):
        sources = [(i, rng.normal(size=(n, n_before)) * np.sqrt(2 / n_before))]
        if residual and i == 2:
            sources += [(j, rng.normal(size=(n, sizes[j]))) for j in (0, 1)]
        activation = piecewise(*SLOPES[slopes], n) if i < len(sizes) - 2 else None
        layers.append(Layer(tuple(sources), rng.normal(size=n) * 0.3, activation))
    return LayeredNetwork(sizes[0], tuple(layers))


def random_judgement(network, *, seed=0, radius=0.0, norm="l1", share=0.2):
    """A start at which the network fails, and a margin so that about a share of all points holds."""
    rng = np.random.default_rng(seed + 100)
    k = network.n_inputs
    level = np.quantile(network(rng.random((2000, k))).min(1), 1 - share)
    network = network.combined(np.eye(network.n_outputs), -level)
    starts = rng.random((200, k))
    start = starts[network(starts).min(1) < -1e-3][0]
    weights = rng.random(k) + 0.5
    return Judgement(network, start, np.zeros(k), np.ones(k), weights, np.full(k, radius), 1e-6, norm)


def linear_judgement(slopes, constant, **changes):
    """f(u) = slopes · u + constant on the unit box, judged at its middle."""
    k = len(slopes)
    layer = Layer(((0, np.array([slopes], float)),), np.array([constant], float), None)
    judgement = Judgement(
        LayeredNetwork(k, (layer,)), np.full(k, 0.5), np.zeros(k), np.ones(k), np.ones(k), np.zeros(k), 1e-3
    )
    return replace(judgement, **changes)


def least_on_grid(judgement, n=400):
    """Least distance of a (stable) correction on a grid of two features; radii are multiples of its step."""
    points = np.array(list(itertools.product(np.linspace(0, 1, n + 1), repeat=2)))
    values = judgement.values(points).reshape(n + 1, n + 1)
    if judgement.is_stable:
        values = minimum_filter(values, 2 * np.round(judgement.radius * n).astype(int) + 1, mode="nearest")
    holds = points[values.ravel() >= judgement.margin]
    return judgement.distance(holds).min() if len(holds) else np.inf


def least_of_all_patterns(judgement):
    """One linear program for each way in which the neurons of one ReLU layer can be active."""
    hidden, last = judgement.network.layers
    (_, into), (_, out) = hidden.sources[0], last.sources[0]
    k, start, weights = judgement.n_features, judgement.start, judgement.weights
    n_costs = k if judgement.norm == "l1" else 1
    each = np.eye(k) if judgement.norm == "l1" else np.ones((k, 1))
    distance = np.block([[np.diag(weights), -each], [-np.diag(weights), -each]])
    least = np.inf
    for pattern in itertools.product([0.0, 1.0], repeat=hidden.n_neurons):
        active = np.array(pattern)
        sign = 2 * active - 1
        rows = np.concatenate([-sign[:, None] * into, -(out * active) @ into])
        ends = [sign * hidden.bias, (out * active) @ hidden.bias + last.bias - judgement.margin]
        found = linprog(
            np.r_[np.zeros(k), np.ones(n_costs)],
            A_ub=np.concatenate([distance, np.c_[rows, np.zeros((len(rows), n_costs))]]),
            b_ub=np.concatenate([weights * start, -weights * start, *ends]),
            bounds=[*zip(judgement.low, judgement.high, strict=True), *[(0, None)] * n_costs],
        )
        if found.status == 0:
            least = min(least, found.fun)
    return least


def assert_brackets(found, truth, *, tolerance=0.01, error=0.0):
    assert found.lower <= truth + 1e-9
    assert truth - error - 1e-9 <= found.upper <= truth * (1 + tolerance) + 1e-9
    assert found.closed(tolerance)


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("radius", [0.0, 0.02])
def test_correction_of_a_linear_network_has_its_closed_form(norm, radius):
    slopes, weights = np.array([2.0, -1.0, 0.5]), np.array([1.0, 2.0, 0.5])
    judgement = linear_judgement(slopes, -1.0, weights=weights, norm=norm, radius=np.full(3, radius))
    missing = judgement.margin - judgement.values(judgement.start[None])[0] + np.abs(slopes).sum() * radius
    rates = np.abs(slopes) / weights
    truth = missing / (rates.max() if norm == "l1" else rates.sum())
    found = solve(judgement, tolerance=1e-4)
    assert_brackets(found, truth, tolerance=1e-4)
    low, high = judgement.box_around(found.centre)
    assert judgement.values(np.stack([low, high, np.where(slopes > 0, low, high)])).min() >= judgement.margin


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("slopes", SLOPES)
def test_distance_of_two_features_is_that_of_a_fine_grid(slopes, residual, norm):
    judgement = random_judgement(random_network([2, 7, 6, 5, 2], slopes, residual=residual), norm=norm)
    found = solve(judgement)
    grid = least_on_grid(judgement)
    assert found.closed(0.01)
    assert found.lower <= grid
    assert grid - 2 / 400 * judgement.weights.sum() <= found.upper
    assert found.upper == judgement.distance(found.centre)
    assert judgement.values(found.centre[None])[0] >= judgement.margin


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("k", [3, 5])
def test_distance_is_the_least_of_linear_programs_over_all_activation_patterns(k, norm):
    judgement = random_judgement(random_network([k, 6, 2], seed=k), norm=norm, share=0.1)
    assert_brackets(solve(judgement, tolerance=1e-3), least_of_all_patterns(judgement), tolerance=1e-3)


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("slopes", ["relu", "concave"])
@pytest.mark.parametrize("seed", [0, 2])
def test_stable_distance_of_two_features_is_that_of_a_fine_grid(seed, slopes, norm):
    judgement = random_judgement(random_network([2, 7, 5, 1], slopes, seed=seed), norm=norm, radius=0.05)
    found = solve(judgement)
    grid = least_on_grid(judgement)
    assert found.closed(0.01)
    assert found.lower <= grid
    assert grid - 2 / 400 * judgement.weights.sum() <= found.upper
    assert verify(judgement.network, *judgement.box_around(found.centre), judgement.margin).holds


def test_stable_correction_at_the_end_of_a_range_needs_no_room_beyond_it():
    """With f = u_0 - 0.95: within the box of half-width 0.2, clipped at 1, only its lower face decides."""
    judgement = linear_judgement([1.0, 0.0], -0.75, start=np.array([0.2, 0.5]), radius=np.full(2, 0.2))
    assert_brackets(solve(judgement, tolerance=1e-4), 0.951 - 0.2, tolerance=1e-4)
    descending = linear_judgement([-1.0, 0.0], 0.25, start=np.array([0.8, 0.5]), radius=np.full(2, 0.2))
    assert_brackets(solve(descending, tolerance=1e-4), 0.8 - 0.049, tolerance=1e-4)


def test_offsets_that_the_ranges_clip_are_modelled_exactly():
    """With f = |u - 0.8| - 0.15, whose upper part is narrower than the box unless that is clipped at 1."""
    hidden = Layer(((0, np.ones((1, 1))),), np.array([-0.8]), piecewise(-1.0, 1.0, 1))
    last = Layer(((1, np.ones((1, 1))),), np.array([-0.15]), None)
    network = LayeredNetwork(1, (hidden, last))
    one = np.ones(1)
    judgement = Judgement(network, 0.8 * one, 0 * one, one, one, 0.1 * one, 1e-3)
    assert_brackets(solve(judgement, tolerance=1e-3), 0.251, tolerance=1e-3)  # down to 0.549
    narrow = replace(judgement, low=0.6 * one, radius=0.02 * one)
    assert_brackets(
        solve(narrow, tolerance=1e-3), 0.171, tolerance=1e-3
    )  # up to 0.971, its box ends at 0.991
    assert solve(replace(narrow, radius=0.06 * one)).exists is False


def test_integer_features_take_allowed_values_only():
    judgement = random_judgement(random_network([3, 8, 6, 1], seed=5), share=0.3)
    judgement = replace(judgement, spacing=np.array([0.25, 0.0, 0.2]), origin=np.array([0.05, 0.0, 0.1]))
    found = solve(judgement, tolerance=1e-3)
    counts = (found.centre - judgement.origin)[[0, 2]] / judgement.spacing[[0, 2]]
    assert np.allclose(counts, np.round(counts))
    lines = itertools.product(0.05 + 0.25 * np.arange(4), np.linspace(0, 1, 2001), 0.1 + 0.2 * np.arange(5))
    points = np.array(list(lines))
    truth = judgement.distance(points[judgement.values(points) >= judgement.margin]).min()
    assert found.lower <= truth
    assert abs(found.upper - truth) <= 1e-3 * truth + judgement.weights[1] / 2000


def test_nothing_to_be_found_is_proven():
    network = random_network([3, 8, 6, 1], seed=1)
    level = network(np.random.default_rng(0).random((5000, 3))).max() + 0.5
    judgement = random_judgement(network)
    found = solve(replace(judgement, network=network.combined(np.eye(1), -level)))
    assert (found.lower, found.upper, found.exists) == (np.inf, np.inf, False)


def test_box_too_wide_for_any_correction_is_proven_to_have_none():
    judgement = random_judgement(random_network([2, 7, 5, 1], seed=4), radius=0.4, share=0.05)
    assert least_on_grid(judgement) == np.inf
    assert solve(judgement).exists is False


def test_known_correction_that_is_nearest_is_kept_with_a_closed_gap():
    judgement = random_judgement(random_network([4, 8, 6, 1], seed=3))
    nearest = solve(judgement, tolerance=1e-4)
    again = solve(judgement, known=replace(nearest, lower=0.0))
    assert again.upper == nearest.upper
    assert again.centre is nearest.centre
    assert again.closed(0.01)


def test_plateau_that_misses_the_margin_by_less_than_the_tolerance_of_the_solver_is_no_correction():
    """With f = relu(u - 0.7): zero up to 0.7, a millionth below the margin."""
    hidden = Layer(((0, np.ones((1, 1))),), np.array([-0.7]), piecewise(0.0, 1.0, 1))
    network = LayeredNetwork(1, (hidden, Layer(((1, np.ones((1, 1))),), np.zeros(1), None)))
    one = np.ones(1)
    judgement = Judgement(network, 0.2 * one, 0 * one, one, one, 0 * one, 1e-6)
    assert_brackets(solve(judgement, tolerance=1e-4), 0.500001, tolerance=1e-4)


def test_start_that_already_holds_has_distance_zero():
    found = solve(linear_judgement([1.0, 1.0], 0.0))
    assert found.lower == 0
    assert found.upper < 1e-9


@pytest.mark.parametrize("radius", [0.0, 0.03])
def test_lower_bound_of_a_search_cut_short_is_never_above_the_truth(radius):
    judgement = random_judgement(random_network([2, 24, 24, 24, 1], seed=1), radius=radius)
    grid = least_on_grid(judgement, n=300)
    for seconds in (0.0, 0.02, 0.1, 0.3):
        found = solve(judgement, seconds=seconds)
        assert 0 <= found.lower <= grid <= found.upper + 2 / 300 * judgement.weights.sum()


def test_search_ends_at_the_deadline_with_a_bound():
    judgement = random_judgement(random_network([12, 64, 64, 64, 1]), share=0.01)
    start = time.monotonic()
    found = solve(judgement, seconds=0.5)
    assert time.monotonic() - start < 1.5
    assert 0 < found.lower < np.inf


def test_smooth_networks_leave_what_is_known():
    known = Bounds(0.1, 0.7, np.array([0.1, 0.2]))
    judgement = random_judgement(random_network([2, 7, 6, 1]))
    first, second, last = judgement.network.layers
    layers = (replace(first, activation=smooth("tanh")), replace(second, activation=smooth("sigmoid")), last)
    assert solve(replace(judgement, network=LayeredNetwork(2, layers)), known=known) is known


def test_networks_too_large_for_the_solver_leave_what_is_known(monkeypatch):
    judgement = random_judgement(random_network([3, 12, 12, 1]))
    truth = solve(judgement).upper
    monkeypatch.setattr(correction_model, "_MOST_BINARIES", 0)
    known = Bounds(0.99 * truth, 1.2 * truth, np.array([0.1, 0.2, 0.3]))
    assert n_binaries(judgement, within=known.upper) > 0
    found = solve(judgement, known=known)
    assert (found.lower, found.upper, found.centre is known.centre) == (known.lower, known.upper, True)


def test_programs_too_large_to_be_simplified_first_have_the_same_solution(monkeypatch):
    judgement = random_judgement(random_network([4, 10, 8, 1], seed=6))
    truth = solve(judgement, tolerance=1e-4)
    monkeypatch.setattr(network_milp, "_SIMPLIFY", 0)
    assert solve(judgement, tolerance=1e-4).upper == pytest.approx(truth.upper, rel=1e-4)


def test_binaries_are_the_neurons_that_change_sign_and_fewer_in_a_smaller_ball():
    judgement = random_judgement(random_network([3, 40, 1], seed=2))
    corners = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    hidden = judgement.network.layers[0]
    z = corners @ hidden.sources[0][1].T + hidden.bias
    assert n_binaries(judgement) == ((z.min(0) < 0) & (z.max(0) > 0)).sum()
    assert 0 < n_binaries(judgement, within=0.1) < n_binaries(judgement)
    assert n_binaries(judgement, within=0.0) == 0


def test_reach_of_a_ball_within_boxes_is_that_of_a_linear_program():
    rng = np.random.default_rng(0)
    k, n, within = 4, 3, 0.5
    low, high = rng.random((k, n)) * 0.3, 0.7 + rng.random((k, n)) * 0.3
    low[0, 0] = high[0, 0] = 0.4
    starts, weights, slopes = rng.random((k, n)), rng.random(k) + 0.5, rng.normal(size=(2, k, n))
    starts = np.clip(starts, low, high)
    radius = (high - low) / 2
    slopes[:, radius == 0] = 0
    reach = correction_model.reach_of_ball(starts, weights, within, low, high)(slopes)
    for r, i in itertools.product(range(2), range(n)):
        per_unit = np.where(
            radius[:, i] > 0, slopes[r, :, i] / np.where(radius[:, i] > 0, radius[:, i], 1), 0
        )
        found = linprog(  # u = start + up - down
            np.r_[-per_unit, per_unit],
            A_ub=np.r_[weights, weights][None],
            b_ub=[within],
            bounds=[*((0, a) for a in (high - starts)[:, i]), *((0, a) for a in (starts - low)[:, i])],
        )
        middle = (low + high)[:, i] / 2
        assert reach[r, i] == pytest.approx(-found.fun + per_unit @ (starts[:, i] - middle))


def test_solver_never_writes_to_the_standard_output(capfd, monkeypatch):
    print("before")
    program = Program()
    columns = program.variables(np.zeros(2), np.ones(2), cost=-1.0, integer=True)
    program.rows(0.0, 1.0, (columns, np.ones((1, 2))), n=1)
    assert program.solve(deadline=time.monotonic() + 5).bound == -1
    # solved on the whole domain at once, where this release of the solver prints a line of its own
    monkeypatch.setattr(correction_milp, "_SMALLEST", 1.0)
    monkeypatch.setattr(correction_milp, "_BISECTIONS", 0)
    judgement = random_judgement(random_network([2, 8, 8, 6, 2], "leaky", seed=1), seed=1, radius=0.05)
    solve(judgement)
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("radius", [0.0, 0.03])
@pytest.mark.parametrize(("k", "norm"), [(3, "l1"), (3, "linf"), (4, "l1")])
def test_distance_is_that_of_branch_and_bound(k, norm, radius):
    judgement = random_judgement(random_network([k, 8, 8, 1], seed=7), norm=norm, radius=radius)
    found = solve(judgement)
    other = NearestSearch(judgement).run(deadline=time.monotonic() + 1, tolerance=0.02)
    assert found.closed(0.01)
    assert found.lower <= other.upper + 1e-9
    assert other.lower <= found.upper + 1e-9
    assert other.upper - other.lower <= 0.1 * other.upper


def rescaled(network, factors):
    """The same function, with the neurons of every hidden layer in other units."""
    layers = list(network.layers)
    for i, factor in enumerate(factors):
        (j, into), out = layers[i].sources[0], layers[i + 1].sources[0][1]
        into, bias = into * factor[:, None], layers[i].bias * factor
        layers[i] = replace(layers[i], sources=((j, into),), bias=bias)
        layers[i + 1] = replace(layers[i + 1], sources=((i + 1, out / factor),))
    return replace(network, layers=tuple(layers))


@pytest.mark.parametrize("radius", [0.0, 0.02])
@pytest.mark.parametrize("slopes", SLOPES)
def test_units_of_neurons_do_not_matter(slopes, radius):
    judgement = random_judgement(random_network([3, 5, 4, 1], slopes, seed=4), radius=radius)
    truth = solve(judgement)
    rng = np.random.default_rng(0)
    for factors in (
        [np.full(5, 1e-10), np.full(4, 1e9)],
        [10.0 ** rng.uniform(-12, 12, n) for n in (5, 4)],
    ):
        found = solve(replace(judgement, network=rescaled(judgement.network, factors)))
        assert found.closed(0.01)
        assert found.lower <= truth.upper * (1 + 1e-6)
        assert truth.lower <= found.upper * (1 + 1e-6)


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_unit_of_the_distance_does_not_matter(norm, factor):
    judgement = random_judgement(random_network([3, 6, 1], seed=3), norm=norm)
    truth = solve(judgement)
    found = solve(replace(judgement, weights=factor * judgement.weights))
    assert found.closed(0.01)
    assert found.lower <= factor * truth.upper * (1 + 1e-6)
    assert factor * truth.lower <= found.upper * (1 + 1e-6)


def test_slopes_and_outputs_may_have_any_size():
    judgement = random_judgement(random_network([3, 6, 1], "leaky", seed=3))
    truth = solve(judgement)
    first, last = judgement.network.layers
    for steep, size in ((1e-9, 1.0), (1e9, 1.0), (1.0, 1e-6), (1.0, 1e6)):
        layers = (
            replace(first, activation=piecewise(0.1 * steep, steep, 6)),
            replace(last, sources=((1, last.sources[0][1] * size / steep),), bias=last.bias * size),
        )
        network = replace(judgement.network, layers=layers)
        found = solve(replace(judgement, network=network, margin=judgement.margin * size))
        assert found.closed(0.01)
        assert found.lower <= truth.upper * (1 + 1e-6)
        assert truth.lower <= found.upper * (1 + 1e-6)


def test_integers_of_a_billion_steps_are_solved():
    width = 1e9
    judgement = linear_judgement(
        [1.0, 0.5], -1.0, spacing=np.full(2, 1 / width), origin=np.full(2, -7 / width)
    )
    found = solve(judgement)
    assert found.closed(0.01)
    assert found.upper == pytest.approx(0.251, rel=0.01)
    counts = (found.centre - judgement.origin) * width
    assert np.abs(counts - np.round(counts)).max() < 1e-5


def test_a_ball_without_an_allowed_value_of_an_integer_is_excluded():
    spacing, origin = np.array([0.2, 0.0]), np.zeros(2)
    judgement = linear_judgement([1.0, 1.0], -1.0, spacing=spacing, origin=origin)
    none = replace(
        judgement, start=np.array([0.66, 0.5]), low=np.array([0.65, 0.0]), high=np.array([0.7, 1.0])
    )
    assert solve(none) == replace(UNKNOWN, lower=np.inf)


def test_tiny_coefficients_never_exclude_a_solution():
    program = Program()
    small = program.variables(np.zeros(1), np.ones(1), cost=1.0)
    large = program.variables(np.zeros(1), np.full(1, 1e10), integer=True)
    program.rows(1.0, np.inf, (small, np.ones(1)), (large, np.full(1, 1e-10)), n=1)
    assert program.solve(deadline=time.monotonic() + 5).bound == 0  # at large = 1e10


def test_coefficients_too_large_for_the_solver_leave_what_is_known(monkeypatch):
    judgement = random_judgement(random_network([3, 12, 12, 1]))
    known = Bounds(0.99 * solve(judgement).upper, np.inf)
    monkeypatch.setattr(network_milp, "_MOST_COEFFICIENT", 0.1)
    assert solve(judgement, known=known).lower == known.lower


@pytest.mark.parametrize("radius", [0.0, 0.02])
@pytest.mark.parametrize("claim", [0.0, np.inf])
def test_wrong_claims_of_the_solver_are_noticed(monkeypatch, claim, radius):
    judgement = random_judgement(random_network([2, 6, 6, 1], seed=1), radius=radius)
    truth = solve(judgement).upper
    infeasible = np.isinf(claim)
    wrong = network_milp.Solution(infeasible, None, np.inf if infeasible else 0.99, 0)
    monkeypatch.setattr(network_milp.Program, "solve", lambda _self, **_options: wrong)
    monkeypatch.setattr(correction_milp, "_SMALLEST", 1.0)
    monkeypatch.setattr(correction_milp, "_GROWTH", 100.0)
    monkeypatch.setattr(correction_milp, "_BISECTIONS", 3)
    known = Bounds(0.0, np.inf)
    assert solve(judgement, known=known) is known
    assert truth < np.inf


def test_corrections_nearer_than_what_was_excluded_void_the_bounds(monkeypatch):
    judgement = random_judgement(random_network([3, 6, 1], seed=3))
    truth = solve(judgement).upper
    monkeypatch.setattr(
        correction_milp._Search, "exclude_at_once", lambda self: self._raise(1.2 * truth, truth)
    )
    known = Bounds(0.0, 1.1 * truth, judgement.start)
    assert solve(judgement, known=known) is known


@pytest.mark.parametrize(("seed", "norm"), [(20, "l1"), (76, "l1"), (99, "linf")])
def test_integers_of_many_steps_have_the_distance_of_branch_and_bound(seed, norm):
    judgement = random_judgement(random_network([3, 5, 1], seed=seed), seed=seed, norm=norm)
    spacing, origin = np.array([1e-8, 0.25, 0.0]), np.array([-486e-8, 0.05, 0.0])
    judgement = replace(judgement, spacing=spacing, origin=origin)
    other = NearestSearch(judgement).run(deadline=time.monotonic() + 2, tolerance=0.01)
    found = solve(judgement)
    assert found.closed(0.01)
    assert found.lower <= other.upper * (1 + 1e-6)
    assert other.lower <= found.upper * (1 + 1e-6)
