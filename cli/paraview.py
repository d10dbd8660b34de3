"""Landscapes and trajectories as VTK XML files (.vts, .vtp) for ParaView; numpy and the standard library."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from dynprobe.analyzers.core.result import FAILED, Result
from dynprobe.cli.figure_panels import number_or_nan, require
from dynprobe.io.atomic import write_atomically
from dynprobe.io.errors import InputError

SUFFIXES = (".vts", ".vtp")
HIDDEN_POINT = 2
"""Bit of `vtkGhostType` by which VTK leaves a point, and the cells around it, out of the picture."""

_TYPES = {"<f8": "Float64", "<f4": "Float32", "<i8": "Int64", "|u1": "UInt8"}


def write_paraview(result: Result, path: Path, *, variable: str = "loss", log: bool = True) -> list[Path]:
    """Write surfaces, one file a checkpoint, or a trajectory as poly-lines.

    A surface is `z(x, y)` with every variable over the same grid as point data. Where the value is not
    finite (or not positive, with `log`), z is put at the top, `finite` is 0 and the point is hidden; a
    `.vtp` leaves those cells out. Several checkpoints get `NAME_STEP.vts` each and a `NAME.pvd` that
    plays them over the steps. A result with `coordinate (checkpoint, component)` becomes poly-lines.

    Args:
        result: A landscape over two directions, or a trajectory.
        path: `NAME.vts` (structured grid) or `NAME.vtp` (polygons, poly-lines).
        variable: What is drawn as height.
        log: Whether the height is the decimal logarithm.

    Returns:
        The files written.

    Raises:
        InputError: If the suffix is not known or the result is neither a landscape nor a trajectory.
        CannotWrite: If a file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path}: ParaView files are {' (surfaces) or '.join(SUFFIXES)} (surfaces, trajectories)",
            tip=f"Try {path.with_suffix('.vtp')}",
        )
    if "coordinate" in result:
        return _write_trajectory(result, path, variable, log=log)
    require(result, variable)
    if result.arrays[variable].dims[-2:] != ("y", "x"):
        raise InputError(
            f"{result.analyzer}: {variable} has dimensions {result.arrays[variable].dims}; "
            "ParaView needs a surface over (y, x)",
            tip="Measure a landscape with --dims 2.",
        )
    pieces = [i for i in range(result.n_pieces) if np.atleast_1d(result["status"])[i] != FAILED]
    pieces = [i for i in pieces if np.isfinite(_plane(result, variable, i)).any()]
    if not pieces:
        raise InputError(f"{result.analyzer}: {variable} has no finite value in any piece; nothing to write")
    files = [path] if len(pieces) == 1 else [_numbered(result, path, i) for i in pieces]
    for piece, file in zip(pieces, files, strict=True):
        write_atomically(file, _surface(result, piece, variable, log=log, polygons=path.suffix.lower() == ".vtp").encode())
    if len(pieces) > 1:
        times = [_step(result, i) for i in pieces]
        times = times if len(set(times)) == len(times) else [float(i) for i in range(len(times))]
        index = path.with_suffix(".pvd")
        write_atomically(index, _collection([f.name for f in files], times).encode())
        files = [*files, index]
    return files


def _plane(result: Result, name: str, piece: int) -> np.ndarray:
    """One variable of one piece over (y, x); further dimensions (direction seeds) averaged."""
    values = result[name].astype(float)
    if result.lead and result.arrays[name].dims[0] == result.lead:
        values = values[piece]
    return np.asarray(values.mean(axis=tuple(range(values.ndim - 2))))


def _step(result: Result, piece: int) -> float:
    step = number_or_nan(np.atleast_1d(result["step"])[piece]) if "step" in result else np.nan
    return step if np.isfinite(step) else float(piece)


def _numbered(result: Result, path: Path, piece: int) -> Path:
    run = str(np.atleast_1d(result["run"])[piece]) if "run" in result else ""
    several = "run" in result and len(set(np.atleast_1d(result["run"]).tolist())) > 1
    label = "".join(c if c.isalnum() or c in "-." else "_" for c in run) + "_" if several else ""
    step = _step(result, piece)
    text = f"{int(step):08d}" if step == int(step) else f"{step:g}"
    return path.with_name(f"{path.stem}_{label}{text}{path.suffix}")


def _heights(values: np.ndarray, *, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Heights of all points, and where it is a real one; the others are put at the top."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log10(values) if log else values.copy()
    finite = np.isfinite(z)
    z[~finite] = z[finite].max() if finite.any() else 0.0
    return z, finite


def _surface(result: Result, piece: int, variable: str, *, log: bool, polygons: bool) -> str:
    x, y = result["x"].astype(float), result["y"].astype(float)
    z, finite = _heights(_plane(result, variable, piece), log=log)
    grid_x, grid_y = np.meshgrid(x, y)
    points = np.stack([grid_x, grid_y, z], axis=-1).reshape(-1, 3)  # x runs fastest, as VTK wants
    data = {
        n: _plane(result, n, piece).ravel()
        for n, a in result.variables.items()
        if a.dims[-2:] == ("y", "x") and a.values.dtype.kind in "iuf"
    }
    data["finite"] = finite.ravel().astype(np.uint8)
    step = _array("TimeValue", np.array([_step(result, piece)]), tuples=1)
    field = f"<FieldData>{step}</FieldData>"
    if polygons:
        cells = _quads(len(x), len(y))
        cells = cells[finite.ravel()[cells].all(axis=1)]
        return _poly_data(points, data, list(cells), "Polys", field)
    data["vtkGhostType"] = np.where(finite.ravel(), 0, HIDDEN_POINT).astype(np.uint8)
    extent = f"0 {len(x) - 1} 0 {len(y) - 1} 0 0"
    body = (
        f'<StructuredGrid WholeExtent="{extent}">{field}<Piece Extent="{extent}">\n'
        f"{_point_data(data, variable)}<Points>{_array('Points', points)}</Points></Piece></StructuredGrid>"
    )
    return _document("StructuredGrid", body)


def _quads(n_x: int, n_y: int) -> np.ndarray:
    """Corners of the cells of a grid, counter-clockwise, `((n_y - 1)(n_x - 1), 4)`."""
    corner = (np.arange(n_y - 1)[:, None] * n_x + np.arange(n_x - 1)).reshape(-1, 1)
    return np.asarray(corner + [0, 1, n_x + 1, n_x])


def _write_trajectory(result: Result, path: Path, variable: str, *, log: bool) -> list[Path]:
    if path.suffix.lower() != ".vtp":
        raise InputError(f"{path}: a trajectory is a poly-line", tip=f"Try {path.with_suffix('.vtp')}")
    array = result.arrays["coordinate"]
    if array.dims[-2:] != ("checkpoint", "component") or array.values.ndim != 2 or array.values.shape[1] < 2:
        raise InputError(f"{result.analyzer}: coordinate has dimensions {array.dims}, not two components")
    plane = array.values[:, :2].astype(float)
    data = {
        n: a.values.astype(float)
        for n, a in result.arrays.items()
        if a.dims == ("checkpoint",) and a.values.dtype.kind in "iuf"
    }
    # Height on the plane's own surface where known: the true loss of an off-plane point floats above it.
    height = next((data[n] for n in (f"plane_{variable}", variable) if n in data), None)
    z, known = _heights(np.ones(len(plane)) if height is None else height, log=log)
    data["finite"] = known.astype(np.uint8)
    runs = next((result[n] for n in ("checkpoint_run", "run") if n in result), np.array([]))
    names = runs if runs.shape == (len(plane),) else np.full(len(plane), "")
    lines = [np.flatnonzero(names == run) for run in dict.fromkeys(names.tolist())]
    drawable = np.isfinite(plane).all(axis=1)
    lines = [line[drawable[line]] for line in lines]
    points = np.column_stack([np.nan_to_num(plane), z])
    write_atomically(path, _poly_data(points, data, [line for line in lines if len(line) > 1], "Lines", "", "loss").encode())
    return [path]


def _poly_data(
    points: np.ndarray,
    data: Mapping[str, np.ndarray],
    cells: list[np.ndarray],
    kind: str,
    field: str,
    active: str = "loss",
) -> str:
    connectivity = np.concatenate(cells) if cells else np.zeros(0)
    ends = np.cumsum([len(c) for c in cells])
    topology = _array("connectivity", connectivity.astype(np.int64)) + _array(
        "offsets", ends.astype(np.int64)
    )
    body = (
        f'<PolyData>{field}<Piece NumberOfPoints="{len(points)}" NumberOf{kind}="{len(cells)}">\n'
        f"{_point_data(data, active)}<Points>{_array('Points', points)}</Points>"
        f"<{kind}>{topology}</{kind}></Piece></PolyData>"
    )
    return _document("PolyData", body)


def _point_data(data: Mapping[str, np.ndarray], active: str) -> str:
    chosen = f" Scalars={quoteattr(active)}" if active in data else ""
    return f"<PointData{chosen}>{''.join(_array(n, v) for n, v in data.items())}</PointData>\n"


def _array(name: str, values: np.ndarray, tuples: int = 0) -> str:
    """One array in VTK's inline binary form: its size in bytes, then its bytes, in base64."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    content = base64.b64encode(struct.pack("<Q", values.nbytes) + values.tobytes()).decode()
    width = values.shape[1] if values.ndim == 2 else 1
    count = f' NumberOfTuples="{tuples}"' if tuples else ""
    return (
        f'<DataArray type="{_TYPES[values.dtype.str]}" Name={quoteattr(name)} '
        f'NumberOfComponents="{width}"{count} format="binary">{content}</DataArray>\n'
    )


def _document(kind: str, body: str) -> str:
    how = 'version="1.0" byte_order="LittleEndian" header_type="UInt64"'
    return f'<?xml version="1.0"?>\n<VTKFile type="{kind}" {how}>\n{body}\n</VTKFile>\n'


def _collection(names: list[str], times: list[float]) -> str:
    entries = "".join(
        f'<DataSet timestep="{time:g}" part="0" file={quoteattr(name)}/>\n'
        for name, time in zip(names, times, strict=True)
    )
    body = f"<Collection>\n{entries}</Collection>"
    return f'<?xml version="1.0"?>\n<VTKFile type="Collection" version="0.1">{body}</VTKFile>\n'
