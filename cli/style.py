"""How figures look: print widths, colours safe for the colour-blind, labels with units, readable numbers."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    from dynprobe.analyzers.core.result import Array

SINGLE, DOUBLE = 3.25, 6.75
"""Widths in inches of one and of two columns of the usual two-column paper."""

INK, GREY, PALE = "#222222", "#777777", "#dddddd"
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, told apart by readers with any colour vision; yellow left out (white paper)."""

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
MAXIMAL_LEGEND = len(CATEGORIES)

_RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same bytes on every machine
    "font.size": 7,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "axes.titlepad": 3,
    "axes.labelpad": 2,
    "axes.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    **{f"{axis}tick.{kind}.width": 0.5 for axis in "xy" for kind in ("major", "minor")},
    **{f"{axis}tick.major.size": 2.5 for axis in "xy"},
    **{f"{axis}tick.minor.size": 1.5 for axis in "xy"},
    "lines.linewidth": 1.0,
    "lines.markersize": 2.5,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "hatch.linewidth": 0.4,
    "axes.prop_cycle": f"cycler('color', {list(CATEGORIES)})",
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.h_pad": 0.03,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # TrueType: text stays text in an editor, and publishers accept it
    "svg.hashsalt": "dynprobe",  # without it the ids in an SVG are random
}


@contextmanager
def paper() -> Iterator[None]:
    """The style of every figure, whatever the user's matplotlibrc says; restored on leaving."""
    from matplotlib import style

    with style.context(["default", _RC]), warnings.catch_warnings():
        # A run may be named in letters the font lacks; a box in the picture says enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def escaped(text: str) -> str:
    """Text of the user's (a run's name) as matplotlib prints it literally, not as mathematics."""
    return text.replace("$", r"\$")


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, _position: int = 0) -> str:
    """A number as short as it reads well: `0.02`, `500`, `2×10⁵`; signature of a tick formatter.

    >>> number(0.02), number(1500), number(2e5), number(1e-6), number(0)
    ('0.02', '1500', '2×10⁵', '10⁻⁶', '0')
    """
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return f"{mantissa}×{power}" if mantissa not in ("1", "−1") else mantissa.replace("1", power)


def label(array: Array, name: str, inches: float = 1.9) -> str:
    """An axis label, the long name and the units, wrapped for an axis of that length."""
    text = array.long_name or name.replace("_", " ")
    units = f" ({array.units})" if array.units not in ("", "1") else ""
    width = max(12, int(inches * 20.5))
    lines = [text + units] if len(text + units) <= width else [text, units.strip()]
    return escaped("\n".join(piece for line in lines for piece in textwrap.wrap(line, width)))


def sequential(n: int) -> ListedColormap:
    """`n` colours of viridis from dark to light, without the yellow that vanishes on white paper."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(n, 1))))


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks and labels for a logarithmic axis that spans `low` to `high`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low) if 0 < low < high else 1.0
    if decades < 0.3:
        return  # less than a factor of two: matplotlib's own minor labels are better
    subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(number))
    axis.set_minor_formatter(NullFormatter())


def few_ticks(ax: Any) -> None:
    """At most five round ticks on both axes, without trailing zeros."""
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(number)


def nice_levels(low: float, high: float, count: int = 14) -> np.ndarray:
    """At most about `count` round levels strictly inside `(low, high)`, evenly spaced on a log scale.

    A range too narrow for that gets round levels on a linear scale.
    """
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        return np.array([])
    if low > 0 and high / low > 3:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for mantissas in (
            (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
            (1, 1.5, 2, 3, 5, 7),
            (1, 2, 3, 5),
            (1, 2, 5),
            (1, 3),
            (1,),
        ):
            decades = range(first, last + 1)
            levels = np.array([float(f"{m}e{e}") for e in decades for m in mantissas])
            levels = levels[(levels > low) & (levels < high)]
            if len(levels) <= count:
                return levels
        return levels[:: math.ceil(len(levels) / count)]
    from matplotlib.ticker import MaxNLocator

    levels = np.asarray(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    return levels[(levels > low) & (levels < high)]


def legend(figure: Figure, handles: Mapping[str, Any], title: str = "") -> None:
    """One legend above all panels, in as few rows as its entries need."""
    width = figure.get_size_inches()[0] * 72
    rows = math.ceil(sum(3.5 * len(name) + 24 for name in handles) / width)
    figure.legend(
        list(handles.values()),
        [escaped(name) for name in handles],
        loc="outside upper center",
        ncols=math.ceil(len(handles) / rows),
        title=title or None,
        title_fontsize=7,
    )


def set_size(figure: Figure, width: float, height: float) -> None:
    """The size in inches; a figure of a paper is never taller than a page."""
    figure.set_size_inches(width, min(height, 8.5))


def add_footnote(figure: Figure, sentences: Sequence[str]) -> None:
    """Small print under the panels; the layout leaves room for it."""
    size, (width, height) = 5.0, figure.get_size_inches()
    per_line = int(width * 72 / (0.545 * size))
    lines = textwrap.wrap(" · ".join(s for s in sentences if s), per_line)
    room = (len(lines) * 1.3 * size + 6) / 72
    figure.set_size_inches(width, height + room)
    share = room / (height + room)
    engine: Any = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, share, 1, 1 - share))
    figure.text(
        0.02 * SINGLE / width,
        share * (1 - 4 / (72 * room)),
        escaped("\n".join(lines)),
        fontsize=size,
        color=GREY,
        va="top",
        ha="left",
        linespacing=1.25,
    )
