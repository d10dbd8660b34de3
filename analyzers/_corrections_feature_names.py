"""Features of a flattened input by name, number or pattern, and lists of options that name them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from typing import Any

from dynprobe.analyzers import OptionError

_NUMBER = re.compile(r"[+-]?\d+")
_NUMBERS = re.compile(r"([+-]?\d+)?:([+-]?\d+)?(?::([+-]?\d+))?")
_SHOWN = 30


@dataclass(frozen=True)
class Match:
    """The features that a text stands for.

    Attributes:
        columns: Their numbers in the flattened input.
        is_single: Whether it is one feature's own name or number, not a pattern.
    """

    columns: tuple[int, ...]
    is_single: bool


class FeatureNames:
    """The names of the entries of a flattened input.

    Args:
        names: One for each entry.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _exact(self) -> dict[str, list[int]]:
        return _positions(self.names)

    @cached_property
    def _loose(self) -> dict[str, list[int]]:
        return _positions(loosened(name) for name in self.names)

    def match(self, text: str, where: str) -> Match:
        """The features that a text stands for.

        In this order: a name; a number, counted from the end where negative; numbers `first:end` as in
        Python; `all`; a name but for case, spaces, underscores and hyphens; a pattern with `*`, `?` or `[…]`.

        Args:
            text: What was typed.
            where: Begins the message: the option, or the place in a file.

        Raises:
            OptionError: If there is no such feature, or more than one has that name.
        """
        if found := self._exact.get(text):
            return self._only(found, text, where)
        if _NUMBER.fullmatch(text):
            return self._number(int(text), where)
        if numbers := _NUMBERS.fullmatch(text):
            return self._slice(text, numbers, where)
        if text.lower() == "all":
            return Match(tuple(range(len(self))), False)
        if found := self._loose.get(loosened(text)):
            return self._only(found, text, where)
        if columns := self._pattern(text):
            return Match(columns, False)
        what = "matches" if any(sign in text for sign in "*?[") else "is called"
        raise OptionError(f"{where}: no feature {what} {text!r}.", f"{self._guess(text)}{self._there_are()}")

    def _only(self, found: list[int], text: str, where: str) -> Match:
        if len(found) == 1:
            return Match((found[0],), True)
        places = ", ".join(f"{self.names[i]!r} ({i})" for i in found[:5])
        raise OptionError(
            f"{where}: {text!r} may be {len(found)} features: {places}.", "Give the feature's number."
        )

    def _number(self, number: int, where: str) -> Match:
        if not -len(self) <= number < len(self):
            raise OptionError(f"{where}: there is no feature {number}.", self._there_are())
        return Match((number % len(self),), True)

    def _slice(self, text: str, numbers: re.Match[str], where: str) -> Match:
        first, end, step = (int(part) if part else None for part in numbers.groups())
        columns = tuple(range(len(self))[first:end:step]) if step != 0 else ()
        if not columns:
            raise OptionError(f"{where}: {text!r} holds no feature.", self._there_are())
        return Match(columns, False)

    def _pattern(self, text: str) -> tuple[int, ...]:
        if not any(sign in text for sign in "*?["):
            return ()
        exact = tuple(i for i, name in enumerate(self.names) if fnmatchcase(name, text))
        lower = text.lower()
        return exact or tuple(i for i, name in enumerate(self.names) if fnmatchcase(name.lower(), lower))

    def _guess(self, text: str) -> str:
        near = difflib.get_close_matches(loosened(text), list(self._loose), 3)
        names = [self.names[self._loose[each][0]] for each in near]
        return f"Did you mean {' or '.join(map(repr, names))}? " if names else ""

    def _there_are(self) -> str:
        return f"There are {len(self)} features, numbered from 0: {listed(self.names)}."


def input_names(shape: Sequence[int]) -> tuple[str, ...]:
    """Names for the entries of an input that has none.

    Args:
        shape: Of one sample. Of an image (channels, rows, columns) they are `pixel_ROW_COLUMN`, or
            `pixel_CHANNEL_ROW_COLUMN` of more than one channel; else `x` and the position along every axis:
            `x0`, `x1`, …, or `x3_5`.

    Returns:
        One name for each entry of the flattened input.
    """
    is_image = len(shape) == 3
    axes = shape[1:] if is_image and shape[0] == 1 else shape
    start = "pixel_" if is_image else "x"
    return tuple(f"{start}{'_'.join(map(str, place))}" for place in product(*map(range, axes)))


def loosened(name: str) -> str:
    """A name without what people type in different ways: case, spaces, underscores, hyphens."""
    return re.sub(r"[\s_-]", "", name.lower())


def listed(names: Iterable[str], limit: int = _SHOWN) -> str:
    """`a, b, c and 4 more`."""
    items = list(names)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _positions(names: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return found


@dataclass(frozen=True)
class Said:
    """What is said of some features.

    Attributes:
        match: Which ones.
        facts: By key.
        where: Who says so, for messages.
    """

    match: Match
    facts: Mapping[str, Any]
    where: str


def settled(statements: Sequence[Said], names: FeatureNames) -> dict[int, dict[str, Any]]:
    """Facts of every column: what is said of a single feature goes before what is said of a pattern.

    Raises:
        OptionError: If two statements of the same kind contradict each other.
    """
    found: dict[int, dict[str, Any]] = {}
    for is_single in (False, True):
        level: dict[tuple[int, str], tuple[Any, str]] = {}
        for said in (each for each in statements if each.match.is_single == is_single):
            for column, (key, value) in product(said.match.columns, said.facts.items()):
                other, where = level.setdefault((column, key), (value, said.where))
                if other != value:
                    raise OptionError(
                        f"{said.where} and {where} give {names.names[column]!r} another {key}.",
                        "Keep one of them.",
                    )
                found.setdefault(column, {})[key] = value
    return found


@dataclass(frozen=True)
class Amount:
    """A number in the feature's own units, or as a part of something.

    Attributes:
        value: The number; of 2.5 % it is 0.025.
        is_part: Whether it was given in per cent.
    """

    value: float
    is_part: bool

    def of(self, whole: float) -> float:
        """The number in the feature's units, where the whole is this."""
        return self.value * whole if self.is_part else self.value


def amount(given: object, where: str) -> Amount:
    """Read a number or per cent: `0.5`, `2.5%`.

    Args:
        given: A text, or a number from a file.
        where: Begins the message.

    Raises:
        OptionError: If it is neither, or not finite, or not from 0 % to 100 %.
    """
    text = given.strip() if isinstance(given, str) else ""
    is_part = text.endswith("%")
    try:
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise ValueError
        value = float(text.removesuffix("%")) / (100 if is_part else 1) if text else float(given)
    except ValueError:
        raise OptionError(f"{where}: {given!r} is no number.", "Give one like 0.5, or 2.5%.") from None
    if not math.isfinite(value) or (is_part and not 0 <= value <= 1):
        allowed = "Per cent go from 0% to 100%." if is_part else "Give a finite number."
        raise OptionError(f"{where}: {given!r} cannot be used.", allowed)
    return Amount(value, is_part)


@dataclass(frozen=True)
class Given:
    """An option that is one value for all features, values for some, or both.

    Attributes:
        everywhere: For the features that are not named; None if there is none.
        of: By column.
    """

    everywhere: str | None
    of: dict[int, str]


def read_given(text: str, names: FeatureNames, option: str) -> Given:
    """Read `VALUE`, `NAME=VALUE,…`, or `VALUE,NAME=VALUE,…`.

    A name may be all that `FeatureNames.match` takes; one feature's own name goes before a pattern.

    Args:
        text: What was typed.
        names: Of the features.
        option: Its name, for messages.

    Raises:
        OptionError: If a name is unknown, or two entries contradict each other.
    """
    everywhere: list[str] = []
    statements = []
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = map(str.strip, part.rpartition("="))
        if equals:
            where = f"{option} {part}"
            statements.append(Said(names.match(name, where), {option: value}, where))
        else:
            everywhere.append(value)
    if len(everywhere) > 1:
        raise OptionError(
            f"{option} {text!r} has {len(everywhere)} values for all features: {', '.join(everywhere)}.",
            "Give one for all, and NAME=VALUE for single ones.",
        )
    of = {column: str(facts[option]) for column, facts in settled(statements, names).items()}
    return Given(everywhere[0] if everywhere else None, of)
