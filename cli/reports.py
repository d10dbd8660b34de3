"""`dynprobe report`: show, export, merge, plot and compare the reports that analyzers write."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynprobe.cli import errors
from dynprobe.io.errors import InputError

if TYPE_CHECKING:
    from dynprobe.analyzers.core.contract import Declaration
    from dynprobe.analyzers.core.result import Result

report_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Show, export, merge, plot and compare reports.",
)


class OutputFormat(StrEnum):
    """How a result is written to stdout."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class DiffFormat(StrEnum):
    """How a comparison is written to stdout."""

    TABLE = "table"
    JSON = "json"


class ExportFormat(StrEnum):
    """What can be exported to stdout."""

    CSV = "csv"
    JSON = "json"


File = Annotated[Path, typer.Argument(help="A report (.h5).", metavar="FILE", show_default=False)]
Files = Annotated[list[Path], typer.Argument(help="Reports (.h5).", metavar="FILE...", show_default=False)]
Analyzer = Annotated[
    str | None, typer.Option(help="Only this analyzer's result; needed where a report holds several.")
]


@report_app.command("show")
def show(
    files: Files,
    analyzer: Analyzer = None,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="How to write it.")] = (
        OutputFormat.TABLE
    ),
) -> None:
    """Print what reports hold: provenance, a table of the pieces, what failed and why.

    With --format json, one document: a list of results, each with its `file`. NaN is null, infinities
    are the strings "Infinity" and "-Infinity". With --format csv, one result, a line for each piece.
    """
    from dynprobe.cli.document import document
    from dynprobe.cli.table import closed_pipe_is_fine, print_result
    from dynprobe.io.plain_json import dumps

    results = [(file, result) for file in files for result in _read(file, analyzer).values()]
    with closed_pipe_is_fine():
        if output_format is OutputFormat.JSON:
            print(dumps([{"file": str(file)} | document(result) for file, result in results], indent=2))
        elif output_format is OutputFormat.CSV:
            print_result(_single(results), "csv")
        else:
            for i, (file, result) in enumerate(results):
                print("\n" * bool(i) + f"{file}")
                _print_provenance(result)
                print_result(result)


def _print_provenance(result: Result) -> None:
    from dynprobe.analyzers.core.result import INTERNAL
    from dynprobe.cli.numbers import one_line

    hidden = (*INTERNAL, "title")
    for name, value in result.attributes.items():
        if name not in hidden and value not in (None, "", [], {}):
            print(f"  {name.replace('_', ' ')}: {one_line(value)}")
    print()


@report_app.command("export")
def export(
    file: File,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .csv, .json, .nc, .h5, .vts or .vtp file; else to stdout."),
    ] = None,
    analyzer: Analyzer = None,
    variable: Annotated[
        str | None,
        typer.Option(help="One variable as a long table: a line for each value, its labels and error."),
    ] = None,
    output_format: Annotated[
        ExportFormat | None, typer.Option("--format", help="By default, from the suffix of the output.")
    ] = None,
) -> None:
    """Write a result for other programs.

    `.csv`: a line for each piece with its single numbers, or with --variable every value of one
    variable. `.json`: everything. `.nc` and `.h5`: the results in a report of their own, which netCDF
    programs read. `.vts` and `.vtp`: landscapes and trajectories for ParaView.
    """
    from dynprobe.cli.export import export_result
    from dynprobe.cli.table import closed_pipe_is_fine

    suffix = f".{output_format}" if output_format else output.suffix.lower() if output else ".csv"
    results = _read(file, analyzer)
    with closed_pipe_is_fine():
        written = export_result(results, suffix, output, variable)
    for path in written:
        errors.note(f"wrote {path}")


@report_app.command("merge")
def merge(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="The report to write.")],
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on without missing shards, and record which.")
    ] = False,
) -> None:
    """Put the shards of one analysis together, and results of different analyzers side by side.

    Refused: other options, data or versions, missing shards, fewer pieces than were planned.
    """
    from dynprobe.io.merge import merge_reports

    merged = merge_reports(files, output, allow_missing=allow_missing, finish=_with_summary)
    for name, result in merged.items():
        missing = result.attributes.get("missing_shards", [])
        without = f", without shards {', '.join(missing)}" if missing else ""
        errors.note(f"{name}: {result.n_pieces} pieces{without}")
    errors.note(f"report: {output}")


def _with_summary(result: Result) -> Result:
    """The merged result with the run-level numbers that its analyzer adds."""
    from dynprobe.cli.outcome import summarised

    declaration = _declaration(result.analyzer)
    if declaration is None:
        errors.warn(f"{result.analyzer} is not installed: run-level numbers are not computed anew")
        return result
    return summarised(declaration, result, warn=errors.warn)


def _declaration(name: str) -> Declaration | None:
    from dynprobe.analyzers.core import registry

    try:
        return registry.load(name)
    except LookupError:
        return None


@report_app.command("plot")
def plot(
    file: File,
    figure: Annotated[
        Path | None, typer.Option(help="A .png, .pdf, .svg or .html file; by default beside the report.")
    ] = None,
    analyzer: Analyzer = None,
    style: Annotated[str, typer.Option(help="contour, filled or surface; or the variable to draw.")] = "",
) -> None:
    """Draw a result as its analyzer does."""
    from dynprobe.cli.figure import draw

    result = _single([(file, result) for result in _read(file, analyzer).values()])
    path = figure or file.with_name(f"{file.stem}-{result.analyzer}.png")
    draw(result, _declaration(result.analyzer), path, style=style)
    errors.note(f"figure: {path}")


@report_app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(help="A report.", metavar="A", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another.", metavar="B", show_default=False)],
    analyzer: Analyzer = None,
    rtol: Annotated[
        float, typer.Option(min=0, help="Relative difference that still counts as equal.")
    ] = 1e-6,
    atol: Annotated[float, typer.Option(min=0, help="Absolute difference that still counts as equal.")] = 0.0,
    output_format: Annotated[DiffFormat, typer.Option("--format", help="How to write it.")] = (
        DiffFormat.TABLE
    ),
) -> None:
    """Compare two reports: how they were made, and by how much their values differ.

    Exit code 0 if every value agrees within the tolerances (|a − b| ≤ atol + rtol·|b|), 1 if not.
    Differences of provenance are shown and do not count.
    """
    from dynprobe.cli.report_diff import print_diff
    from dynprobe.cli.table import closed_pipe_is_fine
    from dynprobe.io.compare import compare

    a, b = _read(first, analyzer), _read(second, analyzer)
    names = list(dict.fromkeys([*a, *b]))
    found = {n: compare(a[n], b[n], rtol=rtol, atol=atol) for n in names if n in a and n in b}
    alone = {n: first if n in a else second for n in names if n not in found}
    same = not alone and all(c.same for c in found.values())
    with closed_pipe_is_fine():
        print_diff(found, alone, same, as_json=output_format is DiffFormat.JSON)
    raise typer.Exit(errors.DONE if same else errors.SOME_FAILED)


def _read(file: Path, analyzer: str | None) -> dict[str, Result]:
    from dynprobe.io.names import suggestion
    from dynprobe.io.report import read_report

    results = read_report(file)
    if analyzer is None:
        return results
    name = analyzer.replace("_", "-")
    if name not in results:
        raise InputError(f"{file}: holds no result of {analyzer}.", suggestion(name, results))
    return {name: results[name]}


def _single(results: list[tuple[Path, Result]]) -> Result:
    """The one result among those found.

    Raises:
        InputError: If there is none or more than one.
    """
    if len(results) != 1:
        names = ", ".join(result.analyzer for _, result in results) or "none"
        raise InputError(f"One result is needed here; found: {names}.", "Name one with --analyzer.")
    return results[0][1]
