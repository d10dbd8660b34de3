"""Saved activations: what a file means, what is refused and why; kept ones come back or count as none."""

from __future__ import annotations

import logging
import pickle

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dynprobe.analyzers.core.result import Array, Piece, stack
from dynprobe.io import atomic, kept_activations
from dynprobe.io.errors import CannotWrite, InputError, UnusableData
from dynprobe.io.hashing import content_hash
from dynprobe.io.kept_activations import KeptActivations
from dynprobe.io.report import write_result
from dynprobe.io.saved_activations import SavedActivations, is_saved

RANDOM = np.random.default_rng(0)
LAYERS = {"conv": RANDOM.normal(size=(12, 5)).astype("f4"), "fc": RANDOM.normal(size=(12, 3)).astype("f4")}


def write(path, arrays, **facts):
    """Arrays in the format that the suffix says."""
    if path.suffix == ".npy":
        np.save(path, next(iter(arrays.values())))
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, facts or None)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
            file.attrs.update(facts)
    return path


def message(path, **options):
    with pytest.raises(InputError) as caught:
        SavedActivations(path, **options).load()
    assert str(path) in caught.value.message
    assert caught.value.tip
    return f"{caught.value.message} {caught.value.tip}"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5", ".hdf5", ".NPZ"])
def test_every_format_gives_the_same_layers_and_the_same_hash(tmp_path, suffix):
    path = tmp_path / "a.npz"
    path = (
        write(path, LAYERS).rename(tmp_path / "b.NPZ")
        if suffix == ".NPZ"
        else write(tmp_path / f"a{suffix}", LAYERS)
    )
    assert is_saved(path)
    loaded = SavedActivations(path).load()
    assert list(loaded.state) == ["conv", "fc"]
    assert all(np.array_equal(loaded.state[name].numpy(), LAYERS[name]) for name in LAYERS)
    assert loaded.hash == content_hash({name: torch.from_numpy(array) for name, array in LAYERS.items()})
    assert (loaded.notes, loaded.input_hash, loaded.treatment, loaded.sample) == ([], "", {}, {})


def test_the_layer_of_an_npy_file_is_called_activations_so_that_files_share_it(tmp_path):
    saved = SavedActivations(write(tmp_path / "penultimate.npy", LAYERS))
    assert list(saved.load().state) == ["activations"]
    assert (saved.run, saved.step, saved.problem) == ("penultimate", None, "")
    assert saved.size == saved.path.stat().st_size


@pytest.mark.parametrize(
    ("name", "step"),
    [("step_300.npy", 300), ("epoch=2-step=50.npy", 50), ("acts_epoch3.npy", 3), ("x.npy", None)],
)
def test_the_step_is_the_one_in_the_name(tmp_path, name, step):
    assert SavedActivations(write(tmp_path / name, LAYERS), run="a").step == step


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [
        *[(stored, "float32") for stored in ("f2", "f4", ">f4", "u1", "?")],
        *[(stored, "float64") for stored in ("f8", "i4", "u2", "g")],
    ],
)
def test_numbers_of_any_type_lose_no_digit_that_their_type_has(tmp_path, stored, loaded):
    array = np.arange(12).reshape(6, 2).astype(stored)
    tensor = SavedActivations(write(tmp_path / "a.npy", {"a": array})).load().state["activations"]
    assert str(tensor.dtype) == f"torch.{loaded}"
    assert np.array_equal(tensor.numpy(), array.astype("f8"))


def test_bfloat16_tensors_become_float32(tmp_path):
    from safetensors.torch import save_file as save_torch

    save_torch({"a": torch.ones(4, 2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    assert SavedActivations(tmp_path / "a.safetensors").load().state["a"].dtype == torch.float32


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5"])
def test_maps_and_sequences_keep_their_dimensions(tmp_path, suffix):
    arrays = {
        "conv": RANDOM.normal(size=(12, 4, 2, 2)),
        "lstm": RANDOM.normal(size=(12, 5, 3)),
        "fc": LAYERS["fc"],
    }
    loaded = SavedActivations(write(tmp_path / f"a{suffix}", arrays)).load()
    assert all(np.array_equal(loaded.state[name].numpy(), arrays[name]) for name in arrays)
    assert (loaded.treatment, loaded.notes) == ({}, [])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5"])
def test_transposed_arrays_give_the_activations_of_those_that_are_not(tmp_path, suffix):
    straight = SavedActivations(write(tmp_path / f"a{suffix}", LAYERS)).load()
    path = write(tmp_path / f"b{suffix}", {name: array.T for name, array in LAYERS.items()})
    assert is_saved(path, transpose=True)
    turned = SavedActivations(path, transpose=True).load()
    assert turned.hash == straight.hash
    assert turned.notes == []


def test_only_matrices_are_transposed(tmp_path):
    path = write(tmp_path / "a.npy", {"a": np.ones((4, 3, 12))})
    assert "'activations' has the shape (4, 3, 12), and --transpose takes matrices only" in message(
        path, transpose=True
    )


def test_what_has_less_than_two_dimensions_beside_the_layers_is_left_out_and_named(tmp_path):
    beside = {"labels": np.arange(12), "loss": np.ones(12), "epoch": np.float64(3)}
    words = "left out, since a layer has two dimensions or more: "
    for suffix, named in ((".npz", "labels (12,), loss (12,), epoch ()"), (".h5", "epoch (), labels (12,)")):
        loaded = SavedActivations(write(tmp_path / f"a{suffix}", {**LAYERS, **beside})).load()
        assert list(loaded.state) == ["conv", "fc"]
        assert len(loaded.notes) == 1
        assert f"a{suffix}: {words}{named}" in loaded.notes[0]
    text = write(tmp_path / "text.h5", {**LAYERS, "labels": ["x"] * 12})
    assert f"text.h5: {words}labels (12,)" in SavedActivations(text).load().notes


def test_vectors_beside_the_layers_of_a_safetensors_file_that_says_what_it_is_are_left_out(tmp_path):
    arrays = {**LAYERS, "labels": np.arange(12)}
    for ids, facts in (({"ids": np.arange(12)}, {}), ({}, {"input_hash": "abc"}), ({}, {"treatments": "{}"})):
        path = write(tmp_path / "a.safetensors", {**arrays, **ids}, **facts)
        assert is_saved(path)
        loaded = SavedActivations(path).load()
        assert list(loaded.state) == ["conv", "fc"]
        assert "labels (12,)" in loaded.notes[0]


def test_biases_of_a_checkpoint_are_not_left_out_silently(tmp_path):
    path = write(tmp_path / "a.safetensors", {"fc.weight": LAYERS["fc"], "fc.bias": np.ones(12, "f4")})
    assert not is_saved(path)
    assert "'fc.bias' has the shape (12,)" in message(path)


def test_a_wide_array_is_taken_as_it_is_with_a_warning(tmp_path):
    path = write(tmp_path / "lin0.npy", {"a": np.ones((64, 1000))})
    loaded = SavedActivations(path).load()
    assert loaded.state["activations"].shape == (64, 1000)
    assert loaded.notes == [
        "lin0.npy has 64 rows and 1,000 columns: rows are taken as samples; "
        "if they are neurons (as google/svcca stores them) give --transpose"
    ]


def test_there_is_no_warning_where_one_layer_is_narrow_or_a_wide_one_is_made_of_maps(tmp_path):
    one_narrow = write(tmp_path / "a.npz", {"a": np.ones((64, 1000)), "b": np.ones((64, 10))})
    assert SavedActivations(one_narrow).load().notes == []
    maps = write(tmp_path / "b.npy", {"b": np.ones((64, 10, 10, 10))})
    assert not any("--transpose" in note for note in SavedActivations(maps).load().notes)


def test_layers_are_in_natural_order_where_the_format_keeps_none_and_in_the_files_where_it_does(tmp_path):
    names = ["layer10", "layer2", "input"]
    arrays = dict.fromkeys(names, LAYERS["fc"])
    assert list(SavedActivations(write(tmp_path / "a.npz", arrays)).load().state) == names
    for suffix in (".safetensors", ".h5"):
        state = SavedActivations(write(tmp_path / f"a{suffix}", arrays)).load().state
        assert list(state) == ["input", "layer2", "layer10"]


def test_arrays_in_groups_of_an_hdf5_file_are_named_by_their_path(tmp_path):
    path = write(tmp_path / "a.h5", {"block1/relu": LAYERS["conv"], "fc": LAYERS["fc"]})
    assert list(SavedActivations(path).load().state) == ["block1/relu", "fc"]


def test_coordinates_of_a_netcdf_file_are_no_layers(tmp_path):
    import xarray

    units = xarray.DataArray(
        LAYERS["conv"], dims=("sample_id", "unit"), coords={"sample_id": np.arange(12), "unit": [*"abcde"]}
    )
    path = tmp_path / "a.h5"
    xarray.Dataset({"conv": units}).to_netcdf(path, engine="h5netcdf")
    loaded = SavedActivations(path).load()
    assert list(loaded.state) == ["conv"]
    assert loaded.input_hash.startswith("sample_ids:")


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_a_files_metadata_say_inputs_and_treatments(tmp_path, suffix):
    path = write(
        tmp_path / f"a{suffix}", LAYERS, input_hash="abc", treatments='{"conv": "average", "other": "x"}'
    )
    loaded = SavedActivations(path).load()
    assert (loaded.input_hash, loaded.treatment) == ("abc", {"conv": "average"})


def test_the_input_hash_may_be_an_array_of_text(tmp_path):
    path = write(tmp_path / "a.npz", {**LAYERS, "input_hash": np.array("abc")})
    assert SavedActivations(path).load().input_hash == "abc"
    stored = write(tmp_path / "a.h5", {**LAYERS, "input_hash": "abc"})
    assert SavedActivations(stored).load().input_hash == "abc"


def test_equal_sample_ids_in_equal_order_are_equal_inputs_in_every_format(tmp_path):
    ids = np.arange(12)
    hashes = {
        SavedActivations(write(tmp_path / f"a{suffix}", {**LAYERS, name: values})).load().input_hash
        for suffix, name, values in [
            (".npz", "sample_id", ids),
            (".h5", "sample_ids", ids.astype("i2")),
            (".safetensors", "ids", ids),
            (".npz", "ids", ids.astype("U")),
        ]
    }
    assert len(hashes) == 1
    other = SavedActivations(write(tmp_path / "b.npz", {**LAYERS, "ids": ids[::-1]})).load().input_hash
    assert other not in hashes


def test_checkpoints_are_not_taken_for_saved_activations(samples, tmp_path):
    assert not is_saved(samples / "bn_cnn_seed0" / "step_003000.safetensors")
    assert not is_saved(samples / "mlp_digits" / "epoch=0-step=0.ckpt")
    assert not is_saved(samples / "mlp_digits")
    assert not is_saved(write(tmp_path / "a.safetensors", {"fc.weight": LAYERS["fc"]}))
    assert not is_saved(write(tmp_path / "b.safetensors", {"a": LAYERS["fc"], "b": LAYERS["fc"][:4]}))
    assert not is_saved(tmp_path / "missing.npy")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:20])
    assert not is_saved(tmp_path / "cut.safetensors")


def test_deciding_what_a_file_is_reads_its_header_only(tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors", LAYERS)
    monkeypatch.setattr("dynprobe.io.saved_arrays.load_file", lambda _path: pytest.fail("read the data"))
    assert is_saved(path)


def test_a_report_is_refused_as_such(tmp_path):
    path = tmp_path / "report.h5"
    piece = Piece(
        "key", {"run": "a", "step": 0, "path": "a/0.pt"}, {"loss": Array((), np.array(1.0), "", "loss")}
    )
    write_result(path, stack("landscape", "checkpoint", [piece], {}))
    for refused in (lambda: is_saved(path), SavedActivations(path).load):
        with pytest.raises(UnusableData, match="is a dynprobe report") as caught:
            refused()
        assert f"dynprobe report show {path}" in caught.value.tip


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".h5"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", LAYERS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert any(word in message(path) for word in ("damaged", "truncated"))
    path.write_bytes(b"")
    assert any(word in message(path) for word in ("damaged", "cut off"))


def test_what_the_reader_of_checkpoints_says_of_a_damaged_file_gets_a_tip(tmp_path):
    path = write(tmp_path / "a.safetensors", LAYERS)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F3\xff"'))
    assert "the safetensors header is damaged" in message(path)


def test_a_missing_file_is_named(tmp_path):
    assert "there is no such file" in message(tmp_path / "a.npy")


def test_pickled_arrays_are_refused_because_they_are_code(tmp_path):
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{"a": 1}, None], dtype=object))
    assert "A pickle is code" in message(objects)
    np.savez(tmp_path / "objects.npz", a=np.array([None, 1], dtype=object))
    assert "A pickle is code" in message(tmp_path / "objects.npz")
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(LAYERS))
    assert "A pickle is code" in message(tmp_path / "pickle.npy")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((3, 2), "a"), "'activations' holds text, not real numbers"),
        (np.ones((3, 2), dtype="c8"), "'activations' holds complex numbers"),
        (np.ones((3, 2), dtype=[("x", "f4")]), "'activations' holds records"),
        (np.ones(7), "'activations' has the shape (7,)"),
        (np.float64(1), "'activations' has the shape ()"),
        (np.ones((0, 3)), "'activations' is empty"),
        (
            np.array([[1.0, np.nan], [np.inf, 0]]),
            "'activations' holds 2 values that are NaN or infinite (of 4)",
        ),
    ],
)
def test_an_array_that_is_no_table_of_numbers_is_named(tmp_path, array, words):
    assert words in message(write(tmp_path / "a.npy", {"a": array}))


def test_text_in_an_hdf5_file_is_named(tmp_path):
    assert "'labels' holds objects" in message(write(tmp_path / "a.h5", {**LAYERS, "labels": [["x"]] * 12}))


def test_a_file_without_arrays_is_named(tmp_path):
    assert "holds no arrays" in message(write(tmp_path / "a.npz", {}))
    assert "holds no arrays" in message(write(tmp_path / "a.npz", {"ids": np.arange(3)}))


def test_layers_with_different_numbers_of_samples_are_listed(tmp_path):
    path = write(tmp_path / "a.npz", {"conv": LAYERS["conv"], "fc": LAYERS["fc"][:7]})
    assert "different numbers of samples: conv (12, 5), fc (7, 3)" in message(path)


def test_the_tip_for_layers_of_different_lengths_names_the_other_orientation(tmp_path):
    turned = write(tmp_path / "a.npz", {name: array.T for name, array in LAYERS.items()})
    assert "columns: give --transpose" in message(turned)
    assert "rows: leave out --transpose" in message(write(tmp_path / "b.npz", LAYERS), transpose=True)


def test_sample_ids_that_do_not_count_the_samples_are_refused(tmp_path):
    path = write(tmp_path / "a.npz", {**LAYERS, "ids": np.arange(5)})
    assert "'ids' has 5 entries, the layers have 12 samples" in message(path)


def test_treatments_that_are_no_table_are_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", LAYERS, treatments="average")
    assert "'treatments' is no JSON table" in message(path)


def treated():
    """Layers as they are recorded: one with several rows a sample, two that share memory."""
    relu = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(24.0).reshape(3, 8).T  # not contiguous
    sample = torch.arange(4).repeat_interleave(2)
    return {
        "relu": (relu, None, ""),
        "identity": (relu, None, ""),
        "conv": (positions, sample, "positions 2x1"),
    }


FACTS = {"run": "runs/bn cnn", "step": 100, "input_hash": "abc"}


def equal(a, b):
    return list(a) == list(b) and all(
        torch.equal(a[n][0], b[n][0])
        and a[n][2] == b[n][2]
        and (torch.equal(a[n][1], b[n][1]) if a[n][1] is not None else b[n][1] is None)
        for n in a
    )


def test_kept_activations_come_back_in_their_order_under_their_key_only(tmp_path):
    kept = KeptActivations(tmp_path / "kept")
    assert kept.get("key") is None
    kept.put("key", treated(), FACTS)
    assert equal(kept.get("key"), treated())
    assert kept.get("other") is None
    assert equal(KeptActivations(tmp_path / "kept").get("key"), treated())


def test_a_kept_file_is_named_after_run_and_step(tmp_path):
    KeptActivations(tmp_path).put("key", treated(), FACTS)
    KeptActivations(tmp_path).put("other", treated(), {"run": "", "step": None})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0].startswith("activations_")
    assert names[1].startswith("runs_bn_cnn_step_100_")


def test_a_kept_file_can_be_given_in_place_of_a_run(tmp_path):
    KeptActivations(tmp_path).put("key", treated(), FACTS)
    path = next(tmp_path.iterdir())
    assert is_saved(path)
    saved = SavedActivations(path)
    assert (saved.run, saved.step) == ("runs/bn cnn", 100)
    loaded = saved.load()
    assert list(loaded.state) == ["relu", "identity", "conv"]
    assert loaded.input_hash == "abc"
    assert loaded.treatment == {"relu": "", "identity": "", "conv": "positions 2x1"}
    assert torch.equal(loaded.sample["conv"], treated()["conv"][1])
    assert loaded.notes == []
    assert "with samples as rows" in message(path, transpose=True)


def damage_data(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def cut_off(content):
    return content[:-10]


def change_metadata(content):
    return content.replace(b'"abc"', b'"abd"')


def other_layout(content):
    return content.replace(b'"dynprobe_activations":"1"', b'"dynprobe_activations":"2"')


def foreign(_content):
    from safetensors.numpy import save

    return save(LAYERS)


@pytest.mark.parametrize("harm", [damage_data, cut_off, change_metadata, other_layout, foreign])
def test_a_harmed_kept_file_counts_as_none_with_a_warning_and_is_replaced(tmp_path, harm, caplog):
    kept = KeptActivations(tmp_path)
    kept.put("key", treated(), FACTS)
    path = next(tmp_path.iterdir())
    content = path.read_bytes()
    path.write_bytes(harm(content))
    assert path.read_bytes() != content
    with caplog.at_level(logging.WARNING, "dynprobe"):
        assert kept.get("key") is None
    assert str(path) in caplog.text
    assert "recorded again" in caplog.text
    kept.put("key", treated(), FACTS)
    assert equal(kept.get("key"), treated())


def test_a_harmed_kept_file_given_in_place_of_a_run_is_an_error(tmp_path):
    KeptActivations(tmp_path).put("key", treated(), FACTS)
    path = next(tmp_path.iterdir())
    path.write_bytes(damage_data(path.read_bytes()))
    assert "does not match its checksum" in message(path)


def test_a_key_whose_digest_another_key_has_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_activations, "_digest", lambda _key: "0" * 12)
    kept = KeptActivations(tmp_path)
    kept.put("key", treated(), FACTS)
    assert kept.get("other") is None


def test_a_full_disk_costs_the_kept_file_and_not_the_measurement(tmp_path, monkeypatch, caplog):
    kept = KeptActivations(tmp_path)

    def full(path, *_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_write", full)
    with caplog.at_level(logging.WARNING, "dynprobe"):
        kept.put("key", treated(), FACTS)
    assert "the disk is full. The activations are used, but not kept." in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="is a file, not a folder"):
        KeptActivations(tmp_path / "file")


def test_a_run_whose_name_is_no_utf_8_is_kept_all_the_same(tmp_path):
    kept = KeptActivations(tmp_path)
    kept.put("key", treated(), {"run": "caf\udce9", "step": 1})
    assert equal(kept.get("key"), treated())
