"""Shards of one analysis → one report; what does not belong together is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynprobe.analyzers.core.result import FAILED, Array, Piece, Result, stack
from dynprobe.io.compare import compare
from dynprobe.io.errors import InputError
from dynprobe.io.merge import merge_reports
from dynprobe.io.report import read_report, write_result


def piece(i: int, run: str = "run2") -> Piece:
    index = {"run": run, "step": 10 * i, "path": f"{run}/{i}.pt"}
    arrays = {"v": Array((), np.array(float(i)), error="v_error"), "v_error": Array((), np.array(0.5))}
    return Piece(f"{run}{i}", index, arrays)


def shard(
    tmp_path: Path, pieces: list[Piece], text: str = "", planned: int = 0, name: str = "norm", **more: Any
) -> Path:
    attributes = {"options": {"top_k": 1}, "planned": planned or len(pieces), "command": text, **more}
    attributes |= {"shard": text} if text else {}
    path = tmp_path / f"{text.replace('/', '-')}{name}{len(list(tmp_path.iterdir()))}.h5"
    write_result(path, stack(name, "checkpoint", pieces, attributes))
    return path


def shards(tmp_path: Path, total: int = 7, n: int = 3) -> list[Path]:
    parts = [[piece(i) for i in range(k, total, n)] for k in range(n)]
    return [shard(tmp_path, part, f"{k}/{n}", planned=total) for k, part in enumerate(parts)]


def test_shards_in_any_order_give_all_pieces_in_the_order_of_the_run(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    merged = merge_reports([paths[2], paths[0], paths[1]], tmp_path / "all.h5")["norm"]
    assert merged["step"].tolist() == list(range(0, 70, 10))
    assert merged["v"].tolist() == list(range(7))
    back = read_report(tmp_path / "all.h5")["norm"]
    assert back["v"].tolist() == list(range(7))
    assert "shard" not in back.attributes
    assert back.attributes["options"] == {"top_k": 1}
    assert len(back.attributes["merged"]) == 3
    assert back.attributes["command"] == ["2/3", "0/3", "1/3"]


def test_runs_are_ordered_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    paths = [shard(tmp_path, [piece(1, run), piece(0, run)]) for run in ("run10", "run9")]
    merged = merge_reports(paths, tmp_path / "all.h5")["norm"]
    assert merged["run"].tolist() == ["run9", "run9", "run10", "run10"]
    assert merged["step"].tolist() == [0, 10, 0, 10]
    assert merged.attributes["planned"] == 4


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    with pytest.raises(InputError, match=r"norm: shard 1/3 is missing: 5 of 7 pieces") as caught:
        merge_reports([paths[0], paths[2]], tmp_path / "all.h5")
    assert "--allow-missing" in caught.value.tip
    assert not (tmp_path / "all.h5").exists()


def test_a_missing_shard_that_is_allowed_is_recorded_and_can_be_added_later(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    part = tmp_path / "part.h5"
    merged = merge_reports([paths[0], paths[2]], part, allow_missing=True)["norm"]
    assert merged.attributes["missing_shards"] == ["1/3"]
    assert merged.n_pieces == 5
    whole = merge_reports([part, paths[1]], tmp_path / "all.h5")["norm"]
    assert whole["v"].tolist() == list(range(7))
    assert "missing_shards" not in whole.attributes


def test_a_shard_that_lost_a_piece_is_noticed_by_the_count(tmp_path: Path) -> None:
    paths = [
        shard(tmp_path, [piece(0)], "0/2", planned=3),
        shard(tmp_path, [piece(1)], "1/2", planned=3),
    ]
    with pytest.raises(InputError, match="every shard is there, but pieces are not: 2 of 3"):
        merge_reports(paths, tmp_path / "all.h5")


def test_one_shard_alone_is_not_the_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1/3, 2/3 is missing"):
        merge_reports(shards(tmp_path)[:1], tmp_path / "all.h5")


def test_shards_of_different_divisions_are_refused(tmp_path: Path) -> None:
    paths = [
        shard(tmp_path, [piece(0)], "0/2", planned=9),
        shard(tmp_path, [piece(1)], "1/3", planned=9),
    ]
    with pytest.raises(InputError, match="into 2, 3"):
        merge_reports(paths, tmp_path / "all.h5")


def test_equal_pieces_are_kept_once_and_a_finished_one_wins_over_a_failed_one(tmp_path: Path) -> None:
    failed = replace(piece(1), arrays={}, status=FAILED, reason="out of memory")
    paths = [shard(tmp_path, [piece(0), failed]), shard(tmp_path, [piece(1), piece(2)], planned=2)]
    merged = merge_reports(paths, tmp_path / "all.h5")["norm"]
    assert merged["v"].tolist() == [0, 1, 2]
    assert merged.failures() == []


def test_pieces_that_failed_before_they_had_a_key_are_all_kept(tmp_path: Path) -> None:
    failed = [Piece("", {"run": "a", "step": i}, status=FAILED, reason="truncated") for i in range(2)]
    paths = [shard(tmp_path, [piece(0), f]) for f in failed]
    assert len(merge_reports(paths, tmp_path / "all.h5")["norm"].failures()) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"options": {"top_k": 2}}, r"options\.top_k: 1 and 2"),
        ({"dynprobe_version": "9"}, "dynprobe_version: None and 9"),
        ({"measured_on": {"data": "abc"}}, "measured_on: None and"),
    ],
)
def test_what_was_measured_otherwise_is_refused_and_the_difference_named(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    paths = [shard(tmp_path, [piece(0)]), shard(tmp_path, [piece(1)], **changed)]
    with pytest.raises(InputError, match=message):
        merge_reports(paths, tmp_path / "all.h5")


def test_results_of_different_analyzers_stand_side_by_side(tmp_path: Path) -> None:
    paths = [shard(tmp_path, [piece(0)], name=name) for name in ("norm", "hessian")]
    merge_reports(paths, tmp_path / "all.h5")
    assert set(read_report(tmp_path / "all.h5")) == {"norm", "hessian"}


def test_run_level_numbers_are_computed_anew(tmp_path: Path) -> None:
    def finish(result: Result) -> Result:
        total = Array((), np.array(result["v"].sum()))
        return replace(result, arrays={**result.arrays, "total": total})

    merged = merge_reports(shards(tmp_path), tmp_path / "all.h5", finish=finish)["norm"]
    assert merged["total"] == sum(range(7))


def result(offset: float = 0.0, steps: int = 3, **attributes: Any) -> Result:
    pieces = [piece(i) for i in range(steps)]
    for p in pieces:
        p.arrays["v"].values[...] += offset
    return stack("norm", "checkpoint", pieces, {"seed": 0, **attributes})


def test_equal_results_agree_whatever_their_provenance() -> None:
    found = compare(result(), result(seed=1, command="again"), rtol=0, atol=0)
    assert found.same
    assert found.provenance == {"seed": (0, 1), "command": (None, "again")}


def test_a_difference_is_given_absolute_relative_and_in_units_of_the_errors() -> None:
    found = compare(result(), result(2.0), rtol=0.1, atol=0)
    by_name = {v.variable: v for v in found.variables}
    assert not found.same
    assert by_name["v_error"].within
    assert by_name["v"].absolute == 2.0
    assert by_name["v"].relative == 1.0  # 0 and 2
    assert by_name["v"].in_errors == pytest.approx(2.0 / np.hypot(0.5, 0.5))
    assert compare(result(), result(2.0), rtol=1.0, atol=0).same
    assert compare(result(), result(2.0), rtol=0, atol=2.0).same


def test_nan_agrees_with_nan_only_and_an_infinity_with_itself() -> None:
    nan, inf = result(np.nan), result(np.inf)
    assert compare(nan, nan, rtol=0, atol=0).same
    assert compare(inf, inf, rtol=0, atol=0).same
    for odd in (nan, inf):
        assert not compare(odd, result(), rtol=1, atol=1e9).same
        assert not compare(result(), odd, rtol=1, atol=1e9).same


def test_a_piece_of_only_one_result_is_named() -> None:
    found = compare(result(steps=3), result(steps=2), rtol=0, atol=0)
    assert found.differences == ["run run2, step 20: only in the first"]
    assert not found.same


def test_runs_of_different_names_are_compared_step_by_step() -> None:
    renamed = stack("norm", "checkpoint", [piece(i, "copy") for i in range(3)], {"seed": 0})
    assert compare(result(), renamed, rtol=0, atol=0).same


def test_another_status_and_another_shape_are_differences() -> None:
    failed = [replace(piece(0), arrays={}, status=FAILED), piece(1), piece(2)]
    found = compare(result(), stack("norm", "checkpoint", failed, {}), rtol=0, atol=0)
    assert found.differences == ["run run2, step 0: ok in the first, failed in the second"]
    longer = [replace(piece(i), arrays={"v": Array(("n",), np.zeros(2))}) for i in range(3)]
    found = compare(result(), stack("norm", "checkpoint", longer, {}), rtol=0, atol=0)
    assert any("shape () and (2,)" in text for text in found.differences)
    assert "v_error: only in the first" in found.differences
