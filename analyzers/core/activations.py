"""What networks compute on the data: recorded once per checkpoint, remembered for every pair it stands in."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.core.memory import Memory
from dynprobe.analyzers.numerics import activations, layer_choice, layouts
from dynprobe.analyzers.numerics.activations import (
    HALF,
    Block,
    Layer,
    LayerError,
    features,
    input_hash,
    n_samples_of,
    record,
    recut,
)
from dynprobe.analyzers.numerics.layouts import treated

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
Consume = Callable[[Block], None]
Treated = Mapping[str, tuple[Tensor, Tensor | None, str]]


IDS = "sample_ids:"
"""How the hash begins that saved activations have of their sample ids, where they do not know the inputs."""


class Kept(Protocol):
    """Where recorded activations outlive the process; `dynprobe.io.kept_activations` has one."""

    def get(self, key: str) -> Treated | None:
        """The layers stored under a key as (values, sample, treatment), or None."""
        ...

    def put(self, key: str, layers: Treated, facts: Mapping[str, Any]) -> None:
        """Store layers under a key."""
        ...


class Activations:
    """The activations of one network on the data: nothing is computed until it is asked for.

    Args:
        label: What messages call it.
        key: Equal keys mean equal activations.
        model: Gives the network, filled with its weights.
        batches: Gives the data.
        input_hash: Hash of the inputs and their order, "" where it is not known.
        kept: Where to look before recording, and to put what was recorded.
        fresh: Not to look there.
        facts: Labels stored beside what is kept.
        again: Whether another pair will ask for it; what is made for one pair alone need not be remembered.

    Attributes:
        forwards: Forward passes over the data so far.
    """

    def __init__(
        self,
        label: str,
        key: str,
        *,
        model: Callable[[], nn.Module],
        batches: Callable[[], Any],
        input_hash: Callable[[], str] = str,
        kept: Kept | None = None,
        fresh: bool = False,
        facts: Mapping[str, Any] | None = None,
        again: Callable[[], bool] = lambda: True,
    ) -> None:
        self.label = label
        self.key = key
        self.forwards = 0
        self._model = model
        self._batches = batches
        self._input_hash = input_hash
        self._kept = kept
        self._fresh = fresh
        self._facts = dict(facts or {})
        self._again = again
        self._token = next(_tokens)
        weakref.finalize(self, _memory.forget, self._token)

    def __repr__(self) -> str:
        return f"Activations({self.label!r})"

    @cached_property
    def n_samples(self) -> int:
        """How many samples there are."""
        return n_samples_of(self._batches())

    @property
    def n_total(self) -> int:
        """Number of samples of their source, of which these may be a subset."""
        return int(getattr(self._batches(), "n_total", 0)) or self.n_samples

    @property
    def again(self) -> bool:
        """Whether another pair will ask for it."""
        return self._again()

    @property
    def input_hash(self) -> str:
        """Hash of the inputs and their order; "" where saved activations do not say."""
        return self._input_hash()

    def features(
        self, *, layers: str = "auto", maps: str = "flatten", sequences: str = "mean"
    ) -> dict[str, Layer]:
        """Every chosen layer as a matrix, from one forward pass over the data; not kept in memory.

        Args:
            layers: `auto`, `all`, or names and globs separated by commas.
            maps: What becomes of convolutional maps: average, flatten, positions.
            sequences: What becomes of sequences: last, mean, first, flatten, per-step, token.

        Raises:
            OptionError: A layer does not exist, never ran, or cannot be treated so.
        """
        name = f"{self.key} {_code()} {layers} {maps} {sequences}"
        stored = self._kept.get(name) if self._kept is not None and not self._fresh else None
        if stored is not None:
            return {layer: Layer(*entry) for layer, entry in stored.items()}
        with _as_option_errors(self.label):
            found = features(
                self._model(),
                self._batches(),
                layers=layers,
                maps=maps,
                sequences=sequences,
                allow_non_finite=True,
            )
        self.forwards += 1
        if self._kept is not None:
            facts = {**self._facts, "input_hash": self.input_hash}
            self._kept.put(name, {n: (e.values, e.sample, e.treatment) for n, e in found.items()}, facts)
        return found

    def stream(
        self,
        consume: Consume,
        *,
        layers: str = "auto",
        maps: str = "flatten",
        sequences: str = "mean",
        minibatch: int = 0,
        seed: int = 0,
    ) -> None:
        """Hand every block of every chosen layer to `consume`, keeping none.

        Args:
            consume: Called inside the forward pass; what it keeps it has to copy.
            layers: As for `features`.
            maps: As for `features`.
            sequences: As for `features`.
            minibatch: Samples per block, drawn without replacement, sizes equal up to one; 0 for the data's
                own batches in their order.
            seed: Of that draw.

        Raises:
            OptionError: As `features`.
        """
        order = np.random.default_rng(seed).permutation(self.n_samples) if minibatch else None
        if self._holds_features:
            found = self.features(layers=layers, maps=maps, sequences=sequences)
            for block in _cut(found, self.n_samples, minibatch, order):
                consume(block)
            return
        with _as_option_errors(self.label):
            batches = self._batches()
            cut = batches if order is None else recut(batches, minibatch, torch.as_tensor(order))
            record(
                self._model(),
                cut,
                consume,
                layers=layers,
                maps=maps,
                sequences=sequences,
                allow_non_finite=True,
            )
        self.forwards += 1

    @property
    def _holds_features(self) -> bool:
        """Whether blocks are cut from whole matrices."""
        return self._kept is not None

    def remembered(self, name: Hashable, make: Callable[[], T], *, limit: float) -> T:
        """`make()`, once for all pairs this stands in.

        Args:
            name: Of what is made; everything that decides it.
            make: Makes it: tensors, arrays and plain values in dataclasses, dicts, lists or tuples.
            limit: Bytes that all that is remembered may take; beyond, what was longest unused goes to a
                temporary file.
        """
        return _memory.get((self._token, name), make, limit)


class Held(Protocol):
    """Saved activations as they were read."""

    state: Mapping[str, Tensor]
    """Layers, `(n_samples, …)`, or `(n_rows, …)` where `sample` has the layer."""
    treatment: Mapping[str, str]
    """What was made of maps and sequences, by layer, as far as it is known."""
    sample: Mapping[str, Tensor]
    """Which sample each row belongs to, by layer, where rows are not samples."""
    input_hash: str
    """Of the inputs and their order, "" where it is not known."""


class SavedArrays(Activations):
    """Activations that were saved, in place of a network.

    Args:
        label: What messages call it.
        key: Equal keys mean equal activations.
        held: Gives them; asked again whenever they are needed, so that they need not stay in memory.
        device: Where computations are to run.
        dtype: At least this precision.
        again: Whether another pair will ask for it.
    """

    def __init__(
        self,
        label: str,
        key: str,
        held: Callable[[], Held],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        again: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(label, key, model=_no_network, batches=_no_network, again=again)
        self._held, self._device, self._dtype = held, device, dtype

    @cached_property
    def n_samples(self) -> int:
        """How many samples there are."""
        held = self._held()
        name, array = next(iter(held.state.items()))
        return int(held.sample[name].max()) + 1 if name in held.sample else len(array)

    @property
    def n_total(self) -> int:
        """As many as there are: nothing is known of others."""
        return self.n_samples

    @cached_property
    def input_hash(self) -> str:
        """Hash of the inputs and their order; "" where the file does not say."""
        return str(self._held().input_hash)

    def features(
        self, *, layers: str = "auto", maps: str = "flatten", sequences: str = "mean"
    ) -> dict[str, Layer]:
        """The chosen layers as matrices; arrays of more than two dimensions are treated as recorded ones are.

        Args:
            layers: `auto` and `all` are the same here; or names and globs separated by commas.
            maps: What becomes of arrays (n_samples, channels, height, width).
            sequences: What becomes of arrays (n_samples, steps, features).

        Raises:
            OptionError: A layer does not exist, or cannot be treated so.
        """
        held = self._held()
        with _as_option_errors(self.label):
            names = list(held.state)
            if layers not in ("auto", "all"):
                names = _matching(names, layers)
            return {name: self._layer(held, name, maps, sequences) for name in names}

    def _layer(self, held: Held, name: str, maps: str, sequences: str) -> Layer:
        values = held.state[name]
        half = next((text for text, dtype in HALF.items() if values.dtype == dtype), "")
        values = values.to(self._device, torch.promote_types(values.dtype, self._dtype))
        if name in held.sample:
            return Layer(values, held.sample[name].to(self._device), held.treatment.get(name, ""))
        matrix, sample, treatment = treated(values, maps=maps, sequences=sequences)
        words = (held.treatment.get(name, "") or treatment, half)
        return Layer(matrix, sample, ", ".join(word for word in words if word))

    @property
    def _holds_features(self) -> bool:
        return True


def _no_network() -> Any:
    raise TypeError("saved activations come without a network")


@cache
def _code() -> str:
    """Hash of what decides how a network is recorded."""
    digest = hashlib.blake2b(digest_size=8)
    for module in (activations, layer_choice, layouts):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _matching(names: Sequence[str], text: str) -> list[str]:
    """Names that the globs choose.

    Raises:
        LayerError: A glob chooses none.
    """
    from fnmatch import fnmatchcase

    globs = text.replace(",", " ").split()
    for pattern in globs:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise LayerError(f"no layer is called {pattern!r}.", f"There are {', '.join(names[:30])}.")
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in globs)]


def _cut(found: Mapping[str, Layer], n_samples: int, size: int, order: np.ndarray | None) -> Iterator[Block]:
    """Recorded layers again as the blocks in which a network would have given them."""
    if order is None:
        for name, layer in found.items():
            yield Block(name, 0, layer.values, layer.sample, layer.treatment)
        return
    count = -(-n_samples // size)
    bounds = [part * n_samples // count for part in range(count + 1)]  # as `recut` cuts
    for start, stop in itertools.pairwise(bounds):
        part = order[start:stop]
        for name, layer in found.items():
            if layer.sample is None:
                rows, sample = torch.as_tensor(part, device=layer.values.device), None
            else:
                device = layer.values.device
                place = torch.full((n_samples,), -1, device=device)
                place[torch.as_tensor(part, device=device)] = torch.arange(len(part), device=device)
                where = place[layer.sample]
                rows = torch.argsort(where, stable=True)[int((where < 0).sum()) :]
                sample = where[rows] + start
            yield Block(name, start, layer.values[rows], sample, layer.treatment)


@contextlib.contextmanager
def _as_option_errors(label: str) -> Iterator[None]:
    """What is wrong with a layer becomes a message for the user, with the checkpoint's name."""
    try:
        yield
    except LayerError as error:
        raise OptionError(f"{label}: {error.message}", error.tip) from error


def as_activations(value: Any) -> Activations:
    """Activations of what a notebook has at hand.

    Args:
        value: Activations; an array `(n_samples, n_features)`; a dict of arrays by layer; or a pair
            `(model, data)`, the data being inputs in one tensor, or batches: `(inputs, targets)`, or inputs
            alone (a tensor, or a dict as Hugging Face models take).

    Raises:
        OptionError: It is none of these, or arrays differ in their number of samples.
    """
    if isinstance(value, Activations):
        return value
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], torch.nn.Module):
        model, held = value[0], _batches(value[1])
        return Activations(
            type(model).__name__,
            f"memory {next(_tokens)}",
            model=lambda: model,
            batches=lambda: held,
            input_hash=lambda: input_hash(held),
        )
    if isinstance(value, list | tuple):
        raise OptionError(
            f"a {type(value).__name__} of {len(value)} is no activations.",
            "Give an array (n_samples, n_features), a dict of arrays by layer, or (model, batches).",
        )
    arrays = value if isinstance(value, Mapping) else {"activations": value}
    tensors = {str(name): _tensor(str(name), array) for name, array in arrays.items()}
    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1:
        raise OptionError(
            f"layers have different numbers of samples: {sizes}." if sizes else "there is no layer.",
            "Every layer needs the same samples.",
        )
    held_arrays = _Arrays(tensors)
    return SavedArrays("activations", f"memory {next(_tokens)}", lambda: held_arrays)


@dataclass
class _Arrays:
    """Arrays of a notebook, of which nothing else is known."""

    state: Mapping[str, Tensor]
    treatment: Mapping[str, str] = field(default_factory=dict)
    sample: Mapping[str, Tensor] = field(default_factory=dict)
    input_hash: str = ""


def _batches(data: Any) -> Any:
    """Data as something that gives (inputs, targets) any number of times."""
    if hasattr(data, "n_samples"):
        return data
    if isinstance(data, Tensor):
        return [(data, None)]
    return [part if _is_pair(part) else (part, None) for part in data]


def _is_pair(part: Any) -> bool:
    """Whether a batch is inputs with targets, and not inputs alone."""
    return isinstance(part, tuple | list) and len(part) == 2


def _tensor(name: str, array: Any) -> Tensor:
    """An array as a tensor of floats.

    Raises:
        OptionError: It is no array (n_samples, n_features, …) of finite real numbers.
    """
    try:
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(_native(np.asarray(array)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"{name}: {type(array).__name__} holds no activations.",
            "Give an array (n_samples, n_features), a dict of arrays by layer, or (model, batches).",
        ) from error
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        raise OptionError(f"{name} is complex.", "Give real and imaginary parts side by side.")
    if tensor.ndim < 2 or not tensor.numel():
        raise OptionError(
            f"{name} has the shape {tuple(tensor.shape)}; activations are (n_samples, n_features).",
            "A single feature per sample is array[:, None].",
        )
    if not tensor.is_floating_point():
        tensor = tensor.double()
    if not all(end.isfinite() for end in torch.aminmax(tensor)):  # takes no memory beside the tensor
        bad = int((~tensor.isfinite()).sum())
        raise OptionError(
            f"{name}: {bad} of {tensor.numel()} activations are NaN or infinite.", "Leave that layer out."
        )
    return tensor


def _native(array: np.ndarray) -> np.ndarray:
    """In the byte order and a type that torch knows, without negative strides."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def check_comparable(a: Activations, b: Activations) -> list[str]:
    """Raises unless both were computed on the same inputs; returns what could not be verified.

    Raises:
        OptionError: The inputs differ, in number, content or order.
    """
    if a is b or a.key == b.key:
        return []
    if a.n_samples != b.n_samples:
        raise OptionError(
            f"{a.label} has {a.n_samples:,} samples and {b.label} {b.n_samples:,}: "
            "representations can be compared only on the same inputs.",
            "Give both the same --data and --samples; saved activations with samples along columns need "
            "--transpose.",
        )
    known = a.input_hash, b.input_hash
    comparable = all(known) and known[0].startswith(IDS) == known[1].startswith(IDS)
    if comparable and known[0] != known[1]:
        raise OptionError(
            f"{a.label} and {b.label} are given different inputs, or the same in another order.",
            "Name one data set for all runs: --data NAME (with --data-arg). Targets may differ.",
        )
    if not comparable:
        return ["saved activations do not say on which inputs: row i is taken for the same sample everywhere"]
    return []


_tokens = itertools.count()
_memory = Memory()
