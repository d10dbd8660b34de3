"""`dynprobe init`: a manifest that can be read at once, and says what it could not tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from dynprobe.cli.init import init
from dynprobe.io.checkpoints import open_runs
from dynprobe.io.errors import CannotWrite, InputError
from dynprobe.io.manifest import find_manifest, read_manifest
from dynprobe.io.models import build_model, fit_state
from dynprobe.io.propose import propose_manifest
from dynprobe.io.spec import Spec

app = typer.Typer()
app.command()(init)


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(build_model(Spec("builtin:cnn", {"width": 3})).state_dict(), folder / "step_7.safetensors")
    return folder


def test_the_written_manifest_builds_the_model_of_the_checkpoints(run):
    result = call(run)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "wrote" in result.stderr
    manifest = find_manifest(run)
    assert manifest.path == run / "dynprobe.toml"
    assert manifest.model.args == {"width": 3, "classes": 10, "channels": 1}
    state = open_runs([str(run)])[0].checkpoints[0].load().state
    fit_state(build_model(manifest.model), state, where="x")
    assert manifest.loss.name == "cross_entropy"
    assert manifest.data is None


def test_a_dry_run_prints_the_same_text_and_writes_nothing(run):
    shown = call(run, "--dry-run")
    assert list(run.iterdir()) == [run / "step_7.safetensors"]
    call(run)
    assert (run / "dynprobe.toml").read_text() == shown.stdout


def test_a_manifest_that_is_there_is_kept_unless_forced(run):
    (run / "dynprobe.toml").write_text("[groups]\nseed = 3\n[checkpoints]\nstep = 'step_(\\d+)'\n")
    result = call(run)
    assert isinstance(result.exception, InputError)
    assert "is there already" in str(result.exception)
    assert "--force" in result.exception.tip
    assert find_manifest(run).groups == {"seed": 3}
    assert call(run, "--force").exit_code == 0
    assert find_manifest(run).groups == {}
    assert find_manifest(run).checkpoints == {"step": r"step_(\d+)"}


def test_one_checkpoint_gets_its_manifest_beside_it(run):
    assert call(run / "step_7.safetensors").exit_code == 0
    assert (run / "dynprobe.toml").is_file()


def test_a_folder_that_cannot_be_written_is_named(run, monkeypatch):
    def refuse(*_args, **_keywords):
        raise CannotWrite(f"{run}: no permission to write there.")

    monkeypatch.setattr("dynprobe.io.atomic.write_atomically", refuse)
    assert isinstance(call(run).exception, CannotWrite)


@pytest.mark.parametrize("name", ["mlp_digits", "bn_cnn_seed0", "lstm_rows", "blur_deficit"])
def test_the_sample_runs_get_the_model_that_their_own_manifest_names(samples, tmp_path, name):
    folder = shutil.copytree(samples / name, tmp_path / name, ignore=shutil.ignore_patterns("dynprobe.toml"))
    path = tmp_path / "dynprobe.toml"
    path.write_text(propose_manifest(open_runs([str(folder)])[0]))
    proposed, own = read_manifest(path), find_manifest(samples / name)
    assert proposed.model.name == own.model.name
    assert proposed.model.args.items() >= own.model.args.items()


def test_what_the_checkpoint_says_of_its_training_is_taken_over(tmp_path):
    hyper_parameters = {"lr": 0.1, "batch_size": 32, "optimizer": "sgd", "seed": "none", "activation": "tanh"}
    net = {f"net.{k}": v for k, v in build_model(Spec("builtin:mlp", {"width": 3})).state_dict().items()}
    content = {"state_dict": net, "global_step": 5, "hyper_parameters": hyper_parameters}
    torch.save(content, tmp_path / "epoch=0-step=5.ckpt")
    assert call(tmp_path).exit_code == 0
    manifest = find_manifest(tmp_path)
    assert manifest.training == {"learning_rate": 0.1, "batch_size": 32, "optimizer": "sgd"}
    assert manifest.model.args["activation"] == "tanh"
    assert 'source = "sklearn:digits"' in manifest.path.read_text()


def test_a_transformers_run_needs_no_model(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"transformer.wte.weight": torch.zeros(3, 2)}, folder / "model.safetensors")
    assert call(tmp_path).exit_code == 0
    assert find_manifest(tmp_path).model.name == "hf"
    assert find_manifest(tmp_path).loss.name == "causal_lm"


def test_an_unknown_network_is_left_to_the_user_in_a_manifest_that_can_be_read(tmp_path):
    save_file({"a.weight": torch.zeros(3, 2), "b.weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    assert call(tmp_path).exit_code == 0
    manifest = find_manifest(tmp_path)
    assert manifest.model is manifest.loss is None
    text = manifest.path.read_text()
    assert "a.weight (3, 2)" in text
    assert "package.module:callable" in text


def test_a_data_file_beside_the_run_is_proposed(run):
    (run.parent / "digits.npz").write_bytes(b"")
    (run / "log.csv").write_text("step\n1\n")
    assert 'source = "../digits.npz"' in call(run, "--dry-run").stdout


def test_a_run_that_cannot_be_read_at_all_is_refused(tmp_path):
    (tmp_path / "step_1.safetensors").write_bytes(b"\x00" * 20)
    assert "none of its checkpoints can be read" in str(call(tmp_path).exception)
