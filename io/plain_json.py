"""JSON that every reader accepts: numpy values as plain ones, no `NaN` token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """`value` as strict JSON knows it.

    NaN becomes `null`, infinities the strings `"Infinity"` and `"-Infinity"` (`float()` reads them
    back), arrays and tuples become lists, anything else its `str()`.

    >>> plain({"a": np.array([1.0, np.nan, -np.inf]), "b": (np.int64(3), True)})
    {'a': [1.0, None, '-Infinity'], 'b': [3, True]}
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return str(value)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strictly valid JSON text of `value`, see `plain`."""
    text = json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)
    # An undecodable byte of a file name becomes the JSON escape that reads back as itself.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
