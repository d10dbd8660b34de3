"""BatchNorm statistics re-estimated at every point: exact however the data are split into batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.batchnorm import recompute_statistics
from dynprobe.analyzers.numerics.directions import random_directions
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.numerics.surface import Surface

CROSS_ENTROPY = get_loss("cross_entropy")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(32, 5),
    )  # fmt: skip
    for _ in range(3):
        model(torch.rand(16, 1, 8, 8) + 0.5)  # running statistics away from 0 and 1
    return model.eval()


def data(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def split(batch: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].split(list(sizes)), batch[1].split(list(sizes)), strict=True))


def test_recomputed_statistics_are_those_of_the_whole_data_set_at_every_point() -> None:
    model = network()
    batch, test = data(), data(11, seed=4)
    directions = random_directions(model, 2, seed=0)
    split_rows = [
        Surface(
            model,
            batches,
            CROSS_ENTROPY,
            directions,
            batchnorm="recompute",
            test_batches=[test],
            dtype=torch.float64,
        ).row(0.5, [-1.0, 0.0])
        for batches in ([batch], split(batch, 17, 22, 1))
    ]
    moved = copy.deepcopy(model).double().train()
    moved[8].eval()  # dropout
    with torch.no_grad():
        for name, tensor in moved.named_parameters():
            tensor += -1.0 * directions[0][name].double() + 0.5 * directions[1][name].double()
        outputs = moved(batch[0].double())  # train mode on one batch: the whole data set's statistics
    expected = nn.functional.cross_entropy(outputs, batch[1]).item()
    for row in split_rows:
        assert row["loss"][0] == pytest.approx(expected, rel=1e-9)
        assert row["test_loss"] == pytest.approx(split_rows[0]["test_loss"], rel=1e-9)


def test_recomputing_undoes_a_scale_that_frozen_statistics_cannot() -> None:
    model = network()
    (direction,) = [{"0.weight": model[0].weight.detach(), "0.bias": model[0].bias.detach()}]
    frozen, again = (
        Surface(model, [data()], CROSS_ENTROPY, [direction], batchnorm=kind).row(0.0, [0.0, 3.0])["loss"]  # type: ignore[arg-type]
        for kind in ("frozen", "recompute")
    )
    assert again[1] == pytest.approx(again[0], rel=1e-3)  # up to BatchNorm's ε
    assert abs(frozen[1] - frozen[0]) > 0.02


def test_a_batchnorm_used_twice_cannot_be_recomputed_and_says_so() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared).eval()
    for batches in ([4], [2, 2]):
        inputs = [(torch.randn(n, 3), torch.zeros(n)) for n in batches]
        with pytest.raises(ValueError, match="used twice"):
            recompute_statistics(model, inputs)
