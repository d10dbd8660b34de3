"""Adversarial perturbations of inputs: one step, projected steps, and noise of the same size.

Everything acts on one batch and keeps a value for every sample, so that the split into batches does not
matter: the gradient of Σ_i ℓ_i with respect to the batch of inputs holds every sample's own gradient, because
in eval mode no sample sees another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.losses import Loss

Norm = Literal["linf", "l2"]

STEP_FACTOR = 2.5
"""Step size in units of ε / steps, as Madry et al. (2018) chose it for CIFAR-10 (their released code)."""

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class NotPerturbable(ValueError):
    """The inputs hold no floating-point tensor, or more than one."""


class Values(NamedTuple):
    """What a perturbed batch gives: loss and fraction right of each sample, float64, shape (n_samples,)."""

    loss: Tensor
    accuracy: Tensor | None


@dataclass(frozen=True)
class Box:
    """The range that every entry of a perturbed input is clipped to."""

    low: float = -math.inf
    high: float = math.inf

    def clip(self, x: Tensor) -> Tensor:
        """The inputs with every entry in the range."""
        return x.clamp(self.low, self.high)


@dataclass
class Work:
    """Samples passed forwards only, and forwards and backwards."""

    forwards: int = 0
    gradients: int = 0


class Victim:
    """One batch under attack: every sample's loss as a function of its own input.

    Args:
        model: In eval mode; its parameters need no gradients.
        inputs: A tensor, tuple or dict with exactly one floating-point tensor, the one that is perturbed.
        targets: Shape (n_samples, …).
        loss: Gives loss and accuracy of each sample; see `in_float64`.
        classifies: Whether accuracy means something here.
        work: Counts what is spent.

    Attributes:
        x: The clean input, float32 at least.
        clean: The values at `x`.
        input_gradient: ∇_x ℓ_i of every sample at `x`, same shape as `x`.

    Raises:
        NotPerturbable: From `perturbable`.
    """

    def __init__(
        self, model: nn.Module, inputs: Any, targets: Tensor, loss: Loss, *, classifies: bool, work: Work
    ) -> None:
        self._model, self._inputs, self._targets, self._loss = model, inputs, targets, loss
        self._classifies, self._work = classifies, work
        self._place, raw = perturbable(inputs)
        self._dtype = raw.dtype
        # Steps of ε would be rounded away in half precision; the model still gets its own dtype.
        self.x = raw.detach().to(torch.promote_types(raw.dtype, torch.float32))
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self.clean, self.input_gradient = self.gradient(self.x)

    def __len__(self) -> int:
        return len(self._targets)

    def losses(self, x: Tensor) -> Tensor:
        """Loss of each sample at the input x, through which gradients flow. Shape (n_samples,)."""
        return self._loss.per_sample(self._outputs(x), self._targets)

    def values(self, x: Tensor) -> Values:
        """Loss and accuracy of each sample at the input x: one forward pass."""
        self._work.forwards += len(self)
        with torch.no_grad():
            return self._values(self._outputs(x))

    def gradient(self, x: Tensor) -> tuple[Values, Tensor]:
        """The values at x and every sample's gradient there: one forward and one backward pass."""
        self._work.gradients += len(self)
        x = x.detach().requires_grad_()
        with torch.enable_grad(), _backward_in_eval_mode(self._recurrent):
            outputs = self._outputs(x)
            losses = self._loss.per_sample(outputs, self._targets)
            if not losses.requires_grad:  # the outputs do not depend on the input
                return self._values(outputs.detach()), torch.zeros_like(x)
            (gradient,) = torch.autograd.grad(losses.sum(), x, materialize_grads=True)
        return self._values(outputs.detach()), gradient

    def _outputs(self, x: Tensor) -> Tensor:
        # A copy: a model that writes over its input must not write over x.
        return call(self._model, _replaced(self._inputs, self._place, x.to(self._dtype, copy=True)))

    def _values(self, outputs: Tensor) -> Values:
        loss = self._loss.per_sample(outputs, self._targets).detach().double()
        right = self._loss.accuracy(outputs, self._targets).double() if self._classifies else None
        return Values(loss, right)


def perturbable(inputs: Any) -> tuple[Any, Tensor]:
    """The one floating-point tensor among the inputs, and its place (None, an index or a name).

    A dict entry whose name ends in "mask" is not counted.

    Raises:
        NotPerturbable: There is none, or more than one.
    """
    if isinstance(inputs, Mapping):
        entries: list[tuple[Any, Any]] = [
            (k, v) for k, v in inputs.items() if not str(k).lower().endswith("mask")
        ]
    elif isinstance(inputs, tuple | list):
        entries = list(enumerate(inputs))
    else:
        entries = [(None, inputs)]
    tensors = [(place, value) for place, value in entries if isinstance(value, Tensor)]
    floating = [(place, value) for place, value in tensors if value.is_floating_point()]
    if len(floating) == 1:
        return floating[0]
    if not floating:
        raise NotPerturbable("inputs are integers (token ids): they cannot be perturbed by ε")
    names = ", ".join(str(place) for place, _ in floating)
    raise NotPerturbable(
        f"there are {len(floating)} floating-point inputs ({names}): which one to perturb is not clear"
    )


def _replaced(inputs: Any, place: Any, x: Tensor) -> Any:
    if place is None:
        return x
    if isinstance(inputs, Mapping):
        return {**inputs, place: x}
    return tuple(x if i == place else value for i, value in enumerate(inputs))


@contextlib.contextmanager
def _backward_in_eval_mode(recurrent: bool) -> Iterator[None]:
    """CuDNN's recurrent layers have no backward pass in eval mode; the plain kernels do."""
    with torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
        yield


def in_float64(loss: Loss, outputs: Tensor, targets: Tensor) -> Loss:
    """The same loss evaluated in float64 on the model's outputs, if it takes them; else the loss itself.

    In float32 the softmax minus its target is rounded to zero as soon as a sample's loss is below 6e-8, which
    well-trained networks reach: the attack would lose its gradient to rounding, not to robustness.
    """
    try:
        loss.per_sample(outputs[:1].double(), targets[:1])
    except (RuntimeError, TypeError, ValueError):  # class weights in float32, a loss written for one dtype
        return loss

    def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss.per_sample(outputs.double(), targets)

    return Loss(loss.name, per_sample, loss.accuracy)


def norms(vectors: Tensor, order: float) -> Tensor:
    """Norm of each sample's entries, in float64: squares of tiny gradients underflow. Shape (n_samples,)."""
    found: Tensor = torch.linalg.vector_norm(vectors.flatten(1), order, dim=1, dtype=torch.float64)
    return found


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The perturbation of unit norm that raises a linear loss most: sign(g), or g/‖g‖₂.

    A sample whose gradient is zero or not finite stays where it is.
    """
    wide = gradient.double()
    shape = (-1,) + (1,) * (gradient.dim() - 1)
    usable = torch.isfinite(wide.flatten(1)).all(1).view(shape)
    wide = torch.where(usable, wide, 0.0)
    if norm == "linf":
        return wide.sign().to(gradient)
    length = norms(wide, 2).view(shape)
    return (wide / torch.where(length > 0, length, 1.0)).to(gradient)


def project(delta: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """The nearest perturbation (in the 2-norm) whose norm is at most ε."""
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    length = norms(delta, 2).view((-1,) + (1,) * (delta.dim() - 1))
    scale = torch.where(length > epsilon, epsilon / length.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    return delta * scale.to(delta)


def perturbed(x: Tensor, direction: Tensor, epsilon: float, box: Box) -> Tensor:
    """One step: x + ε d, clipped. FGSM for d = sign(∇ℓ) (Goodfellow et al. 2015, §4)."""
    return box.clip(x + epsilon * direction)


def projected_gradient(
    victim: Victim, norm: Norm, epsilon: float, *, steps: int, start: Tensor, box: Box
) -> Values:
    """Projected gradient ascent in a ball; of each sample the worst of all points visited, x itself included.

    x ← clip(x₀ + P_ε(x + α d − x₀)) with α = 2.5 ε/steps and d = sign(g) or g/‖g‖₂. Clipping moves an entry
    towards x₀, which lies in the box, and so never out of the ball.

    Args:
        victim: The batch.
        norm: `linf` or `l2`.
        epsilon: Radius of the ball, in units of the inputs.
        steps: Gradient steps; costs as many gradients and one forward pass.
        start: Where to start in the unit ball, as `x`; from `Noise.start`.
        box: Range of the inputs; `victim.x` lies in it.

    Returns:
        Highest loss and lowest accuracy of each sample over the steps + 2 points.

    References:
        Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to Adversarial
        Attacks", ICLR 2018, §2.
    """
    worst = victim.clean
    x = box.clip(victim.x + project(epsilon * start.to(victim.x), norm, epsilon))
    for _ in range(steps):
        values, gradient = victim.gradient(x)
        worst = worse(worst, values)
        moved = x + (STEP_FACTOR * epsilon / steps) * steepest(gradient, norm)
        x = box.clip(victim.x + project(moved - victim.x, norm, epsilon))
    return worse(worst, victim.values(x))


def worse(a: Values, b: Values) -> Values:
    """Of each sample the higher loss and the lower accuracy."""
    right = None if a.accuracy is None or b.accuracy is None else torch.minimum(a.accuracy, b.accuracy)
    return Values(torch.maximum(a.loss, b.loss), right)


class Noise:
    """Random numbers for every sample of the data set, drawn at once: the split into batches does not matter.

    Args:
        n_samples: In the whole data set.
        shape: Of one sample.
        seed: Of the generator, which lives on the CPU.
    """

    def __init__(self, n_samples: int, shape: torch.Size | tuple[int, ...], seed: int) -> None:
        self._size, self._seed = (n_samples, *shape), seed

    def start(self, norm: Norm, restart: int) -> Tensor:
        """Uniform in the unit ball, float32, shape (n_samples, *shape)."""
        generator = self._generator(0, restart)
        if norm == "linf":
            return torch.rand(self._size, generator=generator) * 2 - 1
        direction = steepest(torch.randn(self._size, generator=generator), "l2")
        uniform = torch.rand(self._size[0], generator=generator, dtype=torch.float64)
        radius = uniform.pow(1 / max(math.prod(self._size[1:]), 1))
        return direction * radius.float().view(-1, *[1] * (len(self._size) - 1))

    def direction(self, norm: Norm) -> Tensor:
        """A random direction of unit norm: ±1 in every entry, or uniform on the sphere."""
        return steepest(torch.randn(self._size, generator=self._generator(1, 0)), norm)

    def _generator(self, purpose: int, restart: int) -> torch.Generator:
        state = np.random.SeedSequence([self._seed, purpose, restart]).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))


def wilson(share: NDArray[np.float64], n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % confidence interval of a share of n samples, from Wilson's score.

    Where a sample may be right in part, its variance is below the binomial one and the interval too wide.

    References:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    share = np.asarray(share, dtype=np.float64)
    scale = 1 + Z_95**2 / n
    center = (share + Z_95**2 / (2 * n)) / scale
    half = Z_95 / scale * np.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    # At 0 and 1 the ends are exact, but for rounding.
    return np.where(share <= 0, 0.0, center - half), np.where(share >= 1, 1.0, center + half)
