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
from dynprobe.analyzers._networks import Networks, drawn_means, group_means, relabelling_test
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

LAYERS = ("conv1", "conv2", "conv3", "fc")


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
    for name in ("run_a", "step_a", "run_b", "step_b", "group_a", "group_b"):
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


def bottom_up(noise: float) -> Result:
    steps = [0, 10, 30, 100, 300, 700]
    when = np.array([20.0, 60.0, 150.0, 500.0])
    same = 1 / (1 + (when[None] / (1e-9 + np.array(steps)[:, None])) ** 3)
    return result_of(curve_pairs(steps), same, centred_effects((6, 4, 16), noise))


def test_run_whose_layers_converge_one_after_the_other_is_called_bottom_up_with_its_error() -> None:
    found = summary("cka")(bottom_up(0.003))
    assert found["curve_run"].tolist() == ["r"]
    assert found["depth_tau"][0] == 1
    assert found["depth_tau_stderr"][0] < 0.05
    assert found["depth_tau_p"][0] == pytest.approx(2 / 24)
    assert (found["converged"][0, :3] == 1).all()
    assert (np.diff(found["converged_step"][0, :3]) > 0).all()
    assert (found["converged_step_low"][0, :3] <= found["converged_step"][0, :3]).all()
    assert (found["converged_step_stderr"][0, :3] > 0).all()
    assert found["finding"][0].startswith("bottom-up: conv1")
    assert "Kendall's tau with depth 1.00" in found["finding"][0]
    assert "the smallest that 4 layers allow is 0.083" in found["finding"][0]
    expected = r"conv1 reaches a similarity of 0.9 to the last checkpoint at step \d+\.?\d* ± \d"
    assert re.search(expected, found["finding"][0])


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


def test_p_values_by_enumeration_equal_brute_force_over_all_labelings() -> None:
    value = np.random.default_rng(3).normal(size=(15, 1))
    matrix = np.zeros((6, 6))
    matrix[np.triu_indices(6, 1)] = value[:, 0]
    matrix += matrix.T

    def statistics(a: tuple[int, ...]) -> tuple[float, float]:
        b = [i for i in range(6) if i not in a]
        within = [np.mean([matrix[i, j] for i, j in combinations(g, 2)]) for g in (a, b)]
        between = matrix[np.ix_(a, b)].mean()
        return abs(within[0] - within[1]), sum(within) / 2 - between

    all_labelings = [statistics(a) for a in combinations(range(6), 3)]
    own = statistics((0, 1, 2))
    test = relabelling_test(networks_of(value, (3, 3)), 0, 1, 1000, 0)
    assert test.n_splits == 10
    assert test.smallest_p == 0.1
    assert test.difference_p[0] == pytest.approx(np.mean([s[0] >= own[0] - 1e-12 for s in all_labelings]))
    assert test.cohesion_p[0] == pytest.approx(np.mean([s[1] >= own[1] - 1e-12 for s in all_labelings]))


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
    assert "true runs are mutually closer than shuffled ones, most at conv2" in text
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
