"""Raw arrays by name out of `.npy`, `.npz`, `.h5` and `.safetensors` files; reading one never runs code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynprobe.io.errors import InputError, UnusableData
from dynprobe.io.ordering import natural_order
from dynprobe.io.readers.safetensors_file import load_file, read_header

IDS = ("sample_id", "sample_ids", "ids", "input_hash")
"""Arrays that say which inputs the rows belong to, and are no layer."""

HDF5 = (".h5", ".hdf5")

_AGAIN = "Copy it again, or save it anew."

Arrays = tuple[dict[str, Any], dict[str, str]]
"""Arrays and tensors by name, and what else the file says."""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a library says of a damaged file into a message.

    Raises:
        UnusableData: Instead of any exception that is no message for the user yet.
    """
    try:
        yield
    except InputError as error:
        error.tip = error.tip or _AGAIN
        raise
    except Exception as error:  # damage surfaces as any of a dozen kinds
        if "allow_pickle" in str(error) or "Object arrays" in str(error):
            raise UnusableData(
                f"{path}: holds pickled objects, or is no numpy file. A pickle is code, and is not run.",
                "Save plain numbers: np.save(path, np.asarray(array, dtype=np.float32)).",
            ) from error
        raise UnusableData(
            f"{path}: is damaged, or no {path.suffix} file ({type(error).__name__}: {error}).",
            _AGAIN,
        ) from error


def _read_numpy(path: Path) -> Arrays:
    import numpy as np

    # Opened here because np.load leaves a damaged file open.
    with path.open("rb") as stream:
        content = np.load(stream, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"activations": content}, {}  # as in a notebook, so that files share their layer
        return {name: content[name] for name in content.files}, {}


def _read_safetensors(path: Path) -> Arrays:
    _infos, facts = read_header(path)
    tensors = load_file(path)
    return {name: tensors[name] for name in sorted(tensors, key=natural_order)}, facts


def _read_hdf5(path: Path) -> Arrays:
    import h5py
    import numpy as np

    refuse_report(path)
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        labels_a_dimension = item.ndim < 2 and bool(h5py.h5ds.is_scale(item.id))
        if name in IDS or not labels_a_dimension:
            found[name] = np.asarray(item.asstr()[()] if h5py.check_string_dtype(item.dtype) else item[()])

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(visit)
        stated = [name for name in ("input_hash", "treatments") if name in file.attrs]
        facts = {name: text_of(file.attrs[name]) for name in stated}
    return {name: found[name] for name in sorted(found, key=natural_order)}, facts


READERS: Mapping[str, Callable[[Path], Arrays]] = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".safetensors": _read_safetensors,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
}
"""By suffix; each raises whatever its library does, see `readable`."""


def refuse_report(path: Path) -> None:
    """Stop where an HDF5 file is a report; a damaged one is left to the reader.

    Raises:
        UnusableData: It is a report.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            is_report = "dynprobe_layout" in file.attrs
    except OSError:
        return
    if is_report:
        raise UnusableData(
            f"{path}: is a dynprobe report, and holds no activations.",
            f"dynprobe report show {path} shows it; give runs or saved activations here.",
        )


def text_of(value: Any) -> str:
    """Text out of an attribute or an array of one element."""
    import numpy as np

    entries = np.asarray(value).reshape(-1).tolist()
    first = entries[0] if len(entries) == 1 else ""
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
