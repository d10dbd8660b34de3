"""Hessian-vector products against brute force, closed forms and invariances, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

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


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.__name__)
def test_every_activation_equals_the_dense_hessian(activation: type[nn.Module]) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)
    ).double()
    inputs, targets = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 3, (9,))
    got = dense(HessianOperator(model, split(inputs, targets, [6, 3]), get_loss("cross_entropy")))
    expected = brute_force(model, inputs, targets, functional.cross_entropy)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


IGNORE = -100
LOSSES = {
    "classes": ("cross_entropy", (3,), torch.tensor([0, 2, 1, IGNORE, 2])),
    "soft classes": ("cross_entropy", (3,), torch.rand(5, 3, generator=torch.Generator().manual_seed(1))),
    "classes of pixels": (
        "cross_entropy",
        (3, 2),
        torch.tensor([[0, 1], [2, IGNORE], [1, 1], [0, 0], [IGNORE, 2]]),
    ),
    "soft classes of pixels": (
        "cross_entropy",
        (3, 2),
        torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(1)),
    ),
    "squares": ("mse", (2, 3), torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))),
    "squares of one output": ("mse", (1,), torch.randn(5, generator=torch.Generator().manual_seed(1))),
    "squares of classes": ("mse", (6,), torch.tensor([0, 5, 1, 2, 2])),
    "coins": ("bce_with_logits", (6,), torch.rand(5, 6, generator=torch.Generator().manual_seed(1)).round()),
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


@pytest.mark.parametrize("case", LOSSES)
def test_every_named_loss_equals_the_dense_hessian(case: str) -> None:
    name, shape, targets = LOSSES[case]
    model, inputs = regressor(shape)
    got = dense(HessianOperator(model, split(inputs, targets, [4, 1]), get_loss(name)))
    torch.testing.assert_close(
        got, brute_force(model, inputs, targets, get_loss(name)), rtol=1e-10, atol=1e-12
    )


class TiedTransformer(nn.Module):
    """Predicts the next token: attention, LayerNorm, and an embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.head(self.layer(self.embed(tokens), src_mask=mask))


def test_a_causal_transformer_with_tied_embeddings_equals_the_dense_hessian() -> None:
    torch.manual_seed(0)
    model = TiedTransformer().double()
    tokens = torch.randint(0, 5, (3, 4))
    loss = get_loss("causal_lm")
    operator = HessianOperator(model, split(tokens, tokens, [2, 1]), loss)
    assert operator.n_parameters == sum(p.numel() for p in model.parameters())
    vectors = torch.randn(3, operator.n_parameters, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = brute_force(model.eval(), tokens, tokens, loss)
    torch.testing.assert_close(operator.matmat(vectors), vectors @ expected)
    assert operator.n_matvec == 3


def test_a_recurrent_model_equals_the_dense_hessian() -> None:
    torch.manual_seed(0)
    model = Recurrent().double()
    inputs, targets = torch.randn(5, 3, 2, dtype=torch.float64), torch.randint(0, 2, (5,))
    got = dense(HessianOperator(model, split(inputs, targets, [2, 3]), get_loss("cross_entropy")))
    torch.testing.assert_close(got, brute_force(model, inputs, targets, functional.cross_entropy))


def normalised(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), norm, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2)
    ).double()


@pytest.mark.parametrize("memory", [0.0, 1e9])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, momentum=None),
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    ],
    ids=["BatchNorm", "cumulative", "InstanceNorm"],
)
def test_train_mode_takes_each_batchs_statistics_without_dropout_and_leaves_the_buffers(
    norm: nn.Module, memory: float
) -> None:
    model = normalised(norm)
    inputs, targets = torch.randn(7, 1, 4, 4, dtype=torch.float64), torch.randint(0, 2, (7,))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random_state = torch.get_rng_state()
    batches = split(inputs, targets, [4, 3])
    operator = HessianOperator(model, batches, get_loss("cross_entropy"), mode="train", memory=memory)
    got = dense(operator)
    assert torch.equal(got, dense(operator))
    torch.testing.assert_close(got, got.T)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    eval_mode = dense(HessianOperator(model, batches, get_loss("cross_entropy")))
    assert (got - eval_mode).norm() > 0.1 * eval_mode.norm()
    model[3].eval()
    expected = sum(len(y) / 7 * brute_force(model, x, y, functional.cross_entropy) for x, y in batches)
    torch.testing.assert_close(got, expected)


def test_train_mode_refuses_a_batch_of_one_sample_and_says_what_to_do() -> None:
    model = normalised(nn.BatchNorm2d(2))
    batches = split(torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long), [4, 1])
    with pytest.raises(ValueError, match="batch size that leaves no sample alone"):
        HessianOperator(model, batches, get_loss("cross_entropy"), mode="train")
    HessianOperator(normalised(nn.Identity()), batches, get_loss("cross_entropy"), mode="train")


def test_train_mode_of_an_exported_program_is_refused() -> None:
    model = normalised(nn.BatchNorm2d(2)).eval()
    inputs, targets = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randint(0, 2, (3,))
    program = torch.export.export(model, (inputs,)).module()
    with pytest.raises(ValueError, match="mode built in"):
        HessianOperator(program, [(inputs, targets)], get_loss("cross_entropy"), mode="train")
    with pytest.raises(ValueError, match="eval or train"):
        HessianOperator(model, [(inputs, targets)], get_loss("cross_entropy"), mode="test")


@pytest.mark.parametrize(
    "normalise",
    [nn.utils.parametrizations.weight_norm, lambda m: nn.utils.parametrizations.weight_norm(m, dim=1)],
)
def test_weight_norm_has_the_hessian_of_its_formula_where_torchs_fused_one_is_off_by_a_third(
    normalise,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    inputs, targets = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9,))
    loss = get_loss("cross_entropy")
    operator = HessianOperator(model, split(inputs, targets, [5, 4]), loss)
    found = dense(operator)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12)
    vector = torch.randn(operator.n_parameters, dtype=torch.float64)
    weights, step = dict(model.named_parameters()), 1e-5

    def gradient(sign: float) -> Tensor:
        moved = {n: weights[n] + sign * step * d for n, d in operator.as_dict(vector).items()}
        return HessianOperator(model, [(inputs, targets)], loss, at=moved, memory=0).gradient()

    expected = (gradient(1.0) - gradient(-1.0)) / (2 * step)
    torch.testing.assert_close(operator(vector), expected, rtol=1e-5, atol=1e-8)
