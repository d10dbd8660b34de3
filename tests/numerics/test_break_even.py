"""The stability of SGD against enumerated batches, and planted break-even points."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dynprobe.analyzers.numerics.break_even import break_even_step, noise_factor, sgd_stability

X = np.array([0.3, -1.2, 0.8, 2.0, -0.5, 1.1, 0.1])
CURVATURE = 2 * X**2  # of the squared error (x w − y)² in w, sample by sample
N = len(X)


def stable(**given):
    return sgd_stability(CURVATURE, eigenvalue=float(CURVATURE.mean()), **given)


def second_moment_factor(eta: float, size: int) -> float:
    """E[(1 − η H_B)²] over every batch of that size, none drawn twice."""
    means = [CURVATURE[list(batch)].mean() for batch in itertools.combinations(range(N), size)]
    return float(np.mean([(1 - eta * mean) ** 2 for mean in means]))


@pytest.mark.parametrize("size", range(1, N + 1))
@pytest.mark.parametrize("eta", [0.01, 0.3, 0.9])
def test_stability_is_the_factor_on_the_second_moment_over_all_batches(size, eta):
    value = stable(learning_rate=eta, batch_size=size, n_training=N).value
    assert value == pytest.approx(second_moment_factor(eta, size), rel=1e-12)


@pytest.mark.parametrize("size", [1, 3, N])
def test_the_second_moment_grows_just_beyond_the_critical_learning_rate_and_shrinks_just_below(size):
    critical = stable(batch_size=size, n_training=N).critical_learning_rate
    assert second_moment_factor(critical, size) == pytest.approx(1, abs=1e-12)
    assert second_moment_factor(1.001 * critical, size) > 1 > second_moment_factor(0.999 * critical, size)


def test_simulated_sgd_on_a_quadratic_multiplies_its_second_moment_by_the_stability():
    eta, size, steps, runs = 0.35, 3, 4, 100_000
    rng = np.random.default_rng(0)
    weight = np.ones(runs)
    for _ in range(steps):
        batch = rng.random((runs, N)).argsort(1)[:, :size]
        weight *= 1 - eta * CURVATURE[batch].mean(1)
    expected = stable(learning_rate=eta, batch_size=size, n_training=N).value ** steps
    assert (weight**2).mean() == pytest.approx(expected, rel=0.05)


def test_with_the_whole_training_set_as_batch_the_critical_learning_rate_is_two_over_the_eigenvalue():
    found = stable(learning_rate=0.1, batch_size=N, n_training=N)
    assert found.critical_learning_rate == pytest.approx(2 / CURVATURE.mean(), rel=1e-14)
    assert found.value == pytest.approx((1 - 0.1 * CURVATURE.mean()) ** 2, rel=1e-14)
    assert noise_factor(N, N) == noise_factor(2 * N, N) == noise_factor(1, 1) == 0


def test_the_spread_is_that_of_the_population_and_without_bias_from_a_subset():
    assert stable(n_training=N).curvature_std == pytest.approx(CURVATURE.std(), rel=1e-14)
    estimates = []
    for chosen in itertools.combinations(range(N), 3):
        part = CURVATURE[list(chosen)]
        estimates.append(sgd_stability(part, eigenvalue=1.0, n_training=N).curvature_std ** 2)
    assert np.mean(estimates) == pytest.approx(CURVATURE.var(), rel=1e-12)


def test_measured_on_the_whole_training_set_only_the_error_of_the_eigenvalue_remains():
    given = {"learning_rate": 0.4, "batch_size": 2, "n_training": N}
    assert stable(**given).stderr == 0
    eigenvalue = float(CURVATURE.mean())
    with_error = sgd_stability(CURVATURE, eigenvalue=eigenvalue, error=1e-6, **given)
    moved = sgd_stability(CURVATURE, eigenvalue=eigenvalue + 1e-6, **given)
    assert with_error.stderr == pytest.approx(abs(moved.value - with_error.value), rel=1e-4)
    change = abs(moved.critical_learning_rate - with_error.critical_learning_rate)
    assert with_error.critical_learning_rate_stderr == pytest.approx(change, rel=1e-4)


def test_standard_errors_on_subsets_are_the_spread_over_subsets():
    rng = np.random.default_rng(1)
    population = rng.exponential(2.0, 1000)
    given = {"learning_rate": 0.5, "batch_size": 10, "n_training": 1000}
    found = []
    for _ in range(400):
        part = rng.choice(population, 400, replace=False)
        found.append(sgd_stability(part, eigenvalue=float(part.mean()), **given))
    for value, stderr in (("value", "stderr"), ("critical_learning_rate", "critical_learning_rate_stderr")):
        spread = np.std([getattr(one, value) for one in found])
        assert np.mean([getattr(one, stderr) for one in found]) == pytest.approx(spread, rel=0.15)


def test_what_is_not_known_is_nan_and_what_does_not_need_it_is_not():
    no_rate = stable(batch_size=2, n_training=N)
    assert math.isnan(no_rate.value)
    assert math.isnan(no_rate.stderr)
    assert no_rate.critical_learning_rate > 0
    no_batch = stable(learning_rate=0.1)
    assert math.isnan(no_batch.value)
    assert math.isnan(no_batch.critical_learning_rate)
    assert no_batch.curvature_std > 0


def test_at_negative_curvature_no_learning_rate_is_stable():
    found = sgd_stability(
        -CURVATURE, eigenvalue=-float(CURVATURE.mean()), learning_rate=0.1, batch_size=2, n_training=N
    )
    assert found.value > 1
    assert math.isnan(found.critical_learning_rate)


def test_one_sample_has_no_spread():
    assert math.isnan(sgd_stability(np.ones(1), eigenvalue=1.0, learning_rate=0.1, batch_size=1).stderr)


STEPS = [0, 10, 20, 40, 80]


def test_a_planted_crossing_is_found_between_its_checkpoints():
    found = break_even_step(STEPS, [0.25, 0.25, 0.5, 2.0, 3.0], [0.0] * 5)
    assert found.state == "reached"
    assert found.step == pytest.approx(30)  # the logarithm goes from −log 2 to log 2
    assert (found.low, found.high) == (20, 40)


def test_the_interval_grows_with_the_errors():
    found = break_even_step(STEPS, [0.5, 0.95, 0.98, 1.01, 3.0], [0.01, 0.03, 0.03, 0.03, 0.1])
    assert 20 < found.step < 40
    assert (found.low, found.high) == (0, 80)


def test_never_reached_and_reached_from_the_start_are_told_apart():
    never = break_even_step(STEPS, [0.5] * 5, [0.0] * 5)
    assert never.state == "never"
    assert all(math.isnan(v) for v in (never.step, never.low, never.high))
    start = break_even_step(STEPS, [1.5, 0.5, 0.5, 2, 2], [0.0] * 5)
    assert start.state == "from the start"
    assert math.isnan(start.step)
    assert start.high == 0


def test_a_run_that_may_have_crossed_says_from_where():
    found = break_even_step(STEPS, [0.5, 0.6, 0.7, 0.9, 0.99], [0.01] * 5)
    assert found.state == "never"
    assert found.low == 40
    assert math.isnan(found.high)


def test_a_stability_of_one_but_for_rounding_is_not_reached():
    for value in (1.0, 1 + 4e-16):  # a vanishing curvature, η at the end of a schedule
        found = break_even_step([0, 1, 2], [0.5, value, 0.9], [0, 0, 0])
        assert found.state == "never"
        assert all(math.isnan(v) for v in (found.step, found.low, found.high))
    flat = break_even_step([0, 10, 20], [1.0, 1.0, math.e], [0, 0, 0])
    assert (flat.state, flat.step, flat.low, flat.high) == ("reached", 10, 10, 20)


def test_a_stability_above_one_by_less_than_its_error_is_not_reached():
    found = break_even_step(STEPS, [0.5, 0.9, 1.1, 0.9, 0.8], [0.01, 0.01, 0.2, 0.01, 0.01])
    assert found.state == "never"
    assert found.low == 10
    later = break_even_step(STEPS, [0.5, 0.9, 1.1, 0.5, 2.0], [0.01, 0.01, 0.2, 0.01, 0.01])
    assert later.state == "reached"
    assert later.step == pytest.approx(60)  # the crossing that leads to the certain one
    assert (later.low, later.high) == (10, 80)


def test_with_a_learning_rate_of_zero_nothing_moves_and_stability_is_nan():
    found = stable(learning_rate=0.0, batch_size=2, n_training=N)
    assert math.isnan(found.value)
    assert math.isnan(found.stderr)
    assert found.critical_learning_rate == stable(batch_size=2, n_training=N).critical_learning_rate


def test_the_error_of_the_spread_moves_the_stability_where_that_of_the_eigenvalue_does_not():
    eigenvalue = float(CURVATURE.mean())
    given = {"learning_rate": 1 / eigenvalue, "batch_size": 2, "n_training": N}  # the slope in λ is zero
    assert sgd_stability(CURVATURE, eigenvalue=eigenvalue, error=0.1, **given).stderr == pytest.approx(0)
    found = sgd_stability(CURVATURE, eigenvalue=eigenvalue, variance_error=0.01, **given)
    assert found.stderr == pytest.approx(0.01 * found.value, rel=1e-9)  # all of it is s²
    assert found.critical_learning_rate_stderr > 0


def test_checkpoints_without_a_number_are_left_out_and_order_does_not_matter():
    found = break_even_step([40, 0, 30, 20, 10], [2.0, 0.25, math.nan, 0.5, 0.25], [0, 0, 0, math.nan, 0])
    assert found.step == pytest.approx(30)
    assert (found.low, found.high) == (20, 40)
    assert break_even_step([0, 1], [math.nan, math.nan], [0, 0]).state == "unknown"
    assert break_even_step([], [], []).state == "unknown"
    assert break_even_step([math.nan], [2.0], [0.0]).state == "unknown"
