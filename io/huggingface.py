"""Transformers models from a folder's `config.json`; the repository's own code never runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import InputError, WrongModel
from dynprobe.io.spec import shown

if TYPE_CHECKING:
    from torch import nn


def model_factory(folder: Path) -> Callable[..., nn.Module]:
    """A factory for the first of the `architectures` that `folder/config.json` names.

    Its keyword arguments override values of the configuration; `config` (the file's own path) is ignored.

    Args:
        folder: Folder that holds `config.json`, or that file.

    Raises:
        WrongModel: There is no usable `config.json`, or transformers does not know the architecture.
        InputError: transformers is not installed.
    """
    path = folder if folder.name == "config.json" else folder / "config.json"
    architecture = read_architecture(path)

    def build(config: object = None, **overrides: Any) -> nn.Module:  # noqa: ARG001
        return _build(path, architecture, overrides)

    return build


def read_architecture(path: Path) -> str:
    """The first of the `architectures` in a `config.json`; "" if it names none.

    Raises:
        WrongModel: The file is missing or is not a configuration.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongModel(
            f"{shown(path)}: cannot be read: {error.strerror}.",
            "hf:FOLDER needs the folder that holds the model's config.json.",
        ) from error
    except ValueError as error:
        raise WrongModel(f"{shown(path)}: not valid JSON: {error}.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise WrongModel(f"{shown(path)}: not a transformers configuration: it has no 'model_type'.")
    names = config.get("architectures") or [""]
    return str(names[0])


def _build(path: Path, architecture: str, overrides: dict[str, Any]) -> nn.Module:
    import torch

    try:
        import transformers
    except ModuleNotFoundError as error:
        raise InputError(
            "transformers is not installed, and models from a config.json need it.",
            "pip install transformers   (or: pip install 'dynprobe[hf]')",
        ) from error
    config = transformers.AutoConfig.from_pretrained(
        path.parent, local_files_only=True, trust_remote_code=False, **overrides
    )
    # Fused attention has no second derivative, and a key-value cache is not a tensor.
    config._attn_implementation = "eager"
    config.use_cache = False
    known: Any = transformers
    kind: Any = getattr(known, architecture, None) if architecture else known.AutoModel
    if kind is known.AutoModel:
        model = kind.from_config(config, dtype=torch.float32)
    elif _is_model(kind, known):
        model = kind._from_config(config, dtype=torch.float32)
    else:
        raise WrongModel(
            f"{shown(path)}: transformers {known.__version__} has no model {architecture!r}.",
            "Code that comes with a model is not run; build it yourself: --model file.py:callable.",
        )
    model.register_forward_hook(_tensor_output)
    return model  # type: ignore[no-any-return]


def _is_model(kind: Any, library: Any) -> bool:
    """`architectures` is text from a file: only model classes may be called by it."""
    return isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)


def _tensor_output(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """The tensor that losses take, in place of transformers' output object."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output
