"""Exact rewrites of an eval-mode network that save work at every point of a surface.

All of them keep the function: they fold what is constant (`fold_batchnorm`), write over what nobody reads
again (`relu_in_place`), and compute once what is linear in the coordinates (`start_after`). They work
on the graph that `torch.fx` traces; a network that cannot be traced is used as it is.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

Direction = dict[str, Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FOLDABLE = (nn.Linear, *_CONVOLUTIONS)
_RELU = (functional.relu, torch.relu)
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_OURS = "written anew at every point"  # marks an input that the network may write over
_ADD = (operator.add, torch.add)


class NotFoldable(Exception):
    """The network has no graph that could be rewritten; the message says why."""


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the network as a graph that shares its submodules.

    Raises:
        NotFoldable: `torch.fx` cannot follow the code, for example a branch on the data.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the user's code on proxies: anything may be raised
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotFoldable(reason) from error


def fold_batchnorm(graph: fx.GraphModule, directions: Sequence[Mapping[str, Tensor]]) -> list[Direction]:
    """Fold every BatchNorm that directly follows a convolution or linear layer into it, in place.

    BN(Wu + b) = (sW)u + s(b − mean) + β with s = γ/√(var + ε), which holds along a direction too if BN's own
    parameters stay: the weight's and bias's directions are scaled by the same s. Layers whose BatchNorm
    moves, that are used more than once or share their weight are left alone.

    Args:
        graph: From `trace`, in eval mode; its layers' parameters are replaced.
        directions: Name to tensor.

    Returns:
        The directions of the folded network. Its number of BatchNorm layers tells what was folded.
    """
    scaled = [dict(direction) for direction in directions]
    for node in list(graph.graph.nodes):
        layer_node = _layer_before(node, graph)
        if layer_node is None or _moves(str(node.target), directions):
            continue
        name = str(layer_node.target)
        scale = _fold_into(graph.get_submodule(name), graph.get_submodule(str(node.target)))
        for direction in scaled:
            for part in _NORM_TENSORS:
                direction.pop(f"{node.target}.{part}", None)
            for part in ("weight", "bias"):
                step = direction.get(f"{name}.{part}")
                if step is not None:
                    factor = scale.reshape(-1, *[1] * (step.dim() - 1))
                    direction[f"{name}.{part}"] = (step.double() * factor).to(step.dtype)
        node.replace_all_uses_with(layer_node)
        graph.graph.erase_node(node)
    _clean(graph)
    return scaled


def _layer_before(node: fx.Node, graph: fx.GraphModule) -> fx.Node | None:
    """The node of the layer that this BatchNorm can be folded into, if it is one and there is one."""
    norm = _module(node, graph)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.training:
        return None
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or len(before.users) != 1:
        return None
    layer = _module(before, graph)
    if not isinstance(layer, _FOLDABLE) or not _used_once(before, graph) or not _used_once(node, graph):
        return None
    return before if layer.weight.is_floating_point() else None


def _moves(module: str, directions: Sequence[Mapping[str, Tensor]]) -> bool:
    entries = (f"{module}.{name}" for name in _NORM_TENSORS)
    return any(bool(d[entry].any()) for entry in entries for d in directions if entry in d)


def _fold_into(layer: nn.Module, norm: nn.Module) -> Tensor:
    """Replace the layer's weight and bias; returns the scale of each output channel, in float64."""
    assert isinstance(layer, _FOLDABLE)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = layer.weight
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double()
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    folded = weight.detach().double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    return scale


def relu_in_place(graph: fx.GraphModule) -> None:
    """Let each ReLU write over its input where that is a fresh result that nothing else reads."""
    for node in graph.graph.nodes:
        is_relu = isinstance(_module(node, graph), nn.ReLU) or node.target in _RELU
        is_relu = is_relu or (node.op == "call_method" and node.target == "relu")
        if is_relu and node.args and _is_fresh(node.args[0], graph):
            node.op, node.target = "call_function", torch.relu_
            node.args, node.kwargs = node.args[:1], {}
    _clean(graph)


def _is_fresh(node: object, graph: fx.GraphModule) -> bool:
    """Whether a node's value is new memory with a single reader (a view, or an input, is not)."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if isinstance(_module(node, graph), (*_FOLDABLE, _BatchNorm)):
        return True
    if node.op == "placeholder":
        return _OURS in node.meta
    if node.op == "call_function" and node.target is operator.iadd:
        return _is_fresh(node.args[0], graph)
    # Of a + b the result is new memory, unless both are plain numbers, which no ReLU reads.
    return node.op == "call_function" and node.target in _ADD


def first_layer(graph: fx.GraphModule) -> str | None:
    """Name the first layer if it reads nothing but the data and reshapes of it, and nothing else does.

    Such a layer's output is linear in its weights, hence in the coordinates: at every point it is
    (Wu + b) + x·(Du + d_b) + y·(Eu + e_b), three arrays that `layer_outputs` computes once.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        return None
    node = inputs[0]
    while len(node.users) == 1:
        node = next(iter(node.users))
        if isinstance(_module(node, graph), _FOLDABLE):
            return str(node.target) if _used_once(node, graph) else None
        if not _reshapes(node, graph):
            return None
    return None


def start_after(graph: fx.GraphModule, layer: str) -> None:
    """Cut off all up to `first_layer`: the graph now takes that layer's output, and may write over it."""
    nodes = list(graph.graph.nodes)
    node = next(node for node in nodes if node.op == "call_module" and node.target == layer)
    with graph.graph.inserting_before(nodes[0]):
        output = graph.graph.placeholder("first_layer_output")
    output.meta[_OURS] = True
    node.replace_all_uses_with(output)
    for dead in reversed(nodes[: nodes.index(node) + 1]):
        graph.graph.erase_node(dead)
    _clean(graph)


def _reshapes(node: fx.Node, graph: fx.GraphModule) -> bool:
    if node.op == "call_method":
        return node.target in ("flatten", "reshape", "view")
    return node.target is torch.flatten or isinstance(_module(node, graph), nn.Flatten | nn.Identity)


class _Reached(Exception):
    """The layer has its input: the rest of the forward pass is not needed."""


def layer_input(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """Run the model up to the named layer and return what it is given."""
    captured: list[Tensor] = []

    def capture(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        captured.append(arguments[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(capture)
    try:
        with torch.no_grad(), contextlib.suppress(_Reached):
            model(inputs)
    finally:
        handle.remove()
    return captured[0]


def layer_outputs(
    layer: nn.Module, name: str, directions: Sequence[Mapping[str, Tensor]], inputs: Tensor
) -> list[Tensor]:
    """Return the layer's output at the centre, then its change per unit of each direction.

    Computed in float64 and rounded once, which is closer to the exact value than the layer itself comes.
    """
    wide = copy.deepcopy(layer).double()
    wide_inputs = inputs.double()
    with torch.no_grad():
        outputs = [wide(wide_inputs).to(inputs.dtype)]
        for direction in directions:
            for part, parameter in wide.named_parameters():
                step = direction.get(f"{name}.{part}")
                parameter.copy_(torch.zeros_like(parameter) if step is None else step)
            outputs.append(wide(wide_inputs).to(inputs.dtype))
    return outputs


def _module(node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _used_once(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether the module is called at this node only, and shares no parameter with another module."""
    module = _module(node, graph)
    assert module is not None
    calls = sum(_module(other, graph) is module for other in graph.graph.nodes)
    own = {id(parameter) for parameter in module.parameters()}
    holders = sum(id(p) in own for _name, p in graph.named_parameters(remove_duplicate=False))
    return calls == 1 and holders == len(own)


def _clean(graph: fx.GraphModule) -> None:
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
