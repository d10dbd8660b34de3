"""Landscapes and trajectories as files for ParaView: .vts, .vtp, and a .pvd that plays several."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dynprobe.analyzers.core.result import FAILED, Result
from dynprobe.cli.figure_panels import number_or_nan, refuse_if_all_failed, require, several_runs
from dynprobe.cli.vtk_xml import collection, poly_data, structured_grid
from dynprobe.io.atomic import write_atomically
from dynprobe.io.errors import InputError

SUFFIXES = (".vts", ".vtp")
HIDDEN_POINT = 2
"""Bit of `vtkGhostType` by which VTK leaves a point, and the cells around it, out of the picture."""


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
            f"{path}: files for ParaView end in .vts (surfaces) or .vtp (surfaces, trajectories).",
            f"Try {path.with_suffix('.vtp').name}.",
        )
    refuse_if_all_failed(result)
    if "coordinate" in result:
        return _write_trajectory(result, path, variable, log=log)
    require(result, variable)
    if _inner(result, variable) != ("y", "x"):
        raise InputError(
            f"{result.analyzer}: {variable} has dimensions {', '.join(result.arrays[variable].dims)}; "
            "ParaView needs a surface over y, x.",
            "Measure a landscape with --dims 2.",
        )
    return _write_surfaces(result, path, variable, log=log)


def _write_surfaces(result: Result, path: Path, variable: str, *, log: bool) -> list[Path]:
    ok = np.atleast_1d(result["status"]) != FAILED
    planes = {i: _heights(_plane(result, variable, i), log=log) for i in np.flatnonzero(ok).tolist()}
    planes = {i: (z, finite) for i, (z, finite) in planes.items() if finite.any()}
    if not planes:
        raise InputError(f"{result.analyzer}: {variable} has no value to draw in any piece.")
    files = [path]
    if len(planes) > 1:
        files = [_numbered(result, path, i) for i in planes]
        if len(set(files)) < len(files):  # steps unknown or equal
            files = [path.with_stem(f"{path.stem}_{k:04d}") for k in range(len(files))]
    for file, (piece, (z, finite)) in zip(files, planes.items(), strict=True):
        write_atomically(file, _surface(result, piece, z, finite, variable, path.suffix.lower()).encode())
    if len(files) == 1:
        return files
    times = [_step(result, i) for i in planes]
    times = times if len(set(times)) == len(times) else [float(k) for k in range(len(times))]
    index = path.with_suffix(".pvd")
    write_atomically(index, collection([f.name for f in files], times).encode())
    return [*files, index]


def _surface(
    result: Result, piece: int, z: np.ndarray, finite: np.ndarray, variable: str, suffix: str
) -> str:
    """The document of one checkpoint."""
    x, y = result["x"].astype(float), result["y"].astype(float)
    grid_x, grid_y = np.meshgrid(x, y)
    points = np.stack([grid_x, grid_y, z], axis=-1).reshape(-1, 3)
    data = {
        n: _plane(result, n, piece).ravel()
        for n, a in result.variables.items()
        if _inner(result, n) == ("y", "x") and a.values.dtype.kind in "iuf"
    }
    known = finite.ravel()
    data["finite"] = known.astype(np.uint8)
    time = _step(result, piece)
    if suffix == ".vtp":
        cells = _quads(len(x), len(y))
        return poly_data("Polys", list(cells[known[cells].all(axis=1)]), points, data, variable, time)
    data["vtkGhostType"] = np.where(known, 0, HIDDEN_POINT).astype(np.uint8)
    return structured_grid((len(x), len(y)), points, data, variable, time)


def _write_trajectory(result: Result, path: Path, variable: str, *, log: bool) -> list[Path]:
    if path.suffix.lower() != ".vtp":
        raise InputError(f"{path}: a trajectory is a poly-line.", f"Try {path.with_suffix('.vtp').name}.")
    array = result.arrays["coordinate"]
    if array.dims != ("checkpoint", "component") or array.values.shape[1] < 2:
        raise InputError(f"{result.analyzer}: coordinate is not (checkpoint, component) with two components.")
    plane = array.values[:, :2].astype(float)
    data = {
        n: a.values.astype(float)
        for n, a in result.arrays.items()
        if a.dims == ("checkpoint",) and a.values.dtype.kind in "iuf"
    }
    # On the plane's own surface where that is known: the true loss of an off-plane point floats above it.
    height = next((data[n] for n in (f"plane_{variable}", variable) if n in data), np.ones(len(plane)))
    z, known = _heights(height, log=log)
    data["finite"] = known.astype(np.uint8)
    runs = next((result[n] for n in ("checkpoint_run", "run") if n in result), np.array([]))
    names = (runs if runs.shape == (len(plane),) else np.full(len(plane), "")).tolist()
    drawable = np.isfinite(plane).all(axis=1)
    lines = [
        np.array([i for i in range(len(plane)) if names[i] == run and drawable[i]]) for run in set(names)
    ]
    lines = sorted((line for line in lines if len(line) > 1), key=lambda line: int(line[0]))
    points = np.column_stack([np.where(drawable[:, None], plane, 0.0), z])
    write_atomically(path, poly_data("Lines", lines, points, data, variable).encode())
    return [path]


def _inner(result: Result, name: str) -> tuple[str, ...]:
    """The dimensions of a variable within one piece."""
    return tuple(d for d in result.arrays[name].dims if d != result.lead)


def _plane(result: Result, name: str, piece: int) -> np.ndarray:
    values = result[name].astype(float)
    return np.asarray(values[piece] if result.lead in result.arrays[name].dims else values)


def _heights(values: np.ndarray, *, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Heights of all points, and where they are real; the others are put at the top."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log10(values) if log else values.copy()
    finite = np.isfinite(z)
    z[~finite] = z[finite].max() if finite.any() else 0.0
    return z, finite


def _quads(n_x: int, n_y: int) -> np.ndarray:
    """Corners of the cells of a grid, counter-clockwise, `((n_y - 1)(n_x - 1), 4)`."""
    corner = (np.arange(n_y - 1)[:, None] * n_x + np.arange(n_x - 1)).reshape(-1, 1)
    return np.asarray(corner + np.array([0, 1, n_x + 1, n_x]))


def _step(result: Result, piece: int) -> float:
    step = number_or_nan(np.atleast_1d(result["step"])[piece]) if "step" in result else np.nan
    return step if np.isfinite(step) else float(piece)


def _numbered(result: Result, path: Path, piece: int) -> Path:
    run = str(np.atleast_1d(result["run"])[piece]) + "_" if several_runs(result) and "run" in result else ""
    label = "".join(c if c.isalnum() or c in "-." else "_" for c in run)
    step = _step(result, piece)
    return path.with_stem(f"{path.stem}_{label}" + (f"{int(step):08d}" if step == int(step) else f"{step:g}"))
