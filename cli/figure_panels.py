"""Which pieces of a result a figure shows, what they are called, and the small print below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynprobe.analyzers.core.result import FAILED, Result
from dynprobe.io.errors import InputError
from dynprobe.io.join import EACH

MAXIMAL_PANELS = 9

CROSS_ENTROPIES = ("cross_entropy", "causal_lm")


def require(result: Result, name: str) -> None:
    """Check that the result holds a variable.

    Raises:
        InputError: If it does not.
    """
    if name not in result:
        raise InputError(
            f"{result.analyzer}: there is no variable {name!r} to draw",
            tip=f"The result has {', '.join(sorted(result.variables)) or 'none'}.",
        )


def refuse_if_all_failed(result: Result) -> None:
    """Check that there is something to draw.

    Raises:
        InputError: If every piece failed; it says why the first did.
    """
    if np.all(np.atleast_1d(result["status"]) == FAILED):
        what, reason = result.failures()[0]
        count = f"all {result.n_pieces} pieces" if result.n_pieces > 1 else "the only piece"
        raise InputError(
            f"{result.analyzer}: nothing to draw, {count} failed",
            tip=f"{what}: {reason.removeprefix(f'{FAILED}: ')}",
        )


def fact(result: Result, *names: str) -> Any:
    """The first of these facts that attributes, options or measuring conditions give, else None."""
    measured_on = result.attributes.get("measured_on") or {}
    each_run = list((measured_on.get(EACH) or {"": measured_on}).values())
    sources = [result.attributes, result.attributes.get("options") or {}]
    for name in names:
        for source in sources:
            value = source.get(name)
            if value not in (None, "") and not (isinstance(value, Mapping) and EACH in value):
                return value
        if len({str(conditions.get(name)) for conditions in each_run}) == 1 and each_run[0].get(name):
            return each_run[0][name]  # runs that differ in it have no common answer
    return None


def chance_level(result: Result, name: str) -> float | None:
    """The cross-entropy ln C of a uniform guess among C classes, if `name` is such a loss."""
    classes, loss = fact(result, "n_classes"), fact(result, "loss")
    is_cross_entropy = "loss" in name.split("_") and loss in CROSS_ENTROPIES
    return math.log(int(classes)) if is_cross_entropy and classes and int(classes) > 1 else None


def chance_text(level: float) -> str:
    """The chance level for a legend: `chance, ln 10 = 2.303`."""
    return f"chance, ln {round(math.exp(level))} = {level:.4g}"


def along(result: Result, dim: str, *names: str) -> np.ndarray | None:
    """The first of the named arrays that labels the dimension `dim`, else None."""
    found = (n for n in names if n in result and result.arrays[n].dims == (dim,))
    name = next(found, None)
    return None if name is None else result[name]


def number_or_nan(value: Any) -> float:
    """A step as a float; NaN where it is unknown."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def step_text(value: Any) -> str:
    """A step as it is typed: `1000`, `0.5`."""
    step = number_or_nan(value)
    if not math.isfinite(step):
        return str(value)
    return str(int(step)) if step == int(step) else f"{step:g}"


def piece_title(result: Result, piece: int) -> str:
    """What a panel or a curve is called: its step, with the run where there are several."""

    def at(name: str) -> str:
        return step_text(np.atleast_1d(result[name])[piece]) if name in result else ""

    if at("step_a") and at("step_b"):
        ends = [f"{at(f'run_{half}')} {at(f'step_{half}')}".strip() for half in "ab"]
        same = at("run_a") == at("run_b") and not several_runs(result)
        return f"steps {at('step_a')}, {at('step_b')}" if same else " | ".join(ends)
    if "step" in result and result.arrays["step"].dims == result.arrays["status"].dims:
        step = f"{at('step_unit') or 'step'} {at('step')}"
        return f"{at('run')}, {step}" if several_runs(result) else step
    return result.label(piece)


def run_names(result: Result) -> list[str]:
    """The runs that the result speaks of, in order."""
    names = (n for n in ("run", "checkpoint_run", "run_a", "run_b") if n in result)
    return list(dict.fromkeys(str(v) for n in names for v in np.atleast_1d(result[n]) if str(v)))


def several_runs(result: Result) -> bool:
    """Whether a reader must be told which run is meant."""
    return len(run_names(result)) > 1


def choose(positions: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """Indices of `count` of the positions (steps), log-spaced, with the first and the last.

    Training changes fast at first: equal spacing would show the end many times.
    """
    n = len(positions)
    if n <= count:
        return list(range(n))
    steps = np.asarray(positions, dtype=float)
    if not np.all(np.isfinite(steps)) or np.any(np.diff(steps) < 0):
        steps = np.arange(n, dtype=float)
    place = np.log1p(steps - steps[0])
    chosen = [0, n - 1][:count]
    for target in np.linspace(place[0], place[-1], count)[1:-1]:
        free = [i for i in range(n) if i not in chosen]
        chosen.append(min(free, key=lambda i: abs(place[i] - target)))
    return sorted(chosen)


def shown_pieces(result: Result, drawable: Sequence[int], count: int) -> list[int]:
    """At most `count` of the drawable pieces, shared fairly between the runs."""
    runs = along(result, result.lead, "run") if result.lead else None
    names = np.atleast_1d(runs) if runs is not None else np.array([""] * result.n_pieces)
    steps = along(result, result.lead, "step") if result.lead else None
    groups: dict[str, list[int]] = {}
    for piece in drawable:
        groups.setdefault(str(names[piece]), []).append(piece)
    share = max(1, count // max(1, len(groups)))
    picked = []
    for pieces in list(groups.values())[:count]:
        places = [i if steps is None else number_or_nan(steps[i]) for i in pieces]
        picked += [pieces[i] for i in choose(places, share)]
    return sorted(picked)


def small_print(result: Result, shown: Sequence[int] | None, notes: Sequence[str]) -> list[str]:
    """The sentences under a figure: runs, steps, samples, what is not shown, what to beware of."""
    runs, sentences = run_names(result), []
    if runs:
        names = ", ".join(runs[:4]) + (", …" if len(runs) > 4 else "")
        sentences.append(f"run{'s' if len(runs) > 1 else ''} {names}")
    axes = [n for n in ("step", "step_a", "step_b") if n in result]
    steps = [step for n in axes for step in np.atleast_1d(result[n]).tolist()]
    known = [s for s in map(number_or_nan, steps) if math.isfinite(s)]
    if known:
        unit = str(np.atleast_1d(result["step_unit"])[0]) if "step_unit" in result else "step"
        ends = [step_text(min(known)), step_text(max(known))]
        sentences.append(f"{unit} {ends[0]}" if ends[0] == ends[1] else f"{unit}s {ends[0]} to {ends[1]}")
    if (samples := fact(result, "n_samples", "samples")) is not None:
        sentences.append(f"{samples} samples")
    if shown is not None and len(shown) < result.n_pieces:
        what = f"{result.lead or 'piece'}s"
        sentences.append(f"{len(shown)} of {result.n_pieces} {what} shown")
    failed = np.flatnonzero(np.atleast_1d(result["status"]) == FAILED)
    if failed.size:
        names = ", ".join(piece_title(result, int(i)) for i in failed[:3])
        sentences.append(f"failed: {names}" + (f" and {failed.size - 3} more" if failed.size > 3 else ""))
    return [*sentences, *notes]
