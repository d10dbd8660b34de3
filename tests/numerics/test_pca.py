"""PCA of trajectories and projections against plain numpy on matrices small enough to hold."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from dynprobe.analyzers.numerics import pca as pca_module
from dynprobe.analyzers.numerics.pca import (
    axis_directions,
    principal_axes,
    project,
    random_walk_spectrum,
    trajectory_gram,
)

NAMES = ["a", "b"]


def states_of(matrix: np.ndarray, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """One state per row: 6 entries in `a` (2 x 3), the rest in `b`, and a buffer that must not count."""
    rows = torch.from_numpy(np.asarray(matrix)).to(dtype)
    return [{"a": r[:6].view(2, 3), "b": r[6:], "steps_seen": torch.tensor(i)} for i, r in enumerate(rows)]


def flat(direction: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([direction[name].flatten() for name in NAMES]).numpy()


def trajectory(n: int = 9, size: int = 20, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).standard_normal((n, size)), axis=0)


def analysed(states: list[dict[str, Tensor]], n_components: int = 2, **options):
    last = states[-1]
    gram = trajectory_gram(states.__getitem__, len(states), last, NAMES)
    pca = principal_axes(gram, n_components, **options)
    return pca, axis_directions(states.__getitem__, pca, last, NAMES)


@pytest.mark.parametrize(
    ("held", "passes"), [(1, 20), (9 * 8 * 4, 5), (9 * 8 * 7, 3), (9 * 8 * 20, 1), (None, 1)]
)
def test_gram_is_the_same_in_bands_of_any_size(held: int | None, passes: int) -> None:
    matrix = trajectory()
    loads: list[int] = []
    states = states_of(matrix)

    def load(i: int) -> dict[str, Tensor]:
        loads.append(i)
        return states[i]

    gram = trajectory_gram(load, 9, states[-1], NAMES, held=held)
    rows = matrix - matrix[-1]
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-12, atol=1e-12)
    assert np.array_equal(gram, gram.T)
    assert loads == list(range(9)) * passes


class Counted(dict):
    """A checkpoint that can be watched while it is in memory."""

    __hash__ = object.__hash__


@pytest.fixture
def quick_collections():
    """What was there before is not looked at again by the test's many collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collections")
def test_however_long_the_run_one_checkpoint_is_in_memory_and_the_rest_is_bounded(monkeypatch) -> None:
    """A hundred checkpoints once took three float64 copies of the largest tensor of every one of them."""
    matrix = trajectory(30, 400)
    watched: weakref.WeakSet[Counted] = weakref.WeakSet()
    alive: list[int] = []
    blocks: list[int] = []
    held: set[int] = set()

    def load(i: int) -> Counted:
        state = Counted(states_of(matrix[i : i + 1], torch.float32)[0])
        gc.collect()
        alive.append(sum(1 for _ in watched))
        watched.add(state)
        return state

    def difference(rows, origin):
        block = whole(rows, origin)
        blocks.append(block.nbytes)
        return block

    def copy(state, band, row):
        held.add(row.untyped_storage().nbytes())
        copied(state, band, row)

    whole, copied = pca_module._differences, pca_module._copy
    monkeypatch.setattr(pca_module, "FLOAT64_BYTES", 30 * 8 * 25)
    monkeypatch.setattr(pca_module, "_differences", difference)
    monkeypatch.setattr(pca_module, "_copy", copy)
    reference = states_of(matrix[-1:], torch.float32)[0]
    gram = trajectory_gram(load, 30, reference, NAMES, held=30 * 4 * 100)
    exact = matrix.astype(np.float32).astype(np.float64)
    rows = exact - exact[-1]
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-12, atol=1e-10)
    assert len(alive) == 4 * 30
    assert max(alive) == 0  # no other is left when one is loaded
    assert held == {30 * 4 * 100}
    assert max(blocks) <= 30 * 8 * 25

    blocks.clear()
    pca = principal_axes(gram, 2)
    axes = axis_directions(load, pca, reference, NAMES)
    project(load(0), reference, axes, NAMES)
    assert max(blocks) <= 30 * 8 * 25
    np.testing.assert_allclose([flat(a) @ flat(a) for a in axes], 1.0)


def test_tensors_of_several_dtypes_are_held_in_the_widest() -> None:
    matrix = trajectory()
    states = [{"a": s["a"].bfloat16(), "b": s["b"].float()} for s in states_of(matrix)]
    exact = np.stack([flat({name: s[name].double() for name in NAMES}) for s in states])
    rows = exact - exact[-1]
    for held in (None, 9 * 4 * 7):
        gram = trajectory_gram(states.__getitem__, 9, states[-1], NAMES, held=held)
        np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_axes_and_explained_variance_equal_the_svd_of_the_rows() -> None:
    matrix = trajectory()
    rows = (matrix - matrix[-1])[:-1]
    _, singular, right = np.linalg.svd(rows, full_matrices=False)
    pca, axes = analysed(states_of(matrix), 3)
    np.testing.assert_allclose(pca.explained_variance, (singular**2 / (singular**2).sum())[:3])
    for axis, expected in zip(axes, right, strict=False):
        assert abs(flat(axis) @ expected) == pytest.approx(1.0, abs=1e-12)
        assert np.linalg.norm(flat(axis)) == pytest.approx(1.0)


def test_centred_variant_equals_textbook_pca() -> None:
    matrix = trajectory()
    centred = matrix - matrix.mean(0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    pca, axes = analysed(states_of(matrix), 2, center="mean")
    np.testing.assert_allclose(pca.explained_variance, (singular**2 / (singular**2).sum())[:2])
    assert abs(flat(axes[1]) @ right[1]) == pytest.approx(1.0, abs=1e-12)
    projected = (matrix - matrix[-1]) @ np.stack([flat(a) for a in axes]).T
    np.testing.assert_allclose(pca.coordinate, projected, atol=1e-10)


def test_explained_variance_is_one_minus_the_share_of_squared_off_plane_distances() -> None:
    states = states_of(trajectory())
    pca, axes = analysed(states)
    seen = [project(state, states[-1], axes, NAMES) for state in states]
    np.testing.assert_allclose(pca.coordinate, [p.coordinate for p in seen], atol=1e-10)
    missed = sum(p.off_plane**2 for p in seen) / sum(p.length**2 for p in seen)
    assert pca.explained_variance.sum() == pytest.approx(1 - missed, rel=1e-12)


def test_a_run_inside_a_plane_is_explained_whole_and_stays_on_it() -> None:
    generator = np.random.default_rng(3)
    path = np.column_stack([np.cos(np.arange(7.0)), np.arange(7.0)])
    matrix = path @ generator.standard_normal((2, 20)) + generator.standard_normal(20)
    states = states_of(matrix)
    pca, axes = analysed(states, 5)
    assert len(axes) == 2
    assert pca.explained_variance.sum() == pytest.approx(1.0, abs=1e-12)
    assert max(project(s, states[-1], axes, NAMES).off_plane for s in states) < 1e-12


def test_float32_states_lose_nothing_to_the_subtraction() -> None:
    """Two float32 weights far from each other's size: their difference is no float32 number."""
    matrix = trajectory() * np.logspace(-6, 2, 20)
    states = states_of(matrix, torch.float32)
    exact = np.stack([flat(s) for s in states]).astype(np.float64)
    rows = exact - exact[-1]
    gram = trajectory_gram(states.__getitem__, 9, states[-1], NAMES)
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-13, atol=1e-12)


def test_axis_sign_makes_the_first_checkpoint_positive_whatever_eigh_returns() -> None:
    matrix = trajectory()
    for sign in (1, -1):
        pca, _ = analysed(states_of(sign * matrix))
        assert (pca.coordinate[0] >= 0).all()


def test_buffers_and_unnamed_tensors_do_not_count() -> None:
    states = states_of(trajectory())
    spoiled = [{**s, "running_var": torch.full((3,), float(i) * 1e6)} for i, s in enumerate(states)]
    one = trajectory_gram(states.__getitem__, 9, states[-1], NAMES)
    assert np.array_equal(one, trajectory_gram(spoiled.__getitem__, 9, spoiled[-1], NAMES))


def test_random_walk_null_has_its_published_limits() -> None:
    k = np.arange(1, 5)
    centred = random_walk_spectrum(800, center="mean")[:4]
    np.testing.assert_allclose(centred, 6 / (np.pi * k) ** 2, rtol=6e-3)
    through_last = random_walk_spectrum(800, center="last")[:4]
    np.testing.assert_allclose(through_last, 8 / (np.pi * (2 * k - 1)) ** 2, rtol=6e-3)


@pytest.mark.parametrize("center", ["last", "mean"])
def test_a_simulated_random_walk_meets_its_null_at_even_and_at_log_steps(center: str) -> None:
    size, steps = 40_000, np.array([0, 1, 2, 4, 8, 16, 32, 64, 128])
    generator = np.random.default_rng(0)
    jumps = generator.standard_normal((len(steps) - 1, size)) * np.sqrt(np.diff(steps))[:, None]
    walk = np.vstack([np.zeros(size), np.cumsum(jumps, axis=0)])
    states = states_of(walk)
    gram = trajectory_gram(states.__getitem__, len(steps), states[-1], NAMES)
    pca = principal_axes(gram, 3, steps=steps, center=center)
    np.testing.assert_allclose(pca.explained_variance, pca.random_walk, atol=0.01)
    even = random_walk_spectrum(len(steps), center=center)
    assert abs(even[0] - pca.explained_variance[0]) > 0.03


def test_coordinates_on_directions_that_are_not_unit_are_in_units_of_the_directions() -> None:
    """Dividing by the norm instead puts a path on a filter-normalised plane wrong by a factor of the norm."""
    generator = np.random.default_rng(0)
    d, e = generator.standard_normal((2, 20)) * 21.6
    origin = generator.standard_normal(20)
    reference, point, *directions = states_of(np.stack([origin, origin + 0.25 * d - 0.5 * e, d, e]))
    seen = project(point, reference, directions, NAMES)
    np.testing.assert_allclose(seen.coordinate, [0.25, -0.5], atol=1e-12)
    assert seen.off_plane < 1e-12
    assert seen.length == pytest.approx(np.linalg.norm(0.25 * d - 0.5 * e))


def test_projection_is_least_squares_on_oblique_directions() -> None:
    generator = np.random.default_rng(1)
    d = generator.standard_normal(20)
    directions = np.stack([d, 3 * d + 0.3 * generator.standard_normal(20)])
    origin, displacement = generator.standard_normal((2, 20))
    reference, point, *sides = states_of(np.stack([origin, origin + displacement, *directions]))
    seen = project(point, reference, sides, NAMES)
    expected, squared, _, _ = np.linalg.lstsq(directions.T, displacement, rcond=None)
    np.testing.assert_allclose(seen.coordinate, expected, rtol=1e-9)
    assert seen.off_plane == pytest.approx(math.sqrt(squared[0]))


def test_a_direction_that_lacks_a_tensor_is_zero_there() -> None:
    reference, point = states_of(np.stack([np.zeros(20), np.arange(20.0)]))
    seen = project(point, reference, [{"a": torch.ones(2, 3)}], NAMES)
    assert seen.coordinate[0] == pytest.approx(np.arange(6.0).mean())
    assert seen.off_plane > 10


def test_what_spans_no_plane_or_no_trajectory_is_refused() -> None:
    states = states_of(trajectory(4))
    with pytest.raises(ValueError, match="span no plane"):
        project(states[0], states[1], [states[2], {k: 2.0 * v for k, v in states[2].items()}], NAMES)
    with pytest.raises(ValueError, match="span no plane"):
        project(states[0], states[1], [{"a": torch.zeros(2, 3)}], NAMES)
    with pytest.raises(ValueError, match="same point"):
        principal_axes(np.zeros((3, 3)), 2)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        principal_axes(np.zeros((0, 0)), 2)
    gram = np.eye(3)
    gram[1] = np.nan
    gram[:, 1] = np.nan
    with pytest.raises(ValueError, match=r"positions \[1\]"):
        principal_axes(gram, 2)
