"""The filtering method: smooth and rough parts of target and residuals, over inputs and over layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._fourier_control import DRAWS, classes_of, permuted_within
from dynprobe.analyzers._fourier_outputs import Track
from dynprobe.analyzers._fourier_verdict import UNDECIDED, control_of, order, overall, reason, verdicts
from dynprobe.analyzers.numerics.filter_errors import filter_errors
from dynprobe.analyzers.numerics.filter_scale import FilterScale, search_rows
from dynprobe.analyzers.numerics.gaussian_filter import (
    LEAST_PART,
    Energies,
    centred,
    filter_energies,
    sample_blocks,
    sampled_rows,
)

Floats = NDArray[np.float64]

BLOCKS = 32
"""Blocks of samples behind the standard errors; the relative error of one from B blocks is 1/√(2B)."""
LARGE, SAMPLED = 10_000, 2_000
"""Above so many samples only so many rows of the kernel are computed, unless `exact`."""


@dataclass
class Found:
    """What was measured so far.

    Args:
        values: By the names of the report.
        notes: Sentences for the reader.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Scales:
    """The inputs with their kernel: which rows are computed, how wide the filters are.

    Args:
        track: The run on its samples.
        center: Whether target and residuals are taken without their means.
        n_rows: Rows of the kernel; 0 for the default.
        exact: All rows, however many samples.
        seed: Of the rows, the blocks and the control.
    """

    def __init__(self, track: Track, *, center: bool, n_rows: int, exact: bool, seed: int) -> None:
        n = len(track.inputs)
        if n_rows > n:
            raise OptionError(f"rows {n_rows}: there are {n} samples.", "Leave it out to take all of them.")
        self.track, self.center, self.seed = track, center, seed
        automatic = n if exact or n <= LARGE else SAMPLED
        self.rows = sampled_rows(n, n_rows or automatic, seed)
        self.blocks = sample_blocks(n, BLOCKS, seed)
        self.inputs = centred(track.inputs)
        values = torch.cat([track.target[None], track.residual.double()]).movedim(0, 1)
        self.mean = values.mean(0)
        self.functions = (values - self.mean if center else values).float()
        self.search = FilterScale(
            self.inputs, self.functions[:, 0], sampled_rows(n, search_rows(n), seed)
        )  # its own rows: a sample of the kernel may be too small for it
        if not np.isfinite(self.search.median):
            raise OptionError(
                "squared distances of the samples overflow: there is no scale between them.",
                "Scale the inputs down.",
            )
        if not self.search.median > 0:
            raise OptionError(
                "more than half of the samples have the same inputs, so there is no scale between them.",
                "Give other data.",
            )
        if not float(self.functions[:, 0].square().sum()) > 0:
            raise OptionError("all samples have the same target.", "Frequencies need targets that differ.")

    def deltas(self, ratios: Sequence[float], found: Found) -> list[float]:
        """Widths at which the target's share of low frequencies is as wanted."""
        every = self.search.deltas(ratios)
        missing = [ratio for ratio, delta in zip(ratios, every, strict=True) if not np.isfinite(delta)]
        if missing:
            text = ", ".join(f"{ratio:g}" for ratio in missing)
            found.notes.append(f"no width of the filter gives the target an LFR of {text}: left out")
        deltas = [delta for delta in every if np.isfinite(delta)]
        if not deltas:
            text = ", ".join(f"{ratio:g}" for ratio in ratios)
            raise OptionError(
                f"no width of the filter gives the target an LFR of {text}.",
                "Give the widths themselves with --delta.",
            )
        return deltas

    def energies(self, deltas: Sequence[float]) -> Energies:
        """Of the target and all residuals."""
        return filter_energies(self.inputs, self.functions, deltas, rows=self.rows, blocks=self.blocks)

    def controls(self, deltas: Sequence[float]) -> Iterator[Energies]:
        """The same where residuals are permuted among the samples of a class, draw by draw."""
        classes = classes_of(self.track.target)
        for draw in range(DRAWS):
            moved = self.functions.clone()
            moved[:, 1:] = self.functions[permuted_within(classes, self.seed + 1 + draw), 1:]
            yield filter_energies(
                self.inputs, moved, deltas, rows=self.rows, blocks=self.blocks, influence_rows=0
            )


def filtering(
    scales: Scales, deltas: Sequence[float], levels: Sequence[float], step: Floats, found: Found
) -> None:
    """e_low, e_high and LFR of every checkpoint, the steps at which they fall, and the verdict."""
    energies = scales.energies(deltas)
    errors = filter_errors(energies)
    own = order(step, errors, levels)
    control = control_of([order(step, filter_errors(one), levels) for one in scales.controls(deltas)])
    said = verdicts(own, control)
    whole = overall(said)
    lfr, lfr_stderr, raw = errors.lfr.value, errors.lfr.stderr, _raw(energies, scales)
    found.values |= {
        "delta": np.array(deltas),
        "delta_relative": np.array(deltas) / scales.search.median,
        "neighbours": energies.neighbours,
        "median_squared_distance": scales.search.median,
        "n_rows": energies.n_rows,
        "e_low": errors.low.value,
        "e_low_stderr": errors.low.stderr,
        "e_high": errors.high.value,
        "e_high_stderr": errors.high.stderr,
        "e_low_raw": raw["e_low"],
        "lfr_target": lfr[0],
        "lfr_target_stderr": lfr_stderr[0],
        "lfr_target_raw": raw["lfr"][0],
        "lfr_residual": lfr[1:],
        "lfr_residual_stderr": lfr_stderr[1:],
        "lfr_residual_raw": raw["lfr"][1:],
        "level": np.array(levels),
        "step_low": own.low,
        "step_high": own.high,
        "step_ratio": own.ratio.value,
        "step_ratio_stderr": own.ratio_stderr,
        "control_ratio": control.ratio,
        "control_ratio_stderr": control.spread,
        "verdict": np.array(said, dtype=object),
        "run_verdict": whole,
        "verdict_reason": reason(step, errors, own, control, levels) if whole == UNDECIDED else "",
        "order": own.sign,
        "order_beyond_control": own.beyond(control),
    }
    unknown = (own.sign != 0) & ~control.known
    if unknown.any():
        text = ", ".join(f"{value:.2f}" for value in lfr[0][unknown.any(0)])
        found.notes.append(
            f"control: at LFR {text} the permuted residuals do not fall under some level within the run, or "
            "are under it from the first checkpoint: no verdict there"
        )
    _missing(found, energies, deltas)
    early = np.isnan(own.low) & np.isfinite(step).all() & np.isfinite(errors.low.value[0])
    if early.any():
        found.notes.append(
            "e_low is under a level at the first checkpoint already: the step is not known, and NaN"
        )
    if energies.n_rows < energies.n_samples:
        found.notes.append(
            f"smooth parts evaluated on {energies.n_rows:,} of {energies.n_samples:,} samples, each "
            "an average over all of them; --exact evaluates all"
        )


def _raw(energies: Energies, scales: Scales) -> dict[str, Floats]:
    """The same with means left in: a constant goes through the filter as it is."""
    mean = scales.mean.cpu().numpy() if scales.center else np.zeros(scales.mean.shape)
    n = energies.n_samples
    offset = n * (mean**2).sum(-1)
    low = energies.low + 2 * (energies.low_sum * mean).sum(-1) + offset
    with np.errstate(divide="ignore", invalid="ignore"):
        # what was centred has no mean over all samples, and a mean near 0 over the rows
        lfr = low / (energies.total + offset)
        enough = lfr[:, :1] >= LEAST_PART
        e_low = np.where(enough, np.sqrt(np.maximum(low[:, 1:], 0) / low[:, :1]), np.nan)
    return {"e_low": e_low.T, "lfr": lfr.T}


def _missing(found: Found, energies: Energies, deltas: Sequence[float]) -> None:
    """Says where the target has too little of one part for a relative error."""
    for name, part in (("smooth", energies.low), ("rough", energies.high)):
        share = part[:, 0] / energies.total[0]
        for delta, value in zip(deltas, share, strict=True):
            if value < LEAST_PART:
                which = "e_low" if name == "smooth" else "e_high"
                found.notes.append(
                    f"{which} is NaN at delta {delta:.4g}: the {name} part holds {value:.1e} of the target, "
                    f"less than {LEAST_PART:g}"
                )


def layer_ratios(
    checkpoints: Sequence[Any],
    batches: Any,
    scales: Scales,
    layers: str,
    scale: float,
    told: Callable[[], None],
    found: Found,
) -> None:
    """LFR of the target as a function of what each layer computes, at that layer's own scale."""
    from dynprobe.analyzers.numerics.activations import features

    columns: dict[str, list[tuple[float, float, float]]] = {}
    target = scales.functions[:, :1]
    own = _layer_ratio(scales, scales.inputs, target, scale)
    for checkpoint in checkpoints:
        recorded = features(checkpoint.model, batches, layers=layers)
        for name, layer in recorded.items():
            if layer.sample is not None and len(layer.values) != len(target):
                raise OptionError(
                    f"layer {name!r} has several rows for a sample.", "Choose other layers with --layers."
                )
            inputs = centred(layer.values.to(target.device))
            columns.setdefault(name, []).append(_layer_ratio(scales, inputs, target, scale))
        told()
    table = np.array([[own] * len(checkpoints), *columns.values()])
    found.values |= {
        "layer": np.array(["input", *columns], dtype=object),
        "layer_lfr": table[..., 0].T,
        "layer_lfr_stderr": table[..., 1].T,
        "layer_delta": table[..., 2].T,
    }
    if dead := [name for name, column in columns.items() if np.isnan(column).any()]:
        found.notes.append(
            f"more than half of the samples are alike, or not finite, in {', '.join(dead)}: no LFR there, NaN"
        )


def _layer_ratio(
    scales: Scales, inputs: torch.Tensor, target: torch.Tensor, scale: float
) -> tuple[float, float, float]:
    """LFR, its standard error and δ."""
    search = FilterScale(inputs, target[:, 0], scales.rows)
    delta = scale * search.median
    if not (delta > 0 and np.isfinite(delta)):
        return np.nan, np.nan, np.nan
    energies = filter_energies(inputs, target, [delta], rows=scales.rows, blocks=scales.blocks)
    lfr = filter_errors(energies).lfr
    return float(lfr.value[0, 0]), float(lfr.stderr[0, 0]), delta
