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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynprobe.io.errors import BadManifest, InputError
from dynprobe.io.names import nearest, suggestion

FILE_NAME = "dynprobe.toml"
COMMAND_LINE = "command line"

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


@dataclass(frozen=True)
class Spec:
    """A model, data set or loss by name, and who named it.

    Args:
        name: For example `builtin:cnn`, `sklearn:digits`, `package.module:callable`, a file.
        args: Keyword arguments for it.
        origin: `"command line"`, or the path of the manifest that says so. Only the command line is trusted.
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    origin: str = COMMAND_LINE

    @property
    def trusted(self) -> bool:
        """Whether the user typed it, so that naming code is their own decision."""
        return self.origin == COMMAND_LINE


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
    folder = Path(os.path.abspath(run))
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
                f"{shown(path)}: {name!r} is a value, but must be a table.", f"Write [{name}] on its own line."
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
    if name == "hf":
        return f"hf:{folder}"
    scheme, colon, rest = name.partition(":")
    if scheme == "hf":
        return f"hf:{os.path.normpath(folder / rest)}"
    if scheme.endswith(".py") and colon:
        return f"{os.path.normpath(folder / scheme)}:{rest}"
    # A Windows drive is one letter; `sklearn:digits`, `builtin:cnn` and `module:callable` are not files.
    if (colon and len(scheme) > 1) or not Path(name).suffix:
        return name
    return os.path.normpath(folder / name)


def _training(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Facts about the training: known ones checked, others kept unless they look like a misspelt known one."""
    for key, value in content.items():
        if key in _TRAINING_FACTS:
            _check_type(path, "training", key, value, _TRAINING_FACTS[key])
            if isinstance(value, float) and not math.isfinite(value):
                raise BadManifest(f"{shown(path)}: [training] {key} = {value} is not a finite number.")
            continue
        meant = _TRAINING_ALIASES.get(key) or nearest(key, _TRAINING_FACTS, cutoff=0.8)
        if meant:
            raise BadManifest(f"{shown(path)}: [training] has the unknown key {key!r}.", f"Did you mean {meant!r}?")
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


_TYPE_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}


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
    return next(part for part in lines if part.startswith(f"[{name}]")).replace(f"[{name}]", f"[{table}]").strip()


def shown(path: Path | str) -> str:
    """A path as a message shows it: relative if it lies below the current folder."""
    absolute = Path(os.path.abspath(path))
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)


def parse_args(options: Iterable[str], option: str = "--model-arg") -> dict[str, Any]:
    """The `k=v` values of a repeated option, as keyword arguments.

    Values are read as TOML (whole numbers, decimals, true/false, lists, quoted text); what is not TOML is
    text, so `split=train` needs no quotes.

    Raises:
        InputError: A value has no `=` or no name before it.
    """
    parsed: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"{option} {text!r} is not of the form NAME=VALUE.", f"For example {option} width=16.")
        parsed[key] = _literal(value.strip())
    return parsed


def _literal(text: str) -> Any:
    """One TOML value, or the text itself."""
    python_words = {"True": True, "False": False}
    if text in python_words:
        return python_words[text]
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = document["value"]
    # More keys: a line break in the text made a second line of TOML. Dates are of no use to a model.
    plain = isinstance(value, (str, int, float, bool, list, dict))
    return value if len(document) == 1 and plain else text


def merge_spec(typed: str | None, typed_args: Mapping[str, Any], manifest: Spec | None, option: str) -> Spec | None:
    """What the user typed over what the manifest says.

    A typed name replaces the manifest's together with its arguments, unless it is the same name; typed
    arguments alone are laid over the manifest's, which remains the manifest's choice (and as untrusted).

    Raises:
        InputError: Arguments were typed, but nothing says what they are for.
    """
    if typed is None:
        if manifest is None and typed_args:
            raise InputError(f"{option}-arg was given, but no {option} and no manifest says what it is for.")
        return replace(manifest, args={**manifest.args, **typed_args}) if manifest else None
    kept = manifest.args if manifest and manifest.name == typed else {}
    return Spec(typed, {**kept, **typed_args}, COMMAND_LINE)
