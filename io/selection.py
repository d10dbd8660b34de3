"""What `--steps` means: names, steps, ranges of steps, slices of the list."""

from __future__ import annotations

from collections.abc import Sequence

from dynprobe.io.errors import InputError

_SHOWN = 20


def select_steps(text: str, steps: Sequence[int | float | None], run: str) -> list[int]:
    """Return the positions that `text` names in a run's list of steps, in order, each once.

    Args:
        text: "all", "first", "last", "0,100,200" (steps), "::5" (slice of the list), "100:2000" (range of
            steps, both ends included, either may be missing), or several joined by commas.
        steps: The steps that exist, ascending; None for checkpoints without one.
        run: The run's name, for messages.

    Raises:
        InputError: A part means nothing, or no checkpoint fits it.
    """
    chosen: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        positions = _positions(part, steps)
        if not positions:
            raise InputError(f"--steps {text}: no checkpoint of {run} at '{part}'.", tip=_existing(steps))
        chosen.update(positions)
    return sorted(chosen)


def _positions(part: str, steps: Sequence[int | float | None]) -> list[int]:
    everything = list(range(len(steps)))
    if part == "all":
        return everything
    if part == "first":
        return everything[:1]
    if part == "last":
        return everything[-1:]
    try:
        fields = part.split(":")
        if not part or len(fields) > 3:
            raise ValueError(part)
        if len(fields) == 3:
            first, last, stride = (int(field) if field else None for field in fields)
            return everything[first:last:stride]
        numbers = [float(field) if field else None for field in fields]
    except ValueError as error:
        raise InputError(
            f"--steps {part}: is no step, range or slice.",
            tip="Use all, first, last, 0,100,200, 100:2000 (steps) or ::5 (every fifth).",
        ) from error
    if len(numbers) == 2:
        low, high = (float("-inf") if numbers[0] is None else numbers[0]), numbers[1]
        high = float("inf") if high is None else high
        return [i for i, step in enumerate(steps) if step is not None and low <= step <= high]
    return [i for i, step in enumerate(steps) if step is not None and numbers == [step]]


def _existing(steps: Sequence[int | float | None]) -> str:
    known = [f"{step:g}" if isinstance(step, float) else str(step) for step in steps if step is not None]
    if len(known) > _SHOWN:
        known = [*known[: _SHOWN // 2], "…", *known[-_SHOWN // 2 :]]
    return f"Steps that exist: {', '.join(known)}." if known else "No checkpoint here has a step."
