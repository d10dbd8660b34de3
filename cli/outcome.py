"""The end of a call: pieces become a report, a table, a figure and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.analyzers.core.contract import Declaration
from dynprobe.analyzers.core.result import FAILED, INCOMPLETE, Array, Piece, Result, stack, unstack
from dynprobe.cli import errors
from dynprobe.cli.provenance import differences, provenance
from dynprobe.io.errors import InputError
from dynprobe.io.join import Part, joined, kept_beside, relative_folders, shared_facts

if TYPE_CHECKING:
    from dynprobe.cli.request import Request
    from dynprobe.cli.work import Plan


def figure_path(request: Request, plan: Plan, report: Path) -> Path | None:
    """Where the figure goes, or None."""
    if request.no_figure or plan.declaration.figure is None or (request.shard and not request.figure):
        return None
    return (
        Path(request.figure)
        if request.figure
        else report.with_name(f"{report.stem}-{plan.declaration.name}.png")
    )


def check_outputs(request: Request, plan: Plan, report: Path) -> None:
    """What would make the results unwritable is said before hours are spent on them.

    Raises:
        InputError: If a file cannot be written or is something else, or results in it were made otherwise.
    """
    from dynprobe.io.atomic import check_writable
    from dynprobe.io.report import check_replaceable, read_report

    check_writable(report)
    check_replaceable(report)
    if figure := figure_path(request, plan, report):
        from dynprobe.cli.figure import check_figure

        check_figure(figure, plan.declaration, request.style)
    if report.exists() and not request.fresh:
        older = read_report(report, only=[plan.declaration.group]).get(plan.declaration.group)
        _refuse_if_different(request, plan, report, older)


def _refuse_if_different(request: Request, plan: Plan, report: Path, older: Result | None) -> None:
    if older is None or (np.atleast_1d(older["status"]) == FAILED).all():
        return
    if changed := differences(request, plan, report, older):
        raise InputError(
            f"{report} already holds a {plan.declaration.name} made otherwise: {'; '.join(changed)}.",
            "Give another report with -o, or --fresh to replace those numbers.",
        )


def finish(
    request: Request,
    plan: Plan,
    report: Path,
    pieces: list[Piece],
    stopped: errors.Interrupted | None,
) -> int:
    """Report, table and figure of what was measured; the exit code."""
    if not pieces:
        if stopped is None:
            errors.note("nothing to do")
            return errors.DONE
        errors.warn("stopped before the first piece was finished; the same command resumes")
        return stopped.exit_code
    from dynprobe.cli.table import closed_pipe_is_fine, print_result
    from dynprobe.io.report import PieceStore, update_result

    declaration = plan.declaration
    attributes = provenance(request, plan, report)
    measured = stack(declaration.name, declaration.grain, pieces, attributes)
    whole = _with_earlier(request, plan, report, pieces, measured)
    update_result(report, declaration.group, whole, fresh=request.fresh)
    failed = [p for p in pieces if p.status in (FAILED, INCOMPLETE)]
    if not failed and not stopped:
        PieceStore(report, declaration.group).clear([p.key for p in pieces])
    result = summarised(declaration, measured, warn=errors.warn)
    with closed_pipe_is_fine():
        print_result(result, request.format)
    figures = _draw(request, plan, report, result) if any(p.status != FAILED for p in pieces) else []
    if not request.quiet:
        names = f"   figure: {' '.join(map(str, figures))}" if figures else ""
        errors.note(f"report: {report}{names}")
    if stopped:
        errors.warn(f"stopped after {len(pieces)} of {len(plan.mine)}; the same command resumes")
        return stopped.exit_code
    if failed:
        if request.quiet:
            for piece in failed:
                errors.warn(f"{label_of(piece)}: {piece.reason}")
        errors.warn(f"{len(failed)} of {len(pieces)} failed or are incomplete; the reasons are above")
        return errors.SOME_FAILED
    return errors.DONE


def _draw(request: Request, plan: Plan, report: Path, result: Result) -> list[Path]:
    """Draw the figure; what goes wrong here must not hide that the report is written."""
    path = figure_path(request, plan, report)
    if path is None:
        return []
    from dynprobe.cli.figure import draw

    try:
        return draw(result, plan.declaration, path, style=request.style)
    except InputError as error:
        errors.warn(f"no figure: {error}")
    except Exception as error:  # an analyzer's own drawing may raise anything
        errors.warn(f"no figure: {type(error).__name__}: {error}")
    return []


def summarised(
    declaration: Declaration, result: Result, *, warn: Callable[[str], None] = lambda _text: None
) -> Result:
    """The result with its run-level numbers, computed on each run's pieces.

    A run without a good piece, or whose summary fails, has NaN; if that is every run, nothing is added.

    Args:
        declaration: How the analyzer is declared.
        result: Its pieces, stacked.
        warn: Told which summary failed, and why.
    """
    if declaration.summary is None:
        return result
    groups = _by_run(result) if declaration.summary_of == "run" else {"": result}
    rows = {name: _summary(declaration, name, part, warn) for name, part in groups.items()}
    known = next((row for row in rows.values() if row), None)
    if known is None:
        return result
    arrays = dict(result.arrays)
    lead = ("summary_run",) if len(groups) > 1 else ()
    for name, var in declaration.summary_returns.items():
        if name not in known:
            continue
        missing = np.full(known[name].shape, np.nan)
        values = np.array([row.get(name, missing) for row in rows.values()])
        arrays[name] = Array(
            (*lead, *var.dims), values if lead else values[0], var.units, var.long_name, var.error
        )
    if lead:
        arrays["summary_run"] = Array(lead, np.array(list(groups), dtype=object), "", "run")
    return Result(result.analyzer, result.grain, arrays, result.attributes)


def _by_run(result: Result) -> dict[str, Result]:
    """What belongs together in a summary: a run, or the pairs of two runs."""
    if not result.lead:
        return {"": result}
    if result.grain == "run":  # each as if it had been measured alone
        pieces = {str(p.index["run"]): p for p in unstack(result)}
        return {n: stack(result.analyzer, "run", [p], result.attributes) for n, p in pieces.items()}
    columns = [result[n].astype(str).tolist() for n in ("run", "run_a", "run_b") if n in result]
    names = [" | ".join(dict.fromkeys(labels)) for labels in zip(*columns, strict=True)]
    return {n: result.select(np.array(names) == n) for n in dict.fromkeys(names)}


def _summary(
    declaration: Declaration, run: str, result: Result, warn: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """The run-level numbers of one run; none where they cannot be had."""
    if declaration.summary is None or (np.atleast_1d(result["status"]) == FAILED).all():
        return {}
    try:
        row = declaration.summary(result)
        wanted = declaration.summary_returns
        return {n: _values(row[n]) for n, var in wanted.items() if n in row or not var.optional}
    except Exception as error:  # the pieces are measured: they must not be lost over their summary
        warn(f"{run or declaration.name}: no summary: {type(error).__name__}: {error}")
        return {}


def _values(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "US" else array


def _with_earlier(
    request: Request, plan: Plan, report: Path, pieces: list[Piece], measured: Result
) -> Callable[[Result | None], Result]:
    """Joins this call's result with what the report holds for other checkpoints and runs, in order."""
    declaration = plan.declaration

    def build(older: Result | None) -> Result:
        _refuse_if_different(request, plan, report, older)
        if older is None or differences(request, plan, report, older):
            return summarised(declaration, measured)
        there, here = Part.of(older, report), Part.of(measured, report, pieces)
        # A file that was damaged after it was measured does not take its numbers with it.
        good = {there.place(p) for p in there.pieces if p.status != FAILED}
        sound = [p for p in here.pieces if p.status != FAILED or here.place(p) not in good]
        here = Part(sound, here.folders, here.facts)
        kept = kept_beside(there, here)
        if not kept:
            return summarised(declaration, measured)
        both = joined([Part(kept, there.folders, there.facts), here])
        attributes = {
            **measured.attributes,
            **shared_facts(both.facts),
            "folders": relative_folders(both.folders, report),
            "earlier_commands": [
                *older.attributes.get("earlier_commands", []),
                str(older.attributes.get("command", "")),
            ],
        }
        if not request.shard:
            attributes["planned"] = len(both.pieces)
        together = _in_order(both.pieces)
        return summarised(declaration, stack(declaration.name, declaration.grain, together, attributes))

    return build


def _in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Runs as they come, their pieces by step."""

    def runs_of(piece: Piece) -> tuple[Any, ...]:
        return tuple(piece.index.get(n) for n in ("run", "run_a", "run_b"))

    runs = list(dict.fromkeys(map(runs_of, pieces)))

    def place(piece: Piece) -> tuple[Any, ...]:
        steps = [piece.index.get(n) for n in ("step", "step_a", "step_b")]
        numbers = [(s is None, s if isinstance(s, (int, float)) else 0) for s in steps]
        return runs.index(runs_of(piece)), *numbers

    return sorted(pieces, key=place)


def label_of(piece: Piece) -> str:
    """What a warning calls a piece: its path, else its run."""
    paths = [str(v) for k, v in piece.index.items() if k.startswith("path")]
    return " | ".join(paths) or str(piece.index.get("run", piece.index.get("runs", "")))
