"""What `dynprobe corrections` says in numbers and sentences."""

from __future__ import annotations

import _correction_results as made
import numpy as np
import pytest

from dynprobe.analyzers._corrections_runs import judged_runs
from dynprobe.analyzers._corrections_sentences import (
    ROUND_OFF,
    amount,
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
        "sample 3 (malignant → benign): dti 44 → [20, 38] and credit 640 → [671, 720] flips it; "
        "distance 0.31, optimal within 1 %; numerically verified, 0 of 200,000 samples fail"
    )


def test_a_feature_that_is_not_changed_is_not_told():
    text = sentence(**POLARIS, changed=[0, 1])
    assert "credit 640" in text
    assert "dti" not in text


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


def test_numbers_have_the_digits_that_their_range_warrants():
    assert amount(44.0312, 63) == "44"
    assert amount(-0.00012, 1) == "0"
    assert amount(123456.7, 1e6) == "120000"
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
    assert summarise(result)["finding"].tolist()[-1] == "samples 3, 10 and 17: already the target"


def test_outcomes_are_counted_at_the_last_checkpoint():
    summary = summarise(made.stacked(made.two_features(n_checkpoints=2, n_samples=6, outcomes=ALL)))
    assert {name: summary[f"n_{name}"].tolist() for name in ALL} == {name: [1] for name in ALL}
    assert (
        "6 judgements at step 100: 1 corrected optimally, 1 corrected within bounds, "
        in summary["finding"][0]
    )


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
    assert " and 5 more features flips it" in text


def test_the_summary_returns_what_it_declares():
    others = ["wine", "b"]
    summary = summarise(made.stacked(*[made.two_features(n, others=others) for n in others]))
    assert set(summary) == set(SUMMARY_RETURNS)
    for name, var in SUMMARY_RETURNS.items():
        assert np.ndim(summary[name]) == len(var.dims), name
