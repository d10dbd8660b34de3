"""Per-sample gradients from one backward pass over a batch, kept as the factors they are products of.

One forward pass keeps its graph and the inputs of the layers; a backward pass to the layers' *outputs* then
gives δ for all samples at once, and a layer's rule (`layer_rules`) makes per-sample gradients of input and δ.
Parameters without a rule (bare parameters, recurrent layers, packed attention weights) take a slow route:
`torch.func.vmap` over samples, or a loop where that fails. Nothing is taken on trust: the first pass compares
every parameter's Σ_i w_i g_i, for random w, with what autograd says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.factors import Dense, Factor, nothing, total
from dynprobe.analyzers.numerics.layer_rules import (
    CONVOLUTIONS,
    by_position,
    convolution,
    patches,
    rule_for,
)
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.model_function import _Caller
from dynprobe.analyzers.numerics.sample_by_sample import Loop, vectorised

KEPT_PATCHES = 2**28
"""Bytes of convolution patches that one pass keeps for its next pull."""


class SamplesMixed(ValueError):
    """The outputs of one sample depend on other samples, so that no sample has a gradient of its own."""


@dataclass
class Routes:
    """What the first pass over a model found out, for the next ones.

    Args:
        slow: Parameters whose per-sample gradients no layer rule gives.
        verified: Whether the rules were compared with autograd.
        vectorised: Whether `vmap` can follow the model; if not, a loop over samples does it.
    """

    slow: set[str] = field(default_factory=set)
    verified: bool = False
    vectorised: bool = True


@dataclass
class LayerUse:
    """One call of a layer in the forward pass.

    Args:
        module: The layer.
        inputs: What it was given.
        edge: Its output's place in the graph.
        names: Its parameters that are differentiated: own name to name in the model.
        seen: Patches of a convolution, once they were needed.
    """

    module: nn.Module
    inputs: Tensor
    edge: GradientEdge
    names: dict[str, str]
    seen: Tensor | None = None


class PerSamplePass:
    """One forward pass over one batch, from which per-sample gradients can be pulled any number of times.

    Args:
        model: In eval mode; its parameters, buffers and flags are not touched.
        inputs: One batch, samples along the first dimension.
        parameters: Names of the parameters to differentiate; all when None.
        routes: From an earlier pass over the same model, which spares finding out again what needs the slow
            route.

    Attributes:
        outputs: Shape (n, …), attached to the graph.
        routes: To hand to the next pass; `routes.slow` names the parameters on the slow route.
        uses: The calls of layers with a rule, in order.

    Raises:
        ValueError: If the model is in training mode, or has no parameter of a name.
        SamplesMixed: If samples influence each other (batch statistics, samples not along dim 0).
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        parameters: Sequence[str] | None = None,
        routes: Routes | None = None,
    ) -> None:
        # an exported program has its mode built in, and an `eval` of its own that says so
        if "eval" not in vars(model) and any(module.training for module in model.modules()):
            raise ValueError("per-sample gradients need eval mode: call model.eval(), or use frozen_eval.")
        own = dict(model.named_parameters())
        if unknown := sorted(set(parameters or ()) - set(own)):
            raise ValueError(f"the model has no parameter {', '.join(unknown)}.")
        chosen = list(own) if parameters is None else list(parameters)
        self._leaves = {name: own[name].detach().requires_grad_() for name in chosen}
        self._fixed = {name: p.detach() for name, p in own.items() if name not in self._leaves}
        self._caller, self._inputs = _Caller(model), inputs
        # cuDNN's recurrent layers have no backward pass in eval mode
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._n = _count(inputs)
        self.uses: list[LayerUse] = []
        self._patches = 0
        self._loop: Loop | None = None
        self.routes = routes if routes is not None else Routes()
        self.outputs = self._forward()
        if not self.routes.verified:
            self._verify()

    def pull(self, cotangent: Tensor) -> dict[str, Factor]:
        """Per-sample gradients of Σ_i c_i·f_i: for sample i of c_i·f_i, whatever its shape.

        Args:
            cotangent: c, in the shape of the outputs.

        Returns:
            A factor for n samples per parameter name. Cost: one backward pass, and more on the slow route.
        """
        found = self._fast(cotangent)
        slow = [name for name in self._leaves if name in self.routes.slow]
        if slow:
            found |= self._slow(slow, cotangent)
        return {name: found[name] for name in self._leaves}

    def deltas(self, cotangent: Tensor, uses: Sequence[LayerUse]) -> tuple[Tensor | None, ...]:
        """Gradients of Σ_i c_i·f_i at the outputs of layers; None where the outputs do not depend on them."""
        return torch.autograd.grad(
            self.outputs,
            [use.edge for use in uses],
            cotangent.to(self.outputs),
            retain_graph=True,
            allow_unused=True,
        )

    def gradient(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Gradient of Σ_i c_i·f_i, summed over samples: one backward pass, whatever the layers."""
        if not self.outputs.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
        parts = torch.autograd.grad(
            self.outputs,
            list(self._leaves.values()),
            cotangent.to(self.outputs),
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(self._leaves, parts, strict=True))

    def _forward(self) -> Tensor:
        names = {id(leaf): name for name, leaf in self._leaves.items()}

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            given = args[0] if args else kwargs.get("input")
            if not isinstance(output, Tensor) or not isinstance(given, Tensor) or not output.requires_grad:
                return None
            here = {
                local: names[id(value)]
                for local in ("weight", "bias")
                if id(value := getattr(module, local, None)) in names
            }
            if not here:
                return None
            if isinstance(module, nn.Embedding) and given.dim() > 1 and given.shape[0] == 1 < self._n:
                # positions shared by all samples: spread out, so that each sample has its own gradient
                given = given.expand(self._n, *given.shape[1:])
                output = output.expand(self._n, *output.shape[1:])
            if output._is_view():
                output = output.clone()  # an in-place operation on a view would cut off its edge
            self.uses.append(LayerUse(module, given.detach(), get_gradient_edge(output), here))
            return output

        hooks = [
            module.register_forward_hook(note, with_kwargs=True)
            for module in self._caller.model.modules()
            if rule_for(module) is not None
        ]
        try:
            with torch.enable_grad():
                outputs = self._call(self._leaves, self._inputs)
        finally:
            for hook in hooks:
                hook.remove()
        self._n = len(outputs)
        return outputs

    def _call(self, leaves: dict[str, Tensor], inputs: Any) -> Tensor:
        values = {f"model.{name}": value for name, value in {**self._fixed, **leaves}.items()}
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not self._recurrent):
            outputs: Tensor = torch.func.functional_call(self._caller, values, (inputs,))
        return outputs

    def _fast(self, cotangent: Tensor) -> dict[str, Factor]:
        """By the layers' rules; a parameter no rule speaks of gets zeros, which `_verify` finds out."""
        parts: dict[str, list[Factor]] = {}
        wanted = [use for use in self.uses if not set(use.names.values()) <= self.routes.slow]
        if wanted:
            for use, delta in zip(wanted, self.deltas(cotangent, wanted), strict=True):
                if delta is not None:
                    for local, factor in self._factors(use, delta).items():
                        if local in use.names:
                            parts.setdefault(use.names[local], []).append(factor)
        return {
            name: total(parts[name]) if name in parts else nothing(self._n, leaf)
            for name, leaf in self._leaves.items()
        }

    def _factors(self, use: LayerUse, delta: Tensor) -> dict[str, Factor]:
        module, inputs, delta = use.module, use.inputs, delta.detach()
        if inputs.shape[0] != self._n or delta.shape[0] != self._n:
            if not by_position(module) or inputs.shape[0] % self._n or delta.shape[0] % self._n:
                return {}
            inputs, delta = (t.reshape(self._n, -1, *t.shape[1:]) for t in (inputs, delta))
        if isinstance(module, CONVOLUTIONS):
            return convolution(module, self.seen(use), delta)
        rule = rule_for(module)
        return rule(module, inputs, delta) if rule is not None else {}

    def seen(self, use: LayerUse) -> Tensor:
        """A convolution's patches, shape (n, positions, entries); kept for the next time if memory allows."""
        if use.seen is not None:
            return use.seen
        seen = patches(use.module, use.inputs)
        if self._patches + seen.nbytes <= KEPT_PATCHES:
            self._patches += seen.nbytes
            use.seen = seen
        return seen

    def _slow(self, names: Sequence[str], cotangent: Tensor) -> dict[str, Factor]:
        cotangent = cotangent.detach().to(self.outputs)
        if self.routes.vectorised:
            try:
                found = vectorised(self._call, self._leaves, names, self._inputs, cotangent)
                return {name: Dense(gradients) for name, gradients in found.items()}
            except Exception:  # vmap raises anything on what it cannot follow; the loop's own errors do count
                self.routes.vectorised = False
        if self._loop is None:
            try:
                self._loop = Loop(self._call, self._leaves, self._inputs, self._n)
            except (RuntimeError, ValueError) as error:
                raise SamplesMixed(f"the model cannot be run on a single sample: {error}") from error
        return {name: Dense(gradients) for name, gradients in self._loop.pull(names, cotangent).items()}

    def _verify(self) -> None:
        """Compare Σ_i w_i g_i with autograd for every parameter, on the fast route, then on the slow."""
        generator = torch.Generator().manual_seed(0)
        shape = self.outputs.shape
        cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.outputs)
        weights = torch.randn(self._n, generator=generator, dtype=torch.float64).to(self.outputs)
        truth = self.gradient(cotangent * weights.reshape(-1, *[1] * (len(shape) - 1)))
        found = self._fast(cotangent)
        wrong = [name for name in self._leaves if not _agree(found[name], weights, truth[name])]
        self.routes.slow |= set(wrong)
        if wrong:
            slow = self._slow(wrong, cotangent)
            if self.routes.vectorised and not all(_agree(slow[n], weights, truth[n]) for n in wrong):
                self.routes.vectorised = False
                slow = self._slow(wrong, cotangent)
            mixed = [name for name in wrong if not _agree(slow[name], weights, truth[name])]
            if mixed:
                raise SamplesMixed(
                    f"the gradients of single samples do not add up to the batch's for {mixed[0]!r}: the "
                    "outputs of one sample depend on the others (batch statistics, or samples not along the "
                    "first dimension)."
                )
        self.routes.verified = self._n > 1


def loss_gradients(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss,
    *,
    parameters: Sequence[str] | None = None,
    routes: Routes | None = None,
) -> Iterator[tuple[dict[str, Factor], Tensor]]:
    """Per-sample gradients ∇ℓ_i of the loss, batch by batch.

    Args:
        model: In eval mode.
        batches: Pairs (inputs, targets).
        loss: Gives `per_sample(outputs, targets)`.
        parameters: Names; all when None.
        routes: Filled with what the first pass finds out.

    Yields:
        Per batch a factor per parameter name, and the losses, shape (n,), float64.
    """
    routes = routes if routes is not None else Routes()
    for inputs, targets in batches:
        passed = PerSamplePass(model, inputs, parameters=parameters, routes=routes)
        losses, cotangent = loss_cotangent(loss, passed.outputs, targets)
        yield passed.pull(cotangent), losses


def loss_cotangent(loss: Loss, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses per sample, float64, and their gradients with respect to the outputs.

    Raises:
        ValueError: If the loss has not one value for each sample.
    """
    at = outputs.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss.per_sample(at, targets)
        if losses.shape != (len(outputs),):
            raise ValueError(f"{len(outputs)} samples have losses of shape {tuple(losses.shape)}.")
        cotangent = torch.autograd.grad(losses.sum(), at)[0]
    return losses.detach().double(), cotangent


def _agree(factor: Factor, weights: Tensor, truth: Tensor) -> bool:
    """To half the digits of the dtype, relative to the size of the terms of the sum."""
    if not bool(torch.isfinite(truth).all()):
        return True  # nothing to compare with: the numbers speak for themselves
    difference = torch.linalg.vector_norm(factor.combine(weights) - truth.double())
    terms = (factor.squared_norm() * weights.double().square()).sum().sqrt()
    scale = torch.maximum(terms, torch.linalg.vector_norm(truth.double()))
    return bool(difference <= torch.finfo(truth.dtype).eps ** 0.5 * scale)


def _count(inputs: Any) -> int:
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(len(tensor) if tensor.dim() else 1)
        return tensor

    map_tensors(note, inputs)
    return sizes[0] if sizes else 1
