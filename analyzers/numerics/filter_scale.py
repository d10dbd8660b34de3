"""Chooses the widths of a Gaussian filter: those at which the target has given shares of low frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import brentq
from torch import Tensor

from dynprobe.analyzers.numerics.gaussian_filter import BLOCK_VALUES, squared_distances

SEARCH_VALUES = 2**22
"""Distances the search keeps: all of them up to 2,048 samples."""
SEARCH_ROWS = 256
"""Rows it takes at least."""
WIDEST, NARROWEST = 1e4, 1e-8
"""Ends of the search, in median squared distances."""
PRECISION = 1e-4
"""Of ln δ."""


def search_rows(n_samples: int) -> int:
    """How many rows of distances a search on so many samples takes."""
    return min(n_samples, max(SEARCH_ROWS, SEARCH_VALUES // n_samples))


def median_squared_distance(distance: Tensor) -> float:
    """Median of the squared distances of different samples.

    Args:
        distance: From `squared_distances`, with one zero in each row for the sample itself.
    """
    values = distance.flatten()
    # the zeros of the samples themselves are the smallest values
    rank = len(distance) + (values.numel() - len(distance) + 1) // 2
    return float(values.kthvalue(min(rank, values.numel())).values)


class FilterScale:
    """The share of low frequencies of a target as a function of the filter's width, on some rows.

    LFR(δ) = Σ_i |y_i^low|² / Σ_i |y_i|².

    Args:
        inputs: From `gaussian_filter.centred`, shape (n_samples, n_features).
        target: Shape (n_samples, n_outputs).
        rows: Samples to sum over, in random order; no more than `search_rows` are used.

    Attributes:
        median: Median squared distance of different samples.
    """

    def __init__(self, inputs: Tensor, target: Tensor, rows: Tensor) -> None:
        rows = rows.to(inputs.device)[: search_rows(len(inputs))]
        self._distance = squared_distances(inputs, rows)
        self.median = median_squared_distance(self._distance)
        ones = torch.ones(len(inputs), 1, device=inputs.device)
        self._table = torch.cat([target.float().to(inputs.device), ones], 1)
        self._energy = float(self._table[rows, :-1].double().square().sum())
        self._known: dict[float, float] = {}

    def ratio(self, delta: float) -> float:
        """LFR at a width."""
        if delta not in self._known:
            low, size = 0.0, max(1, BLOCK_VALUES // self._distance.shape[1])
            for start in range(0, len(self._distance), size):
                distance = self._distance[start : start + size]
                product = torch.exp(distance * (-0.5 / delta)) @ self._table
                low += float((product[:, :-1] / product[:, -1:]).double().square().sum())
            self._known[delta] = low / self._energy if self._energy > 0 else math.nan
        return self._known[delta]

    def deltas(self, ratios: Sequence[float]) -> list[float]:
        """The widths δ at which LFR has given values; NaN where no width gives it.

        Args:
            ratios: Each between 0 and 1.
        """
        return [self._delta(ratio) for ratio in ratios]

    def _delta(self, ratio: float) -> float:
        def excess(log_delta: float) -> float:
            return self.ratio(math.exp(log_delta)) - ratio

        low, high = math.log(NARROWEST * self.median), math.log(WIDEST * self.median)
        # rounding makes an end look as if it were on the other side, never a value in between
        if not excess(low) > 0 > excess(high):
            return math.nan
        low, high = self._narrowed(ratio, low, high)
        return math.exp(float(brentq(excess, low, high, xtol=PRECISION)))

    def _narrowed(self, ratio: float, low: float, high: float) -> tuple[float, float]:
        """The smallest interval that the widths tried so far enclose the ratio in: LFR falls with δ."""
        for delta, found in self._known.items():
            if found > ratio:
                low = max(low, math.log(delta))
            elif found < ratio:
                high = min(high, math.log(delta))
        return low, high
