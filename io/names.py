"""Names the user may have misspelt: the nearest known ones, and lists short enough to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, or None if none is alike."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """A tip for an unknown name: `Did you mean 'x'?`, else the whole list."""
    choices = sorted(known)
    match = nearest(name, choices)
    return f"Did you mean {match!r}?" if match else f"Known: {shortlist(choices)}."


def shortlist(names: Iterable[str], limit: int = 20) -> str:
    """`a, b, c and 4 more`: at most `limit` names in the order given."""
    items = list(names)
    shown = ", ".join(items[:limit]) or "none"
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
