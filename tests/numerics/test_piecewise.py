"""Which networks are piecewise linear in each of their tensors, and the traces that follow."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from dynprobe.analyzers.numerics.piecewise import linear_in_each_tensor


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding="same")
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv(x))
        y += x
        y = nn.functional.max_pool2d(self.relu(y), 2)
        return self.head(torch.cat([y[:, :2], y[:, 2:] / 2], 1).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self, in_series):
        super().__init__()
        self.layer, self.in_series = nn.Linear(4, 4), in_series

    def forward(self, x):
        if self.in_series:
            return self.layer(torch.relu(self.layer(x)))
        return torch.relu(self.layer(x)) + self.layer(2 * x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


class Scattered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.lerp(self.layer(x), self.other(x), 0.3)
        y = torch.zeros_like(x).index_add(1, torch.tensor([0, 0, 1, 2]), y)
        y = (
            torch.zeros_like(x).scatter(1, torch.zeros(len(x), 1, dtype=torch.long), y[:, :1])
            + y.median(1)[0][:, None]
        )
        return nn.functional.softshrink(nn.functional.hardshrink(y))


class Interpolated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        y = nn.functional.interpolate(self.conv(x), scale_factor=2, mode="nearest-exact")
        return nn.functional.interpolate(y, size=(3, 3), mode="bilinear", antialias=True)


class Bilinear(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.layer, self.product, self.own = nn.Linear(4, 4), nn.Bilinear(4, 4, 3), own

    def forward(self, x):
        y = self.layer(x)
        return self.product(y, y if self.own else x)


class View(torch.autograd.Function):
    """Called like a linear operation, and not linear."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].exp() * gradient


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return View.apply(self.layer(x))


class Lerped(nn.Module):
    """The parameter is what is interpolated and how far."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return torch.lerp(x * self.scale, x, self.scale)


def images():
    return torch.randn(5, 1, 6, 6)


def vectors():
    return torch.randn(5, 4)


LINEAR = {
    "relu mlp": (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), vectors),
    "residual net with batch norm, max-pool and in-place sums": (Residual(), images),
    "pools": (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU6(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        images,
    ),
    "padding": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Hardtanh()), images),
    "prelu": (nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 2), nn.LeakyReLU()), vectors),
    "dropout in eval mode": (nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 2)), vectors),
    "positions": (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), lambda: torch.randn(5, 3, 4)),
    "shared in parallel": (Tied(in_series=False), vectors),
    "first layer norm": (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), vectors),
    "scatters and shrinkages": (Scattered(), vectors),
    "interpolations": (Interpolated(), images),
    "bilinear layer": (Bilinear(own=False), vectors),
    "embedding": (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), lambda: torch.randint(5, (5, 4))),
}
NOT_LINEAR = {
    "tanh": (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), vectors, "Tanh"),
    "gelu": (nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)), vectors, "Gelu"),
    "softmax": (nn.Sequential(nn.Linear(4, 5), nn.Softmax(1)), vectors, "Softmax"),
    "lstm": (Recurrent(), lambda: torch.randn(5, 3, 4), "is not known"),
    "attention": (Attention(), lambda: torch.randn(5, 3, 4), "is not known|in both factors"),
    "layer norm": (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), vectors, "LayerNorm"),
    "bilinear layer of itself": (Bilinear(own=True), vectors, "is in both factors of one product"),
    "custom function": (Custom(), vectors, "View is a custom function"),
    "interpolated by itself": (Lerped(), vectors, "scale is in both factors"),
    "tied in series": (Tied(in_series=True), vectors, "layer.weight is in both factors"),
    "weight norm": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))),
        vectors,
        "not known|in both",
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_piecewise_linear_networks_are_recognised(name):
    model, make = LINEAR[name]
    assert linear_in_each_tensor(model.eval(), make()) == (True, "")


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_other_networks_are_not_and_the_reason_names_the_operation(name):
    model, make, reason = NOT_LINEAR[name]
    linear, why = linear_in_each_tensor(model.eval(), make())
    assert not linear
    assert re.search(reason, why), why


def test_batch_statistics_are_not_linear():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    linear, why = linear_in_each_tensor(model, images())
    assert not linear
    assert "batch statistics" in why


def test_only_the_tensors_in_question_count():
    model, make, _ = NOT_LINEAR["tanh"]
    assert linear_in_each_tensor(model, make(), ["2.weight", "2.bias"]) == (True, "")
    assert not linear_in_each_tensor(model, make(), ["0.weight"])[0]


@pytest.mark.parametrize("name", ["relu mlp", "residual net with batch norm, max-pool and in-place sums"])
def test_second_derivatives_of_the_outputs_vanish_in_each_tensor(name):
    torch.manual_seed(0)
    model, make = LINEAR[name]
    model, x = copy.deepcopy(model).double().eval(), make().double()
    for key, parameter in model.named_parameters():

        def outputs(value, key=key):
            return torch.func.functional_call(model, {key: value}, (x,)).square().sum()

        def squares(value, key=key):
            """What is left of the Hessian of Σz² is 2JᵀJ."""
            return torch.func.functional_call(model, {key: value}, (x,)).flatten()

        jacobian = torch.autograd.functional.jacobian(squares, parameter.detach()).flatten(1)
        hessian = torch.autograd.functional.hessian(outputs, parameter.detach())
        size = parameter.numel()
        torch.testing.assert_close(hessian.reshape(size, size), 2 * jacobian.T @ jacobian)


def test_the_model_keeps_its_flags():
    model, make = LINEAR["relu mlp"]
    model.requires_grad_(False)
    assert linear_in_each_tensor(model, make())[0]
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
