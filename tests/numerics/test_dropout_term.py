"""The dropout regulariser in closed form, against enumeration of all masks and against Monte Carlo."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from dynprobe.analyzers.numerics.dropout_term import (
    CHUNK,
    LastLayer,
    dropout_gap,
    dropout_term,
    is_quadratic,
    last_layer,
    last_linear,
)
from dynprobe.analyzers.numerics.losses import Loss, as_loss, get_loss

MSE, CE = get_loss("mse"), get_loss("cross_entropy")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2)).double().eval()


def data(n=40):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(n, 2, generator=generator, dtype=torch.float64)


def recorded(sizes=(40,)):
    inputs, targets = data()
    batches = list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))
    return last_layer(network(), "3", batches)


def mean_over_masks(layer, loss, keep):
    """Expected loss less the loss, of each sample: all 64 masks of 6 features with their probabilities."""
    mean = torch.zeros(len(layer.features), dtype=torch.float64)
    for mask in itertools.product((0.0, 1.0), repeat=6):
        kept = torch.tensor(mask, dtype=torch.float64)
        weight = keep ** float(kept.sum()) * (1 - keep) ** float(6 - kept.sum())
        outputs = layer.outputs + (layer.features * (kept / keep - 1)) @ layer.weight.T
        mean += weight * loss.per_sample(outputs, layer.targets)
    return mean - loss.per_sample(layer.outputs, layer.targets)


def test_for_half_the_squared_error_it_is_the_papers_formula():
    layer, keep = recorded(), 0.8
    half = Loss("half", lambda f, y: 0.5 * (f - y).square().sum(1), lambda f, y: f[:, 0])
    total = sum((layer.weight[:, j] * f[j]).square().sum() for f in layer.features for j in range(6))
    expected = (1 - keep) / (2 * len(layer.features) * keep) * total
    found = dropout_term(layer, half.per_sample, keep).mean()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_for_squared_errors_it_is_exactly_the_mean_over_all_masks(keep):
    layer = recorded()
    expected = mean_over_masks(layer, MSE, keep)
    torch.testing.assert_close(dropout_term(layer, MSE.per_sample, keep), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_monte_carlo_agrees_with_the_closed_form_within_three_standard_errors(seed):
    layer = recorded()
    term = float(dropout_term(layer, MSE.per_sample, 0.7).mean())
    gap = dropout_gap(layer, MSE.per_sample, 0.7, 2000, seed)
    assert abs(gap.value - term) < 3 * gap.stderr
    assert gap.stderr < 0.05 * term


def test_masks_are_those_of_torchs_dropout_with_one_minus_the_keep_probability():
    inputs, targets = data()
    model, layer = network(), recorded()
    model[2].p = 0.3
    model[2].train()
    torch.manual_seed(0)
    with torch.no_grad():
        losses = torch.stack([MSE(model(inputs), targets) for _ in range(1000)])
    losses -= MSE(layer.outputs, targets)
    term = float(dropout_term(layer, MSE.per_sample, 0.7).mean())
    assert abs(float(losses.mean()) - term) < 3 * float(losses.std()) / 1000**0.5


def test_for_cross_entropy_it_is_the_second_order_in_what_a_feature_adds_to_the_outputs():
    layer, keep = recorded(), 0.9
    errors = []
    for size in (0.1, 0.01):
        classes = LastLayer(layer.features, size * layer.weight, layer.outputs, layer.outputs.argmax(1))
        term = float(dropout_term(classes, CE.per_sample, keep).mean())
        exact = float(mean_over_masks(classes, CE, keep).mean())
        errors.append(abs(term - exact) / exact)
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(0.1 * errors[0], rel=0.2)


def test_nothing_depends_on_how_the_samples_are_split_into_batches():
    a, b = recorded(), recorded((7, 30, 3))
    assert dropout_gap(a, MSE.per_sample, 0.7, 5, 0).value == pytest.approx(
        dropout_gap(b, MSE.per_sample, 0.7, 5, 0).value, rel=1e-13
    )
    assert CHUNK > 40


def test_the_last_layer_is_found_and_its_absence_explained():
    inputs, _ = data()
    assert last_linear(network(), inputs) == ("3", "")
    squashed = nn.Sequential(network(), nn.Softmax(1))
    assert last_linear(squashed, inputs) == ("", "the outputs are not those of a linear layer")
    assert "3 dimensions" in last_linear(network(), inputs[None])[1]


def test_a_keep_probability_of_zero_and_a_single_draw_are_refused():
    with pytest.raises(ValueError, match="above 0 and at most at 1"):
        dropout_term(recorded(), MSE.per_sample, 0.0)
    with pytest.raises(ValueError, match="at least 2 draws"):
        dropout_gap(recorded(), MSE.per_sample, 0.5, 1, 0)


def test_keeping_everything_adds_nothing():
    assert not dropout_term(recorded(), MSE.per_sample, 1.0).any()
    assert dropout_gap(recorded(), MSE.per_sample, 1.0, 3, 0) == (0.0, 0.0)


def test_a_loss_is_told_to_be_quadratic_by_its_values():
    layer = recorded()
    functional = nn.functional
    for function, expected in (
        (functional.mse_loss, True),
        (lambda f, y: 0.5 * (f - y).square().sum(1).mean(), True),
        (functional.l1_loss, False),
        (lambda f, y: functional.huber_loss(f, y, delta=50.0), False),
        (lambda f, y: functional.cross_entropy(f, y.softmax(1)), False),
        (lambda f, y: functional.binary_cross_entropy_with_logits(f, y.sigmoid()), False),
    ):
        assert is_quadratic(layer, as_loss(function).per_sample) is expected
