"""Per-sample gradients against one autograd call per sample, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynprobe.analyzers.numerics import layer_rules
from dynprobe.analyzers.numerics.evaluate import call, map_tensors
from dynprobe.analyzers.numerics.factors import Rows, total
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.numerics.per_sample import (
    PerSamplePass,
    SamplesMixed,
    loss_gradients,
    settle,
)
from dynprobe.analyzers.numerics.sample_by_sample import grouped

N = 5


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Block(nn.Module):
    """A residual block whose ReLUs write in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, (3, 2), padding="same", padding_mode="circular", dilation=(1, 2))
        self.norm = nn.GroupNorm(3, 6)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.stem(x)))
        y = self.bn2(self.conv(x))
        y += x
        return self.head(self.norm(self.relu(y)).mean((2, 3)))


class Transformer(nn.Module):
    """Learned positions, attention with packed weights, LayerNorm, a decoder tied to the embedding."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.place = nn.Embedding(6, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.1)
        self.norm = nn.RMSNorm(4)
        self.decode = nn.Linear(4, 7, bias=False)
        if tied:
            self.decode.weight = self.embed.weight

    def forward(self, x):
        places = torch.arange(x.shape[1])[None]
        return self.decode(self.norm(self.block(self.embed(x) + self.place(places))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))) * self.scale)


class Merged(nn.Module):
    """Samples and positions made one dimension on the way."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.relu(self.layer(x.flatten(0, 1))).unflatten(0, x.shape[:2]).sum(1))


class Permuted(Merged):
    """The same with positions first, which no layer rule can tell."""

    def forward(self, x):
        y = torch.relu(self.layer(x.transpose(0, 1).flatten(0, 1)))
        return self.head(y.unflatten(0, (x.shape[1], x.shape[0])).sum(0))


class Keys(nn.Module):
    """Attention by hand: its softmax does not see the bias of the keys, whose gradient is only rounding."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT / 2
        return (scores.softmax(-1) @ self.value(x)).mean(1)


class Experts(nn.Module):
    """Each sample goes to one of two layers."""

    def __init__(self):
        super().__init__()
        self.expert = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, x):
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for k, expert in enumerate(self.expert):
            mine = (x[:, 0] > 0) == bool(k)
            if mine.any():
                out = out.index_put((mine.nonzero()[:, 0],), expert(x[mine]))
        return out


class MaskToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.where(x.isnan(), self.token, x)))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(x) * self.gain)


class Places(nn.Embedding):
    """As OPT's: given a mask of floats instead of indices."""

    def forward(self, mask):
        return super().forward((mask.cumsum(1) * mask).long())


class Flattening(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))


class OwnForwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(7, 4), Places(8, 4), Flattening(24, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x) + self.place(torch.ones_like(x, dtype=torch.float32))))


class InFloat32(nn.Module):
    """As the normalisation of many language models, whatever the dtype of the weights."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.head = nn.Linear(4, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(x).float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.head(self.scale * x.to(self.scale.dtype))


def images():
    return torch.randn(N, 4, 7, 6)


def sequences():
    return torch.randn(N, 3, 4)


NETS = {
    "mlp": (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), lambda: torch.randn(N, 4)),
    "residual": (Block(), images),
    "conv1d": (
        nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.ReLU(True), nn.Conv1d(4, 2, 1), nn.Flatten()),
        lambda: torch.randn(N, 3, 9),
    ),
    "conv3d": (
        nn.Sequential(nn.Conv3d(1, 2, 2, dilation=2), nn.Flatten()),
        lambda: torch.randn(N, 1, 3, 4, 5),
    ),
    "reflect": (
        nn.Sequential(nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten()),
        images,
    ),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 2, 3, stride=2), nn.Flatten()), images),
    "tied transformer": (Transformer(), lambda: torch.randint(7, (N, 6))),
    "transformer": (Transformer(tied=False), lambda: torch.randint(7, (N, 6))),
    "lstm": (Recurrent(), lambda: torch.randn(N, 5, 3)),
    "called twice": (Twice(), lambda: torch.randn(N, 4)),
    "positions": (nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.LayerNorm(5)), sequences),
    "many positions": (nn.Linear(3, 2), lambda: torch.randn(N, 20, 3)),
    "merged": (Merged(), sequences),
    "permuted": (Permuted(), sequences),
    "weight_norm": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        lambda: torch.randn(N, 4),
    ),
    "keys": (Keys(), sequences),
    "normalised away": (
        nn.Sequential(nn.Conv2d(4, 3, 3), nn.InstanceNorm2d(3), nn.Conv2d(3, 2, 2), nn.GroupNorm(2, 2)),
        images,
    ),
    "own forwards": (OwnForwards(), lambda: torch.randint(7, (N, 6))),
    "experts": (Experts(), lambda: torch.randn(N, 4)),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Tanh(), nn.Conv2d(4, 9, 4)), images),
    "frozen weights": (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), lambda: torch.randn(N, 4)),
}


def prepared(name):
    model, make = NETS[name]
    model = model.double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.running_mean.shape))
                module.running_var.copy_(torch.rand(module.running_var.shape) + 0.5)
    if name == "frozen weights":
        model.requires_grad_(False)
    return model, make()


def brute_force(model, inputs, cotangent):
    """One forward and backward pass per sample."""
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    rows = []
    for i in range(len(cotangent)):
        one = map_tensors(lambda t, i=i: t[i : i + 1], inputs)
        outputs = torch.func.functional_call(model, values, (one,))
        rows.append(
            torch.autograd.grad(
                (outputs * cotangent[i : i + 1]).sum(), list(values.values()), allow_unused=True
            )
        )
    return {
        name: torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in rows])
        for k, (name, p) in enumerate(values.items())
    }


@pytest.mark.parametrize("name", NETS)
def test_factors_agree_with_one_backward_pass_per_sample(name):
    model, inputs = prepared(name)
    passed = PerSamplePass(model, inputs)
    cotangent = torch.randn(passed.outputs.shape)
    truth = brute_force(model, inputs, cotangent)
    weights, found = torch.randn(N), passed.pull(cotangent)
    assert list(found) == [key for key, _ in model.named_parameters()]
    for key, factor in found.items():
        rows = truth[key].flatten(1)
        vector = torch.randn(truth[key].shape[1:])
        close = {"rtol": 1e-11, "atol": 1e-11 * float(rows.norm()) + 1e-13, "msg": key}
        torch.testing.assert_close(factor.squared_norm(), rows.square().sum(1), **close)
        torch.testing.assert_close(factor.gram(factor), rows @ rows.T, **close)
        torch.testing.assert_close(factor.dot(vector), rows @ vector.flatten(), **close)
        combined = torch.tensordot(weights, truth[key], 1)
        torch.testing.assert_close(factor.combine(weights), combined, **close)


def test_only_parameters_without_a_layer_rule_take_the_slow_route():
    slow = {}
    for name in NETS:
        model, inputs = prepared(name)
        slow[name] = PerSamplePass(model, inputs).routes.slow
    assert slow.pop("lstm") == {f"lstm.{p}_l0" for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert slow.pop("called twice") == {"scale"}
    assert slow.pop("transposed") == {"0.weight", "0.bias"}
    assert slow.pop("permuted") == {"layer.weight", "layer.bias"}
    assert slow.pop("weight_norm") == {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    assert slow.pop("own forwards") == {"place.weight", "head.weight", "head.bias"}
    assert slow.pop("experts") == {f"expert.{k}.{p}" for k in (0, 1) for p in ("weight", "bias")}
    for name in ("transformer", "tied transformer"):
        attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        assert slow.pop(name) == {f"block.self_attn.{p}" for p in attention}
    assert not any(slow.values()), slow


def test_an_lstm_is_followed_by_a_loop_and_attention_by_vmap():
    for name, vectorised in (("lstm", False), ("transformer", True)):
        model, inputs = prepared(name)
        assert PerSamplePass(model, inputs).routes.vectorised is vectorised


def test_gram_between_batches_of_unequal_size_and_length_is_that_of_the_gradients():
    model, _ = prepared("transformer")
    batches = [torch.randint(7, (3, 6)), torch.randint(7, (2, 4))]
    grams, rows = [], []
    cotangents = [torch.randn(*b.shape, 7) for b in batches]
    factors = [PerSamplePass(model, b).pull(c) for b, c in zip(batches, cotangents, strict=True)]
    rows = [brute_force(model, b, c) for b, c in zip(batches, cotangents, strict=True)]
    for key in factors[0]:
        grams = factors[0][key].gram(factors[1][key])
        truth = rows[0][key].flatten(1) @ rows[1][key].flatten(1).T
        torch.testing.assert_close(grams, truth, rtol=1e-11, atol=1e-12)


def test_gram_of_a_linear_network_has_the_last_digits_of_dense_float64():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    model.eval()
    inputs, targets = torch.randn(40, 20), torch.randint(5, (40,))
    (factors, _), *_ = loss_gradients(model, [(inputs, targets)], get_loss("cross_entropy"))
    gram = sum(factor.gram(factor) for factor in factors.values())
    outputs = model(inputs)
    cotangent = torch.autograd.grad(functional.cross_entropy(outputs, targets, reduction="sum"), outputs)[0]
    rows = torch.cat([r.flatten(1) for r in brute_force(model, inputs, cotangent).values()], 1)
    assert float((gram - rows @ rows.T).abs().max() / (rows @ rows.T).abs().max()) < 4e-15


def test_loss_gradients_of_ragged_batches_are_those_of_each_sample():
    model, inputs = prepared("residual")
    targets = torch.randint(3, (N,))
    loss = get_loss("cross_entropy")
    found = list(loss_gradients(model, list(zip(inputs.split(2), targets.split(2), strict=True)), loss))
    losses = torch.cat([values for _, values in found])
    torch.testing.assert_close(losses, loss.per_sample(model(inputs), targets).detach())
    for i in range(N):
        gradients = torch.autograd.grad(
            loss(model(inputs[i : i + 1]), targets[i : i + 1]), model.parameters()
        )
        for (key, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            norm = torch.cat([factors[key].squared_norm() for factors, _ in found])[i]
            torch.testing.assert_close(norm, gradient.square().sum(), rtol=1e-10, atol=1e-14)


def test_parameters_restricts_the_gradients():
    model, inputs = prepared("residual")
    passed = PerSamplePass(model, inputs, parameters=["conv.weight"])
    assert list(passed.pull(torch.ones_like(passed.outputs))) == ["conv.weight"]
    with pytest.raises(ValueError, match="no parameter nonsense"):
        PerSamplePass(model, inputs, parameters=["nonsense"])


def test_an_unused_parameter_has_gradients_of_zero():
    model, inputs = prepared("mlp")
    model.extra = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    model.eval()
    found = PerSamplePass(model, inputs).pull(torch.ones(N, 3))["extra.weight"]
    assert found.squared_norm().tolist() == [0.0] * N
    assert found.gram(found).abs().max() == 0
    assert found.combine(torch.ones(N)).shape == (2, 2)


def test_samples_that_influence_each_other_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(SamplesMixed, match="on a single sample"):
        PerSamplePass(model, torch.randn(N, 4))
    model = nn.Sequential(nn.Conv1d(4, 3, 1), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(SamplesMixed, match="depend on the others"):
        PerSamplePass(model, torch.randn(N, 4, 6))


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        PerSamplePass(nn.Linear(2, 2).train(), torch.randn(N, 2))


def test_the_model_is_left_as_it_was():
    model, inputs = prepared("tied transformer")
    model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    passed = PerSamplePass(model, inputs)
    passed.pull(torch.ones_like(passed.outputs))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_inputs_may_be_a_dictionary_with_entries_that_are_no_samples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bare = nn.Parameter(torch.randn(4, 2))

        def forward(self, x, scale):
            return x @ self.bare * scale

    model, x = Net().eval(), torch.randn(N, 4)
    passed = PerSamplePass(model, {"x": x, "scale": torch.tensor([2.0])})
    found = passed.pull(torch.ones(N, 2))["bare"].squared_norm()
    torch.testing.assert_close(found, 8 * x.square().sum(1))
    assert call(model, {"x": x, "scale": torch.tensor(1.0)}).shape == (N, 2)


def test_routes_are_settled_once():
    model, inputs = prepared("lstm")
    routes = settle(model, [(inputs, None)])
    assert routes.settled
    assert routes.slow
    assert not routes.vectorised
    assert settle(model, [], routes=routes) is routes
    again = PerSamplePass(model, inputs, routes=routes)
    truth = brute_force(model, inputs, torch.ones(N, 2))
    for key, factor in again.pull(torch.ones(N, 2)).items():
        torch.testing.assert_close(factor.squared_norm(), truth[key].flatten(1).square().sum(1))


def halves(kind):
    """Two batches, in the first of which a parameter has no gradient, or its rule happens to be right."""
    torch.manual_seed(2)
    x = torch.randn(10, 4)
    if kind == "experts":
        x[:4, 0] = -x[:4, 0].abs()
        x[4:, 0] = torch.tensor([1, -1, 1, -1, -1, 1]) * x[4:, 0].abs()
    elif kind == "mask token":
        x[7:, :2] = torch.nan
    else:
        x[:4] = 0
    return {"experts": Experts, "mask token": MaskToken, "gain": Gain}[kind]().eval(), x.split((4, 6))


@pytest.mark.parametrize("kind", ["experts", "mask token", "gain"])
def test_gradients_do_not_depend_on_which_batch_comes_first(kind):
    model, parts = halves(kind)
    loss, targets = get_loss("cross_entropy"), torch.randint(3, (10,)).split((4, 6))
    batches = list(zip(parts, targets, strict=True))
    for order in (batches, batches[::-1]):
        for (x, y), (factors, _) in zip(order, loss_gradients(model, order, loss), strict=True):
            z = model(x).detach().requires_grad_()
            truth = brute_force(model, x, torch.autograd.grad(loss(z, y) * len(y), z)[0])
            for key, factor in factors.items():
                torch.testing.assert_close(
                    factor.squared_norm(), truth[key].flatten(1).square().sum(1), msg=key
                )


@pytest.mark.parametrize("kind", ["experts", "mask token", "gain"])
def test_settling_finds_what_needs_the_slow_route_in_any_batch(kind):
    model, parts = halves(kind)
    slow = {"experts": {"expert.0.weight", "expert.1.bias"}, "mask token": {"token"}, "gain": {"gain"}}[kind]
    for order in (parts, parts[::-1]):
        assert slow <= settle(model, [(x, None) for x in order]).slow


def test_a_layer_whose_rule_is_silent_is_not_dropped_on_other_data():
    model, (first, second) = halves("experts")
    routes = settle(model, [(first, None)])
    assert not routes.slow
    found = PerSamplePass(model, second, routes=routes).pull(torch.ones(6, 3))
    truth = brute_force(model, second, torch.ones(6, 3))
    for key, factor in found.items():
        torch.testing.assert_close(factor.squared_norm(), truth[key].flatten(1).square().sum(1))


def test_a_gradient_that_is_not_finite_is_nan_and_not_zero():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            return x * self.scale.abs().sqrt()

    found = PerSamplePass(Root().eval(), torch.randn(N, 3)).pull(torch.ones(N, 3))
    assert bool(found["scale"].squared_norm().isnan().all())


def test_parts_in_float32_of_a_model_in_float64_are_no_mixing_of_samples():
    model, inputs = InFloat32().eval(), torch.randn(N, 4)
    found = PerSamplePass(model, inputs).pull(torch.ones(N, 3))
    truth = brute_force(model, inputs, torch.ones(N, 3))
    for key, factor in found.items():
        torch.testing.assert_close(
            factor.squared_norm(), truth[key].flatten(1).square().sum(1), rtol=1e-5, atol=1e-12
        )


@pytest.mark.parametrize("name", ["residual", "depthwise", "reflect", "conv1d"])
def test_convolutions_whose_patches_are_too_large_are_done_few_samples_at_a_time(name, monkeypatch):
    model, inputs = prepared(name)
    passed = PerSamplePass(model, inputs)
    cotangent = torch.randn(passed.outputs.shape)
    truth = passed.pull(cotangent)
    monkeypatch.setattr(layer_rules, "KEPT_PATCHES", 1)
    parts = PerSamplePass(model, inputs)
    found = parts.pull(cotangent)
    convolutions = [use for use in parts.uses if isinstance(use.module, layer_rules.CONVOLUTIONS)]
    assert [len(list(parts.patches.of(use))) for use in convolutions] == [N] * len(convolutions)
    for key, factor in found.items():
        torch.testing.assert_close(factor.squared_norm(), truth[key].squared_norm())
        torch.testing.assert_close(factor.combine(torch.ones(N)), truth[key].combine(torch.ones(N)))


def dense(factor, rows, columns):
    out = torch.zeros(len(factor.index), rows, columns)
    for i, (index, values) in enumerate(zip(factor.index, factor.values, strict=True)):
        out[i].index_add_(0, index, values)
    return out.flatten(1)


def test_norms_of_embeddings_take_no_memory_for_pairs_of_positions():
    """Pairs of 30,000 positions would take 21 GB."""
    one, other = (Rows(torch.randint(9, (n, 30000)), torch.randn(n, 30000, 2), (9, 2)) for n in (3, 2))
    truth = dense(one, 9, 2)
    torch.testing.assert_close(one.squared_norm(), truth.square().sum(1))
    torch.testing.assert_close(one.gram(other), truth @ dense(other, 9, 2).T)


def test_an_embedding_that_is_used_twice_stays_a_few_rows():
    one, other = (Rows(torch.randint(9, (3, t)), torch.randn(3, t, 2), (9, 2)) for t in (4, 5))
    both = total([one, other])
    assert isinstance(both, Rows)
    torch.testing.assert_close(both.squared_norm(), (dense(one, 9, 2) + dense(other, 9, 2)).square().sum(1))


def test_convolutions_run_without_the_rounding_of_tf32():
    seen = []

    class Net(nn.Linear):
        def forward(self, x):
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    before = torch.backends.cudnn.allow_tf32
    PerSamplePass(Net(2, 2).eval(), torch.randn(N, 2))
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before


def test_groups_go_across_the_ends_of_batches_where_shapes_allow():
    x, y = torch.arange(11.0)[:, None], torch.arange(11)
    cut = [({"x": a, "scale": torch.ones(1)}, b) for a, b in zip(x.split(4), y.split(4), strict=True)]
    for batches in (cut, [({"x": x, "scale": torch.ones(1)}, y)]):
        groups = list(grouped(batches, 3, across=True))
        assert [b.tolist() for _, b in groups] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
        assert all(torch.equal(a["x"][:, 0].long(), b) and len(a["scale"]) == 1 for a, b in groups)
    assert [len(b) for _, b in grouped(cut, 3)] == [3, 1, 3, 1, 3]
    ragged = [(torch.zeros(4, 2), y[:4]), (torch.zeros(4, 3), y[4:8])]
    assert [len(b) for _, b in grouped(ragged, 3, across=True)] == [3, 1, 3, 1]
