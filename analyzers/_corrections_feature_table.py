"""Tables of the features that a correction may change: numbers, and categories with a column each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._corrections_feature_names import listed

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BASELINE = "none of these"
"""The category of a one-hot feature whose columns are all zero."""

WHOLE = 1e-4
"""By what a whole number may miss after it was standardised in float32."""
_FEW = 8


@dataclass(frozen=True)
class OneHot:
    """A feature that is one of several categories, each with a column of its own.

    Attributes:
        name: What it is called.
        index: Columns in the flattened input, (n_columns,).
        names: Of the columns, one for each.
        weight: Cost of another category.
        has_baseline: Whether all zero is a category too; it is the last one.
        offset: The value 0 or 1 is offset + scale * input, (n_columns,).
        scale: The same.
    """

    name: str
    index: Integers
    names: tuple[str, ...]
    weight: float
    has_baseline: bool
    offset: Floats
    scale: Floats

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories."""
        return (*self.names, BASELINE) if self.has_baseline else self.names

    def inputs(self, category: int) -> Floats:
        """The columns of the input in a category, given by its number, (n_columns,)."""
        shown = (np.arange(len(self.index)) == category).astype(np.float64)
        return np.asarray((shown - self.offset) / self.scale)

    def category(self, point: Floats) -> int:
        """Number of the category of a flattened input (n_inputs,).

        Raises:
            OptionError: If its columns are not one-hot.
        """
        return int(self.category_of(np.asarray(point)[None, self.index])[0])

    def category_of(self, columns: Floats) -> Integers:
        """Numbers of the categories of samples, from these columns of their inputs (n_samples, n_columns).

        Raises:
            OptionError: If those of a sample are not one-hot.
        """
        shown = self.offset + self.scale * np.asarray(columns, np.float64)
        ones = np.abs(shown - 1) < WHOLE
        count = ones.sum(1)
        wrong = ~(ones | (np.abs(shown) < WHOLE)).all(1) | (count > 1)
        wrong |= (count == 0) & (not self.has_baseline)
        if wrong.any():
            values = ", ".join(f"{value:.3g}" for value in shown[np.flatnonzero(wrong)[0]][:_FEW])
            raise OptionError(
                f"{self.name!r} is not one-hot: a sample has {values} in {listed(self.names, _FEW)}.",
                "In the feature file, make them 0 and 1 by offset and scale (or mean and std) of each, or "
                "give baseline = true if all zero is a category.",
            )
        return np.where(count == 0, len(self.index), ones.argmax(1)).astype(np.int64)


@dataclass(frozen=True)
class FeatureTable:
    """The chosen features, in the data's own ("shown") units: offset + scale * input.

    Attributes:
        names: Of the k features that are numbers, in the order chosen.
        index: Their columns in the flattened input, (k,).
        low: Least allowed value, (k,).
        high: Largest allowed value, (k,).
        weight: Cost of a change by one unit, (k,).
        stability: Half-width of the box in which a stable correction must hold, (k,).
        integer: Whether only whole numbers are allowed, (k,).
        direction: 1 may only grow, -1 may only shrink, 0 both, (k,).
        unit: Their units, empty where unknown.
        offset: Shown value of an input of 0, (k,).
        scale: Shown units of one unit of the input, (k,).
        groups: The chosen one-hot features.
        notes: What was left out and why.
    """

    names: tuple[str, ...]
    index: Integers
    low: Floats
    high: Floats
    weight: Floats
    stability: Floats
    integer: NDArray[np.bool_]
    direction: Integers
    unit: tuple[str, ...]
    offset: Floats
    scale: Floats
    groups: tuple[OneHot, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def n_features(self) -> int:
        """How many features are numbers, k."""
        return len(self.names)

    def shown(self, inputs: Floats) -> Floats:
        """Values of the k features in shown units, of their inputs (…, k); whole where they must be."""
        values = self.offset + self.scale * np.asarray(inputs, np.float64)
        return np.where(self.integer, np.round(values), values)

    def inputs(self, shown: Floats) -> Floats:
        """Inputs (…, k) of values of the k features in shown units."""
        return np.asarray((np.asarray(shown, np.float64) - self.offset) / self.scale)
