"""Checks that tell a robust network from one whose gradients merely do not find the way (gradient masking).

After Athalye, Carlini and Wagner (ICML 2018, §3.1) and Carlini et al. (2019, §5): an attack that fails where
it must not is a broken attack, and its accuracy no measure of robustness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dynprobe.analyzers._robustness import KINDS, Outcome, stderr
from dynprobe.analyzers._sampling import Floats
from dynprobe.analyzers.numerics.attacks import wilson

CHECKS = (
    "gradients-nonzero",
    "loss-rises",
    "noise-not-stronger",
    "iterative-not-weaker",
    "more-steps-not-weaker",
    "unbounded-breaks",
)
SIGNIFICANCE = 0.001  # one-sided sign test; some dozens of comparisons are made per checkpoint
ZERO_SHARE = 0.01  # samples without a gradient count as robust without having been attacked
UNBOUNDED = 0.05  # accuracy that may be left when every point of the range is within reach
TIE = 0.02
"""Losses closer than this, relative, are equal: PGD of fixed steps ends e^-2.5 of its first angle off the
best point of a sphere, where a linear loss is short of its maximum by a good half percent of its rise."""
LONGER_GAIN = 0.02  # what twice the steps may still take off the accuracy


@dataclass
class Verdict:
    """What the checks found: 1 passed, 0 failed, NaN where a check does not apply.

    Attributes:
        passed: By name, in the order of `CHECKS`.
        sentences: One for each failed check.
        skipped: Why a check does not apply.
    """

    passed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CHECKS, math.nan))
    sentences: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def record(self, check: str, problems: list[str], *, applies: bool, otherwise: str = "") -> None:
        """Note one check's result."""
        if not applies:
            self.skipped.append(f"check {check} does not apply: {otherwise}")
            return
        self.passed[check] = float(not problems)
        self.sentences += problems[:1]  # one sentence for a check, however many sizes show it


def is_stronger(a: Floats, b: Floats) -> bool:
    """Whether attack a leaves lower scores than b, by a sign test over the samples where they differ.

    Args:
        a: Scores under one attack (fraction right, or negative loss), shape (n_samples,).
        b: Under the other.
    """
    from scipy.stats import binom

    difference = b - a
    equal = np.abs(difference) <= TIE * np.maximum(np.abs(a), np.abs(b))
    won, lost = int((difference[~equal] > 0).sum()), int((difference[~equal] < 0).sum())
    return won > lost and float(binom.sf(won - 1, won + lost, 0.5)) < SIGNIFICANCE


def check_gradients(verdict: Verdict, without: float, n_samples: int) -> None:
    """Few samples may lack a gradient."""
    problems = []
    if without > ZERO_SHARE:
        problems.append(
            f"{100 * without:.3g} % of {n_samples} samples have no input gradient (zero or not finite), so "
            "no gradient attack moves them"
        )
    verdict.record("gradients-nonzero", problems, applies=True)


def check_rise(verdict: Verdict, outcomes: Mapping[str, Outcome], grids: Mapping[str, Floats]) -> None:
    """One step along the gradient raises the mean loss, and at no size lowers it."""
    problems = []
    names = [name for name in outcomes if KINDS[name].source == "gradient"]
    for name in names:
        change = outcomes[name].loss[1:] - outcomes[name].loss[:1]
        mean, error = change.mean(1), stderr(change)
        falls = np.flatnonzero(mean < -3 * error)
        if not (mean > 0).any():
            problems.append(f"{name} raises the loss at no size")
        elif len(falls):
            size = grids[name][1 + falls[0]]
            problems.append(f"{name} of size {size:.3g} lowers the loss")
    verdict.record("loss-rises", problems, applies=bool(names), otherwise="it needs fgsm or l2grad")


def check_pairs(
    verdict: Verdict,
    check: str,
    outcomes: Mapping[str, Outcome],
    grids: Mapping[str, Floats],
    weak: str,
    strong: tuple[str, ...],
) -> None:
    """An attack of one source must not be stronger than the best of the others in its norm, at any size."""
    problems, found = [], False
    for name in (n for n in outcomes if KINDS[n].source == weak):
        rivals = [n for n in outcomes if KINDS[n].source in strong and KINDS[n].norm == KINDS[name].norm]
        if not rivals:
            continue
        found = True
        best = np.min([outcomes[rival].score for rival in rivals], axis=0)
        for level, size in enumerate(grids[name]):
            if is_stronger(outcomes[name].score[level], best[level]):
                problems.append(f"{name} of size {size:.3g} is stronger than {' and '.join(rivals)}")
                break
    needed = "pgd and a one-step attack of the same norm" if weak == "gradient" else "a gradient attack"
    verdict.record(check, problems, applies=found, otherwise=f"it needs {needed}")


@dataclass(frozen=True)
class Probe:
    """An iterative attack at one size, with the steps asked for and with twice as many.

    Args:
        attack: Its name.
        epsilon: The size.
        usual: Scores of the samples, shape (n_samples,).
        longer: With twice the steps.
        outcome: All that the longer attack gave.
    """

    attack: str
    epsilon: float
    usual: Floats
    longer: Floats
    outcome: Outcome

    @property
    def unfinished(self) -> str:
        """A sentence if the longer attack is noticeably stronger, else nothing."""
        gain = float(self.usual.mean() - self.longer.mean())
        scale = 1.0 if (self.usual >= 0).all() else abs(float(self.usual.mean()))
        if gain <= LONGER_GAIN * scale or not is_stronger(self.longer, self.usual):
            return ""
        return (
            f"{self.attack} has not converged: twice the steps take off another {gain:.3g} at size "
            f"{self.epsilon:.3g}; raise --pgd-steps"
        )


def check_steps(verdict: Verdict, probes: list[Probe]) -> None:
    """Twice the steps are not weaker."""
    problems = [
        f"{probe.attack} of size {probe.epsilon:.3g} is weaker with twice the steps"
        for probe in probes
        if is_stronger(probe.usual, probe.longer)
    ]
    verdict.record("more-steps-not-weaker", problems, applies=bool(probes), otherwise="it needs pgd")


def check_unbounded(verdict: Verdict, left: Mapping[str, float], n_samples: int, *, classifies: bool) -> None:
    """Within reach of every input there is a wrong one: hardly any accuracy may be left.

    Args:
        verdict: Where the result is noted.
        left: Accuracy with the whole range within reach, by attack; NaN where there is none.
        n_samples: Samples attacked.
        classifies: Whether accuracy means something.
    """
    problems = []
    known = {name: accuracy for name, accuracy in left.items() if math.isfinite(accuracy)}
    for name, accuracy in known.items():
        if float(wilson(np.array(accuracy), n_samples)[0]) > UNBOUNDED:
            problems.append(
                f"{name} leaves an accuracy of {accuracy:.3g} although the whole range is within reach"
            )
    why = "it needs pgd" if classifies else "it needs class targets"
    if left:
        why = "the inputs are all one number, or some accuracy is NaN"
    verdict.record("unbounded-breaks", problems, applies=bool(known), otherwise=why)
