"""Slope and curvature of every sample's loss along one direction in parameter space."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.model_function import ModelFunction, explaining

Along = Callable[[Tensor], Tensor]  # t ↦ the loss of every sample of a batch at θ + t·d
Series = tuple[Tensor, Tensor, Tensor]

CHECKED = 8
"""Samples on which forward mode must agree with reverse mode before it is used."""


@dataclass(frozen=True)
class Directional:
    """The first three Taylor terms of every sample's loss ℓ_i(θ + t·d) at t = 0.

    Attributes:
        value: ℓ_i(θ), float64 on the CPU, shape (n_samples,), in the order of the batches.
        slope: dᵀ∇ℓ_i(θ), likewise.
        curvature: dᵀ∇²ℓ_i(θ) d, likewise.
        method: "forward" or "reverse", the mode of differentiation that the model allowed.
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor
    method: Literal["forward", "reverse"]


def per_sample_curvature(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss,
    direction: Mapping[str, Tensor] | Tensor,
    *,
    parameters: Sequence[str] | None = None,
) -> Directional:
    """Value, slope and curvature of every sample's loss along one direction, exactly.

    Forward mode over forward mode in the one variable t: 3.6 to 4.6 gradients of the data, whatever their
    number. It is used only where it agrees with reverse mode on the first few samples, because some
    operations (LSTM, depending on the dtype) have no forward mode and others have one that is silently wrong
    when it is nested (LayerNorm: torch takes its statistics for constants). Otherwise reverse
    mode three times over, 5.5 to 6.2 gradients: with weights w_i on the samples, ∂/∂w_i of
    ∂²/∂t² Σ w_i ℓ_i(θ + t·d).

    The model is evaluated in eval mode through copies of its parameters and is not changed.

    Args:
        model: The module.
        batches: Pairs (inputs, targets).
        loss: Its `per_sample` is differentiated.
        direction: d, of any length: by parameter name (parameters not named stay put), or one vector of shape
            (n_parameters,) in the order of `named_parameters`.
        parameters: Which parameters a vector stands for, all when None; a mapping may name only these.

    Raises:
        ValueError: The direction does not fit the parameters, or there are no batches.

    References:
        Griewank and Walther, "Evaluating Derivatives" (2008), chapter 13 (Taylor coefficients).
    """
    function = ModelFunction(model, parameters=parameters)
    step = _as_dict(direction, function.leaves)
    start = {name: leaf.detach() for name, leaf in function.leaves.items()}
    anchor = next(iter(start.values()))
    zero = torch.zeros((), dtype=anchor.dtype, device=anchor.device)

    def along(inputs: Any, targets: Tensor) -> Along:
        def losses(t: Tensor) -> Tensor:
            moved = {name: start[name] + t * d for name, d in step.items()}
            return loss.per_sample(function(inputs, {**start, **moved}), targets)

        return losses

    pairs = list(batches)
    if not pairs:
        raise ValueError("There are no batches to take a curvature on.")
    few = map_tensors(lambda tensor: tensor[:CHECKED], pairs[0])
    forward = _forward_mode_is_right(along(*few), zero)
    series = _forward if forward else _reverse
    with explaining():
        columns = zip(*(series(along(*pair), zero) for pair in pairs), strict=True)
    value, slope, curvature = (torch.cat(column).cpu().double() for column in columns)
    return Directional(value, slope, curvature, "forward" if forward else "reverse")


def _forward(losses: Along, zero: Tensor) -> Series:
    one = torch.ones_like(zero)

    def first(t: Tensor) -> tuple[Tensor, ...]:
        value, slope, *_ = torch.func.jvp(losses, (t,), (one,))
        return slope, value

    with torch.no_grad(), _without_fused_inference(), warnings.catch_warnings():
        # torch's own forward mode calls the torch.jit.script that torch deprecates
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        (slope, value), (curvature, _), *_ = torch.func.jvp(first, (zero,), (one,))
    return value, slope, curvature


def _reverse(losses: Along, zero: Tensor) -> Series:
    with torch.enable_grad():
        t = zero.clone().requires_grad_()
        value = losses(t)
        weight = torch.ones_like(value, requires_grad=True)
        slope = _derivative((weight * value).sum(), t)
        curvature = _derivative(slope, t)
        return value.detach(), _derivative(slope, weight).detach(), _derivative(curvature, weight).detach()


def _derivative(of: Tensor, by: Tensor) -> Tensor:
    if not of.requires_grad:
        return torch.zeros_like(by)
    (found,) = torch.autograd.grad(of, by, create_graph=True, materialize_grads=True)
    return found


def _forward_mode_is_right(losses: Along, zero: Tensor) -> bool:
    try:
        _, _, forward = _forward(losses, zero)
    except RuntimeError:  # not implemented for some operation: many messages, NotImplementedError among them
        return False
    with explaining():
        _, _, reverse = _reverse(losses, zero)
    tolerance = math.sqrt(torch.finfo(reverse.dtype).eps) * float(reverse.abs().max())
    return bool(((forward - reverse).abs() <= tolerance).all())


@contextmanager
def _without_fused_inference() -> Iterator[None]:
    """`nn.TransformerEncoderLayer` layer by layer: its fused inference pass has no forward mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _as_dict(direction: Mapping[str, Tensor] | Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(direction, Tensor):
        sizes = [leaf.numel() for leaf in leaves.values()]
        if direction.shape != (sum(sizes),):
            raise ValueError(f"Expected a direction of shape ({sum(sizes)},), got {tuple(direction.shape)}.")
        pieces = zip(leaves, torch.split(direction, sizes), strict=True)
        direction = {name: piece.view_as(leaves[name]) for name, piece in pieces}
    if not direction:
        raise ValueError("`direction` moves no parameter.")
    for name, piece in direction.items():
        if name not in leaves:
            raise ValueError(f"`direction` names a parameter that the model does not have here: {name}.")
        if piece.shape != leaves[name].shape:
            raise ValueError(
                f"`direction` has shape {tuple(piece.shape)} for {name}, "
                f"which is {tuple(leaves[name].shape)}."
            )
    return {name: piece.detach().to(leaves[name]) for name, piece in direction.items()}
