"""Which of two exact formulations of HSIC is cheaper: matrices of samples, or covariances of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def plan(n_rows: int, widths: Sequence[int], limit: float, *, itemsize: int = 4, gram: bool = False) -> Plan:
    """Chooses by the number of operations for networks of these widths, within a limit of memory.

    Grams cost n²ΣD a network and 2n²L² a pair, covariances 4nΣD² and 4n(ΣD)², the sums by sample for the
    standard error included. A network is made once and stands in several pairs.

    Args:
        n_rows: n, rows of every layer.
        widths: D, features of each of the L layers.
        limit: Bytes.
        itemsize: Bytes of a number.
        gram: Only Grams will do, as for any kernel but the linear one.
    """
    n, depth, total = float(n_rows), len(widths), float(sum(widths))
    features, sums = itemsize * n * total, 16 * n * depth**2
    needs = {
        "gram": (
            n * n * total + PAIRS * 2 * n * n * depth**2,
            2 * itemsize * n * n * depth + features + sums,
        ),
        "covariance": (
            4 * n * sum(d * d for d in widths) + PAIRS * 4 * n * total**2,
            3 * features + 2 * sums + 16 * max(widths) * total,
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
