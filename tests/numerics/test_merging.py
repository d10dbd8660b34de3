"""Finding out which layer reads which, and merging neurons of one direction."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynprobe.analyzers.numerics.merging import merge
from dynprobe.analyzers.numerics.outgoing import Link, links, made_up_inputs


@pytest.fixture(autouse=True)
def seeded():
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


def mlp(activation, width=12, *, bias=True):
    return nn.Sequential(
        nn.Linear(5, width, bias), activation, nn.Linear(width, 7), activation, nn.Linear(7, 3)
    ).double().eval()  # fmt: skip


class Functional(nn.Module):
    """A network whose activations, pooling and flattening are no modules."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4 * 9, 3)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.one(x)), 2)
        return self.three(torch.relu(self.two(x)).flatten(1))


class Residual(nn.Module):
    """A skip connection: the second layer is not the only one that reads the first."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + torch.relu(self.inner(x)))


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("activation", "homogeneous", "odd"),
    [
        (nn.ReLU(), True, False),
        (nn.LeakyReLU(0.1), True, False),
        (nn.Identity(), True, True),
        (nn.Tanh(), False, True),
        (nn.GELU(), False, False),
        (nn.SiLU(), False, False),
        (nn.Sigmoid(), False, False),
        (nn.ReLU6(), False, False),
        (nn.Softplus(), False, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_activation_allows_is_found_out_by_trying(activation, homogeneous, odd):
    found, refused = links(mlp(activation), data(8, 5))
    assert not refused
    assert found == {
        "0": Link("0", "2", homogeneous, odd),
        "2": Link("2", "4", homogeneous, odd),
    }


def test_functional_activations_pooling_and_flattening_are_seen_through():
    found, refused = links(Functional().double().eval(), data(4, 1, 12, 12))
    assert not refused
    assert found == {"one": Link("one", "two", True, False), "two": Link("two", "three", True, False)}


def test_a_layer_that_a_skip_connection_reads_too_is_refused():
    found, refused = links(Residual().double().eval(), data(4, 5))
    assert "first" not in found
    assert refused["first"] == "not only inner depends on it"


def test_normalisation_over_the_neurons_is_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    found, refused = links(model, data(4, 5))
    assert not found
    assert "by itself" in refused["0"]


def test_neurons_with_slopes_of_their_own_are_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 2)).double().eval()
    model[1].weight.data = torch.linspace(0, 0.5, 6, dtype=torch.float64)
    found, refused = links(model, data(4, 5))
    assert not found
    assert "same function" in refused["0"]


def test_layers_used_twice_and_grouped_convolutions_are_refused():
    shared = nn.Linear(5, 5)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(5, 2)).double().eval()
    assert links(twice, data(4, 5))[0] == {}
    grouped = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=2)).double().eval()
    assert "grouped" in links(grouped, data(4, 2, 9))[1]["0"]


def test_the_weights_are_put_back_and_the_random_state_is_untouched():
    model = mlp(nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    links(model, data(4, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_merging_parallel_relu_neurons_keeps_the_function():
    model, inputs = mlp(nn.ReLU(), 24), data(50, 5)
    first = model[0]
    with torch.no_grad():
        scale = torch.rand(24, generator=torch.Generator().manual_seed(1)).double() + 0.2
        which = torch.arange(24) % 4
        first.weight.copy_(scale[:, None] * first.weight[which])
        first.bias.copy_(scale * first.bias[which])
    before = model(inputs)
    kept = merge(model, links(model, inputs)[0]["0"], 0.999)
    assert kept.sum() == 4
    assert torch.count_nonzero(model[2].weight.any(0)) == 4
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-12)


def test_merging_opposite_relu_neurons_would_change_the_function_and_is_not_done():
    model, inputs = mlp(nn.ReLU()), data(20, 5)
    with torch.no_grad():
        model[0].weight[1:].copy_(-model[0].weight[:1])
        model[0].bias[1:].copy_(-model[0].bias[:1])
    before = model(inputs)
    assert merge(model, links(model, inputs)[0]["0"], 0.95).sum() == 2
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-12)


def test_tanh_neurons_are_merged_with_their_opposites_but_not_with_longer_ones():
    model, inputs = mlp(nn.Tanh(), 3), data(20, 5)
    with torch.no_grad():
        for row, factor in ((1, -1.0), (2, 5.0)):
            model[0].weight[row].copy_(factor * model[0].weight[0])
            model[0].bias[row].copy_(factor * model[0].bias[0])
    before = model(inputs)
    assert merge(model, links(model, inputs)[0]["0"], 0.95).sum() == 2
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-12)


def test_merging_convolutions_keeps_the_function_through_padding_pooling_and_flattening():
    model, inputs = Functional().double().eval(), data(6, 1, 12, 12)
    with torch.no_grad():
        model.one.weight[3:].copy_(2 * model.one.weight[:3])
        model.one.bias[3:].copy_(2 * model.one.bias[:3])
        model.two.weight[2:].copy_(0.5 * model.two.weight[:2])
        model.two.bias[2:].copy_(0.5 * model.two.bias[:2])
    before = model(inputs)
    found, _ = links(model, inputs)
    assert [int(merge(model, found[name], 0.99).sum()) for name in ("one", "two")] == [3, 2]
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-12)


def test_neurons_that_nothing_reads_or_that_are_zero_are_cut_off_without_a_change():
    model, inputs = mlp(nn.ReLU(), 6), data(20, 5)
    with torch.no_grad():
        model[2].weight[:, 0] = 0
        model[0].weight[1] = 0
        model[0].bias[1] = 0
    before = model(inputs)
    kept = merge(model, links(model, inputs)[0]["0"], 0.9999)
    assert kept.tolist() == [False, False, True, True, True, True]
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-12)


def test_a_zero_neuron_of_a_sigmoid_is_a_constant_and_stays():
    model, inputs = mlp(nn.Sigmoid(), 6), data(20, 5)
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1:3] = 0
    before = model(inputs)
    assert merge(model, links(model, inputs)[0]["0"], 0.9999).sum() == 5
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-12)


def test_neurons_below_the_least_amplitude_are_dropped():
    model = mlp(nn.ReLU(), 6)
    with torch.no_grad():
        model[0].weight[2] *= 1e-6
        model[0].bias[2] *= 1e-6
    kept = merge(model, links(model, data(8, 5))[0]["0"], 0.9999, least_amplitude=1e-3)
    assert not kept[2]
    assert kept.sum() == 5


def test_inputs_that_show_a_networks_connections_are_made_up_from_its_first_layer():
    assert made_up_inputs(mlp(nn.ReLU())).shape == (4, 5)
    assert made_up_inputs(nn.Sequential(nn.Conv2d(3, 2, 3))).shape == (4, 3, 32, 32)
    assert made_up_inputs(nn.Sequential(nn.ReLU())) is None


@pytest.mark.parametrize(
    "activation",
    [nn.Hardtanh(0, 20), nn.Hardtanh(-20, 20), nn.Hardtanh(0, 1800), nn.Softshrink(1e-3), nn.GELU()],
)
def test_activations_that_are_homogeneous_only_in_a_part_of_their_range_are_not_called_so(activation):
    assert not links(mlp(activation), data(8, 5))[0]["0"].homogeneous


def test_an_activation_is_tried_out_beyond_the_inputs_that_it_has():
    clipped = mlp(nn.Hardtanh(0, 5e5))
    assert links(clipped, data(8, 5))[0]["0"].homogeneous
    assert not links(clipped, 1e5 * data(8, 5))[0]["0"].homogeneous
    assert links(mlp(nn.ReLU()), 1e5 * data(8, 5))[0]["0"].homogeneous


def test_merging_neurons_of_a_relu_clipped_at_20_keeps_the_function():
    model, inputs = mlp(nn.Hardtanh(0, 20)), 100 * data(20, 5)
    with torch.no_grad():
        model[0].weight[6:].copy_(2 * model[0].weight[:6])
        model[0].bias[6:].copy_(2 * model[0].bias[:6])
    before = model(inputs)
    assert merge(model, links(model, inputs)[0]["0"], 0.999).sum() == 12
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-12)
