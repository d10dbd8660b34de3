"""What networks compute on the data: recorded once per checkpoint, remembered for every pair it stands in."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.activations import (
    Block,
    Layer,
    LayerError,
    features,
    input_hash,
    record,
    recut,
)

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("dynprobe")

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
    """The activations of one checkpoint, of a network in memory, or as they were saved.

    Args:
        label: What messages call it.
        key: Equal keys mean equal activations.
        model: Gives the network, filled; None for saved activations.
        batches: Gives the data.
        arrays: Saved activations by layer, `(n_samples, …)`; None for a network.
        input_hash: Hash of the inputs and their order, "" where it is not known.
        treatment: Of saved activations, by layer.
        sample: Of saved activations, by layer: which sample each row belongs to, where rows are not samples.
        kept: Where to look before recording, and to put what was recorded.
        facts: Labels stored beside what is kept.
    """

    def __init__(
        self,
        label: str,
        key: str,
        *,
        model: Callable[[], nn.Module] | None = None,
        batches: Callable[[], Any] = tuple,
        arrays: Mapping[str, Tensor] | None = None,
        input_hash: Callable[[], str] = str,
        treatment: Mapping[str, str] | None = None,
        sample: Mapping[str, Tensor] | None = None,
        kept: Kept | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.label = label
        self.key = key
        self.forwards = 0
        self._model = model
        self._batches = batches
        self._arrays = {n: torch.as_tensor(a) for n, a in (arrays or {}).items()}
        self._input_hash = input_hash
        self._treatment = dict(treatment or {})
        self._sample = dict(sample or {})
        self._kept = kept
        self._facts = dict(facts or {})
        self._token = next(_tokens)
        weakref.finalize(self, _memory.forget, self._token)

    def __repr__(self) -> str:
        return f"Activations({self.label!r})"

    @property
    def n_samples(self) -> int:
        """How many samples there are."""
        if self._model is None:
            name, array = next(iter(self._arrays.items()))
            return int(self._sample[name].max()) + 1 if name in self._sample else len(array)
        batches = self._batches()
        n = getattr(batches, "n_samples", 0)
        return int(n) or sum(len(targets) for _inputs, targets in batches)

    @property
    def n_total(self) -> int:
        """Number of samples of their source, of which these may be a subset."""
        return int(getattr(self._batches(), "n_total", 0)) or self.n_samples

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
        with _as_option_errors(self.label):
            if self._model is None:
                return self._saved(layers)
            name = f"{self.key} {layers} {maps} {sequences}"
            stored = self._kept.get(name) if self._kept is not None else None
            if stored is not None:
                return {layer: Layer(*entry) for layer, entry in stored.items()}
            found = features(self._model(), self._batches(), layers=layers, maps=maps, sequences=sequences)
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
        if self._model is None or self._kept is not None:
            found = self.features(layers=layers, maps=maps, sequences=sequences)
            for block in _cut(found, self.n_samples, minibatch, order):
                consume(block)
            return
        with _as_option_errors(self.label):
            batches = self._batches()
            cut = batches if order is None else recut(batches, minibatch, torch.as_tensor(order))
            record(self._model(), cut, consume, layers=layers, maps=maps, sequences=sequences)
            self.forwards += 1

    def remembered(self, name: Hashable, make: Callable[[], T], *, limit: float) -> T:
        """`make()`, once for all pairs this stands in.

        Args:
            name: Of what is made; everything that decides it.
            make: Makes it: tensors, arrays and plain values in dataclasses, dicts, lists or tuples.
            limit: Bytes that all that is remembered may take; beyond, what was longest unused goes to a
                temporary file.
        """
        return _memory.get((self._token, name), make, limit)

    def _saved(self, layers: str) -> dict[str, Layer]:
        names = list(self._arrays)
        if layers not in ("auto", "all"):
            names = _matching(names, layers)
        return {
            n: Layer(self._arrays[n].flatten(1), self._sample.get(n), self._treatment.get(n, ""))
            for n in names
        }


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
            `(model, batches)`.

    Raises:
        OptionError: It is none of these, or arrays differ in their number of samples.
    """
    if isinstance(value, Activations):
        return value
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], torch.nn.Module):
        model, batches = value
        held = batches if hasattr(batches, "n_samples") else list(batches)
        return Activations(
            type(model).__name__,
            f"memory {next(_tokens)}",
            model=lambda: model,
            batches=lambda: held,
            input_hash=lambda: input_hash(held),
        )
    arrays = dict(value) if isinstance(value, Mapping) else {"activations": value}
    try:
        tensors = {str(n): torch.as_tensor(a) for n, a in arrays.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"{type(value).__name__} holds no activations.",
            "Give an array (n_samples, n_features), a dict of arrays by layer, or (model, batches).",
        ) from error
    if not tensors or any(t.ndim < 2 for t in tensors.values()):
        raise OptionError(
            "activations need two dimensions, (n_samples, n_features).",
            "A single feature per sample is array[:, None].",
        )
    sizes = {n: len(t) for n, t in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise OptionError(
            f"layers have different numbers of samples: {sizes}.", "Every layer needs the same samples."
        )
    for name, tensor in tensors.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise OptionError(
                f"{name}: {bad} of {tensor.numel()} activations are NaN or infinite.", "Leave that layer out."
            )
    return Activations("activations", f"memory {next(_tokens)}", arrays=tensors)


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


class _Memory:
    """Values by key, the least recently used of them in temporary files once they exceed a limit."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[int, Hashable], tuple[Any, int]] = OrderedDict()
        self._spilled: dict[tuple[int, Hashable], Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self, key: tuple[int, Hashable], make: Callable[[], T], limit: float) -> T:
        if key not in self._values:
            if key in self._spilled:
                # our own file, written a moment ago: weights_only could not read dataclasses
                value = torch.load(self._spilled[key], weights_only=False)
            else:
                value = make()
            self._values[key] = value, _nbytes(value)
        self._values.move_to_end(key)
        while len(self._values) > 2 and sum(size for _value, size in self._values.values()) > limit:
            self._spill()
        found: T = self._values[key][0]
        return found

    def _spill(self) -> None:
        key, (value, size) = self._values.popitem(last=False)
        if key in self._spilled:
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dynprobe-")
            atexit.register(self._folder.cleanup)
        path = Path(self._folder.name) / f"{next(_tokens)}.pt"
        log.debug("%.0f MB of representations go to a temporary file (--memory)", size / 1e6)
        torch.save(value, path)
        self._spilled[key] = path

    def forget(self, token: int) -> None:
        for key in [k for k in self._values if k[0] == token]:
            del self._values[key]
        for key in [k for k in self._spilled if k[0] == token]:
            self._spilled.pop(key).unlink(missing_ok=True)


def _nbytes(value: Any) -> int:
    """Bytes of all tensors and arrays in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if is_dataclass(value):
        return sum(_nbytes(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, Mapping):
        return sum(_nbytes(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_nbytes(v) for v in value)
    return 0


_tokens = itertools.count()
_memory = _Memory()
