"""All columns that a report shows of an input: features that are numbers, then columns of categories."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers._corrections_features import FeatureTable
from dynprobe.analyzers.numerics.layered_network import Floats


@dataclass(frozen=True)
class Columns:
    """The reported columns; values are in the data's own units, offset + scale * input.

    Args:
        names: (n_reported,).
        index: In the flattened input, (n_reported,).
        offset: (n_reported,).
        scale: (n_reported,).
        whole: Which are whole numbers, but for the rounding of the inputs, (n_reported,).
    """

    names: tuple[str, ...]
    index: np.ndarray
    offset: Floats
    scale: Floats
    whole: np.ndarray

    @classmethod
    def of(cls, table: FeatureTable) -> Columns:
        """Those of a table, its features first and in its order."""
        groups = table.groups
        return cls(
            (*table.names, *(name for group in groups for name in group.names)),
            np.concatenate([table.index, *(group.index for group in groups)]).astype(np.int64),
            np.concatenate([table.offset, *(group.offset for group in groups)]),
            np.concatenate([table.scale, *(group.scale for group in groups)]),
            np.concatenate([table.integer, *(np.ones(len(group.index), bool) for group in groups)]),
        )

    def shown(self, point: Floats) -> Floats:
        """Values of an input (n_inputs,), shape (n_reported,)."""
        values: Floats = np.asarray(self.offset + self.scale * point[self.index])
        return np.asarray(np.where(self.whole, np.round(values) + 0.0, values))  # and no negative zero

    def inputs(self, shown: Floats) -> Floats:
        """The inverse: entries of the input."""
        return np.asarray((shown - self.offset) / self.scale)
