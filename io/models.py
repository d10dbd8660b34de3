"""From a name to a module, and from a checkpoint to values that fit it.

A model may be named as `builtin:NAME`, `package.module:callable`, `path/to/file.py:callable`,
`torchvision:NAME`, `timm:NAME`, `hf:FOLDER` (its `config.json`) or `path/to/arch.pt2` (a `torch.export`
program). Inputs are passed as `model(x)`, `model(*inputs)` for a tuple, `model(**inputs)` for a dict.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.code import names_code, require_trust, resolve_callable
from dynprobe.io.errors import InputError, WrongModel
from dynprobe.io.fit import BuiltFrom, fit_state
from dynprobe.io.names import suggestion
from dynprobe.io.spec import Spec, shown

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_model", "fit_state"]

Factory = Callable[..., "nn.Module"]
SCHEMES = (
    "builtin:NAME",
    "package.module:callable",
    "file.py:callable",
    "torchvision:NAME",
    "timm:NAME",
    "hf:FOLDER",
    "arch.pt2",
)

# Arguments with which a library's factory would fetch or unpickle weights before a checkpoint replaces them.
_LOADING_ARGS = ("pretrained", "weights", "checkpoint", "cache_dir")


def build_model(spec: Spec, *, trust: bool = False) -> nn.Module:
    """Build the module that `spec` names, in `eval()` mode, with deterministic initial values.

    Args:
        spec: Name and arguments of the model.
        trust: Whether code that a manifest names may run.

    Returns:
        A module on the CPU. The global random number generator of torch is as it was.

    Raises:
        UntrustedCode: A manifest names code and `trust` is off; nothing was run.
        WrongModel: There is no such model, or it does not take these arguments.
        InputError: A file or module named by the user is missing or fails.
    """
    import torch
    from torch import nn

    factory, parameters = _factory(spec, trust)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = _call(factory, spec, parameters)
    if not isinstance(model, nn.Module):
        raise WrongModel(f"{spec.name} returned a {type(model).__name__}, not a torch.nn.Module.")
    BuiltFrom(spec, tuple(parameters)).remember(model)
    return model.eval()


def _factory(spec: Spec, trust: bool) -> tuple[Factory, Mapping[str, inspect.Parameter]]:
    """The callable that makes the module, and its parameters (empty when it takes any)."""
    scheme, colon, name = spec.name.partition(":")
    if scheme in _SOURCES and (colon or scheme == "hf"):
        factory = _SOURCES[scheme](name, spec, trust)
    elif spec.name.endswith(".pt2"):
        require_trust(spec, trust=trust, what=f"load {shown(spec.name)}, which can hold pickled objects")
        factory = _exported(Path(spec.name))
    elif names_code(spec.name):
        factory = resolve_callable(spec, trust=trust)
    else:
        raise WrongModel(f"{spec.name!r} names no model.", f"Give one of: {', '.join(SCHEMES)}.")
    try:
        return factory, inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables written in C do not tell
        return factory, {}


def _call(factory: Factory, spec: Spec, parameters: Mapping[str, inspect.Parameter]) -> object:
    """Call the factory, naming a misspelt argument before anything runs."""
    open_ended = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in spec.args:
        if key not in parameters and not open_ended:
            raise WrongModel(f"{spec.name} has no argument {key!r}.", suggestion(key, parameters))
    try:
        return factory(**spec.args)
    except InputError:
        raise
    except Exception as error:
        text = ", ".join(f"{key}={value!r}" for key, value in spec.args.items())
        raise WrongModel(
            f"{spec.name} with arguments ({text}) fails: {type(error).__name__}: {error}"
        ) from error


def _builtin(name: str, _spec: Spec, _trust: bool) -> Factory:
    from dynprobe.io.nets import BUILTIN

    if name not in BUILTIN:
        raise WrongModel(f"There is no builtin:{name}.", suggestion(name, BUILTIN))
    return BUILTIN[name]


def _hugging_face(name: str, spec: Spec, _trust: bool) -> Factory:
    """`hf:FOLDER`, or `hf` with the argument `config` (a `config.json` or its folder)."""
    from dynprobe.io.huggingface import model_factory

    folder = name or spec.args.get("config")
    if not folder:
        raise WrongModel("hf needs a config.json, and none was found.", "Name its folder: --model hf:FOLDER.")
    return model_factory(Path(str(folder)))


def _torchvision(name: str, spec: Spec, trust: bool) -> Factory:
    models = _library("torchvision", "torchvision.models")
    _refuse_loading(spec, trust)
    if name not in models.list_models():
        raise WrongModel(f"There is no torchvision:{name}.", suggestion(name, models.list_models()))
    return models.get_model_builder(name)  # type: ignore[no-any-return]


def _timm(name: str, spec: Spec, trust: bool) -> Factory:
    timm = _library("timm", "timm")
    _refuse_loading(spec, trust)
    if not timm.is_model(name):
        raise WrongModel(f"There is no timm:{name}.", suggestion(name, timm.list_models()))

    def create(**args: Any) -> nn.Module:
        return timm.create_model(name, **args)  # type: ignore[no-any-return]

    return create


def _exported(path: Path) -> Factory:
    from dynprobe.io.exported import load_exported

    return lambda: load_exported(path)


_SOURCES: Mapping[str, Callable[[str, Spec, bool], Factory]] = {
    "builtin": _builtin,
    "hf": _hugging_face,
    "torchvision": _torchvision,
    "timm": _timm,
}


def _library(package: str, module: str) -> Any:
    """An optional package, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{package} is not installed, and models of the form {package}:NAME need it.",
            f"pip install {package}   (or: pip install 'dynprobe[vision]')",
        ) from error


def _refuse_loading(spec: Spec, trust: bool) -> None:
    """A manifest must not make a library download or unpickle weights: the checkpoint replaces them."""
    for key, value in spec.args.items():
        if value and key.startswith(_LOADING_ARGS):
            require_trust(
                spec, trust=trust, what=f"build {spec.name} with {key}={value!r}, which loads files"
            )
