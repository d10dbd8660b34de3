"""Per-sample gradients from one backward pass over a batch, kept as the factors they are products of.

One forward pass keeps its graph and the inputs of the layers; a backward pass to the layers' *outputs* then
gives δ for all samples at once, and a layer's rule (`layer_rules`) makes per-sample gradients of input and δ.
Parameters without a rule (bare parameters, recurrent layers, packed attention weights) take a slow route:
`torch.func.vmap` over samples, or a loop where that fails. Nothing is taken on trust: on some samples of
every batch each parameter's Σ_i w_i g_i, for random w, is compared with what autograd says. A parameter may
be without a gradient there (an expert that sees no sample, a mask token): then all samples are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.factors import Dense, Factor, nothing, total
from dynprobe.analyzers.numerics.layer_rules import LayerUse, Patches, rule_for
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.model_function import Caller
from dynprobe.analyzers.numerics.sample_by_sample import Loop, n_samples, vectorised

COMPARED = 32
"""Samples of a batch on which the rules are compared with autograd."""
ROUNDING = 100.0
"""Units of the last place of the whole gradient, below which a difference is nothing but rounding."""


class SamplesMixed(ValueError):
    """The outputs of one sample depend on other samples, so that no sample has a gradient of its own."""


@dataclass
class Routes:
    """What comparing with autograd found out about a model, for the passes that follow.

    Args:
        slow: Parameters whose per-sample gradients no layer rule gives.
        compared: Those of them that the slow route was seen to give.
        seen: Parameters that had a gradient when they were compared.
        settled: Whether all batches have been compared, see `settle`.
        vectorised: Whether `vmap` can follow the model; if not, a loop over samples does it.
        entries: Most entries of a sample's outputs.
    """

    slow: set[str] = field(default_factory=set)
    compared: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    settled: bool = False
    vectorised: bool = True
    entries: int = 1


class PerSamplePass:
    """One forward pass over one batch, from which per-sample gradients can be pulled any number of times.

    Args:
        model: In eval mode; its parameters, buffers and flags are not touched.
        inputs: One batch, samples along the first dimension.
        parameters: Names of the parameters to differentiate; all when None.
        routes: Of the same model: filled with what this pass finds out, and trusted where they are settled.

    Attributes:
        outputs: Shape (n, …), attached to the graph.
        routes: To hand to the next pass; `routes.slow` names the parameters on the slow route.
        uses: The calls of layers with a rule, in order.
        patches: Gives what their convolutions see.

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
        self._caller, self._inputs = Caller(model), inputs
        # cuDNN's recurrent layers have no backward pass in eval mode
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._n = n_samples(inputs)
        self.uses: list[LayerUse] = []
        self.patches = Patches()
        self._loop: Loop | None = None
        self.routes = routes if routes is not None else Routes()
        self.outputs = self._forward()
        self.routes.entries = max(self.routes.entries, self.outputs.numel() // max(1, self._n))
        if not self.routes.settled:
            self._verify()

    def pull(self, cotangent: Tensor) -> dict[str, Factor]:
        """Per-sample gradients of Σ_i c_i·f_i: for sample i of c_i·f_i, whatever its shape.

        Args:
            cotangent: c, in the shape of the outputs.

        Returns:
            A factor for n samples per parameter name. Cost: one backward pass, and more on the slow route.
        """
        found, silent = self._fast(cotangent)
        slow = [name for name in self._leaves if name in self.routes.slow | silent]
        if slow:
            found |= self._slow(slow, cotangent)
        return {
            name: found[name] if name in found else nothing(self._n, leaf)
            for name, leaf in self._leaves.items()
        }

    def deltas(self, cotangent: Tensor, uses: Sequence[LayerUse]) -> tuple[Tensor | None, ...]:
        """Gradients of Σ_i c_i·f_i at the outputs of layers; None where the outputs do not depend on them."""
        with self._cudnn():
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
        with self._cudnn():
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
        with self._cudnn():
            outputs: Tensor = torch.func.functional_call(self._caller, values, (inputs,))
        return outputs

    def _cudnn(self) -> Any:
        """Without TF32, whose rounding would pass for a wrong rule."""
        enabled = torch.backends.cudnn.enabled and not self._recurrent
        return torch.backends.cudnn.flags(enabled=enabled, deterministic=True, allow_tf32=False)

    def _fast(self, cotangent: Tensor) -> tuple[dict[str, Factor], set[str]]:
        """By the layers' rules, and the parameters that a layer has and its rule is silent of."""
        parts: dict[str, list[Factor]] = {}
        silent: set[str] = set()
        wanted = [use for use in self.uses if not set(use.names.values()) <= self.routes.slow]
        if wanted:
            for use, delta in zip(wanted, self.deltas(cotangent, wanted), strict=True):
                if delta is None:
                    continue
                factors = use.factors(delta.detach(), self._n, self.patches)
                for local, name in use.names.items():
                    if local in factors:
                        parts.setdefault(name, []).append(factors[local])
                    else:
                        silent.add(name)
        return {name: total(found) for name, found in parts.items()}, silent

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
        sizes = [_norm(part) for part in truth.values()]
        whole = math.hypot(*(size for size in sizes if math.isfinite(size)))
        found, silent = self._fast(cotangent)
        for name, part in truth.items():
            if name in found and name not in silent:
                right = _agree(found[name], weights, part, whole, torch.finfo(part.dtype).eps)
            else:  # without a rule no gradient but zero is right, however small it is
                right = not bool(part.any())
            if not right:
                self.routes.slow.add(name)
            elif bool(part.any()):
                self.routes.seen.add(name)
        asked = [name for name in self._leaves if name in self.routes.slow - self.routes.compared]
        if asked:
            self._compare(asked, cotangent, weights, truth, whole)

    def _compare(
        self, names: list[str], cotangent: Tensor, weights: Tensor, truth: dict[str, Tensor], whole: float
    ) -> None:
        """Compare Σ_i w_i g_i on the slow route, which must be right."""
        # parts of many language models compute in float32 also where the weights are float64
        eps = max(torch.finfo(weights.dtype).eps, torch.finfo(torch.float32).eps)

        def mixed() -> list[str]:
            slow = self._slow(names, cotangent)
            return [name for name in names if not _agree(slow[name], weights, truth[name], whole, eps)]

        wrong = mixed()
        if wrong and self.routes.vectorised:
            self.routes.vectorised = False
            wrong = mixed()
        if wrong:
            raise SamplesMixed(
                f"the gradients of single samples do not add up to the batch's for {wrong[0]!r}: the "
                "outputs of one sample depend on the others (batch statistics, or samples not along the "
                "first dimension)."
            )
        if self._n > 1:
            self.routes.compared |= set(names)


def settle(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    parameters: Sequence[str] | None = None,
    routes: Routes | None = None,
) -> Routes:
    """Compare the layers' rules with autograd on samples of every batch, for what follows to trust them.

    Cost: that of up to 32 samples per batch; three gradients of all data where a parameter has no gradient in
    these. Routes that are settled are returned as they are.

    Args:
        model: In eval mode.
        batches: Pairs (inputs, targets), re-iterable.
        parameters: Names; all when None.
        routes: Filled with what is found out.

    Raises:
        SamplesMixed: If samples influence each other.
    """
    routes = routes if routes is not None else Routes()
    if routes.settled:
        return routes
    for inputs, _ in batches:
        PerSamplePass(model, _few(inputs), parameters=parameters, routes=routes)
    names = {name for name, _ in model.named_parameters()} if parameters is None else set(parameters)
    for inputs, _ in batches:
        if names <= routes.seen | routes.slow:
            break
        PerSamplePass(model, inputs, parameters=parameters, routes=routes)
    routes.settled = True
    return routes


def _few(inputs: Any) -> Any:
    """Some samples, evenly spread."""
    n = n_samples(inputs)
    rows = torch.arange(0, n, max(1, n // COMPARED))[:COMPARED]
    return map_tensors(lambda t: t[rows.to(t.device)] if t.dim() and len(t) == n else t, inputs)


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
        routes: From `settle`; otherwise settled first.

    Yields:
        Per batch a factor per parameter name, and the losses, shape (n,), float64.
    """
    routes = settle(model, batches, parameters=parameters, routes=routes)
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


def _agree(factor: Factor, weights: Tensor, truth: Tensor, whole: float, eps: float) -> bool:
    """To half the digits, relative to the size of the terms of the sum; or to the rounding of the whole.

    Nothing but rounding is the gradient of the bias of an attention's keys, or of one before a normalisation.
    """
    size = _norm(truth)
    if not math.isfinite(size):
        return True  # nothing to compare with: the numbers speak for themselves
    difference = _norm(factor.combine(weights) - truth)
    if difference <= max(eps**0.5 * size, min(ROUNDING * eps, eps**0.5) * whole):
        return True
    terms = float((factor.squared_norm() * weights.double().square()).sum().sqrt())
    return bool(difference <= eps**0.5 * terms)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
