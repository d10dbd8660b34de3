"""safetensors: 8 bytes of header length, a JSON header, raw tensors. Safe by design; checked all the same."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.header import Header, OpenedCheckpoint, TensorInfo, count_parameters
from dynprobe.io.state_search import NoSuchKey, NoWeights, strip_wrappers
from dynprobe.io.steps import counts_in_facts
from dynprobe.io.tensor_refs import ITEM_SIZE

if TYPE_CHECKING:
    import torch

NAME = "safetensors"

MAX_HEADER = 100_000_000  # the format's own limit

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def sniff(path: Path) -> bool:
    """Whether the file starts with a plausible length and the JSON header's brace."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the JSON header.

    Raises:
        UnreadableCheckpoint: Truncated, or the header contradicts itself or the file's size.
        NoSuchKey: `key` or `ema` was given; the format holds one flat mapping.
    """
    if key or ema:
        raise NoSuchKey(
            f"{path}: a safetensors file is one flat mapping; --key and --ema choose nothing in it."
        )
    return SafetensorsCheckpoint(path)


class SafetensorsCheckpoint:
    """One safetensors file with its header read."""

    def __init__(self, path: Path) -> None:
        infos, metadata = read_header(path)
        if not infos:
            raise NoWeights(f"{path}: holds no tensors.")
        renamed, notes = strip_wrappers(infos)
        self._path = path
        self._renamed = renamed
        tensors = {new: infos[old] for old, new in renamed.items()}
        self.header = Header(
            format=NAME,
            tensors=tensors,
            n_parameters=count_parameters(tensors),
            metadata=dict(metadata),
            counts=counts_in_facts(metadata, "safetensors metadata"),
            notes=notes,
        )

    def load(self) -> dict[str, torch.Tensor]:
        """Return name → CPU tensor, memory-mapped."""
        loaded = load_file(self._path)
        return {new: loaded[old] for old, new in self._renamed.items()}


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file under their names in it.

    Raises:
        UnreadableCheckpoint: The safetensors library refuses the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_with_safetensors

    try:
        return load_with_safetensors(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UnreadableCheckpoint(f"{path}: safetensors cannot read it ({error}).") from error


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return name → (shape, dtype) and the metadata, after checking every offset against the file's size.

    Raises:
        UnreadableCheckpoint: Truncated or inconsistent.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise UnreadableCheckpoint(
                f"{path}: the safetensors header is cut off.", tip="Copy the file again, or leave it out."
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpoint(f"{path}: the safetensors header is damaged ({error}).") from error
    if not isinstance(header, dict):
        raise UnreadableCheckpoint(f"{path}: the safetensors header is no table.")
    metadata = header.pop("__metadata__", None) or {}
    infos = {name: _checked(path, name, entry, size - 8 - length) for name, entry in header.items()}
    return infos, {str(name): str(value) for name, value in metadata.items()}


def _checked(path: Path, name: str, entry: Any, data_size: int) -> TensorInfo:
    try:
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableCheckpoint(f"{path}: the entry of '{name}' is damaged ({error!r}).") from error
    numel = 1
    for length in shape:
        numel *= length if isinstance(length, int) and length >= 0 else -1
    if numel < 0 or not 0 <= first <= end or end - first != numel * ITEM_SIZE[dtype]:
        raise UnreadableCheckpoint(f"{path}: size and offsets of '{name}' contradict each other.")
    if end > data_size:
        raise UnreadableCheckpoint(
            f"{path}: '{name}' ends at byte {end} of the data, the file has {data_size}.",
            tip="It is truncated or still being written. Copy it again, or leave it out.",
        )
    return TensorInfo(shape, dtype)
