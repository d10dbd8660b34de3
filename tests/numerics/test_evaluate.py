"""Means over samples: exact for ragged batches, whatever the model takes and returns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.evaluate import (
    call,
    estimate,
    evaluate,
    move,
    protect_inputs,
    resolve_metrics,
)
from dynprobe.analyzers.numerics.losses import get_loss

LOSS = get_loss("cross_entropy")


class Returns(nn.Module):
    def __init__(self, wrap: object) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> object:
        return self.wrap(x * scale)  # type: ignore[operator]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, "cache"),
        lambda x: [x],
        lambda x: {"logits": x},
        lambda x: SimpleNamespace(logits=x, hidden_states=None),
    ],
)
def test_the_outputs_are_taken_from_whatever_the_model_returns(wrap: object) -> None:
    x = torch.ones(2, 3)
    model = Returns(wrap)
    assert torch.equal(call(model, x), x)
    assert torch.equal(call(model, (x, 2.0)), 2 * x)
    assert torch.equal(call(model, {"x": x, "scale": 3.0}), 3 * x)


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="the model returned NoneType"):
        call(Returns(lambda x: None), torch.ones(1))


def test_unequal_batches_give_the_mean_over_samples_not_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(11, 4, generator=generator), torch.arange(11) % 4
    whole = evaluate(nn.Identity(), [(x, t)], LOSS, ("loss", "accuracy"))
    parts = [(x[:1], t[:1]), (x[1:8], t[1:8]), (x[8:], t[8:])]
    split = evaluate(nn.Identity(), parts, LOSS, ("loss", "accuracy"))
    exact = LOSS.per_sample(x.double(), t)
    assert split["loss"].value == pytest.approx(float(exact.mean()), rel=1e-6)
    assert split["loss"].stderr == pytest.approx(float(exact.std()) / math.sqrt(11), rel=1e-6)
    assert split["loss"].n_samples == 11
    assert split["accuracy"] == whole["accuracy"]


def test_accuracy_error_is_the_binomial_one_up_to_the_sample_correction() -> None:
    values = torch.tensor([1.0] * 30 + [0.0] * 10)
    p, stderr, n = estimate(values)
    assert p == 0.75
    assert stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


def test_a_single_sample_has_no_standard_error() -> None:
    assert math.isnan(estimate(torch.tensor([2.0])).stderr)


def test_nan_and_infinity_stay_what_they_are() -> None:
    assert math.isnan(estimate(torch.tensor([1.0, math.nan])).value)
    assert estimate(torch.tensor([1.0, math.inf])).value == math.inf


def test_no_batches_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="no batches"):
        evaluate(nn.Identity(), [], LOSS)


def test_own_metrics_are_functions_of_outputs_and_targets() -> None:
    metrics = {"margin": lambda outputs, targets: outputs.max(1).values}
    x, t = torch.arange(6.0).reshape(2, 3), torch.zeros(2, dtype=torch.long)
    assert evaluate(nn.Identity(), [(x, t)], LOSS, metrics)["margin"].value == 3.5


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match="'f1'"):
        resolve_metrics(("loss", "f1"), LOSS)


def test_moving_inputs_changes_the_dtype_of_floating_point_tensors_only() -> None:
    moved = move(
        {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.long), "flag": True}, None, torch.float64
    )
    assert (moved["x"].dtype, moved["ids"].dtype, moved["flag"]) == (torch.float64, torch.int64, True)


class Centres(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x -= 1.0
        return x


def test_a_model_that_writes_over_its_inputs_is_given_copies_and_others_are_not() -> None:
    x = torch.ones(3, 2)
    for model in (Centres(), nn.Sequential(nn.ReLU(inplace=True))):
        protect_inputs(model, x)
        model(x)
        assert torch.equal(x, torch.ones(3, 2))
        assert model._forward_pre_hooks
    plain = nn.Identity()
    protect_inputs(plain, x)
    assert not plain._forward_pre_hooks
