"""Pieces: nothing finished is lost, whatever kills the process or damages a file."""

from __future__ import annotations

import errno
import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dynprobe.analyzers.core.result import FAILED, NOT_CONVERGED, Array, Piece
from dynprobe.io import atomic
from dynprobe.io.errors import CannotWrite
from dynprobe.io.report import PieceStore, read_report


def piece(i: int) -> Piece:
    return Piece(
        f"key {i}/with any: characters",
        {"run": "a\udcff", "step": i, "path": f"a/{i}.pt", "unknown": None},
        {
            "x": Array(("x",), np.array([-1.0, 0.0, 1.0])),
            "loss": Array(("x",), np.array([np.nan, np.inf, float(i)]), "nat", "loss", "loss_stderr"),
            "loss_stderr": Array(("x",), np.zeros(3)),
            "trace": Array((), np.array(i)),
        },
        NOT_CONVERGED,
        "stopped after 10 steps",
        1.25,
        {"hvps": 10},
        ("a note", "ünother"),
    )


def assert_same(a: Piece | None, b: Piece) -> None:
    assert a is not None
    assert (a.key, a.index, a.status, a.reason) == (b.key, b.index, b.status, b.reason)
    assert (a.seconds, a.spent, a.notes, list(a.arrays)) == (b.seconds, b.spent, b.notes, list(b.arrays))
    for name, array in b.arrays.items():
        assert (a.arrays[name].dims, a.arrays[name].error) == (array.dims, array.error)
        np.testing.assert_array_equal(a.arrays[name].values, array.values, strict=True)


@pytest.fixture
def store(tmp_path: Path) -> PieceStore:
    return PieceStore(tmp_path / "out" / "r.h5", "landscape")


def test_a_piece_comes_back_as_it_was_put(store: PieceStore) -> None:
    assert store.get(piece(1).key) is None
    store.put(piece(1))
    assert_same(store.get(piece(1).key), piece(1))
    assert store.get(piece(1).key) is not None
    assert store.get("another") is None
    assert list(store.pieces()) == [piece(1).key]


def test_a_failed_piece_without_arrays_comes_back(store: PieceStore) -> None:
    failed = Piece("k", {"run": "a"}, status=FAILED, reason="NaN in conv1.weight\0")
    store.put(failed)
    assert_same(store.get("k"), failed)


def test_pieces_of_one_report_and_two_analyzers_stay_apart(tmp_path: Path) -> None:
    one, other = (PieceStore(tmp_path / "r.h5", name) for name in ("hessian", "landscape"))
    one.put(piece(1))
    assert other.get(piece(1).key) is None
    one.clear([piece(1).key])
    other.put(piece(1))
    assert other.get(piece(1).key) is not None
    assert one.get(piece(1).key) is None


@pytest.mark.parametrize("damage", ["half", "empty", "zeros", "flipped"])
def test_a_damaged_piece_counts_as_absent_is_reported_and_can_be_put_again(
    store: PieceStore, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store.put(piece(1))
    (path,) = store.folder.glob("*.h5")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    kinds = {"half": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}
    path.write_bytes(kinds.get(damage, content))
    with caplog.at_level(logging.WARNING, "dynprobe"):
        assert store.get(piece(1).key) is None
        assert store.pieces() == {}
    assert path.name in caplog.text
    assert "measured again" in caplog.text
    store.put(piece(1))
    assert_same(store.get(piece(1).key), piece(1))


def test_a_flipped_bit_anywhere_never_gives_a_wrong_number(store: PieceStore) -> None:
    store.put(piece(1))
    (path,) = store.folder.glob("*.h5")
    good = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(good), 100):
        bad = bytearray(good)
        bad[place] ^= 0x04
        path.write_bytes(bad)
        found = store.get(piece(1).key)
        if found is not None:  # a bit of the superblock, which is restored
            assert_same(found, piece(1))


def test_parts_survive_until_their_piece_is_put(store: PieceStore) -> None:
    part = store.partial(piece(1).key)
    assert part.get("row 3") is None
    part.put("row 3", {"loss": np.array([1.0, np.nan]), "file": np.arange(3), "name": np.array(["a"])})
    again = PieceStore(store.folder.parent.with_name("r.h5"), "landscape").partial(piece(1).key)
    row = again.get("row 3")
    assert row is not None
    np.testing.assert_array_equal(row["loss"], [1.0, np.nan])
    assert (row["file"].tolist(), row["name"].tolist()) == ([0, 1, 2], ["a"])
    assert store.partial("another").get("row 3") is None
    store.put(piece(1))
    assert part.get("row 3") is None
    assert not list(store.folder.glob("*.parts"))


@pytest.mark.parametrize("size", [0.0, 0.5, 0.99])
def test_a_truncated_part_counts_as_absent(
    store: PieceStore, caplog: pytest.LogCaptureFixture, size: float
) -> None:
    part = store.partial("k")
    part.put("row", {"loss": np.arange(100.0)})
    (path,) = part.folder.iterdir()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * size)])
    assert part.get("row") is None
    assert "damaged" in caplog.text


def test_a_flipped_bit_in_a_part_never_gives_a_wrong_number(store: PieceStore) -> None:
    part = store.partial("k")
    part.put("row", {"loss": np.arange(20.0)})
    (path,) = part.folder.iterdir()
    good = path.read_bytes()
    for place in range(0, len(good), 5):
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bad)
        found = part.get("row")
        assert found is None or set(found) != {"loss"} or found["loss"].tolist() == list(range(20))


def test_clear_leaves_no_folder_behind_and_other_pieces_alone(store: PieceStore) -> None:
    for i in range(3):
        store.put(piece(i))
    store.partial("unfinished").put("row", {"loss": np.zeros(2)})
    store.clear([piece(0).key])
    assert sorted(store.pieces()) == [piece(1).key, piece(2).key]
    assert store.partial("unfinished").get("row") is not None
    store.clear([piece(1).key, piece(2).key, "unfinished"])
    assert not store.folder.parent.exists()


def test_a_full_disk_keeps_the_pieces_that_are_there(
    store: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(piece(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(CannotWrite, match="disk is full"):
        store.put(piece(2))
    with pytest.raises(CannotWrite, match="disk is full"):
        store.partial("k").put("row", {"loss": np.zeros(2)})
    assert list(store.pieces()) == [piece(1).key]
    assert not [p for p in store.folder.rglob("*") if p.name.endswith(".tmp")]


WORKER = """
import sys
from pathlib import Path
import numpy as np
from dynprobe.analyzers.core.result import Array, Piece, stack
from dynprobe.io.report import PieceStore, write_result
assert "torch" not in sys.modules
report, total = Path(sys.argv[1]), int(sys.argv[2])
store = PieceStore(report, "landscape")
print("ready", flush=True)
for i in range(total):
    if store.get(str(i)) is None:
        for row in range(3):
            store.partial(str(i)).put(str(row), {"loss": np.full(50, float(i))})
        loss = Array(("y", "x"), np.full((50, 50), float(i)))
        store.put(Piece(str(i), {"run": "a", "step": i}, {"loss": loss}))
        print("piece", i, flush=True)
    elif i < total - 1:
        continue
    if i % 4 == 3 or i == total - 1:
        pieces = sorted(store.pieces().values(), key=lambda p: p.index["step"])
        write_result(report, stack("landscape", "checkpoint", pieces, {}))
        print("report", len(pieces), flush=True)
print("done", flush=True)
"""


def test_killed_at_any_moment_nothing_finished_is_lost_and_a_second_call_resumes(tmp_path: Path) -> None:
    report, total = tmp_path / "r.h5", 4000
    rng = random.Random(0)
    acknowledged: set[int] = set()
    stacked = 0
    for _ in range(15):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, str(report), str(total)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            lines = [process.stdout.readline() for _ in range(rng.randrange(4))]
            time.sleep(rng.uniform(0.0, 0.05))
            process.kill()
            lines += process.stdout.readlines()
        finished = [line.split() for line in lines if line.endswith("\n")]
        new = {int(number) for kind, number in finished if kind == "piece"}
        assert not new & acknowledged, "measured again what was finished"
        acknowledged |= new
        stacked = max([stacked, *(int(number) for kind, number in finished if kind == "report")])
        store = PieceStore(report, "landscape")
        for i in sorted(acknowledged)[-30:]:
            found = store.get(str(i))
            assert found is not None
            assert (found.arrays["loss"].values == i).all()
        if stacked:
            whole = read_report(report)["landscape"]
            assert whole.n_pieces >= stacked
            assert (whole["loss"] == np.arange(whole.n_pieces)[:, None, None]).all()
    assert len(acknowledged) > 15
    assert stacked > 0
    end = str(max(acknowledged) + 2)
    last = subprocess.run([sys.executable, "-c", WORKER, str(report), end], capture_output=True, text=True)
    assert last.stdout.endswith("done\n")
    assert read_report(report)["landscape"].n_pieces == int(end)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    assert list(store.folder.rglob("*.tmp")) == []


def test_many_processes_put_pieces_side_by_side(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dynprobe.analyzers.core.result import Piece\n"
        "from dynprobe.io.report import PieceStore\n"
        "store = PieceStore(Path(sys.argv[1]), 'a')\n"
        "for i in range(20): store.put(Piece(f'{int(sys.argv[2]) % 2} {i}', {'run': 'a', 'step': i}))"
    )
    report = tmp_path / "r.h5"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(report), str(w)]) for w in range(4)]
    assert [w.wait() for w in workers] == [0] * 4
    assert set(PieceStore(report, "a").pieces()) == {f"{w} {i}" for w in (0, 1) for i in range(20)}
