"""Find the weights in whatever a training script saved: the largest name → tensor mapping."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dynprobe.io.errors import InputError, UnreadableCheckpoint
from dynprobe.io.inert import Stub
from dynprobe.io.tensor_refs import TensorRef

MAX_DEPTH = 32
MAX_NODES = 1_000_000
MAX_MODULES = 200_000

_OPTIMIZER_NAME = re.compile(r"optim|^opt(s|_state.*)?$|sched|^scaler|^rng|random_state", re.IGNORECASE)
_AVERAGE_NAME = re.compile(r"(^|_)(ema|swa|avg|averaged?|polyak|shadow|teacher)(_|$|[0-9])", re.IGNORECASE)
_WRAPPERS = ("module.", "_orig_mod.")


class NoWeights(UnreadableCheckpoint):
    """A file that was read without fault and holds no weights (an optimizer's state, say)."""


class NoSuchKey(InputError):
    """`--key` or `--ema` names what a checkpoint does not hold."""


@dataclass(frozen=True)
class Found:
    """One name → tensor mapping of a file.

    Attributes:
        path: Where it is, e.g. ("model", "state_dict"); empty for the file's top level.
        tensors: Name → reference.
        is_module: Whether it was put together from a pickled `nn.Module`.
        is_mixed: Whether the tensors are a minority of what stands there (a loss, an RNG's state).
    """

    path: tuple[str, ...]
    tensors: dict[str, TensorRef]
    is_module: bool = False
    is_mixed: bool = False

    @property
    def key(self) -> str:
        """The path as `--key` takes it."""
        return ".".join(self.path)

    @cached_property
    def size(self) -> tuple[bool, int, int]:
        """What candidates are ranked by: unmixed first, then floating-point elements, then all elements."""
        floating = [
            ref.numel for ref in self.tensors.values() if "float" in ref.dtype or "complex" in ref.dtype
        ]
        return not self.is_mixed, sum(floating), sum(ref.numel for ref in self.tensors.values())

    @property
    def is_average(self) -> bool:
        """Whether its name says that it is an average of the weights (EMA, SWA, teacher)."""
        return any(_AVERAGE_NAME.search(part) for part in self.path)


def find_state(
    tree: object, where: str, *, key: str | None = None, ema: bool = False
) -> tuple[Found, list[str]]:
    """Choose the weights of a checkpoint.

    Args:
        tree: The unpickled file.
        where: The file's name, for messages.
        key: Choose the mapping at this dotted path, or the largest below it.
        ema: Prefer an averaged copy.

    Returns:
        The mapping, and notes on what else there was.

    Raises:
        NoWeights: There is no name → tensor mapping outside the optimizer's state.
        NoSuchKey: None at `key`, or `ema` was asked for and there is none; lists the candidates.
    """
    candidates = list(_candidates(tree))
    if not candidates:
        raise NoWeights(f"{where}: holds no weights (no mapping from names to tensors).")
    pool = candidates
    if key is not None:
        pool = [found for found in pool if found.key == key]
        pool = pool or [found for found in candidates if found.key.startswith(key + ".")]
        if not pool:
            raise NoSuchKey(f"{where}: nothing at --key {key}.", tip=_listing(candidates))
    elif ema:
        pool = [found for found in pool if found.is_average]
        if not pool:
            what = "--ema was given, but no averaged copy is found"
            raise NoSuchKey(f"{where}: {what}.", tip=_listing(candidates))
    else:
        pool = _without_averages(pool)
    chosen = max(pool, key=lambda found: (found.size, -len(found.path)))
    return chosen, _notes(chosen, candidates, asked=key is not None)


def strip_wrappers(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Undo the prefixes that wrappers put before every name.

    `module.` (DataParallel, DDP) and `_orig_mod.` (torch.compile), in any order and number, and the counter
    `n_averaged` of `torch.optim.swa_utils.AveragedModel`.

    Args:
        names: All names of a state dict.

    Returns:
        Old name → new name (dropped names are missing), and notes on what was done.
    """
    renamed = {name: name for name in names}
    notes = []
    if "n_averaged" in renamed and any(name.startswith("module.") for name in renamed):
        rest = [name for name in renamed if name != "n_averaged"]
        if all(name.startswith("module.") for name in rest):
            del renamed["n_averaged"]
            notes.append("dropped 'n_averaged' (weights averaged by SWA)")
    stripped = ""
    while renamed:
        prefix = next((p for p in _WRAPPERS if all(new.startswith(p) for new in renamed.values())), None)
        if prefix is None:
            break
        renamed = {old: new.removeprefix(prefix) for old, new in renamed.items()}
        stripped += prefix
    if stripped:
        notes.append(f"stripped the prefix '{stripped}' from every name")
    return renamed, notes


def is_optimizer_state(node: object) -> bool:
    """Whether a mapping is what `optimizer.state_dict()` returns."""
    return isinstance(node, dict) and "param_groups" in node and "state" in node


def children(node: object) -> Iterator[tuple[str | int, object]]:
    """Yield the named parts of a mapping, stub or (short) list."""
    if isinstance(node, Stub):
        items: Mapping[Any, Any] = node.attributes
        if not items and node.elements:
            items = dict(enumerate(node.elements[:1000]))
    elif isinstance(node, dict):
        items = node
    elif isinstance(node, list | tuple):
        items = dict(enumerate(node[:1000]))
    else:
        return
    for name, value in items.items():
        if isinstance(name, str | int):
            yield name, value


def _candidates(tree: object) -> Iterator[Found]:
    """Walk the tree breadth first, each object once, skipping optimizers."""
    queue: deque[tuple[tuple[str, ...], object]] = deque([((), tree)])
    seen: set[int] = set()
    while queue and len(seen) < MAX_NODES:
        path, node = queue.popleft()
        if id(node) in seen or len(path) > MAX_DEPTH or is_optimizer_state(node):
            continue
        if not isinstance(node, dict | list | tuple | Stub):
            continue
        seen.add(id(node))
        if isinstance(node, Stub) and _is_module(node):
            tensors = dict(_module_tensors(node))
            if tensors:
                yield Found(path, tensors, is_module=True)
            continue
        parts = list(children(node))
        named = {name: ref for name, ref in parts if isinstance(name, str) and isinstance(ref, TensorRef)}
        if named:
            yield Found(path, named, is_mixed=len(named) * 2 < len(parts))
        queue.extend(((*path, str(name)), value) for name, value in parts if not _skipped(name))


def _skipped(name: str | int) -> bool:
    return isinstance(name, str) and _OPTIMIZER_NAME.search(name) is not None


def _is_module(stub: Stub) -> bool:
    attributes = stub.attributes
    return all(isinstance(attributes.get(name), dict) for name in ("_parameters", "_buffers", "_modules"))


def _module_tensors(root: Stub) -> Iterator[tuple[str, TensorRef]]:
    """Yield what `nn.Module.state_dict` would: parameters and persistent buffers, depth first."""
    stack: list[tuple[str, Stub, int]] = [("", root, 0)]
    visited = 0
    while stack:
        prefix, module, depth = stack.pop()
        visited += 1
        if visited > MAX_MODULES or depth > 1000:  # modules inside themselves, or shared without end
            raise UnreadableCheckpoint("A pickled module contains itself or has absurdly many parts.")
        attributes = module.attributes
        hidden = attributes.get("_non_persistent_buffers_set") or ()
        for name, value in (*attributes["_parameters"].items(), *attributes["_buffers"].items()):
            if isinstance(value, TensorRef) and not (name in attributes["_buffers"] and name in hidden):
                yield f"{prefix}{name}", value
        for name, child in reversed(attributes["_modules"].items()):
            if isinstance(child, Stub) and _is_module(child):
                stack.append((f"{prefix}{name}.", child, depth + 1))


def _without_averages(pool: list[Found]) -> list[Found]:
    """Drop averaged copies where the weights themselves are there too."""
    plain = [found for found in pool if not found.is_average]
    return plain if plain and _floating(plain) * 2 >= _floating(pool) else pool


def _floating(pool: list[Found]) -> int:
    return max(found.size[1] for found in pool)


def _notes(chosen: Found, candidates: list[Found], *, asked: bool) -> list[str]:
    notes = []
    if chosen.is_module:
        notes.append("weights taken out of a pickled nn.Module, without running its code")
    if chosen.path and not asked:
        notes.append(f"weights found at '{chosen.key}'")
    # Stray single tensors (a loss, a mean) are no alternatives.
    least = max(chosen.size[1] / 10, 1)
    least = max(chosen.size[1] / 10, 1)
    others = [found for found in candidates if found is not chosen and found.size[1] >= least]
    if others and not asked:
        listed = ", ".join(f"'{found.key}'" for found in others[:5])
        notes.append(f"also holds {listed} (choose with --key)")
    return notes


def _listing(candidates: list[Found]) -> str:
    ranked = sorted(candidates, key=lambda found: found.size, reverse=True)[:10]
    lines = [f"  {found.key or '(top level)'}: {len(found.tensors)} tensors" for found in ranked]
    return "\n".join(["It holds:", *lines])
