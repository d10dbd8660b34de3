"""`dynprobe hessian-overlap` on planted eigenspaces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers import hessian_overlap as module
from dynprobe.analyzers.hessian_overlap import hessian_overlap
from dynprobe.analyzers.numerics.losses import get_loss

MSE = get_loss("mse")


@pytest.fixture(autouse=True)
def _forget():
    module._spaces.clear()


class Turned(nn.Module):
    """Outputs diag(c) R(angle) w: the squared loss has known eigenvectors, turned by an angle."""

    def __init__(self, angle: float, scale: tuple[float, ...] = (3.0, 2.0, 1.0, 0.5)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(scale), dtype=torch.float64))
        turn = torch.eye(len(scale), dtype=torch.float64)
        turn[1, 1] = turn[2, 2] = math.cos(angle)
        turn[1, 2], turn[2, 1] = math.sin(angle), -math.sin(angle)
        self.register_buffer("matrix", torch.diag(torch.tensor(scale, dtype=torch.float64)) @ turn)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.matrix @ self.w)


BATCHES = [(torch.ones(n, 1, dtype=torch.float64), torch.zeros(n, 4, dtype=torch.float64)) for n in (3, 2)]


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, math.pi / 2])
def test_overlap_of_spaces_turned_by_an_angle_is_its_squared_cosine_averaged_over_the_dimensions(angle):
    found = hessian_overlap(Turned(0.0).eval(), Turned(angle).eval(), BATCHES, MSE, top_k=2, tol=1e-10)
    assert found["overlap"] == pytest.approx((1 + math.cos(angle) ** 2) / 2, abs=1e-9)
    np.testing.assert_allclose(found["cosine"], [1.0, abs(math.cos(angle))], atol=1e-9)
    assert found["overlap_chance"] == 0.5
    assert found["overlap_error"] < 1e-6


def test_a_turn_within_the_space_leaves_the_overlap_at_one():
    """Eigenvectors of a cluster turn freely; the space they span does not."""
    found = hessian_overlap(Turned(0.0).eval(), Turned(0.7).eval(), BATCHES, MSE, top_k=3, tol=1e-10)
    assert found["overlap"] == pytest.approx(1.0, abs=1e-9)


def test_the_gap_says_where_the_space_is_badly_defined():
    clear = hessian_overlap(Turned(0.0).eval(), Turned(0.1).eval(), BATCHES, MSE, top_k=2)
    assert clear["gap_a"] == pytest.approx(1 / 4)
    near = Turned(0.0, (3.0, 2.0, 1.999, 0.5)).eval()
    assert hessian_overlap(near, near, BATCHES, MSE, top_k=2)["gap_a"] > 0.99


def test_of_pairs_in_a_row_each_checkpoint_is_solved_once():
    a, b, c = (Turned(x).eval() for x in (0.0, 0.2, 0.4))
    first = hessian_overlap(a, b, BATCHES, MSE, top_k=2)
    second = hessian_overlap(b, c, BATCHES, MSE, top_k=2)
    assert second.spent["hvps"] < 0.7 * first.spent["hvps"]
    again = hessian_overlap(a, b, BATCHES, MSE, top_k=2)
    assert again["overlap"] == first["overlap"]


def test_networks_of_different_size_are_refused():
    other = Turned(0.0, (3.0, 2.0, 1.0, 0.5)).eval()
    other.spare = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(OptionError, match="4 and 5 parameters"):
        hessian_overlap(Turned(0.0).eval(), other, BATCHES, MSE, top_k=2)


def test_more_pairs_than_parameters_are_refused():
    with pytest.raises(OptionError, match="more than the 4 parameters"):
        hessian_overlap(Turned(0.0).eval(), Turned(0.0).eval(), BATCHES, MSE, top_k=9)


def test_the_whole_space_overlaps_fully_without_a_gap_to_judge_it_by():
    found = hessian_overlap(Turned(0.0).eval(), Turned(1.0).eval(), BATCHES, MSE, top_k=4)
    assert found["overlap"] == pytest.approx(1.0)
    assert found["gap_a"] == 0.0


def test_networks_of_equal_weights_that_compute_otherwise_are_not_taken_for_each_other():
    inputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [(inputs, torch.zeros(30, 1, dtype=torch.float64))]
    nets = [nn.Sequential(nn.Linear(3, 4), kind(), nn.Linear(4, 1)).double() for kind in (nn.Tanh, nn.ReLU)]
    nets[1].load_state_dict(nets[0].state_dict())
    found = hessian_overlap(nets[0].eval(), nets[1].eval(), batches, MSE, top_k=2)
    assert not np.allclose(found["eigenvalue_a"], found["eigenvalue_b"], rtol=1e-3)


def test_other_data_in_the_same_list_are_not_taken_for_the_old():
    net = Turned(0.0).eval()
    data = [(torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))]
    first = hessian_overlap(net, net, data, MSE, top_k=2)
    data[0] = (3 * data[0][0], data[0][1])
    second = hessian_overlap(net, net, data, MSE, top_k=2)
    np.testing.assert_allclose(second["eigenvalue_a"], 9 * first["eigenvalue_a"], rtol=1e-6)


def test_what_is_remembered_is_the_pairs_alone():
    hessian_overlap(Turned(0.0).eval(), Turned(0.1).eval(), BATCHES, MSE, top_k=2)
    assert len(module._spaces) == 2
    assert all(found.space is None for found in module._spaces.values())


@pytest.mark.parametrize(
    ("scale", "reason"), [((0.0, 0.0, 0.0, 0.0), "not separated"), ((3.0, 2.0, 2.0, 0.5), "not separated")]
)
def test_a_space_that_is_not_separated_from_the_rest_is_said_not_to_be_one(scale, reason):
    net = Turned(0.0, scale).eval()
    found = hessian_overlap(net, net, BATCHES, MSE, top_k=2)
    assert not found.converged
    assert reason in found.reason
    assert found["overlap_error"] == 1.0


def test_products_that_are_not_finite_give_nan_with_the_checkpoint_named():
    bad = Turned(0.0).eval()
    bad.matrix[0, 0] = math.inf
    found = hessian_overlap(Turned(0.0).eval(), bad, BATCHES, MSE, top_k=2)
    assert math.isnan(found["overlap"])
    assert "second checkpoint" in found.reason
    assert not found.converged
