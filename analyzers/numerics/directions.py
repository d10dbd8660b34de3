"""Random directions in parameter space, scaled to the filters of the network (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.params import filter_axis, weight_parameters

Direction = dict[str, Tensor]
Normalization = Literal["filter", "layer", "none"]

TINY = 1e-10  # added to a direction's norm, as the authors' code does


def random_directions(
    model: nn.Module,
    n: int = 2,
    *,
    seed: int,
    normalize: Normalization = "filter",
    ignore_1d: bool = True,
) -> list[Direction]:
    """Draw Gaussian directions and scale them to the weights.

    With `filter`, each filter of the direction gets the norm of the network's filter (§4 of the paper):
    d_f ← d_f · ‖w_f‖ / (‖d_f‖ + 1e-10). So ‖d‖ = ‖weights with more than one dimension‖ unless a filter is
    zero, and a dead filter has a zero direction. Buffers are never part of a direction.

    The numbers are those of tomgoldstein/loss-landscape after `torch.manual_seed(seed)`, bit for bit: drawn
    in float32 for every parameter in order, ignored ones included, first the whole first direction.

    Args:
        model: Its parameters, a tied tensor once.
        n: How many directions.
        seed: Of this function's own generator; the global random state is untouched.
        normalize: `filter`, `layer` (each tensor to its weight's norm) or `none`.
        ignore_1d: Biases and normalisation parameters get zero, as the authors' `biasbn` does. Otherwise
            their direction is the parameter itself, also as theirs.

    Returns:
        `n` dicts of name to tensor, on the parameters' devices, of their dtype (float32 for half precision).

    References:
        Li, Xu, Taylor, Studer, Goldstein. Visualizing the loss landscape of neural nets. NeurIPS 2018,
        arXiv:1712.09913, §4.
    """
    weights = {name: w for name, w in weight_parameters(model).items() if w.is_floating_point()}
    axes = filter_axis(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        {name: torch.randn(w.shape, generator=generator, dtype=torch.float32) for name, w in weights.items()}
        for _ in range(n)
    ]
    return [_finish(direction, weights, axes, normalize, ignore_1d) for direction in drawn]


def _finish(
    direction: Direction,
    weights: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    normalize: Normalization,
    ignore_1d: bool,
) -> Direction:
    direction = {name: d.to(weights[name].device, _wide(weights[name])) for name, d in direction.items()}
    for name, w in weights.items():
        if w.dim() <= 1:
            direction[name] = torch.zeros_like(direction[name]) if ignore_1d else _widened(w).clone()
    return normalise(direction, weights, axes, normalize)


def normalise(
    direction: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    axes: Mapping[str, int | None],
    kind: Normalization,
) -> Direction:
    """Scale a direction to the weights; tensors with at most one dimension are returned as they are.

    Args:
        direction: Name to tensor.
        weights: Name to tensor, at least the names of `direction`.
        axes: From `params.filter_axis`.
        kind: `filter`, `layer` or `none`.

    Returns:
        A new dict; the given tensors are not changed.

    Raises:
        ValueError: `kind` is none of the three.
    """
    if kind not in get_args(Normalization):
        raise ValueError(f"normalize is one of {', '.join(get_args(Normalization))}, not {kind!r}")
    result: Direction = {}
    for name, d in direction.items():
        axis = axes.get(name, 0)
        if kind == "none" or d.dim() <= 1 or axis is None:
            result[name] = d
        elif kind == "layer":
            result[name] = d * (_norm(_widened(weights[name])) / (_norm(d) + TINY))
        else:
            result[name] = d * (filter_norms(_widened(weights[name]), axis) / (filter_norms(d, axis) + TINY))
    return result


def filter_norms(tensor: Tensor, axis: int) -> Tensor:
    """Return the norm of each filter, in a shape that broadcasts against the tensor.

    Args:
        tensor: A weight or a direction with more than one dimension.
        axis: Which dimension indexes filters; a `FilterAxis` with groups splits dim 0 into that many blocks.
    """
    groups = getattr(axis, "groups", 1)
    if groups > 1:
        blocks = tensor.reshape(groups, -1, *tensor.shape[1:])
        rows = blocks.transpose(1, 2).reshape(groups, tensor.shape[1], -1)
        norms = _norm(rows, 2)  # (groups, out / groups)
        spread = norms.repeat_interleave(tensor.shape[0] // groups, dim=0)
        return spread.reshape(*spread.shape, *[1] * (tensor.dim() - 2))
    rows = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1).contiguous()
    shape = [1] * tensor.dim()
    shape[axis] = tensor.shape[axis]
    return _norm(rows, 1).reshape(shape)


def _norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim)
    return norm


def _wide(tensor: Tensor) -> torch.dtype:
    """Half precision cannot hold a norm of many entries: directions are float32 or float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor))
