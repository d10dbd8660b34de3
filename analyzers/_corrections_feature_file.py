"""The file of facts about features: ranges, costs, stability, units, what may change and which way."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._corrections_feature_names import (
    Amount,
    FeatureNames,
    Said,
    amount,
    loosened,
    settled,
)

EXAMPLE = """[features.interest]
range = [0, 10]        # or "1%:99%"
stability = "2.5%"
direction = "down\""""
"""What a file looks like, for messages."""

_DIRECTIONS = {"up": 1, "down": -1}
_SAME = {"mean": "offset", "std": "scale"}
_OF_COLUMNS = {"offset", "scale", "immutable"}
"""What may be said of a single column of a one-hot feature."""


@dataclass(frozen=True)
class Group:
    """A one-hot feature, as the file says it.

    Attributes:
        name: What it is called.
        columns: Of the flattened input.
        weight: Cost of another category.
        has_baseline: Whether all zero is a category too.
        immutable: Whether it may not change.
    """

    name: str
    columns: tuple[int, ...]
    weight: float = 1.0
    has_baseline: bool = False
    immutable: bool = False


@dataclass(frozen=True)
class FeatureFile:
    """What a feature file says.

    Attributes:
        facts: By column: any of `range`, `weight`, `stability`, `integer`, `immutable`, `direction`,
            `offset`, `scale`, `unit`.
        groups: The one-hot features.
    """

    facts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    groups: tuple[Group, ...] = ()

    def of(self, column: int, key: str, otherwise: Any) -> Any:
        """One fact about a column."""
        return self.facts.get(column, {}).get(key, otherwise)


def read_feature_file(path: str, names: FeatureNames) -> FeatureFile:
    """Read a TOML file of facts about features.

    Sections `[features.NAME]` say what is known of a feature, or of all that a pattern matches, and
    `[[one_hot]]` which columns are the categories of one feature. What is said of one feature by its name
    goes before what is said of a pattern.

    Args:
        path: Of the file; an empty text for none.
        names: Of the features in the data.

    Raises:
        OptionError: If the file cannot be read, has an unknown key or a value that makes no sense, names a
            feature that the data do not have, or contradicts itself.
    """
    if not path:
        return FeatureFile()
    document = _load(path)
    _check_keys(document, ("features", "one_hot"), path, EXAMPLE)
    sections = document.get("features", {})
    if not isinstance(sections, Mapping) or not all(isinstance(s, Mapping) for s in sections.values()):
        raise OptionError(f"{path}: features needs one section for each feature.", EXAMPLE)
    statements = [_section(str(name), section, path, names) for name, section in sections.items()]
    facts = settled(statements, names)
    entries = document.get("one_hot", [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise OptionError(f"{path}: one_hot needs double brackets.", "[[one_hot]]")
    groups = tuple(_group(entry, path, names, facts) for entry in entries)
    _check_groups(groups, statements, path, names)
    return FeatureFile(facts, groups)


def _load(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise OptionError(f"{path}: there is no such feature file.", f"It looks like this:\n{EXAMPLE}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{path}: it is no TOML: {error}.",
            'A name with spaces or other signs needs quotes: [features."mean radius"].',
        ) from error
    except OSError as error:
        raise OptionError(f"{path}: it cannot be read: {error.strerror}.") from error


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], where: str, tip: str = "") -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            guess = f"Did you mean {near[0]!r}? " if near else ""
            raise OptionError(
                f"{where}: {key!r} is not known.", f"{guess}Known: {', '.join(known)}.\n{tip}".strip()
            )


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{where}: {value!r} is neither true nor false.", "Write it without quotes.")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{where}: {value!r} is no text.", "Write it in quotes.")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool | str):
        raise OptionError(f"{where}: {value!r} is no number.", "Write it without quotes.")
    return amount(value, where).value


def _positive(value: object, where: str) -> float:
    number = _number(value, where)
    if number <= 0:
        raise OptionError(f"{where}: {number:g} must be above 0.", "What may not change is immutable = true.")
    return number


def _direction(value: object, where: str) -> int:
    if value not in _DIRECTIONS:
        raise OptionError(
            f"{where}: {value!r} is no direction.", 'Give "up" (may only grow) or "down" (may only shrink).'
        )
    return _DIRECTIONS[str(value)]


def half_width(value: object, where: str) -> Amount:
    """Read a half-width, in the feature's units or per cent of its range.

    Raises:
        OptionError: If it is none, or negative.
    """
    found = amount(value, where)
    if found.value < 0:
        raise OptionError(f"{where}: {value!r} is negative.", "Give a half-width, such as 2.5%; 0 is none.")
    return found


def interval(value: object, where: str) -> tuple[Amount, Amount]:
    """Read a range: `[0, 10]` or `0:10` in the feature's units, `1%:99%` as quantiles of the data.

    Raises:
        OptionError: If it is none, or its ends are not in order.
    """
    ends = value.split(":") if isinstance(value, str) else value
    if not isinstance(ends, list) or len(ends) != 2:
        raise OptionError(
            f"{where}: {value!r} is no range.", "Give LOW:HIGH, such as 0:10, or 1%:99% of the data."
        )
    low, high = (amount(end, where) for end in ends)
    if low.is_part == high.is_part and low.value >= high.value:
        raise OptionError(f"{where}: the range {value!r} has no inside.", "Give the lower end first.")
    return low, high


_READERS: Mapping[str, Callable[[object, str], Any]] = {
    "range": interval,
    "weight": _positive,
    "stability": half_width,
    "integer": _flag,
    "immutable": _flag,
    "direction": _direction,
    "offset": _number,
    "scale": _positive,
    "mean": _number,
    "std": _positive,
    "unit": _text,
}


def _section(name: str, section: Mapping[str, Any], path: str, names: FeatureNames) -> Said:
    """What one section says, checked."""
    where = f"{path}: [features.{name}]"
    _check_keys(section, tuple(_READERS), where)
    facts: dict[str, Any] = {}
    for key, value in section.items():
        meant = _SAME.get(key, key)
        if meant != key and meant in section:
            raise OptionError(f"{where}: {key} and {meant} say the same.", f"Keep {key} or {meant}.")
        facts[meant] = _READERS[key](value, f"{where} {key}")
    if facts.get("immutable") and "direction" in facts:
        raise OptionError(f"{where}: what is immutable has no direction.", "Keep immutable or direction.")
    return Said(names.match(name, where), facts, where)


def _group(
    entry: Mapping[str, Any], path: str, names: FeatureNames, facts: Mapping[int, Mapping[str, Any]]
) -> Group:
    """One one-hot feature, checked by itself."""
    where = f"{path}: [[one_hot]]"
    _check_keys(entry, ("name", "features", "weight", "baseline", "immutable"), where)
    name = _text(entry.get("name", ""), f"{where} name")
    where = f"{where} {name!r}"
    listed = entry.get("features", [])
    if not isinstance(listed, list) or any(
        isinstance(f, bool) or not isinstance(f, str | int) for f in listed
    ):
        raise OptionError(f"{where}: features needs a list of names.", 'features = ["house", "flat", "land"]')
    columns = [column for feature in listed for column in names.match(str(feature), where).columns]
    baseline = _flag(entry.get("baseline", False), f"{where} baseline")
    if len(columns) + baseline < 2 or len(set(columns)) < len(columns):
        raise OptionError(
            f"{where}: it needs at least two categories, each one once.",
            "baseline = true makes a category of all zero.",
        )
    frozen = [column for column in columns if facts.get(column, {}).get("immutable")]
    immutable = _flag(entry.get("immutable", False), f"{where} immutable")
    if 0 < len(frozen) < len(columns) and not immutable:
        raise OptionError(
            f"{where}: {names.names[frozen[0]]!r} is immutable and others are not.",
            "Categories change together: write immutable = true here.",
        )
    weight = _positive(entry.get("weight", 1.0), f"{where} weight")
    return Group(name, tuple(columns), weight, baseline, immutable or bool(frozen))


def _check_groups(groups: tuple[Group, ...], statements: list[Said], path: str, names: FeatureNames) -> None:
    """Whether one-hot features get on with each other and with what is said of their columns."""
    owner: dict[int, str] = {}
    taken = {loosened(name) for name in names.names}
    for group in groups:
        if loosened(group.name) in taken:
            raise OptionError(
                f"{path}: [[one_hot]] {group.name!r}: another feature has that name.",
                "Give it a name of its own.",
            )
        taken.add(loosened(group.name))
        for column in group.columns:
            if (other := owner.setdefault(column, group.name)) != group.name:
                raise OptionError(
                    f"{path}: {names.names[column]!r} is a category of {other!r} and of {group.name!r}.",
                    "Keep it in one of them.",
                )
    for said in statements:
        column = said.match.columns[0]
        wrong = [key for key in said.facts if key not in _OF_COLUMNS]
        if said.match.is_single and column in owner and wrong:
            raise OptionError(
                f"{said.where}: {wrong[0]} means nothing for a category of {owner[column]!r}.",
                f"Remove it; [[one_hot]] takes weight and immutable for all of {owner[column]!r}.",
            )
