"""Errors in bands of kernel eigenvectors against a dense eigenbasis and against constructed residuals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from dynprobe.analyzers.numerics.kernel_bands import kernel_bands

BANDS = ((1, 5), (6, 20), (21, None))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eigenbasis(x):
    """Eigenvectors of the centred kernel by numpy, largest eigenvalue first."""
    squared = squareform(pdist(x.numpy(), "sqeuclidean"))
    kernel = np.exp(-squared / (2 * np.median(pdist(x.numpy(), "sqeuclidean"))))
    middle = np.eye(len(x)) - 1 / len(x)
    return np.linalg.eigh(middle @ kernel @ middle)[1][:, ::-1]


def test_bands_equal_those_of_the_dense_eigenbasis():
    x, y, h = randn(70, 6), randn(70, 3, seed=1), randn(2, 70, 3, seed=2)
    found = kernel_bands(x, y, h, bands=BANDS)
    basis = eigenbasis(x)
    target = basis.T @ (y - y.mean(0)).numpy()
    residual = basis.T @ ((h - y) - (h - y).mean(1, keepdim=True)).numpy()
    for band, (first, last) in enumerate(BANDS):
        rows = slice(first - 1, last)
        power = np.square(target[rows]).sum()
        assert found["share"][band] == pytest.approx(power / np.square(target).sum(), rel=1e-9)
        expected = np.sqrt(np.square(residual[:, rows]).sum((1, 2)) / power)
        np.testing.assert_allclose(found["error"][:, band], expected, rtol=1e-9)
    assert found["share"].sum() == pytest.approx(1.0, rel=1e-12)


def test_a_residual_made_of_one_eigenvector_is_in_its_band_alone():
    x, y = randn(60, 5), randn(60, 1, seed=1)
    wave = torch.from_numpy(eigenbasis(x)[:, 9:10].copy())
    found = kernel_bands(x, y, (y + 3 * wave)[None], bands=BANDS)
    assert found["error"][0, 1] > 0.1
    np.testing.assert_allclose(found["error"][0, [0, 2]], 0, atol=1e-7)


def test_constants_belong_to_no_band_and_outputs_at_the_labels_mean_have_error_one():
    x, y = randn(60, 5), randn(60, 2, seed=1)
    outputs = torch.stack([y + 7, torch.full_like(y, 3.0)])
    found = kernel_bands(x, y + 100, outputs, bands=BANDS)
    np.testing.assert_allclose(found["error"], [[0] * 3, [1] * 3], atol=1e-7)
    np.testing.assert_allclose(found["error_stderr"][:, :1], 0, atol=1e-7)


def test_bands_of_inputs_scaled_and_moved_are_the_same_with_the_width_following():
    x, y, h = randn(50, 4), randn(50, 1, seed=1), randn(1, 50, 1, seed=2)
    plain = kernel_bands(x, y, h, bands=BANDS)
    moved = kernel_bands((10 * x + 1000).reshape(50, 2, 2), y, h, bands=BANDS)
    np.testing.assert_allclose(moved["error"], plain["error"], rtol=1e-6)
    assert moved["delta"] == pytest.approx(100 * plain["delta"], rel=1e-9)


def test_a_band_that_holds_almost_nothing_of_the_target_has_no_relative_error():
    x = randn(60, 5)
    smooth = torch.from_numpy(eigenbasis(x)[:, :1].copy())
    found = kernel_bands(x, smooth, 0 * smooth[None], bands=BANDS)
    assert found["error"][0, 0] == pytest.approx(1.0)
    assert np.isnan(found["error"][0, 1:]).all()


def test_eigenvectors_below_rounding_are_in_no_band_but_that_of_the_rest():
    x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    y = torch.sin(5 * x) + 0.1 * randn(200, 1)
    found = kernel_bands(x, y, 0 * y[None], bands=((1, 5), (6, 100), (6, None), (150, None)))
    assert 6 < found["n_resolved"] < 40
    np.testing.assert_allclose(found["error"][0, [0, 2]], 1.0)
    assert np.isnan(found["error"][0, [1, 3]]).all()
    assert np.isnan(found["share"][[1, 3]]).all()


def test_bands_beyond_the_number_of_samples_are_missing_and_the_last_one_ends_with_them():
    x, y = randn(30, 20), randn(30, 1, seed=1)
    found = kernel_bands(x, y, 0 * y[None])  # 29 eigenvectors besides the constant
    np.testing.assert_allclose(found["error"][0, :2], 1.0)
    assert found["share"][:2].sum() == pytest.approx(1.0)
    assert np.isnan(found["error"][0, 2:]).all()
    assert np.isnan(found["error_stderr"][0, 1:]).all()


def test_more_samples_than_the_limit_give_a_seeded_subset():
    x, y, h = randn(300, 4), randn(300, 1, seed=1), randn(1, 300, 1, seed=2)
    one, again, other = (kernel_bands(x, y, h, bands=BANDS, max_samples=100, seed=s) for s in (0, 0, 1))
    assert one["n_samples"] == 100
    np.testing.assert_array_equal(one["error"], again["error"])
    assert not np.allclose(one["error"], other["error"])


def test_the_standard_error_is_the_spread_over_draws_of_samples():
    def draw(seed):
        x = randn(160, 3, seed=seed)
        y = x[:, :1].sin() + randn(160, 1, seed=1000 + seed)
        return kernel_bands(x, y, x[None, :, :1].sin(), bands=((1, 3), (4, None)))

    found = [draw(seed) for seed in range(20)]
    spread = np.std([f["error"][0] for f in found], 0, ddof=1)
    claimed = np.sqrt(np.mean([f["error_stderr"][0] ** 2 for f in found], 0))
    assert (claimed / spread > 0.5).all()
    assert (claimed / spread < 2).all()


def test_a_checkpoint_with_broken_outputs_has_nan_and_leaves_the_others_alone():
    x, y = randn(60, 5), randn(60, 1, seed=1)
    outputs = torch.stack([0.5 * y, y * math.nan, y + math.inf]).float()
    found = kernel_bands(x, y, outputs, bands=BANDS)
    np.testing.assert_allclose(found["error"][0], 0.5, rtol=1e-5)
    assert np.isnan(found["error"][1:]).all()


def test_kernel_bands_refuse_inputs_and_targets_they_cannot_use():
    x, y = randn(20, 3), randn(20, 1)
    with pytest.raises(ValueError, match="NaN"):
        kernel_bands(x, y * math.nan, y[None])
    with pytest.raises(ValueError, match="half differ"):
        kernel_bands(torch.ones(20, 3), y, y[None])
