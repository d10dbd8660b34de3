"""Kronecker-factored Fisher information per layer: log-determinant and effective rank, always finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.layer_rules import CONVOLUTIONS, LayerUse
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.output_factor import draw_seeds, output_factor
from dynprobe.analyzers.numerics.per_sample import PerSamplePass, Routes, settle

MAXIMAL_SIDE = 6000
"""Rows of a factor that is still decomposed: two minutes on one core."""


@dataclass(frozen=True)
class LayerFactors:
    """F ≈ A ⊗ G for one layer, by the eigenvalues of its factors.

    Args:
        names: The parameters it covers.
        inputs: Eigenvalues of A, ascending, float64, none negative.
        outputs: Eigenvalues of G, likewise.
    """

    names: tuple[str, ...]
    inputs: Tensor
    outputs: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        """α_i γ_j, all of them."""
        return torch.outer(self.inputs, self.outputs).flatten()

    @property
    def largest(self) -> float:
        """The largest α_i γ_j."""
        return float(self.inputs[-1] * self.outputs[-1])

    @property
    def trace(self) -> float:
        """Σ α_i γ_j."""
        return float(self.inputs.sum() * self.outputs.sum())

    def log_determinant(self, damping: float) -> float:
        """Σ_ij log(α_i γ_j + ε) = log det(A ⊗ G + ε I); NaN without damping."""
        return float((self.eigenvalues + damping).log().sum()) if damping > 0 else math.nan

    def pseudo_log_determinant(self, cut: float) -> float:
        """Σ log(α_i γ_j) over those above the cut; 0 if none is."""
        values = self.eigenvalues
        return float(values[values > cut].log().sum())

    def rank(self, cut: float) -> int:
        """How many α_i γ_j are above the cut."""
        return int((self.eigenvalues > cut).sum())

    @property
    def participation(self) -> float:
        """(Σ αγ)²/Σ (αγ)², the rank of a flat spectrum of the same spread; NaN for none at all."""
        parts = [self.inputs, self.outputs]
        if not all(float(part[-1]) > 0 for part in parts):
            return math.nan
        scaled = [part / part[-1] for part in parts]  # squares of tiny eigenvalues would be zero
        return math.prod(float(part.sum().square() / part.square().sum()) for part in scaled)


@dataclass(frozen=True)
class Kfac:
    """Kronecker factors of all layers that have them.

    Args:
        layers: By the layer's name.
        left_out: Parameters that no layer covers.
        covered: Share of the parameters' entries that are covered.
        exact: Whether G was summed over all classes, or estimated with random signs.
    """

    layers: dict[str, LayerFactors]
    left_out: tuple[str, ...]
    covered: float
    exact: bool

    def damping(self, relative: float) -> float:
        """ε: the largest eigenvalue of all layers times `relative`; NaN if there is no layer."""
        return relative * max((layer.largest for layer in self.layers.values()), default=math.nan)


def kronecker_factors(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss,
    *,
    max_columns: int = 128,
    draws: int = 8,
    seed: int = 0,
    routes: Routes | None = None,
) -> Kfac:
    """A = E_x Σ_t a_t a_tᵀ and G = E_x E_y mean_t δ_t δ_tᵀ for linear layers and convolutions.

    a is the input of a layer with a 1 for its bias, δ the gradient of log p(y|x) at its output for labels y
    of the *model*, t a position (a pixel, a token): summed over in A, averaged over in G, the convention of
    the cited papers ("expand"), under which positions count as independent.

    Cost: one forward pass, and per class (above `max_columns`, per draw of random signs) one backward pass
    to the layers' outputs; then one eigendecomposition per factor.

    Args:
        model: In eval mode.
        batches: Pairs (inputs, targets), re-iterable.
        loss: One that says which labels the model would draw, see `output_factor`.
        max_columns: Classes times positions up to which G is exact.
        draws: Random-sign draws beyond.
        seed: Of the signs.
        routes: From `settle`; otherwise settled first.

    Raises:
        ValueError: If the loss is no such loss, or a factor is not finite.

    References:
        Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML
        2015, §3. Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers",
        ICML 2016, §3. Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network
        architectures", NeurIPS 2023, §3 (K-FAC-expand).
    """
    signs = [torch.Generator().manual_seed(part) for part in draw_seeds(seed, draws)]
    routes = settle(model, batches, routes=routes)
    sums: dict[str, tuple[tuple[str, ...], Tensor, Tensor]] = {}
    n, exact = 0, True
    for inputs, targets in batches:
        passed = PerSamplePass(model, inputs, routes=routes)
        factor = output_factor(loss, passed.outputs, targets)
        few = factor.n_columns <= max_columns
        exact, share = exact and few, 1.0 if few else 1 / draws
        cotangents = factor.columns() if few else (factor.random(generator) for generator in signs)
        uses = _covered(passed)
        grams = [torch.zeros((), dtype=torch.float64) for _ in uses]
        for cotangent in cotangents:
            for i, delta in enumerate(passed.deltas(cotangent, uses) if uses else ()):
                if delta is not None:
                    grams[i] = grams[i].to(delta.device) + share * _gram(uses[i], delta, len(targets))
        for use, gram in zip(uses, grams, strict=True):
            name = next(iter(use.names.values())).rpartition(".")[0]
            second = _second_moment(passed, use)
            _, before, after = sums.get(name, ((), 0, 0))
            sums[name] = (tuple(use.names.values()), before + second, after + gram)
        n += len(targets)
    layers = {
        name: LayerFactors(names, _spectrum(a / n, name), _spectrum(g / n, name))
        for name, (names, a, g) in sums.items()
        if max(a.shape[0], g.dim() and g.shape[0]) <= MAXIMAL_SIDE and g.dim()
    }
    return _assembled(model, layers, exact=exact)


def _covered(passed: PerSamplePass) -> list[LayerUse]:
    """Linear layers and convolutions that are called once and hold their own weight."""
    known = [use for use in passed.uses if _is_known(use.module) and "weight" in use.names]
    counts: dict[str, int] = {}
    for use in passed.uses:
        for name in use.names.values():
            counts[name] = counts.get(name, 0) + 1
    return [
        use
        for use in known
        if all(counts[name] == 1 and name not in passed.routes.slow for name in use.names.values())
    ]


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _rows(use: LayerUse, passed: PerSamplePass) -> Iterator[Tensor]:
    """Inputs of all samples and positions, shapes (some, features)."""
    if isinstance(use.module, CONVOLUTIONS):
        return (seen.flatten(0, 1) for seen in passed.patches.of(use))
    return iter([use.inputs.reshape(-1, use.inputs.shape[-1])])


def _second_moment(passed: PerSamplePass, use: LayerUse) -> Tensor:
    """Σ_i Σ_t a aᵀ, with a 1 appended for the bias."""
    moment = total = torch.zeros((), dtype=torch.float64, device=use.inputs.device)
    count = 0
    for rows in _rows(use, passed):
        moment = moment + (rows.mT @ rows).double()
        total = total + rows.sum(0, dtype=torch.float64)[:, None]
        count += len(rows)
    if "bias" not in use.names:
        return moment
    corner = total.new_full((1, 1), float(count))
    return torch.cat([torch.cat([moment, total], 1), torch.cat([total.mT, corner], 1)])


def _gram(use: LayerUse, delta: Tensor, n: int) -> Tensor:
    """Σ_i mean_t δ δᵀ over n samples."""
    channels_first = isinstance(use.module, CONVOLUTIONS)
    rows = delta.flatten(2).mT.flatten(0, 1) if channels_first else delta.reshape(-1, delta.shape[-1])
    return (rows.mT @ rows).double() * (n / len(rows))


def _spectrum(matrix: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the Kronecker factors of layer {name!r} are not finite.")
    found: Tensor = torch.linalg.eigvalsh(matrix)
    return found.clamp_min(0).cpu()


def _assembled(model: nn.Module, layers: dict[str, LayerFactors], *, exact: bool) -> Kfac:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    inside = {name for layer in layers.values() for name in layer.names}
    covered = sum(sizes[name] for name in inside) / max(1, sum(sizes.values()))
    return Kfac(layers, tuple(name for name in sizes if name not in inside), covered, exact)
