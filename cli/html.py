"""A result as one small page that needs nothing else: picture, numbers, failures, provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.analyzers.core.result import FAILED, INTERNAL, OK, Array, Result
from dynprobe.cli.figure_panels import step_text
from dynprobe.cli.style import number

if TYPE_CHECKING:
    from dynprobe.analyzers.core.contract import Declaration

MAXIMAL_ROWS = 200
LISTED_VALUES = 8
"""A variable with up to so many values per piece is listed in full, a larger one by its range."""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --pale: #ddd; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #121212; --ink: #ddd; --pale: #3a3a3a; --bad: #ff8a80; }
  figure svg { filter: invert(.93) hue-rotate(180deg); }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figure.narrow svg { max-width: 32rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--pale); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; } th small { display: block; font-weight: normal; opacity: .7; }
td.text { text-align: left; } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(result: Result, svg: str, declaration: Declaration | None = None) -> str:
    """The page of a result.

    Args:
        result: What was measured.
        svg: Its figure as an SVG document.
        declaration: How its analyzer is declared, for the sentence under the title.
    """
    line = f"<p>{escape(declaration.line)}</p>" if declaration and declaration.line else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>dynprobe {escape(result.analyzer)}</title>\n<style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(result.analyzer)}</h1>\n{line}\n{inline_svg(svg)}\n"
        f"{_failures(result)}<h2>Numbers</h2>\n{_table(result)}\n"
        f"<h2>Provenance</h2>\n{_provenance(result)}\n</body></html>\n"
    )


def inline_svg(svg: str) -> str:
    """The SVG element alone, as a figure: no document type, no metadata, coordinates to 0.01 pt."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"\d+\.\d{3,}", _short, path[0]), body)
    narrow = float(body.split('width="')[1].split("pt")[0]) < 300
    return f'<figure class="narrow">{body}</figure>' if narrow else f"<figure>{body}</figure>"


def _short(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _failures(result: Result) -> str:
    found = result.failures()
    if not found:
        return ""
    items = "".join(
        f'<li><strong>{escape(what)}</strong> <span class="bad">{escape(why)}</span></li>'
        for what, why in found
    )
    return f"<h2>Not as it should be: {len(found)} of {result.n_pieces}</h2>\n<ul>{items}</ul>\n"


def _table(result: Result) -> str:
    """One row for each piece: what it is, then every variable, listed or as its range."""
    labels = [n for n in result.attributes.get("index", ()) if n in result and _per_piece(result, n)]
    variables = {
        n: a for n, a in result.variables.items() if a.values.dtype.kind in "iuf" and n not in labels
    }
    errors = {a.error for a in variables.values() if a.error in variables}
    variables = {n: a for n, a in variables.items() if n not in errors}
    head = "".join(f"<th>{escape(n.replace('_', ' '))}</th>" for n in [*labels, "status"])
    head += "".join(_head(result, n, a) for n, a in variables.items())
    rows = []
    for piece in range(min(result.n_pieces, MAXIMAL_ROWS)):
        status = str(np.atleast_1d(result["status"])[piece])
        cells = [_text(step_text(np.atleast_1d(result[n])[piece])) for n in labels]
        cells.append(_text(status, "text" if status == OK else "text bad"))
        for array in variables.values():
            cells += [f"<td>{text}</td>" for text in _cells(result, array, piece, missing=status == FAILED)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    more = result.n_pieces - len(rows)
    note = f"<p>{more} more rows are in the report.</p>" if more else ""
    body = "\n".join(rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide">{table}</div>{note}'


def _per_piece(result: Result, name: str) -> bool:
    return result.arrays[name].dims in ((), (result.lead,))


def _text(text: str, kind: str = "text") -> str:
    return f'<td class="{kind}">{escape(text)}</td>'


def _inner(result: Result, array: Array) -> tuple[int, ...]:
    return array.values.shape[1:] if result.lead and result.lead in array.dims else array.values.shape


def _head(result: Result, name: str, array: Array) -> str:
    shape = _inner(result, array)
    units = "" if array.units in ("", "1") else f", {array.units}"
    what = f"<small>{escape((array.long_name or '') + units)}</small>"
    if int(np.prod(shape)) <= LISTED_VALUES:
        places = ["[" + ", ".join(map(str, i)) + "]" if i else "" for i in np.ndindex(*shape)]
        return "".join(f"<th>{escape(name + place)}{what}</th>" for place in places)
    return "".join(
        f"<th>{escape(name)}, {part}{what}</th>" for part in ("smallest", "median", "largest", "not finite")
    )


def _cells(result: Result, array: Array, piece: int, *, missing: bool) -> Iterator[str]:
    leads = bool(result.lead) and result.lead in array.dims
    values = np.asarray(array.values[piece] if leads else array.values, dtype=float)
    if values.size > LISTED_VALUES:
        finite = values[np.isfinite(values)]
        if not finite.size:
            yield from ("–",) * 3
        else:
            yield from (number(float(f"{v:.3g}")) for v in (finite.min(), np.median(finite), finite.max()))
        yield "–" if missing else str(values.size - finite.size)
        return
    error = result[array.error] if array.error in result else np.full(array.values.shape, np.nan)
    errors = np.asarray(error[piece] if leads else error, dtype=float)
    for value, width in zip(values.ravel().tolist(), errors.ravel().tolist(), strict=True):
        spread = f" ± {number(float(f'{width:.2g}'))}" if np.isfinite(width) else ""
        yield "–" if missing else number(float(f"{value:.4g}")) + spread


def _provenance(result: Result) -> str:
    facts = {k: v for k, v in result.attributes.items() if k not in INTERNAL}
    items = "".join(
        f"<dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(v)}</dd>" for k, v in _flat(facts.items())
    )
    return f"<dl>{items}</dl>"


def _flat(items: Iterable[tuple[str, Any]], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested attributes as `name.name`, values as a reader would write them."""
    for key, value in items:
        if isinstance(value, dict):
            yield from _flat(value.items(), f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            yield f"{prefix}{key}", text
