"""Numbers for people, with as many digits as the error leaves meaningful, and other values on one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DIGITS = 5
"""Significant digits of a number whose error is not known."""


def with_error(value: float, error: float = math.nan) -> str:
    """A value and its error, rounded to two digits of the error.

    >>> with_error(0.123412, 0.001234), with_error(2.302585), with_error(1234567.0, 8900.0)
    ('0.1234 ± 0.0012', '2.3026', '(1.2346 ± 0.0089)e+06')
    >>> with_error(1.5, 0.0), with_error(math.inf), with_error(3.21e-7, 5e-9)
    ('1.5 ± 0', 'inf', '(3.210 ± 0.050)e-07')
    """
    if not math.isfinite(value) or math.isnan(error):
        return number(value)
    if error == 0 or not math.isfinite(error):
        return f"{number(value)} ± {number(error)}"
    if abs(error) < 1e-13 * abs(value):  # pure rounding: a float holds no digits that small
        return f"{number(value)} ± {error:.1e}"
    exponent = math.floor(math.log10(max(abs(value), abs(error))))
    scale = max(exponent, -300) if exponent < -4 or exponent > 5 else 0
    mantissa, spread = value / 10.0**scale, abs(error) / 10.0**scale
    decimals = max(0, 1 - math.floor(math.log10(float(f"{spread:.1e}"))))
    text = f"{mantissa:.{decimals}f} ± {spread:.{decimals}f}"
    return f"({text})e{scale:+03d}" if scale else text


def number(value: Any) -> str:
    """A number with five significant digits, an integer with all of its own.

    >>> number(12), number(0.1), number(123456.789), number(1.5e-9), number(2.0)
    ('12', '0.1', '1.2346e+05', '1.5e-09', '2')
    """
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.{DIGITS}g}" if not math.isnan(value) else "NaN"
    return str(value)


def one_line(value: Any) -> str:
    """A value of a report's provenance on one line.

    >>> one_line({"span": 1.0, "pair": [1, 2]})
    'span=1.0, pair=1, 2'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={one_line(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(one_line, value))
    return str(value)
