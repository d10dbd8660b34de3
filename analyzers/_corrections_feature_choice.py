"""Which features were chosen, and what was left out of them and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._corrections_feature_file import FeatureFile, Group
from dynprobe.analyzers._corrections_feature_names import FeatureNames, Match, listed, loosened

_LISTED = 8


@dataclass(frozen=True)
class Choice:
    """The chosen features.

    Attributes:
        columns: Of those that are numbers, in the order chosen.
        named: Those of them that were named alone, not by a pattern.
        groups: The one-hot features.
        notes: What was left out and why.
    """

    columns: tuple[int, ...]
    named: frozenset[int]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]


def choose_features(text: str, names: FeatureNames, file: FeatureFile) -> Choice:
    """The features that the option `features` names; immutable ones that a pattern matches are left out.

    Args:
        text: Names, numbers, patterns and one-hot features, separated by commas.
        names: Of the features in the data.
        file: What the feature file says.

    Raises:
        OptionError: If there is no such feature, one that is named alone is immutable, or categories of a
            one-hot feature are chosen and others are not.
    """
    columns: dict[int, None] = {}
    named: set[int] = set()
    groups: dict[str, Group] = {}
    by_name = {loosened(group.name): group for group in file.groups}
    for part in filter(None, map(str.strip, text.split(","))):
        if group := by_name.get(loosened(part)):
            _check_may_change(group.immutable, group.name)
            groups[group.name] = group
            continue
        match = _match(part, names, file)
        columns |= dict.fromkeys(match.columns)
        named |= set(match.columns) if match.is_single else set()
    for column in named:
        _check_may_change(file.of(column, "immutable", False), names.names[column])
    for group in file.groups:
        if _is_whole(group, columns, names):
            groups.setdefault(group.name, group)
        columns = {column: None for column in columns if column not in group.columns}
    fixed = [column for column in columns if file.of(column, "immutable", False)]
    left_out = [names.names[column] for column in fixed]
    left_out += [name for name, group in groups.items() if group.immutable]
    kept = tuple(column for column in columns if column not in set(fixed))
    free = tuple(group for group in groups.values() if not group.immutable)
    if not kept and not free:
        raise _nothing(left_out)
    return Choice(kept, frozenset(named), free, left_out_note(left_out, "immutable"))


def left_out_note(names: Iterable[str], why: str) -> tuple[str, ...]:
    """A sentence on features that do not take part, if there are any."""
    items = list(names)
    return (f"left out, {why}: {listed(items, _LISTED)}",) if items else ()


def _match(text: str, names: FeatureNames, file: FeatureFile) -> Match:
    try:
        return names.match(text, "features")
    except OptionError as error:
        if not file.groups:
            raise
        one_hot = listed(group.name for group in file.groups)
        raise OptionError(error.message, f"{error.tip} One-hot features: {one_hot}.") from None


def _check_may_change(immutable: bool, name: str) -> None:
    if immutable:
        raise OptionError(
            f"features: {name!r} is immutable in the feature file.",
            "Leave it out, or remove immutable there.",
        )


def _is_whole(group: Group, columns: Iterable[int], names: FeatureNames) -> bool:
    """Whether all columns of a one-hot feature are among the chosen ones.

    Raises:
        OptionError: If only some are: changing one changes the others.
    """
    chosen = set(columns) & set(group.columns)
    if 0 < len(chosen) < len(group.columns):
        raise OptionError(
            f"features: {names.names[min(chosen)]!r} is one category of {group.name!r}, not all are chosen.",
            f"They change together: give {group.name}.",
        )
    return bool(chosen)


def _nothing(left_out: list[str]) -> OptionError:
    if left_out:
        return OptionError(f"features: all are immutable: {listed(left_out, _LISTED)}.", "Choose others.")
    return OptionError("features: none is chosen.", "Give names separated by commas, or all.")
