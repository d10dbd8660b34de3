"""Which pairs of checkpoints are compared, and which group a run belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dynprobe.cli.request import Request
from dynprobe.cli.work import make_plan
from dynprobe.io.errors import InputError
from dynprobe.io.kept_activations import KeptActivations

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
    with pytest.raises(InputError, match="--samples says how networks are found and run"):
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


def test_the_final_checkpoint_is_that_of_the_run_whatever_steps_were_chosen():
    assert steps(plan(ONE, steps="0,10", against="final")) == [(0, 3000), (10, 3000)]
    assert steps(plan(ONE, steps="10,20", against="first")) == [(10, 0), (20, 0)]


def test_groups_of_runs_and_one_checkpoint_to_compare_with_do_not_go_together():
    with pytest.raises(InputError, match="--group compares runs with each other"):
        plan(ONE, OTHER, steps="last", group=["labels"], against="final")


def test_the_first_that_was_typed_is_the_first_of_the_pair(saved):
    for typed in ([saved[0], ONE], [ONE, saved[0]]):
        index = plan(*typed, steps="last").units[0].index
        assert [index["path_a"].startswith(str(typed[0])), index["path_b"].startswith(str(typed[1]))] == [
            1,
            1,
        ]


def test_saved_activations_beside_two_runs_leave_the_runs_compared_step_by_step(saved):
    units = plan(ONE, OTHER, saved[0], steps="0,10,100").units
    assert len(units) == 3 + 3 + 3


def test_a_reference_is_transposed_like_the_rest(saved):
    *others, reference = saved
    units = plan(*others, against=str(reference), transpose=True).units
    assert all(u.workspaces[1].checkpoint.transpose for u in units)


def test_files_that_differ_in_their_step_alone_are_one_run(saved):
    folder = saved[0].parent
    for step in (0, 20, 100):
        np.save(folder / f"acts_step_{step}.npy", np.ones((30, 4), np.float32))
    assert steps(plan(folder / "acts_step_*.npy", against="final")) == [(0, 100), (20, 100)]


def test_arrays_in_a_folder_of_checkpoints_do_not_hide_these(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for file in Path(ONE).glob("step_00000?.safetensors"):
        (run / file.name).symlink_to(file)
    (run / "dynprobe.toml").write_text(
        (Path(ONE) / "dynprobe.toml").read_text().replace("../", f"{SAMPLES}/")
    )
    np.save(run / "losses.npy", np.ones((100, 3)))
    assert steps(plan(run)) == [(0, 1), (1, 2), (2, 5)]


def test_what_was_kept_of_two_runs_of_one_name_stays_two_runs(tmp_path):
    layers = {"fc": (torch.ones(30, 4), None, "")}
    for place, step in (("one", 0), ("one", 100), ("other", 100), ("other", 200)):
        kept = KeptActivations(tmp_path / place)
        kept.put(f"{place} {step}", layers, {"run": "seed0", "step": step, "input_hash": "x"})
    units = plan(tmp_path / "one", tmp_path / "other").units
    assert [(u.index["run_a"], u.index["run_b"], u.index["step_a"]) for u in units] == [
        ("one/seed0", "other/seed0", 100)
    ]


def test_one_step_that_was_kept_twice_is_refused(tmp_path):
    kept = KeptActivations(tmp_path / "kept")
    for key in "ab":
        layers = {"fc": (torch.ones(30, 4), None, key)}
        kept.put(key, layers, {"run": "seed0", "step": 5, "input_hash": "x"})
    with pytest.raises(InputError, match="one step is there twice"):
        plan(tmp_path / "kept")


@pytest.mark.parametrize("given", [{"pairs": "all"}, {"against": "final"}, {"group": ["labels"]}], ids=str)
def test_options_about_pairs_are_refused_where_single_checkpoints_are_measured(given):
    options = {"predictors": "targets"}
    with pytest.raises(InputError, match="measures each checkpoint by itself"):
        plan(ONE, analyzer="rsa", options=options, **given)
