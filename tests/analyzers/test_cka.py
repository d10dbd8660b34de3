"""`dynprobe cka`: what it is invariant to, what it says of layers without a similarity, and its options."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.cka import cka
from dynprobe.analyzers.core.activations import Activations, SavedArrays, as_activations
from dynprobe.analyzers.core.contract import declaration_of
from dynprobe.analyzers.numerics.hsic_plan import plan

KINDS = [
    pytest.param({}, id="unbiased"),
    pytest.param({"estimator": "biased"}, id="biased"),
    pytest.param({"kernel": "rbf"}, id="rbf"),
    pytest.param({"minibatch": 16}, id="minibatch"),
]
N = 60


def array(n_features=5, seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mixing = torch.randn(3, n_features, generator=generator, dtype=torch.float64)
    return common @ mixing + torch.randn(n, n_features, generator=generator, dtype=torch.float64)


def value(x, y, **options):
    return float(cka(x, y, **options)["cka"].item())


def rotation(d):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(5)).double()).Q


class Net(nn.Module):
    """A convolution, an in-place rectifier and a residual sum, as in residual networks."""

    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 3)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.eval()

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = x + self.conv2(x)
        return self.head(x.flatten(1))


def data(sizes=(N,)):
    x = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(7))
    return list(zip(x.split(sizes), torch.zeros(N, dtype=torch.long).split(sizes), strict=True))


def u_centred(x):
    n = len(x)
    k = x @ x.T * (1 - np.eye(n))
    row = k.sum(1)
    return (k - row[:, None] / (n - 2) - row / (n - 2) + row.sum() / ((n - 1) * (n - 2))) * (1 - np.eye(n))


def dense(x, y):
    k, q = (u_centred(np.asarray(z, dtype=float)) for z in (x, y))
    return (k * q).sum() / math.sqrt((k * k).sum() * (q * q).sum())


@pytest.mark.parametrize("options", KINDS[:3])
def test_it_does_not_change_when_samples_are_permuted_in_both_or_features_turned_scaled_or_shifted(options):
    x, y = array(5, 1), array(8, 2)
    before = value(x, y, **options)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert value(x[order], y[order], **options) == pytest.approx(before, abs=1e-12)
    turned = 3.7 * x @ rotation(5) + torch.arange(5.0)
    assert value(turned, y, **options) == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_the_scale_of_activations_does_not_matter_from_1e_minus_15_to_1e15(scale, dtype, options):
    x, y = array(5, 1).to(dtype), array(8, 2).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    scaled = cka(x * scale, y, **options)
    assert scaled["cka"].item() == pytest.approx(value(x, y, **options), abs=tolerance)
    terms = scaled["hsic"] / np.sqrt(scaled["hsic_a"] * scaled["hsic_b"])
    np.testing.assert_allclose(terms, scaled["cka"], rtol=1e-6)


@pytest.mark.parametrize("options", KINDS)
def test_a_general_linear_map_does_change_it(options):
    x, y = array(5, 1), array(8, 2)
    stretched = x * torch.tensor([1.0, 1, 1, 1, 20])
    assert abs(value(stretched, y, **options) - value(x, y, **options)) > 0.01


def test_raw_terms_are_those_of_the_activations_in_their_own_units():
    x, y = 30 * array(5, 1), array(8, 2)
    found = cka(x, y)
    expected = (u_centred(x.numpy()) * u_centred(y.numpy())).sum() / (N * (N - 3))
    assert found["hsic"].item() == pytest.approx(expected, rel=1e-12)
    biased = cka(x, y, estimator="biased")
    centred = x - x.mean(0)
    assert biased["gram_trace_a"][0] == pytest.approx(float(centred.square().sum()), rel=1e-12)
    chance = biased["gram_trace_a"] * biased["gram_trace_b"] / (N - 1) ** 3
    assert biased["cka_chance"].item() == pytest.approx(
        float(chance[0]) / math.sqrt(biased["hsic_a"][0] * biased["hsic_b"][0])
    )
    excess = (biased["cka"] - biased["cka_chance"]) / (1 - biased["cka_chance"])
    np.testing.assert_allclose(biased["excess"], excess)


@pytest.mark.parametrize("options", KINDS)
def test_a_representation_is_1_with_itself_and_knows_its_layers(options):
    layers = {"a": array(5, 1), "b": array(90, 2)}
    found = cka(layers, layers, **options)
    np.testing.assert_allclose(np.diag(found["cka"]), 1, atol=1e-12)
    np.testing.assert_allclose(np.diag(found["cka_stderr"]), 0, atol=1e-9)
    assert found["same_layer"] == 1
    assert found["layer_a"].tolist() == found["layer"].tolist() == ["a", "b"]
    assert found["n_features_b"].tolist() == [5, 90]


def test_rows_are_the_first_network_and_columns_the_second():
    a = {"x": array(5, 1), "y": array(6, 2)}
    b = {"y": array(4, 3), "z": array(5, 1), "w": array(3, 4)}
    found = cka(a, b)
    assert found["cka"].shape == (2, 3)
    assert found["cka"][0, 1] == pytest.approx(1)
    expected = [[dense(p, q) for q in b.values()] for p in a.values()]
    np.testing.assert_allclose(found["cka"], expected, atol=1e-12)
    assert found["layer"].tolist() == ["y"]
    assert found["block_effect"].shape == (1, 32)


def test_networks_without_a_common_layer_have_no_effects_by_layer():
    found = cka({"x": array(5, 1)}, {"y": array(5, 2)})
    assert "layer" not in dict(found)
    assert math.isnan(found["same_layer"])


def test_duplicate_and_dead_neurons_are_what_the_formula_makes_of_them():
    x, y = array(5, 1), array(8, 2)
    doubled = torch.cat([x, x[:, :1], torch.zeros(N, 3)], 1)
    assert value(doubled, y) == pytest.approx(dense(doubled, y), abs=1e-12)
    assert value(torch.cat([x, torch.full((N, 1), 7.0)], 1), y) == pytest.approx(value(x, y), abs=1e-12)


@pytest.mark.parametrize("options", KINDS)
def test_a_constant_layer_is_nan_by_name_and_the_others_go_on(options):
    a = {"good": array(5, 1), "dead": torch.full((N, 4), 0.1)}
    found = cka(a, {"good": array(5, 2)}, **options)
    assert math.isnan(found["cka"][1, 0])
    assert math.isnan(found["cka_stderr"][1, 0])
    assert found["cka"][0, 0] == pytest.approx(value(a["good"], array(5, 2), **options), abs=1e-12)
    assert any("dead is constant over the samples" in note for note in found.notes)


class NotChecked(SavedArrays):
    """Saved activations, as they are when non-finite ones are let through."""

    def __init__(self, layers):
        self.state, self.treatment, self.sample, self.input_hash = layers, {}, {}, ""
        super().__init__("saved", "key", lambda: self)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [slice(None), slice(40, 41)])
@pytest.mark.parametrize("options", [*KINDS, pytest.param({"kernel": "rbf", "minibatch": 16}, id="both")])
def test_a_layer_with_nan_or_infinite_activations_is_nan_by_name_and_the_others_go_on(options, where, bad):
    a = {"good": array(5, 1), "broken": array(4, 3)}
    a["broken"][where, 1] = bad
    found = cka(NotChecked(a), {"good": array(5, 2)}, **options)
    alone = cka({"good": a["good"]}, {"good": array(5, 2)}, **options)
    for name in ("cka", "cka_stderr", "cka_chance", "hsic"):
        assert found[name][0, 0] == pytest.approx(alone[name][0, 0], abs=1e-12)
        assert math.isnan(found[name][1, 0])
    assert math.isnan(found["hsic_a"][1])
    assert found["layer_a"].tolist() == ["good", "broken"]
    assert any("broken is NaN or infinite in" in note for note in found.notes)


class InSeries:
    """Two networks as a series of pairs has them, and whether another pair will ask for them."""

    def __init__(self, again):
        held, self.again = data((40, 20)), again
        self.pair = [
            Activations(name, name, model=lambda n=net: n, batches=lambda: held, again=lambda: self.again)
            for name, net in (("one", Net(0)), ("two", Net(1)))
        ]


@pytest.mark.parametrize(("options", "passes"), [({}, 1), ({"kernel": "rbf"}, 2)])
def test_minibatches_of_a_network_in_no_other_pair_are_not_kept_and_give_the_same_numbers(options, passes):
    options = {"minibatch": 16, **options}
    kept, passing = InSeries(True), InSeries(False)
    first, second = (cka(*series.pair, **options) for series in (kept, passing))
    assert first.spent == second.spent == {"forwards": 2 * passes}
    for name, values in dict(first).items():
        np.testing.assert_array_equal(values, second[name])
    kept.again = False
    assert cka(*kept.pair, **options).spent == {"forwards": 0}
    assert cka(*passing.pair, **options).spent == {"forwards": passes}


@pytest.mark.parametrize("name", ["memory", "permutations", "bootstrap", "level"])
def test_limits_and_options_of_the_summary_decide_no_number_of_a_pair(name):
    assert name in {option.name for option in declaration_of(cka).options}
    assert declaration_of(cka).deciding({name: 1, "kernel": "rbf"}) == {"kernel": "rbf"}


def test_a_layer_equal_on_most_pairs_of_samples_has_no_median_distance_and_says_so():
    x = torch.zeros(N, 2)
    x[:5, 0] = 1
    for options in ({}, {"minibatch": 30}):
        found = cka(x, array(), kernel="rbf", **options)
        assert np.isnan(found["cka"]).all()
        assert np.isnan(found["bandwidth_a"]).all()
        assert any("median distance is 0" in note for note in found.notes)


def test_the_sign_is_kept_and_nothing_is_clamped():
    values = [
        value(*(torch.randn(12, 4, generator=torch.Generator().manual_seed(2 * s + i)) for i in (0, 1)))
        for s in range(12)
    ]
    assert min(values) < 0 < max(values)


def test_the_rbf_bandwidth_is_reported_in_units_of_the_activations():
    x = array(5, 1)
    distance = torch.pdist(x).median()
    found = cka(100 * x, array(8, 2), kernel="rbf", bandwidth=0.4)
    assert found["bandwidth_a"][0] == pytest.approx(40 * float(distance), rel=0.01)


@pytest.mark.parametrize("options", KINDS)
def test_networks_give_what_their_saved_activations_give_whatever_the_batches(options):
    one, two = Net(0), Net(1)
    found = cka((one, data((40, 19, 1))), (two, data((7,) * 8 + (4,))), **options)
    saved = [
        {name: layer.values for name, layer in as_activations((net, data())).features().items()}
        for net in (one, two)
    ]
    again = cka(*saved, **options)
    assert found["layer_a"].tolist() == again["layer_a"].tolist()
    np.testing.assert_allclose(found["cka"], again["cka"], atol=2e-6)
    assert found.spent == {"forwards": 2}


def test_the_value_of_a_layer_before_an_in_place_rectifier_is_its_own():
    nets = Net(0), Net(1)
    found = cka(*((net, data()) for net in nets), layers="bn")
    with torch.no_grad():
        truth = [net.bn(net.conv(data()[0][0])).flatten(1) for net in nets]
    assert found["cka"].item() == pytest.approx(dense(*truth), abs=1e-6)
    after = dense(*(x.relu() for x in truth))
    assert abs(after - found["cka"].item()) > 1e-3


def test_networks_and_the_random_state_are_left_as_they_were():
    net = Net(0).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = Net(1)
    state = torch.get_rng_state()
    cka((net, data()), (other, data()), minibatch=16)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("options", KINDS)
def test_a_series_with_what_is_remembered_equals_pairs_computed_afresh_and_runs_each_network_once(options):
    nets = [Net(seed) for seed in range(3)]
    kept = [as_activations((net, data())) for net in nets]
    pairs = [(0, 1), (1, 2), (0, 2), (1, 1)]
    series = [cka(kept[i], kept[j], **options) for i, j in pairs]
    assert [one.spent["forwards"] for one in series] == [2, 1, 0, 0]
    for (i, j), one in zip(pairs, series, strict=True):
        fresh = cka((nets[i], data()), (nets[j], data()), **options)
        for name in ("cka", "cka_stderr", "hsic", "block_effect"):
            np.testing.assert_array_equal(one[name], fresh[name])


def test_positions_as_samples_compare_layers_with_the_same_positions_and_cluster_errors_by_sample():
    found = cka((Net(0), data()), (Net(1), data()), maps="positions", layers="conv,conv2,head")
    assert found["n_rows_a"].tolist() == [N * 36, N * 36, N]
    assert np.isnan(found["cka"][2, :2]).all()
    assert np.isfinite(found["cka"][:2, :2]).all()
    assert np.isfinite(found["cka_stderr"][:2, :2]).all()
    assert any("different positions" in note for note in found.notes)
    one, two = (
        as_activations((net, data())).features(layers="conv", maps="positions")["conv"].values
        for net in (Net(0), Net(1))
    )
    rows = cka(one, two)
    assert found["cka"][0, 0] == pytest.approx(rows["cka"].item(), abs=1e-6)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_the_chance_level_of_positions_is_the_mean_over_samples_in_random_order_not_0(estimator):
    options = {"maps": "positions", "layers": "conv2", "estimator": estimator}
    nets = Net(0).double(), Net(1).double()
    inputs = data()[0][0].double() + torch.linspace(-3, 3, 6, dtype=torch.float64)
    targets = torch.zeros(N, dtype=torch.long)
    found = cka(*((net, [(inputs, targets)]) for net in nets), **options)
    permuted = []
    for seed in range(60):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        saved = [
            as_activations((net, [(x, targets)])).features(layers="conv2", maps="positions")["conv2"].values
            for net, x in zip(nets, (inputs, inputs[order]), strict=True)
        ]
        permuted.append(value(*saved, estimator=estimator))
    assert found["cka_chance"].item() == pytest.approx(
        np.mean(permuted), abs=4 * np.std(permuted) / math.sqrt(60)
    )
    assert found["cka_chance"].item() > 0.03
    excess = (found["cka"] - found["cka_chance"]) / (1 - found["cka_chance"])
    np.testing.assert_allclose(found["excess"], excess)


class Tokens(nn.Module):
    """A layer on sequences, whose padding is named."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding.from_pretrained(torch.randn(11, 6, generator=generator))

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


@pytest.mark.parametrize("ragged", [False, True])
def test_tokens_have_a_chance_level_where_all_samples_have_as_many_and_a_note_where_not(ragged):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (N, 8), generator=generator)
    lengths = torch.randint(2, 9, (N, 1), generator=generator) if ragged else torch.full((N, 1), 8)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(8) < lengths).long()}
    parts = [({k: v[rows] for k, v in inputs.items()}, ids[rows, 0]) for rows in (slice(20), slice(20, N))]
    a, b = ((Tokens(seed), parts) for seed in (0, 1))
    found = cka(a, b, sequences="token", layers="table")
    assert found["n_rows_a"].item() == int(lengths.sum())
    assert np.isfinite(found["cka"]).all()
    assert np.isnan(found["cka_chance"]).all() == np.isnan(found["excess"]).all() == ragged
    assert any("different numbers of rows" in note for note in found.notes) == ragged
    whole = cka(*((net, [(inputs, ids[:, 0])]) for net, _ in (a, b)), sequences="token", layers="table")
    np.testing.assert_allclose(found["cka"], whole["cka"], atol=1e-6)


def test_sigma_of_minibatches_is_the_median_distance_of_a_sample_of_512_whatever_the_batches():
    x, y = array(5, 1, n=90), array(8, 2, n=90)
    full = cka(x, y, kernel="rbf")
    for size in (9, 30):
        batched = cka(x, y, kernel="rbf", minibatch=size, seed=size)
        np.testing.assert_allclose(batched["bandwidth_a"], full["bandwidth_a"], rtol=1e-12)
    many = array(5, 1, n=2000)
    sigma = [cka(many, many, kernel="rbf", minibatch=100, seed=seed)["bandwidth_a"][0] for seed in range(5)]
    np.testing.assert_allclose(sigma, float(torch.pdist(many).median()), rtol=0.05)


def test_the_pass_that_finds_sigma_for_minibatches_ends_after_512_samples_and_counts_as_one():
    net, seen = nn.Linear(4, 3), []
    net.register_forward_pre_hook(lambda _module, arguments: seen.append(len(arguments[0])))
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    kept = as_activations((net, [(x, torch.zeros(2000))]))
    options = {"kernel": "rbf", "minibatch": 250}
    assert cka(kept, kept, **options).spent == {"forwards": 2}
    assert sum(seen) < 2000 + 3 * 512
    assert not net._forward_hooks
    assert declaration_of(cka).cost(options, 1) == {"forwards": 2}
    assert declaration_of(cka).cost({"kernel": "rbf"}, 1) == {"forwards": 1}
    assert cka(x, x, **options).spent == {"forwards": 0}


@pytest.mark.parametrize("options", [{}, {"minibatch": 50}])
def test_a_large_bandwidth_gives_the_linear_kernel_and_a_small_one_nan_with_the_reason(options):
    a, b = (array(500, seed, n=100).float() for seed in (1, 2))
    wide = cka(a, b, kernel="rbf", bandwidth=1000.0, **options)
    np.testing.assert_allclose(wide["cka"], cka(a, b, **options)["cka"], atol=0.01)
    narrow = cka(a, b, kernel="rbf", bandwidth=0.001, **options)
    assert np.isnan(narrow["cka"]).all()
    assert any("another --bandwidth is needed" in note for note in narrow.notes)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize(("n", "depth", "width"), [(100_000, 1, 100), (20_000, 5, 80), (1500, 5, 200)])
def test_memory_stays_within_a_few_percent_of_the_plan(n, depth, width):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        {f"layer{i}": torch.randn(n, width, generator=generator) for i in range(depth)}
        for _network in range(2)
    )
    cka(*({name: x[:50] for name, x in network.items()} for network in (a, b)))
    a, b = as_activations(a), as_activations(b)
    before = memory_of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    cka(a, b)
    peak = memory_of_process("VmHWM") - before
    assert peak < 1.15 * plan(n, [width] * depth, 4e9).bytes


def memory_of_process(name):
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def test_minibatches_are_near_the_full_sample_by_the_deviation_they_state():
    a, b = {"x": array(5, 1), "r": torch.randn(N, 6)}, {"x": array(8, 2), "r": torch.randn(N, 6)}
    full, batched = cka(a, b), cka(a, b, minibatch=20)
    gap = np.abs(batched["cka"] - full["cka"])
    assert (gap < 5 * batched["minibatch_deviation"]).all()
    assert "minibatch_deviation" not in dict(full)
    whole = cka(a, b, minibatch=N)
    np.testing.assert_array_equal(whole["cka"], full["cka"])
    assert (whole["minibatch_deviation"] == 0).all()


def test_batches_as_even_as_possible_take_every_sample_once():
    x, y = array(5, 1), array(8, 2)
    found = cka({"x": x}, {"x": y}, minibatch=25, seed=4)
    order = np.random.default_rng(4).permutation(N)
    terms = np.zeros(3)
    for part in np.array_split(order, 3):
        k, q = (u_centred(z[part].numpy()) for z in (x, y))
        terms += np.array([(k * q).sum(), (k * k).sum(), (q * q).sum()]) / (len(part) * (len(part) - 3))
    assert found["cka"].item() == pytest.approx(terms[0] / math.sqrt(terms[1] * terms[2]), abs=1e-12)
    assert found["block_effect"].shape == (1, 3)


@pytest.mark.parametrize("options", [{}, {"minibatch": 30}])
@pytest.mark.parametrize("width", [2, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_single_sample_that_differs_has_nothing_in_common_with_another_and_is_nan_by_name(
    dtype, width, options
):
    x = torch.full((N, width), 0.3, dtype=dtype)
    x[3, 0] = 1.0
    found = cka(x, array(), **options)
    assert np.isnan(found["cka"]).all()
    assert any("too few of them" in note for note in found.notes)


def test_two_active_samples_have_a_value_but_no_standard_error():
    x = torch.zeros(N, 2)
    x[3:5, 0] = 1.0
    found = cka(x, array())
    assert found["cka"].item() == pytest.approx(dense(x, array()), abs=1e-6)
    assert np.isnan(found["cka_stderr"]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bandwidth": 0.5}, "no effect on the linear kernel"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "between 1e-06 and 1e\\+06"),
        ({"kernel": "rbf", "bandwidth": 1e9}, "between 1e-06 and 1e\\+06"),
        ({"minibatch": 4}, "too few"),
        ({"minibatch": 16, "estimator": "biased"}, "bias that grows"),
        ({"memory": 1e-6}, "--memory"),
        ({"memory": 1e-6, "minibatch": 16}, "--memory"),
        ({"seed": -1}, "seed"),
        ({"layers": "nothing*"}, "nothing"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_with_a_tip(options, words):
    with pytest.raises(OptionError, match=words) as error:
        cka((Net(0), data((20, 40))), (Net(1), data((20, 40))), **options)
    assert error.value.tip


@pytest.mark.parametrize(("n", "given", "enough"), [(100, 8, 9), (N, 8, 9), (31, 7, 11), (12, 10, 12)])
def test_the_tip_for_minibatches_that_are_too_small_names_the_smallest_that_are_not(n, given, enough):
    with pytest.raises(OptionError, match="too few") as error:
        cka(array(n=n), array(seed=1, n=n), minibatch=given)
    assert f"--minibatch {enough} or more" in error.value.tip
    cka(array(n=n), array(seed=1, n=n), minibatch=enough)
    with pytest.raises(OptionError, match="too few"):
        cka(array(n=n), array(seed=1, n=n), minibatch=enough - 1)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_minibatches_of_positions_are_refused_with_a_tip(kernel):
    with pytest.raises(OptionError, match="a row is a sample") as error:
        cka((Net(0), data()), (Net(1), data()), maps="positions", minibatch=16, kernel=kernel)
    assert "--maps" in error.value.tip


def test_three_samples_are_too_few_and_different_numbers_of_samples_are_no_pair():
    with pytest.raises(OptionError, match="at least 4 samples"):
        cka(array(n=3), array(seed=1, n=3))
    with pytest.raises(OptionError, match="samples"):
        cka(array(), array()[:-1])


def test_four_samples_have_a_value_but_no_standard_error():
    found = cka(array(n=4), array(seed=1, n=4))
    assert np.isfinite(found["cka"]).all()
    assert np.isnan(found["cka_stderr"]).all()
