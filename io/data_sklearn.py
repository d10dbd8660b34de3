"""scikit-learn's small real data sets, with a split that is the same everywhere."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dynprobe.io.data_names import shell_name
from dynprobe.io.errors import InputError, UnusableData
from dynprobe.io.names import suggestion
from dynprobe.io.transforms import check_names, standardised, transform

if TYPE_CHECKING:
    from dynprobe.io.data import Samples

NAMES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
_ARGS = ("split", "standardize", "image")
_TRAIN_SHARE = 0.8


def read_sklearn(name: str, args: Mapping[str, Any]) -> Samples:
    """One of scikit-learn's bundled data sets (nothing is downloaded).

    Args:
        name: One of `NAMES`.
        args: `split`: `"all"` (default), `"train"` or `"test"`: a fixed random 80 % and the other 20 %, not
            stratified, each in the order of the data set; `standardize`: subtract the mean and divide by the
            standard deviation of the *training* split, feature by feature; `image`: digits as
            `(n, 1, 8, 8)`; and the transformations.

    Returns:
        The data; its features have the names that scikit-learn gives them, as far as a shell likes them
        (`mean radius` is `mean_radius`), and so have its classes.

    Raises:
        UnusableData: There is no such data set or argument.
        InputError: scikit-learn is not installed.
    """
    import numpy as np
    import torch

    from dynprobe.io.data import Samples

    source = f"sklearn:{name}"
    if name not in NAMES:
        raise UnusableData(f"There is no {source}.", suggestion(name, NAMES))
    check_names(args, _ARGS, source)
    bunch = _load(name)
    features, targets = bunch.data, bunch.target
    # RandomState's stream is frozen by numpy's compatibility policy; default_rng's is not.
    order = np.random.RandomState(0).permutation(len(targets))
    n_train = round(_TRAIN_SHARE * len(targets))
    rows = {
        "all": np.arange(len(targets)),
        "train": np.sort(order[:n_train]),
        "test": np.sort(order[n_train:]),
    }
    split = args.get("split", "all")
    if split not in rows:
        raise UnusableData(f"{source} has no split {split!r}.", suggestion(str(split), rows))
    units: dict[str, Any] = {}
    if args.get("standardize"):
        features, units = standardised(features, features[rows["train"]])
    x, y = torch.from_numpy(features[rows[split]]), torch.from_numpy(targets[rows[split]])
    if args.get("image"):
        if name != "digits":
            raise UnusableData(f"{source} holds no images; image=true is for sklearn:digits.")
        x = x.reshape(-1, 1, 8, 8)
    feature_names = tuple(map(shell_name, bunch.feature_names))
    samples = Samples(x, y, len(y), feature_names=feature_names, class_names=_class_names(bunch), **units)
    return transform(samples, args, source)


def _class_names(bunch: Any) -> tuple[str, ...]:
    """Of a classification; what a regression calls `target_names` are its outputs."""
    names = bunch.get("target_names") if bunch.target.dtype.kind == "i" else None
    return () if names is None else tuple(map(shell_name, names))


def _load(name: str) -> Any:
    """What scikit-learn calls a bunch: `data`, `target` and their names."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise InputError(
            f"scikit-learn is not installed, and sklearn:{name} needs it.",
            "pip install scikit-learn   (or: pip install 'dynprobe[sklearn]')",
        ) from error
    return getattr(datasets, f"load_{name}")()
