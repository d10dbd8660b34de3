"""What the manifest's [training] says about a step: learning rate, batch size, momentum, samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SGD = ("", "sgd", "momentum", "nesterov")


@dataclass(frozen=True)
class TrainingFacts:
    """Facts of the training at one step; None where nothing says.

    Args:
        learning_rate: η at this step.
        batch_size: S, samples in a training batch.
        momentum: Heavy-ball β; 0 for plain SGD.
        n_samples: N, size of the training set.
        is_sgd: Whether the optimizer is SGD, with or without momentum: others have no 2/η.
        notes: What was assumed, for the reader.
    """

    learning_rate: float | None = None
    batch_size: int | None = None
    momentum: float = 0.0
    n_samples: int | None = None
    is_sgd: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def stability_threshold(self) -> float:
        """Sharpness above which full-batch descent is unstable: 2(1 + β)/η; NaN where it is not known.

        2/η for plain gradient descent; with heavy-ball momentum see Cohen et al., "Gradient Descent on Neural
        Networks Typically Occurs at the Edge of Stability", ICLR 2021, appendix B.
        """
        if not self.learning_rate or not self.is_sgd:
            return math.nan
        return 2 * (1 + self.momentum) / self.learning_rate


def training_facts(
    training: Mapping[str, Any] | None, step: float | None, *, learning_rate: float = 0.0
) -> TrainingFacts:
    """Read the facts for one step.

    Args:
        training: The manifest's `[training]`.
        step: The checkpoint's step, for a schedule.
        learning_rate: η as given on the command line, which has precedence; 0 for none.

    Returns:
        The facts. With `schedule = "cosine"` and `steps = T`, η(t) = η₀ (1 + cos πt/T)/2; a schedule that
        is not known leaves η unknown.
    """
    facts = dict(training or {})
    notes: list[str] = []
    eta: float | None = learning_rate or None
    if eta is None:
        eta = _scheduled(facts, step, notes)
    optimizer = str(facts.get("optimizer", "")).lower()
    return TrainingFacts(
        eta,
        _whole(facts.get("batch_size")),
        _number(facts.get("momentum")) or 0.0,
        _whole(facts.get("samples")),
        optimizer in SGD,
        tuple(notes),
    )


def _scheduled(facts: Mapping[str, Any], step: float | None, notes: list[str]) -> float | None:
    eta = _number(facts.get("learning_rate"))
    schedule = str(facts.get("schedule", "constant")).lower()
    if eta is None or schedule == "constant":
        return eta
    total = _number(facts.get("steps"))
    if schedule == "cosine" and total and step is not None:
        return eta * (1 + math.cos(math.pi * min(max(step / total, 0.0), 1.0))) / 2
    notes.append(
        f"the learning rate at this step is not known: schedule {schedule!r} is none of constant, cosine "
        "(with steps = …); give --learning-rate"
    )
    return None


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 1 else None
