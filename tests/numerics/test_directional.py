"""Every sample's curvature along a direction, against dense Hessians of single samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers.numerics.directional import per_sample_curvature
from dynprobe.analyzers.numerics.hvp import HessianOperator, NoSecondDerivative
from dynprobe.analyzers.numerics.losses import get_loss


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x, x, x)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    if kind == "batchnorm":
        norm = nn.BatchNorm2d(2)
        norm.running_var.fill_(2.0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 2, 2), norm, nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(12, 2),
        ).double()  # fmt: skip
    return {"lstm": Recurrent, "attention": Attention, "layernorm": Encoder}[kind]().double()


KINDS = ["mlp", "batchnorm", "lstm", "attention", "layernorm"]
LOSSES = {
    "cross_entropy": torch.tensor([0, 1, 1, 0, 1]),
    "mse": torch.linspace(-1, 1, 10).view(5, 2),
    "bce_with_logits": torch.ones(5, 2),
}


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_the_slope_and_curvature_of_its_own_loss(kind: str, loss_name: str) -> None:
    model, loss, targets = network(kind), get_loss(loss_name), LOSSES[loss_name]
    inputs = torch.randn(5, 3, 4, dtype=torch.float64)
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    whole = HessianOperator(model, batches, loss)
    direction = torch.randn(whole.n_parameters, dtype=torch.float64)
    found = per_sample_curvature(model, batches, loss, direction)
    single = [HessianOperator(model, [(inputs[i : i + 1], targets[i : i + 1])], loss) for i in range(5)]
    expected = torch.stack([direction @ operator(direction) for operator in single])
    torch.testing.assert_close(found.curvature, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.slope, torch.stack([direction @ o.gradient() for o in single]))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(found.value, loss.per_sample(model.eval()(inputs), targets).double())
    torch.testing.assert_close(found.curvature.mean(), direction @ whole(direction), rtol=1e-10, atol=1e-12)


def test_nested_forward_mode_is_not_trusted_where_it_is_wrong() -> None:
    inputs, targets = torch.randn(5, 3, 4, dtype=torch.float64), LOSSES["cross_entropy"]
    methods = {}
    for kind in KINDS:
        model = network(kind)
        direction = dict(model.named_parameters())
        found = per_sample_curvature(model, [(inputs, targets)], get_loss("cross_entropy"), direction)
        methods[kind] = found.method
    assert methods["mlp"] == methods["batchnorm"] == "forward"
    assert methods["layernorm"] == "reverse"


def test_an_operation_without_forward_mode_is_differentiated_in_reverse() -> None:
    model = network("lstm").float()  # the float32 LSTM on the CPU has no forward mode
    inputs, targets = torch.randn(5, 3, 4), LOSSES["cross_entropy"]
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    single = per_sample_curvature(model, [(inputs, targets)], get_loss("cross_entropy"), direction)
    exact = per_sample_curvature(
        model.double(), [(inputs.double(), targets)], get_loss("cross_entropy"), direction
    )
    assert single.method == "reverse"
    assert single.curvature.dtype == torch.float64
    torch.testing.assert_close(single.curvature, exact.curvature, rtol=1e-4, atol=1e-5)


def test_linear_regression_in_closed_form() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    X, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    d = torch.randn(3, dtype=torch.float64)
    found = per_sample_curvature(model, [(X, y)], get_loss("mse"), d)
    torch.testing.assert_close(found.curvature, 2 * (X @ d).square())
    residual = model(X).detach().flatten() - y
    torch.testing.assert_close(found.slope, 2 * residual * (X @ d))


def test_a_direction_may_name_some_parameters_or_be_a_vector_of_a_block() -> None:
    model, loss = network("mlp"), get_loss("cross_entropy")
    batches = [(torch.randn(5, 3, 4, dtype=torch.float64), LOSSES["cross_entropy"])]
    d = torch.randn(5, 12, dtype=torch.float64)
    named = per_sample_curvature(model, batches, loss, {"1.weight": d})
    block = per_sample_curvature(model, batches, loss, d.flatten(), parameters=["1.weight"])
    assert torch.equal(named.curvature, block.curvature)
    operator = HessianOperator(model, batches, loss, parameters=["1.weight"])
    torch.testing.assert_close(named.curvature.mean(), d.flatten() @ operator(d.flatten()))


def test_a_direction_the_loss_does_not_depend_on_has_zero_curvature() -> None:
    model = network("mlp")
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    batches = [(torch.randn(5, 3, 4, dtype=torch.float64), LOSSES["cross_entropy"])]
    found = per_sample_curvature(model, batches, get_loss("cross_entropy"), {"spare": torch.ones(2)})
    assert torch.equal(found.curvature, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(found.slope, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_model_gradients_flags_random_state_and_fused_attention_stay_as_they_were(kind: str) -> None:
    model = network(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    batches = [(torch.ones(5, 3, 4, dtype=torch.float64), LOSSES["cross_entropy"])]
    per_sample_curvature(model, batches, get_loss("cross_entropy"), dict(model.named_parameters()))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled()


def test_directions_that_do_not_fit_and_missing_batches_say_so() -> None:
    model, loss = network("mlp"), get_loss("cross_entropy")
    batches = [(torch.ones(5, 3, 4, dtype=torch.float64), LOSSES["cross_entropy"])]
    with pytest.raises(ValueError, match=r"shape \(77,\), got \(3,\)"):
        per_sample_curvature(model, batches, loss, torch.ones(3))
    with pytest.raises(ValueError, match=r"4\.weight"):
        per_sample_curvature(model, batches, loss, {"4.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"3\.bias.*\(2,\)"):
        per_sample_curvature(model, batches, loss, {"3.bias": torch.ones(3)})
    with pytest.raises(ValueError, match="no parameter"):
        per_sample_curvature(model, batches, loss, {})
    with pytest.raises(ValueError, match="no batches"):
        per_sample_curvature(model, [], loss, torch.ones(77))


def test_an_operation_without_a_second_derivative_is_named() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bag(x)

    batch = (torch.randint(0, 5, (4, 2)), torch.randint(0, 3, (4,)))
    with pytest.raises(NoSecondDerivative, match="_embedding_bag_backward"):
        per_sample_curvature(Bag(), [batch], get_loss("cross_entropy"), torch.ones(15))
