"""Products of the loss Hessian with a vector, exactly averaged over samples.

Reverse over reverse (double backward), because it is the mode that works for the most models: recurrent
layers, weight_norm and checkpointing fail under forward over reverse, and so does `mse_loss` on CPU
("ZeroTensors are immutable", torch 2.13). The graph of the gradient is kept per batch while memory allows,
which saves a third of the cost of every product after the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.params import set_eval, weight_parameters

GRAPH_TO_SAVED = 3.0
"""Bytes of a kept gradient graph per byte that the forward pass saves; measured 1.8 on a conv net, an MLP
and a Transformer layer, 2.7 on an LSTM, rounded up."""


class NoSecondDerivative(RuntimeError):
    """An operation of the model has no second derivative in this version of torch."""


class _Caller(nn.Module):
    """Makes `call(model, inputs)` a module, which `functional_call` can fill with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        return call(self.model, inputs)


@dataclass
class _Chunk:
    """One batch: its share of the samples, and its gradient with its graph while that is kept."""

    inputs: Any
    targets: Tensor
    share: float
    gradient: tuple[Tensor, ...] | None = None


class HessianOperator:
    """Symmetric linear operator v ↦ Hv, H the Hessian of the mean loss over all samples of `batches`.

    H = (1/N) Σ_i ∇²ℓ_i(θ): every *sample* weighs the same, whatever the batch sizes. The model is evaluated
    in eval mode (dropout off, BatchNorm with its stored statistics) through copies of its parameters, so the
    model itself, its buffers and its `.grad` fields are never written. Sums over batches are kept in float64.

    Cost: one product is 1.9 gradients of the whole data with the graph kept, 2.9 with a fresh graph.

    Args:
        model: The module; its training flags are put back after every pass.
        batches: Sized, re-iterable pairs (inputs, targets).
        loss: Mean loss over the samples of a batch, `loss(outputs, targets)` → scalar.
        parameters: Names of the parameters that H is restricted to (a diagonal block); all when None.
        at: Other values for (some of) the parameters and buffers, by name: H there, not at the model's own.
        memory: Bytes that kept graphs may take; 0 builds every graph afresh.

    Attributes:
        n_parameters: Length of the vectors.
        n_matvec: Products made so far.
        rounding: Machine epsilon of the model's dtype: the relative noise floor of a product.

    Raises:
        ValueError: A name in `parameters` or `at` that the model lacks, or no samples at all.
        NoSecondDerivative: From a product, if an operation of the model cannot be differentiated twice.

    References:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Tensor]],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        parameters: Sequence[str] | None = None,
        at: Mapping[str, Tensor] | None = None,
        memory: float = 1e9,
    ) -> None:
        weights = weight_parameters(model)
        buffers = dict(model.named_buffers())
        at = dict(at or {})
        _refuse_unknown("parameters", parameters or (), weights)
        _refuse_unknown("at", at, {**weights, **buffers})
        self._caller = _Caller(model)
        self._loss = loss
        self._fixed = {name: at.get(name, value).detach() for name, value in buffers.items()}
        self._leaves: dict[str, Tensor] = {}
        chosen = list(weights) if parameters is None else list(parameters)
        for name, value in weights.items():
            copy = at.get(name, value).detach().to(value).clone()
            if name in chosen:
                self._leaves[name] = copy.requires_grad_()
            else:
                self._fixed[name] = copy
        self._names = list(self._leaves)
        self._sizes = [leaf.numel() for leaf in self._leaves.values()]
        first = next(iter(self._leaves.values()))
        self.device, self.dtype = first.device, first.dtype
        self.rounding: float = torch.finfo(first.dtype).eps
        self.n_parameters = sum(self._sizes)
        self.n_matvec = 0
        self._chunks = self._plan(batches, memory)

    def _plan(self, batches: Iterable[tuple[Any, Tensor]], memory: float) -> list[_Chunk]:
        pairs = list(batches)
        total = sum(len(targets) for _, targets in pairs)
        if total == 0:
            raise ValueError("The Hessian of a mean loss needs at least one sample; `batches` is empty.")
        chunks = [_Chunk(inputs, targets, len(targets) / total) for inputs, targets in pairs]
        if memory > 0:
            per_share = GRAPH_TO_SAVED * self._saved_bytes(chunks[0]) / chunks[0].share
            for chunk in chunks:
                memory -= per_share * chunk.share
                if memory < 0:
                    break
                chunk.gradient = self._gradient(chunk)
        return chunks

    def _forward(self, chunk: _Chunk) -> Tensor:
        values = {f"model.{name}": value for name, value in {**self._fixed, **self._leaves}.items()}
        with (
            _evaluating(self._caller),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
        ):
            outputs = torch.func.functional_call(self._caller, values, (chunk.inputs,), strict=False)
            return self._loss(outputs, chunk.targets) * chunk.share

    def _gradient(self, chunk: _Chunk) -> tuple[Tensor, ...]:
        with torch.enable_grad(), _explaining():
            return torch.autograd.grad(
                self._forward(chunk), list(self._leaves.values()), create_graph=True, materialize_grads=True
            )

    def _saved_bytes(self, chunk: _Chunk) -> int:
        """Bytes one forward pass saves for its backward pass, each storage once, parameters not counted."""
        own = {leaf.untyped_storage().data_ptr() for leaf in (*self._leaves.values(), *self._fixed.values())}
        seen: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # detached: keeping the tensor itself would be a reference cycle

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self._forward(chunk)
        return sum(seen.values())

    def gradient(self) -> Tensor:
        """Gradient of the mean loss, float64, shape (n_parameters,)."""
        total = torch.zeros(self.n_parameters, dtype=torch.float64, device=self.device)
        for chunk in self._chunks:
            parts = chunk.gradient or self._gradient(chunk)
            total += torch.cat([part.detach().double().flatten() for part in parts])
        return total

    def matvec(self, vector: Tensor) -> Tensor:
        """Product Hv.

        Args:
            vector: Shape (n_parameters,), any floating dtype.

        Returns:
            Hv, float64, shape (n_parameters,).
        """
        pieces = self._split(vector)
        total = torch.zeros(self.n_parameters, dtype=torch.float64, device=self.device)
        for chunk in self._chunks:
            kept = chunk.gradient is not None
            parts = self._product(chunk.gradient or self._gradient(chunk), pieces, keep=kept)
            total += torch.cat([part.double().flatten() for part in parts])
        self.n_matvec += 1
        return total

    __call__ = matvec

    def _product(
        self, gradient: tuple[Tensor, ...], pieces: list[Tensor], *, keep: bool
    ) -> tuple[Tensor, ...] | list[Tensor]:
        curved = [i for i, part in enumerate(gradient) if part.requires_grad]
        if not curved:  # the loss is linear in these parameters: H is zero, and autograd would raise
            return [torch.zeros_like(piece) for piece in pieces]
        with _explaining():
            return torch.autograd.grad(
                [gradient[i] for i in curved],
                list(self._leaves.values()),
                [pieces[i] for i in curved],
                retain_graph=keep,
                materialize_grads=True,
            )

    def _split(self, vector: Tensor) -> list[Tensor]:
        if vector.shape != (self.n_parameters,):
            raise ValueError(f"Expected a vector of shape ({self.n_parameters},), got {tuple(vector.shape)}.")
        parts = torch.split(vector.detach().to(self.device, self.dtype), self._sizes)
        return [part.view_as(leaf) for part, leaf in zip(parts, self._leaves.values(), strict=True)]

    def as_dict(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector of this operator as one tensor per parameter name, in the parameters' shapes and dtype."""
        return dict(zip(self._names, self._split(vector), strict=True))


def _refuse_unknown(what: str, names: Iterable[str], known: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"`{what}` names what the model does not have: {', '.join(unknown)}.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own training flag afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    set_eval(model)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        text = str(error)
        if "derivative for" in text and "not implemented" in text:
            operation = text.split("derivative for")[1].split("is not implemented")[0].strip(" '")
            raise NoSecondDerivative(
                f"The model uses an operation without a second derivative in torch {torch.__version__}: "
                f"{operation}. Attention is handled; EmbeddingBag is not: use Embedding followed by a mean."
            ) from error
        raise
