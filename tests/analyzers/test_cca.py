"""`dynprobe cca` on layers with known relations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers import _cca as module
from dynprobe.analyzers.cca import cca
from dynprobe.analyzers.core.activations import as_activations

STATISTICS = ("mean_rho", "mean_rho_squared", "svcca", "pwcca", "procrustes")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed=0, kind=nn.Tanh):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), kind(), nn.Linear(8, 6), kind(), nn.Linear(6, 3)).double()
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return net.eval()


INPUTS = draw(200, 5, seed=9)


def batches(*sizes):
    return [(x, torch.zeros(len(x))) for x in INPUTS.split(sizes)]


def quick(a, b, **options):
    return cca(a, b, **{"chance_permutations": 0, "jackknife_blocks": 0, **options})


def same(one, other, **tolerance):
    for name in one:
        if np.asarray(one[name]).dtype.kind in "if":
            np.testing.assert_allclose(one[name], other[name], err_msg=name, **tolerance)


def test_networks_give_what_their_saved_activations_give_whatever_the_batches():
    nets = network(0), network(1)
    whole = cca(*[(net, batches(200)) for net in nets], layers="all")
    ragged = cca(*[(net, batches(90, 77, 33)) for net in nets], layers="all")
    same(whole, ragged, rtol=1e-9)

    def saved(net):
        found, x = {}, INPUTS
        for name, layer in net.named_children():
            x = found[name] = layer(x).detach()
        return found

    arrays = cca(*[{n: v.numpy() for n, v in saved(net).items()} for net in nets])
    assert set(whole["layer_a"]) >= set(arrays["layer_a"])
    at = [list(whole["layer_a"]).index(name) for name in arrays["layer_a"]]
    for name in STATISTICS:
        np.testing.assert_allclose(arrays[name], whole[name][np.ix_(at, at)], rtol=1e-9, err_msg=name)


def test_a_network_with_itself_is_one_on_the_diagonal_and_recorded_once():
    found = cca((network(), batches(200)), (network(), batches(200)))
    alone = as_activations((network(), batches(200)))
    itself = cca(alone, alone)
    assert itself.spent == {"forwards": 1}
    assert found.spent == {"forwards": 2}
    for name in STATISTICS:
        np.testing.assert_allclose(np.diag(itself[name]), 1, atol=1e-10)
        np.testing.assert_allclose(np.diag(itself[f"{name}_stderr"]), 0, atol=1e-10)
    np.testing.assert_allclose(np.diag(itself["procrustes_distance"]), 0, atol=1e-6)
    assert itself["same_layer"] == 1


def test_a_series_of_pairs_equals_each_pair_on_its_own_with_one_forward_for_each_checkpoint():
    series = [as_activations((network(seed), batches(120, 80))) for seed in range(3)]
    forwards = 0
    for i, j in ((0, 1), (1, 2), (0, 2)):
        found = cca(series[i], series[j])
        forwards += found.spent["forwards"]
        fresh = cca((network(i), batches(120, 80)), (network(j), batches(120, 80)))
        same(found, fresh, rtol=0)
    assert forwards == 3


def test_procrustes_distance_is_the_angle_of_the_similarity():
    found = quick(draw(50, 4), draw(50, 3, seed=1))
    assert found["procrustes_distance"] == pytest.approx(np.arccos(found["procrustes"]))


def test_standard_errors_are_the_spread_of_the_statistic_over_other_samples():
    spread, error = [], []
    mix = draw(4, 5, seed=50)
    for seed in range(60):
        a = draw(400, 4, seed=2 * seed)
        b = a @ mix + 3 * draw(400, 5, seed=2 * seed + 1)
        found = cca(a, b, chance_permutations=0, jackknife_blocks=20)
        spread.append([float(found[name][0, 0]) for name in STATISTICS])
        error.append([float(found[f"{name}_stderr"][0, 0]) for name in STATISTICS])
    ratio = np.sqrt(np.mean(np.square(error), 0)) / np.std(spread, 0, ddof=1)
    assert ((ratio > 0.75) & (ratio < 1.4)).all(), dict(zip(STATISTICS, ratio, strict=True))


@pytest.mark.parametrize("statistic", ["mean_rho", "mean_rho_squared", "svcca", "pwcca"])
def test_block_effects_are_of_the_chosen_statistic_and_their_squares_add_up_to_its_variance(statistic):
    found = cca((network(0), batches(200)), (network(1), batches(200)), statistic=statistic)
    assert found["block_effect"].shape == (len(found["layer"]), 10)
    error = np.sqrt((found["block_effect"] ** 2).sum(-1))
    np.testing.assert_allclose(error, np.diag(found[f"{statistic}_stderr"]), rtol=1e-5)
    np.testing.assert_allclose(found["block_effect"].sum(-1), 0, atol=1e-6)


def test_unrelated_layers_are_at_their_chance_levels():
    a, b = draw(300, 12), draw(300, 7, seed=1)
    found = cca(a, b, chance_permutations=40)
    assert found["mean_rho_squared_chance"][0, 0] == 12 / 299
    for name in STATISTICS:
        assert found[name][0, 0] == pytest.approx(found[f"{name}_chance"][0, 0], abs=0.04), name


def test_pairs_whose_ranks_reach_n_minus_1_are_nan_with_layers_and_samples_named_and_the_others_go_on():
    a = {"narrow": draw(40, 5), "wide": draw(40, 36, seed=1)}
    b = {"narrow": draw(40, 4, seed=2), "wide": draw(40, 60, seed=3)}
    found = cca(a, b, components=3)
    assert np.isnan(found["mean_rho"]).tolist() == [[False, True], [True, True]]
    assert np.isnan(found["pwcca_stderr"]).tolist() == [[False, True], [True, True]]
    assert np.isfinite(found["svcca"]).all()
    assert np.isfinite(found["procrustes"]).all()
    assert found["forced"].tolist() == [[0, 5], [1, 36]]
    assert found.converged
    note = next(note for note in found.notes if "whatever the data" in note)
    assert "n - 1 = 39" in note
    assert "wide (rank 36) with narrow (4)" in note
    assert "3 of 4 pairs" in note
    assert math.isnan(found["same_layer"])
    assert any("no same_layer" in note for note in found.notes)
    assert math.isfinite(cca(a, b, components=3, statistic="svcca")["same_layer"])


def test_nothing_left_of_the_statistic_is_an_error_that_names_the_ways_out():
    a, b = draw(30, 20), draw(30, 20, seed=1)
    with pytest.raises(OptionError, match=r"n - 1 = 29 or more make correlations 1") as caught:
        quick(a, b, components=2)
    assert "--samples" in caught.value.tip
    assert "--statistic svcca" in caught.value.tip
    assert "--force" in caught.value.tip
    assert np.isfinite(quick(a, b, components=2, statistic="svcca")["svcca"]).all()
    forced = quick(a, b, force=True)
    assert int((forced["rho"] > 1 - 1e-9).sum()) == forced["forced"][0, 0] == 11
    with pytest.raises(
        OptionError, match=r"components kept for SVCCA.*activations \(k = 20\) with activations \(20\)"
    ) as caught:
        quick(a, b, statistic="svcca", threshold=1.0)
    assert "--statistic svcca" not in caught.value.tip


def test_no_error_is_given_where_leaving_out_a_block_would_force_correlations():
    found = cca(draw(40, 17), draw(40, 19, seed=1), jackknife_blocks=4, components=2)
    assert np.isfinite(found["mean_rho"]).all()
    assert np.isnan(found["mean_rho_stderr"]).all()
    assert np.isfinite(found["svcca_stderr"]).all()
    assert any("no standard error" in note for note in found.notes)
    assert any("few samples for the dimensions" in note for note in found.notes)


def test_a_dead_layer_is_nan_with_its_name_and_the_others_go_on():
    net = network(kind=nn.ReLU)
    net[2].weight.data.zero_()
    found = quick((net, batches(200)), (network(1), batches(200)))
    dead = list(found["layer_a"]).index("2")
    assert any("2 is constant over the samples" in note for note in found.notes)
    assert found["rank_a"][dead] == 0
    for name in STATISTICS:
        assert np.isnan(found[name][dead]).all()
        assert np.isfinite(found[name][0]).all()
    assert np.isnan(found["forced"][dead]).all()


def test_errors_and_chance_that_were_not_asked_for_are_nan_and_said_to_be():
    found = quick(draw(50, 4), draw(50, 3, seed=1))
    assert "block_effect" not in found
    assert np.isnan(found["pwcca_stderr"]).all()
    assert np.isnan(found["pwcca_chance"]).all()
    assert found["mean_rho_squared_chance"][0, 0] == 4 / 49
    assert any("--jackknife-blocks" in note for note in found.notes)
    assert any("--chance-permutations" in note for note in found.notes)


class Maps(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=stride, padding=1)

    def forward(self, x):
        return self.conv(x).mean((-2, -1))


def test_positions_of_other_grids_are_not_compared_and_those_of_equal_ones_are():
    torch.manual_seed(0)
    data = [(draw(30, 1, 6, 6, dtype=torch.float32), torch.zeros(30))]
    nets = [Maps(1).eval(), Maps(2).eval()]
    found = quick((nets[0], data), (nets[1], data), maps="positions", layers="conv")
    assert np.isnan(found["mean_rho"]).all()
    assert any("positions" in note and "cannot be compared" in note for note in found.notes)
    found = cca((nets[0], data), (nets[0], data), maps="positions", layers="conv")
    assert found["mean_rho"][0, 0] == pytest.approx(1)
    assert "positions" in found["treatment_a"][0]


def test_the_original_pwcca_replaces_the_papers_and_says_what_it_is():
    a, b = {"x": draw(90, 4) + 1, "z": draw(90, 7, seed=3)}, {"y": draw(90, 6, seed=1) + draw(90, 1)}
    paper, original = cca(a, b), cca(a, b, pwcca="original")
    assert abs(paper["pwcca"] - original["pwcca"]).min() > 1e-6
    assert np.isfinite(original["pwcca"]).all()
    assert np.isfinite(original["pwcca_a"][:, 0]).tolist() == [True, False]
    assert np.isfinite(original["pwcca_b"][:, 0]).tolist() == [False, True]
    assert np.isnan(original["pwcca_stderr"]).all()
    same({"mean_rho": paper["mean_rho"]}, original, rtol=0)
    assert any("the published code" in note for note in original.notes)


def test_the_original_pwcca_that_breaks_down_is_nan_with_a_note(monkeypatch):
    monkeypatch.setattr(module, "original_pwcca", lambda x, y: (math.nan, True))
    found = quick(draw(90, 3), draw(90, 5, seed=1), pwcca="original")
    assert np.isnan(found["pwcca"]).all()
    assert any("fails for 1 pairs" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jackknife_blocks": 1}, "leaving out 1 block"),
        ({"threshold": 0.0}, "threshold 0 keeps no component"),
        ({"seed": -1}, "seed -1"),
        ({"layers": "nothing"}, "nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_a_tip(options, message):
    with pytest.raises(OptionError, match=message) as caught:
        cca({"x": draw(20, 3)}, {"x": draw(20, 3, seed=1)}, **options)
    assert caught.value.tip


def test_other_numbers_of_samples_are_refused():
    with pytest.raises(OptionError, match="samples"):
        quick(draw(20, 3), draw(21, 3))


def test_more_blocks_than_samples_are_as_many_as_there_are():
    found = cca(draw(9, 2), draw(9, 2, seed=1), jackknife_blocks=100)
    assert found["block_effect"].shape == (1, 9)
    assert math.isfinite(found["pwcca_stderr"][0, 0])
