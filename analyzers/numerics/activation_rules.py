"""What activations, maxima and minima do to affine forms: by name of the aten operation.

Everything is written with activations of single neurons, exactly: max(a, b) = b + relu(a - b).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy import sparse

from dynprobe.analyzers.numerics.affine_form import Affine, Indices
from dynprobe.analyzers.numerics.layered_network import Floats, piecewise, smooth
from dynprobe.analyzers.numerics.traced_call import Call, Dropped, Final, Refused, Rule
from dynprobe.analyzers.numerics.window_matrices import adaptive_windows, sliding_windows


def _relu(call: Call) -> Affine:
    return _positive_part(call, call.operand("self"))


def _leaky_relu(call: Call) -> Affine:
    return _with_slopes(call, call.operand("self"), float(call["negative_slope"]))


def _randomised_relu(call: Call) -> Affine:
    if call["training"]:
        raise Refused("draws random numbers")
    return _with_slopes(call, call.operand("self"), (call["lower"] + call["upper"]) / 2)


def _parametric_relu(call: Call) -> Affine:
    slopes = call.broadcast(call["weight"])
    if not slopes.is_constant:
        raise Refused("has slopes that depend on the input")
    return _with_slopes(call, call.operand("self"), slopes.constant)


def _absolute(call: Call) -> Affine:
    return _with_slopes(call, call.operand("self"), -1.0)


def _tanh(call: Call) -> Affine:
    return call.activate(call.operand("self"), smooth("tanh"))


def _sigmoid(call: Call) -> Affine:
    return call.activate(call.operand("self"), smooth("sigmoid"))


def _hard_tanh(call: Call) -> Affine:
    return _clamped(call, call.operand("self"), call["min_val"], call["max_val"])


def _clamp(call: Call) -> Affine:
    low = call.get("min")
    high = call.get("max")
    return _clamped(call, call.operand("self"), low, high)


def _hard_sigmoid(call: Call) -> Affine:
    return _clamped(call, call.operand("self").shifted(3.0), 0.0, 6.0).scaled(1 / 6)


def _soft_shrink(call: Call) -> Affine:
    x, by = call.operand("self"), float(call["lambd"])
    return x.minus(_clamped(call, x, -by, by))


def _threshold(call: Call) -> Affine:
    if call["threshold"] != call["value"]:
        raise Refused("jumps at its threshold, so that it has no bounds here")
    return _clamped(call, call.operand("self"), call["threshold"], None)


def _maximum(call: Call) -> Affine:
    a, b = call.operand("self"), call.operand("other")
    return b.plus(_positive_part(call, a.minus(b)))


def _minimum(call: Call) -> Affine:
    a, b = call.operand("self"), call.operand("other")
    return b.minus(_positive_part(call, b.minus(a)))


def _largest(call: Call) -> Affine:
    return _largest_of(call, call.form(call["self"]), _along_dims(call))


def _least(call: Call) -> Affine:
    return _largest_of(call, call.form(call["self"]).scaled(-1.0), _along_dims(call)).scaled(-1.0)


def _max_pool(call: Call) -> Affine:
    n_axes = 3 if "3d" in call.name else 2
    size, out_size = tuple(call["self"].shape[-n_axes:]), call.shape[-n_axes:]

    def per_axis(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * n_axes if len(values) == 1 else values

    kernel = per_axis(call["kernel_size"])
    stride = per_axis(call["stride"]) if call["stride"] else kernel
    windows = sliding_windows(
        size, out_size, kernel, stride, per_axis(call["padding"]), per_axis(call["dilation"])
    )
    return _largest_of(call, call.form(call["self"]), _in_each_channel(call, windows, size))


def _adaptive_max_pool(call: Call) -> Affine:
    n_axes = 3 if "3d" in call.name else 2
    size, out_size = tuple(call["self"].shape[-n_axes:]), call.shape[-n_axes:]
    windows = adaptive_windows(size, out_size)
    return _largest_of(call, call.form(call["self"]), _in_each_channel(call, windows, size))


def _final(dropped: Dropped) -> Rule:
    """A last operation over all outputs that does not change which is the largest."""

    def rule(call: Call) -> Affine:
        if call.get("dim") is not None and call["self"].shape[call["dim"]] != call["self"].numel():
            raise Refused("is only analysed as the last operation of a network, over all its outputs")
        raise Final(dropped, call.operand("self"))

    return rule


def _with_slopes(call: Call, form: Affine, below: float | Floats) -> Affine:
    return call.activate(form, piecewise(below, 1.0, len(form)))


def _positive_part(call: Call, form: Affine) -> Affine:
    return _with_slopes(call, form, 0.0)


def _clamped(call: Call, form: Affine, low: Any, high: Any) -> Affine:
    """One bound after the other, so that the bounds of a network keep the upper one whatever its input."""
    if low is not None:
        start = call.broadcast(low)
        form = start.plus(_positive_part(call, form.minus(start)))
    if high is not None:
        end = call.broadcast(high)
        form = end.minus(_positive_part(call, end.minus(form)))
    return form


def _along_dims(call: Call) -> Indices:
    """Which entries of the tensor are compared for each result, (n_results, n_compared)."""
    shape = tuple(call["self"].shape)
    dims = call.get("dim")
    dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    compared = [dim % max(len(shape), 1) for dim in dims]
    others = [dim for dim in range(len(shape)) if dim not in compared]
    index = torch.arange(math.prod(shape)).reshape(shape).permute(*others, *compared)
    return np.asarray(index.reshape(math.prod(shape[dim] for dim in others), -1).numpy())


def _in_each_channel(call: Call, windows: Indices, size: tuple[int, ...]) -> Indices:
    n = math.prod(size)
    channels = np.arange(call["self"].numel() // n)[:, None, None] * n
    everywhere = np.where(windows >= 0, windows + channels, -1)
    return everywhere.reshape(-1, windows.shape[1])


def _largest_of(call: Call, form: Affine, windows: Indices) -> Affine:
    """The largest entry of each window, by rounds of pairs.

    Args:
        call: The operation.
        form: All entries.
        windows: Their indices, (n_windows, n_compared); -1 for none.
    """
    order = np.argsort(windows < 0, axis=1, kind="stable")  # those that exist first
    windows = np.take_along_axis(windows, order, axis=1)
    while windows.shape[1] > 1:
        if windows.shape[1] % 2:
            windows = np.pad(windows, ((0, 0), (0, 1)), constant_values=-1)
        first, second = windows[:, 0::2].ravel(), windows[:, 1::2].ravel()
        paired = np.flatnonzero(second >= 0)
        kept = np.where(second >= 0, second, first)
        exists = kept >= 0
        gain = _positive_part(call, form.rows(first[paired]).minus(form.rows(second[paired])))
        place = sparse.csr_array(
            (np.ones(len(paired)), (paired, np.arange(len(paired)))), shape=(len(kept), len(paired))
        )
        winners = form.rows(np.where(exists, kept, 0)).plus(gain.through(place))
        numbers = np.where(exists, np.arange(len(kept)), -1)
        form, windows = winners, numbers.reshape(len(windows), -1)
    return form.rows(windows.ravel())


ACTIVATION_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "relu": _relu,
        "leaky_relu": _leaky_relu,
        "rrelu_with_noise": _randomised_relu,
        "_prelu_kernel": _parametric_relu,
        "abs": _absolute,
        "tanh": _tanh,
        "sigmoid": _sigmoid,
        "hardtanh": _hard_tanh,
        "clamp": _clamp,
        "clamp_min": _clamp,
        "clamp_max": _clamp,
        "hardsigmoid": _hard_sigmoid,
        "softshrink": _soft_shrink,
        "threshold": _threshold,
        "maximum": _maximum,
        "minimum": _minimum,
        "fmax": _maximum,
        "fmin": _minimum,
        "max": _largest,
        "min": _least,
        "amax": _largest,
        "amin": _least,
        "max_pool2d_with_indices": _max_pool,
        "max_pool3d_with_indices": _max_pool,
        "adaptive_max_pool2d": _adaptive_max_pool,
        "adaptive_max_pool3d": _adaptive_max_pool,
        "_softmax": _final("softmax"),
        "_log_softmax": _final("log_softmax"),
        "log_sigmoid_forward": _final("log_sigmoid"),
    }
)
