"""Data from `.npz`, `.safetensors`, `.h5`, `.pt` and `.csv` files; reading one never runs code."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.data_names import NAME_FIELDS, names_of
from dynprobe.io.errors import UnusableData
from dynprobe.io.names import shortlist, suggestion
from dynprobe.io.spec import shown
from dynprobe.io.transforms import check_names, standardised, transform

if TYPE_CHECKING:
    from torch import Tensor

    from dynprobe.io.data import Samples

INPUT_NAMES = ("x", "inputs", "input", "images", "image", "data", "features", "input_ids")
TARGET_NAMES = ("y", "targets", "target", "labels", "label", "class", "species")
_TOKEN_NAMES = ("input_ids", "attention_mask", "token_type_ids")
_ARGS = ("inputs", "targets", "split", "standardize", *NAME_FIELDS)


@dataclass
class _Content:
    """What a file holds.

    Args:
        arrays: Tensors by name.
        names: What it holds under `NAME_FIELDS`.
        classes: Of a table, the words that became class numbers, by column.
    """

    arrays: dict[str, Tensor]
    names: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)


def read_file(path: Path, args: Mapping[str, Any]) -> Samples:
    """Read a data file.

    Args:
        path: The file; its suffix says what it is.
        args: `inputs` and `targets`: names of arrays or columns, where they are not the usual ones; `split`:
            use `train_x` or `x_train` (for `split=train`) rather than `x`; `feature_names` and `class_names`:
            in place of the file's own; `standardize` (`.csv` only): subtract the mean and divide by the
            standard deviation of the file's own rows, column by column; and the transformations.

    Returns:
        The data. Features and classes have the names that stand under `NAME_FIELDS` in the file; the features
        of a `.csv` file those of its columns, its classes the words of the target's column.

    Raises:
        UnusableData: The file is missing, damaged, of no known kind, or has no such names.
    """
    from dynprobe.io.data import Samples

    source = shown(path)
    if path.suffix not in READERS:
        raise UnusableData(
            f"{source!r} names no data.",
            f"Give sklearn:NAME, package.module:callable, or a file ending in {', '.join(READERS)}.",
        )
    check_names(args, _ARGS, source)
    if not path.is_file():
        raise UnusableData(f"{source}: no such file.")
    try:
        content = READERS[path.suffix](path)
    except UnusableData:
        raise
    except Exception as error:
        raise UnusableData(f"{source}: cannot be read: {type(error).__name__}: {error}") from error
    choose = _choose_columns if path.suffix == ".csv" else _choose_arrays
    inputs, targets, names = choose(content, args, source)
    n_total = len(targets) if targets.ndim else 0
    names |= {key: args[key] for key in NAME_FIELDS if key in args}
    names = {key: names_of(value, key, source) for key, value in names.items()}
    units: dict[str, Any] = {}
    if args.get("standardize"):
        inputs, units = _standardised_rows(inputs)
    return transform(Samples(inputs, targets, n_total, **names, **units), args, source)


def _standardised_rows(inputs: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """By the finite rows, so that a value that is missing is still reported as that of its own sample."""
    import torch

    rows = inputs[inputs.isfinite().all(1)]
    if not len(rows):
        return inputs, {}
    features, units = standardised(inputs.numpy(), rows.numpy())
    return torch.from_numpy(features), units


def _read_npz(path: Path) -> _Content:
    import numpy as np
    import torch

    # Opened here because np.load leaves a damaged file open.
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        names = {name: file[name] for name in NAME_FIELDS if name in file.files}
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name not in names}
    return _Content(arrays, names)


def _read_safetensors(path: Path) -> _Content:
    from safetensors.torch import load_file

    return _Content(load_file(path))


def _read_hdf5(path: Path) -> _Content:
    import h5py
    import torch

    content = _Content({})

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if name in NAME_FIELDS:
            content.names[name] = item[()]
        elif item.dtype.kind in "biuf":
            content.arrays[name] = torch.from_numpy(item[()]) if item.shape else torch.tensor(item[()].item())

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return content


def _read_torch(path: Path) -> _Content:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, (tuple, list)) and len(content) == 2:
        content = dict(zip(("inputs", "targets"), content, strict=True))
    if not isinstance(content, dict):
        raise UnusableData(
            f"{shown(path)}: holds a {type(content).__name__}.",
            "It must hold a dict of tensors, or (inputs, targets).",
        )
    names = {name: content[name] for name in NAME_FIELDS if name in content}
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    return _Content({name: tensor for name, tensor in tensors.items() if name not in names}, names)


def _read_csv(path: Path) -> _Content:
    """Columns by the names in the first row; text becomes class numbers in alphabetical order."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise UnusableData(f"{shown(path)}: is empty.")
    header, *body = rows
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise UnusableData(
                f"{shown(path)}: row {number} has {len(row)} values, the header {len(header)} names."
            )
    content = _Content({})
    for i, name in enumerate(header):
        column, classes = _column([row[i].strip() for row in body])
        content.arrays[name.strip()] = column
        if classes:
            content.classes[name.strip()] = classes
    return content


def _column(texts: list[str]) -> tuple[Tensor, list[str]]:
    """Whole numbers, numbers (an empty cell is NaN), or else numbers of classes and what these are called."""
    import torch

    for kind, dtype in ((int, torch.int64), (float, torch.float64)):
        try:
            numbers = [kind(text if text or kind is int else "nan") for text in texts]
        except ValueError:
            continue
        return torch.tensor(numbers, dtype=dtype), []
    classes = sorted(set(texts))
    number_of = {text: number for number, text in enumerate(classes)}
    return torch.tensor([number_of[text] for text in texts]), classes


READERS: Mapping[str, Callable[[Path], _Content]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".csv": _read_csv,
}


def _choose_arrays(
    content: _Content, args: Mapping[str, Any], source: str
) -> tuple[Any, Tensor, dict[str, Any]]:
    """Inputs, targets, and names of features and classes."""
    if args.get("standardize"):
        raise UnusableData(
            f"{source}: standardize=true is for .csv files and sklearn:NAME.",
            "Give lists of numbers as mean and std, one per feature.",
        )
    return *_choose_pair(content.arrays, args, source), content.names


def _choose_pair(arrays: Mapping[str, Tensor], args: Mapping[str, Any], source: str) -> tuple[Any, Tensor]:
    """Inputs and targets by the names given, or by the usual ones."""
    split = args.get("split")
    if "inputs" in args:
        named = args["inputs"]
        inputs = (
            {name: _named(arrays, name, source) for name in named}
            if isinstance(named, list)
            else _named(arrays, named, source)
        )
    else:
        name = _usual(arrays, INPUT_NAMES, split, "inputs", source)
        tokens = {other: arrays[other] for other in _TOKEN_NAMES if other in arrays}
        inputs = tokens if name in tokens else arrays[name]
    if "targets" in args:
        return inputs, _named(arrays, args["targets"], source)
    if isinstance(inputs, dict) and "input_ids" in inputs and not set(TARGET_NAMES) & set(arrays):
        return inputs, _next_tokens(inputs)
    return inputs, arrays[_usual(arrays, TARGET_NAMES, split, "targets", source)]


def _next_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """A language model's targets are its inputs (the loss shifts them); padding, -100, does not count."""
    tokens = inputs["input_ids"].long()
    mask = inputs.get("attention_mask")
    return tokens if mask is None else tokens.masked_fill(mask == 0, -100)


def _choose_columns(
    content: _Content, args: Mapping[str, Any], source: str
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The target's column, the others (or those named) side by side as `(n, features)`, and their names."""
    import torch

    if "split" in args:
        raise UnusableData(f"{source}: a .csv file has no splits; keep train and test in files of their own.")
    columns = content.arrays
    target = args.get("targets") or _usual(columns, TARGET_NAMES, None, "targets", source)
    wanted = args.get("inputs") or [name for name in columns if name != target]
    names = wanted if isinstance(wanted, list) else [wanted]
    features = [_named(columns, name, source).double() for name in names]
    if not features:
        raise UnusableData(f"{source}: has no column beside {target!r}.")
    called = {"feature_names": names, "class_names": content.classes.get(target, [])}
    return torch.stack(features, dim=1), _named(columns, target, source), called


def _named(arrays: Mapping[str, Tensor], name: object, source: str) -> Tensor:
    if name not in arrays:
        raise UnusableData(
            f"{source}: holds no {name!r}.", f"{suggestion(str(name), arrays)} {_listing(arrays)}"
        )
    return arrays[str(name)]


def _usual(
    arrays: Mapping[str, Tensor], usual: tuple[str, ...], split: str | None, role: str, source: str
) -> str:
    """The one array with a usual name; with a split, `train_x` and `x_train` rather than `x`.

    Raises:
        UnusableData: There is none, or more than one.
    """
    if split is None:
        found = [name for name in arrays if name.lower() in usual]
    else:
        wanted = {
            form for word in usual for form in (f"{split}_{word}", f"{word}_{split}", f"{split}/{word}")
        }
        found = [name for name in arrays if name.lower() in wanted]
    if len(found) == 1:
        return found[0]
    which = f"{role} of split {split!r}" if split else role
    reason = "none has a usual name" if not found else f"{shortlist(found)} might be"
    raise UnusableData(f"{source}: which array holds the {which}? {reason}.", _tip(arrays, role))


def _tip(arrays: Mapping[str, Tensor], role: str) -> str:
    return f"Say {role}=NAME, or split=train for names like x_train. {_listing(arrays)}"


def _listing(arrays: Mapping[str, Tensor]) -> str:
    """What the file holds, with shapes."""
    return "It holds " + shortlist(f"{name} {tuple(tensor.shape)}" for name, tensor in arrays.items()) + "."
