"""What `dynprobe corrections` says of networks whose corrections are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from _correction_cases import (
    GRID,
    Data,
    axes,
    best_box,
    decided,
    judged,
    net,
    noisy,
    random_net,
    samples_of,
    square,
    trained,
    two_classes,
)
from scipy.ndimage import minimum_filter
from torch import nn

from dynprobe.analyzers import OptionError, _corrections_search
from dynprobe.analyzers._corrections import Judge
from dynprobe.analyzers._corrections_model import Classifier
from dynprobe.analyzers._corrections_search import Found
from dynprobe.io.pieces import PieceStore

NUMBERS = ("distance", "lower_bound", "stable_distance", "stable_lower_bound", "volume", "volume_bound")
PLACES = ("value", "nearest", "corrected", "box_low", "box_high")


# Linear judgements have a closed form

NAMES, OFFSET, SCALE = ("interest", "ltv", "credit"), [5.0, 80.0, 650.0], [2.0, 20.0, 100.0]
LOW, HIGH = np.array([0.0, 20.0, 300.0]), np.array([10.0, 120.0, 850.0])


def linear_case():
    """Slopes in units of the ranges, value at the judged input, and the model and data that have them."""
    values = np.array([LOW, HIGH, [5.5, 60.0, 520.0]])
    slopes, at_input = np.array([-1.0, -2.0, 3.0]), -0.9
    of_inputs = slopes / (HIGH - LOW) * SCALE
    constant = at_input - of_inputs @ ((values[2] - OFFSET) / SCALE)
    data = Data(values, names=NAMES, offset=OFFSET, scale=SCALE)
    return slopes, at_input, two_classes(of_inputs, constant), data


@pytest.mark.parametrize("distance", ["l1", "linf"])
def test_distances_of_a_linear_judgement_are_its_closed_form_in_the_datas_own_units(distance):
    slopes, value, model, data = linear_case()
    found = judged(model, data, sample="2", distance=distance, tolerance=1e-5)
    steepest = np.abs(slopes).max() if distance == "l1" else np.abs(slopes).sum()
    missing = found["margin"][0] - value
    for kind, lower, radius in (("distance", "lower_bound", 0), ("stable_distance", "stable_lower_bound", 1)):
        expected = (missing + radius * 0.025 * np.abs(slopes).sum()) / steepest
        assert found[lower][0] <= expected * (1 + 1e-12)
        assert expected <= found[kind][0] * (1 + 1e-12)
        assert found[kind][0] == pytest.approx(expected, rel=2e-5)
    for place, kind in (("nearest", "distance"), ("corrected", "stable_distance")):
        moved = np.abs(found[place][0] - found["value"][0]) / (HIGH - LOW)
        total = moved.sum() if distance == "l1" else moved.max()
        assert total == pytest.approx(found[kind][0], rel=1e-9)
    assert found["outcome"][0] == found["nearest_outcome"][0] == "optimal"
    assert found.converged
    np.testing.assert_allclose(found["value"][0], [5.5, 60, 520], rtol=1e-12)
    np.testing.assert_allclose(found["feature_low"], LOW)
    np.testing.assert_allclose(found["feature_high"], HIGH)
    np.testing.assert_allclose(found["stability"], 0.025 * (HIGH - LOW))


def test_stability_of_one_feature_alone_costs_only_its_own_slope():
    _slopes, value, model, data = linear_case()
    found = judged(model, data, sample="2", stability="ltv=10", tolerance=1e-5)
    expected = (found["margin"][0] - value + 0.1 * 2) / 3
    assert found["stable_distance"][0] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("slack", [0.0, 0.5])
def test_the_box_is_the_largest_in_a_half_plane(slack):
    model = two_classes([1.0, 2.0], -1.6)
    data = Data([[0, 0], [1, 1], [0.4, 0.3]])
    found = judged(model, data, sample="2", stability="0.05", slack=slack)
    corner = found["corrected"][0] - 0.05 * (1 - slack)
    # the lower corner lies on the line, below and left of the surroundings
    a = np.linspace(0, corner[0], 100_001)
    b = np.maximum((1.6 - a) / 2, 0)
    expected = np.where(b <= corner[1] + 1e-6, (1 - a) * (1 - b), 0).max()
    assert found["volume"][0] <= expected * (1 + 1e-4)
    assert expected <= found["volume_bound"][0] * (1 + 1e-4)
    assert found["volume"][0] > 0.95 * expected
    widths = found["box_high"][0] - found["box_low"][0]
    assert found["volume"][0] == pytest.approx(widths.prod())


# Brute force


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distance_and_volume_for_two_features_are_those_of_a_dense_grid(seed):
    model, data = trained(seed=seed)
    found = judged(model, data, sample=samples_of(model, data, 0, n=3), target="1", tolerance=0.002)
    good = (decided(model, axes()) == 1).reshape(GRID, GRID)
    stable = minimum_filter(good, 2 * 10 + 1, mode="constant", cval=1)
    for i in range(3):
        distance = np.abs(axes() - found["value"][i]).sum(1).reshape(GRID, GRID)
        step = 2 / (GRID - 1)
        assert found["lower_bound"][i] <= distance[good].min()
        assert distance[good].min() - step <= found["distance"][i] * 1.002
        assert found["stable_lower_bound"][i] <= distance[stable].min() + step
        assert distance[stable].min() - 2 * step <= found["stable_distance"][i]
        inner = found["corrected"][i] - 0.025, found["corrected"][i] + 0.025
        expected = best_box(good, np.clip(inner[0], 0, 1), np.clip(inner[1], 0, 1))
        edge = 4 / (GRID - 1)
        assert found["volume"][i] > 0.95 * expected - edge
        assert found["volume_bound"][i] > expected - edge
    assert found["sampled_failures"].tolist() == [0, 0, 0]


def test_the_nearest_of_two_regions_is_found_though_the_gradient_leads_to_the_other():
    # -0.9 + x + 20 max(-x - 0.3, 0): positive from 0.9 on, where the gradient at 0 leads, and left of -0.363
    model = two_classes([1.0, -1.0, 20.0], -0.9, ([[1, 0], [-1, 0], [-1, 0]], [0.0, 0.0, -0.3]))
    data = Data([[-1, -1], [1, 1], [0.0, 0.1]])
    start = torch.tensor([[0.01, 0.1]], dtype=torch.float64, requires_grad=True)
    model(start)[0, 1].backward()
    assert start.grad[0, 0] > 0
    found = judged(model, data, sample="2", stability="0", tolerance=1e-4)
    expected = (0.3 + (1.2 + found["margin"][0]) / 19) / 2
    assert found["distance"][0] == pytest.approx(expected, rel=2e-4)
    assert found["lower_bound"][0] <= expected * (1 + 1e-12)
    assert found["nearest"][0, 0] == pytest.approx(-0.3 - 1.2 / 19, rel=1e-3)


def test_at_most_so_many_changes_is_the_best_of_all_subsets():
    model, data = random_net([4, 12, 12, 2], 5), Data(square(k=4), names="abcd")
    sample = samples_of(model, data, 0, n=2)
    options = {"sample": sample, "target": "1", "tolerance": 0.003, "sampled": 0}
    found = judged(model, data, max_changed=2, **options)
    for i, kind in itertools.product(range(2), ("distance", "stable_distance")):
        single = [
            judged(model, data, features=",".join(names), max_changed=n, **options)[kind][i]
            for n in (1, 2)
            for names in itertools.combinations("abcd", n)
        ]
        assert found[kind][i] == pytest.approx(np.nanmin(single), rel=0.004)
        moved = {"distance": "nearest", "stable_distance": "corrected"}[kind]
        assert (found[moved][i] != found["value"][i]).sum() <= 2
    still = found["changed"] == 0
    assert still.sum() >= 4
    for place in ("nearest", "corrected", "box_low", "box_high"):
        if place != "nearest":
            assert (found[place][still] == found["value"][still]).all()


# What may change


FACTS = """
[features.count]
integer = true
stability = 0
[features.age]
immutable = true
[features.debt]
direction = "down"
"""


@pytest.fixture
def facts(tmp_path):
    def write(text):
        path = tmp_path / "features.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def household():
    """Random network of a whole number, an age, a debt and two more, in float32, with units."""
    rng = np.random.default_rng(1)
    values = np.column_stack([rng.integers(0, 9, 40), rng.uniform(18, 90, 40), rng.random((40, 3)) * 50])
    model = random_net([5, 12, 2], 11).float()
    names = ("count", "age", "debt", "rate", "rest")
    mean, std = values.mean(0), values.std(0)
    return model, Data(values, names=names, offset=mean, scale=std, dtype=torch.float32)


def test_whole_numbers_directions_and_immutable_features_are_obeyed(facts):
    model, data = household()
    sample = samples_of(model, data, 0, n=4)
    found = judged(
        model, data, sample=sample, features="count,debt,rate", target="1", feature_file=facts(FACTS)
    )
    assert list(found["feature"]) == ["count", "debt", "rate"]
    whole, down = (found["feature"].tolist().index(name) for name in ("count", "debt"))
    n_found = np.isfinite(found["stable_distance"]).sum()
    assert n_found >= 2
    for place in ("nearest", "corrected", "box_low", "box_high"):
        values = found[place][np.isfinite(found[place]).all(1)]
        assert (values[:, whole] == np.round(values[:, whole])).all()
    for place in ("nearest", "corrected", "box_high"):
        known = np.isfinite(found[place][:, down])
        assert (found[place][known, down] <= found["value"][known, down] * (1 + 1e-12)).all()
    with pytest.raises(OptionError, match="age"):
        judged(model, data, features="age", feature_file=facts(FACTS))
    everything = judged(
        model, data, sample="0", features="all", feature_file=facts(FACTS), max_changed=1, sampled=0
    )
    assert "age" not in everything["feature"].tolist()


def test_distances_with_a_whole_number_are_those_of_trying_each_of_its_values(facts):
    model, data = household()
    sample = samples_of(model, data, 0, n=4)
    found = judged(
        model,
        data,
        sample=sample,
        features="count,debt",
        target="1",
        stability="0",
        tolerance=1e-3,
        feature_file=facts("[features.count]\ninteger = true\n"),
    )
    inputs = torch.cat([x for x, _ in data])
    counts, debts = np.arange(0, 9), np.linspace(found["feature_low"][1], found["feature_high"][1], 4001)
    for i, number in enumerate(map(int, sample.split(","))):
        points = inputs[number].repeat(len(counts) * len(debts), 1)
        shown = np.array(list(itertools.product(counts, debts)))
        points[:, [0, 2]] = torch.tensor(
            (shown - data.feature_offset[[0, 2]]) / data.feature_scale[[0, 2]]
        ).float()
        good = decided(model, points) == 1
        cost = (np.abs(shown - found["value"][i]) * found["feature_weight"]).sum(1)
        if not good.any():
            assert found["nearest_outcome"][i] == "none_exists"
            continue
        assert found["lower_bound"][i] <= cost[good].min() + 1e-6
        assert found["distance"][i] == pytest.approx(cost[good].min(), rel=2e-3, abs=5e-4)


def test_what_was_not_chosen_keeps_its_bits_in_every_point_that_the_model_is_asked_at(monkeypatch):
    model, data = household()
    asked = []
    decides = Classifier.decides
    monkeypatch.setattr(
        Classifier, "decides", lambda self, points: asked.append(points) or decides(self, points)
    )
    sample = samples_of(model, data, 0)
    found = judged(model, data, sample=sample, features="debt,rate", target="1", sampled=3000)
    assert found["n_sampled"][0] == 3000
    own = torch.cat([x for x, _ in data])[int(sample)].double().numpy()
    asked = np.concatenate(
        [points for points in asked if len(points) != len(torch.cat([x for x, _ in data]))]
    )
    assert len(asked) > 3000
    others = [0, 1, 4]
    assert (asked[:, others] == own[others]).all()


def houses(seed):
    """A network of a number and a category of three, standardised in float32, that likes two of five."""
    rng = np.random.default_rng(seed)
    values = np.column_stack([np.linspace(0, 1, 30), np.eye(3)[rng.integers(0, 3, 30)]])
    names, mean, std = ("size", "house", "flat", "land"), values.mean(0), values.std(0)
    data = Data(values, names=names, offset=mean, scale=std, dtype=torch.float32)
    model = random_net([4, 10, 2], seed).float()
    with torch.no_grad():
        model[-1].bias[0] += np.quantile(model(data[0][0]) @ torch.tensor([-1.0, 1.0]), 0.6)
    return model, data, values


HOUSE = '[[one_hot]]\nname = "kind"\nfeatures = ["house", "flat", "land"]\nweight = 0.3\n'


@pytest.mark.parametrize(("features", "most"), [("size,kind", 2), ("size,kind", 1), ("kind", 1)])
def test_categories_are_tried_one_by_one_and_cost_what_they_weigh(facts, features, most):
    outcomes = []
    for seed in (4, 5):
        model, data, values = houses(seed)
        sample = samples_of(model, data, 0, n=3)
        found = judged(
            model,
            data,
            sample=sample,
            features=features,
            target="1",
            max_changed=most,
            stability="0",
            tolerance=1e-3,
            feature_file=facts(HOUSE),
        )
        names = found["feature"].tolist()
        kinds = [names.index(name) for name in ("house", "flat", "land")]
        for i, number in enumerate(map(int, sample.split(","))):
            own = values[number]
            sizes = np.unique([own[0], *np.linspace(0, 1, 8001)]) if "size" in features else own[:1]
            points = np.array([[size, *np.eye(3)[kind]] for size in sizes for kind in range(3)])
            other = np.abs(points[:, 1:] - own[1:]).any(1)
            moved = points[:, 0] != own[0]
            cost = np.abs(points[:, 0] - own[0]) + 0.3 * other
            inputs = (points - data.feature_offset) / data.feature_scale
            good = (decided(model, inputs) == 1) & (other.astype(int) + moved <= most)
            outcomes.append(found["outcome"][i])
            if not good.any():
                assert found["outcome"][i] == found["nearest_outcome"][i] == "none_exists"
                assert np.isnan(found["distance"][i])
                continue
            assert found["distance"][i] == pytest.approx(cost[good].min(), rel=2e-3, abs=3e-4)
            chosen = found["nearest"][i, kinds]
            assert sorted(chosen) == [0, 0, 1]
            if features == "kind":
                assert found["distance"][i] == 0.3
                assert found["changed"][i, kinds].sum() == 2
    assert "optimal" in outcomes


# Which class


@pytest.fixture(scope="module")
def three():
    model, data = trained(classes=3, seed=3)
    named = Data(
        torch.cat([x for x, _ in data]).numpy(),
        targets=torch.cat([y for _, y in data]),
        classes=("none", "disc", "ring"),
    )
    return model, named


def test_any_class_is_the_nearest_of_all_others(three):
    model, data = three
    sample = samples_of(model, data, 0, n=2)
    options = {"sample": sample, "tolerance": 1e-3, "sampled": 0}
    found = judged(model, data, target="any", **options)
    each = [judged(model, data, target=target, **options) for target in ("1", "2")]
    expected = np.stack([one["stable_distance"] for one in each])
    np.testing.assert_allclose(found["stable_distance"], np.nanmin(expected, 0), rtol=2e-3)
    assert (found["target"] == 1 + np.nanargmin(expected, 0)).all()
    assert (found["decided"] == 0).all()


def test_a_class_is_named_by_number_or_name_or_as_the_samples_own(three):
    model, data = three
    sample = samples_of(model, data, 0)
    by_number, by_name = (judged(model, data, sample=sample, target=t, sampled=0) for t in ("2", "ring"))
    assert by_number["target"].tolist() == by_name["target"].tolist() == [2]
    assert by_number["stable_distance"] == by_name["stable_distance"]
    assert by_name["class"].tolist() == ["none", "disc", "ring"]
    own = judged(model, data, samples="3", target="label", sampled=0)
    assert (own["target"] == own["label"]).all()
    with pytest.raises(OptionError, match="circle") as error:
        judged(model, data, target="circle")
    assert "1 (disc)" in error.value.tip


def test_what_is_decided_for_the_target_already_has_no_correction(three):
    model, data = three
    found = judged(model, data, sample=samples_of(model, data, 1), target="disc")
    assert found["outcome"][0] == found["nearest_outcome"][0] == "already_target"
    assert found["target"][0] == found["decided"][0] == 1
    for name in (*NUMBERS, "n_sampled", "overlap"):
        assert np.isnan(found[name]).all()
    for name in ("nearest", "corrected", "box_low", "box_high"):
        assert np.isnan(found[name]).all()
    assert np.isfinite(found["value"]).all()
    assert (found["on_target"], found["correctable"]) == (1, 0)


def test_misclassified_samples_are_to_be_decided_for_their_own_class(three):
    model, data = three
    found = judged(model, data, samples="misclassified:3", sampled=0)
    wrong = np.flatnonzero(
        decided(model, torch.cat([x for x, _ in data])) != torch.cat([y for _, y in data]).numpy()
    )
    assert set(found["sample"]) <= set(wrong.tolist())
    assert len(found["sample"]) == min(3, len(wrong))
    assert (found["target"] == found["label"]).all()
    assert (found["decided"] != found["label"]).all()


# One output, and what may stand at the end


def single(slope=4.0, constant=-3.0, *last):
    return nn.Sequential(net(([[slope, slope]], constant)), *last)


@pytest.mark.parametrize(
    ("last", "threshold", "level"),
    [((), None, 0.0), ((), 0.7, 0.7), ((nn.Sigmoid(),), None, 0.0), ((nn.Sigmoid(),), 0.9, np.log(9))],
)
def test_one_output_decides_for_class_1_from_the_threshold_on(last, threshold, level):
    data = Data([[0, 0], [1, 1], [0.3, 0.2]])
    found = judged(
        single(4.0, -3.0, *last), data, sample="2", threshold=threshold, stability="0", tolerance=1e-4
    )
    assert found["distance"][0] == pytest.approx((level + 3 - 4 * 0.5) / 4, rel=1e-3)
    assert (found["decided"][0], found["target"][0]) == (0, 1)
    back = judged(
        single(4.0, -3.0, *last), data, sample="1", threshold=threshold, stability="0", tolerance=1e-4
    )
    assert back["distance"][0] == pytest.approx((4 * 2 - 3 - level) / 4, rel=1e-3)
    assert (back["decided"][0], back["target"][0]) == (1, 0)


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_a_softmax_at_the_end_changes_no_correction(last):
    model, data = trained()
    options = {"sample": samples_of(model, data, 0), "tolerance": 1e-4}
    plain, found = judged(model, data, **options), judged(nn.Sequential(model, last), data, **options)
    for name in ("distance", "stable_distance", "volume"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-3)


def test_a_threshold_is_refused_where_the_largest_output_decides():
    model, data = trained()
    with pytest.raises(OptionError, match="2 outputs"):
        judged(model, data, threshold=0.5)


def test_with_tanh_the_answer_is_bounded_at_best_however_small_the_gap():
    model = net(([[1, 0], [0, 1]], [0, 0]), ([[0, 0], [2, 1]], [0, -1.5]), activation=nn.Tanh)
    data = Data([[0, 0], [1, 1], [0.3, 0.2]])
    found = judged(model, data, sample="2", stability="0", tolerance=1e-3)
    grid = axes()
    good = decided(model, grid) == 1
    expected = np.abs(grid[good] - [0.3, 0.2]).sum(1).min()
    assert found["outcome"][0] == found["nearest_outcome"][0] == "bounded"
    assert found["lower_bound"][0] <= expected <= found["distance"][0] + 2 / (GRID - 1)
    assert found["distance"][0] - found["lower_bound"][0] <= 1e-3 * found["distance"][0]
    assert found.converged
    assert found["still_open"] == 0


# What there is not


def test_no_correction_within_the_ranges_is_said_and_depends_on_them():
    model = two_classes([1.0, 1.0], -2.5)
    data = Data([[0, 0], [1, 1], [0.5, 0.5]])
    found = judged(model, data, sample="2")
    assert found["outcome"][0] == found["nearest_outcome"][0] == "none_exists"
    for name in NUMBERS:
        assert np.isnan(found[name][0])
    assert found["not_correctable"] == 1
    assert found.converged
    assert (found["feature_low"].tolist(), found["feature_high"].tolist()) == ([0, 0], [1, 1])
    wider = judged(model, data, sample="2", ranges="0:2", stability="0", tolerance=1e-4)
    assert wider["distance"][0] == pytest.approx(1.5 / 2, rel=1e-3)


def test_a_point_may_be_a_correction_where_no_stable_one_exists():
    # only the band |x - 0.8| < 0.02 is decided for class 1, narrower than the stability
    model = two_classes([-1.0, -1.0], 0.02, ([[1, 0], [-1, 0]], [-0.8, 0.8]))
    data = Data([[0, 0], [1, 1], [0.3, 0.5]])
    found = judged(model, data, sample="2")
    assert found["nearest_outcome"][0] == "optimal"
    assert found["distance"][0] == pytest.approx(0.48, rel=0.01)
    assert found["outcome"][0] == "none_exists"
    assert np.isnan(found["stable_distance"][0])
    assert np.isnan(found["box_low"]).all()


def test_without_time_the_lower_bound_holds_and_the_judgement_is_open():
    model, data = random_net([5, 24, 24, 24, 2], 2), Data(square(k=5))
    sample = samples_of(model, data, 0)
    found = judged(model, data, sample=sample, budget=1e-3, target="1", tolerance=0.0)
    enough = judged(model, data, sample=sample, budget=4.0, target="1", sampled=0)
    assert found["outcome"][0] in ("timeout", "bounded")
    assert not found.converged
    assert "--budget" in found.reason
    assert found["still_open"] == 1
    assert 0 <= found["lower_bound"][0] <= enough["distance"][0]
    assert 0 <= found["stable_lower_bound"][0] <= enough["stable_distance"][0]


def test_a_stable_correction_counts_as_one_though_the_search_for_the_nearest_missed_it(monkeypatch):
    model, data = trained()
    options = {"sample": samples_of(model, data, 0), "target": "1", "sampled": 0}
    enough = judged(model, data, **options)
    search = Judge._nearest

    def only_stable(self, *arguments, stable, **more):
        if not stable:
            return Found(0.0, math.inf, None, None, "none", 0)
        return search(self, *arguments, stable=stable, **more)

    monkeypatch.setattr(Judge, "_nearest", only_stable)
    found = judged(model, data, **options)
    assert found["distance"] == found["stable_distance"] == enough["stable_distance"]
    assert found["lower_bound"][0] == 0
    assert found["nearest_outcome"][0] == "bounded"
    np.testing.assert_array_equal(found["nearest"], found["corrected"])


# What cannot be analysed


class Depends(nn.Module):
    """Two networks in one: which, depends on the input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0.7 * x.numel() else self.linear(-x)


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x):
        return self.linear(x - x.mean(0))


def test_gelu_is_refused_by_name():
    model = random_net([2, 8, 2], 0, activation=nn.GELU)
    with pytest.raises(OptionError, match="GELU"):
        judged(model, Data(square()))


@pytest.mark.parametrize("model", [Depends(), Centred()])
def test_a_forward_pass_that_depends_on_the_data_in_other_ways_is_refused(model):
    with pytest.raises(OptionError, match="cannot be analysed"):
        judged(model, Data(square()))


# Boxes and polygons


@pytest.fixture(scope="module")
def single_precision():
    model, data = trained(seed=1)
    rng = np.random.default_rng(0)
    half = random_net([2, 16, 16, 2], 0).float()
    half.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    values = torch.cat([x for x, _ in data]).numpy() * [60, 500] + [3, 300]
    named = Data(values, names=("dti", "credit"), offset=[3, 300], scale=[60, 500], dtype=torch.float32)
    return half, named, judged(half, named, sample=samples_of(half, named, 0, n=4), sampled=200_000), rng


def test_corrections_and_200000_points_of_each_box_are_the_target_in_the_models_own_dtype(single_precision):
    model, data, found, rng = single_precision
    assert (found["n_sampled"] == 200_000).all()
    assert (found["sampled_failures"] == 0).all()
    for i in range(4):
        low, high = found["box_low"][i], found["box_high"][i]
        shown = low + rng.random((200_000, 2)) * (high - low)
        faces = rng.random(shown.shape) < 0.1
        shown = np.where(faces, np.where(rng.random(shown.shape) < 0.5, low, high), shown)
        shown = np.concatenate([shown, [found["nearest"][i], found["corrected"][i], low, high]])
        points = (shown - data.feature_offset) / data.feature_scale
        assert (decided(model, points) == found["target"][i]).all()
        assert (low <= found["corrected"][i]).all()
        assert (found["corrected"][i] <= high).all()


def test_the_margin_is_above_four_times_the_measured_rounding_error(single_precision):
    *_, found, _rng = single_precision
    assert found["rounding_error"] > 1e-8
    assert (found["margin"] >= 4 * found["rounding_error"]).all()


def test_slack_and_polygons_never_make_less_of_a_box():
    model, data = trained(seed=2)
    options = {"sample": samples_of(model, data, 0, n=2), "target": "1", "sampled": 0}
    box = judged(model, data, **options)
    slack = judged(model, data, slack=0.4, **options)
    polygon = judged(model, data, shape="polygon", **options | {"budget": 0.6})
    assert (slack["volume"] >= 0.95 * box["volume"]).all()
    assert (slack["volume_bound"] >= 0.999 * box["volume"]).all()
    assert (polygon["volume"] >= 0.999 * box["volume"]).all()
    rng = np.random.default_rng(0)
    for i in range(2):
        vertices = polygon["polygon"][i][np.isfinite(polygon["polygon"][i]).all(1)]
        x, y = vertices.T
        area = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
        assert area == pytest.approx(polygon["volume"][i])
        inside = rng.dirichlet(np.full(len(vertices), 0.3), 20_000) @ vertices
        assert (decided(model, inside) == 1).all()


def test_where_one_of_two_features_cannot_move_the_box_of_the_other_stands_for_the_polygon(facts):
    model, data = two_classes([1.0, 1.0], -1.6), Data([[0, 0], [1, 1], [1.0, 0.3]], names=("a", "b"))
    options = {"sample": "2", "feature_file": facts('[features.a]\ndirection = "up"\n'), "budget": 1.0}
    found = judged(model, data, shape="polygon", **options)
    assert found["stable_distance"][0] == pytest.approx(0.325, rel=0.01)
    np.testing.assert_allclose(found["box_low"][0], [1, 0.6], atol=2e-3)
    assert found["volume"][0] == pytest.approx(0.4, rel=0.01)


def test_a_polygon_needs_two_features_that_change():
    with pytest.raises(OptionError, match="two features"):
        judged(random_net([3, 4, 2], 0), Data(square(k=3)), shape="polygon", max_changed=3)


# Over checkpoints


def test_whether_the_last_box_holds_and_how_much_it_overlaps_is_what_a_grid_says():
    first, data = trained(seed=0)
    sample = samples_of(first, data, 0, n=3)
    seen = []
    before = judged(first, data, sample=sample, target="1", sampled=0)
    for size in (0.0, 0.3, 2.0):
        later = noisy(first, 0.1 * size)
        found = judged(later, data, previous=before, sample=sample, target="1", sampled=0)
        for i in range(3):
            low, high = before["box_low"][i], before["box_high"][i]
            holds = float((decided(later, low + axes(201) * (high - low)) == 1).all())
            assert found["previous_holds"][i] == holds
            seen.append(holds)
            if found["outcome"][i] != "optimal":
                continue
            ends = [np.minimum(high, found["box_high"][i]), np.maximum(low, found["box_low"][i])]
            shared = np.maximum(ends[0] - ends[1], 0).prod()
            sizes = (high - low).prod() + (found["box_high"][i] - found["box_low"][i]).prod()
            assert found["overlap"][i] == pytest.approx(shared / (sizes - shared))
        known = found["previous_holds"][np.isfinite(found["previous_holds"])]
        assert found["still_hold"] == pytest.approx(known.mean())
    assert set(seen) == {0.0, 1.0}


def test_the_first_checkpoint_says_nothing_of_a_previous_one():
    model, data = trained()
    found = judged(model, data, sample="0", sampled=0)
    assert np.isnan(found["previous_holds"]).all()
    assert np.isnan(found["overlap"]).all()
    assert np.isnan(found["still_hold"])


# Which samples, resuming, determinism


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sample": "7"}, [7]),
        ({"sample": "9,2"}, [9, 2]),
        ({"sample": "-1"}, [61]),
        ({"samples": "3,40,5"}, [3, 40, 5]),
    ],
)
def test_samples_are_judged_by_number(options, expected):
    model, data = two_classes([1.0, 1.0], -1.0), Data(square())
    found = judged(model, data, **options, sampled=0)
    assert found["sample"].tolist() == expected
    values = torch.cat([x for x, _ in data]).numpy()[expected]
    np.testing.assert_array_equal(found["value"], values)


def test_samples_are_drawn_by_seed_and_ten_where_nothing_is_said():
    model, data = two_classes([1.0, 1.0], -1.0), Data(square())
    drawn = [judged(model, data, samples="4", seed=s, sampled=0)["sample"].tolist() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(judged(model, data, sampled=0)["sample"]) == 10
    assert len(judged(model, data, samples="all", sampled=0)["sample"]) == 62
    with pytest.raises(OptionError, match="both given"):
        judged(model, data, sample="1", samples="4")


class InMemory:
    """Parts of a piece."""

    def __init__(self):
        self.parts = {}

    def get(self, name):
        return self.parts.get(name)

    def put(self, name, arrays):
        self.parts[name] = dict(arrays)


@pytest.mark.parametrize("on_disk", [False, True])
def test_finished_judgements_are_not_judged_again(on_disk, tmp_path, monkeypatch):
    model, data = trained()
    partial = PieceStore(tmp_path / "report.h5", "corrections").partial("key") if on_disk else InMemory()
    sample = ",".join([samples_of(model, data, 0), samples_of(model, data, 1)])
    options = {"sample": sample, "target": "1", "shape": "polygon", "budget": 0.2}
    first = judged(model, data, partial=partial, **options)

    def never(*_):
        raise AssertionError("judged again")

    monkeypatch.setattr(Judge, "__call__", never)
    again = judged(model, data, partial=partial, **options)
    assert_equal(first, again)
    assert first.notes == again.notes


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def test_the_same_seed_gives_the_same_numbers_however_the_data_are_split():
    model, data = trained()
    inputs, targets = torch.cat([x for x, _ in data]).numpy(), torch.cat([y for _, y in data])
    split = Data(inputs, targets=targets, names=("left", "up"), sizes=(100, 1, 150, 51))
    options = {"samples": "3", "seed": 4}
    first = judged(model, data, **options)
    assert_equal(first, judged(model, data, **options))
    assert_equal(first, judged(model, split, **options))


def test_the_model_is_left_as_it_was():
    model, data = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    judged(model, data, samples="2")
    assert torch.equal(random, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in model.parameters())


def test_maps_are_least_margins_over_the_two_features():
    model, data = trained()
    found = judged(model, data, sample=samples_of(model, data, 0), target="1", sampled=0)
    values = found["margin_map"][0]
    n = len(values)
    points = axes(n)  # the first coordinate is slowest: along y of the map's transpose
    with torch.no_grad():
        outputs = model(torch.from_numpy(points)).numpy()
    expected = (outputs[:, 1] - outputs[:, 0]).reshape(n, n).T
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)


# What a review found


def test_with_a_category_too_more_changes_allowed_are_never_worse(facts):
    """Class 1 is decided where x > 0.5 and y is almost 0.5: to change both is not stable, x alone is."""
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.random((60, 2)), np.eye(2)[rng.integers(0, 2, 60)]])
    values[0] = [0.2, 0.5, 1, 0]
    hidden = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    model = two_classes([1.0, -100, -100, -10], -0.5, (hidden, [0.0, -0.51, 0.49, 0.0]))
    data = Data(values, names=("x", "y", "p", "q"))
    file = facts('[[one_hot]]\nname = "h"\nfeatures = ["p", "q"]\n')
    found = [
        judged(model, data, sample="0", features="x,y,h", feature_file=file, max_changed=most, sampled=0)
        for most in (1, 2)
    ]
    assert [f["outcome"][0] for f in found] == ["optimal", "optimal"]
    assert found[1]["stable_distance"][0] == pytest.approx(found[0]["stable_distance"][0], rel=0.01)


def test_so_many_categories_are_searched_where_one_of_them_may_change(facts):
    kinds = 12
    rng = np.random.default_rng(0)
    names = [f"{letter}{i}" for i in range(kinds) for letter in "abc"]
    values = np.column_stack([np.eye(3)[rng.integers(0, 3, 40)] for _ in range(kinds)])
    text = "".join(
        f'[[one_hot]]\nname = "k{i}"\nfeatures = ["a{i}", "b{i}", "c{i}"]\nweight = {1 + i}\n'
        for i in range(kinds)
    )
    weights = np.zeros(3 * kinds)
    weights[3 * 4] = 1.0  # what decides is whether the fifth feature is a
    values[0, 12:15] = [0, 1, 0]
    model, data = two_classes(weights, -0.5), Data(values, names=names)
    found = judged(
        model, data, sample="0", features="all", feature_file=facts(text), max_changed=1, target="1"
    )
    assert found["distance"][0] == 5.0
    with pytest.raises(OptionError, match="531,441 ways"):
        judged(model, data, sample="0", features="all", feature_file=facts(text), max_changed=12, target="1")


def test_a_softmax_that_hides_the_outputs_makes_the_margin_no_smaller():
    """Logits of 2^17 (x + 64 - 64.5) in float32 are off by half a unit; behind a softmax nothing tells."""
    scale = 2.0**17
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2), nn.Softmax(1)).eval()
    with torch.no_grad():
        model[0].weight[:], model[0].bias[:] = 1, 64
        model[2].weight[:] = torch.tensor([[0.0], [scale]])
        model[2].bias[:] = torch.tensor([0.0, -64.5 * scale])
    data = Data([[0.2], [0.0], [1.0]], names=("x",), dtype=torch.float32)
    found = judged(model, data, sample="0", features="x", ranges="0:100", stability="0", sampled=2000)
    assert found["rounding_error"] >= 0.5
    assert not found["sampled_failures"][0] > 0


def test_a_model_in_training_mode_is_judged_in_eval_mode_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    model.double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = judged(model, Data(square()), sample="0", features="0,1", sampled=100)
    assert found["rounding_error"] < 1e-12
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises(OptionError, match="is not finite"):
        judged(net(([1.0, 0.0], -0.5)), Data(square()), sample="0", features="0,1", threshold=threshold)


def test_with_any_gap_tolerated_something_is_found_still():
    model = two_classes([1.0, 0.0], -0.5)
    data = Data([[0.0, 0.0], [1.0, 1.0]])
    found = judged(model, data, sample="0", features="0", tolerance=1.0, stability="0")
    assert found["distance"][0] >= 0.5 * (1 - 1e-6)


def test_a_volume_is_part_of_the_allowed_ranges_whatever_the_directions(facts):
    """Class 1 is decided where x < 0.3; x may only shrink and y only grow, from 0.5 each."""
    data = Data([[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]], names=("x", "y"))
    file = facts('[features.x]\ndirection = "down"\n[features.y]\ndirection = "up"\n')
    model = two_classes([-1.0, 0.0], 0.3)
    found = judged(model, data, sample="0", features="x,y", feature_file=file, stability="0", sampled=100)
    sides = found["box_high"][0] - found["box_low"][0]
    assert found["volume"][0] == pytest.approx(np.prod(sides), rel=1e-6)
    assert found["volume"][0] == pytest.approx(0.3 * 0.5, rel=0.01)


def test_the_nearest_correction_says_which_class_it_is_of():
    """A sliver of class 1 at 0.3, too thin to be stable, and class 2 from 0.6 on."""
    hidden = (np.ones((3, 1)), [-0.29, -0.3, -0.31])
    model = net(hidden, ([[0, 0, 0], [300, -600, 300], [20, 0, 0]], [0.0, -1.0, -6.2]))
    data = Data([[0.0], [1.0]], names=("x",))
    found = judged(model, data, sample="0", features="x", target="any", stability="0.02", sampled=100)
    assert found["nearest"][0, 0] == pytest.approx(0.3, abs=0.01)
    assert (found["nearest_target"][0], found["target"][0]) == (1, 2)


def test_what_is_too_large_for_anything_stable_is_unsupported_and_not_a_matter_of_time(monkeypatch):
    monkeypatch.setattr(_corrections_search, "TOO_LARGE", 10.0)
    model, data = trained()
    found = judged(model, data, sample=samples_of(model, data, 0), target="1", budget=2.0)
    assert found["outcome"][0] == "unsupported"
    assert found["nearest_outcome"][0] == "bounded"
    assert np.isnan(found["stable_distance"][0])
    assert found["distance"][0] > 0
    assert found.converged
    assert any("nothing stable can be verified" in note for note in found.notes)
