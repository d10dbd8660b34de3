"""`landscape` against closed forms, an independent evaluation at every point, and others' defects."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.loop import Job, MemoryStore, checkpoint_units, measure
from dynprobe.analyzers.core.result import stack
from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.analyzers.landscape import landscape
from dynprobe.analyzers.numerics.directions import random_directions
from dynprobe.analyzers.numerics.losses import get_loss

CROSS_ENTROPY = get_loss("cross_entropy")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(3 * 16, 4),
    )


def trained(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    for _ in range(3):
        model(torch.randn(16, 1, 4, 4))
    return model.eval()


def samples(count: int = 21, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 4, 4, generator=generator), torch.randint(4, (count,), generator=generator)


def split(inputs: Tensor, targets: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


BATCHES = split(*samples(), [8, 8, 5])


class FakeRun:
    """What an analyzer sees of a run: states by position, step or word."""

    def __init__(self, models: list[nn.Module], steps: list[int] | None = None) -> None:
        self._states = [copy.deepcopy(m.state_dict()) for m in models]
        self.steps = steps or list(range(len(models)))
        self.calls = 0

    def __len__(self) -> int:
        return len(self._states)

    def state(self, which):
        self.calls += 1
        words = {"first": 0, "last": -1} | {str(s): i for i, s in enumerate(self.steps)}
        return self._states[words[which] if isinstance(which, str) else which]

    def cached(self, key, make):
        return make()


class Parts:
    """A store of parts that can be told to fail, as a kill does."""

    def __init__(self, limit: int | None = None) -> None:
        self.parts: dict[str, dict] = {}
        self.limit = limit

    def get(self, name: str):
        return self.parts.get(name)

    def put(self, name: str, arrays) -> None:
        if self.limit is not None and len(self.parts) >= self.limit:
            raise KeyboardInterrupt
        self.parts[name] = {key: np.array(value) for key, value in arrays.items()}


def independent(model: nn.Module, directions, x: float, y: float, loss=functional.cross_entropy) -> float:
    """The mean loss at a point, in float64 and in one batch, from a fresh copy."""
    moved = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            for coordinate, direction in zip((x, y), directions, strict=False):
                parameter += coordinate * direction[name].double()
        inputs, targets = (torch.cat(part) for part in zip(*BATCHES, strict=True))
        return float(loss(moved(inputs.double()), targets))


# Values


def test_every_grid_point_equals_an_independent_evaluation_to_float32_rounding() -> None:
    model = trained()
    found = landscape(model, BATCHES, CROSS_ENTROPY, resolution="7x5", seed=3)
    directions = random_directions(model, 2, seed=3)
    expected = [[independent(model, directions, x, y) for x in found["x"]] for y in found["y"]]
    np.testing.assert_allclose(found["loss"], expected, rtol=2e-6)


def test_a_non_square_grid_is_stored_y_by_x() -> None:
    """Another tool fills (nx, ny) in (ny, nx) order: right on square grids, scrambled on others."""
    found = landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="9x5")
    assert (len(found["x"]), len(found["y"])) == (9, 5)
    assert found["loss"].shape == (5, 9)
    line = landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="9", dims=1)
    np.testing.assert_allclose(found["loss"][2], line["loss"], rtol=1e-6)


def quadratic() -> tuple[nn.Module, list, np.ndarray]:
    """Linear regression: L(W) is an exact quadratic, with Hessian 2/(N·outputs)·XᵀX for each output."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    inputs, targets = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    hessian = np.kron(np.eye(2), (2 * inputs.T @ inputs / 18).numpy())
    return model, split(inputs, targets, [4, 4, 1]), hessian


def test_landscape_of_a_quadratic_model_equals_its_closed_form() -> None:
    model, batches, hessian = quadratic()
    found = landscape(model, batches, get_loss("mse"), resolution="11x7", span=2.0)
    weight = model.weight.detach().numpy()
    d, e = (direction["weight"].numpy().ravel() for direction in random_directions(model, 2, seed=0))
    inputs, targets = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    residual = inputs @ weight.T - targets
    gradient = (2 * residual.T @ inputs / 18).ravel()
    for i, y in enumerate(found["y"]):
        for j, x in enumerate(found["x"]):
            step = x * d + y * e
            exact = (residual**2).mean() + gradient @ step + step @ hessian @ step / 2
            assert found["loss"][i, j] == pytest.approx(exact, rel=1e-12)


def test_the_checkpoint_is_exactly_on_the_grid() -> None:
    """Even step counts put other tools' centre beside the checkpoint, labelled as if it were there."""
    model = trained()
    found = landscape(model, BATCHES, CROSS_ENTROPY, resolution="9x5", span=0.7)
    assert found["x"][4] == found["y"][2] == 0.0
    assert (found["x"][0], found["x"][-1]) == (-0.7, 0.7)
    assert found["loss"][2, 4] == found["center_loss"]
    inputs, targets = (torch.cat(part) for part in zip(*BATCHES, strict=True))
    with torch.no_grad():
        own = functional.cross_entropy(model(inputs), targets, reduction="none").double()
    assert found["center_loss"] == pytest.approx(float(own.mean()), rel=1e-7)
    assert found["center_loss_stderr"] == pytest.approx(float(own.std()) / np.sqrt(21), rel=1e-6)
    assert found["loss_difference_stderr"][2, 4] == 0.0


@pytest.mark.parametrize("resolution", ["50", "51x4"])
def test_an_even_resolution_is_refused_with_the_neighbours_named(resolution: str) -> None:
    with pytest.raises(ValueError, match=r"use (49 or 51|3 or 5)"):
        landscape(trained(), BATCHES, CROSS_ENTROPY, resolution=resolution)


def test_standard_errors_are_over_samples_and_paired_against_the_centre() -> None:
    model = trained()
    found = landscape(model, BATCHES, CROSS_ENTROPY, resolution="3", dims=1)
    direction = random_directions(model, 1, seed=0)[0]
    moved = copy.deepcopy(model)
    inputs, targets = (torch.cat(part) for part in zip(*BATCHES, strict=True))
    with torch.no_grad():
        own = functional.cross_entropy(model(inputs), targets, reduction="none").double()
        for name, parameter in moved.named_parameters():
            parameter += direction[name]
        there = functional.cross_entropy(moved(inputs), targets, reduction="none").double()
    n = len(targets)
    assert found["loss_stderr"][2] == pytest.approx(float(there.std()) / n**0.5, rel=1e-5)
    assert found["loss_difference_stderr"][2] == pytest.approx(float((there - own).std()) / n**0.5, rel=1e-5)


# Directions


def test_direction_norm_is_that_of_the_weights_with_more_than_one_dimension() -> None:
    model = trained()
    found = landscape(model, BATCHES, CROSS_ENTROPY, resolution="3")
    weights = [p for p in model.parameters() if p.dim() > 1]
    expected = float(torch.cat([w.detach().flatten() for w in weights]).norm())
    np.testing.assert_allclose(found["direction_norm"], expected, rtol=1e-6)
    assert found["direction_seed"] == 0


def rescaled(model: nn.Sequential, factor: float) -> nn.Sequential:
    """The same function by ReLU's homogeneity: one layer times a factor, the next divided by it."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight *= factor
        other[0].bias *= factor
        other[2].weight /= factor
    return other


def test_relu_rescaling_leaves_the_normalised_surface_unchanged_and_changes_the_raw_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    inputs, targets = torch.randn(17, 5, dtype=torch.float64), torch.randint(4, (17,))
    batches = [(inputs, targets)]
    one, other = (landscape(m, batches, CROSS_ENTROPY, resolution="5") for m in (model, rescaled(model, 7.0)))
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-8)
    raw = [
        landscape(m, batches, CROSS_ENTROPY, resolution="5", normalize="none")
        for m in (model, rescaled(model, 7.0))
    ]
    assert np.abs(raw[0]["loss"] / raw[1]["loss"] - 1).max() > 0.1


def test_one_draw_per_run_gives_every_checkpoint_the_same_numbers_and_its_own_filters() -> None:
    shared = [landscape(trained(s), BATCHES, CROSS_ENTROPY, step=s, resolution="3", dims=1) for s in (0, 1)]
    fresh = [
        landscape(trained(s), BATCHES, CROSS_ENTROPY, step=s, resolution="3", dims=1, draw="checkpoint")
        for s in (0, 1)
    ]
    assert [f["direction_seed"] for f in shared] == [0, 0]
    assert fresh[0]["direction_seed"] != fresh[1]["direction_seed"]
    assert not np.allclose(fresh[0]["loss"], shared[0]["loss"])
    again = landscape(trained(1), BATCHES, CROSS_ENTROPY, step=1, resolution="3", dims=1, draw="checkpoint")
    assert np.array_equal(again["loss"], fresh[1]["loss"])


def test_several_seeds_give_the_mean_the_spread_and_each_plane() -> None:
    model = trained()
    found = landscape(model, BATCHES, CROSS_ENTROPY, resolution="5x3", seeds=3, seed=5)
    each = [landscape(model, BATCHES, CROSS_ENTROPY, resolution="5x3", seed=s)["loss"] for s in (5, 6, 7)]
    assert found["seed_loss"].shape == (3, 3, 5)
    np.testing.assert_array_equal(found["seed_loss"], each)
    np.testing.assert_allclose(found["loss"], np.mean(each, axis=0))
    np.testing.assert_allclose(found["loss_spread"], np.std(each, axis=0, ddof=1))
    assert found["direction_seed"].tolist() == [5, 6, 7]
    assert found["direction_norm"].shape == (3, 2)
    single = landscape(model, BATCHES, CROSS_ENTROPY, resolution="5x3")
    assert "loss_spread" not in single
    assert "seed_loss" not in single


def test_biases_and_normalisation_parameters_stay_unless_asked() -> None:
    model = trained()
    still = landscape(model, BATCHES, CROSS_ENTROPY, resolution="3", dims=1)
    moving = landscape(model, BATCHES, CROSS_ENTROPY, resolution="3", dims=1, ignore_1d=False)
    assert moving["direction_norm"][0] > still["direction_norm"][0]


def test_eigen_directions_have_the_curvature_of_their_eigenvalues() -> None:
    model, batches, hessian = quadratic()
    found = landscape(model, batches, get_loss("mse"), directions="eigen", resolution="3", span=0.1)
    exact = np.linalg.eigvalsh(hessian)[::-1]
    np.testing.assert_allclose(found["direction_eigenvalue"], exact[:2], rtol=1e-6)
    np.testing.assert_allclose(found["direction_norm"], 1.0)
    along_x = (found["loss"][1, 2] - 2 * found["loss"][1, 1] + found["loss"][1, 0]) / 0.01
    assert along_x == pytest.approx(exact[0], rel=1e-6)
    assert (found["direction_residual"] < 1e-3 * exact[0]).all()
    assert found.spent["hvps"] > 2


def test_pca_directions_are_those_of_the_run_and_say_how_far_it_reaches() -> None:
    models = [trained(seed) for seed in range(4)]
    found = landscape(
        models[1], BATCHES, CROSS_ENTROPY, run=FakeRun(models), directions="pca", resolution="3"
    )
    flat = np.stack(
        [torch.cat([p.detach().flatten() for p in m.parameters()]).double().numpy() for m in models]
    )
    singular = np.linalg.svd(flat[:-1] - flat[-1], compute_uv=False)
    np.testing.assert_allclose(
        found["explained_variance"], (singular**2 / (singular**2).sum())[:2], rtol=1e-6
    )
    assert len(found["random_walk"]) == 2
    assert any("reaches from" in note for note in found.notes)


def test_a_broken_checkpoint_is_left_out_of_the_principal_axes_by_name() -> None:
    models = [trained(seed) for seed in range(4)]
    with torch.no_grad():
        models[1][0].weight[0] = float("nan")
    run = FakeRun(models, [0, 10, 20, 30])
    found = landscape(models[0], BATCHES, CROSS_ENTROPY, run=run, directions="pca", resolution="3")
    assert any("step 10" in note for note in found.notes)
    assert np.isfinite(found["loss"]).all()


# Path between two checkpoints


def test_path_to_a_checkpoint_hits_both_ends_exactly_with_buffers_interpolated() -> None:
    here, there = trained(0).double(), trained(1).double()
    batches = [(inputs.double(), targets) for inputs, targets in BATCHES]
    run = FakeRun([here, there])
    found = landscape(here, batches, CROSS_ENTROPY, run=run, directions="to:last", resolution="9")
    x = found["x"]
    assert (x[0], x[-1]) == (-0.5, 1.5)

    def own(model: nn.Module) -> float:
        inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
        with torch.no_grad():
            return float(functional.cross_entropy(model(inputs), targets))

    assert found["loss"][x == 0][0] == pytest.approx(own(here), rel=1e-14)
    assert found["loss"][x == 1][0] == pytest.approx(own(there), rel=1e-14)
    middle, other = copy.deepcopy(here), there.state_dict()
    state = {k: (v + other[k]) / 2 for k, v in here.state_dict().items() if v.is_floating_point()}
    middle.load_state_dict(state, strict=False)
    assert found["loss"][x == 0.5][0] == pytest.approx(own(middle), rel=1e-14)
    assert "y" not in found
    assert not any("direction_seed" in name for name in found)


@pytest.mark.parametrize("swap", [False, True])
def test_barrier_is_the_peak_above_the_higher_end_with_its_paired_error(swap: bool) -> None:
    models = [trained(0), trained(3)]
    here, there = models[::-1] if swap else models
    found = landscape(
        here, BATCHES, CROSS_ENTROPY, run=FakeRun([here, there]), directions="to:1", resolution="17"
    )
    x, loss = found["x"], found["loss"]
    inside = (x >= 0) & (x <= 1)
    ends = loss[x == 0][0], loss[x == 1][0]
    assert found["barrier"] == pytest.approx(loss[inside].max() - max(ends))
    assert loss[x == found["barrier_at"]][0] == loss[inside].max()

    def per_sample(a: float) -> Tensor:
        model = copy.deepcopy(here)
        other = there.state_dict()
        state = {k: v + a * (other[k] - v) for k, v in here.state_dict().items() if v.is_floating_point()}
        model.load_state_dict(state, strict=False)
        inputs, targets = (torch.cat(part) for part in zip(*BATCHES, strict=True))
        with torch.no_grad():
            return functional.cross_entropy(model(inputs), targets, reduction="none").double()

    higher = per_sample(0.0 if ends[0] >= ends[1] else 1.0)
    difference = per_sample(float(found["barrier_at"])) - higher
    assert found["barrier_stderr"] == pytest.approx(float(difference.std()) / 21**0.5, rel=1e-4, abs=1e-7)


def test_a_path_to_the_same_weights_is_a_point_without_a_barrier() -> None:
    model = trained()
    found = landscape(
        model, BATCHES, CROSS_ENTROPY, run=FakeRun([model]), directions="to:last", resolution="5"
    )
    assert found["barrier"] == found["barrier_stderr"] == 0.0
    assert np.ptp(found["loss"]) == 0.0
    assert any("same weights" in note for note in found.notes)


def test_a_path_is_never_normalised_because_it_would_miss_its_end() -> None:
    model = trained()
    with pytest.raises(OptionError, match="misses the other end"):
        landscape(
            model, BATCHES, CROSS_ENTROPY, run=FakeRun([model]), directions="to:last", normalize="filter"
        )


def test_recomputed_batchnorm_differs_from_interpolated_statistics() -> None:
    here, there = trained(0), trained(1)
    run = FakeRun([here, there])
    frozen, fresh = (
        landscape(here, BATCHES, CROSS_ENTROPY, run=run, directions="to:last", resolution="5", batchnorm=kind)
        for kind in ("frozen", "recompute")
    )
    assert not np.allclose(frozen["loss"], fresh["loss"])
    assert any("re-estimated" in note for note in fresh.notes)


# What is not finite, zero, or interpolated


def test_nan_and_infinity_are_stored_as_they_are() -> None:
    """Another tool replaces NaN by the mean and adds noise to the maxima."""
    model, batches, _ = quadratic()
    far = landscape(model.float(), [(x.float() * 1e18, y.float()) for x, y in batches], get_loss("mse"),
                    resolution="3", span=1e5)  # fmt: skip
    assert np.isinf(far["loss"]).any()
    assert any("NaN or infinite" in note for note in far.notes)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert np.isnan(
        landscape(model, [(x.float(), y) for x, y in batches], get_loss("mse"), resolution="3")["loss"]
    ).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
def test_a_stored_row_is_never_redone_whatever_its_values(value: float) -> None:
    """Elsewhere "not yet computed" meant "at most 0": a true zero was always redone, NaN never."""
    calls = [0]

    def constant(outputs: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
        calls[0] += 1
        return outputs[:, 0] * 0 + value

    parts, options = Parts(), {"resolution": "5x3", "metrics": "loss"}
    first = landscape(trained(), BATCHES, constant, partial=parts, **options)
    spent = calls[0]
    again = landscape(trained(), BATCHES, constant, partial=parts, **options)
    assert calls[0] == spent
    np.testing.assert_array_equal(first["loss"], again["loss"])
    assert again.spent == first.spent


def test_a_killed_surface_loses_only_the_row_in_hand() -> None:
    whole = landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="5x7")
    parts = Parts(limit=4)
    with pytest.raises(KeyboardInterrupt):
        landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="5x7", partial=parts)
    assert len(parts.parts) == 4
    parts.limit = None
    seen: list[tuple[int, int]] = []
    resumed = landscape(
        trained(), BATCHES, CROSS_ENTROPY, resolution="5x7", partial=parts,
        progress=lambda done, total, what: seen.append((done, total)),
    )  # fmt: skip
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    assert seen[-1] == (35, 35)
    assert len(parts.parts) == 7


def test_a_killed_adaptive_convex_surface_resumes_to_the_same_numbers() -> None:
    options = {
        "resolution": "21x21",
        "adaptive": 0.05,
        "convexity": True,
        "convexity_resolution": 3,
        "seeds": 2,
    }
    whole = landscape(trained(), BATCHES, CROSS_ENTROPY, **options)
    parts = Parts()
    for limit in (5, 30, 50, None):
        parts.limit = limit
        try:
            resumed = landscape(trained(), BATCHES, CROSS_ENTROPY, partial=parts, **options)
        except KeyboardInterrupt:
            continue
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    assert resumed.spent["hvps"] == whole.spent["hvps"]


def test_adaptive_marks_what_it_evaluated_and_reports_the_held_out_residual() -> None:
    options = {"resolution": "41x41", "span": 0.5}
    exact = landscape(trained(), BATCHES, CROSS_ENTROPY, **options)
    found = landscape(trained(), BATCHES, CROSS_ENTROPY, adaptive=0.05, **options)
    mask = found["evaluated"].astype(bool)
    assert found["evaluated"].dtype == np.int8
    assert 0.05 < mask.mean() < 0.7
    np.testing.assert_array_equal(found["loss"][mask], exact["loss"][mask])
    assert np.abs(found["loss"] / exact["loss"] - 1).max() < 0.05
    assert np.isnan(found["loss_stderr"][~mask]).all()
    assert found["heldout_residual"] > 0
    assert found.converged == (found["heldout_residual"] <= 0.05)
    assert any("held-out" in note for note in found.notes)
    assert found.spent["forwards"] < exact.spent["forwards"]


# Metrics, test data, convexity


def test_accuracy_comes_by_itself_where_targets_are_classes_and_only_there() -> None:
    found = landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="3", dims=1)
    inputs, targets = (torch.cat(part) for part in zip(*BATCHES, strict=True))
    with torch.no_grad():
        expected = float((trained()(inputs).argmax(1) == targets).double().mean())
    assert found["accuracy"][1] == pytest.approx(expected)
    model, batches, _ = quadratic()
    assert "accuracy" not in landscape(model, batches, get_loss("mse"), resolution="3")
    assert "accuracy" not in landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="3", metrics="loss")
    with pytest.raises(OptionError, match="f1"):
        landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="3", metrics="loss,f1")


def test_test_data_stand_beside_the_training_data() -> None:
    other = split(*samples(13, seed=9), [13])
    found = landscape(trained(), BATCHES, CROSS_ENTROPY, other, resolution="3", test=True)
    alone = landscape(trained(), other, CROSS_ENTROPY, resolution="3")
    np.testing.assert_allclose(found["test_loss"], alone["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["test_loss_stderr"], alone["loss_stderr"], rtol=1e-5)
    assert "test_accuracy" in found
    assert "test_loss" not in landscape(trained(), BATCHES, CROSS_ENTROPY, other, resolution="3")
    with pytest.raises(OptionError, match="no test data"):
        landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="3", test=True)


def test_convexity_of_a_quadratic_is_the_same_known_ratio_everywhere() -> None:
    model, batches, hessian = quadratic()
    found = landscape(
        model, batches, get_loss("mse"), resolution="7x5", convexity=True, convexity_resolution=3
    )
    exact = np.linalg.eigvalsh(hessian)
    assert found["convexity"].shape == (3, 3)
    np.testing.assert_allclose(found["lambda_max"], exact[-1], rtol=1e-2)
    np.testing.assert_allclose(found["lambda_min"], exact[0], atol=1e-2 * exact[-1])
    assert (found["convexity_converged"] == 1).all()
    assert (found["lambda_max_residual"] < 0.1 * exact[-1]).all()
    d, e = (direction["weight"].numpy().ravel() for direction in random_directions(model, 2, seed=0))
    slice_hessian = np.array([[d @ hessian @ d, d @ hessian @ e], [d @ hessian @ e, e @ hessian @ e]])
    inside = found["slice_curvature_max"][1:-1, 1:-1]
    np.testing.assert_allclose(inside, np.linalg.eigvalsh(slice_hessian)[1], rtol=1e-6)
    assert found.spent["hvps"] > 0


def test_convexity_sees_the_negative_curvature_of_a_net_and_the_line_has_one_axis() -> None:
    found = landscape(
        trained(), BATCHES, CROSS_ENTROPY, resolution="5", dims=1, convexity=True, convexity_resolution=3
    )
    assert found["convexity"].shape == (3,)
    assert (found["lambda_min"] < 0).all()
    np.testing.assert_allclose(found["convexity"], np.abs(found["lambda_min"] / found["lambda_max"]))


# Around it


def test_the_model_comes_back_untouched_and_in_its_own_mode() -> None:
    model = trained().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    landscape(model, BATCHES, CROSS_ENTROPY, resolution="3", convexity=True, convexity_resolution=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_the_same_samples_in_other_batches_give_the_same_surface() -> None:
    model, data = (
        trained().double(),
        [part.double() if part.is_floating_point() else part for part in samples()],
    )
    one, many = (
        landscape(model, split(*data, sizes), CROSS_ENTROPY, resolution="3") for sizes in ([21], [10, 10, 1])
    )
    for name in one:
        np.testing.assert_allclose(one[name], many[name], rtol=1e-10, err_msg=name)


def test_a_plain_loss_function_will_do() -> None:
    one = landscape(trained(), BATCHES, functional.cross_entropy, resolution="3")
    other = landscape(trained(), BATCHES, CROSS_ENTROPY, resolution="3")
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "sideways"}, "random, pca, eigen or to:CHECKPOINT"),
        ({"directions": "pca"}, "whole run"),
        ({"directions": "to:last"}, "need a run"),
        ({"resolution": "big"}, "51x31"),
        ({"resolution": "5x5x5"}, "51x31"),
        ({"resolution": "5x3", "dims": 1}, "Try 5"),
        ({"span": -1.0}, "must be positive"),
        ({"convexity": True, "convexity_resolution": 4}, "use 3 or 5"),
        ({"convexity_resolution": 5}, "Add --convexity"),
        ({"metrics": "foo"}, "loss,accuracy"),
        ({"directions": "to:"}, "to:CHECKPOINT"),
        ({"resolution": "\u00b3"}, "51x31"),
        ({"adaptive": float("inf")}, "no relative error"),
        ({"seed": -1}, "whole number from 0"),
    ],
)
def test_options_that_cannot_be_followed_say_what_to_do(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        landscape(trained(), BATCHES, CROSS_ENTROPY, **options)
    assert message in f"{caught.value} {getattr(caught.value, 'tip', '')}"


def test_random_directions_never_touch_the_run() -> None:
    run = FakeRun([trained()])
    landscape(trained(), BATCHES, CROSS_ENTROPY, run=run, resolution="3")
    assert run.calls == 0


def test_a_path_to_broken_weights_is_refused_by_name() -> None:
    broken = trained()
    broken[5].bias.data[0] = torch.nan
    with pytest.raises(OptionError, match="NaN or infinity"):
        landscape(trained(), BATCHES, CROSS_ENTROPY, run=FakeRun([broken]), directions="to:last")


def make_run(models: list[nn.Module]) -> Run:
    checkpoints = [
        SimpleNamespace(path=Path(f"r/step_{i}.pt"), run="r", step=i, load=lambda m=m, i=i: SimpleNamespace(
            state=copy.deepcopy(m.state_dict()), hash=str(i), notes=[]))
        for i, m in enumerate(models)
    ]  # fmt: skip
    return Run("r", checkpoints, Setup(
        make_model=network, fit=lambda model, state, where: (state, []), make_batches=lambda: BATCHES,
        make_test_batches=lambda: None, make_loss=lambda: CROSS_ENTROPY, open_other=lambda path: None,
        device=torch.device("cpu"), dtype=torch.float32,
    ))  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"dims": 1}, {"directions": "to:last"}, {"directions": "pca"}, {"directions": "eigen"}, {"seeds": 2},
    {"seeds": 2, "dims": 1, "draw": "checkpoint"}, {"adaptive": 0.1},
    {"convexity": True, "convexity_resolution": 3},
])  # fmt: skip
def test_through_the_framework_every_variant_fits_its_declaration_and_stacks(options: dict) -> None:
    declaration = declaration_of(landscape)
    defaults = {o.name: o.default for o in declaration.options} | {"resolution": "5"} | options
    run = make_run([trained(s) for s in range(3)])
    pieces = [
        p
        for p, _ in measure(Job(declaration, defaults), checkpoint_units(run, run.checkpoints), MemoryStore())
    ]
    assert [p.status for p in pieces] == ["ok"] * 3, [p.reason for p in pieces]
    result = stack("landscape", "checkpoint", pieces, {})
    line = defaults["dims"] == 1 or defaults["directions"].startswith("to:")
    assert result.arrays["loss"].dims == (("checkpoint", "x") if line else ("checkpoint", "y", "x"))
    assert result.arrays["loss"].error == "loss_stderr"
    assert ("y" in result) == (not line)
    assert np.isfinite(result["loss"]).all()
    plain = landscape(trained(1), BATCHES, CROSS_ENTROPY, run=run, step=1, **{**options, "resolution": "5"})
    labelled(declaration, plain)
    np.testing.assert_array_equal(result["loss"][1], plain["loss"])


def test_declared_cost_counts_points_seeds_and_test_data() -> None:
    declaration = declaration_of(landscape)
    assert declaration.cost is not None
    defaults = {o.name: o.default for o in declaration.options}
    assert declaration.cost(defaults, 4)["forwards"] == 51 * 51
    many = declaration.cost(defaults | {"resolution": "5x3", "seeds": 2, "test": True, "convexity": True}, 1)
    assert many["forwards"] == 60
    assert many["hvps"] > 121
    assert declaration.cost(defaults | {"directions": "to:last"}, 1)["forwards"] == 51


def test_an_eigenvector_can_be_normalised_like_a_random_direction() -> None:
    model = trained()
    raw = landscape(model, BATCHES, CROSS_ENTROPY, directions="eigen", resolution="3", dims=1)
    scaled = landscape(
        model, BATCHES, CROSS_ENTROPY, directions="eigen", resolution="3", dims=1, normalize="layer"
    )
    assert raw["direction_norm"][0] == pytest.approx(1.0, rel=1e-5)
    weights = sum(float(p.detach().square().sum()) for p in model.parameters() if p.dim() > 1)
    assert scaled["direction_norm"][0] == pytest.approx(weights**0.5, rel=0.1)


def test_it_leaves_gradients_enabled_and_the_loss_of_a_caller_trainable() -> None:
    model = trained()
    landscape(model, BATCHES, CROSS_ENTROPY, resolution="3")
    assert torch.is_grad_enabled()
    CROSS_ENTROPY(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    assert all(p.grad is not None for p in model.parameters())
