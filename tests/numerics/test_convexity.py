"""Both ends of the Hessian's spectrum along a row, against the dense Hessian in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers.numerics.convexity import convexity_row
from dynprobe.analyzers.numerics.directions import random_directions
from dynprobe.analyzers.numerics.losses import get_loss


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 3, (20,))
    return model, list(zip(inputs.split([14, 6]), targets.split([14, 6]), strict=True))


def dense_ends(model: nn.Module, batches, directions, x: float, y: float) -> tuple[float, float]:
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    weights = dict(model.named_parameters())
    place = torch.cat([
        (w.detach() + sum(c * d[n] for c, d in zip((x, y), directions, strict=False))).flatten()
        for n, w in weights.items()
    ])  # fmt: skip

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in weights.values()])
        filled = {n: p.view_as(w) for (n, w), p in zip(weights.items(), parts, strict=True)}
        return functional.cross_entropy(torch.func.functional_call(model, filled, (inputs,)), targets)

    spectrum = torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, place))
    return float(spectrum[-1]), float(spectrum[0])


def test_both_ends_equal_the_dense_spectrum_at_every_point() -> None:
    model, batches = problem()
    directions = random_directions(model, 2, seed=0)
    xs = [-1.0, -0.2, 0.0, 0.7]
    row = convexity_row(model, batches, get_loss("cross_entropy"), directions, 0.4, xs, tol=1e-6)
    exact = np.array([dense_ends(model, batches, directions, x, 0.4) for x in xs])
    np.testing.assert_allclose(row["lambda_max"], exact[:, 0], rtol=1e-5)
    np.testing.assert_allclose(row["lambda_min"], exact[:, 1], atol=1e-5 * exact[:, 0].max())
    assert (row["converged"] == 1).all()
    assert (row["hvps"] > 2).all()


def test_warm_start_changes_the_count_and_not_the_answer() -> None:
    model, batches = problem()
    directions = random_directions(model, 1, seed=0)
    loss, xs = get_loss("cross_entropy"), [0.0, 0.01, 0.02]
    together = convexity_row(model, batches, loss, directions, 0.0, xs, tol=1e-3)
    alone = [convexity_row(model, batches, loss, directions, 0.0, [x], tol=1e-3) for x in xs]
    np.testing.assert_allclose(together["lambda_max"], [row["lambda_max"][0] for row in alone], rtol=2e-3)
    assert together["hvps"][1:].sum() < sum(row["hvps"][0] for row in alone[1:])


def test_the_same_samples_in_other_batches_have_the_same_eigenvalues() -> None:
    """Summed over batches instead of averaged over samples, four batches give four times the eigenvalue."""
    model, batches = problem()
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    loss, directions = get_loss("cross_entropy"), random_directions(model, 1, seed=0)
    one = convexity_row(model, [(inputs, targets)], loss, directions, 0.0, [0.3], tol=1e-8)
    many = list(zip(inputs.split(6), targets.split(6), strict=True))
    four = convexity_row(model, many, loss, directions, 0.0, [0.3], tol=1e-8)
    np.testing.assert_allclose(four["lambda_max"], one["lambda_max"], rtol=1e-7)


def test_a_point_without_a_finite_hessian_is_nan_and_its_neighbours_are_not() -> None:
    model, batches = problem()
    directions = [{"0.weight": torch.ones(5, 3, dtype=torch.float64)}]
    row = convexity_row(model, batches, get_loss("cross_entropy"), directions, 0.0, [0.0, float("inf"), 0.0])
    assert row["converged"].tolist() == [1, 0, 1]
    assert np.isnan(row["lambda_max"]).tolist() == [False, True, False]
    assert row["lambda_max"][0] == row["lambda_max"][2]


def test_a_single_parameter_has_one_eigenvalue_at_both_ends() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    batch = (torch.full((3, 1), 2.0, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    row = convexity_row(model, [batch], get_loss("mse"), [{"weight": torch.ones(1, 1)}], 0.0, [0.0])
    assert row["lambda_max"][0] == row["lambda_min"][0] == 8.0
