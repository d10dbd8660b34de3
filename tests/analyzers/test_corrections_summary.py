"""What `dynprobe corrections` says in numbers and sentences."""

from __future__ import annotations

import _correction_results as made
import numpy as np
import pytest

from dynprobe.analyzers._corrections_runs import judged_runs
from dynprobe.analyzers._corrections_sentences import (
    ROUND_OFF,
    change,
    interval,
    judgement_sentences,
    least,
    listed,
    within,
)
from dynprobe.analyzers._corrections_summary import SUMMARY_RETURNS, share, summarise

ALL = ["optimal", "bounded", "timeout", "none_exists", "already_target", "unsupported"]


def read(text):
    return [float(number) for number in text.replace("−", "-").strip("[]").split(", ")]


def result_with(**values):
    """One judgement, some of whose numbers are set by hand."""
    result = made.stacked(made.two_features())
    for name, value in values.items():
        result[name][0, 0] = value
    return result


def sentence(**values):
    return judgement_sentences(judged_runs(result_with(**values))[0], 8)[0]


POLARIS = {
    "value": [44.0, 640.0],
    "box_low": [20.0, 671.0],
    "box_high": [38.0, 720.0],
    "stable_distance": 0.31,
    "stable_lower_bound": 0.3069,
}


def test_a_correction_is_told_with_its_box_its_bound_and_what_was_sampled():
    assert sentence(**POLARIS) == (
        "sample 3 (malignant → benign): dti 44 → [20, 38] and credit 640 → [671, 720] flip it; "
        "distance 0.31, optimal within 1 %; numerically verified, 0 of 200,000 samples fail"
    )


def test_a_feature_that_the_correction_does_not_change_may_vary_or_is_not_told():
    still = {**POLARIS, "corrected": [44.0, 700.0]}
    text = sentence(**{**still, "box_low": [30.0, 671.0], "box_high": [50.0, 720.0]})
    assert ": credit 640 → [671, 720] flips it, and dti in [30, 50] may vary with it; distance" in text
    text = sentence(**{**still, "box_low": [44.0, 671.0], "box_high": [44.0, 720.0]}, changed=[0, 1])
    assert ": credit 640 → [671, 720] flips it; distance" in text


def test_a_feature_whose_judged_value_lies_in_the_box_need_not_change():
    text = sentence(**{**POLARIS, "corrected": [30.0, 700.0], "box_high": [50.0, 720.0]})
    assert ": credit 640 → [671, 720] flips it, and dti in [20, 50] may vary with it; distance" in text


def test_a_change_below_single_precision_is_none():
    text = sentence(
        **{**POLARIS, "corrected": [44.0 + 1e-7, 700.0], "box_low": [44.0 + 1e-7, 671.0]}
        | {"box_high": [46.0, 720.0]}
    )
    assert ": credit 640 → [671, 720] flips it, and dti in " in text


def test_many_features_that_merely_may_vary_are_counted():
    result = made.stacked(made.many_features(n_samples=1, n_features=64, n_changed=2))
    still = result["changed"][0, 0] == 0
    result["changed"][:] = 1
    result["box_low"][0, 0, still] -= 0.1
    result["box_high"][0, 0, still] += 0.1
    text = judgement_sentences(judged_runs(result)[0], 8)[0]
    assert text.count("→ [") == 2
    assert "flip it, and 62 more features may vary with them; distance" in text


def test_categories_are_told_as_columns_that_change():
    columns = {"value": [0.0, 1.0], "corrected": [1.0, 0.0], "box_low": [1.0, 0.0], "box_high": [1.0, 0.0]}
    assert ": dti 0 → 1 and credit 1 → 0 flip it; distance" in sentence(**columns)


def test_a_stable_correction_without_a_box_is_no_single_point():
    none = {**POLARIS, "box_low": np.nan, "box_high": np.nan, "n_sampled": np.nan}
    text = sentence(**none)
    assert text.endswith(
        "stable within ± the stability asked for, verified by the search; no box, see the notes"
    )
    result = result_with(**none)
    result["stability"][:] = 0
    assert (
        "a single point, which the model itself confirms" in judgement_sentences(judged_runs(result)[0], 8)[0]
    )


def test_a_polygon_is_told_with_its_vertices_and_its_area():
    result = made.stacked(made.with_polygons(made.two_features()))
    low, high = (result[f"box_{end}"][0, 0] for end in ("low", "high"))
    area = 0.82 * np.prod((high - low) / (made.HIGH - made.LOW))  # four corners of 0.3 x 0.3 / 2 less
    (text,) = judgement_sentences(judged_runs(result)[0], 8)
    assert f"; all of a polygon of 8 vertices, {least(area)} of the allowed ranges, flips it too; " in text


def test_an_interval_is_printed_within_itself_and_loses_at_most_a_fifth():
    generator = np.random.default_rng(0)
    for _ in range(3000):
        span = 10 ** generator.uniform(-6, 7)
        low = span * generator.uniform(-3, 3)
        high = low + span * 10 ** generator.uniform(-4, 0)
        first, last = read(interval(low, high, span))
        slack = ROUND_OFF * max(abs(low), abs(high))
        assert low - slack <= first < last <= high + slack
        assert last - first >= 0.8 * (high - low) - 2 * slack


def test_a_bound_that_is_a_round_number_up_to_the_conversion_of_units_stays_one():
    assert interval(0.1 + 0.2, 2.9999999999999996, 10) == "[0.3, 3]"


def test_a_judged_value_is_printed_on_the_side_of_the_interval_where_it_is():
    assert change(6.11, 6.1005, 6.11, 10) == "6.11 → [6.1005, 6.11]"
    generator = np.random.default_rng(1)
    for _ in range(3000):
        low, high = np.sort(generator.uniform(-3, 3, 2))
        value = generator.choice([low, high]) + 10 ** generator.uniform(-6, 0) * generator.choice([-1, 1])
        shown, box = change(value, low, high, 6.0).split(" → ")
        first, last = read(box) if "," in box else 2 * read(box)
        (shown,) = read(shown)
        sides = (np.sign(shown - first) < 0, np.sign(shown - last) > 0)
        assert sides == (value < low, value > high)


def test_numbers_have_the_digits_that_their_range_warrants():
    assert change(44.0312, 20, 38, 63) == "44 → [20, 38]"
    assert change(-0.00012, 0.2, 0.5, 1) == "0 → [0.2, 0.5]"
    assert change(123456.7, 2e5, 5e5, 1e6) == "120000 → [200000, 500000]"
    assert interval(20.02, 37.98, 63) == "[20.1, 37.9]"
    assert interval(-5, -5, 1) == "−5"


def test_a_lower_bound_is_rounded_down_and_a_gap_up():
    assert least(0.12999) == "0.129"
    assert least(0.0) == "0"
    assert within(1.0, 0.9899) == "optimal within 2 %"
    assert within(1.0, 1.0) == "optimal"


def test_a_list_counts_what_it_leaves_out_but_never_a_single_one():
    assert listed(["a"]) == "a"
    assert listed(list("abcde")) == "a, b, c, d and e"
    assert listed(list("abcdef"), noun="features") == "a, b, c, d and 2 more features"


def test_that_none_exists_is_said_with_the_ranges_in_which():
    excluded = {"outcome": "none_exists", "nearest_outcome": "none_exists"}
    text = sentence(**excluded, distance=np.inf, stable_distance=np.nan)
    assert text == (
        "sample 3 (malignant → benign): no change of dti and credit within [0, 63] and [300, 850] flips it "
        "(numerically verified)"
    )


def restricted(most):
    result = result_with(outcome="none_exists", nearest_outcome="none_exists", distance=np.nan)
    return made.with_facts(result, max_changed=most)


def told(result):
    return judgement_sentences(judged_runs(result)[0], 8)[0]


def test_only_what_was_searched_is_said_to_flip_nothing():
    assert ": no change of at most one of dti and credit within [0, 63] and [300, 850]" in told(restricted(1))
    assert ": no change of dti and credit within" in told(restricted(2))
    result = made.stacked(made.many_features(n_samples=1, n_features=61))
    result["outcome"][:] = result["nearest_outcome"][:] = "none_exists"
    result["distance"][:] = np.nan
    text = told(made.with_facts(result, max_changed=2))
    assert ": no change of at most two of the 61 features within their allowed ranges flips it" in text


def test_only_what_was_searched_is_said_to_be_far():
    unknown = {"outcome": "timeout", "stable_distance": np.nan, "lower_bound": 0.1199}
    result = made.with_facts(result_with(**unknown, distance=np.nan), max_changed=1)
    assert "no change of at most one of dti and credit nearer than 0.119 flips it, nothing" in told(result)
    result = made.with_facts(result_with(**unknown, distance=0.2, stable_lower_bound=0.12), max_changed=1)
    assert ", and none by a change of at most one of dti and credit is nearer than 0.12" in told(result)


def test_ranges_are_those_of_the_sample():
    none = {"outcome": "none_exists", "nearest_outcome": "none_exists", "distance": np.nan}
    outside = result_with(**none, value=[70.0, 640.0])
    assert "within [0, 70] and [300, 850]" in told(outside)
    ranges = {"allowed_low": [[0.0, 400.0]], "allowed_high": [[70.0, 700.0]]}
    assert "within [0, 70] and [400, 700]" in told(made.with_facts(outside, **ranges))
    assert "within 70 and [400, 640]" in told(made.with_facts(outside, **ranges, direction=[1, -1]))


def test_equal_ranges_are_said_once():
    result = result_with(outcome="none_exists", nearest_outcome="none_exists", distance=np.nan)
    ranges = {"allowed_low": [[0.0, 0.0]], "allowed_high": [[16.0, 16.0]]}
    assert "no change of dti and credit within [0, 16] each flips it" in told(
        made.with_facts(result, **ranges)
    )


def test_that_no_stable_one_exists_names_the_point_that_does():
    text = sentence(outcome="none_exists", distance=0.2, stable_distance=np.nan)
    assert "a point at distance 0.2 flips it, but no change of dti and credit within" in text
    assert "stays flipped in the whole box of the stability asked for" in text


def test_that_no_stable_one_exists_is_not_taken_for_no_point_where_points_are_undecided():
    text = sentence(outcome="none_exists", nearest_outcome="timeout", distance=np.nan)
    assert ": no change of dti and credit within" in text
    assert "stays flipped" in text
    assert "flips it" not in text


def test_a_timeout_says_what_is_known():
    unknown = {
        "outcome": "timeout",
        "stable_distance": np.nan,
        "lower_bound": 0.1199,
        "stable_lower_bound": 0.12,
    }
    text = sentence(**unknown, distance=np.inf)
    assert text.endswith("undecided after the time given: nothing nearer than 0.119 flips it, nothing found")
    text = sentence(**unknown, distance=0.2)
    assert text.endswith(
        "a point at distance 0.2 flips it, no stable correction was found, and none is nearer than 0.12"
    )


def test_a_bounded_correction_says_how_much_is_needed_at_least():
    text = sentence(**{**POLARIS, "stable_lower_bound": 0.2519}, outcome="bounded")
    assert "distance 0.31, at least 0.251 is needed" in text


def test_a_bound_of_zero_is_not_told():
    assert "needed" not in sentence(**{**POLARIS, "stable_lower_bound": 0.0}, outcome="bounded")
    unknown = {"stable_distance": np.nan, "lower_bound": 0.0, "stable_lower_bound": 0.0}
    assert "nearer" not in sentence(outcome="timeout", distance=0.2, **unknown)
    assert sentence(outcome="timeout", distance=np.inf, **unknown).endswith("time given: nothing found")


def test_a_sample_that_fails_is_told_first_and_loudly():
    result = made.stacked(made.two_features(n_samples=3))
    result["sampled_failures"][0, 2] = 12
    first = judgement_sentences(judged_runs(result)[0], 8)[0]
    assert first.startswith("sample 17")
    assert "12 of 200,000 samples FAIL: do not rely on it" in first
    assert "verified" not in first


def test_what_was_not_sampled_is_not_said_to_be():
    assert sentence(**POLARIS, n_sampled=np.nan).endswith("optimal within 1 %; numerically verified")


def test_the_words_never_say_proven():
    result = made.stacked(made.two_features(n_checkpoints=2, n_samples=6, outcomes=ALL))
    assert not any("prove" in text for text in summarise(result)["finding"])


def test_at_most_eight_judgements_are_told_and_the_others_counted():
    texts = summarise(made.stacked(made.two_features(n_samples=20)))["finding"].tolist()
    assert sum(text.startswith("sample") for text in texts) == 8
    assert texts[-1] == "… and 12 more: see the report"


def test_judgements_that_need_no_correction_share_a_sentence():
    result = made.stacked(made.two_features(n_samples=3, outcomes=["already_target"] * 3))
    assert summarise(result)["finding"].tolist() == [
        "3 judgements at step 0: all are the target already, there is nothing to correct",
        "samples 3, 10 and 17: already the target",
    ]


def test_outcomes_are_counted_at_the_last_checkpoint():
    summary = summarise(made.stacked(made.two_features(n_checkpoints=2, n_samples=6, outcomes=ALL)))
    assert {name: summary[f"n_{name}"].tolist() for name in ALL} == {name: [1] for name in ALL}
    assert (
        "6 judgements at step 100: 1 corrected optimally, 1 corrected within bounds, "
        in summary["finding"][0]
    )


def test_what_only_lacks_a_stable_correction_is_not_counted_as_without_any():
    result = made.stacked(made.two_features(n_samples=3, outcomes=["none_exists"] * 3))
    result["nearest_outcome"][0, :2] = "optimal"
    text = summarise(result)["finding"][0]
    assert text == "3 judgements at step 0: 2 without a stable correction, 1 without any correction"
    result["stability"][:] = 0
    assert summarise(result)["finding"][0] == "3 judgements at step 0: 3 without any correction"


def test_a_median_is_said_of_how_many_and_one_value_has_no_quartiles():
    one, three = (
        made.stacked(made.two_features(n_samples=4, outcomes=["optimal"] * n + ["timeout"] * (4 - n)))
        for n in (1, 3)
    )
    for result in (one, three):
        result["stable_distance"][0, :3] = 0.75
    summary = summarise(one)
    assert "; stable distance of the one corrected 0.75" in summary["finding"][0]
    assert np.isnan(summary["stable_distance_low"]).all()
    assert "quartiles" not in summary["finding"][0]
    text = summarise(three)["finding"][0]
    assert "; median stable distance of the 3 corrected 0.75 (quartiles 0.75 to 0.75)" in text


def test_median_and_quartiles_are_of_the_corrections_found_at_the_last_checkpoint():
    result = made.stacked(
        made.two_features(n_checkpoints=2, n_samples=5, outcomes=[*["optimal"] * 4, "timeout"])
    )
    result["stable_distance"][1] = [0.4, 0.1, 0.2, 0.3, np.nan]
    result["stable_lower_bound"][1, :4] = 0.9 * result["stable_distance"][1, :4]
    summary = summarise(result)
    assert summary["median_stable_distance"] == pytest.approx([0.25])
    assert summary["stable_distance_low"] == pytest.approx([0.175])
    assert summary["stable_distance_high"] == pytest.approx([0.325])
    assert summary["median_gap"] == pytest.approx([0.1])


def test_the_share_of_boxes_that_hold_is_over_all_consecutive_checkpoints():
    result = made.stacked(made.two_features(n_checkpoints=3, n_samples=4))
    result["previous_holds"][1:] = [[1, 1, 0, np.nan], [1, 0, 1, 1]]
    summary = summarise(result)
    assert summary["holding_share"] == pytest.approx([5 / 7])
    assert summary["n_boxes_followed"].tolist() == [7]
    shrunk = 6 / 9
    assert summary["holding_share_stderr"] == pytest.approx([np.sqrt(shrunk * (1 - shrunk) / 7)])
    assert any(
        text.startswith("5 of 7 boxes still hold at the next checkpoint (0.71 ± 0.18)")
        for text in summary["finding"]
    )


def test_a_share_of_all_has_an_error_and_a_share_of_none_is_unknown():
    value, error, n = share(np.ones(3))
    assert (value, n) == (1.0, 3)
    assert error > 0
    assert np.isnan(share(np.full(3, np.nan))[:2]).all()


def test_transfer_is_told_for_every_other_run():
    others = ["wine", "b"]
    runs = [made.two_features(name, n_samples=4, others=others) for name in others]
    result = made.stacked(*runs)
    result["transfer"][0, :, 1] = [1, 1, 1, 0]
    summary = summarise(result)
    assert summary["transfer_share"].shape == (2, 2)
    assert summary["transfer_share"][0, 1] == pytest.approx(0.75)
    assert np.isnan(summary["transfer_share"][0, 0])
    assert any(
        "wine: share of its boxes that hold on other runs: 0.75" in text for text in summary["finding"]
    )
    assert sum(": sample" in text for text in summary["finding"]) == 8


def test_sampled_points_are_added_up_and_unknown_where_none_were_sampled():
    summary = summarise(made.stacked(made.two_features(n_checkpoints=2, n_samples=3)))
    assert summary["n_points_sampled"].tolist() == [2 * 3 * 200_000]
    assert summary["n_points_failing"].tolist() == [0]
    assert np.isnan(summarise(made.stacked(made.many_features()))["n_points_sampled"]).all()


def test_checkpoints_are_taken_in_the_order_of_their_steps_and_failed_ones_left_out():
    pieces = made.two_features(n_checkpoints=3)
    (run,) = judged_runs(made.stacked([pieces[2], pieces[0], pieces[1]], made.failed()))
    assert run.step.tolist() == [0, 100, 200]


def test_class_numbers_are_called_classes():
    pieces = made.two_features()
    pieces[0].arrays["class"].values[:] = ["0", "1"]
    try:
        text = judgement_sentences(judged_runs(made.stacked(pieces))[0], 8)[0]
    finally:
        made.CLASSES[:] = ["malignant", "benign"]
    assert text.startswith("sample 3 (class 0 → class 1): ")


def test_more_features_than_a_sentence_holds_are_counted():
    result = made.stacked(made.many_features(n_samples=1, n_features=30, n_changed=9))
    text = judgement_sentences(judged_runs(result)[0], 8)[0]
    assert " and 5 more features flip it" in text


def test_the_summary_returns_what_it_declares():
    others = ["wine", "b"]
    summary = summarise(made.stacked(*[made.two_features(n, others=others) for n in others]))
    assert set(summary) == set(SUMMARY_RETURNS)
    for name, var in SUMMARY_RETURNS.items():
        assert np.ndim(summary[name]) == len(var.dims), name
