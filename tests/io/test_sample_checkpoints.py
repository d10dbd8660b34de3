"""The runs that ship with the project: real, small, and exactly what their manifests and README say."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from dynprobe.io.checkpoints import open_runs
from dynprobe.io.data import load_data
from dynprobe.io.models import build_model, fit_state

GROUPS = {
    labels: [f"memorisation/{labels}_{member}" for member in range(5)] for labels in ("true", "shuffled")
}
TABULAR = ["tabular/seed0", "tabular/seed1"]
NAMES = [
    "bn_cnn_seed0",
    "bn_cnn_seed1",
    "bn_cnn_shuffled",
    "mlp_digits",
    "lstm_rows",
    "blur_deficit",
    "blur_control",
    "small_lr_large_batch",
    "large_lr_small_batch",
    *GROUPS["true"],
    *GROUPS["shuffled"],
    *TABULAR,
]


def open_run(folder: Path):
    return open_runs([str(folder)])[0]


def log(folder: Path) -> dict[int, dict[str, float]]:
    with (folder / "log.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows}


def accuracy(model, checkpoint, data) -> float:
    model.load_state_dict(fit_state(model, checkpoint.load().state, where=str(checkpoint.path))[0])
    model.eval()
    batches = data.batches(500, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / data.n_samples


@pytest.mark.parametrize("name", NAMES)
def test_a_run_needs_nothing_but_its_folder(samples, name):
    run = open_run(samples / name)
    assert run.warnings == []
    assert run.unit == "step"
    assert [checkpoint.step for checkpoint in run] == list(log(samples / name))
    assert run.checkpoints[0].step == 0
    assert run.checkpoints[-1].step == run.manifest.training["steps"]
    model = build_model(run.manifest.model)
    for checkpoint in run:
        fit_state(model, checkpoint.load().state, where=str(checkpoint.path))


@pytest.mark.parametrize("name", NAMES)
def test_the_logged_accuracy_is_that_of_the_weights_on_the_manifests_data(samples, name):
    run = open_run(samples / name)
    model = build_model(run.manifest.model)
    train, test = load_data(run.manifest.data), load_data(run.manifest.test_data)
    assert train.n_samples == run.manifest.training["samples"]
    for checkpoint in (run.checkpoints[0], run.checkpoints[-1]):
        logged = log(samples / name)[checkpoint.step]
        # One image on the edge between two classes may fall to the other side on another processor.
        assert accuracy(model, checkpoint, train) == pytest.approx(logged["train_accuracy"], abs=2e-3)
        assert accuracy(model, checkpoint, test) == pytest.approx(logged["test_accuracy"], abs=3e-3)


def test_the_runs_show_what_they_are_there_for(samples):
    final = {name: list(log(samples / name).values())[-1] for name in NAMES}
    for name in NAMES:
        assert log(samples / name)[0]["test_accuracy"] < (0.6 if name in TABULAR else 0.25)
        assert final[name]["train_accuracy"] > 0.95
        assert (final[name]["test_accuracy"] < 0.15) == ("shuffled" in name)
    assert final["blur_control"]["test_accuracy"] > final["blur_deficit"]["test_accuracy"]


def test_the_networks_of_both_groups_saw_the_same_images_and_no_two_of_them_start_alike(samples):
    runs = {labels: [open_run(samples / name) for name in names] for labels, names in GROUPS.items()}
    data = {labels: [load_data(run.manifest.data) for run in group] for labels, group in runs.items()}
    for labels in GROUPS:
        assert [run.manifest.groups["labels"] for run in runs[labels]] == [labels] * 5
        assert all(torch.equal(other.inputs, data["true"][0].inputs) for other in data[labels])
        assert all(torch.equal(other.targets, data[labels][0].targets) for other in data[labels])
    agreeing = (data["true"][0].targets == data["shuffled"][0].targets).double().mean()
    assert agreeing == pytest.approx(0.1, abs=0.05)
    everyone = [run for group in runs.values() for run in group]
    assert len({run.manifest.training["seed"] for run in everyone}) == 10
    assert len({run.checkpoints[0].load().hash for run in everyone}) == 10
    finals = [list(log(samples / name).values())[-1] for names in GROUPS.values() for name in names]
    assert min(final["train_accuracy"] for final in finals) >= 0.99


def test_the_group_runs_are_small(samples):
    files = [path for path in (samples / "memorisation").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5e6


def test_the_tabular_runs_have_named_features_and_misclassify_some_samples_to_the_end(samples):
    for name in TABULAR:
        run = open_run(samples / name)
        train, test = load_data(run.manifest.data), load_data(run.manifest.test_data)
        assert (train.feature_names[0], len(train.feature_names)) == ("mean_radius", 30)
        assert train.class_names == test.class_names == ("malignant", "benign")
        assert (train.feature_scale == test.feature_scale).all()
        final = list(log(samples / name).values())[-1]
        assert 0.98 < final["train_accuracy"] < 1
        assert 0.95 < final["test_accuracy"] < 1
    first, second = (open_run(samples / name).checkpoints[0].load().hash for name in TABULAR)
    assert first != second
    assert sum(path.stat().st_size for path in (samples / "tabular").rglob("*") if path.is_file()) < 2e5


def test_formats_are_mixed(samples):
    assert len({open_run(samples / name).checkpoints[0].format for name in NAMES}) >= 4


def test_the_folder_is_small(samples):
    assert sum(path.stat().st_size for path in samples.rglob("*") if path.is_file()) < 25e6


def test_the_readme_table_is_that_of_the_logs(samples):
    text = (samples / "README.md").read_text()
    for name in NAMES:
        row = re.search(rf"\| `{name}` \|.*\| (\d+) \| ([\d.]+) \| ([\d.]+) \|", text)
        step, last = list(log(samples / name).items())[-1]
        assert row
        assert int(row[1]) == step
        assert float(row[2]) == pytest.approx(last["train_accuracy"], abs=5.1e-4)
        assert float(row[3]) == pytest.approx(last["test_accuracy"], abs=5.1e-4)


def test_training_a_run_again_gives_its_accuracy(samples, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(samples))
    spec = importlib.util.spec_from_file_location("make_samples", samples / "make.py")
    make = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_samples", make)
    spec.loader.exec_module(make)
    try:
        make.train("mlp_digits", tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    new, old = (list(log(folder / "mlp_digits").values())[-1] for folder in (tmp_path, samples))
    assert new["test_accuracy"] == pytest.approx(old["test_accuracy"], abs=0.02)
    assert (tmp_path / "mlp_digits" / "dynprobe.toml").read_text() == (
        samples / "mlp_digits" / "dynprobe.toml"
    ).read_text()
