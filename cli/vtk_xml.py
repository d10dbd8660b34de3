"""The VTK XML formats that ParaView opens, written with numpy and the standard library."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import quoteattr

import numpy as np

_TYPES = {"<f8": "Float64", "<f4": "Float32", "<i8": "Int64", "|u1": "UInt8"}


def structured_grid(
    shape: tuple[int, int], points: np.ndarray, data: Mapping[str, np.ndarray], active: str, time: float
) -> str:
    """A `.vts` document.

    Args:
        shape: Points along x and along y.
        points: `(n_x * n_y, 3)`, x running fastest.
        data: Values at the points by name.
        active: The one that colours them.
        time: The time (step) the file stands for.
    """
    extent = f"0 {shape[0] - 1} 0 {shape[1] - 1} 0 0"
    body = (
        f'<StructuredGrid WholeExtent="{extent}">{_time(time)}<Piece Extent="{extent}">\n'
        f"{_point_data(data, active)}<Points>{_array('Points', points)}</Points></Piece></StructuredGrid>"
    )
    return _document("StructuredGrid", body)


def poly_data(
    kind: str,
    cells: Sequence[np.ndarray],
    points: np.ndarray,
    data: Mapping[str, np.ndarray],
    active: str,
    time: float | None = None,
) -> str:
    """A `.vtp` document.

    Args:
        kind: `Polys` or `Lines`.
        cells: Indices of points, cell by cell.
        points: `(n_points, 3)`.
        data: Values at the points by name.
        active: The one that colours them.
        time: The time (step) the file stands for, if any.
    """
    connectivity = np.concatenate([np.zeros(0), *cells]).astype(np.int64)
    ends = np.cumsum([len(c) for c in cells]).astype(np.int64)
    topology = _array("connectivity", connectivity) + _array("offsets", ends)
    body = (
        f"<PolyData>{'' if time is None else _time(time)}"
        f'<Piece NumberOfPoints="{len(points)}" NumberOf{kind}="{len(cells)}">\n'
        f"{_point_data(data, active)}<Points>{_array('Points', points)}</Points>"
        f"<{kind}>{topology}</{kind}></Piece></PolyData>"
    )
    return _document("PolyData", body)


def collection(names: Sequence[str], times: Sequence[float]) -> str:
    """A `.pvd` document: files and the times they stand for."""
    entries = "".join(
        f'<DataSet timestep="{time:.17g}" part="0" file={quoteattr(name)}/>\n'
        for name, time in zip(names, times, strict=True)
    )
    return _document("Collection", f"<Collection>\n{entries}</Collection>")


def _time(time: float) -> str:
    return f"<FieldData>{_array('TimeValue', np.array([time]), tuples=1)}</FieldData>"


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
