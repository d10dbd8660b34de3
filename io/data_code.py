"""Data from the user's own code: whatever a data loader may be, as tensors in fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dynprobe.io.data_names import NAME_FIELDS, Named, names_of
from dynprobe.io.errors import InputError, UnusableData

if TYPE_CHECKING:
    from torch import Tensor

    from dynprobe.io.data import Inputs, Samples
    from dynprobe.io.spec import Spec

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def materialise(factory: Callable[..., Any], spec: Spec, choose: Callable[[int], Tensor | None]) -> Samples:
    """Call the user's function and collect what it returns.

    Args:
        factory: Returns `(inputs, targets)` tensors or arrays, an object that has them as attributes, a dict
            with `labels`, a torch `Dataset` (only the chosen items are read), or an iterable of batches such
            as a `DataLoader` (read once; a shuffled one is read with a fixed seed). What it returns, or the
            `dataset` of that, may have the attributes of `Named`.
        spec: Its name and arguments.
        choose: Number of items to the indices to keep, or None for all.

    Raises:
        UnusableData: The call fails, or returns none of these.
    """
    import torch

    # Loaders draw from the global generators; the analysis must neither depend on them nor move them.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            found = factory(**spec.args)
            samples = _collect(found, choose, spec.name)
            _take_names(found, samples, spec.name)
        except InputError:
            raise
        except Exception as error:
            raise UnusableData(f"{spec.name} fails: {type(error).__name__}: {error}") from error
    return samples


def _collect(found: Any, choose: Callable[[int], Tensor | None], name: str) -> Samples:
    """Inputs and targets of whatever it is."""
    from torch.utils.data import Dataset as TorchDataset

    from dynprobe.io.data import Samples

    if isinstance(found, TorchDataset) and hasattr(found, "__len__"):
        return _from_items(found, choose, name)
    if hasattr(found, "inputs") and hasattr(found, "targets"):
        found = (found.inputs, found.targets)
    inputs, targets = _pair(found) or _from_batches(found, name)
    return Samples(inputs, targets, len(targets))


def _take_names(found: Any, named: Named, name: str) -> None:
    """From the attributes of what was returned, or of the data set that it wraps."""
    import numpy as np

    for place in (getattr(found, "dataset", None), found):
        for field in NAME_FIELDS:
            if hasattr(place, field):
                setattr(named, field, names_of(getattr(place, field), field, name))
        offset, scale = (getattr(place, field, None) for field in ("feature_offset", "feature_scale"))
        if offset is not None or scale is not None:
            offset, scale = 0.0 if offset is None else offset, 1.0 if scale is None else scale
            named.feature_offset, named.feature_scale = np.broadcast_arrays(
                np.asarray(offset, np.float64), np.asarray(scale, np.float64)
            )


def _from_items(items: Any, choose: Callable[[int], Tensor | None], name: str) -> Samples:
    """Items of a map-style data set, stacked."""
    from torch.utils.data import default_collate

    from dynprobe.io.data import Samples

    n_total = len(items)
    chosen = choose(n_total)
    rows = range(n_total) if chosen is None else chosen.tolist()
    if not n_total:
        raise UnusableData(f"{name}: has no samples.")
    pair = _pair(default_collate([items[i] for i in rows]))
    if pair is None:
        raise UnusableData(f"{name}: its items are not pairs (inputs, target).")
    return Samples(*pair, n_total, chosen=True)


def _from_batches(batches: Any, name: str) -> tuple[Inputs, Tensor]:
    """Batches of an iterable, joined."""
    import torch

    if not isinstance(batches, Iterable):
        raise UnusableData(
            f"{name} returned a {type(batches).__name__}.",
            "It must return (inputs, targets), a torch Dataset, or an iterable of batches.",
        )
    pairs = []
    for number, batch in enumerate(batches):
        pair = _pair(batch)
        if pair is None:
            raise UnusableData(f"{name}: batch {number} is not a pair (inputs, targets).")
        pairs.append(pair)
    if not pairs:
        raise UnusableData(f"{name}: has no samples.")
    targets = torch.cat([pair[1] for pair in pairs])
    inputs: list[Any] = [pair[0] for pair in pairs]
    if isinstance(inputs[0], dict):
        return {key: torch.cat([part[key] for part in inputs]) for key in inputs[0]}, targets
    if isinstance(inputs[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*inputs, strict=True)), targets
    return torch.cat(inputs), targets


def _pair(found: Any) -> tuple[Inputs, Tensor] | None:
    """`(inputs, targets)` of a pair or of a dict with labels, as tensors on the CPU; None if neither."""
    if isinstance(found, Mapping):
        key = next((key for key in _TARGET_KEYS if key in found), None)
        if key is None:
            return None
        inputs = {name: _tensor(value) for name, value in found.items() if name != key}
        return inputs, _tensor(found[key])
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return None
    first, second = found
    if not _is_array(second):
        return None
    if isinstance(first, Mapping):
        return {name: _tensor(value) for name, value in first.items()}, _tensor(second)
    if isinstance(first, (tuple, list)) and all(_is_array(part) for part in first):
        return tuple(_tensor(part) for part in first), _tensor(second)
    return (_tensor(first), _tensor(second)) if _is_array(first) else None


def _is_array(value: object) -> bool:
    import numpy as np
    import torch

    return isinstance(value, (torch.Tensor, np.ndarray))


def _tensor(value: Any) -> Tensor:
    import torch

    return torch.as_tensor(value).detach().cpu()
