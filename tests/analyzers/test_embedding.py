"""Splitting a neuron of a checkpoint: a critical point stays one, and gains zero and negative eigenvalues."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.result import Piece, stack
from dynprobe.analyzers.embedding import embedding
from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.losses import get_loss

MSE, CE = get_loss("mse"), get_loss("cross_entropy")
X = torch.linspace(-2, 2, 24, dtype=torch.float64)[:, None]
Y = torch.tanh(1.5 * X - 0.5) - 0.8 * torch.tanh(2 * X + 1) + 0.3 * torch.cos(5 * X)


class TwoLayers(nn.Module):
    def __init__(self, width, activation=torch.tanh, inputs=1, outputs=1, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, width), nn.Linear(width, outputs, bias=bias)
        self.activation = activation

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


@functools.cache
def width_two_critical_state():
    """A minimum of the width-2 network without biases at the output, by Newton's method to rounding."""
    model = TwoLayers(2, bias=False).double()
    with torch.no_grad():  # the target's smooth part
        model.a.weight.copy_(torch.tensor([[1.5], [2.0]]))
        model.a.bias.copy_(torch.tensor([-0.5, 1.0]))
        model.b.weight.copy_(torch.tensor([[1.0, -0.8]]))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def closure():
        optimizer.zero_grad()
        value = MSE(model(X), Y)
        value.backward()
        return value

    optimizer.step(closure)
    for _ in range(6):
        operator = HessianOperator(model, [(X, Y)], MSE)
        matrix = operator.matmat(torch.eye(operator.n_parameters, dtype=torch.float64))
        move = operator.as_dict(torch.linalg.solve(matrix, operator.gradient()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= move[name]
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def critical_model():
    model = TwoLayers(2, bias=False).double()
    model.load_state_dict(width_two_critical_state())
    return model


def on_critical(**options):
    return embedding(critical_model(), [(X[:10], Y[:10]), (X[10:], Y[10:])], MSE, **options)


def classifier(seed=0, width=6):
    torch.manual_seed(seed)
    model = TwoLayers(width, torch.relu, 4, 3)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(30, 4, generator=generator)
    return model, [(inputs, torch.randint(3, (30,), generator=generator))]


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_each_split_of_a_critical_point_keeps_loss_and_gradient_and_adds_one_zero_eigenvalue(alpha):
    found = on_critical(kind="multi-step", splits=2, alpha=alpha, gradient_tol=1e-13)
    assert found["verdict"] == "critical, kept"
    assert found["gradient_norm"].max() < 1e-15
    assert np.ptp(found["loss"]) < 1e-15
    assert found["zero"].tolist() == [0, 1, 2]
    assert found["negative"].tolist() == [0, 1, 2]
    assert found["positive"].tolist() == [6, 7, 8]
    assert found.converged


def test_counted_eigenvalues_are_those_predicted_from_the_blocks_of_the_splits():
    model, batches = classifier()
    found = embedding(model, batches, CE, kind="multi-step", splits=3, alpha=0.2, max_dense=100)
    for sign in ("negative", "zero", "positive"):
        np.testing.assert_array_equal(found[sign], found[f"predicted_{sign}"])
        assert found[f"predicted_{sign}"][-1] == found[sign][0] + found[f"added_{sign}"].sum()
    np.testing.assert_array_equal(found["n_parameters"], [51, 59, 67, 75])
    np.testing.assert_array_equal(found["negative"] + found["zero"] + found["positive"], [51, 59, 67, 75])


def test_a_null_neuron_with_random_weights_keeps_the_function_but_not_the_critical_point():
    found = on_critical(kind="null", gradient_tol=1e-13)
    assert found["output_difference"] < 1e-15
    assert found["verdict"] == "critical, lost"
    assert found["gradient_norm"][0] < 1e-15 < 1e-3 < found["gradient_norm"][1]
    assert any("null neuron" in note for note in found.notes)


def test_a_null_neuron_without_incoming_weights_keeps_both():
    found = on_critical(kind="null-zero", splits=2, gradient_tol=1e-13)
    assert found["verdict"] == "critical, kept"
    assert found["gradient_norm"].max() < 1e-15
    assert np.isnan(found["added_zero"]).all()


def test_a_network_in_training_is_not_called_critical():
    model, batches = classifier()
    found = embedding(model, batches, CE)
    assert found["verdict"] == "not critical"
    assert found["critical"].tolist() == [0, 0]
    assert found["gradient_threshold"] == pytest.approx(1e-6 * found["loss_scale"])
    share = torch.bincount(batches[0][1], minlength=3).double() / 30
    assert found["loss_scale"] == pytest.approx(float(-(share * share.log()).sum()))


@pytest.mark.parametrize("shape", [(24, 1), (24,)])
def test_an_offset_of_regression_targets_does_not_make_a_network_in_training_critical(shape):
    model = critical_model()
    with torch.no_grad():
        model.a.weight += 0.02
    plain = embedding(model, [(X, Y.reshape(shape))], MSE, max_dense=0, smallest=0)
    assert plain["loss_scale"] == pytest.approx(float(Y.var(correction=0)))

    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.by = model, nn.Parameter(torch.tensor(2000.0, dtype=torch.float64))

        def forward(self, x):
            return self.inner(x) + self.by

    found = embedding(Offset(), [(X, Y.reshape(shape) + 2000)], MSE, max_dense=0, smallest=0)
    assert found["loss_scale"] == pytest.approx(float(Y.var(correction=0)), rel=1e-6)
    assert found["gradient_norm"][0] > 1e-3
    assert found["gradient_threshold"] < 1e-5
    assert found["verdict"] == "not critical"


class Casting(TwoLayers):
    """A network that computes a part of its forward pass in float32."""

    def __init__(self, where):
        super().__init__(5, inputs=4, outputs=3)
        self.where = where

    def forward(self, x):
        x = x.float() if self.where == "inputs" else x
        h = torch.tanh(self.a(x))
        h = h.float().to(x.dtype) if self.where == "hidden" else h
        return self.b(h).to(torch.float32) if self.where == "outputs" else self.b(h)


@pytest.mark.parametrize("where", ["inputs", "hidden", "outputs"])
def test_a_network_that_casts_to_float32_is_refused(where):
    with pytest.raises(OptionError, match="forward converts to float32; embedding needs float64") as caught:
        embedding(Casting(where), classifier()[1], CE)
    assert ".float()" in caught.value.tip
    assert "negative" in embedding(Casting("nowhere"), classifier()[1], CE)


def test_a_network_that_insists_on_float32_is_refused():
    class Strict(TwoLayers):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("float32, please")
            return super().forward(x)

    with pytest.raises(OptionError, match=r"does not run in float64.*float32, please"):
        embedding(Strict(5, inputs=4, outputs=3), classifier()[1], CE)


def test_a_gradient_that_passes_the_threshold_by_being_split_is_undecided():
    model, batches = classifier()
    probe = embedding(model, batches, CE, alpha=3.0, neuron=1)
    narrow, wide = probe["gradient_norm"]
    tolerance = (narrow + wide) / 2 / probe["loss_scale"]
    assert narrow < wide
    assert (
        embedding(model, batches, CE, alpha=3.0, neuron=1, gradient_tol=tolerance)["verdict"] == "undecided"
    )


def test_outputs_and_the_predicted_gradient_agree_to_rounding():
    model, batches = classifier()
    found = embedding(model, batches, CE, alpha=0.25)
    assert found["output_relative_difference"] < 1e-14
    assert found["gradient_residual"].max() < 1e-15


def test_lanczos_gives_a_lower_bound_of_the_negative_eigenvalues_of_a_large_network():
    model, batches = classifier()
    dense = embedding(model, batches, CE)
    found = embedding(model, batches, CE, max_dense=20, smallest=3)
    assert found["negative_is_bound"].all()
    assert (found["negative"] <= dense["negative"]).all()
    np.testing.assert_allclose(found["smallest"], dense["smallest"], rtol=0.05)
    assert np.isnan(found["zero"]).all()
    assert np.isnan(found["predicted_negative"]).all()
    for sign in ("negative", "zero", "positive"):
        np.testing.assert_array_equal(found[f"added_{sign}"], dense[f"added_{sign}"])
    assert any("lower bounds" in note for note in found.notes)


def test_bounds_of_negative_eigenvalues_are_no_less_than_what_the_splits_add():
    model, batches = classifier()
    options = {"kind": "multi-step", "splits": 3, "max_dense": 20}
    found = embedding(model, batches, CE, **options)
    dense = embedding(model, batches, CE, **options | {"max_dense": 100})
    assert found["added_negative"].sum() > 1
    assert found["negative_is_bound"].all()
    assert (np.diff(found["negative"]) >= found["added_negative"]).all()
    assert (found["negative"] <= dense["negative"]).all()


def test_without_eigenvalues_the_rest_is_still_measured():
    model, batches = classifier()
    found = embedding(model, batches, CE, max_dense=0, smallest=0)
    assert "negative" not in found
    assert found.spent["hvps"] == 0
    assert np.isnan(found["added_zero"]).all()
    assert any("8 rows" in n for n in embedding(model, batches, CE, max_dense=5, smallest=0).notes)


def test_the_last_layer_that_can_be_split_is_chosen_and_a_skip_connection_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.one(x))
            return self.three(h + torch.tanh(self.two(h)))

    _, batches = classifier()
    with pytest.raises(OptionError, match=r"layer 'one'|layer 'two'") as caught:
        embedding(Net(), batches, CE)
    assert "skip connection" in caught.value.tip
    model, batches = classifier()
    deeper = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), model)
    assert "layer '2.a' of 6 neurons, read by '2.b'" in embedding(deeper, batches, CE).notes[0]
    assert "layer '0' of 4 neurons, read by '2.a'" in embedding(deeper, batches, CE, layer="0").notes[0]


def test_the_dropout_regulariser_agrees_with_monte_carlo_for_squared_errors():
    found = on_critical(keep=0.8, draws=400)
    assert abs(found["dropout_gap"] - found["dropout_term"]) < 3 * found["dropout_gap_stderr"]
    model, batches = classifier()
    assert any("only for squared errors is it exact" in n for n in embedding(model, batches, CE).notes)
    assert math.isnan(embedding(model, batches, CE, draws=0)["dropout_gap"])


@pytest.mark.parametrize("loss", [nn.functional.mse_loss, nn.MSELoss(), nn.MSELoss(reduction="sum")])
def test_squared_errors_under_other_names_are_known_by_their_values(loss):
    found = embedding(critical_model(), [(X, Y)], loss, max_dense=0, smallest=0)
    assert not any("expansion" in note for note in found.notes)


def test_a_dropout_regulariser_that_monte_carlo_contradicts_is_said_to_be_wrong():
    model, batches = classifier()
    with torch.no_grad():
        model.b.weight *= 30  # confident outputs
    found = embedding(model, batches, CE, draws=400, max_dense=0, smallest=0)
    off = abs(found["dropout_gap"] - found["dropout_term"])
    assert off > 3 * found["dropout_gap_stderr"]
    assert any("disagrees with Monte Carlo" in n and "believe dropout_gap" in n for n in found.notes)


def test_draws_that_are_too_few_to_check_the_dropout_regulariser_are_said_to_be():
    model, batches = classifier()
    few, many = (
        embedding(model, batches, CE, draws=n, keep=0.5, max_dense=0, smallest=0).notes for n in (5, 3000)
    )
    assert any("draws are too few" in note for note in few)
    assert not any("draws are too few" in note for note in many)


@pytest.mark.parametrize(
    ("options", "message", "tip"),
    [
        ({"splits": 2}, "a one-step embedding adds one neuron, not 2", "multi-step"),
        ({"kind": "null", "alpha": 0.3}, "splits no neuron", "Leave them out"),
        ({"kind": "null-zero", "neuron": 1}, "splits no neuron", "Leave them out"),
        ({"alpha": math.inf}, "alpha inf is no number", "--alpha 0.3"),
        ({"keep": 0.0}, "no feature is ever kept", "above 0"),
        ({"draws": 1}, "one draw has no standard error", "--draws 2"),
        ({"neuron": 6}, "layer 'a' has 6 neurons, none has the number 6", "--neuron 0 to 5"),
        ({"layer": "b"}, "no linear layer or convolution after layer 'b'", "--layer one of: a"),
        ({"layer": "c"}, "layer 'c' is no linear layer or convolution: there is none", "--layer one of: a"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_tip(options, message, tip):
    model, batches = classifier()
    with pytest.raises(OptionError, match=message) as caught:
        embedding(model, batches, CE, **options)
    assert tip in caught.value.tip


def test_a_network_without_hidden_layers_is_refused():
    with pytest.raises(OptionError, match="no hidden linear layer"):
        embedding(nn.Linear(4, 3), classifier()[1], CE)


def test_the_model_is_untouched_and_seeds_decide_what_is_drawn():
    model, batches = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = {
        embedding(model, batches, CE, seed=seed, max_dense=0, smallest=0)["neuron"][0] for seed in range(9)
    }
    assert len(numbers) > 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.a.weight.dtype == torch.float32


@pytest.mark.parametrize("style", ["", "spectrum", "block", "gradient"])
def test_its_figure_draws_in_every_style_and_with_a_single_checkpoint(style):
    figures = pytest.importorskip("matplotlib.figure")
    declaration = declaration_of(embedding)
    figure = figures.Figure()
    arrays = labelled(declaration, on_critical())
    declaration.figure(stack("embedding", "checkpoint", [Piece("k", {"step": 3}, arrays)], {}), figure, style)
    assert len(figure.axes) == (1 if style else 2)
    with pytest.raises(OptionError, match="not a style"):
        declaration.figure(stack("embedding", "checkpoint", [Piece("k", {}, arrays)], {}), figure, "x")


def test_the_figure_of_a_large_network_shows_the_blocks_and_says_what_is_missing():
    figures = pytest.importorskip("matplotlib.figure")
    declaration = declaration_of(embedding)
    model, batches = classifier()
    for options, panels in (({"max_dense": 20, "smallest": 0}, 2), ({"max_dense": 0, "smallest": 0}, 1)):
        arrays = labelled(declaration, embedding(model, batches, CE, **options))
        result = stack("embedding", "checkpoint", [Piece("k", {"step": 3}, arrays)], {})
        figure = figures.Figure()
        declaration.figure(result, figure)
        assert len(figure.axes) == panels
        with pytest.raises(OptionError, match="no eigenvalues for the style spectrum"):
            declaration.figure(result, figures.Figure(), "spectrum")
