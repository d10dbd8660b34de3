"""`linear_dynamics` against networks trained here, whose early learning the theory predicts."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._linear_dynamics_findings import findings
from dynprobe.analyzers._linear_dynamics_model import DRAWS, schedule_of
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.result import Array, Piece, Result, stack, tidy
from dynprobe.analyzers.linear_dynamics import linear_dynamics
from dynprobe.analyzers.numerics.linear_model import shuffled
from dynprobe.analyzers.numerics.losses import as_loss, get_loss

MSE, CROSS_ENTROPY = get_loss("mse"), get_loss("cross_entropy")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Erf(nn.Module):
    """f = Σ v erf(w·x/√d)/√m with a symmetric start, as in the paper."""

    def __init__(self, inputs: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        half, head = (
            normal(width // 2, inputs, seed=7).to(dtype),
            normal(1, width // 2, seed=8).sign().to(dtype),
        )
        self.w = nn.Parameter(torch.cat([half, half]))
        self.v = nn.Parameter(torch.cat([head, -head], 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.erf(x @ self.w.T / math.sqrt(self.w.shape[1]))
        return hidden @ self.v.T / math.sqrt(self.w.shape[0])


class Checkpoints(list):
    """Checkpoints that refill one shared model, as those of a run do."""

    def __init__(self, model: nn.Module, states: list[dict], steps: list) -> None:
        super().__init__(_Checkpoint(model, s, t) for s, t in zip(states, steps, strict=True))


class _Checkpoint:
    def __init__(self, shared: nn.Module, state: dict, step) -> None:
        self._shared, self.state, self.step = shared, state, step

    @property
    def model(self) -> nn.Module:
        self._shared.load_state_dict(self.state)
        return self._shared


def trained(model, loss, data, steps, rate, **options) -> Checkpoints:
    """Full-batch gradient descent; the states at these steps."""
    inputs, targets = data
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, **options)
    states = []
    for step in range(max(steps) + 1):
        if step in steps:
            states.append({name: t.clone() for name, t in model.state_dict().items()})
        if step < max(steps):
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
    return Checkpoints(model.eval(), states, list(steps))


def split(data, sizes=None):
    sizes = sizes or [len(data[1])]
    return list(zip(data[0].split(sizes), data[1].split(sizes), strict=True))


D, TRAIN, TEST, RATE = 50, 1000, 500, 0.8
ERF_STEPS = [0, 1, 2, 5, 10, 40]


@functools.cache
def erf_run(width: int):
    """An erf network in the paper's scaling on a target with a linear and a quadratic part."""
    inputs = normal(TRAIN + TEST, D).float()
    target = inputs @ normal(D, 1, seed=1).float() / math.sqrt(D)
    target = target + (inputs[:, :1] * inputs[:, 1:2]) * 0.75
    data = (inputs[:TRAIN], target[:TRAIN]), (inputs[TRAIN:], target[TRAIN:])
    return trained(Erf(D, width, torch.float32), MSE, data[0], ERF_STEPS, RATE), *data


@functools.cache
def erf_found(width: int):
    checkpoints, train, test = erf_run(width)
    return linear_dynamics(checkpoints, split(train), MSE, split(test), {"learning_rate": RATE})


def at(found, name: str, step: int, feature_set: str = "paper") -> float:
    row = ERF_STEPS.index(step)
    return float(found[name][row, list(found["feature_set"]).index(feature_set)])


@pytest.mark.parametrize("width", [512, 2048])
def test_a_two_layer_erf_network_differs_from_its_linear_model_by_0_6_d_over_width_at_step_10(width):
    found = erf_found(width)
    assert found["expected_floor"] == pytest.approx(0.6 * D / width)
    assert at(found, "relative_mse", 10) == pytest.approx(0.6 * D / width, rel=0.25)


def test_the_residual_in_v_lin_falls_and_its_complement_stays():
    found = erf_found(2048)
    inside, outside = found["residual_linear"], found["residual_complement"]
    assert inside[-1] < 0.2 * inside[0]
    assert outside[-1] == pytest.approx(outside[0], rel=0.1)
    assert inside[0] + outside[0] == pytest.approx(1, rel=1e-5)  # symmetric: the network starts at 0
    assert found["v_lin_dimension"] == D + 1


def test_the_network_agrees_with_the_measured_kernel_too_and_the_norm_terms_of_erf_vanish():
    found = erf_found(2048)
    assert at(found, "relative_mse", 10, "measured kernel") < 0.05
    assert at(found, "relative_mse", 10, "paper without norm") == pytest.approx(at(found, "relative_mse", 10))


def test_zero_and_network_are_one_start_where_the_network_starts_at_zero():
    checkpoints, train, test = erf_run(512)
    zero = linear_dynamics(checkpoints, split(train), MSE, split(test), {"learning_rate": RATE}, start="zero")
    np.testing.assert_allclose(zero["relative_mse"][1:], erf_found(512)["relative_mse"][1:], rtol=1e-3)


def result_of(found, name="run"):
    arrays = labelled(declaration_of(linear_dynamics), found)
    steps = ERF_STEPS[: len(found["loss"])]
    arrays["step"] = Array(("checkpoint",), tidy(steps))
    arrays["checkpoint_run"] = Array(("checkpoint",), tidy([name] * len(steps)))
    return Piece(name, {"run": name}, arrays)


def test_findings_say_until_when_the_network_is_linear_and_that_a_narrow_one_cannot_tell():
    wide, narrow = result_of(erf_found(2048), "wide"), result_of(erf_found(128), "narrow")
    result: Result = stack("linear-dynamics", "run", [wide, narrow], {"options": {"level": 0.1}})
    texts = list(findings(result)["finding"])
    assert any(t.startswith("wide: the part in V_lin falls first") for t in texts)
    paper = [t for t in texts if "(paper)" in t]
    assert "they agree" in paper[0]
    assert "undecided" not in paper[0]
    assert "undecided: a network of this width is expected to differ by 0.23" in paper[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_a_linear_network_agrees_with_its_linear_model_to_rounding(bias, options):
    data = normal(60, 5), normal(60, 2, seed=4)
    checkpoints = trained(nn.Linear(5, 2, bias).double(), MSE, data, [0, 1, 5, 40], 0.1, **options)
    found = linear_dynamics(checkpoints, split(data), MSE, None, {"learning_rate": 0.1, **options})
    assert list(found["feature_set"]) == ["measured kernel"]
    assert np.nanmax(found["relative_mse"]) < 1e-20
    assert list(found["agreement_state"]) == ["never"]
    np.testing.assert_allclose(found["linear_loss"][:, 0], found["loss"], rtol=1e-9)


def test_logistic_regression_agrees_with_its_linear_model_whatever_the_loss():
    data = normal(60, 5), torch.arange(60) % 3
    checkpoints = trained(nn.Linear(5, 3).double(), CROSS_ENTROPY, data, [0, 3, 30], 0.5)
    found = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, {"learning_rate": 0.5})
    assert np.nanmax(found["relative_mse"]) < 1e-20
    assert found["shown_output"].tolist() == [0, 0, 2]
    np.testing.assert_allclose(found["sample_output"], found["linear_output"], rtol=1e-9)

    signs = normal(60, 5), (torch.arange(60) % 2).double()[:, None]
    bce = get_loss("bce_with_logits")
    checkpoints = trained(nn.Linear(5, 1).double(), bce, signs, [0, 3, 30], 0.5)
    found = linear_dynamics(checkpoints, split(signs), bce, None, {"learning_rate": 0.5})
    assert np.nanmax(found["relative_mse"]) < 1e-20


def test_a_network_trained_long_enough_reaches_the_least_squares_optimum():
    data = normal(60, 5), normal(60, 2, seed=4)
    checkpoints = trained(nn.Linear(5, 2).double(), MSE, data, [0, 2000], 0.3)
    found = linear_dynamics(checkpoints, split(data), MSE, None, {"learning_rate": 0.3})
    assert found["optimum_mse"][-1, 0] < 1e-20
    assert found["residual_linear"][-1] < 1e-20
    assert list(np.isnan(found["relative_mse"][:, 0])) == [True, True]  # beyond --linear-steps 1000
    assert any("--linear-steps" in note for note in found.notes)


def small_run(steps=(0, 2, 8), seed=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)).double().eval()
    data = normal(40, 6), torch.arange(40) % 3
    return trained(model, CROSS_ENTROPY, data, list(steps), 0.2), data


FACTS = {"learning_rate": 0.2}


def test_the_constant_can_be_left_out_of_v_lin_and_that_is_said():
    checkpoints, data = small_run()
    inside = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, FACTS)
    outside = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, FACTS, constant=False)
    assert (inside["v_lin_dimension"], outside["v_lin_dimension"]) == (7, 6)
    assert any("with the constant" in note for note in inside.notes)
    assert any("without the constant" in note for note in outside.notes)
    assert inside["residual_linear"][0] > outside["residual_linear"][0]


def test_unequal_batches_change_nothing():
    checkpoints, data = small_run()
    whole = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, FACTS)
    parts = linear_dynamics(checkpoints, split(data, [20, 17, 3]), CROSS_ENTROPY, None, FACTS)
    for name, value in whole.items():
        if np.asarray(value).dtype.kind == "f":
            np.testing.assert_allclose(value, parts[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_samples_whose_label_is_ignored_are_in_nothing():
    checkpoints, (inputs, labels) = small_run()
    marked = torch.cat([inputs, 9 * normal(3, 6, seed=2)]), torch.cat([labels, torch.full((3,), -100)])
    kept = linear_dynamics(checkpoints, split((inputs, labels)), CROSS_ENTROPY, None, FACTS)
    found = linear_dynamics(checkpoints, split(marked, [21, 22]), CROSS_ENTROPY, None, FACTS)
    np.testing.assert_allclose(found["relative_mse"], kept["relative_mse"], rtol=1e-9)
    np.testing.assert_allclose(found["kernel_slope"], kept["kernel_slope"], rtol=1e-9)


def test_inputs_may_be_a_dictionary():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 2).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(torch.cat([x, y], 1))

    model, data = Named(), normal(30, 5)
    batches = [({"x": data[:20, :3], "y": data[:20, 3:]}, torch.zeros(20, dtype=torch.long))]
    batches += [({"x": data[20:, :3], "y": data[20:, 3:]}, torch.ones(10, dtype=torch.long))]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = linear_dynamics(Checkpoints(model, [state], [0]), batches, CROSS_ENTROPY, None, FACTS)
    assert found["n_inputs"] == 5
    assert (found["kernel_slope"], found["kernel_constant"]) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("facts", "steps", "reason"),
    [
        ({"optimizer": "adam", "learning_rate": 0.1}, [0, 1], "adam"),
        ({}, [0, 1], "learning rate is not known"),
        ({"learning_rate": 0.1, "schedule": "step"}, [0, 1], "schedule 'step'"),
        ({"learning_rate": 0.1}, [None, None], "no steps that are whole numbers"),
        ({"learning_rate": 0.1}, [0.5, 1.5], "no steps that are whole numbers"),
    ],
)
def test_without_knowing_how_the_run_descended_the_comparison_is_nan_with_the_reason(facts, steps, reason):
    checkpoints, data = small_run((0, 2))
    for checkpoint, step in zip(checkpoints, steps, strict=True):
        checkpoint.step = step
    found = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, facts)
    assert np.isnan(found["relative_mse"]).all()
    assert set(found["agreement_state"]) == {"unknown"}
    assert np.isfinite(found["residual_linear"]).all()
    assert any(reason in note and "NaN" in note for note in found.notes)


LENGTHS = {"linear_steps": 60, "n_samples": 8, "n_source": 8}


def test_the_schedule_takes_momentum_and_cosine_rates_from_the_manifest():
    facts = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "cosine", "steps": 100, "momentum": 0.9}
    found = schedule_of([0, 50], facts, learning_rate=0, from_network=True, **LENGTHS)
    assert found.momentum == 0.9
    assert found.rates[:1] + found.rates[49:] == pytest.approx((0.1, 0.05 * (1 + math.cos(math.pi * 0.49))))
    later = schedule_of([20, 50], facts, learning_rate=0, from_network=True, **LENGTHS)
    assert later.steps == (0, 30)
    assert any("without the momentum" in note for note in later.notes)
    given = schedule_of(
        [0, 9],
        {"optimizer": "adam"},
        learning_rate=0.3,
        linear_steps=60,
        from_network=True,
        n_samples=8,
        n_source=8,
    )
    assert set(given.rates) == {0.3}
    assert given.momentum == 0
    zero = schedule_of(
        [20, 50], facts, learning_rate=0, linear_steps=60, from_network=False, n_samples=8, n_source=8
    )
    assert zero.steps == (20, 50)


def on_batches(model, loss, data, steps, rate, size, seed=11):
    inputs, targets = data
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    states = []
    batches = shuffled(len(inputs), size, seed)
    for step in range(max(steps) + 1):
        if step in steps:
            states.append({name: t.clone() for name, t in model.state_dict().items()})
        rows = next(batches)
        optimizer.zero_grad()
        loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    return Checkpoints(model.eval(), states, list(steps))


def test_the_noise_of_batches_is_what_makes_a_linear_network_differ_and_the_verdict_is_undecided():
    data = normal(200, 5), torch.arange(200) % 3
    facts = {"learning_rate": 0.5, "batch_size": 10}
    errors, noises = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        checkpoints = on_batches(nn.Linear(5, 3).double(), CROSS_ENTROPY, data, [0, 1, 3], 0.5, 10)
        found = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, facts, seed=50 + seed)
        errors.append(found["relative_mse"][1:, 0])
        noises.append(found["batch_noise"][1:, 0])
    np.testing.assert_allclose(np.mean(noises, 0), np.mean(errors, 0), rtol=0.7)
    assert np.mean(noises, 0)[0] > 1
    result = stack("linear-dynamics", "run", [result_of(found)], {"options": {"level": 0.1}})
    assert any("undecided: batches alone" in text for text in findings(result)["finding"])


def test_a_difference_beyond_the_noise_of_batches_is_named_with_its_step():
    found = dict(erf_found(512))
    rows = {"relative_mse": [math.nan, 3, 2, 0.9, 0.8, 0.7], "batch_noise": [math.nan, 3, 1, 0.2, 0.1, 0.1]}
    for name, values in rows.items():
        found[name] = np.tile(np.array(values)[:, None], (1, 3))
        found[f"{name}_stderr"] = np.full((6, 3), 0.01)
    found["batch_noise_std"] = np.full((6, 3), 0.03)
    found["agreement_state"] = np.array(["from the start"] * 3, dtype=object)
    result = stack("linear-dynamics", "run", [result_of(found)], {"options": {"level": 0.1}})
    text = next(text for text in findings(result)["finding"] if "(paper)" in text)
    assert "they differ from step 5 (0.90 ± 0.01, batches alone 0.2, up to 0.4)" in text
    found["batch_noise_std"] = np.full((6, 3), 0.5)
    result = stack("linear-dynamics", "run", [result_of(found)], {"options": {"level": 0.1}})
    texts = [text for text in findings(result)["finding"] if "relative error" in text]
    assert all("undecided: batches alone would make them differ by 3 (up to 6)" in text for text in texts)


def test_where_the_noise_of_batches_is_not_known_a_difference_says_so():
    found = dict(erf_found(128))
    result = stack("linear-dynamics", "run", [result_of(found)], {"options": {"level": 0.01}})
    text = next(text for text in findings(result)["finding"] if "(measured kernel)" in text)
    assert "they differ" in text
    assert text.endswith("what batches alone would do is not known")


@pytest.mark.parametrize("run_seed", [0, 4])
def test_the_verdict_on_a_linear_network_trained_on_batches_depends_on_no_seed(run_seed):
    data = normal(200, 5), torch.arange(200) % 3
    torch.manual_seed(run_seed)
    checkpoints = on_batches(
        nn.Linear(5, 3).double(), CROSS_ENTROPY, data, [0, 1, 3, 8, 30], 0.5, 20, 90 + run_seed
    )
    said = []
    for seed in range(8):
        facts = {"learning_rate": 0.5, "batch_size": 20}
        found = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, facts, seed=seed)
        result = stack("linear-dynamics", "run", [result_of(found)], {"options": {"level": 0.01}})
        said += [text for text in findings(result)["finding"] if "measured kernel" in text]
        assert found["batch_noise_std"][1, 0] == pytest.approx(
            found["batch_noise_stderr"][1, 0] * math.sqrt(DRAWS)
        )
    assert len(said) == 8
    assert not any("they differ from" in text and "undecided: batches" not in text for text in said)


def one_hot_half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((outputs - targets) ** 2).sum(1).mean()


@pytest.mark.parametrize("given", ["mse_loss", "mse"])
def test_a_loss_called_mse_loss_is_descended_on_as_it_is(given):
    data = normal(60, 5), normal(60, 3, seed=4)
    custom = as_loss(one_hot_half_squares, given)
    checkpoints = trained(nn.Linear(5, 3).double(), one_hot_half_squares, data, [0, 1, 5, 40], 0.1)
    found = linear_dynamics(checkpoints, split(data), custom, None, {"learning_rate": 0.1})
    assert np.nanmax(found["relative_mse"]) < 1e-20
    own = trained(nn.Linear(5, 3).double(), nn.MSELoss(), data, [0, 1, 5, 40], 0.1)
    found = linear_dynamics(own, split(data), nn.MSELoss(), None, {"learning_rate": 0.1})
    assert np.nanmax(found["relative_mse"]) < 1e-20


@pytest.mark.parametrize(
    "given",
    [nn.MSELoss(reduction="sum"), as_loss(functools.partial(nn.functional.mse_loss, reduction="sum"))],
)
def test_a_loss_that_is_a_sum_over_samples_has_no_linear_model_and_the_reason_is_said(given):
    data = normal(60, 5), normal(60, 3, seed=4)
    checkpoints = trained(nn.Linear(5, 3).double(), MSE, data, [0, 5], 0.1)
    found = linear_dynamics(checkpoints, split(data), given, None, {"learning_rate": 0.1})
    assert np.isnan(found["relative_mse"]).all()
    assert np.isfinite(found["loss"]).all()
    assert any("twice give 2 times the loss" in note and "NaN" in note for note in found.notes)


@pytest.mark.parametrize("as_given", [lambda loss: loss, as_loss], ids=["criterion", "Loss"])
def test_class_weights_in_float32_are_descended_on_as_the_run_did(as_given):
    data = normal(60, 5), torch.arange(60) % 3
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([5.0, 1.0, 1.0]))
    checkpoints = trained(nn.Linear(5, 3).double(), copy.deepcopy(weighted).double(), data, [0, 3, 30], 0.5)
    found = linear_dynamics(checkpoints, split(data), as_given(weighted), None, {"learning_rate": 0.5})
    assert np.nanmax(found["relative_mse"]) < 1e-10
    assert any("class weights?" in note for note in found.notes)
    assert weighted.reduction == "mean"
    assert weighted.weight.dtype == torch.float32


def test_squared_errors_are_compared_as_outputs_whatever_the_loss_is_called():
    data = normal(60, 5), torch.arange(60) % 3

    def distance(outputs: Tensor, targets: Tensor) -> Tensor:
        return one_hot_half_squares(outputs, nn.functional.one_hot(targets, 3))

    checkpoints = trained(nn.Linear(5, 3).double(), distance, data, [0, 5], 0.1)
    found = linear_dynamics(checkpoints, split(data), distance, None, {"learning_rate": 0.1})
    same = linear_dynamics(checkpoints, split(data), MSE, None, {"learning_rate": 0.1 * 1.5})
    for name in ("residual_linear", "residual_complement", "relative_mse", "optimum_mse"):
        np.testing.assert_allclose(found[name], same[name], rtol=1e-9, atol=1e-20, err_msg=name)


def test_a_criterion_that_sums_over_the_batch_is_refused_where_it_came_through_the_command_line_too():
    checkpoints, data = small_run((0, 2))
    criterion = as_loss(nn.CrossEntropyLoss(reduction="sum"))
    found = linear_dynamics(checkpoints, split(data), criterion, None, FACTS)
    assert np.isnan(found["relative_mse"]).all()
    assert any("is no mean over the samples of a batch" in text for text in (*found.notes, found.reason))


def test_a_loss_that_does_not_fit_the_targets_is_refused_in_the_users_words():
    checkpoints, data = small_run((0,))
    with pytest.raises(OptionError, match=r"the loss NLLLoss takes no outputs of shape \(7, 3\)"):
        linear_dynamics(checkpoints, [(data[0], normal(40, 3))], nn.NLLLoss())


def test_a_network_with_a_frozen_layer_is_not_compared_with_the_features_of_training_both():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    data = normal(40, 6), torch.arange(40) % 3
    state = {name: t.clone() for name, t in model.state_dict().items()}
    whole = linear_dynamics(Checkpoints(model, [state], [0]), split(data), CROSS_ENTROPY, None, FACTS)
    assert "paper" in list(whole["feature_set"])
    model[0].requires_grad_(False)
    found = linear_dynamics(Checkpoints(model, [state], [0]), split(data), CROSS_ENTROPY, None, FACTS)
    assert list(found["feature_set"]) == ["measured kernel"]
    assert math.isnan(found["expected_floor"])
    assert any("frozen: 0.weight, 0.bias" in note for note in found.notes)
    assert found["kernel_slope"] < whole["kernel_slope"]
    model.requires_grad_(False)
    with pytest.raises(OptionError, match="every parameter of the network is frozen"):
        linear_dynamics(Checkpoints(model, [state], [0]), split(data), CROSS_ENTROPY, None, FACTS)


def test_weight_decay_that_is_not_small_leaves_the_verdict_undecided():
    data = normal(60, 5), normal(60, 2, seed=4)
    for strength, undecided in ((0.2, True), (1e-6, False)):
        checkpoints = trained(nn.Linear(5, 2).double(), MSE, data, ERF_STEPS, 0.1, weight_decay=strength)
        facts = {"learning_rate": 0.1, "weight_decay": strength, "momentum": 0.0}
        found = linear_dynamics(checkpoints, split(data), MSE, None, facts)
        np.testing.assert_allclose(found["weight_decay_part"], strength * 0.1 * np.array(ERF_STEPS))
        result = stack("linear-dynamics", "run", [result_of(found)], {"options": {"level": 0.1}})
        text = next(text for text in findings(result)["finding"] if "measured kernel" in text)
        assert ("undecided: weight decay is not in the linear models" in text) is undecided
    heavy = facts | {"momentum": 0.9}
    schedule = schedule_of([0, 10], heavy, learning_rate=0, from_network=True, **LENGTHS)
    assert schedule.decay == pytest.approx((0, 1e-6 * 0.1 * 10 / 0.1))


def test_the_figure_says_how_many_of_the_shown_samples_it_draws():
    from matplotlib.figure import Figure

    from dynprobe.analyzers._linear_dynamics_figure import draw_linear_dynamics

    checkpoints, data = small_run((0, 1, 2))
    for show, said in ((40, "output of a sample (7 of 40)"), (7, "output of a sample")):
        found = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, FACTS, show=show)
        figure = Figure()
        draw_linear_dynamics(stack("linear-dynamics", "run", [result_of(found)], {}), figure, "outputs")
        assert figure.axes[0].get_ylabel() == said


def test_the_noise_of_batches_is_zero_for_whole_batches_and_nan_with_a_reason_where_it_is_not_known():
    checkpoints, data = small_run()
    whole = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, FACTS | {"batch_size": 40})
    assert set(whole["batch_noise"].ravel()) == {0.0}
    unknown = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, FACTS)
    assert np.isnan(unknown["batch_noise"]).all()
    assert any("batch_noise is NaN: the run's batch size is not known" in note for note in unknown.notes)


def test_a_linear_model_that_diverges_is_said_to():
    data = normal(60, 5), normal(60, 2, seed=4)
    model = nn.Linear(5, 2).double()
    checkpoints = trained(model, MSE, data, [0, 900], 0.1)
    found = linear_dynamics(checkpoints, split(data), MSE, None, {"learning_rate": 9.0})
    assert any("diverges" in note for note in found.notes)


def test_sequences_and_tokens_are_refused_in_the_users_words():
    checkpoints, data = small_run((0,))
    tokens = [(torch.arange(12).reshape(4, 3), torch.arange(4))]
    with pytest.raises(OptionError, match="no real numbers"):
        linear_dynamics(checkpoints, tokens, CROSS_ENTROPY)
    per_position = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (3, 2))).double()
    state = {name: t.clone() for name, t in per_position.state_dict().items()}
    many = [(data[0], torch.zeros(40, 2, dtype=torch.long))]
    with pytest.raises(OptionError, match="several positions"):
        linear_dynamics(Checkpoints(per_position, [state], [0]), many, CROSS_ENTROPY)


def test_options_and_data_that_leave_nothing_to_compare_are_refused():
    checkpoints, data = small_run((0,))
    with pytest.raises(OptionError, match="level 0"):
        linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, level=0.0)
    with pytest.raises(OptionError, match="no samples"):
        linear_dynamics(checkpoints, [], CROSS_ENTROPY)
    with pytest.raises(OptionError, match="at least two samples"):
        linear_dynamics(checkpoints, [(data[0][:1], data[1][:1])], CROSS_ENTROPY)
    with pytest.raises(OptionError, match="classes up to 7"):
        linear_dynamics(checkpoints, [(data[0], data[1] + 5)], CROSS_ENTROPY)
    with pytest.raises(OptionError, match="target of 4 numbers"):
        linear_dynamics(checkpoints, [(data[0], normal(40, 4))], MSE)
    with pytest.raises(OptionError, match="test inputs have 4 features"):
        linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, [(normal(9, 4), torch.arange(9) % 3)])


@pytest.mark.parametrize("style", ["auto", "residuals", "agreement", "outputs"])
def test_every_style_of_the_figure_draws_several_runs(style):
    from matplotlib.figure import Figure

    from dynprobe.analyzers._linear_dynamics_figure import draw_linear_dynamics

    checkpoints, data = small_run((0, 1, 2))
    other = linear_dynamics(checkpoints, split(data), CROSS_ENTROPY, None, FACTS)
    pieces = [result_of(erf_found(512), "a"), result_of(other, "b")]
    figure = Figure()
    draw_linear_dynamics(stack("linear-dynamics", "run", pieces, {}), figure, style)
    assert len(figure.axes) == (6 if style == "auto" else 2)


def test_an_unknown_style_is_refused():
    from matplotlib.figure import Figure

    from dynprobe.analyzers._linear_dynamics_figure import draw_linear_dynamics

    with pytest.raises(OptionError, match="'round' is not a style"):
        draw_linear_dynamics(stack("x", "run", [result_of(erf_found(512))], {}), Figure(), "round")
