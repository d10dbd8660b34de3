"""The covariance of the gradients against dense float64 matrices and closed forms."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers.numerics import covariance as module
from dynprobe.analyzers.numerics import covariance_routes as routes
from dynprobe.analyzers.numerics.covariance import (
    centred,
    from_gram,
    leading_eigenpairs,
    minibatch_spectrum,
    partition,
)
from dynprobe.analyzers.numerics.covariance_routes import TooLittleMemory, gradient_covariance
from dynprobe.analyzers.numerics.losses import get_loss

MSE, CROSS_ENTROPY = get_loss("mse"), get_loss("cross_entropy")
ROUTES = ("gram", "lanczos")


def regression(n=40, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    model = nn.Linear(d, 1, bias=False).double().eval()
    return model, x, y


def batches(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def classifier(n=37):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double().eval()
    return model, x, y


def per_sample_gradients(model, x, y, loss=CROSS_ENTROPY) -> np.ndarray:
    """One backward pass for each sample: the definition."""
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    return torch.stack(rows).numpy()


def dense(gradients):
    difference = gradients - gradients.mean(0)
    value, vector = np.linalg.eigh(difference.T @ difference / len(gradients))
    return value[::-1], vector[:, ::-1]


def measured(model, data, loss, *, route="gram", k=4, minibatch=5, minibatches=25, seed=0, memory=4e9):
    n = sum(len(y) for _, y in data)
    groups = partition(n, minibatch=minibatch, minibatches=minibatches, seed=seed)
    options = {"k": k, "memory": memory, "tol": 1e-10}
    if route == "gram":
        return gradient_covariance(model, data, loss, groups, **options)
    with patch.object(routes, "_stored", return_value=None):  # as if the gradients did not fit
        return gradient_covariance(model, data, loss, groups, **options)


@pytest.mark.parametrize("route", ROUTES)
def test_linear_regression_has_the_covariance_of_its_closed_form(route):
    model, x, y = regression()
    found = measured(model, batches(x, y, [16, 16, 8]), MSE, route=route, k=6)
    residual = (model(x) - y).detach()
    gradient = (2 * residual * x).mean(0)
    closed = 4 / len(x) * (x * residual**2).T @ x - torch.outer(gradient, gradient)
    value = np.linalg.eigvalsh(closed.numpy())[::-1]
    assert found.route == route
    np.testing.assert_allclose(found.eigenvalue, value, rtol=1e-12 if route == "gram" else 1e-9)
    numbers = found.estimates()
    assert numbers["trace"] == pytest.approx(float(closed.trace()), rel=1e-12)
    assert numbers["trace_ratio"] == pytest.approx(float(closed.trace()) / value[0], rel=1e-9)
    assert numbers["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_a_network_has_the_spectrum_of_the_dense_matrix_whatever_the_batches(route):
    model, x, y = classifier()
    value, vector = dense(per_sample_gradients(model, x, y))
    for sizes in ([37], [10, 9, 17, 1]):
        found = measured(model, batches(x, y, sizes), CROSS_ENTROPY, route=route)
        np.testing.assert_allclose(found.eigenvalue, value[:4], rtol=1e-12 if route == "gram" else 1e-8)
        gradients = per_sample_gradients(model, x, y)
        scores = (gradients - gradients.mean(0)) @ vector[:, :3]
        np.testing.assert_allclose(abs(found.score[:, :3]), abs(scores), atol=1e-6)
        np.testing.assert_allclose(
            abs(found.mean_score[:3]), abs(gradients.mean(0) @ vector[:, :3]), atol=1e-6
        )


def test_both_routes_give_the_same_numbers():
    model, x, y = classifier()
    gram, lanczos = (measured(model, batches(x, y, 16), CROSS_ENTROPY, route=route) for route in ROUTES)
    np.testing.assert_allclose(gram.group_gram, lanczos.group_gram, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(gram.batch_gram, lanczos.batch_gram, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(gram.squared_norm, lanczos.squared_norm, rtol=1e-10)
    np.testing.assert_allclose(gram.loss, lanczos.loss, rtol=1e-12)
    np.testing.assert_allclose(gram.minibatch_share(3), lanczos.minibatch_share(3), rtol=1e-6)
    one, other = gram.estimates(), lanczos.estimates()
    for name in ("trace_stderr", "noise_scale", "noise_scale_stderr", "gradient_norm_stderr"):
        assert one[name] == pytest.approx(other[name], rel=1e-8), name
    assert one["eigenvalue_stderr"][0] == pytest.approx(other["eigenvalue_stderr"][0], rel=0.1)
    assert gram.n_products == 0 < lanczos.n_products


def test_the_route_changes_when_the_factors_turn_out_not_to_fit():
    model, x, y = classifier()
    groups = partition(37, minibatch=0, minibatches=25, seed=0)
    needed = 3 * 8 * 37**2
    found = gradient_covariance(model, batches(x, y, 16), CROSS_ENTROPY, groups, k=2, memory=needed + 100)
    assert found.route == "lanczos"


def test_the_vectors_of_lanczos_stay_within_the_memory_and_graphs_within_half_of_it(monkeypatch):
    model, x, y = classifier()
    vector, given = 8 * 66, {}
    real_operator, real_lanczos = routes.GradientCovarianceOperator, routes.lanczos

    def operator(*arguments, **options):
        given["graphs"] = options["memory"]
        return real_operator(*arguments, **options)

    def lanczos(*arguments, **options):
        given["basis"] = options["max_basis"]
        return real_lanczos(*arguments, **options)

    monkeypatch.setattr(routes, "GradientCovarianceOperator", operator)
    monkeypatch.setattr(routes, "lanczos", lanczos)
    memory = 2 * 20 * vector
    found = measured(model, batches(x, y, 16), CROSS_ENTROPY, route="lanczos", k=5, memory=memory)
    assert given == {"graphs": memory / 2, "basis": 20 - 5}
    whole = measured(model, batches(x, y, 16), CROSS_ENTROPY, route="lanczos", k=5)
    np.testing.assert_allclose(found.eigenvalue, whole.eigenvalue, rtol=1e-8)


def test_too_little_memory_for_lanczos_says_how_much_would_do():
    model, x, y = classifier()
    data, vector = batches(x, y, 16), 8 * 66
    with pytest.raises(TooLittleMemory) as caught:
        measured(model, data, CROSS_ENTROPY, route="lanczos", k=5, memory=2 * 17 * vector)
    assert (caught.value.room, caught.value.vectors) == (17, 18)
    assert caught.value.needed == 2 * 18 * vector
    measured(model, data, CROSS_ENTROPY, route="lanczos", k=5, memory=caught.value.needed)


def test_inner_products_of_mean_gradients_are_the_same_in_pieces_of_any_size():
    model, x, y = classifier()
    groups = partition(37, minibatch=4, minibatches=9, seed=0)
    averages, sets = groups.weights(), [range(10), range(10, 19)]
    data = batches(x, y, 16)
    rows = averages @ per_sample_gradients(model, x, y)
    for room in (5, 10, 19):
        passes = routes._passes(sets, room)
        assert max(map(len, passes)) <= room
        inner = routes._inner_products(model, data, CROSS_ENTROPY, averages, passes)
        for part in sets:
            block = np.ix_(part, part)
            np.testing.assert_allclose(inner[block], (rows @ rows.T)[block], rtol=1e-10, atol=1e-14)
    assert len(routes._passes(sets, 19)) == 1
    assert len(routes._passes(sets, 10)) == 2


@pytest.mark.parametrize("route", ROUTES)
def test_minibatch_covariance_is_that_of_explicit_minibatch_gradients(route):
    model, x, y = classifier()
    found = measured(model, batches(x, y, 16), CROSS_ENTROPY, route=route, minibatch=6, minibatches=5)
    rows = found.partition.minibatch
    assert rows.shape == (5, 6)
    drawn = []
    for row in rows:
        value = CROSS_ENTROPY(model(x[row]), y[row])
        drawn.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    explicit = torch.stack(drawn).numpy()
    difference = explicit - explicit.mean(0)
    value = np.linalg.eigvalsh(difference.T @ difference / 4)[::-1]
    spectrum = minibatch_spectrum(found.batch_gram, 1e-16)
    assert spectrum.eigenvalue == pytest.approx(value[0], rel=1e-10)
    assert spectrum.smallest == pytest.approx(value[3], rel=1e-9)
    assert spectrum.ratio == pytest.approx(value[3] / value[0], rel=1e-9)
    assert spectrum.trace == pytest.approx(value.sum(), rel=1e-10)
    leading = dense(per_sample_gradients(model, x, y))[1][:, :3]
    share = np.linalg.norm(explicit @ leading, axis=1) / np.linalg.norm(explicit, axis=1)
    np.testing.assert_allclose(found.minibatch_share(3), share, rtol=1e-6)


def test_minibatch_covariance_times_batch_size_estimates_the_covariance_of_single_samples():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((800, 3)) * [2.0, 1.0, 0.5]
    groups = partition(800, minibatch=4, minibatches=200, seed=0)
    found = from_gram(gradients @ gradients.T, np.zeros(800), groups, k=3)
    assert 4 * minibatch_spectrum(found.batch_gram, 1e-16).eigenvalue == pytest.approx(4, rel=0.2)
    assert 4 * minibatch_spectrum(found.batch_gram, 1e-16).trace == pytest.approx(5.25, rel=0.15)


def test_a_smallest_minibatch_eigenvalue_below_rounding_is_nan_not_noise():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((8, 2))  # rank 2: the 7th eigenvalue of 8 mini-batches is zero
    assert math.isnan(minibatch_spectrum(gradients @ gradients.T, 2e-16).ratio)
    gradients = rng.standard_normal((3, 2))
    assert minibatch_spectrum(gradients @ gradients.T, 2e-16).ratio > 0


def test_alignment_is_the_cosine_with_the_dense_eigenvector():
    model, x, y = classifier()
    gradients = per_sample_gradients(model, x, y)
    direction = np.random.default_rng(0).standard_normal(gradients.shape[1])
    direction /= np.linalg.norm(direction)
    expected = abs(direction @ dense(gradients)[1][:, 0])
    for route in ROUTES:
        found = measured(model, batches(x, y, 16), CROSS_ENTROPY, route=route)
        assert found.alignment(gradients @ direction) == pytest.approx(expected, abs=1e-8)


def test_standard_errors_are_those_of_deleting_groups_of_samples():
    gradients = np.random.default_rng(0).standard_normal((53, 4)) + 1
    groups = partition(53, minibatch=0, minibatches=25, seed=3)
    numbers = from_gram(gradients @ gradients.T, np.zeros(53), groups, k=2).estimates()
    deleted = []
    for group in range(10):
        kept = gradients[groups.group != group]
        value = dense(kept)[0]
        mean, n = kept.mean(0), len(kept)
        noise = value.sum() * n / (n - 1)
        scale = noise / (mean @ mean - noise / n)
        deleted.append([value[0], value[1], value.sum(), value.sum() / value[0], np.linalg.norm(mean), scale])
    spread = np.sqrt(9 / 10 * ((deleted - np.mean(deleted, 0)) ** 2).sum(0))
    names = ("trace", "trace_ratio", "gradient_norm", "noise_scale")
    found = [*numbers["eigenvalue_stderr"], *(numbers[f"{name}_stderr"] for name in names)]
    np.testing.assert_allclose(found, spread, rtol=1e-9)


def test_standard_errors_of_gaussian_gradients_are_the_known_ones():
    rng = np.random.default_rng(0)
    n, scale = 300, np.array([3.0, 1.0, 0.5])
    groups = partition(n, minibatch=0, minibatches=25, seed=0)
    errors, values = [], []
    for _ in range(60):
        gradients = rng.standard_normal((n, 3)) * scale
        numbers = from_gram(gradients @ gradients.T, np.zeros(n), groups, k=1).estimates()
        errors.append([numbers["eigenvalue_stderr"][0], numbers["trace_stderr"]])
        values.append([numbers["eigenvalue"][0], numbers["trace"]])
    theory = [9 * math.sqrt(2 / n), math.sqrt(2 * (scale**4).sum() / n)]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), 0)), theory, rtol=0.12)
    np.testing.assert_allclose(np.std(values, 0), theory, rtol=0.25)


def test_standard_errors_from_the_leading_subspace_agree_with_whole_decompositions():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((300, 250)) * np.arange(1, 251) ** -0.7
    groups = partition(300, minibatch=0, minibatches=25, seed=0)
    found = from_gram(gradients @ gradients.T, np.zeros(300), groups, k=5)
    assert found.score.shape[1] == module.SUBSPACE < 299
    deleted = np.array([dense(gradients[groups.group != group])[0][:5] for group in range(10)])
    spread = np.sqrt(9 / 10 * ((deleted - deleted.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(found.estimates()["eigenvalue_stderr"], spread, rtol=0.05)


def test_the_noise_scale_recovers_the_one_of_the_distribution():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((800, 20)) + 0.5
    groups = partition(800, minibatch=0, minibatches=25, seed=0)
    numbers = from_gram(gradients @ gradients.T, np.zeros(800), groups, k=1).estimates()
    assert numbers["noise_scale"] == pytest.approx(20 / (20 * 0.25), rel=0.08)
    assert 0 < numbers["noise_scale_stderr"] < 0.4


def test_a_mean_gradient_within_its_noise_has_no_noise_scale():
    gradients = np.random.default_rng(0).standard_normal((20, 5))
    gradients -= gradients.mean(0)
    groups = partition(20, minibatch=0, minibatches=25, seed=0)
    numbers = from_gram(gradients @ gradients.T, np.zeros(20), groups, k=1).estimates()
    assert math.isnan(numbers["noise_scale"])


@pytest.mark.parametrize("size", [1.0, 0.0, 1e-200])
def test_gradients_that_are_all_equal_have_no_covariance_no_ratio_and_no_direction(size):
    gradients = np.full((12, 3), size)
    groups = partition(12, minibatch=3, minibatches=25, seed=0)
    found = from_gram(gradients @ gradients.T, np.zeros(12), groups, k=2)
    numbers = found.estimates()
    np.testing.assert_allclose(numbers["eigenvalue"], 0, atol=1e-14)
    assert 0 <= numbers["trace"] < 1e-14
    assert found.vanishes
    assert all(math.isnan(numbers[name]) for name in ("trace_ratio", "noise_scale"))
    assert math.isnan(found.alignment(np.arange(12.0)))
    assert np.isnan(found.minibatch_share(2)).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_samples_in_unequal_batches_have_no_covariance_in_either_precision(route, dtype):
    model, x, y = classifier()
    data = batches(x[:1].expand(30, 5).to(dtype), y[:1].expand(30), [17, 13])
    found = measured(model.to(dtype), data, CROSS_ENTROPY, route=route, minibatch=4)
    assert found.vanishes
    numbers = found.estimates()
    assert numbers["trace"] >= 0
    assert math.isnan(numbers["trace_ratio"])
    assert math.isnan(numbers["noise_scale"])
    assert np.isnan(found.minibatch_share(5)).all()


def test_directions_that_are_only_rounding_are_in_no_share():
    scale = np.linspace(1, 3, 24)
    gradients = np.outer(scale, [1.0, 2.0, 2.0])  # K of rank one: four of five eigenvectors are any
    groups = partition(24, minibatch=4, minibatches=25, seed=0)
    found = from_gram(gradients @ gradients.T, np.zeros(24), groups, k=1)
    np.testing.assert_allclose(found.minibatch_share(5), 1, rtol=1e-12)


def test_a_minibatch_without_gradient_has_no_share():
    gradients = np.zeros((12, 3))
    gradients[0] = 1
    groups = partition(12, minibatch=3, minibatches=25, seed=0)
    found = from_gram(gradients @ gradients.T, np.zeros(12), groups, k=1)
    assert np.isnan(found.minibatch_share(1)).sum() == 3


def test_two_samples_have_no_standard_errors_of_their_covariance():
    gradients = np.random.default_rng(0).standard_normal((2, 5))
    groups = partition(2, minibatch=0, minibatches=25, seed=0)
    numbers = from_gram(gradients @ gradients.T, np.zeros(2), groups, k=1).estimates()
    for name in ("eigenvalue", "trace", "trace_ratio", "noise_scale"):
        assert np.isnan(numbers[f"{name}_stderr"]).all(), name
    assert numbers["eigenvalue"][0] == pytest.approx(numbers["trace"])
    assert numbers["gradient_norm_stderr"] > 0
    three = np.random.default_rng(0).standard_normal((3, 5))
    groups = partition(3, minibatch=0, minibatches=25, seed=0)
    assert from_gram(three @ three.T, np.zeros(3), groups, k=1).estimates()["trace_stderr"] > 0


def test_a_noise_scale_without_standard_error_is_not_given():
    rng = np.random.default_rng(3)
    groups = partition(30, minibatch=0, minibatches=25, seed=0)
    barely = 0
    for shift in np.linspace(0.0, 1.0, 40):
        gradients = rng.standard_normal((30, 20)) + shift / 3
        found = from_gram(gradients @ gradients.T, np.zeros(30), groups, k=1)
        numbers, whole = found.estimates(), found._moments(None)["noise_scale"]
        barely += math.isfinite(whole) and math.isnan(numbers["noise_scale"])
        assert math.isnan(numbers["noise_scale"]) == math.isnan(numbers["noise_scale_stderr"])
    assert barely > 0


def test_the_centred_matrix_has_rows_that_sum_to_zero():
    gradients = np.random.default_rng(0).standard_normal((9, 4)) + 3
    inner = centred(gradients @ gradients.T)
    difference = gradients - gradients.mean(0)
    np.testing.assert_allclose(inner, difference @ difference.T, atol=1e-12)
    np.testing.assert_allclose(inner.sum(0), 0, atol=1e-12)


def test_large_matrices_are_decomposed_iteratively_to_the_same_digits(monkeypatch):
    gradients = np.random.default_rng(0).standard_normal((60, 30)) * np.arange(1, 31)
    inner = gradients @ gradients.T
    value, vector = leading_eigenpairs(inner, 5)
    monkeypatch.setattr(module, "DENSE", 10)
    iterated, vectors = leading_eigenpairs(inner, 5)
    np.testing.assert_allclose(iterated, value, rtol=1e-12)
    np.testing.assert_allclose(abs((vector * vectors).sum(0)), 1, rtol=1e-10)


def test_groups_and_minibatches_are_disjoint_even_and_seeded():
    groups = partition(103, minibatch=8, minibatches=25, seed=5)
    assert np.ptp(np.bincount(groups.group)) <= 1
    assert len(np.bincount(groups.group)) == 10
    assert groups.minibatch.shape == (12, 8)
    assert len(np.unique(groups.minibatch)) == 96
    again = partition(103, minibatch=8, minibatches=25, seed=5)
    assert np.array_equal(groups.minibatch, again.minibatch)
    assert not np.array_equal(groups.minibatch, partition(103, minibatch=8, minibatches=25, seed=6).minibatch)
    assert partition(103, minibatch=8, minibatches=4, seed=5).minibatch.shape == (4, 8)


def test_fewer_than_three_minibatches_are_none_and_few_samples_are_a_group_each():
    assert partition(20, minibatch=8, minibatches=25, seed=0).minibatch.shape == (0, 8)
    assert partition(20, minibatch=0, minibatches=25, seed=0).minibatch.shape == (0, 0)
    assert sorted(partition(4, minibatch=0, minibatches=25, seed=0).group) == [0, 1, 2, 3]
