"""Which of two exact formulations of HSIC is cheaper: matrices of samples, or covariances of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynprobe.analyzers.numerics.hsic import MEDIAN_OF, STRIP

PAIRS = 4
"""Pairs that a checkpoint is taken to stand in, as in a series of five with all its pairs."""


@dataclass(frozen=True)
class Plan:
    """How layers on the same rows are compared.

    Attributes:
        formulation: "gram" or "covariance"; "" where neither fits.
        flops: Of the kernels of one network and of the pairs it stands in.
        bytes: That a pair of networks keeps at a time, with the features of one.
        sentence: The choice in words.
    """

    formulation: str
    flops: float
    bytes: float
    sentence: str


def plan(
    n_rows: int,
    widths: Sequence[int],
    limit: float,
    *,
    itemsize: int = 4,
    gram: bool = False,
    rows_per_sample: int = 1,
) -> Plan:
    """Chooses by the number of operations for networks of these widths, within a limit of memory.

    Grams cost n²ΣD a network and 2n²L² a pair, covariances 4nΣD² and 4n(ΣD)², the sums by sample for the
    standard error included. A network is made once and stands in several pairs.

    Args:
        n_rows: n, rows of every layer.
        widths: D, features of each of the L layers.
        limit: Bytes.
        itemsize: Bytes of a number.
        gram: Only Grams will do, as for any kernel but the linear one.
        rows_per_sample: Of which the sums of blocks are kept that give the chance level.
    """
    n, depth, total = float(n_rows), len(widths), float(sum(widths))
    features, sums = itemsize * n * total, 120 * n * depth
    blocks = 4 * itemsize * depth * rows_per_sample**2 if rows_per_sample > 1 else 0
    median = 50 * min(n * n / 2, MEDIAN_OF) if gram else 0.0
    strips = itemsize * n * (depth**2 + 4 * STRIP)
    needs = {
        "gram": (
            n * n * total + PAIRS * 2 * n * n * depth**2,
            2 * itemsize * n * n * depth + features + sums + strips + blocks + median,
        ),
        "covariance": (
            4 * n * sum(d * d for d in widths) + 2 * n * total * rows_per_sample + PAIRS * 4 * n * total**2,
            (2 + (depth > 1)) * features + sums + 24 * max(widths) * total + blocks,
        ),
    }
    if gram:
        del needs["covariance"]
    fitting = {name: need for name, need in needs.items() if need[1] <= limit}
    chosen = min(fitting or needs, key=lambda name: needs[name][0 if fitting else 1])
    flops, size = needs[chosen]
    others = [
        f"{name} would take {other[0] / 1e9:.3g} GFLOP and {other[1] / 1e6:.3g} MB"
        for name, other in needs.items()
        if name != chosen
    ]
    sentence = (
        f"{depth} layer{'s' * (depth > 1)} of {int(total):,} features on {n_rows:,} rows by {chosen}: "
        f"{flops / 1e9:.3g} GFLOP for {PAIRS} pairs and {size / 1e6:.3g} MB for one"
        + "".join(f"; {o}" for o in others)
    )
    return Plan(chosen if fitting else "", flops, size, sentence)
