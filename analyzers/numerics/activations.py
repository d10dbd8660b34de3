"""What the layers of a network compute on data, recorded in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import Batch, Inputs, map_tensors
from dynprobe.analyzers.numerics.input_samples import batch_size, input_hash, n_samples_of, recut
from dynprobe.analyzers.numerics.layer_choice import Plan, label, plan_layers, run
from dynprobe.analyzers.numerics.layouts import (
    LayerError,
    Side,
    Treated,
    check_treatments,
    padding_masks,
    take,
    treat,
)
from dynprobe.analyzers.numerics.params import frozen_eval

__all__ = [
    "Block",
    "Layer",
    "LayerError",
    "features",
    "input_hash",
    "n_samples_of",
    "non_finite",
    "record",
    "recut",
]


@dataclass(frozen=True)
class Layer:
    """One layer of one network on all samples.

    Attributes:
        values: (n_rows, n_features), float32 (float64 if the network is), not centred, where the network is.
        sample: Which sample each row belongs to, (n_rows,) int64; None: row i is sample i.
        treatment: How it became a matrix: "" where it was one; "flatten", "average", "positions 8x8", "last",
            "mean", "first", "per-step", "token"; and the type of a network in half precision.
    """

    values: Tensor
    sample: Tensor | None
    treatment: str

    @property
    def eps(self) -> float:
        """Precision of the type the network computed in, where it is not that of `values`; else 0."""
        return next((torch.finfo(t).eps for name, t in HALF.items() if self.treatment.endswith(name)), 0.0)


HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that are widened to float32."""


@dataclass(frozen=True)
class Block:
    """One batch of one layer.

    Attributes:
        layer: Name of the module; from its second call on `NAME#2`, …; per time step `NAME@0`, `NAME@1`, …
        start: Index of the batch's first sample.
        values: (rows, n_features); may share memory with the network: copy or reduce it at once.
        sample: Sample of each row, counted over all data; None: row i is sample `start + i`.
        treatment: As in `Layer`.
    """

    layer: str
    start: int
    values: Tensor
    sample: Tensor | None
    treatment: str


def record(
    model: nn.Module,
    batches: Iterable[Batch],
    consume: Callable[[Block], None],
    *,
    layers: str = "auto",
    maps: str = "flatten",
    sequences: str = "mean",
    allow_non_finite: bool = False,
) -> None:
    """Hand what the chosen layers compute to `consume`, batch by batch, from one forward pass over the data.

    A block is consumed inside the hook, before the network goes on: what an in-place operation makes of the
    tensor afterwards is not recorded. The network runs in eval mode, without TF32, and is left as it was.

    `auto` records every module with parameters of its own that does not normalise, and every block: a module
    with children that is not a plain `Sequential`, `ModuleList` or `ModuleDict`, unless it returns the very
    tensor that a recorded layer inside it returned. A network without layers is recorded itself, under the
    name of its class in lower case. `all` records every module but the network itself. Under both, and for a
    glob, what gives no row of numbers per sample is left out.

    Args:
        model: The network.
        batches: Iterable of `(inputs, targets)` with the sample as the first dimension of the inputs.
        consume: Called with each block.
        layers: `auto`, `all`, or names and globs separated by commas or spaces; `NAME#2` is a module's second
            call, `NAME@3` a time step.
        maps: What becomes of convolutional maps (n, C, …): `average` over positions, `flatten` to C·positions
            features, or `positions`, each a row of C features.
        sequences: What becomes of sequences (n, T, H): the `last`, `first` or `mean` of the steps that are no
            padding, `flatten` to T·H features, `per-step` a layer each, or `token`, each step a row.
            Padding is known from masks among named inputs (`layouts.padding_masks`) and packed sequences.
        allow_non_finite: Hand on NaN and infinite activations as they are, for `non_finite` to name, instead
            of an error for all layers.

    Raises:
        LayerError: A layer does not exist, never ran, has no sample dimension, changes its shape between
            batches, or has NaN or infinite activations.
    """
    check_treatments(maps, sequences)
    recorder: _Recorder | None = None
    with frozen_eval(model), _plain_arithmetic(), contextlib.ExitStack() as hooks:
        for inputs, _targets in batches:
            if recorder is None:
                recorder = _Recorder(plan_layers(model, inputs, layers), consume, maps, sequences)
                for name, module in recorder.plan.modules.items():
                    hooks.callback(module.register_forward_hook(recorder.hook(name)).remove)
            recorder.run(model, inputs)
    if recorder is None:
        raise LayerError("there are no samples.", "Give batches (inputs, targets).")
    if not allow_non_finite:
        recorder.check_finite()


@contextlib.contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """No gradients, no TF32, and no fused transformer layers, which run none of the modules inside them.

    `inference_mode` would be a little faster, but a network that caches a tensor (rotary embeddings) would be
    left with one that autograd refuses.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False
        ):  # fmt: skip
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Recorder:
    """Turns the outputs of hooked modules into blocks, and keeps count of them."""

    def __init__(self, plan: Plan, consume: Callable[[Block], None], maps: str, sequences: str) -> None:
        self.plan = plan
        self._consume = consume
        self._maps, self._sequences = maps, sequences
        self._start = self._n = 0
        self._masks: dict[Side, Tensor] = {}  # of this batch, and those that keep everything
        self._full: set[Side] = set()
        self._calls: dict[str, int] = {}
        self._seen: dict[str, tuple[int, str]] = {}  # of this batch: features and treatment by layer
        self._form: dict[str, tuple[int, str]] | None = None  # of the first batch
        self._broken: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}

    def run(self, model: nn.Module, inputs: Inputs) -> None:
        """Record one batch."""
        self._start += self._n
        self._n = batch_size(inputs)
        self._masks = padding_masks(inputs, self._n)
        self._full = {side for side, mask in self._masks.items() if bool(mask.all())}
        self._calls, self._seen = dict.fromkeys(self.plan.modules, 0), {}
        run(model, map_tensors(torch.clone, inputs) if self.plan.writes else inputs)
        if self._form is None:
            self._form = self._seen
        elif missing := self._form.keys() - self._seen.keys():
            raise _not_everywhere(min(missing))

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook for the module of this name."""

        def record_output(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self._calls[name] += 1
            layer = label(name, self._calls[name])
            if self._calls[name] > self.plan.calls[name]:
                raise LayerError(
                    f"{name!r} ran more often in one batch than in another, so its calls cannot be compared.",
                    "Choose other layers.",
                )
            if layer in self.plan.chosen:
                self._record(layer, output)

        return record_output

    def _record(self, layer: str, output: Any) -> None:
        chosen = self.plan.chosen[layer]
        taken = take(output)
        arranged = None if taken is None else chosen.layout.arranged(taken.tensor, self._n)
        if taken is None or arranged is None:
            shape = "no tensor" if taken is None else tuple(taken.tensor.shape)
            raise LayerError(
                f"{layer!r} gives {shape} for {self._n} samples: there is no sample dimension.",
                "A layer needs one row of numbers per sample: choose others.",
            )
        keep, unmasked = (taken.keep, False) if taken.keep is not None else self._mask_of(layer, arranged)
        emitted = 0
        try:
            for treated in treat(
                arranged,
                chosen.layout.kind,
                keep,
                maps=self._maps,
                sequences=self._sequences,
                unmasked=unmasked,
            ):
                if not chosen.steps or any(fnmatchcase(treated.suffix[1:], s) for s in chosen.steps):
                    self._emit(layer + treated.suffix, treated, arranged.dtype)
                    emitted += 1
        except LayerError as error:
            raise LayerError(f"{layer!r}: {error.message}", error.tip) from error
        if not emitted:
            raise LayerError(
                f"{layer!r} has no step {', '.join(chosen.steps)}.",
                "Steps are counted from 0, and are layers of their own only with --sequences per-step.",
            )

    def _mask_of(self, layer: str, arranged: Tensor) -> tuple[Tensor | None, bool]:
        """Which steps of a layer are no padding, None for all, and whether no mask counts its steps."""
        side = self.plan.sides.get(layer, "inputs")
        mask = self._masks.get(side)
        if mask is None or mask.shape != arranged.shape[:2]:
            return None, bool(self._masks)
        return None if side in self._full else mask, False

    def _emit(self, layer: str, treated: Treated, dtype: torch.dtype) -> None:
        values = treated.values.detach()
        words = [treated.treatment, *(name for name, half in HALF.items() if dtype == half)]
        treatment = ", ".join(word for word in words if word)
        self._seen[layer] = values.shape[1], treatment
        self._check_form(layer)
        self._broken[layer] = self._broken.get(layer, 0) + _count_not_finite(values)
        self._numbers[layer] = self._numbers.get(layer, 0) + values.numel()
        sample = None if treated.sample is None else treated.sample + self._start
        self._consume(Block(layer, self._start, values, sample, treatment))

    def _check_form(self, layer: str) -> None:
        """Refuse a layer with other features than in the first batch."""
        if self._form is None:
            return
        if layer not in self._form:
            raise _not_everywhere(layer)
        then, now = self._form[layer], self._seen[layer]
        if then[0] != now[0]:
            raise LayerError(
                f"{layer!r} has {then[0]} features in one batch and {now[0]} in another.",
                "Pad all samples alike, or choose another treatment or other layers.",
            )
        if then[1] != now[1]:
            raise LayerError(
                f"{layer!r} is treated by {then[1]!r} in one batch and by {now[1]!r} in another.",
                "Pad all samples alike, or choose another treatment or other layers.",
            )

    def check_finite(self) -> None:
        """Raise a LayerError if a layer had NaN or infinite activations.

        Only now, since asking after each batch would make a GPU wait.
        """
        for layer, broken in self._broken.items():
            if count := int(broken):
                raise LayerError(
                    f"{layer!r}: {_broken(count, self._numbers[layer])}.",
                    "Look for NaN in the weights with dynprobe check.",
                )


def _not_everywhere(layer: str) -> LayerError:
    return LayerError(
        f"{layer!r} ran in some batches and not in others.",
        "Choose other layers; for time steps use sequences of one length, or mean, last, first or token.",
    )


def _count_not_finite(values: Tensor) -> Any:
    """How many, an int or a tensor on the device of the values."""
    # A sum is finite only if all its terms are, and takes a fortieth of the time; a GPU would wait for it.
    if values.device.type == "cpu" and bool(values.sum().isfinite()):
        return 0
    return (~values.isfinite()).sum()


def non_finite(values: Tensor) -> str:
    """How many activations are not finite, as in "NaN or infinite in 470 of 960 activations"; "" for none."""
    count = int(_count_not_finite(values))
    return _broken(count, values.numel()) if count else ""


def _broken(count: int, total: int) -> str:
    return f"NaN or infinite in {count} of {total} activations"


def features(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    layers: str = "auto",
    maps: str = "flatten",
    sequences: str = "mean",
    allow_non_finite: bool = False,
) -> dict[str, Layer]:
    """The chosen layers on all samples as matrices, in the order they fired; see `record`.

    Args:
        model: The network.
        batches: As for `record`.
        layers: As for `record`.
        maps: As for `record`.
        sequences: As for `record`.
        allow_non_finite: As for `record`.

    Returns:
        By name; the values lie where the network is.

    Raises:
        LayerError: As `record`.
    """
    stores: dict[str, _Store] = {}
    # None where only walking them would tell, which may cost as much as the data's loading
    known = isinstance(batches, list | tuple) or hasattr(batches, "n_samples")
    n_samples = n_samples_of(batches) if known else None

    def keep(block: Block) -> None:
        if block.layer not in stores:
            stores[block.layer] = _Store(block, n_samples)
        stores[block.layer].add(block)

    record(
        model,
        batches,
        keep,
        layers=layers,
        maps=maps,
        sequences=sequences,
        allow_non_finite=allow_non_finite,
    )
    return {layer: stores.pop(layer).whole() for layer in list(stores)}


class _Store:
    """The blocks of one layer: copied into one matrix where its size is known, else joined at the end."""

    def __init__(self, first: Block, n_samples: int | None) -> None:
        self._treatment = first.treatment
        self._matrix: Tensor | None = None
        self._filled = 0
        self._parts: list[Tensor] = []
        self._samples: list[Tensor] = []
        if n_samples is not None and not first.treatment.startswith("token"):
            per_sample = 1
            if first.sample is not None:  # as many positions for each
                per_sample = len(first.values) // (int(first.sample[-1]) + 1 - first.start)
            self._matrix = first.values.new_empty(n_samples * per_sample, first.values.shape[1])

    def add(self, block: Block) -> None:
        """Copy one block."""
        if block.sample is not None:
            self._samples.append(block.sample)
        if self._matrix is None:
            self._parts.append(block.values.clone())
            return
        end = self._filled + len(block.values)
        self._matrix[self._filled : end] = block.values
        self._filled = end

    def whole(self) -> Layer:
        """The layer on all samples."""
        values = self._matrix[: self._filled] if self._matrix is not None else torch.cat(self._parts)
        return Layer(values, torch.cat(self._samples) if self._samples else None, self._treatment)
