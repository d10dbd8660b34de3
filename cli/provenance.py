"""Where numbers come from: what must agree for them to stand together, and how to repeat them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynprobe.cli.setup import command_line
from dynprobe.io.join import Part, owner, relative_folders, run_folder, shared_facts

if TYPE_CHECKING:
    from dynprobe.analyzers.core.result import Result
    from dynprobe.cli.request import Request
    from dynprobe.cli.work import Plan


def differences(request: Request, plan: Plan, report: Path, older: Result) -> list[str]:
    """`resolution was 5, is now 7` for everything that keeps a call's pieces out of an older result.

    A run that the older result does not know may be measured on anything.
    """
    now = identity(request, plan)
    before = dict(older.attributes)
    for attributes in (now, before):
        attributes["options"] = plan.declaration.deciding(attributes.get("options", {}))
    found = _changed(now, before)
    there = Part.of(older, report)
    if plan.declaration.grain == "group":
        found += _changed({"runs": [str(v) for v in folders(plan).values()]}, {"runs": _all_folders(there)})
    known = {there.root(run): facts for run, facts in there.facts.items()}
    roots = folders(plan)
    for run, facts in facts_of(request, plan).items():
        old = known.get(owner(roots[run], known), {}).get("measured_on")
        if old is not None:
            new = facts["measured_on"]
            found += _changed(dict.fromkeys(old) | dict(new), old)
    return list(dict.fromkeys(found))


def _all_folders(part: Part) -> list[str]:
    return [str(folder) for folder in part.folders.values()]


def _changed(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            found += _changed(dict.fromkeys(before) | dict(value), before)
        elif before != value:
            found.append(f"{name} was {before}, is now {value}")
    return found


def identity(request: Request, plan: Plan) -> dict[str, Any]:
    """What must be equal for the pieces of all runs to stand in one result: options, code, version."""
    from dynprobe import __version__
    from dynprobe.analyzers.core.loop import code_hash

    return {
        "options": dict(sorted(request.options.items())),
        "dynprobe_version": __version__,
        "code": code_hash(plan.declaration)[:12],
    }


def folders(plan: Plan) -> dict[str, Path]:
    """The folder of each run, by label."""
    return {p.run.name: run_folder(p.run.name, Path(p.run.checkpoints[0].path)) for p in plan.prepared}


def facts_of(request: Request, plan: Plan) -> dict[str, dict[str, Any]]:
    """What each run is measured on: model, data, loss; by run."""
    needed = plan.declaration.needed(request.options)
    decides = plan.declaration.decided_by(request.options)
    found: dict[str, dict[str, Any]] = {}
    for prepared in plan.prepared:
        facts: dict[str, Any] = {"measured_on": dict(prepared.run.setup.facts(decides))}
        used = "batches" in needed or plan.declaration.wants("activations")
        dataset = prepared.dataset if used else None
        if dataset is not None:
            facts |= {
                "data": dataset.source,
                "n_samples": dataset.n_samples,
                "n_samples_of": dataset.n_total,
            }
            if not dataset.targets.is_floating_point() and dataset.targets.ndim == 1:
                facts["n_classes"] = int(dataset.targets.max()) + 1
        found[prepared.run.name] = facts
    return found


def _groups(request: Request, plan: Plan) -> list[str]:
    """The groups in the order in which they were given, or in that of the runs."""
    if all("=" in text for text in request.group):
        return [text.partition("=")[0] for text in request.group]
    return [str(unit.index[n]) for unit in plan.units for n in ("group_a", "group_b") if n in unit.index]


def provenance(request: Request, plan: Plan, report: Path) -> dict[str, Any]:
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
        "matrix": plan.declaration.matrix,
        "folders": relative_folders(folders(plan), report),
    }
    if request.shard:
        attributes["shard"] = request.shard
    if request.group:
        attributes["groups"] = list(dict.fromkeys(_groups(request, plan)))
    return attributes | shared_facts(facts_of(request, plan))
