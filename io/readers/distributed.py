"""torch.distributed.checkpoint folders: `.metadata` and `.distcp` files, read without a process group.

Metadata and chunks are pickles and read by the inert unpickler: torch's own reader would run whatever the
metadata's pickle says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.header import Header, OpenedCheckpoint, TensorInfo, count_parameters
from dynprobe.io.inert import DtypeName, InertUnpickler, Stub
from dynprobe.io.pickled import materialise, plain_facts
from dynprobe.io.readers import torch_zip
from dynprobe.io.state_search import find_state, strip_wrappers
from dynprobe.io.steps import counts_in_tree
from dynprobe.io.tensor_refs import ITEM_SIZE, TensorRef

if TYPE_CHECKING:
    import torch

NAME = "distributed"

MAX_METADATA = 1 << 30
_NESTED = ("pytorch_model_fsdp_0",)  # where accelerate puts it inside a checkpoint folder
_SMALL_OBJECT = 1 << 20
# The optimizer's counters are tensors of one element, one per parameter, all equal: a few tell the step.
_COUNTER = "step"
_MAX_COUNTERS = 8


def sniff(path: Path) -> bool:
    """Whether the folder, or accelerate's folder inside it, has `.metadata`."""
    return path.is_dir() and _root(path) is not None


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the metadata and the small objects (step, epoch) beside the tensors.

    Raises:
        UnreadableCheckpoint: Damaged, a chunk file is missing or cut off, or one outside the folder is named.
    """
    return DistributedCheckpoint(path, key, ema)


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the chunks."""
    root = _root(path) or path
    return sorted(root.glob("*.distcp"))


def _root(path: Path) -> Path | None:
    folders = (path, *(path / name for name in _NESTED))
    return next((folder for folder in folders if (folder / ".metadata").is_file()), None)


@dataclass(frozen=True)
class _Piece:
    """Where one chunk of a tensor, or one object, lies.

    Attributes:
        file: The chunk file.
        position: First byte in it.
        length: Number of bytes, a whole `torch.save` archive.
        offsets: Place of the chunk in its tensor; empty for objects and scalars.
    """

    file: Path
    position: int
    length: int
    offsets: tuple[int, ...]

    def unpickle(self) -> Any:
        """Return what was saved here: a `TensorRef` into the chunk file, or a plain object."""
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            inner = BytesIO(stream.read(self.length))
        return torch_zip.read_archive(self.file, stream=inner, base=self.position).unpickler.load()


class DistributedCheckpoint:
    """A folder with its metadata read."""

    def __init__(self, path: Path, key: str | None, ema: bool) -> None:
        self._root = _root(path) or path
        self._counters_read = 0
        metadata = self._metadata()
        self._sizes: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self._pieces = self._locate(metadata.get("storage_data"))
        tree = self._tree(metadata)
        found, notes = find_state(tree, str(path), key=key, ema=ema)
        renamed, more = strip_wrappers(found.tensors)
        self._names = {new: self._fqn[found.path, old] for old, new in renamed.items()}
        tensors = {
            new: TensorInfo(found.tensors[old].shape, found.tensors[old].dtype)
            for old, new in renamed.items()
        }
        for new, info in tensors.items():
            self._check_cover(new, info)
        self.header = Header(
            format=NAME,
            tensors=tensors,
            n_parameters=count_parameters(tensors),
            metadata=plain_facts(tree),
            counts=counts_in_tree(tree),
            notes=[*notes, *more],
        )

    def load(self) -> dict[str, torch.Tensor]:
        """Assemble each tensor from its chunks: name → CPU tensor."""
        import torch

        state = {}
        for name, info in self.header.tensors.items():
            dtype: torch.dtype = getattr(torch, info.dtype)
            whole = torch.empty(info.shape, dtype=dtype)
            for piece in self._pieces[self._names[name]]:
                ref = piece.unpickle()
                sizes = dict(self._sizes[self._names[name]]).get(piece.offsets)
                if not isinstance(ref, TensorRef) or ref.dtype != info.dtype or ref.shape != sizes:
                    what = f"the chunk of '{name}' does not fit its metadata"
                    raise UnreadableCheckpoint(f"{piece.file}: {what}.")
                place = tuple(slice(first, first + n) for first, n in zip(piece.offsets, sizes, strict=True))
                whole[place] = materialise({name: ref})[name]
            state[name] = whole
        return state

    # -- the metadata ------------------------------------------------------------------------------------

    def _metadata(self) -> dict[str, Any]:
        file = self._root / ".metadata"
        if file.stat().st_size > MAX_METADATA:
            raise UnreadableCheckpoint(f"{file}: is {file.stat().st_size} bytes long; refused.")
        loaded = InertUnpickler(file.read_bytes(), where=str(file)).load()
        attributes = loaded.attributes if isinstance(loaded, Stub) else {}
        if not isinstance(attributes.get("state_dict_metadata"), dict):
            raise UnreadableCheckpoint(f"{file}: is no metadata of torch.distributed.checkpoint.")
        return attributes

    def _locate(self, storage_data: object) -> dict[str, list[_Piece]]:
        """Return fully qualified name → its pieces, each checked to lie inside a file of this folder."""
        pieces: dict[str, list[_Piece]] = {}
        sizes: dict[Path, int] = {}
        for index, info in storage_data.items() if isinstance(storage_data, dict) else []:
            where, what = _attributes(index), _attributes(info)
            name = str(where.get("fqn"))
            relative = what.get("relative_path")
            position, length = what.get("offset"), what.get("length")
            if type(position) is not int or type(length) is not int or not isinstance(relative, str):
                raise UnreadableCheckpoint(f"{self._root}: the metadata of '{name}' is damaged.")
            if PurePosixPath(relative).name != relative or relative == ".." or "\\" in relative:
                raise UnreadableCheckpoint(
                    f"{self._root}: the metadata names the file {relative!r}, not one in the same folder."
                )
            if what.get("transform_descriptors"):
                raise UnreadableCheckpoint(
                    f"{self._root}: '{name}' is stored compressed or encrypted.",
                    tip="Save it again without stream transforms.",
                )
            file = self._root / relative
            if file not in sizes:
                sizes[file] = file.stat().st_size if file.is_file() else -1
            if sizes[file] < 0:
                raise UnreadableCheckpoint(f"{file}: is missing.", tip="Copy the whole folder again.")
            if position < 0 or length < 0 or position + length > sizes[file]:
                raise UnreadableCheckpoint(
                    f"{file}: is cut off ('{name}').", tip="Copy the whole folder again."
                )
            offsets = where.get("offset")
            pieces.setdefault(name, []).append(
                _Piece(file, position, length, tuple(offsets) if isinstance(offsets, tuple) else ())
            )
        return pieces

    def _tree(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Rebuild the nested dict that was saved, tensors as references, small objects read."""
        paths = metadata.get("planner_data")
        paths = paths if isinstance(paths, dict) else {}
        tree: dict[str, Any] = {}
        self._fqn: dict[tuple[tuple[str, ...], str], str] = {}
        for name, entry in metadata["state_dict_metadata"].items():
            path = paths.get(name, (name,))
            path = tuple(path) if isinstance(path, list | tuple) and path else (name,)
            node = tree
            for part in path[:-1]:
                child = node.setdefault(part, {})
                if not isinstance(child, dict):
                    raise UnreadableCheckpoint(f"{self._root}: the metadata nests '{name}' in a tensor.")
                node = child
            node[path[-1]] = self._leaf(str(name), _attributes(entry))
            self._fqn[tuple(str(part) for part in path[:-1]), str(path[-1])] = str(name)
        return tree

    def _leaf(self, name: str, entry: dict[str, Any]) -> object:
        if "size" not in entry:
            return self._object(name)
        dtype = next(_dtypes(entry.get("properties")), None)
        shape = entry["size"]
        natural = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**48 for n in shape)
        if dtype is None or not natural:
            raise UnreadableCheckpoint(f"{self._root}: the metadata of '{name}' is damaged.")
        chunks = [_attributes(chunk) for chunk in entry.get("chunks") or ()]
        self._sizes[name] = [(tuple(c.get("offsets") or ()), tuple(c.get("sizes") or ())) for c in chunks]
        if name.endswith(_COUNTER) and shape == () and self._counters_read < _MAX_COUNTERS:
            self._counters_read += 1
            return self._object(name)
        return TensorRef(None, dtype, 0, shape, (0,) * len(shape))

    def _object(self, name: str) -> object:
        """Read a small saved object (a step, an epoch) inertly; None for large or tensor-like ones."""
        pieces = self._pieces.get(name, [])
        if len(pieces) != 1 or pieces[0].length > _SMALL_OBJECT:
            return None
        try:
            value = pieces[0].unpickle()
        except UnreadableCheckpoint:
            return None  # an object beside the weights; not needed
        if isinstance(value, TensorRef):
            return value.scalar()
        return value if isinstance(value, str | int | float | bool) else None

    def _check_cover(self, name: str, info: TensorInfo) -> None:
        """Refuse a tensor whose chunks do not add up: a part of it would be left unset."""
        total = sum(_product(sizes) for _, sizes in self._sizes.get(self._names[name], []))
        stored = {piece.offsets for piece in self._pieces.get(self._names[name], [])}
        planned = {offsets for offsets, _ in self._sizes.get(self._names[name], [])}
        claimed = _product(info.shape) * ITEM_SIZE[info.dtype]
        held = sum(piece.length for piece in self._pieces.get(self._names[name], []))
        if total != _product(info.shape) or not planned <= stored or claimed > held:
            raise UnreadableCheckpoint(
                f"{self._root}: the chunks of '{name}' do not make up its shape {info.shape}.",
                tip="A rank's file is missing, or the checkpoint was not finished.",
            )


def _attributes(value: object) -> dict[str, Any]:
    return value.attributes if isinstance(value, Stub) else {}


def _dtypes(properties: object) -> Iterator[str]:
    """Yield the dtype in pickled `TensorProperties`, whose state is a tuple of its fields."""
    if isinstance(properties, Stub):
        state = properties.state
        if isinstance(state, dict):
            fields = tuple(state.values())
        else:
            fields = (*properties.arguments, *(state if isinstance(state, tuple) else ()))
        for value in fields:
            if isinstance(value, DtypeName):
                yield str(value)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
