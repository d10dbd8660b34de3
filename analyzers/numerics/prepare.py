"""Bring a network and its data into the form in which a surface's points cost least, and check that form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.evaluate import Batch, Inputs, call, move
from dynprobe.analyzers.numerics.fold import (
    first_layer,
    fold_batchnorm,
    layer_input,
    layer_outputs,
    relu_in_place,
    start_after,
    trace,
)
from dynprobe.analyzers.numerics.params import private_copy
from dynprobe.analyzers.numerics.plane import Direction, Plane

Data = dict[str, list[Batch]]

# Larger activations than this fall out of the processor's caches (and glibc returns memory of 32 MiB and more
# to the system after each use): a batch is evaluated in pieces whose largest activation stays below.
LARGEST_ACTIVATION = 8 * 2**20

# The first layer's outputs are kept (three arrays) where that saves work: for layers with a long sum per
# output whatever their size, for short sums (small convolutions) only while they fit the caches.
LONG_SUM = 64
FIRST_LAYER_IN_CACHE = 16 * 2**20
FIRST_LAYER_AT_MOST = 512 * 2**20


@dataclass
class Prepared:
    """A network whose tensors `plane` moves, with the data it reads at every point."""

    model: nn.Module
    data: Data
    plane: Plane
    notes: list[str]


def prepare_plain(model: nn.Module, data: Data, directions: Sequence[Direction]) -> Prepared:
    """Prepare the network as it is; the model is taken over, so give a private copy."""
    return Prepared(model, data, Plane(_tensors(model), directions), [])


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
    """
    notes: list[str] = []
    data = _in_pieces(model, data)
    convolutional = _device_type(model) == "cpu" and any(isinstance(m, nn.Conv2d) for m in model.modules())
    forms = [(True, True), (True, False), (False, True)] if convolutional else [(True, False)]
    reference: list[tuple[Tensor, Tensor]] = []
    for rewrite, channels_last in forms:
        try:
            candidate = _candidate(model, data, directions, rewrite=rewrite, channels_last=channels_last)
            reference = reference or _reference(model, data, directions)
            if _agrees(candidate, reference, len(directions) == 1):
                candidate.notes[:0] = notes
                return candidate
            reason = "its outputs differ from the network's"
        except Exception as error:  # the rewritten network runs code nobody has seen: whatever it raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "the rewritten network" if rewrite else "channels-last format"
        note = f"{what} is not used: {reason}"
        if note not in notes:
            notes.append(note)
    plain = prepare_plain(private_copy(model), data, directions)
    plain.notes = notes
    return plain


def _candidate(
    model: nn.Module, data: Data, directions: Sequence[Direction], *, rewrite: bool, channels_last: bool
) -> Prepared:
    model = private_copy(model)
    if channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        data = {prefix: [_channels_last(batch) for batch in batches] for prefix, batches in data.items()}
    if not rewrite:
        return prepare_plain(model, data, directions)
    graph = trace(model)
    before = _count_batchnorm(graph)
    moved = fold_batchnorm(graph, directions)
    notes = []
    if before:
        folded = before - _count_batchnorm(graph)
        notes.append(f"{folded} of {before} BatchNorm layers folded into the layer before")
    tensors: dict[str, Tensor] = {}
    layer = first_layer(graph)
    if layer is not None and _pays(model, layer, data, moved):
        data, tensors, moved = _compute_first_layer(model, layer, data, moved)
        start_after(graph, layer)
        notes.append("first layer computed once for all points")
    relu_in_place(graph)
    return Prepared(graph, data, Plane(_tensors(graph) | tensors, moved), notes)


def _pays(model: nn.Module, layer: str, data: Data, directions: Sequence[Direction]) -> bool:
    sum_length = model.get_parameter(f"{layer}.weight")[0].numel()
    step = directions[0].get(f"{layer}.weight")
    if step is None or not bool(step.any()):
        return False  # what does not move would not be written anew after the network has overwritten it
    inputs, _targets = data[""][0]
    with torch.no_grad():
        output = model.get_submodule(layer)(layer_input(model, layer, inputs[:1]))
    n_samples = sum(len(targets) for batches in data.values() for _inputs, targets in batches)
    size = int(output.numel() * output.element_size() * n_samples)
    if sum_length >= LONG_SUM:
        return size <= FIRST_LAYER_AT_MOST
    return 2 * size <= FIRST_LAYER_IN_CACHE


def _compute_first_layer(
    model: nn.Module, layer: str, data: Data, directions: Sequence[Direction]
) -> tuple[Data, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Replace the inputs by the first layer's outputs, as tensors that move with the plane."""
    module = model.get_submodule(layer)
    moved = [
        {name: step for name, step in direction.items() if name.rpartition(".")[0] != layer}
        for direction in directions
    ]
    tensors: dict[str, Tensor] = {}
    new_data: Data = {}
    for prefix, batches in data.items():
        new_data[prefix] = []
        for i, (inputs, targets) in enumerate(batches):
            given = layer_input(model, layer, inputs)
            outputs = layer_outputs(module, layer, directions, given)
            centre, *changes = [_like(output, given) for output in outputs]
            name = f"{prefix}first layer's output {i}"
            tensors[name] = centre
            for direction, change in zip(moved, changes, strict=True):
                direction[name] = change
            new_data[prefix].append((centre, targets))
    return new_data, tensors, moved


def _like(output: Tensor, inputs: Tensor) -> Tensor:
    """Give the first layer's output the memory format that the layer would have given it."""
    channels_last = inputs.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
    return output.contiguous(memory_format=torch.channels_last) if channels_last else output


def _in_pieces(model: nn.Module, data: Data) -> Data:
    """Split batches so that the largest activation fits the caches; values per sample do not depend on it.

    A BatchNorm without running statistics normalises each batch by itself: then the batches are kept.
    """
    couples = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())
    if couples or _device_type(model) != "cpu":
        return data
    limit = max(1, LARGEST_ACTIVATION // max(1, _largest_activation(model, data[""][0])))
    pieces: Data = {}
    for prefix, batches in data.items():
        pieces[prefix] = []
        for inputs, targets in batches:
            starts = range(0, len(targets), limit)
            pieces[prefix] += [(_cut(inputs, i, limit), targets[i : i + limit]) for i in starts]
    return pieces


def _largest_activation(model: nn.Module, batch: Batch) -> int:
    """Bytes per sample of the largest output of any submodule."""
    sizes = [0]

    def measure(_module: nn.Module, _arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    handles = [module.register_forward_hook(measure) for module in model.modules()]
    try:
        with torch.no_grad():
            call(model, _cut(batch[0], 0, 1))
    finally:
        for handle in handles:
            handle.remove()
    return max(sizes)


def _cut(inputs: Inputs, start: int, length: int) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: _cut(value, start, length) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_cut(value, start, length) for value in inputs)
    return inputs[start : start + length] if isinstance(inputs, Tensor) else inputs


def _channels_last(batch: Batch) -> Batch:
    inputs, targets = batch
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs, targets


CHECKED_AT = ((0.0, 0.0), (0.37, -0.21))  # the centre, and a point with no symmetry


def _outputs(prepared: Prepared, one_dimensional: bool) -> Iterator[Tensor]:
    for x, y in CHECKED_AT:
        prepared.plane.start_row(0.0 if one_dimensional else y)
        prepared.plane.move_to(x)
        with torch.no_grad():
            yield call(prepared.model, prepared.data[""][0][0]).detach().clone()


def _reference(model: nn.Module, data: Data, directions: Sequence[Direction]) -> list[tuple[Tensor, Tensor]]:
    """The plain network's outputs at the checked points, in its own dtype and in float64."""
    first = {"": data[""][:1]}
    inputs, targets = first[""][0]
    wide = {"": [(move(inputs, None, torch.float64), targets)]}
    narrow_network = prepare_plain(private_copy(model), first, directions)
    wide_network = prepare_plain(private_copy(model).double(), wide, directions)
    one_dimensional = len(directions) == 1
    pairs = zip(
        _outputs(narrow_network, one_dimensional), _outputs(wide_network, one_dimensional), strict=True
    )
    return list(pairs)


def _agrees(candidate: Prepared, reference: list[tuple[Tensor, Tensor]], one_dimensional: bool) -> bool:
    """Whether the candidate is as near to the float64 outputs as the plain network is.

    Allowed is eight times the plain network's own error, plus a floor of rounding for when that happens to
    be zero. NaN at a checked point proves nothing and is no agreement.
    """
    for outputs, (plain, exact) in zip(_outputs(candidate, one_dimensional), reference, strict=True):
        floor = 256 * torch.finfo(outputs.dtype).eps * exact.abs().max()
        if not bool((outputs - exact).abs().max() <= 8 * (plain - exact).abs().max() + floor):
            return False
    return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _count_batchnorm(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def _device_type(model: nn.Module) -> str:
    return next((tensor.device.type for tensor in model.parameters()), "cpu")
