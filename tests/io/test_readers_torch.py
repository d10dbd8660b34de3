"""Torch's files, new and old, whole modules, and what stands beside the weights."""

from __future__ import annotations

import argparse
import pathlib
import random
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy
import pytest
import torch
from checkpoint_makers import assert_same, small_model, small_state

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.readers import find_reader, open_file
from dynprobe.io.state_search import NoSuchKey, NoWeights


class Custom(torch.nn.Module):
    """A user's module: nested, with a tied weight, persistent and other buffers, an absent bias."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Embedding(5, 4)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.BatchNorm1d(4))
        self.decoder = torch.nn.Linear(4, 5)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("dropped", torch.arange(3.0), persistent=False)
        self.register_buffer("absent", None)
        self.extra = {"anything": object()}


def load(path: Path, key: str | None = None, ema: bool = False) -> dict[str, torch.Tensor]:
    return open_file(path, key, ema).load()


@pytest.mark.parametrize("new_zip", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state, "model_args": {"width": 4}}, "best_acc": 0.5},
        lambda state: {"net": OrderedDict(state), "loss": torch.tensor(0.5)},
        lambda state: [state, {"epoch": 3}],
    ],
)
def test_state_dict_is_found_bit_equal_wherever_it_is(tmp_path, wrap, new_zip):
    state = small_state()
    torch.save(wrap(state), tmp_path / "c.pt", _use_new_zipfile_serialization=new_zip)
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), state)
    assert opened.header.tensors == {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state.items()
    }
    assert opened.header.n_parameters == 4 * 6 + 6 + 6 + 6 + 6 * 3 + 3


@pytest.mark.parametrize("new_zip", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int64,
        torch.complex64, torch.complex128,
    ],
)  # fmt: skip
def test_every_dtype_view_and_special_value_is_bit_equal_through_both_readers(tmp_path, dtype, new_zip):
    base = torch.tensor([0.0, -0.0, 1.5, float("nan"), float("inf"), 2.0, 3.0, 4.0]).reshape(2, 4)
    base = torch.nan_to_num(base, 7, 7) if not (dtype.is_floating_point or dtype.is_complex) else base
    base = base.to(dtype)
    state = {
        "whole": base,
        "transposed": base.t(),
        "slice": base[1:, 1:3],
        "scalar": base[0, 2],
        "empty": base[:0],
        "expanded": base[:1].expand(3, 4),
    }
    # With a Namespace torch refuses the file, and the inert reader reads it.
    for name, tree in (("plain.pt", state), ("args.pt", {"w": state, "args": argparse.Namespace(lr=1)})):
        torch.save(tree, tmp_path / name, _use_new_zipfile_serialization=new_zip)
        assert_same(load(tmp_path / name), state)


def test_float8_is_read_inertly(tmp_path):
    state = {"w": torch.arange(8.0).to(torch.float8_e4m3fn)}
    torch.save({"m": state, "args": argparse.Namespace()}, tmp_path / "c.pt")
    assert_same(load(tmp_path / "c.pt"), state)


@pytest.mark.parametrize("new_zip", [True, False])
def test_what_training_scripts_save_beside_the_weights_does_no_harm(tmp_path, new_zip):
    state = small_state()
    generator = random.Random(0)
    tree = {
        "state_dict": state,
        "args": argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data")),
        "path": tmp_path,
        "best": numpy.float64(0.25),
        "python_rng": generator.getstate(),
        "numpy_rng": numpy.random.RandomState(0).get_state(),
        "generator": numpy.random.default_rng(0),
        "torch_rng": torch.get_rng_state(),
        "history": defaultdict(list, loss=[1.0, 0.5]),
        "array": numpy.arange(6.0).reshape(2, 3),
    }
    torch.save(tree, tmp_path / "c.pt", _use_new_zipfile_serialization=new_zip)
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), state)
    assert opened.header.metadata["args.lr"] == 0.1
    assert opened.header.metadata["best"] == 0.25


@pytest.mark.parametrize("new_zip", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 1}])
def test_whole_pickled_module_gives_its_state_dict_bit_equal(tmp_path, wrap, new_zip):
    model = Custom()
    model.extra = {"anything": "picklable"}
    torch.save(wrap(model), tmp_path / "c.pt", _use_new_zipfile_serialization=new_zip)
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), dict(model.state_dict()))
    assert "dropped" not in opened.header.tensors
    assert any("pickled nn.Module" in note for note in opened.header.notes)
    # The tied embedding is one parameter.
    assert opened.header.n_parameters == 5 * 4 + 4 * 4 + 4 + 4 + 5 + 3


def test_tied_weights_of_a_module_share_memory(tmp_path):
    model = Custom()
    model.extra = {}
    torch.save(model, tmp_path / "c.pt")
    state = load(tmp_path / "c.pt")
    assert state["encoder.weight"].data_ptr() == state["decoder.weight"].data_ptr()


def test_optimizer_is_not_mistaken_for_weights(tmp_path):
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    # Adam's state has twice the weights' size.
    torch.save({"opt": optimizer.state_dict(), "net": model.state_dict()}, tmp_path / "c.pt")
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), dict(model.state_dict()))
    assert ("optimizer state", 1) in [(count.source, count.value) for count in opened.header.counts]
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    with pytest.raises(NoWeights, match="no weights"):
        open_file(tmp_path / "o.pt")


def test_key_and_ema_choose_between_copies(tmp_path):
    plain, average, other = small_state(0), small_state(1), small_state(2)
    torch.save({"model": plain, "model_ema": average, "b": {"critic": other}}, tmp_path / "c.pt")
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), plain)
    assert any("also holds 'model_ema'" in note for note in opened.header.notes)
    assert_same(load(tmp_path / "c.pt", ema=True), average)
    assert_same(load(tmp_path / "c.pt", key="b.critic"), other)
    assert_same(load(tmp_path / "c.pt", key="b"), other)
    with pytest.raises(NoSuchKey, match="--key nets") as caught:
        open_file(tmp_path / "c.pt", "nets")
    assert "model_ema: 9 tensors" in caught.value.tip
    torch.save({"model": plain}, tmp_path / "d.pt")
    with pytest.raises(NoSuchKey, match="no averaged copy"):
        open_file(tmp_path / "d.pt", ema=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefix_is_stripped_when_all_names_have_it(tmp_path, prefix):
    state = small_state()
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "c.pt")
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), state)
    assert f"stripped the prefix '{prefix}' from every name" in opened.header.notes


def test_prefix_of_some_names_only_is_left_alone(tmp_path):
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    torch.save(state, tmp_path / "c.pt")
    assert_same(load(tmp_path / "c.pt"), state)


def test_swa_average_loses_counter_and_prefix(tmp_path):
    model = small_model()
    average = torch.optim.swa_utils.AveragedModel(model)
    torch.save(average.state_dict(), tmp_path / "c.pt")
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), dict(model.state_dict()))
    assert any("n_averaged" in note for note in opened.header.notes)


def test_lightning_checkpoint_is_recognised_and_tells_its_step(tmp_path):
    state = small_state()
    tree = {
        "epoch": 2,
        "global_step": 80,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"net.{name}": tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"step": 9}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.01},
    }
    torch.save(tree, tmp_path / "epoch=2-step=80.ckpt")
    opened = open_file(tmp_path / "epoch=2-step=80.ckpt")
    assert opened.header.format == "lightning"
    assert opened.header.metadata["hyper_parameters.lr"] == 0.01
    assert [tuple(count) for count in opened.header.counts] == [
        (80, "step", "in-file global_step"),
        (2, "epoch", "in-file epoch"),
    ]
    assert list(opened.load()) == [f"net.{name}" for name in state]


def test_content_decides_before_the_suffix(tmp_path):
    from safetensors.torch import save_file

    torch.save(small_state(), tmp_path / "a.safetensors")
    save_file(small_state(), tmp_path / "b.pt")
    assert find_reader(tmp_path / "a.safetensors").NAME == "torch"
    assert find_reader(tmp_path / "b.pt").NAME == "safetensors"


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(small_model()).save(str(tmp_path / "c.pt"))
    with pytest.raises(UnreadableCheckpoint, match="TorchScript") as caught:
        open_file(tmp_path / "c.pt")
    assert "torch.jit.load" in caught.value.tip


def test_recompressed_archive_is_still_read(tmp_path):
    state = small_state()
    torch.save(state, tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "d.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)
    assert_same(load(tmp_path / "d.pt"), state)


def test_tensors_on_the_meta_device_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2, device="meta").state_dict(), tmp_path / "c.pt")
    with pytest.raises(UnreadableCheckpoint, match="meta device"):
        open_file(tmp_path / "c.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all, just text", b"\x80\x02}q\x00."])
def test_other_files_are_of_no_known_format(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match=r"c\.pt: is (empty|of no known format)"):
        open_file(tmp_path / "c.pt")
