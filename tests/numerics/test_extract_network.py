"""What is analysed is what the model computes; what cannot be is refused by name."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers.numerics import affine_form
from dynprobe.analyzers.numerics.affine_form import TooLarge
from dynprobe.analyzers.numerics.extract_network import (
    Extracted,
    UnsupportedNetwork,
    deviation,
    extract,
    require_agreement,
)
from dynprobe.analyzers.numerics.layered_network import Layer, piecewise
from dynprobe.analyzers.numerics.linear_bounds import bound
from dynprobe.io.nets import CNN, MLP

ROW, SEQUENCE, IMAGE, VOLUME = (1, 6), (1, 4, 8), (1, 4, 8, 8), (1, 2, 4, 4, 4)


class Function(nn.Module):
    """A model whose forward is a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and batch norm statistics, in float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.4)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_().add_(0.5)
    return model.double().eval()


def inputs_like(shape: tuple[int, ...], n: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape[1:], generator=generator, dtype=torch.float64)


def largest_difference(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Between what is analysed and the forward pass, on inputs that the extraction has not seen."""
    inputs = inputs_like(shape)
    extracted = extract(model, inputs[:1])
    with torch.no_grad():
        expected = model(inputs.clone()).reshape(len(inputs), -1).numpy()
    return float(np.abs(extracted(inputs.reshape(len(inputs), -1).numpy()) - expected).max())


LAYERS = [
    (nn.Linear(6, 3), ROW),
    (nn.Linear(8, 3, bias=False), SEQUENCE),
    (nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), SEQUENCE),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), IMAGE),
    (nn.Conv2d(4, 3, 3, padding="same", bias=False), IMAGE),
    (nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), IMAGE),
    (nn.Conv3d(2, 3, 3, padding=1), VOLUME),
    (nn.ConvTranspose1d(4, 2, 3, stride=2), SEQUENCE),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), IMAGE),
    (nn.BatchNorm1d(6), ROW),
    (nn.BatchNorm2d(4, affine=False), IMAGE),
    (nn.BatchNorm2d(4), IMAGE),
    (nn.AvgPool1d(2), SEQUENCE),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
    (nn.AvgPool3d(2), VOLUME),
    (nn.AdaptiveAvgPool1d(3), SEQUENCE),
    (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.AdaptiveAvgPool2d((3, 5)), IMAGE),
    (nn.MaxPool1d(3, 2, 1), SEQUENCE),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.MaxPool2d(2, dilation=2), IMAGE),
    (nn.MaxPool3d(2), VOLUME),
    (nn.AdaptiveMaxPool1d(3), SEQUENCE),
    (nn.AdaptiveMaxPool2d(3), IMAGE),
    (nn.Upsample(scale_factor=2, mode="nearest"), IMAGE),
    (nn.Upsample(scale_factor=1.5, mode="bilinear"), IMAGE),
    (nn.Upsample(scale_factor=2, mode="linear", align_corners=True), SEQUENCE),
    (nn.PixelShuffle(2), IMAGE),
    (nn.Unfold(3, padding=1), IMAGE),
    (nn.ReflectionPad2d(2), IMAGE),
    (nn.ReplicationPad2d((1, 0, 2, 1)), IMAGE),
    (nn.ConstantPad2d(1, 2.5), IMAGE),
    (nn.CircularPad2d(1), IMAGE),
    (nn.Dropout(), ROW),
    (nn.AlphaDropout(), ROW),
    (nn.ReLU(inplace=True), ROW),
    (nn.LeakyReLU(0.1, inplace=True), ROW),
    (nn.PReLU(4), IMAGE),
    (nn.RReLU(), ROW),
    (nn.ReLU6(inplace=True), ROW),
    (nn.Hardtanh(-0.3, 0.4), ROW),
    (nn.Hardsigmoid(), ROW),
    (nn.Softshrink(0.2), ROW),
    (nn.Threshold(0.1, 0.1), ROW),
    (nn.Tanh(), ROW),
    (nn.Sigmoid(), ROW),
    (nn.Tanhshrink(), ROW),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_layer_gives_what_its_forward_gives(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = randomised(nn.Sequential(layer, nn.Flatten()))
    assert largest_difference(model, shape) < 1e-12


def test_prelu_slopes_may_be_negative_or_above_one() -> None:
    model = nn.PReLU(6).double()
    model.weight.data = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    assert largest_difference(model, ROW) < 1e-15
    np.testing.assert_array_equal(extract(model, torch.zeros(ROW)).network.layers[0].activation.below,
                                  model.weight.detach().numpy())  # fmt: skip


def written_through_a_view(x: Tensor) -> Tensor:
    y = x * 1
    functional.relu_(y[:, 1:4])
    return y * 2


def filled(x: Tensor) -> Tensor:
    y = x.new_zeros(len(x), 8)
    y[:, [5, 6]] = x[:, 2:4]
    y[:, 0] = 3.0
    y[:, 1:3] += x[:, :2]
    return y


CONSTANT = torch.arange(12.0, dtype=torch.float64).reshape(2, 6) - 5

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda x: x.clamp(-0.2, 1),
    "clamp between tensors": lambda x: torch.clamp(x, CONSTANT[0] / 10, torch.ones(1)),
    "clamp_max_": lambda x: x.clone().clamp_max_(0.1),
    "abs": torch.abs,
    "maximum": lambda x: torch.maximum(x, -2 * x.flip(1)),
    "minimum": lambda x: torch.minimum(x, CONSTANT[:1]),
    "max over a dimension": lambda x: x.view(-1, 2, 3).max(2)[0],
    "amax over several": lambda x: x.view(-1, 2, 3, 1).amax((1, 3)),
    "amin": lambda x: x.view(-1, 2, 3).amin(1),
    "einsum": lambda x: torch.einsum("bi,oi->bo", x, CONSTANT),
    "matmul from the left": lambda x: (CONSTANT @ x.t()).t(),
    "matmul of rows": lambda x: (x.view(-1, 3, 2) @ CONSTANT[:, :4]).flatten(1),
    "matmul with columns": lambda x: (CONSTANT[:, :3] @ x.view(-1, 3, 2)).flatten(1),
    "sums": lambda x: 2 - x / 4 + torch.add(x, x.sum(1, keepdim=True), alpha=0.5) - x.mean(1, True),
    "where": lambda x: torch.where(CONSTANT[0] > -3, x, -x),
    "masked_fill": lambda x: x.masked_fill(CONSTANT[0] > -3, 3.0),
    "index": lambda x: x[:, [0, 0, 3]],
    "mask": lambda x: x[:, CONSTANT[0] > -3],
    "cat and stack": lambda x: torch.cat([x, functional.relu(x), torch.stack([x, -x], 2).flatten(1)], 1),
    "split and roll": lambda x: torch.cat([part.roll(1, 1) for part in x.split([2, 3, 1], 1)], 1),
    "in place and residual": lambda x: functional.relu_(x * 1) + x,
    "in place through a view": written_through_a_view,
    "written to parts": filled,
    "transposed memory": lambda x: (x.view(-1, 2, 3).transpose(1, 2) * 1).relu().flatten(1),
    "half inside": lambda x: x.float() + torch.zeros(6, dtype=torch.float16),
    "unused GELU": lambda x: (functional.gelu(x), x * 2)[1],
    "constant": lambda x: torch.ones(len(x), 3),
    "relu of a constant": lambda x: x + functional.relu(CONSTANT[0]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_gives_what_its_forward_gives(name: str) -> None:
    inputs = inputs_like(ROW)
    extracted = extract(Function(FUNCTIONS[name]), inputs[:1])
    expected = FUNCTIONS[name](inputs.clone()).double().numpy()
    np.testing.assert_allclose(extracted(inputs.numpy()), expected, atol=2e-7 if "half" in name else 1e-12)


class Residual(nn.Module):
    """Convolution, batch norm, an in-place activation whose input is used again, pooling, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)) for _ in range(2)
        )
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for block in self.blocks:
            x = functional.max_pool2d(self.act(x + block(x)), 2)
        return self.head(x.reshape(len(x), -1))


def test_convolutional_residual_network_is_the_same_and_its_convolutions_sparse() -> None:
    model = randomised(Residual())
    assert largest_difference(model, (1, 1, 8, 8)) < 1e-10
    big = extract(randomised(CNN(width=4)), torch.randn(1, 1, 16, 16, dtype=torch.float64))
    assert sparse.issparse(big.network.layers[0].sources[0][1])
    assert big.names[0] == "relu1 (ReLU)"


def test_elman_network_is_the_same() -> None:
    rnn = nn.RNN(8, 4, batch_first=True)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][:, -1]

    assert largest_difference(randomised(Last()), SEQUENCE) < 1e-12


def test_affine_layers_between_activations_become_one_matrix() -> None:
    model = randomised(
        nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    )
    network = extract(model, torch.zeros(ROW)).network
    assert [layer.n_neurons for layer in network.layers] == [5, 2]
    assert [[j for j, _ in layer.sources] for layer in network.layers] == [[0], [1]]
    weight = model[1].weight @ model[0].weight
    factor = model[2].weight / torch.sqrt(model[2].running_var + model[2].eps)
    expected = (factor[:, None] * weight).detach().numpy()
    np.testing.assert_allclose(network.layers[0].sources[0][1], expected, atol=1e-14)


def test_unused_layers_are_left_out() -> None:
    network = extract(
        Function(lambda x: (functional.relu(x * 3), functional.relu(-x))[1]), torch.zeros(ROW)
    ).network
    assert len(network.layers) == 2


def test_clamp_is_bounded_by_its_upper_end_whatever_its_input() -> None:
    network = extract(nn.Hardtanh(), torch.zeros(1, 1)).network
    assert bound(network, np.array([[-10.0]]), np.array([[10.0]])).high == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("last", "dropped"),
    [
        (nn.Softmax(1), "softmax"),
        (nn.Softmax(-1), "softmax"),
        (nn.LogSoftmax(1), "log_softmax"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.LogSigmoid(), "log_sigmoid"),
        (Function(lambda x: torch.log(functional.softmax(x, 1))), "log_softmax"),
        (Function(lambda x: {"logits": x}), ""),
    ],
)
def test_last_operation_that_does_not_change_the_decision_is_dropped(last: nn.Module, dropped: str) -> None:
    base = randomised(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    inputs = inputs_like(ROW)
    extracted = extract(nn.Sequential(base, last), inputs[:1])
    assert extracted.dropped == dropped
    with torch.no_grad():
        np.testing.assert_allclose(extracted.network(inputs.numpy()), base(inputs).numpy(), atol=1e-13)
    if not isinstance(last, Function) or dropped:
        assert deviation(extracted, nn.Sequential(base, last), inputs) < 1e-13


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 2)])
def test_outputs_may_be_flat(shape: tuple[int, ...]) -> None:
    n = 2 if shape == (-1, 2) else 1
    model = Function(lambda x: torch.tanh(x[:, :n]).reshape(shape))
    assert extract(model, torch.zeros(ROW)).network.n_outputs == n


def test_single_output_may_lose_all_its_dimensions_by_a_last_squeeze() -> None:
    model = nn.Sequential(randomised(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))))
    model.append(Function(lambda x: x.squeeze()))
    inputs = inputs_like(ROW)
    extracted = extract(model, inputs[:1], check=inputs)
    assert extracted.network.n_outputs == 1
    assert deviation(extracted, model, inputs) < 1e-13
    assert deviation(extracted, model, inputs[:1]) < 1e-13


def test_copies_in_another_memory_format_are_followed() -> None:
    model = nn.Sequential(
        randomised(nn.Conv2d(4, 3, 3)),
        Function(lambda x: x.clone(memory_format=torch.channels_last).flatten(1)),
    )
    assert largest_difference(model, IMAGE) < 1e-12


def accumulated(x: Tensor) -> Tensor:
    position = torch.zeros(len(x), dtype=torch.int64)
    return x.clone().index_put_((torch.arange(len(x)), position), x[:, 1], accumulate=True)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "GELU": (nn.GELU(), "1 is GELU, which is not piecewise linear and has no bounds here; ReLU-like"),
    "SiLU": (nn.SiLU(), "1 is SiLU, which is not"),
    "ELU": (nn.ELU(), "1 is ELU, which is not"),
    "Softplus": (nn.Softplus(), "1 is Softplus, which is not"),
    "LayerNorm": (nn.LayerNorm(6), "1 is LayerNorm, which is not"),
    "Threshold": (nn.Threshold(0.1, 0.2), "1 is Threshold, which jumps at its threshold"),
    "inner softmax": (
        nn.Sequential(nn.Softmax(1), nn.Linear(6, 2)),
        "1.0 is Softmax, which is only analysed as the last",
    ),
    "product": (Function(lambda x: x * x), r"1 \(Function\) uses mul, which multiplies values that depend"),
    "quotient": (Function(lambda x: x / x), "divides by values that depend on the input"),
    "attention": (
        Function(lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]),
        "multiplies values that depend on the input with each other",
    ),
    "rounding": (Function(lambda x: x.long() * 1.0), "rounds to whole numbers"),
    "positions": (Function(lambda x: x.max(1)[1].double() * x), "is not followed"),
    "noise": (Function(lambda x: x + torch.randn(6)), "uses randn, which draws random numbers"),
    "dropout": (Function(lambda x: functional.dropout(x, 0.5, True)), "draws random numbers"),
    "branch": (Function(lambda x: x if x.mean() > 0 else -x), "what it computes depends on the data"),
    "selection": (Function(lambda x: x[x > 0]), "what it computes depends on the data"),
    "out=": (Function(lambda x: torch.add(x, 1, out=x)), "uses add, which cannot be followed"),
    "complex": (Function(lambda x: (x * 1j).real), "which computes with complex numbers"),
    "sequence": (Function(lambda x: x.view(-1, 2, 3)), r"outputs of shape \(1, 2, 3\) for one input"),
    "no batch": (Function(lambda x: x.squeeze(0)), r"outputs of shape \(6,\) for one input"),
    "mean of the batch": (Function(lambda x: x.sum().reshape(1, 1)), "gives 1 numbers for one input but 1 "),
    "one at a time": (Function(lambda x: x.view(1, 6)), "on one input but not on 33 together"),
    "accumulating": (Function(accumulated), "uses index_put, which adds to values at positions"),
    "NaN": (Function(lambda x: x / 0), "gives NaN or infinite outputs"),
    "python": (Function(lambda x: x * random.random()), "does its forward depend on the data, or on chance"),
    "numpy": (
        Function(lambda x: x if x.detach().numpy().mean() > 0 else -x),
        r"differ from what the network computes \(by .* at input",
    ),
    "no tensor": (Function(lambda x: 3.0), "cannot be run in float64: the model returned float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_networks_are_refused_by_name(name: str) -> None:
    last, message = REFUSED[name]
    model = nn.Sequential(randomised(nn.Linear(6, 6)), last)
    with pytest.raises(UnsupportedNetwork, match=message):
        extract(model, inputs_like(ROW)[:1])


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.InstanceNorm2d(4), IMAGE, "is InstanceNorm2d, which normalises by the statistics of its input"),
        (nn.LSTM(8, 4), SEQUENCE, "is LSTM, which multiplies"),
        (nn.MaxPool2d(2, return_indices=True), IMAGE, "outputs of shape"),
    ],
)
def test_unsupported_layers_are_named(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UnsupportedNetwork, match=message):
        extract(nn.Sequential(model, Function(lambda x: x[0][:, 0])), torch.randn(shape))


def test_inputs_other_than_one_tensor_of_numbers_are_refused() -> None:
    model = nn.Linear(6, 2)
    with pytest.raises(UnsupportedNetwork, match="takes several inputs"):
        extract(model, (torch.zeros(ROW), torch.zeros(ROW)))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedNetwork, match=r"torch.int64, such as tokens or categories"):
        extract(model, torch.zeros(ROW, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one input, \(1, …\), not of shape \(3, 6\)"):
        extract(model, torch.zeros(3, 6))


def test_matrices_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine_form, "MOST_ENTRIES", 1000)
    with pytest.raises(UnsupportedNetwork, match="0 is Conv2d, which is too large to be analysed"):
        extract(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten()), torch.zeros(IMAGE))
    with pytest.raises(TooLarge):
        affine_form.require_entries(1001)


def test_branch_that_only_the_data_reach_is_found_with_them() -> None:
    model = Function(lambda x: x * (1 + torch.from_numpy(x.numpy().max(1, keepdims=True) > 50)))
    example = torch.zeros(ROW)
    extract(model, example)
    data = torch.tensor([[0.0] * 6, [100.0] * 6])
    with pytest.raises(UnsupportedNetwork, match="differ from what the network computes"):
        extract(model, example, check=data)


@pytest.mark.parametrize("limit", [0.99, 1.05])
def test_branch_at_the_corners_of_the_range_of_the_data_is_found(limit: float) -> None:
    # within the range random points hardly ever have all entries so large
    model = Function(lambda x: x * (1 + torch.from_numpy(x.numpy().min(1, keepdims=True) > limit)))
    wide = torch.cat([torch.eye(2), 1 - torch.eye(2)])
    model = nn.Sequential(model)
    with pytest.raises(UnsupportedNetwork, match="differ from what the network computes"):
        extract(model, torch.zeros(1, 2), check=wide)


def test_analysed_relu_that_forward_does_not_have_is_found() -> None:
    # the published analysis of a drawing network: its layer list has a ReLU, its forward uses what is before
    model = randomised(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 2)))
    right = extract(model, torch.zeros(ROW))
    first, last = right.network.layers
    hidden = Layer(
        ((1, model[2].weight.detach().numpy()),), model[2].bias.detach().numpy(), piecewise(0, 1, 4)
    )
    end = replace(last, sources=((2, model[3].weight.detach().numpy()),), bias=model[3].bias.detach().numpy())
    wrong = Extracted(replace(right.network, layers=(first, hidden, end)))
    inputs = inputs_like(ROW)
    require_agreement(right, model, inputs)
    with pytest.raises(UnsupportedNetwork, match="differ from what the network computes"):
        require_agreement(wrong, model, inputs)
    assert deviation(wrong, model, inputs) > 1e-2
    assert deviation(right.network, model, inputs) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deviation_is_the_rounding_of_the_models_own_dtype(dtype: torch.dtype) -> None:
    model = randomised(MLP(6, 20, 2, 3)).to(dtype)
    extracted = extract(model, inputs_like(ROW)[:1].to(dtype))
    inputs = inputs_like(ROW).to(dtype)
    largest = np.abs(extracted(inputs.double().numpy())).max()
    assert 0 < deviation(extracted, model, inputs) < 40 * torch.finfo(dtype).eps * largest


def test_model_and_random_state_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.ReLU(inplace=True)).train()
    model[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    example = torch.randn(ROW, generator=torch.Generator().manual_seed(0))
    kept = example.clone()
    extracted = extract(model, example, check=example.repeat(3, 1))
    deviation(extracted, model, example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[1].training
    assert not model[0].weight.requires_grad
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(example, kept)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_same_model_gives_the_same_matrices() -> None:
    model = randomised(Residual())
    example = torch.zeros(1, 1, 8, 8)
    for a, b in zip(*(extract(model, example).network.layers for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a.bias, b.bias)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_read_too() -> None:
    model = randomised(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    inputs = inputs_like(ROW)
    found = extract(torch.jit.trace(model, inputs), inputs[:1])
    np.testing.assert_allclose(found(inputs.numpy()), extract(model, inputs[:1])(inputs.numpy()), atol=1e-14)


def test_weights_computed_from_others_are_constants() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU())
    assert largest_difference(model.double().eval(), ROW) < 1e-13


def test_small_networks_take_a_fraction_of_a_second() -> None:
    model = MLP(30, 64, 4, 3)
    extract(model, torch.zeros(1, 30))
    start = time.perf_counter()
    extract(model, torch.zeros(1, 30))
    assert time.perf_counter() - start < 1
