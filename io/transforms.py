"""The few fixed transformations that a manifest may ask for; anything else is `package.module:callable`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import UnusableData
from dynprobe.io.names import suggestion

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from dynprobe.io.data import Samples

TRANSFORMS = ("limit", "add_channel", "scale", "mean", "std", "flatten")


def check_names(args: Mapping[str, Any], known: Iterable[str], source: str) -> None:
    """Refuse arguments that the source does not have.

    Raises:
        UnusableData: One is unknown; names the nearest.
    """
    known = (*known, *TRANSFORMS)
    for name in args:
        if name not in known:
            raise UnusableData(f"{source} has no argument {name!r}.", suggestion(name, known))


def transform(samples: Samples, args: Mapping[str, Any], source: str) -> Samples:
    """Apply the transformations that `args` ask for.

    Args:
        samples: What was read; changed in place.
        args: `limit` (keep the first so many samples); `add_channel` (`(n, h, w)` to `(n, 1, h, w)`);
            `scale` (multiply; `"1/255"` is a number too), `mean` (subtract) and `std` (divide), each one
            number or one per channel; `flatten` (to `(n, features)`).
        source: The data, as messages name it.

    Raises:
        UnusableData: A value is not usable, or the inputs are several tensors.
    """
    import torch

    if "limit" in args:
        _limit(samples, args["limit"], source)
    if not set(args) & set(TRANSFORMS[1:]):
        return samples
    x = samples.inputs
    if not isinstance(x, torch.Tensor):
        raise UnusableData(f"{source}: transformations need inputs that are one tensor.")
    if args.get("add_channel"):
        x = x.unsqueeze(1)
    for name in ("scale", "mean", "std"):
        if name in args:
            x = x if x.is_floating_point() else x.float()
            value = _per_channel(name, args[name], x, source)
            samples.change_units(x, **_undo(name, value))
            value = value.to(x.dtype)
            x = x * value if name == "scale" else x - value if name == "mean" else x / value
    samples.inputs = x.flatten(1) if args.get("flatten") else x
    return samples


def _undo(name: str, value: Tensor) -> dict[str, Any]:
    """How an input is turned back into what it was before the transformation: `plus + times * input`."""
    number = value.numpy()
    return {"plus": number} if name == "mean" else {"times": number if name == "std" else 1 / number}


def standardised(
    features: npt.NDArray[Any], rows: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], dict[str, npt.NDArray[np.float64]]]:
    """Subtract the mean of `rows` and divide by their standard deviation, feature by feature.

    Args:
        features: `(n, n_features)`.
        rows: `(n_rows, n_features)`, at least one. A feature that is constant in them is only shifted.

    Returns:
        The new features; and their `feature_offset` and `feature_scale`, which lead back.
    """
    import numpy as np

    mean, spread = rows.mean(0), rows.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    return (features - mean) / spread, {"feature_offset": mean, "feature_scale": spread}


def _limit(samples: Samples, limit: object, source: str) -> None:
    from dynprobe.io.data import each

    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UnusableData(f"{source}: limit={limit!r} must be a whole number of samples, at least 1.")
    samples.inputs = each(samples.inputs, lambda tensor: tensor[:limit])
    samples.targets = samples.targets[:limit]
    samples.n_total = len(samples.targets)


def _per_channel(name: str, value: object, x: Tensor, source: str) -> Tensor:
    """A number, or one per channel (dimension 1 of images, else the last), float64, to broadcast with `x`."""
    import torch

    numbers = [_number(name, item, source) for item in (value if isinstance(value, list) else [value])]
    if name != "mean" and 0.0 in numbers:
        raise UnusableData(f"{source}: {name} must not be 0.")
    row = torch.tensor(numbers, dtype=torch.float64)
    if len(numbers) == 1:
        return row[0]
    dim = 1 if x.ndim == 4 else x.ndim - 1
    if x.shape[dim] != len(numbers):
        raise UnusableData(
            f"{source}: {name} has {len(numbers)} values, but the inputs are {tuple(x.shape)}."
        )
    return row.reshape([-1 if i == dim else 1 for i in range(x.ndim)])


def _number(name: str, value: object, source: str) -> float:
    try:
        return float(Fraction(value) if isinstance(value, str) else value)  # type: ignore[arg-type]
    except (ValueError, TypeError, ZeroDivisionError):
        raise UnusableData(
            f"{source}: {name}={value!r} is not a number, list of numbers or fraction."
        ) from None
