"""Rewritten networks are the same function, along directions too; what cannot be rewritten is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers.numerics.directions import random_directions
from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.fold import first_layer, fold_batchnorm, layer_outputs, record
from dynprobe.analyzers.numerics.in_place import functions_in_place, relu_modules_in_place
from dynprobe.analyzers.numerics.params import private_copy
from dynprobe.analyzers.numerics.plane import Plane
from dynprobe.analyzers.numerics.prepare import Piece, Prepared, prepare_fast


def trained_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm with statistics, scales and shifts that are far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1:
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return model.eval()


def convolutional() -> nn.Module:
    return trained_statistics(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4),
        )
    )  # fmt: skip


class Residual(nn.Module):
    """A branch on the shape (which `torch.fx` cannot trace), functional ReLU, `+=`, a value read twice."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pre_activation, self.fc, self.branch = nn.BatchNorm2d(4), nn.Linear(4, 5), branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.ndim != 4:
            x = x.reshape(-1, 3, 8, 8)
        first = self.bn1(self.conv1(x))
        out = functional.relu(first)
        out = self.bn2(self.conv2(out))
        out += first  # `first` is read after the ReLU: it must not be written over
        out = self.pre_activation(functional.relu(out))
        return self.fc(out.mean((2, 3)))


def at(model: nn.Module, directions: list[dict[str, Tensor]], x: float, y: float, inputs: Tensor) -> Tensor:
    """Brute force: float64, one tensor after another."""
    moved = private_copy(model).double()
    with torch.no_grad():
        for name, tensor in moved.named_parameters():
            for coordinate, direction in zip((x, y), directions, strict=True):
                tensor += coordinate * direction[name].double()
        return call(moved, inputs.double())


def prepared(model: nn.Module, directions: list[dict[str, Tensor]], inputs: Tensor) -> Prepared:
    return prepare_fast(model, {"": [Piece(inputs, torch.zeros(len(inputs), dtype=torch.long))]}, directions)


@pytest.mark.parametrize(
    "model", [convolutional(), trained_statistics(Residual(True)), trained_statistics(Residual(False))]
)
def test_the_rewritten_network_is_the_same_function_on_the_whole_plane(model: nn.Module) -> None:
    inputs = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    directions = random_directions(model, 2, seed=1)
    network = prepared(model, directions, inputs)
    assert any("BatchNorm layers folded" in note for note in network.notes)
    for x, y in [(0.0, 0.0), (1.0, -1.0), (-0.5, 0.25), (0.0, 0.0)]:
        network.plane.start_row(y)
        network.plane.move_to(x)
        with torch.no_grad():
            outputs = network.outputs(network.data[""][0])
        torch.testing.assert_close(
            outputs.double(), at(model, directions, x, y, inputs), rtol=1e-5, atol=1e-5
        )


def test_every_batchnorm_behind_a_layer_is_folded_and_one_behind_a_relu_is_not() -> None:
    inputs = torch.randn(4, 3, 8, 8)
    for model, note in [(convolutional(), "3 of 3"), (trained_statistics(Residual(True)), "2 of 3")]:
        network = prepared(model, random_directions(model, 2, seed=0), inputs)
        assert network.notes[0] == f"{note} BatchNorm layers folded into the layer before"


def test_a_batchnorm_that_moves_is_not_folded_and_the_values_are_right() -> None:
    model = convolutional()
    inputs = torch.randn(4, 3, 8, 8)
    directions = random_directions(model, 2, seed=0, ignore_1d=False)
    network = prepared(model, directions, inputs)
    assert network.notes[0].startswith("1 of 3")  # the one without scale and shift
    network.plane.start_row(-0.2)
    network.plane.move_to(0.3)
    outputs = network.outputs(network.data[""][0]).detach()
    torch.testing.assert_close(
        outputs.double(), at(model, directions, 0.3, -0.2, inputs), rtol=1e-5, atol=1e-5
    )


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def test_a_layer_whose_weight_is_shared_is_not_folded() -> None:
    model = trained_statistics(Shared())
    fold_batchnorm(model, record(model, torch.randn(3, 4)), [])
    assert isinstance(model.norm, nn.BatchNorm1d)


class HiddenReader(nn.Module):
    """The layer's output is read once more outside any module, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return self.norm(out) + out.sin()


def test_a_rewrite_that_changes_the_function_is_found_out_and_dropped() -> None:
    model = trained_statistics(HiddenReader())
    inputs = torch.randn(6, 4)
    directions = random_directions(model, 2, seed=0)
    network = prepared(model, directions, inputs)
    assert network.notes == ["the rewritten network is not used: its outputs differ from the network's"]
    network.plane.start_row(0.5)
    network.plane.move_to(0.5)
    outputs = network.outputs(network.data[""][0]).detach()
    torch.testing.assert_close(
        outputs.double(), at(model, directions, 0.5, 0.5, inputs), rtol=1e-5, atol=1e-5
    )


class NeedsContiguous(nn.Module):
    """`view` fails on a channels-last tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.relu(self.conv(x)).view(x.shape[0], -1))


def test_a_network_that_cannot_take_channels_last_is_evaluated_without() -> None:
    model, inputs = NeedsContiguous().eval(), torch.randn(3, 3, 8, 8)
    network = prepared(model, random_directions(model, 2, seed=0), inputs)
    network.plane.start_row(0.0)
    network.plane.move_to(0.0)
    torch.testing.assert_close(network.outputs(network.data[""][0]), model(inputs))


def test_the_first_layer_on_fixed_data_is_linear_in_the_coordinates() -> None:
    layer, inputs = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    model = nn.Sequential(layer)
    directions = random_directions(model, 2, seed=0, ignore_1d=False)
    centre, along_x, along_y = layer_outputs(layer, "0", directions, inputs)
    torch.testing.assert_close(
        (centre + 0.3 * along_x - 0.7 * along_y).double(),
        at(model, directions, 0.3, -0.7, inputs),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("before", "expected"),
    [(nn.Flatten(), "1"), (nn.Identity(), "1"), (nn.Softplus(), None)],
)
def test_the_first_layer_is_recognised_only_if_it_reads_the_data_themselves(
    before: nn.Module, expected: str | None
) -> None:
    model, inputs = nn.Sequential(before, nn.Linear(4, 2)), torch.randn(3, 4)
    calls = record(model, inputs)
    assert first_layer(model, calls, inputs) == expected


def test_relu_is_in_place_only_where_nothing_else_reads_its_input() -> None:
    model = trained_statistics(Residual(False))
    graph = functions_in_place(model)
    inputs = torch.randn(2, 3, 8, 8)
    assert (
        sum(node.target is torch.relu_ for node in graph.graph.nodes) == 1
    )  # the second; the first is read again
    torch.testing.assert_close(graph(inputs), model(inputs))
    plain = convolutional()
    relu_modules_in_place(plain, record(plain, inputs))
    assert [module.inplace for module in plain if isinstance(module, nn.ReLU)] == [True, True, True]


def test_a_relu_on_the_data_never_writes_over_them() -> None:
    model, inputs = nn.Sequential(nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    before = inputs.clone()
    network = prepared(model, random_directions(model, 2, seed=0), inputs)
    network.outputs(network.data[""][0])
    assert torch.equal(inputs, before)


def test_a_plane_returns_to_its_centre_bit_for_bit_after_any_walk() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = model.weight.detach().clone()
    plane = Plane(dict(model.named_parameters()), random_directions(model, 2, seed=0))
    for y, x in [(0.1, 0.7), (1e6, -1e6), (-0.3, 0.1)]:
        plane.start_row(y)
        plane.move_to(x)
    plane.start_row(0.0)
    plane.move_to(0.0)
    assert torch.equal(model.weight, before)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


class Sums(nn.Module):
    """A sum that can be written over its first term, one that cannot (another shape), one that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.c(x)
        return (self.a(x) + x) + (self.b(x) + x) * (kept + x) * kept


def test_a_sum_is_written_over_its_first_term_only_where_that_is_free_and_fits() -> None:
    model, inputs = Sums(), torch.randn(3, 4)
    before = inputs.clone()
    torch.testing.assert_close(functions_in_place(model)(inputs), model(inputs))
    assert torch.equal(inputs, before)


def test_one_channel_images_are_in_channels_last_format_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both formats count as contiguous then; only the strides make the convolution return the fast one."""
    monkeypatch.setattr("dynprobe.analyzers.numerics.prepare.FIRST_LAYER_IN_CACHE", 0)
    model, inputs = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval(),
        torch.randn(3, 1, 8, 8),
    )
    network = prepared(model, random_directions(model, 2, seed=0), inputs)
    assert network.outputs(network.data[""][0]).stride(1) == 1
