"""Which pairs of checkpoints are compared, and which group a run belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynprobe.cli.request import Request
from dynprobe.cli.work import make_plan
from dynprobe.io.errors import InputError

SAMPLES = Path(__file__).resolve().parents[2] / "sample_checkpoints"
ONE, OTHER, THIRD = (str(SAMPLES / n) for n in ("bn_cnn_seed0", "bn_cnn_seed1", "bn_cnn_shuffled"))


def plan(*runs, analyzer="cka", **request):
    return make_plan(Request(analyzer, [str(r) for r in runs], **request))


def steps(plan):
    return [(u.index["step_a"], u.index["step_b"]) for u in plan.units]


def test_two_runs_are_compared_at_their_common_steps():
    assert steps(plan(ONE, OTHER, steps="0,100")) == [(0, 0), (100, 100)]


def test_one_run_is_compared_step_by_step():
    assert steps(plan(ONE, steps="0,10,100")) == [(0, 10), (10, 100)]


def test_one_checkpoint_is_compared_with_itself():
    assert steps(plan(ONE, steps="last")) == [(3000, 3000)]


def test_against_final_leaves_out_the_final_one_itself():
    assert steps(plan(ONE, steps="0,10,last", against="final")) == [(0, 3000), (10, 3000)]


def test_against_final_of_two_runs_stays_within_each_run():
    units = plan(ONE, OTHER, steps="0,last", against="final").units
    assert [(u.index["run_a"], u.index["run_b"]) for u in units] == [
        ("bn_cnn_seed0", "bn_cnn_seed0"),
        ("bn_cnn_seed1", "bn_cnn_seed1"),
    ]


def test_against_a_step_that_was_not_chosen_itself():
    assert steps(plan(ONE, steps="0,10", against="100")) == [(0, 100), (10, 100)]


def test_against_a_file_of_another_run():
    file = f"{OTHER}/step_003000.safetensors"
    units = plan(ONE, steps="0,10", against=file).units
    assert [u.index["path_b"] for u in units] == [file, file]


def test_against_something_that_is_neither_step_nor_file_lists_the_steps():
    with pytest.raises(InputError, match="neither a step of every run nor a file") as error:
        plan(ONE, against="77")
    assert "3000" in error.value.tip


def test_against_and_pairs_contradict_each_other():
    with pytest.raises(InputError, match="both say what is compared"):
        plan(ONE, against="final", pairs="all")


def test_every_checkpoint_is_one_workspace_whatever_the_number_of_its_pairs():
    units = plan(ONE, steps="0,10,100,1000", pairs="all").units
    assert len(units) == 6
    assert len({id(w) for u in units for w in u.workspaces}) == 4


def test_an_analyzer_that_is_handed_both_networks_has_them_in_two_models():
    units = plan(ONE, steps="0,10,100", analyzer="hessian-overlap").units
    assert all([w.slot for w in u.workspaces] == ["a", "b"] for u in units)


def test_groups_by_a_key_of_the_manifests():
    units = plan(ONE, OTHER, THIRD, steps="last", group=["labels"]).units
    assert [(u.index["group_a"], u.index["group_b"]) for u in units] == [
        ("true", "true"),
        ("true", "shuffled"),
        ("true", "shuffled"),
    ]


def test_groups_by_globs_on_labels_or_folders():
    asked = ["plain=*seed?", f"memorised={THIRD}/"]
    units = plan(ONE, OTHER, THIRD, steps="last", group=asked).units
    assert {(u.index["run_b"], u.index["group_b"]) for u in units} == {
        ("bn_cnn_seed1", "plain"),
        ("bn_cnn_shuffled", "memorised"),
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["optimiser"], "has no such key under .groups.; it has seed, labels"),
        (["a=nothing*"], "matches none of the runs"),
        (["a=*", "b=*shuffled"], "bn_cnn_shuffled would be in two groups, a and b"),
        (["a=*shuffled"], "bn_cnn_seed0, bn_cnn_seed1 would be in no group"),
        (["a=*", "labels"], "give NAME=GLOB for every group, or one key"),
    ],
)
def test_a_run_is_in_exactly_one_group(asked, message):
    with pytest.raises(InputError, match=message):
        plan(ONE, OTHER, THIRD, steps="last", group=asked)


@pytest.fixture
def saved(tmp_path):
    generator = np.random.default_rng(0)
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", generator.normal(size=(30, 4)).astype(np.float32))
    return [tmp_path / f"{name}.npy" for name in "abc"]


def test_saved_activations_stand_for_runs(saved):
    units = plan(*saved).units
    assert [(u.index["run_a"], u.index["run_b"]) for u in units] == [
        ("a.npy", "b.npy"),
        ("a.npy", "c.npy"),
        ("b.npy", "c.npy"),
    ]


def test_saved_activations_are_found_by_a_pattern_too(saved):
    assert len(plan(saved[0].parent / "*.npy").units) == 3


def test_one_file_of_saved_activations_is_compared_with_itself(saved):
    assert len(plan(saved[0]).units) == 1


def test_a_run_is_compared_with_saved_activations_at_every_step(saved):
    assert len(plan(ONE, saved[0], steps="0,10,100").units) == 3


def test_options_about_networks_mean_nothing_to_saved_activations(saved):
    with pytest.raises(InputError, match="--samples says how a network is run"):
        plan(*saved, samples=10)


def test_transpose_without_saved_activations_is_refused():
    with pytest.raises(InputError, match="--transpose is about saved activations"):
        plan(ONE, OTHER, transpose=True)


def test_the_last_checkpoints_of_runs_of_different_length_are_compared():
    units = plan(ONE, SAMPLES / "memorisation" / "true_0", steps="last").units
    assert [(u.index["step_a"], u.index["step_b"]) for u in units] == [(3000, 1500)]


def test_runs_without_a_common_step_are_told_what_to_do():
    with pytest.raises(InputError) as error:
        plan(ONE, SAMPLES / "memorisation" / "true_0", steps="3::1")
    assert "--steps last" in error.value.tip
