"""Gaps in a sequence of steps: what is missing from a regular spacing, linear or geometric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_ENOUGH = 5
# Share of equal distances from which a spacing counts as regular.
_REGULAR = 0.6
_MOST_LISTED = 100


def missing_steps(steps: Sequence[int | float]) -> list[int | float]:
    """Return the steps that a regular spacing would have and the sequence lacks.

    Only where the usual distance is seen both before and after the gap: a spacing that grows (logarithmic,
    denser early on, a last checkpoint at the end of training) is no gap.

    Args:
        steps: Ascending, distinct.

    Returns:
        The missing steps; empty where the spacing is not regular.
    """
    if len(steps) < _ENOUGH:
        return []
    linear = _gaps([later - earlier for earlier, later in pairwise(steps)])
    if linear is not None:
        usual, gaps = linear
        return [steps[i] + usual * k for i, factor in gaps for k in range(1, factor)][:_MOST_LISTED]
    positive = [step for step in steps if step > 0]
    if len(positive) < _ENOUGH:
        return []
    return _missing_in_powers(positive)


def _gaps(distances: Sequence[int | float]) -> tuple[int | float, list[tuple[int, int]]] | None:
    """Return the usual distance and (position, multiple) of the gaps; None if no distance is usual."""
    usual, count = Counter(distances).most_common(1)[0]
    if count < _REGULAR * len(distances):
        return None
    at_usual = [i for i, distance in enumerate(distances) if distance == usual]
    gaps = []
    for i, distance in enumerate(distances):
        factor = distance / usual
        if factor >= 2 and factor == int(factor) and at_usual[0] < i < at_usual[-1]:
            gaps.append((i, int(factor)))
    return usual, gaps


def _missing_in_powers(steps: Sequence[int | float]) -> list[int | float]:
    """The same for a constant ratio (1, 2, 4, 16, 32: 8 is missing)."""
    ratios = [later / earlier for earlier, later in pairwise(steps)]
    usual, count = Counter(ratios).most_common(1)[0]
    if count < _REGULAR * len(ratios) or usual <= 1:
        return []
    at_usual = [i for i, ratio in enumerate(ratios) if ratio == usual]
    missing: list[int | float] = []
    for i, ratio in enumerate(ratios):
        if not (at_usual[0] < i < at_usual[-1]) or ratio <= usual:
            continue
        between = steps[i] * usual
        inside: list[int | float] = []
        while between < steps[i + 1] and len(inside) < _MOST_LISTED:
            inside.append(int(between) if between == int(between) else between)
            between *= usual
        if between == steps[i + 1]:
            missing += inside
    return missing


def out_of_time_order(
    paths: Sequence[Path], times: Sequence[int], tolerance: int = 1_000_000_000
) -> list[int]:
    """Return the positions whose modification time contradicts the order of steps.

    Copying a folder sets new times: nothing is returned where the times follow the names instead, where most
    of them contradict, or where they lie within the tolerance.

    Args:
        paths: In order of their steps.
        times: Modification times in nanoseconds.
        tolerance: Differences up to this many nanoseconds are no order.

    Returns:
        The fewest positions without which the times do not decrease.
    """
    if len(times) < _ENOUGH or max(times) - min(times) <= tolerance:
        return []
    by_name = [time for _, time in sorted(zip((str(path) for path in paths), times, strict=True))]
    if by_name == sorted(times) and by_name != list(times):
        return []
    kept = _longest_rising(times, tolerance)
    odd = sorted(set(range(len(times))) - kept)
    return odd if len(odd) * 4 <= len(times) else []


def _longest_rising(times: Sequence[int], tolerance: int) -> set[int]:
    """Positions of a longest subsequence that does not fall by more than the tolerance."""
    length = [1] * len(times)
    before = [-1] * len(times)
    for i in range(len(times)):
        for j in range(i):
            if times[j] <= times[i] + tolerance and length[j] + 1 > length[i]:
                length[i], before[i] = length[j] + 1, j
    position = max(range(len(times)), key=lambda i: length[i])
    kept = set()
    while position >= 0:
        kept.add(position)
        position = before[position]
    return kept
