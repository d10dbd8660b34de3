"""Names of features and classes, and units: they arrive, fit the data, and are no part of its hash."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynprobe.io.data import Dataset, load_data
from dynprobe.io.data_names import shell_name
from dynprobe.io.errors import UnusableData
from dynprobe.io.spec import Spec

X = torch.arange(12, dtype=torch.float64).reshape(4, 3)
Y = torch.tensor([0, 1, 1, 0])
FEATURES = ("age", "height", "größe")
CLASSES = ("no", "yes")


def load(path, samples=None, **args) -> Dataset:
    return load_data(Spec(str(path), args), samples=samples)


def refusal(path, **args) -> str:
    with pytest.raises(UnusableData) as caught:
        load(path, **args)
    return f"{caught.value} {caught.value.tip}"


def save(path, features=FEATURES, classes=CLASSES):
    """One file per suffix with `x`, `y`, `feature_names` and `class_names`."""
    if path.suffix == ".npz":
        np.savez(path, x=X, y=Y, feature_names=list(features), class_names=list(classes))
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["x"], file["y"] = X.numpy(), Y.numpy()
            file["feature_names"], file["class_names"] = list(features), list(classes)
    else:
        torch.save({"x": X, "y": Y, "feature_names": list(features), "class_names": list(classes)}, path)
    return path


def own_units(data: Dataset) -> torch.Tensor:
    return torch.from_numpy(data.feature_offset + data.feature_scale * data.inputs.flatten(1).numpy())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mean radius", "mean_radius"),
        ("od280/od315_of_diluted_wines", "od280_od315_of_diluted_wines"),
        ("sepal length (cm)", "sepal_length_cm"),
        ("Chins", "chins"),
        (7, "7"),
    ],
)
def test_a_shell_name_needs_no_quotes(text, expected):
    assert shell_name(text) == expected


class TestSklearn:
    @pytest.mark.parametrize(
        ("name", "n_features", "feature", "classes"),
        [
            ("breast_cancer", 30, "worst_fractal_dimension", ("malignant", "benign")),
            ("iris", 4, "petal_width_cm", ("setosa", "versicolor", "virginica")),
            ("wine", 13, "proline", ("class_0", "class_1", "class_2")),
            ("digits", 64, "pixel_7_7", tuple("0123456789")),
            ("diabetes", 10, "s6", ()),
            ("linnerud", 3, "jumps", ()),
        ],
    )
    def test_features_and_classes_have_scikit_learns_names(self, name, n_features, feature, classes):
        data = load(f"sklearn:{name}")
        assert len(set(data.feature_names)) == n_features
        assert data.feature_names[-1] == feature
        assert data.class_names == classes
        assert data.feature_offset is None
        assert data.feature_scale is None

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_standardised_features_turn_back_into_the_measured_values(self, split):
        measured, data = (
            load("sklearn:wine", split=split),
            load("sklearn:wine", split=split, standardize=True),
        )
        torch.testing.assert_close(own_units(data), measured.inputs)
        train = load("sklearn:wine", split="train").inputs.numpy()
        np.testing.assert_array_equal(data.feature_offset, train.mean(0))
        np.testing.assert_array_equal(data.feature_scale, train.std(0))

    def test_a_constant_feature_has_scale_one(self):
        data = load("sklearn:digits", split="train", standardize=True)
        assert data.feature_scale[0] == 1
        torch.testing.assert_close(own_units(data), load("sklearn:digits", split="train").inputs)

    def test_images_keep_the_names_of_their_pixels_in_flattened_order(self):
        data = load("sklearn:digits", image=True, scale="1/16")
        flat = load("sklearn:digits")
        assert data.feature_names == flat.feature_names
        assert data.feature_scale.tolist() == [16.0] * 64
        torch.testing.assert_close(own_units(data), flat.inputs)


class TestFiles:
    @pytest.mark.parametrize("suffix", ["npz", "h5", "pt"])
    def test_names_are_read_and_are_no_part_of_the_hash(self, tmp_path, suffix):
        data = load(save(tmp_path / f"d.{suffix}"))
        assert data.feature_names == FEATURES
        assert data.class_names == CLASSES
        assert data.hash == Dataset(X, Y, 4, "").hash

    def test_names_may_be_bytes_or_numbers(self, tmp_path):
        np.savez(tmp_path / "d.npz", x=X, y=Y, feature_names=np.array([b"a", b"b", b"c"]), class_names=[0, 1])
        data = load(tmp_path / "d.npz")
        assert data.feature_names == ("a", "b", "c")
        assert data.class_names == ("0", "1")

    def test_arguments_name_what_a_file_cannot(self, tmp_path):
        save_file({"x": X, "y": Y}, tmp_path / "d.safetensors")
        assert load(tmp_path / "d.safetensors").feature_names == ()
        data = load(tmp_path / "d.safetensors", feature_names=list(FEATURES), class_names=list(CLASSES))
        assert (data.feature_names, data.class_names) == (FEATURES, CLASSES)
        assert "must be a list of names" in refusal(tmp_path / "d.safetensors", feature_names="age")

    def test_names_that_do_not_fit_are_refused_and_can_be_left_out(self, tmp_path):
        path = save(tmp_path / "d.npz", features=("a", "b"))
        assert "feature_names has 2 names, but a sample has 3 values" in refusal(path)
        assert load(path, feature_names=[]).feature_names == ()
        path = save(tmp_path / "d.npz", classes=("only",))
        assert "class_names has 1 names, but there is a target 1. Name every class" in refusal(path)
        assert load(path, class_names=[]).class_names == ()
        assert "feature_names has a more than once" in refusal(save(tmp_path / "d.npz", features="aba"))

    def test_several_inputs_have_no_feature_names(self, tmp_path):
        data = load(save(tmp_path / "d.npz"), inputs=["x", "y"], targets="y")
        assert data.feature_names == ()
        assert data.class_names == CLASSES


class TestCsv:
    @pytest.fixture
    def table(self, tmp_path):
        path = tmp_path / "d.csv"
        path.write_text("age,kind,Body height\n30,b,1.5\n40,a,1.75\n50,b,2.0\n")
        return path

    def test_the_header_names_features_and_the_targets_words_name_classes(self, table):
        data = load(table, targets="kind")
        assert data.feature_names == ("age", "Body height")
        assert data.class_names == ("a", "b")
        assert data.targets.tolist() == [1, 0, 1]
        data = load(table, inputs=["Body height", "kind"], targets="age")
        assert data.feature_names == ("Body height", "kind")
        assert data.class_names == ()

    def test_it_is_standardised_by_its_own_rows_and_turns_back(self, table):
        data = load(table, targets="kind", standardize=True)
        torch.testing.assert_close(data.inputs.mean(0), torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(data.inputs.std(0, correction=0), torch.ones(2, dtype=torch.float64))
        assert data.feature_offset.tolist() == [40, 1.75]
        torch.testing.assert_close(own_units(data), load(table, targets="kind").inputs)

    def test_lists_of_mean_and_std_do_the_same_for_a_test_file(self, table):
        own = load(table, targets="kind", standardize=True)
        given = load(table, targets="kind", mean=own.feature_offset.tolist(), std=own.feature_scale.tolist())
        torch.testing.assert_close(given.inputs, own.inputs)
        np.testing.assert_allclose(given.feature_offset, own.feature_offset)
        np.testing.assert_allclose(given.feature_scale, own.feature_scale)

    @pytest.mark.parametrize("cell", ["", "inf"])
    def test_a_value_that_is_missing_is_that_of_its_own_sample_all_the_same(self, table, cell):
        table.write_text(f"a,y\n1,0\n{cell},1\n3,0\n")
        assert "inputs of 1 samples are NaN or infinite (first: sample 1)" in refusal(table, standardize=True)

    def test_other_files_are_not_standardised_by_rows_of_unknown_split(self, tmp_path):
        assert "standardize=true is for .csv files" in refusal(save(tmp_path / "d.npz"), standardize=True)


class TestTransforms:
    def test_they_keep_the_units_of_the_source(self, tmp_path):
        path = save(tmp_path / "d.npz")
        data = load(path, scale=[1, "1/2", -4], mean=[0.5, 0, 3], std=2)
        torch.testing.assert_close(own_units(data), X)
        assert data.feature_names == FEATURES

    def test_a_value_per_channel_holds_for_each_pixel_of_it(self, tmp_path):
        images = torch.rand(4, 2, 3, 3, dtype=torch.float64)
        np.savez(tmp_path / "d.npz", x=images, y=Y)
        data = load(tmp_path / "d.npz", scale="1/255", mean=[0.1, 0.2], std=[0.5, 0.25], flatten=True)
        assert data.feature_scale.shape == (18,)
        torch.testing.assert_close(own_units(data), images.flatten(1))

    def test_bytes_scaled_to_one_have_units_of_bytes(self, tmp_path):
        pixels = torch.arange(12).to(torch.uint8).reshape(4, 3)
        np.savez(tmp_path / "d.npz", x=pixels, y=Y)
        data = load(tmp_path / "d.npz", scale="1/255")
        np.testing.assert_allclose(data.feature_scale, 255, rtol=1e-15)
        torch.testing.assert_close(own_units(data), pixels.double())


class TestCode:
    CODE = """
import torch
from types import SimpleNamespace
from torch.utils.data import DataLoader, TensorDataset
X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 1, 0])
NAMES = {"feature_names": ["age", "height", "größe"], "class_names": ["no", "yes"]}
NAMES["feature_scale"] = [1, 2, 3]
def plain(**more): return SimpleNamespace(inputs=X, targets=Y, **{**NAMES, **more})
def items():
    data = TensorDataset(X, Y)
    vars(data).update(NAMES)
    return data
def loader(): return DataLoader(items(), batch_size=3)
def bare(): return X, Y
"""

    @pytest.fixture
    def code(self, tmp_path):
        path = tmp_path / "named_data.py"
        path.write_text(self.CODE, encoding="utf-8")
        return path

    @pytest.mark.parametrize("name", ["plain", "items", "loader"])
    def test_attributes_of_what_is_returned_are_taken(self, code, name):
        data = load(f"{code}:{name}")
        assert (data.feature_names, data.class_names) == (FEATURES, CLASSES)
        assert data.feature_scale.tolist() == [1, 2, 3]
        assert data.feature_offset.tolist() == [0, 0, 0]
        assert data.hash == load(f"{code}:bare").hash

    def test_without_attributes_nothing_is_known(self, code):
        data = load(f"{code}:bare")
        assert (data.feature_names, data.class_names) == ((), ())
        assert data.feature_offset is None

    @pytest.mark.parametrize(
        ("more", "expected"),
        [
            (
                {"feature_scale": [1.0, 2.0]},
                "feature_offset and feature_scale must hold 3 finite numbers each",
            ),
            (
                {"feature_offset": [0, float("nan"), 0]},
                "feature_offset and feature_scale must hold 3 finite numbers each",
            ),
            ({"feature_scale": [1, 0, 1]}, "feature_scale must not be 0"),
            ({"feature_scale": ["wide"]}, "fails: ValueError"),
            ({"class_names": 2}, "class_names=2 must be a list of names"),
        ],
    )
    def test_what_does_not_fit_is_named(self, code, more, expected):
        assert expected in refusal(f"{code}:plain", **more)


class TestBatches:
    @pytest.mark.parametrize("fits", [True, False])
    def test_they_carry_names_and_units_whether_they_are_on_the_device_or_not(self, monkeypatch, fits):
        monkeypatch.setattr("dynprobe.io.data._fits", lambda *_: fits)
        data = load("sklearn:iris", samples=10, split="train", standardize=True)
        batches = data.batches(4, device="cpu", dtype=torch.float32)
        assert batches.feature_names == data.feature_names
        assert batches.class_names == ("setosa", "versicolor", "virginica")
        assert batches.feature_offset.shape == batches.feature_scale.shape == (4,)
        assert batches.feature_scale.dtype == np.float64
        assert (batches.n_samples, batches.n_total) == (10, 120)
