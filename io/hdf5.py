"""Labelled arrays ↔ HDF5 groups that xarray, netCDF and h5py read alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import h5py
import numpy as np

from dynprobe.analyzers.core.result import Array
from dynprobe.io.plain_json import dumps, plain

FILTERS: dict[str, Any] = {"compression": "gzip", "shuffle": True, "fletcher32": True}
TEXT = h5py.string_dtype("utf-8")

# How the netCDF library itself stores a dimension without coordinate, and a variable that has the
# name of a dimension without being its coordinate.
NO_COORDINATE = "This is a netCDF dimension but not a netCDF variable.{:10d}"
NOT_A_COORDINATE = "_nc4_non_coord_"


def storable(values: np.ndarray) -> np.ndarray:
    """Values in a type that every reader of HDF5 knows: little-endian numbers, or UTF-8 text.

    Truth values become int8, half precision becomes single; NaN and infinities stay as they are.

    Raises:
        ValueError: For complex numbers and records, which netCDF readers drop silently.
    """
    kind = values.dtype.kind
    if kind in "OUS":
        flat = [_text(v) for v in values.ravel().tolist()]
        text = np.empty(len(flat), dtype=object)
        text[:] = flat
        return text.reshape(values.shape)
    if kind == "b":
        return values.astype("i1")
    if kind == "f" and values.dtype.itemsize not in (4, 8):
        return values.astype("<f4" if values.dtype.itemsize < 4 else "<f8")
    if kind not in "iuf":
        raise ValueError(f"values of type {values.dtype} cannot be stored: return real numbers or text")
    return values.astype(values.dtype.newbyteorder("<"), copy=False)


def _text(value: Any) -> str:
    """Valid UTF-8 without NUL, which HDF5 text cannot hold; undecodable bytes of a path are escaped."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def write_arrays(group: h5py.Group, arrays: Mapping[str, Array]) -> None:
    """Write arrays with named dimensions; each dimension gets a scale, of integers if nothing labels it.

    Raises:
        ValueError: If two arrays disagree about the size of a dimension, or a type cannot be stored.
    """
    scales = {}
    for dim, size in _sizes(arrays).items():
        if dim not in arrays:
            scales[dim] = group.create_dataset(dim, data=np.arange(size, dtype="<i4"))
            scales[dim].attrs["long_name"] = f"index along {dim}"
        elif arrays[dim].dims == (dim,):
            scales[dim] = _create(group, dim, arrays[dim])
        else:
            scales[dim] = group.create_dataset(dim, data=np.zeros(size, dtype="<i4"))
            scales[dim].make_scale(NO_COORDINATE.format(size))
            continue
        scales[dim].make_scale(dim)
    for name, array in arrays.items():
        if array.dims == (name,):
            continue
        dataset = _create(group, NOT_A_COORDINATE + name if name in scales else name, array)
        for axis, dim in enumerate(array.dims):
            dataset.dims[axis].attach_scale(scales[dim])


def _sizes(arrays: Mapping[str, Array]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        for dim, size in zip(array.dims, array.values.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"{name}: dimension {dim} has {size} entries here and {sizes[dim]} elsewhere"
                )
    return sizes


def _create(group: h5py.Group, name: str, array: Array) -> h5py.Dataset:
    values = storable(array.values)
    filters = FILTERS if values.ndim and values.size and values.dtype != object else {}
    dtype = TEXT if values.dtype == object else values.dtype
    dataset = group.create_dataset(name, data=values, dtype=dtype, **filters)
    if array.values.dtype.kind == "b":
        dataset.attrs["flag_values"] = np.array([0, 1], dtype="i1")
        dataset.attrs["flag_meanings"] = "false true"
    described = {"units": array.units, "long_name": array.long_name, "ancillary_variables": array.error}
    for key, text in described.items():
        if text:
            dataset.attrs[key] = _text(text)
    return dataset


def read_arrays(group: h5py.Group, names: list[str]) -> dict[str, Array]:
    """The arrays of these names with their dimensions, in this order.

    Raises:
        Exception: Of any kind if one is damaged or absent; `sealed.opened` explains it.
    """
    return {name: _read(group, name) for name in names}


def _read(group: h5py.Group, name: str) -> Array:
    moved = NOT_A_COORDINATE + name
    dataset = group[moved if moved in group else name]
    if dataset.is_scale:
        dims: tuple[str, ...] = (name,)
    else:
        dims = tuple(dataset.dims[axis][0].name.rpartition("/")[2] for axis in range(dataset.ndim))
    text = h5py.check_string_dtype(dataset.dtype) is not None
    values = np.asarray(dataset.asstr()[()] if text else dataset[()], dtype=object if text else None)
    about = [str(dataset.attrs.get(key, "")) for key in ("units", "long_name", "ancillary_variables")]
    return Array(dims, values, *about)


def checksum(arrays: Mapping[str, Array], about: str) -> str:
    """Digest of names, dimensions, units and values, whatever their layout on disk, and of `about`.

    HDF5's own checksums cover neither text nor single numbers.
    """
    digest = hashlib.sha256(about.encode())
    for name, array in sorted(arrays.items()):
        values = storable(array.values)
        text = values.dtype == object
        kind = "text" if text else values.dtype.str
        head = [name, array.dims, values.shape, kind, array.units, array.long_name, array.error]
        digest.update(json.dumps([_text(h) if isinstance(h, str) else h for h in head]).encode())
        digest.update(json.dumps(values.ravel().tolist()).encode() if text else values.tobytes())
    return digest.hexdigest()


def write_attributes(node: h5py.Group, values: Mapping[str, Any]) -> None:
    """Attributes as plain numbers and text where they are such, else as JSON; `None` is left out."""
    for name, value in values.items():
        simple = plain(value)
        if simple is None:
            continue
        if isinstance(simple, bool):
            simple = int(simple)
        elif isinstance(simple, (list, dict)):
            simple = _homogeneous(simple)
        node.attrs[name] = _text(simple) if isinstance(simple, str) else simple


def _homogeneous(value: Any) -> Any:
    """A list of only numbers or only text as an array; JSON for what no array can hold."""
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value):
            return np.array([_text(v) for v in value], dtype=TEXT)
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            return np.array(value)
    return dumps(value)


def copy_tree(source: h5py.File, target: h5py.File, *, skip: Collection[str] = ()) -> None:
    """Copy the groups and variables of a file as they are stored, compressed blocks untouched.

    `Group.copy` alone leaves the references between variables and their dimensions dangling, so
    these are made anew.

    Args:
        source: File to copy from; its own attributes are not copied.
        target: File to copy to.
        skip: Names at the root to leave out.
    """

    def attach(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset) and name in target and "DIMENSION_LIST" in item.attrs:
            for axis in range(item.ndim):
                for scale in item.dims[axis].values():
                    target[name].dims[axis].attach_scale(target[scale.name])

    _copy_contents(source, target, skip)
    source.visititems(attach)


def _copy_contents(source: h5py.Group, target: h5py.Group, skip: Collection[str] = ()) -> None:
    for name, item in source.items():
        if name in skip:
            continue
        if isinstance(item, h5py.Group):
            copied: Any = target.create_group(name)
            _copy_contents(item, copied)
        else:
            source.copy(item, target, name, without_attrs=True)
            copied = target[name]
            if isinstance(item, h5py.Dataset) and item.is_scale:
                copied.make_scale(item.attrs["NAME"].decode())
        for key in item.attrs:
            if key not in ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME"):
                copied.attrs[key] = item.attrs[key]
