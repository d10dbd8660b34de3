"""Folders, globs and lists of files become ordered runs; weights are read when asked for."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from checkpoint_makers import assert_same, save_distributed, save_huggingface, small_state
from safetensors.torch import save_file

from dynprobe.io.checkpoints import content_hash, open_runs
from dynprobe.io.errors import InputError, UnreadableCheckpoint
from dynprobe.io.run_specs import run_labels
from dynprobe.io.state_search import NoSuchKey


def open_one(*specs, **options):
    (run,) = open_runs([str(spec) for spec in specs], **options)
    return run


def steps(run):
    return [checkpoint.step for checkpoint in run]


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (0, 2, 9, 10, 100):
        torch.save(small_state(step), folder / f"step_{step}.pt")
    return folder


def test_order_is_numeric_never_lexical(run_folder):
    run = open_one(run_folder)
    assert steps(run) == [0, 2, 9, 10, 100]
    assert (run.name, run.unit) == ("run", "step")
    assert {checkpoint.step_source for checkpoint in run} == {"file name"}
    assert_same(run.checkpoints[2].load().state, small_state(9))


def test_every_format_in_one_folder_has_the_same_hash(tmp_path):
    state = small_state()
    folder = tmp_path / "mixed"
    folder.mkdir()
    torch.save({"model": state}, folder / "step_1.pt")
    torch.save(state, folder / "step_2.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "step_3.safetensors")
    save_huggingface(folder / "checkpoint-4", state, 4, shards=2)
    save_distributed(folder / "step_5", {"model": state, "step": 5})
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "step_6.bin")
    run = open_one(folder)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    formats = ["torch", "torch-legacy", "safetensors", "huggingface", "distributed", "torch"]
    assert [checkpoint.format for checkpoint in run] == formats
    assert {checkpoint.load().hash for checkpoint in run} == {content_hash(state)}


def test_hash_depends_on_names_dtypes_shapes_and_bytes():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2)}
    variants = [
        state,
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].to(torch.float64), "b": state["b"]},
        {"a": state["a"].reshape(1, 2), "b": state["b"]},
        {"a": state["a"], "b": -state["b"]},
    ]
    assert len({content_hash(variant) for variant in variants}) == len(variants)
    assert content_hash(dict(reversed(state.items()))) == content_hash(state)


def test_listing_reads_no_weights_and_does_not_import_torch(run_folder):
    script = """
        import sys
        from dynprobe.io.checkpoints import open_runs
        (run,) = open_runs([sys.argv[1]])
        assert [c.step for c in run] == [0, 2, 9, 10, 100]
        assert all(c.header().n_parameters == 63 for c in run)
        print("torch" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(run_folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_truncated_file_stays_in_the_listing_with_its_problem(run_folder):
    whole = (run_folder / "step_10.pt").read_bytes()
    (run_folder / "step_10.pt").write_bytes(whole[: len(whole) // 2])
    run = open_one(run_folder)
    assert steps(run) == [0, 2, 9, 10, 100]
    damaged = run.checkpoints[3]
    assert "step_10.pt" in damaged.problem
    assert [bool(checkpoint.problem) for checkpoint in run].count(True) == 1
    with pytest.raises(UnreadableCheckpoint, match=r"step_10\.pt"):
        damaged.load()


def test_what_is_no_checkpoint_is_left_out_and_said(run_folder):
    torch.save({"state": {}, "param_groups": []}, run_folder / "optimizer.pt")
    torch.save([], run_folder / "step_3_meta.pt")
    (run_folder / "log.txt").write_text("loss 1")
    (run_folder / ".hidden.pt").write_text("x")
    (run_folder / "step_5.pt.tmp").write_text("x")
    run = open_one(run_folder)
    assert steps(run) == [0, 2, 9, 10, 100]
    assert any("left out 2 without weights" in note and "optimizer.pt" in note for note in run.notes)
    assert run.warnings == ["left out 1 without weights: step_3_meta.pt"], "it looks like a checkpoint"


def test_huggingface_run_with_its_final_model_in_the_root(tmp_path):
    root = tmp_path / "out"
    save_huggingface(root, small_state(30), 30)
    for step in (10, 20, 30):
        save_huggingface(root / f"checkpoint-{step}", small_state(step), step, shards=1 + (step == 20))
    run = open_one(root)
    assert steps(run) == [10, 20, 30]
    assert run.checkpoints[-1].path.name == "checkpoint-30"
    assert any("left out out: the same weights as checkpoint-30" in note for note in run.notes)


def test_nested_checkpoints_folder_is_found(tmp_path):
    nested = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    nested.mkdir(parents=True)
    for step in (8, 16):
        tree = {
            "pytorch-lightning_version": "2",
            "global_step": step,
            "epoch": 0,
            "state_dict": small_state(step),
        }
        torch.save(tree, nested / f"epoch=0-step={step}.ckpt")
    torch.save(tree, nested / "last.ckpt")
    run = open_one(tmp_path)
    assert steps(run) == [8, 16]
    assert any("last.ckpt: the same weights as epoch=0-step=16.ckpt" in note for note in run.notes)


def test_several_runs_below_a_folder_are_an_error_that_lists_them(tmp_path):
    for seed in (1, 2):
        (tmp_path / f"seed{seed}").mkdir()
        torch.save(small_state(), tmp_path / f"seed{seed}" / "step_1.pt")
    with pytest.raises(InputError, match="holds 2 runs") as caught:
        open_one(tmp_path)
    assert "seed2" in caught.value.tip
    first, second = open_runs([str(tmp_path / "seed1"), str(tmp_path / "seed2")])
    assert (first.name, second.name) == ("seed1", "seed2")


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    for parent in "ab":
        (tmp_path / parent / "ckpt").mkdir(parents=True)
        torch.save(small_state(), tmp_path / parent / "ckpt" / "step_1.pt")
    runs = open_runs([str(tmp_path / "a" / "ckpt"), str(tmp_path / "b" / "ckpt")])
    assert [run.name for run in runs] == ["a/ckpt", "b/ckpt"]


def test_equal_paths_get_equal_short_labels():
    assert run_labels([Path("/data/a.npy"), Path("/data/a.npy")]) == ["a.npy", "a.npy"]
    assert run_labels([Path("/x/a"), Path("/x/a"), Path("/y/a")]) == ["x/a", "x/a", "y/a"]
    assert run_labels([Path("/a"), Path("/y/a"), Path("/")]) == ["a", "y/a", "/"]


def test_per_step_folders_with_one_file_each(tmp_path):
    for step in (5, 10):
        (tmp_path / f"step_{step}").mkdir()
        torch.save(small_state(step), tmp_path / f"step_{step}" / "weights.pt")
        torch.save({"state": {}, "param_groups": []}, tmp_path / f"step_{step}" / "optimizer.pt")
    assert steps(open_one(tmp_path)) == [5, 10]


def test_empty_folder_and_missing_path_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in this folder") as caught:
        open_one(tmp_path)
    assert ".safetensors" in caught.value.tip
    with pytest.raises(InputError, match="no such file"):
        open_one(tmp_path / "ghost")
    with pytest.raises(InputError, match="nothing matches"):
        open_one(tmp_path / "*.pt")


def test_files_globs_and_stdin_give_one_run(run_folder, monkeypatch):
    files = sorted(run_folder.glob("*.pt"))
    for run in (open_one(*files), open_one(run_folder / "*.pt")):
        assert (steps(run), run.name) == ([0, 2, 9, 10, 100], "run")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(str, files[:2])) + "\n\n"))
    assert len(open_one("-")) == 2
    assert steps(open_one(files[0])) == [0]


def test_alias_is_dropped_only_if_its_weights_are_the_same(run_folder):
    torch.save({"step": 100, "model": small_state(100)}, run_folder / "last.pt")
    torch.save({"step": 9, "model": small_state(1)}, run_folder / "best.pt")
    torch.save(small_state(7), run_folder / "final.pt")
    run = open_one(run_folder)
    assert steps(run) == [0, 2, 9, 10, 100]
    assert any("last.pt: the same weights as step_100.pt" in note for note in run.notes)
    assert any("best.pt: claims step 9 as step_9.pt does" in warning for warning in run.warnings)
    assert any("final.pt: nothing tells its step" in note for note in run.notes)


def test_alias_with_a_step_of_its_own_joins_the_sequence(run_folder):
    torch.save({"step": 120, "model": small_state(1)}, run_folder / "last.pt")
    assert steps(open_one(run_folder)) == [0, 2, 9, 10, 100, 120]


def test_link_to_a_checkpoint_is_an_alias(run_folder):
    (run_folder / "step_100_copy.pt").symlink_to(run_folder / "step_100.pt")
    assert steps(open_one(run_folder)) == [0, 2, 9, 10, 100]


def test_two_files_at_one_step_are_kept_with_a_warning(run_folder):
    torch.save(small_state(1), run_folder / "ema_step_9.pt")
    run = open_one(run_folder)
    assert steps(run) == [0, 2, 9, 9, 10, 100]
    assert any("both claim step 9" in warning for warning in run.warnings)


def test_step_pattern_comes_first_and_leaves_out_what_does_not_match(tmp_path):
    for run, it in ((7, 1), (8, 2)):
        torch.save({"step": 5, "model": small_state(it)}, tmp_path / f"net{run}.x{it}.pt")
    torch.save(small_state(), tmp_path / "other.pt")
    run = open_one(tmp_path, step_pattern=r"\.x(\d+)")
    assert steps(run) == [1, 2]
    assert run.checkpoints[0].step_source == "command line"
    assert any("left out other.pt" in note for note in run.notes)
    run = open_one(tmp_path, step_pattern=r"\.x(?P<epoch>\d+)")
    assert (steps(run), run.unit) == ([1, 2], "epoch")


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "no regular expression"), ("x", "no group"), ("(n)", "no number")]
)
def test_bad_step_pattern_is_explained(run_folder, pattern, message):
    torch.save(small_state(), run_folder / "n.pt")
    with pytest.raises(InputError, match=message):
        open_one(run_folder, step_pattern=pattern)


def test_manifest_chooses_files_key_and_step(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for it in (1, 2):
        torch.save(
            {"a": {"big": torch.ones(99)}, "b": {"w": torch.full((3,), float(it))}}, folder / f"x{it}.pt"
        )
    torch.save(small_state(), folder / "y3.pt")
    (folder / "dynprobe.toml").write_text('[checkpoints]\nglob = "x*.pt"\nkey = "b"\nstep = "x(\\\\d+)"\n')
    run = open_one(folder)
    assert steps(run) == [1, 2]
    assert run.checkpoints[0].step_source == "manifest"
    assert list(run.checkpoints[0].load().state) == ["w"]


def test_data_of_the_manifest_is_no_checkpoint(run_folder):
    save_file({"inputs": torch.zeros(3, 2), "targets": torch.zeros(3)}, run_folder / "data_1.safetensors")
    (run_folder / "dynprobe.toml").write_text('[data]\nsource = "data_1.safetensors"\n')
    assert steps(open_one(run_folder)) == [0, 2, 9, 10, 100]


def test_wrong_key_is_an_error_of_the_user_not_of_the_files(run_folder):
    with pytest.raises(NoSuchKey, match="--key nets"):
        open_one(run_folder, key="nets")


def test_modification_time_is_the_last_resort_and_warned_of(tmp_path):
    for i, name in enumerate("cab"):
        torch.save(small_state(i), tmp_path / f"{name}.pt")
        os.utime(tmp_path / f"{name}.pt", (1000 + i, 1000 + i))
    run = open_one(tmp_path)
    assert [checkpoint.path.name for checkpoint in run] == ["c.pt", "a.pt", "b.pt"]
    assert (steps(run), run.unit) == ([0, 1, 2], "order")
    assert any("modification time" in warning for warning in run.warnings)


def test_single_file_without_a_step_is_fine(tmp_path):
    torch.save(small_state(), tmp_path / "net.pt")
    run = open_one(tmp_path / "net.pt")
    assert (steps(run), run.warnings) == ([None], [])


def test_checkpoints_travel_to_worker_processes(run_folder):
    checkpoint = pickle.loads(pickle.dumps(open_one(run_folder).checkpoints[1]))
    assert_same(checkpoint.load().state, small_state(2))


def test_headers_of_one_model_share_one_table(run_folder):
    run = open_one(run_folder)
    assert len({id(checkpoint.header().tensors) for checkpoint in run}) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 2, 9, 10, 100]),
        ("first", [0]),
        ("last", [100]),
        ("first,last", [0, 100]),
        ("10,0", [0, 10]),
        ("2:10", [2, 9, 10]),
        (":9", [0, 2, 9]),
        ("10:", [10, 100]),
        ("::2", [0, 9, 100]),
        ("1:4:", [2, 9, 10]),
        ("-2::", [10, 100]),
        ("2:9,last", [2, 9, 100]),
    ],
)
def test_select(run_folder, text, expected):
    assert [checkpoint.step for checkpoint in open_one(run_folder).select(text)] == expected


@pytest.mark.parametrize("text", ["11", "200:300", "0,11", "50::"])
def test_select_of_steps_that_do_not_exist_lists_those_that_do(run_folder, text):
    with pytest.raises(InputError, match="no checkpoint of run") as caught:
        open_one(run_folder).select(text)
    assert caught.value.tip == "Steps that exist: 0, 2, 9, 10, 100."


@pytest.mark.parametrize("text", ["", "lots", "1:2:3:4", "::0"])
def test_select_of_nonsense_says_how(run_folder, text):
    with pytest.raises(InputError) as caught:
        open_one(run_folder).select(text)
    assert "Use all, first, last" in caught.value.tip
