"""`gradient-covariance` against closed forms of linear regression, planted cases, and its own messages."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from dynprobe.analyzers import OptionError, _curvature
from dynprobe.analyzers._gradient_covariance import loss_change, minimum_distance, training_of
from dynprobe.analyzers._gradient_covariance_figure import draw_gradient_covariance
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.loop import Job, MemoryStore, checkpoint_units, measure
from dynprobe.analyzers.core.result import FAILED, Piece, stack
from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.analyzers.gradient_covariance import gradient_covariance
from dynprobe.analyzers.numerics import covariance_routes
from dynprobe.analyzers.numerics.losses import Loss, get_loss
from dynprobe.cli.outcome import summarised

MSE, CROSS_ENTROPY = get_loss("mse"), get_loss("cross_entropy")
SGD = {"learning_rate": 0.05, "batch_size": 8, "optimizer": "sgd", "samples": 40}
DECLARATION = declaration_of(gradient_covariance)


def regression(n=40, d=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    return nn.Linear(d, 1, bias=False).double().eval(), x, y


def batches(x, y, sizes=16):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def classifier(*, width=7, dtype=torch.float64, norm=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(33, 5, generator=generator, dtype=dtype)
    y = torch.randint(3, (33,), generator=generator)
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(width)] if norm else []
    model = nn.Sequential(nn.Linear(5, width), *middle, nn.Tanh(), nn.Linear(width, 3))
    return model.to(dtype).eval(), x, y


ROUTES = ("gram", "lanczos")


def by_route(route, *arguments, **options):
    """Measured by inner products, or by Lanczos as if the gradients did not fit in memory."""
    if route == "gram":
        return gradient_covariance(*arguments, **options)
    with patch.object(covariance_routes, "_stored", return_value=None):
        return gradient_covariance(*arguments, **options)


def measured(**options):
    model, x, y = regression()
    options = {"training": SGD, "minibatch": 5, "top_k": 3} | options
    return gradient_covariance(model, batches(x, y), MSE, **options)


def test_linear_regression_has_the_numbers_of_its_closed_form():
    model, x, y = regression()
    found = measured(hessian_top_k=3)
    hessian = 2 * x.T @ x / len(x)
    value, vector = np.linalg.eigh(hessian.numpy())
    along = 2 * (x.numpy() @ vector[:, -1]) ** 2  # H_i along e
    spread, top = along.std(), value[-1]
    noise = spread**2 * (40 - 8) / (8 * 39)
    assert found["hessian_eigenvalue"] == pytest.approx(top, rel=1e-9)
    assert found["hessian_ratio"] == pytest.approx(value[-3] / top, rel=1e-6)
    assert found["hessian_rank"] == 3
    assert found["per_sample_curvature_std"] == pytest.approx(spread, rel=1e-5)
    assert found["stability"] == pytest.approx((1 - 0.05 * top) ** 2 + 0.05**2 * noise, rel=1e-6)
    assert found["critical_learning_rate"] == pytest.approx(2 * top / (top**2 + noise), rel=1e-5)
    assert found["alignment_chance"] == pytest.approx(6**-0.5)
    residual = (model(x) - y).detach()
    gradients = (2 * residual * x).numpy()
    mean = gradients.mean(0)
    covariance = np.cov(gradients.T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(found["eigenvalue"], values[::-1][:3], rtol=1e-12)
    assert found["trace"] == pytest.approx(np.trace(covariance), rel=1e-12)
    assert found["alignment"] == pytest.approx(abs(vectors[:, -1] @ vector[:, -1]), abs=1e-5)
    assert found["minimum_distance"] == pytest.approx(abs(mean @ vector[:, -1]) / top, rel=1e-5)
    noise_trace = np.trace(covariance) * 40 / 39
    assert found["noise_scale"] == pytest.approx(noise_trace / (mean @ mean - noise_trace / 40), rel=1e-9)
    assert found["loss"] == pytest.approx(float((residual**2).mean()), rel=1e-12)
    assert found["route"] == "gram"
    assert found.converged
    assert found.spent["hvps"] > 0


def test_at_the_critical_learning_rate_stability_is_one_and_grows_beyond():
    critical = measured()["critical_learning_rate"]
    assert measured(learning_rate=critical)["stability"] == pytest.approx(1, abs=1e-9)
    assert measured(learning_rate=1.01 * critical)["stability"] > 1 > measured()["stability"]


def test_with_the_training_set_as_batch_the_critical_learning_rate_is_two_over_the_eigenvalue():
    found = measured(train_batch_size=40)
    assert found["critical_learning_rate"] == pytest.approx(2 / found["hessian_eigenvalue"], rel=1e-12)


def test_alignment_is_one_where_gradients_and_curvature_have_one_direction():
    scale = torch.linspace(0.1, 2, 30, dtype=torch.float64)[:, None]
    direction = torch.tensor([[3.0, 0.0, -4.0]], dtype=torch.float64) / 5
    model = nn.Linear(3, 1, bias=False).double().eval()
    data = batches(scale * direction, torch.sin(7 * scale))
    for route in ROUTES:
        found = by_route(route, model, data, MSE, minibatch=0, top_k=1, hessian_top_k=1)
        assert found["alignment"] == pytest.approx(1, abs=1e-9)
        assert "hessian_ratio" not in found


@pytest.mark.parametrize("route", ROUTES)
def test_ragged_batches_and_one_batch_give_the_same_numbers(route):
    model, x, y = classifier()
    options = {"minibatch": 4, "top_k": 2, "training": SGD, "tol": 1e-10}
    whole, ragged = (
        by_route(route, model, batches(x, y, sizes), CROSS_ENTROPY, **options)
        for sizes in ([33], [1, 20, 12])
    )
    assert whole["route"] == route
    assert ("eigenvalue_residual" in whole) == (route == "lanczos")
    for name in whole.keys() - {"route", "hessian_residual", "eigenvalue_residual", "stability_stderr"}:
        np.testing.assert_allclose(whole[name], ragged[name], rtol=1e-6, err_msg=name)


def test_both_routes_agree():
    model, x, y = classifier()
    options = {"minibatch": 4, "top_k": 5, "training": SGD, "tol": 1e-10}
    gram, lanczos = (by_route(route, model, batches(x, y), CROSS_ENTROPY, **options) for route in ROUTES)
    for name in ("eigenvalue", "trace", "trace_ratio", "minibatch_ratio", "alignment", "top_gradient_share"):
        np.testing.assert_allclose(gram[name], lanczos[name], rtol=1e-5, err_msg=name)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize("network", [Recurrent, Attentive])
@pytest.mark.parametrize("route", ROUTES)
def test_recurrent_nets_and_attention_have_the_dense_spectrum(network, route):
    torch.manual_seed(0)
    model = network().double().eval()
    x, y = torch.randn(14, 3, 4, dtype=torch.float64), torch.randint(3, (14,))
    options = {"minibatch": 4, "top_k": 2, "training": SGD}
    found = by_route(route, model, batches(x, y, 8), CROSS_ENTROPY, **options)
    rows = []
    for i in range(14):
        value = CROSS_ENTROPY(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    covariance = torch.cov(torch.stack(rows).T, correction=0).numpy()
    np.testing.assert_allclose(found["eigenvalue"], np.linalg.eigvalsh(covariance)[::-1][:2], rtol=1e-6)
    assert np.isfinite(found["stability"])
    assert 0 <= found["alignment"] <= 1


def test_the_model_is_left_as_it_was():
    model, x, y = classifier(norm=True)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4)
    state = torch.get_rng_state()
    gradient_covariance(model, batches(x, y), CROSS_ENTROPY, minibatch=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_norm_of_the_last_batchnorm_scale_is_reported_where_there_is_one():
    model, x, y = classifier(norm=True)
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(7.0))
    found = gradient_covariance(model, batches(x, y), CROSS_ENTROPY, minibatch=0)
    assert found["batchnorm_norm"] == pytest.approx(math.sqrt(sum(i * i for i in range(7))))
    assert "batchnorm_norm" not in measured()


def test_what_it_returns_is_declared():
    assert labelled(DECLARATION, measured()).keys() >= {"eigenvalue", "trace", "stability"}


# what is missing, and what is assumed


@pytest.mark.parametrize(
    ("training", "nan", "note"),
    [
        ({"batch_size": 8}, ["stability"], "the learning rate is not known; give --learning-rate"),
        ({"learning_rate": 0.1}, ["stability", "critical_learning_rate"], "give --train-batch-size"),
        (
            {**SGD, "batch_size": 41},
            ["stability", "critical_learning_rate"],
            "a training batch of 41 samples is larger than the training",
        ),
        ({**SGD, "momentum": 0.9}, [], "stability is that of plain SGD, and the run used momentum 0.9"),
        ({**SGD, "optimizer": "adam"}, [], "the run used an optimizer other than SGD"),
        ({**SGD, "samples": 30}, [], "30 training samples are fewer than the 40 measured"),
        ({**SGD, "samples": 400}, [], "stability rests on 40 of 400 training samples"),
    ],
)
def test_what_is_not_known_is_nan_with_a_note_and_what_is_assumed_is_said(training, nan, note):
    found = measured(training=training)
    assert [n for n in ("stability", "critical_learning_rate") if math.isnan(found[n])] == nan
    assert any(note in text for text in found.notes), found.notes


def test_the_training_set_is_the_data_source_where_nothing_says():
    facts = training_of({"batch_size": 4}, 0, n_measured=10, n_source=50)
    assert facts.n_training == 50
    assert training_of({"samples": 60}, 0, n_measured=10, n_source=50).n_training == 60
    assert training_of({"samples": 60}, 0, n_measured=10, n_source=50, n_training=70).n_training == 70


def test_options_go_before_the_manifest_and_a_schedule_follows_the_step():
    facts = training_of(SGD, 5, n_measured=10, n_source=50, learning_rate=0.7, batch_size=3)
    assert (facts.learning_rate, facts.batch_size) == (0.7, 3)
    cosine = {**SGD, "schedule": "cosine", "steps": 100}
    assert measured(training=cosine, step=50)["learning_rate"] == pytest.approx(0.025)


def test_too_few_samples_for_three_minibatches_is_nan_with_a_note():
    found = measured(minibatch=14)
    assert math.isnan(found["minibatch_ratio"])
    assert math.isnan(found["minibatch_count"])
    assert found["minibatch_size"] == 14
    assert any("fewer than 3 of 14 fit in 40 samples" in note for note in found.notes)


def test_no_minibatches_are_no_note():
    found = measured(minibatch=0)
    assert math.isnan(found["minibatch_size"])
    assert math.isnan(found["top_gradient_share"])
    assert found.notes == ()


def test_a_smallest_minibatch_eigenvalue_at_rounding_is_said():
    found = measured(minibatch=4)  # ten mini-batches, six parameters
    assert math.isnan(found["minibatch_ratio"])
    assert any("minibatch_ratio is NaN" in note for note in found.notes)


def test_more_eigenvalues_than_the_rank_are_said():
    found = measured(top_k=50)
    assert found["eigenvalue"].shape == (6,)
    assert any("rank at most 6" in note for note in found.notes)


def test_a_mean_gradient_within_its_noise_is_said():
    model, x, y = regression()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    found = gradient_covariance(model, batches(x, y), MSE, minibatch=0, training=SGD)
    assert math.isnan(found["noise_scale"])
    assert any("noise_scale is NaN" in note for note in found.notes)


def test_two_equal_leading_eigenvalues_are_said():
    x = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    model = nn.Linear(4, 1, bias=False).double().eval()
    y = torch.arange(20, dtype=torch.float64)[:, None]
    found = gradient_covariance(model, batches(x, y), MSE, minibatch=0, training=SGD)
    assert any("nearly coincide" in note for note in found.notes)


def test_an_eigenvalue_that_misses_its_tolerance_is_not_converged(monkeypatch):
    def short(*given, **options):
        return dataclasses.replace(lanczos(*given, **options), error_bound=np.array([0.0, 1.0]))

    lanczos = _curvature.lanczos
    monkeypatch.setattr(_curvature, "lanczos", short)
    found = measured()
    assert not found.converged
    assert "Hessian eigenvalues missed the tolerance 0.0001" in found.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minibatch": 1}, "minibatch 1 is a single sample"),
        ({"minibatch": 0, "minibatches": 4}, "minibatches would have no effect"),
        ({"tol": 0.0}, "tol 0 is no relative tolerance"),
        ({"tol": 2.0}, "tol 2 is no relative tolerance"),
        ({"train_samples": 30}, "train-samples 30 is fewer than the 40 samples measured"),
        ({"train_batch_size": 41}, "a training batch of 41 samples is larger than the training set of 40"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message) as caught:
        measured(**options)
    assert caught.value.tip


def test_gradients_that_vanish_at_a_perfect_fit_are_one_note_and_no_failure():
    model, x, _ = regression()
    for route in ROUTES:
        data = batches(x, model(x).detach())
        found = by_route(route, model, data, MSE, minibatch=5, training=SGD)
        assert found["eigenvalue"][0] == found["trace"] == 0
        missing = ("trace_ratio", "alignment", "noise_scale", "minibatch_ratio", "top_gradient_share")
        assert all(math.isnan(found[name]) for name in missing)
        assert found["hessian_eigenvalue"] > 0
        notes = [note for note in found.notes if "rank at most" not in note]
        assert notes == [
            "all gradients are equal but for rounding: K is zero, and its ratios and directions NaN"
        ]


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_whose_squares_underflow_in_float32_have_no_ratios(route):
    model, x, y = classifier(dtype=torch.float32)
    tiny = Loss("tiny", lambda o, t: 1e-25 * CROSS_ENTROPY.per_sample(o, t), CROSS_ENTROPY.accuracy)
    found = by_route(route, model, batches(x, y), tiny, minibatch=4, training=SGD)
    assert all(math.isnan(found[name]) for name in ("trace_ratio", "alignment", "noise_scale"))
    assert any("K is zero" in note for note in found.notes)


def test_two_samples_have_numbers_without_standard_errors_and_a_note():
    model, x, y = classifier()
    found = gradient_covariance(model, [(x[:2], y[:2])], CROSS_ENTROPY, minibatch=0, training=SGD)
    assert found["eigenvalue"][0] == pytest.approx(found["trace"])
    assert np.isnan(found["eigenvalue_stderr"]).all()
    assert math.isnan(found["trace_stderr"])
    assert math.isnan(found["noise_scale"])
    assert any("they need three samples" in note for note in found.notes)


def test_where_a_schedule_ends_at_zero_stability_is_nan_and_no_break_even_point():
    cosine = {**SGD, "schedule": "cosine", "steps": 9}
    pieces = pieces_of(training_run(training=cosine))
    assert float(pieces[-1].arrays["learning_rate"].values) == 0
    assert math.isnan(float(pieces[-1].arrays["stability"].values))
    assert float(pieces[-1].arrays["critical_learning_rate"].values) > 0
    assert "stability is NaN where the learning rate is 0: nothing moves" in pieces[-1].notes
    result = stack("gradient-covariance", "checkpoint", pieces, {})
    assert float(summarised(DECLARATION, result)["break_even_state"]) == 0
    figure = Figure()
    draw_gradient_covariance(result, figure)
    figure.canvas.draw()


def test_the_standard_error_of_stability_covers_what_the_default_tolerance_leaves():
    assert {option.name: option.default for option in DECLARATION.options}["tol"] == 1e-4
    model, x, y = classifier(dtype=torch.float32)
    for size in (1, 4, 33):
        options = {"training": {"learning_rate": 1.5, "batch_size": size}, "minibatch": 0}
        found = gradient_covariance(model, batches(x, y), CROSS_ENTROPY, **options)
        assert found.converged, found.reason
        data = batches(x.double(), y)
        exact = gradient_covariance(model.double(), data, CROSS_ENTROPY, tol=1e-12, **options)
        model.float()
        for name in ("stability", "critical_learning_rate"):
            assert 0 < abs(found[name] - exact[name]) < found[f"{name}_stderr"] < 0.02 * found[name]


@pytest.mark.parametrize(
    ("memory", "message", "tip"),
    [
        (1e-6, "eigenvectors of 66 parameters", "or a smaller --hessian-top-k"),
        (2e-5, "the 28 vectors that the eigenvalues of their covariance need", "Give --memory 0.001 or more"),
    ],
)
def test_too_little_memory_is_refused_with_what_would_do(memory, message, tip):
    model, x, y = classifier()
    with pytest.raises(OptionError) as caught:
        gradient_covariance(model, batches(x, y), CROSS_ENTROPY, minibatch=0, memory=memory)
    assert message in caught.value.message
    assert tip in caught.value.tip


def test_a_single_sample_is_refused():
    model, x, y = regression()
    with pytest.raises(OptionError, match="at least two samples"):
        gradient_covariance(model, [(x[:1], y[:1])], MSE)


# consecutive checkpoints


def test_the_change_of_the_loss_in_one_step_is_paired_by_sample():
    before = {"measured_step": 4.0, "sample_loss": np.array([1.0, 2.0, 3.0])}
    change, stderr, note = loss_change(np.array([0.5, 1.5, 2.6]), 5, before)
    assert change == pytest.approx(-1.4 / 3)
    assert stderr == pytest.approx(np.std([-0.5, -0.5, -0.4], ddof=1) / math.sqrt(3))
    assert note == ""


@pytest.mark.parametrize(
    ("step", "previous", "said"),
    [
        (5, None, "there is none before it"),
        (None, {"measured_step": math.nan, "sample_loss": []}, "the checkpoints have no step"),
        (5, {"measured_step": 2.0, "sample_loss": []}, "the checkpoint before is 3 steps earlier, not 1"),
    ],
)
def test_without_the_step_before_there_is_no_change_but_a_reason(step, previous, said):
    change, stderr, note = loss_change(np.ones(3), step, previous)
    assert math.isnan(change)
    assert math.isnan(stderr)
    assert said in note


def test_beyond_a_maximum_there_is_no_distance_to_a_minimum():
    assert all(math.isnan(v) for v in minimum_distance(np.ones(4), -np.ones(4)))


def test_the_distance_to_the_minimum_of_a_quadratic_is_exact():
    w, target = 3.0, np.array([1.0, 2.0, 4.0])  # ℓ_i = (w − t_i)²
    distance, stderr = minimum_distance(2 * (w - target), np.full(3, 2.0))
    assert distance == pytest.approx(w - target.mean())
    assert stderr == pytest.approx(target.std(ddof=1) / math.sqrt(3))


# a whole run


def training_run(steps=(0, 1, 2, 5, 9), scales=(0.0, 0.5, 1.0, 1.5, 2.0), training=SGD):
    """Checkpoints of one network, its weights scaled: curvature and gradients grow on the way."""
    model, x, y = classifier()
    states = [{name: scale * value for name, value in model.state_dict().items()} for scale in scales]
    checkpoints = [
        SimpleNamespace(
            path=f"run/{step}.pt",
            run="run",
            step=step,
            load=lambda state=state, step=step: SimpleNamespace(state=state, hash=str(step), notes=[]),
        )
        for step, state in zip(steps, states, strict=True)
    ]
    setup = Setup(
        make_model=lambda: classifier()[0],
        fit=lambda model, state, where: (state, []),
        make_batches=lambda: batches(x, y),
        make_test_batches=lambda: None,
        make_loss=lambda: CROSS_ENTROPY,
        open_other=lambda path: checkpoints[0],
        device=torch.device("cpu"),
        dtype=torch.float64,
        training=training,
    )
    return Run("run", checkpoints, setup)


def pieces_of(run, **options):
    defaults = {option.name: option.default for option in DECLARATION.options} | {"minibatch": 4, "top_k": 2}
    job = Job(DECLARATION, defaults | options)
    return [piece for piece, _ in measure(job, checkpoint_units(run, run.checkpoints), MemoryStore())]


def test_consecutive_checkpoints_of_a_run_have_the_change_of_their_losses():
    pieces = pieces_of(training_run(), consecutive=True)
    change = [float(piece.arrays["loss_change"].values) for piece in pieces]
    loss = [float(piece.arrays["loss"].values) for piece in pieces]
    assert change[1:3] == pytest.approx([loss[1] - loss[0], loss[2] - loss[1]])
    assert all(math.isnan(change[i]) for i in (0, 3, 4))
    assert any("3 steps earlier" in note for note in pieces[3].notes)


def test_without_consecutive_the_measurement_before_is_not_needed():
    assert "previous" not in DECLARATION.needed({"consecutive": False})
    assert "previous" in DECLARATION.needed({"consecutive": True})
    assert "sample_loss" not in pieces_of(training_run(), consecutive=False)[1].arrays


def planted(stability, run="run", steps=None, **extra):
    """A stacked result with the stability given and everything else as measured once."""
    template = measured()
    pieces = []
    for i, value in enumerate(stability):
        values = {**template, "stability": value, "stability_stderr": 0.01, **extra}
        step = (steps or [0, 10, 20, 40, 80])[i]
        index = {"run": run, "step": step, "path": f"{run}/{step}.pt"}
        pieces.append(Piece(f"{run}{i}", index, labelled(DECLARATION, values)))
    return pieces


def result_of(pieces):
    return stack("gradient-covariance", "checkpoint", pieces, {})


@pytest.mark.parametrize(
    ("stability", "state", "step"),
    [
        ([0.25, 0.25, 0.5, 2.0, 3.0], 1, 30.0),
        ([0.25] * 5, 0, math.nan),
        ([1.5] * 5, -1, math.nan),
        ([math.nan] * 5, math.nan, math.nan),
    ],
)
def test_the_summary_has_the_break_even_step_and_its_state(stability, state, step):
    found = summarised(DECLARATION, result_of(planted(stability)))
    assert float(found["break_even_state"]) == pytest.approx(state, nan_ok=True)
    assert float(found["break_even_step"]) == pytest.approx(step, nan_ok=True)
    assert float(found["max_eigenvalue"]) == pytest.approx(measured()["eigenvalue"][0])
    if state == 1:
        assert (float(found["break_even_low"]), float(found["break_even_high"])) == (20, 40)


def test_a_run_without_steps_has_no_break_even_step_but_maxima():
    pieces = planted([0.5, 2.0], steps=[None, None])
    found = summarised(DECLARATION, result_of(pieces))
    assert math.isnan(float(found["break_even_step"]))
    assert float(found["max_trace_ratio"]) > 1


def test_a_failed_checkpoint_does_not_hide_the_summary_of_the_others():
    pieces = planted([0.25, 0.25, 0.5, 2.0])
    index = {"run": "run", "step": 80, "path": "run/80.pt"}
    pieces.append(Piece("", index, status=FAILED, reason="damaged"))
    assert float(summarised(DECLARATION, result_of(pieces))["break_even_step"]) == pytest.approx(30)


@pytest.mark.parametrize(
    "pieces",
    [
        lambda: planted([0.25, 0.25, 0.5, 2.0, 3.0]) + planted([0.9] * 5, "other $x$"),
        lambda: planted([math.nan] * 5, learning_rate=math.nan),
        lambda: planted([0.001, 2.0], steps=[None, None]),
        lambda: [p for i in range(9) for p in planted([0.5, 2.0], f"run{i}")],
        lambda: planted([0.5]),
    ],
    ids=["two runs", "stability unknown", "no steps", "many runs", "one checkpoint"],
)
def test_the_figure_draws_whatever_is_there(pieces):
    figure = Figure()
    draw_gradient_covariance(result_of(pieces()), figure)
    figure.canvas.draw()
    assert len(figure.axes) == 4


def test_a_single_checkpoint_has_error_bars_and_a_dash_at_two_over_eta():
    figure = Figure()
    draw_gradient_covariance(result_of(planted([0.5]) + planted([0.7], "other")), figure)
    covariance, hessian, ratio, stability = figure.axes
    for panel in (covariance, ratio, stability):
        assert len(panel.containers) == 2
        assert all(bar.has_yerr for bar in panel.containers)
    dashes = [line for line in hessian.lines if line.get_marker() == "_"]
    assert [float(line.get_ydata()[0]) for line in dashes] == pytest.approx([2 / 0.05] * 2)
    low, high = hessian.get_ylim()
    assert low < 2 / 0.05 < high


def test_the_trace_of_the_hessian_stands_beside_its_largest_eigenvalue_when_asked_for():
    model = nn.Linear(3, 1, bias=False).double().eval()
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [(inputs[:25], torch.ones(25, 1).double()), (inputs[25:], torch.ones(15, 1).double())]
    found = gradient_covariance(model, batches, get_loss("mse"), minibatch=0, hessian_trace=True)
    exact = 2 * inputs.T @ inputs / 40
    assert found["hessian_trace"] == pytest.approx(float(exact.trace()), rel=1e-9)
    largest = float(torch.linalg.eigvalsh(exact)[-1])
    assert found["hessian_trace_ratio"] == pytest.approx(float(exact.trace()) / largest, rel=1e-4)
    assert "hessian_trace" not in gradient_covariance(model, batches, get_loss("mse"), minibatch=0)
