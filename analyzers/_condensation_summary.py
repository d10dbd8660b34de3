"""What a call says about condensation: which layers condensed, and the regime over several widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._condensation import counted_neurons, nearest
from dynprobe.analyzers._findings import plus_minus
from dynprobe.analyzers.core.result import FAILED, Piece, Result, Var, unstack
from dynprobe.analyzers.numerics.width_slope import FEWEST_WIDTHS, UNDECIDED, regime, width_slope

Floats = NDArray[np.float64]

TOGETHER = "widened layers"
"""The entry of `slope_layer` that takes all layers with another number of neurons in every run as one."""


def _var(dims: tuple[str, ...], long_name: str, units: str = "", error: str = "") -> Var:
    return Var(dims, units, long_name, error, optional=True)


SUMMARY_RETURNS = {
    "slope_layer": _var(("slope_layer",), "Layer"),
    "width_slope": _var(
        ("slope_layer",), "S_w, slope of log relative distance against log width", "", "width_slope_stderr"
    ),
    "width_slope_stderr": _var(("slope_layer",), "Standard error of the least-squares slope"),
    "width_slope_low": _var(("slope_layer",), "Lower end of its 95 % interval"),
    "width_slope_high": _var(("slope_layer",), "Upper end of its 95 % interval"),
    "regime": _var(("slope_layer",), "linear, critical, condensed or undecided"),
    "slope_run": _var(("slope_run",), "Run"),
    "run_width": _var(("slope_run",), "Neurons of the widened layers, geometric mean"),
    "run_distance": _var(("slope_run", "slope_layer"), "Largest relative distance over the run"),
    "finding": _var(("finding",), "What was found, in words"),
}


@dataclass(frozen=True)
class _Run:
    """One run of the call, with its layers by name."""

    name: str
    layers: tuple[str, ...]
    n_neurons: Floats
    counted: Floats  # at each checkpoint, shape (checkpoint, layer)
    distance: Floats
    norm: Floats
    arrays: Mapping[str, Any]

    @classmethod
    def of(cls, piece: Piece) -> _Run:
        arrays = {name: array.values for name, array in piece.arrays.items()}
        there = np.isfinite(arrays["n_neurons"].astype(float))  # not padded for the layers of other runs
        return cls(
            str(piece.index.get("run", "")),
            tuple(str(name) for name in arrays["layer"][there]),
            arrays["n_neurons"][there].astype(float),
            counted_neurons(arrays)[:, there],
            arrays["relative_distance"][:, there],
            arrays["weight_norm"][0, there],
            {
                name: (array if array.ndim < 2 else array[..., there, :])
                for name, array in arrays.items()
                if "directions" in name
            },
        )

    def at(self, layer: str) -> int:
        return self.layers.index(layer)

    def farthest(self, layers: list[str]) -> float:
        """Relative distance of these layers taken together, largest over the checkpoints."""
        rows = [self.at(layer) for layer in layers]
        norm = self.norm[rows]
        if not norm.any() or len(self.distance) < 2:
            return float("nan")
        # weights that start at zero have no relative distance of their own
        length = np.nan_to_num(self.distance[:, rows]) * norm
        return float((np.linalg.norm(length, axis=1) / np.linalg.norm(norm)).max())


def summarise(result: Result) -> dict[str, Any]:
    """Sentences on every run, and slopes against the width where the runs have different ones."""
    options = result.attributes.get("options", {})
    options = options if isinstance(options, Mapping) else {}
    margin = float(options.get("critical_slope", 0.1))
    runs = [_Run.of(piece) for piece in unstack(result) if piece.status != FAILED and piece.arrays]
    thresholds = np.asarray(result["threshold"], dtype=float)
    chosen = nearest(thresholds)
    findings = _findings(runs, chosen, float(thresholds[chosen]))
    slopes = _slopes(runs, margin)
    findings += slopes.pop("finding", [])
    return slopes | {"finding": np.array(findings, dtype=object)}


@dataclass(frozen=True, order=True)
class _Condensed:
    """A layer with fewer directions than as many random neurons, and fewer per neuron than at first.

    Both in every order, and of the neurons that were counted: one that was pruned has condensed into nothing.
    """

    ratio: float
    layer: int


def _condensed(run: _Run, chosen: int) -> tuple[list[_Condensed], int]:
    """Those layers, the most condensed one first, and of how many the directions were counted."""
    low, high = (run.arrays[f"effective_directions_{end}"][..., chosen] for end in ("low", "high"))
    chance = run.arrays["chance_directions_low"][:, chosen]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio, at_first = high[-1] / run.counted[-1], low[0] / run.counted[0]
    fewer = (high[-1] < chance) & ((ratio < at_first) if len(high) > 1 else True)
    found = sorted(_Condensed(float(ratio[i]), int(i)) for i in np.flatnonzero(fewer))
    return found, int(np.isfinite(high[-1]).sum())


def _findings(runs: list[_Run], chosen: int, threshold: float) -> list[str]:
    """One sentence for each run, or one for all of them where nothing condensed."""
    found = [_condensed(run, chosen) for run in runs]
    if len(runs) > 1 and all(known and not layers for layers, known in found):
        return [f"no layer of {len(runs)} runs {_none(runs[0], threshold)}"]
    sentences = []
    for run, (layers, known) in zip(runs, found, strict=True):
        head = f"{run.name}: " if len(runs) > 1 else ""
        if not known:
            sentences.append(f"{head}no layer's directions were counted")
        elif not layers:
            sentences.append(f"{head}no layer {_none(run, threshold)}")
        else:
            sentences.append(f"{head}{_most(run, layers, known, chosen, threshold)}")
    return sentences


def _none(run: _Run, threshold: float) -> str:
    first = " and fewer per neuron than at the first" if len(run.distance) > 1 else ""
    return (
        "has condensed: at the last checkpoint none has, in every order, fewer directions "
        f"(cosine {threshold:g}) than random neurons have{first}"
    )


def _most(run: _Run, layers: list[_Condensed], known: int, chosen: int, threshold: float) -> str:
    i = layers[0].layer
    low, high = (run.arrays[f"effective_directions_{end}"][:, i, chosen] for end in ("low", "high"))
    total = run.n_neurons[i]
    first, last = (_neurons(run.counted[at, i], total) for at in (0, -1))
    before = ""
    if len(high) > 1:
        of = "" if run.counted[0, i] == run.counted[-1, i] else f" of {first}"
        before = f", {_range(low[0], high[0])}{of} at the first checkpoint"
    middle = run.arrays["chance_directions"][i, chosen]
    return (
        f"{len(layers)} of {known} layers condensed, {run.layers[i]} most: {last} in "
        f"{_range(low[-1], high[-1])} direction{'s' if high[-1] > 1 else ''} (cosine {threshold:g}){before}, "
        f"{middle:.3g} if random"
    )


def _neurons(counted: float, total: float) -> str:
    return f"{total:g} neurons" if counted == total else f"the {counted:g} counted of {total:g} neurons"


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _slopes(runs: list[_Run], margin: float) -> dict[str, Any]:
    """S_w of every layer that all runs have, and of those that were widened together."""
    if len(runs) < FEWEST_WIDTHS:
        return {}
    common = [name for name in runs[0].layers if all(name in run.layers for run in runs)]
    sizes = {name: np.array([run.n_neurons[run.at(name)] for run in runs]) for name in common}
    widened = [name for name in common if len(np.unique(sizes[name])) > 1]
    width = np.exp(np.mean([np.log(sizes[name]) for name in widened], axis=0)) if widened else np.ones(1)
    if len(np.unique(width.round(9))) < FEWEST_WIDTHS:
        return {}
    groups = {TOGETHER: widened, **{name: [name] for name in common}}
    distance = np.array([[run.farthest(layers) for layers in groups.values()] for run in runs])
    slopes = [width_slope(width, column) for column in distance.T]
    regimes = [regime(slope, margin) for slope in slopes]
    value, error, low, high = slopes[0]
    verdict = f"{regimes[0]} regime" if regimes[0] != UNDECIDED else "regime undecided"
    text = f"{verdict}: S_w = {plus_minus(value, error)} over {len(np.unique(width))} widths"
    text += f" (95 %: {low:.2f} to {high:.2f}, within ±{margin:g} is critical)"
    if not np.isfinite(value):
        text = "regime undecided: fewer than 3 widths have a relative distance from their first checkpoint"
    return {
        "slope_layer": np.array(list(groups), dtype=object),
        **{
            f"width_slope{end}": np.array([slope[i] for slope in slopes])
            for i, end in enumerate(("", "_stderr", "_low", "_high"))
        },
        "regime": np.array(regimes, dtype=object),
        "slope_run": np.array([run.name for run in runs], dtype=object),
        "run_width": width,
        "run_distance": distance,
        "finding": [text],
    }
