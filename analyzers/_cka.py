"""What `cka` keeps of a checkpoint, its options, and when they contradict each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.hsic import Kernels
from dynprobe.analyzers.numerics.hsic_chance import BlockSums
from dynprobe.analyzers.numerics.hsic_minibatch import BatchKernels

BANDWIDTH = 1.0
"""σ of the RBF kernel over the median distance, where nothing is said."""
GIGABYTE = 1e9
SMALLEST = 8
"""Samples in a minibatch: its halves need four for an unbiased HSIC."""
WIDEST = 1e6
"""Largest bandwidth, where the RBF kernel is the linear one to 12 digits, and inverse of the smallest."""


@dataclass(frozen=True)
class Choice:
    """The options that decide what is kept of a checkpoint."""

    layers: str
    maps: str
    sequences: str
    kernel: str
    estimator: str
    bandwidth: float
    minibatch: int
    memory: float
    seed: int

    @property
    def unbiased(self) -> bool:
        """Whether HSIC is the unbiased estimate."""
        return self.estimator == "unbiased"

    @property
    def fraction(self) -> float:
        """σ over the median distance, 0 for the linear kernel."""
        return self.bandwidth if self.kernel == "rbf" else 0.0


@dataclass(frozen=True)
class Rows:
    """Layers whose rows are the same things: samples, or positions of one kind.

    Attributes:
        index: Of the layers in their network.
        treatment: Of the layers where rows are no samples.
        sample: Sample of every row, (n_rows,); None where row i is sample i.
        kernels: Of the layers.
        blocks: For their chance level; None where samples have different numbers of rows.
    """

    index: list[int]
    treatment: str
    sample: Tensor | None
    kernels: Kernels
    blocks: BlockSums | None

    def matches(self, other: Rows) -> bool:
        """Whether row i is the same thing in both."""
        if self.sample is None or other.sample is None:
            return self.sample is other.sample
        return self.treatment == other.treatment and torch.equal(self.sample, other.sample)


@dataclass(frozen=True)
class Representation:
    """All that comparisons need of a checkpoint.

    Attributes:
        layers: Names, in the order in which they ran.
        treatment: What was done to the output of each.
        width: Features of each.
        n_rows: Rows of each.
        exponent: Kernels of a layer are those of features times two to the minus this.
        bandwidth: σ of the RBF kernel of each, in units of its activations; empty for the linear kernel.
        trouble: Why a layer has no similarity, "" where it has.
        rows: The layers that have one, by what their rows are; empty for minibatches.
        minibatch: The kernels of all layers in each minibatch; empty where they were used as they were made.
    """

    layers: list[str]
    treatment: list[str]
    width: list[int]
    n_rows: list[int]
    exponent: list[int]
    bandwidth: list[float]
    trouble: list[str]
    rows: list[Rows] = field(default_factory=list)
    minibatch: list[BatchKernels] = field(default_factory=list)


def troubles(label: str, representation: Representation) -> list[str]:
    """A sentence for each layer that has no similarity."""
    named = zip(representation.layers, representation.trouble, strict=True)
    return [f"{label}: {layer} {why}; its similarities are NaN" for layer, why in named if why]


def check_choice(choice: Choice, n_samples: int) -> None:
    """Raises before any compute where options contradict each other.

    Raises:
        OptionError: What, and what to do.
    """
    if n_samples <= 3:
        raise OptionError(
            f"CKA needs at least 4 samples, there are {n_samples}.", "Give more --samples, some hundreds."
        )
    if choice.kernel == "linear" and choice.bandwidth != BANDWIDTH:
        raise OptionError(
            "--bandwidth has no effect on the linear kernel.", "Add --kernel rbf, or leave it out."
        )
    if not 1 / WIDEST <= choice.bandwidth <= WIDEST:
        raise OptionError(
            f"--bandwidth {choice.bandwidth:g} must lie between {1 / WIDEST:g} and {WIDEST:g}.",
            "1 is the median distance. Much larger ones give the linear kernel: --kernel linear.",
        )
    if not choice.minibatch:
        return
    if not choice.unbiased:
        raise OptionError(
            "--estimator biased has a bias that grows as batches shrink: minibatches would measure it.",
            "With --minibatch leave --estimator at unbiased.",
        )
    enough = math.ceil(n_samples / max(1, n_samples // SMALLEST))
    if (smallest := n_samples // math.ceil(n_samples / choice.minibatch)) < SMALLEST:
        raise OptionError(
            f"--minibatch {choice.minibatch} cuts {n_samples:,} samples into batches of {smallest}: too few "
            "to estimate their deviation from the full sample.",
            f"Give --minibatch {enough:,} or more, or 0 for the full sample.",
        )
