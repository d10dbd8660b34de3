"""What a checkpoint says about its own place in training: step, epoch, optimizer's counter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dynprobe.io.header import Count
from dynprobe.io.inert import Stub
from dynprobe.io.inert_numpy import NumpyArray
from dynprobe.io.state_search import children, is_optimizer_state
from dynprobe.io.tensor_refs import TensorRef

STEP_KEYS = (
    "global_step", "step", "iteration", "iter", "num_updates", "global_iteration", "current_step",
    "train_step", "steps", "iterations", "iter_num", "n_iter", "num_steps", "it", "batches_seen",
)  # fmt: skip
"""Names under which training scripts save the number of updates, the most explicit first."""

EPOCH_KEYS = ("epoch", "current_epoch", "epochs_done", "num_epochs_done", "ep")

# Where a count would be a plan or another object's, not this checkpoint's own.
_FOREIGN = (
    "arg", "config", "cfg", "hparam", "hyper_param", "ema", "average", "optim", "sched", "callback", "scaler",
    "state_dict", "loop", "rng", "history",
)  # fmt: skip

# The optimizer counts per parameter; all agree but for parameters that joined late.
_PARAMETERS_READ = 8


def counts_in_tree(tree: object) -> list[Count]:
    """Return what an unpickled checkpoint says of its step and epoch, the most trustworthy first.

    Looked up at the top level and one level below, then in the state of an optimizer.
    """
    levels = [dict(_plain_children(tree))]
    levels += [
        dict(_plain_children(value))
        for name, value in levels[0].items()
        if not any(word in name.lower() for word in _FOREIGN)
    ]
    found: list[Count] = []
    for names, unit in ((STEP_KEYS, "step"), (EPOCH_KEYS, "epoch")):
        for level in levels:
            found += _counts(level, names, unit, "in-file ")
    optimizer = optimizer_step(tree)
    if optimizer is not None:
        found.append(Count(optimizer, "step", "optimizer state"))
    return found


def counts_in_facts(facts: Mapping[str, Any], source: str) -> list[Count]:
    """Return the counts among plain facts (safetensors metadata, `trainer_state.json`).

    Args:
        facts: Name → number or text.
        source: Put before the name, e.g. "safetensors metadata".
    """
    prefix = f"{source} "
    return [
        *_counts(facts, STEP_KEYS, "step", prefix),
        *_counts(facts, EPOCH_KEYS, "epoch", prefix),
    ]


def optimizer_step(tree: object) -> int | float | None:
    """Return the largest `step` in the optimizer states of a checkpoint; None if there is none."""
    steps: list[int | float] = []
    for optimizer in _optimizers(tree):
        state = optimizer["state"]
        per_parameter = list(state.values())[:_PARAMETERS_READ] if isinstance(state, dict) else []
        groups = optimizer["param_groups"]
        for slot in [*per_parameter, *(groups if isinstance(groups, list) else [])]:
            value = _number(slot.get("step")) if isinstance(slot, dict) else None
            if value is not None:
                steps.append(value)
    return max(steps, default=None)


def _optimizers(tree: object, depth: int = 0) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict) and is_optimizer_state(tree):
        yield tree
    elif depth < 4 and isinstance(tree, dict | list | tuple | Stub):
        for _, child in children(tree):
            yield from _optimizers(child, depth + 1)


def _plain_children(node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict | Stub):
        for name, value in children(node):
            if isinstance(name, str):
                yield name, value


def _counts(level: Mapping[str, Any], names: tuple[str, ...], unit: str, prefix: str) -> Iterator[Count]:
    for name in names:
        value = _number(level.get(name))
        if value is not None:
            yield Count(value, unit, f"{prefix}{name}")


def _number(value: object) -> int | float | None:
    """Return a count as a number; None for what is none (negative, text, a tensor of many)."""
    if isinstance(value, TensorRef):
        value = value.scalar()
    elif isinstance(value, NumpyArray):
        array = value.value()
        value = array.item() if array is not None and array.size == 1 else None
    elif isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        return None
    return int(value) if value == int(value) else float(value)
