"""Frequency principle: in which order a run learns the smooth and the rough parts of its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import Measurement, OptionError, Range, analyzer
from dynprobe.analyzers._fourier_figure import draw_fourier
from dynprobe.analyzers._fourier_filter import Found, Scales, filtering, layer_ratios
from dynprobe.analyzers._fourier_findings import SUMMARY_RETURNS, summary
from dynprobe.analyzers._fourier_outputs import record
from dynprobe.analyzers._fourier_returns import RETURNS, TABLE
from dynprobe.analyzers._fourier_spectra import FREQUENCIES, PERMUTATIONS, bands, grid_steps, spectra
from dynprobe.analyzers._sampling import Meter, check_seed, subset_note
from dynprobe.analyzers.numerics.losses import as_loss

RATIOS = "0.1,0.25,0.5,0.75"


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    return {"forwards": n_checkpoints * (2 if options.get("layers") else 1)}


@analyzer(
    returns=RETURNS,
    figure=draw_fourier,
    table=TABLE,
    cost=_cost,
    summary=summary,
    summary_returns=SUMMARY_RETURNS,
    summary_of="call",
)
def fourier(
    checkpoints: Sequence[Any],
    batches: Any,
    loss: Any,
    progress: Any = None,
    *,
    lfr: str = RATIOS,
    delta: str = "",
    levels: str = "0.5,0.2,0.1",
    center: bool = True,
    rows: Annotated[int, Range(min=0)] = 0,
    exact: bool = False,
    components: Annotated[int | None, Range(min=0)] = None,
    frequencies: Annotated[int, Range(min=2)] = FREQUENCIES,
    permutations: Annotated[int, Range(min=100)] = PERMUTATIONS,
    kernel: bool = True,
    layers: str = "",
    layer_scale: Annotated[float, Range(min=0)] = 0.0625,
    seed: int = 0,
) -> Measurement:
    """Frequency principle: in which order a run learns the smooth and the rough parts of its target.

    The residual y − h of every checkpoint is split by a Gaussian filter over the inputs, r^low = C⁻¹G r with
    G_ij = exp(−|x_i − x_j|²/(2δ)), and r^high = r − r^low; e_low = (Σ|r^low|²/Σ|y^low|²)^½ and e_high
    likewise. δ is chosen so that the smooth part holds given shares (LFR) of the target. Beside it stand the
    Fourier components along principal directions, or on a grid of one or two dimensions, and the error in
    bands of eigenvectors of a kernel.

    "Frequency" is that of the map from inputs to targets, not of pixels in an image.

    Cost: one forward pass per checkpoint and one pass over the kernel for all of them, n_rows·n_samples·
    (n_features + n_deltas·n_checkpoints·n_outputs) multiplications, some three times as many with the errors,
    and as many for each of 8 draws of the control.

    Args:
        checkpoints: Of one run, in order; each with `step` and `model`.
        batches: Pairs (inputs, targets), re-iterable: the data the run was trained on.
        loss: Says what outputs are compared with: cross_entropy their softmax, bce_with_logits their sigmoid,
            mse the outputs themselves, and PyTorch's losses likewise.
        progress: Called with (done, total, what).
        lfr: Shares of the target that the smooth part is to hold, between 0 and 1; each gives a width δ.
        delta: Widths δ themselves instead, in squared units of the inputs.
        levels: Relative errors under which a part counts as learned.
        center: Take means over the samples off target and residuals, so that the constant is not counted as a
            low frequency; with no-center a network has learned much before its first step.
        rows: Samples that the filter is evaluated on; 0 for all, or 2,000 above 10,000 samples.
        exact: All of them, however many.
        components: Principal directions of the inputs to take Fourier components along; by default 1, or none
            where the inputs are a grid.
        frequencies: How many frequencies along each, in units of 1/range.
        permutations: Draws of permuted labels behind the noise floor of a spectrum.
        kernel: Errors in bands of eigenvectors of a kernel.
        layers: Also LFR of the target as a function of each of these layers: auto, all, or names and globs.
        layer_scale: δ there, in units of the layer's own median squared distance.
        seed: Of rows, blocks, permutations and the control.

    Returns:
        Errors of every checkpoint with standard errors over samples, the steps at which they fall under the
        levels, and a verdict for each δ and for the run; see the report's long names.

    Raises:
        OptionError: If the data have no map from real inputs to targets, or options contradict each other.

    References:
        Xu, Zhang, Luo, Xiao and Ma, "Frequency Principle: Fourier Analysis Sheds Light on Deep Neural
        Networks", CiCP 28 (2020), section 4.
        Rahaman et al., "On the Spectral Bias of Neural Networks", ICML 2019.
        Xu and Zhou, "Deep frequency principle towards understanding why deeper learning is faster", AAAI
        2021.
    """
    check_seed(seed)
    ratios, widths, thresholds = _options(lfr, delta, levels, rows, exact, layers, layer_scale)
    for name, given in (
        ("frequencies", frequencies != FREQUENCIES),
        ("permutations", permutations != PERMUTATIONS),
    ):
        if components == 0 and given:
            raise OptionError(f"{name} would have no effect with components 0.", "Leave it out.")
    found = Found()
    meter = Meter(progress, len(checkpoints) * (2 if layers else 1) + 1)
    track = record(checkpoints, batches, as_loss(loss), lambda: meter.add(1, "checkpoints"))
    found.notes += track.notes
    _check_finite(track.residual, checkpoints, found)
    step = _steps(checkpoints, found)
    scales = Scales(track, center=center, n_rows=rows, exact=exact, seed=seed)
    filtering(scales, widths or scales.deltas(ratios, found), thresholds, step, found)
    meter.add(1, "filter")
    spectra(track, components, frequencies, permutations, seed, found)
    grid_steps(step, thresholds, found)
    if kernel:
        bands(track, seed, found)
    if layers:
        layer_ratios(checkpoints, batches, scales, layers, layer_scale, lambda: meter.add(1, "layers"), found)
    found.values["compared"] = track.compared
    return Measurement(
        found.values,
        spent={
            "forwards": len(checkpoints) * (2 if layers else 1),
            "kernel_rows": int(found.values["n_rows"]),
        },
        notes=[*subset_note(batches), *dict.fromkeys(found.notes)],
    )


def _options(
    lfr: str, delta: str, levels: str, rows: int, exact: bool, layers: str, layer_scale: float
) -> tuple[list[float], list[float], list[float]]:
    """Lists of numbers; no option is accepted and ignored, and none fails after the compute."""
    if delta and lfr != RATIOS:
        raise OptionError("lfr and delta both say how wide the filter is.", "Give one of them.")
    if rows and exact:
        raise OptionError("rows takes some samples and exact all of them.", "Give one of them.")
    if layer_scale != 0.0625 and not layers:
        raise OptionError("layer-scale would have no effect without layers.", "Add --layers auto.")
    if not layer_scale > 0:
        raise OptionError(f"layer-scale {layer_scale:g} is no width.", "0.0625 is a sixteenth.")
    widths = _numbers("delta", delta, np.inf) if delta else []
    return _numbers("lfr", lfr, 1.0), widths, _numbers("levels", levels, 1.0)


def _numbers(name: str, text: str, below: float) -> list[float]:
    """Different numbers between 0 and a bound, separated by commas."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < below for number in numbers):
        bound = f"between 0 and {below:g}" if np.isfinite(below) else "above 0"
        raise OptionError(f"{name} {text!r} is no list of numbers {bound}.", "As in 0.1,0.25,0.5.")
    if len(set(numbers)) < len(numbers):
        raise OptionError(f"{name} {text!r} names a number twice.", "Leave one of them out.")
    return numbers


def _check_finite(residual: Any, checkpoints: Sequence[Any], found: Found) -> None:
    """Outputs that overflow leave a checkpoint's row NaN; the run is measured."""
    bad = (~residual.isfinite()).flatten(1).any(1).tolist()
    for checkpoint, broken in zip(checkpoints, bad, strict=True):
        if broken:
            found.notes.append(f"outputs at step {checkpoint.step} are not finite: its errors are NaN")


def _steps(checkpoints: Sequence[Any], found: Found) -> NDArray[np.float64]:
    """Steps, NaN throughout where they are not ascending numbers."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    known = [isinstance(step, int | float) for step in steps]
    if all(known) and all(a < b for a, b in pairwise(steps)):
        return np.array(steps, dtype=np.float64)
    found.notes.append("steps are not known or not ascending: when the errors fall is not known, and NaN")
    return np.full(len(steps), np.nan)
