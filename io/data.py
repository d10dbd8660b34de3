"""Data sets in memory, in fixed order: read once, checked, hashed, cut into batches.

Sources: `sklearn:NAME`, a `.npz`, `.safetensors`, `.h5`, `.pt` or `.csv` file, or `package.module:callable`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.code import names_code, resolve_callable
from dynprobe.io.data_names import Named, check_named
from dynprobe.io.errors import UnusableData
from dynprobe.io.hashing import content_hash
from dynprobe.io.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

# Whole data sets move to a GPU at once only if they take less than this part of its free memory.
_GPU_SHARE = 0.25


@dataclass
class Samples(Named):
    """What a source yields, before it is checked.

    Args:
        inputs: A tensor, or a tuple or dict of tensors, with the sample as first dimension.
        targets: One target per sample.
        n_total: Number of samples of the source.
        chosen: Whether the requested subset was taken already.
    """

    inputs: Inputs
    targets: Tensor
    n_total: int
    chosen: bool = False


@dataclass
class Dataset(Named):
    """Data in memory, on the CPU, in the order of its source.

    Args:
        inputs: A tensor, or a tuple or dict of tensors, with `n_samples` as first dimension.
        targets: One target per sample; class labels are int64.
        n_total: Number of samples of the source, of which these are a subset.
        source: Where it comes from, for people.
    """

    inputs: Inputs
    targets: Tensor
    n_total: int
    source: str

    @property
    def n_samples(self) -> int:
        """Number of samples held."""
        return len(self.targets)

    @cached_property
    def hash(self) -> str:
        """Content hash over names, dtypes, shapes and bytes of the tensors used, not over feature names."""
        return content_hash(dict(named_tensors(self.inputs, self.targets)))

    def batches(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> Batches:
        """Cut into batches of `batch_size` in fixed order; the last one may be smaller.

        Args:
            batch_size: Samples per batch, at least 1.
            device: Where the batches are.
            dtype: Of floating-point inputs and targets; token ids and class labels stay integers.

        Raises:
            UnusableData: `batch_size` is less than 1.
        """
        import torch

        if batch_size < 1:
            raise UnusableData(f"--batch-size {batch_size} must be at least 1.")

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        place = torch.device(device)
        if _fits(place, named_tensors(self.inputs, self.targets)):
            inputs, targets, each_time = each(self.inputs, move), move(self.targets), None
        else:
            inputs, targets, each_time = self.inputs, self.targets, move
        return Batches(inputs, targets, batch_size, place, self.n_total, each_time, **self.names())


@dataclass
class Batches(Named):
    """Batches `(inputs, targets)` in fixed order; sized, and can be walked any number of times.

    `n_total` is the number of samples of the source, of which these may be a subset.
    """

    inputs: Inputs
    targets: Tensor
    batch_size: int
    device: torch.device
    n_total: int
    move: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    @property
    def n_samples(self) -> int:
        """Number of samples in all batches together."""
        return len(self.targets)

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        for start in range(0, self.n_samples, self.batch_size):
            cut = partial(_rows, start=start, stop=start + self.batch_size)
            inputs, targets = each(self.inputs, cut), cut(self.targets)
            yield (each(inputs, self.move), self.move(targets)) if self.move else (inputs, targets)


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def load_data(spec: Spec, *, trust: bool = False, samples: int | None = None, seed: int = 0) -> Dataset:
    """Read a data set.

    Args:
        spec: Its source and arguments.
        trust: Whether code that a manifest names may run.
        samples: Keep this many samples, drawn without replacement and kept in the source's order; all of them
            if there are no more, or if None.
        seed: Of that draw, which has a generator of its own.

    Returns:
        The data in memory.

    Raises:
        UnusableData: The source is unknown or unreadable, empty, has NaN, inputs and targets differ in
            length, or names of features or classes are not those of the data.
        UntrustedCode: A manifest names code and `trust` is off; nothing was run.
    """
    if samples is not None and samples < 1:
        raise UnusableData(f"--samples {samples} must be at least 1.")

    def choose(n_total: int) -> Tensor | None:
        return _subset(n_total, samples, seed)

    source = _describe(spec)
    found = _read(spec, trust, choose)
    _check_lengths(found, source)
    rows = None if found.chosen else choose(len(found.targets))
    if rows is not None:
        found.inputs, found.targets = each(found.inputs, lambda t: t[rows]), found.targets[rows]
    inputs, targets = each(found.inputs, _numeric), _numeric_targets(found.targets)
    _check_finite(inputs, targets, source)
    check_named(found, inputs, targets, source)
    return Dataset(inputs, targets, found.n_total, source, **found.names())


def _read(spec: Spec, trust: bool, choose: Callable[[int], Tensor | None]) -> Samples:
    """Ask the reader that the name belongs to."""
    scheme, colon, name = spec.name.partition(":")
    if colon and scheme == "sklearn":
        from dynprobe.io.data_sklearn import read_sklearn

        return read_sklearn(name, spec.args)
    if names_code(spec.name):
        from dynprobe.io.data_code import materialise

        return materialise(resolve_callable(spec, trust=trust), spec, choose)
    from dynprobe.io.data_files import read_file

    return read_file(Path(spec.name), spec.args)


def _describe(spec: Spec) -> str:
    """`digits.npz (split=train)`: the file without its folder, so that it is the same on every machine."""
    name = Path(spec.name).name if "/" in spec.name else spec.name
    args = ", ".join(f"{key}={value}" for key, value in spec.args.items())
    return f"{name} ({args})" if args else name


def _subset(n_total: int, samples: int | None, seed: int) -> Tensor | None:
    """Indices of a seeded subset in increasing order, or None for all."""
    import torch

    if samples is None or samples >= n_total:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n_total, generator=generator)[:samples].sort().values


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply `change` to the tensor, or to each one of a tuple or dict."""
    if isinstance(inputs, dict):
        return {name: change(tensor) for name, tensor in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(change(tensor) for tensor in inputs)
    return change(inputs)


def named_tensors(inputs: Inputs, targets: Tensor) -> list[tuple[str, Tensor]]:
    """All tensors of a data set, with names for messages and hashes."""
    if isinstance(inputs, dict):
        pairs: list[tuple[str, Any]] = [(f"input {name}", inputs[name]) for name in sorted(inputs)]
    elif isinstance(inputs, tuple):
        pairs = [(f"input {i}", tensor) for i, tensor in enumerate(inputs)]
    else:
        pairs = [("inputs", inputs)]
    return [*pairs, ("targets", targets)]


def _numeric(tensor: Tensor) -> Tensor:
    """Bytes are pixels, never token ids: networks need them as numbers with a fraction."""
    import torch

    return tensor.float() if tensor.dtype in (torch.uint8, torch.bool) else tensor


def _numeric_targets(targets: Tensor) -> Tensor:
    return targets if targets.is_floating_point() else targets.long()


def _check_lengths(found: Samples, source: str) -> None:
    tensors = named_tensors(found.inputs, found.targets)
    lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors}
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise UnusableData(f"{source}: inputs and targets differ in number of samples ({text}).")
    if not lengths["targets"]:
        raise UnusableData(f"{source}: has no samples.")


def _check_finite(inputs: Inputs, targets: Tensor, source: str) -> None:
    for name, tensor in named_tensors(inputs, targets):
        if not tensor.is_floating_point():
            continue
        bad = ~tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else ~tensor.isfinite()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise UnusableData(
                f"{source}: {name} of {int(bad.sum())} samples are NaN or infinite (first: sample {first}).",
                "Remove those samples, or fill their missing values.",
            )


def _fits(device: torch.device, tensors: list[tuple[str, Tensor]]) -> bool:
    """Whether all of the data may live on the device for the whole analysis."""
    import torch

    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(tensor.nbytes for _, tensor in tensors) < _GPU_SHARE * free
