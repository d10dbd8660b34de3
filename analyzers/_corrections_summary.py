"""What a call says about corrections: how far they are, where there are none, how long boxes hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._corrections_runs import (
    ALREADY_TARGET,
    BOUNDED,
    FOUND,
    NONE_EXISTS,
    OPTIMAL,
    OUTCOMES,
    TIMEOUT,
    UNSUPPORTED,
    JudgedRun,
    judged_runs,
)
from dynprobe.analyzers._corrections_sentences import MOST_SAMPLES, judgement_sentences, listed
from dynprobe.analyzers._findings import plus_minus
from dynprobe.analyzers.core.result import Result, Var

Floats = NDArray[np.float64]

MOST_OTHERS = 3
"""Other runs that a sentence on transfer lists."""


def _var(long_name: str, error: str = "", dims: tuple[str, ...] = ("judged_run",)) -> Var:
    return Var(dims, "", long_name, error, optional=True)


_TRANSFER = ("judged_run", "other")

SUMMARY_RETURNS = {
    "judged_run": _var("Run"),
    "median_stable_distance": _var("Stable distance at the last checkpoint, median of those found"),
    "stable_distance_low": _var("Lower quartile of it"),
    "stable_distance_high": _var("Upper quartile of it"),
    "median_distance": _var("Distance of the nearest correction there, median of those found"),
    "median_gap": _var("Gap between stable distance and its bound, part of the distance, median"),
    **{
        f"n_{outcome}": _var(f"Judgements at the last checkpoint, stable correction: {text}")
        for outcome, text in OUTCOMES.items()
    },
    "holding_share": _var("Share of boxes that hold at the next checkpoint", "holding_share_stderr"),
    "holding_share_stderr": _var("Binomial standard error, over boxes"),
    "n_boxes_followed": _var("Boxes looked at again at the next checkpoint"),
    "median_overlap": _var("Overlap with the box of the checkpoint before, median"),
    "transfer_share": _var("Share of boxes that hold on another run", "transfer_share_stderr", _TRANSFER),
    "transfer_share_stderr": _var("Binomial standard error, over boxes", dims=_TRANSFER),
    "n_points_sampled": _var("Points sampled in all boxes and polygons of all checkpoints"),
    "n_points_failing": _var("Of them, points not judged as the target"),
    "finding": _var("What was found, in words", dims=("finding",)),
}


def share(holds: Floats) -> tuple[float, float, int]:
    """Share of ones among ones and zeros, its binomial standard error, and of how many.

    The error takes one more of either kind: all of three is no certainty.

    Args:
        holds: 1, 0 or NaN, in any shape.

    Returns:
        Share and error, NaN where nothing is known, and the number of known entries.
    """
    known = holds[np.isfinite(holds)]
    n = len(known)
    if n == 0:
        return float("nan"), float("nan"), 0
    shrunk = (known.sum() + 1) / (n + 2)
    return float(known.mean()), float(np.sqrt(shrunk * (1 - shrunk) / n)), n


def _quantile(values: Floats, at: float) -> float:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, at)) if known.size else float("nan")


def _total(values: Floats) -> float:
    return float(np.nansum(values)) if np.isfinite(values).any() else float("nan")


def summarise(result: Result) -> dict[str, Any]:
    """Numbers on every run of a call, and sentences on its last checkpoint.

    Args:
        result: From `corrections`, all runs of the call.

    Returns:
        What `SUMMARY_RETURNS` declares; transfer only where it was measured.
    """
    runs = judged_runs(result)
    rows = [_numbers(run) for run in runs]
    names = np.atleast_1d(result["run"]).astype(str) if "run" in result else np.array([""])
    summary: dict[str, Any] = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    summary["judged_run"] = np.array([run.name or str(names[0]) for run in runs], dtype=object)
    if "transfer" in result:
        shares = np.array([transfer_shares(run) for run in runs])
        summary["transfer_share"], summary["transfer_share_stderr"] = shares[..., 0], shares[..., 1]
    others = [str(name) for name in result["other"]] if "transfer" in result else []
    most = max(1, MOST_SAMPLES // len(runs))
    findings = [
        text for run in runs for text in (*_overview(run, others), *judgement_sentences(run, most))
    ]  # fmt: skip
    return summary | {"finding": np.array(findings, dtype=object)}


def _numbers(run: JudgedRun) -> dict[str, float]:
    stable, lower = run.numbers("stable_distance")[-1], run.numbers("stable_lower_bound")[-1]
    outcome = run.outcomes()[-1]
    stable = np.where(np.isin(outcome, FOUND), stable, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = (stable - lower) / stable
    holding, error, n = share(run.numbers("previous_holds"))
    several = stable if np.isfinite(stable).sum() > 1 else np.full(1, np.nan)  # one value has no quartiles
    return {
        "median_stable_distance": _quantile(stable, 0.5),
        "stable_distance_low": _quantile(several, 0.25),
        "stable_distance_high": _quantile(several, 0.75),
        "median_distance": _quantile(run.numbers("distance")[-1], 0.5),
        "median_gap": _quantile(gap, 0.5),
        **{f"n_{name}": int((outcome == name).sum()) for name in OUTCOMES},
        "holding_share": holding,
        "holding_share_stderr": error,
        "n_boxes_followed": n,
        "median_overlap": _quantile(run.numbers("overlap"), 0.5),
        "n_points_sampled": _total(run.numbers("n_sampled")),
        "n_points_failing": _total(run.numbers("sampled_failures")),
    }


def transfer_shares(run: JudgedRun) -> Floats:
    """Share of the last checkpoint's boxes that hold on each other run, with its error.

    Returns:
        (n_others, 2), NaN where nothing is known.
    """
    columns = run.numbers("transfer")[-1].T
    return np.array([share(column)[:2] for column in columns]).reshape(-1, 2)


def _overview(run: JudgedRun, others: list[str]) -> list[str]:
    """Sentences on all judgements of a run together."""
    numbers = _numbers(run)
    head = f"{run.name}: " if run.name else ""
    found = [_counts(run, numbers)] if (run.outcomes()[-1] != "").sum() > 1 else []
    if n := int(numbers["n_boxes_followed"]):
        text = plus_minus(numbers["holding_share"], numbers["holding_share_stderr"])
        hold = f"{round(n * numbers['holding_share'])} of {n} box{'es' if n > 1 else ''} still hold"
        overlap = numbers["median_overlap"]
        beside = f"; median overlap of consecutive boxes {overlap:.2g}" if np.isfinite(overlap) else ""
        found.append(f"{hold}{'s' if n == 1 else ''} at the next checkpoint ({text}){beside}")
    if others:
        shares = transfer_shares(run)
        known = [j for j in np.flatnonzero(np.isfinite(shares[:, 0])) if others[j] != run.name]
        on = [f"{plus_minus(*shares[j])} on {others[j]}" for j in known]
        found += [f"share of its boxes that hold on other runs: {listed(on, MOST_OTHERS)}"] if on else []
    return [head + text for text in found]


def _counts(run: JudgedRun, numbers: dict[str, float]) -> str:
    total = sum(int(numbers[f"n_{name}"]) for name in OUTCOMES)
    head = f"{total} judgements at {run.step_name} {run.step[-1]:g}: "
    if numbers[f"n_{ALREADY_TARGET}"] == total:
        return f"{head}all are the target already, there is nothing to correct"
    stable_only = sum(run.only_stable_excluded(i) for i in range(len(run.samples)))
    counts = [
        (numbers[f"n_{OPTIMAL}"], "corrected optimally"),
        (numbers[f"n_{BOUNDED}"], "corrected within bounds"),
        (stable_only, "without a stable correction"),
        (numbers[f"n_{NONE_EXISTS}"] - stable_only, "without any correction"),
        (numbers[f"n_{TIMEOUT}"], "undecided"),
        (numbers[f"n_{UNSUPPORTED}"], "not supported"),
        (numbers[f"n_{ALREADY_TARGET}"], "already the target"),
    ]
    text = head + ", ".join(f"{n} {words}" for n, words in counts if n)
    n = int(numbers[f"n_{OPTIMAL}"] + numbers[f"n_{BOUNDED}"])
    median, low, high = (
        numbers[name] for name in ("median_stable_distance", "stable_distance_low", "stable_distance_high")
    )
    if np.isfinite(median):
        kind = "stable distance" if run.is_stable() else "distance"
        of = f"median {kind} of the {n} corrected" if n > 1 else f"{kind} of the one corrected"
        text += f"; {of} {median:.2g}" + (f" (quartiles {low:.2g} to {high:.2g})" if n > 1 else "")
    return text
