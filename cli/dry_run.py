"""`--dry-run`: what would be done, what is already there, what the rest would cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dynprobe.analyzers.core.loop import piece_key
from dynprobe.analyzers.core.result import tidy
from dynprobe.cli.plain_table import print_csv, print_rows
from dynprobe.cli.run import open_store, report_path
from dynprobe.io.plain_json import dumps

if TYPE_CHECKING:
    from dynprobe.analyzers.core.loop import Unit
    from dynprobe.cli.request import Request
    from dynprobe.cli.work import Plan, Shelf


FORWARDS = {"forwards": 1, "gradients": 3, "hvps": 5, "input_hvps": 5}
"""Forward passes that a unit of work takes: a Hessian-vector product by double backward measured 5.1."""


def show_plan(request: Request, plan: Plan) -> None:
    """Print the plan to stdout: every piece, whether it is stored, and the cost of those that are not."""
    report = report_path(request, plan)
    store = open_store(request, plan.declaration, report)
    rows: list[dict[str, Any]] = []
    keys: dict[str, str] = {}
    for position in plan.mine:
        unit = plan.units[position]
        row = {name: value for name, value in unit.index.items() if not name.startswith("hash")}
        run = unit.workspaces[0].run.name
        if unit.problem:
            row["plan"] = f"cannot: {unit.problem}"
        else:
            row["plan"], keys[run] = _known(request, plan, unit, store, keys.get(run, ""))
        for workspace in unit.workspaces:
            workspace.release()
        rows.append(row)
    to_do = [plan.units[p] for p, row in zip(plan.mine, rows, strict=True) if row["plan"] == "measure"]
    _show(request, rows, _cost(plan, to_do) | {"report": str(report)})


def _known(request: Request, plan: Plan, unit: Unit, store: Shelf, previous: str) -> tuple[str, str]:
    """What would be done with a unit, and its key."""
    try:
        key = piece_key(plan.job, unit, previous)
    except Exception as error:
        return f"cannot: {error}", previous
    return "stored" if not request.fresh and store.get(key) is not None else "measure", key


def _cost(plan: Plan, to_do: list[Unit]) -> dict[str, Any]:
    """Counts of work for the pieces to be measured, and the time it takes by one timed forward pass."""
    cost: dict[str, Any] = {"pieces to measure": len(to_do)}
    if plan.declaration.cost is None or not to_do:
        return cost
    n_checkpoints = max(len(unit.workspaces) for unit in plan.units)
    recorded = plan.declaration.wants("activations")
    n_units = len(to_do)
    if recorded:  # once per checkpoint, for all its pairs
        n_units = len({id(w) for u in to_do for w in u.workspaces if not w.run.setup.saved})
    for name, count in plan.declaration.cost(plan.job.options, n_checkpoints).items():
        if count * n_units:
            cost[name] = count * n_units
    if "forwards" in cost and (recorded or plan.declaration.wants("batches")):
        try:
            seconds = _seconds_per_forward(plan)
        except Exception as error:
            return cost | {"no estimate": f"the model cannot be run: {error}"}
        passes = sum(weight * cost.get(name, 0) for name, weight in FORWARDS.items())
        cost["seconds per forward pass over the data"] = float(f"{seconds:.2g}")
        cost["estimated seconds"] = float(f"{seconds * passes:.2g}")
    return cost


def _seconds_per_forward(plan: Plan) -> float:
    import torch

    setup = next(p.run.setup for p in plan.prepared if not p.run.setup.saved)
    model, batches = setup.model().eval(), setup.batches
    from dynprobe.analyzers.numerics.evaluate import call

    best = float("inf")
    with torch.inference_mode():
        for _ in range(2):  # the first pass also allocates
            start = time.perf_counter()
            for inputs, _ in batches:
                call(model, inputs)
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
            best = min(best, time.perf_counter() - start)
    return best


def _show(request: Request, rows: list[dict[str, Any]], cost: dict[str, Any]) -> None:
    if request.format == "json":
        print(dumps({"plan": rows, "cost": cost}, indent=2))
        return
    names = list(dict.fromkeys(n for row in rows for n in row))
    if request.format == "csv":
        print_csv(names, [[row.get(n, "") for n in names] for row in rows])
        return
    numeric = [n for n in names if tidy([row.get(n) for row in rows]).dtype.kind in "if"]
    print_rows(names, [[str(row.get(n, "")) for n in names] for row in rows], right=numeric)
    print()
    for name, value in cost.items():
        print(f"{name}: {value}")
