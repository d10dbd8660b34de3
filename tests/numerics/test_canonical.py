"""Canonical correlations against closed forms, scipy's principal angles and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from dynprobe.analyzers.numerics import canonical, canonical_pairs
from dynprobe.analyzers.numerics.canonical import Components, reduced, space
from dynprobe.analyzers.numerics.canonical_original import original_pwcca
from dynprobe.analyzers.numerics.canonical_pairs import STATISTICS, compare, refused


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def related(n=120, d_a=6, d_b=9, seed=0):
    """Two layers that share four directions, with means and unequal scales."""
    shared = draw(n, 4, seed=seed)
    a = shared @ draw(4, d_a, seed=seed + 1) + 0.7 * draw(n, d_a, seed=seed + 2)
    b = shared @ draw(4, d_b, seed=seed + 3) + 0.7 * draw(n, d_b, seed=seed + 4)
    return a * torch.linspace(0.3, 3, d_a) + 2, b - 1


def whole(n):
    return torch.zeros(n, dtype=torch.long)


def one(a, b, *, components=None, block=None, sample=None, **options):
    """The statistics of a single pair of layers as plain numbers."""
    kept = components or Components()
    block = whole(len(a)) if block is None else block
    force = options.get("force", False)
    return compare(*[[space(x, sample, block, kept, force=force)] for x in (a, b)], **options)


def values(found):
    return {name: float(found.value[name][0, 0]) for name in STATISTICS}


def brute(x, y, components=None):
    """Every statistic by the definitions, from samples × samples and samples × features arrays."""
    x, y = ((m - m.mean(0)).numpy() for m in (x, y))
    u_x, s_x, _ = np.linalg.svd(x, full_matrices=False)
    u_y, s_y, _ = np.linalg.svd(y, full_matrices=False)
    p, rho, q_t = np.linalg.svd(u_x.T @ u_y, full_matrices=False)

    def weighted(variates, neurons):
        weight = np.abs(variates.T @ neurons).sum(1)
        return float(weight @ rho / weight.sum())

    def leading(u, s):
        return u[:, : int(np.searchsorted(np.cumsum(s**2), 0.99 * (s**2).sum()) + 1)]

    pwcca = weighted(u_x @ p, x), weighted(u_y @ q_t.T, y)
    nuclear = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    angles = scipy.linalg.subspace_angles(leading(u_x, s_x), leading(u_y, s_y))
    return {
        "mean_rho": rho.mean(),
        "mean_rho_squared": (rho**2).mean(),
        "pwcca_a": pwcca[0],
        "pwcca_b": pwcca[1],
        "pwcca": sum(pwcca) / 2,
        "svcca": np.cos(angles).mean(),
        "procrustes": nuclear / np.linalg.norm(x) / np.linalg.norm(y),
    }


def test_every_statistic_is_that_of_its_definition_and_rho_the_cosines_of_scipys_principal_angles():
    a, b = related()
    found = one(a, b)
    for name, expected in brute(a, b).items():
        assert values(found)[name] == pytest.approx(expected, abs=1e-12), name
    angles = scipy.linalg.subspace_angles((a - a.mean(0)).numpy(), (b - b.mean(0)).numpy())
    np.testing.assert_allclose(found.rho[0, 0], np.cos(angles)[::-1], atol=1e-10)


def test_rho_of_single_features_is_the_absolute_value_of_pearsons_correlation():
    a, b = draw(50, 1), draw(50, 1, seed=1) - 0.4 * draw(50, 1)
    expected = abs(np.corrcoef(a[:, 0], b[:, 0])[0, 1])
    found = values(one(a, b))
    assert all(found[name] == pytest.approx(expected**2 if "squared" in name else expected) for name in found)


def test_rho_of_gaussians_of_known_correlation_is_that_correlation():
    """Rotated noise: orthonormal columns, so the sample correlations are exact."""
    u, _ = torch.linalg.qr(draw(80, 4) - draw(80, 4).mean(0))
    a, b = u[:, :2], u[:, :2] * torch.tensor([0.9, 0.3]) + u[:, 2:] * torch.tensor([0.19**0.5, 0.91**0.5])
    found = one(a @ draw(2, 2, seed=5), b @ draw(2, 2, seed=6) + 3)
    np.testing.assert_allclose(found.rho[0, 0], [0.9, 0.3], atol=1e-12)


def test_layers_equal_up_to_an_invertible_map_have_all_correlations_one():
    a, _ = related()
    found = values(one(a, a @ draw(6, 6, seed=9) + 4, components=Components(1.0)))
    assert all(
        found[n] == pytest.approx(1, abs=1e-12) for n in ("mean_rho", "mean_rho_squared", "svcca", "pwcca")
    )
    assert found["procrustes"] < 0.99


def rotation(d, seed=20):
    return torch.linalg.qr(draw(d, d, seed=seed))[0]


ALIKE = {
    "an invertible map": (lambda x: x @ draw(6, 6, seed=3), {"mean_rho", "mean_rho_squared", "pwcca_b"}),
    "a rotation": (
        lambda x: x @ rotation(6),
        {"mean_rho", "mean_rho_squared", "pwcca_b", "svcca", "procrustes"},
    ),
    "a permutation of neurons": (lambda x: x[:, [3, 1, 0, 5, 4, 2]], set(STATISTICS)),
    "a shift": (lambda x: x + torch.arange(6.0), set(STATISTICS)),
    "a change of sign": (lambda x: x * torch.tensor([1, -1, 1, 1, -1, -1.0]), set(STATISTICS)),
    "a factor 1e-6": (lambda x: x * 1e-6, set(STATISTICS)),
    "a factor 1e6": (lambda x: x * 1e6, set(STATISTICS)),
}


@pytest.mark.parametrize("change", ALIKE)
def test_each_statistic_is_invariant_to_what_it_claims_and_to_nothing_else(change):
    a, b = related()
    function, invariant = ALIKE[change]
    before, after = values(one(a, b)), values(one(function(a), b))
    same = {name for name in STATISTICS if math.isclose(before[name], after[name], abs_tol=1e-10)}
    assert same == invariant


@pytest.mark.parametrize("change", ["an invertible map", "a permutation of neurons", "a factor 1e-6"])
def test_swapping_the_networks_swaps_the_sides_and_nothing_else(change):
    a, b = related()
    a = ALIKE[change][0](a)
    one_way, other = values(one(a, b)), values(one(b, a))
    assert one_way.pop("pwcca_a") == pytest.approx(other.pop("pwcca_b"), abs=1e-12)
    assert one_way.pop("pwcca_b") == pytest.approx(other.pop("pwcca_a"), abs=1e-12)
    assert one_way == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [False, True])
def test_duplicated_and_dependent_and_dead_neurons_add_nothing_to_the_correlations(dtype, wide, monkeypatch):
    if wide:
        monkeypatch.setattr(canonical, "SMALL", 2)  # the route of wide layers
    a, b = (x.to(dtype) for x in related(200))
    extra = torch.cat([a, a[:, :1], a[:, 1:2] + 0.5 * a[:, 2:3], torch.full((200, 2), 7.0, dtype=dtype)], 1)
    before, after = one(a, b), one(extra, b)
    assert space(extra, None, whole(200), Components()).rank == 6
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(after.rho, before.rho, atol=tolerance)
    assert values(after)["mean_rho"] == pytest.approx(values(before)["mean_rho"], abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_counts_from_max_n_d_times_eps_of_the_strongest_on(dtype):
    u, _ = torch.linalg.qr(draw(100, 2) - draw(100, 2).mean(0))
    unit = 100 * torch.finfo(dtype).eps
    for size, rank in ((0.5, 1), (2.0, 2)):
        x = (u * torch.tensor([1.0, size * unit])).to(dtype)
        assert space(x, None, whole(100), Components()).rank == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_layer_has_no_space_even_where_its_mean_was_rounded(dtype):
    x = torch.full((300, 4), 1 / 3, dtype=dtype) * torch.tensor([1, 10, 1000, 0], dtype=dtype)
    assert space(x, None, whole(300), Components()) is None
    rounding = 1 + torch.finfo(dtype).eps * torch.randint(
        -1, 2, (300, 4), generator=torch.Generator().manual_seed(0)
    )
    assert space(x * rounding, None, whole(300), Components()) is None


def test_a_mean_far_above_the_spread_leaves_float32_correlations_right():
    a, b = related(400)
    exact = values(one(a, b))
    far = one((a + 2000).float(), b.float())
    for name, value in values(far).items():
        assert value == pytest.approx(exact[name], abs=2e-3), name
    rounded = values(one((a + 2000).float().double(), b.float().double()))
    assert values(far) == pytest.approx(rounded, abs=1e-7)


@pytest.mark.parametrize("shape", [(60, 7), (60, 60), (30, 80)])
def test_the_reduced_layer_is_orthonormal_and_gives_the_centred_layer_back_by_either_route(
    shape, monkeypatch
):
    x = draw(*shape) @ torch.diag(torch.logspace(0, -3, shape[1], dtype=torch.float64)) + 1
    for small in (canonical.SMALL, 2):
        monkeypatch.setattr(canonical, "SMALL", small)
        u, sigma, centred = reduced(x.float())
        loading = centred.T @ u
        np.testing.assert_allclose(u.T @ u, np.eye(len(sigma)), atol=1e-7)
        np.testing.assert_allclose(u @ loading.T, (x - x.mean(0)), atol=1e-5)
        assert len(sigma) == min(shape[0] - 1, shape[1])


@pytest.mark.parametrize(("d_a", "d_b"), [(9, 9), (12, 12), (5, 15), (17, 4), (30, 30), (3, 3)])
def test_as_many_correlations_as_ranks_exceed_samples_are_one_whatever_the_data(d_a, d_b):
    n = 20
    found = one(draw(n, d_a), draw(n, d_b, seed=1), force=True)
    rank_a, rank_b = min(d_a, n - 1), min(d_b, n - 1)
    assert int((found.rho[0, 0] > 1 - 1e-9).sum()) == max(0, rank_a + rank_b - (n - 1))


def test_where_the_ranks_reach_n_minus_1_the_correlations_are_nan_unless_forced():
    a, b = draw(20, 10), draw(20, 9, seed=1)
    assert refused(10, 9, 20)
    assert not refused(9, 9, 20)
    kept = Components(count=3)
    found, forced = values(one(a, b, components=kept)), values(one(a, b, components=kept, force=True))
    for name in canonical_pairs.CANONICAL:
        assert math.isnan(found[name])
        assert math.isfinite(forced[name])
    assert found["svcca"] == forced["svcca"]
    assert found["procrustes"] == forced["procrustes"]


def test_components_are_the_fewest_that_reach_the_threshold_of_variance_or_of_sigma():
    sigma, rank = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64), torch.tensor(4)
    assert int(Components(0.7).kept(sigma, rank)) == 1  # 16 of 22
    assert int(Components(0.9).kept(sigma, rank)) == 2  # 20 of 22
    assert int(Components(0.7, "sigma").kept(sigma, rank)) == 2  # 6 of 8
    assert int(Components(0.75, "sigma").kept(sigma, rank)) == 2  # reached exactly
    assert int(Components(1.0).kept(sigma, rank)) == 4
    assert int(Components(count=3).kept(sigma, rank)) == 3
    assert int(Components(count=9).kept(sigma, rank)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leaving_out_a_block_by_its_own_sums_equals_computing_without_its_samples(dtype):
    a, b = (x.to(dtype) for x in related(103))
    a = torch.cat([a, a[:, :1]], 1)
    block = torch.arange(103) % 5
    found = one(a, b, block=block)
    for left_out in range(5):
        kept = block != left_out
        expected = values(one(a[kept], b[kept]))
        for name in STATISTICS:
            assert found.deleted[name][0, 0, left_out] == pytest.approx(expected[name], abs=1e-7), name


@pytest.mark.parametrize("swapped", [False, True])
def test_a_direction_that_only_one_block_has_is_gone_without_it(swapped):
    a, b = related(100, 6, 7)
    block = torch.arange(100) % 4
    a = torch.cat([a, torch.where(block == 1, draw(100, seed=8), 0.0)[:, None]], 1)
    a, b = (b, a) if swapped else (a, b)
    found = one(a, b, block=block)
    kept = block != 1
    expected = values(one(a[kept], b[kept]))
    for name in STATISTICS:
        assert found.deleted[name][0, 0, 1] == pytest.approx(expected[name], abs=1e-7), name


def test_blocks_are_of_samples_where_samples_have_several_rows():
    a, b = related(120)
    sample = torch.arange(120) % 40  # three rows each, far apart
    block = torch.arange(40) % 4
    found = one(a, b, block=block, sample=sample)
    kept = block[sample] != 2
    expected = values(one(a[kept], b[kept]))
    for name in STATISTICS:
        assert found.deleted[name][0, 0, 2] == pytest.approx(expected[name], abs=1e-7), name
    assert space(a, sample, block, Components()).cluster == 3


def test_chance_is_the_mean_over_permutations_and_of_squared_rho_the_closed_form():
    a, b = related(60)
    found = one(a, b, permutations=1500, seed=3)
    generator = np.random.default_rng(0)
    drawn = [brute(a, b[generator.permutation(60)]) for _ in range(250)]
    for name in STATISTICS:
        series = np.array([one_draw[name] for one_draw in drawn])
        error = series.std() / math.sqrt(len(series))
        assert abs(found.chance[name][0, 0] - series.mean()) < 5 * error, name
    assert found.chance["mean_rho_squared"][0, 0] == pytest.approx(9 / 59, abs=1e-3)


@pytest.mark.parametrize(
    ("ranks", "expected"), [((5, 90), 20), ((16, 16), 20), ((64, 40), 8), ((999, 999), 3)]
)
def test_wide_layers_take_fewer_permutations_and_know_chance_as_well(ranks, expected):
    assert canonical_pairs.draws(20, *ranks) == expected
    assert canonical_pairs.draws(2, *ranks) == 2


def test_the_error_of_chance_does_not_grow_where_wide_layers_take_fewer_permutations():
    spread = {}
    for d in (8, 64):
        a, b = draw(400, d), draw(400, d, seed=1)
        series = [one(a, b, permutations=20, seed=seed).chance["mean_rho"][0, 0] for seed in range(12)]
        spread[d] = np.std(series, ddof=1) * math.sqrt(canonical_pairs.draws(20, d, d) * d * 2 * 400)
    assert all(0.5 < value < 1.7 for value in spread.values()), spread


def test_permutations_move_whole_samples_where_these_have_several_rows():
    """All rows of a sample are alike, so unrelated samples correlate as 20 do, not as 100."""
    sample = torch.arange(100) // 5
    a, b = draw(20, 3)[sample], draw(20, 3, seed=1)[sample]
    found = one(a, b, sample=sample, block=whole(20), permutations=300)
    assert found.chance["mean_rho_squared"][0, 0] == pytest.approx(3 / 19, abs=0.015)


def test_layers_of_many_shapes_at_once_equal_one_pair_at_a_time(monkeypatch):
    monkeypatch.setattr(canonical_pairs, "WORKING", 6000)  # several chunks
    layers_a = [related(60, d_a=d, seed=i)[0] for i, d in enumerate([3, 5, 3, 3, 5])]
    layers_b = [related(60, d_b=d, seed=9 + i)[1] for i, d in enumerate([4, 5, 4, 3])]
    block = torch.arange(60) % 3
    a, b = ([space(x, None, block, Components()) for x in layers] for layers in (layers_a, layers_b))
    b[1] = None
    found = compare(a, b, permutations=2, seed=1)
    for i, x in enumerate(layers_a):
        for j, y in enumerate(layers_b):
            single = one(x, y, block=block, permutations=2, seed=1)
            for name in STATISTICS:
                for many, few in (
                    (found.value, single.value),
                    (found.deleted, single.deleted),
                    (found.chance, single.chance),
                ):
                    expected = np.full_like(few[name][0, 0], np.nan) if j == 1 else few[name][0, 0]
                    np.testing.assert_allclose(many[name][i, j], expected, rtol=1e-6)
            if j != 1:
                rank = single.rho.shape[-1]
                np.testing.assert_allclose(found.rho[i, j, :rank], single.rho[0, 0], rtol=1e-9)
                assert np.isnan(found.rho[i, j, rank:]).all()


def test_layers_of_other_rows_are_not_compared():
    a = space(draw(40, 3), torch.arange(40) // 4, whole(10), Components())
    b = space(draw(10, 3), None, whole(10), Components())
    assert np.isnan(compare([a], [b]).value["procrustes"]).all()


def published(x, y):
    """The published code's steps one after the other, with its own conventions (neurons × samples)."""
    joint = np.cov(x, y)
    n = len(x)
    xx, yy, xy = joint[:n, :n], joint[n:, n:], joint[:n, n:]
    root_x, root_y = (np.real(scipy.linalg.sqrtm(np.linalg.inv(m))) for m in (xx, yy))
    u, rho, v = np.linalg.svd(root_x @ xy @ root_y)
    rows, acts = (u.T, x) if n <= len(y) else (v, y)
    mean = acts.mean(1, keepdims=True)
    basis, _ = np.linalg.qr((rows @ (acts - mean) + mean).T)
    weight = np.abs(basis.T @ acts.T).sum(1)
    return (weight / weight.sum() * rho).sum()


@pytest.mark.parametrize(("d_a", "d_b"), [(4, 6), (5, 5), (6, 4)])
def test_the_original_pwcca_follows_the_published_steps_on_the_side_with_fewer_neurons(d_a, d_b):
    a, b = (x.numpy() for x in related(90, d_a, d_b))
    number, first = original_pwcca(a, b)
    assert number == pytest.approx(published(a.T, b.T), abs=1e-9)
    assert first == (d_a <= d_b)


def test_the_original_pwcca_changes_with_a_shift_which_the_papers_does_not():
    a, b = related()
    number, _ = original_pwcca(a.numpy(), b.numpy())
    shifted, _ = original_pwcca(a.numpy() + 3, b.numpy())
    assert abs(number - shifted) > 1e-3


def test_the_original_pwcca_of_dependent_neurons_is_nan_or_a_number_and_never_an_exception():
    a, b = (x.numpy() for x in related())
    number, _ = original_pwcca(np.hstack([a, a[:, :1]]), np.zeros_like(b))
    assert math.isnan(number)
