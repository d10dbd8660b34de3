"""Says in sentences what the statistics on a whole call found."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from dynprobe.analyzers._convergence import EXACT_LAYERS, FEWEST_LAYERS, Convergence
from dynprobe.analyzers._group_curves import GroupCurves
from dynprobe.analyzers._networks import FEWEST
from dynprobe.analyzers._relabelling import n_relabelings

LEVEL = 0.05
"""Up to this p-value a sentence says that there is a difference."""
MOST_STEPS = 4
"""Steps that a sentence lists."""
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
    from_first = run.step[first] == run.first_known[first]
    there = f"a similarity of {level:g}{' or more' if from_first else ''} to the last checkpoint"
    text = f"{layers[first]} {'has' if from_first else 'reaches'} {there} {_when(run, first)}"
    if not run.reached[first]:
        text = f"{layers[first]} never reaches {there}"
    if last != first:
        does = " does" if run.reached[last] and not run.reached[first] else ""
        text += f", {layers[last]}{does} {_when(run, last)}"
    order, reason = _order(run, len(known))
    return f"{head}{order}{text}{reason}{_undefined(run, layers)}"


def _order(run: Convergence, n_layers: int) -> tuple[str, str]:
    """What is said about the order in depth, before and after what the layers do."""
    smallest = 2 / math.factorial(min(n_layers, EXACT_LAYERS))
    if n_layers < FEWEST_LAYERS:
        return "", "; too few layers for an order in depth"
    if not math.isfinite(run.tau):
        return "", "; all layers alike: no order in depth"
    p = f"p = {probability(run.tau_p)}"
    if smallest > LEVEL:
        order = "too few layers to tell an order in depth from chance"
        p += f"; the smallest that {n_layers} layers allow is {probability(smallest)}"
    elif run.tau_p > LEVEL:
        order = "no order in depth beyond chance"
    else:
        order = "bottom-up" if run.tau > 0 else "top-down"
    return f"{order}: ", f"; Kendall's tau with depth {plus_minus(run.tau, run.tau_stderr)} ({p})"


def _undefined(run: Convergence, layers: list[str]) -> str:
    """Layers that have no similarity at the first steps, or at a later one."""
    text = ""
    for step in np.unique(run.first_known[(run.first_known > run.first_step) & np.isfinite(run.reached)]):
        late = [layers[i] for i in np.flatnonzero(run.first_known == step) if np.isfinite(run.reached[i])]
        text += f"; {', '.join(late)} not defined before step {step:g}"
    if lost := [layers[i] for i in np.flatnonzero(np.isnan(run.reached))]:
        text += f"; left out, because not defined at later steps: {', '.join(lost)}"
    return text


def _when(run: Convergence, layer: int) -> str:
    step, error, low, high = (float(x[layer]) for x in (run.step, run.stderr, run.low, run.high))
    if not run.reached[layer]:
        return "never"
    if step == run.first_step:
        return "from the first checkpoint on"
    at = "from" if step == run.first_known[layer] else "at"
    if math.isfinite(error) and math.isfinite(high):
        return f"{at} step {_rounded(step, error)}"
    if math.isfinite(low):
        return f"{at} step {step:.4g} (95 %: {low:.3g} to {f'{high:.3g}' if high == high else 'never'})"
    return f"{at} step {step:.4g}"


def _rounded(value: float, error: float) -> str:
    """Both to the second digit of the error."""
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 0
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def group_findings(curves: GroupCurves) -> list[str]:
    """What the groups show at the last step that has them, what could not be said, and why no t-test."""
    found = [_missing_finding(curves)]
    found += [_size_finding(curves, i) for i in range(len(curves.groups))]
    found += [_contrast_finding(curves, i) for i in range(len(curves.contrast_names))]
    if np.isfinite(curves.p[curves.shown]).any():
        found.append(NO_T_TEST)
    return [text for text in dict.fromkeys(found) if text]


def _missing_finding(curves: GroupCurves) -> str:
    """Which networks are not in all means over networks."""
    runs: dict[str, list[str]] = {}
    for run, absent in curves.missing.items():
        when = f"{len(absent)} of {len(curves.step)} steps"
        if len(absent) == len(curves.step):
            when = "any step"
        elif len(absent) <= MOST_STEPS:
            when = f"step {', '.join(f'{step:g}' for step in absent)}"
        runs.setdefault(when, []).append(run)
    if not runs:
        return ""
    text = "; ".join(f"at {when} {', '.join(names)}" for when, names in runs.items())
    later = "" if curves.shown == len(curves.step) - 1 else f"; groups are described at {_step(curves)}"
    return f"compared with no other network: {text}{later}"


def _size_finding(curves: GroupCurves, group: int) -> str:
    size, name = int(curves.sizes[curves.shown, group]), curves.groups[group]
    if size == 0:
        return f"{name} has no network at {_step(curves)} that is compared with another"
    if size == 1:
        return f"{name} has 1 network: there is no similarity within it, and no test"
    if size < FEWEST:
        return (
            f"{name} has {size} networks: an error over networks, and a test of how close they are to each "
            f"other, need {FEWEST}"
        )
    return ""


def _step(curves: GroupCurves) -> str:
    step = curves.step[curves.shown]
    return f"step {step:g}" if math.isfinite(step) else "the step"


def _contrast_finding(curves: GroupCurves, contrast: int) -> str:
    """The layer of smallest p-value; the sign of a difference is in the words."""
    at = (curves.shown, slice(None), contrast)
    value, error, corrected = curves.contrast[at], curves.contrast_stderr[at], curves.p_layers[at]
    tested = np.isfinite(corrected)
    if not tested.any():
        return ""
    signed = value if contrast % 2 else np.abs(value)
    size = signed / np.where(error > 0, error, 1.0)
    layer = int(np.lexsort((-size, np.where(tested, corrected, np.inf)))[0])
    n_layers, p_layers = int(tested.sum()), float(corrected[layer])
    text = f"p = {probability(float(curves.p[at][layer]))}"
    if n_layers > 1:
        text += f", corrected for {n_layers} layers {probability(p_layers)}"
    smallest = float(curves.smallest_p[curves.shown, contrast])
    n_splits = int(curves.n_splits[curves.shown, contrast])
    text += f" ({n_splits:,} relabelings of networks, smallest possible p {probability(smallest)})"
    if smallest > LEVEL:
        text += f": {_too_few(curves, contrast)} for any difference to have p below {LEVEL}"
    claim = _difference if contrast % 2 == 0 else _cohesion
    found = np.flatnonzero(tested & (corrected <= LEVEL) & (np.sign(value) == np.sign(value[layer])))
    opposite = int((tested & (corrected <= LEVEL)).sum()) - len(found)
    where = _where(len(found), opposite, n_layers)
    return f"{claim(curves, contrast, layer, where, found=bool(len(found)))}, {text}"


def _too_few(curves: GroupCurves, contrast: int) -> str:
    names = _groups_of(curves, contrast)
    sizes = [int(curves.sizes[curves.shown, curves.groups.index(name)]) for name in names]
    if n_relabelings(*sizes) * LEVEL < 1:
        return "too few networks"
    return "too few relabelings looked at (--permutations)"


def _where(found: int, opposite: int, n_layers: int) -> str:
    """In how many layers, as the words before the name of the clearest."""
    if n_layers == 1:
        return ", at"
    if not found:
        return f" in any of {n_layers} layers, most nearly at"
    other = f" (in {opposite} the other way round)" if opposite else ""
    return f" in {found} of {n_layers} layers{other}, most clearly at"


def _difference(curves: GroupCurves, contrast: int, layer: int, where: str, *, found: bool) -> str:
    first, second = _groups_of(curves, contrast)
    if curves.contrast[curves.shown, layer, contrast] < 0:
        first, second = second, first
    means = " against ".join(_mean(curves, name, layer) for name in (first, second))
    at = f"{where} {curves.layers[layer]}, {_step(curves)}: {means}"
    if found:
        return f"{first} runs are mutually closer than {second} ones{at}"
    return f"{first} runs are no closer among themselves than {second} ones beyond chance{at}"


def _cohesion(curves: GroupCurves, contrast: int, layer: int, where: str, *, found: bool) -> str:
    pair = " and ".join(_groups_of(curves, contrast))
    value, error = (x[curves.shown, layer, contrast] for x in (curves.contrast, curves.contrast_stderr))
    at = f"{where} {curves.layers[layer]}, {_step(curves)}: by {plus_minus(value, error)}"
    if found:
        return f"{pair}: runs are closer within the groups than between them{at}"
    return f"{pair}: runs are no closer within the groups than between them beyond chance{at}"


def _groups_of(curves: GroupCurves, contrast: int) -> tuple[str, str]:
    return list(combinations(curves.groups, 2))[contrast // 2]


def _mean(curves: GroupCurves, group: str, layer: int) -> str:
    at = curves.pair_names.index(group)
    return plus_minus(curves.mean[curves.shown, layer, at], curves.stderr[curves.shown, layer, at])


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
