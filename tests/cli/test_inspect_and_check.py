"""`dynprobe inspect` and `dynprobe check` from the shell's side: streams, formats, exit codes."""

from __future__ import annotations

import csv
import io
import json
import os

import pytest
import torch
import typer
from typer.testing import CliRunner

from dynprobe.cli.sequence import check, human_size, inspect
from dynprobe.io.errors import InputError

app = typer.Typer()
app.command()(inspect)
app.command()(check)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / ("a_run_with_a_name_that_is_longer_than_eighty_columns_" + "x" * 60)
    root.mkdir()
    for step in (0, 10, 20, 30, 40):
        generator = torch.Generator().manual_seed(step)
        torch.save({"model": {"w": torch.randn(3, 4, generator=generator)}}, root / f"step_{step}.pt")
        os.utime(root / f"step_{step}.pt", (step + 1, step + 1))
    return root


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_lists_full_paths_when_piped(folder):
    result = call("inspect", folder)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].split() == ["step", "from", "format", "parameters", "dtype", "size", "file"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "10", "20", "30", "40"]
    assert all(str(folder / "step_") in line for line in lines[1:])
    assert "weights found at 'model'" in result.stderr


def test_inspect_json_is_one_document_with_numbers(folder):
    result = call("inspect", folder, "--format", "json", "--hash")
    (run,) = json.loads(result.stdout)["runs"]
    first = run["checkpoints"][0]
    assert (first["step"], first["parameters"], first["dtype"], first["unit"]) == (0, 12, "float32", "step")
    assert first["path"] == str(folder / "step_0.pt")
    assert first["bytes"] == (folder / "step_0.pt").stat().st_size
    assert len({checkpoint["hash"] for checkpoint in run["checkpoints"]}) == 5


def test_inspect_csv_has_one_line_per_checkpoint(folder):
    result = call("inspect", folder, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["step"] for row in rows] == ["0", "10", "20", "30", "40"]
    assert {row["problem"] for row in rows} == {""}


def test_inspect_shows_a_damaged_file_and_exits_one(folder):
    (folder / "step_20.pt").write_bytes(b"PK\x03\x04")
    result = call("inspect", folder)
    assert result.exit_code == 1
    assert "step_20.pt (unreadable)" in result.stdout
    assert "unreadable: " in result.stderr
    assert result.stdout.count("float32") == 4


def test_inspect_of_several_runs_names_each(folder, tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "single.pt")
    result = call("inspect", folder, tmp_path / "single.pt")
    assert result.stdout.splitlines()[0].split()[0] == "run"
    assert result.stdout.splitlines()[-1].split()[0] == "single.pt"


def test_check_of_a_sound_run_is_silent_and_exits_zero(folder):
    result = call("check", folder)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "5 checkpoints: nothing found" in result.stderr


def test_check_prints_one_line_per_finding_and_exits_one(folder):
    torch.save({"model": {"w": torch.full((3, 4), float("nan"))}}, folder / "step_20.pt")
    (folder / "step_30.pt").write_bytes(b"PK\x03\x04")
    os.utime(folder / "step_20.pt", (21, 21))
    os.utime(folder / "step_30.pt", (31, 31))
    result = call("check", folder)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["not finite", "damaged"]
    assert str(folder / "step_30.pt") in lines[1]


def test_check_json_counts_findings(folder):
    torch.save({"model": {"w": torch.full((3, 4), float("nan"))}}, folder / "step_20.pt")
    os.utime(folder / "step_20.pt", (21, 21))
    result = call("check", folder, "--format", "json")
    document = json.loads(result.stdout)
    assert document["n_findings"] == 1
    assert document["runs"][0]["findings"][0]["kind"] == "not finite"
    result = call("check", folder, "--format", "csv")
    assert result.stdout.splitlines()[0] == "kind,run,path,message"


def test_unusable_input_is_an_input_error(tmp_path):
    for command in ("inspect", "check"):
        result = call(command, tmp_path / "ghost")
        assert isinstance(result.exception, InputError)
        assert call(command).exit_code == 2


def test_key_and_step_pattern_reach_the_reader(folder):
    result = call("inspect", folder, "--key", "nothing")
    assert isinstance(result.exception, InputError)
    result = call("inspect", folder, "--step-pattern", r"step_(\d)", "--format", "csv")
    assert {row["source"] for row in csv.DictReader(io.StringIO(result.stdout))} == {"command line"}


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5 GiB"), (3 << 50, "3.07e+03 TiB")],
)
def test_human_size(size, text):
    assert human_size(size) == text
