"""Canonical correlations against closed forms, scipy's principal angles and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from dynprobe.analyzers.numerics import canonical, canonical_influence, canonical_pairs
from dynprobe.analyzers.numerics.canonical import Components, reduced, space
from dynprobe.analyzers.numerics.canonical_original import original_pwcca
from dynprobe.analyzers.numerics.canonical_pairs import STATISTICS, compare, exchanges, refused


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


def stderr(deleted):
    """The jackknife's standard error."""
    n = deleted.shape[-1]
    return np.sqrt((n - 1) * deleted.var(-1))


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


def rank(x, eps=0.0):
    return len(reduced(x, eps)[1])


def test_a_direction_counts_from_the_rounding_of_its_own_neurons_on():
    """Two nearly equal neurons: their difference counts if it is above what rounding makes of it."""
    a, noise = draw(400), draw(400, seed=1)
    eps = torch.finfo(torch.float32).eps
    for part, expected in ((0.4, 1), (4.0, 2)):
        x = torch.stack([a, a + part * 9 * eps * noise * 2**0.5], 1)
        assert rank(x, eps) == expected
        assert rank(x) == 2


@pytest.mark.parametrize("n", [300, 3000])
@pytest.mark.parametrize("d", [20, 280])
def test_strong_neurons_do_not_hide_weak_ones_in_float32(n, d):
    x = draw(n, d)
    x[:, 0] *= 3000
    x[:, 1] *= 1e-3
    assert rank(x.float()) == min(d, n - 1)


def test_combinations_of_strong_and_weak_neurons_in_float32_add_nothing():
    strong, weak = draw(2000, 1).float() * 3000, draw(2000, 20, seed=1).float()
    sums = torch.cat([strong + weak[:, :1], weak[:, 1:2] - weak[:, 2:3], strong / 3], 1)
    assert rank(torch.cat([strong, weak, sums], 1)) == 21


@pytest.mark.parametrize(("inner", "outer", "n"), [(64, 96, 4000), (256, 320, 3000)])
def test_neurons_that_a_float32_network_computes_as_combinations_of_fewer_add_nothing(inner, outer, n):
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = nn.Linear(2 * inner, inner), nn.Linear(inner, outer)
        assert rank(second(first(torch.randn(n, 2 * inner)))) == inner


def test_the_rank_of_a_power_law_in_float32_does_not_depend_on_the_number_of_samples():
    turned = torch.linalg.qr(draw(60, 60))[0]
    for n in (200, 2000, 20_000):
        x = (draw(n, 60, seed=n) * torch.logspace(0, -4.5, 60, dtype=torch.float64)) @ turned + 1
        assert rank(x.float()) == 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_rank_of_what_was_rounded_as_an_array_and_after_a_cast(dtype):
    x = (draw(1500, 12) @ draw(12, 20, seed=1)).to(dtype)
    assert rank(x) == rank(x.float(), torch.finfo(dtype).eps) == 12
    a, b = related(2000)
    exact, half = values(one(a, b)), values(one(a.to(dtype), b.to(dtype)))
    assert half == pytest.approx(exact, abs=0.01)


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
        u, sigma, loading = reduced(x.float())
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
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert Components(0.7).kept(sigma) == 1  # 16 of 22
    assert Components(0.9).kept(sigma) == 2  # 20 of 22
    assert Components(0.7, "sigma").kept(sigma) == 2  # 6 of 8
    assert Components(0.75, "sigma").kept(sigma) == 2  # reached exactly
    assert Components(1.0).kept(sigma) == 4
    assert Components(count=3).kept(sigma) == 3
    assert Components(count=9).kept(sigma) == 4


def by_deletion(a, b, block, sample=None):
    """Standard errors from computing without each block, with the components of all samples."""
    kept = [space(x, sample, block, Components()).components for x in (a, b)]
    drawn = []
    for left_out in range(int(block.max()) + 1):
        rows = block[torch.arange(len(a)) if sample is None else sample] != left_out
        two = [
            [space(x[rows], None, whole(int(rows.sum())), Components(count=k))]
            for x, k in zip((a, b), kept, strict=True)
        ]
        drawn.append([compare(*two).value[name][0, 0] for name in STATISTICS])
    return stderr(np.array(drawn).T)


def rectified(n=500, d_a=14, d_b=20, seed=0):
    """Layers of two random rectified networks, of the same inputs."""
    x = draw(n, 10, seed=seed)
    return tuple(torch.relu(x @ draw(10, d, seed=900 + d) / 3 + draw(d, seed=901)) for d in (d_a, d_b))


def power_law(n=300, d=60, seed=0):
    """Layers that share a spectrum of slowly falling variance, of which SVCCA keeps a part."""
    shared = draw(n, d, seed=seed) / torch.arange(1, d + 1)
    turned = [torch.linalg.qr(draw(d, d, seed=900 + i))[0] for i in range(2)]
    return tuple(shared @ q + 0.03 * draw(n, d, seed=seed + 1 + i) for i, q in enumerate(turned))


@pytest.mark.parametrize(
    "layers",
    [
        related,
        power_law,
        rectified,
        lambda seed: related(700, 24, 16, seed=seed),
        lambda seed: (draw(400, 8, seed=seed), draw(400, 10, seed=seed + 1)),
        lambda seed: rectified(600, 40, 30, seed=seed),
    ],
    ids=["few samples", "power law", "rectified", "wide first", "unrelated", "many"],
)
def test_first_order_errors_are_those_of_leaving_blocks_out_within_a_quarter(layers):
    squares = np.zeros((2, len(STATISTICS)))
    for seed in range(8):
        a, b = layers(seed=10 * seed)
        block = torch.arange(len(a)) % 10
        found = one(a, b, block=block)
        errors = [stderr(found.deleted[name][0, 0]) for name in STATISTICS]
        squares += np.square([errors, by_deletion(a, b, block)])
    ratio = dict(zip(STATISTICS, np.sqrt(squares[0] / squares[1]), strict=True))
    assert all(0.75 < value < 1.25 for value in ratio.values()), ratio


def test_influence_is_the_derivative_by_the_weight_of_samples_where_all_directions_are_distinct():
    """Repeating a few of very many samples is a small change of weight."""
    u, _ = torch.linalg.qr(draw(4000, 8) - draw(4000, 8).mean(0))
    rho = torch.tensor([0.95, 0.7, 0.4, 0.1], dtype=torch.float64)
    a = u[:, :4] * torch.tensor([4.0, 2.0, 1.0, 0.3]) @ rotation(4)
    b = (u[:, :4] * rho + u[:, 4:] * (1 - rho**2).sqrt()) * torch.tensor([0.7, 3, 1.5, 0.2]) @ rotation(4, 5)
    block = torch.arange(4000) % 400
    kept = Components(count=3)
    found = one(a, b, block=block, components=kept)
    for left_out in (0, 1, 2):
        rows = block != left_out
        exact = values(one(a[rows], b[rows], components=kept))
        for name in STATISTICS:
            change = exact[name] - found.value[name][0, 0]
            first = found.deleted[name][0, 0, left_out] - found.value[name][0, 0]
            assert first == pytest.approx(change, rel=0.08, abs=3e-5), name


def test_wide_layers_have_the_same_errors_in_float32(monkeypatch):
    a, b = related()
    block = torch.arange(120) % 5
    double = one(a, b, block=block)
    monkeypatch.setattr(canonical_influence, "WIDE", 2)
    single = one(a, b, block=block)
    for name in STATISTICS:
        np.testing.assert_allclose(single.deleted[name], double.deleted[name], atol=1e-5)


def test_the_error_of_svcca_does_not_jump_where_a_component_sits_at_the_threshold():
    """Two components reach 99 % of the variance by a hair, and not without some of the blocks."""
    u, _ = torch.linalg.qr(draw(300, 5) - draw(300, 5).mean(0))
    a = u * torch.tensor([1, 0.9, (1.81 * 0.0101) ** 0.5 - 0.001, 0.005, 0.002], dtype=torch.float64) * 10
    b = a[:, :2] + draw(300, 2, seed=5)
    block = torch.arange(300) % 10
    assert space(a, None, block, Components()).components == 2
    without = {space(a[block != i], None, whole(270), Components()).components for i in range(10)}
    assert without == {2, 3}
    free, fixed = (one(a, b, block=block, components=kept) for kept in (Components(), Components(count=2)))
    np.testing.assert_allclose(free.deleted["svcca"], fixed.deleted["svcca"], rtol=1e-12)
    error = stderr(free.deleted["svcca"][0, 0])
    assert error == pytest.approx(by_deletion(a, b, block)[STATISTICS.index("svcca")], rel=0.25)


def test_a_neuron_that_fires_on_one_sample_leaves_errors_finite():
    a, b = related()
    a = torch.cat([a, (torch.arange(120) == 7).double()[:, None]], 1)
    found = one(a, b, block=torch.arange(120) % 10)
    assert all(np.isfinite(found.deleted[name]).all() for name in STATISTICS)


def test_blocks_are_of_samples_where_samples_have_several_rows():
    squares = np.zeros((2, len(STATISTICS)))
    for seed in range(6):
        a, b = related(360, seed=10 * seed)
        sample = torch.arange(360) % 120  # three rows each, far apart
        block = torch.arange(120) % 8
        found = one(a, b, block=block, sample=sample)
        errors = [stderr(found.deleted[name][0, 0]) for name in STATISTICS]
        squares += np.square([errors, by_deletion(a, b, block, sample)])
    ratio = np.sqrt(squares[0] / squares[1])
    assert ((ratio > 0.75) & (ratio < 1.25)).all(), ratio
    assert space(a, sample, block, Components()).lengths == (3,) * 120


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


def test_samples_with_unequal_numbers_of_rows_change_places_with_those_of_as_many():
    lengths = torch.tensor([1, 2, 5]).repeat(20)
    sample = torch.repeat_interleave(torch.arange(60), lengths)
    a, b = draw(60, 3)[sample], draw(60, 3, seed=1)[sample]
    one_space = space(a, sample, whole(60), Components())
    for order in exchanges(one_space, 3, seed=0):
        assert sorted(order.tolist()) == list(range(len(sample)))
        assert (sample[order] - sample == (sample[order] - sample)[torch.searchsorted(sample, sample)]).all()
    found = one(a, b, sample=sample, block=whole(60), permutations=400)
    weight = lengths / lengths.sum()
    expected = 3 * float((weight**2).sum())  # ρ² of one direction with another: a weighted sum of 60 signs
    assert found.chance["mean_rho_squared"][0, 0] == pytest.approx(expected, abs=0.02)


def test_there_is_no_chance_level_where_samples_have_numbers_of_rows_of_their_own():
    sample = torch.repeat_interleave(torch.arange(20), torch.arange(1, 21))
    a, b = draw(len(sample), 3), draw(len(sample), 3, seed=1)
    found = one(a, b, sample=sample, block=whole(20), permutations=5)
    assert all(np.isnan(found.chance[name]).all() for name in STATISTICS)
    assert np.isfinite(found.value["mean_rho"]).all()


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
                    np.testing.assert_allclose(many[name][i, j], expected, rtol=1e-5)
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
