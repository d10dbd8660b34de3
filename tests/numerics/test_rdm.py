"""RDMs, their comparisons, crossnobis and single units against closed forms, scipy and dense formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, rankdata, spearmanr

from dynprobe.analyzers.numerics.rdm import (
    condensed,
    condition_means,
    dissimilarities,
    entries_between,
    n_entries,
    n_stimuli,
    permuted_entries,
    row_sums,
)
from dynprobe.analyzers.numerics.rdm_compare import (
    ceiling_of_similarities,
    chance,
    comparable,
    noise_ceiling,
    permutation_p,
    ranking,
    similarities,
)
from dynprobe.analyzers.numerics.rdm_crossnobis import crossnobis, deal_folds, shrunk_noise
from dynprobe.analyzers.numerics.rdm_units import cluster_units, unit_similarities

COMPARISONS = ("spearman", "rho-a", "pearson", "cosine", "whitened")


def patterns(n=14, d=6, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


def rdms(count=4, n=12, seed=0, common=1.0):
    """RDMs of networks that share a part of their patterns."""
    shared = patterns(n, 5, 100)
    own = [patterns(n, 5, seed + i) for i in range(count)]
    return np.stack([dissimilarities(common * shared + 0.7 * x, "sqeuclidean") for x in own])


@pytest.mark.parametrize("measure", ["correlation", "cosine", "euclidean", "sqeuclidean"])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_dissimilarities_equal_scipys_pdist_with_distances_per_feature(measure, mean):
    x = patterns(mean=mean)
    per_feature = {"euclidean": np.sqrt(x.shape[1]), "sqeuclidean": x.shape[1]}.get(measure, 1)
    expected = pdist(x.numpy(), measure) / per_feature
    np.testing.assert_allclose(dissimilarities(x, measure), expected, rtol=1e-9, atol=1e-13)


def test_distances_of_float32_patterns_survive_a_mean_a_million_times_their_spread():
    x = torch.round(patterns(9, 4) * 64) / 64  # exact in float32 beside a large mean
    moved = (x + 2.0**16).float()
    np.testing.assert_allclose(
        dissimilarities(moved, "sqeuclidean"), dissimilarities(x, "sqeuclidean"), rtol=1e-10
    )


@pytest.mark.parametrize("measure", ["correlation", "cosine", "euclidean", "sqeuclidean"])
def test_equal_patterns_are_exactly_zero_apart(measure):
    x = patterns(mean=5.0)
    x[7] = x[2]
    found = squareform(dissimilarities(x, measure))
    assert found[2, 7] == 0.0
    assert (found[np.triu_indices(14, 1)] == 0).sum() == 1


def test_many_features_are_summed_in_parts_to_the_same_distances():
    x = patterns(5, 9000)
    for measure in ("correlation", "sqeuclidean"):
        scale = 9000 if measure == "sqeuclidean" else 1
        np.testing.assert_allclose(dissimilarities(x, measure), pdist(x.numpy(), measure) / scale, rtol=1e-10)


def test_a_pattern_without_variance_has_no_correlation_but_a_distance():
    x = patterns()
    x[3] = 2.0
    assert np.isnan(squareform(dissimilarities(x, "correlation"))[3]).sum() == 13
    assert np.isfinite(dissimilarities(x, "euclidean")).all()
    x[3] = 0.0
    assert np.isnan(squareform(dissimilarities(x, "cosine"))[3]).sum() == 13


def test_sizes_and_unknown_names_are_refused():
    assert [n_stimuli(n_entries(n)) for n in range(2, 40)] == list(range(2, 40))
    for wrong in (0, 2, 7):
        with pytest.raises(ValueError, match=r"n\(n-1\)/2"):
            n_stimuli(wrong)
    with pytest.raises(ValueError, match="two"):
        dissimilarities(patterns(1), "cosine")
    with pytest.raises(ValueError, match="'cos'"):
        dissimilarities(patterns(), "cos")
    with pytest.raises(ValueError, match="'tau'"):
        comparable(rdms(), "tau")


def test_entries_of_kept_and_of_permuted_stimuli_are_those_of_the_square_matrix():
    rdm = rdms(1)[0]
    square = squareform(rdm)
    kept = np.arange(12) % 3 > 0
    np.testing.assert_array_equal(rdm[entries_between(kept)], condensed(square[np.ix_(kept, kept)]))
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(rdm[permuted_entries(order)], condensed(square[np.ix_(order, order)]))
    np.testing.assert_allclose(row_sums(rdm), square.sum(1), rtol=1e-13)


def test_ranks_share_ties_and_follow_scipy_on_any_part():
    values = np.round(np.random.default_rng(1).random(400), 2)
    untied = np.random.default_rng(3).random(400)
    kept = np.flatnonzero(np.random.default_rng(2).random(400) < 0.6)
    for rdm in (values, untied):
        np.testing.assert_array_equal(ranking(rdm).ranks(), rankdata(rdm))
        np.testing.assert_array_equal(ranking(rdm).ranks(kept), rankdata(rdm[kept]))


def test_ranks_of_a_part_of_many_entries_correlate_as_those_of_a_new_sort():
    x, y = (patterns(700, 5, seed) for seed in (0, 1))
    a, b = (dissimilarities(z, "correlation") for z in (x, y + 0.5 * x))
    b = np.where(b < np.median(b), np.round(b, 2), b)  # half of one in heavy ties
    without = np.arange(700) % 10 == 3
    kept = entries_between(~without)
    found = comparable([a], "spearman").form(without) @ comparable([b], "spearman").form(without)
    assert found[0, 0] == pytest.approx(spearmanr(a[kept], b[kept]).statistic, abs=1e-7)


def test_distances_that_differ_by_rounding_are_ties():
    one_hot = torch.eye(6, dtype=torch.float64)[torch.arange(18) % 6] @ patterns(6, 6).T.double()
    rdm = dissimilarities(one_hot, "sqeuclidean")
    noisy = rdm * (1 + 1e-15 * np.random.default_rng(0).standard_normal(len(rdm)))
    np.testing.assert_array_equal(ranking(noisy).ranks(), ranking(rdm).ranks())


def test_spearman_and_pearson_are_scipys():
    a, b = rdms(3), np.round(rdms(2, seed=9), 1)
    for i in range(3):
        for j in range(2):
            assert similarities(a, b, "spearman")[i, j] == pytest.approx(spearmanr(a[i], b[j]).statistic)
            assert similarities(a, b, "pearson")[i, j] == pytest.approx(pearsonr(a[i], b[j]).statistic)


def test_rho_a_is_the_mean_of_spearman_over_random_orders_of_ties():
    generator = np.random.default_rng(0)
    a, b = (np.round(x, 1) for x in (rdms(1, 8)[0], rdms(1, 8, seed=5)[0]))
    broken = [
        spearmanr(
            np.lexsort((generator.random(28), a)).argsort(), np.lexsort((generator.random(28), b)).argsort()
        )
        for _ in range(800)
    ]
    draws = np.array([found.statistic for found in broken])
    found = similarities(a[None], b[None], "rho-a")[0, 0]
    assert found == pytest.approx(draws.mean(), abs=4 * draws.std() / np.sqrt(800))
    assert found != pytest.approx(spearmanr(a, b).statistic, abs=1e-6)


def linear_cka(x, y):
    one, other = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    return float((one * other).sum() / (one.norm() * other.norm()))


def test_whitened_cosine_of_squared_distances_is_biased_linear_cka():
    x, y = patterns(20, 7), patterns(20, 4, 1)
    y[:, 0] += x[:, 0]
    a, b = (dissimilarities(z, "sqeuclidean")[None] for z in (x, y))
    assert abs(similarities(a, b, "whitened")[0, 0] - linear_cka(x, y)) < 1e-12


def test_whitened_cosine_of_any_rdm_is_that_of_the_dense_covariance():
    a = rdms(2, 9)
    rows, columns = np.triu_indices(9, 1)
    between = np.zeros((36, 9))
    between[np.arange(36), rows], between[np.arange(36), columns] = 1, -1
    inverse = np.linalg.inv((between @ between.T) ** 2)
    product = a @ inverse @ a.T
    expected = product / np.sqrt(np.outer(np.diag(product), np.diag(product)))
    np.testing.assert_allclose(similarities(a, a, "whitened"), expected, rtol=1e-11)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_chance_is_the_mean_over_permuted_stimuli(compare):
    a, b = (comparable(rdms(1, 8, seed), compare).form() for seed in (0, 5))
    generator = np.random.default_rng(0)
    right = b.left if b.right is None else b.right
    draws = np.array([a.left[0] @ right[0, permuted_entries(generator.permutation(8))] for _ in range(4000)])
    assert chance(a, b)[0, 0] == pytest.approx(draws.mean(), abs=4 * draws.std() / np.sqrt(4000))


@pytest.mark.parametrize("compare", COMPARISONS)
def test_leaving_stimuli_out_is_comparing_the_smaller_rdms(compare):
    a, b = np.round(rdms(2), 1), rdms(3, seed=7)
    block = np.arange(12) % 4
    for left_out in range(4):
        without = block == left_out
        found = comparable(a, compare).form(without) @ comparable(b, compare).form(without)
        kept = entries_between(~without)
        np.testing.assert_allclose(found, similarities(a[:, kept], b[:, kept], compare), rtol=1e-12)


def test_p_values_are_small_for_equal_rdms_and_uniform_for_independent_ones():
    a = comparable(rdms(1), "spearman").form()
    assert permutation_p(a, a, 99)[0, 0] == 0.01
    p = [
        permutation_p(*(comparable(rdms(1, 8, seed, 0.0), "pearson").form() for seed in (i, i + 500)), 39)[
            0, 0
        ]
        for i in range(120)
    ]
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) <= 0.1) < 0.2


@pytest.mark.parametrize("compare", COMPARISONS)
def test_the_lower_ceiling_is_below_the_upper_and_both_reach_one_without_noise(compare):
    ceiling = noise_ceiling(rdms(5), compare)
    assert ceiling.lower.mean() < ceiling.upper.mean() < 1
    same = noise_ceiling(np.repeat(rdms(1), 3, axis=0), compare)
    np.testing.assert_allclose([same.lower, same.upper], 1)
    with pytest.raises(ValueError, match="two RDMs"):
        noise_ceiling(rdms(1), compare)


@pytest.mark.parametrize(
    ("compare", "tolerance"), [("pearson", 1e-12), ("cosine", 1e-12), ("whitened", 1e-12), ("spearman", 0.05)]
)
def test_the_ceiling_follows_from_similarities_of_pairs(compare, tolerance):
    stack = rdms(5)
    direct, found = (
        noise_ceiling(stack, compare),
        ceiling_of_similarities(similarities(stack, stack, compare)),
    )
    np.testing.assert_allclose(found.lower, direct.lower, atol=tolerance)
    np.testing.assert_allclose(found.upper, direct.upper, atol=tolerance)


def test_rho_a_of_an_rdm_with_ties_to_itself_is_below_one_and_so_is_the_diagonal_of_its_ceiling():
    stack = (rdms(4) > np.median(rdms(4))).astype(float)
    s = similarities(stack, stack, "rho-a")
    assert (np.diagonal(s) < 0.8).all()
    direct, found = noise_ceiling(stack, "rho-a"), ceiling_of_similarities(s)
    as_if_one = ceiling_of_similarities(s + np.diag(1 - np.diagonal(s)))
    pooled = [(similarities(stack, stack.mean(0)[None], "pearson")[:, 0] * np.sqrt(np.diagonal(s))).mean()]
    assert found.upper.mean() == pytest.approx(pooled[0], rel=0.02)
    assert abs(as_if_one.upper.mean() - pooled[0]) > 0.05
    assert found.upper.mean() == pytest.approx(direct.upper.mean(), abs=0.1)


def test_no_model_exceeds_the_upper_ceiling():
    stack = rdms(5)
    model = noise_ceiling(stack, "pearson").upper.mean()
    for trial in rdms(50, seed=40):
        assert similarities(trial[None], stack, "pearson").mean() < model


@pytest.mark.parametrize("compare", COMPARISONS)
def test_an_rdm_without_direction_has_no_similarity(compare):
    a = rdms(2)
    a[0] = 0.0
    found = similarities(a, rdms(1), compare)
    assert np.isnan(found[0, 0])
    assert np.isfinite(found[1, 0])
    a[0, 3] = np.nan
    assert np.isnan(similarities(a, rdms(1), compare)[0, 0])


def noisy(conditions=6, repeats=6, d=5, effect=0.0, seed=0):
    condition = np.repeat(np.arange(conditions), repeats)
    mixing = patterns(d, d, 77)
    noise = patterns(len(condition), d, seed) @ mixing
    return noise + effect * patterns(conditions, d, 55)[condition] + 3.0, condition


def dense_crossnobis(x, condition, fold, precision):
    """The mean over ordered pairs of folds, entry by entry."""
    x, folds = x.numpy(), range(fold.max() + 1)
    mean = {(c, f): x[(condition == c) & (fold == f)].mean(0) for c in np.unique(condition) for f in folds}
    pairs = [(f, g) for f in folds for g in folds if f != g]
    return (
        np.array(
            [
                np.mean([(mean[i, f] - mean[j, f]) @ precision @ (mean[i, g] - mean[j, g]) for f, g in pairs])
                for i in range(condition.max() + 1)
                for j in range(i + 1, condition.max() + 1)
            ]
        )
        / x.shape[1]
    )


@pytest.mark.parametrize("d", [5, 50])
def test_crossnobis_is_the_mean_over_pairs_of_folds_in_the_shrunk_noise(d):
    x, condition = noisy(d=d, effect=1.0)
    fold = deal_folds(condition, 3, seed=1)
    cell = 3 * condition + fold
    residual = (x - condition_means(x, cell)[torch.as_tensor(cell)]).numpy()
    n = len(residual)
    s = residual.T @ residual / n
    mu = np.trace(s) / d
    delta = ((s - mu * np.eye(d)) ** 2).sum()
    beta = min(sum(((np.outer(r, r) - s) ** 2).sum() for r in residual) / n**2, delta)
    covariance = (beta / delta * mu * np.eye(d) + (1 - beta / delta) * s) * n / (n - 18)
    assert shrunk_noise(x, cell).shrinkage == pytest.approx(beta / delta)
    np.testing.assert_allclose(
        crossnobis(x, condition, fold),
        dense_crossnobis(x, condition, fold, np.linalg.inv(covariance)),
        rtol=1e-9,
    )
    np.testing.assert_allclose(
        crossnobis(x, condition, fold, shrink=False),
        dense_crossnobis(x, condition, fold, np.eye(d)),
        rtol=1e-9,
    )


@pytest.mark.parametrize(
    ("shrink", "sizes"), [(True, {}), (False, {}), (True, {"conditions": 10, "repeats": 4, "d": 20})]
)
def test_crossnobis_is_zero_on_average_where_conditions_do_not_differ(shrink, sizes):
    means = []
    for seed in range(200):
        x, condition = noisy(seed=seed, **sizes)
        means.append(crossnobis(x, condition, deal_folds(condition, 2, seed), shrink=shrink).mean())
    assert abs(np.mean(means)) < 4 * np.std(means) / np.sqrt(200)
    biased = np.mean(
        [dissimilarities(condition_means(*noisy(seed=s, **sizes)), "sqeuclidean").mean() for s in range(20)]
    )
    assert biased > 10 * abs(np.mean(means))


def test_folds_are_of_equal_size_within_conditions_and_seeded():
    condition = np.array([0] * 7 + [1] * 4 + [2] * 5)
    fold = deal_folds(condition, 2, seed=3)
    for label in range(3):
        counts = np.bincount(fold[condition == label])
        assert len(counts) == 2
        assert np.ptp(counts) <= 1
    np.testing.assert_array_equal(fold, deal_folds(condition, 2, seed=3))
    with pytest.raises(ValueError, match="4 samples, fewer than 5 folds"):
        deal_folds(condition, 5)


def test_crossnobis_without_noise_or_without_two_conditions_is_refused():
    condition = np.repeat(np.arange(3), 4)
    fold = deal_folds(condition, 2)
    with pytest.raises(ValueError, match="nothing varies"):
        crossnobis(patterns(3, 5)[torch.as_tensor(condition)], condition, fold)
    with pytest.raises(ValueError, match="one condition"):
        crossnobis(patterns(4, 5), np.zeros(4, dtype=np.int64), np.arange(4) % 2)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_units_in_blocks_are_what_they_are_at_once(compare, monkeypatch):
    values = patterns(12, 9).numpy()
    values[:, 4] = 1.0
    predictors = comparable(rdms(3), compare).form()
    monkeypatch.setattr("dynprobe.analyzers.numerics.rdm_units.BLOCK_BYTES", 2 * 8 * 66)
    found = unit_similarities(values, predictors, compare)
    dense = np.stack([pdist(values[:, [i]], "cityblock") for i in range(9)])
    np.testing.assert_allclose(found, similarities(dense, rdms(3), compare), rtol=1e-12)
    assert np.isnan(found[4]).all()
    assert np.isfinite(np.delete(found, 4, 0)).all()


def test_clusters_find_the_groups_that_are_there_and_their_middles():
    generator = np.random.default_rng(0)
    centres = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    sizes = [30, 20, 10]
    profiles = np.concatenate(
        [c + 0.05 * generator.standard_normal((n, 3)) for c, n in zip(centres, sizes, strict=True)]
    )
    profiles[5] = np.nan
    order = generator.permutation(60)
    found = cluster_units(profiles[order], seed=1)
    assert found.n_clusters == 3
    assert found.silhouette > 0.8
    truth = np.repeat([1.0, 2, 3], sizes)
    truth[5] = np.nan
    np.testing.assert_array_equal(found.label, truth[order])
    first = profiles[order][found.central[0, 0]]
    distances = np.linalg.norm(profiles[:30] - np.nanmean(profiles[:30], axis=0), axis=1)
    assert np.linalg.norm(first - np.nanmean(profiles[:30], axis=0)) == pytest.approx(np.nanmin(distances))
    assert cluster_units(profiles, clusters=5).n_clusters == 5


def test_few_or_no_units_make_few_or_no_clusters():
    assert cluster_units(np.ones((4, 2))).n_clusters == 1
    one = cluster_units(np.array([[0.0, 0], [1, 1]]), clusters=4)
    assert one.n_clusters == 2
    assert (one.central[:, 1] == -1).all()
    assert np.isnan(cluster_units(np.full((3, 2), np.nan)).label).all()


def test_the_silhouette_is_the_dense_formula():
    generator = np.random.default_rng(2)
    points = generator.standard_normal((40, 3))
    found = cluster_units(points, clusters=3)
    distance = squareform(pdist(points))
    scores = []
    for i in range(40):
        own = found.label == found.label[i]
        within = distance[i, own].sum() / (own.sum() - 1)
        between = min(distance[i, found.label == c].mean() for c in {1.0, 2.0, 3.0} - {found.label[i]})
        scores.append((between - within) / max(between, within))
    assert found.silhouette == pytest.approx(np.mean(scores))
