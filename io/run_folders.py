"""Which files and folders of a run are checkpoints, by name and first bytes only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dynprobe.io.errors import InputError
from dynprobe.io.readers import deepspeed, distributed, find_reader, huggingface
from dynprobe.io.step_names import counts_in_name, is_alias

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".chkpt", ".safetensors", ".t7")
_MAX_DEPTH = 4

_NOT_WEIGHTS = re.compile(
    r"^(optimizer|optim|scheduler|lr_scheduler|scaler|sampler|training_args|trainer_state|rng_state|rng|"
    r"random_states|dataloader|loss_log)([-_.0-9].*)?$|optim_states\.pt$|\.(tmp|part|partial|incomplete|lock)$|"
    r"\.pt2$",
    re.IGNORECASE,
)
# Nobody takes these for checkpoints, so that they were left out needs no word.
_PLAIN_SUFFIXES = {
    ".toml",
    ".csv",
    ".tsv",
    ".txt",
    ".log",
    ".md",
    ".yaml",
    ".yml",
    ".py",
    ".png",
    ".pdf",
    ".svg",
}
_CHECKPOINT_FOLDERS = {"checkpoints", "checkpoint", "ckpts", "ckpt", "weights", "models", "snapshots"}
_MAIN_FILES = {"model", "pytorch_model", "weights", "checkpoint", "state", "state_dict", "ckpt"}


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        root: The folder that was typed.
        paths: Its checkpoints: files, and folders of sharded formats.
        left_out: Names of what is no checkpoint.
        notes: What else there is to say.
    """

    root: Path
    paths: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder is one checkpoint: sharded, Hugging Face, DeepSpeed."""
    return any(reader.sniff(path) for reader in (distributed, deepspeed, huggingface))


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights; for a plain file, itself.

    Raises:
        UnreadableCheckpoint: A shard index is damaged or unsafe.
    """
    for reader in (distributed, deepspeed, huggingface):
        if reader.sniff(path):
            files: list[Path] = reader.weight_files(path)
            return files
    return [path]


def list_run(folder: Path, exclude: Iterable[Path] = ()) -> Listing:
    """Find the checkpoints of a run folder.

    Args:
        folder: The folder.
        exclude: Files that are known to be something else (the manifest's data).

    Returns:
        Its checkpoints, or those of the one folder below that holds any.

    Raises:
        InputError: There is none, or there are several runs below.
    """
    excluded = {path.resolve() for path in exclude}
    listing = _list_level(folder, excluded)
    if listing.paths:
        return listing
    below = list(_runs_below(folder, excluded, _MAX_DEPTH))
    if len(below) == 1:
        below[0].notes.append(f"checkpoints found in {below[0].root}")
        return Listing(folder, below[0].paths, below[0].left_out, below[0].notes)
    if below:
        raise InputError(
            f"{folder}: holds {len(below)} runs, no checkpoints of its own.",
            tip="Name the ones you mean:\n" + "\n".join(f"  {run.root}" for run in below[:20]),
        )
    raise InputError(
        f"{folder}: no checkpoint in this folder or below.",
        tip="Give a folder with .pt, .pth, .bin, .ckpt or .safetensors files, or with checkpoint-N/ folders.",
    )


def _list_level(folder: Path, excluded: set[Path]) -> Listing:
    listing = Listing(folder)
    own_files: set[Path] = set()
    if is_checkpoint_folder(folder):
        listing.paths.append(folder)
        own_files = {file for reader_file in folder.glob("*") if (file := reader_file).is_file()}
        own_files -= {file for file in own_files if not _belongs_to_folder_format(file)}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry in own_files or entry.resolve() in excluded:
            continue
        if entry.is_dir():
            _add_folder(listing, entry, excluded)
        elif not _NOT_WEIGHTS.search(entry.name) and _may_be_checkpoint(entry):
            listing.paths.append(entry)
        elif entry.suffix.lower() not in _PLAIN_SUFFIXES:
            listing.left_out.append(entry.name)
    return listing


def _belongs_to_folder_format(file: Path) -> bool:
    """Whether a file beside a folder checkpoint is one of its parts."""
    stem = file.name.split(".")[0]
    names = {Path(name).stem.split(".")[0] for name in huggingface.WEIGHTS}
    return (
        file.suffix in {".distcp"}
        or file.name.endswith("_states.pt")
        or any(stem == name or stem.startswith(f"{name}-0") for name in names)
    )


def _add_folder(listing: Listing, folder: Path, excluded: set[Path]) -> None:
    """Add a subfolder that is a checkpoint, holds one, or is called `checkpoints`."""
    if is_checkpoint_folder(folder):
        listing.paths.append(folder)
        return
    if folder.name.lower() in _CHECKPOINT_FOLDERS:
        inner = _list_level(folder, excluded)
        listing.paths += inner.paths
        listing.left_out += inner.left_out
        return
    if not counts_in_name(folder.name) and not is_alias(folder.name):
        return
    inside = _list_level(folder, excluded).paths
    main = [path for path in inside if path.name.split(".")[0] in _MAIN_FILES]
    chosen = inside if len(inside) == 1 else main
    if len(chosen) == 1:
        listing.paths += chosen
    elif inside and not any(counts_in_name(path.name) for path in inside):
        listing.notes.append(
            f"left out {folder.name}/: holds {len(inside)} weight files; choose with a glob such as "
            f"'{listing.root}/*/{inside[0].name}'"
        )


def _may_be_checkpoint(file: Path) -> bool:
    """Whether suffix or content says checkpoint; a suffix is enough, so that damaged files are listed."""
    if not file.is_file():
        return False
    name = file.name.lower()
    return name.endswith((*SUFFIXES, ".pth.tar")) or find_reader(file) is not None


def _runs_below(folder: Path, excluded: set[Path], depth: int) -> Iterator[Listing]:
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        listing = _list_level(entry, excluded)
        if listing.paths:
            yield listing
        elif depth > 1:
            yield from _runs_below(entry, excluded, depth - 1)
