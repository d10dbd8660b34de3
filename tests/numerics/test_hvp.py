"""Hessian-vector products against brute force, closed forms and invariances, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers.numerics.hvp import HessianOperator, NoSecondDerivative
from dynprobe.analyzers.numerics.losses import as_loss, get_loss


def dense(operator: HessianOperator) -> Tensor:
    eye = torch.eye(operator.n_parameters, dtype=torch.float64)
    return torch.stack([operator(row) for row in eye])


def brute_force(model: nn.Module, inputs: Tensor, targets: Tensor, loss) -> Tensor:
    """Second derivatives by torch.func, all samples in one batch."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters.values()])
        filled = {n: part.view_as(p) for (n, p), part in zip(parameters.items(), parts, strict=True)}
        return loss(torch.func.functional_call(model, filled, (inputs,)), targets)

    flat = torch.cat([p.flatten() for p in parameters.values()])
    return torch.autograd.functional.hessian(value, flat)


def split(inputs: Tensor, targets: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def classifier(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    return model, torch.randn(11, 4, dtype=torch.float64), torch.randint(0, 3, (11,))


@pytest.mark.parametrize("memory", [0.0, 1e9])
@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1, 10]])
def test_products_equal_the_brute_force_hessian_for_unequal_batches(memory: float, sizes: list[int]) -> None:
    model, inputs, targets = classifier()
    operator = HessianOperator(model, split(inputs, targets, sizes), get_loss("cross_entropy"), memory=memory)
    expected = brute_force(model, inputs, targets, functional.cross_entropy)
    torch.testing.assert_close(dense(operator), expected, rtol=1e-10, atol=1e-12)
    assert operator.n_matvec == operator.n_parameters


def test_hessian_of_linear_regression_with_unequal_batches_is_two_xtx_over_n() -> None:
    torch.manual_seed(1)
    model = nn.Linear(5, 1, bias=False).double()
    inputs, targets = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    operator = HessianOperator(model, split(inputs, targets, [3, 3, 1]), get_loss("mse"))
    torch.testing.assert_close(dense(operator), 2 * inputs.T @ inputs / 7)


def test_mse_on_cpu_works_where_forward_over_reverse_raises() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    operator = HessianOperator(model, split(inputs, targets, [4, 2]), as_loss(functional.mse_loss))
    torch.testing.assert_close(dense(operator), brute_force(model, inputs, targets, functional.mse_loss))


def test_gradient_is_that_of_the_mean_loss() -> None:
    model, inputs, targets = classifier()
    operator = HessianOperator(model, split(inputs, targets, [8, 3]), get_loss("cross_entropy"))
    functional.cross_entropy(model(inputs), targets).backward()
    torch.testing.assert_close(operator.gradient(), torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_a_subset_of_parameters_gives_that_diagonal_block() -> None:
    model, inputs, targets = classifier()
    operator = HessianOperator(
        model, [(inputs, targets)], get_loss("cross_entropy"), parameters=["2.weight", "2.bias"]
    )
    expected = brute_force(model, inputs, targets, functional.cross_entropy)[-21:, -21:]
    torch.testing.assert_close(dense(operator), expected)
    assert set(operator.as_dict(torch.zeros(21))) == {"2.weight", "2.bias"}


def test_at_other_values_equals_a_model_that_holds_them_and_leaves_this_one_alone() -> None:
    model, inputs, targets = classifier()
    other, _, _ = classifier(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    operator = HessianOperator(
        model, [(inputs, targets)], get_loss("cross_entropy"), at=dict(other.named_parameters())
    )
    torch.testing.assert_close(dense(operator), brute_force(other, inputs, targets, functional.cross_entropy))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_batchnorm_and_dropout_are_in_eval_mode_and_the_training_flags_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double()
    model[1].running_var.fill_(3.0)
    inputs, targets = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9,))
    model.train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    operator = HessianOperator(model, split(inputs, targets, [5, 4]), get_loss("cross_entropy"))
    got = dense(operator)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    torch.testing.assert_close(got, brute_force(model.eval(), inputs, targets, functional.cross_entropy))
    torch.testing.assert_close(got, got.T)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize(("build", "width"), [(Recurrent, 2), (Attention, 4)])
def test_recurrent_and_attention_models_equal_finite_differences_of_the_gradient(build, width: int) -> None:
    torch.manual_seed(0)
    model = build().double()
    inputs, targets = torch.randn(5, 4, width, dtype=torch.float64), torch.randint(0, 2, (5,))
    weights = dict(model.named_parameters())
    vector = torch.randn(sum(w.numel() for w in weights.values()), dtype=torch.float64)
    loss, step = get_loss("cross_entropy"), 1e-5

    def gradient(sign: float) -> Tensor:
        base = HessianOperator(model, [(inputs, targets)], loss, memory=0)
        moved = {n: weights[n] + sign * step * d for n, d in base.as_dict(vector).items()}
        return HessianOperator(model, [(inputs, targets)], loss, at=moved, memory=0).gradient()

    expected = (gradient(1.0) - gradient(-1.0)) / (2 * step)
    got = HessianOperator(model, [(inputs, targets)], loss)(vector)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bag(x)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    batch = (torch.randint(0, 5, (4, 2)), torch.randint(0, 3, (4,)))
    with pytest.raises(NoSecondDerivative, match="_embedding_bag_backward"):
        HessianOperator(Bag(), [batch], get_loss("cross_entropy"))(torch.ones(15))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def test_tied_weights_count_once_and_move_together() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    inputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    operator = HessianOperator(model, [(inputs, targets)], get_loss("mse"))
    assert operator.n_parameters == 9

    def value(flat: Tensor) -> Tensor:
        weight = flat.view(3, 3)
        return functional.mse_loss(torch.tanh(inputs @ weight.T) @ weight.T, targets)

    expected = torch.autograd.functional.hessian(value, model.encode.weight.detach().flatten())
    torch.testing.assert_close(dense(operator), expected)


def test_parameters_that_take_no_part_have_zero_curvature() -> None:
    model = nn.ModuleDict(
        {"used": nn.Linear(2, 1, bias=False), "spare": nn.Linear(2, 1, bias=False)}
    ).double()
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    inputs = torch.randn(4, 2, dtype=torch.float64)
    operator = HessianOperator(model, [(inputs, torch.zeros(4, 1, dtype=torch.float64))], get_loss("mse"))
    got = dense(operator)
    torch.testing.assert_close(got[:2, :2], inputs.T @ inputs / 2)
    assert torch.equal(got[2:], torch.zeros(2, 4, dtype=torch.float64))


def test_a_loss_linear_in_the_parameters_has_zero_hessian_instead_of_an_autograd_error() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    operator = HessianOperator(
        model, [(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3))], lambda o, t: o.mean()
    )
    assert torch.equal(operator(torch.ones(2)), torch.zeros(2, dtype=torch.float64))


def test_inputs_may_be_tuples_or_dicts() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1, bias=False)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.linear(a + b)

    model = Sum().double()
    a, b = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    targets = torch.zeros(4, 1, dtype=torch.float64)
    expected = (a + b).T @ (a + b) / 2
    for inputs in ((a, b), {"a": a, "b": b}):
        torch.testing.assert_close(
            dense(HessianOperator(model, [(inputs, targets)], get_loss("mse"))), expected
        )


def test_float32_model_gives_products_within_its_own_rounding() -> None:
    model, inputs, targets = classifier()
    exact = HessianOperator(model, [(inputs, targets)], get_loss("cross_entropy"))
    vector = torch.randn(exact.n_parameters, dtype=torch.float64)
    expected = exact(vector)
    batches = split(inputs.float(), targets, [6, 5])
    single = HessianOperator(model.float(), batches, get_loss("cross_entropy"))
    assert single.rounding == torch.finfo(torch.float32).eps
    assert (single(vector) - expected).norm() < 100 * single.rounding * expected.norm()


def test_wrong_names_shapes_and_empty_batches_say_so() -> None:
    model, inputs, targets = classifier()
    loss = get_loss("cross_entropy")
    with pytest.raises(ValueError, match=r"3\.weight"):
        HessianOperator(model, [(inputs, targets)], loss, parameters=["3.weight"])
    with pytest.raises(ValueError, match="at least one sample"):
        HessianOperator(model, [], loss)
    with pytest.raises(ValueError, match=r"\(51,\)"):
        HessianOperator(model, [(inputs, targets)], loss)(torch.zeros(3))
