"""Linear models of a network against numpy, plain iteration, and the constants of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers.numerics.affine_kernel import fit_affine, tangent_kernel
from dynprobe.analyzers.numerics.linear_model import (
    decompose,
    descend,
    descend_by_modes,
    least_squares,
    ratio_of_means,
    shuffled,
    split_residual,
)
from dynprobe.analyzers.numerics.two_layer import NotTwoLayer, early_features, recognise, second_moment_trace

N_KERNEL = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Erf(nn.Module):
    """The paper's scaling, with outputs that cancel at the start."""

    def __init__(self, inputs: int, width: int, outputs: int = 1, act=torch.erf, seed: int = 0) -> None:
        super().__init__()
        half, head = normal(width // 2, inputs, seed=seed), normal(outputs, width // 2, seed=seed + 1).sign()
        self.w = nn.Parameter(torch.cat([half, half]))
        self.v = nn.Parameter(torch.cat([head, -head], 1))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(x.flatten(1) @ self.w.T / math.sqrt(self.w.shape[1]))
        return hidden @ self.v.T / math.sqrt(self.w.shape[0])


class Standard(nn.Module):
    """As libraries write it."""

    def __init__(
        self, inputs: int, width: int, act: nn.Module, *, bias: bool = True, outputs: int = 2
    ) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(inputs, width, bias), act, nn.Linear(width, 2, bias)
        generator = torch.Generator().manual_seed(5)
        for p in self.parameters():
            nn.init.uniform_(p, -1 / math.sqrt(p.shape[-1]), 1 / math.sqrt(p.shape[-1]), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x.flatten(1))))


def half_squared_gradient(target: Tensor):
    return lambda outputs, rows: (outputs - target[rows]) * 2 / target[rows].numel()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("schedule", ["constant", "falling"])
def test_gradient_descent_by_eigenmodes_is_plain_iteration(momentum, nesterov, schedule):
    features, target, start = normal(40, 7), normal(40, 3, seed=1), normal(40, 3, seed=2)
    rates = [0.3] * 60 if schedule == "constant" else [0.3 / (1 + t / 10) for t in range(60)]
    steps = [0, 1, 5, 60]
    by_modes = descend_by_modes(
        decompose(features), target - start, 2 / 120, steps, rates, momentum=momentum, nesterov=nesterov
    )
    iterated = descend(
        features, start, half_squared_gradient(target), steps, rates, momentum=momentum, nesterov=nesterov
    )
    torch.testing.assert_close(by_modes, iterated, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_iteration_with_momentum_is_what_torch_sgd_does(nesterov):
    features, labels = normal(30, 4), torch.arange(30) % 3
    linear = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.5, momentum=0.8, nesterov=nesterov)
    for _ in range(12):
        optimizer.zero_grad()
        functional.cross_entropy(linear(features), labels).backward()
        optimizer.step()

    def gradient(outputs, rows):
        return (torch.softmax(outputs, 1) - functional.one_hot(labels[rows], 3)) / 30

    found = descend(
        features, torch.zeros(30, 3).double(), gradient, [12], [0.5] * 12, momentum=0.8, nesterov=nesterov
    )
    torch.testing.assert_close(found[0], linear.weight.detach().T, rtol=1e-12, atol=1e-12)


def test_descent_on_batches_takes_each_samples_gradient_once_an_epoch():
    batches = shuffled(10, 4, seed=1)
    epochs = [torch.cat([next(batches) for _ in range(3)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    features, target = normal(10, 3), normal(10, 2, seed=1)
    found = descend(
        features,
        torch.zeros_like(target),
        half_squared_gradient(target),
        [0, 1],
        [0.1],
        batches=shuffled(10, 4, 1),
    )
    rows = next(shuffled(10, 4, seed=1))
    torch.testing.assert_close(found[1], 0.1 * features[rows].T @ target[rows] * 2 / 8)


@pytest.mark.parametrize("shape", [(40, 7), (5, 9)])
def test_least_squares_is_numpys_also_with_dependent_columns(shape):
    features, targets = normal(*shape), normal(shape[0], 2, seed=3)
    features = torch.cat([features, features[:, :1] + features[:, 1:2]], 1)
    expected = np.linalg.lstsq(features.numpy(), targets.numpy(), rcond=None)[0]
    np.testing.assert_allclose(least_squares(decompose(features), targets).numpy(), expected, atol=1e-10)


def test_gradient_descent_ends_at_the_least_squares_optimum():
    features, targets = normal(50, 4), normal(50, 1, seed=1)
    found = decompose(features)
    end = descend_by_modes(found, targets, 2 / 50, [5000], [0.1] * 5000)[0]
    torch.testing.assert_close(end, least_squares(found, targets), rtol=1e-10, atol=1e-12)


def test_a_residual_is_split_as_a_projection_splits_it():
    columns, residual, target = normal(30, 6), normal(30, 2, seed=1), normal(30, 2, seed=2)
    projection = columns @ torch.linalg.pinv(columns)
    split = split_residual(decompose(columns).left, residual, target)
    scale = float((target**2).sum())
    assert split.inside == pytest.approx(float(((projection @ residual) ** 2).sum()) / scale, rel=1e-12)
    assert split.outside == pytest.approx(float((residual**2).sum()) / scale - split.inside, rel=1e-12)


def test_the_jackknife_of_the_split_leaves_samples_out_of_the_space_too():
    columns, residual, target = normal(15, 4), normal(15, 2, seed=1), normal(15, 2, seed=2)
    split = split_residual(decompose(columns).left, residual, target)
    without = []
    for i in range(15):
        keep = torch.arange(15) != i
        one = split_residual(decompose(columns[keep]).left, residual[keep], target[keep])
        without.append((one.inside, one.outside))
    expected = np.sqrt(14 / 15 * ((np.array(without) - np.mean(without, 0)) ** 2).sum(0))
    np.testing.assert_allclose([split.inside_stderr, split.outside_stderr], expected, rtol=1e-10)


def test_the_complement_is_nan_where_the_space_is_everything_and_all_is_nan_without_a_target():
    split = split_residual(decompose(normal(5, 8)).left, normal(5, 1), normal(5, 1))
    assert split.inside > 0
    assert math.isnan(split.outside)
    assert math.isnan(split_residual(decompose(normal(9, 2)).left, normal(9, 1), torch.zeros(9, 1)).inside)


def test_a_ratio_of_means_has_the_spread_of_repeated_draws():
    draws = [
        ratio_of_means(normal(200, seed=s) ** 2, normal(200, seed=1000 + s) ** 2 + 1) for s in range(300)
    ]
    ratios, errors = np.array(draws).T
    assert errors.mean() == pytest.approx(ratios.std(), rel=0.1)
    assert math.isnan(ratio_of_means(torch.ones(3), torch.zeros(3))[0])


def test_the_features_are_those_of_the_paper_in_its_scaling():
    d, m, n = 30, 2000, 2000
    model, inputs = Erf(d, m).double(), normal(n, d)
    inputs *= math.sqrt(d) / float((inputs**2).sum(1).mean().sqrt())
    with torch.no_grad():
        model.w *= 1 / model.w.square().mean().sqrt()
    found = recognise(model, inputs[:4])
    features = early_features(model, found, inputs[:4], inputs)
    zeta = 2 / math.sqrt(3 * math.pi)  # E φ'(g) for φ = erf
    assert features.linear == pytest.approx(2 * zeta**2 / d, rel=1e-6)
    assert features.constant == pytest.approx(0, abs=1e-12)
    assert features.scale**2 == pytest.approx(d, rel=1e-9)
    np.testing.assert_allclose(features.norm, 0, atol=1e-8)


def test_relu_features_have_the_papers_constants():
    d, m = 20, 400
    model, inputs = Erf(d, m, act=torch.relu).double(), normal(2000, d)
    inputs *= math.sqrt(d) / float((inputs**2).sum(1).mean().sqrt())
    with torch.no_grad():
        model.w *= 1 / model.w.square().mean().sqrt()
    features = early_features(model, recognise(model, inputs[:4]), inputs[:4], inputs)
    half, root = 0.5, 1 / math.sqrt(2 * math.pi)  # E φ' and E[gφ'] = E φ for ReLU
    nu_squared = root**2 * second_moment_trace(inputs) / d
    assert features.linear == pytest.approx(2 / d * half**2, rel=1e-5)
    assert features.constant == pytest.approx(3 / (2 * d) * nu_squared, rel=1e-4)
    # θ₂ = E[(g³/2 − g)φ'] = (2/2 − 1)/√2π
    np.testing.assert_allclose(features.norm, [root, root, 0], atol=1e-5)
    psi = features(inputs)
    r = inputs.norm(dim=1) / math.sqrt(d) - 1
    torch.testing.assert_close(psi[:, -1], root + root * r, atol=1e-4, rtol=1e-4)
    assert float(features(inputs, norm=False)[:, -1].std()) < 1e-12


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(), nn.Softplus()], ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_the_features_give_the_tangent_kernel_of_a_wide_network_as_libraries_write_it(act, bias):
    d = 60
    model = Standard(d, 2000, act, bias=bias).double()
    inputs = normal(N_KERNEL, d) * 1.3
    many = torch.cat([inputs, normal(3000, d, seed=9) * 1.3])
    features = early_features(model, recognise(model, inputs[:3]), inputs[:3], many)
    kernel, _ = tangent_kernel(model, inputs)
    pairs = ~np.eye(N_KERNEL, dtype=bool)
    products, theirs = (inputs @ inputs.T).numpy()[pairs], kernel[pairs]
    psi = features(inputs)
    ours = (psi @ psi.T).numpy()[pairs]
    slope, _ = np.polyfit(products, theirs, 1)
    assert np.polyfit(products, ours, 1)[0] == pytest.approx(slope, rel=0.04)
    assert ours.mean() == pytest.approx(theirs.mean(), rel=0.03, abs=0.1 * theirs.std())


def test_second_moments_are_estimated_without_bias():
    found = [second_moment_trace(normal(12, 40, seed=s)) for s in range(300)]
    assert np.mean(found) == pytest.approx(40, abs=4 * np.std(found) / math.sqrt(300))
    both = normal(12, 40)
    pairs = ((both @ both.T) ** 2)[~torch.eye(12, dtype=torch.bool)]
    assert second_moment_trace(both) == pytest.approx(float(pairs.mean()), rel=1e-12)


def test_scales_of_inputs_and_biases_are_found_by_probing():
    class Scaled(Standard):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.two(torch.sin(0.5 * self.one(x / 4)))

    found = recognise(Scaled(5, 7, nn.Identity()).double(), normal(4, 5))
    assert found.hidden_bias_scale == pytest.approx(4)
    assert found.output_bias_scale == pytest.approx(3)


OTHERS = {
    "two matrices": [
        [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)],
        [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)],
        [nn.Linear(6, 2)],
    ],
    "activation of each unit": [
        [nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 2)],
        [nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)],
    ],
}


@pytest.mark.parametrize(("reason", "parts"), [(r, p) for r, many in OTHERS.items() for p in many])
def test_other_networks_are_not_taken_for_two_layer_ones(reason, parts):
    model = nn.Sequential(*parts)
    with pytest.raises(NotTwoLayer, match=reason):
        recognise(model.double().eval(), normal(4, 6))


def test_biases_of_equal_sizes_are_told_apart():
    square = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    found = recognise(square, normal(4, 4))
    assert (found.hidden_bias, found.output_bias) == ("0.bias", "2.bias")
    last = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)).double()
    assert recognise(last, normal(4, 4)).output_bias == "2.bias"


def test_recognising_leaves_the_model_as_it_was():
    model = Standard(6, 5, nn.Tanh()).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recognise(model, normal(4, 6))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_the_tangent_kernel_of_a_linear_layer_is_affine_exactly():
    model, inputs = nn.Linear(6, 3).double(), normal(20, 6)
    kernel, n_gradients = tangent_kernel(model, inputs)
    assert n_gradients == 60
    np.testing.assert_allclose(kernel, (inputs @ inputs.T).numpy() + 1, rtol=1e-12, atol=1e-12)
    fit = fit_affine(kernel, inputs.numpy())
    assert (fit.slope, fit.constant, fit.explained) == pytest.approx((1, 1, 1))
    assert fit.slope_stderr == pytest.approx(0, abs=1e-10)
    psi = fit.features(inputs)
    np.testing.assert_allclose((psi @ psi.T).numpy(), kernel, rtol=1e-10, atol=1e-10)


def test_the_error_of_the_fitted_kernel_is_the_spread_over_draws_of_samples():
    model = Standard(20, 200, nn.Tanh()).double()
    fits = []
    for seed in range(40):
        inputs = normal(24, 20, seed=100 + seed)
        fits.append(fit_affine(tangent_kernel(model, inputs)[0], inputs.numpy()))
    slopes = np.array([fit.slope for fit in fits])
    assert np.mean([fit.slope_stderr for fit in fits]) == pytest.approx(slopes.std(), rel=0.5)
