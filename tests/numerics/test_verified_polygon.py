"""Verified polygons hold, contain what they have to, and none is larger than the bound."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.convex_polygon import (
    added_triangles,
    area,
    clip,
    contains,
    cross,
    hull,
    rectangle,
)
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.empty_polygons import EmptyPolygons
from dynprobe.analyzers.numerics.largest_box import largest_box
from dynprobe.analyzers.numerics.layered_network import Floats, Layer, LayeredNetwork, piecewise
from dynprobe.analyzers.numerics.verified_polygon import LargestPolygon, largest_polygon, verify_polygon


def relu_network(sizes: list[int], seed: int) -> LayeredNetwork:
    generator = np.random.default_rng(seed)
    layers = []
    for i in range(len(sizes) - 1):
        matrix = generator.normal(size=(sizes[i + 1], sizes[i])) * np.sqrt(2 / sizes[i]) * (1 + (i == 0))
        activation = piecewise(0.0, 1.0, sizes[i + 1]) if i < len(sizes) - 2 else None
        layers.append(Layer(((i, matrix),), generator.normal(size=sizes[i + 1]) / 2, activation))
    return LayeredNetwork(sizes[0], tuple(layers))


def judgement(network: LayeredNetwork, margin: float = 0.0) -> Judgement:
    zero, one = np.zeros(2), np.ones(2)
    return Judgement(network, zero, zero, one, one, np.full(2, 0.02), margin)


def random_case(seed: int) -> tuple[Judgement, Floats]:
    """A network and a point whose stable box holds, with a third of the domain a correction."""
    network = relu_network([2, 10, 10, 2], seed)
    points = np.random.default_rng(seed).random((3000, 2))
    values = network(points).min(1)
    case = judgement(network, float(np.quantile(values, 0.67)))
    for point in points[np.argsort(-values)[100::7]]:
        if verify(network, *case.box_around(point), case.margin).holds:
            return case, point
    raise AssertionError("no stable point")


def half_plane(normal: list[float], offset: float) -> LayeredNetwork:
    return LayeredNetwork(2, (Layer(((0, -np.array([normal])),), np.array([offset]), None),))


def disc(n_sides: int, radius: float) -> LayeredNetwork:
    """All outputs positive within a regular polygon around (0.5, 0.5), one output for every side."""
    angles = 2 * np.pi * np.arange(n_sides) / n_sides
    normals = np.stack([np.cos(angles), np.sin(angles)], 1)
    return LayeredNetwork(2, (Layer(((0, -normals),), radius + normals @ np.full(2, 0.5), None),))


def around(case: Judgement, point: Floats, seconds: float = 2.0) -> LargestPolygon:
    return largest_polygon(case, point, *case.box_around(point), deadline=time.monotonic() + seconds)


def samples_in(vertices: Floats, n: int, seed: int = 0) -> Floats:
    weights = np.random.default_rng(seed).dirichlet(np.full(len(vertices), 0.5), n)
    return np.asarray(np.concatenate([weights @ vertices, vertices]))


def is_convex(vertices: Floats) -> bool:
    edges = np.roll(vertices, -1, 0) - vertices
    return bool((cross(edges, np.roll(edges, -1, 0)) > 0).all())


def test_a_clipped_square_has_the_area_of_the_part() -> None:
    square = rectangle(np.zeros(2), np.ones(2))
    assert area(square) == 1
    assert area(clip(square, np.array([1.0, 1.0]), 1.0)) == pytest.approx(0.5)
    assert len(clip(square, np.array([1.0, 0.0]), -1.0)) == 0


def test_hull_of_points_contains_all_of_them_and_turns_left() -> None:
    points = np.random.default_rng(0).random((50, 2))
    vertices = hull(points)
    assert is_convex(vertices)
    assert contains(vertices, points, slack=1e-12).all()


def test_added_triangles_and_the_polygon_make_up_the_hull_with_the_point() -> None:
    vertices = hull(np.random.default_rng(1).random((20, 2)))
    point = np.array([1.5, 1.2])
    parts = added_triangles(vertices, point)
    whole = area(hull(np.concatenate([vertices, point[None]])))
    assert area(vertices) + sum(area(part) for part in parts) == pytest.approx(whole)
    assert not added_triangles(vertices, vertices.mean(0))


@pytest.mark.parametrize("seed", range(6))
def test_verifying_a_polygon_agrees_with_dense_samples(seed: int) -> None:
    network = relu_network([2, 12, 12, 2], seed)
    vertices = hull(np.random.default_rng(seed).random((6, 2)))
    least = float(network(samples_in(vertices, 40_000)).min())
    assert verify_polygon(network, vertices, least - 0.02).holds
    verdict = verify_polygon(network, vertices, least + 1e-6)
    assert verdict.holds is False
    assert verdict.counterexample is not None
    assert contains(vertices, verdict.counterexample[None], slack=1e-12).all()
    assert network(verdict.counterexample[None]).min() < least + 1e-6


def test_a_polygon_holds_whose_bounding_box_does_not() -> None:
    network = half_plane([1.0, 1.0], 1.001)
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert verify_polygon(network, triangle, 0.0).holds
    assert verify(network, np.zeros(2), np.ones(2), 0.0).holds is False


def test_verifying_a_polygon_says_undecided_when_the_limit_is_reached() -> None:
    network = relu_network([2, 12, 12, 2], 0)
    vertices = rectangle(np.zeros(2), np.ones(2))
    margin = float(network(samples_in(vertices, 40_000)).min()) - 1e-3
    assert verify_polygon(network, vertices, margin, max_boxes=1).holds is None
    assert verify_polygon(network, vertices, margin, deadline=time.monotonic() - 1).holds is None


def test_points_and_segments_are_verified_as_polygons() -> None:
    network = half_plane([1.0, 0.0], 0.5)
    assert verify_polygon(network, np.array([[0.5, 0.3]]), 0.0).holds
    assert verify_polygon(network, np.array([[0.0, 0.3], [0.5, 0.4]]), 0.0).holds
    assert verify_polygon(network, np.array([[0.0, 0.3], [0.6, 0.4]]), 0.0).holds is False


def test_polygon_in_a_half_plane_is_the_part_of_the_domain_in_it() -> None:
    case = judgement(half_plane([1.0, 1.5], 1.2))
    found = around(case, np.full(2, 0.3))
    exact = area(clip(rectangle(np.zeros(2), np.ones(2)), np.array([1.0, 1.5]), 1.2))
    assert 0.95 * exact <= found.area <= exact + 1e-9
    assert exact <= found.area_bound <= 1.1 * exact


def test_polygon_in_a_disc_has_nearly_its_area() -> None:
    found = around(judgement(disc(24, 0.35)), np.full(2, 0.5), 2.0)
    exact = 24 * 0.35**2 * np.tan(np.pi / 24)
    assert 0.85 * exact <= found.area <= exact + 1e-9
    assert exact <= found.area_bound
    assert len(found.vertices) <= 12


def test_polygon_in_the_whole_domain_is_the_domain() -> None:
    found = around(judgement(half_plane([1.0, 1.0], 3.0)), np.full(2, 0.3))
    assert found.area == pytest.approx(1.0)
    assert found.area_bound == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_polygon_of_a_random_network_is_convex_holds_and_contains_the_largest_box(seed: int) -> None:
    case, point = random_case(seed)
    box = largest_box(case, point, *case.box_around(point), deadline=time.monotonic() + 2)
    found = largest_polygon(case, point, box.low, box.high, deadline=time.monotonic() + 1.0)
    assert is_convex(found.vertices)
    assert contains(found.vertices, rectangle(box.low, box.high), slack=1e-12).all()
    assert (found.vertices >= 0).all()
    assert (found.vertices <= 1).all()
    assert box.volume <= found.area + 1e-12
    assert found.area <= found.area_bound <= 1
    assert len(found.vertices) <= 12
    assert case.values(samples_in(found.vertices, 20_000)).min() >= case.margin - 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_no_convex_set_that_avoids_the_points_is_larger_than_the_bound(seed: int) -> None:
    generator = np.random.default_rng(seed)
    inner = rectangle(np.full(2, 0.45), np.full(2, 0.55))
    points = generator.random((12, 2))
    sets = EmptyPolygons(np.zeros(2), np.ones(2), inner)
    sets.add(points)
    sets.focus()
    before = sets.bound
    for _ in range(40):
        sets.halve()
    assert sets.bound < before
    # lines through the points at random angles that leave the inner polygon on one side
    points = sets.points
    best = 0.0
    for _ in range(150):
        polygon = rectangle(np.zeros(2), np.ones(2))
        for point in generator.permutation(points):
            angle = generator.random() * 2 * np.pi
            normal = np.array([np.cos(angle), np.sin(angle)])
            if contains(polygon, point[None], slack=-1e-9).all():
                while (inner @ normal).max() > normal @ point:
                    angle = generator.random() * 2 * np.pi
                    normal = np.array([np.cos(angle), np.sin(angle)])
                polygon = clip(polygon, normal, float(normal @ point))
        best = max(best, area(polygon))
    large = sets.large(0.0)
    assert best <= sets.bound
    assert 0.9 * best <= area(large) <= sets.bound
    assert not contains(large, points, slack=-1e-6).any()


def test_share_of_a_domain_without_width_is_unknown() -> None:
    case = Judgement(
        half_plane([1.0, 1.0], 1.0),
        np.zeros(2),
        np.array([0.0, 0.5]),
        np.array([1.0, 0.5]),
        np.ones(2),
        np.zeros(2),
        0.0,
    )
    found = largest_polygon(
        case, np.array([0.2, 0.5]), np.array([0.2, 0.5]), np.array([0.2, 0.5]), deadline=time.monotonic() + 1
    )
    assert np.isnan([found.area, found.area_bound]).all()
    assert (found.vertices == [0.2, 0.5]).all()


def test_a_deadline_that_has_passed_leaves_the_inner_box() -> None:
    case, point = random_case(0)
    found = around(case, point, -1.0)
    low, high = case.box_around(point)
    assert found.area == pytest.approx(float(np.prod(high - low)))
    assert found.area <= found.area_bound


def test_polygon_grows_from_a_single_point() -> None:
    case = judgement(half_plane([1.0, 0.2], 0.7))
    point = np.array([0.3, 0.4])
    found = largest_polygon(case, point, point, point, deadline=time.monotonic() + 1.5)
    assert found.area >= 0.9 * area(clip(rectangle(np.zeros(2), np.ones(2)), np.array([1.0, 0.2]), 0.7))
