"""A `torch.export` program as a model without code: any checkpoint with its names fits it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import WrongModel
from dynprobe.io.spec import shown

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


def load_exported(path: Path) -> nn.Module:
    """The module in a `.pt2` file, its parameters named as in the model that was exported.

    It works under `eval()`, `torch.func.functional_call`, `vmap` and double backward. The program is fixed:
    `train()` changes nothing.

    Args:
        path: File written by `torch.export.save`, with a dynamic batch dimension, exported in `eval()` mode.

    Raises:
        WrongModel: The file is no such program, or holds one for a fixed batch size or for training.
    """
    import torch

    if not path.is_file():
        raise WrongModel(f"{shown(path)}: no such file.")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise WrongModel(
            f"{shown(path)}: not a torch.export program: {type(error).__name__}: {error}",
            "Write one with torch.export.save(torch.export.export(model, …), 'arch.pt2').",
        ) from error
    _check_batch(path, program)
    _check_mode(path, program)
    module: nn.Module = program.module()
    # These instance attributes raise, although the program is the same in both modes.
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    # torch makes a class per program, and a new one for each copy from the same base.
    kind = type(module)
    kind.__bases__ = (type("ExportedModel", (_QuietCopy, *kind.__bases__), {}),)
    return module


class _QuietCopy:
    """Copies without torch's remark on one of its own classes that is about to be renamed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            return super().__deepcopy__(memo)  # type: ignore[misc]


def _check_batch(path: Path, program: ExportedProgram) -> None:
    """The first dimension of some input must be free, or no data set but the example's batch can pass."""
    inputs = set(program.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs
    ]
    if any(shape and not isinstance(shape[0], int) for shape in shapes):
        return
    sizes = ", ".join(str(tuple(shape)) for shape in shapes)
    raise WrongModel(
        f"{shown(path)}: was exported for a fixed batch size: it takes only inputs of shape {sizes}.",
        "Export it with dynamic_shapes=({0: torch.export.Dim('batch')},).",
    )


def _check_mode(path: Path, program: ExportedProgram) -> None:
    """Refuse dropout and BatchNorm frozen in training mode: they would measure another function."""
    for node in program.graph.nodes:
        operation = str(node.target)
        # dropout(input, p, train), batch_norm(input, weight, bias, mean, variance, training, …)
        training = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}.get(operation)
        if training is not None and node.args[training] is True:
            raise WrongModel(
                f"{shown(path)}: was exported in training mode ({operation.split('.')[1]} is active).",
                "Call model.eval() before torch.export.export.",
            )
