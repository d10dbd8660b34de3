"""Centred kernel alignment: how similar the representations of two checkpoints are, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers import Measurement, Range, Setting, Var, analyzer
from dynprobe.analyzers._cka import BANDWIDTH, GIGABYTE, Choice, Representation, Rows, check_choice, troubles
from dynprobe.analyzers._cka_record import in_minibatches, represent
from dynprobe.analyzers._sampling import check_seed, subset_note
from dynprobe.analyzers._similarity import (
    SUMMARY_RETURNS,
    common_layers,
    effects_of_deletions,
    same_layer,
    stimulus_blocks,
    summary,
)
from dynprobe.analyzers._similarity_figure import similarity_figure
from dynprobe.analyzers.core.activations import as_activations, check_comparable
from dynprobe.analyzers.numerics.hsic_chance import mean_over_orders
from dynprobe.analyzers.numerics.hsic_compare import compare
from dynprobe.analyzers.numerics.hsic_minibatch import MinibatchTerms

Floats = NDArray[np.float64]

PAIR = ("layer_a", "layer_b")


def _of_a(what: str, units: str = "", optional: bool = False) -> Var:
    return Var(("layer_a",), units, f"{what}, first checkpoint", "", optional)


def _of_b(what: str, units: str = "", optional: bool = False) -> Var:
    return Var(("layer_b",), units, f"{what}, second checkpoint", "", optional)


RETURNS = {
    "cka": Var(PAIR, "", "Centred kernel alignment, 1 for identical representations", "cka_stderr"),
    "cka_stderr": Var(PAIR, "", "Jackknife standard error over samples"),
    "cka_chance": Var(PAIR, "", "Its mean for samples in random order"),
    "excess": Var(PAIR, "", "(cka − chance)/(1 − chance)"),
    "hsic": Var(PAIR, "", "Hilbert-Schmidt independence criterion between the layers"),
    "hsic_a": _of_a("HSIC of the layer with itself"),
    "hsic_b": _of_b("HSIC of the layer with itself"),
    "gram_trace_a": _of_a("Trace of the centred kernel matrix", optional=True),
    "gram_trace_b": _of_b("Trace of the centred kernel matrix", optional=True),
    "bandwidth_a": _of_a("Width σ of the RBF kernel", "activation", optional=True),
    "bandwidth_b": _of_b("Width σ of the RBF kernel", "activation", optional=True),
    "minibatch_deviation": Var(
        PAIR, "", "Standard deviation of cka in minibatches about that of all samples", optional=True
    ),
    "layer_a": _of_a("Layer"),
    "layer_b": _of_b("Layer"),
    "n_samples": Var((), "", "Samples"),
    "n_rows_a": _of_a("Rows of the layer: samples, or positions of samples"),
    "n_rows_b": _of_b("Rows of the layer: samples, or positions of samples"),
    "n_features_a": _of_a("Features of the layer"),
    "n_features_b": _of_b("Features of the layer"),
    "treatment_a": _of_a("What was done to the layer's output"),
    "treatment_b": _of_b("What was done to the layer's output"),
    "input_hash": Var((), "", "Hash of the inputs and their order"),
    "same_layer": Var(
        (), "", "Fraction of layers most similar to the layer of the same name", "same_layer_stderr"
    ),
    "same_layer_stderr": Var((), "", "Standard error over samples"),
    "layer": Var(("layer",), "", "Layer of both networks", optional=True),
    "block_effect": Var(
        ("layer", "block"), "", "What each block of samples adds to cka of the layer", optional=True
    ),
}


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    """A checkpoint is run once, however many pairs it stands in; consecutive pairs add one each."""
    del n_checkpoints
    widths_first = options.get("kernel") == "rbf" and options.get("minibatch", 0)
    return {"forwards": 2 if widths_first else 1}


@analyzer(
    returns=RETURNS,
    figure=similarity_figure("cka", "CKA"),
    table=("cka", "cka_chance", "same_layer"),
    matrix="cka",
    cost=_cost,
    summary=summary("cka"),
    summary_of="call",
    summary_returns=SUMMARY_RETURNS,
)
def cka(
    activations_a: Any,
    activations_b: Any,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    estimator: Literal["unbiased", "biased"] = "unbiased",
    bandwidth: Annotated[float, Range(min=0)] = BANDWIDTH,
    minibatch: Annotated[int, Range(min=0)] = 0,
    layers: str = "auto",
    maps: Literal["average", "flatten", "positions"] = "flatten",
    sequences: Literal["last", "mean", "first", "flatten", "per-step", "token"] = "mean",
    memory: Annotated[float, Range(min=0), Setting()] = 4.0,
    seed: int = 0,
    permutations: Annotated[int, Range(min=1), Setting()] = 10000,
    bootstrap: Annotated[int, Range(min=2), Setting()] = 2000,
    level: Annotated[float, Range(min=0, max=1), Setting()] = 0.9,
) -> Measurement:
    """Centred kernel alignment: how similar the representations of two checkpoints are, layer by layer.

    CKA = HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)) with the kernels K = X Xᵀ and L = Y Yᵀ of two layers on the
    same samples (Kornblith et al. 2019, eq. 4): 1 for representations equal up to rotation, scale and shift,
    0 on average for unrelated ones when HSIC is estimated without bias (Song et al. 2012, eq. 5), if rows are
    samples; `cka_chance` has the exact mean over orders of the samples. Nothing is clamped: the unbiased
    estimate can be slightly negative. The jackknife standard error is an upper estimate, about √2 times too
    large for unrelated or very wide layers.

    Cost: one forward pass per checkpoint whatever the number of pairs (a second one over at most 512 samples
    for σ of the rbf kernel in minibatches), and the products of n samples with each other, n²ΣD, or of
    features with each other, whichever are fewer.

    Args:
        activations_a: Those of the first checkpoint; in a notebook an array (n_samples, n_features), a dict
            of arrays by layer, or (model, batches).
        activations_b: Of the second, on the same inputs in the same order.
        kernel: linear, or rbf: exp(−distance²/(2σ²)).
        estimator: unbiased, or biased as in the first papers; its floor at chance is reported beside.
        bandwidth: σ of the rbf kernel over the layer's median distance between samples, from 1e-6 to 1e6.
        minibatch: Samples per minibatch, for which HSIC is summed with little memory; 0 takes all at once.
        layers: auto, all, or names and globs separated by commas.
        maps: What becomes of convolutional maps: flatten, average over positions, or positions as samples.
        sequences: What becomes of sequences: last, mean or first position, flatten, per-step, or every token
            as a sample.
        memory: Gigabytes for what is kept of the checkpoints.
        seed: Of blocks of samples, minibatches and random draws.
        permutations: Permutations of networks between groups; all where there are no more.
        bootstrap: Draws of networks and samples for errors of groups.
        level: Similarity to the last checkpoint that counts as converged (`--against final`).

    Returns:
        cka with its standard error, chance level and the terms it is made of, (layer_a, layer_b).

    Raises:
        OptionError: If the inputs differ, there are fewer than 4 samples, memory does not suffice, or
            options contradict each other.

    References:
        Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited", ICML
        2019. Song, Smola, Gretton, Bedo and Borgwardt, "Feature Selection via Dependence Maximization", JMLR
        13 (2012). Nguyen, Raghu and Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021.
    """
    del permutations, bootstrap, level  # of the summary, which reads them from the result
    check_seed(seed)
    a, b = as_activations(activations_a), as_activations(activations_b)
    notes = [*subset_note(a), *check_comparable(a, b)]
    choice = Choice(
        layers, maps, sequences, kernel, estimator, bandwidth,
        minibatch if minibatch < a.n_samples else 0, memory, seed,
    )  # fmt: skip
    check_choice(choice, a.n_samples)
    before = a.forwards + (b.forwards if b is not a else 0)
    limit = memory * GIGABYTE
    first = a.remembered(("cka", choice), lambda: represent(a, choice), limit=limit)
    batches = MinibatchTerms(first.minibatch)

    def represent_second() -> Representation:
        if choice.minibatch and (b is not activations_b or not b.again):
            raise _NotKeptError
        return represent(b, choice)

    try:
        same = a is b or a.key == b.key
        second = first if same else b.remembered(("cka", choice), represent_second, limit=limit)
    except _NotKeptError:  # no other pair asks for its kernels: they are compared as they are made
        second = in_minibatches(b, choice, batches.add)
    pair = _Pair(first, second, choice, a.n_samples)
    if choice.minibatch:
        for batch in second.minibatch:
            batches.add(batch)
        pair.in_minibatches(batches)
    else:
        pair.in_full()
        if minibatch:
            pair.deviation = np.where(np.isnan(pair.value), np.nan, 0.0)
    return Measurement(
        {"n_samples": a.n_samples, "input_hash": a.input_hash or b.input_hash, **pair.results()},
        spent={"forwards": a.forwards + (b.forwards if b is not a else 0) - before},
        notes=list(
            dict.fromkeys([*notes, *troubles(a.label, first), *troubles(b.label, second), *pair.notes])
        ),
    )


class _NotKeptError(Exception):
    """Kernels are not there, and are not worth keeping."""


class _Pair:
    """The layers of two networks against each other; NaN until it is known."""

    def __init__(self, a: Representation, b: Representation, choice: Choice, n_samples: int) -> None:
        self._a, self._b, self._choice, self._n_samples = a, b, choice, n_samples
        shape = (len(a.layers), len(b.layers))
        self.value, self.stderr, self.chance, self.hsic = (np.full(shape, np.nan) for _ in range(4))
        self.own = [np.full(size, np.nan) for size in shape]
        self.trace = [np.full(size, np.nan) for size in shape]
        self.effect = np.full((*shape, 0), np.nan)
        self.deviation: Floats | None = None
        self.notes: list[str] = []

    def in_full(self) -> None:
        """All samples at once, for all layers whose rows are the same things."""
        blocks = torch.as_tensor(stimulus_blocks(self._n_samples, self._choice.seed))
        self.effect = np.full((*self.value.shape, int(blocks.max()) + 1), np.nan)
        unbiased, unmatched = self._choice.unbiased, 0
        for side, representation in enumerate((self._a, self._b)):
            for rows in representation.rows:
                n = rows.kernels.n_rows
                norm = n * (n - 3.0) if unbiased else (n - 1.0) ** 2
                self.own[side][rows.index] = rows.kernels.total.cpu().numpy() / norm
                self.trace[side][rows.index] = rows.kernels.diagonal.sum(0).cpu().numpy()
        for first in self._a.rows:
            for second in self._b.rows:
                if not first.matches(second):
                    unmatched += len(first.index) * len(second.index)
                    continue
                at, n = np.ix_(first.index, second.index), first.kernels.n_rows
                found = compare(first.kernels, second.kernels, blocks, first.sample)
                self.value[at], self.stderr[at], self.effect[at] = found.value, found.stderr, found.effect
                self.hsic[at] = found.total / (n * (n - 3.0) if unbiased else (n - 1.0) ** 2)
                self.chance[at] = self._chance(first, second)
        if unmatched:
            self.notes.append(
                f"{unmatched} pairs of layers have different positions, so that rows do not correspond; "
                "their similarities are NaN"
            )

    def _chance(self, a: Rows, b: Rows) -> Floats | float:
        if a.blocks is None or b.blocks is None:
            self.notes.append(
                "samples have different numbers of rows, so that they cannot change places: cka_chance and "
                "excess are NaN"
            )
            return math.nan
        scale = torch.outer(a.kernels.total.sqrt(), b.kernels.total.sqrt())
        chance: Floats = (mean_over_orders(a.blocks, b.blocks) / scale).cpu().numpy()
        return chance

    def in_minibatches(self, terms: MinibatchTerms) -> None:
        """HSIC summed over minibatches; their errors from leaving one out."""
        self.deviation = terms.deviation().cpu().numpy()
        cross, own_a, own_b = (
            torch.stack(term).cpu().numpy() for term in (terms.cross, terms.own_a, terms.own_b)
        )
        good_a, good_b = (np.array([not why for why in r.trouble]) for r in (self._a, self._b))
        with np.errstate(divide="ignore", invalid="ignore"):
            self.value = cross.sum(0) / np.sqrt(np.outer(own_a.sum(0), own_b.sum(0)))
            rest_a, rest_b = own_a.sum(0) - own_a, own_b.sum(0) - own_b
            deleted = (cross.sum(0) - cross) / np.sqrt(rest_a[:, :, None] * rest_b[:, None, :])
        self.effect = effects_of_deletions(np.moveaxis(deleted, 0, -1))
        self.stderr = np.sqrt((self.effect**2).sum(-1))
        self.hsic, self.own = cross.mean(0), [own_a.mean(0), own_b.mean(0)]
        self.chance = np.zeros(self.value.shape)
        for values in (self.value, self.stderr, self.deviation, self.hsic, self.chance, self.effect):
            values[~np.outer(good_a, good_b)] = np.nan
        for side, representation in enumerate((self._a, self._b)):
            self.own[side][[bool(why) for why in representation.trouble]] = np.nan
        self.notes.append(
            f"{len(cross)} minibatches of at most {max(batch.size for batch in self._a.minibatch)} samples"
        )

    def results(self) -> dict[str, Any]:
        """Everything that `cka` declares of a pair."""
        a, b = self._a, self._b
        fraction, fraction_stderr = same_layer(self.value, self.effect, a.layers, b.layers, self._choice.seed)
        scale = [2.0 ** (2.0 * np.array(r.exponent)) for r in (a, b)]
        found = {
            "cka": self.value,
            "cka_stderr": self.stderr,
            "cka_chance": self.chance,
            "excess": (self.value - self.chance) / (1 - self.chance),
            "hsic": self.hsic * np.outer(*scale),
            "same_layer": fraction,
            "same_layer_stderr": fraction_stderr,
        }
        for side, (half, r) in enumerate(zip("ab", (a, b), strict=True)):
            found[f"hsic_{half}"] = self.own[side] * scale[side] ** 2
            found[f"layer_{half}"] = np.array(r.layers, dtype=object)
            found[f"treatment_{half}"] = np.array(r.treatment, dtype=object)
            found[f"n_features_{half}"] = np.array(r.width)
            found[f"n_rows_{half}"] = np.array(r.n_rows)
            if not self._choice.unbiased:
                found[f"gram_trace_{half}"] = self.trace[side] * scale[side]
            if self._choice.kernel == "rbf":
                why = np.array([bool(text) for text in r.trouble])
                found[f"bandwidth_{half}"] = np.where(why, math.nan, r.bandwidth)
        if self.deviation is not None:
            found["minibatch_deviation"] = self.deviation
        if names := common_layers(a.layers, b.layers):
            at = [a.layers.index(name) for name in names], [b.layers.index(name) for name in names]
            found["layer"] = np.array(names, dtype=object)
            found["block_effect"] = self.effect[at].astype(np.float32)
        return found
