"""Several processes on one machine: each prepares the same plan and does the units it is handed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.analyzers.core.result import FAILED, Piece

if TYPE_CHECKING:
    from dynprobe.cli.request import Request

ATTEMPTS = 2  # a unit whose process dies twice is at fault itself (a crash in native code, out of memory)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    unit: int | None = None


def measure_in_processes(
    request: Request, positions: list[int], report: Path, indices: dict[int, Any], count: int
) -> Iterator[tuple[int, Piece, bool]]:
    """Measure units in `count` processes.

    Args:
        request: The call.
        positions: Positions of the units in the plan.
        report: Where the report will be; the pieces go beside it.
        indices: Labels of each unit, for a piece that has to be reported as failed.
        count: Number of processes.

    Yields:
        `(position, piece, stored)` as they finish, in no particular order.
    """
    waiting = deque(positions)
    attempts = dict.fromkeys(positions, 0)
    workers = [_start(request, report, count) for _ in range(min(count, len(positions)))]
    try:
        for worker in workers:
            _hand_out(worker, waiting, attempts)
        while busy := [w for w in workers if w.unit is not None]:
            ready = wait([w.pipe for w in busy])
            for worker in [w for w in busy if w.pipe in ready]:
                position = worker.unit
                assert position is not None
                try:
                    outcome = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    if attempts[position] < ATTEMPTS:
                        waiting.append(position)
                    else:
                        yield position, _killed(indices[position], worker.process.exitcode), False
                    if waiting:
                        workers[workers.index(worker)] = worker = _start(request, report, count)
                else:
                    if isinstance(outcome, BaseException):
                        raise outcome
                    yield position, *outcome
                worker.unit = None
                if worker.process.is_alive():
                    _hand_out(worker, waiting, attempts)
    finally:
        for worker in workers:
            worker.pipe.close()  # an idle worker reads the end and leaves
            if worker.unit is not None and worker.process.is_alive():
                worker.process.terminate()
        for worker in workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()


def _hand_out(worker: _Worker, waiting: deque[int], attempts: dict[int, int]) -> None:
    if waiting:
        worker.unit = waiting.popleft()
        attempts[worker.unit] += 1
        worker.pipe.send(worker.unit)


def _killed(index: Any, exitcode: int | None) -> Piece:
    if exitcode is not None and exitcode < 0:
        how = f"killed by {signal.Signals(-exitcode).name} (out of memory?)"
    else:
        how = f"ended with exit code {exitcode}"
    return Piece("", index, status=FAILED, reason=f"its process was {how}, {ATTEMPTS} times")


def _start(request: Request, report: Path, count: int) -> _Worker:
    # spawn, not fork: torch's thread pool and CUDA do not survive a fork
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_work, args=(request, report, theirs, count), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, mine)


def _work(request: Request, report: Path, pipe: Connection, count: int) -> None:
    """What a process does: prepare the plan, then measure what it is handed until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    import torch

    from dynprobe.analyzers.core.loop import measure
    from dynprobe.cli.run import open_store
    from dynprobe.cli.work import make_plan

    torch.set_num_threads(request.threads or max(1, (os.cpu_count() or 1) // count))
    try:
        plan = make_plan(request)
        store = open_store(request, plan.declaration, report)
        while True:
            position = pipe.recv()
            piece, stored = next(iter(measure(plan.job, [plan.units[position]], store)))
            pipe.send((piece, stored))
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)
