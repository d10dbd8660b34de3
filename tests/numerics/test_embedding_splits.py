"""Splitting a neuron: the same function, the gradient of the chain rule, and the block of the Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dynprobe.analyzers.numerics.embedding import add_null, split, split_directions, widened_gradient
from dynprobe.analyzers.numerics.hidden_layer import CannotSplit, find_hidden, layers_in_order
from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.losses import get_loss

MSE = get_loss("mse")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = seeded(seed)
    model = model.double().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            positive = tensor.dim() == 1 and bool((tensor == 1).all())
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise.abs() + 0.2 if positive else 0.5 * noise)
    return model


class Functional(nn.Module):
    """A network that says nothing of its activation, pooling and flattening in modules."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 4, 2)

    def forward(self, x):
        return self.fc(functional.max_pool2d(functional.relu(self.norm(self.conv(x))), 2).flatten(1))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(h + torch.tanh(self.b(h)))


def mlp(activation, width=5, outputs=3):
    return randomised(nn.Sequential(nn.Linear(4, width), activation, nn.Linear(width, outputs)))


def images(n=6, size=6):
    return torch.randn(n, 1, size, size, generator=seeded(1), dtype=torch.float64)


def vectors(n=9):
    return torch.randn(n, 4, generator=seeded(1), dtype=torch.float64)


NETWORKS = {
    "tanh": (lambda: mlp(nn.Tanh()), "0", vectors),
    "relu": (lambda: mlp(nn.ReLU()), "0", vectors),
    "gelu": (lambda: mlp(nn.GELU()), "0", vectors),
    "prelu": (lambda: mlp(nn.PReLU(5)), "0", vectors),
    "batchnorm": (
        lambda: randomised(
            nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        ),
        "0",
        vectors,
    ),
    "convolution to convolution": (
        lambda: randomised(
            nn.Sequential(
                nn.Conv2d(1, 3, 3), nn.ReLU(True), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2)
            )
        ),
        "0",
        images,
    ),
    "convolution, batchnorm, pooling, flattened": (lambda: randomised(Functional()), "conv", images),
}


@pytest.mark.parametrize("alpha", [0.5, 0.3, -0.7])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_split_keeps_the_outputs_to_rounding(name, alpha):
    make, layer, data = NETWORKS[name]
    model, inputs = make(), data()
    wide = split(model, find_hidden(model, inputs, layer, 1), 1, alpha)
    with torch.no_grad():
        expected, found = model(inputs), wide(inputs)
    assert float((found - expected).abs().max()) < 1e-14 * float(expected.abs().max())
    more = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in model.parameters())
    hidden = find_hidden(model, inputs, layer, 1)
    assert more == len(split_directions(wide, hidden, 1, alpha).entries)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_of_a_split_network_is_that_of_the_chain_rule(name):
    make, layer, data = NETWORKS[name]
    model, inputs = make(), data()
    hidden = find_hidden(model, inputs, layer, 2)
    wide = split(model, hidden, 2, 0.3)

    def gradient(network):
        named = dict(network.named_parameters())
        value = network(inputs).square().mean()
        return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))

    expected, found = widened_gradient(gradient(model), hidden, 2, 0.3), gradient(wide)
    assert expected.keys() == found.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-13)


def eigenvalues(model, batches):
    operator = HessianOperator(model, batches, MSE)
    return torch.linalg.eigvalsh(
        operator.matmat(torch.eye(operator.n_parameters, dtype=torch.float64))
    ).numpy()


def signs(values, tol=1e-10):
    return np.array([(values < -tol).sum(), (np.abs(values) <= tol).sum(), (values > tol).sum()])


@pytest.mark.parametrize("alpha", [0.5, 0.2, 1.4, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_eigenvalues_of_the_wide_network_have_the_signs_of_the_narrow_ones_and_of_the_block(name, alpha):
    make, layer, data = NETWORKS[name]
    model, inputs = make(), data()
    outputs = model(inputs).shape[1]
    targets = torch.randn(len(inputs), outputs, generator=seeded(2), dtype=torch.float64)
    batches = [(inputs, targets)]
    hidden = find_hidden(model, inputs, layer, 0)
    wide = split(model, hidden, 0, alpha)
    directions = split_directions(wide, hidden, 0, alpha)
    operator = HessianOperator(wide, batches, MSE, parameters=directions.names)
    block = torch.linalg.eigvalsh(directions.block(operator.matvec)).numpy()
    found = signs(eigenvalues(wide, batches))
    np.testing.assert_array_equal(found, signs(eigenvalues(model, batches)) + signs(block))


def test_splits_of_a_relu_network_add_as_many_negative_as_positive_eigenvalues():
    model, inputs = mlp(nn.ReLU()), vectors()
    neuron = int((model[0](inputs) > 0).sum(0).argmax())
    hidden = find_hidden(model, inputs, "0", neuron)
    wide = split(model, hidden, neuron, 0.5)
    directions = split_directions(wide, hidden, neuron, 0.5)
    batches = [(inputs, torch.zeros(9, 3, dtype=torch.float64))]
    operator = HessianOperator(wide, batches, MSE, parameters=directions.names)
    negative, zero, positive = signs(torch.linalg.eigvalsh(directions.block(operator.matvec)).numpy())
    assert negative == positive == 3  # the rank of errors times inputs, of three outputs
    assert zero == 5 + 3 - 6


def test_a_neuron_that_nothing_reads_keeps_the_outputs_whatever_feeds_it():
    for name, (make, layer, data) in NETWORKS.items():
        model, inputs = make(), data()
        hidden = find_hidden(model, inputs, layer, 0)
        for generator in (None, seeded()):
            wide = add_null(model, hidden, generator)
            torch.testing.assert_close(wide(inputs), model(inputs), rtol=1e-12, atol=1e-13, msg=name)
            assert wide.get_submodule(layer).weight.shape[0] == hidden.width + 1


def test_a_model_is_not_changed_by_being_split():
    model, inputs = randomised(Functional()), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split(model, find_hidden(model, inputs, "conv", 1), 1, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_are_listed_in_the_order_in_which_they_run():
    assert layers_in_order(randomised(Skip()), vectors()) == ["a", "b", "c"]


def test_what_mixes_neurons_is_refused():
    model = mlp(nn.LayerNorm(5))
    with pytest.raises(CannotSplit, match="mixes neurons: a change of neuron 2 reaches other inputs of '2'"):
        find_hidden(model, vectors(), "0", 2)


def test_a_last_layer_a_group_convolution_and_a_shared_weight_are_refused():
    with pytest.raises(CannotSplit, match="no linear layer or convolution after layer '2'"):
        find_hidden(mlp(nn.Tanh()), vectors(), "2", 0)
    with pytest.raises(CannotSplit, match="'1' is no linear layer or convolution: it is a Tanh"):
        find_hidden(mlp(nn.Tanh()), vectors(), "1", 0)
    grouped = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(72, 1))
    with pytest.raises(CannotSplit, match="layer '1' is a convolution in groups"):
        find_hidden(grouped.double(), images(), "0", 0)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)).double()
    tied[2].weight = tied[0].weight
    with pytest.raises(CannotSplit, match="shares its weight"):
        find_hidden(tied, vectors(), "0", 0)
    computed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(CannotSplit, match="computed from other parameters"):
        find_hidden(nn.Sequential(computed, nn.Linear(4, 1)).double(), vectors(), "0", 0)
