"""The corrections of a result by run, in the order of the steps: what figure and summary both read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._steps import step_axis
from dynprobe.analyzers.core.result import FAILED, Result

Floats = NDArray[np.float64]

OPTIMAL, BOUNDED, NONE_EXISTS = "optimal", "bounded", "none_exists"
TIMEOUT, UNSUPPORTED, ALREADY_TARGET = "timeout", "unsupported", "already_target"
OUTCOMES = {
    OPTIMAL: "optimal",
    BOUNDED: "bounded",
    NONE_EXISTS: "none exists",
    TIMEOUT: "undecided",
    UNSUPPORTED: "not supported",
    ALREADY_TARGET: "already target",
}
"""Every outcome of a judgement, in the words of figures."""
FOUND = (OPTIMAL, BOUNDED)

STABLE, NEAREST = "corrected", "nearest"
"""Variables with the two corrections of a judgement."""

_IN_ORDER = 5
"""Changes up to which the order is that of the features."""
_SINGLE_PRECISION = float(np.finfo(np.float32).eps)
_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def outcome_text(name: str, *, stable: bool) -> str:
    """An outcome in the words of figures.

    Args:
        name: One of `OUTCOMES`.
        stable: Whether more than a point was asked for: single points may then flip what has no correction.
    """
    return "no stable correction" if stable and name == NONE_EXISTS else OUTCOMES[name]


class JudgedRun:
    """One run's corrections, without failed checkpoints.

    Attributes:
        name: Of the run, empty where there is one only.
        step: Where its checkpoints stand, ascending, (n_checkpoints,).
        step_name: What that is: step or checkpoint.
        samples: Places in the data, (n_samples,).
        features: Names of all features of the result.
        chosen: Which of them this run may change.
    """

    def __init__(self, result: Result, pieces: list[int], name: str) -> None:
        step, self.step_name = step_axis(result, np.array(pieces))
        self._pieces = sorted(pieces, key=lambda i: step[i])
        self._result = result
        self.name = name
        self.step = step[self._pieces]
        self.samples = np.asarray(result["sample"])
        self.features = [str(name) for name in result["feature"]]
        names = next((result[n] for n in ("class", "classes") if n in result and result[n].ndim == 1), ())
        self._classes = [str(name) for name in names]
        self.chosen = np.flatnonzero(np.isfinite(self["feature_low"][-1].astype(float)))

    def __contains__(self, name: str) -> bool:
        return name in self._result

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A variable of this run's checkpoints, (n_checkpoints, …)."""
        values: NDArray[Any] = self._result[name][self._pieces]
        return values

    def numbers(self, name: str) -> Floats:
        """The same as floats, infinities as NaN; all NaN for every sample where it was not measured."""
        if name not in self._result:
            return np.full((len(self._pieces), len(self.samples)), np.nan)
        values = self[name].astype(float)
        return np.where(np.isfinite(values), values, np.nan)

    def outcomes(self) -> NDArray[Any]:
        """Outcomes as text, (n_checkpoints, n_samples); empty where a sample was not judged."""
        return self["outcome"].astype(str)

    def found(self) -> NDArray[np.bool_]:
        """Where there is a correction, (n_checkpoints, n_samples)."""
        there: NDArray[np.bool_] = np.isin(self.outcomes(), FOUND)
        return there

    def is_stable(self) -> bool:
        """Whether more than a point was asked for."""
        return bool((np.nan_to_num(self.numbers("stability")[-1]) > 0).any())

    def only_stable_excluded(self, sample: int) -> bool:
        """Whether none exists at the last checkpoint that is stable, while single points may flip it."""
        nearest = str(self["nearest_outcome"][-1, sample])
        return bool(self.is_stable() and self.outcomes()[-1, sample] == NONE_EXISTS != nearest)

    def correction(self, sample: int) -> str:
        """Which correction the last checkpoint has: the stable one, else the nearest; or none."""
        if self.found()[-1, sample]:
            return STABLE
        known = np.isfinite(self.numbers("distance")[-1, sample])
        return NEAREST if known and np.isfinite(self.numbers(NEAREST)[-1, sample]).any() else ""

    def allowed(self, sample: int) -> tuple[Floats, Floats]:
        """Lowest and highest allowed value of every feature: its range, extended to the judged value."""
        value = self.numbers("value")[-1, sample]
        own = (
            np.fmin(self.numbers("feature_low")[-1], value),
            np.fmax(self.numbers("feature_high")[-1], value),
        )
        low, high = (
            np.where(np.isfinite(told), told, end)
            for told, end in zip(
                (self._of_features(f"allowed_{name}", sample) for name in ("low", "high")), own, strict=True
            )
        )
        return low, high

    def reachable(self, sample: int) -> tuple[Floats, Floats]:
        """The same for a feature that may only grow, or only shrink, from the judged value on."""
        low, high = self.allowed(sample)
        value = self.numbers("value")[-1, sample]
        direction = self.numbers("direction")[-1] if "direction" in self else np.zeros(len(value))
        return np.where(direction > 0, value, low), np.where(direction < 0, value, high)

    def _of_features(self, name: str, sample: int) -> Floats:
        return self.numbers(name)[-1, sample] if name in self else np.full(len(self.features), np.nan)

    def at_most(self) -> str:
        """`at most two` where not all features may change at once, else nothing."""
        most = float(self.numbers("max_changed")[-1]) if "max_changed" in self else np.inf
        if not 0 < most < len(self.chosen):
            return ""
        return f"at most {_WORDS[int(most)] if most < len(_WORDS) else int(most)}"

    def changed(self, sample: int, checkpoint: int = -1) -> NDArray[np.intp]:
        """Which features the correction may change: in these its box has a width."""
        return np.flatnonzero(np.nan_to_num(self.numbers("changed")[checkpoint, sample]) > 0)

    def moved(self, sample: int, to: str = STABLE) -> NDArray[np.intp]:
        """Which features a correction at the last checkpoint does change, in single precision.

        Where they are many, those changed most in parts of their range come first.
        """
        value, correction = (self.numbers(name)[-1, sample] for name in ("value", to))
        low, high = self.allowed(sample)
        size = np.nan_to_num(np.abs(correction - value))
        moved = np.flatnonzero(size > _SINGLE_PRECISION * np.fmax(high - low, np.abs(value)))
        moved = moved if len(moved) else np.flatnonzero(size)
        if len(moved) <= _IN_ORDER:
            return moved
        share = size[moved] / np.where(high > low, high - low, 1.0)[moved]
        return moved[np.argsort(-share, kind="stable")]

    def leaving(self, sample: int) -> NDArray[np.intp]:
        """Which features have to change at the last checkpoint: the box excludes their judged values.

        What the stable correction changes, where there is no box.
        """
        moved = self.moved(sample)
        low, high, value = (self.numbers(n)[-1, sample][moved] for n in ("box_low", "box_high", "value"))
        lowest, highest = (end[moved] for end in self.allowed(sample))
        slack = _SINGLE_PRECISION * np.fmax(highest - lowest, np.abs(value))
        inside = (value >= low - slack) & (value <= high + slack)
        return moved if inside.all() else moved[~inside]

    def varying(self, sample: int) -> NDArray[np.intp]:
        """Which other features its box has a width in: they may stay as they are."""
        low, high = (self.numbers(f"box_{end}")[-1, sample] for end in ("low", "high"))
        wide = np.flatnonzero(np.nan_to_num(high - low) > 0)
        return np.setdiff1d(wide, self.leaving(sample))

    def polygon(self, sample: int) -> Floats:
        """Vertices of the polygon at the last checkpoint, (n_vertices, 2); none where there is none."""
        corners = self.numbers("polygon")[-1, sample] if "polygon" in self else np.empty((0, 2))
        corners = corners[np.isfinite(corners).all(-1)]
        return corners if len(corners) > 2 else corners[:0]

    def transition(self, sample: int, checkpoint: int = -1) -> str:
        """What the sample is judged as, and what it is to be judged as: `malignant → benign`."""
        numbers = (self.numbers(n)[checkpoint, sample] for n in ("decided", "target"))
        names = [self._class_name(number) for number in numbers]
        return " → ".join(name for name in names if name)

    def _class_name(self, number: float) -> str:
        if not number >= 0:  # no target, or not known
            return ""
        place = int(number)
        name = self._classes[place] if place < len(self._classes) else str(place)
        return f"class {name}" if name.isdigit() else name or f"class {place}"


def judged_runs(result: Result) -> list[JudgedRun]:
    """All runs with a checkpoint that could be analysed, as they first come."""
    status = np.atleast_1d(result["status"])
    names = np.atleast_1d(result["run"]).astype(str) if "run" in result else np.full(len(status), "")
    pieces: dict[str, list[int]] = {}
    for i in np.flatnonzero(status != FAILED):
        pieces.setdefault(str(names[i]), []).append(int(i))
    several = len(pieces) > 1
    return [JudgedRun(result, own, name if several else "") for name, own in pieces.items()]
