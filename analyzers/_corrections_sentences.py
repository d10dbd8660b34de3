"""Says in sentences what would have to change for a network to decide otherwise."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_DOWN, ROUND_FLOOR, ROUND_HALF_EVEN, ROUND_UP, Decimal

import numpy as np

from dynprobe.analyzers._corrections_runs import (
    ALREADY_TARGET,
    FOUND,
    NONE_EXISTS,
    OPTIMAL,
    STABLE,
    TIMEOUT,
    UNSUPPORTED,
    JudgedRun,
)

MOST_FEATURES = 4
"""Features that a sentence lists."""
MOST_SAMPLES = 8
"""Samples that a sentence lists."""
ROUND_OFF = 4 * np.finfo(float).eps
"""What the conversion between units may have added to a bound, as a part of it."""


def _step(span: float) -> Decimal:
    """A power of ten between a hundredth and a thousandth of `span`."""
    return Decimal(10) ** math.floor(math.log10(span / 100)) if span > 0 else Decimal("1e-6")


def _text(value: Decimal) -> str:
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−") if text not in ("-0", "0") else "0"


def _rounded(value: float, step: Decimal, rounding: str) -> Decimal:
    # a number's shortest text, not its binary expansion: 0.1 is not to become 0.11
    return (Decimal(repr(float(value))) / step).to_integral_value(rounding) * step


def interval(low: float, high: float, span: float) -> str:
    """An interval rounded inwards, so that all that is printed lies within it; a point where it has no width.

    Rounded to a hundredth of the range or finer, and to a tenth of the interval where that is less.

    Args:
        low: Lower end.
        high: Upper end.
        span: Width of the range that was allowed.

    >>> interval(20.02, 37.98, 63), interval(670.2, 720.9, 550), interval(0.1, 0.1, 1)
    ('[20.1, 37.9]', '[671, 720]', '0.1')
    """
    first, last, _ = _inner(low, high, span)
    return _text(first) if first == last else f"[{_text(first)}, {_text(last)}]"


def change(value: float, low: float, high: float, span: float) -> str:
    """A value and the interval that it goes to, with the same digits, on the side of it where it is.

    Args:
        value: Judged value.
        low: Lower end.
        high: Upper end.
        span: Width of the range that was allowed.

    >>> change(44.0312, 20, 38, 63), change(6.1132, 6.1005, 6.1099, 10), change(1, 0, 0, 1)
    ('44 → [20, 38]', '6.1132 → [6.1005, 6.1099]', '1 → 0')
    """
    first, last, step = _inner(low, high, span)
    shown = _rounded(value, step, ROUND_HALF_EVEN)
    if value < low:
        shown = shown if shown < first else _rounded(value, step, ROUND_FLOOR)
    elif value > high:
        shown = shown if shown > last else _rounded(value, step, ROUND_CEILING)
    else:
        shown = min(max(shown, first), last)
    return f"{_text(shown)} → {interval(low, high, span)}"


def _inner(low: float, high: float, span: float) -> tuple[Decimal, Decimal, Decimal]:
    """Both ends rounded inwards, and to what."""
    width = high - low
    if not width > 1e-9 * max(span, abs(low)):
        step = _step(span / 100)
        point = _rounded((low + high) / 2, step, ROUND_HALF_EVEN)
        return point, point, step
    step = min(_step(span), _step(10 * width))
    slack = ROUND_OFF * max(abs(low), abs(high))
    return _nearby(low, step, slack, ROUND_CEILING), _nearby(high, step, slack, ROUND_FLOOR), step


def _nearby(value: float, step: Decimal, slack: float, rounding: str) -> Decimal:
    """Rounded, but to the nearest where that differs by no more than the error of the units' conversion."""
    nearest = _rounded(value, step, ROUND_HALF_EVEN)
    return nearest if abs(float(nearest) - value) <= slack else _rounded(value, step, rounding)


def least(bound: float) -> str:
    """A lower bound to three digits, rounded down.

    >>> least(0.12999)
    '0.129'
    """
    return _text(_rounded(bound, _step(bound), ROUND_DOWN)) if bound > 0 else "0"


def within(upper: float, lower: float) -> str:
    """How near to the optimum a distance is, rounded up: `optimal within 1 %`.

    >>> within(0.31, 0.3079), within(0.31, 0.31)
    ('optimal within 0.7 %', 'optimal')
    """
    percent = 100 * (upper - lower) / upper if upper > 0 else 0.0
    if percent <= 1e-4:
        return "optimal"
    step = Decimal(10) ** math.floor(math.log10(percent))
    return f"optimal within {_text(_rounded(percent, step, ROUND_UP))} %"


def listed(items: list[str], most: int = MOST_FEATURES, noun: str = "") -> str:
    """`a, b and c`; what exceeds `most` is counted."""
    if len(items) > most + 1:
        return f"{', '.join(items[:most])} and {len(items) - most} more{noun and ' ' + noun}"
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""


def judgement_sentences(run: JudgedRun, most: int) -> list[str]:
    """One sentence on every judgement at the last checkpoint; those with failing samples first.

    Args:
        run: With at least one checkpoint.
        most: Judgements that get a sentence; the others are counted.
    """
    outcome = run.outcomes()[-1]
    failing = np.nan_to_num(run.numbers("sampled_failures")[-1])
    told = np.flatnonzero(np.isin(outcome, (*FOUND, NONE_EXISTS, TIMEOUT, UNSUPPORTED)))
    told = told[np.argsort(failing[told] <= 0, kind="stable")]
    head = f"{run.name}: " if run.name else ""
    sentences = [head + _judgement(run, int(i)) for i in told[:most]]
    if len(told) > most:
        sentences.append(f"{head}… and {len(told) - most} more: see the report")
    names = [str(s) for s in run.samples[outcome == ALREADY_TARGET]]
    if names:
        noun = "sample" if len(names) == 1 else "samples"
        sentences.append(f"{head}{noun} {listed(names, MOST_SAMPLES)}: already the target")
    return sentences


def _judgement(run: JudgedRun, i: int) -> str:
    transition = run.transition(i)
    head = f"sample {run.samples[i]}" + (f" ({transition})" if transition else "")
    outcome = str(run.outcomes()[-1, i])
    say = _found if outcome in FOUND else _none_exists if outcome == NONE_EXISTS else _undecided
    return f"{head}: {say(run, i)}"


def _found(run: JudgedRun, i: int) -> str:
    distance, lower = (float(run.numbers(n)[-1, i]) for n in ("stable_distance", "stable_lower_bound"))
    changes = [f"{run.features[j]} {change_text(run, i, int(j))}" for j in run.leaving(i)]
    flip, them = ("flips it", "it") if len(changes) == 1 else ("flip it", "them")
    text = f"{listed(changes, noun='features')} {flip}{_beside(run, i, them)}{_polygon(run, i)}"
    text += f"; distance {distance:.3g}"
    if run.outcomes()[-1, i] == OPTIMAL:
        text += f", {within(distance, lower)}"
    elif lower > 0:
        text += f", at least {least(lower)} is needed"
    return f"{text}; {_evidence(run, i)}"


def change_text(run: JudgedRun, i: int, j: int) -> str:
    """A feature at the last checkpoint: `44 → [20, 38]`, or `in [20, 38]` where it may stay as it is.

    Args:
        run: With a correction of this judgement; a nearest point where there is no stable one.
        i: Row of the judgement.
        j: Feature.
    """
    correction = run.correction(i)
    value, low, high, point = (
        float(run.numbers(n)[-1, i, j]) for n in ("value", "box_low", "box_high", correction)
    )
    lowest, highest = (float(end[j]) for end in run.allowed(i))
    if correction != STABLE or not math.isfinite(low + high):  # a point, around which no box was measured
        low = high = point
    if j in (run.leaving(i) if correction == STABLE else run.moved(i, correction)):
        return change(value, low, high, highest - lowest)
    return f"in {interval(low, high, highest - lowest)}"


def _beside(run: JudgedRun, i: int, them: str) -> str:
    """Features that the correction leaves alone, but need not."""
    varying = run.varying(i)
    names = [f"{run.features[j]} {change_text(run, i, int(j))}" for j in varying[: MOST_FEATURES + 1]]
    if len(varying) > MOST_FEATURES:
        names = [f"{len(varying)} more features"]
    return f", and {listed(names)} may vary with {them}" if names else ""


def _polygon(run: JudgedRun, i: int) -> str:
    corners, changed = run.polygon(i), run.changed(i)
    if not len(corners) or len(changed) != 2:
        return ""
    low, high = run.allowed(i)
    x, y = ((corners - low[changed]) / (high - low)[changed]).T
    area = abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2
    return f"; all of a polygon of {len(corners)} vertices, {least(area)} of the allowed ranges, flips it too"


def _evidence(run: JudgedRun, i: int) -> str:
    n, failures = (run.numbers(name)[-1, i] for name in ("n_sampled", "sampled_failures"))
    if not np.isfinite(run.numbers("box_low")[-1, i]).all():
        if (np.nan_to_num(run.numbers("stability")[-1][run.changed(i)]) > 0).any():
            return "stable within ± the stability asked for, verified by the search; no box, see the notes"
        return "a single point, which the model itself confirms; no box, see the notes"
    if not n > 0:
        return "numerically verified"
    if failures > 0:
        return f"{int(failures):,} of {int(n):,} samples FAIL: do not rely on it"
    return f"numerically verified, 0 of {int(n):,} samples fail"


def _change_of(run: JudgedRun) -> str:
    """`change of at most two of the 61 features`: all that was searched."""
    names = (
        f"the {len(run.chosen)} features"
        if len(run.chosen) > MOST_FEATURES
        else listed([run.features[j] for j in run.chosen])
    )
    most = run.at_most()
    return f"change of {most} of {names}" if most else f"change of {names}"


def _ranges(run: JudgedRun, i: int) -> str:
    if len(run.chosen) > MOST_FEATURES:
        return "within their allowed ranges"
    low, high = run.reachable(i)
    lowest, highest = run.allowed(i)
    ranges = [interval(float(low[j]), float(high[j]), float(highest[j] - lowest[j])) for j in run.chosen]
    same = len(ranges) > 1 and len(set(ranges)) == 1
    return f"within {ranges[0]} each" if same else f"within {listed(ranges)}"


def _none_exists(run: JudgedRun, i: int) -> str:
    if not run.only_stable_excluded(i):
        return f"no {_change_of(run)} {_ranges(run, i)} flips it (numerically verified)"
    nearest = float(run.numbers("distance")[-1, i])
    head = f"a point at distance {nearest:.3g} flips it, but " if math.isfinite(nearest) else ""
    return (
        f"{head}no {_change_of(run)} {_ranges(run, i)} stays flipped in the whole box of the stability asked "
        "for (numerically verified)"
    )


def _undecided(run: JudgedRun, i: int) -> str:
    nearest, lower, stable = (
        float(run.numbers(n)[-1, i]) for n in ("distance", "lower_bound", "stable_lower_bound")
    )
    out_of_time = str(run.outcomes()[-1, i]) == TIMEOUT
    head = (
        "undecided after the time given: "
        if out_of_time
        else "nothing stable can be verified, see the notes: "
    )
    searched = f" by a {_change_of(run)}" if run.at_most() else ""
    if math.isfinite(nearest):
        # the bound on stable corrections is none on points
        bound = f", and none{searched} is nearer than {least(stable)}" if stable > 0 else ""
        return f"{head}a point at distance {nearest:.3g} flips it, no stable correction was found{bound}"
    nothing = f"no {_change_of(run)}" if run.at_most() else "nothing"
    bound = f"{nothing} nearer than {least(lower)} flips it, " if lower > 0 else ""
    return f"{head}{bound}nothing found"
