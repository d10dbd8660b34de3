"""From what a module returns to a matrix of samples by features: which dimension is which, and treatments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Maps = Literal["average", "flatten", "positions"]
Sequences = Literal["last", "mean", "first", "flatten", "per-step", "token"]
Channels = Literal["first", "last"]
Side = Literal["inputs", "decoder", "unknown"]

_PADDING_MASKS = ("padding_mask", "key_padding_mask", "src_key_padding_mask")
_MASKS: dict[Side, tuple[str, ...]] = {
    "inputs": ("attention_mask", "mask", *_PADDING_MASKS),
    "decoder": ("decoder_attention_mask",),
}
_PREFERRED = ("last_hidden_state", "logits", "hidden_states")
_CHANNELS_FIRST = re.compile(
    r"[123]d$|Conv(?!1D)|BatchNorm$|^GroupNorm$|^LocalResponseNorm$|^Upsample$|^Pixel"
)
_CHANNELS_LAST = re.compile(
    r"Linear|LayerNorm|RMSNorm|Embedding|RNN|LSTM|GRU|Recurrent|Attention|Transformer|^Conv1D$"
)


class LayerError(ValueError):
    """A layer that does not exist, never ran, or does not give one row of numbers per sample.

    Args:
        message: What is wrong, in the user's words.
        tip: What to do about it.
    """

    def __init__(self, message: str, tip: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.tip = tip


class Output(NamedTuple):
    """The tensor taken from what a module returned, and which steps of each sample are no padding."""

    tensor: Tensor
    keep: Tensor | None = None  # (n, T) bool; None: the output does not say
    packed: bool = False  # padded here to (n, T, H), whatever the module's `batch_first`


def take(output: Any) -> Output | None:
    """The tensor that stands for a module's output, None where it has none.

    Of a mapping, dataclass or Hugging Face output `last_hidden_state`, `logits` or the last of
    `hidden_states`; else the first tensor, depth first. A packed sequence is padded.
    """
    if isinstance(output, PackedSequence):
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        keep = torch.arange(padded.shape[1]) < lengths[:, None]
        return Output(padded, None if bool(keep.all()) else keep.to(padded.device), packed=True)
    if isinstance(output, Tensor):
        return Output(output)
    return next((found for entry in _entries(output) if (found := take(entry)) is not None), None)


def _entries(output: Any) -> list[Any]:
    if isinstance(output, tuple | list):
        return list(output)
    if isinstance(output, Mapping):
        named = dict(output)
    elif is_dataclass(output):
        named = {field.name: getattr(output, field.name) for field in fields(output)}
    else:
        named = dict(getattr(output, "__dict__", {})) if any(hasattr(output, n) for n in _PREFERRED) else {}
    states = named.get("hidden_states")
    if isinstance(states, tuple | list) and states:
        named["hidden_states"] = states[-1]
    return [named[name] for name in _PREFERRED if name in named] + list(named.values())


def padding_masks(inputs: Any, n: int) -> dict[Side, Tensor]:
    """Which steps of each sample are no padding, `(n, T)` bool, from the masks among named inputs.

    `attention_mask` and `mask` mark the steps to keep, `padding_mask`, `key_padding_mask` and
    `src_key_padding_mask` those to leave out, `decoder_attention_mask` the decoder's steps to keep. A side
    without a mask is left out.

    Raises:
        LayerError: A sample has no step to keep.
    """
    if not isinstance(inputs, Mapping):
        return {}
    found = {side: _padding_mask(inputs, n, names) for side, names in _MASKS.items()}
    return {side: keep for side, keep in found.items() if keep is not None}


def _padding_mask(inputs: Mapping[str, Any], n: int, names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        mask = inputs.get(name)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != n:
            continue
        keep = mask == 0 if name in _PADDING_MASKS else mask != 0
        if empty := int((~keep.any(1)).sum()):
            raise LayerError(
                f"`{name}` leaves no step of {empty} of {n} samples.", "Leave those samples out of the data."
            )
        return keep
    return None


@dataclass(frozen=True)
class Layout:
    """What the dimensions of a layer's output mean.

    Attributes:
        ndim: How many there are.
        sample_dim: Which one is the sample.
        kind: `rows`: (n,) or (n, d). `maps`: (n, C, *space). `sequence`: (n, T, H) or (T, n, H).
        channels_last: Of maps: (n, *space, C).
    """

    ndim: int
    sample_dim: int = 0
    kind: Literal["rows", "maps", "sequence"] = "rows"
    channels_last: bool = False

    def arranged(self, tensor: Tensor, n: int) -> Tensor | None:
        """A batch of this layer as (n, d), (n, C, *space) or (n, T, H); None if it is laid out otherwise."""
        if tensor.ndim != self.ndim or tensor.shape[self.sample_dim] != n:
            return None
        if tensor.ndim == 1:
            return tensor[:, None]
        return tensor.movedim(-1, 1) if self.channels_last else tensor.movedim(self.sample_dim, 0)


class ChannelTracker:
    """Remembers where the modules that ran so far keep their channels, for those that work on any shape.

    A ReLU or a residual block does not say whether its (n, 8, 16) is 8 channels or 8 steps; the convolution
    or linear layer before it does.
    """

    def __init__(self) -> None:
        self._channels: Channels | None = None
        self._size = 0
        self._ndim = 0
        self.time_first = False  # what the last module said that has a `batch_first`

    def see(self, module: nn.Module, tensor: Tensor) -> Channels:
        """Where the channels of this output are, which a module without children may decide anew."""
        if hasattr(module, "batch_first"):
            self.time_first = not module.batch_first
        decided = None if any(module.children()) else _decided(module)
        channels = decided or self._inherited(tensor)
        if decided and tensor.ndim > 2:
            self._channels, self._ndim = decided, tensor.ndim
            self._size = tensor.shape[1 if decided == "first" else -1]
        return channels

    def _inherited(self, tensor: Tensor) -> Channels:
        usual: Channels = "last" if tensor.ndim == 3 else "first"
        if self._channels is None or tensor.ndim < 3:
            return usual
        first, last = tensor.shape[1] == self._size, tensor.shape[-1] == self._size
        if first != last:
            return "first" if first else "last"
        return self._channels if tensor.ndim == self._ndim else usual


def _decided(module: nn.Module) -> Channels | None:
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return None
    for base in type(module).__mro__:  # the most derived first: a LayerNorm2d is a LayerNorm of maps
        if _CHANNELS_FIRST.search(base.__name__):
            return "first"
        if _CHANNELS_LAST.search(base.__name__):
            return "last"
    return None


def layout_of(
    shapes: tuple[torch.Size, torch.Size], sizes: tuple[int, int], channels: Channels, *, time_first: bool
) -> Layout | None:
    """The layout of an output, from its shapes for two numbers of samples.

    Args:
        shapes: Of the output for each of them.
        sizes: The two numbers of samples.
        channels: Where the channels are, if there are more than two dimensions.
        time_first: What to take where more than one dimension follows the number of samples.

    Returns:
        None if no dimension is the sample, or there are more than five.
    """
    a, b = shapes
    if len(a) != len(b) or not 1 <= len(a) <= 5:
        return None
    follows = [d for d, size in enumerate(zip(a, b, strict=True)) if size == sizes]
    ndim = len(a)
    if ndim == 3 and 1 in follows and (time_first or 0 not in follows):
        return Layout(3, 1, "sequence")
    if 0 not in follows:
        return None
    if ndim <= 2:
        return Layout(ndim)
    if ndim == 3 and channels == "last":
        return Layout(3, 0, "sequence")
    return Layout(ndim, 0, "maps", channels == "last")


class Treated(NamedTuple):
    """One batch of one layer as a matrix."""

    suffix: str  # "@3": the fourth time step, a layer of its own
    values: Tensor  # (rows, n_features), real
    sample: Tensor | None  # (rows,): sample of each row within the batch; None: row i is sample i
    treatment: str


def treat(
    arranged: Tensor, kind: str, keep: Tensor | None, *, maps: str, sequences: str, unmasked: bool = False
) -> Iterator[Treated]:
    """Make a matrix (or one per time step) of a batch that `Layout.arranged` put in order.

    Args:
        arranged: (n, d), (n, C, *space) or (n, T, H).
        kind: The layout's.
        keep: Which steps are no padding, (n, T).
        maps: What becomes of maps, one of `Maps`.
        sequences: What becomes of sequences, one of `Sequences`.
        unmasked: There is a mask, but not of this sequence's steps; said in the treatment.

    Raises:
        LayerError: Padding would become features.
    """
    if arranged.dtype in (torch.float16, torch.bfloat16):
        arranged = arranged.float()
    if kind == "rows":
        yield Treated("", _real(arranged), None, "")
    elif kind == "maps":
        yield _of_maps(arranged, maps)
    else:
        said = " (mask not applied)" if unmasked else ""
        for suffix, values, sample, treatment in _of_sequence(arranged, keep, sequences):
            yield Treated(suffix, _real(values), sample, treatment + said)


def _of_maps(maps: Tensor, treatment: str) -> Treated:
    flat = maps.flatten(2)
    if treatment == "average":
        return Treated("", _real(flat.mean(2)), None, treatment)
    if treatment == "flatten":
        return Treated("", _real(flat.flatten(1)), None, treatment)
    n, channels, positions = flat.shape
    values = flat.transpose(1, 2).reshape(n * positions, channels)
    space = "x".join(str(size) for size in maps.shape[2:])
    return Treated("", _real(values), _each(n, positions, maps.device), f"positions {space}")


def _of_sequence(x: Tensor, keep: Tensor | None, treatment: str) -> Iterator[Treated]:
    n, steps, width = x.shape
    if treatment in ("flatten", "per-step"):
        if keep is not None:
            raise LayerError(
                f"sequences differ in length, and {treatment!r} would take padding for steps.",
                "Use mean, last, first or token.",
            )
        if treatment == "flatten":
            yield Treated("", x.flatten(1), None, treatment)
        else:
            yield from (Treated(f"@{t}", x[:, t], None, treatment) for t in range(steps))
    elif treatment == "token":
        rows, sample = x.reshape(n * steps, width), _each(n, steps, x.device)
        if keep is not None:
            kept = keep.reshape(-1)
            rows, sample = rows[kept], sample[kept]
        yield Treated("", rows, sample, treatment)
    elif treatment == "mean":
        yield Treated("", _mean(x, keep), None, treatment)
    else:
        yield Treated("", _one_step(x, keep, last=treatment == "last"), None, treatment)


def _mean(x: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return x.mean(1)
    # not a product with the mask: what stands in padding may be NaN
    return torch.where(keep[..., None], x, 0).sum(1) / keep.sum(1, keepdim=True)


def _one_step(x: Tensor, keep: Tensor | None, *, last: bool) -> Tensor:
    if keep is None:
        return x[:, -1 if last else 0]
    marks = keep.to(torch.uint8)
    step = x.shape[1] - 1 - marks.flip(1).argmax(1) if last else marks.argmax(1)
    return x[torch.arange(len(x), device=x.device), step]


def _each(n: int, times: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device).repeat_interleave(times)


def _real(values: Tensor) -> Tensor:
    """Real and imaginary parts side by side."""
    return torch.cat([values.real, values.imag], 1) if values.is_complex() else values


def treated(values: Tensor, *, maps: str, sequences: str) -> tuple[Tensor, Tensor | None, str]:
    """A saved array as a matrix: values, the sample of each row, and how it became one, as in `Treated`.

    Args:
        values: (n, d), which stays as it is; (n, T, H); (n, C, height, width), or with a depth.
        maps: What becomes of maps, one of `Maps`.
        sequences: What becomes of sequences, one of `Sequences`; nothing says which steps are padding.

    Raises:
        LayerError: It has other dimensions, no numbers, or no layout of one tensor in memory; or
            `sequences` would make several layers of it.
    """
    check_treatments(maps, sequences)
    if values.layout is not torch.strided or values.is_nested:
        raise LayerError("the array is sparse or nested.", "Give a dense one: array.to_dense().")
    shape = tuple(values.shape)
    if not 2 <= len(shape) <= 5 or not values.numel():
        raise LayerError(
            f"an array of the shape {shape} is no layer.",
            "A layer is (n, features), maps (n, channels, height, width) or sequences (n, steps, features).",
        )
    if len(shape) == 3 and sequences == "per-step":
        raise LayerError(
            f"an array of the shape {shape} is one layer, and per-step makes a layer of every step.",
            "Save one array per step, or choose other --sequences.",
        )
    kind = {2: "rows", 3: "sequence"}.get(len(shape), "maps")
    values = values.detach()
    if not (values.is_floating_point() or values.is_complex()):
        values = values.double()
    one = next(treat(values, kind, None, maps=maps, sequences=sequences))
    return one.values, one.sample, one.treatment


def check_treatments(maps: str, sequences: str) -> None:
    """Refuse a treatment that does not exist.

    Raises:
        LayerError: With the list of those that do.
    """
    for name, value, known in (("maps", maps, get_args(Maps)), ("sequences", sequences, get_args(Sequences))):
        if value not in known:
            raise LayerError(f"`{name}` cannot be {value!r}.", f"It is one of {', '.join(known)}.")
