"""Errors over stimuli, convergence and group statistics of the similarity analyzers."""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.stats

from dynprobe.analyzers._convergence import NEVER, kendall_tau, reaching, tau_p_value
from dynprobe.analyzers._networks import Networks, drawn_means, group_means
from dynprobe.analyzers._relabelling import relabelling_test
from dynprobe.analyzers._similarity import (
    SUMMARY_RETURNS,
    common_layers,
    effects_of_deletions,
    same_layer,
    stimulus_blocks,
    stimulus_draws,
    summary,
)
from dynprobe.analyzers.core.contract import RESERVED
from dynprobe.analyzers.core.result import Array, Result

LAYERS = ("conv1", "conv2", "conv3", "fc", "head", "out")


# ---- builders


def result_of(
    pairs: list[dict[str, Any]], same: np.ndarray, effect: np.ndarray | None = None, **options: Any
) -> Result:
    """A result with these pairs, `same` (pair, layer) on the diagonal and 0.1 beside it."""
    n, n_layers = same.shape
    layers = np.array(LAYERS[:n_layers], dtype=object)
    value = np.full((n, n_layers, n_layers), 0.1)
    value[:, range(n_layers), range(n_layers)] = same
    arrays = {
        "layer_a": Array(("layer_a",), layers),
        "layer_b": Array(("layer_b",), layers),
        "layer": Array(("layer",), layers),
        "cka": Array(("pair", "layer_a", "layer_b"), value),
        "status": Array(("pair",), np.array([p.get("status", "ok") for p in pairs], dtype=object)),
    }
    for name in ("run_a", "step_a", "path_a", "run_b", "step_b", "path_b", "group_a", "group_b"):
        if name in pairs[0]:
            column = np.array([p[name] for p in pairs])
            arrays[name] = Array(("pair",), column.astype(object) if column.dtype.kind == "U" else column)
    if effect is not None:
        arrays["block_effect"] = Array(("pair", "layer", "block"), effect.astype(np.float32))
    return Result("cka", "pair", arrays, {"options": options})


def centred_effects(shape: tuple[int, ...], size: float, seed: int = 0) -> np.ndarray:
    effect = np.random.default_rng(seed).normal(size=shape)
    effect -= effect.mean(-1, keepdims=True)
    return np.asarray(size * effect / np.sqrt((effect**2).sum(-1, keepdims=True)))


def curve_pairs(steps: list[int], run: str = "r") -> list[dict[str, Any]]:
    return [{"run_a": run, "step_a": s, "run_b": run, "step_b": 1000} for s in steps]


def group_result(sizes: dict[str, int], value: Any, step: int = 9, **options: Any) -> Result:
    names = [(f"{g}{i}", g) for g, n in sizes.items() for i in range(n)]
    pairs, same = [], []
    for (a, ga), (b, gb) in combinations(names, 2):
        steps_and_groups = {"step_a": step, "step_b": step, "group_a": ga, "group_b": gb}
        pairs.append({"run_a": a, "run_b": b, **steps_and_groups})
        same.append(value(a, b, ga, gb))
    same_array = np.array(same, dtype=float)
    effect = centred_effects((*same_array.shape, 8), 0.005)
    return result_of(pairs, same_array, effect, **options)


def networks_of(value: np.ndarray, sizes: tuple[int, int]) -> Networks:
    """Two groups with value (pair, layer) in the order of np.triu_indices."""
    first, second = np.triu_indices(sum(sizes), 1)
    group = np.repeat([0, 1], sizes)
    return Networks(0.0, group, first, second, value, np.zeros((*value.shape, 1)))


# ---- stimuli


def test_blocks_of_stimuli_have_equal_sizes_and_the_same_seed_gives_the_same_blocks() -> None:
    blocks = stimulus_blocks(1003, seed=3)
    sizes = np.bincount(blocks)
    assert len(sizes) == 32
    assert np.ptp(sizes) == 1
    assert (blocks == stimulus_blocks(1003, seed=3)).all()
    assert (blocks != stimulus_blocks(1003, seed=4)).any()
    assert sorted(stimulus_blocks(5)) == [0, 1, 2, 3, 4]


def test_effects_of_deletions_of_a_mean_give_its_standard_error_and_sum_to_zero() -> None:
    x = np.random.default_rng(0).normal(size=(3, 16))
    deleted = (x.sum(1, keepdims=True) - x) / 15
    effect = effects_of_deletions(deleted)
    np.testing.assert_allclose(effect.sum(-1), 0, atol=1e-12)
    np.testing.assert_allclose((effect**2).sum(-1), x.var(1, ddof=1) / 16, rtol=1e-12)
    assert np.isnan(effects_of_deletions(np.ones((2, 1)))).all()


def test_effects_are_positive_for_the_blocks_that_raise_the_statistic() -> None:
    x = np.array([0.0, 0.0, 0.0, 1.0])
    effect = effects_of_deletions((x.sum() - x) / 3)
    assert effect.argmax() == 3


def test_multiplier_draws_have_the_variance_that_the_effects_say() -> None:
    effect = centred_effects((16,), 0.3)
    drawn = stimulus_draws(16, 20_000) @ effect
    assert drawn.std() == pytest.approx(0.3, rel=0.02)
    assert drawn.mean() == pytest.approx(0, abs=0.01)


def test_common_layers_are_in_the_order_of_the_first_network() -> None:
    assert common_layers(["c", "a", "x"], ["a", "b", "c"]) == ["c", "a"]


def test_same_layer_counts_both_directions_and_only_layers_that_both_have() -> None:
    value = np.array([[0.9, 0.2, 0.1], [0.8, 0.3, 0.95], [0.1, 0.2, 0.7]])
    names = ["a", "b", "c"]
    found, error = same_layer(value, np.zeros((3, 3, 4)), names, names)
    assert found == pytest.approx((2 / 3 + 2 / 3) / 2)  # rows: a, c; columns: a, b
    assert error < 1e-12
    found, _ = same_layer(value[:, :2], np.zeros((3, 2, 4)), names, names[:2])
    assert found == pytest.approx((1 / 2 + 2 / 2) / 2)


def test_same_layer_leaves_out_constant_layers_and_is_nan_where_none_is_left() -> None:
    value = np.array([[0.9, np.nan], [np.nan, np.nan]])
    assert same_layer(value, np.zeros((2, 2, 4)), ["a", "b"], ["a", "b"])[0] == 1
    assert math.isnan(same_layer(np.full((1, 1), np.nan), np.zeros((1, 1, 4)), ["a"], ["a"])[0])
    assert math.isnan(same_layer(value, np.zeros((2, 2, 4)), ["a", "b"], ["c", "d"])[0])


def test_same_layer_counts_a_layer_that_shares_the_first_place_up_to_rounding() -> None:
    """Dropout in evaluation hands on its input: a network against itself matches everywhere."""
    value = np.array([[1.0, 1.0 + 1e-7, 0.3], [1.0 + 1e-7, 1.0, 0.3], [0.3, 0.3, 1.0]])
    names = ["fc", "dropout", "out"]
    assert same_layer(value, np.zeros((3, 3, 4)), names, names) == (1, 0)
    value[0, 1] = 1 + 1e-4
    assert same_layer(value, np.zeros((3, 3, 4)), names, names)[0] == pytest.approx(2 / 3)


def test_same_layer_has_an_error_only_where_stimuli_could_change_the_match() -> None:
    clear, close = np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([[0.90, 0.89], [0.89, 0.90]])
    effect = centred_effects((2, 2, 8), 0.05)
    assert same_layer(clear, effect, ["a", "b"], ["a", "b"])[1] == 0
    assert 0.1 < same_layer(close, effect, ["a", "b"], ["a", "b"])[1] < 0.6
    assert math.isnan(same_layer(close, np.full((2, 2, 1), np.nan), ["a", "b"], ["a", "b"])[1])


# ---- convergence


def test_level_is_reached_between_checkpoints_linearly_in_the_logarithm_of_the_step() -> None:
    steps = np.array([0.0, 9.0, 99.0])
    curve = np.array([[0.0], [0.8], [1.0]])
    assert reaching(curve, steps, 0.9)[0] == pytest.approx(10**1.5 - 1)


def test_level_that_is_lost_again_counts_from_the_last_time_it_is_reached() -> None:
    steps = np.array([0.0, 10.0, 20.0, 30.0])
    curve = np.array([[0.0], [0.95], [0.5], [1.0]])
    assert 20 < reaching(curve, steps, 0.9)[0] < 30


def test_layer_below_the_level_before_the_last_checkpoint_never_reached_it_and_an_unknown_one_is_nan() -> (
    None
):
    steps = np.array([0.0, 10.0, 20.0])
    curve = np.array([[0.0, 0.0, 1.0], [0.5, np.nan, 1.0], [0.6, 0.9, 1.0]])
    found = reaching(curve, steps, 0.9)
    assert found[0] == NEVER
    assert np.isnan(found[1])
    assert found[2] == 0  # as it is at the end from the start


def test_curve_that_is_not_defined_at_the_first_steps_begins_where_it_is() -> None:
    steps = np.array([0.0, 9.0, 99.0, 999.0])
    late = np.array([[np.nan, np.nan], [0.0, 0.95], [0.8, 0.95], [1.0, 1.0]])
    np.testing.assert_allclose(reaching(late, steps, 0.9), [10**2.5 - 1, 9.0])
    assert np.isnan(reaching(np.full((4, 1), np.nan), steps, 0.9)).all()
    late[3] = np.nan
    assert np.isnan(reaching(late, steps, 0.9)).all()


def test_kendall_tau_agrees_with_scipy_with_ties_and_never() -> None:
    generator = np.random.default_rng(1)
    steps = np.where(generator.random((20, 7)) < 0.2, NEVER, generator.integers(0, 5, (20, 7)).astype(float))
    expected = [scipy.stats.kendalltau(range(7), row).statistic for row in steps]
    np.testing.assert_allclose(kendall_tau(steps), expected, atol=1e-12)


def test_p_value_of_tau_is_exact_for_few_layers_and_agrees_with_random_orders_for_many() -> None:
    assert tau_p_value(np.arange(4.0), 10, 0) == pytest.approx(2 / 24)
    steps = np.array([0.0, 2, 1, 3, 4, 6, 5, 8, 7])
    exact = scipy.stats.kendalltau(range(9), steps, method="exact").pvalue
    assert tau_p_value(steps, 10_000, 0) == pytest.approx(exact, abs=5e-4)
    assert math.isnan(tau_p_value(np.zeros(5), 10, 0))


def bottom_up(noise: float, when: tuple[float, ...] = (20.0, 60.0, 150.0, 500.0), **options: Any) -> Result:
    """Layers whose similarity to the end is 1/2 at the steps `when`."""
    steps = [0, 10, 30, 100, 300, 700]
    same = 1 / (1 + (np.array(when)[None] / (1e-9 + np.array(steps)[:, None])) ** 3)
    return result_of(curve_pairs(steps), same, centred_effects((*same.shape, 16), noise), **options)


FIVE = (10.0, 20.0, 60.0, 150.0, 500.0)


def test_run_whose_layers_converge_one_after_the_other_is_called_bottom_up_with_its_error() -> None:
    found = summary("cka")(bottom_up(0.003, FIVE))
    assert found["curve_run"].tolist() == ["r"]
    assert found["depth_tau"][0] == 1
    assert found["depth_tau_stderr"][0] < 0.05
    assert found["depth_tau_p"][0] == pytest.approx(2 / 120)
    assert (found["converged"][0, :3] == 1).all()
    assert (np.diff(found["converged_step"][0, :3]) > 0).all()
    assert (found["converged_step_low"][0, :3] <= found["converged_step"][0, :3]).all()
    assert (found["converged_step_stderr"][0, :3] > 0).all()
    assert found["finding"][0].startswith("bottom-up: conv1")
    assert "Kendall's tau with depth 1.00" in found["finding"][0]
    expected = r"conv1 reaches a similarity of 0.9 to the last checkpoint at step \d+\.?\d* ± \d"
    assert re.search(expected, found["finding"][0])


def test_order_in_depth_is_not_claimed_where_layers_are_too_few_or_chance_would_do_it() -> None:
    few = summary("cka")(bottom_up(0.003, (20.0, 60.0, 150.0)))["finding"][0]
    assert few.startswith("too few layers to tell an order in depth from chance: conv1 reaches")
    assert "p = 0.33; the smallest that 3 layers allow is 0.33" in few
    four = summary("cka")(bottom_up(0.003))["finding"][0]
    assert four.startswith("too few layers to tell")
    mixed = summary("cka")(bottom_up(0.003, (60.0, 20.0, 150.0, 10.0, 100.0)))["finding"][0]
    assert mixed.startswith("no order in depth beyond chance: ")


def test_level_that_is_there_from_the_start_is_said_without_a_step() -> None:
    found = summary("cka")(bottom_up(0.003, (1e-12, *FIVE[1:])))
    start = (
        "bottom-up: conv1 has a similarity of 0.9 or more to the last checkpoint from the first checkpoint on"
    )
    assert found["finding"][0].startswith(f"{start}, head never")


def test_layer_that_is_constant_at_first_keeps_its_row_and_is_named() -> None:
    result = bottom_up(0.003, FIVE)
    result["cka"][0, 1], result["cka"][1:3, 2, 2] = np.nan, np.nan
    result["block_effect"][0, 1], result["block_effect"][1:3, 2] = np.nan, np.nan
    found, whole = summary("cka")(result), summary("cka")(bottom_up(0.003, FIVE))
    for name in ("converged_step", "converged_step_stderr", "converged"):
        assert found[name][0, 1] == whole[name][0, 1]
    assert np.isnan(found["converged_step"][0, 2])
    assert (
        "; conv2 not defined before step 10; left out, because not defined at later steps: conv3"
        in (found["finding"][0])
    )


def test_several_networks_side_by_side_in_a_folder_do_not_converge() -> None:
    pairs = [
        {"run_a": "r", "step_a": s, "path_a": f"{f}_{s}", "run_b": "r", "step_b": 3, "path_b": "true_3"}
        for s in (0, 1, 2)
        for f in ("true", "shuffled")
    ]
    same = np.linspace(0.1, 0.9, 6)[:, None] * np.ones((1, 2))
    assert "converged_step" not in summary("cka")(result_of(pairs, same))
    assert "converged_step" in summary("cka")(result_of(pairs[::2], same[::2]))


def test_one_draw_gives_no_error_and_no_warning() -> None:
    found = summary("cka")(bottom_up(0.003, bootstrap=1))
    assert np.isnan(found["depth_tau_stderr"]).all()
    assert np.isnan(found["converged_step_stderr"]).all()
    grouped = group_result({"a": 3, "b": 3}, lambda a, b, ga, gb: [hash_of(a, b)], bootstrap=1)
    assert np.isnan(summary("cka")(grouped)["group_similarity_stderr"]).all()


def test_layer_that_never_reaches_the_level_is_nan_and_flagged() -> None:
    found = summary("cka")(bottom_up(0.003))
    assert found["converged"][0, 3] == 0
    assert np.isnan(found["converged_step"][0, 3])
    assert ", fc never; Kendall's tau" in found["finding"][0]


def test_error_of_the_step_grows_with_that_of_the_similarity() -> None:
    small, large = (
        summary("cka")(bottom_up(noise))["converged_step_stderr"][0, 1] for noise in (0.001, 0.01)
    )
    assert large == pytest.approx(10 * small, rel=0.5)


def test_convergence_needs_three_pairs_with_one_checkpoint_of_the_same_run() -> None:
    assert summary("cka")(result_of(curve_pairs([0, 10]), np.ones((2, 2)) * 0.5)) == {}
    chain = [{"run_a": "r", "step_a": s, "run_b": "r", "step_b": s + 10} for s in (0, 10, 20, 30)]
    assert summary("cka")(result_of(chain, np.ones((4, 2)) * 0.5)) == {}


def test_failed_pairs_are_left_out_of_the_curve() -> None:
    pairs = [*curve_pairs([0, 10, 100, 500])]
    pairs[1]["status"] = "failed"
    same = np.array([[0.0], [np.nan], [0.8], [0.99]])
    found = summary("cka")(result_of(pairs, same))
    assert found["converged"][0, 0] == 1


def test_without_effects_of_stimuli_there_is_a_step_and_no_error() -> None:
    found = summary("cka")(result_of(curve_pairs([0, 10, 100]), np.array([[0.0], [0.8], [0.99]])))
    assert np.isfinite(found["converged_step"]).all()
    assert np.isnan(found["converged_step_stderr"]).all()


# ---- groups


def test_group_means_and_contrasts_are_those_of_the_pairs_without_self_pairs() -> None:
    value = np.arange(10.0)[:, None]
    networks = networks_of(value, (3, 2))
    matrix = np.full((5, 5), np.nan)
    matrix[np.triu_indices(5, 1)] = value[:, 0]
    within_a, within_b = np.nanmean(matrix[:3, :3]), matrix[3, 4]
    between = matrix[:3, 3:].mean()
    np.testing.assert_allclose(group_means(networks, 2)[:, 0], [within_a, within_b, between])
    test = relabelling_test(networks, 0, 1, 1000, 0)
    assert test.difference[0] == pytest.approx(within_a - within_b)
    assert test.cohesion[0] == pytest.approx((within_a + within_b) / 2 - between)
    assert test.n_splits == 10


def brute_force_p(value: np.ndarray, size: int) -> tuple[float, float]:
    """p-values of difference and cohesion of one layer, group a first, written out from their definitions."""
    n = int((1 + math.sqrt(1 + 8 * len(value))) / 2)
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = value
    matrix += matrix.T

    def within(group: tuple[int, ...]) -> float:
        return float(np.mean([matrix[i, j] for i, j in combinations(group, 2)]))

    groups = [tuple(range(size)), tuple(range(size, n))]
    share = np.zeros(n)
    for group in groups:
        for i in group:
            rest = tuple(k for k in group if k != i)
            share[i] = len(group) * within(group) - (len(group) - 1) * within(rest)

    def statistics(a: tuple[int, ...]) -> tuple[float, float]:
        b = tuple(i for i in range(n) if i not in a)
        welch = scipy.stats.ttest_ind(share[list(a)], share[list(b)], equal_var=False).statistic
        return abs(welch), (within(a) + within(b)) / 2 - matrix[np.ix_(a, b)].mean()

    everything = np.array([statistics(a) for a in combinations(range(n), size)])
    return tuple((everything >= np.array(statistics(groups[0])) - 1e-7).mean(0).tolist())


@pytest.mark.parametrize(("size", "other", "splits"), [(3, 3, 10), (4, 3, 35), (3, 5, 56)])
def test_p_values_by_enumeration_equal_brute_force_over_all_labelings(
    size: int, other: int, splits: int
) -> None:
    n = size + other
    value = np.random.default_rng(3).normal(size=n * (n - 1) // 2)
    test = relabelling_test(networks_of(value[:, None], (size, other)), 0, 1, 1000, 0)
    assert test.n_splits == splits
    assert test.smallest_p == 1 / splits
    assert (test.difference_p[0], test.cohesion_p[0]) == pytest.approx(brute_force_p(value, size))


def test_random_relabelings_agree_with_all_of_them_and_never_give_zero() -> None:
    value = np.random.default_rng(4).normal(size=(45, 3))
    networks = networks_of(value, (5, 5))
    exact, drawn = (relabelling_test(networks, 0, 1, n, 0) for n in (126, 125))
    assert (exact.n_splits, drawn.n_splits) == (126, 125)
    np.testing.assert_allclose(exact.difference_p, drawn.difference_p, atol=0.12)
    first, second = np.triu_indices(10, 1)
    far = networks_of(((first < 5) & (second < 5))[:, None] * 1.0, (5, 5))
    assert relabelling_test(far, 0, 1, 20, 0).difference_p >= 1 / 21


def test_correction_for_layers_makes_p_values_larger_and_leaves_one_layer_alone() -> None:
    value = np.random.default_rng(5).normal(size=(45, 6))
    many = relabelling_test(networks_of(value, (5, 5)), 0, 1, 1000, 0)
    one = relabelling_test(networks_of(value[:, :1], (5, 5)), 0, 1, 1000, 0)
    assert (many.difference_p_layers >= many.difference_p).all()
    assert one.difference_p_layers == one.difference_p


def test_relabelling_networks_keeps_the_error_rate_that_a_t_test_on_pairs_does_not() -> None:
    """400 series at once, each a layer of its own: network effects and noise from one population."""
    generator = np.random.default_rng(7)
    first, second = np.triu_indices(10, 1)
    effect = generator.normal(size=(10, 400))
    value = effect[first] + effect[second] + 0.5 * generator.normal(size=(45, 400))
    test = relabelling_test(networks_of(value, (5, 5)), 0, 1, 1000, 0)
    within = [(first < 5) & (second < 5), (first >= 5) & (second >= 5)]
    t_test = scipy.stats.ttest_ind(value[within[0]], value[within[1]]).pvalue
    assert 0.03 <= (test.difference_p <= 0.05).mean() <= 0.08
    assert 0.02 <= (test.cohesion_p <= 0.05).mean() <= 0.08
    assert (t_test <= 0.05).mean() > 0.25


def simulated(sizes: tuple[int, int], network: float, pair: float, within: tuple[float, float]) -> Networks:
    """300 series, each a layer of its own; 0.02 between the groups."""
    generator = np.random.default_rng(11)
    n = sum(sizes)
    first, second = np.triu_indices(n, 1)
    effect = network * generator.normal(size=(n, 300))
    group = np.repeat([0, 1], sizes)
    mean = np.where(group[first] != group[second], 0.02, np.array(within)[group[first]])
    noise = pair * generator.normal(size=(len(first), 300))
    return networks_of(mean[:, None] + effect[first] + effect[second] + noise, sizes)


@pytest.mark.parametrize("sizes", [(5, 3), (8, 4), (10, 5)])
def test_difference_of_groups_of_unequal_sizes_that_are_far_apart_is_found(sizes: tuple[int, int]) -> None:
    test = relabelling_test(simulated(sizes, 0.02, 0.0, (0.88, 0.30)), 0, 1, 1000, 0)
    assert (test.difference_p <= 0.05).all()


@pytest.mark.parametrize("sizes", [(4, 4), (5, 5), (8, 4), (5, 3)])
@pytest.mark.parametrize(("network", "pair", "least"), [(1.0, 0.0, 0.01), (0.5, 0.5, 0.0), (0.0, 1.0, 0.0)])
def test_groups_that_are_apart_and_equally_close_differ_no_more_often_than_the_level(
    sizes: tuple[int, int], network: float, pair: float, least: float
) -> None:
    test = relabelling_test(simulated(sizes, network, pair, (50.0, 50.0)), 0, 1, 1000, 0)
    assert least <= (test.difference_p <= 0.05).mean() <= 0.08


def test_difference_needs_three_networks_in_each_group_and_cohesion_does_not() -> None:
    value = np.random.default_rng(4).normal(size=(10, 2))
    test = relabelling_test(networks_of(value, (3, 2)), 0, 1, 1000, 0)
    assert np.isnan(test.difference_p).all()
    assert np.isnan(test.difference_p_layers).all()
    assert np.isfinite(test.difference).all()
    assert np.isfinite(test.cohesion_p_layers).all()


def test_network_whose_layer_is_constant_is_left_out_of_the_difference_of_that_layer_alone() -> None:
    value = np.random.default_rng(6).normal(size=(28, 2))
    first, second = np.triu_indices(8, 1)
    there = (first != 7) & (second != 7)
    value[~there, 0] = np.nan
    test = relabelling_test(networks_of(value, (4, 4)), 0, 1, 1000, 0)
    whole = relabelling_test(networks_of(value[:, 1:], (4, 4)), 0, 1, 1000, 0)
    without = relabelling_test(networks_of(value[there, :1], (4, 3)), 0, 1, 1000, 0)
    assert test.difference_p[1] == whole.difference_p[0]
    assert test.difference[0] == pytest.approx(without.difference[0])
    assert np.isfinite(test.difference_p[0])


@pytest.mark.parametrize(("size", "tolerance"), [(3, 0.15), (5, 0.12), (8, 0.12)])
def test_error_of_a_group_mean_is_the_spread_over_fresh_networks(size: int, tolerance: float) -> None:
    generator = np.random.default_rng(8)
    first, second = np.triu_indices(2 * size, 1)
    effect = generator.normal(size=(2 * size, 600))
    value = effect[first] + effect[second]
    networks = networks_of(value, (size, size))
    drawn = drawn_means(networks, 2, np.zeros((600, 1)), 0)
    truth = group_means(networks, 2).std(1)
    estimate = np.sqrt(drawn.var(0, ddof=1).mean(1))
    np.testing.assert_allclose(estimate, truth, rtol=tolerance)


def test_error_over_stimuli_is_in_that_of_the_group_mean() -> None:
    effect = np.broadcast_to(centred_effects((1, 16), 0.02), (45, 1, 16))
    first, second = np.triu_indices(10, 1)
    networks = Networks(0.0, np.repeat([0, 1], 5), first, second, np.full((45, 1), 0.5), effect)
    drawn = drawn_means(networks, 2, stimulus_draws(16, 3000), 0)
    np.testing.assert_allclose(drawn.std(0), 0.02, rtol=0.06)  # no spread over networks: that alone


def test_generalising_runs_that_are_mutually_closer_are_found_with_p_from_all_relabelings() -> None:
    def value(a: str, b: str, ga: str, gb: str) -> list[float]:
        late = {("true", "true"): 0.93, ("shuffled", "shuffled"): 0.41}.get((ga, gb), 0.42)
        wiggle = 0.01 * math.sin(int(a[-1]) + 2 * int(b[-1]))
        return [0.9 + wiggle, late + wiggle]

    found = summary("cka")(group_result({"true": 5, "shuffled": 5}, value))
    assert found["group_pair"].tolist() == ["true", "shuffled", "true | shuffled"]
    assert found["contrast"].tolist() == ["true − shuffled", "within − between"]
    assert found["group_similarity"].shape == (1, 2, 3)
    np.testing.assert_allclose(found["group_similarity"][0, 1], [0.93, 0.41, 0.42], atol=0.01)
    assert found["contrast_value"][0, 1, 0] == pytest.approx(0.52, abs=0.01)
    assert found["contrast_p"][0, 1, 0] == pytest.approx(1 / 126)
    assert found["n_splits"].tolist() == [[126, 126]]
    assert 0 < found["contrast_stderr"][0, 1, 0] < 0.02
    text = "\n".join(found["finding"])
    assert "true runs are mutually closer than shuffled ones in 1 of 2 layers, most clearly at conv2" in text
    assert "126 relabelings of networks, smallest possible p 0.0079" in text
    assert "no t-test on pairs" in text


def test_group_of_one_network_has_no_within_mean_and_the_finding_says_so() -> None:
    found = summary("cka")(group_result({"true": 3, "shuffled": 1}, lambda a, b, ga, gb: [0.5]))
    within_shuffled = found["group_similarity"][0, 0, 1]
    assert np.isnan(within_shuffled)
    assert np.isnan(found["contrast_p"]).all()
    assert "shuffled has 1 network" in "\n".join(found["finding"])


def test_too_few_networks_for_a_small_p_value_is_said() -> None:
    found = summary("cka")(group_result({"true": 3, "shuffled": 3}, lambda a, b, ga, gb: [hash_of(a, b)]))
    assert "too few networks for any difference to have p below 0.05" in "\n".join(found["finding"])


def test_finding_names_the_layer_of_the_smallest_p_value_and_not_that_of_the_largest_difference() -> None:
    """The last layer differs most and varies most."""

    def value(a: str, b: str, ga: str, gb: str) -> list[float]:
        late = {("true", "true"): 0.93, ("shuffled", "shuffled"): 0.80}.get((ga, gb), 0.5)
        opposite = {("true", "true"): 0.80, ("shuffled", "shuffled"): 0.90}.get((ga, gb), 0.5)
        wiggle = 0.001 * hash_of(a, b)
        wide = 0.2 * sum(hash_of(x, x) * (2 if x[0] == "t" else 4) for x in (a, b))
        return [late + wiggle, 0.9 + wiggle, opposite + wiggle, wide]

    found = summary("cka")(group_result({"true": 5, "shuffled": 5}, value))
    assert np.abs(found["contrast_value"][0, :, 0]).argmax() == 3
    assert found["contrast_p_layers"][0, 3, 0] > 0.05
    text = next(x for x in found["finding"] if "mutually" in x)
    expected = (
        "true runs are mutually closer than shuffled ones in 1 of 4 layers (in 1 the other way round), "
    )
    assert text.startswith(f"{expected}most clearly at conv1, step 9: ")


def test_too_few_relabelings_looked_at_name_the_option_and_not_the_networks() -> None:
    result = group_result({"a": 5, "b": 5}, lambda a, b, ga, gb: [hash_of(a, b)], permutations=1)
    text = "\n".join(summary("cka")(result)["finding"])
    assert "too few relabelings looked at (--permutations) for any difference to have p below 0.05" in text
    assert "too few networks" not in text


def joined(*results: Result) -> Result:
    arrays = {
        name: Array(array.dims, np.concatenate([r[name] for r in results]))
        if array.dims[0] == "pair"
        else array
        for name, array in results[0].arrays.items()
    }
    return Result("cka", "pair", arrays, results[0].attributes)


def test_runs_that_end_at_different_steps_are_described_where_all_are_and_named() -> None:
    def value(a: str, b: str, ga: str, gb: str) -> list[float]:
        return [hash_of(a, b)]

    result = joined(
        group_result({"a": 4, "b": 4}, value, 100),
        group_result({"a": 3, "b": 4}, value, 200),
        group_result({"a": 3}, value, 300),
    )
    found = summary("cka")(result)
    assert found["group_step"].tolist() == [100, 200, 300]
    assert np.isnan(found["group_similarity"][2, 0, 1:]).all()
    assert np.isfinite(found["group_similarity"][2, 0, 0])
    assert np.isnan(found["contrast_p"][2]).all()
    text = "\n".join(found["finding"])
    missing = "compared with no other network: at step 200, 300 a3; at step 300 b0, b1, b2, b3"
    assert f"{missing}; groups are described at step 200" in text
    assert "step 200: " in text


@pytest.mark.parametrize("last", ["a", "b", "c"])
def test_step_that_one_group_alone_has_reached_has_its_mean_and_no_test(last: str) -> None:
    def value(a: str, b: str, ga: str, gb: str) -> list[float]:
        return [hash_of(a, b)]

    found = summary("cka")(
        joined(group_result({"a": 3, "b": 3, "c": 3}, value, 100), group_result({last: 3}, value, 200))
    )
    known = np.isfinite(found["group_similarity"][1, 0])
    assert known.tolist() == [name == last for name in found["group_pair"]]
    assert np.isnan(found["contrast_p"][1]).all()
    assert np.isfinite(found["contrast_p"][0]).all()


def test_network_of_which_every_pair_failed_is_named() -> None:
    result = group_result({"a": 4, "b": 3}, lambda a, b, ga, gb: [hash_of(a, b)])
    result["status"][(result["run_a"] == "a0") | (result["run_b"] == "a0")] = "failed"
    assert "compared with no other network: at any step a0" in summary("cka")(result)["finding"]


def test_groups_stand_in_the_order_in_which_they_were_given() -> None:
    result = group_result({"b": 3, "a": 3}, lambda a, b, ga, gb: [hash_of(a, b)])
    assert summary("cka")(result)["group_pair"].tolist() == ["b", "a", "b | a"]
    given = Result("cka", "pair", result.arrays, {"groups": ["a", "b"]})
    assert summary("cka")(given)["group_pair"].tolist() == ["a", "b", "a | b"]


def hash_of(a: str, b: str) -> float:
    return math.sin(sum(map(ord, a + b))) / 4 + 0.5


def test_pairs_at_different_steps_or_of_one_run_do_not_count_for_groups() -> None:
    base = group_result({"true": 3, "shuffled": 3}, lambda a, b, ga, gb: [hash_of(a, b)])
    step_b = base["step_b"].copy()
    step_b[0] = 77
    moved = Result("cka", "pair", {**base.arrays, "step_b": Array(("pair",), step_b)}, {})
    found, all_pairs = summary("cka")(moved), summary("cka")(base)
    assert found["group_similarity"][0, 0, 0] != all_pairs["group_similarity"][0, 0, 0]
    np.testing.assert_allclose(found["group_similarity"][0, 0, 1:], all_pairs["group_similarity"][0, 0, 1:])


def test_three_groups_have_a_contrast_for_every_two() -> None:
    found = summary("cka")(group_result({"a": 3, "b": 3, "c": 2}, lambda a, b, ga, gb: [hash_of(a, b)]))
    assert len(found["group_pair"]) == 6
    assert found["contrast"].tolist()[:2] == ["a − b", "within − between: a | b"]
    assert len(found["contrast"]) == 6
    assert len(set(found["finding"])) == len(found["finding"])


def test_same_seed_gives_the_same_numbers() -> None:
    result = group_result({"a": 4, "b": 3}, lambda a, b, ga, gb: [hash_of(a, b), 0.5])
    first, second = summary("cka")(result), summary("cka")(result)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_summary_returns_what_it_declares_with_the_dimensions_it_declares() -> None:
    for result in (
        bottom_up(0.01),
        group_result({"a": 4, "b": 3}, lambda a, b, ga, gb: [hash_of(a, b), 0.5]),
    ):
        sizes: dict[str, int] = {}
        for name, value in summary("cka")(result).items():
            var = SUMMARY_RETURNS[name]
            assert len(var.dims) == np.ndim(value), name
            for dim, size in zip(var.dims, np.shape(value), strict=True):
                assert sizes.setdefault(dim, size) == size, name
    for name, var in SUMMARY_RETURNS.items():
        assert name not in RESERVED
        assert var.optional
        assert var.long_name
        assert not var.error or var.error in SUMMARY_RETURNS
        assert not {"pair", "run", "checkpoint"} & set(var.dims)


def test_options_of_the_call_set_level_and_number_of_relabelings() -> None:
    result = bottom_up(0.003)
    early = summary("cka")(Result("cka", "pair", result.arrays, {"options": {"level": 0.5}}))
    late = summary("cka")(result)
    assert (early["converged_step"][0, :3] < late["converged_step"][0, :3]).all()
    assert "reaches a similarity of 0.5" in early["finding"][0]
    drawn = group_result({"a": 5, "b": 5}, lambda a, b, ga, gb: [hash_of(a, b)], permutations=40)
    assert (summary("cka")(drawn)["n_splits"] == 40).all()
