"""Which analyzers there are: files of this package and entry points, listed without importing them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType

from dynprobe.analyzers.core.contract import MARKER, Declaration, DeclarationError

GROUP = "dynprobe.analyzers"
_FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Entry:
    """One analyzer in the listing.

    Args:
        name: As typed on the command line.
        line: What it does, one line.
        origin: Module of a built-in, or `distribution (module:attribute)` of a plug-in.
    """

    name: str
    line: str
    origin: str


@cache
def listing() -> Mapping[str, Entry]:
    """Every analyzer by name; a plug-in never hides a built-in of the same name."""
    found = {entry.name: entry for entry in _builtins()}
    for point in entry_points(group=GROUP):
        owner = point.dist.name if point.dist else "unknown package"
        found.setdefault(point.name, Entry(point.name, f"(from {owner})", f"{owner} ({point.value})"))
    return MappingProxyType(found)


def clashes() -> list[str]:
    """Sentences about plug-ins that lose against a built-in of the same name."""
    builtin = {entry.name for entry in _builtins()}
    return [
        f"the plug-in {p.name!r} ({p.value}) is hidden by the built-in analyzer of that name"
        for p in entry_points(group=GROUP)
        if p.name in builtin
    ]


class UnknownAnalyzer(LookupError):
    """No analyzer has that name, or no file or function is where the user says."""


def load(name: str) -> Declaration:
    """Import one analyzer.

    Args:
        name: As typed, hyphens or underscores.

    Raises:
        UnknownAnalyzer: If no analyzer has that name; the message lists those there are.
        DeclarationError: If its module declares nothing, or a plug-in cannot be imported.
    """
    name = name.replace("_", "-")
    if name in {entry.name for entry in _builtins()}:
        return _declared(importlib.import_module(f"dynprobe.analyzers.{name.replace('-', '_')}"), name)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _from_entry_point(point)
    raise UnknownAnalyzer(f"no analyzer {name!r}; there are {', '.join(sorted(listing()))}")


def load_file(path: Path, attribute: str) -> Declaration:
    """Import one analyzer from a Python file of the user's.

    Raises:
        UnknownAnalyzer: If the file or the attribute does not exist.
        DeclarationError: If the attribute is not a declared analyzer.
    """
    if not path.is_file():
        raise UnknownAnalyzer(f"{path}: no such file")
    name = f"dynprobe_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UnknownAnalyzer(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # get_type_hints and pickling look the module up by name
    try:
        spec.loader.exec_module(module)
    except DeclarationError:
        raise
    except Exception as error:
        raise DeclarationError(f"{path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    if not attribute:
        return _declared(module, path.stem)
    if not hasattr(module, attribute):
        raise UnknownAnalyzer(f"{path} has no {attribute!r}")
    found = getattr(getattr(module, attribute), MARKER, None)
    if not isinstance(found, Declaration):
        raise DeclarationError(
            f"{path}:{attribute} is not an analyzer: decorate it with @analyzer(returns=…)"
        )
    return found


def _line(error: Exception, path: Path) -> str:
    """`, line N` of the last frame of a user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    if isinstance(error, SyntaxError):
        numbers.append(error.lineno)
    return f", line {numbers[-1]}" if numbers else ""


def source_files(declaration: Declaration) -> list[Path]:
    """The files whose text decides what the analyzer computes, for the resume key."""
    own = Path(inspect.getfile(declaration.function)).resolve()
    return sorted({own, *_FOLDER.rglob("*.py")})


def _builtins() -> list[Entry]:
    entries = []
    for path in sorted(_FOLDER.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        module = f"dynprobe.analyzers.{path.stem}"
        entries.append(Entry(path.stem.replace("_", "-"), text.split("\n")[0], module))
    return entries


def _declared(module: ModuleType, name: str) -> Declaration:
    found = [
        d for d in (getattr(v, MARKER, None) for v in vars(module).values()) if isinstance(d, Declaration)
    ]
    named = [d for d in found if d.name == name.replace("_", "-")]
    if len(named) == 1 or len(found) == 1:
        return (named or found)[0]
    raise DeclarationError(
        f"{module.__name__} declares {[d.name for d in found] or 'no analyzer'}; "
        f"expected one called {name!r} (decorate a function with @analyzer)"
    )


def _from_entry_point(point: EntryPoint) -> Declaration:
    try:
        loaded = point.load()
    except Exception as error:
        raise DeclarationError(
            f"the plug-in {point.name!r} ({point.value}) cannot be imported: {error}"
        ) from error
    if isinstance(loaded, ModuleType):
        return _declared(loaded, point.name)
    found = getattr(loaded, MARKER, None)
    if not isinstance(found, Declaration):
        raise DeclarationError(f"the plug-in {point.name!r} ({point.value}) is not an analyzer")
    return found
