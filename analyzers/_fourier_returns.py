"""What `fourier` returns, by name."""

from __future__ import annotations

from dynprobe.analyzers import Var

INPUTS = "squared units of the inputs"


def _at(dims: tuple[str, ...], what: str, error: str = "", units: str = "") -> Var:
    return Var(dims, units, what, error)


def _maybe(dims: tuple[str, ...], what: str, error: str = "", units: str = "") -> Var:
    return Var(dims, units, what, error, optional=True)


_E, _CELL = ("checkpoint", "delta"), ("level", "delta")
_CELLS = ("component", "frequency", "output")
_STDERR = "Standard error over samples"

RETURNS = {
    "delta": _at(("delta",), "δ: variance of the Gaussian filter", units=INPUTS),
    "delta_relative": _at(("delta",), "δ over the median squared distance of two samples"),
    "neighbours": _at(("delta",), "Mean effective number of neighbours, the sample itself included"),
    "median_squared_distance": _at((), "Median squared distance of two samples", units=INPUTS),
    "n_rows": _at((), "Samples that the filter was evaluated on"),
    "compared": _at((), "What the target is compared with"),
    "e_low": _at(_E, "Relative error of the smooth part", "e_low_stderr"),
    "e_low_stderr": _at(_E, _STDERR),
    "e_high": _at(_E, "Relative error of the rough part", "e_high_stderr"),
    "e_high_stderr": _at(_E, _STDERR),
    "e_low_raw": _at(_E, "Relative error of the smooth part with the means left in"),
    "lfr_target": _at(("delta",), "Share of low frequencies in the target", "lfr_target_stderr"),
    "lfr_target_stderr": _at(("delta",), _STDERR),
    "lfr_target_raw": _at(("delta",), "The same with its mean left in"),
    "lfr_residual": _at(_E, "Share of low frequencies in the residual", "lfr_residual_stderr"),
    "lfr_residual_stderr": _at(_E, _STDERR),
    "lfr_residual_raw": _at(_E, "The same with its mean left in"),
    "level": _at(("level",), "Relative error under which a part counts as learned"),
    "step_low": _at(_CELL, "Step at which e_low is first under the level, inf for never", units="step"),
    "step_high": _at(_CELL, "Step at which e_high is first under the level, inf for never", units="step"),
    "step_ratio": _at(_CELL, "Their ratio, high over low", "step_ratio_stderr"),
    "step_ratio_stderr": _at(_CELL, _STDERR),
    "control_ratio": _at(
        _CELL,
        "The same ratio with residuals permuted among samples of a class, mean over draws",
        "control_ratio_stderr",
    ),
    "control_ratio_stderr": _at(_CELL, "Standard deviation over draws"),
    "order": _at(
        _CELL, "1 where the rough part is later beyond the errors, -1 where the smooth one is, else 0"
    ),
    "order_beyond_control": _at(_CELL, "The same where the ratio also is beyond that of the control, else 0"),
    "verdict": _at(("delta",), "Frequency principle at this width: holds, reversed or undecided"),
    "run_verdict": _at((), "Frequency principle for the run: holds, reversed or undecided"),
    "verdict_reason": _at((), "Why that is undecided, else empty"),
    "component": _maybe(("component",), "Principal direction of the inputs"),
    "explained_variance": _maybe(("component",), "Share of the inputs' variance along it"),
    "frequency": _maybe(("frequency",), "Frequency along a direction", units="1/range of the positions"),
    "projection_error": _maybe(
        ("checkpoint", "component", "frequency"), "Relative complex error over significant outputs"
    ),
    "projection_complex_error": _maybe(("checkpoint", *_CELLS), "Relative error |H − F|/|F|"),
    "projection_amplitude_error": _maybe(
        ("checkpoint", *_CELLS), "Relative error of the amplitude alone, blind to phase"
    ),
    "projection_target": _maybe(_CELLS, "Amplitude |F| of the target"),
    "projection_floor": _maybe(
        ("component", "output"),
        "99 % quantile of the largest |F| of permuted labels, over outputs too",
    ),
    "projection_significant": _maybe(_CELLS, "1 where the target exceeds the floor, else 0"),
    "octave": _maybe(("octave",), "Band of frequencies along a direction"),
    "octave_error": _maybe(
        ("checkpoint", "component", "octave"), "Relative complex error over what is significant in the band"
    ),
    "octave_cells": _maybe(("component", "octave"), "Significant frequencies times outputs in the band"),
    "grid_frequency": _maybe(("mode",), "Frequency on the grid", units="periods over its longest side"),
    "grid_wavenumber": _maybe(("mode", "axis"), "Periods along each side of the grid"),
    "grid_error": _maybe(("checkpoint", "mode"), "Relative complex error over outputs, on the grid"),
    "grid_complex_error": _maybe(("checkpoint", "mode", "output"), "Relative error |H − F|/|F|"),
    "grid_amplitude_error": _maybe(
        ("checkpoint", "mode", "output"), "Relative error of the amplitude alone, blind to phase"
    ),
    "grid_target": _maybe(("mode", "output"), "Amplitude |F| of the target"),
    "grid_significant": _maybe(("mode", "output"), "1 where the target has that frequency, else 0"),
    "grid_step": _maybe(
        ("mode", "level"), "Step at which the error is first under the level, inf for never", units="step"
    ),
    "band": _maybe(("band",), "Eigenvectors of the kernel, smooth ones first"),
    "band_error": _maybe(("checkpoint", "band"), "Relative error within the band", "band_error_stderr"),
    "band_error_stderr": _maybe(("checkpoint", "band"), "Standard error over four parts of the samples"),
    "band_share": _maybe(("band",), "Share of the target in the band"),
    "band_delta": _maybe((), "δ of that kernel: the median squared distance", units=INPUTS),
    "band_samples": _maybe((), "Samples behind the bands"),
    "layer": _maybe(("layer",), "Layer, in the order it runs"),
    "layer_lfr": _maybe(
        ("checkpoint", "layer"), "Share of low frequencies in the target, over the layer", "layer_lfr_stderr"
    ),
    "layer_lfr_stderr": _maybe(("checkpoint", "layer"), _STDERR),
    "layer_delta": _maybe(("checkpoint", "layer"), "δ there", units="squared units of the layer"),
}

TABLE = ("lfr_target", "delta_relative", "neighbours", "e_low", "e_high", "step_ratio", "run_verdict")
