"""Several processes and one report: what each measured is there in the end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynprobe.analyzers.core.result import Array, Piece, Result, stack
from dynprobe.io import report as report_module
from dynprobe.io.errors import DamagedReport
from dynprobe.io.report import read_report, update_result, write_result

NEIGHBOUR = """
import sys
import numpy as np
from pathlib import Path
from dynprobe.analyzers.core.result import Array, Piece, stack, unstack
from dynprobe.io.report import update_result

name, report = sys.argv[1], Path(sys.argv[2])
for i in range(12):
    mine = Piece(f"{name}{i}", {"run": name, "step": i}, {"v": Array((), np.array(1.0 * i))})
    kept = lambda older: unstack(older) if older else []
    update_result(report, "norm", lambda older: stack("norm", "checkpoint", [*kept(older), mine], {}))
"""


def test_processes_that_add_to_one_result_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    report = tmp_path / "r.h5"
    command = [sys.executable, "-c", NEIGHBOUR]
    running = [subprocess.Popen([*command, name, str(report)]) for name in ("a", "b")]
    assert [process.wait(60) for process in running] == [0, 0]
    expected = {f"{name}{i}" for name in ("a", "b") for i in range(12)}
    assert set(read_report(report)["norm"]["key"].tolist()) == expected


def of_keys(*keys: str) -> Result:
    pieces = [Piece(key, {"run": key}, {"v": Array((), np.array(1.0))}) for key in keys]
    return stack("norm", "checkpoint", pieces, {})


def with_mine(older: Result | None) -> Result:
    return of_keys(*([] if older is None else older["key"].tolist()), "mine")


def test_a_result_overwritten_right_after_its_rename_is_put_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "r.h5"
    write, overwritten = report_module.write_atomically, []

    def overtaken(*args: Any, **kwargs: Any) -> bool:
        done = write(*args, **kwargs)
        if not overwritten:
            overwritten.append(True)
            write_result(report, of_keys("theirs"))
        return done

    monkeypatch.setattr(report_module, "write_atomically", overtaken)
    monkeypatch.setattr(report_module, "_alone", lambda _folder: contextlib.nullcontext())
    update_result(report, "norm", with_mine)
    assert read_report(report)["norm"]["key"].tolist() == ["theirs", "mine"]


def test_a_fresh_result_replaces_what_was_there_and_a_damaged_report(tmp_path: Path) -> None:
    report = tmp_path / "r.h5"
    write_result(report, of_keys("old"))
    update_result(report, "norm", with_mine, fresh=True)
    assert read_report(report)["norm"]["key"].tolist() == ["mine"]
    report.write_bytes(report.read_bytes()[:-300])
    with pytest.raises(DamagedReport):
        update_result(report, "norm", with_mine)
    update_result(report, "norm", with_mine, fresh=True)
    assert read_report(report)["norm"]["key"].tolist() == ["mine"]
