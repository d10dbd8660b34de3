"""Robustness against closed forms for linear models, and networks whose gradients are masked on purpose."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._masking import CHECKS, Probe, is_stronger
from dynprobe.analyzers._robustness import Outcome, half_radius
from dynprobe.analyzers._robustness_figure import draw_robustness
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.result import Array, Piece, Result, stack
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.robustness import robustness
from dynprobe.cli.figure import figure_of
from dynprobe.cli.style import paper

CE, BCE, MSE = get_loss("cross_entropy"), get_loss("bce_with_logits"), get_loss("mse")
FREE = {"clip": "none", "curvature": False}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(n_features=5, n_outputs=1):
    model = nn.Linear(n_features, n_outputs).double().eval()
    with torch.no_grad():
        model.weight.copy_(randn(n_outputs, n_features))
        model.bias.copy_(randn(n_outputs, seed=1))
    return model


def split(inputs, targets, size=7):
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def separable(model, n=40):
    """Samples that a binary linear model classifies rightly, with its margins."""
    inputs = randn(n, model.in_features, seed=2)
    outputs = model(inputs).detach()[:, 0]
    return split(inputs, (outputs > 0).double()), outputs.abs()


def blobs(n=60, classes=3, n_features=6):
    centers = 2.5 * randn(classes, n_features, seed=3)
    targets = torch.arange(n) % classes
    return centers[targets] + randn(n, n_features, seed=4), targets


def trained(n=60):
    """A small network trained on blobs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    inputs, targets = blobs(n)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        CE(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), split(inputs, targets, 16)


@pytest.mark.parametrize(
    ("attacks", "option", "order"),
    [
        ("fgsm", "epsilons", 1),
        ("pgd-linf", "epsilons", 1),
        ("fhsm", "epsilons", 1),
        ("l2grad", "epsilons_l2", 2),
        ("l2hess", "epsilons_l2", 2),
    ],
)
def test_a_linear_classifier_is_fooled_exactly_where_epsilon_times_the_dual_norm_exceeds_the_margin(
    attacks, option, order
):
    model = linear()
    batches, margin = separable(model)
    sizes = (0.05, 0.2, 0.4, 0.9)
    found = robustness(
        model, batches, BCE, attacks=attacks, **{option: ",".join(str(size) for size in sizes)}, **FREE
    )
    norm = float(model.weight.detach()[0].norm(order))
    exact = [float((margin > size * norm).double().mean()) for size in (0.0, *sizes)]
    np.testing.assert_allclose(found["accuracy"][0], exact, atol=0)
    assert len(set(exact)) > 2
    assert found["epsilon"][0].tolist() == [0.0, *sizes]


def test_pgd_in_l2_with_a_random_start_finds_nearly_all_that_the_optimal_step_finds():
    model = linear()
    batches, _ = separable(model, 200)
    found = robustness(model, batches, BCE, attacks="l2grad,pgd-l2", epsilons_l2="0.2,0.5", **FREE)
    optimal, iterated = found["accuracy"][:2]
    assert (iterated >= optimal).all()
    assert (iterated <= optimal + 0.02).all()
    assert found.converged, found.reason


def test_the_robust_radius_is_the_median_margin_over_the_dual_norm():
    model = linear()
    batches, margin = separable(model, 400)
    radii = margin / model.weight.detach().norm()
    grid = ",".join(str(round(size, 3)) for size in np.linspace(0.02, 1.5, 75))
    found = robustness(model, batches, BCE, attacks="l2grad", epsilons_l2=grid, **FREE)
    assert float(found["robust_radius"][0]) == pytest.approx(float(radii.median()), abs=0.02)
    assert found["robust_radius_low"][0] < found["robust_radius"][0] < found["robust_radius_high"][0]


def test_the_loss_of_a_linear_regression_under_fgsm_is_in_closed_form_and_there_is_no_accuracy():
    model = linear()
    inputs, targets = randn(23, 5, seed=5), randn(23, seed=6)
    found = robustness(
        model, split(inputs, targets), MSE, attacks="fgsm,pgd-linf", epsilons="0.1,0.5", **FREE
    )
    residual = (model(inputs).detach()[:, 0] - targets).abs()
    for level, size in enumerate((0.0, 0.1, 0.5)):
        losses = (residual + size * model.weight.detach().abs().sum()).square()
        assert found["loss"][0, level] == pytest.approx(float(losses.mean()), rel=1e-9)
        assert found["loss_stderr"][0, level] == pytest.approx(float(losses.std()) / math.sqrt(23), rel=1e-9)
    assert not {"accuracy", "robust_radius", "clean_accuracy", "unbounded_accuracy"} & found.keys()
    assert found.converged, found.reason
    gradients = 2 * residual * model.weight.detach().norm()
    assert found["input_gradient_norm"] == pytest.approx(float(gradients.mean()), rel=1e-9)
    assert found["input_gradient_norm_stderr"] == pytest.approx(
        float(gradients.std()) / math.sqrt(23), rel=1e-9
    )
    declaration = declaration_of(robustness)
    arrays = {n: Array(declaration.returns[n].dims, np.asarray(found[n])) for n in found}
    arrays |= {"status": Array((), np.array("ok"))}
    draw_robustness(Result("robustness", "checkpoint", arrays), Figure())


def test_lambda_max_is_the_largest_eigenvalue_of_the_dense_hessian():
    model, batches = trained()
    found = robustness(model, batches, CE, attacks="fgsm", epsilons="0.1")
    parameters = dict(model.named_parameters())
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    sizes = [p.numel() for p in parameters.values()]

    def loss_of(flat):
        pieces = {
            name: part.view_as(p)
            for (name, p), part in zip(parameters.items(), flat.split(sizes), strict=True)
        }
        return CE(torch.func.functional_call(model, pieces, (inputs,)), targets)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_of, flat))[-1]
    assert found["lambda_max"] == pytest.approx(float(exact), rel=1e-3)
    assert found["lambda_max_residual"] < 0.1 * float(exact)


def test_a_healthy_network_passes_every_check():
    model, batches = trained()
    found = robustness(model, batches, CE, attacks="fgsm,l2grad,pgd-linf,pgd-l2", curvature=False)
    assert dict(zip(found["check"], found["check_passed"], strict=True)) == dict.fromkeys(CHECKS, 1.0)
    assert found["masking_warnings"] == 0
    assert found.converged, found.reason
    assert float(np.nanmax(found["unbounded_accuracy"])) < 0.05


class Masked(nn.Module):
    """A network behind a front whose backward pass is not the derivative of its forward pass."""

    def __init__(self, model, front):
        super().__init__()
        self.model, self.front = model, front

    def forward(self, x):
        return self.model(self.front(x))


class Backwards(torch.autograd.Function):
    """The identity with the gradient's sign turned round."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return -gradient


class Scaled(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


def failed(found):
    return {name for name, passed in zip(found["check"], found["check_passed"], strict=True) if passed == 0}


def test_a_quantised_front_without_gradient_is_flagged():
    model, batches = trained()
    masked = Masked(model, lambda x: torch.round(4 * x) / 4)
    found = robustness(masked, batches, CE, attacks="fgsm,pgd-linf", curvature=False)
    assert found["zero_gradient_share"] == 1
    assert "gradients-nonzero" in failed(found)
    assert "loss-rises" in failed(found)
    assert not found.converged
    assert found.reason.startswith("possible gradient masking: 100 % of 60 samples have no input gradient")
    assert found["masking_warnings"] == len(failed(found))


def test_saturated_logits_are_flagged():
    model, batches = trained()
    found = robustness(
        Scaled(model, 1e5), batches, CE, attacks="fgsm,pgd-linf", epsilons="0.01,0.1", curvature=False
    )
    assert found["zero_gradient_share"] > 0.5
    assert "gradients-nonzero" in failed(found)
    assert not found.converged


def test_gradients_that_point_the_wrong_way_are_flagged():
    model, batches = trained()
    masked = Masked(model, Backwards.apply)
    found = robustness(masked, batches, CE, attacks="fgsm", epsilons="0.5,2,4", **FREE)
    assert failed(found) == {"loss-rises", "noise-not-stronger"}
    assert found["zero_gradient_share"] == 0


def test_checks_that_cannot_be_made_are_not_applicable_and_say_why():
    model, batches = trained()
    found = robustness(model, batches, CE, attacks="l2hess", epsilons_l2="0.5", curvature=False)
    applies = dict(zip(found["check"], ~np.isnan(found["check_passed"]), strict=True))
    assert [name for name in CHECKS if applies[name]] == ["gradients-nonzero"]
    assert "check unbounded-breaks does not apply: it needs pgd" in found.notes
    assert found["input_curvature"] > 0
    assert found["newton_residual_max"] < 1e-2


def test_accuracy_under_pgd_never_rises_with_the_size_and_the_worst_of_restarts_counts():
    model, batches = trained()
    one = robustness(model, batches, CE, attacks="pgd-linf", pgd_steps=3, curvature=False)
    three = robustness(model, batches, CE, attacks="pgd-linf", pgd_steps=3, restarts=3, curvature=False)
    assert (np.diff(one["accuracy"][0]) <= 0).all()
    assert (np.diff(one["loss"][0]) >= 0).all()
    assert (three["loss"][0] >= one["loss"][0]).all()
    assert (three["loss"][0] > one["loss"][0]).any()


def test_the_split_into_batches_does_not_matter():
    model, batches = trained()
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    options = {"attacks": "fgsm,pgd-linf,pgd-l2,fhsm,l2hess", "pgd_steps": 4, "seed": 3}
    whole = robustness(model, [(inputs, targets)], CE, **options)
    other = robustness(model, split(inputs, targets, 13), CE, **options)
    for name, values in whole.items():
        if np.asarray(values).dtype.kind == "f":
            np.testing.assert_allclose(other[name], values, rtol=1e-7, atol=1e-9, err_msg=name)


def test_model_gradients_and_random_state_are_untouched():
    model, batches = trained()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    inputs = [pair[0].clone() for pair in batches]
    robustness(model, batches, CE, attacks="pgd-l2,fhsm", pgd_steps=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(
        torch.equal(pair[0], old) and not pair[0].requires_grad
        for pair, old in zip(batches, inputs, strict=True)
    )


def test_inputs_are_clipped_to_their_own_range_unless_told_otherwise():
    model, batches = trained()
    options = {"attacks": "fgsm", "epsilons": "3", "curvature": False}
    inputs = torch.cat([pair[0] for pair in batches])
    auto = robustness(model, batches, CE, **options)
    assert (auto["clip_low"], auto["clip_high"]) == (float(inputs.min()), float(inputs.max()))
    free = robustness(model, batches, CE, clip="none", **options)
    assert "clip_low" not in free
    assert free["loss"][0, 1] != auto["loss"][0, 1]
    wide = robustness(model, batches, CE, clip="-100:100", **options)
    assert wide["loss"][0, 1] == free["loss"][0, 1]


def test_automatic_sizes_are_shares_of_the_range_and_of_its_length_in_the_two_norm():
    model, batches = trained()
    found = robustness(model, batches, CE, attacks="fgsm,l2grad", curvature=False)
    width = found["clip_high"] - found["clip_low"]
    np.testing.assert_allclose(
        found["epsilon"][0], width * np.array([0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    )
    np.testing.assert_allclose(found["epsilon"][1], math.sqrt(6) * found["epsilon"][0])


def test_grids_of_different_length_are_padded_with_nan():
    model, batches = trained()
    found = robustness(
        model, batches, CE, attacks="fgsm,l2grad", epsilons="0.1", epsilons_l2="0.1,0.2,0.3", curvature=False
    )
    assert found["attack"].tolist() == ["fgsm", "l2grad", "random-linf", "random-l2"]
    assert np.isnan(found["accuracy"]).sum(1).tolist() == [2, 0, 2, 0]


def test_test_data_are_attacked_when_asked_for_and_the_curvature_stays_that_of_the_training_loss():
    model, batches = trained()
    test = [(randn(11, 6, seed=9), torch.arange(11) % 3)]
    options = {"attacks": "fgsm", "epsilons": "0.1"}
    train = robustness(model, batches, CE, test, **options)
    held = robustness(model, batches, CE, test, test=True, **options)
    assert (train["attacked_samples"], held["attacked_samples"]) == (60, 11)
    assert held["clean_accuracy"] == pytest.approx(
        float((model(test[0][0]).argmax(1) == test[0][1]).double().mean())
    )
    assert held["lambda_max"] == train["lambda_max"]


def test_finished_attacks_are_taken_from_the_store_of_parts():
    class Store(dict):
        put = dict.__setitem__

    model, batches = trained()
    store, options = Store(), {"attacks": "pgd-linf", "pgd_steps": 5, "curvature": False}
    first = robustness(model, batches, CE, partial=store, **options)
    again = robustness(model, batches, CE, partial=store, **options)
    assert list(store) == ["pgd-linf"]
    assert again.spent["gradients"] < first.spent["gradients"] / 2
    np.testing.assert_array_equal(again["loss"], first["loss"])
    np.testing.assert_array_equal(again["accuracy"], first["accuracy"])


def test_the_dry_run_promises_what_is_spent():
    model, batches = trained()
    options = {"attacks": "fgsm,pgd-linf,l2grad", "epsilons": "0.1,0.2", "pgd_steps": 4, "restarts": 2}
    promised = declaration_of(robustness).cost({**options, "curvature": False}, 1)
    spent = robustness(model, batches, CE, curvature=False, **options).spent
    assert spent["gradients"] == promised["gradients"]
    assert spent["forwards"] == promised["forwards"]


def test_a_model_without_second_derivatives_has_its_attacks_and_no_curvature():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centers = nn.Parameter(randn(3, 6))

        def forward(self, x):
            return -torch.cdist(x, self.centers)

    inputs, targets = blobs()
    found = robustness(Distances().eval(), split(inputs, targets), CE, attacks="fgsm", epsilons="0.1")
    assert math.isnan(found["lambda_max"])
    assert any("second derivative" in note for note in found.notes)
    assert np.isfinite(found["accuracy"]).all()


def test_a_sign_test_calls_an_attack_stronger_only_when_chance_would_hardly_do_it():
    base = np.ones(100)
    few, many = base.copy(), base.copy()
    few[:6], many[:15] = 0, 0
    assert not is_stronger(few, base)
    assert is_stronger(many, base)
    assert not is_stronger(base, many)
    assert not is_stronger(1.001 * -base, -base)  # losses that differ by a thousandth are equal


def test_pgd_that_still_gains_with_twice_the_steps_is_reported_as_not_converged():
    usual, longer = np.ones(100), np.ones(100)
    usual[:20], longer[:60] = 0, 0
    outcome = Outcome(np.zeros((1, 100)), longer[None])
    text = Probe("pgd-linf", 0.1, usual, longer, outcome).unfinished
    assert text.startswith("pgd-linf has not converged: twice the steps take off another 0.4 at size 0.1")
    assert not Probe("pgd-linf", 0.1, usual, usual, outcome).unfinished


def test_the_half_radius_is_linear_between_sizes_and_bracketed_by_whole_intervals():
    levels = np.array([0.0, 1.0, 2.0, 3.0])
    found = half_radius(levels, np.array([0.8, 0.6, 0.2, 0.0]), 0.8, 1000)
    assert found == pytest.approx((1.5, 1.0, 2.0))
    uncertain = half_radius(levels, np.array([0.8, 0.6, 0.35, 0.0]), 0.8, 20)
    assert (uncertain.low, uncertain.high) == (0.0, 3.0)
    never = half_radius(levels, np.array([0.8, 0.8, 0.7, 0.7]), 0.8, 1000)
    assert math.isnan(never.value)
    assert never.low == 3.0
    assert math.isnan(half_radius(levels, np.zeros(4), 0.0, 1000).low)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": "fgms"}, "attacks: 'fgms' is not known"),
        ({"attacks": "random-l2"}, "attacks: 'random-l2' is not known"),
        ({"attacks": ","}, "names none"),
        ({"epsilons": "a,b"}, "epsilons 'a,b' is no list of sizes"),
        ({"epsilons": "-1"}, "no list of sizes"),
        ({"epsilons_l2": "nan"}, "epsilons-l2 'nan' is no list"),
        ({"epsilons": "0"}, "no list of sizes"),
        ({"clip": "1:0"}, "clip '1:0' is no range"),
        ({"clip": "wide"}, "clip 'wide' is no range"),
        ({"clip": "0:1"}, "clip 0:1 does not hold the inputs, which reach from -"),
        ({"attacks": "fgsm", "epsilons_l2": "0.1"}, "epsilons-l2 would have no effect"),
        ({"attacks": "l2grad", "epsilons": "0.1"}, "epsilons would have no effect"),
        ({"attacks": "fgsm", "pgd_steps": 5}, "pgd-steps would have no effect"),
        ({"attacks": "fgsm", "restarts": 2}, "restarts would have no effect"),
        ({"damping": 0.1}, "damping would have no effect"),
        ({"cg_iterations": 5}, "cg-iterations would have no effect"),
        ({"attacks": "fhsm", "damping": math.inf}, "damping inf is not finite"),
        ({"test": True}, "there are no test data"),
        ({"seed": -1}, "seed -1 is out of range"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_by_name(options, message):
    inputs, targets = blobs(6)
    model = nn.Linear(6, 3).double()
    with pytest.raises(OptionError) as caught:
        robustness(model, [(inputs, targets)], CE, **options)
    assert message in caught.value.message


def test_inputs_that_cannot_be_perturbed_are_refused_with_the_reason():
    ids, targets = torch.arange(12).view(6, 2), torch.arange(6) % 3

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(12, 3)

        def forward(self, ids, scale=None):
            return self.table(ids).mean(1)

    with pytest.raises(
        OptionError, match=r"inputs are integers \(token ids\): they cannot be perturbed by ε"
    ):
        robustness(Embedded(), [(ids, targets)], CE, curvature=False)
    constant = [(torch.ones(6, 4), targets)]
    with pytest.raises(OptionError, match="no ε can be chosen"):
        robustness(nn.Linear(4, 3), constant, CE, curvature=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "no ε can be chosen"), ({"clip": "2:3"}, "clip 2:3 does not hold the inputs")],
)
def test_what_is_refused_is_refused_before_the_curvature_is_computed(monkeypatch, options, message):
    def never(*given):
        raise AssertionError("computed before the options were checked")

    monkeypatch.setattr(sys.modules[robustness.__module__], "largest_eigenvalue", never)
    with pytest.raises(OptionError, match=message):
        robustness(nn.Linear(4, 3), [(torch.ones(6, 4), torch.arange(6) % 3)], CE, **options)


CONSTANT = {"epsilons": "0.1,0.2", "epsilons_l2": "0.1", "curvature": False, "pgd_steps": 3}


@pytest.mark.parametrize("clip", ["none", "auto"])
def test_constant_inputs_with_sizes_of_their_own_have_no_unbounded_check(clip):
    model, data = linear(4, 3), [(torch.ones(6, 4).double(), torch.arange(6) % 3)]
    found = robustness(model, data, CE, clip=clip, **CONSTANT)
    assert np.isnan(found["unbounded_accuracy"]).all()
    assert np.isfinite(found["longer_accuracy"][[1, 2]]).all()
    checks = dict(zip(found["check"], found["check_passed"], strict=True))
    assert math.isnan(checks["unbounded-breaks"])
    assert any("unbounded-breaks does not apply: the inputs are all one number" in n for n in found.notes)


def test_the_whole_range_of_constant_inputs_is_the_one_they_are_clipped_to():
    model, data = linear(4, 3), [(torch.ones(6, 4).double(), torch.arange(6) % 3)]
    found = robustness(model, data, CE, clip="0:1", **CONSTANT)
    assert np.isfinite(found["unbounded_accuracy"][[1, 2]]).all()


def test_a_sample_whose_target_is_ignored_is_said_and_drawn_without_its_mean():
    inputs, targets = blobs(12)
    targets[3] = -100
    found = robustness(linear(6, 3), [(inputs, targets)], CE, attacks="fgsm", epsilons="0.1", **FREE)
    assert math.isnan(found["clean_loss"])
    assert math.isnan(found["clean_accuracy"])
    assert any("1 of 12 samples have no loss (NaN)" in note for note in found.notes)
    draw_robustness(several({"run": found}, steps=(0, 1)), Figure())


def several(found_of, steps=(7,)):
    """One result of several runs."""
    declaration = declaration_of(robustness)
    pieces = [
        Piece(
            f"{run}{step}", {"run": run, "step": step, "path": f"{run}/{step}"}, labelled(declaration, found)
        )
        for run, found in found_of.items()
        for step in steps
    ]
    return stack("robustness", "checkpoint", pieces, {})


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_legend_of_one_panel_lies_within_the_figure_however_many_runs(count):
    model, data = trained()
    found = robustness(model, data, CE, attacks="fgsm,pgd-linf", epsilons="0.1", **FREE)
    names = ["large_lr_small_batch", "small_lr_large_batch", "bn_cnn_shuffled", "bn_cnn_seed0", "mlp_digits"]
    figure = figure_of(several(dict.fromkeys(names[:count], found)), declaration_of(robustness))
    with paper():
        figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
