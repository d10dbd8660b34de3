"""`dynprobe condensation` on networks whose condensation is planted, trained, or absent."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.condensation import condensation
from dynprobe.analyzers.core import registry
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.loop import Job, MemoryStore, measure, run_unit
from dynprobe.analyzers.core.result import Array, Piece, stack
from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.analyzers.numerics.losses import get_loss

TANH_STEPS = 20
DIRECTIONS = ("effective_directions", "effective_directions_unsigned")


def two_layer(width, activation, *, bias=True, inputs=1):
    return nn.Sequential(nn.Linear(inputs, width, bias), activation, nn.Linear(width, 1, bias)).double()


def initialise(model, std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def checkpoints_of(*models, has_model=True):
    """Like those of a run: each with a step, a state and a model."""
    return [
        SimpleNamespace(
            step=step,
            path=f"step_{step}.pt",
            state={name: value.detach().clone() for name, value in model.state_dict().items()},
            **({"model": model} if has_model else {}),
        )
        for step, model in enumerate(models)
    ]


def copy_of(model):
    import copy

    return copy.deepcopy(model).eval()


def gradients(model, inputs, targets):
    return torch.autograd.grad((model(inputs) - targets).square().mean(), list(model.parameters()))


def gradient_descent(model, inputs, targets, steps, learning_rate):
    for _ in range(steps):
        for parameter, gradient in zip(model.parameters(), gradients(model, inputs, targets), strict=True):
            parameter.data -= learning_rate * gradient
    return model


def adam(model, inputs, targets, steps, learning_rate):
    """Written out: `torch.optim` takes seconds to import."""
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step in range(1, steps + 1):
        every = zip(model.parameters(), gradients(model, inputs, targets), moments, strict=True)
        for parameter, gradient, (mean, square) in every:
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient**2, 0.001)
            scale = (square / (1 - 0.999**step)).sqrt() + 1e-8
            parameter.data -= learning_rate * mean.data / (1 - 0.9**step) / scale
    return model


def curve():
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    return x, torch.sin(3 * x) + 0.5


def sine():
    x = torch.rand(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.3
    return x, x.sum(1, keepdim=True).sin() + 0.5


def test_a_tanh_network_with_tiny_weights_condenses_into_one_direction_up_to_sign():
    model = initialise(two_layer(50, nn.Tanh(), inputs=5), 50.0**-4)
    first = copy_of(model)
    adam(model, *sine(), TANH_STEPS, 0.002)
    found = condensation(checkpoints_of(first, model))
    threshold = list(found["threshold"]).index(0.95)
    signed, unsigned = (found[n][:, 0, threshold] for n in DIRECTIONS)
    assert signed[0] > 40
    assert signed[1] <= 2
    assert unsigned[1] == 1
    assert found["effective_directions_unsigned_high"][1, 0, threshold] == 1
    assert found["chance_directions_low"][0, threshold] > 40
    assert found["relative_distance"][1, 0] > 1e4
    assert found["orientation_share"][1, 0].min() == pytest.approx(1)


def test_a_network_with_large_weights_does_not_condense():
    model = initialise(two_layer(50, nn.Tanh(), inputs=5), 50.0**-0.5)
    first = copy_of(model)
    adam(model, *sine(), TANH_STEPS, 0.002)
    found = condensation(checkpoints_of(first, model))
    before, after = found["effective_directions"][:, 0, 1]
    assert after > 0.8 * before
    assert found["relative_distance"][1, 0] < 1


def test_the_relative_distance_is_that_of_weights_and_bias_as_one_vector():
    one, two = (initialise(two_layer(4, nn.ReLU()), 1.0, seed) for seed in (0, 1))
    found = condensation(checkpoints_of(one, two))
    flat = [torch.cat([p.detach().flatten() for p in model[0].parameters()]) for model in (one, two)]
    assert found["relative_distance"][1, 0] == pytest.approx(
        float((flat[1] - flat[0]).norm() / flat[0].norm())
    )
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, two)]
    assert found["relative_distance_all"][1] == pytest.approx(
        float((flat[1] - flat[0]).norm() / flat[0].norm())
    )
    np.testing.assert_array_equal(found["relative_distance"][0], 0)


def test_the_amplitude_is_the_product_of_both_norms_where_the_next_layer_is_known():
    model = initialise(two_layer(4, nn.ReLU()), 1.0)
    found = condensation(checkpoints_of(model))
    length = torch.cat([model[0].weight, model[0].bias[:, None]], 1).norm(dim=1)
    expected = (length * model[2].weight.norm(dim=0)).detach().numpy()
    np.testing.assert_allclose(found["amplitude"][-1, 0, :4], expected)
    assert list(found["amplitude_kind"]) == ["|a||w|", "|w|"]


def test_a_run_without_a_model_is_measured_from_names_and_shapes():
    models = [initialise(two_layer(6, nn.ReLU()), 1.0, seed) for seed in (0, 1)]
    found = condensation(checkpoints_of(*models, has_model=False))
    known = condensation(checkpoints_of(*models))
    for name in ("effective_directions_least", "relative_distance"):
        np.testing.assert_allclose(found[name], known[name])
    assert list(found["amplitude_kind"]) == ["|w|", "|w|"]
    assert "no model" in found.notes[0]


def test_neurons_without_a_bias_are_counted_in_one_dimension_fewer():
    model = initialise(two_layer(20, nn.ReLU(), bias=False), 1.0)
    found = condensation(checkpoints_of(model))
    assert found["fan_in"][0] == 1
    np.testing.assert_array_equal(found["effective_directions"][0, 0], 2)
    np.testing.assert_array_equal(found["effective_directions_unsigned"][0, 0], 1)
    assert set(found["orientation"][0, 0].round(12)) == {0.0, round(math.pi, 12)}


def test_neurons_that_are_zero_are_counted_apart():
    model = initialise(two_layer(6, nn.ReLU()), 1.0)
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = 0
    found = condensation(checkpoints_of(model))
    assert found["zero_neurons"][0, 0] == 4
    assert found["effective_directions_high"][0, 0, 1] <= 2
    assert np.isnan(found["orientation"][0, 0, :4]).all()
    assert np.isnan(found["similarity"][0, 0, :4]).all()


def test_neurons_below_the_least_amplitude_are_counted_apart():
    model = initialise(two_layer(6, nn.ReLU(), inputs=9), 1.0)
    with torch.no_grad():
        model[0].weight[0] *= 1e-5
        model[0].bias[0] *= 1e-5
    whole, without = (condensation(checkpoints_of(model), least_amplitude=x) for x in (0.0, 1e-3))
    assert whole["effective_directions"][0, 0, 2] == 6
    assert without["effective_directions"][0, 0, 2] == 5
    assert without["small_neurons"][0, 0] == 1


def test_layers_that_start_at_zero_have_no_relative_distance_but_a_note():
    one, two = two_layer(4, nn.ReLU()), initialise(two_layer(4, nn.ReLU()), 1.0)
    with torch.no_grad():
        for parameter in one[0].parameters():
            parameter.zero_()
    found = condensation(checkpoints_of(one, two))
    assert np.isnan(found["relative_distance"][:, 0]).all()
    assert any("all zero" in note for note in found.notes)


def test_layers_above_the_largest_size_are_left_uncounted_with_a_note():
    model = initialise(two_layer(20, nn.ReLU()), 1.0)
    found = condensation(checkpoints_of(model), max_neurons=10)
    assert np.isnan(found["effective_directions"][0, 0]).all()
    assert np.isfinite(found["effective_directions"][0, 1]).all()
    assert any("--max-neurons 10" in note for note in found.notes)


def planted(dtype=torch.float64):
    """A BatchNorm network for two classes, in which 4 of 8 hidden neurons are multiples of the others."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    ).to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
        model[1].running_var.abs_().add_(0.1)
        model[4].weight[4:] = 3 * model[4].weight[:4]
        model[4].bias[4:] = 3 * model[4].bias[:4]
    inputs = torch.randn(30, 1, 6, 6, generator=generator).to(dtype)
    targets = torch.randint(2, (30,), generator=generator)
    return model.eval(), list(zip(inputs.split([13, 17]), targets.split([13, 17]), strict=True))


def test_the_network_of_merged_parallel_neurons_has_the_same_loss():
    model, batches = planted()
    found = condensation(
        checkpoints_of(model), batches, get_loss("cross_entropy"), thresholds="0.9999", verify=True
    )
    assert list(found["layer"]) == ["0", "4", "6"]
    np.testing.assert_array_equal(found["reduced_neurons"][:, 0], [4, 4, np.nan])
    assert abs(found["reduced_loss_change"][0]) < 1e-12
    assert found["reduced_loss"][0] == pytest.approx(found["loss"], abs=1e-12)
    assert found["reduced_agreement"][0] == 1
    assert found["n_weights"] == 4 * 9 + 4 + 64 * 8 + 8 + 8 * 2 + 2
    assert found["reduced_weights"][0] == 4 * 9 + 4 + 64 * 4 + 4 + 4 * 2 + 2
    assert any("BatchNorm folded" in note for note in found.notes)
    assert found.spent == {"forwards": 2}


def test_verifying_leaves_the_model_as_it_was():
    model, batches = planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    condensation(checkpoints_of(model), batches, get_loss("cross_entropy"), verify=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_split_into_batches_does_not_change_what_is_verified():
    model, batches = planted()
    whole = [tuple(torch.cat(part) for part in zip(*batches, strict=True))]
    one, two = (
        condensation(
            checkpoints_of(model), each, get_loss("cross_entropy"), verify=True, thresholds="0.5,0.8"
        )
        for each in (batches, whole)
    )
    for name in ("reduced_loss", "reduced_loss_stderr", "reduced_loss_change", "reduced_accuracy"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-10, atol=1e-12)


def test_a_regression_is_verified_by_its_loss_alone():
    model = initialise(two_layer(8, nn.Tanh()), 1.0)
    x, y = curve()
    found = condensation(checkpoints_of(model), [(x, y)], get_loss("mse"), verify=True)
    assert "accuracy" not in found
    assert found["reduced_loss"].shape == (3,)
    assert any("not positively homogeneous" in note for note in found.notes)


def test_verify_says_why_no_layer_can_be_merged():
    model = nn.Sequential(nn.Linear(1, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 1)).double().eval()
    with pytest.raises(OptionError, match="0: 3 is not given each of its neurons by itself"):
        condensation(checkpoints_of(model), [curve()], get_loss("mse"), verify=True)


def test_verify_needs_data_and_a_model():
    model = initialise(two_layer(4, nn.ReLU()), 1.0)
    with pytest.raises(OptionError, match="needs data"):
        condensation(checkpoints_of(model), verify=True)
    with pytest.raises(OptionError, match="needs the model"):
        condensation(checkpoints_of(model, has_model=False), [curve()], get_loss("mse"), verify=True)


@pytest.mark.parametrize("text", ["0.9,a", "0.9,0.9", "1", "0", ""])
def test_thresholds_that_are_no_cosines_are_refused(text):
    model = initialise(two_layer(4, nn.ReLU()), 1.0)
    with pytest.raises(OptionError, match="thresholds"):
        condensation(checkpoints_of(model), thresholds=text)


def test_a_run_without_any_layer_is_refused():
    with pytest.raises(OptionError, match="no linear or convolutional layer"):
        condensation(checkpoints_of(nn.BatchNorm1d(3)))


def test_the_same_seed_gives_the_same_ranges_and_weights_alone_ask_for_no_data():
    model = initialise(two_layer(30, nn.ReLU()), 1.0)
    one, two = (condensation(checkpoints_of(model), orders=5, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one["effective_directions_low"], two["effective_directions_low"])
    declaration = registry.load("condensation")
    assert declaration.needed({"verify": False}) == ("checkpoints", "progress")
    assert "batches" in declaration.needed({"verify": True})


def test_neurons_are_left_out_of_the_report_on_demand():
    model = initialise(two_layer(30, nn.ReLU()), 1.0)
    assert "similarity" not in condensation(checkpoints_of(model), neurons=0)
    few = condensation(checkpoints_of(model), neurons=5)
    assert few["similarity"].shape == (2, 2, 5, 5)
    largest = np.argsort(-condensation(checkpoints_of(model))["amplitude"][1, 0])[:5]
    np.testing.assert_array_equal(few["neuron_index"][0], np.sort(largest))


class Stored:
    """A checkpoint in memory, as the loop reads it."""

    def __init__(self, model, step, run):
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.step, self.run, self.path = step, run, f"{run}/{step}.pt"

    def load(self):
        return SimpleNamespace(state=self.state, notes=[], hash=f"{self.run} {self.step}")


def no_data():
    raise AssertionError("weights alone are enough")


def test_a_run_without_model_and_data_goes_through_the_loop():
    stored = [Stored(initialise(two_layer(5, nn.ReLU()), 1.0, seed), seed, "run") for seed in (0, 1)]
    setup = Setup(
        no_data, lambda *_: no_data(), no_data, no_data, no_data, no_data, "cpu", None, has_model=False
    )
    run = Run("run", stored, setup)
    declaration = registry.load("condensation")
    job = Job(declaration, {option.name: option.default for option in declaration.options})
    ((piece, _),) = list(measure(job, [run_unit(run, stored)], MemoryStore()))
    assert (piece.status, piece.reason) == ("ok", "")
    assert piece.arrays["relative_distance"].values.shape == (2, 2)


def piece_of(found, run="run"):
    """As the loop makes it, with the labels of its checkpoints."""
    arrays = labelled(declaration_of(condensation), found)
    count = len(found["relative_distance"])
    steps = Array(("checkpoint",), np.arange(count))
    runs = Array(("checkpoint",), np.array([run] * count, dtype=object))
    return Piece(run, {"run": run}, {**arrays, "step": steps, "checkpoint_run": runs})


def of_widths(train, widths=(128, 512, 2048), **attributes):
    """The stacked result of one trained two-layer network of each width."""
    declaration = declaration_of(condensation)
    pieces = []
    for width in widths:
        first, last = train(width)
        found = condensation(checkpoints_of(first, last), neurons=0, max_neurons=1)
        pieces.append(piece_of(found, f"width_{width}"))
    return declaration.summary(stack("condensation", "run", pieces, attributes))


def in_the_ntk_regime(width):
    """Output scaled by 1/√m: γ = 1/2, γ' = 0."""
    x, y = curve()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = initialise(two_layer(width, nn.ReLU()), 1.0)

        def forward(self, inputs):
            return self.net(inputs) / math.sqrt(width)

    model = Scaled()
    return copy_of(model), gradient_descent(model, x, y, 100, 0.5)


def test_relative_distances_over_widths_fall_in_the_linear_regime():
    found = of_widths(in_the_ntk_regime)
    assert list(found["slope_layer"]) == ["widened layers", "net.0", "net.2"]
    slope, low, high = (found[f"width_slope{end}"][0] for end in ("", "_low", "_high"))
    assert slope == pytest.approx(-0.5, abs=0.15)
    assert low < slope < high
    assert found["run_width"].tolist() == pytest.approx([128, 512, 2048])
    assert "S_w = -0." in str(found["finding"][-1])


def test_the_regime_follows_planted_distances_and_its_margin_is_an_option():
    def planted_slope(width):
        first = initialise(two_layer(width, nn.ReLU()), 1.0)
        last = copy_of(first)
        with torch.no_grad():
            for parameter in last.parameters():
                parameter *= 1 + 0.1 * width**0.05
        return first, last

    assert str(of_widths(planted_slope)["regime"][0]) == "critical"
    assert str(of_widths(planted_slope, options={"critical_slope": 0.01})["regime"][0]) == "condensed"


def test_two_widths_give_no_slope():
    found = of_widths(in_the_ntk_regime, widths=(4, 8))
    assert "width_slope" not in found


def test_condensation_is_said_only_beyond_chance_and_beyond_the_first_checkpoint():
    random = [initialise(two_layer(50, nn.ReLU()), 1.0, seed) for seed in (0, 1)]
    condensed = copy_of(random[1])
    with torch.no_grad():
        condensed[0].weight.copy_(condensed[0].weight[:1].expand(50, 1))
        condensed[0].bias.copy_(condensed[0].bias[:1].expand(50))
    said = []
    for last in (random[1], condensed):
        result = stack("condensation", "run", [piece_of(condensation(checkpoints_of(random[0], last)))], {})
        said.append(str(declaration_of(condensation).summary(result)["finding"][0]))
    assert said[0].startswith("no layer has condensed")
    assert said[1].startswith("1 of 2 layers condensed, 0 most: 50 neurons in 1 direction (cosine 0.95)")


def test_styles_of_the_figure_that_the_result_does_not_allow_are_refused():
    from matplotlib.figure import Figure

    declaration = declaration_of(condensation)
    models = [initialise(two_layer(6, nn.ReLU()), 1.0, seed) for seed in (0, 1)]
    result = stack("condensation", "run", [piece_of(condensation(checkpoints_of(*models), neurons=0))], {})
    declaration.figure(result, Figure(), "curves")
    for style, said in (("width", "different width"), ("neurons", "--neurons"), ("odd", "not a style")):
        with pytest.raises(OptionError) as caught:
            declaration.figure(result, Figure(), style)
        assert said in f"{caught.value.message} {caught.value.tip}"


def said_of(*models, **options):
    result = stack("condensation", "run", [piece_of(condensation(checkpoints_of(*models), **options))], {})
    return str(declaration_of(condensation).summary(result)["finding"][0])


def test_neurons_that_were_pruned_or_left_out_are_not_said_to_have_condensed():
    first = initialise(two_layer(60, nn.ReLU(), inputs=9), 1.0)
    pruned, small = copy_of(first), copy_of(first)
    with torch.no_grad():
        for model, factor in ((pruned, 0.0), (small, 1e-6)):
            for parameter in model[0].parameters():
                parameter[20:] *= factor
    assert said_of(first, pruned).startswith("no layer has condensed")
    assert said_of(first, small, least_amplitude=1e-3).startswith("no layer has condensed")
    with torch.no_grad():
        for parameter in pruned[0].parameters():
            parameter[:20] = parameter[:1].clone()
    assert "0 most: the 20 counted of 60 neurons in 1 direction (cosine 0.95)" in said_of(first, pruned)
    assert " of 60 neurons at the first checkpoint" in said_of(first, pruned)


def figure_of(n_runs, style, **options):
    from matplotlib.figure import Figure

    models = [initialise(two_layer(6, nn.ReLU()), 1.0, seed) for seed in (0, 1)]
    with torch.no_grad():
        for parameter in models[1][0].parameters():
            parameter[4:] = 0
    found = condensation(checkpoints_of(*models), **options)
    pieces = [piece_of(found, f"run_{k}") for k in range(n_runs)]
    figure = Figure()
    declaration_of(condensation).figure(stack("condensation", "run", pieces, {}), figure, style)
    return figure


def test_the_figure_says_which_of_several_runs_it_draws():
    assert figure_of(4, "neurons").get_suptitle() == "run_0: 1 of 4 runs"
    assert figure_of(4, "curves").get_suptitle() == "the first 3 of 4 runs"
    assert figure_of(3, "curves").get_suptitle() == figure_of(1, "neurons").get_suptitle() == ""


def test_the_figure_relates_directions_to_the_neurons_that_were_counted():
    titles = [axis.get_title(loc="left") for axis in figure_of(1, "neurons").axes]
    assert any(title.startswith("first: ") and title.endswith(" of 6") for title in titles)
    assert any(title.startswith("last: ") and title.endswith(" of 4 counted") for title in titles)
