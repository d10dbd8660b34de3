"""Runs attacks over a data set: by attack and size, every sample's loss and whether it is still right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._sampling import Floats, Meter
from dynprobe.analyzers.numerics.attacks import (
    Box,
    Noise,
    Norm,
    NotPerturbable,
    Values,
    Victim,
    Work,
    in_float64,
    norms,
    perturbable,
    perturbed,
    projected_gradient,
    steepest,
    wilson,
    worse,
)
from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.input_hessian import InputHessian, newton_direction
from dynprobe.analyzers.numerics.losses import Loss

FRACTIONS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Sizes of `auto`, as shares of the range of the inputs; in the 2-norm times √d, the norm of that share in
every entry."""


class Kind(NamedTuple):
    """What an attack is made of."""

    norm: Norm
    source: str  # where its direction comes from: gradient, newton, steps or noise


KINDS: dict[str, Kind] = {
    "fgsm": Kind("linf", "gradient"),
    "pgd-linf": Kind("linf", "steps"),
    "fhsm": Kind("linf", "newton"),
    "l2grad": Kind("l2", "gradient"),
    "pgd-l2": Kind("l2", "steps"),
    "l2hess": Kind("l2", "newton"),
    "random-linf": Kind("linf", "noise"),
    "random-l2": Kind("l2", "noise"),
}
BASELINE = {"linf": "random-linf", "l2": "random-l2"}


class Outcome(NamedTuple):
    """Each sample's loss and fraction right at every size; float64, shape (n_levels, n_samples)."""

    loss: Floats
    accuracy: Floats | None

    @property
    def score(self) -> Floats:
        """What an attack lowers: the fraction right, or where that means nothing the negative loss."""
        return -self.loss if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class Effort:
    """How hard the iterative attacks try."""

    steps: int
    restarts: int
    damping: float
    cg_iterations: int


class Campaign:
    """The data under attack, with what all attacks share.

    Args:
        model: In eval mode; its parameters need no gradients.
        batches: Pairs (inputs, targets).
        loss: Of each sample.
        classifies: Whether accuracy means something.
        clip: `auto`, `none` or a (low, high) that holds all inputs.
        effort: Of the iterative attacks.
        seed: Of random starts and noise.

    Attributes:
        low: Smallest entry of any input.
        high: Largest.
        n_samples: Samples attacked.
        n_features: Entries of one sample.
        clean: Values of every sample without attack, one level.

    Raises:
        OptionError: The inputs cannot be perturbed, or lie outside the range to clip to.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batches: Iterable[tuple[Any, torch.Tensor]],
        loss: Loss,
        *,
        classifies: bool,
        clip: str | tuple[float, float],
        effort: Effort,
        seed: int,
    ) -> None:
        pairs = list(batches)
        try:
            inputs = [perturbable(pair[0])[1] for pair in pairs]
        except NotPerturbable as error:
            raise OptionError(
                f"{error}.",
                "One floating-point input is needed; images stored as integers become one with scale = "
                '"1/255" in the arguments of the data.',
            ) from error
        self.low, self.high = (
            float(edge) for edge in (min(x.min() for x in inputs), max(x.max() for x in inputs))
        )
        self.n_samples = sum(len(x) for x in inputs)
        self.n_features = inputs[0][0].numel()
        self.box = self._box(clip)
        self.effort, self.work = effort, Work()
        with torch.no_grad():
            loss = in_float64(loss, call(model, pairs[0][0]), pairs[0][1])
        self.victims = [
            Victim(model, inputs, targets, loss, classifies=classifies, work=self.work)
            for inputs, targets in pairs
        ]
        self.clean = _joined([[victim.clean for victim in self.victims]])
        self._noise = Noise(self.n_samples, inputs[0].shape[1:], seed)
        self._newton: list[torch.Tensor] | None = None
        self.newton_evidence: dict[str, NDArray[np.float64]] = {}
        self.hvps = 0

    def _box(self, clip: str | tuple[float, float]) -> Box:
        if clip == "none":
            return Box()
        if clip == "auto":
            return Box(self.low, self.high)
        low, high = float(clip[0]), float(clip[1])
        slack = 1e-6 * (self.high - self.low)  # 255/255 in half precision, a mean subtracted twice
        if self.low < low - slack or self.high > high + slack:
            raise OptionError(
                f"clip {low:g}:{high:g} does not hold the inputs, which reach from {self.low:g} to "
                f"{self.high:g}.",
                "Give the range in the units of the inputs after scaling, or auto.",
            )
        return Box(min(low, self.low), max(high, self.high))

    def levels(self, norm: Norm, wanted: Sequence[float] | None) -> Floats:
        """Sizes ε, ascending from 0, in units of the inputs; `wanted` None for those made from the data.

        Raises:
            OptionError: All inputs are the same number, so that there is no scale.
        """
        if wanted is not None:
            return np.unique([0.0, *wanted])
        width = self.high - self.low
        if not 0 < width < math.inf:
            raise OptionError(
                f"the inputs reach from {self.low:g} to {self.high:g}: no ε can be chosen from them.",
                "Check the data, or give --epsilons and --epsilons-l2 yourself.",
            )
        return np.array([0.0, *FRACTIONS]) * width * self._length(norm)

    def whole_range(self, norm: Norm) -> float:
        """The size that reaches every point of the range of the inputs, or else of the one clipped to.

        NaN where neither has a width: all inputs are one number, and nothing says how far others may lie.
        """
        for width in (self.high - self.low, self.box.high - self.box.low):
            if 0 < width < math.inf:
                return width * self._length(norm)
        return math.nan

    def _length(self, norm: Norm) -> float:
        """Norm of a perturbation of one in every entry."""
        return math.sqrt(self.n_features) if norm == "l2" else 1.0

    def attack(self, name: str, levels: Floats, meter: Meter, *, steps: int = 0) -> Outcome:
        """Each sample's loss and fraction right under an attack at these sizes.

        Iterative attacks keep the worst point visited in any smaller or equal ball, over all restarts.
        """
        norm, source = KINDS[name]
        if source == "steps":
            return self._iterated(name, norm, levels, steps or self.effort.steps, meter)
        directions = self._directions(norm, source)
        rows = []
        for epsilon in levels:
            rows.append(
                [
                    victim.values(perturbed(victim.x, d.to(victim.x), float(epsilon), self.box))
                    if epsilon > 0
                    else victim.clean
                    for victim, d in zip(self.victims, directions, strict=True)
                ]
            )
            meter.add(1, name)
        return _joined(rows)

    def _iterated(self, name: str, norm: Norm, levels: Floats, steps: int, meter: Meter) -> Outcome:
        worst = [[victim.clean for victim in self.victims] for _ in levels]
        for restart in range(self.effort.restarts):
            starts = self._split(self._noise.start(norm, restart))
            for row, epsilon in enumerate(levels):
                if epsilon > 0:
                    for i, (victim, start) in enumerate(zip(self.victims, starts, strict=True)):
                        found = projected_gradient(
                            victim, norm, float(epsilon), steps=steps, start=start, box=self.box
                        )
                        worst[row][i] = worse(worst[row][i], found)
                meter.add(1 + steps if epsilon > 0 else 1, name)
        outcome = _joined(worst)
        # A point of a smaller ball lies in the larger one too.
        loss = np.maximum.accumulate(outcome.loss)
        right = None if outcome.accuracy is None else np.minimum.accumulate(outcome.accuracy)
        return Outcome(loss, right)

    def _directions(self, norm: Norm, source: str) -> list[torch.Tensor]:
        if source == "gradient":
            return [steepest(victim.input_gradient, norm) for victim in self.victims]
        if source == "noise":
            return self._split(self._noise.direction(norm))
        if self._newton is None:
            self._newton = self._solve()
        return [steepest(direction, norm) for direction in self._newton]

    def _solve(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        columns: dict[str, list[torch.Tensor]] = {}
        products = 0
        for victim in self.victims:
            operator = InputHessian(victim.losses, victim.x)
            newton = newton_direction(
                operator, damping=self.effort.damping, iterations=self.effort.cg_iterations
            )
            found.append(newton.direction.view_as(victim.x))
            for name in ("residual", "truncated", "eigenvalue"):
                columns.setdefault(name, []).append(getattr(newton, name))
            products += operator.n_matvec * len(victim)
            self.work.gradients += len(victim)
        self.hvps = round(products / self.n_samples)
        self.newton_evidence = {name: torch.cat(c).cpu().double().numpy() for name, c in columns.items()}
        return found

    def _split(self, drawn: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.split(drawn, [len(victim) for victim in self.victims]))

    def gradient_norms(self, order: float) -> Floats:
        """Norm of every sample's input gradient, float64."""
        found = torch.cat([norms(victim.input_gradient, order).cpu() for victim in self.victims])
        return np.asarray(found.numpy(), dtype=np.float64)

    def without_gradient(self) -> NDArray[np.bool_]:
        """Which samples have an input gradient that is not finite, or zero but for underflow."""
        smallest = torch.finfo(self.victims[0].x.dtype).tiny
        largest = self.gradient_norms(math.inf)
        return ~(np.isfinite(largest) & (largest >= smallest))

    def spent(self) -> dict[str, int]:
        """Passes over the whole data."""
        return {
            "forwards": round(self.work.forwards / self.n_samples),
            "gradients": round(self.work.gradients / self.n_samples),
            "input_hvps": self.hvps,
        }


def _joined(rows: Sequence[Sequence[Values]]) -> Outcome:
    loss = np.stack([torch.cat([v.loss for v in row]).cpu().numpy() for row in rows])
    parts = [[v.accuracy for v in row if v.accuracy is not None] for row in rows]
    if not parts[0]:
        return Outcome(loss, None)
    return Outcome(loss, np.stack([torch.cat(row).cpu().numpy() for row in parts]))


class Radius(NamedTuple):
    """The size of a perturbation at which accuracy has fallen to half, NaN where it does not."""

    value: float
    low: float
    high: float


def half_radius(levels: Floats, accuracy: Floats, clean: float, n_samples: int) -> Radius:
    """Where accuracy first falls to half the clean one, linear between sizes, with a bracket.

    The bracket goes from the last size before the crossing at which the whole 95 % interval is above half,
    to the first after it at which it is below.
    """
    half = clean / 2
    below = np.flatnonzero(accuracy <= half)
    low, high = wilson(accuracy, n_samples)
    if clean <= 0 or not len(below):
        above = np.flatnonzero(low > half)
        return Radius(math.nan, float(levels[above[-1]]) if clean > 0 and len(above) else math.nan, math.nan)
    first = int(below[0])
    fall = accuracy[first - 1] - accuracy[first]
    share = (accuracy[first - 1] - half) / fall
    value = levels[first - 1] + share * (levels[first] - levels[first - 1])
    above = np.flatnonzero(low[:first] > half)
    surely = np.flatnonzero(high[first:] < half)
    return Radius(
        float(value),
        float(levels[above[-1]]) if len(above) else 0.0,
        float(levels[first + surely[0]]) if len(surely) else math.nan,
    )


def table_of(outcomes: dict[str, Outcome], grids: dict[str, Floats]) -> dict[str, Floats]:
    """Outcomes as arrays over (attack, level), shorter grids padded with NaN."""
    n_levels = max(len(levels) for levels in grids.values())

    def rows(of: Callable[[str], Floats]) -> Floats:
        out = np.full((len(outcomes), n_levels), np.nan)
        for i, name in enumerate(outcomes):
            values = of(name)
            out[i, : len(values)] = values
        return out

    some = next(iter(outcomes.values()))
    n = some.loss.shape[1]
    table = {
        "epsilon": rows(lambda name: grids[name]),
        "loss": rows(lambda name: outcomes[name].loss.mean(1)),
        "loss_stderr": rows(lambda name: stderr(outcomes[name].loss)),
    }
    if some.accuracy is not None:
        table["accuracy"] = rows(lambda name: _accuracy(outcomes[name]).mean(1))
        table["accuracy_low"], table["accuracy_high"] = wilson(table["accuracy"], n)
    return table


def _accuracy(outcome: Outcome) -> Floats:
    assert outcome.accuracy is not None
    return outcome.accuracy


def stderr(values: Floats) -> Floats:
    """Standard error of the mean along the last axis; NaN for a single value."""
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.nan)
    with np.errstate(invalid="ignore"):
        return np.asarray(values.std(axis=-1, ddof=1) / math.sqrt(n))
