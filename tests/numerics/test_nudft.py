"""Fourier components on grids and along directions against closed forms, naive sums and Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dynprobe.analyzers.numerics import fourier_sums as sums
from dynprobe.analyzers.numerics import nudft
from dynprobe.analyzers.numerics.nudft import grid_spectrum, principal_positions, projected_spectrum


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_open(n, low=-math.pi, length=2 * math.pi):
    return low + length * torch.arange(n, dtype=torch.float64)[:, None] / n


def naive(phase, y, n_frequencies):
    """The sum as it is written, in extended precision."""
    p, values = phase.numpy().astype(np.longdouble), y.numpy().astype(np.longdouble)
    angle = 2 * np.arccos(np.longdouble(-1)) * np.outer(np.arange(1, n_frequencies + 1), p)
    return (np.cos(angle) @ values) / len(p) - 1j * ((np.sin(angle) @ values) / len(p))


@pytest.mark.parametrize("n_frequencies", [1, 2, 7, 64, 65])
def test_fourier_sums_equal_the_naive_sum_to_1e_14(n_frequencies, monkeypatch):
    monkeypatch.setattr(sums, "TABLE", 2**12)  # several blocks of rows, the last one shorter
    phase, y = rand(401), randn(401, 5)
    found = sums.fourier_sums(phase, y.__getitem__, n_frequencies)
    assert np.abs(found - naive(phase, y, n_frequencies)).max() < 1e-14


def test_fourier_sums_of_float32_columns_keep_their_seven_digits():
    phase, y = rand(3000), randn(3000, 4).float()
    found = sums.fourier_sums(phase, y.__getitem__, 64)
    assert np.abs(found - naive(phase, y.double(), 64)).max() < 1e-7


def test_a_sinusoid_along_a_direction_has_half_its_amplitude_at_its_own_frequency():
    t = torch.arange(64, dtype=torch.float64) * 5 / 63  # range 5
    y = 3 * torch.cos(2 * math.pi * 4 * t / 5)[:, None]
    found = projected_spectrum(t, y, y[None], n_frequencies=8)
    assert found.amplitude_target[3, 0] == pytest.approx(1.5, rel=0.02)
    assert found.frequency.tolist() == list(range(1, 9))
    assert found.resolution == pytest.approx(0.2)
    assert found.significant[:, 0].tolist() == [k == 4 for k in range(1, 9)]


def test_errors_of_the_target_itself_are_zero_and_of_its_mean_one():
    t, y = rand(200), randn(200, 3)
    outputs = torch.stack([y, y.mean(0).expand_as(y), 3 * y])
    found = projected_spectrum(t, y, outputs, n_frequencies=5, permutations=2)
    expected = np.array([0, 1, 2])[:, None, None] * np.ones((3, 5, 3))
    np.testing.assert_allclose(found.complex_error, expected, atol=1e-12)
    np.testing.assert_allclose(found.amplitude_error, expected, atol=1e-12)


def test_a_constant_added_to_labels_or_outputs_leaks_into_no_frequency():
    t, y, h = rand(300) ** 2, randn(300, 2), randn(2, 300, 2, seed=1)
    plain = projected_spectrum(t, y, h, n_frequencies=6, permutations=2)
    moved = projected_spectrum(t, y + 100, h - 50, n_frequencies=6, permutations=2)
    np.testing.assert_allclose(moved.complex_error, plain.complex_error, rtol=1e-9)
    np.testing.assert_allclose(moved.amplitude_target, plain.amplitude_target, rtol=1e-9)


def test_a_shift_of_one_radian_is_an_error_of_2_sin_half_and_none_of_the_amplitude():
    x = half_open(40)
    target, output = torch.sin(3 * x), torch.sin(3 * x + 1)
    found = grid_spectrum(x, target, output[None])
    assert found.complex_error[0, 2, 0] == pytest.approx(2 * math.sin(0.5), rel=1e-12)
    assert found.amplitude_error[0, 2, 0] < 1e-12


def test_frequencies_where_the_target_is_zero_have_no_relative_error():
    x = half_open(40)
    found = grid_spectrum(x, torch.sin(3 * x), torch.sin(2 * x)[None])
    assert np.isnan(found.complex_error[0, [0, 1, 3, 4], 0]).all()
    assert found.complex_error[0, 2, 0] == pytest.approx(1.0, rel=1e-12)
    assert found.significant[:, 0].tolist() == [k == 3 for k in range(1, 21)]


@pytest.mark.parametrize("n", [61, 64])
def test_a_periodic_sinusoid_on_a_half_open_grid_leaks_nothing(n):
    x = half_open(n)
    found = grid_spectrum(x, 0.4 * torch.sin(5 * x) + 7, torch.zeros(1, n, 1))
    assert found.amplitude_target[4, 0] == pytest.approx(0.2, rel=1e-14)
    assert np.delete(found.amplitude_target[:, 0], 4).max() < 1e-15
    assert found.closed == (False,)
    assert found.resolution == pytest.approx(1 / (2 * math.pi))


def test_a_grid_closed_at_both_ends_is_recognised_and_leaks_nothing_either():
    x = torch.linspace(-math.pi, math.pi, 61, dtype=torch.float64)[:, None]
    target = 0.4 * torch.sin(5 * x)
    found = grid_spectrum(x, target, torch.stack([target, 0 * target]))
    assert found.closed == (True,)
    assert len(found.frequency) == 30
    assert found.amplitude_target[4, 0] == pytest.approx(0.2, rel=1e-12)  # 0.189 with the last point
    assert np.delete(found.amplitude_target[:, 0], 4).max() < 1e-15
    np.testing.assert_allclose(found.complex_error[:, 4, 0], [0, 1], atol=1e-12)


def test_ends_of_a_grid_that_agree_because_labels_change_seldom_do_not_make_it_closed():
    labels = ((torch.arange(32) > 8) & (torch.arange(32) < 20)).double()[:, None]
    assert grid_spectrum(half_open(32), labels, labels[None]).closed == (False,)


def test_the_spectrum_of_a_grid_does_not_depend_on_the_order_of_samples_or_on_float32_inputs():
    x, y, h = half_open(50), randn(50, 2), randn(3, 50, 2, seed=1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    plain = grid_spectrum(x, y, h)
    shuffled = grid_spectrum(x[order].float(), y[order], h[:, order])
    np.testing.assert_allclose(shuffled.complex_error, plain.complex_error, rtol=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (8, 7), (7, 8), (5, 6)])
def test_a_two_dimensional_grid_has_each_pair_of_wavenumbers_once_and_all_of_the_energy(shape):
    axes = [half_open(n)[:, 0] for n in shape]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    y = randn(len(x), 1)
    found = grid_spectrum(x, y, y[None])
    own, mirror = found.wavenumber % np.array(shape), -found.wavenumber % np.array(shape)
    assert len({frozenset({tuple(a), tuple(b)}) for a, b in zip(own, mirror, strict=True)}) == len(own)
    twice = np.where((own == mirror).all(1), 1, 2)
    energy = float(y.var(unbiased=False))
    assert twice @ found.amplitude_target[:, 0] ** 2 == pytest.approx(energy, rel=1e-12)
    assert (np.diff(found.frequency) >= -1e-9).all()


def test_a_plane_wave_on_a_grid_is_one_wavenumber_of_the_length_it_has():
    x = torch.cartesian_prod(half_open(16)[:, 0], half_open(12)[:, 0])
    wave = torch.cos(3 * x[:, :1] - 4 * x[:, 1:])
    found = grid_spectrum(x, wave, wave[None])
    largest = found.amplitude_target[:, 0].argmax()
    assert found.frequency[largest] == pytest.approx(5.0)
    assert sorted(np.abs(found.wavenumber[largest])) == [3, 4]
    assert np.delete(found.amplitude_target[:, 0], largest).max() < 1e-15


def test_frequencies_of_a_grid_of_unequal_sides_are_in_units_of_the_longer_period():
    x = torch.cartesian_prod(half_open(8, 0, 2)[:, 0], half_open(8, 0, 1)[:, 0])
    wave = torch.sin(2 * math.pi * 2 * x[:, 1:])
    found = grid_spectrum(x, wave, wave[None])
    assert found.frequency[found.amplitude_target[:, 0].argmax()] == pytest.approx(4.0)
    assert found.resolution == pytest.approx(0.5)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.tensor([0, 1, 1.3, 2.7, 3.1, 5, 6])[:, None],  # its mean second difference is 0
        torch.tensor([0.0, 1, 2, 3, 4, 4])[:, None],
        half_open(30)[torch.arange(30) != 11],
        torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))[1:],
        torch.tensor([0.0, 1, 2])[:, None],
        randn(64, 3),
    ],
    ids=["uneven", "repeated", "gap", "corner missing", "three points", "three dimensions"],
)
def test_inputs_that_are_no_uniform_grid_have_no_grid_spectrum(inputs):
    y = randn(len(inputs), 1)
    assert grid_spectrum(inputs, y, y[None]) is None


def test_the_floor_is_the_rayleigh_quantile_of_the_largest_of_k_amplitudes():
    n, k = 1500, 32
    labels = randn(n, 2) * torch.tensor([1.0, 5.0])
    floor = sums.permutation_floor(rand(n), labels - labels.mean(0), k, permutations=400, seed=3)
    expected = labels.std(0).numpy() * math.sqrt(-math.log(1 - 0.99 ** (1 / k)) / n)
    np.testing.assert_allclose(floor, expected, rtol=0.1)


def test_labels_without_relation_to_inputs_are_significant_nowhere_in_nineteen_draws_of_twenty():
    t = rand(200)
    hits = 0
    for seed in range(20):
        y = randn(200, 1, seed=100 + seed)
        hits += projected_spectrum(t, y, y[None], n_frequencies=8, seed=seed).significant.any()
    assert hits <= 1


def test_a_class_that_no_sample_has_is_significant_nowhere():
    y = torch.cat([randn(100, 1), torch.full((100, 1), 0.1, dtype=torch.float64)], 1)
    found = projected_spectrum(rand(100), y, y[None].float(), n_frequencies=4)
    assert not found.significant[:, 1].any()
    assert np.isnan(found.complex_error[..., 1]).all()


def test_the_floor_is_over_all_outputs_whatever_their_scales():
    t = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(300, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (y - y.mean(0)) / y.square().mean(0).sqrt()
    alone = sums.permutation_floor(t, y[:, :1] - y[:, :1].mean(), 8, permutations=200, seed=0)
    every = sums.permutation_floor(t, y * torch.arange(1, 9), 8, permutations=200, seed=0)
    np.testing.assert_allclose(every / every[0], np.arange(1, 9), rtol=0.01)
    assert every[0] > 1.05 * alone[0]


def test_draws_split_over_memory_give_the_same_floor(monkeypatch):
    t, y = rand(100), randn(100, 3)
    y = y - y.mean(0)
    whole = sums.permutation_floor(t, y, 5, permutations=11, seed=0)
    monkeypatch.setattr(sums, "COLUMNS", 4 * 300)
    parts = sums.permutation_floor(t, y, 5, permutations=11, seed=0)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("grid", [False, True])
def test_a_checkpoint_with_broken_outputs_has_nan_and_leaves_the_others_alone(grid):
    x, y = half_open(32), randn(32, 2)
    outputs = torch.stack([0.5 * y, torch.full_like(y, math.nan), torch.full_like(y, math.inf)])
    found = (
        grid_spectrum(x, y, outputs)
        if grid
        else projected_spectrum(x[:, 0], y, outputs, n_frequencies=4, permutations=2)
    )
    np.testing.assert_allclose(found.complex_error[0], 0.5, rtol=1e-12)
    assert np.isnan(found.complex_error[1:]).all()


def test_a_spectrum_refuses_positions_or_targets_it_cannot_use():
    t, y = rand(10), randn(10, 1)
    with pytest.raises(ValueError, match="differ"):
        projected_spectrum(torch.ones(10), y, y[None], n_frequencies=2)
    with pytest.raises(ValueError, match="NaN"):
        projected_spectrum(t, y * math.nan, y[None], n_frequencies=2)
    with pytest.raises(ValueError, match="NaN"):
        grid_spectrum(half_open(10), y * math.nan, y[None])
    with pytest.raises(ValueError, match="at least one frequency"):
        projected_spectrum(t, y, y[None], n_frequencies=0)


@pytest.mark.parametrize(("n", "d", "direct"), [(60, 5, 2000), (9, 40, 10), (60, 20, 4)])
def test_principal_positions_equal_those_of_a_singular_value_decomposition(n, d, direct, monkeypatch):
    monkeypatch.setattr(nudft, "DIRECT", direct)
    x = randn(n, d) * torch.linspace(3, 1, d, dtype=torch.float64) + 50
    position, explained = principal_positions(x, 3)
    u, s, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = (u * s).T[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()
    np.testing.assert_allclose(position.numpy(), expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(explained, (s**2 / (s**2).sum())[:3].numpy(), rtol=1e-8)


def test_principal_positions_of_inputs_on_a_line_are_one_row_in_the_units_of_the_inputs():
    line = torch.linspace(0, 2, 9, dtype=torch.float64)[:, None] * torch.tensor([-0.6, 0.8])
    position, explained = principal_positions(line.reshape(9, 1, 2), 2)
    assert position.shape == (1, 9)
    np.testing.assert_allclose(explained, [1.0], rtol=1e-12)
    np.testing.assert_allclose(position[0].numpy(), np.linspace(-1, 1, 9), atol=1e-12)


def test_principal_positions_refuse_inputs_without_a_direction():
    with pytest.raises(ValueError, match="differ"):
        principal_positions(torch.ones(5, 3), 1)
    with pytest.raises(ValueError, match="NaN"):
        principal_positions(torch.full((5, 3), math.nan), 1)
    with pytest.raises(ValueError, match="at least one"):
        principal_positions(randn(5, 3), 0)
