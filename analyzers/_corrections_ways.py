"""All the ways in which one judged input may be changed, as judgements in units of the features' ranges."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dynprobe.analyzers._corrections_features import FeatureTable
from dynprobe.analyzers._corrections_model import Classifier
from dynprobe.analyzers._corrections_search import FEW, Way
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.centre_bounds import bound_centres
from dynprobe.analyzers.numerics.correction_problem import Judgement, Norm
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.linear_bounds import boxes_at_once

MOST_WAYS, _MOST_USUAL = 50_000, 2_100
"""Subsets, times classes and categories, that are searched at most; and subsets without being asked to."""

_SCREENED, _SCREENED_AT_ONCE = 16, 256
"""From how many subsets on they are screened, and how many at most at once."""


@dataclass(frozen=True)
class Rules:
    """What may change and what it costs; the same for every checkpoint of a run.

    Args:
        table: The features that may change.
        norm: How the costs of several features add up.
        max_changed: How many features may change at once.
        margin: Least output that counts.
    """

    table: FeatureTable
    norm: Norm
    max_changed: int
    margin: float


def most_changed(asked: int, table: FeatureTable, shape: str) -> int:
    """How many features may change at once: as asked, else all of a few and two of many.

    Raises:
        OptionError: If a polygon is asked for and other than two features may change.
    """
    k = len(table.names) + len(table.groups)
    usual = 2 if k > FEW and k + math.comb(k, 2) <= _MOST_USUAL else k
    found = min(asked, k) if asked else usual
    if shape == "polygon" and (found != 2 or len(table.names) < 2):
        raise OptionError(
            f"a polygon needs two features that change, and here it is {found} of {k}.",
            "Choose two with --features, or give --max-changed 2, or --shape box.",
        )
    return found


def domain(table: FeatureTable, point: Floats) -> tuple[Floats, Floats]:
    """Lowest and highest allowed value of every feature in its own units; the judged one always is."""
    own = table.shown(point[table.index])
    return np.minimum(table.low, own), np.maximum(table.high, own)


def ways_of(
    rules: Rules,
    classifier: Classifier,
    point: Floats,
    targets: Sequence[int],
    *,
    deadline: float = math.inf,
) -> list[Way]:
    """Every subset of features, category and target that is allowed for one judged input (n_inputs,).

    Args:
        rules: What may change.
        classifier: The checkpoint's network.
        point: The judged input, (n_inputs,).
        targets: Classes of which one is to be decided.
        deadline: Until when lower bounds for many ways at once are looked for, by `time.monotonic()`.

    Raises:
        OptionError: If there are too many, or the input is not one-hot where it should be.
    """
    table = rules.table
    found = []
    _check_number(rules, len(targets))
    by_lead = sorted(targets, key=lambda target: -classifier.margins(target)(point[None]).min())
    for target, (categories, changed, n_changed, base) in itertools.product(
        by_lead, _category_choices(rules, point)
    ):
        size = max(_sizes(rules, n_changed))
        lead = float(classifier.margins(target)(changed[None]).min())
        subsets = [
            columns
            for n in _sizes(rules, n_changed)
            for columns in itertools.combinations(range(len(table.names)), n)
        ]
        floors = _floors(rules, classifier, changed, subsets, target, deadline)
        for columns, floor in zip(subsets, floors, strict=True):
            make = functools.partial(_judgement, rules, classifier, changed, columns, target)
            stable = bool(_radius(table, list(columns)).any())
            way = Way(columns, make, changed, base, target, rules.norm, stable, categories)
            way.floor, way.lead = way.total(float(floor)), lead
            way.is_widest = len(columns) == size
            found.append(way)
    return found


def _sizes(rules: Rules, n_categories_changed: int) -> Sequence[int]:
    """How many numbers may change beside so many categories.

    All at once, where everything may; else up to as many as are left: where fewer change, fewer need be
    stable.
    """
    k, n_groups = len(rules.table.names), len(rules.table.groups)
    if rules.max_changed >= k + n_groups:
        return (k,)
    most = min(rules.max_changed - n_categories_changed, k)
    return range(0 if n_categories_changed else min(1, most), most + 1)


def _n_choices(table: FeatureTable, most: int) -> list[int]:
    """In how many ways n of the one-hot features may change their category, for n up to `most`."""
    ways = [1]
    for group in table.groups:
        others = len(group.categories) - 1
        ways = [a + others * b for a, b in zip([*ways, 0], [0, *ways], strict=True)]
    return ways[: most + 1]


def _n_ways(rules: Rules) -> int:
    k = len(rules.table.names)
    return sum(
        n_choices * sum(math.comb(k, size) for size in _sizes(rules, n_changed))
        for n_changed, n_choices in enumerate(_n_choices(rules.table, rules.max_changed))
    )


def _check_number(rules: Rules, n_targets: int) -> None:
    """Refuse so many ways that not even one look at each is affordable.

    Raises:
        OptionError: If there are more than `MOST_WAYS`.
    """
    n_ways = _n_ways(rules)
    if n_ways * n_targets <= MOST_WAYS:
        return
    k = len(rules.table.names) + len(rules.table.groups)
    times = f", times {n_targets} classes" if n_targets > 1 else ""
    whole = replace(rules, max_changed=k)
    at_once = (
        f", or --max-changed {k} to change all at once" if _n_ways(whole) * n_targets <= MOST_WAYS else ""
    )
    raise OptionError(
        f"up to {rules.max_changed} of {k} features can be chosen in {n_ways:,} ways{times}, and at most "
        f"{MOST_WAYS:,} are searched.",
        f"Choose fewer --features{', or a smaller --max-changed' if rules.max_changed > 1 else ''}{at_once}.",
    )


def _floors(
    rules: Rules,
    classifier: Classifier,
    point: Floats,
    subsets: list[tuple[int, ...]],
    target: int,
    deadline: float,
) -> Floats:
    """For every subset a distance below which it has no correction, all with few passes of bounds.

    Most pairs of many features are out of the question for a single look at each, which this is. It is 0 for
    those that are not looked at until the deadline.
    """
    k = len(rules.table.names)
    floors = np.zeros(len(subsets))
    if len(subsets) < _SCREENED:
        return floors
    whole = _judgement(rules, classifier, point, tuple(range(k)), target).for_points()
    at_once = min(_SCREENED_AT_ONCE, boxes_at_once(whole.network))
    for first in range(0, len(subsets), at_once):
        if time.monotonic() > deadline:
            break
        part = subsets[first : first + at_once]
        low = np.repeat(whole.start[:, None], len(part), 1)
        high = low.copy()
        for i, columns in enumerate(part):
            low[list(columns), i], high[list(columns), i] = (
                whole.low[list(columns)],
                whole.high[list(columns)],
            )
        floors[first : first + len(part)] = bound_centres(whole, low, high).distance
    return floors


def _category_choices(rules: Rules, point: Floats) -> Iterator[tuple[tuple[int, ...], Floats, int, float]]:
    """Every choice of categories: their positions, the input with them, how many differ, and their cost."""
    groups = rules.table.groups
    own = [int(group.category(point)) for group in groups]
    for n_changed in range(min(rules.max_changed, len(groups)) + 1):
        for which in itertools.combinations(range(len(groups)), n_changed):
            others = [[c for c in range(len(groups[i].categories)) if c != own[i]] for i in which]
            costs = [groups[i].weight for i in which]
            base = (math.fsum(costs) if rules.norm == "l1" else max(costs)) if costs else 0.0
            for chosen in itertools.product(*others):
                changed, positions = point.copy(), list(own)
                for i, position in zip(which, chosen, strict=True):  # all others keep their bits
                    changed[groups[i].index] = groups[i].inputs(position)
                    positions[i] = position
                yield tuple(positions), changed, n_changed, base


def _judgement(
    rules: Rules, classifier: Classifier, point: Floats, columns: tuple[int, ...], target: int
) -> Judgement:
    table, chosen = rules.table, list(columns)
    lows, highs = domain(table, point)
    low, high = lows[chosen], highs[chosen]
    width = high - low
    own = table.shown(point[table.index])[chosen]
    start = (own - low) / width
    direction = table.direction[chosen]
    index = table.index[chosen]
    integer = table.integer[chosen]
    network = classifier.margins(target).restricted(
        point, index.tolist(), inputs_of(table, chosen, low), inputs_of(table, chosen, high)
    )
    return Judgement(
        network,
        start,
        np.where(direction > 0, start, 0.0),
        np.where(direction < 0, start, 1.0),
        table.weight[chosen] * width,
        _radius(table, chosen) / width,
        rules.margin,
        rules.norm,
        np.where(integer, 1 / width, 0.0) if integer.any() else None,
        np.where(integer, -low / width, 0.0) if integer.any() else None,
    )


def _radius(table: FeatureTable, chosen: list[int]) -> Floats:
    """Half-widths of the stable box in the features' own units; whole numbers for integer features."""
    stability = table.stability[chosen]
    return np.where(table.integer[chosen], np.floor(stability), stability)


def inputs_of(table: FeatureTable, columns: Sequence[int], values: Floats) -> Floats:
    """The network's inputs for values of some features in their own units."""
    chosen = list(columns)
    return np.asarray((values - table.offset[chosen]) / table.scale[chosen])


def shown_of(table: FeatureTable, way: Way, units: Floats) -> Floats:
    """Values in the features' own units of a point or corner (k,) of a way's judgement."""
    low, high = domain(table, way.point)
    chosen = list(way.columns)
    return np.asarray(low[chosen] + units * (high[chosen] - low[chosen]))


def units_of(table: FeatureTable, way: Way, values: Floats) -> Floats:
    """The inverse of `shown_of`."""
    low, high = domain(table, way.point)
    chosen = list(way.columns)
    return np.asarray((values - low[chosen]) / (high[chosen] - low[chosen]))
