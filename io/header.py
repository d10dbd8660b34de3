"""What is known of a checkpoint before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dynprobe.io.tensor_refs import TensorRef

if TYPE_CHECKING:
    import torch


class TensorInfo(NamedTuple):
    """Shape and dtype of one named tensor."""

    shape: tuple[int, ...]
    dtype: str


class Count(NamedTuple):
    """A place on the training axis that a checkpoint claims for itself, and where it says so.

    Attributes:
        value: The number.
        unit: "step" or "epoch"; "number" where a file name has a bare number.
        source: E.g. "in-file global_step".
    """

    value: int | float
    unit: str
    source: str


@dataclass
class Header:
    """Names, shapes and facts of one checkpoint.

    Attributes:
        format: The reader's name.
        tensors: Name → (shape, dtype) of the state that `load` would return. Not to be changed: checkpoints
            of one run share it.
        n_parameters: Number of trainable elements as far as names tell: floating-point tensors without
            BatchNorm's running statistics, tied tensors once.
        metadata: Plain facts beside the weights ("epoch", "args.lr", …).
        counts: Every claim of a step or epoch in the file, the most trustworthy first.
        notes: What was chosen, stripped or skipped.
    """

    format: str
    tensors: Mapping[str, TensorInfo]
    n_parameters: int
    metadata: dict[str, str | int | float | bool] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        """The floating-point dtypes of the weights, e.g. "float32" or "bfloat16+float32"."""
        kinds = {info.dtype for info in self.tensors.values()}
        floating = {kind for kind in kinds if kind.startswith(("float", "bfloat", "complex"))}
        return "+".join(sorted(floating or kinds))


class OpenedCheckpoint(Protocol):
    """A checkpoint whose header has been read; what every reader's `open` returns."""

    header: Header

    def load(self) -> dict[str, torch.Tensor]:
        """Read the weights: name → CPU tensor, the names those of `header.tensors`."""
        ...


def count_parameters(tensors: Mapping[str, TensorInfo], refs: Mapping[str, TensorRef] | None = None) -> int:
    """Count trainable elements: floating point, without running statistics, tied tensors once.

    Args:
        tensors: Name → (shape, dtype).
        refs: Where the bytes lie, if known; tensors at the same place are one parameter.
    """
    seen: set[object] = set()
    total = 0
    for name, info in tensors.items():
        if not info.dtype.startswith(("float", "bfloat", "complex")):
            continue
        if name.endswith(("running_mean", "running_var")):
            continue
        if refs is not None and refs[name].storage is not None:
            if refs[name].place in seen:
                continue
            seen.add(refs[name].place)
        size = 1
        for length in info.shape:
            size *= length
        total += size
    return total
