"""The plan of a call: its units of work, checked against the model before any compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.analyzers.core import registry
from dynprobe.analyzers.core.contract import Declaration
from dynprobe.analyzers.core.loop import Job, Unit, checkpoint_units, group_unit, run_unit
from dynprobe.analyzers.core.result import Piece
from dynprobe.cli.pairs import pair_units
from dynprobe.cli.setup import PreparedRun, prepare
from dynprobe.io.errors import InputError

if TYPE_CHECKING:
    from dynprobe.cli.request import Request
    from dynprobe.io.report import PieceStore


@dataclass
class Plan:
    """All units of a call, and which of them this process is to do.

    Args:
        declaration: The analyzer.
        job: Its options, ready for the loop.
        prepared: The runs.
        units: Every unit, in order.
        mine: Positions of the units of this shard.
    """

    declaration: Declaration
    job: Job
    prepared: list[PreparedRun]
    units: list[Unit]
    mine: list[int]


def find_analyzer(name: str) -> Declaration:
    """The declaration of `NAME`, or of `file.py:function`."""
    path, _, attribute = name.rpartition(":")
    if name.endswith(".py"):
        path, attribute = name, ""
    if path.endswith(".py"):
        return registry.load_file(Path(path), attribute)
    return registry.load(name)


def make_plan(request: Request) -> Plan:
    """Open the runs, decide the units, and find every mismatch before any compute.

    Raises:
        InputError: If nothing could be measured: no run, no model, no data, no checkpoint that fits.
    """
    declaration = find_analyzer(request.analyzer).resolved(request.options)
    _check_pairing(request, declaration)
    prepared = prepare(request, declaration)
    units = _units(declaration, prepared, request)
    job = Job(declaration, request.options, fresh=request.fresh)
    chunks = chunked(job, units)
    mine = [position for chunk in _shard(request.shard, len(chunks)) for position in chunks[chunk]]
    _check_inputs(declaration, prepared, declaration.needed(request.options))
    _check_fit(declaration, units)
    return Plan(declaration, job, prepared, units, mine)


def _check_pairing(request: Request, declaration: Declaration) -> None:
    """Options about pairs mean nothing where these options make an analyzer measure single checkpoints.

    Raises:
        InputError: If one was given.
    """
    given = {"pairs": request.pairs != "auto", "against": request.against, "group": request.group}
    useless = [name for name, value in given.items() if value]
    if declaration.grain != "pair" and useless:
        raise InputError(
            f"--{useless[0]} is about pairs, and with these options {declaration.name} measures each "
            "checkpoint by itself.",
            f"Leave --{useless[0]} out.",
        )


def _units(declaration: Declaration, prepared: list[PreparedRun], request: Request) -> list[Unit]:
    if declaration.grain == "group":
        return [group_unit([(p.run, p.chosen) for p in prepared])]
    if declaration.grain == "run":
        return [run_unit(p.run, p.chosen) for p in prepared]
    if declaration.grain == "checkpoint":
        return [unit for p in prepared for unit in checkpoint_units(p.run, p.chosen)]
    return pair_units(declaration, prepared, request)


def chunked(job: Job, units: list[Unit]) -> list[list[int]]:
    """Positions of units that one process does in order: a run, where a piece builds on the one before."""
    if "previous" not in job.declaration.needed(job.options):
        return [[position] for position in range(len(units))]
    runs: dict[str, list[int]] = {}
    for position, unit in enumerate(units):
        runs.setdefault(unit.workspaces[0].run.name, []).append(position)
    return list(runs.values())


def _shard(text: str | None, total: int) -> list[int]:
    """Which of `total` parts shard `I/N` has: every N-th, so that cheap and dear ones spread evenly."""
    if text is None:
        return list(range(total))
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(
            f"--shard {text}: expected I/N with I from 0 to N-1.",
            "For a job array numbered from 0: --shard $SLURM_ARRAY_TASK_ID/64 with --array=0-63.",
        )
    return list(range(int(index), total, int(count)))


def _check_inputs(declaration: Declaration, prepared: list[PreparedRun], needed: tuple[str, ...]) -> None:
    """Build model, data and loss once per run now: what the user has to mend is said before any compute."""
    recorded = declaration.wants("activations")
    kinds = {
        "model": declaration.wants("model") or recorded,
        "data": "batches" in needed or recorded,
        "loss": "loss" in needed,
    }
    for each in prepared:
        setup = each.run.setup
        if setup.saved:
            if "batches" in needed:
                _ = setup.batches
            continue
        each.specs.require([kind for kind, wanted in kinds.items() if wanted])
        if kinds["data"]:
            _ = setup.batches
        if "test_batches" in needed:
            _ = setup.test_batches
        if kinds["loss"]:
            _ = setup.loss
        if declaration.builds_model(available=setup.has_model):
            setup.model()


def _check_fit(declaration: Declaration, units: list[Unit]) -> None:
    """Compare the header of every checkpoint with the model; what does not fit becomes a failed piece."""
    problems = []
    for unit in units:
        for workspace in list(unit.workspaces):
            problem = _misfit(declaration, workspace)
            problems.append(problem)
            if problem and unit.runs and len(unit.workspaces) > 1:
                unit.workspaces.remove(workspace)
                unit.left_out.append(f"left out {problem}")
            elif problem:
                unit.problem = str(problem)
    if problems and all(problems):
        first = problems[0]
        assert first is not None
        others = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise InputError(f"{first}{others}", getattr(first, "tip", ""))


def _misfit(declaration: Declaration, workspace: Any) -> Exception | None:
    import torch

    checkpoint, setup = workspace.checkpoint, workspace.run.setup
    if checkpoint.problem:
        return InputError(f"{checkpoint.path}: {checkpoint.problem.removeprefix(f'{checkpoint.path}: ')}")
    if setup.saved:
        return None
    try:
        header = checkpoint.header()
        if declaration.builds_model(available=setup.has_model):
            empty = {
                name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
                for name, info in header.tensors.items()
            }
            setup.fit(setup.model(workspace.slot), empty, str(checkpoint.path))
    except InputError as error:
        return error
    return None


class Shelf:
    """Finished pieces: those of this call's store first, then those of an older report.

    Args:
        store: Where new pieces go.
        earlier: Pieces of the report, by key.

    Attributes:
        before_put: Called right before a piece is written.
    """

    def __init__(self, store: PieceStore, earlier: dict[str, Piece]) -> None:
        self._store = store
        self._earlier = earlier
        self.before_put: Callable[[], None] = lambda: None

    def get(self, key: str) -> Piece | None:
        """A finished piece with this key, or None."""
        return self._store.get(key) or self._earlier.get(key)

    def put(self, piece: Piece) -> None:
        """Keep a finished piece."""
        self.before_put()
        self._store.put(piece)

    def partial(self, key: str) -> Any:
        """The store for parts of the piece with this key."""
        return self._store.partial(key)
