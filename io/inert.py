"""An unpickler that runs nothing: what a pickle names becomes a stub that only stores its state.

`pickle` is a small program whose instructions may call any importable function. Here every name is looked
up in a short table of our own stand-ins (tensor rebuilds, `OrderedDict`, numpy arrays and scalars, dtypes,
sizes); every other name becomes a fresh `Stub` class. Nothing of the file is imported or called. The program
is scanned before it runs, so that it cannot make the unpickler itself allocate without bound.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.inert_numpy import NumpyArray, NumpyDtype
from dynprobe.io.pickle_scan import scan_pickle
from dynprobe.io.tensor_refs import ITEM_SIZE, STORAGE_DTYPE, StorageRef, TensorRef, checked_tensor

MAX_GLOBALS = 10_000
# Elements that allow-listed calls may copy in total: stops quadratic growth from one list copied many times.
MAX_COPIED = 50_000_000

_SHARD_CLASSES = {"DTensor", "ShardedTensor"}

FindStorage = Callable[[tuple[Any, ...]], object]


class Stub:
    """An object of a class that was not imported: its constructor arguments and state, nothing else.

    Attributes:
        qualified_name: The class's name in the pickle, `module.name` (set on each subclass).
        arguments: What the pickle would have called it with.
        state: What the pickle would have given its `__setstate__` (usually its `__dict__`).
        entries: Items set on it, if it was a mapping.
        elements: Items appended to it, if it was a list or a set.
    """

    __slots__ = ("arguments", "elements", "entries", "state")
    qualified_name = ""
    arguments: tuple[object, ...]
    state: object
    entries: dict[Any, object]
    elements: list[object]

    def __new__(cls, *arguments: object, **keywords: object) -> Stub:
        """Make the stub; the arguments are stored, whatever they are."""
        stub = object.__new__(cls)
        stub.arguments = (*arguments, *keywords.items())
        stub.state = None
        stub.entries = {}
        stub.elements = []
        return stub

    def __init__(self, *arguments: object, **keywords: object) -> None:
        """Accept anything: `__new__` has stored it."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: object) -> None:
        self.entries[key] = value

    def append(self, value: object) -> None:
        """Store an item of a list-like object."""
        self.elements.append(value)

    def extend(self, values: list[object]) -> None:
        """Store items of a list-like object."""
        self.elements.extend(values)

    add = append

    @property
    def attributes(self) -> dict[Any, Any]:
        """Its attributes and mapping items, as far as the pickle names them."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            parts = [part for part in state if isinstance(part, dict)]
        else:
            parts = [state] if isinstance(state, dict) else []
        merged: dict[Any, Any] = {}
        for part in parts:
            merged.update(part)
        # The items of a mapping subclass, which an `__init__` may have received instead.
        for argument in self.arguments:
            if isinstance(argument, dict):
                merged.update(argument)
        merged.update(self.entries)
        return merged


class PlainMapping(dict[Any, Any]):
    """What an `OrderedDict` becomes: ordered as every dict, without attributes that a pickle could set."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Drop the attributes (`_metadata` of a state dict)."""


class DtypeName(str):
    """Torch's name of a dtype, as the pickle gave it."""

    __slots__ = ()


class _StorageClass(str):
    """The dtype that a storage class of the pickle holds."""

    __slots__ = ()


class _Call:
    """An allow-listed function: can be called, and nothing can be set on it."""

    __slots__ = ("_function",)
    _function: Callable[..., object]

    def __init__(self, function: Callable[..., object]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("the pickle tries to change a function")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the pickle tries to change a function")


class InertUnpickler(pickle.Unpickler):
    """Unpickle `data` without importing or running anything.

    Args:
        data: The pickle, ending with its STOP instruction.
        where: The file's name, for messages.
        find_storage: Turns a persistent id of torch's into a `StorageRef`.
    """

    def __init__(self, data: bytes, *, where: str, find_storage: FindStorage | None = None) -> None:
        # latin1 keeps the bytes of Python 2 strings (numpy arrays of old files) as they were.
        super().__init__(BytesIO(data), encoding="latin1")
        self._data = data
        self._where = where
        self._find_storage = find_storage
        self._copied = 0
        self._globals: dict[tuple[str, str], object] = {}

    @property
    def holds_shards(self) -> bool:
        """Whether the pickle holds tensors of which this file has one rank's part only."""
        return any(name in _SHARD_CLASSES for _, name in self._globals)

    def load(self) -> Any:
        """Return the pickled object, made of plain containers, `TensorRef` and `Stub`.

        Raises:
            UnreadableCheckpoint: The pickle is damaged or asks for what no checkpoint needs.
        """
        try:
            scan_pickle(self._data, self._where)
            return super().load()
        except UnreadableCheckpoint:
            raise
        except Exception as error:
            raise UnreadableCheckpoint(
                f"{self._where}: the pickle inside cannot be read ({type(error).__name__}: {error}).",
                tip="The file is damaged, or it is not a checkpoint.",
            ) from error

    def persistent_load(self, saved_id: Any) -> object:
        """Resolve torch's reference to a storage."""
        if self._find_storage is None or not isinstance(saved_id, tuple):
            raise pickle.UnpicklingError("an unexpected persistent id")
        return self._find_storage(saved_id)

    def find_class(self, module: str, name: str) -> Any:
        """Return our stand-in for `module.name`; never an import."""
        key = (module, name)
        if key not in self._globals:
            if len(self._globals) >= MAX_GLOBALS:
                raise pickle.UnpicklingError(f"the pickle names more than {MAX_GLOBALS} classes")
            self._globals[key] = self._stand_in(module, name)
        return self._globals[key]

    def _stand_in(self, module: str, name: str) -> object:
        if module.startswith("torch") and name in STORAGE_DTYPE:
            return _StorageClass(STORAGE_DTYPE[name])
        if module == "torch" and name in ITEM_SIZE:
            return DtypeName(name)
        method = _ALLOWED.get((_root_of_numpy(module), name))
        if method is not None:
            return _Call(getattr(self, method))
        return type("Stub", (Stub,), {"__slots__": (), "qualified_name": f"{module}.{name}"})

    def _spend(self, *values: Any) -> None:
        self._copied += sum(len(value) for value in values)
        if self._copied > MAX_COPIED:
            raise pickle.UnpicklingError("the pickle copies its data too often")

    # -- stand-ins of Python's own ---------------------------------------------------------------------

    def _ordered_dict(self, *pairs: Any) -> PlainMapping:
        self._spend(*pairs)
        return PlainMapping(*pairs)

    def _set(self, *values: Any) -> set[Any]:
        self._spend(*values)
        return set(*values)

    def _tuple(self, values: Any = ()) -> tuple[Any, ...]:
        self._spend(values)
        return tuple(values)

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        self._spend(text)
        if encoding not in ("latin1", "utf-8", "ascii"):
            raise pickle.UnpicklingError(f"the text encoding {encoding}")
        return text.encode(encoding)

    def _bytes(self, *values: Any) -> bytes:
        if not values:
            return b""
        if not isinstance(values[0], str | bytes | list | tuple):
            raise pickle.UnpicklingError("bytes made of something else than text or numbers")
        self._spend(values[0])
        return values[0].encode("latin1") if isinstance(values[0], str) else bytes(values[0])

    # -- stand-ins of torch's ---------------------------------------------------------------------------

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: object) -> TensorRef:
        if not isinstance(storage, StorageRef):
            raise pickle.UnpicklingError("a tensor without a storage")
        return checked_tensor(self._where, storage, storage.dtype, offset, shape, stride)

    def _tensor_of_dtype(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        stride: Any,
        _grad: Any,
        _hooks: Any,
        dtype: Any,
        *_: object,
    ) -> TensorRef:
        if not isinstance(storage, StorageRef):
            raise pickle.UnpicklingError("a tensor without a storage")
        return checked_tensor(self._where, storage, str(dtype), offset, shape, stride)

    def _meta_tensor(self, dtype: Any, shape: Any, stride: Any, *_: object) -> TensorRef:
        return checked_tensor(self._where, None, str(dtype), 0, shape, stride)

    def _first(self, value: object, *_: object) -> object:
        return value

    def _from_type(self, rebuild: Any, _type: object, arguments: Any, *_: object) -> object:
        """Rebuild a tensor subclass as the plain tensor it wraps."""
        return rebuild(*arguments) if callable(rebuild) else None

    def _device(self, *parts: object) -> str:
        return ":".join(str(part)[:32] for part in parts if isinstance(part, str | int))

    # -- stand-ins of numpy's ---------------------------------------------------------------------------

    def _numpy_scalar(self, dtype: Any, data: Any = b"") -> object:
        array = NumpyArray()
        array.__setstate__((1, (), dtype, False, data))
        value = array.value()
        return None if value is None else value.item()

    def _numpy_array(self, *_: object) -> NumpyArray:
        return NumpyArray()

    def _numpy_from_buffer(self, data: Any, dtype: Any, shape: Any, order: Any = "C") -> NumpyArray:
        array = NumpyArray()
        array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
        return array

    def _numpy_dtype(self, code: Any = "", *_: object) -> NumpyDtype:
        return NumpyDtype(code)


_ALLOWED = {
    ("collections", "OrderedDict"): "_ordered_dict",
    ("_codecs", "encode"): "_encode",
    ("builtins", "set"): "_set",
    ("__builtin__", "set"): "_set",
    ("builtins", "bytearray"): "_bytes",
    ("builtins", "bytes"): "_bytes",
    ("torch", "Size"): "_tuple",
    ("torch", "device"): "_device",
    ("torch._utils", "_rebuild_tensor"): "_tensor",
    ("torch._utils", "_rebuild_tensor_v2"): "_tensor",
    ("torch._utils", "_rebuild_tensor_v3"): "_tensor_of_dtype",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "_meta_tensor",
    ("torch._utils", "_rebuild_parameter"): "_first",
    ("torch._utils", "_rebuild_parameter_with_state"): "_first",
    ("torch._tensor", "_rebuild_from_type_v2"): "_from_type",
    ("numpy", "dtype"): "_numpy_dtype",
    ("numpy.core.multiarray", "_reconstruct"): "_numpy_array",
    ("numpy.core.multiarray", "scalar"): "_numpy_scalar",
    ("numpy.core.numeric", "_frombuffer"): "_numpy_from_buffer",
}


def _root_of_numpy(module: str) -> str:
    """Return the module's name before numpy 2 renamed it."""
    return module.replace("numpy._core.", "numpy.core.", 1)
