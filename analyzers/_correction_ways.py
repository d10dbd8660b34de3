"""All the ways in which one judged input may be changed, as judgements in units of the features' ranges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers._correction_features import FeatureTable
from dynprobe.analyzers._correction_model import Classifier
from dynprobe.analyzers._correction_search import FEW, Way
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.correction_problem import Judgement, Norm
from dynprobe.analyzers.numerics.layered_network import Floats


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
    found = min(asked, k) if asked else k if k <= FEW else 2
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


def ways_of(rules: Rules, classifier: Classifier, point: Floats, targets: Sequence[int]) -> list[Way]:
    """Every subset of features, category and target that is allowed for one judged input (n_inputs,)."""
    table = rules.table
    found = []
    for target, (categories, changed, n_changed, base) in itertools.product(
        targets, _category_choices(rules, point)
    ):
        size = min(rules.max_changed - n_changed, len(table.names))
        for columns in itertools.combinations(range(len(table.names)), size):
            judgement = _judgement(rules, classifier, changed, columns, target)
            found.append(Way(columns, judgement, changed, base, target, categories))
    return found


def _category_choices(rules: Rules, point: Floats) -> Iterator[tuple[tuple[int, ...], Floats, int, float]]:
    """Every choice of categories: their positions, the input with them, how many differ, and their cost."""
    groups = rules.table.groups
    own = [int(group.category(point)) for group in groups]
    for chosen in itertools.product(*(range(len(group.categories)) for group in groups)):
        differs = [a != b for a, b in zip(chosen, own, strict=True)]
        n_changed = sum(differs)
        if n_changed > rules.max_changed:
            continue
        changed = point.copy()
        for group, position, differ in zip(groups, chosen, differs, strict=True):
            if differ:  # an unchanged category stays bit for bit what it was
                changed[group.index] = group.inputs(position)
        costs = [group.weight for group, differ in zip(groups, differs, strict=True) if differ]
        base = (math.fsum(costs) if rules.norm == "l1" else max(costs)) if costs else 0.0
        yield tuple(chosen), changed, n_changed, base


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
    radius = np.where(integer, np.floor(table.stability[chosen]), table.stability[chosen])
    network = classifier.margins(target).restricted(
        point, index.tolist(), inputs_of(table, chosen, low), inputs_of(table, chosen, high)
    )
    return Judgement(
        network,
        start,
        np.where(direction > 0, start, 0.0),
        np.where(direction < 0, start, 1.0),
        table.weight[chosen] * width,
        radius / width,
        rules.margin,
        rules.norm,
        np.where(integer, 1 / width, 0.0) if integer.any() else None,
        np.where(integer, -low / width, 0.0) if integer.any() else None,
    )


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
