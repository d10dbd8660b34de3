"""What checkpoints and layers are called in the figures of similarities."""

from __future__ import annotations

import math
from typing import Any

MOST_LABELS = 25
"""Labels along an axis; more layers are labelled in part."""


def short(text: str, length: int = 20) -> str:
    """A long name without its middle, as matplotlib prints it literally and a legend takes it."""
    return _elided(text.lstrip("_") or text, length).replace("$", r"\$")


def tell_apart(names: list[str], length: int = 18) -> list[str]:
    """Short forms of names with dots that stay as different as the names.

    Where a name is too long, parts that all share at the start and the end go; then parts before the last
    become their first letters, from the left and in all names; then the middle goes. Where names would become
    equal, all are left longer.
    """
    longest, parts = max(map(len, names), default=0), [name.split(".") for name in names]
    if longest > length:
        parts = _stripped(parts)
    found = names
    for allowed in range(length, max(longest, length) + 1):
        found = [short(text, allowed) for text in _with_initials(parts, allowed)]
        if len(set(found)) == len(set(names)):
            break
    return found


def _stripped(parts: list[list[str]]) -> list[list[str]]:
    """Without the parts that all share at the start and at the end; each keeps one."""
    for at in (0, -1):
        while all(len(part) > 1 for part in parts) and len({part[at] for part in parts}) == 1 < len(parts):
            parts = [part[1:] if at == 0 else part[:-1] for part in parts]
    return parts


def _with_initials(parts: list[list[str]], length: int) -> list[str]:
    """As few leading parts of all names as will do become their first letters; numbers stay."""
    texts: list[str] = []
    for count in range(max(map(len, parts), default=0)):
        ends = [min(count, len(part) - 1) for part in parts]
        texts = [
            ".".join([*map(_initial, part[:end]), *part[end:]]) for part, end in zip(parts, ends, strict=True)
        ]
        if max(map(len, texts)) <= length:
            break
    return texts


def _initial(part: str) -> str:
    return part if part.isdigit() else part[:1]


def _elided(text: str, length: int) -> str:
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def at_step(run: str, step: float, length: int = 20) -> str:
    """A checkpoint as a reader calls it."""
    name = short(run, length)
    return f"{name}, step {step:g}".removeprefix(", ") if math.isfinite(step) else name


def label_axis(axis: Any, names: list[str], *, length: int = 18) -> None:
    """Names along an axis, evenly thinned where there are too many; the last one always has its name."""
    every = math.ceil(len(names) / MOST_LABELS)
    shown, labels = list(range(len(names) - 1, -1, -every))[::-1], tell_apart(names, length)
    axis.set_ticks(shown, [labels[i] for i in shown])
