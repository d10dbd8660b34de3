"""What the curvature commands share: an operator from options, its eigenpairs, data cut anew."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.batch_operator import BatchOperator, Mode
from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.lanczos import Eigenpairs, Which, lanczos
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.outer_products import FisherOperator, GaussNewtonOperator
from dynprobe.analyzers.numerics.params import weight_parameters

Curvature = Literal["hessian", "ggn", "fisher"]
End = Literal["largest", "smallest", "largest-magnitude", "both"]
ENDS: dict[str, Which] = {"largest": "LA", "smallest": "SA", "largest-magnitude": "LM", "both": "BE"}
OPERATORS: dict[str, Callable[..., BatchOperator[Any]]] = {
    "hessian": HessianOperator,
    "ggn": GaussNewtonOperator,
    "fisher": FisherOperator,
}
Batches = Sequence[tuple[Any, Tensor]]

GIGABYTE = 1e9

log = logging.getLogger("dynprobe")


@dataclass(frozen=True)
class Problem:
    """A curvature matrix of a model, and how much memory its eigenvectors may take.

    Args:
        model: The network.
        loss: The loss.
        curvature: hessian, ggn or fisher.
        mode: eval, or train for BatchNorm with each batch's own statistics.
        memory: Bytes; half for kept graphs, half for Krylov vectors.
    """

    model: nn.Module
    loss: Loss
    curvature: Curvature = "hessian"
    mode: Mode = "eval"
    memory: float = 4 * GIGABYTE

    def operator(self, batches: Batches, parameters: Sequence[str] | None = None) -> BatchOperator[Any]:
        """The matrix on these data, restricted to some parameters.

        Raises:
            OptionError: If the loss defines no distribution, which a Fisher matrix needs.
        """
        for name, module in self.model.named_modules():
            if "Attention" in type(module).__name__ or isinstance(module, nn.RNNBase):
                log.debug("%s: on torch's plain kernels; the fused ones cannot be derived twice", name)
        build = OPERATORS[self.curvature]
        try:
            return build(
                self.model,
                batches,
                self.loss,
                parameters=parameters,
                mode=self.mode,
                memory=self.memory / 2,
            )
        except ValueError as error:
            raise OptionError(f"{error}", f"Curvature {self.curvature}, mode {self.mode}.") from error

    def eigenpairs(
        self,
        operator: BatchOperator[Any],
        k: int,
        *,
        end: End = "largest",
        tol: float = 1e-4,
        seed: int = 0,
        max_products: int = 0,
        reserved: int = 0,
    ) -> Eigenpairs:
        """Extreme eigenpairs of an operator within the memory, of which so many vectors are for other things.

        Raises:
            OptionError: If there are fewer parameters than pairs, or too little memory for them.
        """
        n = operator.n_parameters
        if k > n:
            raise OptionError(f"top-k {k} is more than the {n} parameters.", f"Give {n} or fewer.")
        dtype = operator.dtype if operator.dtype == torch.float64 else torch.float32
        vector = n * torch.finfo(dtype).bits // 8
        reserved += k  # the eigenvectors themselves
        room = int(self.memory / 2 / vector) - reserved
        if room < min(n, k + 8):
            needed = 2 * (min(n, k + 8) + reserved) * vector / GIGABYTE
            raise OptionError(
                f"memory {self.memory / GIGABYTE:g} GB is too little for {k} eigenvectors of {n:,} "
                "parameters and the vectors they are found with.",
                f"Give --memory {1.01 * needed:.3g} or more, or a smaller --top-k.",
            )
        return lanczos(
            operator.matvec,
            n,
            k=k,
            which=ENDS[end],
            tol=tol,
            seed=seed,
            dtype=dtype,
            device=operator.device,
            rounding=operator.rounding,
            max_iter=max_products or None,
            max_basis=min(room, n),
        )


def chosen_parameters(model: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that a regular expression finds; all for an empty one.

    Raises:
        OptionError: If it is no regular expression or finds nothing.
    """
    names = list(weight_parameters(model))
    try:
        chosen = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise OptionError(
            f"params {pattern!r} is no regular expression: {error}.", "Try 'conv|fc'."
        ) from error
    if not chosen:
        raise OptionError(f"params {pattern!r} fits no parameter.", f"There are {', '.join(names)}.")
    return chosen


def in_batches_of(batches: Batches, size: int) -> Batches:
    """The same samples in the same order, cut into batches of `size`; a last one alone joins the others."""
    inputs, targets = gathered(batches)
    n = len(targets)
    size = min(size or n, n)
    edges = [*range(0, n, size), n]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    return [(rows(inputs, slice(a, b)), targets[a:b]) for a, b in itertools.pairwise(edges)]


def check_subsets(batches: Batches, count: int) -> None:
    """Raises where there are too few samples for so many subsets.

    Raises:
        OptionError: If there are fewer than two samples for each.
    """
    n = sum(len(targets) for _, targets in batches)
    if n < 2 * count:
        raise OptionError(f"subsets {count} of {n} samples have fewer than two each.", "Give fewer subsets.")


def disjoint_subsets(batches: Batches, count: int, seed: int) -> list[Batches]:
    """Random disjoint subsets of nearly equal size, each as one batch or as many as the data came in."""
    inputs, targets = gathered(batches)
    n = len(targets)
    largest = max(len(part) for _, part in batches)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    subsets = []
    for part in torch.tensor_split(order, count):
        chosen = part.sort().values.to(targets.device)
        subsets.append(in_batches_of([(rows(inputs, chosen), targets[chosen])], largest))
    return subsets


def gathered(batches: Batches) -> tuple[Any, Tensor]:
    """All samples as one batch."""
    pairs = list(batches)
    return _joined([inputs for inputs, _ in pairs]), torch.cat([targets for _, targets in pairs])


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], dict):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return tuple(_joined(list(column)) for column in zip(*parts, strict=True))


def rows(inputs: Any, which: Any) -> Any:
    """Some samples of a tensor, or of each one of a tuple or dict."""
    return map_tensors(lambda tensor: tensor[which], inputs)
