"""A model, data set or loss by name; and how options and a manifest together choose it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynprobe.io.errors import InputError

COMMAND_LINE = "command line"


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


def absolute(path: Path | str) -> Path:
    """The path from the root, without `..`; links stay as they are, unlike with `Path.resolve`."""
    return Path(os.path.normpath(Path(path).absolute()))


def shown(path: Path | str) -> str:
    """A path as a message shows it: relative if it lies below the current folder."""
    full = absolute(path)
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else str(full)


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
            raise InputError(
                f"{option} {text!r} is not of the form NAME=VALUE.", f"For example {option} width=16."
            )
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


def merge_spec(
    typed: str | None, typed_args: Mapping[str, Any], manifest: Spec | None, option: str
) -> Spec | None:
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
