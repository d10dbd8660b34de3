"""Turns the activations of a checkpoint into the kernels that `cka` compares, in one pass over the data."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._cka import GIGABYTE, Choice, Representation, Rows
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.numerics.activations import Block
from dynprobe.analyzers.numerics.hsic import (
    Kernels,
    centre,
    centre_gram,
    exponent,
    fourth_power,
    from_features,
    from_grams,
    gram,
    rbf,
    vanishes,
)
from dynprobe.analyzers.numerics.hsic_minibatch import MinibatchRecorder
from dynprobe.analyzers.numerics.hsic_plan import Plan, plan

log = logging.getLogger("dynprobe")

CONSTANT = "is constant over the samples"
ALONE = "differs from sample to sample in too few of them for an unbiased estimate"
EQUAL = "is equal on most pairs of samples, so that the median distance is 0"


def represent(activations: Activations, choice: Choice) -> Representation:
    """One pass over the data; kernels of every layer.

    Raises:
        OptionError: If they need more memory than allowed.
    """
    if choice.minibatch:
        return _in_minibatches(activations, choice)
    collected = _Collected(activations, choice)
    activations.stream(collected.add, layers=choice.layers, maps=choice.maps, sequences=choice.sequences)
    return collected.finish()


class _Collected:
    """The features of all layers, batch after batch; stops early where they cannot fit."""

    def __init__(self, activations: Activations, choice: Choice) -> None:
        self._label, self._n_samples, self._choice = activations.label, activations.n_samples, choice
        self._parts: dict[str, list[Block]] = {}
        self._first = 0

    def add(self, block: Block) -> None:
        """Takes a copy of one layer on one batch."""
        if block.start > 0 and not self._first:
            self._first = block.start
            self._plans(self._n_samples / block.start)
        kept = Block(block.layer, block.start, block.values.clone(), block.sample, block.treatment)
        self._parts.setdefault(block.layer, []).append(kept)

    def _plans(self, scale: float = 1.0) -> list[tuple[list[str], Plan]]:
        """Layers by what their rows are, and how to compare them; `scale` for the batches to come."""
        groups: dict[tuple[str, int], list[str]] = {}
        for name, parts in self._parts.items():
            kind = "" if parts[0].sample is None else parts[0].treatment
            groups.setdefault((kind, sum(len(part.values) for part in parts)), []).append(name)
        left, plans = self._choice.memory * GIGABYTE, []
        for (_kind, n_rows), names in groups.items():
            values = [self._parts[name][0].values for name in names]
            found = plan(
                round(n_rows * scale),
                [value.shape[1] for value in values],
                left,
                itemsize=max(4, *(value.element_size() for value in values)),
                gram=self._choice.kernel == "rbf",
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
        names = list(self._parts)
        first = [self._parts[name][0] for name in names]
        n_rows = [sum(len(part.values) for part in self._parts[name]) for name in names]
        made = {name: _Made() for name in names}
        rows = []
        for members, found in self._plans():
            log.debug("%s: %s", self._label, found.sentence)
            samples = [part.sample for part in self._parts[members[0]] if part.sample is not None]
            grams = found.formulation == "gram"
            kernels = self._kernels({name: made[name] for name in members}, grams=grams)
            if kernels is not None:
                there = [name for name in members if not made[name].trouble]
                index = [names.index(name) for name in there]
                for name, alone in zip(there, _drop_alone(kernels, [made[n] for n in there]), strict=True):
                    made[name].trouble = ALONE if alone else ""
                kind = first[index[0]].treatment if samples else ""
                rows.append(Rows(index, kind, torch.cat(samples) if samples else None, kernels))
        rbf_kernel = self._choice.kernel == "rbf"
        return Representation(
            names,
            [block.treatment for block in first],
            [block.values.shape[1] for block in first],
            n_rows,
            [0 if rbf_kernel else one.exponent for one in made.values()],
            [one.width for one in made.values()] if rbf_kernel else [],
            [one.trouble for one in made.values()],
            rows,
        )

    def _kernels(self, made: dict[str, _Made], *, grams: bool) -> Kernels | None:
        """Centred kernels of layers on the same rows, put side by side; None where all are constant."""
        values = [self._parts[name][0].values for name in made]
        dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
        total = sum(v.shape[1] for v in values)
        del values
        kept: Tensor | None = None
        widths: list[int] = []
        for name, one in made.items():
            features = self._centred(name, dtype, one)
            if one.trouble:
                continue
            n, at = len(features), sum(widths)
            if kept is None:
                kept = features.new_empty((n, len(made), n) if grams else (n, total))
            if not grams:
                kept[:, at : at + features.shape[1]] = features
            else:
                kernel = self._gram(features, one)
                if one.trouble:
                    continue
                kept[:, len(widths)] = kernel
            widths.append(features.shape[1])
        if kept is None or not widths:
            return None
        if grams:
            return from_grams(kept[:, : len(widths)], widths, unbiased=self._choice.unbiased)
        return from_features(kept[:, : sum(widths)], widths, unbiased=self._choice.unbiased)

    def _centred(self, name: str, dtype: torch.dtype, one: _Made) -> Tensor:
        values = torch.cat([part.values for part in self._parts.pop(name)]).to(dtype)
        features, largest = centre(values)
        if not largest:
            one.trouble = CONSTANT
        one.exponent = exponent(largest)
        return features.mul_(2.0**-one.exponent)

    def _gram(self, features: Tensor, one: _Made) -> Tensor:
        if self._choice.fraction:
            kernel, width = rbf(features, self._choice.fraction, self._choice.seed)
            one.width = math.ldexp(width, one.exponent)
            one.trouble = "" if width else EQUAL
        else:
            kernel = gram(features)
        one.fourth = fourth_power(kernel, of_rbf=bool(self._choice.fraction))
        return centre_gram(kernel, unbiased=self._choice.unbiased)


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
    held = kernels.gram if kernels.gram is not None else kernels.features
    assert held is not None
    alone = vanishes(kernels.total, fourth, kernels.n_rows, held.dtype, grams=grams)
    kernels.total[alone] = torch.nan
    return [bool(one) for one in alone]


def _in_minibatches(activations: Activations, choice: Choice) -> Representation:
    recorder = MinibatchRecorder(choice.fraction)
    width, treatment = dict[str, int](), dict[str, str]()
    n = activations.n_samples

    def consume(block: Block) -> None:
        if block.sample is not None:
            raise OptionError(
                f"{block.layer}: with --minibatch a row is a sample, and here it is one of several "
                f"({block.treatment}).",
                "Leave --minibatch out, or choose other --maps and --sequences.",
            )
        if block.start > 0 and block.layer == next(iter(width)):
            need = 4.0 * n * choice.minibatch * len(width)
            if need > choice.memory * GIGABYTE:
                raise OptionError(
                    f"{activations.label}: {len(width)} layers in minibatches of {choice.minibatch} take "
                    f"{need / 1e6:.3g} MB a pair, more than --memory {choice.memory:g} GB allows.",
                    "Give a smaller --minibatch, fewer --samples, fewer --layers, or more --memory.",
                )
        width[block.layer], treatment[block.layer] = block.values.shape[1], block.treatment
        recorder.add(block.layer, block.start, block.values)

    activations.stream(
        consume, layers=choice.layers, maps=choice.maps, sequences=choice.sequences,
        minibatch=choice.minibatch, seed=choice.seed,
    )  # fmt: skip
    kernels = recorder.finish()
    trouble = [""] * len(recorder.layers)
    for i in range(len(trouble)):
        if kernels.constant[i]:
            trouble[i] = CONSTANT
        elif choice.fraction and not kernels.width[i]:
            trouble[i] = EQUAL
        elif kernels.alone[i]:
            trouble[i] = ALONE
    return Representation(
        recorder.layers,
        list(treatment.values()),
        list(width.values()),
        [n] * len(trouble),
        kernels.exponent if choice.kernel == "linear" else [0] * len(trouble),
        kernels.width if choice.kernel == "rbf" else [],
        trouble,
        [],
        kernels,
    )
