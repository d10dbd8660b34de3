"""Where numbers come from: what must agree for them to stand together, and how to repeat them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.cli.setup import command_line

if TYPE_CHECKING:
    from dynprobe.analyzers.core.result import Result
    from dynprobe.cli.request import Request
    from dynprobe.cli.work import Plan


EACH = "of each run"


def differences(request: Request, plan: Plan, older: Result) -> list[str]:
    """`resolution was 5, is now 7` for everything that keeps a call's pieces out of an older result.

    A run that the older result does not know may be measured on anything.
    """
    new = identity(request, plan)
    found = _changed({k: v for k, v in new.items() if k != "measured_on"}, older.attributes)
    before = _by_run(older.attributes.get("measured_on", {}), _runs_of(older))
    for run, facts in _by_run(new["measured_on"], [p.run.name for p in plan.prepared]).items():
        if run in before:
            found += _changed(dict.fromkeys(before[run]) | dict(facts), before[run])
    return list(dict.fromkeys(found))


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            found += _changed(dict.fromkeys(before) | dict(value), before)
        elif before != value:
            found.append(f"{name} was {before}, is now {value}")
    return found


def _by_run(measured_on: Mapping[str, Any], runs: Iterable[str]) -> dict[str, Any]:
    return dict(measured_on[EACH]) if EACH in measured_on else dict.fromkeys(runs, measured_on)


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts themselves where all runs share them, by run otherwise."""
    first, *others = facts.values()
    return {EACH: dict(facts)} if any(other != first for other in others) else dict(first)


def _runs_of(result: Result) -> list[str]:
    names = [n for n in ("run", "run_a", "run_b") if n in result]
    return list(dict.fromkeys(str(run) for n in names for run in np.atleast_1d(result[n]).tolist()))


def identity(request: Request, plan: Plan) -> dict[str, Any]:
    """What must be equal for pieces to stand in one result: options, data, model, version."""
    from dynprobe import __version__

    needed = plan.declaration.needed(request.options)
    facts = {p.run.name: dict(p.run.setup.facts(needed)) for p in plan.prepared}
    return {
        "options": dict(sorted(request.options.items())),
        "measured_on": _flat(facts),
        "dynprobe_version": __version__,
    }


def joined_facts(new: Result, older: Result) -> dict[str, Any]:
    """What two results were measured on, for the one that holds both."""
    each = [_by_run(r.attributes.get("measured_on", {}), _runs_of(r)) for r in (older, new)]
    return _flat(each[0] | each[1])


def provenance(request: Request, plan: Plan) -> dict[str, Any]:
    """Everything a reader needs to repeat the call, nothing that names a machine or a person."""
    import torch

    attributes = identity(request, plan) | {
        "title": plan.declaration.line,
        "command": command_line(sys.argv[1:]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": request.device,
        "dtype": request.dtype,
        "seed": request.seed,
        "batch_size": request.batch_size,
        "threads": torch.get_num_threads(),
        "mode": "eval (dropout off, BatchNorm statistics frozen) unless an option above says otherwise",
        "planned": len(plan.units),
        "table": list(plan.declaration.table),
    }
    if request.shard:
        attributes["shard"] = request.shard
    dataset = plan.prepared[0].dataset
    if dataset is not None and plan.declaration.wants("batches"):
        attributes |= {
            "data": dataset.source,
            "n_samples": dataset.n_samples,
            "n_samples_of": dataset.n_total,
        }
        if not dataset.targets.is_floating_point() and dataset.targets.ndim == 1:
            attributes["n_classes"] = int(dataset.targets.max()) + 1
    return attributes
