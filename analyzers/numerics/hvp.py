"""Products of the loss Hessian with a vector, exactly averaged over samples.

Reverse over reverse (double backward), because it is the mode that works for the most models: recurrent
layers, weight_norm and checkpointing fail under forward over reverse, and so does `mse_loss` on CPU
("ZeroTensors are immutable", torch 2.13). The graph of the gradient is kept per batch while memory allows,
which saves a third of the cost of every product after the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynprobe.analyzers.numerics.batch_operator import BatchOperator, Chunk
from dynprobe.analyzers.numerics.model_function import NoSecondDerivative

__all__ = ["HessianOperator", "NoSecondDerivative"]

Gradient = tuple[Tensor, ...]


class HessianOperator(BatchOperator[Gradient]):
    """Symmetric linear operator v ↦ Hv, H the Hessian of the mean loss over all samples of `batches`.

    H = (1/N) Σ_i ∇²ℓ_i(θ). Cost: one product is 1.9 gradients of the whole data with the graph kept, 2.9 with
    a fresh graph. Arguments, attributes and errors are those of `BatchOperator`.

    References:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    """

    def _build(self, chunk: Chunk[Gradient]) -> Gradient:
        return self._loss_gradient(chunk, create_graph=True)

    def _gradient_of(self, chunk: Chunk[Gradient]) -> Sequence[Tensor]:
        return chunk.graph if chunk.graph is not None else super()._gradient_of(chunk)

    def _product(self, graph: Gradient, pieces: list[Tensor], *, keep: bool) -> Sequence[Tensor]:
        curved = [i for i, part in enumerate(graph) if part.requires_grad]
        if not curved:  # the loss is linear in these parameters: H is zero, and autograd would raise
            return [torch.zeros_like(piece) for piece in pieces]
        return torch.autograd.grad(
            [graph[i] for i in curved],
            self._leaves,
            [pieces[i] for i in curved],
            retain_graph=keep,
            materialize_grads=True,
        )
