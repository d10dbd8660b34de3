"""The ways to change an input, the search over all of them, boxes, and what holds over a run."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _correction_cases import (
    Data,
    axes,
    balanced,
    decided,
    net,
    noisy,
    random_net,
    samples_of,
    square,
    trained,
    two_classes,
)

from dynprobe.analyzers import OptionError, _corrections_search
from dynprobe.analyzers._corrections_boxes import ReportedBox, box_inputs, holds, overlap, sample_box
from dynprobe.analyzers._corrections_columns import Columns
from dynprobe.analyzers._corrections_features import read_features
from dynprobe.analyzers._corrections_model import Classifier
from dynprobe.analyzers._corrections_record import Record, counted
from dynprobe.analyzers._corrections_search import Found, nearest
from dynprobe.analyzers._corrections_ways import Rules, domain, most_changed, shown_of, units_of, ways_of
from dynprobe.analyzers.core.contract import declaration_of
from dynprobe.analyzers.core.loop import Job, MemoryStore, checkpoint_units, measure, piece_key
from dynprobe.analyzers.core.result import FAILED, OK
from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.analyzers.corrections import corrections


def setting(model, data, *, max_changed=0, norm="l1", margin=1e-6, **options):
    """Rules, and the network as it decides."""
    table = read_features(data, **options)
    classifier = Classifier(model, data[0][0], None)
    return Rules(table, norm, max_changed or len(table.names) + len(table.groups), margin), classifier


def search(ways, *, stable=True, tolerance=1e-3, seconds=20.0, **more):
    deadline = time.monotonic() + seconds
    return nearest(ways, stable=stable, deadline=deadline, tolerance=tolerance, seed=0, **more)


def rejected(model, data):
    """An input for which class 0 is decided."""
    return data[0][0][int(samples_of(model, data, 0))].numpy()


# The portfolio


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("stable", [False, True])
def test_a_milp_and_branch_and_bound_find_the_same_distance(norm, stable, monkeypatch):
    for seed in (0, 2):
        data = Data(square(k=3, seed=seed))
        model = balanced([3, 8, 6, 2], seed, data[0][0])
        rules, classifier = setting(model, data, norm=norm)
        point = rejected(model, data)
        branching = search(ways_of(rules, classifier, point, [1]), stable=stable)
        monkeypatch.setattr(_corrections_search, "FEW", 2)  # more features than that are many
        solving = search(ways_of(rules, classifier, point, [1]), stable=stable)
        monkeypatch.undo()
        assert "milp" in solving.solver or solving.solver == "heuristic"
        assert branching.solver == "branch and bound"
        for found in (branching, solving):
            assert found.outcome(1e-3, smooth=False) == "optimal"
        assert max(branching.lower, solving.lower) <= min(branching.upper, solving.upper)
        assert solving.upper == pytest.approx(branching.upper, rel=2e-3)


def test_what_branching_leaves_open_is_closed_by_a_milp():
    data = Data(square(k=3, seed=1))
    model = balanced([3, 8, 6, 2], 1, data[0][0])
    rules, classifier = setting(model, data)
    found = search(ways_of(rules, classifier, rejected(model, data), [1]), tolerance=0.01)
    assert found.solver == "milp"  # branching alone takes ten times as long
    assert found.outcome(0.01, smooth=False) == "optimal"


def test_both_prove_that_there_is_none(monkeypatch):
    model, data = two_classes([1.0, 1.0, 1.0], -3.5), Data(square(k=3))
    rules, classifier = setting(model, data)
    for few in (5, 2):
        monkeypatch.setattr(_corrections_search, "FEW", few)
        found = search(ways_of(rules, classifier, rejected(model, data), [1]))
        assert found.lower == math.inf
        assert found.outcome(0.01, smooth=False) == found.outcome(0.01, smooth=True) == "none_exists"


def test_a_limit_of_time_is_kept_and_what_is_found_before_it_holds():
    model, data = random_net([8, 40, 40, 40, 2], 3), Data(square(k=8))
    rules, classifier = setting(model, data)
    point = rejected(model, data)
    start = time.monotonic()
    ways = ways_of(rules, classifier, point, [1])
    found = search(ways, seconds=0.3, tolerance=0.0)
    assert time.monotonic() - start < 2
    longer = search(ways, seconds=1.0, tolerance=0.0)  # goes on from there
    assert found.lower <= longer.lower <= longer.upper <= found.upper
    assert longer.way is not None
    low, high = longer.way.judgement.box_around(longer.centre)
    points = low + np.random.default_rng(0).random((5000, 8)) * (high - low)
    assert (longer.way.judgement.values(points) >= rules.margin).all()


def test_the_best_of_all_ways_ends_the_search_of_those_that_cannot_be_nearer():
    # features a and b need 0.2 each for themselves, c would need 0.9: it is not looked at for long
    model, data = two_classes([3.0, 3.0, 1.0], -4.0), Data(square(k=3), names="abc")
    rules, classifier = setting(model, data, max_changed=1, stability="0")
    point = np.array([0.5, 0.5, 0.05])
    ways = ways_of(rules, classifier, point, [1])
    found = search(ways)
    assert [way.columns for way in ways] == [(0,), (1,), (2,)]
    assert found.way.columns in ((0,), (1,))
    assert found.upper == pytest.approx((4.0 - 3.05) / 3, rel=1e-3)


def test_a_known_correction_is_where_the_search_starts():
    model, data = trained()
    rules, classifier = setting(model, data)
    point = rejected(model, data)
    first = search(ways_of(rules, classifier, point, [1]), tolerance=0.01)
    (way,) = ways_of(rules, classifier, point, [1])
    again = nearest(
        [way], stable=True, deadline=time.monotonic() + 20, tolerance=0.5, seed=0, seeds=[(way, first.centre)]
    )
    assert again.upper <= first.upper * (1 + 1e-9)


# The ways


def test_ways_are_all_subsets_up_to_the_size_and_the_widest_are_told():
    model, data = random_net([4, 5, 2], 0), Data(square(k=4))
    rules, classifier = setting(model, data, max_changed=2)
    ways = ways_of(rules, classifier, data[0][0][0].numpy(), [1])
    assert sorted(len(way.columns) for way in ways) == [1] * 4 + [2] * 6
    assert {way.columns for way in ways if way.is_widest} == {w.columns for w in ways if len(w.columns) == 2}
    every, classifier = setting(model, data)
    assert [w.columns for w in ways_of(every, classifier, data[0][0][0].numpy(), [1])] == [(0, 1, 2, 3)]


def test_a_floor_from_one_look_at_each_subset_is_below_its_distance():
    model, data = random_net([7, 16, 2], 1), Data(square(k=7))
    rules, classifier = setting(model, data, max_changed=2)
    ways = ways_of(rules, classifier, rejected(model, data), [1])
    assert len(ways) == 28
    assert any(way.floor > 0 for way in ways)
    for way in ways:
        alone = search([replace(way, floor=0.0, _search={})], stable=False, tolerance=0.01)
        assert way.floor <= alone.upper * (1 + 1e-9)


def test_without_time_for_a_look_at_each_subset_there_are_no_floors():
    model, data = random_net([7, 16, 2], 1), Data(square(k=7))
    rules, classifier = setting(model, data, max_changed=2)
    ways = ways_of(rules, classifier, rejected(model, data), [1], deadline=time.monotonic() - 1)
    assert len(ways) == 28
    assert all(way.floor == 0 for way in ways)


def test_what_one_look_excludes_is_excluded_by_linear_bounds():
    model, data = two_classes([1.0] * 7, -7.5), Data(square(k=7))
    rules, classifier = setting(model, data, max_changed=2)
    found = search(ways_of(rules, classifier, rejected(model, data), [1]))
    assert (found.lower, found.solver) == (math.inf, "linear bounds")


def test_too_many_ways_are_refused_with_their_number():
    model, data = random_net([30, 4, 3], 0), Data(square(k=30))
    rules, classifier = setting(model, data, max_changed=5)
    with pytest.raises(OptionError, match="174,436 ways, times 2 classes"):
        ways_of(rules, classifier, data[0][0][0].numpy(), [1, 2])


@pytest.mark.parametrize(("k", "asked", "most"), [(3, 0, 3), (5, 0, 5), (6, 0, 2), (150, 0, 150), (9, 3, 3)])
def test_how_many_may_change_follows_from_how_many_there_are(k, asked, most):
    table = read_features(Data(square(k=k)))
    assert most_changed(asked, table, "box") == most


def test_the_judged_value_is_always_allowed():
    model, data = random_net([2, 4, 2], 0), Data(square(), names="ab")
    rules, _classifier = setting(model, data, ranges="0.4:0.6")
    low, high = domain(rules.table, np.array([0.1, 0.9]))
    np.testing.assert_allclose(low, [0.1, 0.4])
    np.testing.assert_allclose(high, [0.6, 0.9])


def test_units_and_values_are_each_others_inverse():
    data = Data(square() * 30 + 5, offset=[10, 12], scale=[4, 7])
    model = random_net([2, 4, 2], 0)
    rules, classifier = setting(model, data)
    (way,) = ways_of(rules, classifier, data[0][0][3].numpy(), [1])
    units = np.random.default_rng(0).random((5, 2))
    np.testing.assert_allclose(units_of(rules.table, way, shown_of(rules.table, way, units)), units)
    np.testing.assert_allclose(shown_of(rules.table, way, np.zeros(2)), rules.table.low)
    # and the restricted network is the network
    shown = shown_of(rules.table, way, units)
    outputs = classifier.network(rules.table.inputs(shown))
    expected = outputs[:, 1] - outputs[:, 0]
    np.testing.assert_allclose(way.judgement.network(units)[:, 0], expected, rtol=1e-10)


@pytest.mark.parametrize(("norm", "total", "left"), [("l1", 0.7, 0.2), ("linf", 0.4, 0.6)])
def test_a_category_adds_to_the_distance_or_is_its_floor(norm, total, left):
    model, data = random_net([2, 4, 2], 0), Data(square())
    rules, classifier = setting(model, data, norm=norm)
    (way,) = ways_of(rules, classifier, data[0][0][0].numpy(), [1])
    way = replace(way, base=0.4)
    assert way.total(0.3 if norm == "l1" else 0.2) == pytest.approx(total)
    assert way.remaining(0.6) == pytest.approx(left)
    assert way.remaining(0.1) < 0


# Boxes


def boxes(seed=0):
    """A network, a point, and a box in its units that is all class 1 on a grid."""
    model, data = trained(seed=seed)
    rules, classifier = setting(model, data)
    return model, rules, classifier, Columns.of(rules.table), rejected(model, data)


def test_a_box_holds_exactly_where_a_dense_grid_says_so():
    model, rules, classifier, columns, point = boxes()
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(60):
        low = rng.random(2)
        high = np.minimum(low + 0.2 * rng.random(2), 1)
        box = ReportedBox(low, high)
        verdict = holds(classifier, columns, point, box, 1, rules.margin, time.monotonic() + 10)
        expected = bool((decided(model, low + axes(201) * (high - low)) == 1).all())
        assert verdict.holds == expected
        seen.append(expected)
        tried, failed = sample_box(classifier, columns, point, box, 1, 4000, 0, time.monotonic() + 10)
        assert tried == 4000
        assert not (expected and failed)
    assert 5 < sum(seen) < 55


def test_failures_at_a_corner_alone_are_met_by_sampling():
    # class 1 everywhere but in one corner of half a thousandth of the box
    model, data = two_classes([-1.0, -1.0], 1.97), Data(square())
    rules, classifier = setting(model, data)
    box = ReportedBox(np.zeros(2), np.ones(2))
    columns = Columns.of(rules.table)
    _, failed = sample_box(classifier, columns, np.zeros(2), box, 1, 1000, 0, time.monotonic() + 10)
    assert failed >= 1


def test_what_does_not_move_in_a_box_keeps_its_bits():
    values = np.random.default_rng(0).random((20, 3)) * 100
    data = Data(values, offset=values.mean(0), scale=values.std(0), dtype=torch.float32)
    rules, _classifier = setting(random_net([3, 4, 2], 0).float(), data)
    columns = Columns.of(rules.table)
    point = data[0][0][5].double().numpy()
    own = columns.shown(point)
    low, high = own.copy(), own.copy()
    low[1], high[1] = 10, 20
    corners = box_inputs(columns, point, ReportedBox(low, high))[:2]
    for corner in corners:
        assert (corner[[0, 2]] == point[[0, 2]]).all()


def box(low, high):
    return ReportedBox(np.array(low, float), np.array(high, float))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (box([0, 0], [1, 1]), box([0, 0], [1, 1]), 1.0),
        (box([0, 0], [1, 1]), box([0.5, 0], [1.5, 1]), 0.5 / 1.5),
        (box([0, 0], [1, 1]), box([2, 0], [3, 1]), 0.0),
        (box([0, 5], [1, 5]), box([0.5, 5], [1, 5]), 0.5),  # one feature moves
        (box([0, 5], [1, 5]), box([0, 4], [1, 4]), 0.0),  # and the other stands elsewhere
        (box([0, 5], [1, 5]), box([0.5, 4], [0.5, 6]), 0.0),  # each moves another one
        (box([np.nan] * 2, [np.nan] * 2), box([0, 0], [1, 1]), np.nan),
    ],
)
def test_overlap_is_intersection_over_union(a, b, expected):
    np.testing.assert_allclose(overlap(a, b), expected)
    np.testing.assert_allclose(overlap(b, a), expected)


# Records


def test_a_record_survives_the_store_of_parts():
    record = Record(np.array([1.0, 2.0]), 1, 0, "optimal", solver="branch and bound", notes=["one", "two"])
    record.polygon = np.ones((3, 2))
    again = Record.of_arrays(record.as_arrays())
    for name, value in vars(record).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert isinstance(again.decided, int)


def test_counts_are_those_of_the_outcomes():
    def ended(outcome, upper=math.nan, lower=math.nan, held=math.nan):
        return Record(
            np.zeros(1), 0, 1, outcome, stable_distance=upper, stable_lower_bound=lower, previous_holds=held
        )

    counts = counted(
        [
            ended("optimal", 0.2, 0.199, 1.0),
            ended("bounded", 0.4, 0.3, 0.0),
            ended("none_exists", held=1.0),
            ended("timeout", lower=0.1),
            ended("already_target"),
        ],
        0.01,
    )
    assert counts["judged"] == 5
    assert counts["correctable"] == 2
    assert counts["not_correctable"] == counts["on_target"] == 1
    assert counts["still_open"] == 2
    assert counts["distance_median"] == pytest.approx(0.3)
    assert counts["distance_median_gap"] == pytest.approx(0.3 - 0.2495)
    assert counts["still_hold"] == pytest.approx(2 / 3)
    share = (2 + 2) / 7
    assert counts["still_hold_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 7))


@pytest.mark.parametrize(
    ("found", "smooth", "outcome"),
    [
        (Found(math.inf, math.inf, None, None, "", 1), False, "none_exists"),
        (Found(0.1, math.inf, None, None, "", 1), False, "timeout"),
        (Found(0.0, 0.0, "way", None, "", 1), False, "optimal"),
        (Found(0.995, 1.0, "way", None, "", 1), False, "optimal"),
        (Found(0.995, 1.0, "way", None, "", 1), True, "bounded"),
        (Found(0.9, 1.0, "way", None, "", 1), False, "bounded"),
    ],
)
def test_an_outcome_says_how_the_search_ended(found, smooth, outcome):
    assert found.outcome(0.01, smooth=smooth) == outcome


# Runs of checkpoints


@dataclass
class Loaded:
    state: dict
    hash: str
    notes: list = field(default_factory=list)


@dataclass
class Stored:
    """A checkpoint without a file."""

    state: dict
    step: int
    run: str

    @property
    def path(self):
        return Path(f"{self.run}/step_{self.step}.pt")

    def load(self):
        return Loaded(dict(self.state), f"{self.run} {self.step}")


def make_run(name, models, data):
    """A run of these models, which are alike."""
    checkpoints = [Stored(model.state_dict(), 10 * i, name) for i, model in enumerate(models)]
    setup = Setup(
        make_model=lambda: copy.deepcopy(models[0]),
        fit=lambda model, state, where: (state, []),
        make_batches=lambda: data,
        make_test_batches=lambda: None,
        make_loss=lambda: None,
        open_other=lambda path: checkpoints[0],
        device=torch.device("cpu"),
        dtype=next(models[0].parameters()).dtype,
    )
    run = Run(name, checkpoints, setup)
    run.others = [run]
    return run


def measured(run, **options):
    """Pieces of all checkpoints of a run."""
    job = Job(declaration_of(corrections), {"budget": 20.0, "sampled": 0, **options})
    units = checkpoint_units(run, run.checkpoints)
    return [piece for piece, _ in measure(job, units, MemoryStore())]


def values(piece, name):
    return piece.arrays[name].values


def test_boxes_are_tried_on_the_last_checkpoint_of_every_run():
    model, data = trained()
    first = make_run("first", [noisy(model, 0.3, 1), model], data)
    second = make_run("second", [model, noisy(model, 0.04, 2)], data)
    first.others = second.others = [first, second]
    sample = samples_of(model, data, 0, n=3)
    seen = []
    for run in (first, second):
        pieces = measured(run, sample=sample, target="1", transfer=True)
        assert values(pieces[-1], "other").tolist() == ["first", "second"]
        for piece in pieces:
            for i, j in np.ndindex(3, 2):
                low, high = values(piece, "box_low")[i], values(piece, "box_high")[i]
                if np.isnan(low).any():
                    assert np.isnan(values(piece, "transfer")[i, j])
                    continue
                there = (first, second)[j].model("last")
                expected = float((decided(there, low + axes(201) * (high - low)) == 1).all())
                assert values(piece, "transfer")[i, j] == expected
                seen.append(expected)
        own = values(pieces[-1], "transfer")[:, (first, second).index(run)]
        assert set(own[np.isfinite(own)]) == {1.0}
    assert set(seen) == {0.0, 1.0}


def test_a_box_holds_on_another_run_only_with_the_margin_of_that_runs_own_rounding_error():
    """Both decide for class 1 from 0.5 on, but the second adds 4096 on the way, in float32."""
    data = Data(np.linspace(0, 1, 21)[:, None], names=("x",), dtype=torch.float32)
    exact, rough = (net(([1.0], shift), ([1.0], -shift - 0.5)).float() for shift in (0.0, 4096.0))
    first, second = make_run("first", [exact], data), make_run("second", [rough], data)
    first.others = second.others = [first, second]
    options = {"sample": "4", "features": "x", "stability": "0", "transfer": True}
    (of_exact,), (of_rough,) = (measured(run, **options) for run in (first, second))
    assert values(of_exact, "margin")[0] < 1e-5 < 1e-4 < values(of_rough, "margin")[0]
    assert values(of_exact, "transfer")[0].tolist() == [1.0, 0.0]
    assert values(of_rough, "transfer")[0].tolist() == [1.0, 1.0]


def test_what_stands_in_for_a_broken_last_checkpoint_is_part_of_the_key():
    model, data = trained()
    keys = []
    for before in (noisy(model, 0.2, 3), noisy(model, 0.2, 4)):
        run = make_run("run", [model, before, noisy(model, math.nan)], data)
        run.checkpoints[1].run = f"run {len(keys)}"  # hashes are made of names here
        job = Job(declaration_of(corrections), {"samples": "3"})
        keys.append(piece_key(job, checkpoint_units(run, run.checkpoints[:1])[0]))
    assert keys[0] != keys[1]


def test_transfer_without_runs_is_refused():
    model, data = trained()
    with pytest.raises(OptionError, match="runs of the call"):
        corrections(model, data, transfer=True)


def test_a_broken_last_checkpoint_leaves_the_decision_to_the_one_before_and_the_others_are_measured():
    model, data = trained()
    good = noisy(model, 0.2, 3)
    broken = noisy(model, math.nan)
    run = make_run("run", [model, good, broken], data)
    pieces = measured(run, samples="misclassified:4")
    assert [piece.status for piece in pieces] == [OK, OK, FAILED]
    inputs, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]).numpy()
    wrong = np.flatnonzero(decided(good, inputs) != labels)
    for piece in pieces[:2]:
        assert set(values(piece, "sample")) <= set(wrong)
        assert len(values(piece, "sample")) == min(4, len(wrong))
        assert any("step 10" in note and "last checkpoint cannot be used" in note for note in piece.notes)
    assert "nan" in pieces[2].reason.lower()


def test_the_samples_and_targets_of_a_run_are_those_of_its_last_checkpoint():
    model, data = trained()
    early = noisy(model, 0.6, 4)
    run = make_run("run", [early, model], data)
    pieces = measured(run, samples="6", seed=3)
    inputs = torch.cat([x for x, _ in data])
    assert values(pieces[0], "sample").tolist() == values(pieces[1], "sample").tolist()
    numbers = values(pieces[0], "sample")
    final = decided(model, inputs[numbers])
    for piece in pieces:
        assert (values(piece, "target") == 1 - final).all()
    at_first = decided(early, inputs[numbers])
    assert (values(pieces[0], "decided") == at_first).all()
    already = values(pieces[0], "outcome") == "already_target"
    assert (already == (at_first != final)).all()
