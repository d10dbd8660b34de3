"""Products with matrices JᵀMJ averaged over samples: Gauss–Newton, Fisher, empirical Fisher and covariance.

J is the Jacobian of a sample's outputs (or loss) with respect to the parameters. Jᵀu is computed once for a
dummy cotangent u and its graph kept: it is linear in u, so its derivative with respect to u along v is Jv,
by reverse mode alone. A product then costs one pass for Jv and one for Jᵀ(MJv): 1.3 to 1.5 gradients of the
whole data with the graph kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.batch_operator import BatchOperator, Chunk, Options
from dynprobe.analyzers.numerics.label_metric import Weigh, label_metric
from dynprobe.analyzers.numerics.losses import Loss


class PulledBack(NamedTuple):
    """One batch: its outputs z(θ) with their graph, Jᵀu with its graph, and w ↦ Mw."""

    outputs: Tensor
    dummy: Tensor
    pulled: tuple[Tensor, ...]
    weigh: Weigh


class OuterProductOperator(BatchOperator[PulledBack]):
    """Symmetric linear operator v ↦ Av, A = Σ JᵀMJ over the batches; a subclass says which J and M.

    Arguments, attributes and errors are those of `BatchOperator`.
    """

    @abstractmethod
    def _outputs_and_metric(self, chunk: Chunk[PulledBack]) -> tuple[Tensor, Weigh]:
        """Return what is differentiated, and w ↦ Mw with the factor 1/N of the average in it."""

    def _build(self, chunk: Chunk[PulledBack]) -> PulledBack:
        outputs, weigh = self._outputs_and_metric(chunk)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled: tuple[Tensor, ...] = ()
        if outputs.requires_grad:
            pulled = torch.autograd.grad(
                outputs, self._leaves, dummy, create_graph=True, materialize_grads=True
            )
        return PulledBack(outputs, dummy, pulled, weigh)

    def _product(self, graph: PulledBack, pieces: list[Tensor], *, keep: bool) -> Sequence[Tensor]:
        used = [i for i, part in enumerate(graph.pulled) if part.requires_grad]
        if not used:  # no parameter moves the outputs, so A is zero, and autograd would raise
            return [torch.zeros_like(piece) for piece in pieces]
        (pushed,) = torch.autograd.grad(
            [graph.pulled[i] for i in used],
            graph.dummy,
            [pieces[i] for i in used],
            retain_graph=keep,
            materialize_grads=True,
        )
        return torch.autograd.grad(
            graph.outputs, self._leaves, graph.weigh(pushed), retain_graph=keep, materialize_grads=True
        )


class GaussNewtonOperator(OuterProductOperator):
    """Generalised Gauss–Newton matrix G = (1/N) Σ_i J_iᵀ ∇²_z ℓ_i J_i.

    J_i is the Jacobian of sample i's outputs z. G is the Hessian without the curvature of the model: positive
    semidefinite when the loss is convex in the outputs, and equal to the Hessian for a model linear in its
    parameters. ∇²_z comes from differentiating the loss twice, so any loss will do.

    References:
        Schraudolph, "Fast curvature matrix-vector products", Neural Computation 14 (2002), §3.
    """

    def _outputs_and_metric(self, chunk: Chunk[PulledBack]) -> tuple[Tensor, Weigh]:
        outputs = self._function(chunk.inputs)
        free = outputs.detach().requires_grad_()
        value = self._loss(free, chunk.targets) * chunk.share
        (slope,) = torch.autograd.grad(value, free, create_graph=True, materialize_grads=True)

        def weigh(pushed: Tensor) -> Tensor:
            if not slope.requires_grad:  # a loss linear in the outputs
                return torch.zeros_like(pushed)
            (product,) = torch.autograd.grad(slope, free, pushed, retain_graph=True, materialize_grads=True)
            return product

        return outputs, weigh


class FisherOperator(OuterProductOperator):
    """Fisher information F = (1/N) Σ_i E_y[∇log p(y|x_i) ∇log p(y|x_i)ᵀ], labels y drawn from the *model*.

    The expectation over labels is exact (`label_metric` says which distribution each loss stands for); the
    data's own labels are not used, apart from leaving out the positions that the loss ignores. For those
    losses F equals the Gauss–Newton matrix.

    Raises:
        ValueError: The loss defines no distribution over labels.

    References:
        Martens, "New insights and perspectives on the natural gradient method", JMLR 21 (2020), §5 and §9.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Tensor]],
        loss: Loss,
        **options: Unpack[Options],
    ) -> None:
        self._metric = label_metric(loss)
        super().__init__(model, batches, loss, **options)

    def _outputs_and_metric(self, chunk: Chunk[PulledBack]) -> tuple[Tensor, Weigh]:
        outputs = self._function(chunk.inputs)
        metric = self._metric(outputs.detach(), chunk.targets)

        def weigh(pushed: Tensor) -> Tensor:
            return (metric(pushed) / self.n_samples).to(pushed)

        return outputs, weigh


class EmpiricalFisherOperator(OuterProductOperator):
    """Empirical Fisher E = (1/N) Σ_i g_i g_iᵀ, g_i the gradient of sample i's loss, the data's *own* label.

    Not the Fisher information, whose labels the model draws: the two differ by any factor once the model
    fits its data. E is the uncentred second moment of the gradients.

    References:
        Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for natural gradient
        descent", NeurIPS 2019, eq. 3.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Tensor]],
        loss: Loss,
        **options: Unpack[Options],
    ) -> None:
        self._per_sample = loss.per_sample
        super().__init__(model, batches, loss, **options)

    def _outputs_and_metric(self, chunk: Chunk[PulledBack]) -> tuple[Tensor, Weigh]:
        losses = self._per_sample(self._function(chunk.inputs), chunk.targets)
        return losses, lambda pushed: pushed / self.n_samples


class GradientCovarianceOperator(EmpiricalFisherOperator):
    """Covariance of the per-sample gradients, K = (1/N) Σ_i (g_i − ḡ)(g_i − ḡ)ᵀ, ḡ their mean.

    Computed as E − ḡḡᵀ with E the empirical Fisher, so the noise floor of a product is `rounding` times ‖E‖.

    References:
        Jastrzębski et al., "The break-even point on optimization trajectories of deep neural networks",
        ICLR 2020, §3.
    """

    @cached_property
    def _mean_gradient(self) -> Tensor:
        return self.gradient()

    def matvec(self, vector: Tensor) -> Tensor:
        """Product Kv, float64, shape (n_parameters,)."""
        product = super().matvec(vector)
        rounded = vector.detach().to(self.device, self.dtype).double()  # what E was multiplied with
        return product - self._mean_gradient * (self._mean_gradient @ rounded)
