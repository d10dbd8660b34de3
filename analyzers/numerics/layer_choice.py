"""Which layers of a network to record, and how their outputs are laid out: found out on a few samples."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from dynprobe.analyzers.numerics.evaluate import Inputs, map_tensors
from dynprobe.analyzers.numerics.input_samples import batch_size, tensors_of
from dynprobe.analyzers.numerics.layouts import (
    Channels,
    ChannelTracker,
    LayerError,
    Layout,
    Side,
    layout_of,
    take,
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMALISATION = (
    nn.modules.batchnorm._NormBase,  # InstanceNorm too
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_NORM_NAME = re.compile(r"Norm(\dd)?$")
_SHOWN = 30
_SIZES = (2, 3)  # numbers of samples to try the network on


@dataclass(frozen=True)
class Chosen:
    """A call to record.

    Attributes:
        layout: Of its output.
        steps: Patterns of the time steps wanted; all if empty.
    """

    layout: Layout
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to record.

    Attributes:
        chosen: By label, in the order they fire.
        modules: Those to hook, by name.
        calls: How often each of them runs in a forward pass.
        writes: Whether the network writes over its inputs.
        sides: By label, whose steps a sequence counts; empty without a decoder with inputs of its own.
    """

    chosen: dict[str, Chosen]
    modules: dict[str, nn.Module]
    calls: dict[str, int]
    writes: bool
    sides: dict[str, Side]


@dataclass
class _Call:
    """One call of a module; the tensor is held so that its identity lasts."""

    name: str
    index: int
    module: nn.Module
    tensor: Tensor | None
    version: int
    channels: Channels
    time_first: bool
    layout: Layout | None = None

    @property
    def label(self) -> str:
        return label(self.name, self.index)

    def same_tensor(self, other: _Call) -> bool:
        """Whether this returned the other's very output, not written to in between."""
        return self.tensor is other.tensor and self.version == other.version


def label(name: str, index: int) -> str:
    """A layer's name: the module's, and in a forward pass from its second call on `#2`, …."""
    return name if index == 1 else f"{name}#{index}"


def run(model: nn.Module, inputs: Inputs) -> None:
    """A forward pass whose outputs do not matter: a dict as keywords, a tuple as positions."""
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, tuple | list):
        model(*inputs)
    else:
        model(inputs)


def plan_layers(model: nn.Module, inputs: Inputs, layers: str) -> Plan:
    """Decide what to record from two forward passes, over two and three samples.

    The dimension that follows the number of samples is the sample, also where a batch happens to have as many
    samples as there are time steps.

    Args:
        model: In the mode to record in; no gradients.
        inputs: One batch.
        layers: `auto`, `all`, or names and globs separated by commas or spaces.

    Raises:
        LayerError: A name or glob chooses nothing, or what is named gives no row of numbers per sample.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise _program()
    n = batch_size(inputs)
    names = _names(model)
    (before, _), (calls, writes) = (_observe(model, names, inputs, n, size) for size in _SIZES)
    if isinstance(model, fx.GraphModule) and not any(
        c.tensor is not None for c in calls if c.module is not model
    ):
        raise _program()
    _lay_out(before, calls)
    patterns = [pattern for pattern in re.split(r"[,\s]+", layers) if pattern]
    rule = patterns[0] if patterns else "auto"
    if rule in ("auto", "all") and len(patterns) < 2:
        found = {call.label: Chosen(call.layout) for call in _by_rule(model, calls, rule) if call.layout}
    else:
        found = _named(model, names, calls, patterns)
    if not found:
        raise LayerError("no layer gives one row of numbers per sample.", _there_are(names))
    modules = {call.name: call.module for call in calls if call.label in found}
    counts = {name: sum(call.name == name for call in calls) for name in modules}
    chosen = {call.label: found[call.label] for call in calls if call.label in found}
    return Plan(chosen, modules, counts, writes, _sides(model, names, inputs, n, calls))


def _names(model: nn.Module) -> dict[str, nn.Module]:
    """All modules but the parts of parametrised tensors; a shared module under all its names.

    The network itself is the last, under the name of its class in lower case.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and "parametrizations" not in name.split(".")
    }
    name = parametrize.type_before_parametrizations(model).__name__.lower()
    while name in found:
        name += "_"
    return {**found, name: model}


def _observe(
    model: nn.Module, names: Mapping[str, nn.Module], inputs: Inputs, n: int, size: int
) -> tuple[list[_Call], bool]:
    """Run the model on the first samples; what fired, in order, and whether it wrote over its inputs."""
    calls: list[_Call] = []
    tracker = ChannelTracker()

    def hook(name: str) -> Any:
        def note(module: nn.Module, _arguments: Any, output: Any) -> None:
            index = 1 + sum(call.name == name for call in calls)
            taken = take(output)
            if taken is None or taken.tensor.layout is not torch.strided or taken.tensor.is_nested:
                calls.append(_Call(name, index, module, None, 0, "first", False))
                return
            channels = tracker.see(module, taken.tensor)
            time_first = tracker.time_first and not taken.packed
            version = _version(taken.tensor)
            calls.append(_Call(name, index, module, taken.tensor, version, channels, time_first))

        return note

    def cut(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.ndim and len(tensor) == n else tensor.clone()

    rows = [i % n for i in range(size)]  # a copy of the first ones, again where there are fewer
    few = map_tensors(cut, inputs)
    versions = [_version(tensor) for tensor in tensors_of(few)]
    first_names: dict[int, str] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in names.items():
            is_first = first_names.setdefault(id(module), name) == name
            if is_first and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                hooks.callback(module.register_forward_hook(hook(name)).remove)
        run(model, few)
    return calls, versions != [_version(tensor) for tensor in tensors_of(few)]


def _sides(
    model: nn.Module, names: Mapping[str, nn.Module], inputs: Inputs, n: int, calls: Sequence[_Call]
) -> dict[str, Side]:
    """Whose steps each sequence counts: what becomes shorter with a decoder input less one step is its.

    Names would not tell: a decoder's cross attention makes its keys from the encoder's steps.
    """
    if not isinstance(inputs, Mapping) or not any(str(name).startswith("decoder_") for name in inputs):
        return {}

    def shortened(name: str, value: Any) -> Any:
        follows = name.startswith("decoder_") or name == "labels"
        cuts = follows and isinstance(value, Tensor) and value.ndim > 1 and len(value) == n
        return value[:, :-1] if cuts else value

    shapes: dict[str, torch.Size] = {}
    with contextlib.suppress(Exception):  # a network that takes no other length: all sides stay unknown
        shorter, _ = _observe(
            model, names, {name: shortened(name, value) for name, value in inputs.items()}, n, _SIZES[1]
        )
        shapes = {call.label: call.tensor.shape for call in shorter if call.tensor is not None}
    sides: dict[str, Side] = {}
    for call in calls:
        if call.tensor is not None:
            other = shapes.get(call.label)
            sides[call.label] = (
                "unknown" if other is None else "inputs" if other == call.tensor.shape else "decoder"
            )
    return sides


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _lay_out(before: Sequence[_Call], calls: Sequence[_Call]) -> None:
    """Fill in the layouts, from what the same calls returned for two numbers of samples."""
    earlier = {call.label: call.tensor for call in before}
    for call in calls:
        tensor, other = call.tensor, earlier.get(call.label)
        if tensor is None or other is None or not tensor.numel():
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        shapes = other.shape, tensor.shape
        call.layout = layout_of(shapes, _SIZES, call.channels, time_first=call.time_first)


def _by_rule(model: nn.Module, calls: Sequence[_Call], rule: str) -> list[_Call]:
    """The calls that `all` or `auto` records; the network's output where there are no others."""
    usable = [call for call in calls if call.layout is not None]
    kept: list[_Call] = []
    for call in usable:
        if call.module is model or (rule != "all" and not _is_layer(call.module)):
            continue
        repeats = _children(call.module) and any(call.same_tensor(other) for other in kept)
        if rule == "all" or not repeats:
            kept.append(call)
    return kept or [call for call in usable if call.module is model]


def _is_layer(module: nn.Module) -> bool:
    """Whether `auto` records it: it has parameters of its own and does not normalise, or it is a block."""
    if isinstance(module, _NORMALISATION):
        return False
    if _children(module):
        owns = any(True for _ in module.parameters(recurse=False))
        return owns or type(module) not in _CONTAINERS
    if any(_NORM_NAME.search(base.__name__) for base in type(module).__mro__):
        return False
    return parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False))


def _children(module: nn.Module) -> list[str]:
    return [name for name, _child in module.named_children() if name != "parametrizations"]


def _named(
    model: nn.Module, names: Mapping[str, nn.Module], calls: Sequence[_Call], patterns: Sequence[str]
) -> dict[str, Chosen]:
    """What the names and globs choose: `NAME`, `NAME#CALL`, `NAME@STEP`."""
    found: dict[str, Chosen] = {}
    for pattern in patterns:
        call_part, _, step = pattern.partition("@")
        name, _, index = call_part.partition("#")
        is_glob = any(character in call_part for character in "*?[")
        modules = {
            id(module)
            for known, module in names.items()
            if fnmatchcase(known, name) and not (is_glob and module is model)
        }
        if not modules:
            raise _unknown(name, names)
        hits = [call for call in calls if id(call.module) in modules]
        if index:
            hits = [call for call in hits if fnmatchcase(str(call.index), index)]
        if not hits:
            ran = {call.name: call.module for call in calls if call.module is not model}
            raise LayerError(f"{call_part!r} never ran in the forward pass.", _there_are(ran))
        for call in hits:
            if call.layout is not None:
                earlier = found.get(call.label)
                every = not step or (earlier is not None and not earlier.steps)
                steps = () if every else (*(earlier.steps if earlier else ()), step)
                found[call.label] = Chosen(call.layout, steps)
            elif not is_glob or all(other.layout is None for other in hits):
                raise _unusable(call)
    return found


def _program() -> LayerError:
    return LayerError(
        "the network is a compiled program, whose layers cannot be observed from outside.",
        "Give its code (--model) instead of a TorchScript or torch.export program.",
    )


def _unknown(name: str, names: Mapping[str, nn.Module]) -> LayerError:
    near = difflib.get_close_matches(name, names, 1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return LayerError(f"no layer is called {name!r}.", guess + _there_are(names))


def _unusable(call: _Call) -> LayerError:
    tip = "A layer needs one row of numbers per sample: choose others."
    if call.tensor is None:
        return LayerError(f"{call.label!r} returns no tensor, or one that is sparse or nested.", tip)
    shape, kind = tuple(call.tensor.shape), str(call.tensor.dtype).removeprefix("torch.")
    if not (call.tensor.is_floating_point() or call.tensor.is_complex()):
        return LayerError(f"{call.label!r} returns {kind} numbers, which are no activations.", tip)
    what = "there is no sample dimension" if call.tensor.numel() else "there are no numbers"
    return LayerError(f"{call.label!r} gives {shape} for {_SIZES[1]} samples: {what}.", tip)


def _there_are(names: Mapping[str, nn.Module]) -> str:
    shown = list(names)[:_SHOWN]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"There are {', '.join(shown)}{more}."
