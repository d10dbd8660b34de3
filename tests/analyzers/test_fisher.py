"""`fisher` on networks with a closed form, in its choices and refusals, and on the sample runs."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._fisher_figure import draw_fisher
from dynprobe.analyzers.core.contract import declaration_of
from dynprobe.analyzers.core.result import Array, Result
from dynprobe.analyzers.fisher import fisher
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.cli.app import main
from dynprobe.io.report import read_report

LOSS = get_loss("cross_entropy")
RUNS = (
    *("mlp_digits", "bn_cnn_seed0", "bn_cnn_seed1", "bn_cnn_shuffled", "blur_deficit", "blur_control"),
    *("small_lr_large_batch", "large_lr_small_batch", "lstm_rows"),
)


def command(monkeypatch, *arguments):
    """Exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["dynprobe", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def network(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, classes)).double()


def data(n=30, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    y = torch.randint(classes, (n,), generator=generator)
    return list(zip(x.split(13), y.split(13), strict=True))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_softmax_regression_has_the_trace_e_x2_plus_1_times_1_minus_p2(dtype, digits):
    torch.manual_seed(0)
    model, batches = nn.Linear(5, 4).to(dtype), data(dtype=dtype)
    found = fisher(model, batches, LOSS, kl_check=False)
    x = torch.cat([x for x, _ in batches]).double()
    p = functional.linear(x, model.weight.detach().double(), model.bias.detach().double()).softmax(1)
    terms = (x.square().sum(1) + 1) * (1 - p.square().sum(1))
    assert math.isclose(found["trace"], float(terms.mean()), rel_tol=digits)
    assert found["method"] == "exact, 4 columns"
    assert found["draws"] == 0


def test_layers_add_up_to_the_whole_under_the_names_of_the_network():
    found = fisher(network(), data(), LOSS, kl_check=False)
    assert found["layer"].tolist() == ["0", "2"]
    assert math.isclose(found["layer_trace"].sum(), found["trace"], rel_tol=1e-12)
    assert math.isclose(found["layer_share"].sum(), 1, rel_tol=1e-12)
    assert math.isclose(found["layer_empirical_trace"].sum(), found["empirical_trace"], rel_tol=1e-12)
    second = found["gradient_std"] ** 2 + found["gradient_mean_norm"] ** 2
    np.testing.assert_allclose(second, found["layer_empirical_trace"], rtol=1e-12)


def test_the_empirical_trace_is_another_number_once_the_network_is_trained():
    model, batches = network(), data()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        for x, y in batches:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    found = fisher(model, batches, LOSS, kl_check=False)
    assert abs(found["trace"] - found["empirical_trace"]) > 0.3 * found["trace"]


def test_many_classes_are_sampled_to_the_tolerance():
    model, batches = network(classes=200), data(classes=200)
    exact = fisher(model, batches, LOSS, method="exact", kl_check=False)
    found = fisher(model, batches, LOSS, kl_check=False, tol=0.01, max_draws=2000)
    assert found["method"].startswith("sampled")
    assert found.converged
    assert found["trace_draw_stderr"] <= 0.01 * found["trace"]
    assert abs(found["trace"] - exact["trace"]) < 4 * found["trace_draw_stderr"]
    few = fisher(model, batches, LOSS, kl_check=False, tol=1e-3, max_draws=4)
    assert not few.converged
    assert "after 4 draws" in few.reason


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_a_recurrent_network_is_sampled_and_the_note_names_its_layers():
    torch.manual_seed(0)
    model, batches = Recurrent(), [(torch.randn(20, 4, 2), torch.randint(3, (20,)))]
    found = fisher(model, batches, LOSS, tol=0.1)
    assert found["method"].startswith("sampled")
    assert any("rnn.weight_ih_l0" in note and "groups of 16" in note for note in found.notes)
    assert any("empirical trace is sampled too: 16 draws" in note for note in found.notes)
    exact = fisher(model, batches, LOSS, method="exact")
    assert any("one sample after the other" in note for note in exact.notes)
    assert abs(found["trace"] - exact["trace"]) < 4 * found["trace_draw_stderr"]
    assert math.isclose(found["kl_ratio"], 1, rel_tol=0.05)


def test_no_number_of_an_exact_measurement_is_random():
    torch.manual_seed(0)
    model, batches = Recurrent(), [(torch.randn(12, 4, 2), torch.randint(3, (12,)))]
    one, other = (fisher(model, batches, LOSS, method="exact", kl_check=False, seed=seed) for seed in (0, 1))
    for name in ("trace", "empirical_trace", "empirical_trace_stderr", "layer_empirical_trace"):
        np.testing.assert_array_equal(one[name], other[name])
        assert np.isfinite(one[name]).all()
    assert not any("sampled" in note for note in one.notes)


def test_a_few_samples_of_a_recurrent_network_are_not_converged_by_luck_and_have_no_error_over_samples():
    torch.manual_seed(0)
    model, batches = Recurrent(), [(torch.randn(12, 4, 2), torch.randint(3, (12,)))]
    found = fisher(model, batches, LOSS, method="sampled", max_draws=2, tol=0.9, kl_check=False)
    assert not found.converged
    assert "too few to tell the error: 2 by 1" in found.reason
    assert math.isnan(found["trace_stderr"])
    assert any("no standard error over samples; see trace_draw_stderr" in note for note in found.notes)


class Keys(nn.Module):
    """The bias of the keys has a gradient that is nothing but rounding."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(((self.query(x) @ self.key(x).mT).softmax(-1) @ x).mean(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_bias_that_the_outputs_do_not_depend_on_is_no_mixing_of_samples(dtype):
    torch.manual_seed(0)
    batches = [(torch.randn(n, 5, 4, dtype=dtype), torch.randint(3, (n,))) for n in (6, 3)]
    found = fisher(Keys().to(dtype), batches, LOSS)
    assert found["method"] == "exact, 3 columns"
    assert not any("no layer rule" in note for note in found.notes)
    assert math.isclose(found["kl_ratio"], 1, rel_tol=0.02)


def test_a_parametrised_layer_is_one_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 4))
    found = fisher(model.double(), data(), LOSS, kfac=True, kl_check=False)
    assert found["layer"].tolist() == ["0", "2"]
    assert np.isnan(found["layer_log_determinant"]).tolist() == [True, False]


def test_soft_labels_that_do_not_sum_to_one_are_pointed_out():
    model = network()
    for scale, said in ((1.0, False), (2.0, True)):
        batches = [(x, scale * torch.rand(len(x), 4).double().softmax(1)) for x, _ in data()]
        found = fisher(model, batches, LOSS, kl_check=False)
        assert any("do not sum to one" in note for note in found.notes) == said


def test_a_sample_without_a_target_leaves_no_trace_and_the_note_says_why():
    batches = [(torch.randn(3, 2, 4).double(), torch.randint(3, (3, 4)))]
    batches[0][1][1] = -100
    found = fisher(nn.Conv1d(2, 3, 1).double(), batches, LOSS)
    assert math.isnan(found["trace"])
    assert math.isnan(found["empirical_trace"])
    assert any("1 of the samples have no target that counts" in note for note in found.notes)
    assert not any("zero to all digits" in note for note in found.notes)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(OptionError, match="no parameters"):
        fisher(nn.Flatten(), data(), LOSS)


def test_a_gradient_that_is_not_finite_is_a_missing_trace_and_not_a_zero():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return x * self.scale.abs().sqrt()

    found = fisher(Root(), data(classes=5), LOSS, kl_check=False)
    assert np.isnan(found["layer_trace"]).all()
    assert any("trace is not finite" in note for note in found.notes)


def test_in_half_precision_the_ratio_of_divergences_is_called_rounding():
    batches = [(x.bfloat16(), y) for x, y in data()]
    found = fisher(network().bfloat16(), batches, LOSS)
    assert any("half precision" in note for note in found.notes)
    assert not any("half precision" in note for note in fisher(network(), data(), LOSS).notes)


def test_noise_injection_names_the_tensors_that_are_zero():
    model = network()
    nn.init.zeros_(model[2].weight)
    found = fisher(model, data(), LOSS, noise_injection=16, kl_check=False)
    assert np.isnan(found["layer_noise_trace"]).tolist() == [False, True]
    assert any("tensors that are zero: 2.weight" in note for note in found.notes)
    assert any("parameters without filters: 0.bias, 2.bias" in note for note in found.notes)


def test_attention_is_exact_and_vectorised_over_samples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.block(x).mean(1))

    torch.manual_seed(0)
    found = fisher(Net().double(), [(torch.randn(7, 3, 4).double(), torch.randint(3, (7,)))], LOSS)
    assert found["method"] == "exact, 3 columns"
    assert any("vectorised over samples" in note for note in found.notes)


def test_logits_of_ten_thousand_give_finite_numbers():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e5)
    for dtype in (torch.float64, torch.float32):
        found = fisher(model.to(dtype), data(dtype=dtype), LOSS, kfac=True)
        for name, value in found.items():
            if name not in ("method", "layer", "kl_ratio") and "kfac" not in name:
                assert np.isfinite(np.asarray(value, dtype=float)).all(), name


def test_the_kl_divergence_of_a_small_change_is_predicted():
    found = fisher(network(), data(), LOSS, kl_size=1e-5)
    assert math.isclose(found["kl_ratio"], 1, rel_tol=1e-3)
    assert found["kl"] > 0


def test_kronecker_factors_give_finite_determinants_and_ranks():
    found = fisher(network(), data(), LOSS, kfac=True, damping=1e-8)
    assert math.isclose(found["kfac_log_determinant"], found["layer_log_determinant"].sum())
    assert 0 < found["effective_rank"] <= 64
    assert found["kfac_coverage"] == 1
    assert (found["layer_participation"] >= 1).all()
    single = fisher(nn.Linear(5, 4).double(), data(), LOSS, kfac=True)
    assert np.isnan(single["layer_log_determinant"]).tolist() == [False, True]


def test_noise_feels_the_fisher_information_where_the_loss_is_quadratic():
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False).double()
    batches = [(x, torch.randn(len(x), 1).double()) for x, _ in data()]
    found = fisher(model, batches, get_loss("mse"), noise_injection=300, kl_check=False)
    assert abs(found["noise_trace"] - found["trace"]) < 4 * found["noise_trace_stderr"]
    assert found["noise_trace_stderr"] < 0.2 * found["trace"]


def test_a_network_without_filters_gets_no_noise_but_a_clear_answer():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(OptionError, match="two or more dimensions"):
        fisher(Scale(), data(), LOSS, noise_injection=20)


def test_a_function_called_like_a_loss_is_refused_for_what_it_is():
    with pytest.raises(OptionError, match="cross_entropy is a function of your own"):
        fisher(network(), data(), functional.cross_entropy)


def test_a_loss_without_labels_of_its_own_is_refused():
    with pytest.raises(OptionError, match="which labels the model would draw"):
        fisher(network(), data(), functional.multi_margin_loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "no relative tolerance"),
        ({"kl_size": 2.0}, "no small length"),
        ({"damping": 0.0, "kfac": True}, "between 0 and 1"),
        ({"damping": 0.1}, "no effect without --kfac"),
        ({"kl_size": 0.01, "kl_check": False}, "no effect without --kl-check"),
        ({"noise_beta": 0.01}, "no effect without --noise-injection"),
        ({"noise_beta": 0.0, "noise_injection": 20}, "positive and finite"),
        ({"noise_injection": 3}, "too few steps"),
        ({"seed": -1}, "out of range"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        fisher(network(), data(), LOSS, **options)


def summary_of(steps, traces, errors):
    arrays = {"step": np.array(steps), "trace": np.array(traces), "trace_stderr": np.array(errors)}
    result = Result("fisher", "checkpoint", {n: Array(("checkpoint",), v) for n, v in arrays.items()})
    return declaration_of(fisher).summary(result)


def test_the_peak_lies_between_the_checkpoints_beside_those_as_high_as_the_maximum():
    found = summary_of([0, 10, 20, 40, 80], [1.0, 9.9, 10.0, 5.0, 2.0], [0.1] * 5)
    assert found == {"peak_trace": 10, "peak_step": 20, "peak_step_low": 0, "peak_step_high": 40}
    found = summary_of([0, 10, 20, 40, 80], [1.0, 5.0, 10.0, 5.0, math.nan], [0.1] * 5)
    assert (found["peak_step_low"], found["peak_step_high"]) == (10, 40)
    assert math.isnan(summary_of([0, 1], [math.nan, math.nan], [0.1, 0.1])["peak_step"])


@pytest.mark.parametrize("run", RUNS)
def test_every_sample_run_has_finite_traces_at_every_checkpoint(run, tmp_path, monkeypatch):
    """Where a peer library returns NaN: networks that fit their data."""
    steps = ("--steps", "0,200,last") if run == "lstm_rows" else ()
    report = tmp_path / "report.h5"
    options = ["--samples", "20", "--tol", "0.5", "--no-kl-check", "--no-figure", "-q", *steps]
    assert command(monkeypatch, "fisher", f"sample_checkpoints/{run}", *options, "-o", report) == 0
    found = read_report(report)["fisher"]
    for name in ("trace", "layer_trace", "empirical_trace", "gradient_std"):
        assert np.isfinite(found[name]).all(), name
    assert (found["trace"] > 0).all()


def test_the_figure_has_its_styles(tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.h5"
    runs = [f"sample_checkpoints/{run}" for run in ("mlp_digits", "small_lr_large_batch")]
    options = ["--samples", "20", "--steps", "0,10,200", "--no-kl-check", "-q"]
    assert command(monkeypatch, "fisher", *runs, *options, "-o", report, "--no-figure") == 0
    for style in ("auto", "traces", "layers", "gradients"):
        figure = tmp_path / f"{style}.png"
        assert command(monkeypatch, "report", "plot", report, "--style", style, "--figure", figure) == 0
        assert figure.stat().st_size > 5000
    figure = tmp_path / "no.png"
    assert command(monkeypatch, "report", "plot", report, "--style", "no", "--figure", figure) == 2
    assert "Styles: auto, traces" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "labelled"), [((0, 1, 2), 1), ((0, 5, 9), 2)])
def test_panels_of_runs_with_other_steps_have_their_own_labels(steps, labelled):
    from matplotlib.figure import Figure

    one, rows = np.ones(6), np.ones((6, 2)) / 2
    arrays = {
        "step": Array(("checkpoint",), np.array([0, 1, 2, *steps])),
        "run": Array(("checkpoint",), np.array(["a"] * 3 + ["b"] * 3, dtype=object)),
        "status": Array(("checkpoint",), np.array(["ok"] * 6, dtype=object)),
        "layer": Array(("layer",), np.array(["one", "two"], dtype=object)),
        "layer_share": Array(("checkpoint", "layer"), rows),
    } | {
        name: Array(("checkpoint",), one)
        for name in ("trace", "trace_stderr", "empirical_trace", "empirical_trace_stderr")
    }
    figure = Figure()
    draw_fisher(Result("fisher", "checkpoint", arrays), figure)
    shares = [panel for panel in figure.axes if panel.get_ylabel() == "share of the trace"]
    assert len(shares) == 2
    assert sum(bool(panel.get_xlabel()) for panel in shares) == labelled
