"""Gradients of single samples for any model: vectorised by `vmap` where it can follow, else in a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers.numerics.evaluate import map_tensors

Call = Callable[[dict[str, Tensor], Any], Tensor]
"""`(parameters by name, inputs) -> outputs`, samples along dim 0."""


def vectorised(
    call: Call, leaves: Mapping[str, Tensor], names: Sequence[str], inputs: Any, cotangent: Tensor
) -> dict[str, Tensor]:
    """Gradients of c_i·f_i for every sample i, by `vmap` over the samples of a reverse pass.

    Args:
        call: The model as a function of its parameters.
        leaves: All parameters that it takes.
        names: Those to differentiate.
        inputs: The batch.
        cotangent: c, in the shape of the outputs.

    Returns:
        Shape (n, *parameter) by name. Whatever `vmap` raises on what it cannot follow is raised.
    """
    asked = {name: leaves[name].detach() for name in names}
    rest = {name: leaf.detach() for name, leaf in leaves.items() if name not in asked}
    batched, rebuild = _split(inputs, len(cotangent))

    def one(rows: list[Tensor], row: Tensor) -> dict[str, Tensor]:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            return call(rest | values, rebuild([t.unsqueeze(0) for t in rows]))[0]

        return torch.func.vjp(outputs, asked)[1](row)[0]  # type: ignore[no-any-return]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for vmap
        found = torch.func.vmap(one, randomness="same")(batched, cotangent)
    return {name: found[name].detach() for name in names}


class Loop:
    """One forward pass per sample, all graphs kept, to pull gradients from any number of times.

    Args:
        call: The model as a function of its parameters.
        leaves: All parameters that it takes, requiring gradients.
        inputs: The batch.
        n: Samples in it.
    """

    def __init__(self, call: Call, leaves: dict[str, Tensor], inputs: Any, n: int) -> None:
        self._leaves = leaves
        batched, rebuild = _split(inputs, n)
        with torch.enable_grad():
            self._outputs = [call(leaves, rebuild([t[i : i + 1] for t in batched])) for i in range(n)]

    def pull(self, names: Sequence[str], cotangent: Tensor) -> dict[str, Tensor]:
        """Gradients of c_i·f_i for every sample i, shape (n, *parameter) by name."""
        asked = [self._leaves[name] for name in names]
        rows = [
            torch.autograd.grad(
                outputs,
                asked,
                cotangent[i : i + 1].reshape(outputs.shape),
                retain_graph=True,
                materialize_grads=True,
            )
            for i, outputs in enumerate(self._outputs)
        ]
        return {name: torch.stack(part) for name, part in zip(names, zip(*rows, strict=True), strict=True)}


def _split(inputs: Any, n: int) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors that have samples along their first dimension, and how to put others in their place."""
    batched: list[Tensor] = []

    def has_samples(tensor: Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) == n

    def note(tensor: Tensor) -> Tensor:
        if has_samples(tensor):
            batched.append(tensor)
        return tensor

    map_tensors(note, inputs)

    def rebuild(parts: list[Tensor]) -> Any:
        left = iter(parts)
        return map_tensors(lambda tensor: next(left) if has_samples(tensor) else tensor, inputs)

    return batched, rebuild
