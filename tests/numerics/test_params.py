"""Parameters, their filters, and the guard that puts a model back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynprobe.analyzers.numerics.params import (
    filter_axis,
    frozen_eval,
    layers_of,
    private_copy,
    same_bits,
    weight_parameters,
)


class Conv1D(nn.Module):
    """As in transformers: the weight is (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.bias = nn.Parameter(torch.zeros(5))


def test_the_filter_axis_is_that_of_the_outputs_for_every_kind_of_layer() -> None:
    layers = {
        "linear": nn.Linear(3, 5),
        "conv": nn.Conv2d(4, 6, 3, groups=2),
        "transposed": nn.ConvTranspose2d(4, 6, 3),
        "grouped": nn.ConvTranspose1d(4, 6, 3, groups=2),
        "gpt2": Conv1D(),
        "embedding": nn.Embedding(7, 3),
        "norm": nn.BatchNorm2d(4),
        "lstm": nn.LSTM(3, 4),
    }
    axes = filter_axis(nn.ModuleDict(layers))
    expected = {"linear": 0, "conv": 0, "transposed": 1, "grouped": 1, "gpt2": 1, "embedding": 0}
    assert {name: axes[f"{name}.weight"] for name in expected} == expected
    assert (axes["norm.weight"], axes["linear.bias"], axes["lstm.weight_hh_l0"]) == (None, None, 0)
    assert [getattr(axes[f"{name}.weight"], "groups") for name in ("transposed", "grouped")] == [1, 2]  # noqa: B009


def test_a_tied_tensor_appears_once_under_its_first_name() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    model[1].weight = model[0].weight
    assert list(weight_parameters(model)) == ["0.weight"]
    assert filter_axis(model) == {"0.weight": 0}


def test_frozen_eval_puts_everything_back_after_the_worst_treatment() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = gradient = torch.ones(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(KeyError), frozen_eval(model) as lent:  # noqa: PT012
        assert not any(module.training for module in lent.modules())
        lent.train()
        lent(torch.randn(8, 3)).sum().backward()
        lent[0].weight.data = torch.full((4, 3), float("nan"))
        lent.requires_grad_(True)
        raise KeyError
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True]
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)
    assert model[0].weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), random)


def test_frozen_eval_is_loud_when_a_parameter_was_replaced() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="'weight' was replaced"), frozen_eval(model):
        model.weight = nn.Parameter(torch.zeros(2, 2))


def test_same_bits_tells_nan_from_nan_by_its_bits_and_minus_zero_from_zero() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_with_computed_weights_can_be_copied() -> None:
    model = nn.utils.weight_norm(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    expected = model(x)
    torch.testing.assert_close(private_copy(model)(x), expected)


def test_what_a_parametrised_weight_is_computed_from_belongs_to_the_layer_of_the_weight() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    layers = layers_of(name for name, _ in model.named_parameters())
    assert {layer: len(names) for layer, names in layers.items()} == {"0": 3, "1": 2}
    alone = layers_of(name for name, _ in norm(nn.Linear(3, 2)).named_parameters())
    assert {layer: len(names) for layer, names in alone.items()} == {"bias": 1, "weight": 2}
