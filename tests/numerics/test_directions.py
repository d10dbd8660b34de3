"""Random directions against the published formula, stated again filter by filter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynprobe.analyzers.numerics.directions import normalise, random_directions
from dynprobe.analyzers.numerics.params import filter_axis, weight_parameters


def small_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 10)
    )


def published(model: nn.Module, seed: int, n: int, *, normalize: str, ignore: bool) -> list[list[Tensor]]:
    """Li et al. (2018) §4 as its authors run it: one global generator, one filter after another."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = [[torch.randn(p.size()) for p in model.parameters()] for _ in range(n)]
    for direction in drawn:
        for d, p in zip(direction, model.parameters(), strict=True):
            w = p.detach()
            if w.dim() <= 1:
                d.copy_(torch.zeros_like(w) if ignore else w)
            elif normalize == "filter":
                for d_filter, w_filter in zip(d, w, strict=True):
                    d_filter.mul_(w_filter.norm() / (d_filter.norm() + 1e-10))
            else:
                d.mul_(w.norm() / d.norm())
    return drawn


@pytest.mark.parametrize("normalize", ["filter", "layer"])
@pytest.mark.parametrize("ignore", [True, False])
def test_directions_equal_the_published_ones_bit_for_bit(normalize: str, ignore: bool) -> None:
    model = small_network()
    ours = random_directions(model, 2, seed=11, normalize=normalize, ignore_1d=ignore)  # type: ignore[arg-type]
    theirs = published(model, 11, 2, normalize=normalize, ignore=ignore)
    for direction, expected in zip(ours, theirs, strict=True):
        assert list(direction) == [name for name, _ in model.named_parameters()]
        assert all(torch.equal(d, e) for d, e in zip(direction.values(), expected, strict=True))


def test_the_global_generator_is_not_touched_and_the_seed_decides() -> None:
    model = small_network()
    before = torch.get_rng_state()
    first, again, other = (random_directions(model, 1, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_a_direction_is_as_long_as_the_weights_with_more_than_one_dimension() -> None:
    model = small_network()
    lengths = [
        torch.cat([p.flatten() for p in direction.values()]).norm()
        for direction in random_directions(model, 2, seed=0)
    ]
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1]).norm()
    torch.testing.assert_close(torch.stack(lengths), torch.stack([weights, weights]))


def test_every_filter_has_its_own_norm_not_the_tensors() -> None:
    """The defect of nngeom, losscape and landscaper: one factor per tensor, filter ratios 0.6 to 1.6."""
    model = small_network()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 8).reshape(8, 1, 1, 1))
    (direction,) = random_directions(model, 1, seed=0)
    torch.testing.assert_close(
        direction["0.weight"].flatten(1).norm(dim=1), model[0].weight.detach().flatten(1).norm(dim=1)
    )


def test_directions_have_both_signs() -> None:
    """The defect of loss-landscapes 3.0.6: uniform on [0, 1], every entry positive."""
    direction = random_directions(small_network(), 1, seed=0)[0]["4.weight"]
    assert 0.4 < float((direction > 0).float().mean()) < 0.6


def test_biases_and_batchnorm_are_ignored_and_buffers_are_never_in_a_direction() -> None:
    """The defect of loss-landscape-3d: running variances are perturbed, and the surface is NaN."""
    model = small_network()
    (direction,) = random_directions(model, 1, seed=0)
    assert not direction.keys() & dict(model.named_buffers()).keys()
    assert all(not d.any() for name, d in direction.items() if weight_parameters(model)[name].dim() <= 1)


def test_a_dead_filter_gets_a_zero_direction_not_nan() -> None:
    model = small_network()
    with torch.no_grad():
        model[0].weight[2] = 0
    for normalize in ("filter", "layer"):
        (direction,) = random_directions(model, 1, seed=0, normalize=normalize)  # type: ignore[arg-type]
        assert direction["0.weight"].isfinite().all()
    assert not random_directions(model, 1, seed=0)[0]["0.weight"][2].any()


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))


@pytest.mark.parametrize(
    ("layer", "filters"),
    [
        (nn.ConvTranspose2d(4, 6, 3), lambda w: [w[:, j] for j in range(6)]),
        # Output channel (g, j) is fed by the inputs of its group through column j.
        (
            nn.ConvTranspose1d(4, 6, 3, groups=2),
            lambda w: [w[2 * g : 2 * g + 2, j] for g in range(2) for j in range(3)],
        ),
        (Conv1D(), lambda w: [w[:, j] for j in range(4)]),
        (nn.Embedding(5, 3), lambda w: list(w)),
    ],
)
def test_filters_of_layers_that_store_inputs_first(layer: nn.Module, filters: object) -> None:
    (direction,) = random_directions(layer, 1, seed=0, ignore_1d=True)
    for d, w in zip(filters(direction["weight"]), filters(layer.weight.detach()), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(d.norm(), w.norm())


def test_grouped_transposed_filters_are_those_that_feed_one_output_channel() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    outputs = layer(torch.randn(1, 4, 5))
    outputs[0, 4].sum().backward()  # channel 4: group 1, column 1
    assert layer.weight.grad is not None
    assert {(int(i), int(j)) for i, j, _ in layer.weight.grad.nonzero()} == {(2, 1), (3, 1)}


def test_a_tied_tensor_has_one_direction() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    model[1].weight = model[0].weight
    assert list(random_directions(model, 1, seed=0)[0]) == ["0.weight"]


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_directions_are_the_same_numbers_in_every_precision(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    model = nn.Linear(5, 3)
    reference = random_directions(model, 1, seed=0, normalize="none")[0]["weight"]
    direction = random_directions(model.to(dtype), 1, seed=0, normalize="none")[0]["weight"]
    assert direction.dtype == expected
    assert torch.equal(direction.float(), reference)


def test_normalise_leaves_what_it_is_given_alone_and_refuses_unknown_kinds() -> None:
    model = nn.Linear(5, 3)
    direction = {"weight": torch.ones(3, 5)}
    normalise(direction, weight_parameters(model), filter_axis(model), "filter")
    assert torch.equal(direction["weight"], torch.ones(3, 5))
    with pytest.raises(ValueError, match="not 'dfilter'"):
        random_directions(model, 1, seed=0, normalize="dfilter")  # type: ignore[arg-type]
