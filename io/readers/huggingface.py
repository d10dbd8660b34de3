"""Hugging Face folders: one file of weights, or shards with an index; `config.json`, `trainer_state.json`."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.header import Count, Header, OpenedCheckpoint, count_parameters
from dynprobe.io.state_search import NoSuchKey, strip_wrappers
from dynprobe.io.steps import counts_in_facts, optimizer_step

if TYPE_CHECKING:
    import torch

NAME = "huggingface"

MAX_INDEX = 100_000_000
WEIGHTS = (
    "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
)  # fmt: skip
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS)
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")


def sniff(path: Path) -> bool:
    """Whether the folder holds weights, or an index of shards, under the names Hugging Face uses."""
    return path.is_dir() and any((path / name).is_file() for name in (*WEIGHTS, *INDEXES))


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the headers of all shards.

    Raises:
        UnreadableCheckpoint: A shard is missing or damaged, or the index points outside the folder.
        NoSuchKey: `ema` was given; the format has no averaged copy.
    """
    if ema:
        raise NoSuchKey(f"{path}: --ema was given, but a Hugging Face folder has no averaged copy.")
    return HuggingFaceCheckpoint(path, key)


def weight_files(path: Path) -> list[Path]:
    """Return the folder's weights files: the shards of its index, or its single file.

    Raises:
        UnreadableCheckpoint: The index is damaged, names a file outside the folder, or one that is missing.
    """
    index = next((path / name for name in INDEXES if (path / name).is_file()), None)
    single = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if index is None:
        assert single is not None  # sniff has seen one of them
        return [single]
    shards = sorted(set(_weight_map(index).values()))
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        listed = ", ".join(missing[:5])
        raise UnreadableCheckpoint(
            f"{path}: {len(missing)} of {len(shards)} shards are missing: {listed}.",
            tip="Copy them from where the run was saved.",
        )
    return [path / name for name in shards]


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor name → shard, each shard a bare file name."""
    table = _json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UnreadableCheckpoint(f"{index}: has no weight_map.")
    for shard in set(table.values()) if all(isinstance(s, str) for s in table.values()) else [""]:
        bare = shard not in ("", ".", "..") and PurePosixPath(shard).name == shard and "\\" not in shard
        if not bare or ":" in shard or "\0" in shard:
            raise UnreadableCheckpoint(
                f"{index}: names the shard {shard!r}; only a file in the same folder is allowed.",
                tip="The index is damaged or was made to do harm.",
            )
    return table


class HuggingFaceCheckpoint:
    """A folder with the headers of its shards read."""

    def __init__(self, path: Path, key: str | None) -> None:
        from dynprobe.io.readers import open_file

        self._shards = [open_file(file, key=key) for file in weight_files(path)]
        self.header = self._merge(path, [shard.header for shard in self._shards])

    def _merge(self, path: Path, headers: list[Header]) -> Header:
        tensors = {name: info for header in headers for name, info in header.tensors.items()}
        if len(tensors) != sum(len(header.tensors) for header in headers):
            raise UnreadableCheckpoint(f"{path}: two shards hold a tensor of the same name.")
        index = next((path / name for name in INDEXES if (path / name).is_file()), None)
        if index is not None:
            # Compared after stripping, as the shards' headers are.
            expected = set(strip_wrappers(_weight_map(index))[0].values())
            absent = sorted(expected - set(tensors))
            if absent:
                raise UnreadableCheckpoint(
                    f"{path}: the shards lack {len(absent)} tensors of the index, such as '{absent[0]}'."
                )
        trainer = path / "trainer_state.json"
        facts = _json(trainer) if trainer.is_file() else {}
        counts = counts_in_facts(facts, "trainer_state.json")
        counts += [count for header in headers for count in header.counts]
        if not counts:
            counts = _optimizer_counts(path)
        metadata = {name: value for header in headers for name, value in header.metadata.items()}
        metadata.update(
            {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
        )
        return Header(
            format=NAME,
            tensors=tensors,
            n_parameters=count_parameters(tensors),
            metadata=metadata,
            counts=counts,
            notes=list(dict.fromkeys(note for header in headers for note in header.notes)),
        )

    def load(self) -> dict[str, torch.Tensor]:
        """Read every shard: name → CPU tensor."""
        return {name: tensor for shard in self._shards for name, tensor in shard.load().items()}


def _optimizer_counts(path: Path) -> list[Count]:
    """Return the step in the optimizer's file, which accelerate writes without a trainer's state."""
    from dynprobe.io.readers import torch_zip

    for name in _OPTIMIZERS:
        file = path / name
        if torch_zip.sniff(file):
            try:
                step = optimizer_step(torch_zip.read_archive(file).unpickler.load())
            except UnreadableCheckpoint:
                continue  # the weights are what counts; the step is looked for elsewhere
            if step is not None:
                return [Count(step, "step", "optimizer state")]
    return []


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_INDEX:
        raise UnreadableCheckpoint(f"{path}: is {path.stat().st_size} bytes long; refused.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpoint(f"{path}: is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UnreadableCheckpoint(f"{path}: is no table.")
    return value
