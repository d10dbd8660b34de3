"""Claims about ParaView files, checked by decoding them as VTK's format says."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from figure_samples import bowl, cut, landscape

from dynprobe.analyzers.core.result import Array, Piece, Result, stack
from dynprobe.cli.paraview import write_paraview
from dynprobe.io.errors import CannotWrite, InputError

DTYPES = {"Float64": "<f8", "Int64": "<i8", "UInt8": "|u1"}


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Every array of a file by name: an unsigned 64-bit size, then the bytes, in base64."""
    root = ET.parse(path).getroot()
    assert (root.get("byte_order"), root.get("header_type")) == ("LittleEndian", "UInt64")
    arrays = {}
    for element in root.iter("DataArray"):
        content = base64.b64decode(element.text or "")
        assert int.from_bytes(content[:8], "little") == len(content) - 8
        values = np.frombuffer(content[8:], DTYPES[element.get("type") or ""])
        width = int(element.get("NumberOfComponents") or 1)
        arrays[element.get("Name") or ""] = values.reshape(-1, width) if width > 1 else values
    return arrays


def test_a_structured_grid_has_x_fastest_and_the_log_loss_as_height(tmp_path: Path) -> None:
    result = landscape(shape=(7, 11))
    (path,) = write_paraview(result, tmp_path / "a.vts")
    arrays = decoded(path)
    points = arrays["Points"].reshape(7, 11, 3)
    np.testing.assert_array_equal(points[3, :, 0], result["x"])
    np.testing.assert_array_equal(points[:, 4, 1], result["y"])
    np.testing.assert_array_equal(points[..., 2], np.log10(result["loss"][0]))
    root = ET.parse(path).getroot()
    assert root[0].get("WholeExtent") == "0 10 0 6 0 0"
    assert arrays["TimeValue"].tolist() == [1000.0]


def test_every_variable_on_the_grid_is_point_data(tmp_path: Path) -> None:
    result = landscape(test=True)
    (path,) = write_paraview(result, tmp_path / "a.vts", log=False)
    arrays = decoded(path)
    for name in ("loss", "loss_stderr", "accuracy", "test_loss"):
        np.testing.assert_array_equal(arrays[name], result[name].ravel())
    np.testing.assert_array_equal(arrays["Points"][:, 2], result["loss"].ravel())


def broken(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
    z = bowl(x, y, step)
    z[0, 0], z[-1, -1], z[3, 3] = np.nan, np.inf, 0.0
    return z


def test_points_that_are_not_finite_are_hidden_and_keep_their_value_as_data(tmp_path: Path) -> None:
    (path,) = write_paraview(landscape(shape=(7, 7), height=broken), tmp_path / "a.vts")
    arrays = decoded(path)
    hidden = np.flatnonzero(arrays["vtkGhostType"] == 2)
    assert hidden.tolist() == [0, 3 * 7 + 3, 48]
    assert np.all(np.isfinite(arrays["Points"]))
    assert np.isnan(arrays["loss"][0])
    assert np.isposinf(arrays["loss"][48])
    np.testing.assert_array_equal(arrays["finite"] == 0, arrays["vtkGhostType"] == 2)


def test_polygons_leave_out_cells_with_a_bad_corner(tmp_path: Path) -> None:
    (path,) = write_paraview(landscape(shape=(7, 7), height=broken), tmp_path / "a.vtp")
    arrays = decoded(path)
    cells = arrays["connectivity"].reshape(-1, 4)
    assert len(cells) == 36 - 1 - 1 - 4
    assert arrays["offsets"].tolist() == list(range(4, 4 * len(cells) + 1, 4))
    assert np.all(arrays["finite"][cells] == 1)
    corners = arrays["Points"][cells][..., :2]
    sides = np.roll(corners, -1, axis=1) - corners
    turns = (
        sides[..., 0] * np.roll(sides, -1, axis=1)[..., 1]
        - sides[..., 1] * np.roll(sides, -1, axis=1)[..., 0]
    )
    assert np.all(turns > 0)


def test_several_checkpoints_get_a_file_each_and_one_that_plays_them(tmp_path: Path) -> None:
    files = write_paraview(landscape((0, 10, 1000), failed=(10,)), tmp_path / "a.vts")
    assert [f.name for f in files] == ["a_00000000.vts", "a_00001000.vts", "a.pvd"]
    entries = [(e.get("timestep"), e.get("file")) for e in ET.parse(files[-1]).getroot().iter("DataSet")]
    assert entries == [("0", "a_00000000.vts"), ("1000", "a_00001000.vts")]
    np.testing.assert_array_equal(decoded(files[1])["loss"], landscape((1000,))["loss"].ravel())


def test_equal_steps_of_two_runs_do_not_overwrite_each_other(tmp_path: Path) -> None:
    files = write_paraview(landscape((0, 1000), runs=("a b", "c")), tmp_path / "s.vtp")
    assert [f.name for f in files[:-1]] == [
        f"s_{run}_{step:08d}.vtp" for run in ("a_b", "c") for step in (0, 1000)
    ]
    assert len(write_paraview(landscape((5, 5)), tmp_path / "t.vtp")) == 3


def trajectory() -> Result:
    steps = np.array([0, 1, 2, 0, 1], dtype=float)
    arrays = {
        "coordinate": Array(("checkpoint", "component"), np.arange(10, dtype=float).reshape(5, 2)),
        "plane_loss": Array(("checkpoint",), np.array([10.0, 1.0, 0.1, 10.0, 1.0])),
        "loss": Array(("checkpoint",), np.full(5, 7.0)),
        "step": Array(("checkpoint",), steps),
        "checkpoint_run": Array(("checkpoint",), np.array(["a", "a", "a", "b", "b"], dtype=object)),
    }
    return stack("trajectory", "run", [Piece("k", {"run": "a"}, arrays)], {})


def test_a_trajectory_is_a_poly_line_for_each_run_on_the_planes_own_surface(tmp_path: Path) -> None:
    (path,) = write_paraview(trajectory(), tmp_path / "t.vtp")
    arrays = decoded(path)
    assert arrays["connectivity"].tolist() == [0, 1, 2, 3, 4]
    assert arrays["offsets"].tolist() == [3, 5]
    np.testing.assert_allclose(arrays["Points"][:, 2], [1, 0, -1, 1, 0], atol=1e-12)
    assert arrays["step"].tolist() == [0, 1, 2, 0, 1]


def test_a_trajectory_cannot_be_a_grid(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="poly-line"):
        write_paraview(trajectory(), tmp_path / "t.vts")


def test_unknown_suffix_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.vts \(surfaces\) or \.vtp"):
        write_paraview(landscape(), tmp_path / "a.vtk")


def test_a_cut_is_no_surface_and_a_result_without_values_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="surface over y, x"):
        write_paraview(cut(), tmp_path / "a.vts")
    with pytest.raises(InputError, match="no variable 'missing'"):
        write_paraview(landscape(), tmp_path / "a.vts", variable="missing")
    with pytest.raises(InputError, match="the only piece failed"):
        write_paraview(landscape(failed=(1000,)), tmp_path / "a.vts")
    with pytest.raises(InputError, match="no value to draw"):
        write_paraview(landscape(height=lambda x, y, step: x * np.nan), tmp_path / "a.vts")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite):
        write_paraview(landscape(), tmp_path / "file" / "a.vts")


def test_same_result_gives_same_bytes(tmp_path: Path) -> None:
    write_paraview(landscape(), tmp_path / "a.vts")
    write_paraview(landscape(), tmp_path / "b.vts")
    assert (tmp_path / "a.vts").read_bytes() == (tmp_path / "b.vts").read_bytes()
