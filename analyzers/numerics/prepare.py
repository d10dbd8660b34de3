"""Bring a network and its data into the form in which a surface's points cost least, and check that form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.evaluate import Inputs, call, map_tensors, move
from dynprobe.analyzers.numerics.fold import (
    Given,
    first_layer,
    fold_batchnorm,
    layer_input,
    layer_outputs,
    record,
)
from dynprobe.analyzers.numerics.in_place import functions_in_place, relu_modules_in_place
from dynprobe.analyzers.numerics.params import private_copy
from dynprobe.analyzers.numerics.plane import Direction, Plane

# Larger activations than this fall out of the processor's caches (and glibc returns memory of 32 MiB and more
# to the system after each use): a batch is evaluated in pieces whose largest activation stays below.
LARGEST_ACTIVATION = 8 * 2**20

# The first layer's outputs are kept (three arrays) where that saves work: for layers with a long sum per
# output whatever their size, for short sums (small convolutions) only while they fit the caches.
LONG_SUM = 64
FIRST_LAYER_IN_CACHE = 16 * 2**20
FIRST_LAYER_AT_MOST = 512 * 2**20

CHECKED_AT = ((0.0, 0.0), (0.37, -0.21))  # the centre, and a point with no symmetry


@dataclass
class Piece:
    """Data that go through the network together; with its first layer's output where the plane moves that."""

    inputs: Inputs
    targets: Tensor
    first_output: Tensor | None = None


Data = dict[str, list[Piece]]


@dataclass
class Prepared:
    """A network whose tensors `plane` moves, with the data it reads at every point."""

    model: nn.Module
    data: Data
    plane: Plane
    notes: list[str] = field(default_factory=list)
    given: Given | None = None

    def outputs(self, piece: Piece) -> Tensor:
        """Return the network's outputs on a piece of data, at most once per point (see `Given`)."""
        if self.given is not None and piece.first_output is not None:
            self.given.output = piece.first_output
        return call(self.model, piece.inputs)


def prepare_plain(model: nn.Module, data: Data, directions: Sequence[Direction]) -> Prepared:
    """Prepare the network as it is; the model is taken over, so give a private copy."""
    return Prepared(model, data, Plane(_tensors(model), directions))


def prepare_fast(model: nn.Module, data: Data, directions: Sequence[Direction]) -> Prepared:
    """Prepare the network for speed: exact rewrites, memory format, pieces of the data that fit the caches.

    Rewrites: BatchNorm folded into the layer before it, ReLU in place, a first layer on fixed data computed
    once; convolutions in channels-last format on the CPU. A form is used only if its outputs agree with the
    plain network's at the centre and at another point to the rounding of the dtype, judged by a float64
    evaluation on the first piece of data; otherwise the next simpler form is tried, and the notes say why.

    Args:
        model: In eval mode; not changed.
        data: Held in memory.
        directions: Of the model's parameters or buffers.

    Raises:
        ValueError: A direction does not fit the model.
    """
    convolutional = _on_cpu(model) and any(isinstance(module, nn.Conv2d) for module in model.modules())
    forms = [(True, True), (True, False), (False, True)] if convolutional else [(True, False)]
    notes: list[str] = []
    try:
        data = _in_pieces(model, data)
        forms = forms if _may_gain(model, data) else []
        reference = _reference(model, data, directions) if forms else []
    except Exception as error:  # for example a device without float64: then there is nothing to compare with
        forms, notes = [], [_because("nothing is rewritten", error)]
    for rewrite, channels_last in forms:
        what = "the rewritten network" if rewrite else "channels-last format"
        try:
            candidate = _candidate(model, data, directions, rewrite=rewrite, channels_last=channels_last)
            if _agrees(candidate, reference, one_dimensional=len(directions) == 1):
                candidate.notes[:0] = notes
                return candidate
            note = f"{what} is not used: its outputs differ from the network's"
        except Exception as error:  # a rewritten network runs code that nobody has seen: whatever it raises
            note = _because(f"{what} is not used", error)
        if note not in notes:
            notes.append(note)
    plain = prepare_plain(private_copy(model), data, directions)
    plain.notes = notes
    return plain


def _may_gain(model: nn.Module, data: Data) -> bool:
    """Whether some rewrite applies; else (most language models) the check would cost copies for nothing."""
    if any(isinstance(module, (_BatchNorm, nn.ReLU, nn.Conv2d)) for module in model.modules()):
        return True
    example = _cut(data[""][0].inputs, 0, 2)
    return first_layer(model, record(model, example), example) is not None


def _because(what: str, error: Exception) -> str:
    return f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def _candidate(
    model: nn.Module, data: Data, directions: Sequence[Direction], *, rewrite: bool, channels_last: bool
) -> Prepared:
    model = private_copy(model)
    if channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        data = {prefix: [_channels_last(piece) for piece in pieces] for prefix, pieces in data.items()}
    if not rewrite:
        return prepare_plain(model, data, directions)
    notes = []
    example = _cut(data[""][0].inputs, 0, 2)
    calls = record(model, example)
    n_before = _count_batchnorm(model)
    moved = fold_batchnorm(model, calls, directions)
    n_folded = n_before - _count_batchnorm(model)
    if n_folded:
        notes.append(f"{n_folded} of {n_before} BatchNorm layers folded into the layer before")
    relu_modules_in_place(model, calls)
    layer = first_layer(model, calls, example)
    given = None
    tensors: dict[str, Tensor] = {}
    if layer is not None and _pays(model, layer, data):
        data, tensors, moved = _compute_first_layer(model, layer, data, moved)
        given = Given()
        model.set_submodule(layer, given)
        notes.append("first layer computed once for all points")
    model = functions_in_place(model)
    plane = Plane(_tensors(model) | tensors, moved, overwritten=tensors)
    return Prepared(model, data, plane, notes, given)


def _pays(model: nn.Module, layer: str, data: Data) -> bool:
    sum_length = model.get_parameter(f"{layer}.weight")[0].numel()
    with torch.no_grad():
        output = model.get_submodule(layer)(layer_input(model, layer, data[""][0].inputs[:1]))
    n_samples = sum(len(piece.targets) for pieces in data.values() for piece in pieces)
    size = int(output.numel() * output.element_size() * n_samples)
    if sum_length >= LONG_SUM:
        return size <= FIRST_LAYER_AT_MOST
    return 2 * size <= FIRST_LAYER_IN_CACHE


def _compute_first_layer(
    model: nn.Module, layer: str, data: Data, directions: Sequence[Direction]
) -> tuple[Data, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Add the first layer's outputs to the data, as tensors that the plane moves in place of its weights."""
    module = model.get_submodule(layer)
    moved = [
        {name: step for name, step in direction.items() if name.rpartition(".")[0] != layer}
        for direction in directions
    ]
    tensors: dict[str, Tensor] = {}
    new_data: Data = {prefix: [] for prefix in data}
    for prefix, pieces in data.items():
        for i, piece in enumerate(pieces):
            inputs = layer_input(model, layer, piece.inputs)
            outputs = layer_outputs(module, layer, directions, inputs)
            centre, *changes = [_like(output, inputs) for output in outputs]
            name = f"{prefix}output of {layer}, piece {i}"
            tensors[name] = centre
            for direction, change in zip(moved, changes, strict=True):
                direction[name] = change
            new_data[prefix].append(Piece(piece.inputs, piece.targets, centre))
    return new_data, tensors, moved


def _like(output: Tensor, inputs: Tensor) -> Tensor:
    """Give the first layer's output the memory format that the layer would have given it."""
    channels_last = inputs.dim() == 4 and inputs.stride(1) == 1
    return output.to(memory_format=torch.channels_last) if channels_last else output


def _in_pieces(model: nn.Module, data: Data) -> Data:
    """Split batches so that the largest activation fits the caches; values per sample do not depend on it.

    A BatchNorm without running statistics normalises each batch by itself: then the batches are kept.
    """
    couples = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())
    if couples or not _on_cpu(model):
        return data
    results = [c.result for c in record(model, _cut(data[""][0].inputs, 0, 1))]
    largest = max((result.numel() * result.element_size() for result in results), default=1)
    limit = max(1, LARGEST_ACTIVATION // largest)
    split: Data = {prefix: [] for prefix in data}
    for prefix, pieces in data.items():
        for piece in pieces:
            for i in range(0, len(piece.targets), limit):
                split[prefix].append(Piece(_cut(piece.inputs, i, limit), piece.targets[i : i + limit]))
    return split


def _cut(inputs: Inputs, start: int, length: int) -> Inputs:
    return map_tensors(lambda tensor: tensor[start : start + length], inputs)


def _channels_last(piece: Piece) -> Piece:
    inputs = piece.inputs
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        # Not `contiguous`: with one channel that leaves the strides as they are, and the convolution then
        # returns the other format, in which pooling is ten times slower.
        inputs = inputs.to(memory_format=torch.channels_last)
    return Piece(inputs, piece.targets)


def _checked_outputs(prepared: Prepared, one_dimensional: bool) -> Iterator[Tensor]:
    for x, y in CHECKED_AT:
        prepared.plane.start_row(0.0 if one_dimensional else y)
        prepared.plane.move_to(x)
        with torch.no_grad():
            yield prepared.outputs(prepared.data[""][0]).detach().clone()


def _reference(model: nn.Module, data: Data, directions: Sequence[Direction]) -> list[tuple[Tensor, Tensor]]:
    """The plain network's outputs at the checked points, in its own dtype and in float64."""
    first = data[""][0]
    wide = Piece(move(first.inputs, None, torch.float64), first.targets)
    networks = (
        prepare_plain(private_copy(model), {"": [first]}, directions),
        prepare_plain(private_copy(model).double(), {"": [wide]}, directions),
    )
    plain, exact = (list(_checked_outputs(network, len(directions) == 1)) for network in networks)
    return list(zip(plain, exact, strict=True))


def _agrees(candidate: Prepared, reference: list[tuple[Tensor, Tensor]], *, one_dimensional: bool) -> bool:
    """Whether the candidate is as near to the float64 outputs as the plain network is.

    Allowed is eight times the plain network's own error, plus a floor of rounding for when that happens to
    be zero. NaN at a checked point proves nothing and is no agreement.
    """
    for outputs, (plain, exact) in zip(_checked_outputs(candidate, one_dimensional), reference, strict=True):
        floor = 256 * torch.finfo(outputs.dtype).eps * exact.abs().max()
        if not bool((outputs - exact).abs().max() <= 8 * (plain - exact).abs().max() + floor):
            return False
    return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _count_batchnorm(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def _on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in model.parameters())
