"""What a report holds after several calls: nothing lost, nothing twice, nothing mixed up."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile

import numpy as np
import pytest
from end_to_end import ANALYZERS, dynprobe, save

from dynprobe.analyzers.core import loop
from dynprobe.analyzers.core.result import Piece
from dynprobe.io.pieces import PieceStore
from dynprobe.io.report import read_report

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, both called `run`, and analyzers of one's own."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "x1" / "run", {0: 1.0, 1: 2.0, 2: 4.0})
    save(tmp_path / "x2" / "run", {0: 1.0, 1: 3.0})
    (tmp_path / "mine.py").write_text(ANALYZERS)
    return tmp_path


def measured(capsys: Capture, name: str, *argv: object, code: int = 0) -> str:
    """Measure into r.h5 without a figure; what was said on stderr."""
    found, _, err = dynprobe(capsys, "run", f"mine.py:{name}", *argv, "-o", "r.h5", "--no-figure")
    assert found == code, err
    return err


def rows(report: str = "r.h5", name: str = "norm", value: str = "norm") -> list[tuple[str, float, float]]:
    result = read_report(Path(report))[name]
    return list(zip(result["run"].tolist(), result["step"].tolist(), result[value].tolist(), strict=True))


def test_runs_of_one_name_in_two_folders_stay_apart_in_a_report(folder, capsys):
    measured(capsys, "norm", "x1/run")
    measured(capsys, "norm", "x2/run")
    expected = [("x1/run", 0, 1), ("x1/run", 1, 2), ("x1/run", 2, 4), ("x2/run", 0, 1), ("x2/run", 1, 3)]
    assert rows() == expected
    measured(capsys, "norm", "x2/run", "--steps", "1")
    assert rows() == expected, "measured again, they replace themselves"


def test_runs_of_one_name_stay_apart_when_each_was_typed_in_its_own_folder(folder, capsys, monkeypatch):
    for name in ("x1", "x2"):
        monkeypatch.chdir(folder / name)
        command = ("run", "../mine.py:norm", "run", "-o", "../r.h5", "--no-figure")
        assert dynprobe(capsys, *command)[0] == 0
    monkeypatch.chdir(folder)
    assert {run for run, _, _ in rows()} == {"x1/run", "x2/run"}
    assert len(rows()) == 5


def test_merged_reports_keep_runs_of_one_name_apart(folder, capsys):
    for name in ("x1", "x2"):
        for analyzer in ("norm", "run_norm"):
            command = ("run", f"mine.py:{analyzer}", f"{name}/run", "-o", f"{name}.h5", "--no-figure")
            assert dynprobe(capsys, *command)[0] == 0
    assert dynprobe(capsys, "report", "merge", "x1.h5", "x2.h5", "-o", "all.h5")[0] == 0
    assert len(rows("all.h5")) == 5
    both = read_report(Path("all.h5"))["run-norm"]
    assert both["run"].tolist() == ["x1/run", "x2/run"]
    assert both["checkpoint_run"].tolist() == ["x1/run"] * 3 + ["x2/run"] * 2
    assert both.select(np.array([1]))["norms"].tolist() == [1.0, 3.0]


def test_another_spelling_of_a_path_gives_no_second_row(folder, capsys):
    measured(capsys, "norm", "x1/run")
    measured(capsys, "norm", folder / "x1" / "run")
    measured(capsys, "norm", "x1/run/step_1.safetensors")
    assert rows() == [("run", 0, 1), ("run", 1, 2), ("run", 2, 4)]


def test_a_renamed_run_gives_no_second_rows(folder, capsys):
    measured(capsys, "norm", "x1/run")
    (folder / "x1" / "run").rename(folder / "better")
    measured(capsys, "norm", "better", "--steps", "0,1,2")
    assert rows() == [("better", 0, 1), ("better", 1, 2), ("better", 2, 4)]


def test_checkpoints_of_equal_content_keep_a_row_each(folder, capsys):
    copyfile("x1/run/step_2.safetensors", "x1/run/step_5.safetensors")
    whole = [("x1/run", 0, 1), ("x1/run", 1, 2), ("x1/run", 2, 4), ("x1/run", 5, 4)]
    whole += [("x2/run", 0, 1), ("x2/run", 1, 3)]
    for _ in range(2):
        measured(capsys, "norm", "x1/run", "x2/run")
        assert rows() == whole
    parts = []
    for i in range(2):
        assert dynprobe(capsys, "run", "mine.py:norm", "x1/run", "x2/run", "--shard", f"{i}/2")[0] == 0
        parts.append(f"dynprobe-2-runs.shard-{i}-of-2.h5")
    code, _, err = dynprobe(capsys, "report", "merge", *parts, "-o", "all.h5")
    assert code == 0, err
    assert rows("all.h5") == whole


def test_a_second_run_joins_the_first_in_a_report_about_whole_runs(folder, capsys):
    measured(capsys, "run_norm", "x1/run")
    measured(capsys, "run_norm", "x2/run")
    result = read_report(Path("r.h5"))["run-norm"]
    assert result["run"].tolist() == ["x1/run", "x2/run"]
    assert result["total"].tolist() == [7.0, 4.0]
    assert result["norms"].tolist() == [1.0, 2.0, 4.0, 1.0, 3.0]
    measured(capsys, "run_norm", "x2/run")
    assert read_report(Path("r.h5"))["run-norm"]["total"].tolist() == [7.0, 4.0]


def test_another_group_of_runs_does_not_overwrite_the_first(folder, capsys):
    measured(capsys, "count", "x1/run")
    assert "runs was" in measured(capsys, "count", "x2/run", code=2)
    assert read_report(Path("r.h5"))["count"]["count"] == 3


def test_a_summary_is_made_of_its_own_run(folder, capsys):
    measured(capsys, "run_norm", "x1/run", "x2/run")
    result = read_report(Path("r.h5"))["run-norm"]
    assert result["count"].tolist() == [3, 2]
    np.testing.assert_allclose(result["mean"], [7 / 3, 2])


def test_a_summary_of_pairs_is_made_of_all_pairs_of_its_runs(folder, capsys):
    measured(capsys, "distance", "x1/run", "--pairs", "all")
    result = read_report(Path("r.h5"))["distance"]
    assert result["count"] == 3
    assert result["mean"] == pytest.approx(2)
    measured(capsys, "distance", "x1/run", "x2/run", "--pairs", "all", "--fresh")
    result = read_report(Path("r.h5"))["distance"]
    named = dict(zip(result["summary_run"].tolist(), result["count"].tolist(), strict=True))
    assert named == {"x1/run": 3, "x1/run | x2/run": 6, "x2/run": 1}


def test_a_run_without_a_good_piece_has_no_summary_and_the_others_do(folder, capsys):
    measured(capsys, "best_norm", "x1/run", "x2/run", "--fail", "x2", code=1)
    result = read_report(Path("r.h5"))["best-norm"]
    np.testing.assert_array_equal(result["best"], [4.0, np.nan])
    measured(capsys, "best_norm", "x2/run", "--fail", "x2", "--fresh", code=1)
    assert read_report(Path("r.h5"))["best-norm"]["status"].tolist() == ["failed", "failed"]


def test_a_summary_that_breaks_is_named_and_the_report_is_written(folder, capsys):
    (folder / "mine.py").write_text(ANALYZERS.replace('return {"best": np', 'return {"worst": np'))
    err = measured(capsys, "best_norm", "x1/run")
    assert "run: no summary: KeyError: 'best'" in err.replace("best-norm: ", "run: ")
    assert read_report(Path("r.h5"))["best-norm"]["norm"].tolist() == [1.0, 2.0, 4.0]


def test_a_figure_that_breaks_is_a_warning(folder, capsys):
    code, _, err = dynprobe(capsys, "run", "mine.py:undrawable", "x1/run", "-o", "r.h5")
    assert code == 0, err
    assert "no figure: KeyError: 'oops'" in err


def test_an_incomplete_run_gets_its_figure(folder, capsys):
    broken = folder / "x1" / "run" / "step_1.safetensors"
    broken.write_bytes(broken.read_bytes()[:-2])
    code, _, err = dynprobe(capsys, "run", "mine.py:run_norm", "x1/run", "-o", "r.h5")
    assert code == 1, err
    assert (folder / "r-run-norm.png").exists()


def test_numbers_of_an_edited_analyzer_are_not_mixed_with_older_ones(folder, capsys, monkeypatch):
    measured(capsys, "norm", "x1/run", "--steps", "0")
    (folder / "mine.py").write_text(ANALYZERS.replace('"norm": size(state)', '"norm": 2 * size(state)'))
    monkeypatch.setattr(loop, "_CODE", {})
    assert "code was" in measured(capsys, "norm", "x1/run", "--steps", "1", code=2)
    measured(capsys, "norm", "x1/run", "--fresh")
    assert [value for _, _, value in rows()] == [2, 4, 8]


def test_a_neighbours_finished_pieces_survive_the_end_of_a_call(folder, capsys):
    store = PieceStore(folder / "r.h5", "norm")
    store.put(Piece("a neighbour's", {"run": "elsewhere"}))
    measured(capsys, "norm", "x1/run")
    assert list(store.pieces()) == ["a neighbour's"]


def test_a_file_that_is_no_report_is_refused_before_anything_is_measured(folder, capsys):
    (folder / "notes.txt").write_text("mine")
    command = ("run", "mine.py:norm", "x1/run", "--fresh", "-o", "notes.txt", "--no-figure")
    code, out, err = dynprobe(capsys, *command)
    assert (code, out) == (2, "")
    assert "not a dynprobe report" in err
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "notes.txt.pieces").exists()


def test_fresh_replaces_a_damaged_report(folder, capsys):
    measured(capsys, "norm", "x1/run")
    report = folder / "r.h5"
    report.write_bytes(report.read_bytes()[:-500])
    measured(capsys, "norm", "x1/run", code=2)
    measured(capsys, "norm", "x1/run", "--fresh")
    assert len(rows()) == 3


def test_shards_that_were_run_again_after_training_went_on_merge(folder, capsys):
    save(folder / "x3", {0: 1.0, 2: 3.0, 4: 5.0})
    for _ in range(2):
        for i in range(2):
            shard = ("run", "mine.py:norm", "x3", "-o", "s.h5", "--no-figure", "--shard", f"{i}/2")
            assert dynprobe(capsys, *shard)[0] == 0
        save(folder / "more", {1: 2.0})
        (folder / "more" / "step_1.safetensors").rename(folder / "x3" / "step_1.safetensors")
        (folder / "more").rmdir()
    parts = sorted(str(p) for p in folder.glob("s.shard-*.h5"))
    assert "earlier_commands" in read_report(Path(parts[0]))["norm"].attributes
    code, _, err = dynprobe(capsys, "report", "merge", *parts, "-o", "all.h5")
    assert code == 0, err
    assert [value for _, _, value in rows("all.h5")] == [1, 2, 3, 5]


def test_provenance_names_the_data_of_each_run(folder, capsys):
    for name, classes in (("x1", 3), ("x2", 5)):
        data = folder / name / "data.npz"
        np.savez(data, x=np.zeros((2 * classes, 1), np.float32), y=np.arange(2 * classes) % classes)
        (folder / name / "run" / "dynprobe.toml").write_text(f'[data]\nsource = "{data}"\n')
    text = ANALYZERS.replace("def norm(state):", "def norm(state, batches):")
    (folder / "mine.py").write_text(text)
    measured(capsys, "norm", "x1/run", "x2/run")
    facts = read_report(Path("r.h5"))["norm"].attributes
    assert facts["n_classes"] == {"of each run": {"x1/run": 3, "x2/run": 5}}
    assert facts["n_samples"] == {"of each run": {"x1/run": 6, "x2/run": 10}}


def test_json_of_whole_runs_gives_each_run_its_steps_and_values(folder, capsys):
    command = ("run", "mine.py:run_norm", "x1/run", "x2/run", "--format", "json", "--no-figure")
    code, out, err = dynprobe(capsys, *command)
    assert code == 0, err
    document = json.loads(out)
    first, second = document["pieces"]
    assert first["checkpoints"]["step"] == [0, 1, 2]
    assert second["checkpoints"]["path"][1] == "x2/run/step_1.safetensors"
    assert second["values"]["norms"] == [1.0, 3.0]
    assert second["values"]["total"] == 4.0
    assert set(document["summary"]) == {"mean", "count"}
    _, out, _ = dynprobe(capsys, *command[:3], "--format", "json", "--no-figure")
    (only,) = json.loads(out)["pieces"]
    assert only["checkpoints"]["step"] == [0, 1, 2]
    assert only["values"]["norms"] == [1.0, 2.0, 4.0]
