"""`dynprobe hessian` against closed forms and dense float64 Hessians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._curvature import disjoint_subsets, gathered, in_batches_of
from dynprobe.analyzers._hessian_figure import draw_hessian
from dynprobe.analyzers._hessian_parts import gap
from dynprobe.analyzers._training import training_facts
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.loop import MemoryStore
from dynprobe.analyzers.core.result import Piece, stack
from dynprobe.analyzers.fisher import fisher
from dynprobe.analyzers.gradient_covariance import gradient_covariance
from dynprobe.analyzers.hessian import hessian
from dynprobe.analyzers.numerics.losses import get_loss

CE, MSE = get_loss("cross_entropy"), get_loss("mse")


def split(inputs: Tensor, targets: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def regression(n: int = 30, d: int = 5) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    targets = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False).double().eval()
    spectrum = np.linalg.eigvalsh((2 * inputs.T @ inputs / n).numpy())[::-1]
    return model, split(inputs, targets, [n // 2, n - n // 2 - 3, 3]), spectrum


def classifier(activation: type[nn.Module] = nn.Tanh, seed: int = 0, n: int = 37):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 7), activation(), nn.Linear(7, 3)).double().eval()
    inputs, targets = torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        CE(model(inputs), targets).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model, split(inputs, targets, [n - 11, 10, 1])


def dense(model: nn.Module, batches, loss, train: bool = False) -> Tensor:
    """The Hessian by torch.func, all samples in one batch (or batch by batch, weighted, in train mode)."""
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def value(flat: Tensor) -> Tensor:
        filled = {
            name: part.view(shape) for name, part, shape in zip(names, flat.split(sizes), shapes, strict=True)
        }
        n = sum(len(t) for _, t in batches)
        total = flat.new_zeros(())
        for x, t in batches:
            own = {name: b.clone() for name, b in buffers.items()}
            total = total + loss(torch.func.functional_call(model, {**filled, **own}, (x,)), t) * len(t) / n
        return total

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    model.train(train)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(value, flat)
    finally:
        model.eval()


def test_the_whole_spectrum_of_linear_regression_with_unequal_batches_is_that_of_two_xtx_over_n():
    model, batches, spectrum = regression()
    found = hessian(model, batches, MSE, top_k=5, tol=1e-10)
    np.testing.assert_allclose(found["eigenvalue"], spectrum, rtol=1e-10)
    assert found.converged
    assert found["n_samples"] == 30


class TwoScalars(nn.Module):
    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.b * x


def test_the_two_scalar_net_has_eigenvalues_a2_plus_b2_and_zero_where_ab_is_the_target():
    one = torch.ones(1, 1, dtype=torch.float64)
    half = lambda o, t: (o - t).square().mean() / 2  # noqa: E731
    found = hessian(TwoScalars(2.0, 1.5).eval(), [(one, 3 * one)], half, top_k=2, tol=1e-10)
    np.testing.assert_allclose(found["eigenvalue"], [2.0**2 + 1.5**2, 0.0], atol=1e-12)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(len(x), 2, 2))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 4, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.view(len(x), 2, 2)).mean(1))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(5, 3)
    )


def net(build, n: int = 23):
    torch.manual_seed(3)
    model = build().double()
    inputs, targets = torch.randn(n, 4, dtype=torch.float64), torch.randint(0, 3, (n,))
    if any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
        model.train()(inputs)
    return model.eval(), split(inputs, targets, [14, 8, 1])


@pytest.mark.parametrize(
    "build",
    [Recurrent, Transformer, normalised]
    + [
        lambda a=a: nn.Sequential(nn.Linear(4, 6), a(), nn.Linear(6, 3))
        for a in (nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus)
    ],
)
def test_both_ends_of_the_spectrum_equal_the_dense_float64_hessians(build):
    model, batches = net(build)
    exact = np.linalg.eigvalsh(dense(model, batches, CE).numpy())
    found = hessian(model, batches, CE, top_k=6, which="both", tol=1e-8)
    np.testing.assert_allclose(
        found["eigenvalue"], np.concatenate([exact[::-1][:3], exact[:3][::-1]]), rtol=1e-7, atol=1e-9
    )
    assert found["largest"] == pytest.approx(exact[-1])
    assert found["smallest"] == pytest.approx(exact[0])
    assert (np.abs(found["residual"]) < 1e-3).all()


def test_eigenvectors_are_those_of_the_dense_hessian_up_to_sign():
    model, batches = classifier()
    exact, vectors = torch.linalg.eigh(dense(model, batches, CE))
    found = hessian(model, batches, CE, top_k=3, tol=1e-10, vectors=True)
    cosine = (found["eigenvector"].double() * vectors.flip(1)[:, :3].T).sum(1).abs()
    torch.testing.assert_close(cosine, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    np.testing.assert_allclose(found["eigenvalue"], exact.flip(0)[:3], rtol=1e-9)


def test_a_chosen_end_hides_nothing_and_a_note_says_what_is_larger_at_the_other():
    model, batches = net(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    exact = np.linalg.eigvalsh(dense(model, batches, CE).numpy())
    found = hessian(model, batches, CE, top_k=8)
    assert -exact[0] > exact[::-1][7]
    assert any("most negative eigenvalue" in note for note in found.notes)
    by_size = hessian(model, batches, CE, top_k=8, which="largest-magnitude", tol=1e-8)
    np.testing.assert_allclose(by_size["eigenvalue"], exact[np.argsort(-np.abs(exact))][:8], rtol=1e-6)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_the_trace_of_a_relu_net_is_exact_whole_and_by_layer(curvature):
    model, batches = classifier(nn.ReLU)
    found = hessian(model, batches, CE, top_k=1, trace=True, curvature=curvature)
    diagonal = dense(model, batches, CE).diagonal()
    assert found["trace"] == pytest.approx(float(diagonal.sum()), rel=1e-9)
    np.testing.assert_allclose(
        found["layer_trace"], [float(diagonal[:35].sum()), float(diagonal[35:].sum())], rtol=1e-9
    )
    assert found["trace_stderr"] == 0
    assert list(found["layer"]) == ["0", "2"]
    assert any("exact" in note for note in found.notes)


def test_the_trace_of_a_tanh_net_is_estimated_within_three_standard_errors_and_says_why():
    model, batches = classifier(nn.Tanh)
    diagonal = dense(model, batches, CE).diagonal()
    found = hessian(model, batches, CE, top_k=3, trace=True, trace_tol=0.02, max_probes=400)
    assert 0 < found["trace_stderr"] <= 0.02 * abs(found["trace"])
    assert abs(found["trace"] - float(diagonal.sum())) < 3 * found["trace_stderr"]
    blocks = np.array([float(diagonal[:35].sum()), float(diagonal[35:].sum())])
    assert (np.abs(found["layer_trace"] - blocks) < 3.5 * found["layer_trace_stderr"]).all()
    assert any("estimated" in note and "Tanh" in note for note in found.notes)


def test_a_trace_that_misses_its_tolerance_is_not_converged_and_keeps_its_error():
    """A peer stops after a median of 20 products with errors of ten times its tolerance, unflagged."""
    model, batches = classifier(nn.Tanh)
    found = hessian(model, batches, CE, top_k=1, trace=True, trace_tol=1e-4, max_probes=6)
    assert not found.converged
    assert "standard error" in found.reason
    assert found["trace_stderr"] > 0


def test_density_has_the_moments_of_the_matrix_and_carries_its_nodes():
    model, batches = classifier(nn.Tanh)
    exact = np.linalg.eigvalsh(dense(model, batches, CE).numpy())
    found = hessian(model, batches, CE, top_k=4, density=True, density_probes=8, density_steps=20, tol=1e-8)
    step = found["density_at"][1] - found["density_at"][0]
    assert found["density"].sum() * step == pytest.approx(1, abs=0.02)
    node, weight = found["node"], found["node_weight"]
    for power in (0, 1, 2):
        samples = np.nansum(weight * node**power, axis=1) + (found["eigenvalue"] ** power).sum()
        stderr = samples.std(ddof=1) / math.sqrt(len(samples))
        assert abs(samples.mean() - (exact**power).sum()) <= 4 * stderr + 1e-8
    cut = 0.01 * np.abs(exact).max()
    assert abs(found["negative_share"] - (exact < -cut).mean()) < 0.1
    assert (
        abs(found["negative_trace"] - exact[exact < -cut].sum()) < 5 * found["negative_trace_stderr"] + 0.01
    )


def test_layers_have_the_spectra_of_their_own_blocks():
    model, batches = classifier()
    matrix = dense(model, batches, CE).numpy()
    found = hessian(model, batches, CE, top_k=2, layers=True, tol=1e-9)
    blocks = [np.linalg.eigvalsh(matrix[:35, :35])[::-1][:2], np.linalg.eigvalsh(matrix[35:, 35:])[::-1][:2]]
    np.testing.assert_allclose(found["layer_eigenvalue"], blocks, rtol=1e-7)


def test_params_restricts_everything_to_the_block_they_find():
    model, batches = classifier()
    matrix = dense(model, batches, CE).numpy()
    found = hessian(model, batches, CE, params=r"^2\.", top_k=2, trace=True, trace_tol=0.1, tol=1e-8)
    np.testing.assert_allclose(found["eigenvalue"], np.linalg.eigvalsh(matrix[35:, 35:])[::-1][:2], rtol=1e-6)
    assert found["n_parameters"] == 24
    assert found["trace"] == pytest.approx(np.trace(matrix[35:, 35:]), rel=0.2)


def test_the_loss_along_an_eigenvector_curves_by_its_eigenvalue_on_training_and_test_data():
    model, batches = classifier()
    test = [(x + 0.1, t) for x, t in batches]
    found = hessian(model, batches, CE, test, top_k=2, along=2, span=1e-3, resolution=3, tol=1e-8)
    second = (found["along_loss"][:, 0] - 2 * found["along_loss"][:, 1] + found["along_loss"][:, 2]) / 1e-6
    np.testing.assert_allclose(second, found["eigenvalue"], rtol=1e-3)
    assert found["along_loss"][0, 1] == pytest.approx(found["loss"])
    assert found["along_test_loss"].shape == found["along_test_accuracy"].shape == (2, 3)
    assert (found["along_test_loss"][:, 1] != found["along_loss"][:, 1]).all()


def test_disjoint_subsets_show_the_spread_of_the_eigenvalue_and_its_upward_bias():
    generator = torch.Generator().manual_seed(0)
    n, d = 400, 20
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    model = nn.Linear(d, 1, bias=False).double().eval()
    batches = split(inputs, torch.zeros(n, 1, dtype=torch.float64), [150, 150, 100])
    found = hessian(model, batches, MSE, top_k=1, subsets=5)
    assert found["subset_eigenvalue"].shape == (5, 1)
    assert found["subset_size"] == 80
    # truth for infinitely many samples: 2. Subsets of 80 are off by several times what all 400 are.
    assert found["subset_eigenvalue"].mean() > found["eigenvalue"][0] > 2.0
    corrected = found["eigenvalue"][0] - found["eigenvalue_bias"][0]
    assert abs(corrected - 2.0) < abs(found["eigenvalue"][0] - 2.0)
    assert found["eigenvalue_spread"][0] == pytest.approx(found["subset_eigenvalue"].std(ddof=1))


def test_subsets_are_disjoint_and_hold_every_sample_once():
    inputs = torch.arange(23.0)[:, None]
    parts = disjoint_subsets(split(inputs, torch.arange(23), [10, 13]), 4, seed=1)
    seen = torch.cat([gathered(part)[1] for part in parts])
    assert sorted(seen.tolist()) == list(range(23))
    for part in parts:
        x, t = gathered(part)
        assert torch.equal(x[:, 0].long(), t)


def test_batchnorm_in_train_mode_only_when_asked_with_buffers_untouched_and_the_fact_recorded():
    model, batches = net(normalised)
    before = {name: b.clone() for name, b in model.named_buffers()}
    plain = hessian(model, batches, CE, top_k=2, tol=1e-8)
    found = hessian(model, batches, CE, top_k=2, mode="train", train_batch=12, tol=1e-8)
    model[3].p = 0.0  # dropout is off in ours
    exact = dense(model, in_batches_of(batches, 12), CE, train=True)
    np.testing.assert_allclose(found["eigenvalue"], np.linalg.eigvalsh(exact.numpy())[::-1][:2], rtol=1e-6)
    assert not np.allclose(found["eigenvalue"], plain["eigenvalue"], rtol=0.01)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert any("statistics of batches of 12" in note for note in found.notes)
    assert not any("statistics" in note for note in plain.notes)


def test_train_mode_does_not_depend_on_the_batches_the_data_come_in():
    model, batches = net(normalised)
    inputs, targets = gathered(batches)
    facts = {"batch_size": 10}
    once = hessian(model, batches, CE, training=facts, top_k=2, mode="train")
    again = hessian(model, split(inputs, targets, [5] * 4 + [3]), CE, training=facts, top_k=2, mode="train")
    np.testing.assert_allclose(once["eigenvalue"], again["eigenvalue"], rtol=1e-9)


def test_a_last_batch_of_one_sample_joins_the_others_in_train_mode():
    batches = in_batches_of([(torch.zeros(21, 2), torch.zeros(21))], 10)
    assert [len(t) for _, t in batches] == [10, 11]


def test_too_few_products_are_said_and_the_numbers_keep_their_bounds():
    model, batches = classifier()
    found = hessian(model, batches, CE, top_k=5, tol=1e-9, max_hvps=7)
    assert not found.converged
    assert "missed the tolerance" in found.reason
    assert not np.asarray(found["eigenvalue_converged"]).all()
    exact = np.linalg.eigvalsh(dense(model, batches, CE).numpy())
    nearest = np.abs(found["eigenvalue"][:, None] - exact).min(1)
    assert (nearest <= np.asarray(found["error_bound"]) + 1e-12).all()


def test_a_tight_memory_restarts_and_gives_the_same_eigenvalues():
    model, batches = classifier()
    n = sum(p.numel() for p in model.parameters())
    free = hessian(model, batches, CE, top_k=2, tol=1e-8)
    tight = hessian(model, batches, CE, top_k=2, tol=1e-8, memory=2 * 13 * n * 8 / 1e9)
    np.testing.assert_allclose(tight["eigenvalue"], free["eigenvalue"], rtol=1e-7)


def test_finished_layers_and_subsets_are_not_solved_twice():
    model, batches = classifier()
    store = MemoryStore().partial("key")
    options = {"top_k": 2, "layers": True, "subsets": 2, "partial": store}
    first = hessian(model, batches, CE, **options)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    second = hessian(model, batches, CE, **options)
    np.testing.assert_array_equal(first["subset_eigenvalue"], second["subset_eigenvalue"])
    np.testing.assert_array_equal(first["layer_eigenvalue"], second["layer_eigenvalue"])
    assert first.spent == second.spent
    assert len(calls) < 12
    with pytest.raises(OptionError, match="fewer than two each"):  # before anything is solved
        hessian(model, batches, CE, subsets=30)
    assert len(calls) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 60}, "more than the 59 parameters"),
        ({"tol": 0.0}, "no relative tolerance"),
        ({"params": "("}, "no regular expression"),
        ({"params": "nothing"}, "fits no parameter"),
        ({"subsets": 1}, "one subset"),
        ({"subsets": 30}, "fewer than two each"),
        ({"along": 6}, "so many eigenvectors"),
        ({"along": 1, "span": -1.0}, "positive"),
        ({"along": 1, "resolution": 4}, "leave none at 0"),
        ({"train_batch": 4}, "for mode train"),
        ({"memory": 1e-6}, "too little for 5 eigenvectors"),
        ({"max_hvps": 4}, "cannot give 5 pairs"),
        ({"mode": "train", "along": 1}, "measures another function"),
        ({"seed": -1}, "out of range"),
    ],
)
def test_options_that_cannot_be_followed_are_said_in_the_users_words(options, message):
    model, batches = classifier()
    with pytest.raises(OptionError, match=message):
        hessian(model, batches, CE, **options)


def test_a_fisher_matrix_of_a_loss_without_a_distribution_is_refused():
    model, batches = classifier()
    with pytest.raises(OptionError, match="which labels the model would draw"):
        hessian(model, batches, lambda o, t: o.square().mean(), curvature="fisher")


@pytest.mark.parametrize(
    ("training", "step", "threshold"),
    [
        ({"learning_rate": 0.1}, 0, 20.0),
        ({"learning_rate": 0.1, "momentum": 0.9}, 5, 38.0),
        ({"learning_rate": 0.1, "schedule": "cosine", "steps": 100}, 50, 40.0),
        ({"learning_rate": 0.1, "schedule": "cosine", "steps": 100}, 100, math.nan),
        ({"learning_rate": 0.1, "schedule": "warmup"}, 5, math.nan),
        ({"learning_rate": 0.1, "optimizer": "adam"}, 5, math.nan),
        ({}, 5, math.nan),
    ],
)
def test_the_stability_threshold_is_two_over_eta_and_nan_where_eta_or_its_meaning_is_unknown(
    training, step, threshold
):
    assert training_facts(training, step).stability_threshold == pytest.approx(threshold, nan_ok=True)
    given = training_facts(training, step, learning_rate=0.5)
    assert math.isnan(given.stability_threshold) == (training.get("optimizer") == "adam")


def test_a_schedule_that_is_not_known_is_said():
    assert "warmup" in training_facts({"learning_rate": 0.1, "schedule": "warmup"}, 5).notes[0]


def test_outliers_are_counted_above_the_widest_relative_gap():
    assert gap(np.array([10.0, 8.0, 0.5, 0.4])) == {"spectral_gap": 16.0, "n_outliers": 2.0}
    assert math.isnan(gap(np.array([1.0, -2.0]))["n_outliers"])


def test_a_network_on_a_part_of_its_data_says_so():
    model, batches = classifier()

    class Part(list):
        n_samples, n_total = 37, 400

    assert any("37 of 400 samples" in note for note in hessian(model, Part(batches), CE).notes)


def drawn(style: str, steps=(0, 10, 100), **options) -> Figure:
    model, batches = classifier()
    declaration = declaration_of(hessian)
    pieces = []
    for step in steps:
        found = hessian(model, batches, CE, batches, step=step, training={"learning_rate": 0.1}, **options)
        arrays = labelled(declaration, found)
        pieces.append(Piece(f"{step}", {"run": "run", "step": step, "path": f"{step}.pt"}, arrays))
    figure = Figure(layout="constrained")
    draw_hessian(stack("hessian", "checkpoint", pieces, {}), figure, style)
    return figure


def test_the_figure_has_a_panel_for_everything_measured():
    figure = drawn("", top_k=2, density=True, along=1, resolution=3, layers=True)
    assert len(figure.axes) == 4
    figure.draw_without_rendering()
    assert len(drawn("eigenvalues").axes) == 1
    assert len(drawn("", steps=(5,)).axes) == 1


def test_a_style_that_is_unknown_or_was_not_measured_is_named():
    with pytest.raises(OptionError, match="was not measured"):
        drawn("density", steps=(5,))
    with pytest.raises(OptionError, match="not a style"):
        drawn("pie", steps=(5,))


def test_soft_labels_that_are_no_probabilities_have_no_exact_trace():
    """Their curvature is scaled by the sum of the labels, which the Fisher information does not know."""
    model, _ = classifier(nn.ReLU)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    batches = split(inputs, 4 * torch.rand(20, 3, generator=generator, dtype=torch.float64), [12, 8])
    found = hessian(model, batches, CE, top_k=2, trace=True, trace_tol=0.03, max_probes=2000)
    exact = float(dense(model, batches, CE).trace())
    assert abs(found["trace"] - exact) < 3.5 * found["trace_stderr"]
    assert any("not probabilities" in note for note in found.notes)
    whole = [(x, t / t.sum(1, keepdim=True)) for x, t in batches]
    assert hessian(model, whole, CE, top_k=1, trace=True)["trace_stderr"] == 0


def test_a_network_that_is_another_function_at_every_call_is_refused():
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(nn.functional.dropout(x, 0.5))

    batches = [(torch.randn(9, 4), torch.randint(0, 3, (9,)))]
    for measure in (hessian, fisher, gradient_covariance):
        with pytest.raises(OptionError, match="other outputs for the same inputs"):
            measure(Random().eval(), batches, CE)


def test_graphs_and_krylov_vectors_are_let_go_before_other_matrices_are_solved(monkeypatch):
    from dynprobe.analyzers.numerics.batch_operator import BatchOperator

    model, batches = classifier()
    operators: list[BatchOperator] = []
    most = []
    build = BatchOperator.__init__

    def counting(self, *args, **kwargs):
        build(self, *args, **kwargs)
        operators.append(self)
        most.append(sum(any(c.graph is not None for c in o._chunks) for o in operators))

    monkeypatch.setattr(BatchOperator, "__init__", counting)
    hessian(model, batches, CE, top_k=2, layers=True, subsets=3)
    assert len(operators) == 6
    assert max(most) == 1


def test_rounding_is_named_where_it_is_what_limits_the_tolerance():
    model, batches = classifier()
    single = [(x.float(), t) for x, t in batches]
    found = hessian(model.float(), single, CE, top_k=2, tol=1e-7)
    assert not found.converged
    assert "rounding in float32" in found.reason
    assert "float64" in found.reason


def test_the_ends_of_the_krylov_space_are_bounds_from_inside_and_claim_no_error():
    model, batches = classifier()
    exact = np.linalg.eigvalsh(dense(model, batches, CE).numpy())
    found = hessian(model, batches, CE, top_k=1)
    assert exact[0] - 1e-12 <= found["smallest"] <= found["largest"] <= exact[-1] + 1e-12
    assert declaration_of(hessian).returns["smallest"].error == ""


def test_train_mode_on_a_network_without_batchnorm_is_eval_mode_and_says_so():
    model, batches = classifier(nn.ReLU)
    plain = hessian(model, batches, CE, top_k=2, trace=True)
    found = hessian(model, batches, CE, top_k=2, trace=True, mode="train")
    np.testing.assert_allclose(found["eigenvalue"], plain["eigenvalue"], rtol=1e-9)
    assert found["trace_stderr"] == 0
    assert any("no BatchNorm" in note for note in found.notes)


def test_the_note_on_an_exact_trace_names_only_what_is_equal():
    model, batches = classifier(nn.Tanh)
    notes = hessian(model, batches, CE, top_k=1, trace=True, curvature="ggn").notes
    assert any("tr GGN = tr F" in note and "tr H" not in note for note in notes)


def test_a_density_of_a_single_parameter_and_of_a_zero_matrix_raise_nothing():
    one = torch.ones(3, 1, dtype=torch.float64)
    scalar = nn.Linear(1, 1, bias=False).double().eval()
    found = hessian(scalar, [(one, 2 * one)], MSE, top_k=1, density=True)
    assert found["eigenvalue"][0] == pytest.approx(2.0)
    flat = hessian(scalar, [(one, one)], lambda o, t: 0.0 * (o * t).mean(), top_k=1, density=True)
    assert flat["eigenvalue"][0] == 0
    assert any("matrix is zero" in note for note in flat.notes)


def test_every_run_is_drawn_whatever_their_number():
    model, batches = classifier()
    declaration = declaration_of(hessian)
    arrays = labelled(declaration, hessian(model, batches, CE, top_k=2, density=True, density_steps=4))
    pieces = [
        Piece(f"{run}{step}", {"run": f"run {run}", "step": step, "path": f"{run}/{step}"}, arrays)
        for run in range(9)
        for step in (0, 10)
    ]
    figure = Figure(layout="constrained")
    draw_hessian(stack("hessian", "checkpoint", pieces, {"options": {"curvature": "ggn"}}), figure)
    named = [text for line in figure.axes[0].lines if (text := line.get_label()).startswith("run")]
    assert len(named) == 9
    assert "Gauss" in figure.axes[0].get_ylabel()
    assert len(figure.axes[1].lines) == 18
    assert sum(t.get_text().startswith("stability") for t in figure.axes[0].get_legend().get_texts()) <= 1
