"""The filter against dense float64, its errors against leaving samples out, and when curves cross levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dynprobe.analyzers.numerics.filter_errors import WithError, filter_errors, first_below, surely_later
from dynprobe.analyzers.numerics.filter_scale import FilterScale, median_squared_distance
from dynprobe.analyzers.numerics.gaussian_filter import (
    centred,
    filter_energies,
    sample_blocks,
    sampled_rows,
    squared_distances,
)


def rough_functions(n=300, d=5, k=4, c=3, offset=0.0, scale=1.0, seed=0):
    """Inputs and functions of them, the first a smooth one; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + offset
    smooth = torch.sin((x - offset)[:, :1] / scale + torch.arange(c))
    noise = torch.randn(n, k, c, generator=generator, dtype=torch.float64)
    weight = torch.linspace(0, 1, k, dtype=torch.float64)[:, None]
    return x, (1 - weight) * smooth[:, None] + weight * noise


def dense(x, functions, delta, weight=None):
    """Energies of low and high, (n_functions,), with the full kernel in float64."""
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight
    difference = x[:, None] - x[None]
    kernel = torch.exp(-difference.square().sum(2) / (2 * delta)) * weight
    kernel.fill_diagonal_(1)  # a sample has its own row or none, so that its weight there means nothing
    low = torch.einsum("ij,jkc->ikc", kernel / kernel.sum(1, keepdim=True), functions)
    high = functions - low
    energies = ((part.square().sum(2) * weight[:, None]).sum(0).numpy() for part in (low, high))
    return *energies, float(kernel.sum(1).mean())


def everything(n):
    return {"rows": sampled_rows(n, n, 0), "blocks": sample_blocks(n, 32, 0)}


@pytest.mark.parametrize("delta", [0.02, 0.3, 3.0, 100.0])
def test_the_filter_equals_the_dense_kernel_in_float64_to_1e_5(delta):
    x, functions = rough_functions()
    found = filter_energies(centred(x), functions, [delta], **everything(len(x)))
    low, high, neighbours = dense(x, functions, delta)
    np.testing.assert_allclose(found.low[0], low, rtol=1e-5)
    np.testing.assert_allclose(found.high[0], high, rtol=1e-5)
    np.testing.assert_allclose(found.neighbours[0], neighbours, rtol=1e-5)
    np.testing.assert_allclose(found.total, functions.square().sum((0, 2)), rtol=1e-6)


@pytest.mark.parametrize("features", [1, 5, 100])
def test_far_from_the_origin_the_filter_is_still_that_of_float64(features):
    x, functions = rough_functions(d=features, offset=200.0)
    delta = 0.1 * features
    found = filter_energies(centred(x.float()), functions, [delta], **everything(len(x)))
    low, high, _ = dense(x.float().double(), functions, delta)
    np.testing.assert_allclose(found.low[0], low, rtol=1e-5)
    np.testing.assert_allclose(found.high[0], high, rtol=1e-5)


def test_pixels_up_to_255_are_at_distance_zero_from_themselves_and_never_below():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (200, 784), generator=generator).float()
    distance = squared_distances(centred(x), torch.arange(200))
    assert torch.equal(distance.diagonal(), torch.zeros(200))
    assert bool((distance >= 0).all())
    true = torch.cdist(x.double(), x.double()).square()
    torch.testing.assert_close(distance.double(), true, rtol=1e-5, atol=1e-3)


def test_blocks_of_rows_do_not_matter(monkeypatch):
    from dynprobe.analyzers.numerics import gaussian_filter

    x, functions = rough_functions()
    whole = filter_energies(centred(x), functions, [0.3, 1.0], **everything(len(x)))
    monkeypatch.setattr(gaussian_filter, "BLOCK_VALUES", 1)
    monkeypatch.setattr(gaussian_filter, "FEWEST_ROWS", 7)
    parts = filter_energies(centred(x), functions, [0.3, 1.0], **everything(len(x)))
    for name in ("total", "low", "high", "low_sum", "low_effect", "high_effect"):
        a, b = getattr(whole, name), getattr(parts, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * abs(a).max(), err_msg=name)


@pytest.mark.parametrize("delta", [0.2, 2.0])
def test_the_effect_of_a_block_is_the_derivative_with_respect_to_its_rows_and_its_weight_for_others(delta):
    x, functions = rough_functions(n=120)
    blocks = sample_blocks(120, 8, 0)
    found = filter_energies(centred(x), functions, [delta], rows=sampled_rows(120, 120, 0), blocks=blocks)
    for block in (0, 5):
        step = 1e-5 * (blocks == block).double()
        more, less = (dense(x, functions, delta, 1 + sign * step) for sign in (1, -1))
        for effect, place in ((found.low_effect, 0), (found.high_effect, 1)):
            slope = (more[place] - less[place]) / 2e-5
            np.testing.assert_allclose(effect[block, 0], slope, rtol=1e-3, atol=1e-3 * abs(slope).max())


def test_sampled_rows_agree_with_all_rows_within_their_standard_errors():
    x, functions = rough_functions(n=1500, d=3, k=3)
    functions = functions - functions.mean(0)
    whole = filter_errors(filter_energies(centred(x), functions, [0.2], **everything(1500)))
    misses = []
    for seed in range(12):
        rows, blocks = sampled_rows(1500, 200, seed), sample_blocks(1500, 32, seed)
        part = filter_errors(filter_energies(centred(x), functions, [0.2], rows=rows, blocks=blocks))
        for a, b in ((part.low, whole.low), (part.high, whole.high), (part.lfr, whole.lfr)):
            misses.append((a.value - b.value) / a.stderr)
    scores = np.concatenate([miss.ravel() for miss in misses])
    assert np.isfinite(scores).all()
    # the samples behind the averages are the same in all draws, so that the spread is below 1
    assert 0.3 < np.sqrt((scores**2).mean()) < 1.3


def test_standard_errors_do_not_depend_on_the_seed_of_the_rows_and_are_not_too_small_with_few_neighbours():
    values, errors = [], []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 3, generator=generator, dtype=torch.float64)
        y = torch.sin(2 * x[:, 0]) + 0.5 * torch.sin(5 * x[:, 1])
        wrong = torch.rand(400, generator=generator) < 0.02
        functions = torch.stack([y, torch.where(wrong, y, 0.02 * y)], 1)[..., None]
        functions -= functions.mean(0)
        found, other = (
            filter_errors(
                filter_energies(
                    centred(x),
                    functions,
                    [0.5, 0.02],
                    rows=sampled_rows(400, 400, draw),
                    blocks=sample_blocks(400, 32, 0),
                )
            )
            for draw in (0, 1)
        )
        np.testing.assert_allclose(found.low.stderr, other.low.stderr, rtol=1e-3)
        np.testing.assert_allclose(found.high.stderr, other.high.stderr, rtol=1e-3)
        values.append(np.stack([found.low.value, found.high.value]))
        errors.append(np.stack([found.low.stderr, found.high.stderr]))
    ratio = np.mean(errors, axis=0) / np.std(values, axis=0, ddof=1)
    assert ((ratio > 0.7) & (ratio < 1.9)).all(), ratio


def test_the_standard_error_is_the_spread_between_independent_data_sets():
    values, errors = [], []
    for seed in range(40):
        x, functions = rough_functions(n=250, d=2, k=3, seed=seed)
        found = filter_errors(filter_energies(centred(x), functions, [0.1], **everything(250)))
        values.append(np.concatenate([found.low.value.ravel(), found.high.value.ravel()]))
        errors.append(np.concatenate([found.low.stderr.ravel(), found.high.stderr.ravel()]))
    spread = np.std(values, axis=0, ddof=1)
    ratio = np.sqrt((np.array(errors) ** 2).mean(0)) / spread
    # of a function that is noise alone the first order claims somewhat too much error, never too little
    assert ((ratio > 0.8) & (ratio < 2.0)).all(), ratio


def test_the_widths_give_the_target_the_shares_that_were_asked_for():
    x, functions = rough_functions(n=400, d=4)
    target = functions[:, 1] - functions[:, 1].mean(0)
    inputs, rows = centred(x), torch.arange(400)
    deltas = FilterScale(inputs, target, rows).deltas([0.1, 0.25, 0.5, 0.75])
    found = filter_energies(inputs, target[:, None], deltas, **everything(400))
    np.testing.assert_allclose(found.low[:, 0] / found.total[0], [0.1, 0.25, 0.5, 0.75], atol=1e-3)
    assert deltas == sorted(deltas, reverse=True)


def test_a_share_that_no_width_reaches_is_nan():
    x = torch.arange(10.0, dtype=torch.float64)[:, None]
    constant = torch.ones(10, 1)  # all of it is left at any width
    scale = FilterScale(centred(x), constant, torch.arange(10))
    assert all(math.isnan(delta) for delta in scale.deltas([0.1, 0.9]))


def test_the_median_is_over_different_samples():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    assert median_squared_distance(squared_distances(centred(x), torch.arange(3))) == 4.0


def test_at_small_width_a_relative_error_of_the_rough_part_is_missing_not_zero_over_zero():
    x, functions = rough_functions(n=100, d=5)
    found = filter_errors(filter_energies(centred(x), functions, [1e-6], **everything(100)))
    assert np.isnan(found.high.value).all()
    assert np.isfinite(found.low.value).all()


def test_kernel_gradient_descent_on_a_grid_decays_as_one_minus_rate_times_eigenvalue_to_the_step():
    # the averages over a uniform periodic grid multiply a mode by (C⁻¹G)_k: LFR of one mode is its square
    n = 64
    angle = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    x = torch.stack([angle.cos(), angle.sin()], 1)
    kernel = torch.exp(-torch.cdist(x, x).square())
    eigenvalue = torch.fft.fft(kernel[0]).real
    target = sum(torch.cos(k * angle) for k in (1, 4))
    rate, residuals = 0.5 / float(eigenvalue.max()), [target]
    for _ in range(30):
        residuals.append(residuals[-1] - rate * kernel @ residuals[-1])
    component = torch.fft.fft(torch.stack(residuals), dim=1).abs()
    for k in (1, 4):
        decay = (1 - rate * float(eigenvalue[k])) ** np.arange(31)
        np.testing.assert_allclose((component[:, k] / component[0, k]).numpy(), decay, rtol=1e-10)
    # and the filter, being diagonal in the same modes, sees just that in its two parts
    functions = torch.stack([target, *residuals], 1)[..., None]
    found = filter_errors(filter_energies(centred(x), functions, [0.05], **everything(n)))
    gain = torch.fft.fft(torch.exp(-torch.cdist(x, x).square() / 0.1)[0]).real
    gain = (gain / gain[0])[[1, 4]].numpy()
    decay = np.stack([(1 - rate * float(eigenvalue[k])) ** np.arange(31) for k in (1, 4)], 1)
    for value, part in ((found.low.value[:, 0], gain), (found.high.value[:, 0], 1 - gain)):
        expected = np.sqrt(((part * decay) ** 2).sum(1) / (part**2).sum())
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_between_checkpoints_a_power_law_is_followed_exactly():
    step = np.array([1.0, 10.0, 100.0, 1000.0])
    error = step**-0.5
    np.testing.assert_allclose(first_below(step, error, 0.2), 25.0)
    np.testing.assert_allclose(first_below(step, np.stack([error, error**2]), 0.05), [400.0, 20.0])


def test_after_a_first_step_of_zero_the_step_itself_is_interpolated():
    assert first_below(np.array([0.0, 8.0]), np.array([1.0, 0.25]), 0.5) == pytest.approx(4.0)


def test_an_error_that_is_under_the_level_at_one_checkpoint_alone_has_not_settled():
    step = np.array([1.0, 10, 100, 1000, 10000])
    assert first_below(step, np.array([1, 0.1, 1, 0.01, 0.01]), 0.1) == pytest.approx(10**2.5)
    assert first_below(step, np.array([1, 0.01, 1, 1, 1]), 0.1) == math.inf
    assert first_below(step, np.array([1, 1, 1, 1, 0.01]), 0.1) == pytest.approx(10**3.5)


def test_never_is_infinite_and_from_the_start_is_not_known():
    step = np.array([0.0, 1.0, 2.0])
    assert first_below(step, np.array([1.0, 0.8, 0.6]), 0.5) == math.inf
    assert math.isnan(first_below(step, np.array([0.1, 0.1, 0.1]), 0.5))
    assert math.isnan(first_below(step, np.array([math.nan] * 3), 0.5))


def test_two_that_cross_between_the_same_checkpoints_are_not_told_apart():
    step_error = np.zeros(3)
    early, late = np.array([1.0, 0.9, 0.01]), np.array([1.0, 0.99, 0.1])
    assert not surely_later(late, step_error, early, step_error, 0.5, 3)
    apart = np.array([1.0, 0.4, 0.01])
    assert surely_later(late, step_error, apart, step_error, 0.5, 3)
    assert not surely_later(apart, step_error, late, step_error, 0.5, 3)
    assert not surely_later(late, np.full(3, 0.2), apart, step_error, 0.5, 3)


def test_what_starts_under_the_level_was_not_learned_in_the_run():
    nothing = np.zeros(2)
    assert not surely_later(np.ones(2), nothing, np.full(2, 0.1), nothing, 0.5, 3)


def test_the_jackknife_of_a_mean_over_blocks_is_its_standard_error():
    blocks = np.random.default_rng(0).normal(size=20)
    deleted = (blocks.sum() - blocks) / 19
    found = WithError(np.array(blocks.mean()), deleted)
    assert float(found.stderr) == pytest.approx(blocks.std(ddof=1) / math.sqrt(20))


def test_a_checkpoint_without_an_error_is_passed_over_when_a_crossing_is_sought():
    step = np.array([1.0, 10.0, 100.0, 1000.0])
    error = np.array([[1.0, math.nan, 0.01, 0.01], [1.0, 0.5, 0.01, 0.01]])
    found = first_below(step, error, 0.1)
    assert found[0] == pytest.approx(10.0)  # half-way in logarithms from 1 to 100
    assert np.isfinite(found[1])
