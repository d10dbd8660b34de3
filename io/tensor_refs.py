"""Where a tensor's bytes lie in a file, without reading them and without torch."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dynprobe.io.errors import UnreadableCheckpoint

ITEM_SIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex32": 4, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
"""Bytes per element, by the name torch gives the dtype."""

STORAGE_DTYPE = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}  # fmt: skip
"""The dtype that each of torch's storage classes holds."""

_STRUCT_CODE = {
    "float64": "d", "float32": "f", "float16": "e",
    "int64": "q", "int32": "i", "int16": "h", "int8": "b", "uint8": "B",
}  # fmt: skip

MAX_DIMENSIONS = 64
# An expanded tensor (stride 0) may claim more elements than its storage holds; real files stay near 1.
MAX_EXPANSION = 1024


class _Sealed:
    """A pickle may set the state of any object it has built; not of these, whose bounds were checked."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise UnreadableCheckpoint("The pickle tries to change a tensor after its bounds were checked.")


@dataclass(slots=True)
class StorageRef(_Sealed):
    """One storage of a file: `nbytes` bytes at a known place.

    Attributes:
        path: The file.
        key: The storage's name inside the file.
        dtype: What its elements are.
        nbytes: Its size, already checked against the file.
        position: Byte position of the data, or of the zip member's local header.
        kind: "raw" (data at `position`), "zip" (stored member) or "deflated" (compressed member).
        member: The zip member's full name.
    """

    path: Path
    key: str
    dtype: str
    nbytes: int
    position: int
    kind: str = "raw"
    member: str = ""

    def start(self, stream: IO[bytes]) -> int:
        """Return the byte position of the data in the opened file `stream`."""
        if self.kind == "raw":
            return self.position
        # A zip member's local header: 30 bytes, then name and extra field, whose lengths are its last fields.
        stream.seek(self.position)
        head = stream.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise UnreadableCheckpoint(f"{self.path}: storage '{self.key}' is damaged (no zip header).")
        name_length, extra_length = struct.unpack("<HH", head[26:30])
        return int(self.position + 30 + name_length + extra_length)

    def read(self, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Return `nbytes` bytes of the storage from byte `offset` on (all of it by default)."""
        nbytes = self.nbytes - offset if nbytes is None else nbytes
        if self.kind == "deflated":
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                data = stream.read(self.nbytes)[offset : offset + nbytes]
        else:
            with self.path.open("rb", buffering=0) as raw:
                raw.seek(self.start(raw) + offset)
                data = raw.read(nbytes)
        if len(data) != nbytes:
            raise UnreadableCheckpoint(f"{self.path}: storage '{self.key}' is cut off.")
        return data


@dataclass(slots=True)
class TensorRef(_Sealed):
    """A tensor as a file describes it: a strided view of a storage.

    Attributes:
        storage: The storage, or None for a tensor on the meta device (no data in the file).
        dtype: Torch's name of the dtype, e.g. "float32".
        offset: First element, counted in elements of `dtype`.
        shape: Sizes.
        stride: Strides in elements.
    """

    storage: StorageRef | None
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def place(self) -> tuple[object, ...]:
        """What tensors that are one and the same in the file have in common."""
        key = None if self.storage is None else (self.storage.path, self.storage.key)
        return key, self.dtype, self.offset, self.shape, self.stride

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def scalar(self) -> int | float | None:
        """Read a one-element tensor's value; None where it has more elements or an unusual dtype."""
        if self.storage is None or self.numel != 1 or self.dtype not in _STRUCT_CODE:
            return None
        size = ITEM_SIZE[self.dtype]
        value: int | float = struct.unpack(
            "<" + _STRUCT_CODE[self.dtype], self.storage.read(self.offset * size, size)
        )[0]
        return value


def checked_tensor(
    where: str, storage: StorageRef | None, dtype: object, offset: object, shape: object, stride: object
) -> TensorRef:
    """Build a tensor reference, refusing every view that reaches outside its storage.

    Args:
        where: The file, for the message.
        storage: The storage, None for the meta device.
        dtype: Name of the dtype.
        offset: First element.
        shape: Sizes.
        stride: Strides in elements.

    Returns:
        The checked reference.

    Raises:
        UnreadableCheckpoint: A size, stride or offset is negative, absurd or out of the storage's bounds.
    """
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise UnreadableCheckpoint(f"{where}: a tensor has the unknown dtype '{dtype}'.")
    sizes, strides = _naturals(where, "shape", shape), _naturals(where, "stride", stride)
    (first,) = _naturals(where, "offset", (offset,))
    if len(sizes) != len(strides) or len(sizes) > MAX_DIMENSIONS:
        raise UnreadableCheckpoint(f"{where}: a tensor has {len(sizes)} sizes and {len(strides)} strides.")
    ref = TensorRef(storage, dtype, first, sizes, strides)
    if storage is None or ref.numel == 0:
        return ref
    capacity = storage.nbytes // ITEM_SIZE[dtype]
    last = first
    for size, step in zip(sizes, strides, strict=True):
        last += (size - 1) * step
    if last >= capacity or ref.numel > max(capacity, 1) * MAX_EXPANSION:
        raise UnreadableCheckpoint(
            f"{where}: a tensor of shape {sizes} reaches outside its storage "
            f"(element {last} of '{storage.key}', which holds {capacity}).",
            tip="The file is damaged or was made to do harm. Save it again from the original.",
        )
    return ref


def _naturals(where: str, what: str, values: object) -> tuple[int, ...]:
    """Return `values` as a tuple of non-negative integers below 2**62."""
    if not isinstance(values, list | tuple):
        raise UnreadableCheckpoint(f"{where}: a tensor has an impossible {what}.")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**62:
            raise UnreadableCheckpoint(f"{where}: a tensor has an impossible {what}.")
    return tuple(values)
