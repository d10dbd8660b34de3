"""The built-in networks are what they are named after, can be differentiated twice, and keep their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from dynprobe.io.infer import builtin_candidates, infer_arguments
from dynprobe.io.nets import BUILTIN

SMALL = {
    "mlp": ({"inputs": 64, "width": 5, "depth": 2, "activation": "tanh"}, (64,)),
    "cnn": ({"width": 2}, (1, 8, 8)),
    "allcnn": ({"width": 2}, (3, 16, 16)),
    "resnet20": ({"width": 2}, (3, 8, 8)),
    "resnet32": ({"width": 2, "shortcut": False}, (3, 8, 8)),
    "rnn": ({"inputs": 8, "width": 4}, (1, 8, 8)),
    "lstm": ({"inputs": 8, "width": 4, "depth": 2}, (1, 8, 8)),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    args, shape = SMALL[name]
    torch.manual_seed(0)
    return BUILTIN[name](**args).eval(), torch.randn(6, *shape)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_cifar_resnets_have_the_number_of_parameters_of_he_et_al_table_6(name, millions):
    model = BUILTIN[name]()
    weights = sum(p.numel() for p in model.parameters())
    assert weights / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.006)


def test_a_cifar_resnet_has_as_many_weight_layers_as_its_name_says():
    for depth in (20, 32, 44, 56, 110):
        layers = [m for m in BUILTIN[f"resnet{depth}"]().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth


def test_all_cnn_c_has_1_4_million_parameters_and_pools_over_6_by_6():
    model = BUILTIN["allcnn"]()
    # Springenberg et al. (2015), Tables 1 and 3.
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(1.4, abs=0.05)
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 10, 6, 6)


def test_a_shortcut_has_no_parameters_but_changes_the_function():
    with_shortcut, without = BUILTIN["resnet20"](width=2), BUILTIN["resnet20"](width=2, shortcut=False)
    without.load_state_dict(with_shortcut.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(with_shortcut.eval()(x), without.eval()(x))


def test_a_block_with_zero_weights_is_the_identity_subsampled_and_padded():
    from dynprobe.io.resnets import BasicBlock

    block = BasicBlock(2, 4, 2, shortcut=True).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert out[:, [0, 3]].abs().sum() == 0


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_the_written_out_recurrence_equals_torchs(kind):
    torch.manual_seed(0)
    ours = BUILTIN[kind](inputs=5, width=7, depth=2).rnn.double()
    theirs = {"rnn": nn.RNN, "lstm": nn.LSTM}[kind](5, 7, num_layers=2, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives_equal_finite_differences_of_the_gradient(name):
    model, x = make(name)
    model, x = model.double(), x.double()
    y = torch.arange(6)
    torch.manual_seed(1)
    # Away from the initial zeros of BatchNorm's biases, where ReLUs have their kinks.
    parameters = {k: v.detach() + 0.1 * torch.randn_like(v) for k, v in model.named_parameters()}
    v = {k: torch.randn_like(p) for k, p in parameters.items()}

    def gradient(p):
        return grad(lambda q: nn.functional.cross_entropy(functional_call(model, q, (x,)), y))(p)

    product = grad(lambda p: sum((g * v[k]).sum() for k, g in gradient(p).items()))(parameters)
    step = 1e-6
    plus = gradient({k: p + step * v[k] for k, p in parameters.items()})
    minus = gradient({k: p - step * v[k] for k, p in parameters.items()})
    product = torch.cat([product[k].flatten() for k in parameters])
    differences = torch.cat([((plus[k] - minus[k]) / (2 * step)).flatten() for k in parameters])
    torch.testing.assert_close(product, differences, rtol=1e-4, atol=1e-4 * float(product.abs().max()))


@pytest.mark.parametrize("name", SMALL)
def test_per_sample_gradients_by_vmap_average_to_the_gradient(name):
    model, x = make(name)
    model, x = model.double(), x.double()
    y = torch.arange(6)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, xs, ys):
        return nn.functional.cross_entropy(functional_call(model, p, (xs,)), ys)

    whole = grad(loss)(parameters, x, y)
    each = vmap(grad(lambda p, a, b: loss(p, a[None], b[None])), (None, 0, 0))(parameters, x, y)
    for key in parameters:
        torch.testing.assert_close(each[key].mean(0), whole[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_arguments_are_inferred_from_shapes(name):
    args, _ = SMALL[name]
    shapes = {key: tuple(value.shape) for key, value in BUILTIN[name](**args).state_dict().items()}
    found = infer_arguments(name, shapes)
    rebuilt = BUILTIN[name](**found)
    assert {key: tuple(value.shape) for key, value in rebuilt.state_dict().items()} == shapes


def test_only_the_right_family_is_proposed():
    for name, (args, _) in SMALL.items():
        shapes = {key: tuple(value.shape) for key, value in BUILTIN[name](**args).state_dict().items()}
        assert [found for found, _ in builtin_candidates(shapes)] == [name]
    assert builtin_candidates({"something.weight": (3, 3)}) == []


def test_switches_are_inferred_too():
    shapes = {k: tuple(v.shape) for k, v in BUILTIN["cnn"](width=3, batch_norm=False).state_dict().items()}
    assert infer_arguments("cnn", shapes) == {"width": 3, "classes": 10, "channels": 1, "batch_norm": False}


def test_cnn_takes_rows_of_pixels_as_square_images():
    model, x = make("cnn")
    torch.testing.assert_close(model(x.flatten(1)), model(x))
    torch.testing.assert_close(model(x[:, 0]), model(x))
    with pytest.raises(ValueError, match="no square images"):
        model(torch.zeros(2, 63))


def test_parameter_names_are_stable():
    assert list(BUILTIN["mlp"](depth=1).state_dict()) == [
        "hidden.0.weight",
        "hidden.0.bias",
        "head.weight",
        "head.bias",
    ]
    cnn = [name for name, _ in BUILTIN["cnn"]().named_parameters()]
    assert cnn == [f"{part}.{kind}" for i in "123" for part, kind in _cnn_layers(i)] + [
        "fc.weight",
        "fc.bias",
    ]
    assert list(BUILTIN["lstm"]().state_dict())[:2] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert "layer1.0.conv1.weight" in BUILTIN["resnet20"]().state_dict()


def _cnn_layers(i: str) -> list[tuple[str, str]]:
    return [(f"conv{i}", "weight"), (f"bn{i}", "weight"), (f"bn{i}", "bias")]
