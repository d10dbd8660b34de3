"""safetensors, Hugging Face folders, torch.distributed.checkpoint, DeepSpeed."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from checkpoint_makers import assert_same, save_distributed, save_huggingface, small_model, small_state
from safetensors.torch import save_file

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.readers import open_file
from dynprobe.io.state_search import NoSuchKey

# -- safetensors ---------------------------------------------------------------------------------------------


def test_safetensors_is_bit_equal_and_tells_its_step(tmp_path):
    state = small_state()
    save_file(
        {f"module.{n}": t for n, t in state.items()}, tmp_path / "c.safetensors", metadata={"step": "70"}
    )
    opened = open_file(tmp_path / "c.safetensors")
    loaded = opened.load()
    assert_same({name: loaded[name] for name in state}, state)
    assert [tuple(count) for count in opened.header.counts] == [(70, "step", "safetensors metadata step")]
    assert opened.header.dtype == "float32"


def test_truncated_safetensors_names_the_file_and_the_tensor(tmp_path):
    save_file(small_state(), tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    for length in (9, 50, len(whole) - 1):
        (tmp_path / "d.safetensors").write_bytes(whole[:length])
        with pytest.raises(UnreadableCheckpoint, match=r"d\.safetensors: "):
            open_file(tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        7,
    ],
)
def test_safetensors_header_that_lies_is_refused(tmp_path, entry):
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "c.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(UnreadableCheckpoint):
        open_file(tmp_path / "c.safetensors")


def test_safetensors_has_nothing_to_choose(tmp_path):
    save_file(small_state(), tmp_path / "c.safetensors")
    with pytest.raises(NoSuchKey, match="one flat mapping"):
        open_file(tmp_path / "c.safetensors", key="model")


# -- Hugging Face --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_huggingface_folder_is_read_whole(tmp_path, shards):
    state = small_state()
    save_huggingface(tmp_path / "checkpoint-40", state, 40, shards)
    opened = open_file(tmp_path / "checkpoint-40")
    loaded = opened.load()
    assert_same({name: loaded[name] for name in state}, state)
    assert set(opened.header.tensors) == set(state)
    assert opened.header.format == "huggingface"
    assert opened.header.counts[0] == (40, "step", "trainer_state.json global_step")


def test_sharded_bin_folder_is_read(tmp_path):
    state = small_state()
    names = list(state)
    torch.save({n: state[n] for n in names[:4]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({n: state[n] for n in names[4:]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    table = {n: f"pytorch_model-0000{1 + (n in names[4:])}-of-00002.bin" for n in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    assert_same(open_file(tmp_path).load(), state)


def test_missing_shard_is_named(tmp_path):
    save_huggingface(tmp_path / "checkpoint-40", small_state(), 40, shards=3)
    (tmp_path / "checkpoint-40" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UnreadableCheckpoint, match=r"1 of 3 shards are missing: model-00002-of-00003"):
        open_file(tmp_path / "checkpoint-40")


def test_shard_without_a_tensor_of_the_index_is_refused(tmp_path):
    folder = tmp_path / "checkpoint-40"
    save_huggingface(folder, small_state(), 40, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnreadableCheckpoint, match="'ghost'"):
        open_file(folder)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "..\\x", "C:x", "a\0b", 5]
)
def test_shard_index_cannot_point_outside_its_folder(tmp_path, shard):
    save_file(small_state(), tmp_path / "outside.safetensors")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    index = {"weight_map": {"0.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnreadableCheckpoint, match="only a file in the same folder"):
        open_file(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_shard_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnreadableCheckpoint, match=r"index\.json"):
        open_file(tmp_path)


# -- torch.distributed.checkpoint ----------------------------------------------------------------------------


def training_tree() -> tuple[torch.nn.Module, dict[str, object]]:
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    return model, {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 2}


def test_distributed_checkpoint_is_read_without_a_process_group_bit_equal(tmp_path):
    model, tree = training_tree()
    save_distributed(tmp_path / "dcp", tree)
    opened = open_file(tmp_path / "dcp")
    assert not torch.distributed.is_initialized()
    assert_same(opened.load(), dict(model.state_dict()))
    assert opened.header.format == "distributed"
    assert opened.header.metadata["epoch"] == 2
    assert {(count.source, count.value) for count in opened.header.counts} >= {
        ("in-file epoch", 2),
        ("optimizer state", 3),
    }


def test_distributed_chunks_are_put_together_and_a_hole_is_refused(tmp_path):
    # Two chunks as two ranks would write them: split one chunk's entry in the metadata.
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    weight = torch.randn(6, 4)
    save_distributed(tmp_path / "dcp", {"model": {"w": weight[:3].clone(), "x": weight[3:].clone()}})
    file = tmp_path / "dcp" / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # our own file
    entry = metadata.state_dict_metadata["model.w"]
    entry.size = torch.Size((6, 4))
    halves = [torch.Size((0, 0)), torch.Size((3, 0))]
    entry.chunks = [ChunkStorageMetadata(offset, torch.Size((3, 4))) for offset in halves]
    stored = {index.fqn: info for index, info in metadata.storage_data.items()}
    metadata.storage_data = {
        MetadataIndex("model.w", halves[0], 0): stored["model.w"],
        MetadataIndex("model.w", halves[1], 1): stored["model.x"],
    }
    del metadata.state_dict_metadata["model.x"], metadata.planner_data["model.x"]
    file.write_bytes(pickle.dumps(metadata))
    assert_same(open_file(tmp_path / "dcp").load(), {"w": weight})
    del metadata.storage_data[MetadataIndex("model.w", halves[1], 1)]
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnreadableCheckpoint, match="do not make up its shape"):
        open_file(tmp_path / "dcp")


def test_distributed_metadata_cannot_point_outside_its_folder(tmp_path):
    save_distributed(tmp_path / "dcp", {"model": small_state()})
    file = tmp_path / "dcp" / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # our own file
    for info in metadata.storage_data.values():
        info.relative_path = "../dcp/__0_0.distcp"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnreadableCheckpoint, match="not one in the same folder"):
        open_file(tmp_path / "dcp")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_chunk_file_is_named(tmp_path, damage):
    save_distributed(tmp_path / "dcp", {"model": small_state()})
    file = tmp_path / "dcp" / "__0_0.distcp"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableCheckpoint, match=r"__0_0\.distcp: is (missing|cut off)"):
        open_file(tmp_path / "dcp")


# -- one rank's part -----------------------------------------------------------------------------------------


def test_dtensor_shards_of_one_rank_are_refused(tmp_path, monkeypatch):
    import torch.distributed.tensor

    # A class of that name pickles as torch.save of a DTensor does, without a process group.
    stand_in = type("DTensor", (), {"__module__": "torch.distributed.tensor"})
    monkeypatch.setattr(torch.distributed.tensor, "DTensor", stand_in)
    torch.save({"model": {"w": stand_in(), "b": torch.ones(3)}}, tmp_path / "rank0.pt")
    with pytest.raises(UnreadableCheckpoint, match="one rank's part") as caught:
        open_file(tmp_path / "rank0.pt")
    assert "whole model" in caught.value.tip


def test_deepspeed_folder_gives_the_whole_model_of_stage_two(tmp_path):
    folder = tmp_path / "global_step30"
    folder.mkdir()
    torch.save({"module": small_state(), "global_steps": 30}, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    opened = open_file(folder)
    assert opened.header.format == "deepspeed"
    assert_same(opened.load(), small_state())


def test_deepspeed_parts_are_refused(tmp_path):
    folder = tmp_path / "global_step30"
    folder.mkdir()
    for rank in range(2):
        torch.save({"module": {}}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    with pytest.raises(UnreadableCheckpoint, match="spread over 2 files") as caught:
        open_file(Path(folder))
    assert "zero_to_fp32" in caught.value.tip
