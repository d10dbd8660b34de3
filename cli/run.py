"""One call from start to end: plan, loop, report, table, figure, exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.analyzers.core.contract import Declaration
from dynprobe.analyzers.core.result import FAILED, INCOMPLETE, Array, Piece, Result, stack, unstack
from dynprobe.cli import errors
from dynprobe.cli.progress import Bar
from dynprobe.cli.provenance import differences, joined_facts, provenance
from dynprobe.cli.signals import Gate, signals_raise, signals_wait
from dynprobe.cli.threads import set_threads
from dynprobe.cli.work import Plan, Shelf, make_plan
from dynprobe.io.errors import InputError

if TYPE_CHECKING:
    from dynprobe.cli.request import Request


def run(request: Request) -> int:
    """Do what a request asks; returns the exit code.

    Raises:
        InputError: If nothing can be done (exit code 2).
    """
    _log_to_stderr(request)
    plan = make_plan(request)
    if not request.quiet:
        for prepared in plan.prepared:
            for text in prepared.warnings:
                errors.warn(f"{prepared.run.name}: {text}")
            for text in prepared.notes if request.verbose else ():
                errors.note(f"{prepared.run.name}: {text}")
    if request.workers == 1:
        set_threads(request.threads, plan)
    if request.dry_run:
        from dynprobe.cli.dry_run import show_plan

        show_plan(request, plan)
        return errors.DONE
    report = report_path(request, plan)
    _check_outputs(request, plan, report)
    pieces: dict[int, Piece] = {}
    stopped: errors.Interrupted | None = None
    try:
        bar = Bar(plan.declaration.name, len(plan.mine), quiet=request.quiet)
        with signals_raise() as gate, bar:
            plan.job.progress = bar.part
            for position, piece, stored in _measure(request, plan, report, gate):
                pieces[position] = piece
                gate.open()
                bar.piece_done(measured=not stored)
                if piece.status in (FAILED, INCOMPLETE) and not request.quiet:
                    errors.warn(f"{_label(piece)}: {piece.reason}")
    except errors.Interrupted as signalled:
        stopped = signalled
    with signals_wait():
        return _finish(request, plan, report, [pieces[p] for p in sorted(pieces)], stopped)


def _log_to_stderr(request: Request) -> None:
    """Log lines of dynprobe go to stderr, from the level that -q or -v asks for."""
    level = logging.DEBUG if request.verbose else logging.ERROR if request.quiet else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.setLevel(level)
    logger = logging.getLogger("dynprobe")
    logger.handlers = [handler]
    logger.setLevel(min(level, logging.WARNING))


def _measure(request: Request, plan: Plan, report: Path, gate: Gate) -> Iterator[tuple[int, Piece, bool]]:
    if request.workers > 1 and len(plan.mine) > 1:
        from dynprobe.cli.workers import measure_in_processes

        indices = {p: plan.units[p].index for p in plan.mine}
        yield from measure_in_processes(request, plan.mine, report, indices, request.workers)
        return
    from dynprobe.analyzers.core.loop import measure

    store = open_store(request, plan.declaration, report)
    store.before_put = gate.close
    pieces = measure(plan.job, [plan.units[p] for p in plan.mine], store)
    for position, (piece, stored) in zip(plan.mine, pieces, strict=True):
        yield position, piece, stored


def open_store(request: Request, declaration: Declaration, report: Path) -> Shelf:
    """The store of a call's pieces, with those of the report as it stands behind it."""
    from dynprobe.io.report import PieceStore, result_pieces

    earlier = result_pieces(report, declaration.group) if report.exists() and not request.fresh else {}
    return Shelf(PieceStore(report, declaration.group), earlier)


def report_path(request: Request, plan: Plan) -> Path:
    """Where the report goes: as asked, or named after the run, here; a shard gets its own."""
    names = {p.run.name for p in plan.prepared}
    name = Path(next(iter(names))).name if len(names) == 1 else f"{len(names)}-runs"
    path = Path(request.output or f"dynprobe-{name}.h5")
    if request.shard:
        index, _, count = request.shard.partition("/")
        width = len(count)
        path = path.with_name(f"{path.stem}.shard-{index.zfill(width)}-of-{count}{path.suffix}")
    return path


def figure_path(request: Request, plan: Plan, report: Path) -> Path | None:
    """Where the figure goes, or None."""
    if request.no_figure or plan.declaration.figure is None or (request.shard and not request.figure):
        return None
    return (
        Path(request.figure)
        if request.figure
        else report.with_name(f"{report.stem}-{plan.declaration.name}.png")
    )


def _check_outputs(request: Request, plan: Plan, report: Path) -> None:
    """What would make the results unwritable is said before hours are spent on them."""
    from dynprobe.io.atomic import check_writable
    from dynprobe.io.report import read_report

    check_writable(report)
    if figure := figure_path(request, plan, report):
        from dynprobe.cli.figure import check_figure

        check_figure(figure, plan.declaration, request.style)
    if not report.exists() or request.fresh:
        return
    older = read_report(report, only=[plan.declaration.group]).get(plan.declaration.group)
    if older is None or (np.atleast_1d(older["status"]) == FAILED).all():
        return
    changed = differences(request, plan, older)
    if changed:
        raise InputError(
            f"{report} already holds a {plan.declaration.name} made otherwise: {'; '.join(changed)}.",
            "Give another report with -o, or --fresh to replace those numbers.",
        )


def _finish(
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
    from dynprobe.io.report import PieceStore, result_pieces, write_result

    declaration = plan.declaration
    attributes = provenance(request, plan)
    result = summarised(declaration, stack(declaration.name, declaration.grain, pieces, attributes))
    whole = _with_earlier(request, plan, report, pieces, result)
    write_result(report, whole)
    failed = [p for p in pieces if p.status in (FAILED, INCOMPLETE)]
    written = result_pieces(report, declaration.group)  # another process may have replaced the report since
    if not failed and not stopped and all(p.key in written for p in pieces):
        PieceStore(report, declaration.group).clear()
    with closed_pipe_is_fine():
        print_result(result, request.format)
    figures = _draw(request, plan, report, result) if len(failed) < len(pieces) else []
    if not request.quiet:
        names = f"   figure: {' '.join(map(str, figures))}" if figures else ""
        errors.note(f"report: {report}{names}")
    if stopped:
        errors.warn(f"stopped after {len(pieces)} of {len(plan.mine)}; the same command resumes")
        return stopped.exit_code
    if failed:
        if request.quiet:
            for piece in failed:
                errors.warn(f"{_label(piece)}: {piece.reason}")
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
        return []


def summarised(declaration: Declaration, result: Result) -> Result:
    """The result with its run-level numbers, computed on each run's pieces."""
    if declaration.summary is None:
        return result
    runs = result["run"] if "run" in result else np.array([""])
    names = list(dict.fromkeys(np.atleast_1d(runs).tolist()))
    rows = [declaration.summary(result.select(runs == name) if result.lead else result) for name in names]
    arrays = dict(result.arrays)
    lead = ("summary_run",) if len(names) > 1 else ()
    for name, var in declaration.summary_returns.items():
        values = np.array([np.asarray(row[name]) for row in rows])
        arrays[name] = Array(
            (*lead, *var.dims), values if lead else values[0], var.units, var.long_name, var.error
        )
    if lead:
        arrays["summary_run"] = Array(lead, np.array(names, dtype=object), "", "run")
    return Result(result.analyzer, result.grain, arrays, result.attributes)


def _with_earlier(request: Request, plan: Plan, report: Path, pieces: list[Piece], result: Result) -> Result:
    """This call's result together with what the report already holds for other checkpoints, in order."""
    from dynprobe.io.report import read_report

    declaration = plan.declaration
    if request.fresh or not report.exists() or declaration.grain not in ("checkpoint", "pair"):
        return result
    older = read_report(report, only=[declaration.group]).get(declaration.group)
    new = {_label(p) for p in pieces}
    old = [p for p in unstack(older) if _label(p) not in new] if older else []
    if older is None or not old or differences(request, plan, older):
        return result
    runs = list(dict.fromkeys([*(p.index.get("run") for p in old), *(p.index.get("run") for p in pieces)]))

    def place(piece: Piece) -> tuple[Any, ...]:
        step = piece.index.get("step", piece.index.get("step_a"))
        return runs.index(piece.index.get("run")), step is None, step if isinstance(step, (int, float)) else 0

    together = sorted([*old, *pieces], key=place)
    attributes = dict(result.attributes)
    attributes["earlier_commands"] = [
        *older.attributes.get("earlier_commands", []),
        str(older.attributes.get("command", "")),
    ]
    attributes["measured_on"] = joined_facts(result, older)
    if not request.shard:
        attributes["planned"] = len(together)
    return summarised(declaration, stack(declaration.name, declaration.grain, together, attributes))


def _label(piece: Piece) -> str:
    paths = [str(v) for k, v in piece.index.items() if k.startswith("path")]
    return " | ".join(paths) or str(piece.index.get("run", piece.index.get("runs", "")))
