"""Says in a sentence for each run in which order low and high frequencies were learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import Var
from dynprobe.analyzers._fourier_verdict import HOLDS, REVERSED
from dynprobe.analyzers.core.result import FAILED, Result

Floats = NDArray[np.float64]

SUMMARY_RETURNS = {"finding": Var(("finding",), "", "What was found, in words", optional=True)}


def summary(result: Result) -> dict[str, Any]:
    """One sentence for each run of the call."""
    good = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)
    names = np.atleast_1d(result["run"]).astype(str) if "run" in result else np.full(result.n_pieces, "")
    heads = {i: f"{names[i]}: " if len(names) > 1 else "" for i in good}
    return {"finding": np.array([heads[i] + _sentence(_Run(result, int(i))) for i in good], dtype=object)}


class _Run:
    """One run's part of a result, at the widths that are its own."""

    def __init__(self, result: Result, run: int) -> None:
        self._result, self._run = result, run
        self._own = np.isfinite(np.atleast_2d(self._of("lfr_target"))[0])
        self.lfr = self["lfr_target"]
        self.level = np.asarray(result["level"], dtype=float)
        self.verdict = self["verdict"].astype(str)
        self.whole = str(np.atleast_1d(result["run_verdict"])[run])
        self.reason = str(np.atleast_1d(result["verdict_reason"])[run])

    def _of(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self._result[name]
        return values[self._run] if self._result.lead else values

    def __getitem__(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self._of(name)[..., self._own]
        return values


def _sentence(run: _Run) -> str:
    rising = np.argsort(run.lfr, kind="stable")
    said = {verdict: rising[run.verdict[rising] == verdict] for verdict in (HOLDS, REVERSED)}
    if run.whole in said:
        opening = "the frequency principle holds" if run.whole == HOLDS else "reversed"
        return f"{opening} {_with_evidence(run, run.whole, said[run.whole])}"
    parts = [
        f"{'low frequencies first' if verdict == HOLDS else 'reversed'} {_with_evidence(run, verdict, at)}"
        for verdict, at in said.items()
        if len(at)
    ]
    if not parts:
        return f"undecided: {run.reason}{_closest(run)}"
    return f"undecided: {'; '.join(parts)}; {run.reason}"


def _with_evidence(run: _Run, verdict: str, at: NDArray[np.intp]) -> str:
    """At which widths, and the ratios of steps at the level where most widths tell the order."""
    sign = 1 if verdict == HOLDS else -1
    telling = (run["order_beyond_control"] == sign)[:, at]
    finite = telling & np.isfinite(run["step_ratio"][:, at])
    level = int(np.lexsort((-run.level, finite.sum(1), telling.sum(1)))[-1])
    cells = at[telling[level]]
    ratio, error = run["step_ratio"][level, cells], run["step_ratio_stderr"][level, cells]
    others = at[~np.isin(at, cells)]
    also = f"; also at LFR {_list(run.lfr[others])}, by other levels" if len(others) else ""
    text = f"{_ratios(ratio, error, run.level[level])}{_control(run, level, cells)}"
    return f"at LFR {_list(run.lfr[cells])}: {text}{also}"


def _control(run: _Run, level: int, cells: NDArray[np.intp]) -> str:
    control, spread = run["control_ratio"][level, cells], run["control_ratio_stderr"][level, cells]
    known = np.flatnonzero(np.isfinite(control))
    if not len(known):
        return ""
    return f" ({_extremes(control, spread, known)} with residuals permuted within classes)"


def _closest(run: _Run) -> str:
    """The ratios at the level where most widths have an order, none of them beyond the control."""
    cells = (run["order"] != 0) & np.isfinite(run["step_ratio"]) & np.isfinite(run["control_ratio"])
    if not cells.any():
        return ""
    level = int(np.lexsort((-run.level, cells.sum(1)))[-1])
    at = np.flatnonzero(cells[level])
    at = at[np.argsort(run.lfr[at], kind="stable")]
    ratio, error = run["step_ratio"][level, at], run["step_ratio_stderr"][level, at]
    text = _ratios(ratio, error, run.level[level])
    return f"; at LFR {_list(run.lfr[at])}: {text}{_control(run, level, at)}"


def _ratios(ratio: Floats, error: Floats, level: float) -> str:
    """How many times as many steps, or which part never gets there."""
    known = np.flatnonzero(np.isfinite(ratio) & (ratio > 0))
    first, never = ("e_low", "e_high") if np.isinf(ratio).any() else ("e_high", "e_low")
    if not len(known):
        return f"{first} falls under {level:g} within the run and {never} does not"
    times = f"{_extremes(ratio, error, known)} times as many steps"
    text = f"{times} until e_high < {level:g} as until e_low < {level:g}"
    return text if len(known) == len(ratio) else f"{text}, and {never} never falls under it at the others"


def _extremes(value: Floats, error: Floats, known: NDArray[np.intp]) -> str:
    """The smallest and the largest with their errors."""
    least, most = known[value[known].argmin()], known[value[known].argmax()]
    text = _plus_minus(value[least], error[least])
    return text if most == least else f"{text} to {_plus_minus(value[most], error[most])}"


def _list(values: Floats) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _plus_minus(value: float, error: float) -> str:
    """Both to the second digit of the error."""
    if not (math.isfinite(error) and error > 0):
        return f"{value:.3g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"
