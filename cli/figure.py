"""A result as a figure that a paper would print, a small page of its own, or a file for ParaView."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.analyzers.core.contract import Bands, Contours, Heatmap, Lines
from dynprobe.analyzers.core.result import Result, Var
from dynprobe.cli import paraview
from dynprobe.cli import style as look
from dynprobe.cli.figure_contours import STYLES, draw_contours
from dynprobe.cli.figure_curves import draw_lines
from dynprobe.cli.figure_heat import draw_heatmap
from dynprobe.cli.figure_panels import refuse_if_all_failed, small_print
from dynprobe.cli.html import page
from dynprobe.io.atomic import check_writable, write_atomically
from dynprobe.io.errors import InputError

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

SUFFIXES = (*(f".{suffix}" for suffix in UNDATED), ".html", *paraview.SUFFIXES)


def draw(result: Result, declaration: Declaration | None, path: Path, *, style: str = "") -> list[Path]:
    """Draw a result and write it to a file; the same result gives the same bytes.

    Args:
        result: What was measured.
        declaration: How its analyzer is declared; without one a plain figure is chosen by shape.
        path: The file; its suffix says the format.
        style: For landscapes `contour` (default), `filled` or `surface`; or the name of another
            variable, to draw that one.

    Returns:
        The files written: several for ParaView where there are several surfaces.

    Raises:
        InputError: If suffix or style are not known, or the result has nothing to draw.
        CannotWrite: If the file cannot be written.
    """
    suffix = _suffix(path)
    if suffix in paraview.SUFFIXES:
        return paraview.write_paraview(result, path, variable=style or "loss")
    figure = figure_of(result, declaration, style=style)
    if suffix == ".html":
        content = page(result, _rendered(figure, "svg").decode(), declaration).encode()
    else:
        content = _rendered(figure, suffix[1:])
    write_atomically(path, content)
    return [path]


def check_figure(path: Path, declaration: Declaration, style: str = "") -> None:
    """Say what would keep a figure from being written before anything is measured.

    Raises:
        InputError: If suffix or style are not known.
        CannotWrite: If nothing can be written at that place.
    """
    _suffix(path)
    if declaration.figure is not None:
        _kind_in_style(declaration.name, declaration.figure, style, declaration.returns)
    check_writable(path)


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path}: a figure is written as {', '.join(SUFFIXES)}.", f"Try {path.with_suffix('.pdf').name}."
        )
    return path.suffix.lower()


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
    inner = {n: _inner(result, n) for n, a in result.variables.items() if a.values.dtype.kind in "iuf"}
    kind = _kind_in_style(result.analyzer, kind, style, {n: Var(dims) for n, dims in inner.items()})
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


def _kind_in_style(analyzer: str, kind: FigureKind, style: str, variables: Mapping[str, Var]) -> FigureKind:
    """The figure that a style asks for: the declared one, or one of the variable it names."""
    own = STYLES if isinstance(kind, Contours) else ()
    if not style or style in own:
        return kind
    if style in variables:
        dims = variables[style].dims
        return Heatmap(z=style, x=dims[-1], y=dims[-2]) if len(dims) >= 2 else Lines(y=style, x="".join(dims))
    if not isinstance(kind, (Lines, Bands, Heatmap, Contours)) and _n_positional(kind) >= 3:
        return kind  # the analyzer's own drawing knows its styles
    drawable = [n for n, var in variables.items() if var.dims != (n,)]
    raise InputError(
        f"{style!r} is not a style of the figure of {analyzer}.",
        (f"Styles: {', '.join(own)}. " if own else "") + f"Or a variable: {', '.join(drawable)}.",
    )


def _inner(result: Result, name: str) -> tuple[str, ...]:
    return tuple(d for d in result.arrays[name].dims if d != result.lead)


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
    inner = _inner(result, name)
    return Heatmap(z=name, x=inner[-1], y=inner[-2]) if len(inner) >= 2 else Lines(y=name)


def _rendered(figure: Figure, suffix: str) -> bytes:
    stream = BytesIO()
    with look.paper():
        figure.savefig(stream, format=suffix, dpi=300, metadata=UNDATED[suffix])
    return stream.getvalue()
