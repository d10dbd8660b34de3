"""A result as a figure that a paper would print: .png, .pdf, .svg, or a small page of its own, .html."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.analyzers.core.contract import Bands, Contours, Heatmap, Lines
from dynprobe.analyzers.core.result import Result
from dynprobe.cli import style as look
from dynprobe.cli.figure_curves import draw_lines
from dynprobe.cli.figure_maps import STYLES, draw_contours, draw_heatmap
from dynprobe.cli.figure_panels import refuse_if_all_failed, small_print
from dynprobe.io.errors import CannotWrite, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynprobe.analyzers.core.contract import Declaration
    from dynprobe.analyzers.core.contract import Figure as FigureKind

UNDATED: dict[str, dict[str, Any]] = {
    "png": {},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
"""Metadata that keeps the date out, so that the same numbers give the same bytes."""

SUFFIXES = (*(f".{suffix}" for suffix in UNDATED), ".html")


def draw(result: Result, declaration: Declaration | None, path: Path, *, style: str = "") -> None:
    """Draw a result and write it to a file; the same result gives the same bytes.

    Args:
        result: What was measured.
        declaration: How its analyzer is declared; without one a plain figure is chosen by shape.
        path: The file; its suffix says the format.
        style: A variant of the figure: for landscapes `contour` (default), `filled` or `surface`.

    Raises:
        InputError: If suffix or style are not known, or the result has nothing to draw.
        CannotWrite: If the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: a figure is written as {', '.join(SUFFIXES)}"
            + (f", not {suffix}" if suffix else "; the name has no suffix"),
            tip=f"Try {path.with_suffix('.pdf')}",
        )
    figure = figure_of(result, declaration, style=style)
    if suffix == ".html":
        from dynprobe.cli.html import page

        content = page(result, _rendered(figure, "svg").decode(), declaration).encode()
    else:
        content = _rendered(figure, suffix[1:])
    try:
        path.write_bytes(content)
    except OSError as error:
        raise CannotWrite(
            f"{path}: the figure cannot be written: {error.strerror or error}",
            tip="Give another place with --figure.",
        ) from error


def figure_of(result: Result, declaration: Declaration | None, *, style: str = "") -> Figure:
    """The figure of a result, for a notebook or for `draw`.

    Args:
        result: What was measured.
        declaration: How its analyzer is declared; without one a plain figure is chosen by shape.
        style: A variant of the figure.

    Raises:
        InputError: If the style is not known or the result has nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    refuse_if_all_failed(result)
    kind = (declaration and declaration.figure) or _plain_kind(result)
    _check_style(result, kind, style)
    with look.paper():
        figure = Figure(figsize=(look.SINGLE, 2.4), layout="constrained")
        FigureCanvasAgg(figure)
        shown, notes = None, list[str]()
        if isinstance(kind, Contours):
            notes, shown = draw_contours(result, kind, figure, style)
        elif isinstance(kind, Heatmap):
            notes, shown = draw_heatmap(result, kind, figure)
        elif isinstance(kind, (Lines, Bands)):
            notes = draw_lines(result, kind, figure)
        else:
            kind(*(result, figure, style)[: _n_positional(kind)])
        look.add_footnote(figure, small_print(result, shown, notes))
    return figure


def _check_style(result: Result, kind: FigureKind, style: str) -> None:
    if not style or (isinstance(kind, Contours) and style in STYLES):
        return
    if isinstance(kind, Contours):
        raise InputError(f"{style!r} is not a style of this figure", tip=f"Styles: {', '.join(STYLES)}.")
    if isinstance(kind, (Lines, Bands, Heatmap)) or _n_positional(kind) < 3:
        raise InputError(
            f"{style!r}: the figure of {result.analyzer} has one style only", tip="Leave the style out."
        )


def _n_positional(function: Callable[..., Any]) -> int:
    """2 for an analyzer's own `draw(result, figure)`, 3 for `draw(result, figure, style)`."""
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _plain_kind(result: Result) -> FigureKind:
    """A figure for a report whose analyzer is not installed: a map over two coordinates, else curves.

    Raises:
        InputError: If no variable is numeric.
    """
    numeric = {n: a for n, a in result.variables.items() if a.values.dtype.kind in "iuf"}
    if not numeric:
        raise InputError(f"{result.analyzer}: the report holds no numbers to draw")
    name = next(iter(numeric))
    inner = [d for d in numeric[name].dims if d != result.lead]
    return Heatmap(z=name, x=inner[-1], y=inner[-2]) if len(inner) >= 2 else Lines(y=name)


def _rendered(figure: Figure, suffix: str) -> bytes:
    stream = BytesIO()
    with look.paper():
        figure.savefig(stream, format=suffix, dpi=300, metadata=UNDATED[suffix])
    return stream.getvalue()
