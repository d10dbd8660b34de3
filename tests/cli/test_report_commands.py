"""`dynprobe report …` as a user types it, and the tables, JSON and CSV every analyzer prints."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.analyzers.core.result import FAILED, Array, Piece, Result, stack
from dynprobe.cli import app
from dynprobe.cli.numbers import with_error
from dynprobe.cli.table import blocks, columns, print_result, records
from dynprobe.io.report import read_report, write_result, write_results


class Output(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Output]


@pytest.fixture
def dynprobe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*words: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["dynprobe", "report", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            app.main()
        return Output(int(left.value.code or 0), *capsys.readouterr())

    return call


LONG = "a/very/long/folder/name/that/no/terminal/has/the/width/to/show/in/a/single/line/of/text"


def pieces(scale: float = 1.0, n: int = 3) -> list[Piece]:
    done = [
        Piece(
            f"key{i}",
            {"run": LONG, "step": 10 * i, "path": f"{LONG}/{i}.pt"},
            {
                "layer": Array(("layer",), np.array(["fc1", "head"], dtype=object)),
                "x": Array(("x",), np.linspace(-1, 1, 7)),
                "eigenvalue": Array(("rank",), scale * np.array([2.0, 1.0]) * (i + 1), error="residual"),
                "residual": Array(("rank",), np.array([0.02, 0.001])),
                "norm": Array(("layer",), np.array([np.nan, np.inf])),
                "loss": Array(("x",), np.linspace(-1, 1, 7) ** 2, "nat"),
                "trace": Array((), np.array(3.25), error="trace_stderr"),
                "trace_stderr": Array((), np.array(0.125)),
            },
            seconds=1.5,
            spent={"hvps": 20},
            notes=("prefix stripped",),
        )
        for i in range(n - 1)
    ]
    bad = {"run": LONG, "step": 99, "path": f"{LONG}/99.pt"}
    return [*done, Piece("", bad, status=FAILED, reason="the file ends after 12 bytes\nit should have 99")]


def result(name: str = "hessian", scale: float = 1.0, **more: Any) -> Result:
    attributes = {"title": "Largest eigenvalues", "options": {"top_k": 2}, "seed": 0, "planned": 3, **more}
    return stack(name, "checkpoint", pieces(scale), attributes)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    write_result(tmp_path / "r.h5", result())
    return tmp_path / "r.h5"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write_results(tmp_path / "two.h5", {"hessian": result(), "norm": result("norm")})
    return tmp_path / "two.h5"


def strict(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_show_prints_provenance_the_table_with_whole_paths_and_every_failure(
    dynprobe: Command, report: Path
) -> None:
    shown = dynprobe("show", report)
    assert shown.code == 0
    assert shown.err == ""
    assert "options: top_k=2" in shown.out
    assert f"{LONG}/1.pt" in shown.out
    assert "2.000 ± 0.020" in shown.out
    assert "3.25 ± 0.12" in shown.out
    assert "0 … 1" in shown.out
    assert f"{LONG}/99.pt: failed: the file ends after 12 bytes" in shown.out
    assert "prefix stripped" in shown.out
    assert "\x1b" not in shown.out


def test_show_as_json_is_one_strict_document_with_every_value(dynprobe: Command, two: Path) -> None:
    shown = dynprobe("show", two, "--format", "json")
    first, second = strict(shown.out)
    assert (first["analyzer"], second["analyzer"]) == ("hessian", "norm")
    assert first["file"] == str(two)
    piece = first["pieces"][1]
    assert (piece["step"], piece["status"], piece["hvps"]) == (10, "ok", 20)
    assert piece["values"]["eigenvalue"] == [4.0, 2.0]
    assert piece["values"]["norm"] == [None, "Infinity"]
    assert first["variables"]["eigenvalue"] == {
        "dims": ["rank"],
        "units": "",
        "long_name": "",
        "error": "residual",
    }
    assert first["coordinates"]["layer"]["values"] == ["fc1", "head"]
    assert first["pieces"][2]["status"] == "failed"
    assert first["pieces"][2]["values"]["trace"] is None


def test_show_as_csv_has_every_digit_and_a_line_for_each_piece(dynprobe: Command, report: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(dynprobe("show", report, "--format", "csv").out)))
    assert len(rows) == 3
    assert float(rows[1]["eigenvalue[0]"]) == 4.0
    assert float(rows[1]["eigenvalue[0].error"]) == 0.02
    assert (rows[1]["loss.min"], rows[1]["loss.max"]) == ("0.0", "1.0")
    assert rows[1]["norm[head]"] == "inf"
    assert rows[2]["reason"].startswith("the file ends")
    assert rows[0]["path"] == f"{LONG}/0.pt"


def test_a_result_that_a_report_does_not_hold_is_answered_with_the_nearest(
    dynprobe: Command, two: Path
) -> None:
    shown = dynprobe("show", two, "--analyzer", "hesian")
    assert shown.code == 2
    assert "Did you mean 'hessian'?" in shown.err


def test_where_one_result_is_needed_and_there_are_two_the_option_is_named(
    dynprobe: Command, two: Path
) -> None:
    for words in (("show", two, "--format", "csv"), ("export", two), ("plot", two)):
        answer = dynprobe(*words)
        assert answer.code == 2
        assert "--analyzer" in answer.err


def test_a_missing_file_and_one_that_is_no_report_are_usage_errors(dynprobe: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert dynprobe("show", tmp_path / "none.h5").code == 2
    answer = dynprobe("show", tmp_path / "notes.txt")
    assert answer.code == 2
    assert "notes.txt" in answer.err
    assert "Traceback" not in answer.err


def test_export_of_one_variable_is_a_long_table_with_labels_and_error(
    dynprobe: Command, report: Path
) -> None:
    rows = list(csv.DictReader(io.StringIO(dynprobe("export", report, "--variable", "eigenvalue").out)))
    assert len(rows) == 6
    assert list(rows[0]) == ["run", "step", "path", "status", "rank", "eigenvalue", "residual"]
    assert (rows[3]["step"], rows[3]["rank"], rows[3]["eigenvalue"], rows[3]["residual"]) == (
        "10",
        "1",
        "2.0",
        "0.001",
    )
    loss = list(csv.DictReader(io.StringIO(dynprobe("export", report, "--variable", "loss").out)))
    assert [float(row["x"]) for row in loss[:7]] == np.linspace(-1, 1, 7).tolist()
    assert loss[20]["loss"] == "nan"


def test_export_of_an_unknown_variable_names_the_nearest(dynprobe: Command, report: Path) -> None:
    answer = dynprobe("export", report, "--variable", "eigenvalu")
    assert answer.code == 2
    assert "'eigenvalue'" in answer.err


def test_the_suffix_of_the_output_decides_the_format(dynprobe: Command, two: Path, tmp_path: Path) -> None:
    assert dynprobe("export", two, "-o", tmp_path / "a.json").code == 0
    assert len(strict((tmp_path / "a.json").read_text())) == 2
    assert dynprobe("export", two, "--analyzer", "norm", "-o", tmp_path / "a.csv").code == 0
    assert (tmp_path / "a.csv").read_text().startswith("run,step")
    assert dynprobe("export", two, "--analyzer", "norm", "-o", tmp_path / "a.nc").code == 0
    with xarray.open_datatree(tmp_path / "a.nc", engine="h5netcdf") as tree:
        assert set(tree.children) == {"norm"}
    answer = dynprobe("export", two, "-o", tmp_path / "a.xlsx")
    assert answer.code == 2
    assert ".csv, .json, .nc" in answer.err
    assert dynprobe("export", two, "--format", "json").out.startswith("[")


def surface() -> Result:
    x, y = np.linspace(-1, 1, 4), np.linspace(-1, 1, 3)
    arrays = {
        "x": Array(("x",), x),
        "y": Array(("y",), y),
        "loss": Array(("y", "x"), 1 + x**2 + y[:, None] ** 2, "nat", "loss"),
    }
    return stack("landscape", "checkpoint", [Piece("k", {"run": "a", "step": 1}, arrays)], {})


def test_a_landscape_exports_for_paraview_and_plots(dynprobe: Command, tmp_path: Path) -> None:
    write_result(tmp_path / "r.h5", surface())
    assert dynprobe("export", tmp_path / "r.h5", "-o", tmp_path / "s.vts").code == 0
    assert "StructuredGrid" in (tmp_path / "s.vts").read_text()
    answer = dynprobe("plot", tmp_path / "r.h5", "--figure", tmp_path / "s.svg")
    assert answer.code == 0
    assert answer.out == ""
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_merge_puts_shards_together_and_names_the_missing_one(dynprobe: Command, tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        part = stack("hessian", "checkpoint", [pieces()[i]], {"planned": 3, "shard": f"{i}/3"})
        paths.append(tmp_path / f"{i}.h5")
        write_result(paths[-1], part)
    answer = dynprobe("merge", *paths[:2], "-o", tmp_path / "all.h5")
    assert answer.code == 2
    assert "shard 2/3 is missing" in answer.err
    assert not (tmp_path / "all.h5").exists()
    allowed = dynprobe("merge", *paths[:2], "-o", tmp_path / "some.h5", "--allow-missing")
    assert (allowed.code, allowed.out) == (0, "")
    assert "without shards 2/3" in allowed.err
    assert dynprobe("merge", *paths, "-o", tmp_path / "all.h5").code == 0
    assert read_report(tmp_path / "all.h5")["hessian"]["step"].tolist() == [0, 10, 99]


def test_diff_is_silent_agreement_with_exit_code_0(dynprobe: Command, report: Path, tmp_path: Path) -> None:
    write_result(tmp_path / "again.h5", result(command="again"))
    answer = dynprobe("diff", report, tmp_path / "again.h5")
    assert answer.code == 0
    assert "hessian: same" in answer.out
    assert "command: None | again" in answer.out


def test_diff_of_other_values_says_by_how_much_in_units_of_the_errors(
    dynprobe: Command, report: Path, tmp_path: Path
) -> None:
    write_result(tmp_path / "other.h5", result(scale=1.01))
    answer = dynprobe("diff", report, tmp_path / "other.h5", "--format", "json")
    assert answer.code == 1
    (found,) = [
        v for v in strict(answer.out)["results"]["hessian"]["variables"] if v["variable"] == "eigenvalue"
    ]
    assert found["absolute"] == pytest.approx(0.04)
    assert found["in_errors"] == pytest.approx(0.02 / np.hypot(0.001, 0.001))
    assert dynprobe("diff", report, tmp_path / "other.h5", "--rtol", "0.02").code == 0


def test_diff_counts_an_analyzer_of_only_one_report(dynprobe: Command, report: Path, two: Path) -> None:
    answer = dynprobe("diff", report, two)
    assert answer.code == 1
    assert f"norm: only in {two}" in answer.out


def test_a_reader_that_has_seen_enough_gets_no_error(report: Path) -> None:
    command = f"{sys.executable} -m dynprobe.cli report show {report} --format json | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def test_text_that_a_terminal_would_obey_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    bad = Piece("", {"run": "a", "step": 1, "path": "\x1b[31m\udcff.pt"}, status=FAILED, reason="\x07")
    print_result(stack("norm", "checkpoint", [bad], {}))
    shown = capsys.readouterr().out
    assert r"\x1b[31m\udcff.pt: failed: \x07" in shown
    assert "\x1b" not in shown


def test_csv_with_an_undecodable_path_can_be_printed_where_only_utf8_is_allowed() -> None:
    bad = Piece("", {"run": "a", "step": 1, "path": "\udcff.pt"}, status=FAILED, reason="x")
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding="utf-8", errors="strict") as strict_file:
        print_result(stack("norm", "checkpoint", [bad], {}), "csv", strict_file)
        strict_file.flush()
        assert rb"a,1,\udcff.pt,failed" in content.getvalue()


def test_a_result_about_whole_runs_has_a_row_for_each_checkpoint_and_run_numbers_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays = {
        "loss": Array(("checkpoint",), np.array([2.0, 1.0, 0.5]), error="loss_stderr"),
        "loss_stderr": Array(("checkpoint",), np.full(3, 0.01)),
        "coordinate": Array(("checkpoint", "component"), np.arange(6.0).reshape(3, 2)),
        "component": Array(("component",), np.array([1, 2])),
        "explained_variance": Array(("component",), np.array([0.75, 0.25])),
        "step": Array(("checkpoint",), np.array([0, 1, 5])),
        "path": Array(("checkpoint",), np.array(["0.pt", "1.pt", "5.pt"], dtype=object)),
        "checkpoint_run": Array(("checkpoint",), np.array(["a"] * 3, dtype=object)),
    }
    whole = stack("trajectory", "run", [Piece("k", {"run": "a"}, arrays)], {})
    table = columns(whole)
    assert table["step"] == ["0", "1", "5"]
    assert table["loss"] == ["2.000 ± 0.010", "1.000 ± 0.010", "0.500 ± 0.010"]
    assert table["coordinate[component=2]"] == ["1", "3", "5"]
    assert "explained_variance" not in table
    assert records(whole)["loss.error"] == [0.01] * 3
    print_result(whole)
    assert "explained_variance: 0.75 (component 1), 0.25 (component 2)" in capsys.readouterr().out


def test_on_a_terminal_paths_are_short_and_a_run_that_all_rows_share_is_left_out() -> None:
    table = columns(result(), short=True)
    assert "run" not in table
    assert table["file"] == ["0.pt", "1.pt", "99.pt"]


def test_a_table_wider_than_the_terminal_is_split_and_each_part_starts_with_the_step() -> None:
    table = {
        "step": ["0", "10"],
        "file": ["a.pt", "b.pt"],
        "loss": ["1" * 20] * 2,
        "accuracy": ["2" * 20] * 2,
    }
    assert blocks(table, 200) == [["step", "file", "loss", "accuracy"]]
    assert blocks(table, 40) == [["step", "file", "loss"], ["step", "accuracy"]]
    assert blocks(table, 10) == [["step", "file"], ["step", "loss"], ["step", "accuracy"]]


FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e200, max_value=1e200)


@given(FINITE, st.floats(min_value=1e-200, max_value=1e200))
def test_a_printed_value_is_within_its_printed_rounding_of_the_number(value: float, error: float) -> None:
    text = with_error(value, error)
    scale = 1.0
    if text.startswith("("):
        text, _, exponent = text[1:].partition(")e")
        scale = float(f"1e{exponent}")
    shown, _, spread = text.partition(" ± ")
    rounding = 1e-4 if error < 1e-13 * abs(value) else 1e-12  # five digits where the error says nothing
    assert abs(float(shown) * scale - value) <= 0.06 * error + rounding * abs(value)
    assert float(spread) * scale == pytest.approx(error, rel=0.06)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.12341, 0.00123, "0.1234 ± 0.0012"),
        (9.996, 0.0996, "10.00 ± 0.10"),
        (123.4, 56.0, "123 ± 56"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (1.5, float("nan"), "1.5"),
        (float("nan"), 0.1, "NaN"),
        (float("-inf"), 0.1, "-inf"),
        (2.0, 0.0, "2 ± 0"),
        (2.0, float("inf"), "2 ± inf"),
        (1 / 3, float("nan"), "0.33333"),
    ],
)
def test_as_many_digits_as_the_error_leaves_meaningful(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text
