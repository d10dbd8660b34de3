"""`dynprobe.toml`: parsed with errors that name file, table and key; the command line comes first."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.io.errors import BadManifest, InputError
from dynprobe.io.manifest import EXAMPLE, Manifest, Spec, find_manifest, merge_spec, parse_args

FULL = (
    EXAMPLE
    + """
[test_data]
source = "sklearn:digits"
args = { split = "test" }
[training]
learning_rate = 0.05
batch_size = 64
optimizer = "sgd"
warmup = "none"
[groups]
seed = 1
labels = "true"
[checkpoints]
glob = "*.pt"
key = "model.ema"
step = 'it(\\d+)'
"""
)


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dynprobe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_table_of_the_documented_example_is_read(tmp_path):
    path = write(tmp_path, FULL)
    manifest = find_manifest(tmp_path)
    assert manifest.path == path
    assert manifest.model == Spec("builtin:cnn", {"width": 16, "classes": 10}, str(path))
    assert manifest.data == Spec("sklearn:digits", {"split": "train"}, str(path))
    assert manifest.test_data == Spec("sklearn:digits", {"split": "test"}, str(path))
    assert manifest.loss == Spec("cross_entropy", {}, str(path))
    assert manifest.training["learning_rate"] == 0.05
    assert manifest.training["warmup"] == "none"
    assert manifest.groups == {"seed": 1, "labels": "true"}
    assert manifest.checkpoints == {"glob": "*.pt", "key": "model.ema", "step": r"it(\d+)"}


def test_a_manifest_is_never_as_trusted_as_the_command_line(tmp_path):
    write(tmp_path, FULL)
    model = find_manifest(tmp_path).model
    assert model is not None
    assert not model.trusted
    assert Spec("builtin:cnn").trusted


def test_the_nearest_parent_folder_with_a_manifest_counts(tmp_path):
    write(tmp_path, '[loss]\nname = "mse"\n')
    write(tmp_path / "a", '[loss]\nname = "cross_entropy"\n')
    run = tmp_path / "a" / "b" / "c"
    run.mkdir(parents=True)
    assert find_manifest(run).loss.name == "cross_entropy"
    assert find_manifest(run / "step_1.pt").loss.name == "cross_entropy"


def test_no_manifest_is_an_empty_one(tmp_path):
    assert find_manifest(tmp_path) == Manifest()


def test_relative_files_are_relative_to_the_manifest(tmp_path):
    write(
        tmp_path / "run",
        '[model]\nfactory = "net.py:make"\n[data]\nsource = "../data/x.npz"\n'
        '[test_data]\nsource = "mypkg.data:test"\n',
    )
    manifest = find_manifest(tmp_path / "run")
    assert manifest.model.name == f"{tmp_path / 'run' / 'net.py'}:make"
    assert manifest.data.name == str(tmp_path / "data" / "x.npz")
    assert manifest.test_data.name == "mypkg.data:test"


def test_a_transformers_model_is_named_by_its_folder_or_found_by_whoever_knows_the_run(tmp_path):
    write(tmp_path / "a", '[model]\nfactory = "hf:../gpt"\n')
    write(tmp_path / "b", '[model]\nfactory = "hf"\n')
    assert find_manifest(tmp_path / "a").model.name == f"hf:{tmp_path / 'gpt'}"
    assert find_manifest(tmp_path / "b").model.name == "hf"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[modle]\nfactory = 'builtin:cnn'", ["unknown table [modle]", "Did you mean 'model'?"]),
        ("[model]\nfactry = 'builtin:cnn'", ["[model]", "'factry'", "Did you mean 'factory'?"]),
        ("[data]\nargs = {}", ["[data] has no 'source'", "sklearn:digits"]),
        ("[model]\nfactory = 3", ["[model] factory = 3", "text in quotes"]),
        ("[model]\nfactory = 'builtin:cnn'\nargs = 1", ["[model] args = 1", "a table"]),
        ("[training]\nlearning_rat = 0.1", ["[training]", "'learning_rat'", "'learning_rate'"]),
        ("[training]\nlr = 0.1", ["[training]", "'lr'", "'learning_rate'"]),
        ("[training]\nbatch_size = true", ["[training] batch_size = True", "a whole number"]),
        ("[training]\nlearning_rate = nan", ["[training] learning_rate", "not a finite number"]),
        ("[groups]\nseed = [1, 2]", ["[groups] seed", "text in quotes or a number"]),
        ("[checkpoints]\nstep = '('", ["[checkpoints] step", "not a regular expression"]),
        ("[checkpoints]\nstep = 'it\\d+'", ["[checkpoints] step", "no group"]),
        ("[checkpoints]\nglobb = '*'", ["[checkpoints]", "'globb'", "'glob'"]),
        ("model = 'cnn'", ["'model' is a value", "[model]"]),
        ("[model", ["not valid TOML"]),
    ],
)
def test_a_wrong_manifest_names_file_table_key_and_remedy(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(BadManifest) as caught:
        find_manifest(tmp_path)
    said = f"{caught.value} {caught.value.tip}"
    for part in [str(path), *expected]:
        assert part in said


def test_a_manifest_inside_the_current_folder_is_named_as_the_user_would(tmp_path, monkeypatch):
    write(tmp_path / "run", "[modle]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadManifest, match=r"^run/dynprobe.toml: "):
        find_manifest(Path("run"))


def test_option_values_are_numbers_switches_lists_or_text():
    typed = [
        "w=16",
        "r=1e-3",
        "d=false",
        "e=True",
        "c=[1, 2]",
        "s=train",
        "t='7'",
        "u=1/255",
        "day=2020-01-02",
        "n=",
    ]
    assert parse_args(typed) == {
        "w": 16,
        "r": 1e-3,
        "d": False,
        "e": True,
        "c": [1, 2],
        "s": "train",
        "t": "7",
        "u": "1/255",
        "day": "2020-01-02",
        "n": "",
    }


@given(st.text())
def test_any_option_value_is_read_without_an_exception(text):
    assert list(parse_args([f"k={text}"])) == ["k"]


@pytest.mark.parametrize("text", ["width", "=3", " =3"])
def test_an_option_without_name_and_value_is_refused(text):
    with pytest.raises(InputError, match="NAME=VALUE"):
        parse_args([text])


def test_typed_arguments_are_laid_over_the_manifests():
    manifest = Spec("builtin:cnn", {"width": 8, "classes": 10}, "dynprobe.toml")
    merged = merge_spec(None, {"width": 16}, manifest, "--model")
    assert merged == Spec("builtin:cnn", {"width": 16, "classes": 10}, "dynprobe.toml")


def test_a_typed_name_replaces_the_manifests_arguments_unless_it_is_the_same():
    manifest = Spec("builtin:cnn", {"width": 8}, "dynprobe.toml")
    assert merge_spec("builtin:mlp", {}, manifest, "--model") == Spec("builtin:mlp")
    assert merge_spec("builtin:cnn", {}, manifest, "--model") == Spec("builtin:cnn", {"width": 8})


def test_arguments_for_nothing_are_refused():
    assert merge_spec(None, {}, None, "--model") is None
    with pytest.raises(InputError, match="--model-arg was given, but no --model"):
        merge_spec(None, {"width": 1}, None, "--model")
