"""What `dynprobe report diff` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.cli.numbers import number, one_line
from dynprobe.cli.plain_table import print_rows
from dynprobe.io.plain_json import dumps

if TYPE_CHECKING:
    from dynprobe.io.compare import Comparison

HEAD = ("variable", "entries", "max |a-b|", "max relative", "max in errors", "")


def print_diff(
    found: Mapping[str, Comparison], alone: Mapping[str, Path], same: bool, *, as_json: bool
) -> None:
    """Print how two reports compare.

    Args:
        found: Comparisons of what both hold, by analyzer.
        alone: Analyzers of only one report, and which.
        same: The verdict.
        as_json: One JSON document instead of tables.
    """
    if as_json:
        results = {name: asdict(c) | {"same": c.same} for name, c in found.items()}
        print(dumps({"same": same, "results": results, "only_in": alone}, indent=2))
        return
    for name, path in alone.items():
        print(f"{name}: only in {path}")
    for name, comparison in found.items():
        print(f"{name}: {'same' if comparison.same else 'different'}")
        for key, (one, other) in comparison.provenance.items():
            print(f"  {key.replace('_', ' ')}: {one_line(one)} | {one_line(other)}")
        for sentence in comparison.differences:
            print(f"  {sentence}")
        print_rows(HEAD, _rows(comparison), right=HEAD[1:5])


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            v.variable,
            str(v.entries),
            number(v.absolute),
            number(v.relative),
            "" if isnan(v.in_errors) else number(v.in_errors),
            "" if v.within else "different",
        )
        for v in comparison.variables
    ]
