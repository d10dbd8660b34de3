"""One call from start to end: plan, loop, report, table, figure, exit code."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dynprobe.analyzers.core.contract import Declaration
from dynprobe.analyzers.core.result import FAILED, INCOMPLETE, Piece
from dynprobe.cli import errors
from dynprobe.cli.outcome import check_outputs, finish, label_of
from dynprobe.cli.progress import Bar
from dynprobe.cli.signals import Gate, signals_raise, signals_wait
from dynprobe.cli.threads import set_threads
from dynprobe.cli.work import Plan, Shelf, chunked, make_plan

if TYPE_CHECKING:
    from dynprobe.cli.request import Request


def run(request: Request) -> int:
    """Do what a request asks; returns the exit code.

    Raises:
        InputError: If nothing can be done (exit code 2).
    """
    _log_to_stderr(request)
    if "-" in request.runs:  # read once, here: worker processes have no stdin
        typed = [line.strip() for line in sys.stdin if line.strip()]
        request.runs = [path for run in request.runs for path in (typed if run == "-" else [run])]
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results; a user's code may print
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
    check_outputs(request, plan, report)
    pieces: dict[int, Piece] = {}
    stopped: errors.Interrupted | None = None
    try:
        bar = Bar(plan.declaration.name, len(plan.mine), quiet=request.quiet)
        with signals_raise() as gate, bar, contextlib.redirect_stdout(sys.stderr):
            plan.job.progress = bar.part
            for position, piece, stored in _measure(request, plan, report, gate):
                pieces[position] = piece
                gate.open()
                bar.piece_done(measured=not stored)
                if piece.status in (FAILED, INCOMPLETE) and not request.quiet:
                    errors.warn(f"{label_of(piece)}: {piece.reason}")
    except errors.Interrupted as signalled:
        stopped = signalled
    with signals_wait():
        return finish(request, plan, report, [pieces[p] for p in sorted(pieces)], stopped)


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
        mine = set(plan.mine)
        chunks = [chunk for chunk in chunked(plan.job, plan.units) if mine.issuperset(chunk)]
        yield from measure_in_processes(request, chunks, report, indices, request.workers)
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
