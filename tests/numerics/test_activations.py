"""Recorded activations are what the layers computed, as a matrix of the stated samples and features."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from dynprobe.analyzers.numerics.activations import (
    Block,
    LayerError,
    features,
    input_hash,
    n_samples_of,
    non_finite,
    record,
    recut,
)
from dynprobe.analyzers.numerics.layouts import treated
from dynprobe.analyzers.numerics.params import frozen_eval


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cut(inputs: Any, *sizes: int) -> list[tuple[Any, Tensor]]:
    """Batches of these sizes."""
    batches, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        part = {k: v[rows] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
        batches.append((part, torch.zeros(size)))
        start += size
    return batches


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


class Block2d(nn.Module):
    def __init__(self, width: int, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            out += x
        else:
            out = out + x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 1, 1)
        self.layer1 = nn.Sequential(Block2d(4, inplace), Block2d(4, inplace))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.stem(x)).mean((2, 3)))


IMAGES = randn(7, 1, 5, 5)


class RowsOfSteps(nn.Module):
    """Recurrent layer, element-wise module, linear layer; time first inside if asked for."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first_inside = batch_first
        self.lstm = nn.LSTM(3, 5, batch_first=batch_first)
        self.tanh = nn.Tanh()
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first_inside else x.transpose(0, 1)
        out = self.head(self.tanh(self.lstm(x)[0]))
        return out[:, -1] if self.batch_first_inside else out[-1]


# In-place operations


def test_an_in_place_resnet_records_what_the_same_network_without_in_place_computes() -> None:
    plain, writing = seeded(ResNet(False)), seeded(ResNet(True))
    a = features(plain, cut(IMAGES, 7), layers="all")
    b = features(writing, cut(IMAGES, 7), layers="all")
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name].values, b[name].values), name


def test_a_hook_that_keeps_references_would_record_other_values_for_the_in_place_resnet() -> None:
    model = seeded(ResNet(True)).eval()
    kept = {}
    handle = model.layer1[0].bn2.register_forward_hook(lambda _m, _i, out: kept.update(bn2=out))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    right = features(model, cut(IMAGES, 7), layers="layer1.0.bn2")["layer1.0.bn2"].values
    assert not torch.allclose(kept["bn2"].flatten(1), right, atol=0.1)


def test_a_network_that_writes_over_its_inputs_leaves_the_data_as_it_was() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = randn(6, 4)
    before = x.clone()
    found = features(model, cut(x, 3, 3), layers="0, 1")
    assert torch.equal(x, before)
    assert torch.equal(found["0"].values, before.relu())


# What `auto`, `all`, names and globs choose


def test_auto_takes_layers_with_weights_and_blocks_but_no_normalisation_activation_or_container() -> None:
    block = ["conv1", "conv2", ""]
    expected = ["stem", *(f"layer1.{i}.{part}".rstrip(".") for i in (0, 1) for part in block), "fc"]
    assert list(features(seeded(ResNet()), cut(IMAGES, 7))) == expected


def test_auto_leaves_out_a_block_that_returns_its_last_layers_very_tensor() -> None:
    class Wrapped(nn.Module):
        def __init__(self, after: nn.Module) -> None:
            super().__init__()
            self.linear, self.after = nn.Linear(4, 4), after

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.linear(x))

    x = cut(randn(6, 4), 6)
    assert list(features(nn.Sequential(Wrapped(nn.Dropout())), x)) == ["0.linear"]
    assert list(features(nn.Sequential(Wrapped(nn.Tanh())), x)) == ["0.linear", "0"]
    assert list(features(nn.Sequential(Wrapped(nn.ReLU(inplace=True))), x)) == ["0.linear", "0"]


def test_a_network_without_layers_is_recorded_under_the_name_of_its_class() -> None:
    model, x = nn.Linear(4, 2), randn(6, 4)
    for layers in ("auto", "all", "linear"):
        found = features(model, cut(x, 4, 2), layers=layers)
        assert list(found) == ["linear"]
        assert torch.allclose(found["linear"].values, model(x).detach())


def test_all_takes_everything_but_the_network_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    assert list(features(model, cut(randn(6, 4), 6), layers="all")) == ["0", "1", "2.0", "2"]


def test_weight_normalised_layers_are_layers_and_the_parts_of_their_weights_are_none() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)), nn.Tanh(), nn.Linear(4, 2)
    )
    assert list(features(model, cut(randn(6, 4), 6))) == ["0", "2"]
    assert list(features(model, cut(randn(6, 4), 6), layers="all")) == ["0", "1", "2"]


def test_names_and_globs_choose_and_keep_the_order_of_firing() -> None:
    model = seeded(ResNet())
    assert list(features(model, cut(IMAGES, 7), layers="fc stem, layer1.*.relu")) == [
        "stem",
        *("layer1.0.relu", "layer1.0.relu#2", "layer1.1.relu", "layer1.1.relu#2"),
        "fc",
    ]
    assert list(features(model, cut(IMAGES, 7), layers="layer1")) == ["layer1"]
    assert list(features(model, cut(IMAGES, 7), layers="layer1.1.relu#2")) == ["layer1.1.relu#2"]


def test_repeated_calls_of_one_module_are_layers_of_their_own() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    model = nn.Sequential(model[0], model[1], model[2], model[1])
    x = randn(7, 4)
    found = features(model, cut(x, 4, 3), layers="all")
    assert list(found) == ["0", "1", "2", "1#2"]
    assert torch.allclose(found["1#2"].values, model(x).detach())
    assert torch.allclose(found["1"].values, model[:2](x).detach())


def test_a_shared_module_goes_by_its_first_name_and_is_found_by_each() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared))
    for layers in ("0", "2.0"):
        assert list(features(model, cut(randn(6, 4), 6), layers=layers)) == ["0", "0#2"]


def test_an_unknown_name_is_refused_with_a_near_match_and_the_list() -> None:
    with pytest.raises(LayerError, match=r"no layer is called 'layer1.0.conv3'") as error:
        features(ResNet(), cut(IMAGES, 7), layers="layer1.0.conv3")
    assert error.value.tip.startswith("Did you mean 'layer1.0.conv")
    assert "There are stem, layer1, layer1.0," in error.value.tip
    with pytest.raises(LayerError, match=r"no layer is called 'nothing\*'"):
        features(ResNet(), cut(IMAGES, 7), layers="nothing*")


def test_a_named_layer_that_never_ran_is_an_error_and_one_among_a_globs_is_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"unused": nn.Linear(4, 4)}))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    x = cut(randn(6, 4), 6)
    with pytest.raises(LayerError, match=r"'1.unused' never ran in the forward pass"):
        features(model, x, layers="1.unused")
    with pytest.raises(LayerError, match="never ran"):
        features(model, x, layers="1.*")
    assert list(features(model, x, layers="*")) == ["0"]


def test_a_call_that_did_not_happen_never_ran() -> None:
    with pytest.raises(LayerError, match="'0#2' never ran"):
        features(nn.Sequential(nn.Linear(4, 2)), cut(randn(6, 4), 6), layers="0#2")


def test_what_has_no_sample_dimension_or_no_floats_is_left_out_unless_it_is_named() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.index, self.head = nn.Linear(4, 4), Index(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x.reshape(-1, 4)).reshape(x.shape).mean(1)
            self.index(out)
            return self.head(out)

    class Index(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).argmax(1)

    x = cut(randn(6, 5, 4), 6)
    assert list(features(Windows(), x)) == ["head"]
    with pytest.raises(LayerError, match=r"'inner' gives \(15, 4\) for 3 samples: there is no sample dim"):
        features(Windows(), x, layers="inner")
    with pytest.raises(LayerError, match="'index' returns int64 numbers"):
        features(Windows(), x, layers="index")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_program_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval()
    programs = [
        torch.jit.trace(model, torch.zeros(2, 4)),
        torch.jit.script(model),
        torch.export.export(
            model, (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
        ).module(),
    ]
    for program in programs:
        with pytest.raises(LayerError, match="compiled program"):
            features(program, cut(randn(6, 4), 6))


# Layouts and treatments


@pytest.mark.parametrize("treatment", ["average", "flatten", "positions"])
def test_convolutional_maps_are_treated_as_asked(treatment: str) -> None:
    conv = nn.Conv2d(1, 4, 3, 1, 1)
    found = features(nn.Sequential(conv), cut(IMAGES, 4, 3), maps=treatment)["0"]
    maps = conv(IMAGES).detach()
    if treatment == "positions":
        assert torch.allclose(
            found.values, torch.stack([m[:, i, j] for m in maps for i in range(5) for j in range(5)])
        )
        assert torch.equal(found.sample, torch.arange(7).repeat_interleave(25))
        assert found.treatment == "positions 5x5"
    else:
        expected = maps.mean((2, 3)) if treatment == "average" else maps.flatten(1)
        assert torch.allclose(found.values, expected, atol=1e-6)
        assert found.sample is None
        assert found.treatment == treatment


def test_three_dimensions_are_maps_after_a_convolution_and_steps_after_a_linear_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.linear, self.gelu = (
                nn.Conv1d(3, 4, 1),
                nn.ReLU(),
                nn.Linear(4, 6),
                nn.GELU(),
            )
            self.turn = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv(x))  # (n, 4, 5)
            x = self.turn(x.transpose(1, 2))  # (n, 5, 4)
            return self.gelu(self.linear(x)).mean(1)  # (n, 5, 6)

    found = features(Both(), cut(randn(7, 3, 5), 4, 3), layers="all", maps="average", sequences="mean")
    assert {n: (e.treatment, e.values.shape[1]) for n, e in found.items()} == {
        "conv": ("average", 4),
        "relu": ("average", 4),
        "turn": ("mean", 4),
        "linear": ("mean", 6),
        "gelu": ("mean", 6),
    }


@pytest.mark.parametrize("width", [6, 9])  # 9: as many channels as patches
def test_patches_of_a_vision_transformer_are_steps_although_a_convolution_made_them(width: int) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(1, width, 2, 2), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.conv(x).flatten(2).transpose(1, 2))

    model, x = Patches(), randn(5, 1, 6, 6)
    found = features(model, cut(x, 5), layers="conv,drop", maps="average", sequences="mean")
    assert (found["conv"].treatment, found["drop"].treatment) == ("average", "mean")
    assert torch.allclose(found["conv"].values, found["drop"].values, atol=1e-6)


def test_channels_last_maps_are_averaged_over_space_not_over_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU())
    x = randn(7, 4, 5, 3)
    found = features(model, cut(x, 7), layers="all", maps="average")
    assert torch.allclose(found["2"].values, model(x).detach().mean((1, 2)), atol=1e-6)


def test_one_number_per_sample_is_one_feature() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1)

    found = features(nn.Sequential(nn.Linear(3, 2), Last()), cut(randn(6, 3), 6), layers="1")
    assert found["1"].values.shape == (6, 1)


def test_each_step_of_a_recurrent_layer_is_the_hand_unrolled_state() -> None:
    model, x = nn.Sequential(seeded(nn.RNN(3, 5, batch_first=True))), randn(7, 4, 3)
    rnn = model[0]
    found = features(model, cut(x, 4, 3), sequences="per-step")
    assert list(found) == ["0@0", "0@1", "0@2", "0@3"]
    state = torch.zeros(7, 5)
    for t in range(4):
        drive = x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + rnn.bias_hh_l0
        state = torch.tanh(drive + state @ rnn.weight_hh_l0.T).detach()
        assert torch.allclose(found[f"0@{t}"].values, state, atol=1e-6)
    assert list(features(model, cut(x, 7), layers="0@1,0@3", sequences="per-step")) == ["0@1", "0@3"]
    with pytest.raises(LayerError, match="'0' has no step 9"):
        features(model, cut(x, 7), layers="0@9", sequences="per-step")


@pytest.mark.parametrize("n", [2, 4, 6])  # 4: as many samples as steps
@pytest.mark.parametrize("treatment", ["mean", "last", "first", "flatten", "token", "per-step"])
def test_time_first_inside_the_network_changes_nothing(n: int, treatment: str) -> None:
    x = randn(n + 1, 4, 3)
    batch_first, time_first = seeded(RowsOfSteps(True)), seeded(RowsOfSteps(False))
    a = features(batch_first, cut(x, n, 1), layers="all", sequences=treatment)
    b = features(time_first, cut(x, n, 1), layers="all", sequences=treatment)
    assert list(a) == list(b)
    for name in a:
        assert torch.allclose(a[name].values, b[name].values, atol=1e-6)
        assert (a[name].sample is None) == (b[name].sample is None) == (treatment != "token")


class Masked(nn.Module):
    """A transformer over tokens with a mask of those to keep."""

    def __init__(self, name: str = "attention_mask") -> None:
        super().__init__()
        self.name = name
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, **masks: Tensor) -> dict[str, Any]:
        drop = masks[self.name] == 0 if self.name == "attention_mask" else masks[self.name]
        states = self.encoder(self.embed(input_ids), src_key_padding_mask=drop)
        return {"states": states, "logits": self.head(states)}


IDS = torch.randint(11, (7, 5), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([5, 3, 1, 4, 5, 2, 3])
KEEP = torch.arange(5) < LENGTHS[:, None]


@pytest.mark.parametrize("treatment", ["mean", "last", "first", "token"])
def test_padding_is_no_part_of_a_masked_sequence(treatment: str) -> None:
    model = seeded(Masked())
    inputs = {"input_ids": IDS, "attention_mask": KEEP.long()}
    found = features(model, cut(inputs, 4, 3), sequences=treatment)
    assert {"embed", "encoder.layers.0.self_attn", "encoder.layers.0.linear1", "encoder.layers.1"} < set(
        found
    )
    for i in range(7):  # each sentence alone, without padding
        alone = {"input_ids": IDS[i : i + 1, : LENGTHS[i]]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        single = features(model, cut(alone, 1), sequences=treatment)
        for name, layer in found.items():
            rows = layer.values[i : i + 1] if layer.sample is None else layer.values[layer.sample == i]
            assert torch.allclose(rows, single[name].values, atol=2e-6), name


def test_a_mask_of_padding_is_the_inverse_of_one_of_tokens() -> None:
    a = features(seeded(Masked()), cut({"input_ids": IDS, "attention_mask": KEEP.long()}, 7))
    b = features(seeded(Masked("padding_mask")), cut({"input_ids": IDS, "padding_mask": ~KEEP}, 7))
    assert all(torch.equal(a[name].values, b[name].values) for name in a)


@pytest.mark.parametrize("treatment", ["flatten", "per-step"])
def test_padding_never_becomes_features(treatment: str) -> None:
    inputs = {"input_ids": IDS, "attention_mask": KEEP.long()}
    with pytest.raises(LayerError, match="'embed': sequences differ in length"):
        features(Masked(), cut(inputs, 7), sequences=treatment)


def test_a_mask_of_another_length_is_said_not_to_be_applied() -> None:
    class Shorter(Masked):
        def forward(self, input_ids: Tensor, **masks: Tensor) -> dict[str, Any]:
            return {"logits": self.head(self.embed(input_ids)[:, :3])}

    found = features(Shorter(), cut({"input_ids": IDS, "attention_mask": KEEP.long()}, 7))
    assert found["embed"].treatment == "mean"
    assert found["head"].treatment == "mean (mask not applied)"


class Translator(nn.Module):
    """Encoder, and a decoder whose cross attention has the encoder's steps; no name says whose."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        self.steps = steps
        self.words, self.reader, self.writer = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.keys, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, **_masks: Tensor) -> Tensor:
        if self.steps and decoder_input_ids.shape[1] != self.steps:
            raise ValueError("another number of steps")
        read, written = self.reader(self.words(input_ids)), self.writer(self.words(decoder_input_ids))
        return self.head(written + torch.softmax(written @ self.keys(read).mT, -1) @ read)


DECODER_KEEP = torch.arange(5) < LENGTHS.flip(0)[:, None]
TRANSLATED = {
    "input_ids": IDS,
    "attention_mask": KEEP.long(),
    "decoder_input_ids": IDS.flip(0),
    "decoder_attention_mask": DECODER_KEEP.long(),
}
READ, WRITTEN = ("words", "reader", "keys"), ("words#2", "writer", "head")


def test_each_sequence_of_an_encoder_and_decoder_of_equal_lengths_is_averaged_over_its_own_mask() -> None:
    model = seeded(Translator())
    found = features(model, cut(TRANSLATED, 4, 3))
    with torch.no_grad():
        for name, ids, keep in (("reader", IDS, KEEP), ("writer", IDS.flip(0), DECODER_KEEP)):
            out = getattr(model, name)(model.words(ids))
            expected = torch.stack([rows[mask].mean(0) for rows, mask in zip(out, keep, strict=True)])
            assert torch.allclose(found[name].values, expected, atol=1e-6)
    tokens = features(model, cut(TRANSLATED, 4, 3), sequences="token")
    assert set(found) == {*READ, *WRITTEN}
    for names, keep in ((READ, KEEP), (WRITTEN, DECODER_KEEP)):
        for name in names:
            assert found[name].treatment == "mean"
            assert torch.equal(torch.bincount(tokens[name].sample), keep.sum(1)), name


def test_without_a_mask_of_the_decoder_that_of_the_encoder_is_not_applied_to_it() -> None:
    inputs = {name: value for name, value in TRANSLATED.items() if name != "decoder_attention_mask"}
    found = features(seeded(Translator()), cut(inputs, 4, 3))
    assert {found[name].treatment for name in READ} == {"mean"}
    assert {found[name].treatment for name in WRITTEN} == {"mean (mask not applied)"}


def test_where_a_network_does_not_show_whose_steps_are_whose_no_mask_is_applied() -> None:
    found = features(seeded(Translator(steps=5)), cut(TRANSLATED, 4, 3))
    assert {layer.treatment for layer in found.values()} == {"mean (mask not applied)"}


def test_a_hugging_face_t5_is_averaged_over_its_two_masks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    sums = KEEP.sum(1), DECODER_KEEP.sum(1)
    found = features(model, cut(TRANSLATED, 4, 3), sequences="token")
    for name, layer in found.items():
        from_encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert torch.equal(torch.bincount(layer.sample), sums[not from_encoder]), name


def test_a_sample_without_any_step_is_refused() -> None:
    mask = KEEP.long().clone()
    mask[2] = 0
    with pytest.raises(LayerError, match="`attention_mask` leaves no step of 1 of 7 samples"):
        features(Masked(), cut({"input_ids": IDS, "attention_mask": mask}, 7))


def test_packed_sequences_bring_their_lengths() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][-1])

    model, x = seeded(Packed()), randn(7, 5, 3)
    found = features(model, cut({"x": x, "lengths": LENGTHS}, 4, 3), sequences="last")
    with torch.no_grad():
        states = model.rnn(x.transpose(0, 1))[0].transpose(0, 1)
    assert torch.allclose(found["rnn"].values, states[torch.arange(7), LENGTHS - 1], atol=1e-6)


def test_batches_padded_to_different_lengths_are_one_mean_and_no_flattened_layer() -> None:
    model = seeded(RowsOfSteps(True))
    batches = [(randn(4, 5, 3), torch.zeros(4)), (randn(3, 2, 3), torch.zeros(3))]
    assert features(model, batches, layers="lstm")["lstm"].values.shape == (7, 5)
    assert features(model, batches, layers="lstm", sequences="token")["lstm"].values.shape == (26, 5)
    with pytest.raises(LayerError, match="'lstm' has 25 features in one batch and 10 in another"):
        features(model, batches, layers="lstm", sequences="flatten")
    with pytest.raises(LayerError, match="'lstm@2' ran in some batches and not in others"):
        features(model, batches, layers="lstm", sequences="per-step")


def test_a_module_that_runs_more_often_in_one_batch_is_refused() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), 5)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state

    model = Loop()
    found = features(model, cut(randn(7, 3, 3), 7))
    assert list(found) == ["cell", "cell#2", "cell#3"]
    for lengths in ((3, 2), (2, 3)):
        batches = [(randn(4, t, 3), torch.zeros(4)) for t in lengths]
        with pytest.raises(LayerError, match=r"'cell(#3)?' ran"):
            features(model, batches)


# Saved arrays


@pytest.mark.parametrize("shape", [(6, 4, 3, 2), (6, 4, 3, 2, 2)])
def test_saved_maps_are_treated_as_recorded_ones(shape: tuple[int, ...]) -> None:
    maps = randn(*shape)
    net = nn.Sequential(
        nn.BatchNorm2d(4, affine=False, eps=0) if len(shape) == 4 else nn.BatchNorm3d(4, eps=0)
    )
    for treatment in ("average", "flatten", "positions"):
        layer = features(net, cut(maps, 6), layers="0", maps=treatment)["0"]
        values, sample, said = treated(maps, maps=treatment, sequences="mean")
        assert torch.equal(values, layer.values)
        assert said == layer.treatment
        assert (sample is None) == (layer.sample is None)


def test_saved_sequences_are_treated_as_asked_and_matrices_not_at_all() -> None:
    x = randn(6, 4, 3)
    expected = {
        "mean": x.mean(1),
        "last": x[:, -1],
        "first": x[:, 0],
        "flatten": x.flatten(1),
        "token": x.flatten(0, 1),
    }
    for sequences, values in expected.items():
        found = treated(x, maps="average", sequences=sequences)
        assert torch.equal(found[0], values)
        assert found[2] == sequences
    assert torch.equal(found[1], torch.arange(6).repeat_interleave(4))
    matrix, sample, said = treated(x[:, 0], maps="average", sequences="per-step")
    assert (matrix.data_ptr(), sample, said) == (x.data_ptr(), None, "")
    whole = treated(torch.arange(12).reshape(2, 3, 2), maps="average", sequences="mean")[0]
    assert torch.equal(whole, torch.tensor([[2.0, 3.0], [8.0, 9.0]], dtype=torch.float64))
    assert not treated(x.requires_grad_(), maps="average", sequences="mean")[0].requires_grad


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (torch.ones(3), r"shape \(3,\) is no layer"),
        (torch.ones(3, 0), r"shape \(3, 0\) is no layer"),
        (torch.ones(3, 1, 1, 1, 1, 1), "is no layer"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, 4, 2), "per-step makes a layer of every step"),
    ],
)
def test_an_array_that_is_no_layer_is_refused_with_a_sentence(array: Tensor, words: str) -> None:
    with pytest.raises(LayerError, match=words) as error:
        treated(array, maps="average", sequences="per-step")
    assert error.value.tip


# Outputs that are no tensor


@dataclass
class Named:
    loss: None
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda h: (h, "cache"),
        lambda h: [None, (h, h + 1)],
        lambda h: {"attentions": h + 1, "last_hidden_state": h},
        lambda h: {"values": h + 1, "logits": h},
        lambda h: {"pooled": h + 1, "hidden_states": (h + 2, h)},
        lambda h: Named(None, h),
        lambda h: SimpleNamespace(extra=h + 1, logits=h),
    ],
)
def test_the_representation_is_taken_from_tuples_mappings_and_output_objects(wrap: Any) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Any:
            return wrap(x * self.weight)

    x = randn(6, 3)
    assert torch.equal(features(nn.Sequential(Inner()), cut(x, 6))["0"].values, x)


def test_a_named_module_without_a_tensor_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(LayerError, match="'0' returns no tensor"):
        features(nn.Sequential(Nothing()), cut(randn(6, 3), 6), layers="0")


def test_outputs_without_numbers_or_dense_memory_are_left_out_and_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self, form: Any) -> None:
            super().__init__()
            self.form, self.scale = form, nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.form(x)

    class Net(nn.Module):
        def __init__(self, form: Any) -> None:
            super().__init__()
            self.odd, self.head = Odd(form), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.odd(x)
            return self.head(x)

    x = cut(randn(6, 3), 6)
    for form, words in (
        (lambda h: h[:, :0], r"'odd' gives \(3, 0\) for 3 samples: there are no numbers"),
        (lambda h: h.to_sparse(), "'odd' returns no tensor, or one that is sparse"),
    ):
        assert list(features(Net(form), x)) == ["head"]
        with pytest.raises(LayerError, match=words):
            features(Net(form), x, layers="odd")


def test_complex_features_are_real_and_imaginary_parts() -> None:
    class Fourier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x)

    x = randn(6, 4)
    found = features(nn.Sequential(Fourier()), cut(x, 6), layers="0")["0"].values
    assert torch.equal(found, torch.cat([torch.fft.rfft(x).real, torch.fft.rfft(x).imag], 1))


def test_half_precision_networks_give_float32_and_double_ones_float64() -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = nn.Sequential(nn.Linear(3, 2)).to(dtype)
        assert features(model, cut(randn(6, 3).to(dtype), 6))["0"].values.dtype == expected


def test_nan_in_a_layer_is_an_error_that_counts_it() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].bias[1] = torch.nan
    with pytest.raises(LayerError, match="'0': NaN or infinite in 6 of 12 activations"):
        features(model, cut(randn(6, 3), 4, 2))


def test_nan_is_handed_on_where_allowed_and_can_be_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Threshold(0, 0), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].bias[1] = torch.inf
    found = features(model, cut(randn(6, 3), 4, 2), layers="0", allow_non_finite=True)["0"].values
    assert torch.isinf(found[:, 1]).all()
    assert non_finite(found) == "NaN or infinite in 6 of 12 activations"
    assert non_finite(torch.full((2, 9), 3e38)) == ""


def test_activations_whose_sum_overflows_are_no_error() -> None:
    model = nn.Sequential(nn.Linear(1, 8, bias=False))
    nn.init.constant_(model[0].weight, 3e38)
    assert features(model, cut(torch.ones(6, 1), 6))["0"].values.isfinite().all()


# Batches


@pytest.mark.parametrize("maps", ["average", "flatten", "positions"])
def test_ragged_batches_give_what_one_batch_gives(maps: str) -> None:
    model = seeded(ResNet()).double()
    x = IMAGES.double()
    whole, split = (features(model, cut(x, *s), layers="all", maps=maps) for s in ((7,), (1, 4, 2)))
    for name in whole:
        assert torch.allclose(whole[name].values, split[name].values, atol=1e-12, rtol=0), name
        if maps == "positions" and name != "fc":
            assert torch.equal(whole[name].sample, split[name].sample)


def test_a_stream_that_can_be_walked_once_and_tells_no_size_is_enough() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    x = randn(7, 4)
    found = features(model, iter(cut(x, 4, 3)))
    assert torch.equal(found["0"].values, features(model, cut(x, 4, 3))["0"].values)


def test_blocks_say_where_they_start_and_which_samples_they_hold() -> None:
    blocks: list[Block] = []
    record(nn.Sequential(nn.Conv2d(1, 2, 3)), cut(IMAGES, 4, 3), blocks.append, maps="positions")
    assert [block.start for block in blocks] == [0, 4]
    assert torch.equal(blocks[1].sample, torch.tensor([4, 5, 6]).repeat_interleave(9))


def test_no_samples_are_an_error() -> None:
    with pytest.raises(LayerError, match="there are no samples"):
        features(nn.Linear(2, 2), [])


@pytest.mark.parametrize("wrong", [{"maps": "sum"}, {"sequences": "median"}])
def test_a_treatment_that_does_not_exist_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(LayerError, match="cannot be"):
        features(nn.Linear(2, 2), cut(randn(4, 2), 4), **wrong)


# What is left behind


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.norm(self.drop(self.linear(x))) + torch.rand(1)
        if self.calls == 4:
            raise KeyboardInterrupt
        return out


def test_the_network_and_the_random_state_are_untouched_also_after_an_interrupt() -> None:
    for batches in ([4], [4, 2]):  # the fourth call is the second batch
        model = Fails().train()
        model.norm.eval()
        model(randn(4, 4)).sum().backward()
        model.calls = 0
        modes = [module.training for module in model.modules()]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradient, random = model.linear.weight.grad, torch.get_rng_state()
        fast = torch.backends.mha.get_fastpath_enabled()
        if batches == [4, 2]:
            with pytest.raises(KeyboardInterrupt):
                features(model, cut(randn(6, 4), *batches))
        else:
            features(model, cut(randn(4, 4), *batches))
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert model.linear.weight.grad is gradient
        assert model.linear.weight.requires_grad
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_the_consumer_raises() -> None:
    def stop(block: Block) -> None:
        raise RuntimeError(block.layer)

    model = seeded(ResNet())
    with pytest.raises(RuntimeError, match="stem"):
        record(model, cut(IMAGES, 7), stop)
    assert not any(module._forward_hooks for module in model.modules())


def test_recording_inside_a_frozen_network_is_the_same() -> None:
    model = seeded(ResNet())
    with frozen_eval(model):
        inside = features(model, cut(IMAGES, 7))
    assert torch.equal(inside["fc"].values, features(model, cut(IMAGES, 7))["fc"].values)


# Hash and cut of the inputs


def test_the_hash_is_that_of_the_inputs_and_their_order_not_of_the_split_or_targets() -> None:
    x = randn(7, 4)
    hashed = input_hash(cut(x, 7))
    assert len(hashed) == 32
    assert input_hash(cut(x, 4, 3)) == input_hash([(x, None)]) == hashed
    others = [
        cut(x[torch.arange(7).flip(0)], 7),
        cut(x.double(), 7),
        cut(x.reshape(7, 2, 2), 7),
        cut(x[:6], 6),
    ]
    assert len({hashed, *map(input_hash, others)}) == 5
    zero = torch.zeros(2, 1)
    assert input_hash(cut(zero, 2)) != input_hash(cut(-zero, 2))


def test_the_hash_of_named_inputs_depends_on_the_names_and_not_on_their_order() -> None:
    a, b = randn(5, 2), randn(5, 2, seed=1)
    hashed = input_hash(cut({"a": a, "b": b}, 3, 2))
    assert hashed == input_hash(cut({"b": b, "a": a}, 5))
    assert hashed != input_hash(cut({"a": b, "b": a}, 5))
    assert input_hash([((a, b), None)]) != input_hash([((b, a), None)])


@dataclass
class Held:
    inputs: Any
    targets: Tensor
    n_total: int = 100
    move: Any = None

    @property
    def n_samples(self) -> int:
        return len(self.targets)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_recutting_gives_every_sample_once_in_batches_of_equal_size_up_to_one(
    held: bool, named: bool
) -> None:
    x = torch.arange(11)
    inputs = {"x": x[:, None]} if named else x[:, None]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    source = Held(inputs, x, move=lambda t: t.double()) if held else [
        (part, x[i : i + len(t)]) for i, (part, t) in zip((0, 4, 8), cut(inputs, 4, 4, 3), strict=True)
    ]  # fmt: skip
    parts = recut(source, 4, order)
    assert (len(parts), parts.n_samples, parts.n_total) == (3, 11, 100 if held else 11)
    found = [(part["x"] if named else part, targets) for part, targets in parts]
    assert sorted(len(part) for part, _targets in found) == [3, 4, 4]
    assert torch.equal(torch.cat([part for part, _targets in found])[:, 0].long(), order)
    assert torch.equal(torch.cat([targets for _part, targets in found]).long(), order)
    assert found[0][0].dtype == (torch.float64 if held else torch.int64)
    again = recut(parts, 11, torch.argsort(order))
    assert torch.equal(again[0][1].long(), x)


def test_recutting_refuses_sizes_and_orders_that_lose_samples() -> None:
    batches = cut(randn(6, 2), 6)
    with pytest.raises(ValueError, match="at least 1"):
        recut(batches, 0)
    with pytest.raises(ValueError, match=r"each of 0 … 5 once"):
        recut(batches, 2, [0, 1, 2, 3, 4, 4])
    with pytest.raises(LayerError, match="no samples"):
        recut([], 2)
    with pytest.raises(LayerError, match="padded to different lengths"):
        recut([(randn(2, 3), None), (randn(2, 4), None)], 2)


@pytest.mark.parametrize(
    "targets", [None, torch.tensor(1.0), ("a", "b", "c"), {"y": torch.zeros(3)}, [1, 2, 3]]
)
def test_samples_are_counted_in_the_inputs_whatever_the_targets(targets: Any) -> None:
    batches = [(randn(3, 2), targets), (randn(2, 2), targets)]
    assert n_samples_of(batches) == 5
    parts = recut(batches, 2, torch.arange(5).flip(0))
    assert (parts.n_samples, [len(inputs) for inputs, _targets in parts]) == (5, [1, 2, 2])
    assert torch.equal(
        torch.cat([inputs for inputs, _targets in parts]), torch.cat([b[0] for b in batches]).flip(0)
    )
    held = SimpleNamespace(inputs=randn(4, 2), targets=targets)
    assert recut(held, 4).n_samples == 4
    assert n_samples_of(SimpleNamespace(n_samples=9)) == 9
    assert n_samples_of([({"scale": torch.tensor(2.0), "x": randn(3, 2)}, targets)]) == 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 5)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        ([1, 2, 3], [4, 5]),
        ({"y": torch.zeros(3)}, {"z": torch.zeros(2)}),
        (torch.zeros(3), None),
    ],
)
def test_targets_that_cannot_be_joined_do_not_keep_inputs_from_being_cut_anew(
    first: Any, second: Any
) -> None:
    parts = recut([(randn(3, 2), first), (randn(2, 2), second)], 2)
    assert [(len(inputs), targets) for inputs, targets in parts] == [(1, None), (2, None), (2, None)]


def test_settings_that_differ_between_batches_are_refused_before_they_are_mixed() -> None:
    batches = [({"x": randn(2, 3), "power": power}, None) for power in (1, 2)]
    with pytest.raises(LayerError, match="different settings"):
        recut(batches, 2)


def test_inputs_that_require_gradients_are_inputs_and_sparse_or_empty_ones_are_refused() -> None:
    x = randn(6, 3)
    model = nn.Sequential(nn.Linear(3, 2))
    wanted = features(model, cut(x, 4, 2))["0"].values
    leaf = x.clone().requires_grad_()
    assert torch.equal(features(model, cut(leaf, 4, 2))["0"].values, wanted)
    assert input_hash(cut(leaf, 6)) == input_hash(cut(x, 6))
    for inputs, words in ((x.to_sparse(), "sparse or nested"), (x[:0], "holds no samples")):
        with pytest.raises(LayerError, match=words):
            features(model, [(inputs, None)])
        with pytest.raises(LayerError, match=words):
            recut([(inputs, None)], 2)
    with pytest.raises(LayerError, match="sparse or nested"):
        input_hash([(x.to_sparse(), None)])
