"""Fourier components along directions and on grids, and kernel bands, as variables by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._fourier_filter import Found
from dynprobe.analyzers._fourier_outputs import Track
from dynprobe.analyzers.numerics.filter_errors import first_below
from dynprobe.analyzers.numerics.kernel_bands import BANDS, kernel_bands
from dynprobe.analyzers.numerics.nudft import (
    Spectrum,
    grid_spectrum,
    principal_positions,
    projected_spectrum,
)

Floats = NDArray[np.float64]

FREQUENCIES, PERMUTATIONS = 32, 200
"""Defaults of the projection."""
MOST_RANGE = 20
"""Range of the positions over that of their middle half: 2 for uniform ones, 6 for 10,000 normal ones."""


def spectra(
    track: Track, components: int | None, frequencies: int, permutations: int, seed: int, found: Found
) -> None:
    """The exact DFT on a uniform grid, else Fourier components along principal directions."""
    grid = grid_spectrum(track.inputs, track.target, track.output) if track.inputs.shape[1] <= 2 else None
    if grid is not None:
        _grid(grid, found)
    if components is None:
        if grid is not None and (frequencies, permutations) != (FREQUENCIES, PERMUTATIONS):
            raise OptionError(
                "the inputs are a grid, whose frequencies are known exactly: frequencies and permutations "
                "would have no effect.",
                "Leave them out, or ask for a projection with --components 1.",
            )
        components = 0 if grid is not None else 1
    if components == 0:
        return
    positions, explained = principal_positions(track.inputs, components)
    if len(positions) < components:
        found.notes.append(f"the inputs span {len(positions)} dimensions: fewer components than asked for")
    every = [
        projected_spectrum(
            position,
            track.target,
            track.output,
            n_frequencies=frequencies,
            permutations=permutations,
            seed=seed,
        )
        for position in positions
    ]
    found.values |= {
        "component": np.arange(1, len(every) + 1),
        "explained_variance": explained,
        "frequency": every[0].frequency,
        "projection_error": np.stack([_over_outputs(s) for s in every], 1),
        "projection_complex_error": np.stack([s.complex_error for s in every], 1),
        "projection_amplitude_error": np.stack([s.amplitude_error for s in every], 1),
        "projection_target": np.stack([s.amplitude_target for s in every]),
        "projection_floor": np.stack([s.floor for s in every]),
        "projection_significant": np.stack([s.significant for s in every]).astype(np.int64),
        **_octaves(every),
    }
    n = len(track.target)
    if 2 * frequencies > n:
        found.notes.append(
            f"frequencies above {n // 2}, half of the {n} samples, are aliases of lower ones as far as "
            "positions are evenly spaced"
        )
    for k, position in enumerate(positions, 1):
        _note_outliers(position, k, found)
    if not any(s.significant.any() for s in every):
        found.notes.append("along the principal directions nothing of the target exceeds the noise floor")


def _note_outliers(position: Tensor, component: int, found: Found) -> None:
    """The range of the positions sets all frequencies: a few samples far away shrink the rest to a point."""
    low, middle_low, middle_high, high = np.quantile(position.cpu().numpy(), [0, 0.25, 0.75, 1])
    if high - low > MOST_RANGE * (middle_high - middle_low):
        found.notes.append(
            f"along component {component} the range of the positions is more than {MOST_RANGE} times that of "
            "their middle half: a few samples far away set the frequencies, of which few resolve the rest; "
            "leave those samples out, or raise frequencies"
        )


def _grid(grid: Spectrum, found: Found) -> None:
    found.values |= {
        "grid_frequency": grid.frequency,
        "grid_error": _over_outputs(grid),
        "grid_complex_error": grid.complex_error,
        "grid_amplitude_error": grid.amplitude_error,
        "grid_target": grid.amplitude_target,
        "grid_significant": grid.significant.astype(np.int64),
        "grid_wavenumber": grid.wavenumber,
    }
    if any(grid.closed):
        found.notes.append("the grid's last point repeats its first one, a period later: left out of the DFT")


def grid_steps(step: Floats, levels: Sequence[float], found: Found) -> None:
    """Steps at which each frequency of a grid falls under the levels."""
    if "grid_error" in found.values and np.isfinite(step).all():
        error = found.values["grid_error"].T
        found.values["grid_step"] = np.stack([first_below(step, error, level) for level in levels], 1)


def _over_outputs(spectrum: Spectrum) -> Floats:
    """Root of Σ|H − F|² over Σ|F|² of the significant outputs, (n_checkpoints, n_frequencies)."""
    return _root(spectrum, (2,))


def _root(spectrum: Spectrum, axes: tuple[int, ...]) -> Floats:
    weight = np.where(spectrum.significant, spectrum.amplitude_target**2, 0.0)
    missed = np.where(spectrum.significant, spectrum.complex_error**2, 0.0) * weight
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.sqrt(missed.sum(axes) / weight[None].sum(axes)), dtype=np.float64)


def _octaves(every: Sequence[Spectrum]) -> dict[str, Any]:
    """The significant part of the spectrum in bands of an octave: 1–2, 3–4, 5–8 and so on."""
    top = len(every[0].frequency)
    ends = [2]
    while ends[-1] < top:
        ends.append(2 * ends[-1])
    bands = [(ends[i - 1] + 1 if i else 1, min(end, top)) for i, end in enumerate(ends)]
    errors, cells = [], []
    for low, high in bands:
        parts = [_part(spectrum, slice(low - 1, high)) for spectrum in every]
        errors.append(np.stack([_root(part, (1, 2)) for part in parts], 1))
        cells.append([int(part.significant.sum()) for part in parts])
    return {
        "octave": np.array(
            [f"{low}-{high}" if low < high else f"{low}" for low, high in bands], dtype=object
        ),
        "octave_error": np.stack(errors, 2),
        "octave_cells": np.array(cells).T,
    }


def _part(spectrum: Spectrum, chosen: slice) -> Spectrum:
    return replace(
        spectrum,
        significant=spectrum.significant[chosen],
        amplitude_target=spectrum.amplitude_target[chosen],
        complex_error=spectrum.complex_error[:, chosen],
    )


def bands(track: Track, seed: int, found: Found) -> None:
    """Errors in bands of eigenvectors of the kernel of the inputs."""
    try:
        kernel = kernel_bands(track.inputs, track.target, track.output, seed=seed)
    except ValueError as error:
        found.notes.append(f"no kernel bands: {error}")
        return
    names = [f"{low}-{high}" if high else f"{low}-" for low, high in BANDS]
    found.values |= {
        "band": np.array(names, dtype=object),
        "band_error": kernel["error"],
        "band_error_stderr": kernel["error_stderr"],
        "band_share": kernel["share"],
        "band_delta": kernel["delta"],
        "band_samples": kernel["n_samples"],
    }
    if kernel["n_samples"] < len(track.inputs):
        found.notes.append(f"kernel bands on {kernel['n_samples']:,} of {len(track.inputs):,} samples")
