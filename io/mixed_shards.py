"""Checkpoints put together from the shards of several: found by tensors that stand still or come back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from dynprobe.io.findings import Finding, Seen, place_of
from dynprobe.io.run_folders import weight_files


def find_mixed(run: str, seen: Sequence[Seen]) -> Iterator[Finding]:
    """Find tensors that return to an earlier checkpoint's values, or stand still in a single shard.

    A frozen tensor never changes and is no finding; a tensor that changed and came back is.
    """
    distinct = [entry for i, entry in enumerate(seen) if entry.hash not in {e.hash for e in seen[:i]}]
    shared: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in sorted({name for entry in distinct for name in entry.telling}):
        last_at: dict[str, int] = {}
        for position, entry in enumerate(distinct):
            value = entry.tensors.get(name)
            if value is None or name not in entry.telling:
                continue
            before = last_at.get(value)
            between = distinct[before + 1 : position] if before is not None else []
            if before is not None and any(other.tensors.get(name) != value for other in between):
                shared[before, position].append(name)
            last_at[value] = position
    for position, names in _stale_shards(distinct):
        shared[position - 1, position] += names
    for (earlier, later), names in sorted(shared.items()):
        first, second = distinct[earlier].checkpoint, distinct[later].checkpoint
        message = (
            f"{second.path} ({place_of(second)}): {len(names)} of {len(distinct[later].tensors)} tensors are "
            f"those of {place_of(first)}, others are not ('{names[0]}', …): shards of two checkpoints mixed?"
        )
        yield Finding("mixed", run, str(second.path), message)


def _stale_shards(seen: list[Seen]) -> Iterator[tuple[int, list[str]]]:
    """Find sharded checkpoints with tensors that stood still for this one interval of the run."""
    n_moves: Counter[str] = Counter()
    for earlier, later in pairwise(seen):
        n_moves.update(name for name in later.telling if later.tensors[name] != earlier.tensors.get(name))
    for position in range(1, len(seen)):
        earlier, later = seen[position - 1], seen[position]
        if len(seen) < 4 or len(weight_files(later.checkpoint.path)) < 2:
            continue
        still = [name for name in sorted(later.telling) if later.tensors[name] == earlier.tensors.get(name)]
        still = [name for name in still if n_moves[name] == len(seen) - 2]
        if still:
            yield position, still
