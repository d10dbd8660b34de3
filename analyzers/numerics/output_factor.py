"""A factor S of the Fisher information M = S Sᵀ of a sample's outputs, when the model draws the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprobe.analyzers.numerics.losses import IGNORED_TARGET, Loss, get_loss


@dataclass(frozen=True)
class OutputFactor:
    """S for every sample of a batch, as a linear map from coefficients to cotangents of the outputs.

    Args:
        shape: Of the coefficients, (n, …): one entry per column of S.
        apply: Coefficients s, float64, to S s in the shape and dtype of the outputs.
        device: Where the outputs are.
    """

    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]
    device: torch.device

    @property
    def n_columns(self) -> int:
        """Columns of S: one per class and position."""
        return int(torch.Size(self.shape[1:]).numel())

    def columns(self) -> Iterator[Tensor]:
        """The columns of S one after another, each for all samples, in the shape of the outputs."""
        for k in range(self.n_columns):
            unit = torch.zeros(self.shape[0], self.n_columns, dtype=torch.float64, device=self.device)
            unit[:, k] = 1
            yield self.apply(unit.reshape(self.shape))

    def random(self, generator: torch.Generator) -> Tensor:
        """S s with random signs s: E[S s sᵀ Sᵀ] = M, and independent between samples.

        Drawn one sample after the other: the same signs, however the samples are split into batches.
        """
        signs = torch.randint(2, self.shape, generator=generator, dtype=torch.int8) * 2 - 1
        return self.apply(signs.to(self.device, torch.float64))


def draw_seeds(seed: int, draws: int) -> list[int]:
    """One seed per draw: each draw's signs come from a generator of its own, in the order of the data."""
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(2**62, (), generator=generator)) for _ in range(draws)]


def output_factor(loss: Loss, outputs: Tensor, targets: Tensor) -> OutputFactor:
    """S with S Sᵀ = M = E_y[∇_z log p(y|z) ∇_z log p(y|z)ᵀ], y drawn by the model from its outputs z.

    - `cross_entropy`, p = softmax(z): S = diag(√p) − p√pᵀ, one column per class;
    - `causal_lm`: the same at every position for the token after it;
    - `bce_with_logits`, p = σ(z): S = diag(√(p(1 − p)));
    - `mse`, a Gaussian with density ∝ exp(−loss): S = √2 I.

    Several terms in a sample (pixels, tokens, outputs) are averaged within it as the loss does, so that M is
    also the second derivative of the loss. Computed in float64, and from p itself: neither 1 − p of the
    likeliest class nor a difference of cumulated probabilities, which is negative by rounding on a network
    that fits its data, is ever formed.

    Args:
        loss: By one of these names, as `get_loss` returns it.
        outputs: Shape (n, classes, …) or, for `causal_lm`, (n, positions, classes).
        targets: Say only which positions the loss ignores.

    Raises:
        ValueError: The loss is none of these, so that it is not known which labels the model would draw.
    """
    make = _FACTORS.get(loss.name)
    if make is not None and loss != get_loss(loss.name):
        raise ValueError(
            f"{loss.name} is a function of your own here, which may weigh or smooth labels; only the loss "
            f"of that name (--loss {loss.name}) is known not to."
        )
    if make is None:
        raise ValueError(
            f"the Fisher information needs a loss that says which labels the model would draw: "
            f"{', '.join(_FACTORS)}; {loss.name!r} does not."
        )
    return make(outputs.detach(), targets)


def _softmax(outputs: Tensor, targets: Tensor) -> OutputFactor:
    p = outputs.double().softmax(1)
    top = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.argmax(1, keepdim=True), value=True)
    rest = torch.where(top, p.masked_fill(top, 0).sum(1, keepdim=True), 1 - p)  # 1 − p without cancellation
    root, share = p.sqrt(), position_share(outputs, targets).sqrt()

    def apply(s: Tensor) -> Tensor:
        terms = root * s
        lesser = terms.masked_fill(top, 0).sum(1, keepdim=True)
        others = torch.where(top, lesser, lesser + (terms * top).sum(1, keepdim=True) - terms)
        return (share * (terms * rest - p * others)).to(outputs.dtype)

    return OutputFactor(tuple(outputs.shape), apply, outputs.device)


def position_share(outputs: Tensor, targets: Tensor) -> Tensor:
    """What each position counts within its sample, shaped to multiply the outputs; float64.

    NaN, as the loss is, for a sample without any that counts.
    """
    if targets.is_floating_point():
        counted = torch.ones_like(outputs[:, 0], dtype=torch.float64)
    else:
        counted = (targets != IGNORED_TARGET).double()
    whole = counted.reshape(len(counted), -1).sum(1)
    return (counted / whole.reshape(-1, *[1] * (counted.dim() - 1))).unsqueeze(1)


def _next_token(outputs: Tensor, targets: Tensor) -> OutputFactor:
    shifted = _softmax(outputs[:, :-1].transpose(1, 2), targets[:, 1:])

    def apply(s: Tensor) -> Tensor:
        product = shifted.apply(s).transpose(1, 2)
        return torch.cat([product, torch.zeros_like(product[:, :1])], 1)  # nothing follows the last token

    return OutputFactor(shifted.shape, apply, outputs.device)


def _coins(outputs: Tensor, _targets: Tensor) -> OutputFactor:
    z = outputs.double()
    root = (z.sigmoid() * (-z).sigmoid() / outputs[0].numel()).sqrt()
    return OutputFactor(tuple(outputs.shape), lambda s: (root * s).to(outputs.dtype), outputs.device)


def _gaussian(outputs: Tensor, _targets: Tensor) -> OutputFactor:
    root = (2 / outputs[0].numel()) ** 0.5
    return OutputFactor(tuple(outputs.shape), lambda s: (root * s).to(outputs.dtype), outputs.device)


_FACTORS: dict[str, Callable[[Tensor, Tensor], OutputFactor]] = {
    "cross_entropy": _softmax,
    "causal_lm": _next_token,
    "bce_with_logits": _coins,
    "mse": _gaussian,
}
