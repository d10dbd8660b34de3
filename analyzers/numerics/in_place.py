"""Write over values that nobody else reads, in ReLUs and residual additions: less memory traffic."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dynprobe.analyzers.numerics.fold import LINEAR, Call, Given

_RELU = (functional.relu, torch.relu)
_ADD = (operator.add, torch.add)
_FRESH = (*LINEAR, _BatchNorm, Given)  # modules whose result is new memory


def relu_modules_in_place(model: nn.Module, calls: Sequence[Call]) -> None:
    """Switch `nn.ReLU` modules to in-place where every recorded call reads a fresh result alone."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            own = [other for other in calls if other.module is module]
            if own and all(_reads_fresh_result(other, calls) for other in own):
                module.inplace = True


def _reads_fresh_result(reader: Call, calls: Sequence[Call]) -> bool:
    sources = [other for other in calls if other.feeds(reader)]
    readers = [other for other in calls if other.given is reader.given]
    return len(readers) == 1 and any(isinstance(source.module, _FRESH) for source in sources)


def functions_in_place(model: nn.Module) -> nn.Module:
    """Do the same for `functional.relu` and for `a + b` of a residual network, which only a graph shows.

    Returns:
        A `torch.fx` graph that shares the model's submodules; the model itself where there is nothing to gain
        or `torch.fx` cannot follow its code.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        return model  # a graph has no hooks of its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = fx.GraphModule(model, _Tracer().trace(model))
    except Exception:  # tracing runs the model's code on proxies, which may raise anything
        return model
    rewritten = 0
    for node in graph.graph.nodes:
        is_relu = node.target in _RELU or (node.op == "call_method" and node.target == "relu")
        if is_relu and node.args and _is_fresh(node.args[0], graph):
            node.op, node.target = "call_function", torch.relu_
            node.args, node.kwargs = node.args[:1], {}
            rewritten += 1
        elif (
            node.target in _ADD and len(node.args) == 2 and not node.kwargs and _is_fresh(node.args[0], graph)
        ):
            node.target = add_in_place
            rewritten += 1
    graph.recompile()
    return graph if rewritten else model


def add_in_place(fresh: Any, other: Any) -> Any:
    """`fresh + other`, written over `fresh` where that has the sum's shape and dtype."""
    fits = isinstance(other, Tensor) and fresh.shape == other.shape and fresh.dtype == other.dtype
    return fresh.add_(other) if fits else fresh + other


class _Tracer(fx.Tracer):
    """Looks into containers only: what a module without children does inside is its own business."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return not any(m.children())


def _is_fresh(value: Any, graph: fx.GraphModule) -> bool:
    """Whether a node's value is new memory with a single reader (a view, or an input, is not)."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    if value.op == "call_module":
        module = graph.get_submodule(str(value.target))
        if isinstance(module, nn.Identity):
            return _is_fresh(value.args[0], graph)
        return isinstance(module, _FRESH)
    if value.op == "call_function" and value.target is operator.iadd:
        return _is_fresh(value.args[0], graph)
    return value.op == "call_function" and value.target in (*_ADD, add_in_place)
