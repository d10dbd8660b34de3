"""HSIC and CKA against dense float64 formulas, and their errors against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from dynprobe.analyzers.numerics import hsic, hsic_chance, hsic_minibatch
from dynprobe.analyzers.numerics.hsic_compare import compare
from dynprobe.analyzers.numerics.hsic_plan import plan

ESTIMATORS = [pytest.param(True, id="unbiased"), pytest.param(False, id="biased")]
FORMULATIONS = [pytest.param(True, id="gram"), pytest.param(False, id="covariance")]


def centred(kernel, unbiased):
    """Székely's U-centring or HKH, as the definitions say."""
    n = len(kernel)
    if not unbiased:
        h = np.eye(n) - 1 / n
        return h @ kernel @ h
    kernel = kernel - np.diag(np.diag(kernel))
    row = kernel.sum(1)
    u = kernel - row[:, None] / (n - 2) - row[None] / (n - 2) + row.sum() / ((n - 1) * (n - 2))
    return u - np.diag(np.diag(u))


def song(x, y):
    """Unbiased HSIC from Song et al. 2012, eq. 5."""
    n = len(x)
    k, q = (z @ z.T * (1 - np.eye(n)) for z in (x, y))
    one = np.ones(n)
    terms = np.trace(k @ q) + (one @ k @ one) * (one @ q @ one) / ((n - 1) * (n - 2))
    return (terms - 2 / (n - 2) * (one @ k @ q @ one)) / (n * (n - 3))


def product(x, y, unbiased):
    return float((centred(x @ x.T, unbiased) * centred(y @ y.T, unbiased)).sum())


def dense_cka(x, y, unbiased):
    return product(x, y, unbiased) / math.sqrt(product(x, x, unbiased) * product(y, y, unbiased))


def layers(n, widths, seed=0, shared=3):
    """Layers that share a few directions, with means of their own."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).standard_normal((n, shared))
    return [
        common @ rng.standard_normal((shared, d)) + rng.standard_normal((n, d)) + rng.standard_normal(d)
        for d in widths
    ]


def kernels(matrices, unbiased, grams, dtype=torch.float64):
    features = [hsic.centre(torch.as_tensor(x, dtype=dtype))[0] for x in matrices]
    made = hsic.from_features(torch.cat(features, 1), [f.shape[1] for f in features], unbiased=unbiased)
    return hsic.as_grams(made) if grams else made


def each_alone(n):
    return torch.arange(n)


@pytest.mark.parametrize("grams", FORMULATIONS)
@pytest.mark.parametrize("unbiased", ESTIMATORS)
def test_cka_in_float64_is_the_dense_formula_to_1e_12_with_fewer_and_with_more_features_than_samples(
    unbiased, grams
):
    a, b = layers(23, (2, 7, 60), 1), layers(23, (5, 40), 2)
    found = compare(kernels(a, unbiased, grams), kernels(b, unbiased, grams), each_alone(23))
    expected = [[dense_cka(x, y, unbiased) for y in b] for x in a]
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grams", FORMULATIONS)
def test_the_unbiased_sum_is_songs_estimate(grams):
    (x,), (y,) = layers(19, (4,), 1), layers(19, (6,), 2)
    found = compare(kernels([x], True, grams), kernels([y], True, grams), each_alone(19))
    assert found.total[0, 0] / (19 * 16) == pytest.approx(song(x, y), rel=1e-12)


@pytest.mark.parametrize("unbiased", ESTIMATORS)
def test_one_network_in_grams_and_the_other_in_covariances_are_converted(unbiased):
    a, b = layers(15, (3, 20), 1), layers(15, (4,), 2)
    mixed = compare(kernels(a, unbiased, True), kernels(b, unbiased, False), each_alone(15))
    same = compare(kernels(a, unbiased, False), kernels(b, unbiased, False), each_alone(15))
    np.testing.assert_allclose(mixed.value, same.value, atol=1e-13)
    np.testing.assert_allclose(mixed.stderr, same.stderr, atol=1e-13)


@pytest.mark.parametrize("grams", FORMULATIONS)
@pytest.mark.parametrize("unbiased", ESTIMATORS)
def test_the_standard_error_is_that_of_leaving_out_every_sample_and_computing_anew(unbiased, grams):
    n = 14
    a, b = layers(n, (3, 30), 1), layers(n, (5,), 2)
    found = compare(kernels(a, unbiased, grams), kernels(b, unbiased, grams), each_alone(n))
    for i, x in enumerate(a):
        without = [np.delete(np.arange(n), k) for k in range(n)]
        theta = np.array([dense_cka(x[keep], b[0][keep], unbiased) for keep in without])
        assert found.stderr[i, 0] == pytest.approx(theta.std() * math.sqrt(n - 1), rel=1e-9)
        effect = -math.sqrt((n - 1) / n) * (theta - theta.mean())
        np.testing.assert_allclose(found.effect[i, 0], effect, atol=1e-11)


def test_effects_of_blocks_sum_to_zero_and_their_squares_to_about_the_variance():
    n = 320
    a, b = layers(n, (10,), 1), layers(n, (10,), 2)
    blocks = torch.as_tensor(np.random.default_rng(0).permutation(np.arange(n) % 32))
    found = compare(kernels(a, True, True), kernels(b, True, True), blocks)
    assert found.effect.shape == (1, 1, 32)
    assert abs(found.effect.sum()) < 1e-12
    assert math.sqrt((found.effect**2).sum()) == pytest.approx(found.stderr[0, 0], rel=0.35)


@pytest.mark.parametrize("grams", FORMULATIONS)
@pytest.mark.parametrize("unbiased", ESTIMATORS)
def test_cka_of_float32_features_is_right_to_5e_7(unbiased, grams):
    a, b = layers(300, (20, 500), 1), layers(300, (40, 300), 2)
    single = [[x.astype(np.float32) for x in network] for network in (a, b)]
    one, two = (kernels(network, unbiased, grams, torch.float32) for network in single)
    found = compare(one, two, each_alone(300))
    expected = [[dense_cka(x.astype(float), y.astype(float), unbiased) for y in single[1]] for x in single[0]]
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("grams", FORMULATIONS)
def test_a_mean_thousands_of_times_the_spread_costs_no_digits_in_float32(grams):
    a, b = ([x + 5000 for x in layers(200, (10, 300), seed)] for seed in (1, 2))
    single = [[x.astype(np.float32) for x in network] for network in (a, b)]
    one, two = (kernels(network, True, grams, torch.float32) for network in single)
    found = compare(one, two, each_alone(200))
    expected = [[dense_cka(x.astype(float), y.astype(float), True) for y in single[1]] for x in single[0]]
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=5e-7)


def test_a_unit_that_varies_by_rounding_alone_counts_as_constant():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 1e-3
    x[:, 1] = 3e4 * (1 + 2e-7 * (torch.arange(50) % 2))
    features, largest = hsic.centre(x)
    assert features[:, 1].abs().max() == 0
    assert 0 < largest < 0.01
    assert hsic.centre(torch.full((50, 3), 0.1))[1] == 0
    assert hsic.centre(torch.zeros(50, 3))[1] == 0


@pytest.mark.parametrize("n", [20, 21])
def test_the_rbf_kernel_is_the_exponential_of_the_squared_distance_over_the_median(n):
    (x,) = layers(n, (4,))
    squared = hsic.squared_distances(hsic.centre(torch.as_tensor(x))[0])
    width = 0.5 * hsic.median_distance(squared, 0)
    kernel = hsic.rbf(squared, width)
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    median = np.median(distance[np.triu_indices(n, 1)])
    assert width == pytest.approx(0.5 * median, rel=1e-12)
    np.testing.assert_allclose(kernel.numpy() + 1, np.exp(-(distance**2) / (2 * width**2)), atol=1e-12)


@pytest.mark.parametrize("fraction", [100.0, 1e4])
def test_the_rbf_kernel_of_a_wide_layer_with_a_large_bandwidth_does_not_vanish_in_float32(fraction):
    x = torch.randn(100, 5000, generator=torch.Generator().manual_seed(0))
    squared = hsic.squared_distances(hsic.centre(x)[0])
    kernel = hsic.rbf(squared, fraction * hsic.median_distance(squared, 0))
    fourth = torch.tensor([hsic.fourth_power(kernel, of_rbf=True)], dtype=torch.float64)
    total = hsic.from_grams(hsic.centre_gram(kernel, unbiased=True)[None], [1], unbiased=True).total
    assert not hsic.vanishes(total, fourth, 100, torch.float32, grams=True)


def test_the_median_of_very_many_distances_is_that_of_a_seeded_sample():
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    squared = torch.cdist(x, x).square()
    exact = hsic.median_distance(squared, 0)
    assert hsic.median_distance(squared, 0, most=20_000) == pytest.approx(exact, rel=0.02)
    assert hsic.median_distance(squared, 3, 500) == hsic.median_distance(squared, 3, 500)


def test_the_plan_takes_covariances_for_narrow_layers_and_grams_for_wide_ones():
    assert plan(2000, [10, 20], 4e9).formulation == "covariance"
    wide = plan(2000, [4096] * 20, 4e9)
    assert wide.formulation == "gram"
    assert wide.flops == pytest.approx(2000**2 * (20 * 4096 + 8 * 400))
    assert "covariance would take" in wide.sentence
    assert plan(2000, [10, 20], 4e9, gram=True).formulation == "gram"


def test_the_plan_counts_features_that_lie_side_by_side_only_where_there_are_several_layers():
    assert plan(200_000, [400], 4e9).bytes == pytest.approx(2 * 200_000 * 400 * 4, rel=0.05)
    assert plan(20_000, [125] * 10, 4e9).bytes == pytest.approx(3 * 20_000 * 1250 * 4, rel=0.1)


def test_centring_in_place_takes_no_more_memory_and_gives_the_same():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + 5
    expected = hsic.centre(x)[0]
    found, _ = hsic.centre(x, in_place=True)
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(found, expected)


def test_the_plan_takes_the_formulation_that_fits_and_says_where_none_does():
    assert plan(50_000, [2000] * 3, 4e9).formulation == "covariance"
    assert plan(50_000, [20_000] * 3, 4e9).formulation == ""


def recorded(network, sizes, seed=0, take=None):
    batches = []
    splits = hsic_minibatch.splits_of(len(sizes))
    recorder = hsic_minibatch.MinibatchRecorder(take or batches.append, splits, seed)
    start = 0
    for size in sizes:
        for index, x in enumerate(network):
            recorder.add(f"layer{index}", start, torch.as_tensor(x[start : start + size]))
        start += size
    recorder.finish()
    return batches


def terms_of(one, two):
    terms = hsic_minibatch.MinibatchTerms(one)
    for batch in two:
        terms.add(batch)
    return terms


def test_minibatch_terms_are_those_of_each_batch_whatever_its_size():
    a, b, sizes = layers(29, (3, 40), 1), layers(29, (5,), 2), (10, 10, 9)
    terms = terms_of(recorded(a, sizes), recorded(b, sizes))
    for batch, start in enumerate((0, 10, 20)):
        rows = slice(start, start + sizes[batch])
        for i, x in enumerate(a):
            assert terms.own_a[batch][i] == pytest.approx(song(x[rows], x[rows]), rel=1e-10)
            expected = song(x[rows], b[0][rows])
            assert terms.cross[batch][i, 0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [12, 13, 9])
def test_the_halves_of_a_batch_centred_anew_are_those_computed_from_their_features_though_one_is_larger(n):
    a, b = layers(n, (3, 40), 1), layers(n, (5,), 2)
    one, two = recorded(a, (n,), seed=3), recorded(b, (n,), seed=3)
    terms = terms_of(one, two)
    assert len(one[0].signs) == hsic_minibatch.HALVINGS
    assert torch.equal(one[0].signs, two[0].signs)
    for split, signs in enumerate(one[0].signs):
        halves = [np.flatnonzero(signs.numpy() == sign) for sign in (1, -1)]
        weights = np.array([len(half) * (len(half) - 3) for half in halves]) / sum(
            len(half) * (len(half) - 3) for half in halves
        )
        for i, x in enumerate(a):
            own = weights @ [song(x[half], x[half]) for half in halves]
            both = weights @ [song(x[half], b[0][half]) for half in halves]
            assert one[0].hsic_halves[split, i] == pytest.approx(own, rel=1e-9)
            gap = terms._gaps[0][0][split, i, 0] + terms.cross[0][i, 0]
            assert gap == pytest.approx(both, rel=1e-8, abs=1e-10)


def test_batches_compared_as_they_are_made_give_the_numbers_of_batches_that_were_kept():
    a, b, sizes = layers(29, (3, 40), 1), layers(29, (5, 6), 2), (10, 10, 9)
    one = recorded(a, sizes)
    kept, streamed = terms_of(one, recorded(b, sizes)), hsic_minibatch.MinibatchTerms(one)
    assert recorded(b, sizes, take=streamed.add) == []
    assert torch.equal(torch.stack(streamed.cross), torch.stack(kept.cross))
    assert torch.equal(streamed.deviation(), kept.deviation())


def test_a_layer_with_nan_in_one_batch_leaves_the_others_as_they_are():
    a, sizes = layers(20, (3, 40), 1), (10, 10)
    expected = recorded(a, sizes)
    a[0][13, 1] = np.nan
    found = recorded(a, sizes)
    for batch, clean in zip(found, expected, strict=True):
        assert torch.equal(batch.packed[1], clean.packed[1])
        assert batch.packed.isfinite().all()


def test_features_of_moderate_size_are_not_scaled_and_others_are_by_a_power_of_two():
    assert [hsic.exponent(x) for x in (0.0, math.nan, math.inf, 1.0, 200.0, 0.003)] == [0] * 6
    assert hsic.exponent(1e15) == 50
    assert hsic.exponent(1e-15) == -49


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [5, 300, 513])
def test_a_gram_matrix_on_a_cpu_is_that_of_torch_also_of_some_columns_and_into_given_memory(n, dtype):
    features = torch.randn(n, 70, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 3:60]
    expected = features.double() @ features.double().T
    room = torch.empty(3, n, n, dtype=dtype)
    found = hsic.gram(features, room[1])
    assert found.data_ptr() == room[1].data_ptr()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=57 * tolerance, rtol=0)
    assert torch.equal(found, found.T)


def test_a_gram_matrix_computed_in_strips_is_that_of_a_cpu():
    features = torch.randn(300, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = hsic._gram_in_strips(features, features.new_empty(300, 300))
    torch.testing.assert_close(found, hsic.gram(features), atol=1e-13, rtol=0)


def test_a_mean_is_removed_to_rounding_of_the_spread_whether_it_is_below_or_far_above_it():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    for shift in (0.5, 1e4):
        features, largest = hsic.centre(x + shift)
        assert features.mean(0).abs().max() < 3e-7
        assert largest == features.abs().max()


def test_the_deviation_of_minibatches_is_predicted_from_halves_within_a_factor_of_two():
    n, size = 240, 40
    a, b = layers(n, (20, 5), 1, shared=5), layers(n, (20, 5), 2, shared=5)
    b[1] = np.random.default_rng(5).standard_normal((n, 5))  # unrelated
    full = compare(kernels(a, True, True), kernels(b, True, True), each_alone(n)).value
    predicted, true = [], []
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(n)
        one, two = (recorded([x[order] for x in net], (size,) * (n // size), seed) for net in (a, b))
        terms = terms_of(one, two)
        predicted.append(terms.deviation().numpy())
        cross, own_a, own_b = (sum(term).numpy() for term in (terms.cross, terms.own_a, terms.own_b))
        true.append(cross / np.sqrt(np.outer(own_a, own_b)) - full)
    ratio = np.sqrt(np.mean(np.square(predicted), 0) / np.mean(np.square(true), 0))
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()


def test_the_error_with_several_rows_a_sample_is_that_of_leaving_out_samples():
    n_samples, rows = 120, 6
    rng = np.random.default_rng(0)
    of_sample = np.repeat(rng.standard_normal((n_samples, 4)), rows, 0)
    x = of_sample + 0.5 * rng.standard_normal((n_samples * rows, 4))
    y = of_sample[:, :3] + 0.5 * rng.standard_normal((n_samples * rows, 3))
    sample = torch.arange(n_samples).repeat_interleave(rows)
    a, b = kernels([x], True, False), kernels([y], True, False)
    found = compare(a, b, each_alone(n_samples), sample)
    theta = []
    for k in range(n_samples):
        keep = sample.numpy() != k
        theta.append(dense_cka(x[keep], y[keep], True))
    assert found.stderr[0, 0] == pytest.approx(np.std(theta) * math.sqrt(n_samples - 1), rel=0.05)
    independent = compare(a, b, each_alone(n_samples * rows)).stderr[0, 0]
    assert found.stderr[0, 0] > 1.5 * independent


def test_over_permutations_of_samples_unbiased_cka_is_zero_and_biased_its_closed_form():
    n = 24
    (x,), (y,) = layers(n, (6,), 1), layers(n, (9,), 2)
    rng = np.random.default_rng(0)
    for unbiased in (True, False):
        k, q = (centred(z @ z.T, unbiased) for z in (x, y))
        norm = np.linalg.norm(k) * np.linalg.norm(q)
        permuted = []
        for _ in range(4000):
            order = rng.permutation(n)
            permuted.append((k * q[np.ix_(order, order)]).sum() / norm)
        chance = 0.0 if unbiased else np.trace(k) * np.trace(q) / ((n - 1) * norm)
        assert np.mean(permuted) == pytest.approx(chance, abs=4 * np.std(permuted) / math.sqrt(4000))


@pytest.mark.parametrize("grams", FORMULATIONS)
@pytest.mark.parametrize("unbiased", ESTIMATORS)
@pytest.mark.parametrize(("n", "rows"), [(5, 4), (6, 1), (4, 7)])
def test_the_chance_level_is_the_mean_over_all_orders_of_the_samples_with_their_rows_together(
    n, rows, unbiased, grams
):
    rng = np.random.default_rng(0)
    x, y, wide = (
        (rng.standard_normal((rows, d)) + rng.standard_normal((n, rows, d))).reshape(n * rows, d)
        for d in (3, 2, 40)
    )
    one, two = kernels([x, wide], unbiased, grams), kernels([y], unbiased, grams)
    found = hsic_chance.mean_over_orders(hsic_chance.block_sums(one, n), hsic_chance.block_sums(two, n))
    q = centred(y @ y.T, unbiased)
    places = np.arange(n * rows).reshape(n, rows)
    orders = [places[list(order)].ravel() for order in itertools.permutations(range(n))]
    mean = np.mean([q[np.ix_(order, order)] for order in orders], 0)
    for i, z in enumerate((x, wide)):
        k = centred(z @ z.T, unbiased)
        scale = np.linalg.norm(k) * np.linalg.norm(q)
        assert found[i, 0] / scale == pytest.approx((k * mean).sum() / scale, abs=1e-13)
    if unbiased and rows == 1:
        assert not found.any()


def test_samples_are_told_apart_that_have_the_same_number_of_rows_each():
    assert hsic_chance.rows_per_sample(None, 7) == 1
    assert hsic_chance.rows_per_sample(torch.tensor([0, 0, 1, 1]), 2) == 2
    assert hsic_chance.rows_per_sample(torch.tensor([0, 1, 1, 1]), 2) == 0
    assert hsic_chance.rows_per_sample(torch.tensor([0, 0, 1]), 2) == 0


def test_the_standard_error_of_unrelated_or_wide_layers_is_an_upper_estimate_by_about_root_two():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(300):
        x, y = rng.standard_normal((2, 50, 100))
        x, related = x[:, :4], x + y
        one, two = kernels([x, y], True, False), kernels([y, related], True, False)
        found = compare(one, two, each_alone(50))
        values.append([found.value[0, 0], found.value[1, 1]])
        errors.append([found.stderr[0, 0], found.stderr[1, 1]])
    ratio = np.sqrt(np.mean(np.square(errors), 0)) / np.std(values, 0)
    assert (ratio > 1.1).all()
    assert (ratio < 1.2 * math.sqrt(2)).all()


def test_the_standard_error_covers_the_value_of_the_population():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((3, 8)), rng.standard_normal((3, 6))

    def draw(n):
        common = rng.standard_normal((n, 3))
        return (common @ m + rng.standard_normal((n, m.shape[1])) for m in (first, second))

    def covariance(m):
        return m.T @ m + np.eye(m.shape[1])

    truth = np.sum((first.T @ second) ** 2) / math.sqrt(
        np.sum(covariance(first) ** 2) * np.sum(covariance(second) ** 2)
    )
    z = []
    for _ in range(300):
        x, y = draw(100)
        found = compare(kernels([x], True, False), kernels([y], True, False), each_alone(100))
        z.append((found.value[0, 0] - truth) / found.stderr[0, 0])
    assert 0.8 < np.std(z) < 1.25
    assert abs(np.mean(z)) < 0.3
