"""Which built-in network a checkpoint's names and shapes belong to, and with which arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dynprobe.io.nets import BUILTIN
from dynprobe.io.resnets import RESNETS

Shapes = Mapping[str, tuple[int, ...]]


def builtin_candidates(shapes: Shapes) -> list[tuple[str, dict[str, Any]]]:
    """Every built-in network that has exactly these names and shapes, with the arguments that make it so.

    Args:
        shapes: Name → shape of a checkpoint's tensors.

    Returns:
        Pairs `(name, args)`; more than one if shapes alone do not decide, none if no built-in fits.
    """
    found = ((name, infer_arguments(name, shapes)) for name in BUILTIN)
    return [(name, args) for name, args in found if args is not None]


def infer_arguments(name: str, shapes: Shapes) -> dict[str, Any] | None:
    """The arguments with which `builtin:name` has these names and shapes, or None if there are none.

    What shapes do not show (activation, shortcut) is left out. So are switches at their default.
    """
    try:
        args = _READERS[name](shapes)
    except (KeyError, IndexError, ValueError):
        return None  # a layer of this network is not there, or is of another kind
    defaults = inspect.signature(BUILTIN[name]).parameters
    args = {
        key: value
        for key, value in args.items()
        if not (isinstance(value, bool) and defaults[key].default is value)
    }
    return args if _shapes_of(name, args) == _without_counters(shapes) else None


def _shapes_of(name: str, args: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The network's names and shapes; on the meta device, so without memory or random numbers."""
    try:
        with torch.device("meta"):
            model = BUILTIN[name](**args)
    except (ValueError, RuntimeError):
        return None
    return _without_counters({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})


def _without_counters(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Without BatchNorm's `num_batches_tracked`, which old checkpoints lack."""
    return {name: tuple(shape) for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def _mlp(shapes: Shapes) -> dict[str, Any]:
    depth = sum(bool(re.fullmatch(r"hidden\.\d+\.weight", name)) for name in shapes)
    classes, fan_in = shapes["head.weight"]
    first = shapes["hidden.0.weight"] if depth else (fan_in, fan_in)
    args = {"inputs": first[1], "width": first[0], "depth": depth, "classes": classes}
    return {**args, "bias": "head.bias" in shapes}


def _cnn(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["conv1.weight"][:2]
    args = {"width": width, "classes": shapes["fc.weight"][0], "channels": channels}
    return {**args, "batch_norm": "bn1.weight" in shapes}


def _allcnn(shapes: Shapes) -> dict[str, Any]:
    layers = sorted(
        int(name.split(".")[1]) for name in shapes if re.fullmatch(r"features\.\d+\.weight", name)
    )
    width, channels = shapes[f"features.{layers[0]}.weight"][:2]
    classes = shapes[f"features.{layers[-1]}.weight"][0]
    # Dropout on the input comes first and has no parameters: it only shifts the numbers of the layers.
    return {"classes": classes, "channels": channels, "width": width, "dropout": layers[0] == 1}


def _resnet(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["conv1.weight"][:2]
    return {"classes": shapes["linear.weight"][0], "channels": channels, "width": width}


def _recurrent(shapes: Shapes) -> dict[str, Any]:
    depth = sum(name.startswith("rnn.weight_hh_l") for name in shapes)
    width, inputs = shapes["rnn.weight_hh_l0"][1], shapes["rnn.weight_ih_l0"][1]
    return {"inputs": inputs, "width": width, "depth": depth, "classes": shapes["fc.weight"][0]}


_READERS: Mapping[str, Callable[[Shapes], dict[str, Any]]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "allcnn": _allcnn,
    **dict.fromkeys(RESNETS, _resnet),
    "rnn": _recurrent,
    "lstm": _recurrent,
}
