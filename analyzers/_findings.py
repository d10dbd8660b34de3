"""Says in sentences what the statistics on a whole call found."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from dynprobe.analyzers._convergence import EXACT_LAYERS, FEWEST_LAYERS, Convergence
from dynprobe.analyzers._group_curves import GroupCurves
from dynprobe.analyzers._networks import FEWEST

LEVEL = 0.05
"""Below this p-value a sentence says that there is a difference."""
NO_T_TEST = (
    "no t-test on pairs: pairs share networks, and it would reject a true null hypothesis in about 4 of 10 "
    "cases instead of 1 of 20"
)


def convergence_findings(runs: list[Convergence], layers: list[str], level: float) -> list[str]:
    """One sentence for each run: which layer converges when, and whether in the order of depth."""
    return [_convergence_finding(run, layers, level, several=len(runs) > 1) for run in runs]


def _convergence_finding(run: Convergence, layers: list[str], level: float, *, several: bool) -> str:
    head = f"{run.run}: " if several else ""
    known = np.flatnonzero(np.isfinite(run.reached))
    if not len(known):
        return f"{head}no layer has a similarity at every step, so nothing is said about convergence"
    first, last = int(known[0]), int(known[-1])
    there = f"a similarity of {level:g} to the last checkpoint"
    text = f"{layers[first]} reaches {there} {_when(run, first)}"
    if not run.reached[first]:
        text = f"{layers[first]} never reaches {there}"
    if last != first:
        does = " does" if run.reached[last] and not run.reached[first] else ""
        text += f", {layers[last]}{does} {_when(run, last)}"
    if len(known) < FEWEST_LAYERS:
        return f"{head}{text}; too few layers for an order in depth"
    if not math.isfinite(run.tau):
        return f"{head}{text}; all layers alike: no order in depth"
    smallest = 2 / math.factorial(min(len(known), EXACT_LAYERS))
    order = "no order in depth beyond chance"
    if run.tau_p <= max(LEVEL, smallest):
        order = "bottom-up" if run.tau > 0 else "top-down"
    p = f"p = {probability(run.tau_p)}"
    if smallest > LEVEL:
        p += f"; the smallest that {len(known)} layers allow is {probability(smallest)}"
    return f"{head}{order}: {text}; Kendall's tau with depth {plus_minus(run.tau, run.tau_stderr)} ({p})"


def _when(run: Convergence, layer: int) -> str:
    step, error, low, high = (float(x[layer]) for x in (run.step, run.stderr, run.low, run.high))
    if not run.reached[layer]:
        return "never"
    if math.isfinite(error) and math.isfinite(high):
        return f"at step {_rounded(step, error)}"
    if math.isfinite(low):
        return f"at step {step:.4g} (95 %: {low:.3g} to {f'{high:.3g}' if high == high else 'never'})"
    return f"at step {step:.4g}"


def _rounded(value: float, error: float) -> str:
    """Both to the second digit of the error."""
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 0
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def group_findings(curves: GroupCurves) -> list[str]:
    """What the groups show at the last step, what could not be said, and why pairs are not tested."""
    found = [_size_finding(curves, i) for i in range(len(curves.groups))]
    found += [_contrast_finding(curves, i) for i in range(len(curves.contrast_names))]
    if np.isfinite(curves.p[-1]).any():
        found.append(NO_T_TEST)
    return [text for text in dict.fromkeys(found) if text]


def _size_finding(curves: GroupCurves, group: int) -> str:
    size, name = int(curves.sizes[-1, group]), curves.groups[group]
    if size == 0:
        return f"{name} has no network at {_step(curves)} that is compared with another"
    if size == 1:
        return f"{name} has 1 network: there is no similarity within it, and no test"
    if size < FEWEST:
        return f"{name} has {size} networks: an error over networks needs {FEWEST}"
    return ""


def _step(curves: GroupCurves) -> str:
    return f"step {curves.step[-1]:g}" if math.isfinite(curves.step[-1]) else "the step"


def _contrast_finding(curves: GroupCurves, contrast: int) -> str:
    """The layer that differs most, or that none does; the sign of a difference is in the words."""
    value, corrected = curves.contrast[-1, :, contrast], curves.p_layers[-1, :, contrast]
    if not np.isfinite(corrected).any():
        return ""
    n_layers, n_splits = int(np.isfinite(corrected).sum()), int(curves.n_splits[-1, contrast])
    smallest = float(curves.smallest_p[-1, contrast])
    relabelings = f"{n_splits:,} relabelings of networks, smallest possible p {probability(smallest)}"
    size = np.abs(value) if contrast % 2 == 0 else value
    layer = int(np.nanargmax(np.where(np.isfinite(corrected), size, np.nan)))
    p, p_layers = float(curves.p[-1, layer, contrast]), float(corrected[layer])
    text = f"p = {probability(p)}"
    if n_layers > 1:
        text += f", corrected for {n_layers} layers {probability(p_layers)}"
    text += f" ({relabelings})"
    if smallest > LEVEL:
        text += f": too few networks for any difference to have p below {LEVEL}"
    claim = _difference if contrast % 2 == 0 else _cohesion
    return f"{claim(curves, contrast, layer, found=p_layers <= LEVEL)}, {text}"


def _difference(curves: GroupCurves, contrast: int, layer: int, *, found: bool) -> str:
    first, second = _groups_of(curves, contrast)
    if curves.contrast[-1, layer, contrast] < 0:
        first, second = second, first
    means = " against ".join(_mean(curves, name, layer) for name in (first, second))
    at = f"{curves.layers[layer]}, {_step(curves)}"
    if found:
        return f"{first} runs are mutually closer than {second} ones, most at {at}: {means}"
    return (
        f"{first} runs are no closer among themselves than {second} ones beyond chance, most at {at}: {means}"
    )


def _cohesion(curves: GroupCurves, contrast: int, layer: int, *, found: bool) -> str:
    pair = " and ".join(_groups_of(curves, contrast))
    at = f"{curves.layers[layer]}, {_step(curves)}"
    excess = plus_minus(curves.contrast[-1, layer, contrast], curves.contrast_stderr[-1, layer, contrast])
    if found:
        return f"{pair}: runs are closer within the groups than between them, most at {at}: by {excess}"
    return f"{pair}: runs are no closer within the groups than between them; at most by {excess}, at {at}"


def _groups_of(curves: GroupCurves, contrast: int) -> tuple[str, str]:
    return list(combinations(curves.groups, 2))[contrast // 2]


def _mean(curves: GroupCurves, group: str, layer: int) -> str:
    at = curves.pair_names.index(group)
    return plus_minus(curves.mean[-1, layer, at], curves.stderr[-1, layer, at])


def plus_minus(value: float, error: float) -> str:
    """A number of order 1 with its error, to two or three decimals.

    >>> plus_minus(0.9312, 0.012), plus_minus(0.9312, 0.004), plus_minus(0.9312, float("nan"))
    ('0.93 ± 0.01', '0.931 ± 0.004', '0.93')
    """
    if not math.isfinite(error):
        return f"{value:.2f}"
    digits = 2 if error >= 0.0095 else 3
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def probability(p: float) -> str:
    """A p-value to two digits, never as 0.

    >>> probability(0.0079), probability(0.5), probability(0.00001)
    ('0.0079', '0.5', '1e-05')
    """
    return f"{p:.2g}"
