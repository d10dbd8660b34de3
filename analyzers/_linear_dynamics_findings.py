"""Says in sentences what a comparison with linear models found, and reads one run out of a result."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._findings import plus_minus
from dynprobe.analyzers.core.result import FAILED, Result

Floats = NDArray[np.float64]

HALF = 0.5
"""What is said about the residuals is said where the part in V_lin has fallen to this part of its start."""
SURE = 2.0
"""Standard errors by which a difference has to exceed zero."""
SMALL = 0.1
"""Weight decay that shrinks the weights by more than this part of the level leaves a verdict undecided."""


class RunView:
    """One run's part of a result."""

    def __init__(self, result: Result, place: int) -> None:
        self._result, self._place, self._several = result, place, bool(result.lead)
        self.name = str(np.atleast_1d(result["run"])[place]) if "run" in result else ""
        self._mine: Any = slice(None)
        if self._several and "checkpoint_run" in result:
            self._mine = np.flatnonzero(result["checkpoint_run"].astype(str) == self.name)
        raw = self.along("step") if "step" in result else np.arange(len(self.along("loss")))
        known = raw.dtype.kind in "if" and bool(np.isfinite(raw.astype(float)).all())
        self.step: Floats = raw.astype(float) if known else np.arange(len(raw), dtype=float)
        self.step_name = "step" if known else "checkpoint"
        sets = [str(name) for name in result["feature_set"]]
        has = np.isfinite(self.along("optimum_mse").astype(float)).any(0)
        self.sets = [(i, name) for i, name in enumerate(sets) if has[i]]

    def along(self, name: str) -> NDArray[Any]:
        """A variable of the checkpoints."""
        values: NDArray[Any] = np.asarray(self._result[name])[self._mine]
        return values

    def of_run(self, name: str) -> Any:
        """A variable of the run as a whole."""
        values = np.asarray(self._result[name])
        return values[self._place] if self._several else values[()]


def runs_of(result: Result) -> list[RunView]:
    """The runs that were measured."""
    status = np.atleast_1d(result["status"])
    return [RunView(result, i) for i in range(len(status)) if status[i] != FAILED]


def findings(result: Result) -> dict[str, Any]:
    """Sentences on each run: until when it is linear, and which part of the residual goes first."""
    runs = runs_of(result)
    options = dict(result.attributes.get("options", {}))
    level = float(options.get("level", 0.1))
    found = []
    for run in runs:
        head = f"{run.name}: " if len(runs) > 1 else ""
        found += [head + text for text in (_residuals(run), *_agreements(run, level)) if text]
    return {"finding": np.array(found, dtype=object)} if found else {}


def _residuals(run: RunView) -> str:
    """Which part of the residual falls first, where the one in V_lin has halved."""
    inside, outside = run.along("residual_linear"), run.along("residual_complement")
    inside_error, outside_error = run.along("residual_linear_stderr"), run.along("residual_complement_stderr")
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        return "undecided: the residual in V_lin and outside it are not both known at every checkpoint"
    fallen = np.flatnonzero(inside <= HALF * inside[0])
    if not len(fallen):
        return "undecided: the residual in V_lin never falls to half of its start"
    at = int(fallen[0])
    left = [values[at] / values[0] for values in (inside, outside)]
    errors = [
        abs(ratio) * math.hypot(error[at] / values[at], error[0] / values[0]) if values[at] > 0 else 0.0
        for ratio, values, error in zip(left, (inside, outside), (inside_error, outside_error), strict=True)
    ]
    first = "undecided"
    if abs(left[1] - left[0]) > SURE * math.hypot(*errors):
        first = "the part in V_lin falls first" if left[0] < left[1] else "the part outside V_lin falls first"
    return (
        f"{first}: at step {run.step[at]:g} {plus_minus(left[0], errors[0])} of the residual in V_lin is "
        f"left and {plus_minus(left[1], errors[1])} of that outside"
    )


def _agreements(run: RunView, level: float) -> list[str]:
    """Until when each linear model agrees with the network."""
    steps, states = np.atleast_1d(run.of_run("agreement_step")), np.atleast_1d(run.of_run("agreement_state"))
    low, high = np.atleast_1d(run.of_run("agreement_low")), np.atleast_1d(run.of_run("agreement_high"))
    floor = float(run.of_run("expected_floor"))
    found = []
    for i, name in run.sets:
        values, errors = run.along("relative_mse")[:, i], run.along("relative_mse_stderr")[:, i]
        known = np.flatnonzero(np.isfinite(values))
        text = _agreement(str(states[i]), steps[i], low[i], high[i], run.step, values, errors, known)
        if text:
            text = _beside_decay(run, i, level, _beside_batches(run, i, level, text))
        if text and floor > level and name.startswith("paper"):
            text = (
                f"undecided: a network of this width is expected to differ by {floor:.2g} (0.6 d/width), "
                f"above the level {level:g}; {text}"
            )
        if text:
            found.append(f"network and linear model ({name}) at a relative error of {level:g}: {text}")
    return found


def _beside_batches(run: RunView, i: int, level: float, text: str) -> str:
    """What is said where the noise of batches can itself be above the level when they first differ.

    The run is one draw of batches: its distance from the linear model scatters like that of the draws made
    here, whose mean is known up to its own error.
    """
    values, errors = run.along("relative_mse")[:, i], run.along("relative_mse_stderr")[:, i]
    noises = run.along("batch_noise")[:, i]
    scatter = noises + SURE * (run.along("batch_noise_std")[:, i] + run.along("batch_noise_stderr")[:, i])
    most = np.maximum(scatter, SURE * noises)
    differ = np.flatnonzero(values > level)
    if not len(differ) or most[differ[0]] <= level:
        return text
    if not np.isfinite(most[differ[0]]):
        return f"{text}; what batches alone would do is not known"
    beyond = np.flatnonzero(values - SURE * errors > np.maximum(level, most))
    if not len(beyond):
        at = int(differ[0])
        alone = f"{noises[at]:.2g} (up to {most[at]:.2g})"
        return f"undecided: batches alone would make them differ by {alone}; {text}"
    at = int(beyond[0])
    said = plus_minus(float(values[at]), float(errors[at]))
    return (
        f"beyond what batches alone would do they differ from step {run.step[at]:g} ({said}, batches alone "
        f"{noises[at]:.2g}, up to {most[at]:.2g}); before that it is undecided"
    )


def _beside_decay(run: RunView, i: int, level: float, text: str) -> str:
    """What is said where weight decay, which the linear models lack, moves the network by itself."""
    values, decay = run.along("relative_mse")[:, i], run.along("weight_decay_part")
    known, differ = np.flatnonzero(np.isfinite(values)), np.flatnonzero(values > level)
    at = int(differ[0] if len(differ) else known[-1])
    if not decay[at] > SMALL * level:
        return text
    return (
        f"undecided: weight decay is not in the linear models and shrinks the weights by a part of "
        f"{decay[at]:.2g} up to step {run.step[at]:g}; {text}"
    )


def _agreement(
    state: str,
    step: float,
    low: float,
    high: float,
    place: Floats,
    values: Floats,
    errors: Floats,
    known: NDArray[np.intp],
) -> str:
    if not len(known) or state == "unknown":
        return ""
    if state == "never":
        last = known[-1]
        doubt = f", though not certainly from step {low:g} on" if math.isfinite(low) else ""
        return (
            f"they agree to step {place[last]:g}, the last one compared "
            f"({plus_minus(float(values[last]), float(errors[last]))}){doubt}"
        )
    if state == "from the start":
        first = known[0]
        if math.isfinite(high) and high == place[first]:
            said = plus_minus(float(values[first]), float(errors[first]))
            return f"they differ already at step {place[first]:g} ({said})"
        return f"undecided from step {place[first]:g} on"
    until = f"{high:g}" if math.isfinite(high) else "beyond the last checkpoint"
    return f"they agree until step {step:.4g} (between {low:g} and {until})"
