"""`audit` finds what is wrong with a sequence, and nothing in a sound one."""

from __future__ import annotations

import os

import pytest
import torch
from checkpoint_makers import save_huggingface, small_state

from dynprobe.io.audit import audit
from dynprobe.io.checkpoints import open_runs
from dynprobe.io.spacing import missing_steps, out_of_time_order


@pytest.fixture
def folder(tmp_path):
    """Six sound checkpoints, 0 to 500, with a frozen first layer."""
    root = tmp_path / "run"
    root.mkdir()
    for i in range(6):
        save(root, 100 * i, state(i))
    return root


def state(seed):
    """A state whose first layer is the same for all seeds."""
    return {**small_state(seed), "0.weight": small_state(0)["0.weight"], "0.bias": torch.zeros(6)}


def save(root, step, weights, **more):
    torch.save({"model": weights, "step": step, **more}, root / f"step_{step}.pt")
    os.utime(root / f"step_{step}.pt", (1_000_000 + step, 1_000_000 + step))


def findings(root):
    (run,) = open_runs([str(root)])
    return audit(run)


def kinds(root):
    return [finding.kind for finding in findings(root)]


def test_sound_run_with_a_frozen_layer_has_no_finding(folder):
    assert findings(folder) == []


def test_truncated_file_is_found(folder):
    whole = (folder / "step_300.pt").read_bytes()
    (folder / "step_300.pt").write_bytes(whole[: len(whole) // 2])
    (found,) = findings(folder)
    assert (found.kind, found.path) == ("damaged", str(folder / "step_300.pt"))


def test_flipped_bit_in_the_weights_is_found_by_its_checksum(folder):
    data = bytearray((folder / "step_300.pt").read_bytes())
    where = data.index(state(3)["2.weight"].numpy().tobytes())
    data[where] ^= 1
    (folder / "step_300.pt").write_bytes(data)
    os.utime(folder / "step_300.pt", (1_000_300, 1_000_300))
    (found,) = findings(folder)
    assert found.kind == "damaged"
    assert "do not fit their checksum" in found.message


def test_same_weights_at_different_steps_are_found(folder):
    save(folder, 400, state(2))
    (found,) = findings(folder)
    assert found.kind == "duplicate"
    assert "step_200.pt (step 200): the same weights as" in found.message
    assert "step_400.pt" in found.message


def test_nan_and_infinity_are_found_and_counted(folder):
    bad = state(3)
    bad["2.weight"][0, :2] = float("nan")
    bad["2.bias"][1] = float("inf")
    save(folder, 300, bad)
    (found,) = findings(folder)
    assert found.kind == "not finite"
    assert "2 of 9 tensors; '2.weight' has 2 such elements of 18" in found.message


def test_drift_of_shape_dtype_and_names_is_found(folder):
    save(folder, 100, {**state(1), "2.weight": torch.randn(4, 6)})
    save(folder, 200, {**state(2), "2.bias": torch.randn(3).half()})
    save(folder, 300, {**{n: t for n, t in state(3).items() if n != "2.bias"}, "3.bias": torch.ones(1)})
    messages = [found.message for found in findings(folder) if found.kind == "drift"]
    assert "'2.weight' is (4, 6), in most others (3, 6)" in messages[0]
    assert "'2.bias' is float16, in most others float32" in messages[1]
    assert "lacks '2.bias'; also has '3.bias'" in messages[2]
    assert len(messages) == 3


def test_missing_checkpoint_is_found(folder):
    for step in (600, 700, 800, 900):
        save(folder, step, state(step))
    (folder / "step_400.pt").unlink()
    (found,) = findings(folder)
    assert found.kind == "missing"
    assert "no checkpoint at step 400;" in found.message


def test_file_that_says_another_step_than_its_name_is_found(folder):
    torch.save({"model": state(9), "step": 350}, folder / "step_300.pt")
    os.utime(folder / "step_300.pt", (1_000_300, 1_000_300))
    found = [finding for finding in findings(folder) if finding.kind == "step mismatch"]
    assert ["its name says step 300, the file says 350" in finding.message for finding in found] == [True]


def test_counting_from_zero_or_one_is_a_convention_not_a_mismatch(tmp_path):
    for epoch in range(5):
        torch.save({"model": state(epoch), "epoch": epoch}, tmp_path / f"epoch_{epoch + 1}.pt")
    assert kinds(tmp_path) == []


def test_two_files_at_one_step_are_found(folder):
    torch.save({"model": state(77), "step": 300}, folder / "copy_step_300.pt")
    assert "order" in kinds(folder)


def test_file_written_out_of_order_is_found(folder):
    os.utime(folder / "step_200.pt", (2_000_000, 2_000_000))
    (found,) = findings(folder)
    assert (found.kind, found.path) == ("order", str(folder / "step_200.pt"))


def test_shard_of_an_older_checkpoint_is_found(tmp_path):
    for i in range(5):
        save_huggingface(tmp_path / f"checkpoint-{10 * i}", state(i), 10 * i, shards=2)
    assert kinds(tmp_path) == []
    shard = "model-00001-of-00002.safetensors"
    old = (tmp_path / "checkpoint-0" / shard).read_bytes()
    (tmp_path / "checkpoint-30" / shard).write_bytes(old)
    (found,) = findings(tmp_path)
    assert found.kind == "mixed"
    assert "checkpoint-30 (step 30)" in found.message
    assert "those of step 0" in found.message


def test_shard_of_the_checkpoint_just_before_is_found(tmp_path):
    for i in range(5):
        save_huggingface(tmp_path / f"checkpoint-{10 * i}", state(i), 10 * i, shards=2)
    shard = "model-00002-of-00002.safetensors"
    old = (tmp_path / "checkpoint-20" / shard).read_bytes()
    (tmp_path / "checkpoint-30" / shard).write_bytes(old)
    (found,) = findings(tmp_path)
    assert found.kind == "mixed"
    assert "those of step 20" in found.message


def test_layer_that_is_unfrozen_during_training_is_no_mixed_shard(tmp_path):
    for i in range(6):
        weights = {**small_state(i), "0.weight": small_state(max(i, 3))["0.weight"]}
        save_huggingface(tmp_path / f"checkpoint-{10 * i}", weights, 10 * i, shards=2)
    assert kinds(tmp_path) == []


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ([0, 100, 200, 300, 400, 500], []),
        ([0, 100, 200, 400, 500, 600], [300]),
        ([0, 100, 200, 500, 600, 700, 800], [300, 400]),
        ([0, 100, 200, 300, 400, 437], []),  # the last one at the end of training
        ([0, 10, 100, 200, 300, 400, 500], []),  # one more early on
        ([0, 1, 2, 4, 8, 16, 32, 64], []),
        ([1, 2, 4, 8, 32, 64, 128, 256], [16]),
        ([0, 1, 2, 3, 4, 6, 9, 13, 18, 25, 35, 50], []),  # rounded logarithmic
        ([0, 1, 2, 3, 4, 5, 6, 8, 11, 15, 20], []),
        ([0, *(2**k for k in range(10)), *range(1000, 20000, 1000)], []),  # Pythia
        ([0, *(2**k for k in range(10)), *(s for s in range(1000, 40000, 1000) if s != 7000)], [7000]),
        ([0, 100, 300], []),  # too few to tell
        ([3, 17, 18, 90, 91, 400], []),
        ([0.5, 1.0, 1.5, 2.5, 3.0, 3.5], [2.0]),
    ],
)
def test_missing_steps(steps, missing):
    assert missing_steps(steps) == missing


def test_times_of_a_copied_folder_are_no_order():
    second = 1_000_000_000
    paths = [f"step_{step}" for step in (0, 2, 10, 20, 100, 200)]
    assert out_of_time_order(paths, [i * 10 * second for i in range(6)]) == []
    assert out_of_time_order(paths, [0, 0, 0, 0, 0, 0]) == []
    by_name = [sorted(paths).index(path) * 10 * second for path in paths]
    assert out_of_time_order(paths, by_name) == []
    shuffled = [t * 10 * second for t in (3, 0, 5, 2, 4, 1)]
    assert out_of_time_order(paths, shuffled) == []
    assert out_of_time_order(paths, [t * 10 * second for t in (0, 1, 9, 3, 4, 5)]) == [2]
