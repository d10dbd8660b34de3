"""Whether a network is piecewise linear in each parameter tensor, read off its autograd graph.

If the outputs z are (piecewise) linear in every single tensor θ_l, the blocks ∂²z/∂θ_l² vanish almost
everywhere, and with them the difference between the diagonal blocks of the Hessian of the loss,
JᵀMJ + Σ_c (∂ℓ/∂z_c) ∂²z_c/∂θ², and those of the Gauss-Newton matrix: both have the same trace, which for a
softmax cross-entropy is that of the Fisher information.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.model_function import ModelFunction

_LINEAR = frozenset(
    (
        *("Relu", "LeakyRelu", "Rrelu", "Hardtanh", "Threshold", "Clamp", "ClampMin", "ClampMax", "Abs"),
        *("Maximum", "Minimum", "Max", "Min", "Amax", "Amin", "Where", "MaskedFill", "Sort", "Topk"),
        *("Kthvalue", "Median", "Hardshrink", "Softshrink", "Tril", "Triu"),
        *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"),
        *("AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D"),
        *("UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleBilinear2D"),
        *("UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D"),
        *("UpsampleBilinear2DAa", "UpsampleBicubic2DAa"),
        *("UpsampleLinear1D", "UpsampleBicubic2D", "UpsampleTrilinear3D", "PixelShuffle", "PixelUnshuffle"),
        *("Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Cat", "Stack", "Cumsum", "ReduceMean"),
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "Permute", "Transpose", "T", "MT", "Squeeze"),
        *("Unsqueeze", "Expand", "Slice", "Select", "Split", "SplitWithSizes", "Chunk", "Unbind", "Narrow"),
        *("Index", "IndexSelect", "Gather", "Flip", "Roll", "Repeat", "Diagonal", "AsStrided", "Unfold"),
        *("Im2Col", "Col2Im", "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D"),
        *("ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "Clone", "ToCopy", "Contiguous"),
        *("Embedding", "Copy", "SelectScatter", "SliceScatter", "Scatter", "ScatterAdd"),
        *("IndexAdd", "IndexCopy", "IndexPut", "MaskedSelect", "MaskedScatter"),
    )
)
"""Operations that are (piecewise) linear in all their arguments taken together."""

_PRODUCTS: dict[str, tuple[int | tuple[int, ...], ...]] = {
    "Mul": (0, 1),
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Mv": (0, 1),
    "Dot": (0, 1),
    "Linear": (0, 1),
    "Convolution": (0, 1),
    "MkldnnConvolution": (0, 1),
    "CudnnConvolution": (0, 1),
    "PreluKernel": (0, 1),
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Addbmm": (1, 2),
    "Baddbmm": (1, 2),
    "Addcmul": (1, 2),
    "NativeBatchNorm": (0, 1),
    "CudnnBatchNorm": (0, 1),
    "MiopenBatchNorm": (0, 1),
    "Trilinear": (0, 1, 2),
    "Lerp": ((0, 1), 2),
}
"""Operations linear in each of two or three factors, and in any other argument: which the factors are."""

_DIVISIONS = frozenset(("Div",))


def linear_in_each_tensor(
    model: nn.Module, inputs: Any, parameters: Sequence[str] | None = None
) -> tuple[bool, str]:
    """Whether the outputs are piecewise linear in each parameter tensor, the others held fixed.

    The graph of a forward pass over two samples is walked from the parameters to the outputs: sums and ReLUs
    keep linearity, a product keeps it where no parameter is in both factors. What is not known to be linear
    counts as not linear: True is a proof for these inputs (up to kinks, which have measure zero), False
    is not one.

    Args:
        model: Taken in eval mode.
        inputs: A batch.
        parameters: The tensors in question; all when None.

    Returns:
        The answer, and if it is no, why: the operation or the parameter in the way.
    """
    function = ModelFunction(model, parameters=parameters)
    with torch.enable_grad():
        outputs = function(_two_samples(inputs))
    if outputs.grad_fn is None:
        return True, ""
    names = {id(leaf): name for name, leaf in function.leaves.items()}
    inside: dict[Any, frozenset[str]] = {}
    for node in _sources_first(outputs.grad_fn):
        variable = getattr(node, "variable", None)
        if variable is not None:
            # a tensor that wants a gradient and is none of the parameters is a constant here
            inside[node] = frozenset({names[id(variable)]} if id(variable) in names else set())
            continue
        arguments = [inside[n] if n is not None else frozenset[str]() for n, _ in node.next_functions]
        if reason := _objection(node, arguments):
            return False, reason
        inside[node] = frozenset[str]().union(*arguments)
    return True, ""


def _two_samples(inputs: Any) -> Any:
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim():
            sizes.append(len(tensor))
        return tensor

    map_tensors(note, inputs)
    return map_tensors(lambda t: t[:2] if t.dim() and len(t) == sizes[0] else t, inputs)


def _sources_first(last: Any) -> list[Any]:
    """The nodes of a graph, each after all that it is computed from."""
    order, seen, stack = [], set(), [(last, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None and n not in seen]
    return order


def _objection(node: Any, arguments: list[frozenset[str]]) -> str:
    """Why an operation is not linear in each tensor; empty if it is."""
    moved = frozenset[str]().union(*arguments)
    if not moved:
        return ""
    name = _operation(node)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return f"{name} is a custom function, whatever it is called"
    if name in _LINEAR:
        return ""
    if name in _PRODUCTS:
        if getattr(node, "_saved_training", False):
            return f"{name} with batch statistics"
        factors = [_union(arguments, place) for place in _PRODUCTS[name]]
        both = sorted(frozenset[str]().union(*(a & b for a, b in itertools.combinations(factors, 2))))
        return f"{both[0]} is in both factors of one product ({name})" if both else ""
    if name in _DIVISIONS:
        below = arguments[1] if len(arguments) > 1 else frozenset[str]()
        return f"{sorted(below)[0]} is in the denominator of a {name}" if below else ""
    if name in ("NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm") and not arguments[0]:
        return ""  # linear in its scale and shift
    return f"{name} is not known to be piecewise linear"


def _union(arguments: list[frozenset[str]], place: int | tuple[int, ...]) -> frozenset[str]:
    """The parameters in one or several of the arguments; an optional one may be missing."""
    places = (place,) if isinstance(place, int) else place
    return frozenset[str]().union(*(arguments[i] for i in places if i < len(arguments)))


def _operation(node: Any) -> str:
    """`AddmmBackward0` → `Addmm`."""
    name = str(node.name() if callable(getattr(node, "name", None)) else type(node).__name__)
    return name.rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")
