"""Sentences on a pair of networks that `cca` compared: what was refused, is doubtful, or will take long."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("dynprobe")

NAMED = 3
"""Layers, or pairs of them, that a note names."""
RATE = 2.5e10
"""Floating-point operations a second in decompositions on one core."""
LONG = 60.0
"""Seconds that a pair of networks may take without a warning."""

Where = NDArray[np.bool_]


class Sizes:
    """What subspaces' dimensions say about two networks, layer by layer.

    Args:
        names: Layers of either network.
        sizes: Their dimensions: ranks, or components kept.
        n_rows: Rows of data, `(layer_a, layer_b)`.
        components: Whether these are components kept for SVCCA.
    """

    def __init__(
        self,
        names: tuple[Sequence[str], Sequence[str]],
        sizes: tuple[NDArray[np.int64], NDArray[np.int64]],
        n_rows: NDArray[np.int64],
        *,
        components: bool = False,
    ) -> None:
        self._names, self._sizes, self._n_rows, self._components = names, sizes, n_rows, components

    def _pair(self, i: int, j: int) -> str:
        (a, b), (one, two) = self._names, self._sizes
        return f"{a[i]} ({'k =' if self._components else 'rank'} {one[i]}) with {b[j]} ({two[j]})"

    def _worst(self, where: Where, badness: NDArray[np.float64]) -> list[tuple[int, int]]:
        at = np.argwhere(where)
        order = np.argsort(-badness[where], kind="stable")
        return [(int(i), int(j)) for i, j in at[order]]

    def _fullest(self, where: Where) -> list[tuple[int, int]]:
        total = self._sizes[0][:, None] + self._sizes[1][None]
        return self._worst(where, total / np.maximum(self._n_rows, 1))

    def _listed(self, pairs: Sequence[tuple[int, int]]) -> str:
        return ", ".join(self._pair(*pair) for pair in pairs[:NAMED]) + (", …" if len(pairs) > NAMED else "")

    def _no_room(self, i: int, j: int, dimensions: str) -> str:
        what = "components kept for SVCCA," if self._components else "ranks"
        return f"{what} {self._sizes[0][i]} + {self._sizes[1][j]} leave no room in {dimensions}"

    def refusal(self, where: Where, n_pairs: int) -> str:
        """Why correlations are NaN at some of all pairs of layers."""
        pairs = self._fullest(where)
        i, j = pairs[0]
        reason = self._no_room(i, j, f"n - 1 = {self._n_rows[i, j] - 1:,} dimensions")
        return (
            f"{reason}: correlations approach 1 whatever the data, so NaN for {len(pairs)} of {n_pairs} "
            f"pairs of layers: {self._listed(pairs)}"
        )

    def no_error(self, where: Where, smallest: NDArray[np.int64]) -> str:
        """Why some pairs have no standard error; `smallest` are the rows without the largest block."""
        pairs = self._fullest(where)
        i, j = pairs[0]
        left = f"the {smallest[i, j] - 1:,} dimensions of all blocks of samples but one"
        what = "SVCCA" if self._components else "mean ρ, mean ρ² and PWCCA"
        return (
            f"no standard error of {what} for {len(pairs)} pairs of layers, {self._listed(pairs)}: "
            f"{self._no_room(i, j, left)}"
        )

    def forced(self, forced: NDArray[np.float64]) -> str:
        """How many correlations are 1 whatever the data, with `--force`."""
        where = forced > 0
        pairs = self._worst(where, forced)
        of = np.minimum(self._sizes[0][:, None], self._sizes[1][None])
        return (
            f"{int(forced[where].sum()):,} of {int(of[where].sum()):,} correlations are 1 whatever the data "
            f"in {len(pairs)} pairs of layers, most at {self._listed(pairs)}"
        )

    def few(self, where: Where) -> str:
        """That unrelated data correlate nearly as well."""
        largest = np.maximum(self._sizes[0][:, None], self._sizes[1][None])
        pairs = self._worst(where, largest / np.maximum(self._n_rows, 1))
        return (
            f"few samples for the dimensions in {len(pairs)} pairs of layers, fewest for "
            f"{self._listed(pairs)} on {self._n_rows[pairs[0]]:,}: unrelated data correlate as well, see the "
            "chance levels; 5 to 10 samples per dimension are advised"
        )


def fewer_components(label: str, names: Sequence[str], ranks: Sequence[int], count: int) -> list[str]:
    """That SVCCA keeps all components of layers that have fewer than were asked for."""
    short = [f"{name} ({rank})" for name, rank in zip(names, ranks, strict=True) if 0 < rank < count]
    if not short:
        return []
    listed = ", ".join(short[:NAMED]) + (", …" if len(short) > NAMED else "")
    return [f"{label}: {len(short)} layers have fewer than {count} components, all kept for SVCCA: {listed}"]


def announce(work: Mapping[str, float]) -> None:
    """Logs what a pair of networks will take, and warns once where that is long."""
    parts = ", ".join(f"{work[name] / 1e9:,.3g} for {name}" for name in ("values", "errors", "chance"))
    seconds = sum(work[name] for name in ("values", "errors", "chance")) / RATE
    log.debug(
        "a pair of networks: GFLOP %s; %.0f MB at the widest layers; about %.1f s on one core",
        parts,
        work["bytes"] / 1e6,
        seconds,
    )
    if seconds > LONG:
        _warn(f"{seconds / 60:.0f} minutes")


@cache
def _warn(time: str) -> None:
    log.warning(
        "canonical correlations of a pair of these networks take about %s on one core; fewer or narrower "
        "--layers, --jackknife-blocks 0 and --chance-permutations 0 take less",
        time,
    )
