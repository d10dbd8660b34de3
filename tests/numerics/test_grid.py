"""Axes, coarse-to-fine evaluation and curvature of a slice, on functions known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.analyzers.numerics.grid import (
    covering_axis,
    interpolation_axis,
    refine,
    slice_curvature,
    symmetric_axis,
)


@given(half=st.integers(1, 200), span=st.floats(1e-3, 1e3))
def test_symmetric_axis_has_the_checkpoint_in_its_middle_and_the_span_at_its_ends(
    half: int, span: float
) -> None:
    axis = symmetric_axis(2 * half + 1, span)
    assert axis[half] == 0.0
    assert (axis[0], axis[-1]) == (-span, span)
    assert np.array_equal(axis, -axis[::-1])


@pytest.mark.parametrize(("n", "remedy"), [(50, "49 or 51"), (2, "3 or 5"), (1, "3 or 5"), (4, "3 or 5")])
def test_an_axis_that_would_miss_the_checkpoint_is_refused_with_the_remedy(n: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"use {remedy}"):
        symmetric_axis(n, 1.0)


@pytest.mark.parametrize(
    ("n", "span", "size"), [(401, 1.0, 401), (51, 1.0, 53), (11, 0.5, 11), (21, 0.75, 25)]
)
def test_interpolation_axis_hits_both_end_points_exactly(n: int, span: float, size: int) -> None:
    axis = interpolation_axis(n, span)
    assert len(axis) == size
    assert 0.0 in axis
    assert 1.0 in axis
    assert (axis[0], axis[-1]) == pytest.approx((0.5 - span, 0.5 + span), abs=1e-12)
    np.testing.assert_allclose(np.diff(axis), axis[1] - axis[0])


def test_impossible_spans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0\.5"):
        interpolation_axis(11, 0.3)
    with pytest.raises(ValueError, match=r"multiple of 0\.25"):
        interpolation_axis(11, 0.5 + 0.001 * np.pi)
    with pytest.raises(ValueError, match="at least 3"):
        covering_axis(0.0, 1.0, 2)
    for span in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="span"):
            symmetric_axis(11, span)


@given(low=st.floats(-50, 50), width=st.floats(0, 100), n=st.integers(3, 60))
def test_covering_axis_covers_the_path_and_the_origin_and_hits_zero(low: float, width: float, n: int) -> None:
    axis = covering_axis(low, low + width, n)
    assert len(axis) == n
    assert 0.0 in axis
    assert axis[0] <= low
    assert axis[-1] >= low + width


class Counted:
    """A function on index space that remembers where it was asked."""

    def __init__(self, function, shape: tuple[int, int]) -> None:
        y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape)
        self.truth = function(x[None, :], y[:, None]) * np.ones(shape)
        self.asked = np.zeros(shape, dtype=int)

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        self.asked += mask
        return np.where(mask, self.truth, np.nan)


def bowl(x, y):
    return 0.1 + x**2 + 2 * y**2 + 0.3 * np.sin(2 * x * y)


@pytest.mark.parametrize("shape", [(51, 51), (65, 65), (31, 51), (1, 65), (9, 9)])
def test_smooth_surface_is_interpolated_within_the_tolerance_from_fewer_points(
    shape: tuple[int, int],
) -> None:
    function = Counted(bowl, shape)
    found = refine(function, shape, 0.01)
    assert np.abs(found.value / function.truth - 1).max() < 0.01
    assert np.array_equal(found.value[found.evaluated], function.truth[found.evaluated])
    assert function.asked.max() == 1
    assert found.relative
    if min(shape) > 17:
        assert found.evaluated.sum() < 0.35 * function.truth.size
        assert found.heldout_residual < 0.01


def test_tolerance_zero_evaluates_every_point() -> None:
    function = Counted(bowl, (21, 21))
    found = refine(function, (21, 21), 0.0)
    assert found.evaluated.all()
    assert np.array_equal(found.value, function.truth)
    assert np.isnan(found.heldout_residual)


def test_a_rough_surface_is_evaluated_where_it_is_rough() -> None:
    function = Counted(lambda x, y: 1 + x**2 + np.where(x > 0.3, 0.5 * np.sin(60 * x * y), 0.0), (65, 65))
    found = refine(function, (65, 65), 0.02)
    assert found.evaluated[:, 45:].mean() > 3 * found.evaluated[:, :36].mean()


def test_the_held_out_residual_reveals_what_the_bound_missed() -> None:
    """A narrow pit between the coarse points fools every comparison of nested grids."""
    generator = np.random.default_rng(0)
    noise = generator.uniform(0.5, 1.5, (65, 65))
    coarse = np.round(np.linspace(0, 64, 17)).astype(int)
    noise[np.ix_(coarse, coarse)] = 1.0
    function = Counted(lambda x, y: noise, (65, 65))
    found = refine(function, (65, 65), 0.01)
    assert found.evaluated.mean() < 0.2
    assert found.heldout_residual > 0.1


def test_nan_and_infinity_are_kept_and_never_interpolated_across() -> None:
    def cliff(x, y):
        return np.where(x + y > 1.2, np.inf, np.where(x < -0.9, np.nan, bowl(x, y)))

    function = Counted(cliff, (51, 51))
    found = refine(function, (51, 51), 0.01)
    np.testing.assert_array_equal(np.isnan(found.value), np.isnan(function.truth))
    np.testing.assert_array_equal(np.isinf(found.value), np.isinf(function.truth))
    finite = np.isfinite(function.truth)
    assert np.abs(found.value[finite] / function.truth[finite] - 1).max() < 0.02
    nothing = refine(Counted(lambda x, y: np.nan * x * y, (17, 17)), (17, 17), 0.1)
    assert np.isnan(nothing.value).all()
    assert nothing.evaluated.all()


def test_values_that_cross_zero_are_bounded_relative_to_the_range() -> None:
    function = Counted(lambda x, y: x + y**3, (33, 33))
    found = refine(function, (33, 33), 1e-3)
    assert not found.relative
    assert np.abs(found.value - function.truth).max() < 1e-3 * np.ptp(function.truth)


def test_curvature_of_a_quadratic_slice_is_exact_inside_and_unknown_on_the_border() -> None:
    x, y = symmetric_axis(9, 1.0), symmetric_axis(7, 0.5)
    hessian = np.array([[3.0, 1.0], [1.0, -2.0]])
    value = 0.5 * (3 * x**2 + 2 * x * y[:, None] - 2 * y[:, None] ** 2)
    high, low = slice_curvature(value, y, x)
    exact = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(high[1:-1, 1:-1], exact[1])
    np.testing.assert_allclose(low[1:-1, 1:-1], exact[0])
    assert np.isnan(high[0]).all()
    assert np.isnan(low[:, -1]).all()
    line, same = slice_curvature(2.5 * x**2, None, x)
    np.testing.assert_allclose(line[1:-1], 5.0)
    assert np.isnan(line[[0, -1]]).all()
    assert np.array_equal(line, same, equal_nan=True)
