"""Fisher traces against closed forms and dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import functional as autograd_functional
from torch.nn import functional

from dynprobe.analyzers.numerics import fisher_trace
from dynprobe.analyzers.numerics.fisher_trace import (
    exact_fisher_trace,
    gradient_moments,
    sampled_fisher_trace,
)
from dynprobe.analyzers.numerics.losses import as_loss, get_loss
from dynprobe.analyzers.numerics.output_factor import output_factor

N, D, C = 37, 5, 4


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def data(dtype=torch.float64, sizes=(20, 10, 7)):
    x, y = torch.randn(N, D, dtype=dtype), torch.randint(C, (N,))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def whole(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def dense_matrices(model, x, y, loss):
    """Hessian of the mean loss and Gauss-Newton matrix, with the slices of the parameters."""
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach() for p in model.parameters()]
    flat = torch.cat([v.flatten() for v in values])

    def outputs(vector):
        parts = vector.split([v.numel() for v in values])
        filled = {n: p.view_as(v) for n, p, v in zip(names, parts, values, strict=True)}
        return torch.func.functional_call(model, filled, (x,))

    hessian = autograd_functional.hessian(lambda v: loss(outputs(v), y), flat)
    jacobian = autograd_functional.jacobian(outputs, flat)  # (n, outputs, parameters)
    pairs = zip(outputs(flat), y, strict=True)
    metric = torch.stack(
        [autograd_functional.hessian(lambda o, t=t: loss(o[None], t[None]), z) for z, t in pairs]
    )
    ggn = torch.einsum("ncp,ncd,ndq->pq", jacobian, metric, jacobian) / len(x)
    places = torch.arange(len(flat)).split([v.numel() for v in values])
    return hessian, ggn, dict(zip(names, places, strict=True))


def softmax_regression(dtype):
    return nn.Linear(D, C).to(dtype).eval()


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_softmax_regression_has_the_closed_form(dtype, digits):
    model, batches = softmax_regression(dtype), data(dtype)
    found = exact_fisher_trace(model, batches, get_loss("cross_entropy"))
    x = whole(batches)[0].double()
    p = functional.linear(x, model.weight.detach().double(), model.bias.detach().double()).softmax(1)
    terms = (x.square().sum(1) + 1) * (1 - p.square().sum(1))
    value, stderr, n = found.estimate()
    assert math.isclose(value, float(terms.mean()), rel_tol=digits)
    assert math.isclose(stderr, float(terms.std()) / math.sqrt(N), rel_tol=10 * digits)
    assert n == N
    assert found.exact


def relu_net():
    return nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, C)).eval()


def test_traces_of_hessian_gauss_newton_and_fisher_agree_for_a_relu_net_whole_and_per_tensor():
    model, batches, loss = relu_net(), data(), get_loss("cross_entropy")
    hessian, ggn, places = dense_matrices(model, *whole(batches), loss)
    found = exact_fisher_trace(model, batches, loss)
    assert math.isclose(found.estimate().value, float(hessian.trace()), rel_tol=1e-12)
    for name, place in places.items():
        value = found.estimate([name]).value
        assert math.isclose(value, float(ggn.diag()[place].sum()), rel_tol=1e-12)
        assert math.isclose(value, float(hessian.diag()[place].sum()), rel_tol=1e-11)


def test_the_hessian_of_a_tanh_net_has_another_trace():
    model, batches, loss = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).eval(), data(), None
    loss = get_loss("cross_entropy")
    with torch.no_grad():
        model[0].weight.mul_(3)
    hessian, ggn, _ = dense_matrices(model, *whole(batches), loss)
    value = exact_fisher_trace(model, batches, loss).estimate().value
    assert math.isclose(value, float(ggn.trace()), rel_tol=1e-12)
    assert not math.isclose(value, float(hessian.trace()), rel_tol=1e-2)


@pytest.mark.parametrize("name", ["mse", "bce_with_logits"])
def test_other_losses_have_the_trace_of_their_gauss_newton_matrix(name):
    model, batches = relu_net(), [(x, torch.rand(len(x), C)) for x, _ in data()]
    loss = get_loss(name)
    _, ggn, _ = dense_matrices(model, *whole(batches), loss)
    found = exact_fisher_trace(model, batches, loss)
    assert math.isclose(found.estimate().value, float(ggn.trace()), rel_tol=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "causal_lm", "bce_with_logits", "mse"])
def test_the_output_factor_is_a_root_of_the_second_derivative_of_the_loss(name):
    loss = get_loss(name)
    shape = (3, 4, C) if name == "causal_lm" else (3, C, 2)
    z = torch.randn(shape)
    y = {"causal_lm": torch.randint(C, (3, 4)), "cross_entropy": torch.randint(C, (3, 2))}.get(
        name, torch.rand(shape)
    )
    if name in ("causal_lm", "cross_entropy"):
        y[0, 1] = -100
    factor = output_factor(loss, z, y)
    columns = torch.stack(list(factor.columns()), -1).flatten(1, -2)
    for i in range(3):
        second = autograd_functional.hessian(lambda o, i=i: loss(o[None], y[i : i + 1]), z[i])
        size = z[i].numel()
        torch.testing.assert_close(columns[i] @ columns[i].T, second.reshape(size, size))


def test_the_fisher_of_a_network_that_fits_its_data_perfectly_is_finite_and_right():
    for dtype in (torch.float32, torch.float64):
        for scale in (1.0, 30.0, 1e4):
            z = torch.tensor([[1.0, 0.0, -0.5, -1.0]], dtype=dtype) * scale
            factor = output_factor(get_loss("cross_entropy"), z, torch.tensor([0]))
            trace = sum(c.double().square().sum() for c in factor.columns())
            rest = torch.exp(z.double() - z.double()[0, 0])[0]
            p = rest / rest.sum()
            others = 1 - p
            others[0] = p[1:].sum()
            assert math.isfinite(float(trace))
            torch.testing.assert_close(trace, (p * others).sum(), rtol=1e-6, atol=0)


def test_a_peer_library_fails_where_cumulated_probabilities_round_beyond_one():
    """The way of nngeometry 0.4: it takes the square root of 1 − cumsum(p), which rounding makes negative."""
    torch.manual_seed(0)
    logits = torch.randn(2000, 10, dtype=torch.float32)
    logits[:, 9] += 10
    p = logits.softmax(1).flip(1)
    assert bool(((1 - p.cumsum(1)) < 0).any())
    targets = torch.full((2000,), 9)
    for column in output_factor(get_loss("cross_entropy"), logits, targets).columns():
        assert bool(torch.isfinite(column).all())


def test_sampled_traces_agree_with_exact_ones_within_their_error():
    model, batches, loss = relu_net(), data(), get_loss("cross_entropy")
    exact = exact_fisher_trace(model, batches, loss)
    found = sampled_fisher_trace(model, batches, loss, tol=0.01, max_draws=4000, seed=1)
    assert found.converged
    assert 1 < found.draws < 4000
    assert found.draw_stderr <= 0.01 * found.estimate().value
    assert abs(found.estimate().value - exact.estimate().value) < 4 * found.draw_stderr
    for name in exact.names:
        assert math.isclose(found.estimate([name]).value, exact.estimate([name]).value, rel_tol=0.1)
    assert found.estimate().stderr > found.draw_stderr


def test_sampled_traces_say_when_the_draws_do_not_suffice():
    found = sampled_fisher_trace(relu_net(), data(), get_loss("cross_entropy"), tol=1e-4, max_draws=6)
    assert not found.converged
    assert found.draws == 6


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, C)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_groups_of_samples_with_random_signs_give_the_trace_of_an_lstm():
    model, loss = Recurrent().eval(), get_loss("cross_entropy")
    batches = [(torch.randn(n, 4, 2), torch.randint(C, (n,))) for n in (20, 3)]
    exact = exact_fisher_trace(model, batches, loss)
    found = sampled_fisher_trace(model, batches, loss, tol=0.05, max_draws=600)
    assert found.converged
    assert found.sizes.tolist() == [16, 7]
    assert abs(found.estimate().value - exact.estimate().value) < 4 * found.draw_stderr
    moments = gradient_moments(model, batches, loss, draws=400)
    rows = []
    for x, y in batches:
        for i in range(len(y)):
            parts = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
            rows.append(torch.cat([p.flatten() for p in parts]))
    rows = torch.stack(rows)
    assert math.isclose(moments.squares.estimate().value, float(rows.square().sum(1).mean()), rel_tol=0.1)
    names = moments.squares.names
    assert math.isclose(moments.mean_norm(names), float(rows.mean(0).norm()), rel_tol=1e-10)


def test_the_empirical_fisher_is_another_matrix_once_the_network_is_trained():
    model, batches, loss = relu_net(), data(), get_loss("cross_entropy")
    x, y = whole(batches)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    true = exact_fisher_trace(model, batches, loss).estimate()
    empirical = gradient_moments(model, batches, loss).squares.estimate()
    assert abs(true.value - empirical.value) > 0.2 * true.value


def test_moments_of_the_gradients_are_those_of_single_samples():
    model, batches, loss = relu_net(), data(), get_loss("cross_entropy")
    x, y = whole(batches)
    rows = []
    for i in range(N):
        parts = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
        rows.append(parts[0].flatten())
    rows = torch.stack(rows)
    found = gradient_moments(model, batches, loss)
    assert math.isclose(found.squares.estimate(["0.weight"]).value, float(rows.square().sum(1).mean()))
    assert math.isclose(found.mean_norm(["0.weight"]), float(rows.mean(0).norm()), rel_tol=1e-10)
    deviation = float((rows - rows.mean(0)).square().sum(1).mean().sqrt())
    assert math.isclose(found.std(["0.weight"]), deviation, rel_tol=1e-10)


def test_the_split_into_batches_does_not_matter():
    model, loss, batches = relu_net(), get_loss("cross_entropy"), data()
    one = exact_fisher_trace(model, [whole(batches)], loss).estimate()
    several = exact_fisher_trace(model, batches, loss).estimate()
    assert math.isclose(one.value, several.value, rel_tol=1e-13)
    assert math.isclose(one.stderr, several.stderr, rel_tol=1e-12)


def test_a_loss_without_a_distribution_over_labels_is_refused():
    with pytest.raises(ValueError, match="which labels the model would draw"):
        exact_fisher_trace(relu_net(), data(), as_loss(functional.multi_margin_loss))


def test_a_loss_of_ones_own_under_a_known_name_is_refused_for_what_it_is():
    with pytest.raises(ValueError, match="cross_entropy is a function of your own"):
        exact_fisher_trace(relu_net(), data(), as_loss(functional.cross_entropy))


@pytest.mark.parametrize("slow", [False, True])
def test_sampled_traces_do_not_depend_on_the_split_into_batches(slow):
    loss = get_loss("cross_entropy")
    model = Recurrent().eval() if slow else relu_net()
    x, y = (torch.randn(N, 3, 2), torch.randint(C, (N,))) if slow else whole(data())
    splits = [[(x, y)], list(zip(x.split(5), y.split(5), strict=True))]
    one, other = (sampled_fisher_trace(model, batches, loss, tol=0.2, seed=3) for batches in splits)
    torch.testing.assert_close(one.values, other.values, rtol=1e-11, atol=1e-13)
    one, other = (gradient_moments(model, batches, loss, seed=3).squares for batches in splits)
    torch.testing.assert_close(one.values, other.values, rtol=1e-11, atol=1e-13)


def test_batches_with_many_logits_are_cut_without_a_change(monkeypatch):
    model, batches, loss = relu_net(), data(), get_loss("cross_entropy")

    def traces():
        return [
            exact_fisher_trace(model, batches, loss).values,
            sampled_fisher_trace(model, batches, loss, tol=0.1).values,
        ]

    before = traces()
    monkeypatch.setattr(fisher_trace, "FACTOR_BYTES", 3 * 64 * C)
    sizes = []
    factor = fisher_trace.output_factor
    monkeypatch.setattr(fisher_trace, "output_factor", lambda *a: (sizes.append(len(a[1])), factor(*a))[1])
    for now, then in zip(traces(), before, strict=True):
        torch.testing.assert_close(now, then)
    assert max(sizes) == 3


def test_two_lucky_draws_of_a_single_group_are_not_converged():
    model, loss = Recurrent().eval(), get_loss("cross_entropy")
    batches = [(torch.randn(12, 4, 2), torch.randint(C, (12,)))]
    true = exact_fisher_trace(model, batches, loss).estimate().value
    for seed in range(20):
        assert not sampled_fisher_trace(model, batches, loss, max_draws=2, seed=seed, tol=0.3).converged
        found = sampled_fisher_trace(model, batches, loss, seed=seed, tol=0.3)
        assert found.converged
        assert found.draws >= 25
        assert abs(found.estimate().value / true - 1) < 0.9


def test_exact_moments_of_a_recurrent_network_hold_no_random_number():
    model, loss = Recurrent().eval(), get_loss("cross_entropy")
    batches = [(torch.randn(n, 4, 2), torch.randint(C, (n,))) for n in (5, 3)]
    norms = []
    for x, y in batches:
        for i in range(len(y)):
            parts = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), model.parameters())
            norms.append(sum(float(p.square().sum()) for p in parts))
    found = gradient_moments(model, batches, loss, exact=True).squares
    assert found.exact
    torch.testing.assert_close(found.values.sum(1), torch.tensor(norms))
    assert math.isfinite(found.estimate().stderr)
    drawn = gradient_moments(model, batches, loss).squares
    assert drawn.draws == 16
    assert drawn.draw_stderr > 0


@pytest.mark.parametrize("dense", [False, True])
def test_a_sample_whose_targets_are_all_ignored_has_no_trace_and_not_a_zero(dense):
    model = nn.Conv1d(D, C, 1).eval() if dense else nn.Linear(D, C).eval()
    x, y = (
        (torch.randn(3, D, 2), torch.randint(C, (3, 2)))
        if dense
        else (torch.randn(3, D), torch.randint(C, (3,)))
    )
    y[1] = -100
    loss = get_loss("cross_entropy")
    for found in (exact_fisher_trace(model, [(x, y)], loss), gradient_moments(model, [(x, y)], loss).squares):
        assert found.values.isnan().any(1).tolist() == [False, True, False]
