"""What a checkpoint's layers compute: recorded once, remembered for all pairs, never of different inputs."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.core import activations as module
from dynprobe.analyzers.core import registry
from dynprobe.analyzers.core.activations import Activations, SavedArrays, as_activations, check_comparable
from dynprobe.analyzers.core.memory import Memory
from dynprobe.io.kept_activations import KeptActivations

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(11, 1, 4, 4, generator=GENERATOR)
NET = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)).eval()


def batches(*sizes, inputs=IMAGES):
    return [(part, torch.zeros(len(part))) for part in inputs.split(list(sizes))]


def recorded(*, kept=None, split=(8, 3)):
    held = batches(*split)
    return Activations(
        "net", "key", model=lambda: NET, batches=lambda: held, input_hash=lambda: "some inputs", kept=kept
    )


def streamed(activations, **options) -> dict[str, Tensor]:
    """All blocks of every layer, one under the other."""
    parts: dict[str, list[Tensor]] = {}
    activations.stream(lambda b: parts.setdefault(b.layer, []).append(b.values.clone()), **options)
    return {name: torch.cat(values) for name, values in parts.items()}


def test_streamed_blocks_are_the_recorded_features():
    activations = recorded()
    for name, values in streamed(activations).items():
        torch.testing.assert_close(values, activations.features()[name].values)
    assert activations.forwards == 3


def test_minibatches_are_a_seeded_permutation_of_the_samples_whatever_the_batches():
    order = torch.as_tensor(np.random.default_rng(5).permutation(11))
    for activations in (recorded(), recorded(split=(11,))):
        for name, values in streamed(activations, minibatch=4, seed=5).items():
            torch.testing.assert_close(values, activations.features()[name].values[order])


def test_minibatches_of_positions_keep_the_rows_of_a_sample_together(tmp_path):
    """The same from a network and from what was kept of it, though rows are not samples."""
    blocks = {}
    for name, kept in (("network", None), ("kept", KeptActivations(tmp_path))):
        found = blocks.setdefault(name, [])
        activations = recorded(kept=kept)
        activations.stream(
            lambda b, found=found: found.append((b.layer, b.start, b.values.clone(), b.sample)),
            maps="positions",
            minibatch=4,
        )
    for ours, theirs in zip(blocks["network"], blocks["kept"], strict=True):
        assert ours[:2] == theirs[:2]
        torch.testing.assert_close(ours[2], theirs[2])
        assert (ours[3] is None) == (theirs[3] is None)
        if ours[3] is not None:
            assert ours[3].tolist() == theirs[3].tolist()


def test_what_was_kept_is_not_recorded_again(tmp_path):
    first = recorded(kept=KeptActivations(tmp_path))
    before = first.features()
    again = recorded(kept=KeptActivations(tmp_path))
    after = again.features()
    assert (first.forwards, again.forwards) == (1, 0)
    assert list(before) == list(after)
    assert all(torch.equal(before[n].values, after[n].values) for n in before)
    assert recorded(kept=KeptActivations(tmp_path)).features(layers="3").keys() == {"3"}


@dataclass
class Made:
    values: Tensor
    name: str


def test_what_is_remembered_is_made_once():
    activations = recorded()
    made = []

    def make():
        made.append(1)
        return Made(torch.ones(3), "x")

    assert [activations.remembered("a", make, limit=1e9).name for _ in range(3)] == ["x"] * 3
    assert len(made) == 1


def test_beyond_the_limit_it_is_remembered_in_files_that_go_with_the_activations(monkeypatch):
    memory = Memory()
    monkeypatch.setattr(module, "_memory", memory)
    networks = [recorded() for _ in range(4)]
    made = []
    for _ in range(2):
        for i, activations in enumerate(networks):

            def make(i=i):
                made.append(i)
                return Made(torch.full((1000,), float(i)), "")

            assert activations.remembered("a", make, limit=9000).values[0] == i
    assert made == [0, 1, 2, 3]
    assert len(memory._values) == 2
    files = list(Path(memory._folder.name).iterdir())
    assert files
    del networks, activations, make
    gc.collect()
    assert not list(Path(memory._folder.name).iterdir())
    memory._folder.cleanup()


def test_two_networks_of_one_name_are_not_taken_for_each_other():
    a, b = (as_activations((NET, batches(11))) for _ in range(2))
    assert a.key != b.key
    assert a.remembered("x", lambda: 1, limit=1e9) == 1
    assert b.remembered("x", lambda: 2, limit=1e9) == 2


def test_the_same_inputs_are_comparable_and_others_are_not():
    a, b = as_activations((NET, batches(8, 3))), as_activations((NET, batches(11)))
    assert check_comparable(a, b) == []
    other = as_activations((NET, batches(11, inputs=IMAGES.flip(0))))
    with pytest.raises(OptionError, match="different inputs, or the same in another order"):
        check_comparable(a, other)


def test_different_numbers_of_samples_are_said_to_be_so():
    with pytest.raises(OptionError, match="has 11 samples and activations 7") as error:
        check_comparable(as_activations((NET, batches(11))), as_activations(torch.ones(7, 2)))
    assert "--transpose" in error.value.tip


def test_arrays_are_comparable_with_a_word_of_doubt():
    a, b = as_activations(np.ones((5, 2))), as_activations({"x": np.ones((5, 3))})
    assert "do not say on which inputs" in check_comparable(a, b)[0]
    assert check_comparable(a, a) == []


def test_hashes_of_sample_ids_and_of_inputs_cannot_be_compared():
    def known(text):
        held = module._Arrays({"x": torch.ones(3, 2)}, input_hash=text)
        return SavedArrays(text, text, lambda: held)

    assert check_comparable(known("sample_ids:1"), known("abc"))
    with pytest.raises(OptionError, match="different inputs"):
        check_comparable(known("sample_ids:1"), known("sample_ids:2"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "object holds no activations"),
        (np.ones(3), "has the shape .3,."),
        (np.ones((50, 0)), "has the shape .50, 0."),
        (np.ones((3, 2)) * 1j, "is complex"),
        ((np.ones((3, 2)), np.ones((3, 2))), "a tuple of 2 is no activations"),
        ({}, "there is no layer"),
        ({"a": np.ones((3, 2)), "b": np.ones((4, 2))}, "different numbers of samples"),
        ({"a": np.array([[1.0, np.nan]])}, "a: 1 of 2 activations are NaN"),
    ],
)
def test_what_is_no_activations_is_refused_with_a_reason(value, message):
    with pytest.raises(OptionError, match=message) as error:
        as_activations(value)
    assert error.value.tip


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(3, 2)[::-1],
        np.arange(6.0).reshape(3, 2).astype(">f8"),
        np.arange(6.0).reshape(3, 2).astype(np.longdouble),
        np.arange(6).reshape(3, 2),
        np.arange(6).reshape(3, 2) > 2,
        torch.arange(6.0).reshape(3, 2).requires_grad_(),
        torch.arange(6.0).reshape(3, 2).to_sparse(),
    ],
    ids=["reversed", "big-endian", "longdouble", "integers", "booleans", "requires grad", "sparse"],
)
def test_arrays_of_every_make_are_taken(array):
    values = as_activations(array).features()["activations"].values
    assert values.is_floating_point()
    assert not values.requires_grad
    expected = array.detach().to_dense().numpy() if isinstance(array, Tensor) else array
    np.testing.assert_allclose(values.numpy(), np.asarray(expected, dtype=float))


@pytest.mark.parametrize(
    "data",
    [
        IMAGES,
        [IMAGES[:8], IMAGES[8:]],
        [(IMAGES[:8], None), (IMAGES[8:], None)],
        [(IMAGES[:8], torch.tensor(0)), (IMAGES[8:], torch.tensor(0))],
        [(IMAGES[:8], (torch.zeros(8), torch.zeros(8))), (IMAGES[8:], (torch.zeros(3), torch.zeros(3)))],
    ],
    ids=["one tensor", "inputs alone", "no targets", "targets without samples", "several targets"],
)
def test_data_of_every_make_are_taken(data):
    activations = as_activations((NET, data))
    assert activations.n_samples == 11
    expected = as_activations((NET, batches(11))).features()
    for name, layer in activations.features().items():
        torch.testing.assert_close(layer.values, expected[name].values)


def test_layers_of_arrays_are_chosen_by_name_and_glob():
    arrays = as_activations({"a1": np.ones((3, 2)), "a2": np.ones((3, 2)), "b": np.ones((3, 2))})
    assert list(arrays.features(layers="a*")) == ["a1", "a2"]
    with pytest.raises(OptionError, match="no layer is called 'c'"):
        arrays.features(layers="b,c")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_remembered(dtype):
    """Which directions are rounding depends on the type the network computed in."""
    layer = as_activations(torch.ones(4, 2, dtype=dtype)).features()["activations"]
    assert layer.values.dtype == torch.float32
    assert layer.eps == torch.finfo(dtype).eps
    net = nn.Linear(3, 2).to(dtype)
    recorded = as_activations((net, [(torch.ones(4, 3, dtype=dtype), None)])).features()
    assert [layer.eps for layer in recorded.values()] == [torch.finfo(dtype).eps]
    assert as_activations(torch.ones(4, 2)).features()["activations"].eps == 0


class Logarithm(nn.Module):
    """A layer whose output is not a number for some samples, and is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.log, self.last = nn.Linear(4, 5), nn.Sequential(nn.LogSigmoid()), nn.Linear(5, 3)
        self.log.register_forward_hook(lambda _module, _inputs, output: (output * 1e30).log())

    def forward(self, x: Tensor) -> Tensor:
        self.log(self.first(x))
        return self.last(self.first(x))


@pytest.mark.parametrize("analyzer", ["cka", "cca", "rsa"])
def test_a_layer_that_is_not_a_number_is_named_and_the_others_are_compared(analyzer):
    net, data = Logarithm(), [(torch.randn(60, 4, generator=GENERATOR), None)]
    function = registry.load(analyzer).function
    found = function((net, data), (net, data), layers="first,log,last")
    value = found[{"cka": "cka", "cca": "pwcca", "rsa": "similarity"}[analyzer]]
    place = list(found["layer_a"]).index("log")
    assert np.isnan(value[place]).all()
    assert np.isfinite(np.delete(np.delete(value, place, 0), place, 1)).all()
    assert any("log" in note and "NaN" in note for note in found.notes)
