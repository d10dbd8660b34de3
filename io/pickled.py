"""From an inertly read pickle to a header and, later, its tensors: what the torch formats share."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.header import Header, TensorInfo, count_parameters
from dynprobe.io.inert import InertUnpickler, Stub
from dynprobe.io.state_search import children, find_state, strip_wrappers
from dynprobe.io.steps import counts_in_tree
from dynprobe.io.tensor_refs import ITEM_SIZE, StorageRef, TensorRef

if TYPE_CHECKING:
    import torch

_FACTS_IN = ("args", "config", "cfg", "hparams", "hyper_parameters", "hyperparameters", "opt", "params")
_LONGEST_FACT = 200


class PickledCheckpoint:
    """A checkpoint whose pickle was read inertly; its weights are still on disk.

    Args:
        path: The file.
        reader: The format's name.
        tree: The unpickled object.
        unpickler: The unpickler that read it.
        key: `--key`.
        ema: `--ema`.

    Raises:
        UnreadableCheckpoint: It holds no weights, or only one rank's shards of them.
    """

    def __init__(
        self,
        path: Path,
        reader: str,
        tree: object,
        unpickler: InertUnpickler,
        *,
        key: str | None,
        ema: bool,
    ) -> None:
        if unpickler.holds_shards:
            raise UnreadableCheckpoint(
                f"{path}: holds DTensor shards, one rank's part of the weights.",
                tip="Save the whole model and give that: torch.distributed.checkpoint.save, or a full state "
                "dict gathered on one rank.",
            )
        found, notes = find_state(tree, str(path), key=key, ema=ema)
        renamed, more = strip_wrappers(found.tensors)
        self._path = path
        self._tree_path = found.path
        self._renamed = renamed
        self._refs = {new: found.tensors[old] for old, new in renamed.items()}
        self._inert_only = found.is_module
        meta = [name for name, ref in self._refs.items() if ref.storage is None]
        if meta:
            raise UnreadableCheckpoint(f"{path}: holds no data for '{meta[0]}', which is on the meta device.")
        tensors = {name: TensorInfo(ref.shape, ref.dtype) for name, ref in self._refs.items()}
        self.header = Header(
            format=reader,
            tensors=tensors,
            n_parameters=count_parameters(tensors, self._refs),
            metadata=plain_facts(tree),
            counts=counts_in_tree(tree),
            notes=[*notes, *more],
        )

    def load(self) -> dict[str, torch.Tensor]:
        """Read the weights: torch's own safe reader first, and what that refuses from the checked references.

        Returns:
            Name → CPU tensor, memory-mapped where the file allows.
        """
        storages = (ref.storage for ref in self._refs.values())
        compressed = any(storage is not None and storage.kind == "deflated" for storage in storages)
        if not self._inert_only and not compressed:
            state = self._load_with_torch()
            if state is not None:
                return state
        return materialise(self._refs)

    def _load_with_torch(self) -> dict[str, torch.Tensor] | None:
        tree = safe_load(self._path)
        try:
            for part in self._tree_path:
                tree = tree[part] if isinstance(tree, dict) else tree[int(part)]
            state = {new: tree[old].detach() for old, new in self._renamed.items()}
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return None
        if any(tuple(state[name].shape) != info.shape for name, info in self.header.tensors.items()):
            return None
        return state


def safe_load(path: Path) -> Any:
    """Read with `torch.load(weights_only=True)`, memory-mapped where possible; None if torch refuses."""
    import torch

    for mapped in (True, False):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:
            return None
        except Exception:
            continue  # pre-1.6 files cannot be mapped; of damaged ones the inert reader says what is wrong
    return None


def materialise(refs: dict[str, TensorRef]) -> dict[str, torch.Tensor]:
    """Turn checked references into tensors.

    Tensors that share a storage in the file share it in memory; stored data is memory-mapped, privately.

    Args:
        refs: Name → reference.

    Returns:
        Name → CPU tensor.
    """
    import torch

    maps: dict[Path, mmap.mmap] = {}
    bases: dict[tuple[Path, str, str], torch.Tensor] = {}
    state = {}
    for name, ref in refs.items():
        dtype: torch.dtype = getattr(torch, ref.dtype)
        storage = ref.storage
        if ref.numel == 0 or storage is None:
            state[name] = torch.empty(ref.shape, dtype=dtype)
            continue
        base_key = (storage.path, storage.key, ref.dtype)
        if base_key not in bases:
            bases[base_key] = _base(storage, ref.dtype, dtype, maps)
        state[name] = bases[base_key].as_strided(ref.shape, ref.stride, ref.offset)
    return state


def _base(storage: StorageRef, name: str, dtype: torch.dtype, maps: dict[Path, mmap.mmap]) -> torch.Tensor:
    """Return a whole storage as a flat tensor."""
    import torch

    size = ITEM_SIZE[name]
    with storage.path.open("rb") as stream:
        start = storage.start(stream) if storage.kind != "deflated" else 0
        if storage.kind == "deflated" or start % size:
            return torch.frombuffer(bytearray(storage.read()), dtype=dtype, count=storage.nbytes // size)
        if storage.path not in maps:
            maps[storage.path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(maps[storage.path], dtype=dtype, count=storage.nbytes // size, offset=start)


def plain_facts(tree: object) -> dict[str, str | int | float | bool]:
    """Return the short plain values at the top level and in the arguments (`args`, `hyper_parameters`, …)."""
    facts = dict(_short(children(tree), ""))
    for name, value in children(tree):
        if name in _FACTS_IN and isinstance(value, dict | Stub):
            facts.update(_short(children(value), f"{name}."))
    return facts


def _short(
    items: Iterable[tuple[str | int, object]], prefix: str
) -> Iterable[tuple[str, str | int | float | bool]]:
    for name, value in items:
        short_text = not isinstance(value, str) or len(value) <= _LONGEST_FACT
        if isinstance(name, str) and isinstance(value, str | int | float | bool) and short_text:
            yield f"{prefix}{name}", value
