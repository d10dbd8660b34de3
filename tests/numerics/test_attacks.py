"""Attacks and input Hessians against closed forms and dense brute force, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers.numerics.attacks import (
    Box,
    Noise,
    NotPerturbable,
    Victim,
    Work,
    in_float64,
    norms,
    perturbable,
    perturbed,
    project,
    projected_gradient,
    steepest,
    wilson,
)
from dynprobe.analyzers.numerics.hvp import NoSecondDerivative
from dynprobe.analyzers.numerics.input_hessian import InputHessian, newton_direction
from dynprobe.analyzers.numerics.losses import Loss, as_loss, get_loss

CE, BCE = get_loss("cross_entropy"), get_loss("bce_with_logits")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(n_features=5, n_outputs=1, seed=0):
    model = nn.Linear(n_features, n_outputs).double()
    with torch.no_grad():
        model.weight.copy_(randn(n_outputs, n_features, seed=seed))
        model.bias.copy_(randn(n_outputs, seed=seed + 1))
    return model


def victim_of(model, x, targets, loss, classifies=True):
    return Victim(model.eval(), x, targets, loss, classifies=classifies, work=Work())


def binary(n=12, n_features=5):
    targets = torch.arange(n) % 2
    return victim_of(linear(n_features), randn(n, n_features, seed=7), targets.double(), BCE)


class Recorder(nn.Module):
    """Keeps every input that it is called with."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


def test_fgsm_is_the_worst_corner_of_the_cube_for_a_linear_classifier():
    victim = binary()
    epsilon = 0.3
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=torch.float64)
    worst = torch.stack([victim.values(victim.x + epsilon * corner).loss for corner in corners]).amax(0)
    step = perturbed(victim.x, steepest(victim.input_gradient, "linf"), epsilon, Box())
    torch.testing.assert_close(victim.values(step).loss, worst, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_one_step_and_pgd_move_a_linear_logit_by_epsilon_times_the_dual_norm(norm, dual):
    victim, epsilon = binary(), 0.4
    weight = victim._model.weight[0].detach()
    side = 2 * victim._targets - 1
    margin = side * victim._model(victim.x).detach()[:, 0]
    expected = torch.nn.functional.softplus(-(margin - epsilon * weight.norm(dual)))
    step = perturbed(victim.x, steepest(victim.input_gradient, norm), epsilon, Box())
    torch.testing.assert_close(victim.values(step).loss, expected, rtol=1e-10, atol=0)
    still = torch.zeros_like(victim.x)
    found = projected_gradient(victim, norm, epsilon, steps=20, start=still, box=Box())
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=0)
    assert torch.equal(found.accuracy, (margin > epsilon * weight.norm(dual)).double())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_point_that_pgd_visits_lies_in_the_ball_and_in_the_box(norm):
    model = Recorder(nn.Sequential(linear(6, 8), nn.Tanh(), linear(8, 3)))
    x = randn(9, 6, seed=2).clamp(-1, 1)
    victim = victim_of(model, x, torch.arange(9) % 3, CE)
    start = Noise(9, (6,), 0).start(norm, 0)
    model.seen.clear()
    projected_gradient(victim, norm, 0.7, steps=10, start=start, box=Box(-1.0, 1.0))
    assert len(model.seen) == 11
    for point in model.seen:
        assert float(point.abs().max()) <= 1.0
        assert float(norms(point - x, math.inf if norm == "linf" else 2).max()) <= 0.7 * (1 + 1e-14)
    assert any(float((point - x).abs().max()) > 0.3 for point in model.seen)


def test_pgd_keeps_of_every_sample_the_worst_point_visited_and_the_clean_one():
    class Wave(nn.Module):
        def forward(self, x):
            return 40 * torch.sin(9 * x.sum(1, keepdim=True))

    model = Recorder(Wave())
    x = randn(6, 2, seed=5)
    victim = victim_of(model, x, torch.ones(6, dtype=torch.float64), BCE)
    model.seen.clear()
    found = projected_gradient(
        victim, "linf", 0.5, steps=7, start=Noise(6, (2,), 1).start("linf", 0), box=Box()
    )
    points = torch.stack([victim.values(point).loss for point in [x, *model.seen]])
    assert torch.equal(found.loss, points.amax(0))
    assert not torch.equal(found.loss, points[-1])
    rights = torch.stack([victim.values(point).accuracy for point in [x, *model.seen[:8]]])
    assert torch.equal(found.accuracy, rights.amin(0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_the_identity_inside_the_ball_and_lands_on_its_surface_from_outside(norm):
    order = math.inf if norm == "linf" else 2
    delta = randn(30, 4, seed=1)
    there = project(delta, norm, 1.5)
    inside = norms(delta, order) <= 1.5
    assert 0 < int(inside.sum()) < 30
    assert torch.equal(there[inside], delta[inside])
    torch.testing.assert_close(norms(there[~inside], order), torch.full(((~inside).sum(),), 1.5).double())


def test_steepest_direction_has_unit_norm_also_for_gradients_whose_squares_underflow():
    gradient = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    direction = steepest(gradient, "l2")
    torch.testing.assert_close(direction[:2], torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    assert torch.equal(direction[2:], torch.zeros(3, 2))
    assert torch.equal(steepest(gradient, "linf")[2:], torch.zeros(3, 2))


def test_starts_are_uniform_in_the_ball_and_directions_are_of_unit_norm():
    noise = Noise(4000, (3,), 5)
    radius = norms(noise.start("l2", 0), 2)
    assert float(radius.max()) <= 1 + 1e-6
    assert float((radius < 0.5).double().mean()) == pytest.approx(1 / 8, abs=3 * math.sqrt(7 / 64 / 4000))
    cube = noise.start("linf", 0)
    assert float(cube.abs().max()) <= 1
    assert float(cube.square().mean()) == pytest.approx(1 / 3, abs=0.02)
    torch.testing.assert_close(norms(noise.direction("l2"), 2), torch.ones(4000).double())
    assert torch.equal(noise.direction("linf").abs(), torch.ones(4000, 3))
    assert not torch.equal(noise.start("l2", 0), noise.start("l2", 1))
    assert torch.equal(noise.start("l2", 1), Noise(4000, (3,), 5).start("l2", 1))


@pytest.mark.parametrize(("right", "n"), [(0, 7), (1, 1), (3, 10), (500, 1000), (40, 40)])
def test_the_interval_is_wilsons(right, n):
    low, high = wilson(np.array(right / n), n)
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert float(low) == pytest.approx(expected.low, abs=1e-12)
    assert float(high) == pytest.approx(expected.high, abs=1e-12)


def test_the_one_floating_point_input_is_found_and_masks_are_left_alone():
    x, ids = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    assert perturbable(x) == (None, x)
    assert perturbable((ids, x))[0] == 1
    assert perturbable({"pixels": x, "attention_mask": torch.ones(2, 3)})[0] == "pixels"
    with pytest.raises(NotPerturbable, match=r"integers \(token ids\)"):
        perturbable({"input_ids": ids})
    with pytest.raises(NotPerturbable, match="2 floating-point inputs \\(a, b\\)"):
        perturbable({"a": x, "b": x})


def test_only_the_floating_point_entry_of_a_tuple_is_moved():
    class Chosen(nn.Module):
        def forward(self, rows, x):
            return x * rows[:, None]

    x, rows = randn(4, 3), torch.arange(1, 5)
    victim = victim_of(Chosen(), (rows, x), randn(4, 3, seed=1), get_loss("mse"), classifies=False)
    expected = 2 / 3 * (x * rows[:, None] - randn(4, 3, seed=1)) * rows[:, None]
    torch.testing.assert_close(victim.input_gradient, expected)


def test_a_model_that_writes_over_its_input_leaves_the_data_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), linear(3, 2))
    x = randn(5, 3)
    before = x.clone()
    victim = victim_of(model, x, torch.zeros(5, dtype=torch.long), CE)
    victim.values(victim.x)
    assert torch.equal(x, before)
    assert torch.equal(victim.x, before)


def test_the_gradient_of_a_saturated_sample_survives_float32_because_the_loss_is_taken_in_float64():
    model = linear(4, 2).float()
    across = model.weight[0].detach() - model.weight[1].detach()
    gaps = torch.tensor([20.0, 25.0, 30.0])  # exp(-20) = 2e-9: the softmax rounds to one in float32
    with torch.no_grad():
        model.bias.zero_()
    x, targets = gaps[:, None] * across / across.square().sum(), torch.zeros(3, dtype=torch.long)
    rounded = victim_of(model, x, targets, CE).input_gradient.double()
    kept = victim_of(model, x, targets, in_float64(CE, model(x), targets)).input_gradient.double()
    weight = model.weight.detach().double()
    outputs = x.double() @ weight.T + model.bias.detach().double()
    share = torch.softmax(outputs, 1)[torch.arange(3), 1 - targets]
    exact = share[:, None] * (weight[1 - targets] - weight[targets])
    assert float((kept / exact - 1).abs().max()) < 1e-2
    assert float((rounded / exact - 1).abs().max()) > 0.1


def test_a_loss_that_takes_no_float64_is_left_as_it_is():
    weighted = as_loss(nn.CrossEntropyLoss(weight=torch.ones(3)))
    assert in_float64(weighted, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)) is weighted


def test_a_model_that_ignores_its_input_has_a_zero_gradient():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2, dtype=x.dtype)

    victim = victim_of(Constant(), randn(4, 3), torch.zeros(4, dtype=torch.long), CE)
    assert torch.equal(victim.input_gradient, torch.zeros(4, 3).double())
    newton = newton_direction(InputHessian(victim.losses, victim.x), damping=0.1, iterations=5)
    assert torch.equal(newton.direction, torch.zeros(4, 3).double())
    assert torch.isnan(newton.residual).all()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


NETS = {
    "tanh": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "batchnorm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)
        ),
        (1, 4, 4),
    ),
    "attention": (Attention, (2, 8)),
    "lstm": (Recurrent, (3, 3)),
}


def net_victim(name, n=4, scale=1.0):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    return victim_of(model, scale * randn(n, *shape, seed=4), torch.arange(n) % 3, CE)


def dense_hessian(victim):
    """Every sample's Hessian by brute force, shape (n, d, d)."""
    d = victim.x[0].numel()
    rows = []
    for i in range(len(victim)):
        x, y = victim.x[i : i + 1], victim._targets[i : i + 1]
        with sdpa_kernel(SDPBackend.MATH):
            block = torch.autograd.functional.hessian(
                lambda z, y=y: CE.per_sample(victim._model(z), y).sum(), x
            )
        rows.append(block.reshape(d, d))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["tanh", "batchnorm", "lstm", "attention"])
def test_products_are_those_of_the_dense_hessian_of_every_sample(name):
    victim = net_victim(name)
    operator = InputHessian(victim.losses, victim.x)
    vectors = randn(len(victim), victim.x[0].numel(), seed=9)
    dense = dense_hessian(victim)
    torch.testing.assert_close(operator.gradient, victim.input_gradient.flatten(1))
    expected = torch.einsum("nij,nj->ni", dense, vectors)
    torch.testing.assert_close(operator.matvec(vectors), expected, rtol=1e-9, atol=1e-12)


def quadratic(matrices):
    """½ zᵀAz, z the output less the target, with every sample's own A as its target's rows."""
    return Loss("quadratic", lambda z, _: 0.5 * torch.einsum("ni,nij,nj->n", z, matrices, z), CE.accuracy)


def test_the_newton_direction_of_a_quadratic_loss_points_away_from_its_minimum():
    root = randn(5, 4, 4, seed=1)
    matrices = root @ root.transpose(1, 2) + 0.1 * torch.eye(4).double()
    victim = victim_of(nn.Identity(), randn(5, 4, seed=2), torch.zeros(5), quadratic(matrices), False)
    newton = newton_direction(InputHessian(victim.losses, victim.x), damping=0, iterations=40, tol=1e-12)
    torch.testing.assert_close(
        steepest(newton.direction, "l2"), steepest(victim.x, "l2"), rtol=1e-6, atol=1e-8
    )
    assert torch.equal(steepest(newton.direction, "linf"), victim.x.sign())
    assert float(newton.residual.max()) < 1e-8
    torch.testing.assert_close(newton.eigenvalue, torch.linalg.eigvalsh(matrices)[:, -1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("damping", [1.0, 0.1])
def test_the_damped_direction_solves_the_dense_system_where_the_hessian_is_singular(damping):
    victim = victim_of(linear(6, 3), randn(7, 6, seed=3), torch.arange(7) % 3, CE)
    dense = dense_hessian(victim)
    assert int(torch.linalg.matrix_rank(dense, rtol=1e-10).max()) == 2  # C - 1
    gradient = steepest(victim.input_gradient, "l2")
    along = torch.einsum("ni,nij,nj->n", gradient, dense, gradient)
    system = dense + damping * along[:, None, None] * torch.eye(6)
    newton = newton_direction(
        InputHessian(victim.losses, victim.x), damping=damping, iterations=20, tol=1e-11
    )
    torch.testing.assert_close(newton.direction, torch.linalg.solve(system, gradient), rtol=1e-8, atol=1e-9)
    assert not newton.truncated.any()
    assert int(newton.iterations.max()) <= 3
    torch.testing.assert_close(newton.eigenvalue, torch.linalg.eigvalsh(dense)[:, -1], rtol=1e-6, atol=1e-9)


def test_a_solve_cut_short_reports_its_true_residual():
    victim = net_victim("tanh")
    dense, gradient = dense_hessian(victim), steepest(victim.input_gradient, "l2")
    newton = newton_direction(InputHessian(victim.losses, victim.x), damping=0.5, iterations=1)
    system = dense + newton.damping[:, None, None] * torch.eye(4)
    misfit = norms(gradient - torch.einsum("nij,nj->ni", system, newton.direction), 2)
    kept = ~newton.truncated
    assert float(misfit[kept].max()) > 1e-3
    torch.testing.assert_close(newton.residual[kept], misfit[kept])


def test_negative_curvature_ends_the_solve_with_a_direction_that_raises_the_loss():
    matrices = torch.diag_embed(torch.tensor([[1.0, -3.0, 2.0], [-1.0, -1.0, -1.0]]).double())
    x = torch.tensor([[1.0, 0.1, 0.5], [1.0, 2.0, 3.0]]).double()
    victim = victim_of(nn.Identity(), x, torch.zeros(2), quadratic(matrices), False)
    newton = newton_direction(InputHessian(victim.losses, victim.x), damping=0.01, iterations=10)
    assert newton.truncated.all()
    assert torch.isnan(newton.residual).all()
    assert ((newton.direction * victim.input_gradient).sum(1) > 0).all()
    torch.testing.assert_close(newton.direction[1], steepest(victim.input_gradient, "l2")[1])


def test_newton_directions_do_not_depend_on_the_other_samples_of_the_batch():
    whole = net_victim("tanh", n=6)
    together = newton_direction(InputHessian(whole.losses, whole.x), damping=0.1, iterations=8)
    for i in range(6):
        alone = victim_of(whole._model, whole.x[i : i + 1], whole._targets[i : i + 1], CE)
        single = newton_direction(InputHessian(alone.losses, alone.x), damping=0.1, iterations=8)
        torch.testing.assert_close(together.direction[i], single.direction[0], rtol=1e-9, atol=1e-12)


def test_an_operation_without_a_second_derivative_is_named():
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x, torch.eye(2, 3, dtype=x.dtype))

    victim = victim_of(Distances(), randn(4, 3), torch.zeros(4, dtype=torch.long), CE)
    with pytest.raises(NoSecondDerivative, match="_cdist_backward"):
        InputHessian(victim.losses, victim.x).matvec(torch.ones(4, 3).double())


def test_work_counts_samples_once_for_every_pass():
    work = Work()
    victim = Victim(linear(3, 2), randn(5, 3), torch.zeros(5).long(), CE, classifies=True, work=work)
    projected_gradient(victim, "l2", 1.0, steps=4, start=torch.zeros(5, 3), box=Box())
    assert (work.gradients, work.forwards) == (5 * 5, 5)
