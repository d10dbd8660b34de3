"""What the numbers of a data set are called: features, their own units, classes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import UnusableData
from dynprobe.io.names import shortlist

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float64]

NAME_FIELDS = ("feature_names", "class_names")


@dataclass(kw_only=True)
class Named:
    """Data whose features and classes may have names, and whose features may have units of their own.

    Features are those of inputs that are one tensor, flattened: `(n_samples, n_features)`.

    Args:
        feature_names: One per feature; empty where unknown.
        feature_offset: `(n_features,)`. In the data set's own units a feature is
            `feature_offset + feature_scale * input`; None where the inputs are in these units.
        feature_scale: `(n_features,)`; None together with `feature_offset`.
        class_names: By class number; empty where unknown.
    """

    feature_names: tuple[str, ...] = ()
    feature_offset: Floats | None = None
    feature_scale: Floats | None = None
    class_names: tuple[str, ...] = ()

    def names(self) -> dict[str, Any]:
        """The names and units, as keyword arguments for other `Named` data."""
        return {
            "feature_names": self.feature_names,
            "feature_offset": self.feature_offset,
            "feature_scale": self.feature_scale,
            "class_names": self.class_names,
        }

    @property
    def names_hash(self) -> str:
        """Hash of the names and units; empty where there are none."""
        units = [None if u is None else u.tolist() for u in (self.feature_offset, self.feature_scale)]
        known = [self.feature_names, self.class_names, *units]
        if not any(known):
            return ""
        return hashlib.blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()

    def change_units(self, x: Tensor, *, times: Any = 1.0, plus: Any = 0.0) -> None:
        """Keep the own units known when inputs become smaller: the input before was `plus + times * input`.

        Args:
            x: Inputs, for their shape `(n_samples, …)` only.
            times: One number, or an array that broadcasts with `x`, the same for all samples.
            plus: As `times`.
        """
        import numpy as np

        shape = (1, *x.shape[1:])
        factor, shift = (np.broadcast_to(np.float64(value), shape).ravel() for value in (times, plus))
        offset = 0.0 if self.feature_offset is None else self.feature_offset
        scale = 1.0 if self.feature_scale is None else self.feature_scale
        self.feature_offset, self.feature_scale = offset + scale * shift, scale * factor


def shell_name(text: object) -> str:
    """A name that can be typed without quotes: `sepal length (cm)` is `sepal_length_cm`."""
    return re.sub(r"[^a-z0-9]+", "_", str(text).lower()).strip("_")


def names_of(value: object, field: str, source: str) -> tuple[str, ...]:
    """A list, tuple or array of names, as text.

    Raises:
        UnusableData: It is anything else.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UnusableData(f'{source}: {field}={value!r} must be a list of names, such as ["age", "height"].')
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in value)


def check_named(named: Named, inputs: object, targets: Tensor, source: str) -> None:
    """Refuse names and units that are not those of the data; names of inputs that are several are dropped.

    Raises:
        UnusableData: The number of names or units is not that of the features, a unit is not usable, or a
            target has no class name.
    """
    import torch

    if not isinstance(inputs, torch.Tensor):
        named.feature_names, named.feature_offset, named.feature_scale = (), None, None
    else:
        _check_features(named, inputs.shape[1:].numel(), source)
    if not named.class_names or targets.is_floating_point() or targets.ndim != 1:
        return
    if targets.max() >= len(named.class_names):
        raise UnusableData(
            f"{source}: class_names has {len(named.class_names)} names, "
            f"but there is a target {int(targets.max())}.",
            "Name every class in the order of its number, from 0. "
            "For a file, class_names=[] goes without names.",
        )


def _check_features(named: Named, n_features: int, source: str) -> None:
    import numpy as np

    if named.feature_names and len(named.feature_names) != n_features:
        raise UnusableData(
            f"{source}: feature_names has {len(named.feature_names)} names, "
            f"but a sample has {n_features} values.",
            "Name every value of a sample, in the order of the flattened input. "
            "For a file, feature_names=[] goes without names.",
        )
    doubled = [name for name, times in Counter(named.feature_names).items() if times > 1]
    if doubled:
        raise UnusableData(f"{source}: feature_names has {shortlist(doubled)} more than once.")
    units = [values for values in (named.feature_offset, named.feature_scale) if values is not None]
    if any(values.shape != (n_features,) or not np.isfinite(values).all() for values in units):
        raise UnusableData(
            f"{source}: feature_offset and feature_scale must hold {n_features} finite numbers each, "
            "one per value of a sample."
        )
    if named.feature_scale is not None and not named.feature_scale.all():
        raise UnusableData(f"{source}: feature_scale must not be 0.")
