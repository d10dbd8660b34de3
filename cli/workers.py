"""Several processes on one machine: each prepares the same plan and does the units it is handed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
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
    chunk: list[int] | None = None
    done: int = 0


def measure_in_processes(
    request: Request, chunks: list[list[int]], report: Path, indices: dict[int, Any], count: int
) -> Iterator[tuple[int, Piece, bool]]:
    """Measure units in `count` processes.

    Args:
        request: The call.
        chunks: Positions of the units in the plan; those of a chunk stay together, in order.
        report: Where the report will be; the pieces go beside it.
        indices: Labels of each unit: a process finds it by them, since the folder may have grown meanwhile.
        count: Number of processes.

    Yields:
        `(position, piece, stored)` as they finish.
    """
    waiting = deque(chunks)
    attempts: Counter[int] = Counter()
    workers = [_start(request, report, count) for _ in range(min(count, len(chunks)))]
    try:
        for worker in workers:
            _hand_out(worker, waiting, indices)
        while busy := [w for w in workers if w.chunk is not None]:
            ready = wait([w.pipe for w in busy])
            for worker in [w for w in busy if w.pipe in ready]:
                chunk = worker.chunk
                assert chunk is not None
                try:
                    outcome = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    worker.process.join()
                    left = chunk[worker.done :]
                    attempts[left[0]] += 1
                    if attempts[left[0]] >= ATTEMPTS:
                        yield left[0], _killed(indices[left[0]], worker.process.exitcode), False
                        left = left[1:]
                    if left:
                        waiting.append(left)
                    worker.chunk = None
                    if waiting:
                        workers[workers.index(worker)] = worker = _start(request, report, count)
                        _hand_out(worker, waiting, indices)
                    continue
                if isinstance(outcome, BaseException):
                    raise outcome
                yield chunk[worker.done], *outcome
                worker.done += 1
                if worker.done == len(chunk):
                    worker.chunk = None
                    _hand_out(worker, waiting, indices)
    finally:
        for worker in workers:
            worker.pipe.close()  # an idle worker reads the end and leaves
            if worker.chunk is not None and worker.process.is_alive():
                worker.process.terminate()
        for worker in workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()


def _hand_out(worker: _Worker, waiting: deque[list[int]], indices: dict[int, Any]) -> None:
    if waiting:
        worker.chunk, worker.done = waiting.popleft(), 0
        worker.pipe.send([indices[position] for position in worker.chunk])


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
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            plan = make_plan(request)
            store = open_store(request, plan.declaration, report)
            units = {_name(unit.index): unit for unit in plan.units}
            while True:
                chunk = [units[_name(index)] for index in pipe.recv()]
                for outcome in measure(plan.job, chunk, store):
                    pipe.send(outcome)
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        with contextlib.suppress(ConnectionError):
            pipe.send(error)


def _name(index: Any) -> tuple[tuple[str, str], ...]:
    """The labels of a unit, as something to find it by."""
    return tuple(sorted((name, str(label)) for name, label in index.items()))
