"""The surface against closed forms, brute force in float64, and the ways in which other tools fail."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.directions import random_directions
from dynprobe.analyzers.numerics.losses import Loss, get_loss
from dynprobe.analyzers.numerics.params import same_bits
from dynprobe.analyzers.numerics.surface import Surface

CROSS_ENTROPY = get_loss("cross_entropy")
AXIS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(32, 5),
    )  # fmt: skip
    for _ in range(3):
        model(torch.rand(16, 1, 8, 8) + 0.5)  # running statistics away from 0 and 1
    return model.eval()


def perceptron(seed: int = 0, inputs: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)
    )


def data(n: int = 40, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator).to(dtype), torch.randint(5, (n,), generator=generator)


def split(batch: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(list(sizes)), batch[1].split(list(sizes)), strict=True))


def brute_force(
    model: nn.Module, directions: list[dict[str, Tensor]], x: float, y: float, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Per-sample loss and correctness at one point: float64, unfolded, tensor by tensor."""
    moved = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, tensor in moved.named_parameters():
            for coordinate, direction in zip((x, y), directions, strict=False):
                tensor += coordinate * direction[name].double()
        outputs = moved(batch[0].double())
    values = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
    return values, (outputs.argmax(1) == batch[1]).double()


class Quadratic(nn.Module):
    """L(θ) = ½ θᵀHθ + gᵀθ + c, for each sample its own c; θ in two tensors with more than one dimension."""

    def __init__(self, n: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        self.register_buffer("hessian", root @ root.T - 2 * torch.eye(n, dtype=torch.float64))
        self.a = nn.Parameter(torch.randn(2, 3, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        theta = torch.cat([self.a.flatten(), self.b.flatten()])
        return x + 0.5 * theta @ self.hessian @ theta


AS_IT_IS = Loss("value", lambda outputs, _targets: outputs[:, 0], lambda outputs, _targets: outputs[:, 0])


def test_the_surface_of_a_quadratic_is_its_closed_form() -> None:
    model = Quadratic()
    offsets = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    directions = random_directions(model, 2, seed=0)
    theta, d, e = (
        torch.cat([t["a"].detach().flatten(), t["b"].detach().flatten()])
        for t in (dict(model.named_parameters()), *directions)
    )
    H = model.hessian
    surface = Surface(model, [(offsets, torch.zeros(7))], AS_IT_IS, directions)
    for y in (-0.7, 0.0, 2.0):
        row = surface.row(y, AXIS)
        for x, value in zip(AXIS, row["loss"], strict=True):
            slope = x * theta @ H @ d + y * theta @ H @ e
            curvature = 0.5 * (x * x * d @ H @ d + 2 * x * y * d @ H @ e + y * y * e @ H @ e)
            assert value == pytest.approx(float(0.5 * theta @ H @ theta + slope + curvature), rel=1e-12)
        # All samples share the shape, so the paired difference from the centre has no error at all.
        assert row["loss_stderr"] == pytest.approx(float(offsets.std()) / math.sqrt(7))
        assert np.abs(row["loss_difference_stderr"]).max() < 1e-13


@pytest.mark.parametrize("model", [network(), perceptron()])
def test_values_equal_float64_brute_force_at_every_point_and_for_ragged_batches(model: nn.Module) -> None:
    batch, test = data(), data(23, seed=2)
    directions = random_directions(model, 2, seed=3)
    surface = Surface(
        model, split(batch, 17, 22, 1), CROSS_ENTROPY, directions,
        metrics=("loss", "accuracy"), test_batches=split(test, 20, 3),
    )  # fmt: skip
    centre = brute_force(model, directions, 0, 0, batch)[0]
    for y in AXIS:
        row = surface.row(y, AXIS)
        for i, x in enumerate(AXIS):
            loss, right = brute_force(model, directions, x, y, batch)
            n = len(loss)
            assert row["loss"][i] == pytest.approx(float(loss.mean()), rel=3e-6)
            assert row["loss_stderr"][i] == pytest.approx(float(loss.std()) / math.sqrt(n), rel=1e-5)
            paired = float((loss - centre).std()) / math.sqrt(n)
            assert row["loss_difference_stderr"][i] == pytest.approx(paired, rel=1e-4, abs=1e-7)
            assert row["accuracy"][i] == pytest.approx(float(right.mean()), abs=1e-12)
            assert row["accuracy_stderr"][i] == pytest.approx(float(right.std()) / math.sqrt(n), abs=1e-12)
            loss, right = brute_force(model, directions, x, y, test)
            assert row["test_loss"][i] == pytest.approx(float(loss.mean()), rel=3e-6)
            assert row["test_accuracy"][i] == pytest.approx(float(right.mean()), abs=1e-12)
    assert surface.forwards == 2 * 26  # 25 points and the centre, two data sets


def test_the_centre_is_the_checkpoints_own_value_and_lies_on_the_grid() -> None:
    """The defect of loss-landscapes and landscaper: θ* is not on the grid they label."""
    model = perceptron()
    directions = random_directions(model, 2, seed=0)
    surface = Surface(model, [data()], CROSS_ENTROPY, directions, metrics=("loss", "accuracy"))
    first = surface.row(0.0, [0.0])
    surface.row(1e3, AXIS)
    again = surface.row(0.0, AXIS)
    assert again["loss"][2] == first["loss"][0]
    assert again["loss_difference_stderr"][2] == 0.0
    unmoved = Surface(model, [data()], CROSS_ENTROPY, [{}]).row(0.0, [0.0])
    assert first["loss"][0] == pytest.approx(unmoved["loss"][0], rel=1e-6)


def test_rows_and_columns_are_where_their_coordinates_say_for_any_shape_and_order() -> None:
    """The defects of TG (non-square grids scrambled) and loss-landscapes (every other row one step off)."""
    model = perceptron()
    directions = random_directions(model, 2, seed=0)
    surface = Surface(model, [data()], CROSS_ENTROPY, directions)
    ys, xs = [0.3, -0.6, 0.9], [-1.0, 1.0, 0.2, 0.4, -0.3]
    grid = np.stack([surface.row(y, xs)["loss"] for y in ys])
    assert grid.shape == (3, 5)
    expected = [[float(brute_force(model, directions, x, y, data())[0].mean()) for x in xs] for y in ys]
    np.testing.assert_allclose(grid, expected, rtol=1e-5)
    swapped = Surface(model, [data()], CROSS_ENTROPY, directions[::-1])
    np.testing.assert_allclose(np.stack([swapped.row(x, ys)["loss"] for x in xs]).T, grid, rtol=1e-5)


def test_the_surface_is_not_a_constant_and_both_directions_count() -> None:
    """The defect of pylandscape: the same number at every point."""
    model = perceptron()
    surface = Surface(model, [data()], CROSS_ENTROPY, random_directions(model, 2, seed=0))
    values = {float(v) for y in AXIS for v in surface.row(y, AXIS)["loss"]}
    assert len(values) == 25


def rescaled(model: nn.Module, factor: float) -> nn.Module:
    """ReLU(cu) = c·ReLU(u): the same function with the first layer times c and the second over c."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight.mul_(factor)
        other[1].bias.mul_(factor)
        other[3].weight.div_(factor)
    return other


def test_relu_rescaling_leaves_the_filter_normalised_surface_alone_and_changes_the_raw_one() -> None:
    model = perceptron()
    other = rescaled(model, 8.0)  # a power of two: no rounding
    surfaces = {}
    for normalize in ("filter", "none"):
        for name, net in (("model", model), ("rescaled", other)):
            directions = random_directions(net, 2, seed=5, normalize=normalize)  # type: ignore[arg-type]
            surface = Surface(net, [data()], CROSS_ENTROPY, directions)
            surfaces[normalize, name] = np.stack([surface.row(y, AXIS)["loss"] for y in AXIS])
    np.testing.assert_allclose(surfaces["filter", "model"], surfaces["filter", "rescaled"], rtol=1e-5)
    assert np.abs(surfaces["none", "model"] / surfaces["none", "rescaled"] - 1).max() > 0.1


def test_the_users_model_data_and_generator_are_untouched_in_train_mode_too() -> None:
    """The defect of losscape: a model left in train() has its BatchNorm buffers changed."""
    model = network().train()
    batch = data()
    before = copy.deepcopy(model.state_dict())
    inputs = batch[0].clone()
    random = torch.get_rng_state()
    for batchnorm in ("frozen", "recompute"):
        surface = Surface(
            model,
            [batch],
            CROSS_ENTROPY,
            random_directions(model, 2, seed=0),
            batchnorm=batchnorm,  # type: ignore[arg-type]
        )
        surface.row(0.5, AXIS)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(batch[0], inputs)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_batchnorm_net_gives_finite_values_and_keeps_its_running_statistics() -> None:
    """The defects of loss-landscape-anim (raises) and loss-landscape-3d (24 of 25 points NaN)."""
    model = network()
    surface = Surface(model, [data()], CROSS_ENTROPY, random_directions(model, 2, seed=0))
    assert all(np.isfinite(surface.row(y, AXIS)["loss"]).all() for y in AXIS)


def test_nan_and_infinity_are_stored_as_they_are() -> None:
    """The defect of landscaper: NaN replaced by the mean, noise added to the maxima."""
    model = perceptron()
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    row = Surface(model, [data()], CROSS_ENTROPY, random_directions(perceptron(), 2, seed=0)).row(0.0, AXIS)
    assert np.isnan(row["loss"]).all()
    layer, huge = nn.Linear(4, 5), [{"weight": torch.full((5, 4), 3e38)}]
    row = Surface(layer, [(torch.full((3, 4), 2.0), torch.zeros(3))], AS_IT_IS, huge).row(0.0, [0.0, 1.0])
    assert math.isfinite(row["loss"][0])
    assert row["loss"][1] == math.inf


def test_the_same_point_gives_the_same_bits_whenever_it_is_asked_for() -> None:
    model = network()
    surface = Surface(model, split(data(), 30, 10), CROSS_ENTROPY, random_directions(model, 2, seed=0))
    first = surface.row(0.5, AXIS)
    surface.row(-1.0, AXIS)
    assert all(np.array_equal(first[name], values) for name, values in surface.row(0.5, AXIS).items())
    assert surface.row(0.5, [AXIS[3]])["loss"][0] == first["loss"][3]


def test_memory_does_not_grow_with_the_number_of_points() -> None:
    """The defect of loss-landscape-anim: every grid point's parameters at once, 10.9 GB for a ResNet-20."""
    model = nn.Sequential(nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 5))
    x, t = data(4)
    allocated: list[int] = []

    def measure(outputs: Tensor, _targets: Tensor) -> Tensor:
        allocated.append(sum(tensor.numel() for tensor in _tensors_alive()))
        return outputs[:, 0]

    surface = Surface(
        model,
        [(x.flatten(1), t)],
        CROSS_ENTROPY,
        random_directions(model, 2, seed=0),
        metrics={"size": measure},
    )
    surface.row(0.0, np.linspace(-1, 1, 12).tolist())
    assert max(allocated) - allocated[0] < 2 * sum(p.numel() for p in model.parameters())


def _tensors_alive() -> list[Tensor]:
    import gc

    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(torch.cat([left, right], 1))}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_models_with_several_inputs_are_evaluated_from_tuples_and_dicts(kind: str) -> None:
    model = TwoInputs()
    left, right, t = torch.randn(9, 2), torch.randn(9, 4), torch.arange(9) % 5
    inputs: Any = (left, right) if kind == "tuple" else {"right": right, "left": left}
    (direction,) = random_directions(model, 1, seed=0)
    row = Surface(model, [(inputs, t)], CROSS_ENTROPY, [direction]).row(0.0, [0.5])
    moved = model.fc.weight + 0.5 * direction["fc.weight"]
    expected = nn.functional.cross_entropy(torch.cat([left, right], 1) @ moved.T + model.fc.bias, t)
    assert row["loss"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_line_has_only_the_row_zero_and_buffers_move_along_it() -> None:
    """Interpolation between two networks needs the buffers: direction = other state − this state."""
    a, b = network(0), network(1)
    direction = {
        name: b.state_dict()[name] - tensor
        for name, tensor in a.state_dict().items()
        if tensor.is_floating_point()
    }
    surface = Surface(a, [data()], CROSS_ENTROPY, [direction])
    row = surface.row(0.0, [0.0, 1.0])
    ends = [float(brute_force(net, [], 0, 0, data())[0].mean()) for net in (a, b)]
    assert row["loss"] == pytest.approx(ends, rel=1e-5)
    with pytest.raises(ValueError, match="only the row y = 0"):
        surface.row(0.1, [0.0])


def test_half_precision_points_are_rounded_once_from_float32() -> None:
    model = perceptron().bfloat16()
    directions = random_directions(model, 2, seed=0)
    x, t = data()
    row = Surface(model, [(x.bfloat16(), t)], CROSS_ENTROPY, directions).row(0.3, [0.7])
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in moved.named_parameters():
            tensor.copy_((tensor.float() + 0.3 * directions[1][name]) + 0.7 * directions[0][name])
        expected = nn.functional.cross_entropy(moved(x.bfloat16()).float(), t)
    assert row["loss"][0] == pytest.approx(expected.item(), rel=2e-2)


def test_dtype_float64_computes_in_float64() -> None:
    model = perceptron()
    directions = random_directions(model, 2, seed=0)
    row = Surface(model, [data()], CROSS_ENTROPY, directions, dtype=torch.float64).row(0.5, [0.5])
    expected = float(brute_force(model, directions, 0.5, 0.5, data())[0].mean())
    assert row["loss"][0] == pytest.approx(expected, rel=1e-12)


def test_large_batches_are_evaluated_in_pieces_with_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    directions = random_directions(model, 2, seed=0)
    whole = Surface(model, [data()], CROSS_ENTROPY, directions).row(0.5, AXIS)
    monkeypatch.setattr("dynprobe.analyzers.numerics.prepare.LARGEST_ACTIVATION", 6 * 64 * 4 * 7)
    pieces = Surface(model, [data()], CROSS_ENTROPY, directions)
    assert [len(piece.targets) for piece in pieces._network.data[""]] == [7] * 5 + [5]
    for name, values in pieces.row(0.5, AXIS).items():
        np.testing.assert_allclose(values, whole[name], rtol=2e-5, atol=1e-7)


def test_a_batchnorm_without_running_statistics_sees_the_batches_as_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
    monkeypatch.setattr("dynprobe.analyzers.numerics.prepare.LARGEST_ACTIVATION", 1)
    x, t = data()
    row = Surface(model, [(x, t)], CROSS_ENTROPY, random_directions(model, 2, seed=0)).row(0.0, [0.0])
    assert row["loss"][0] == pytest.approx(nn.functional.cross_entropy(model(x), t).item(), rel=1e-5)


class Centres(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.25
        return x


def test_a_model_that_writes_over_its_inputs_sees_the_same_data_at_every_point() -> None:
    model = nn.Sequential(Centres(), perceptron()).eval()
    x, t = data()
    before = x.clone()
    surface = Surface(model, [(x, t)], CROSS_ENTROPY, random_directions(model, 2, seed=0))
    values = [surface.row(0.0, [0.0])["loss"][0] for _ in range(3)]
    assert values[0] == values[1] == values[2]
    assert torch.equal(x, before)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_a_model_that_draws_random_numbers_draws_the_same_at_every_point_and_from_no_global_state() -> None:
    model = nn.Sequential(perceptron(), Noisy()).eval()
    directions = random_directions(model, 2, seed=0)
    before = torch.get_rng_state()
    surface = Surface(model, [data()], CROSS_ENTROPY, directions)
    values = [surface.row(0.5, [0.5])["loss"][0] for _ in range(2)]
    assert values[0] == values[1]
    assert torch.equal(torch.get_rng_state(), before)


class Accumulates(nn.Module):
    """Writes over its first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(64, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(x)
        out += 1.0
        return self.head(out.tanh())


def test_a_first_layer_that_does_not_move_is_still_written_anew_at_every_point() -> None:
    torch.manual_seed(0)
    model = Accumulates().eval()
    x, t = data()
    directions = [{"head.weight": torch.ones(5, 8)}]
    surface = Surface(model, [(x.flatten(1), t)], CROSS_ENTROPY, directions)
    assert "first layer computed once for all points" in surface.notes
    values = [surface.row(0.0, [0.0])["loss"][0] for _ in range(3)]
    assert values[0] == values[1] == values[2]
    assert values[0] == pytest.approx(nn.functional.cross_entropy(model(x.flatten(1)), t).item(), rel=1e-6)


def test_train_and_test_data_may_be_the_same_object() -> None:
    model = perceptron()
    batch = [data()]
    surface = Surface(model, batch, CROSS_ENTROPY, random_directions(model, 2, seed=0), test_batches=batch)
    row = surface.row(0.5, AXIS)
    assert np.array_equal(row["loss"], row["test_loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_surface_on_cuda_equals_the_one_on_the_cpu() -> None:
    model = network()
    directions = random_directions(model, 2, seed=0)
    rows = [
        Surface(model, [data()], CROSS_ENTROPY, directions, device=device).row(0.5, AXIS)
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(rows[0]["loss"], rows[1]["loss"], rtol=1e-3)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ([], "one or two directions, not 0"),
        ([{"missing": torch.ones(1)}], "names 'missing', which the model does not have"),
        ([{"1.weight": torch.ones(2)}], r"shape \(2,\), the model's is \(16, 64\)"),
    ],
)
def test_directions_that_do_not_fit_are_named(directions: list[dict[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Surface(perceptron(), [data()], CROSS_ENTROPY, directions)


def test_no_data_and_unknown_batchnorm_are_errors() -> None:
    with pytest.raises(ValueError, match="no batches"):
        Surface(perceptron(), [], CROSS_ENTROPY, [{}])
    with pytest.raises(ValueError, match="frozen, recompute"):
        Surface(perceptron(), [data()], CROSS_ENTROPY, [{}], batchnorm="train")  # type: ignore[arg-type]
