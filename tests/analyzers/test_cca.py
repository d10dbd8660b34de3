"""`dynprobe cca` on layers with known relations."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers import _cca as module
from dynprobe.analyzers import _cca_notes as notes
from dynprobe.analyzers._cca import reduce_network
from dynprobe.analyzers.cca import cca
from dynprobe.analyzers.core.activations import as_activations
from dynprobe.analyzers.core.contract import declaration_of
from dynprobe.analyzers.numerics.canonical import Components

analyzer_module = sys.modules["dynprobe.analyzers.cca"]

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
    assert "ranks 36 + 39 leave no room in n - 1 = 39 dimensions" in note
    assert "approach 1" in note
    assert "wide (rank 36) with narrow (4)" in note
    assert "3 of 4 pairs" in note
    assert math.isnan(found["same_layer"])
    assert any("no same_layer" in note for note in found.notes)
    assert math.isfinite(cca(a, b, components=3, statistic="svcca")["same_layer"])


def test_nothing_left_of_the_statistic_is_an_error_that_names_the_ways_out():
    a, b = draw(30, 20), draw(30, 20, seed=1)
    with pytest.raises(OptionError, match=r"20 \+ 20 leave no room in n - 1 = 29") as caught:
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


def test_a_refusal_at_the_boundary_does_not_say_that_correlations_are_forced():
    a, b = draw(31, 15), draw(31, 15, seed=1)
    with pytest.raises(OptionError, match=r"ranks 15 \+ 15 leave no room in n - 1 = 30 dimensions"):
        quick(a, b)
    forced = quick(a, b, force=True)
    assert forced["forced"][0, 0] == 0
    assert not any("are 1 whatever the data" in note for note in forced.notes)


def test_force_says_how_many_correlations_say_nothing_and_where():
    a = {"narrow": draw(40, 5), "wide": draw(40, 36, seed=1)}
    found = quick(a, {"wide": draw(40, 38, seed=3)}, force=True)
    note = next(note for note in found.notes if "whatever the data" in note)
    assert note.startswith("39 of 41 correlations are 1 whatever the data in 2 pairs of layers, most at wide")
    assert "wide (rank 36) with wide (38)" in note
    few = next(note for note in found.notes if note.startswith("few samples"))
    assert "fewest for" in few
    assert "wide (rank 36) with wide (38)" in few


def test_no_error_is_given_where_all_blocks_but_one_leave_no_room_and_why_is_said_by_statistic():
    found = cca(draw(40, 17), draw(40, 19, seed=1), jackknife_blocks=4, components=2)
    assert np.isfinite(found["mean_rho"]).all()
    assert np.isnan(found["mean_rho_stderr"]).all()
    assert np.isfinite(found["svcca_stderr"]).all()
    note = next(note for note in found.notes if "no standard error" in note)
    assert note.startswith("no standard error of mean ρ, mean ρ² and PWCCA for 1 pairs")
    assert "ranks 17 + 19 leave no room in the 29 dimensions" in note
    assert any("few samples for the dimensions" in note for note in found.notes)
    found = cca(draw(40, 17), draw(40, 19, seed=1), jackknife_blocks=4, threshold=1.0, statistic="svcca")
    assert np.isnan(found["svcca_stderr"]).all()
    assert any(note.startswith("no standard error of SVCCA") for note in found.notes)


def test_a_neuron_that_fires_on_one_sample_costs_no_error():
    a = torch.cat([draw(100, 4), (torch.arange(100) == 3).double()[:, None]], 1)
    found = cca(a, draw(100, 3, seed=1), chance_permutations=0)
    assert all(np.isfinite(found[f"{name}_stderr"]).all() for name in STATISTICS)
    assert not any("no standard error" in note for note in found.notes)


def test_layers_with_fewer_components_than_asked_for_are_named():
    found = quick({"x": draw(60, 3), "z": draw(60, 12)}, {"y": draw(60, 9, seed=1)}, components=9)
    assert any("1 layers have fewer than 9 components" in note and "x (3)" in note for note in found.notes)
    assert found["k_a"].tolist() == [3, 9]


def test_half_precision_arrays_are_not_constant():
    a, b = draw(400, 6), draw(400, 5, seed=1)
    found = quick(a.bfloat16(), b.half())
    assert found["rank_a"] == 6
    assert found["rank_b"] == 5
    assert found["mean_rho"][0, 0] == pytest.approx(quick(a, b)["mean_rho"][0, 0], abs=0.01)


class Steps(nn.Module):
    """Every step of a sample is the same noise, of a seed; padding is masked."""

    def __init__(self, seed):
        super().__init__()
        self.noise, self.copy = draw(30, 1, 3, seed=seed), nn.Identity()

    def forward(self, x, attention_mask):
        return self.copy(self.noise[: len(x)] + x[:, :, None])


@pytest.mark.parametrize("alone", [False, True])
def test_chance_of_ragged_sequences_moves_whole_samples_or_is_missing_with_a_reason(alone):
    lengths = torch.arange(1, 31) if alone else torch.tensor([2, 6]).repeat(15)
    mask = (torch.arange(30) < lengths[:, None]).long()

    inputs = {"x": torch.zeros(30, 30, dtype=torch.float64), "attention_mask": mask}
    data = [(inputs, torch.zeros(30))]
    options = {"sequences": "token", "layers": "copy", "chance_permutations": 300}
    found = cca((Steps(1), data), (Steps(2), data), **options)
    if alone:
        assert np.isnan(found["mean_rho_squared_chance"]).all()
        assert any("no chance levels for 1 pairs of layers, as of copy" in note for note in found.notes)
    else:
        expected = 3 * float((lengths**2).sum() / lengths.sum() ** 2)
        assert found["mean_rho_squared_chance"][0, 0] == pytest.approx(expected, abs=0.03)


def test_the_matrix_on_the_screen_is_of_the_chosen_statistic():
    declaration = declaration_of(cca)
    assert declaration.matrix == "pwcca"
    assert declaration.resolved({"statistic": "svcca"}).matrix == "svcca"


def test_the_cost_is_one_forward_pass_for_each_checkpoint():
    assert declaration_of(cca).cost({}, 2) == {"forwards": 1}


def test_options_of_the_summary_and_of_memory_decide_no_number_of_a_pair():
    settings = {option.name for option in declaration_of(cca).options if option.is_setting}
    assert settings == {"memory", "permutations", "bootstrap", "level"}


def test_what_a_pair_will_take_is_logged_and_a_long_one_is_warned_of_once(caplog, monkeypatch):
    a, b = draw(50, 4), draw(50, 3, seed=1)
    with caplog.at_level("DEBUG", logger="dynprobe"):
        quick(a, b)
        assert "GFLOP" in caplog.text
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        monkeypatch.setattr(notes, "LONG", 0.0)
        quick(a, b)
        quick(a, b)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "--jackknife-blocks 0" in warnings[0]


def test_what_is_kept_of_a_network_does_not_grow_with_the_blocks():
    recorded = {"layers": "auto", "maps": "average", "sequences": "mean"}
    sizes = []
    for blocks in (0, 40):
        found = reduce_network(
            as_activations({"x": draw(400, 90)}), recorded, Components(),
            blocks=blocks, seed=0, force=False, keep_values=False,
        )  # fmt: skip
        sizes.append(sum(v.nbytes for v in vars(found.spaces[0]).values() if isinstance(v, torch.Tensor)))
    assert sizes == [8 * 90 * (400 + 90 + 1)] * 2


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


def test_the_original_pwcca_of_dependent_neurons_is_said_to_be_arbitrary():
    a = draw(90, 3)
    found = quick({"x": torch.cat([a, a[:, :1]], 1)}, {"y": draw(90, 5, seed=1)}, pwcca="original")
    assert any("arbitrary" in note and "x (rank 3 of 4)" in note for note in found.notes)
    plain = quick({"x": a}, {"y": draw(90, 5, seed=1)}, pwcca="original")
    assert not any("arbitrary" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"pwcca": "original", "statistic": "pwcca"}, "PWCCA (published code)"),
        ({"pwcca": "original", "statistic": "svcca"}, "SVCCA"),
        ({"pwcca": "paper", "statistic": "pwcca"}, "PWCCA"),
    ],
)
def test_the_figure_says_where_pwcca_is_that_of_the_published_code(options, label, monkeypatch):
    labels = []
    monkeypatch.setattr(
        analyzer_module, "similarity_figure", lambda *names: labels.append(names[1]) or (lambda *_: None)
    )
    analyzer_module._draw(SimpleNamespace(attributes={"options": options}), None)
    assert labels == [label]


def test_the_original_pwcca_that_breaks_down_is_nan_with_a_note(monkeypatch):
    monkeypatch.setattr(module, "original_pwcca", lambda x, y: (math.nan, True))
    found = quick(draw(90, 3), draw(90, 5, seed=1), pwcca="original")
    assert np.isnan(found["pwcca"]).all()
    assert any("fails for 1 pairs" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jackknife_blocks": 1}, "1 block of samples has no spread"),
        ({"components": 2, "threshold": 0.9}, "--components sets the number"),
        ({"components": 2, "sv": "sigma"}, "--components sets the number"),
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
