"""Trace and density on planted spectra: exact inside the Krylov space, within their errors outside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dynprobe.analyzers.numerics.density import Quadrature, density, moments, negative_part, quadrature
from dynprobe.analyzers.numerics.krylov import KrylovSpace
from dynprobe.analyzers.numerics.lanczos import Eigenpairs, lanczos
from dynprobe.analyzers.numerics.trace import TraceEstimate, random_signs, widened_stderr

SPECTRUM = np.concatenate([[20.0, 12.0, 7.0, -5.0], np.geomspace(1e-3, 1.0, 150), -np.linspace(0, 0.4, 46)])
N = len(SPECTRUM)
SIZES = (50, 1, 100, 49)


def planted(spectrum: np.ndarray = SPECTRUM, seed: int = 0) -> Tensor:
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum),) * 2))[0]
    return torch.from_numpy((basis * spectrum) @ basis.T)


def solved(matrix: Tensor, k: int = 4, **options) -> Eigenpairs:
    return lanczos(lambda v: matrix @ v, len(matrix), k=k, which="LM", tol=1e-8, **options)


def space_of(found: Eigenpairs) -> KrylovSpace:
    assert found.space is not None
    return found.space


def traced(matrix: Tensor, found: Eigenpairs, probes: int, sizes=SIZES) -> TraceEstimate:
    estimate = TraceEstimate(space_of(found), sizes)
    for seed in range(probes):
        signs = random_signs(len(matrix), seed, matrix)
        estimate.add(signs, signs, matrix @ signs)
    return estimate


def test_trace_is_within_three_standard_errors_whole_and_by_block():
    matrix = planted()
    result = traced(matrix, solved(matrix), 40).result()
    blocks = np.array([float(part.sum()) for part in matrix.diagonal().split(SIZES)])
    assert abs(result.value - SPECTRUM.sum()) < 3 * result.stderr
    assert (np.abs(result.layer - blocks) < 3.5 * result.layer_stderr).all()
    assert result.layer.sum() == pytest.approx(result.value)


def test_the_space_of_an_eigenvalue_run_takes_most_of_hutchinsons_variance():
    matrix = planted()
    with_space = traced(matrix, solved(matrix), 30).result().stderr
    plain = [float(s @ matrix @ s) for s in (random_signs(N, seed, matrix) for seed in range(30))]
    assert with_space < 0.3 * widened_stderr(np.array(plain))


def test_two_standard_errors_cover_the_trace_in_about_95_of_100_runs():
    matrix = planted()
    found = solved(matrix, k=2)
    samples = np.array(traced(matrix, found, 600)._samples).sum(1)
    inside = sum(traced(matrix, found, 0)._inside)
    groups = samples.reshape(100, 6)
    errors = np.array([widened_stderr(group) for group in groups])
    covered = np.abs(inside + groups.mean(1) - SPECTRUM.sum()) <= 2 * errors
    assert 0.88 <= covered.mean() <= 1.0


def test_trace_is_exact_without_a_probe_once_the_space_is_complete():
    matrix = planted(np.array([3.0, -1.0, 0.5, 0.25]))
    found = solved(matrix, k=4)
    result = TraceEstimate(space_of(found), (3, 1)).result()
    assert result.value == pytest.approx(2.75, abs=1e-12)
    assert result.stderr == 0.0
    np.testing.assert_allclose(
        result.layer, [float(matrix.diagonal()[:3].sum()), float(matrix[3, 3])], atol=1e-12
    )


def test_a_probe_less_the_eigenvectors_gives_the_same_sample_as_the_whole_probe():
    """So the first product of a density probe serves the trace."""
    matrix = planted()
    found = solved(matrix)
    signs = random_signs(N, 5, matrix)
    locked = found.eigenvector
    given = signs - (locked @ signs) @ locked
    whole, less = (TraceEstimate(space_of(found), SIZES) for _ in range(2))
    whole.add(signs, signs, matrix @ signs)
    less.add(signs, given, matrix @ given)
    np.testing.assert_allclose(less._samples[0], whole._samples[0], atol=1e-9)


def test_trace_after_a_thick_restart_still_uses_the_space_exactly():
    matrix = planted()
    found = solved(matrix, max_basis=14)
    result = traced(matrix, found, 30).result()
    assert abs(result.value - SPECTRUM.sum()) < 3 * result.stderr
    basis = torch.cat(list(space_of(found).rows()))
    outside = torch.eye(N, dtype=torch.float64) - basis.T @ basis
    expected = matrix.diagonal() - (outside @ matrix @ outside).diagonal()
    torch.testing.assert_close(space_of(found).diagonal_inside(), expected, rtol=0, atol=1e-9)


def test_one_probe_has_no_standard_error_and_never_counts_as_converged():
    matrix = planted()
    result = traced(matrix, solved(matrix), 1).result()
    assert math.isnan(result.stderr)
    assert not result.reached(10.0)


def test_blocks_that_do_not_cover_the_parameters_are_refused():
    with pytest.raises(ValueError, match="do not make"):
        TraceEstimate(space_of(solved(planted())), (1, 2))


def probes_of(matrix: Tensor, found: Eigenpairs, count: int, steps: int) -> list[Quadrature]:
    locked = found.eigenvector
    quadratures = []
    for seed in range(count):
        signs = random_signs(len(matrix), seed, matrix)
        start = signs - (locked @ signs) @ locked
        quadratures.append(quadrature(lambda v: matrix @ v, start, steps, locked))
    return quadratures


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_moments_of_the_density_are_within_their_standard_errors(power: int):
    matrix = planted()
    found = solved(matrix)
    value, stderr = moments(found.eigenvalue, probes_of(matrix, found, 12, 12), power)
    assert abs(value - (SPECTRUM**power).sum()) <= 3 * stderr + 1e-9


def test_quadrature_is_exact_for_low_powers_of_its_own_probe():
    """That many Lanczos steps, s, integrate polynomials up to degree 2s − 1 exactly (Golub and Meurant)."""
    matrix = planted()
    start = random_signs(N, 1, matrix)
    found = quadrature(lambda v: matrix @ v, start, 4, torch.zeros((0, N), dtype=torch.float64))
    power = start
    for degree in range(8):
        assert found.weight @ found.node**degree == pytest.approx(float(start @ power), rel=1e-9)
        power = matrix @ power
    torch.testing.assert_close(found.image, matrix @ start)


def test_a_density_integrates_to_one_and_is_near_the_true_one():
    matrix = planted()
    found = solved(matrix)
    width = 0.05
    smooth = density(found.eigenvalue, probes_of(matrix, found, 16, 30), N, n_grid=4000, width=width)
    step = smooth.at[1] - smooth.at[0]
    assert smooth.density.sum() * step == pytest.approx(1.0, abs=2e-3)
    distance = (smooth.at[:, None] - SPECTRUM) / width
    truth = np.exp(-(distance**2) / 2).sum(1) / (N * width * math.sqrt(2 * math.pi))
    assert np.abs(smooth.density - truth).sum() * step < 0.12
    assert np.nanmedian(np.abs(smooth.density - truth) / np.maximum(smooth.stderr, 1e-6)) < 3


def test_known_eigenvalues_stand_in_the_density_with_weight_one_each():
    matrix = planted()
    found = solved(matrix)
    smooth = density(found.eigenvalue, probes_of(matrix, found, 3, 20), N, n_grid=20001, width=0.02)
    near = np.abs(smooth.at - 20.0) < 0.5
    assert smooth.density[near].sum() * (smooth.at[1] - smooth.at[0]) * N == pytest.approx(1.0, abs=1e-3)


def test_the_negative_part_is_within_its_errors():
    matrix = planted()
    found = solved(matrix)
    negative = negative_part(found.eigenvalue, probes_of(matrix, found, 20, 40), N, cut=1e-9)
    true_share, true_trace = (SPECTRUM < 0).mean(), SPECTRUM[SPECTRUM < 0].sum()
    assert abs(negative.share - true_share) < 3 * negative.share_stderr + 0.01
    assert abs(negative.trace - true_trace) < 3 * negative.trace_stderr + 0.05


def test_a_probe_ends_where_its_krylov_space_ends():
    matrix = planted(np.array([2.0] * 5 + [1.0] * 5))
    start = random_signs(10, 0, matrix)
    found = quadrature(lambda v: matrix @ v, start, 8, torch.zeros((0, 10), dtype=torch.float64))
    assert len(found.node) == 2
    assert found.weight.sum() == pytest.approx(10.0)


def test_the_same_seed_gives_the_same_signs_on_any_machine_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    one, two = (random_signs(9, 3, torch.zeros(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert set(one.tolist()) <= {1.0, -1.0}
    assert torch.equal(state, torch.get_rng_state())
