"""Lanczos on planted spectra, where every eigenvalue is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.lanczos import lanczos
from dynprobe.analyzers.numerics.losses import get_loss


def planted(spectrum: np.ndarray, seed: int = 0) -> tuple[Tensor, int]:
    """A symmetric matrix with that spectrum in a random basis."""
    n = len(spectrum)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    return torch.from_numpy((basis * spectrum) @ basis.T), n


class Counted:
    def __init__(self, matrix: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.matrix, self.calls = matrix.to(dtype), 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ vector.to(self.matrix.dtype)


BULK = np.concatenate([np.linspace(-0.4, 0.5, 190), [8.0, 5.0, 3.0, 2.0, 1.2, -0.9, -1.5, -2.5, -4.0, -6.0]])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_planted_spectrum_is_found_in_order_with_true_bounds(which: str, k: int) -> None:
    matrix, n = planted(BULK)
    matvec = Counted(matrix)
    found = lanczos(matvec, n, k=k, which=which, tol=1e-6)
    ordered = np.sort(BULK)
    expected = {
        "LA": ordered[::-1][:k],
        "SA": ordered[:k],
        "LM": BULK[np.argsort(-np.abs(BULK))][:k],
        "BE": np.concatenate([ordered[::-1][: k - k // 2], ordered[: k // 2][::-1]]),
    }[which]
    error = np.abs(found.eigenvalue - expected)
    assert found.converged.all()
    assert (error <= 1e-6 * np.abs(expected)).all()
    assert (error <= found.error_bound + 1e-12).all()
    assert found.n_matvec == matvec.calls


def test_residual_is_that_of_the_returned_pair_and_not_an_estimate() -> None:
    matrix, n = planted(BULK)
    found = lanczos(Counted(matrix), n, k=3, tol=1e-3)
    vector = found.eigenvector
    explicit = (vector @ matrix - torch.from_numpy(found.eigenvalue)[:, None] * vector).norm(dim=1)
    np.testing.assert_allclose(found.residual, explicit.numpy(), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(vector @ vector.T, torch.eye(3, dtype=torch.float64))


def test_ill_conditioned_spectrum_gives_no_ghosts() -> None:
    """A converged outlier comes back again and again without reorthogonalisation."""
    spectrum = np.concatenate([[1e4, 1e3], np.linspace(0, 1, 298)])
    matrix, n = planted(spectrum)
    found = lanczos(Counted(matrix), n, k=10, tol=1e-8, max_iter=200)
    np.testing.assert_allclose(found.eigenvalue, np.sort(spectrum)[::-1][:10], rtol=1e-7)
    assert found.orthogonality < 1e-12


def test_plus_and_minus_the_same_eigenvalue_are_told_apart() -> None:
    """Power iteration returns a mixture of the two."""
    matrix, n = planted(np.concatenate([[2.0, -2.0], np.linspace(-0.5, 0.5, 60)]))
    found = lanczos(Counted(matrix), n, k=2, which="LM", tol=1e-8)
    np.testing.assert_allclose(np.sort(found.eigenvalue), [-2.0, 2.0], rtol=1e-8)
    both = lanczos(Counted(matrix), n, k=2, which="BE", tol=1e-8)
    np.testing.assert_allclose(both.eigenvalue, [2.0, -2.0], rtol=1e-8)


@pytest.mark.parametrize("copies", [2, 3])
def test_every_copy_of_a_multiple_eigenvalue_is_found(copies: int) -> None:
    matrix, n = planted(np.concatenate([[3.0] * copies, [2.0], np.linspace(0, 1, 80)]))
    found = lanczos(Counted(matrix), n, k=copies + 1, tol=1e-7)
    np.testing.assert_allclose(found.eigenvalue, [3.0] * copies + [2.0], rtol=1e-6)
    assert found.converged.all()


def test_clustered_eigenvalues_are_resolved() -> None:
    spectrum = np.concatenate([[1.0, 1.0 + 5e-4, 1.0 + 1e-3], np.linspace(0, 0.5, 60)])
    matrix, n = planted(spectrum)
    found = lanczos(Counted(matrix), n, k=3, tol=1e-7)
    np.testing.assert_allclose(found.eigenvalue, np.sort(spectrum)[::-1][:3], rtol=1e-7)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_low_rank_and_zero_operators_break_down_gracefully(which: str) -> None:
    matrix, n = planted(np.concatenate([[4.0, -1.0], np.zeros(20)]))
    found = lanczos(Counted(matrix), n, k=4, which=which, tol=1e-8)
    expected = {"LA": [4, 0, 0, 0], "SA": [-1, 0, 0, 0], "LM": [4, -1, 0, 0], "BE": [4, 0, 0, -1]}[which]
    np.testing.assert_allclose(found.eigenvalue, expected, atol=1e-10)
    nothing = lanczos(lambda v: 0 * v, 9, k=3, which=which)
    assert np.array_equal(nothing.eigenvalue, np.zeros(3))
    assert nothing.converged.all()


def test_all_eigenvalues_of_a_small_matrix_equal_the_dense_ones() -> None:
    matrix, n = planted(np.array([3.0, -1.0, 0.5, 0.5, 0.0]))
    found = lanczos(Counted(matrix), n, k=n, tol=1e-10)
    np.testing.assert_allclose(found.eigenvalue, [3.0, 0.5, 0.5, 0.0, -1.0], atol=1e-12)


def test_one_by_one_operator() -> None:
    found = lanczos(lambda v: -2.0 * v, 1, k=1)
    assert found.eigenvalue.tolist() == [-2.0]
    assert found.residual[0] < 1e-15


def test_smallest_eigenvalue_near_zero_is_judged_against_the_norm() -> None:
    matrix, n = planted(np.concatenate([[10.0], np.linspace(1e-9, 1, 100)]))
    found = lanczos(Counted(matrix), n, k=2, which="BE", tol=1e-2, relative_to="norm")
    assert found.converged.all()
    assert abs(found.eigenvalue[1]) <= 0.2
    assert found.n_matvec < 30


def test_max_iter_too_small_is_flagged_not_hidden() -> None:
    matrix, n = planted(np.linspace(0, 1, 200))
    found = lanczos(Counted(matrix), n, k=5, tol=1e-8, max_iter=8)
    assert not found.converged.any()
    assert (found.residual > 1e-3).all()


def test_non_finite_operator_gives_nan_and_not_converged() -> None:
    found = lanczos(lambda v: v * float("nan"), 10, k=2)
    assert np.isnan(found.eigenvalue).all()
    assert np.isnan(found.residual).all()
    assert not found.converged.any()
    assert found.n_matvec == 1


def test_float32_operator_stops_at_its_noise_floor_and_claims_no_more() -> None:
    matrix, n = planted(BULK)
    single = Counted(matrix, torch.float32)
    eps = float(torch.finfo(torch.float32).eps)
    found = lanczos(single, n, k=2, tol=1e-12, rounding=eps)
    assert found.n_matvec < 80
    assert (np.abs(found.eigenvalue - [8.0, 5.0]) <= 8 * eps * 8.0).all()
    assert (found.error_bound >= eps * 8.0 * 0.99).all()


def test_warm_start_at_the_eigenvectors_needs_fewer_products_and_agrees() -> None:
    spectrum = np.concatenate([np.linspace(-1, 1, 300), [1.1, -1.1]])
    matrix, n = planted(spectrum)
    cold = lanczos(Counted(matrix), n, k=2, which="BE", tol=1e-3)
    warm = lanczos(Counted(matrix), n, k=2, which="BE", tol=1e-3, start=cold.eigenvector.sum(0))
    np.testing.assert_allclose(warm.eigenvalue, [1.1, -1.1], rtol=1e-3)
    assert warm.n_matvec < cold.n_matvec


def test_warm_start_at_the_wrong_eigenvector_still_finds_the_largest() -> None:
    matrix = torch.diag(torch.tensor([5.0, 3.0, *np.linspace(0, 1, 30)], dtype=torch.float64))
    start = torch.zeros(32, dtype=torch.float64)
    start[1] = 1.0
    assert lanczos(Counted(matrix), 32, k=1, tol=1e-6, start=start).eigenvalue[0] == pytest.approx(
        5.0, rel=1e-6
    )


def test_same_seed_same_digits_and_global_random_state_untouched() -> None:
    matrix, n = planted(BULK)
    state = torch.get_rng_state()
    one, two = (lanczos(Counted(matrix), n, k=2, seed=3) for _ in range(2))
    assert np.array_equal(one.eigenvalue, two.eigenvalue)
    assert torch.equal(one.eigenvector, two.eigenvector)
    assert torch.equal(state, torch.get_rng_state())


def test_eigenvector_sign_is_fixed_by_its_largest_entry() -> None:
    matrix, n = planted(BULK)
    for seed in range(3):
        vector = lanczos(Counted(matrix), n, k=2, seed=seed).eigenvector
        assert (vector.gather(1, vector.abs().argmax(1, keepdim=True)) > 0).all()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="between 1 and the dimension 4"):
        lanczos(lambda v: v, 4, k=5)
    with pytest.raises(ValueError, match="LA, SA, LM or BE"):
        lanczos(lambda v: v, 4, which="XX")  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    spectrum=st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 7.0]), min_size=2, max_size=12),
    k=st.integers(1, 4),
    which=st.sampled_from(["LA", "SA"]),
)
def test_any_small_spectrum_with_repeats_equals_the_dense_one(
    spectrum: list[float], k: int, which: str
) -> None:
    k = min(k, len(spectrum))
    matrix, n = planted(np.array(spectrum))
    found = lanczos(Counted(matrix), n, k=k, which=which, tol=1e-8)
    expected = sorted(spectrum, reverse=which == "LA")[:k]
    np.testing.assert_allclose(found.eigenvalue, expected, atol=1e-7)


def test_hessian_of_a_trained_net_equals_the_dense_spectrum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
    loss = get_loss("cross_entropy")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    batches = list(zip(inputs.split([25, 15]), targets.split([25, 15]), strict=True))
    operator = HessianOperator(model, batches, loss)
    dense = torch.stack([operator(row) for row in torch.eye(operator.n_parameters, dtype=torch.float64)])
    exact = np.linalg.eigvalsh(dense.numpy())
    found = lanczos(operator, operator.n_parameters, k=6, which="BE", tol=1e-8)
    np.testing.assert_allclose(
        found.eigenvalue, np.concatenate([exact[::-1][:3], exact[:3][::-1]]), rtol=1e-7
    )


def test_twenty_equal_outliers_are_all_found_and_no_twenty_first() -> None:
    matrix, n = planted(np.concatenate([[5.0] * 20, np.linspace(-0.5, 1, 200)]))
    found = lanczos(Counted(matrix), n, k=22, tol=1e-6)
    np.testing.assert_allclose(found.eigenvalue[:20], 5.0, rtol=1e-6)
    np.testing.assert_allclose(found.eigenvalue[20:], [1.0, 1 - 1.5 / 199], rtol=1e-5)
    assert found.converged.all()
    assert found.orthogonality < 1e-12


def test_condition_number_1e12_beside_a_null_space_keeps_relative_accuracy_within_the_bounds() -> None:
    planted_values = np.geomspace(1e-12, 1, 60)[::-1]
    matrix, n = planted(np.concatenate([planted_values, np.zeros(100)]))
    found = lanczos(Counted(matrix), n, k=40, tol=1e-6)
    error = np.abs(found.eigenvalue - planted_values[:40])
    assert (error <= 20 * found.error_bound).all()
    assert (error[:20] <= 1e-12 * planted_values[:20]).all()


def test_what_rounding_cannot_resolve_is_never_claimed_more_accurate_than_the_floor() -> None:
    matrix, n = planted(np.concatenate([np.geomspace(1e-12, 1, 60), np.zeros(100)]))
    eps = float(torch.finfo(torch.float32).eps)
    found = lanczos(Counted(matrix, torch.float32), n, k=50, tol=1e-6, rounding=eps)
    assert (found.error_bound >= eps * 0.99).all()


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("room", [14, 20])
def test_restarts_within_a_memory_limit_give_the_same_pairs(which: str, room: int) -> None:
    spectrum = np.concatenate([np.linspace(-0.9, 1, 300), BULK[-10:]])
    matrix, n = planted(spectrum)
    free = lanczos(Counted(matrix), n, k=5, which=which, tol=1e-8)
    tight = lanczos(Counted(matrix), n, k=5, which=which, tol=1e-8, max_basis=room)
    np.testing.assert_allclose(tight.eigenvalue, free.eigenvalue, rtol=1e-7)
    assert tight.converged.all()
    assert tight.space is not None
    assert tight.space.n_allocated <= room
    explicit = (
        tight.eigenvector @ matrix - torch.from_numpy(tight.eigenvalue)[:, None] * tight.eigenvector
    ).norm(dim=1)
    np.testing.assert_allclose(tight.residual, explicit.numpy(), rtol=1e-6, atol=1e-12)


def test_restarts_find_multiple_eigenvalues_too() -> None:
    matrix, n = planted(np.concatenate([[3.0] * 4, np.linspace(0, 1, 150)]))
    found = lanczos(Counted(matrix), n, k=5, tol=1e-7, max_basis=16)
    np.testing.assert_allclose(found.eigenvalue, [3.0] * 4 + [1.0], rtol=1e-6)


def test_too_little_memory_is_said_with_what_is_needed() -> None:
    with pytest.raises(ValueError, match="room for at least 13 vectors"):
        lanczos(lambda v: v, 100, k=5, max_basis=6)


def test_an_operator_that_is_not_what_its_products_say_shows_as_a_discrepancy() -> None:
    """A buffer that moves, dropout that is on: the check product does not fit, and residuals are measured."""
    matrix, n = planted(BULK)
    calls = Counted(matrix)

    def drifting(vector: Tensor) -> Tensor:
        return calls(vector) * (1 + 1e-3 * calls.calls)

    found = lanczos(drifting, n, k=2, tol=1e-6)
    assert found.discrepancy > 1e-3
    assert (found.residual > 1e-3).all()
    assert not found.converged.any()
    assert lanczos(Counted(matrix), n, k=2, tol=1e-6).discrepancy < 1e-12


def test_a_matrix_that_is_not_symmetric_is_seen_and_no_eigenvalue_claimed_better_than_that() -> None:
    matrix, n = planted(BULK)
    skew = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lopsided = matrix + 1e-3 * (skew - skew.T)
    found = lanczos(Counted(lopsided), n, k=3, tol=1e-6)
    assert found.asymmetry > 1e-3
    assert (found.error_bound >= found.asymmetry).all()
    assert not found.converged.any()
    assert lanczos(Counted(matrix), n, k=3, tol=1e-6).asymmetry < 1e-13
    assert lanczos(Counted(matrix), n, k=3, tol=1e-6, max_basis=12).asymmetry < 1e-13


def test_a_second_copy_is_found_in_a_dense_spectrum_too() -> None:
    spectrum = np.concatenate([np.exp(-np.linspace(0, 8, 200)), np.zeros(300), [0.9, 0.9]])
    matrix, n = planted(spectrum)
    expected = np.sort(spectrum)[::-1][:10]
    found = [lanczos(Counted(matrix), n, k=10, tol=1e-6, seed=seed).eigenvalue for seed in range(5)]
    for eigenvalue in found:
        np.testing.assert_allclose(eigenvalue, expected, rtol=1e-5)
