"""Turns the activations of a checkpoint into the kernels that `cka` compares, in one pass over the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._cka import GIGABYTE, Choice, Representation, Rows
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.numerics.activations import Block, non_finite
from dynprobe.analyzers.numerics.hsic import (
    Kernels,
    centre,
    centre_gram,
    exponent,
    fourth_power,
    from_features,
    from_grams,
    gram,
    median_distance,
    rbf,
    squared_distances,
    vanishes,
)
from dynprobe.analyzers.numerics.hsic_chance import block_sums, rows_per_sample
from dynprobe.analyzers.numerics.hsic_minibatch import BatchKernels, MinibatchRecorder, splits_of
from dynprobe.analyzers.numerics.hsic_plan import Plan, plan

log = logging.getLogger("dynprobe")

SAMPLE = 512
"""Samples at most whose median distance sets σ where kernels are made in minibatches."""

CONSTANT = "is constant over the samples"
ALONE = "differs from sample to sample in too few of them for an unbiased estimate"
FLAT = "has, to rounding, the same RBF kernel between all samples: another --bandwidth is needed"
EQUAL = "is equal on most pairs of samples, so that the median distance is 0"


def represent(activations: Activations, choice: Choice) -> Representation:
    """One pass over the data; kernels of every layer.

    Raises:
        OptionError: If they need more memory than allowed.
    """
    if choice.minibatch:
        batches: list[BatchKernels] = []
        return replace(in_minibatches(activations, choice, batches.append), minibatch=batches)
    collected = _Collected(activations, choice)
    activations.stream(collected.add, layers=choice.layers, maps=choice.maps, sequences=choice.sequences)
    return collected.finish()


class _Store:
    """The rows of one layer: the first block, from the second on in a matrix for all."""

    def __init__(self, block: Block) -> None:
        half = block.values.dtype not in (torch.float32, torch.float64)
        self.values = block.values.float() if half else block.values.clone()
        self.treatment = block.treatment
        self.samples = [] if block.sample is None else [block.sample]
        self.n_rows = len(block.values)

    def add(self, block: Block, n_samples: int) -> None:
        """Copies a block; the matrix is large enough if the samples to come have as many rows each."""
        end = self.n_rows + len(block.values)
        if end > len(self.values):
            last = block.start + len(block.values) if block.sample is None else int(block.sample[-1]) + 1
            larger = self.values.new_empty(math.ceil(end * n_samples / last), self.values.shape[1])
            larger[: self.n_rows] = self.values[: self.n_rows]
            self.values = larger
        self.values[self.n_rows : end] = block.values
        self.n_rows = end
        if block.sample is not None:
            self.samples.append(block.sample)


class _Collected:
    """The features of all layers, batch after batch; stops early where they cannot fit."""

    def __init__(self, activations: Activations, choice: Choice) -> None:
        self._label, self._n_samples, self._choice = activations.label, activations.n_samples, choice
        self._stores: dict[str, _Store] = {}
        self._checked = False

    def add(self, block: Block) -> None:
        """Takes a copy of one layer on one batch."""
        if block.layer not in self._stores:
            self._stores[block.layer] = _Store(block)
            return
        if not self._checked:
            self._checked = True
            self._plans(self._n_samples / block.start)
        self._stores[block.layer].add(block, self._n_samples)

    def _plans(self, scale: float = 1.0) -> list[tuple[list[str], Plan]]:
        """Layers by what their rows are, and how to compare them; `scale` for the batches to come."""
        groups: dict[tuple[str, int], list[str]] = {}
        for name, store in self._stores.items():
            groups.setdefault((store.treatment if store.samples else "", store.n_rows), []).append(name)
        left, plans = self._choice.memory * GIGABYTE, []
        for (_kind, n_rows), names in groups.items():
            values = [self._stores[name].values for name in names]
            found = plan(
                round(n_rows * scale),
                [value.shape[1] for value in values],
                left,
                itemsize=max(value.element_size() for value in values),
                gram=self._choice.kernel == "rbf",
                rows_per_sample=math.ceil(n_rows * scale / self._n_samples),
            )
            if not found.formulation:
                raise OptionError(
                    f"{self._label}: {found.sentence}, more than --memory {self._choice.memory:g} GB allows.",
                    "Give --minibatch 256, fewer --samples, --maps average, fewer --layers or more --memory.",
                )
            left -= found.bytes
            plans.append((names, found))
        return plans

    def finish(self) -> Representation:
        """The kernels of what was taken; features are let go as they are used."""
        names, treatments = list(self._stores), [store.treatment for store in self._stores.values()]
        widths = [store.values.shape[1] for store in self._stores.values()]
        n_rows = [store.n_rows for store in self._stores.values()]
        made = {name: _Made() for name in names}
        rows = []
        for members, found in self._plans():
            log.debug("%s: %s", self._label, found.sentence)
            samples = self._stores[members[0]].samples
            sample = torch.cat(samples) if samples else None
            make = self._in_grams if found.formulation == "gram" else self._in_features
            kernels = make({name: made[name] for name in members})
            if kernels is not None:
                there = [name for name in members if not made[name].trouble]
                index = [names.index(name) for name in there]
                why = FLAT if self._choice.fraction else ALONE
                for name, alone in zip(there, _drop_alone(kernels, [made[n] for n in there]), strict=True):
                    made[name].trouble = why if alone else ""
                regular = rows_per_sample(sample, self._n_samples)
                blocks = block_sums(kernels, self._n_samples) if regular else None
                rows.append(Rows(index, treatments[index[0]] if samples else "", sample, kernels, blocks))
        rbf_kernel = self._choice.kernel == "rbf"
        return Representation(
            names,
            treatments,
            widths,
            n_rows,
            [0 if rbf_kernel else one.exponent for one in made.values()],
            [one.width for one in made.values()] if rbf_kernel else [],
            [one.trouble for one in made.values()],
            rows,
        )

    def _in_features(self, made: dict[str, _Made]) -> Kernels | None:
        """Centred features of layers on the same rows side by side; None where all are constant."""
        dtype, total = self._dtype(made), sum(self._stores[name].values.shape[1] for name in made)
        kept: Tensor | None = None
        widths: list[int] = []
        for name, one in made.items():
            features = self._centred(name, dtype, one)
            if one.trouble:
                continue
            at, width = sum(widths), features.shape[1]
            if kept is None:
                kept = features if len(made) == 1 else features.new_empty(len(features), total)
            if kept is not features:
                kept[:, at : at + width] = features
            widths.append(width)
        return (
            None if kept is None else from_features(kept[:, : sum(widths)], widths, unbiased=self._unbiased)
        )

    def _in_grams(self, made: dict[str, _Made]) -> Kernels | None:
        """Their centred kernel matrices."""
        first, dtype = self._stores[next(iter(made))], self._dtype(made)
        kept = first.values.new_empty(len(made), first.n_rows, first.n_rows, dtype=dtype)
        del first
        widths: list[int] = []
        for name, one in made.items():
            features = self._centred(name, dtype, one)
            if not one.trouble:
                self._gram(features, one, kept[len(widths)])
            if not one.trouble:  # else the next one takes its place
                widths.append(features.shape[1])
        if not widths:
            return None
        return from_grams(kept[: len(widths)], widths, unbiased=self._unbiased)

    @property
    def _unbiased(self) -> bool:
        return self._choice.unbiased

    def _dtype(self, names: Iterable[str]) -> torch.dtype:
        doubles = any(self._stores[name].values.dtype == torch.float64 for name in names)
        return torch.float64 if doubles else torch.float32

    def _centred(self, name: str, dtype: torch.dtype, one: _Made) -> Tensor:
        store = self._stores.pop(name)
        values = store.values[: store.n_rows].to(dtype)
        if words := non_finite(values):
            one.trouble = f"is {words}"
            return values
        features, largest = centre(values, in_place=True)
        if not largest:
            one.trouble = CONSTANT
        one.exponent = exponent(largest)
        return features.mul_(2.0**-one.exponent) if one.exponent else features

    def _gram(self, features: Tensor, one: _Made, out: Tensor) -> None:
        if not self._choice.fraction:
            gram(features, out)
        else:
            width = self._choice.fraction * median_distance(
                squared_distances(features, out), self._choice.seed
            )
            if not width:
                one.trouble = EQUAL
                return
            rbf(out, width)
            one.width = math.ldexp(width, one.exponent)
        one.fourth = fourth_power(out, of_rbf=bool(self._choice.fraction))
        centre_gram(out, unbiased=self._unbiased)


@dataclass
class _Made:
    """What became of a layer: its scale, the width of its kernel, and why there is none."""

    exponent: int = 0
    width: float = 0.0
    fourth: float = 0.0
    trouble: str = ""


def _drop_alone(kernels: Kernels, made: list[_Made]) -> list[bool]:
    """Which layers have no HSIC with themselves to divide by; it becomes NaN."""
    grams = kernels.gram is not None
    fourth = kernels.total.new_tensor([one.fourth for one in made])
    if not grams:
        fourth = kernels.diagonal.square().sum(0)
    alone = vanishes(kernels.total, fourth, kernels.n_rows, kernels.dtype, grams=grams)
    kernels.total[alone] = torch.nan
    return [bool(one) for one in alone]


class _EnoughError(Exception):
    """The first samples have passed."""


def _median_widths(activations: Activations, choice: Choice) -> tuple[dict[str, float], bool]:
    """σ of each layer from at most `SAMPLE` random samples, and whether the pass ended with them."""
    widths: dict[str, float] = {}

    def consume(block: Block) -> None:
        _check_rows(block)
        if block.start > 0:
            raise _EnoughError
        if non_finite(block.values):
            return
        features, largest = centre(block.values)
        power = exponent(largest)
        squared = squared_distances(features.mul_(2.0**-power))
        widths[block.layer] = math.ldexp(choice.fraction * median_distance(squared, choice.seed), power)

    try:
        activations.stream(
            consume, layers=choice.layers, maps=choice.maps, sequences=choice.sequences,
            minibatch=SAMPLE, seed=choice.seed,
        )  # fmt: skip
    except _EnoughError:
        return widths, True
    return widths, False


def _check_rows(block: Block) -> None:
    if block.sample is not None:
        raise OptionError(
            f"{block.layer}: with --minibatch a row is a sample, and here it is one of several "
            f"({block.treatment}).",
            "Leave --minibatch out, or choose other --maps and --sequences.",
        )


def in_minibatches(
    activations: Activations, choice: Choice, take: Callable[[BatchKernels], None]
) -> Representation:
    """One pass over the data in minibatches, whose kernels go to `take` as they are made.

    Raises:
        OptionError: If they need more memory than allowed, or rows are not samples.
    """
    widths, stopped = _median_widths(activations, choice) if choice.fraction else (None, False)
    before, n = activations.forwards, activations.n_samples
    recorder = MinibatchRecorder(take, splits_of(math.ceil(n / choice.minibatch)), choice.seed, widths)
    width, treatment, trouble = dict[str, int](), dict[str, str](), dict[str, str]()

    def consume(block: Block) -> None:
        _check_rows(block)
        if block.start > 0 and block.layer == next(iter(width)):
            _check_memory(activations.label, choice, n, len(width))
        width[block.layer], treatment[block.layer] = block.values.shape[1], block.treatment
        if not recorder.add(block.layer, block.start, block.values):
            words = non_finite(block.values) or "too large for its precision"
            trouble.setdefault(block.layer, f"is {words} of a minibatch")

    activations.stream(
        consume, layers=choice.layers, maps=choice.maps, sequences=choice.sequences,
        minibatch=choice.minibatch, seed=choice.seed,
    )  # fmt: skip
    if stopped:  # a pass over a part of the data counts as one, where there was a network to run
        activations.forwards += activations.forwards - before
    for layer, alone in zip(recorder.layers, recorder.finish(), strict=True):
        if layer in trouble:
            continue
        if layer not in recorder.exponent:
            trouble[layer] = CONSTANT
        elif widths is not None and not widths[layer]:
            trouble[layer] = EQUAL
        elif alone:
            trouble[layer] = FLAT if choice.fraction else ALONE
    linear = widths is None
    return Representation(
        recorder.layers,
        list(treatment.values()),
        list(width.values()),
        [n] * len(width),
        [recorder.exponent.get(layer, 0) if linear else 0 for layer in recorder.layers],
        [] if widths is None else [widths.get(layer, 0.0) for layer in recorder.layers],
        [trouble.get(layer, "") for layer in recorder.layers],
    )


def _check_memory(label: str, choice: Choice, n_samples: int, n_layers: int) -> None:
    need = 4.0 * n_samples * choice.minibatch * n_layers
    if need > choice.memory * GIGABYTE:
        raise OptionError(
            f"{label}: {n_layers} layers in minibatches of {choice.minibatch} take "
            f"{need / 1e6:.3g} MB a pair, more than --memory {choice.memory:g} GB allows.",
            "Give a smaller --minibatch, fewer --samples, fewer --layers, or more --memory.",
        )
