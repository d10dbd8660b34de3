"""Data from every kind of source: right values in fixed order, checked, hashed, cut into batches."""

from __future__ import annotations

import csv

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dynprobe.io.data import Dataset, load_data
from dynprobe.io.errors import UnusableData
from dynprobe.io.spec import Spec

X = torch.arange(30, dtype=torch.float32).reshape(10, 3)
Y = torch.arange(10) % 3


def save(path, arrays):
    """One file per suffix with the same arrays."""
    arrays = {name: torch.as_tensor(array) for name, array in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    elif path.suffix == ".safetensors":
        save_file(arrays, path)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array.numpy()
    else:
        torch.save(arrays, path)
    return path


def load(path, samples=None, seed=0, **args) -> Dataset:
    return load_data(Spec(str(path), args), samples=samples, seed=seed)


def refusal(path, samples=None, **args) -> str:
    with pytest.raises(UnusableData) as caught:
        load(path, samples, **args)
    return f"{caught.value} {caught.value.tip}"


class TestFiles:
    @pytest.mark.parametrize("suffix", ["npz", "safetensors", "h5", "pt"])
    @pytest.mark.parametrize("names", [("x", "y"), ("inputs", "targets"), ("images", "labels")])
    def test_every_format_gives_the_same_data_and_the_same_hash(self, tmp_path, suffix, names):
        data = load(save(tmp_path / f"d.{suffix}", dict(zip(names, (X, Y), strict=True))))
        assert torch.equal(data.inputs, X)
        assert torch.equal(data.targets, Y)
        assert data.hash == Dataset(X, Y, 10, "").hash
        assert (data.n_samples, data.n_total, data.source) == (10, 10, f"d.{suffix}")

    def test_arrays_are_chosen_by_name_or_by_split(self, tmp_path):
        path = save(
            tmp_path / "d.npz",
            {"x_train": X, "y_train": Y, "test_images": X[:4], "test_labels": Y[:4], "odd": 2 * X},
        )
        assert load(path, split="train").n_samples == 10
        assert load(path, split="test").n_samples == 4
        assert torch.equal(load(path, inputs="odd", targets="y_train").inputs, 2 * X)

    def test_unclear_names_are_listed(self, tmp_path):
        path = save(tmp_path / "d.npz", {"a": X, "b": Y})
        assert "which array holds the inputs? none has a usual name." in refusal(path)
        assert "a (10, 3), b (10,)" in refusal(path)
        assert "holds no 'c'" in refusal(path, inputs="c")
        path = save(tmp_path / "e.npz", {"x": X, "images": X, "y": Y})
        assert "x, images might be" in refusal(path)

    def test_tokens_become_keyword_inputs_and_their_own_targets(self, tmp_path):
        tokens, mask = torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.long)
        mask[0, 3] = 0
        data = load(save(tmp_path / "t.safetensors", {"input_ids": tokens, "attention_mask": mask}))
        assert set(data.inputs) == {"input_ids", "attention_mask"}
        assert data.targets[0].tolist() == [0, 1, 2, -100]
        labelled = load(save(tmp_path / "l.npz", {"input_ids": tokens, "labels": torch.arange(3)}))
        assert labelled.targets.tolist() == [0, 1, 2]

    def test_several_inputs_by_name(self, tmp_path):
        path = save(tmp_path / "d.npz", {"a": X, "b": X[:, 0], "y": Y})
        data = load(path, inputs=["a", "b"])
        assert torch.equal(data.inputs["b"], X[:, 0])

    def test_a_pair_in_a_torch_file_is_inputs_and_targets(self, tmp_path):
        torch.save((X, Y), tmp_path / "d.pt")
        assert torch.equal(load(tmp_path / "d.pt").inputs, X)

    def test_a_torch_file_cannot_run_code(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (print, ("ran",))

        torch.save({"x": X, "y": Payload()}, tmp_path / "d.pt")
        assert "cannot be read: UnpicklingError" in refusal(tmp_path / "d.pt")

    def test_an_object_array_is_refused(self, tmp_path):
        np.savez(tmp_path / "d.npz", x=np.array([{}, 1], dtype=object), y=np.zeros(2))
        assert "cannot be read" in refusal(tmp_path / "d.npz")

    def test_a_damaged_missing_or_unknown_file_is_named(self, tmp_path):
        (tmp_path / "d.npz").write_bytes(b"PK\x03\x04nothing")
        assert f"{tmp_path / 'd.npz'}: cannot be read" in refusal(tmp_path / "d.npz")
        assert "no such file" in refusal(tmp_path / "none.npz")
        assert "names no data" in refusal("mnist")
        assert "sklearn:NAME" in refusal("mnist")

    def test_an_unknown_argument_names_the_nearest(self, tmp_path):
        assert "Did you mean 'inputs'?" in refusal(save(tmp_path / "d.npz", {"x": X, "y": Y}), input="x")


class TestCsv:
    @pytest.fixture
    def table(self, tmp_path):
        path = tmp_path / "d.csv"
        rows = [
            ["a", "b", "species"],
            ["1", "0.5", "setosa"],
            ["2", "1.5", "virginica"],
            ["3", "2.5", "setosa"],
        ]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        return path

    def test_text_becomes_classes_and_the_rest_features(self, table):
        data = load(table)
        assert data.inputs.tolist() == [[1, 0.5], [2, 1.5], [3, 2.5]]
        assert data.targets.tolist() == [0, 1, 0]

    def test_columns_are_chosen_by_name(self, table):
        data = load(table, inputs="a", targets="b")
        assert data.inputs.tolist() == [[1], [2], [3]]
        assert data.targets.dtype == torch.float64
        assert "holds no 'c'" in refusal(table, targets="c")

    def test_a_missing_value_or_cell_is_refused(self, table):
        table.write_text("a,y\n1,2.5\n,1.5\n")
        assert "inputs of 1 samples are NaN or infinite (first: sample 1)" in refusal(table)
        table.write_text("a,y\n1,2\n3\n")
        assert "row 3 has 1 values" in refusal(table)
        table.write_text("")
        assert "is empty" in refusal(table)


class TestSklearn:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("digits", (1797, 64)),
            ("breast_cancer", (569, 30)),
            ("wine", (178, 13)),
            ("iris", (150, 4)),
            ("diabetes", (442, 10)),
        ],
    )
    def test_the_bundled_sets_are_there(self, name, shape):
        data = load(f"sklearn:{name}")
        assert tuple(data.inputs.shape) == shape
        assert data.targets.is_floating_point() == (name == "diabetes")

    def test_train_and_test_are_disjoint_complete_and_in_order(self):
        whole, train, test = (load("sklearn:wine", split=split).inputs for split in ("all", "train", "test"))
        assert (len(train), len(test)) == (142, 36)
        rows = {tuple(row): number for number, row in enumerate(whole.tolist())}
        numbers = [[rows[tuple(row)] for row in part.tolist()] for part in (train, test)]
        assert sorted(numbers[0] + numbers[1]) == list(range(178))
        assert all(part == sorted(part) for part in numbers)

    def test_the_split_is_the_same_for_ever(self):
        assert load("sklearn:iris", split="test").targets.bincount().tolist() == [10, 11, 9]

    def test_standardising_uses_the_training_part_only(self):
        train, test = (
            load("sklearn:wine", split=split, standardize=True).inputs for split in ("train", "test")
        )
        torch.testing.assert_close(train.mean(0), torch.zeros(13, dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(train.std(0, correction=0), torch.ones(13, dtype=torch.float64))
        assert test.mean(0).abs().max() > 1e-3

    def test_digits_are_images_on_request(self):
        flat, image = load("sklearn:digits"), load("sklearn:digits", image=True, scale="1/16")
        assert image.inputs.shape == (1797, 1, 8, 8)
        torch.testing.assert_close(image.inputs.flatten(1) * 16, flat.inputs)
        assert "holds no images" in refusal("sklearn:wine", image=True)

    def test_what_is_not_there_is_named(self):
        assert "There is no sklearn:digit. Did you mean 'digits'?" in refusal("sklearn:digit")
        assert "no split 'tset'. Did you mean 'test'?" in refusal("sklearn:digits", split="tset")
        assert "no argument 'images'. Did you mean 'image'?" in refusal("sklearn:digits", images=True)


class TestTransforms:
    def test_they_are_applied_in_a_fixed_order(self, tmp_path):
        images = (torch.arange(48) % 256).to(torch.uint8).reshape(3, 4, 4)
        path = save(tmp_path / "d.npz", {"x": images, "y": Y[:3]})
        data = load(path, limit=2, flatten=True, std=0.5, mean=0.1, scale="1/255", add_channel=True)
        expected = ((images[:2].float() / 255 - 0.1) / 0.5).reshape(2, 16)
        torch.testing.assert_close(data.inputs, expected)
        assert data.n_total == 2
        assert load(path, add_channel=True).inputs.shape == (3, 1, 4, 4)

    def test_a_list_is_one_value_per_channel(self, tmp_path):
        images = torch.rand(4, 3, 5, 5)
        data = load(save(tmp_path / "d.npz", {"x": images, "y": Y[:4]}), mean=[0.1, 0.2, 0.3])
        torch.testing.assert_close(data.inputs, images - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))

    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            ({"scale": "big"}, "scale='big' is not a number"),
            ({"std": 0}, "std must not be 0"),
            ({"mean": [1, 2]}, "mean has 2 values"),
            ({"limit": 0}, "limit=0 must be a whole number"),
        ],
    )
    def test_a_wrong_value_is_named(self, tmp_path, args, expected):
        assert expected in refusal(save(tmp_path / "d.npz", {"x": X, "y": Y}), **args)


class TestCode:
    CODE = """
import numpy as np, torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(10) % 3
READ = []
class Items(Dataset):
    def __len__(self): return 10
    def __getitem__(self, i): READ.append(i); return X[i], int(Y[i])
def pair(n=10): return X[:n], Y[:n]
def arrays(): return X.numpy(), Y.numpy()
def two_inputs(): return (X, 2 * X), Y
def mapping(): return {"input_ids": X, "labels": Y}
def items(): return Items()
def loader(): return DataLoader(TensorDataset(X, Y), batch_size=4)
def shuffled(): return DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
def batches(): yield from ({"a": X[i:i + 3], "labels": Y[i:i + 3]} for i in range(0, 10, 3))
def nothing(): return []
def number(): return 3
def wrong(): return [X, X, X]
def broken(): raise OSError("no disk")
"""

    @pytest.fixture
    def code(self, tmp_path):
        path = tmp_path / "own_data.py"
        path.write_text(self.CODE)
        return path

    @pytest.mark.parametrize(
        "name", ["pair", "arrays", "two_inputs", "mapping", "items", "loader", "batches"]
    )
    def test_whatever_a_loader_may_be_gives_all_samples_in_order(self, code, name):
        data = load(f"{code}:{name}")
        inputs = data.inputs
        first = (
            inputs[0]
            if isinstance(inputs, tuple)
            else next(iter(inputs.values()))
            if isinstance(inputs, dict)
            else inputs
        )
        assert torch.equal(first, X)
        assert torch.equal(data.targets, Y)

    def test_a_shuffled_loader_is_read_in_one_fixed_order_and_leaves_the_global_rng_alone(self, code):
        before = torch.get_rng_state()
        first = load(f"{code}:shuffled")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert load(f"{code}:shuffled").hash == first.hash
        assert sorted(first.inputs[:, 0].tolist()) == X[:, 0].tolist()

    def test_only_the_chosen_items_of_a_dataset_are_read(self, code):
        from dynprobe.io.code import resolve_callable

        data = load(f"{code}:items", samples=3)
        read = resolve_callable(Spec(f"{code}:items"), trust=False).__globals__["READ"]
        assert len(read) == data.n_samples == 3
        assert data.n_total == 10
        assert torch.equal(data.inputs, load(f"{code}:pair", samples=3).inputs)

    def test_arguments_are_passed_on(self, code):
        assert load(f"{code}:pair", n=4).n_samples == 4

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("nothing", "no samples"),
            ("number", "returned a int"),
            ("wrong", "batch 0 is not a pair"),
            ("broken", "OSError: no disk"),
        ],
    )
    def test_what_is_no_data_is_named(self, code, name, expected):
        assert expected in refusal(f"{code}:{name}")


class TestChecks:
    @pytest.mark.parametrize(
        ("x", "y", "expected"),
        [
            (X, Y[:9], "inputs and targets differ in number of samples (inputs: 10, targets: 9)"),
            (X[:0], Y[:0], "has no samples"),
            (X, torch.full((10,), float("nan")), "targets of 10 samples are NaN or infinite"),
            (
                X.masked_fill(X == 4, float("inf")),
                Y,
                "inputs of 1 samples are NaN or infinite (first: sample 1)",
            ),
        ],
    )
    def test_unusable_data_is_refused_with_the_reason(self, tmp_path, x, y, expected):
        assert expected in refusal(save(tmp_path / "d.npz", {"x": x, "y": y}))

    def test_sizes_below_one_are_refused(self, tmp_path):
        path = save(tmp_path / "d.npz", {"x": X, "y": Y})
        assert "--samples 0 must be at least 1" in refusal(path, 0)
        with pytest.raises(UnusableData, match="--batch-size 0"):
            load(path).batches(0, device="cpu", dtype=torch.float32)


class TestSubset:
    def test_it_is_seeded_ordered_without_repeats_and_leaves_the_global_rng_alone(self, tmp_path):
        path = save(tmp_path / "d.npz", {"x": X, "y": torch.arange(10)})
        before = torch.get_rng_state()
        a, b, other = load(path, 4), load(path, 4), load(path, 4, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        chosen = a.targets.tolist()
        assert chosen == b.targets.tolist() == sorted(set(chosen))
        assert chosen != other.targets.tolist()
        assert a.hash == b.hash != other.hash
        assert (a.n_samples, a.n_total) == (4, 10)
        assert load(path, 99).n_samples == 10


class TestBatches:
    @given(n=st.integers(1, 40), batch_size=st.integers(1, 50))
    def test_they_cut_the_data_into_ordered_pieces_any_number_of_times(self, n, batch_size):
        data = Dataset(torch.arange(n), torch.arange(n), n, "")
        batches = data.batches(batch_size, device="cpu", dtype=torch.float32)
        for _ in range(2):
            pieces = list(batches)
            assert len(pieces) == len(batches)
            assert torch.equal(torch.cat([y for _, y in pieces]), data.targets)
            assert all(len(y) == batch_size for _, y in pieces[:-1])
        assert batches.n_samples == n

    def test_floats_are_cast_and_integers_are_not(self):
        data = Dataset({"x": X, "tokens": Y}, Y, 10, "")
        inputs, targets = next(iter(data.batches(4, device="cpu", dtype=torch.float64)))
        assert (inputs["x"].dtype, inputs["tokens"].dtype, targets.dtype) == (
            torch.float64,
            torch.int64,
            torch.int64,
        )

    def test_several_inputs_are_cut_alike(self):
        parts = list(Dataset((X, 2 * X), Y, 10, "").batches(4, device="cpu", dtype=torch.float32))
        assert [len(x[0]) for x, _ in parts] == [4, 4, 2]
        assert all(torch.equal(2 * x[0], x[1]) for x, _ in parts)

    def test_data_too_large_for_the_device_moves_batch_by_batch(self, monkeypatch):
        monkeypatch.setattr("dynprobe.io.data._fits", lambda *_: False)
        data = Dataset(X, Y, 10, "")
        batches = data.batches(4, device="cpu", dtype=torch.float64)
        assert batches.inputs is X
        assert torch.equal(torch.cat([x for x, _ in batches]), X.double())

    def test_the_hash_sees_every_value_shape_and_type(self):
        base = Dataset(X, Y, 10, "").hash
        changed = X.clone()
        changed[9, 2] += 1
        others = [
            Dataset(changed, Y, 10, ""),
            Dataset(X.double(), Y, 10, ""),
            Dataset(X.reshape(10, 1, 3), Y, 10, ""),
        ]
        assert base not in {data.hash for data in others}
        assert Dataset(X, Y, 99, "elsewhere").hash == base

    def test_data_moves_to_a_gpu_at_once_only_if_it_leaves_room_there(self, monkeypatch):
        from dynprobe.io.data import _fits, named_tensors

        tensors = named_tensors(X, Y)  # 120 + 80 bytes
        for free, expected in ((801, True), (800, False)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 10**9))
            assert _fits(torch.device("cuda"), tensors) is expected
        assert _fits(torch.device("cpu"), tensors)
