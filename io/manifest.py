"""`dynprobe.toml`: what a checkpoint does not hold (model, data, loss, training facts, labels).

The command line comes first, then the manifest in the run folder or its nearest parent. File paths in a
manifest are relative to the manifest's own folder, so that a run folder can be moved and mailed.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynprobe.io.errors import BadManifest
from dynprobe.io.names import nearest, suggestion
from dynprobe.io.spec import COMMAND_LINE, Spec, absolute, merge_spec, parse_args, shown

__all__ = [
    "COMMAND_LINE",
    "EXAMPLE",
    "FILE_NAME",
    "Manifest",
    "Spec",
    "find_manifest",
    "merge_spec",
    "parse_args",
    "read_manifest",
    "shown",
]

FILE_NAME = "dynprobe.toml"

EXAMPLE = """\
[model]
factory = "builtin:cnn"
args = { width = 16, classes = 10 }
[data]
source = "sklearn:digits"
args = { split = "train" }
[loss]
name = "cross_entropy"
"""

# Table → the key that names the thing. All four become a Spec.
_SPEC_KEYS = {"model": "factory", "data": "source", "test_data": "source", "loss": "name"}
_CHECKPOINT_KEYS = ("glob", "key", "step", "ema")
_TABLES = (*_SPEC_KEYS, "training", "groups", "checkpoints")

# Facts that analyzers read by name, with what each must be; any other fact may stand beside them.
_TRAINING_FACTS: dict[str, type | tuple[type, ...]] = {
    "learning_rate": (int, float),
    "batch_size": int,
    "schedule": str,
    "optimizer": str,
    "momentum": (int, float),
    "weight_decay": (int, float),
    "steps": int,
    "epochs": (int, float),
    "samples": int,
    "seed": int,
}
_TRAINING_ALIASES = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "optim": "optimizer",
    "optimiser": "optimizer",
    "n_samples": "samples",
}


@dataclass
class Manifest:
    """What a `dynprobe.toml` says; all empty when there is none (`path` is None)."""

    path: Path | None = None
    model: Spec | None = None
    data: Spec | None = None
    test_data: Spec | None = None
    loss: Spec | None = None
    training: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    checkpoints: dict[str, Any] = field(default_factory=dict)


def find_manifest(run: Path) -> Manifest:
    """The manifest of a run: in its folder, or in the nearest parent folder that has one.

    Args:
        run: A run folder, or a checkpoint file in one.

    Returns:
        The parsed manifest, or an empty one if no folder up to the root holds a `dynprobe.toml`.

    Raises:
        BadManifest: A `dynprobe.toml` is there but is not what it should be.
    """
    folder = absolute(run)
    for parent in (folder, *folder.parents):
        path = parent / FILE_NAME
        if path.is_file():
            return read_manifest(path)
    return Manifest()


def read_manifest(path: Path) -> Manifest:
    """Parse one `dynprobe.toml`.

    Raises:
        BadManifest: The file is not TOML, or has an unknown table or key, or a value of the wrong type;
            the message names the file, the table and the key.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadManifest(f"{shown(path)}: not valid TOML: {error}.") from error
    except OSError as error:
        raise BadManifest(f"{shown(path)}: cannot be read: {error.strerror}.") from error
    for name, table in document.items():
        if name not in _TABLES:
            raise BadManifest(f"{shown(path)}: unknown table [{name}].", suggestion(name, _TABLES))
        if not isinstance(table, dict):
            raise BadManifest(
                f"{shown(path)}: {name!r} is a value, but must be a table.",
                f"Write [{name}] on its own line.",
            )
    specs = {name: _spec(path, name, document[name]) for name in _SPEC_KEYS if name in document}
    return Manifest(
        path=path,
        training=_training(path, document.get("training", {})),
        groups=_groups(path, document.get("groups", {})),
        checkpoints=_checkpoints(path, document.get("checkpoints", {})),
        **specs,
    )


def _spec(path: Path, table: str, content: dict[str, Any]) -> Spec:
    """One of the four tables that name a thing and its arguments."""
    key = _SPEC_KEYS[table]
    _check_keys(path, table, content, (key, "args"))
    if key not in content:
        raise BadManifest(f"{shown(path)}: [{table}] has no {key!r}.", f"For example:\n{_example(table)}")
    _check_type(path, table, key, content[key], str)
    args = content.get("args", {})
    _check_type(path, table, "args", args, dict)
    return Spec(_anchored(content[key], path.parent), dict(args), str(path))


def _anchored(name: str, folder: Path) -> str:
    """`name`, made absolute if it is a file (or `file.py:callable`, or `hf:folder`) below `folder`."""
    scheme, colon, rest = name.partition(":")
    if scheme == "hf" and colon:
        return f"hf:{os.path.normpath(folder / rest)}"
    if scheme.endswith(".py") and colon:
        return f"{os.path.normpath(folder / scheme)}:{rest}"
    # A Windows drive is one letter; `sklearn:digits`, `builtin:cnn` and `module:callable` are not files.
    if (colon and len(scheme) > 1) or not Path(name).suffix:
        return name
    return os.path.normpath(folder / name)


def _training(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Facts about the training: known ones are checked, others kept unless they look misspelt."""
    for key, value in content.items():
        if key in _TRAINING_FACTS:
            _check_type(path, "training", key, value, _TRAINING_FACTS[key])
            if isinstance(value, float) and not math.isfinite(value):
                raise BadManifest(f"{shown(path)}: [training] {key} = {value} is not a finite number.")
            continue
        meant = _TRAINING_ALIASES.get(key) or nearest(key, _TRAINING_FACTS, cutoff=0.8)
        if meant:
            raise BadManifest(
                f"{shown(path)}: [training] has the unknown key {key!r}.", f"Did you mean {meant!r}?"
            )
    return content


def _groups(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Free labels; each one word or number, so that runs can be grouped by it."""
    for key, value in content.items():
        _check_type(path, "groups", key, value, (str, int, float, bool))
    return content


def _checkpoints(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """How to read the folder: `glob`, `key` of the weights, `step` regular expression, `ema`."""
    _check_keys(path, "checkpoints", content, _CHECKPOINT_KEYS)
    for key, value in content.items():
        _check_type(path, "checkpoints", key, value, bool if key == "ema" else str)
    if "step" in content:
        try:
            groups = re.compile(content["step"]).groups
        except re.error as error:
            raise BadManifest(
                f"{shown(path)}: [checkpoints] step is not a regular expression: {error}."
            ) from error
        if groups < 1:
            raise BadManifest(
                f"{shown(path)}: [checkpoints] step = {content['step']!r} has no group for the number.",
                r"Put the number in brackets, for example 'it(\d+)'.",
            )
    return content


def _check_keys(path: Path, table: str, content: Mapping[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    for key in content:
        if key not in known:
            raise BadManifest(
                f"{shown(path)}: [{table}] has the unknown key {key!r}.", suggestion(key, known)
            )


_TYPE_NAMES = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
}


def _check_type(path: Path, table: str, key: str, value: object, wanted: type | tuple[type, ...]) -> None:
    kinds = wanted if isinstance(wanted, tuple) else (wanted,)
    # In Python a bool is an int, but `batch_size = true` is a mistake.
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return
    names = [_TYPE_NAMES[kind] for kind in kinds if kind is not int or float not in kinds]
    raise BadManifest(f"{shown(path)}: [{table}] {key} = {value!r} must be {' or '.join(names)}.")


def _example(table: str) -> str:
    """The lines of EXAMPLE for one table."""
    name = "data" if table == "test_data" else table
    lines = re.split(r"(?m)^(?=\[)", EXAMPLE)
    return (
        next(part for part in lines if part.startswith(f"[{name}]"))
        .replace(f"[{name}]", f"[{table}]")
        .strip()
    )
