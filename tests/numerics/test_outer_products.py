"""Gauss–Newton, Fisher, empirical Fisher and gradient covariance against dense float64 oracles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers.numerics.batch_operator import BatchOperator
from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.losses import Loss, as_loss, get_loss
from dynprobe.analyzers.numerics.outer_products import (
    EmpiricalFisherOperator,
    FisherOperator,
    GaussNewtonOperator,
    GradientCovarianceOperator,
)

OPERATORS = [GaussNewtonOperator, FisherOperator, EmpiricalFisherOperator, GradientCovarianceOperator]
Batches = list[tuple[Tensor, Tensor]]


def dense(operator: BatchOperator) -> Tensor:
    return operator.matmat(torch.eye(operator.n_parameters, dtype=torch.float64))


def split(inputs: Tensor, targets: Tensor, sizes: list[int]) -> Batches:
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def jacobian(values: Tensor, model: nn.Module) -> Tensor:
    """Derivatives of every entry by all parameters, one backward pass for each."""
    parameters = list(model.parameters())
    rows = [
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        for value in values.flatten()
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def dense_gauss_newton(model: nn.Module, batches: Batches, loss: Loss) -> Tensor:
    """Σ over batches of Jᵀ (Hessian by the outputs) J, weighted by samples."""
    total = sum(len(targets) for _, targets in batches)
    parts = []
    for inputs, targets in batches:
        with sdpa_kernel(SDPBackend.MATH):
            outputs = model(inputs)
        shape = outputs.shape
        curvature = torch.autograd.functional.hessian(
            lambda z, shape=shape, targets=targets: loss(z.view(shape), targets), outputs.detach().flatten()
        )
        J = jacobian(outputs, model)
        parts.append(len(targets) / total * J.T @ curvature @ J)
    return sum(parts)


def sample_gradients(model: nn.Module, batches: Batches, loss: Loss) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.cat([jacobian(loss.per_sample(model(x), y), model) for x, y in batches])


def dense_expected(kind: type, model: nn.Module, batches: Batches, loss: Loss) -> Tensor:
    if kind in (GaussNewtonOperator, FisherOperator):
        return dense_gauss_newton(model, batches, loss)
    G = sample_gradients(model, batches, loss)
    if kind is GradientCovarianceOperator:
        G = G - G.mean(0)
    return G.T @ G / len(G)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got, got.T, rtol=1e-10, atol=1e-12)


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus]


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.__name__)
def test_every_activation_equals_the_dense_matrix(activation: type[nn.Module], kind: type) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 3), activation(), nn.Linear(3, 3))
    inputs, targets = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 3, (9,))
    batches, loss = split(inputs, targets, [6, 2, 1]), get_loss("cross_entropy")
    close(dense(kind(model.double(), batches, loss)), dense_expected(kind, model, batches, loss))


IGNORE = -100


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LOSSES = {
    "classes": ("cross_entropy", (3,), torch.tensor([0, 2, 1, IGNORE, 2])),
    "soft classes": ("cross_entropy", (3,), random(5, 3).softmax(1)),
    "classes of pixels": (
        "cross_entropy",
        (3, 2),
        torch.tensor([[0, 1], [2, IGNORE], [1, 1], [0, 0], [IGNORE, 2]]),
    ),
    "soft classes of pixels": ("cross_entropy", (3, 2), random(5, 3, 2).softmax(1)),
    "squares": ("mse", (2, 3), random(5, 2, 3)),
    "squares of one output": ("mse", (1,), random(5)),
    "squares of classes": ("mse", (6,), torch.tensor([0, 5, 1, 2, 2])),
    "coins": ("bce_with_logits", (6,), random(5, 6).round()),
    "one coin": ("bce_with_logits", (1,), torch.tensor([0, 1, 1, 0, 1])),
    "tokens": (
        "causal_lm",
        (3, 2),
        torch.tensor([[0, 1, 1], [1, 0, IGNORE], [0, 0, 1], [1, 1, 1], [0, 1, 0]]),
    ),
}


def regressor(shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    width = torch.Size(shape).numel()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width), nn.Unflatten(1, shape)).double()
    return model, torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("case", LOSSES)
def test_every_named_loss_equals_the_dense_matrix(case: str, kind: type) -> None:
    name, shape, targets = LOSSES[case]
    model, inputs = regressor(shape)
    batches, loss = split(inputs, targets, [4, 1]), get_loss(name)
    close(dense(kind(model, batches, loss)), dense_expected(kind, model, batches, loss))


def enumerated_fisher(
    model: nn.Module, inputs: Tensor, log_density: Callable[[Tensor], Tensor], n_labels: int
) -> Tensor:
    """(1/N) Σ_i Σ_y p(y|x_i) ∇log p ∇log pᵀ, label by label; `log_density` is (n_samples, n_labels)."""
    values = log_density(model(inputs))
    G = jacobian(values, model)
    return G.T @ (values.detach().exp().flatten()[:, None] * G) / len(inputs)


def test_fisher_of_a_classifier_is_the_expectation_over_the_models_own_labels() -> None:
    model, inputs = regressor((4,))
    operator = FisherOperator(model, [(inputs, torch.zeros(5, dtype=torch.long))], get_loss("cross_entropy"))
    close(dense(operator), enumerated_fisher(model, inputs, lambda z: z.log_softmax(1), 4))


def test_fisher_of_a_coin_is_the_expectation_over_both_sides() -> None:
    model, inputs = regressor((1,))
    operator = FisherOperator(model, [(inputs, torch.zeros(5))], get_loss("bce_with_logits"))
    both = enumerated_fisher(
        model, inputs, lambda z: torch.cat([functional.logsigmoid(z), functional.logsigmoid(-z)], 1), 2
    )
    close(dense(operator), both)


def test_fisher_of_mse_is_that_of_a_gaussian_with_density_exp_minus_loss() -> None:
    model, inputs = regressor((3,))
    operator = FisherOperator(model, [(inputs, torch.zeros(5, 3))], get_loss("mse"))
    outputs = model(inputs)
    gradients = []
    for j in range(3):  # sigma points z ± √3·σ e_j of a Gaussian of variance σ² = 3/2 have its covariance
        for sign in (1, -1):
            labels = outputs.detach() + sign * (3 * 1.5) ** 0.5 * torch.eye(3, dtype=torch.float64)[j]
            gradients.append(jacobian(get_loss("mse").per_sample(outputs, labels), model))
    G = torch.cat(gradients)
    close(dense(operator), G.T @ G / (6 * len(inputs)))


def test_fisher_does_not_look_at_the_labels_and_the_empirical_one_does() -> None:
    model, inputs = regressor((3,))
    loss, a, b = get_loss("cross_entropy"), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 0, 1, 0])
    same = [dense(FisherOperator(model, [(inputs, labels)], loss)) for labels in (a, b)]
    assert torch.equal(*same)
    other = [dense(EmpiricalFisherOperator(model, [(inputs, labels)], loss)) for labels in (a, b)]
    assert (other[0] - other[1]).norm() > 0.1 * other[0].norm()


def test_fisher_of_a_confident_net_keeps_its_digits_in_float32() -> None:
    model = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[30.0], [0.0], [-1.0]]))
    inputs, targets = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    p = model.weight.detach().double().flatten().softmax(0)
    assert float(p[1]) < 1e-12
    expected = torch.diag(p) - p[:, None] * p
    expected[0, 0] = p[0] * (p[1] + p[2])  # 1 − p_0 without cancellation
    got = dense(FisherOperator(model, [(inputs, targets)], get_loss("cross_entropy")))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_softmax_regression_is_the_mean_of_diag_p_minus_pp_kron_xx() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    X, targets = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,))
    P = (X @ model.weight.detach().T).softmax(1)
    expected = sum(
        torch.kron(torch.diag(p) - p[:, None] * p, x[:, None] * x) for p, x in zip(P, X, strict=True)
    )
    for kind in (FisherOperator, GaussNewtonOperator, HessianOperator):
        operator = kind(model, split(X, targets, [3, 3, 1]), get_loss("cross_entropy"))
        close(dense(operator), expected / 7)


@pytest.mark.parametrize("case", LOSSES)
def test_gauss_newton_of_a_linear_model_is_its_hessian(case: str) -> None:
    name, shape, targets = LOSSES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, torch.Size(shape).numel()), nn.Unflatten(1, shape)).double()
    batches = split(torch.randn(5, 3, dtype=torch.float64), targets, [2, 3])
    hessian = dense(HessianOperator(model, batches, get_loss(name)))
    close(dense(GaussNewtonOperator(model, batches, get_loss(name))), hessian)


def test_gradient_covariance_of_linear_regression_in_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    X, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    residual = X @ model.weight.detach().flatten() - y
    mean = 2 / 9 * X.T @ residual
    expected = 4 / 9 * X.T @ (residual.square()[:, None] * X) - mean[:, None] * mean
    close(dense(GradientCovarianceOperator(model, split(X, y, [4, 4, 1]), get_loss("mse"))), expected)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class TiedTransformer(nn.Module):
    """Predicts the next token: attention, LayerNorm, and an embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.head(self.layer(self.embed(tokens), src_mask=mask))


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda k: k.__name__)
def test_a_recurrent_model_equals_the_dense_matrix(kind: type) -> None:
    torch.manual_seed(0)
    model, loss = Recurrent().double(), get_loss("cross_entropy")
    batches = split(torch.randn(5, 3, 2, dtype=torch.float64), torch.randint(0, 2, (5,)), [2, 3])
    close(dense(kind(model, batches, loss)), dense_expected(kind, model, batches, loss))


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda k: k.__name__)
def test_a_causal_transformer_with_tied_embeddings_equals_the_dense_matrix(kind: type) -> None:
    torch.manual_seed(0)
    model, loss = TiedTransformer().double(), get_loss("causal_lm")
    tokens = torch.randint(0, 4, (4, 3))
    batches = split(tokens, tokens, [3, 1])
    operator = kind(model, batches, loss)
    expected = dense_expected(kind, model.eval(), batches, loss)
    vectors = torch.randn(3, operator.n_parameters, dtype=torch.float64)
    torch.testing.assert_close(operator.matmat(vectors), vectors @ expected, rtol=1e-10, atol=1e-12)


def convolutional() -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    inputs, targets = torch.randn(7, 1, 4, 4, dtype=torch.float64), torch.randint(0, 2, (7,))
    return model, split(inputs, targets, [4, 3])


@pytest.mark.parametrize("memory", [0.0, 1e9])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", OPERATORS, ids=lambda k: k.__name__)
def test_batchnorm_in_both_modes_without_dropout_leaves_everything_as_it_was(
    kind: type, mode: str, memory: float
) -> None:
    (model, batches), loss = convolutional(), get_loss("cross_entropy")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    operator = kind(model, batches, loss, mode=mode, memory=memory)
    got = dense(operator)
    assert torch.equal(got, dense(operator))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.train(mode == "train")
    model[3].eval()
    close(got, dense_expected(kind, model, batches, loss))


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda k: k.__name__)
def test_a_block_of_the_parameters_and_at_other_values(kind: type) -> None:
    (model, batches), (other, _) = convolutional(), convolutional()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    loss, at = get_loss("cross_entropy"), dict(other.named_parameters())
    got = dense(kind(model, batches, loss, at=at, parameters=["5.weight", "5.bias"]))
    close(got, dense(kind(other, batches, loss))[-18:, -18:])


@pytest.mark.parametrize("kind", OPERATORS, ids=lambda k: k.__name__)
def test_parameters_that_move_no_output_have_no_curvature(kind: type) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 1)}).double()
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    batches = [(torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0]))]
    got = dense(kind(model, batches, get_loss("cross_entropy")))
    assert float(got[:6, :6].norm()) > 0
    assert torch.equal(got[6:], torch.zeros(3, 9, dtype=torch.float64))
    alone = kind(model, batches, get_loss("cross_entropy"), parameters=["spare.weight"])
    assert torch.equal(alone(torch.ones(2)), torch.zeros(2, dtype=torch.float64))


def test_gauss_newton_of_a_loss_linear_in_the_outputs_is_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    batches = [(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3))]
    operator = GaussNewtonOperator(model, batches, lambda outputs, _: outputs.mean())
    assert torch.equal(operator(torch.ones(6)), torch.zeros(6, dtype=torch.float64))


def test_gradient_and_the_count_of_products() -> None:
    (model, batches), loss = convolutional(), get_loss("cross_entropy")
    operator = GradientCovarianceOperator(model, batches, loss)
    torch.testing.assert_close(
        operator.gradient(), sample_gradients(model.eval(), batches, loss).mean(0).detach()
    )
    operator.matmat(torch.randn(3, operator.n_parameters))
    assert (operator.n_matvec, operator.n_samples) == (3, 7)


def test_a_loss_without_a_distribution_is_refused_and_the_ones_with_are_named() -> None:
    model, inputs = regressor((3,))
    batches = [(inputs, torch.zeros(5, 3))]
    smoothed = as_loss(nn.CrossEntropyLoss(label_smoothing=0.1), "cross_entropy")
    for loss in (as_loss(functional.huber_loss), smoothed):
        with pytest.raises(ValueError, match="cross_entropy, causal_lm, bce_with_logits, mse"):
            FisherOperator(model, batches, loss, memory=0)
