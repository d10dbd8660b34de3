"""The report on disk: what goes in comes out, other programs read it, a write is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dynprobe.analyzers.core.result import FAILED, Array, Piece, Result, stack
from dynprobe.io import atomic, hdf5
from dynprobe.io.errors import CannotWrite, DamagedReport, InputError
from dynprobe.io.report import read_report, result_pieces, write_result, write_results
from dynprobe.io.sealed import image


def surface(step: int, scale: float = 1.0) -> Piece:
    x, y = np.linspace(-1, 1, 5), np.linspace(-1, 1, 3)
    loss = scale * (x**2 + y[:, None] ** 2) + step
    loss[0, 0], loss[0, 1], loss[0, 2] = np.nan, np.inf, -np.inf
    return Piece(
        f"key{step}",
        {"run": "runs/a", "step": step, "path": f"runs/a/{step}.pt"},
        {
            "x": Array(("x",), x, "1", "along the first direction"),
            "y": Array(("y",), y),
            "loss": Array(("y", "x"), loss, "nat", "loss", error="loss_stderr"),
            "loss_stderr": Array(("y", "x"), np.full((3, 5), 0.1), "nat", "standard error"),
            "eigenvalue": Array(("rank",), np.array([2.0, 1.0]) * step),
            "layer": Array(("layer",), np.array(["conv", "größe"], dtype=object)),
            "norm": Array(("layer",), np.array([0.5, 0.25], dtype=np.float32)),
            "trace": Array((), np.array(3.5)),
            "dead": Array(("layer",), np.array([True, False])),
        },
        seconds=0.5,
        spent={"forwards": 15},
        notes=("prefix 'module.' stripped",),
    )


def result(name: str = "landscape", scale: float = 1.0) -> Result:
    bad = Piece("", {"run": "runs/a", "step": 30, "path": "runs/a/30.pt"}, status=FAILED, reason="truncated")
    attributes = {
        "options": {"resolution": 5, "span": 1.0, "directions": None},
        "seed": 0,
        "command": f"dynprobe {name} runs/a",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return stack(name, "checkpoint", [surface(0, scale), surface(10, scale), bad], attributes)


def assert_same(a: Result, b: Result) -> None:
    assert (a.analyzer, a.grain, a.attributes) == (b.analyzer, b.grain, b.attributes)
    assert list(a.arrays) == list(b.arrays)
    for name, array in a.arrays.items():
        other = b.arrays[name]
        about = (array.dims, array.units, array.long_name, array.error)
        assert about == (other.dims, other.units, other.long_name, other.error)
        np.testing.assert_array_equal(array.values, other.values)


def test_a_report_reads_back_as_it_was_written_with_nan_and_infinities(tmp_path: Path) -> None:
    write_result(tmp_path / "r.h5", result())
    assert_same(read_report(tmp_path / "r.h5")["landscape"], result())


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        write_result(tmp_path / name, result())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_xarray_opens_the_report_as_a_tree_with_named_dimensions_and_coordinates(tmp_path: Path) -> None:
    write_results(tmp_path / "r.h5", {n: result(n) for n in ("landscape", "gradient-covariance")})
    with xarray.open_datatree(tmp_path / "r.h5", engine="h5netcdf") as tree:
        assert set(tree.children) == {"landscape", "gradient-covariance"}
        assert tree.attrs["Conventions"].startswith("CF-")
        assert json.loads(tree.attrs["provenance"])["seed"] == 0
        assert not [d for d in tree["landscape"].dims if d.startswith("phony")]
    with xarray.open_dataset(tmp_path / "r.h5", group="landscape", engine="h5netcdf") as opened:
        assert opened.loss.dims == ("checkpoint", "y", "x")
        assert opened.loss.attrs == {
            "units": "nat",
            "long_name": "loss",
            "ancillary_variables": "loss_stderr",
        }
        assert {"step", "path", "status", "reason", "seconds", "x", "y", "layer"} <= set(opened.coords)
        assert opened.path.values[1] == "runs/a/10.pt"
        assert opened.layer.values.tolist() == ["conv", "größe"]
        middle = opened.loss.isel(checkpoint=1).sel(x=0, y=0)
        assert middle == 10
        assert np.isposinf(opened.loss.values[0, 0, 1])
        assert np.isneginf(opened.loss.values[0, 0, 2])
        assert np.isnan(opened.loss.values[2]).all()


def test_every_dimension_without_labels_gets_an_integer_scale(tmp_path: Path) -> None:
    write_result(tmp_path / "r.h5", result())
    with h5py.File(tmp_path / "r.h5") as file:
        group = file["landscape"]
        assert group["rank"][()].tolist() == [0, 1]
        assert all(len(group[n].dims[i]) == 1 for n in ("loss", "eigenvalue") for i in (0, 1))


def test_no_truth_value_or_newer_layout_gets_into_the_file(tmp_path: Path) -> None:
    write_result(tmp_path / "r.h5", result())
    kinds = set()
    with h5py.File(tmp_path / "r.h5") as file:
        file.visititems(
            lambda _, item: kinds.add(item.dtype.kind) if isinstance(item, h5py.Dataset) else None
        )
        assert file["landscape/loss"].fletcher32
        assert file["landscape/loss"].shuffle
        assert file["landscape/loss"].compression == "gzip"
    assert kinds <= set("ifO")
    assert (tmp_path / "r.h5").read_bytes()[8] == 3  # superblock of HDF5 1.10


def test_complex_values_are_refused_as_netcdf_readers_would_drop_them() -> None:
    with pytest.raises(ValueError, match="complex"):
        hdf5.storable(np.array([1j]))


def test_a_variable_named_like_a_foreign_dimension_stays_apart_from_it(tmp_path: Path) -> None:
    arrays = dict(result().arrays)
    arrays["break_even"] = Array(("run",), np.array([1.0, 2.0]))  # "run" also labels the checkpoints
    both = Result("landscape", "checkpoint", arrays, result().attributes)
    write_result(tmp_path / "r.h5", both)
    assert_same(read_report(tmp_path / "r.h5")["landscape"], both)
    with xarray.open_dataset(tmp_path / "r.h5", group="landscape", engine="h5netcdf") as opened:
        assert opened.run.dims == ("checkpoint",)
        assert opened.break_even.dims == ("run",)


def test_undecodable_paths_and_nul_in_a_reason_are_stored_escaped(tmp_path: Path) -> None:
    piece = Piece("k", {"run": "a", "path": "a/\udcff.pt"}, status=FAILED, reason="bad\0byte")
    write_result(tmp_path / "r.h5", stack("norm", "checkpoint", [piece], {}))
    back = read_report(tmp_path / "r.h5")["norm"]
    assert (back["path"][0], back["reason"][0]) == (r"a/\udcff.pt", r"bad\x00byte")


DTYPES = st.sampled_from(["<f8", "<f4", "<f2", ">f8", "<i8", "<i4", "|i1", "<u2", "?"])
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_array_survives_the_round_trip(tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    values = data.draw(DTYPES.flatmap(lambda d: hnp.arrays(d, shape)))
    text = np.array(data.draw(st.lists(TEXT, min_size=2, max_size=2)), dtype=object)
    dims = tuple(f"d{i}" for i in range(values.ndim))
    arrays = {"v": Array(dims, values, "m"), "t": Array(("n",), text), "s": Array((), text[:1].reshape(()))}
    whole = Result("a", "group", {**arrays, "status": Array((), np.array("ok", dtype=object))}, {})
    write_result(tmp_path / "any.h5", whole)
    back = read_report(tmp_path / "any.h5")["a"]
    assert_same(back, Result("a", "group", whole.arrays, {}))


def test_other_groups_even_foreign_ones_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    write_result(path, result("hessian"))
    note = xarray.Dataset(
        {"note": ("place", [1.0, 2.0], {"units": "m"})}, coords={"place": ["here", "there"]}
    )
    note.to_netcdf(path, mode="a", group="mine", engine="h5netcdf")
    write_result(path, result("landscape"))
    write_result(path, result("landscape", scale=2.0))
    assert_same(read_report(path)["hessian"], result("hessian"))
    assert_same(read_report(path)["landscape"], result("landscape", scale=2.0))
    with xarray.open_dataset(path, group="mine", engine="h5netcdf") as kept:
        xarray.testing.assert_identical(kept.load(), note)


def test_a_rewritten_report_does_not_grow(tmp_path: Path) -> None:
    write_result(tmp_path / "r.h5", result("hessian"))
    write_result(tmp_path / "r.h5", result())
    size = (tmp_path / "r.h5").stat().st_size
    for _ in range(3):
        write_result(tmp_path / "r.h5", result())
    assert (tmp_path / "r.h5").stat().st_size == size


@pytest.mark.parametrize("content", [b"my thesis", b""], ids=["text", "empty"])
def test_a_file_that_is_no_report_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(CannotWrite, match="not a dynprobe report"):
        write_result(path, result())
    assert path.read_bytes() == content


def test_a_foreign_hdf5_file_is_never_overwritten_and_not_read_as_a_report(tmp_path: Path) -> None:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["data"] = [1, 2, 3]
    with pytest.raises(CannotWrite, match="not a dynprobe report"):
        write_result(path, result())
    with pytest.raises(InputError, match="not a dynprobe report"):
        read_report(path)
    with h5py.File(path) as file:
        assert file["data"][()].tolist() == [1, 2, 3]


def test_a_folder_in_the_place_of_the_report_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="not a file"):
        write_result(tmp_path, result())


def test_a_missing_report_and_one_that_may_not_be_read_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_report(tmp_path / "none.h5")
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    write_result(path, result())
    good = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(good), 60):
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(InputError):
            read_report(path)


def test_a_truncated_report_is_damaged_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    write_result(path, result())
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    with pytest.raises(DamagedReport, match=r"r\.h5"):
        read_report(path)
    with pytest.raises(DamagedReport) as caught:
        write_result(path, result())
    assert "kept" in caught.value.tip
    assert path.read_bytes() == half


def test_a_value_changed_by_another_program_does_not_match_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    write_results(path, {"landscape": result(), "hessian": result("hessian")})
    with h5py.File(path, "r+") as file:
        file["landscape/trace"][0] = 99.0
        file["mine"] = np.arange(10_000)  # the file grows over the seal
    with pytest.raises(DamagedReport, match="landscape does not match its checksum"):
        read_report(path)
    assert list(read_report(path, only=["hessian"])) == ["hessian"]


def test_a_newer_layout_is_refused_with_advice(tmp_path: Path) -> None:
    def newer(file: h5py.File) -> None:
        file.attrs["dynprobe_layout"] = 99

    (tmp_path / "r.h5").write_bytes(image(newer))
    with pytest.raises(InputError, match="newer dynprobe"):
        read_report(tmp_path / "r.h5")


def test_a_second_call_finds_the_finished_pieces_in_the_report_and_not_the_failed_one(tmp_path: Path) -> None:
    assert result_pieces(tmp_path / "r.h5", "landscape") == {}
    write_result(tmp_path / "r.h5", result())
    found = result_pieces(tmp_path / "r.h5", "landscape")
    assert list(found) == ["key0", "key10"]
    np.testing.assert_array_equal(found["key10"].arrays["loss"].values, surface(10).arrays["loss"].values)
    assert found["key10"].index == surface(10).index
    assert result_pieces(tmp_path / "r.h5", "hessian") == {}


def test_a_report_that_another_process_reads_can_be_replaced_and_read(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    write_result(path, result())
    with h5py.File(path, "r") as reader:
        before = reader["landscape/loss"][()]
        write_result(path, result(scale=3.0))
        np.testing.assert_array_equal(reader["landscape/loss"][()], before)
    assert_same(read_report(path)["landscape"], result(scale=3.0))


def test_a_report_that_another_process_has_locked_for_writing_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    write_result(path, result())
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert_same(read_report(path)["landscape"], result())
        holder.kill()
        holder.communicate()
    with pytest.raises(OSError, match="open for write"):  # HDF5 itself refuses the file from now on
        h5py.File(path, "r")
    write_result(path, result("hessian"))
    assert_same(read_report(path)["landscape"], result())
    with h5py.File(path, "r") as file:
        assert set(file) == {"landscape", "hessian"}


def test_writers_of_different_analyzers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    names = [f"analyzer{i}" for i in range(4)]
    threads = [threading.Thread(target=write_result, args=(path, result(n))) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    missing = set(names) - set(read_report(path))
    for name in missing:  # the last instant before a rename is not guarded: pieces are what guards it
        write_result(path, result(name))
    assert set(read_report(path)) == set(names)
    assert len(missing) <= 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failed_write_leaves_the_old_report_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "r.h5"
    write_result(path, result())
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(CannotWrite, match=r"r\.h5: cannot be written") as caught:
        write_result(path, result(scale=2.0))
    assert "run the same command again" in caught.value.tip
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.h5"]


def test_a_real_limit_of_the_file_size_is_explained(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from dynprobe.analyzers.core.result import Piece, stack
from dynprobe.io.errors import CannotWrite
from dynprobe.io.report import write_result
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    write_result(Path(sys.argv[1]), stack("norm", "checkpoint", [Piece("k", {"run": "a"})], {}))
except CannotWrite as error:
    print(error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.h5")], capture_output=True, text=True, check=True
    )
    assert "allowed file size" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="is a file, not a folder"):
        write_result(tmp_path / "file" / "r.h5", result())


def test_missing_folders_are_made_and_a_link_is_followed(tmp_path: Path) -> None:
    write_result(tmp_path / "new" / "folder" / "r.h5", result())
    link = tmp_path / "link.h5"
    link.symlink_to(tmp_path / "new" / "folder" / "r.h5")
    write_result(link, result(scale=2.0))
    assert link.is_symlink()
    assert_same(read_report(tmp_path / "new" / "folder" / "r.h5")["landscape"], result(scale=2.0))


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = atomic._HOST
    gone = tmp_path / f".r.h5.{host}-{dead.pid}-0.tmp"
    old = tmp_path / ".r.h5.elsewhere-1-0.tmp"
    stay = [
        tmp_path / f".r.h5.{host}-{os.getpid()}-999.tmp",
        tmp_path / ".r.h5.elsewhere-2-0.tmp",
        tmp_path / f".other.h5.{host}-{dead.pid}-0.tmp",
        tmp_path / ".mine.tmp",
    ]
    for path in (gone, old, *stay):
        path.write_text("")
    os.utime(old, (0, 0))
    write_result(tmp_path / "r.h5", result())
    assert sorted(tmp_path.iterdir()) == sorted([*stay, tmp_path / "r.h5"])


def test_the_permissions_of_the_report_are_kept(tmp_path: Path) -> None:
    write_result(tmp_path / "r.h5", result())
    (tmp_path / "r.h5").chmod(0o640)
    write_result(tmp_path / "r.h5", result())
    assert (tmp_path / "r.h5").stat().st_mode & 0o777 == 0o640
