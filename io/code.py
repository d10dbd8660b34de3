"""Code named by the user or by a manifest, and the rule that says which of the two may run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dynprobe.io.errors import InputError, UntrustedCode
from dynprobe.io.names import suggestion
from dynprobe.io.spec import absolute, shown

if TYPE_CHECKING:
    from dynprobe.io.spec import Spec


def names_code(name: str) -> bool:
    """Whether `name` is `package.module:callable` or `path/to/file.py:callable`.

    >>> names_code("mynets.resnet:make"), names_code("nets.py:make"), names_code("digits.npz")
    (True, True, False)
    """
    module, attribute = _split(name)
    if not attribute.isidentifier():
        return False
    return module.endswith(".py") or all(part.isidentifier() for part in module.split("."))


def resolve_callable(spec: Spec, *, trust: bool) -> Callable[..., Any]:
    """Import what `spec` names, if it may run.

    Args:
        spec: Its name is `package.module:callable` or `path/to/file.py:callable`. Importing either runs the
            module's top level.
        trust: Whether code named by a manifest may run. What the user typed always may.

    Returns:
        The callable.

    Raises:
        UntrustedCode: A manifest names the code and `trust` is off. Nothing was imported.
        InputError: The file, module or name does not exist, fails when imported, or is not callable.
    """
    module_name, attribute = _split(spec.name)
    if not names_code(spec.name):
        raise InputError(
            f"{spec.name!r} names no callable.", "Write package.module:callable or path/to/file.py:callable."
        )
    require_trust(
        spec, trust=trust, what=f"import {_describe(module_name)} and call {attribute}({_call(spec)})"
    )
    module = _load(module_name)
    try:
        found = getattr(module, attribute)
    except AttributeError:
        public = [
            name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
        ]
        raise InputError(
            f"{_describe(module_name)} has no {attribute!r}.", suggestion(attribute, public)
        ) from None
    if not callable(found):
        raise InputError(f"{spec.name}: {attribute!r} is a {type(found).__name__}, not a callable.")
    return found  # type: ignore[no-any-return]


def require_trust(spec: Spec, *, trust: bool, what: str) -> None:
    """Refuse what only trusted input may do.

    Raises:
        UntrustedCode: `spec` comes from a manifest and `trust` is off; says `what` would run.
    """
    if spec.trusted or trust:
        return
    raise UntrustedCode(
        f"{shown(spec.origin)} came with the data and names code: it would {what}. Nothing was run.",
        "Read that code first; then repeat the command with --trust.",
    )


def _split(name: str) -> tuple[str, str]:
    """Module (or file) and attribute; the last colon counts, since a path may hold others."""
    module, _, attribute = name.rpartition(":")
    return module, attribute


def _describe(module_name: str) -> str:
    if module_name.endswith(".py"):
        return f"the file {shown(module_name)}"
    return f"the module {module_name}"


def _call(spec: Spec) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in spec.args.items())


def _load(module_name: str) -> ModuleType:
    """Import a dotted module, or run a file as one; any failure names it."""
    try:
        if module_name.endswith(".py"):
            return _load_file(Path(module_name))
        with _on_path(Path.cwd()):
            return importlib.import_module(module_name)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        tip = ""
        if error.name and module_name.split(".")[0] == error.name.split(".")[0]:
            tip = "Run from the folder that holds it, install it, or name the file: path/to/file.py:callable."
        raise InputError(f"{_describe(module_name)} cannot be imported: {error}.", tip) from error
    except Exception as error:
        raise InputError(
            f"{_describe(module_name)} fails when imported: {type(error).__name__}: {error}"
        ) from error


def _load_file(path: Path) -> ModuleType:
    path = absolute(path)
    if not path.is_file():
        raise InputError(f"{shown(path)}: no such file.")
    # One module object per file, so that two names from it share their classes.
    name = f"dynprobe_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None  # the name ends in .py, so there is a loader
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickling look their own module up
    try:
        with _on_path(path.parent):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """`folder` first on `sys.path`, as Python does for a script, so that neighbours can be imported."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
