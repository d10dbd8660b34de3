"""What linear operations of a forward pass do to affine forms: by name of the aten operation.

Operations that are not named here, in `activation_rules` or views are refused: nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils._pytree import tree_map

from dynprobe.analyzers.numerics.affine_form import (
    Affine,
    constant_form,
    require_entries,
    stacked,
)
from dynprobe.analyzers.numerics.layered_network import Floats, Matrix
from dynprobe.analyzers.numerics.traced_call import Call, Refused, Rule
from dynprobe.analyzers.numerics.window_matrices import convolution_matrix

# Entries of a basis that an operation is applied to at once.
_CHUNK = 4_000_000
# Options of rearrangements that do not change which entry goes where.
_WITHOUT_EFFECT = {"memory_format", "sparse_grad"}


def _add(call: Call) -> Affine:
    return call.operand("self").plus(call.operand("other").scaled(float(call["alpha"])))


def _subtract(call: Call) -> Affine:
    return call.operand("self").minus(call.operand("other").scaled(float(call["alpha"])))


def _subtract_from(call: Call) -> Affine:
    return call.operand("other").minus(call.operand("self").scaled(float(call["alpha"])))


def _negate(call: Call) -> Affine:
    return call.operand("self").scaled(-1.0)


def _multiply(call: Call) -> Affine:
    a, b = call.operand("self"), call.operand("other")
    if not a.is_constant and not b.is_constant:
        raise Refused("multiplies values that depend on the input with each other")
    return b.scaled(a.constant) if a.is_constant else a.scaled(b.constant)


def _divide(call: Call) -> Affine:
    a, b = call.operand("self"), call.operand("other")
    if not b.is_constant:
        raise Refused("divides by values that depend on the input")
    if call.get("rounding_mode") is not None:
        raise Refused("rounds")
    return a.scaled(1 / b.constant)


def _set_all(call: Call) -> Affine:
    return call.operand("value")


def _set_zero(call: Call) -> Affine:
    return constant_form(np.zeros(math.prod(call.shape)))


def _as_computed(call: Call) -> Affine:
    """Tensors that are like others in shape only."""
    return constant_form(call.result.numpy())


def _rearrange(call: Call) -> Affine:
    """Any operation whose results are entries of its arguments: applied to their numbers instead.

    0 stands for the number that it fills in, such as that of padding.
    """
    if call.get("accumulate"):
        raise Refused("adds to values at positions")
    if unknown := set(call.kwargs) - _WITHOUT_EFFECT:
        raise Refused(f"has an option that cannot be followed ({', '.join(sorted(unknown))})")
    forms = [constant_form(np.array([_filling(call)]))]
    count = 1

    def numbered(value: object) -> object:
        nonlocal count
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        forms.append(call.form(value))
        numbers = torch.arange(count, count + value.numel(), dtype=torch.float64).reshape(value.shape)
        count += value.numel()
        return numbers

    names = [argument.name for argument in call.func._schema.arguments]
    args = [
        0.0 if name == "value" and isinstance(value, float | int) else tree_map(numbered, value)
        for name, value in zip(names, call.args, strict=False)
    ]
    picked = call.func(*args)
    return stacked(forms).rows(picked.reshape(-1).long().numpy())


def _filling(call: Call) -> float:
    value = call.get("value")
    return float(value) if isinstance(value, float | int) else 0.0


def _convert(call: Call) -> Affine:
    if not (call["dtype"] is None or call["dtype"].is_floating_point):
        raise Refused("rounds to whole numbers")
    return call.operand("self")


def _sum(call: Call) -> Affine:
    return _reduced(call, 1.0)


def _mean(call: Call) -> Affine:
    return _reduced(call, math.prod(call.shape) / call["self"].numel())


def _reduced(call: Call, factor: float) -> Affine:
    shape = call["self"].shape
    dims = call.get("dim") or range(len(shape))
    dims = {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)} if shape else set()
    kept = [1 if i in dims else n for i, n in enumerate(shape)]
    into = torch.arange(math.prod(kept)).reshape(kept).expand(shape).reshape(-1).numpy()
    n = len(into)
    matrix = sparse.csr_array((np.full(n, factor), (into, np.arange(n))), shape=(math.prod(kept), n))
    return call.form(call["self"]).through(matrix)


def _matrix_product(call: Call) -> Affine:
    """Products of matrices, also many at a time and with something added to them."""
    a, b = (
        (("batch1", "batch2") if call.get("batch1") is not None else ("mat1", "mat2"))
        if call.get("beta") is not None
        else _FACTORS[call.name]
    )
    found = _product(call, call[a], call[b])
    if call.get("beta") is None:
        return found
    return found.scaled(float(call["alpha"])).plus(call.operand("self").scaled(float(call["beta"])))


_FACTORS = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "dot": ("self", "tensor")}


def _product(call: Call, left: Tensor, right: Tensor) -> Affine:
    a, b = call.form(left), call.form(right)
    if not a.is_constant and not b.is_constant:
        raise Refused("multiplies values that depend on the input with each other")
    n, m = (1, left.shape[0]) if left.ndim == 1 else left.shape[-2:]
    p = 1 if right.ndim == 1 else right.shape[-1]
    constant = (a if a.is_constant else b).constant
    if a.is_constant:
        blocks = [_kron(block, np.eye(p)) for block in constant.reshape(-1, n, m)]
        return b.through(_block_diagonal(blocks))
    blocks = [_kron(np.eye(n), block.T) for block in constant.reshape(-1, m, p)]
    return a.through(_block_diagonal(blocks))


def _kron(a: Floats, b: Floats) -> Matrix:
    if a.shape == (1, 1):
        return a[0, 0] * b
    if b.shape == (1, 1):
        return a * b[0, 0]
    require_entries(int(np.count_nonzero(a)) * b.size)
    return sparse.csr_array(sparse.kron(sparse.csr_array(a), sparse.csr_array(b)))


def _block_diagonal(blocks: list[Matrix]) -> Matrix:
    return blocks[0] if len(blocks) == 1 else sparse.csr_array(sparse.block_diag(blocks))


def _convolve(call: Call) -> Affine:
    weight, bias = call.constant("weight"), call.constant("bias")
    assert weight is not None
    size, out_size = tuple(call["input"].shape[2:]), call.shape[2:]
    how = {name: tuple(call[name]) for name in ("stride", "padding", "dilation")}
    groups = call["groups"]
    if call["transposed"]:
        # The transpose of the convolution that leads from its outputs to its inputs.
        matrix = convolution_matrix(weight, out_size, size, **how, groups=groups).T.tocsr()
    else:
        matrix = convolution_matrix(weight, size, out_size, **how, groups=groups)
    n_samples = call.shape[0]
    found = call.form(call["input"]).through(_repeated(matrix, n_samples))
    if bias is None:
        return found
    return found.shifted(np.tile(np.repeat(bias, math.prod(out_size)), n_samples))


def _repeated(matrix: Matrix, times: int) -> Matrix:
    """The matrix that does the same to each of several blocks."""
    if times == 1:
        return matrix
    require_entries(matrix.nnz * times)
    return sparse.csr_array(sparse.kron(sparse.eye(times), matrix))


def _resample(call: Call) -> Affine:
    """Average pooling and interpolation: the same linear map of positions for each channel."""
    tensor = call["input"] if call.get("self") is None else call["self"]
    n_axes = 1 if "1d" in call.name else 3 if "3d" in call.name else 2
    size = tuple(tensor.shape[-n_axes:])
    n = math.prod(size)
    step = max(1, _CHUNK // n)
    parts = []
    for first in range(0, n, step):
        count = min(step, n - first)
        basis = torch.zeros(count, n, dtype=torch.float64)
        basis[torch.arange(count), first + torch.arange(count)] = 1
        out = call.func(basis.reshape(count, 1, *size), *call.args[1:], **call.kwargs)
        parts.append(sparse.csr_array(out.reshape(count, -1).numpy()))
    matrix = sparse.csr_array(sparse.vstack(parts).T)
    return call.form(tensor).through(_repeated(matrix, tensor.numel() // n))


def _batch_norm(call: Call) -> Affine:
    if call.get("training"):
        raise Refused("normalises by the statistics of its input, not by kept ones")
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    assert mean is not None
    assert variance is not None
    weight, bias = call.constant("weight"), call.constant("bias")
    factor = 1 / np.sqrt(variance + call["eps"]) * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * factor
    channel = np.arange(len(factor)).reshape(1, -1, *[1] * (len(call.shape) - 2))
    channel = np.broadcast_to(channel, call.shape).ravel()
    return call.form(call["input"]).scaled(factor[channel]).shifted(shift[channel])


_REARRANGING = (
    "cat stack clone alias lift_fresh _unsafe_view view_copy constant_pad_nd reflection_pad1d "
    "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d flip roll "
    "repeat index_select index gather take masked_select upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "slice_scatter select_scatter im2col pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle tril triu masked_fill where index_put _reshape_copy rot90 index_fill "
    "diagonal_scatter"
)
_LIKE_OTHERS = "new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like"
_RESAMPLING = (
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa"
)

LINEAR_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "add": _add,
        "sub": _subtract,
        "rsub": _subtract_from,
        "neg": _negate,
        "mul": _multiply,
        "div": _divide,
        "fill": _set_all,
        "zero": _set_zero,
        "_to_copy": _convert,
        "sum": _sum,
        "mean": _mean,
        "convolution": _convolve,
        "native_batch_norm": _batch_norm,
        "_native_batch_norm_legit_no_training": _batch_norm,
        "_batch_norm_no_update": _batch_norm,
        **dict.fromkeys(("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm"), _matrix_product),
        **dict.fromkeys(_LIKE_OTHERS.split(), _as_computed),
        **dict.fromkeys(_REARRANGING.split(), _rearrange),
        **dict.fromkeys(_RESAMPLING.split(), _resample),
    }
)
