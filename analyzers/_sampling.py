"""Fills a grid over a surface row by row; a finished row survives a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.evaluate import call, map_tensors
from dynprobe.analyzers.numerics.grid import Refined, refine
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.surface import Surface

Floats = NDArray[np.float64]
Table = dict[str, Floats]
Progress = Callable[[int, int, str], None]


class Meter:
    """Counts points done across all parts of a measurement.

    Args:
        progress: `progress(done, total, what)`, or None.
        total: Points in all.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, points: int, what: str) -> None:
        """So many points more are done."""
        self._done += points
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, what)


class Sampler:
    """Evaluates a surface on a grid; rows go to and come from the store of parts.

    A row's numbers do not depend on which rows were found, so a resumed surface equals an uninterrupted one.

    Args:
        surface: What to evaluate; made only when a row is really missing.
        name: Of this surface among the parts.
        x: Coordinates along the first direction.
        y: Along the second; `[0.0]` on a line.
        partial: The store of parts, or None.
        meter: Told of every row.
    """

    def __init__(
        self, surface: Callable[[], Surface], name: str, x: Floats, y: Floats, partial: Any, meter: Meter
    ) -> None:
        self._make = surface
        self._surface: Surface | None = None
        self._name, self._x, self._y = name, x, y
        self._partial, self._meter = partial, meter
        self._round = 0
        self.table: Table = {}
        self.forwards = 0

    @property
    def surface(self) -> Surface:
        """The surface, made once."""
        if self._surface is None:
            self._surface = self._make()
        return self._surface

    def fill(self, tol: float = 0.0, seed: int = 0) -> Refined:
        """Evaluates the loss everywhere, or where `refine` asks; other metrics stay NaN elsewhere."""
        found = refine(self._evaluate, (len(self._y), len(self._x)), tol, seed=seed)
        self.table["loss"] = found.value
        return found

    def _evaluate(self, mask: NDArray[np.bool_]) -> Floats:
        for row in np.flatnonzero(mask.any(axis=1)):
            columns = np.flatnonzero(mask[row])
            for name, values in self._row(int(row), columns).items():
                if name == "forwards":
                    self.forwards += round(float(values))
                    continue
                self.table.setdefault(name, np.full(mask.shape, np.nan))[row, columns] = values
            self._meter.add(len(columns), "grid points")
        self._round += 1
        return self.table["loss"].copy()

    def _row(self, row: int, columns: NDArray[np.intp]) -> dict[str, Any]:
        part = f"{self._name}-{self._round}-{row}"
        stored: dict[str, Any] | None = self._partial.get(part) if self._partial is not None else None
        if stored is not None:
            return stored
        before = self.surface.forwards
        evaluated = self.surface.row(float(self._y[row]), self._x[columns].tolist())
        found: dict[str, Any] = {
            n: v for n, v in evaluated.items() if not n.endswith("accuracy_difference_stderr")
        }
        found["forwards"] = np.array(self.surface.forwards - before)
        if self._partial is not None:
            self._partial.put(part, found)
        return found


def check_repeatable(model: torch.nn.Module, batches: Any) -> None:
    """Raises where the network is not the same function twice, in eval mode: nothing could be measured of it.

    Raises:
        OptionError: If two passes over the first batch differ by more than rounding.
    """
    inputs = map_tensors(torch.clone, next(iter(batches))[0])
    with torch.inference_mode():
        one, two = (call(model, map_tensors(torch.clone, inputs)).double() for _ in range(2))
    scale = one.abs().amax().nan_to_num()
    if not torch.allclose(one, two, rtol=0, atol=1e-3 * float(scale), equal_nan=True):
        raise OptionError(
            "the network gives other outputs for the same inputs when called again.",
            "Is dropout called as a function? Pass it training=self.training.",
        )


def subset_note(batches: Any, consequence: str = "") -> list[str]:
    """A sentence where the data are a part of their source: what was measured is that of the part."""
    n, total = getattr(batches, "n_samples", 0), getattr(batches, "n_total", 0)
    return [f"measured on {n:,} of {total:,} samples{consequence}"] if 0 < n < total else []


def check_seed(seed: int) -> None:
    """Raises before any compute where a seed is none that all generators take.

    Raises:
        OptionError: If it is negative or too large.
    """
    if not 0 <= seed < 2**62:
        raise OptionError(f"seed {seed} is out of range.", "Give a whole number from 0 to 2^62 - 1.")


def named_metrics(text: str) -> list[str]:
    """The metrics named in "loss,accuracy", the loss always; none for "auto".

    Raises:
        OptionError: If a name is not known.
    """
    if text == "auto":
        return []
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= {"loss", "accuracy"}:
        raise OptionError(f"metrics {text!r} is not known.", "Give loss, or loss,accuracy.")
    return ["loss", "accuracy"] if "accuracy" in names else ["loss"]


def chosen_metrics(text: str, batches: Any, loss: Loss, model: Any) -> list[str]:
    """As `named_metrics`; for "auto" the loss, and accuracy where targets are classes.

    Raises:
        OptionError: If a name is not known, or accuracy is asked for where it means nothing.
    """
    names = named_metrics(text)
    if names == ["loss"]:
        return names
    inputs, targets = next(iter(batches))
    if not names and targets.is_floating_point() and loss.name != "bce_with_logits":
        return ["loss"]
    try:
        with torch.inference_mode():
            loss.accuracy(call(model, inputs), targets)
    except ValueError as error:
        if names:
            raise OptionError(f"metrics {text} cannot be followed: {error}.", "Give loss.") from error
        return ["loss"]
    return ["loss", "accuracy"]


def stacked(tables: Sequence[Table], squeeze: bool) -> Table:
    """Several planes as one: values and standard errors averaged, and the spread of the loss between them.

    The planes share their samples, so the mean of their standard errors is no less than that of the mean.
    """
    table = {name: np.mean([t[name] for t in tables], axis=0) for name in tables[0]}
    if len(tables) > 1:
        losses = np.stack([t["loss"] for t in tables])
        with np.errstate(invalid="ignore"):
            table |= {"seed_loss": losses, "loss_spread": losses.std(axis=0, ddof=1)}
    return {name: values[..., 0, :] if squeeze else values for name, values in table.items()}
