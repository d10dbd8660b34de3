"""The parts of an embedding measurement: the chain of wider networks, each one's gradient and curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._embedding_double import check_double
from dynprobe.analyzers._embedding_inertia import Inertia, count, dense_inertia, lower_end
from dynprobe.analyzers.numerics.embedding import add_null, split, split_directions, widened_gradient
from dynprobe.analyzers.numerics.evaluate import Batch, call, evaluate, map_tensors, move
from dynprobe.analyzers.numerics.hidden_layer import CannotSplit, Hidden, find_hidden, layers_in_order
from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.params import private_copy

SAME = 1e-9
"""Relative difference of the outputs up to which a wider network is the same function, in float64."""
FEW = 8
"""Samples that show which layer reads which."""
SPLITTABLE = (
    "A neuron can be split if one further linear layer or convolution reads it, past activations and "
    "BatchNorm; not in recurrent layers, attention or at a skip connection."
)
NULL_KINDS = ("null", "null-zero")


class InDouble:
    """The batches in float64, converted as they are walked.

    Args:
        batches: Re-iterable.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self._batches:
            yield move(inputs, None, torch.float64), targets


@dataclass(frozen=True)
class Widening:
    """How the network is made wider.

    Args:
        kind: one-step, multi-step, null or null-zero.
        layer: Whose neurons; empty for the last layer that can be split.
        neuron: The first to be split; negative to draw it.
        alpha: The copy's part of the outgoing weights.
        count: Neurons to add.
        seed: Of neurons and weights that are drawn.
    """

    kind: str
    layer: str
    neuron: int
    alpha: float
    count: int
    seed: int


@dataclass
class Chain:
    """The networks from the narrow to the widest, one neuron more at each step, and what is found of them.

    Args:
        model: The checkpoint's network, not changed: everything is done on a copy in float64.
        batches: The data.
        loss: The loss.
        widening: What is done.
        max_dense: Most parameters for which all eigenvalues are computed.
        smallest: Eigenvalues that Lanczos looks for where there are more; 0 for none.
        zero_tol: Relative size of an eigenvalue that counts as zero.
        progress: Called with (done, total, what), or None.
    """

    model: nn.Module
    batches: Any
    loss: Loss
    widening: Widening
    max_dense: int
    smallest: int
    zero_tol: float
    progress: Callable[[int, int, str], None] | None = None
    spent: dict[str, int] = field(default_factory=lambda: {"forwards": 0, "gradients": 0, "hvps": 0})
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = InDouble(self.batches)
        self.narrow = private_copy(self.model).double()
        for parameter in self.narrow.parameters():
            parameter.requires_grad_()
        self.few = map_tensors(lambda tensor: tensor[:FEW].clone(), next(iter(self.data))[0])
        check_double(self.narrow, self.few)
        self.generator = torch.Generator().manual_seed(self.widening.seed)
        self.hidden, self.first = self._choose()

    def _choose(self) -> tuple[Hidden, int]:
        wanted, errors = self.widening.layer, []
        names = layers_in_order(self.narrow, self.few)
        for name in [wanted] if wanted else reversed(names[:-1]):
            try:
                neuron = self._neuron(name)
                hidden = find_hidden(self.narrow, self.few, name, neuron)
                self._check_same(split(self.narrow, hidden, neuron, 0.5), name)
            except CannotSplit as error:
                errors.append(str(error))
            else:
                return hidden, neuron
        others = ", ".join(names[:-1])
        raise OptionError(
            f"{errors[0]}." if errors else "the network has no hidden linear layer or convolution.",
            f"Give --layer one of: {others}." if wanted and others else SPLITTABLE,
        )

    def _neuron(self, name: str) -> int:
        """The neuron asked for, or one drawn the same whichever layers were tried before."""
        layer = dict(self.narrow.named_modules()).get(name)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            return 0
        width = weight.shape[0]
        if self.widening.neuron >= width:
            raise OptionError(
                f"layer {name!r} has {width} neurons, none has the number {self.widening.neuron}.",
                f"Give --neuron 0 to {width - 1}.",
            )
        if self.widening.neuron >= 0:
            return self.widening.neuron
        self.generator.manual_seed(self.widening.seed)
        return int(torch.randint(width, (), generator=self.generator))

    def _check_same(self, wide: nn.Module, name: str) -> None:
        """Whether the wide network runs, and computes the same: a second reader of the neurons shows here."""
        with torch.no_grad():
            expected = call(self.narrow, self.few)
            try:
                found = call(wide, self.few)
            except RuntimeError as error:
                raise CannotSplit(
                    f"the neurons of layer {name!r} are read in a second place (a skip connection?)"
                ) from error
        if not float((found - expected).abs().max()) <= SAME * float(expected.abs().max()):
            raise CannotSplit(
                f"the network is another function when a neuron of layer {name!r} is split: "
                "something but its reader depends on how many neurons there are"
            )

    def measure(self) -> dict[str, Any]:
        """All networks of the chain; arrays with one entry a network, the narrow one first."""
        model, gradient = self.narrow, Tensor()
        rows: list[dict[str, Any]] = []
        added: list[Inertia | None] = []
        for step in range(self.widening.count + 1):
            row: dict[str, Any] = {"neuron": math.nan}
            if step and self.widening.kind in NULL_KINDS:
                random = self.generator if self.widening.kind == "null" else None
                model = add_null(model, self.hidden, random)
            elif step:
                row["neuron"] = self.first if step == 1 else self._next(step)
                expected = self._expected_gradient(model, gradient, row["neuron"])
                model = split(model, self.hidden, row["neuron"], self.widening.alpha)
            operator = self._operator(model)
            gradient = operator.gradient()
            self.spent["gradients"] += 1
            row |= self._outputs(model) | {"gradient_norm": float(gradient.norm())}
            row["n_parameters"] = operator.n_parameters
            row["gradient_residual"] = math.nan
            if step and self.widening.kind not in NULL_KINDS:
                row["gradient_residual"] = float((gradient - expected).norm())
            row |= self._curvature(operator, model, row["neuron"], added)
            operator.release()
            rows.append(row)
            if self.progress is not None:
                self.progress(step + 1, self.widening.count + 1, "networks")
        return _raised(_columns(rows) | _predicted(rows, added))

    def _next(self, step: int) -> int:
        """Of all neurons so far, copies included."""
        return int(torch.randint(self.hidden.width + step - 1, (), generator=self.generator))

    def _operator(self, model: nn.Module, names: list[str] | None = None) -> HessianOperator:
        operator = HessianOperator(model, self.data, self.loss, parameters=names)
        operator.on_product = self._count
        return operator

    def _count(self) -> None:
        self.spent["hvps"] += 1

    def _expected_gradient(self, model: nn.Module, gradient: Tensor, neuron: int) -> Tensor:
        parameters = dict(model.named_parameters())
        pieces = torch.split(gradient, [parameter.numel() for parameter in parameters.values()])
        named = {n: g.view_as(p) for (n, p), g in zip(parameters.items(), pieces, strict=True)}
        wide = widened_gradient(named, self.hidden, neuron, self.widening.alpha)
        return torch.cat([wide[name].flatten() for name in parameters])

    def _outputs(self, model: nn.Module) -> dict[str, float]:
        """Loss, and how far the outputs are from those of the narrow network."""
        own = evaluate(model, self.data, self.loss)["loss"]
        difference = scale = 0.0
        with torch.no_grad():
            for inputs, _ in self.data:
                expected, found = call(self.narrow, inputs), call(model, inputs)
                difference = max(difference, float((found - expected).abs().max()))
                scale = max(scale, float(expected.abs().max()))
        self.spent["forwards"] += 3
        return {
            "loss": own.value,
            "loss_stderr": own.stderr,
            "output_difference": difference,
            "output_relative_difference": difference / scale if scale else difference,
        }

    def _curvature(
        self, operator: HessianOperator, model: nn.Module, neuron: float, added: list[Inertia | None]
    ) -> dict[str, Any]:
        n = operator.n_parameters
        found: Inertia | None = None
        if n <= self.max_dense:
            found = dense_inertia(operator, self.zero_tol)
        elif self.smallest:
            found = lower_end(operator, min(self.smallest, n), self.zero_tol, self.widening.seed)
            if not found.converged:
                self.reasons.append("the smallest eigenvalues missed their tolerance")
        added.append(self._added(model, int(neuron), found) if neuron == neuron else None)
        if found is None:
            return {}
        return {
            "negative": found.negative,
            "negative_is_bound": int(found.is_bound),
            "zero": found.zero,
            "positive": found.positive,
            "zero_tolerance": found.tolerance,
            "smallest": found.smallest,
            "smallest_error": found.smallest_error,
            "smallest_nonzero": found.smallest_nonzero,
            "eigenvalue": found.eigenvalue,
        }

    def _added(self, model: nn.Module, neuron: int, found: Inertia | None) -> Inertia | None:
        """Signs of the block that the split adds; its zeros are measured on the scale of the whole matrix."""
        directions = split_directions(model, self.hidden, neuron, self.widening.alpha)
        size = len(directions.entries)
        if size > self.max_dense:
            if self.max_dense:
                self.notes.append(
                    f"the eigenvalues that the split adds are those of a matrix of {size:,} rows: "
                    f"--max-dense {size} computes them"
                )
            return None
        block = np.linalg.eigvalsh(directions.block(self._operator(model, directions.names).matvec).numpy())
        own = self.zero_tol * float(np.abs(block).max())
        return count(block, found.tolerance if found is not None else own)


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One array per name; eigenvalues are padded with NaN."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "eigenvalue"]
    found: dict[str, Any] = {n: np.array([float(row.get(n, math.nan)) for row in rows]) for n in names}
    for name in ("neuron", "gradient_residual"):  # of a split, of which the narrow network is none
        found[name] = found[name][1:]
    spectra = [row.get("eigenvalue", np.zeros(0)) for row in rows]
    if any(len(spectrum) for spectrum in spectra):
        table = np.full((len(rows), max(len(spectrum) for spectrum in spectra)), np.nan)
        for line, spectrum in zip(table, spectra, strict=True):
            line[: len(spectrum)] = spectrum
        found["eigenvalue"] = table
    return found


def _predicted(rows: list[dict[str, Any]], added: list[Inertia | None]) -> dict[str, Any]:
    """Counts of the narrow network plus those of every block, by Sylvester's law."""
    found: dict[str, Any] = {}
    if all(block is not None for block in added[1:]):
        found["block_eigenvalue"] = np.stack([block.eigenvalue for block in added[1:] if block is not None])
    for sign in ("negative", "zero", "positive"):
        steps = np.array([math.nan if block is None else float(getattr(block, sign)) for block in added[1:]])
        start = math.nan if rows[0].get("negative_is_bound", 1) else float(rows[0][sign])
        found[f"added_{sign}"] = steps
        found[f"predicted_{sign}"] = start + np.cumsum([0.0, *steps])
    return found


def _raised(values: dict[str, Any]) -> dict[str, Any]:
    """The values with every lower bound of the negative eigenvalues no less than those a split has added."""
    if "negative" not in values:
        return values
    added = np.cumsum([0.0, *values["added_negative"]])
    known = (values["negative_is_bound"] == 1) & np.isfinite(added)
    least = np.fmax(values["negative"], values["negative"][0] + added)
    return values | {"negative": np.where(known, least, values["negative"])}
