"""The largest empty box is that of brute force; verified boxes hold, and none is larger than the bound."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from dynprobe.analyzers.numerics import empty_boxes
from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.empty_boxes import EmptyBoxes
from dynprobe.analyzers.numerics.largest_box import LargestBox, largest_box
from dynprobe.analyzers.numerics.layered_network import Floats, Layer, LayeredNetwork, piecewise


def relu_network(sizes: list[int], seed: int) -> LayeredNetwork:
    generator = np.random.default_rng(seed)
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        matrix = generator.normal(size=(n_out, n_in)) * np.sqrt(2 / n_in) * (2 if i == 0 else 1)
        activation = piecewise(0.0, 1.0, n_out) if i < len(sizes) - 2 else None
        layers.append(Layer(((i, matrix),), generator.normal(size=n_out) / 2, activation))
    return LayeredNetwork(sizes[0], tuple(layers))


def linear(rows: Floats, offset: Floats) -> LayeredNetwork:
    return LayeredNetwork(rows.shape[1], (Layer(((0, rows),), offset, None),))


def judgement(network: LayeredNetwork, margin: float = 0.0, **changed: Floats) -> Judgement:
    k = network.n_inputs
    arguments = {"low": np.zeros(k), "high": np.ones(k), **changed}
    return Judgement(
        network, np.zeros(k), weights=np.ones(k), radius=np.full(k, 0.02), margin=margin, **arguments
    )


def random_case(sizes: list[int], seed: int) -> tuple[Judgement, Floats]:
    """A network and a point whose stable box holds, with a third of the domain a correction."""
    network = relu_network(sizes, seed)
    points = np.random.default_rng(seed).random((3000, sizes[0]))
    values = network(points).min(1)
    case = judgement(network, float(np.quantile(values, 0.67)))
    for point in points[np.argsort(-values)[100::7]]:
        if verify(network, *case.box_around(point), case.margin).holds:
            return case, point
    raise AssertionError("no stable point")


def found_around(case: Judgement, point: Floats, seconds: float = 5.0) -> LargestBox:
    return largest_box(case, point, *case.box_around(point), deadline=time.monotonic() + seconds)


def brute_force(case: Judgement, point: Floats, n_ticks: int, finer: int) -> float:
    """Largest volume of boxes with corners on a grid and no violating point of a finer grid."""
    k = len(point)
    low, high = case.box_around(point)
    ticks = np.linspace(0, 1, n_ticks * finer + 1)
    grid = np.stack(np.meshgrid(*[ticks] * k, indexing="ij"), -1).reshape(-1, k)
    bad = (case.values(grid) < case.margin).reshape([len(ticks)] * k).astype(np.int64)
    total = np.pad(bad, [(1, 0)] * k)
    for axis in range(k):
        total = total.cumsum(axis)
    corners = np.arange(0, len(ticks), finer)
    first = [corners[ticks[corners] <= low[j]] for j in range(k)]
    last = [corners[ticks[corners] >= high[j]] for j in range(k)]
    count, volume = 0, 1.0
    axes = [len(a) for pair in zip(first, last, strict=True) for a in pair]
    for sides in itertools.product((0, 1), repeat=k):
        index = []
        for j, side in enumerate(sides):
            shape = [1] * (2 * k)
            shape[2 * j + side] = axes[2 * j + side]
            index.append((last[j] + 1 if side else first[j]).reshape(shape))
        count = count + (-1) ** (k - sum(sides)) * total[tuple(index)]
    for j in range(k):
        shape = [1] * (2 * k)
        shape[2 * j], shape[2 * j + 1] = axes[2 * j], axes[2 * j + 1]
        volume = volume * (ticks[last[j]][None] - ticks[first[j]][:, None]).reshape(shape)
    return float(np.where(np.broadcast_to(count, axes) == 0, volume, 0.0).max())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_largest_empty_box_among_random_points_is_that_of_brute_force(k: int) -> None:
    for seed in range(6):
        generator = np.random.default_rng(seed)
        points = generator.random((9, k))
        low, high = np.full(k, 0.45), np.full(k, 0.55)
        points = points[((points < low) | (points > high)).any(1)]
        boxes = EmptyBoxes(np.zeros(k), np.ones(k), low, high)
        boxes.add(points)
        found = boxes.largest()
        starts = [np.r_[0.0, points[points[:, j] < low[j], j]] for j in range(k)]
        ends = [np.r_[1.0, points[points[:, j] > high[j], j]] for j in range(k)]
        best = 0.0
        for start in itertools.product(*starts):
            for end in itertools.product(*ends):
                if not ((points > start) & (points < end)).all(1).any():
                    best = max(best, float(np.prod(np.subtract(end, start))))
        assert found is not None
        assert boxes.bound == pytest.approx(best, rel=1e-9)
        assert not len(boxes.inside(found.low, found.high))
        assert (found.low <= low).all()
        assert (found.high >= high).all()


def test_a_point_on_the_edge_of_the_domain_is_avoided() -> None:
    boxes = EmptyBoxes(np.zeros(2), np.ones(2), np.full(2, 0.4), np.full(2, 0.6))
    boxes.add(np.array([[1.0, 0.5]]))
    found = boxes.largest()
    assert found is not None
    assert found.high[0] < 1.0
    assert boxes.bound == pytest.approx(1.0)


def test_a_point_within_the_inner_box_leaves_no_box() -> None:
    boxes = EmptyBoxes(np.zeros(2), np.ones(2), np.full(2, 0.4), np.full(2, 0.6))
    boxes.add(np.array([[0.5, 0.5]]))
    assert boxes.largest() is None
    assert boxes.bound == 0.0


def test_halving_keeps_every_box_that_avoids_the_points() -> None:
    boxes = EmptyBoxes(np.zeros(2), np.ones(2), np.full(2, 0.4), np.full(2, 0.6))
    boxes.add(np.array([[0.8, 0.9], [0.1, 0.2]]))
    assert boxes.largest() is not None
    best = boxes.bound
    assert boxes.halve()
    assert boxes.largest() is not None
    assert boxes.bound == pytest.approx(best)


@pytest.mark.parametrize("slopes", [(1.0, 2.0), (1.0, 0.3, 0.5)])
def test_largest_box_in_a_half_space_is_that_of_a_grid_of_corners(slopes: tuple[float, ...]) -> None:
    k = len(slopes)
    case = judgement(linear(-np.array([slopes]), np.array([0.6 * sum(slopes)])))
    point = np.full(k, 0.3)
    found = found_around(case, point)
    ticks = np.linspace(0.32, 1, 69)
    corners = np.stack(np.meshgrid(*[ticks] * k), -1).reshape(-1, k)
    best = corners[case.values(corners) >= 0].prod(1).max()
    assert 0.95 * best <= found.volume <= found.volume_bound + 1e-12
    assert found.volume_bound >= best
    assert found.volume >= 0.95 * found.volume_bound


def test_box_of_a_network_that_holds_everywhere_is_the_domain() -> None:
    case = judgement(linear(np.ones((1, 4)), np.ones(1)))
    found = found_around(case, np.full(4, 0.5))
    assert (found.low == 0).all()
    assert (found.high == 1).all()
    assert found.volume == found.volume_bound == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_volume_in_two_features_is_within_5_percent_of_brute_force(seed: int) -> None:
    case, point = random_case([2, 12, 12, 2], seed)
    found = found_around(case, point)
    best = brute_force(case, point, 40, 5)
    error = 4 / 200  # boxes of the grid may stick out by less than one of its finer steps at every face
    assert found.volume >= 0.95 * (best - error)
    assert found.volume >= 0.95 * found.volume_bound
    assert found.volume_bound >= best - error


@pytest.mark.parametrize("seed", range(2))
def test_volume_in_three_features_is_within_5_percent_of_brute_force(seed: int) -> None:
    case, point = random_case([3, 10, 10, 1], seed)
    found = found_around(case, point)
    best = brute_force(case, point, 16, 3)
    assert found.volume >= 0.9 * best
    assert found.volume >= 0.95 * found.volume_bound
    assert found.volume_bound >= best - 6 / 48 * best ** (2 / 3)


def test_no_violation_in_200000_samples_of_boxes_of_many_networks() -> None:
    generator = np.random.default_rng(0)
    for seed in range(20):
        k = 2 + seed % 3
        case, point = random_case([k, 8, 8, 1 + seed % 2], seed)
        found = found_around(case, point, 0.2)
        low, high = case.box_around(point)
        assert (found.low <= low).all()
        assert (found.high >= high).all()
        assert (found.low >= 0).all()
        assert (found.high <= 1).all()
        share = generator.random((10_000, k))
        share[:1000] = np.round(share[:1000])
        assert case.values(found.low + share * (found.high - found.low)).min() >= case.margin
        assert found.volume <= found.volume_bound


def test_faces_of_integer_features_have_allowed_values_and_the_inner_box_is_kept() -> None:
    spacing, origin = np.array([0.1, 0.0]), np.array([0.0, 0.0])
    case = judgement(linear(np.array([[-1.0, -1.0]]), np.array([1.13])), spacing=spacing, origin=origin)
    low, high = np.array([0.37, 0.4]), np.array([0.42, 0.45])
    found = largest_box(case, (low + high) / 2, low, high, deadline=time.monotonic() + 5)
    assert found.low[0] == 0
    assert found.high[0] == pytest.approx(0.6)  # 0.5 x 0.63 is less than 0.6 x 0.53
    assert found.volume >= 0.95 * 0.6 * 0.53
    assert found.volume_bound >= 0.6 * 0.53 - 1e-9


def test_features_without_a_range_do_not_count_for_the_volume() -> None:
    flat = judgement(
        linear(np.array([[-1.0, -1.0]]), np.array([1.0])), low=np.array([0.0, 0.5]), high=np.array([1.0, 0.5])
    )
    found = largest_box(
        flat, np.array([0.2, 0.5]), np.array([0.2, 0.5]), np.array([0.2, 0.5]), deadline=time.monotonic() + 5
    )
    assert found.volume == pytest.approx(0.5, rel=0.05)
    assert 0.5 - 1e-9 <= found.volume_bound <= 0.53
    assert found.low[1] == found.high[1] == 0.5


def test_box_that_can_have_no_volume_is_still_grown() -> None:
    case = judgement(linear(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([-0.3, 0.3])))  # only x = 0.3
    point = np.array([0.3, 0.5])
    found = largest_box(case, point, point, point, deadline=time.monotonic() + 1)
    assert found.volume == 0
    assert found.low[1] == 0
    assert found.high[1] == 1


def test_a_deadline_that_has_passed_leaves_the_inner_box_and_a_valid_bound() -> None:
    case, point = random_case([2, 12, 12, 2], 0)
    found = found_around(case, point, -1.0)
    assert (found.low == case.box_around(point)[0]).all()
    assert found.volume <= found_around(case, point).volume <= found.volume_bound <= 1


def test_many_features_end_at_the_deadline_with_a_box_and_a_bound() -> None:
    case, point = random_case([15, 10, 1], 1)
    start = time.monotonic()
    found = found_around(case, point, 0.7)
    assert time.monotonic() - start < 2.5
    low, high = case.box_around(point)
    assert 0 < found.volume <= found.volume_bound <= 1
    assert (found.high - found.low).sum() > 1.5 * (high - low).sum()


def test_hundreds_of_features_end_at_the_deadline() -> None:
    generator = np.random.default_rng(0)
    k, hidden = 784, 64
    network = LayeredNetwork(
        k,
        (
            Layer(((0, generator.normal(size=(hidden, k)) / 28),), np.zeros(hidden), piecewise(0, 1, hidden)),
            Layer(((1, generator.normal(size=(9, hidden)) / 8),), np.zeros(9), None),
        ),
    )
    point = generator.random(k)
    case = judgement(network, float(network(point[None]).min() - 0.05))
    seconds, start = 0.5, time.monotonic()
    found = largest_box(case, point, point - 1e-4, point + 1e-4, deadline=start + seconds)
    assert time.monotonic() - start < seconds + 0.5
    assert (found.low <= point - 1e-4).all()
    assert (found.high >= point + 1e-4).all()


def test_queue_that_is_full_leaves_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    k = 40
    boxes = EmptyBoxes(np.zeros(k), np.ones(k), np.full(k, 0.4), np.full(k, 0.6))
    boxes.add(generator.random((200, k)))
    monkeypatch.setattr(empty_boxes, "_MOST_NUMBERS", 10_000)
    assert boxes.largest() is None
    assert 0 < boxes.bound <= 1


def test_points_in_a_box_of_many_features_are_those_of_a_comparison() -> None:
    generator = np.random.default_rng(0)
    k = 70
    high = np.ones(k)
    high[[3, 40]] = 0.0  # without width: these do not count
    boxes = EmptyBoxes(np.zeros(k), high, np.zeros(k), np.zeros(k))
    points = generator.random((300, k)) ** 0.01
    boxes.add(points)
    wide = high > 0
    expected = points[((points >= 0.95) & (points <= 1))[:, wide].all(1)]
    assert 0 < len(expected) < 300
    assert (boxes.inside(np.full(k, 0.95), np.ones(k)) == expected).all()


def test_integer_features_without_room_are_searched_without_a_warning() -> None:
    low, high, inner = np.zeros(2), np.ones(2), np.full(2, 0.5)
    boxes = EmptyBoxes(low, high, inner, inner, spacing=np.array([1.0, 0.0]), origin=np.array([0.5, 0.0]))
    boxes.add(np.array([[0.5, 0.8], [0.5, 0.1]]))
    found = boxes.largest(above=-1.0)
    assert found is not None
    assert found.low == pytest.approx([0.5, 0.1])
    assert found.high == pytest.approx([0.5, 0.8])


def test_faces_on_a_grid_of_a_billion_steps_stay_where_they_are() -> None:
    generator = np.random.default_rng(0)
    width = 1e9
    for _ in range(100):
        low = float(generator.integers(-1000, 1000))
        at = (np.sort(generator.integers(0, int(width), (2, 1)), 0)) / width
        boxes = EmptyBoxes(
            np.zeros(1),
            np.ones(1),
            at[0],
            at[0],
            spacing=np.full(1, 1 / width),
            origin=np.full(1, -low / width),
        )
        found = np.concatenate(boxes.inwards(*at, at[1], at[0]))
        assert found == pytest.approx(at[:, 0], abs=1e-12)


def test_same_box_again() -> None:
    case, point = random_case([2, 12, 12, 1], 3)
    first, second = found_around(case, point, 30), found_around(case, point, 30)
    assert (first.low == second.low).all()
    assert (first.high == second.high).all()
    assert first.volume_bound == second.volume_bound
