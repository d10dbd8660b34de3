"""The Fisher information of each sample's outputs, when the model itself draws the labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynprobe.analyzers.numerics.losses import IGNORED_TARGET, Loss, get_loss

Weigh = Callable[[Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], Weigh]


def label_metric(loss: Loss) -> Metric:
    """Return `(outputs, targets) -> (w ↦ Mw)`, M the Fisher information of a sample's outputs z.

    M = E_y[∇_z log p(y|z) ∇_z log p(y|z)ᵀ] over labels y of the model, in closed form:

    - `cross_entropy`: classes with probabilities p = softmax(z), M = diag(p) − ppᵀ;
    - `causal_lm`: the same at every position for the token after it;
    - `bce_with_logits`: independent coins with p = σ(z), M = diag(p(1 − p));
    - `mse`: a Gaussian with density ∝ exp(−loss), M = 2I.

    Several terms in a sample (pixels, tokens, outputs) are averaged within the sample, as the loss does. The
    targets only say which positions the loss ignores.

    Raises:
        ValueError: The loss is none of these, so that it is not known which labels the model would draw.
    """
    metric = _METRICS.get(loss.name)
    if metric is None or loss != get_loss(loss.name):
        raise ValueError(
            f"The Fisher information needs a loss that says which labels the model would draw: "
            f"{', '.join(_METRICS)}. The loss {loss.name!r} does not."
        )
    return metric


def _softmax(outputs: Tensor, targets: Tensor) -> Weigh:
    weight = _position_weight(outputs, targets)
    probability = _at_least_float32(outputs).softmax(1)
    top = probability.argmax(1, keepdim=True)

    def weigh(vector: Tensor) -> Tensor:
        # M does not see a constant added to all classes. With the likeliest class at zero, what is left is
        # exact to rounding also where that class has probability 1 to all digits.
        vector = vector.to(probability)
        vector = vector - vector.gather(1, top)
        mean = (probability * vector).sum(1, keepdim=True)
        return weight * probability * (vector - mean)

    return weigh


def _position_weight(outputs: Tensor, targets: Tensor) -> Tensor:
    """What each position counts within its sample, shaped to multiply the outputs."""
    dtype = _at_least_float32(outputs).dtype
    if targets.is_floating_point():
        counted = torch.ones_like(outputs[:, 0], dtype=dtype)
    else:
        counted = (targets != IGNORED_TARGET).to(dtype)
    if counted.dim() > 1:
        counted = counted / counted.flatten(1).sum(1).view(-1, *[1] * (counted.dim() - 1))
    return counted.unsqueeze(1)


def _next_token(outputs: Tensor, targets: Tensor) -> Weigh:
    shifted = _softmax(outputs[:, :-1].transpose(1, 2), targets[:, 1:])

    def weigh(vector: Tensor) -> Tensor:
        product = shifted(vector[:, :-1].transpose(1, 2)).transpose(1, 2)
        return torch.cat([product, torch.zeros_like(product[:, :1])], 1)  # nothing follows the last token

    return weigh


def _coins(outputs: Tensor, _targets: Tensor) -> Weigh:
    outputs = _at_least_float32(outputs)
    variance = outputs.sigmoid() * (-outputs).sigmoid() / outputs[0].numel()
    return lambda vector: variance * vector.to(variance)


def _gaussian(outputs: Tensor, _targets: Tensor) -> Weigh:
    precision = 2 / outputs[0].numel()
    return lambda vector: precision * vector


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


_METRICS: dict[str, Metric] = {
    "cross_entropy": _softmax,
    "causal_lm": _next_token,
    "bce_with_logits": _coins,
    "mse": _gaussian,
}
