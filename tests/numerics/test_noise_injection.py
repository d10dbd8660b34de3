"""Noise injection against closed forms of quadratic losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.numerics.noise_injection import noise_injection

N, D = 40, 6
MSE = get_loss("mse")


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def regression():
    model = nn.Linear(D, 1).eval()
    x = torch.randn(N, D) * torch.linspace(0.5, 2, D)
    return model, x, list(zip(x.split(16), torch.randn(N, 1).split(16), strict=True))


def test_linear_regression_with_unequal_batches_has_the_trace_of_two_xtx_over_n():
    model, x, batches = regression()
    found = noise_injection(model, batches, MSE, steps=500, seed=1)
    truth = float((2 * x.T @ x / N).trace())
    assert found.converged
    assert found.total_stderr < 0.05 * truth
    assert abs(found.total - truth) < 4 * found.total_stderr
    assert math.isclose(found.trace["weight"], found.total)


def test_sigma_satisfies_the_stationarity_condition():
    model, x, batches = regression()
    beta = 1e-3
    found = noise_injection(model, batches, MSE, steps=500, beta=beta)
    curvature = float((2 * x.T @ x / N).trace()) / D
    sigma2 = float(found.sigma["weight"].square())
    prior = float(model.weight.detach().square().mean()) + sigma2
    assert math.isclose(2 * beta * (1 / sigma2 - 1 / prior), curvature, rel_tol=0.1)


def test_the_gradient_itself_adds_no_variance():
    """At a point far from the minimum the gradient is large; of ± the noise only curvature is left."""
    model, _, batches = regression()
    small = noise_injection(model, batches, MSE, steps=200)
    far = noise_injection(model, [(x, y + 1e4) for x, y in batches], MSE, steps=200)
    assert math.isclose(small.total, far.total, rel_tol=1e-3)


def test_each_filter_has_its_own_variance():
    model = nn.Linear(D, 2, bias=False).eval()
    x = torch.randn(N, D)
    weight = torch.tensor([1.0, 9.0])

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, given):
            return self.layer(given) * weight.sqrt()

    found = noise_injection(Weighted().eval(), [(x, torch.zeros(N, 2))], MSE, steps=600, beta=1e-5)
    ratio = found.sigma["layer.weight"].square()
    assert math.isclose(float(ratio[0] / ratio[1]), 9, rel_tol=0.15)


def test_too_few_steps_are_not_converged():
    model, _, batches = regression()
    assert not noise_injection(model, batches, MSE, steps=4, tol=1e-3).converged


def test_a_tensor_that_is_zero_throughout_gets_no_noise():
    model, _, batches = regression()
    net = nn.Sequential(model, nn.Linear(1, 1)).eval()
    nn.init.zeros_(net[1].weight)
    found = noise_injection(net, batches, MSE, steps=8)
    assert list(found.trace) == ["0.weight"]
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="is not zero"):
        noise_injection(net, batches, MSE, steps=8)


def test_a_model_without_filters_is_refused():
    with pytest.raises(ValueError, match="two or more dimensions"):
        noise_injection(nn.BatchNorm1d(3).eval(), [(torch.randn(2, 3), torch.randn(2, 3))], MSE, steps=2)


def test_the_model_and_the_global_generator_are_untouched():
    model, _, batches = regression()
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    noise_injection(model, batches, MSE, steps=3)
    assert torch.equal(before, model.weight)
    assert torch.equal(state, torch.get_rng_state())
    assert model.weight.grad is None
