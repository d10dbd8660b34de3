"""One axis for all checkpoints of a run, from what each of them says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dynprobe.io.header import Count

SOURCES = (
    "command line", "manifest", "in-file", "safetensors metadata", "trainer_state.json", "optimizer state",
    "file name",
)  # fmt: skip
"""Who is believed first."""


@dataclass(frozen=True)
class Claims:
    """What one checkpoint says.

    Attributes:
        name: For messages.
        counts: Its counts, in any order.
        readable: Whether its header could be read; a damaged file has its name only.
    """

    name: str
    counts: Sequence[Count]
    readable: bool = True


@dataclass
class Axis:
    """The axis that was agreed on.

    Attributes:
        unit: "step" or "epoch"; "order" where nothing is known.
        places: One count per checkpoint; None where it has no place on this axis.
        notes: Which sources were set aside, and why.
    """

    unit: str
    places: list[Count | None]
    notes: list[str] = field(default_factory=list)


def agree(claims: Sequence[Claims]) -> Axis:
    """Choose the unit that all checkpoints share, and each one's place on it.

    Steps are preferred to epochs; never both on one axis. A less trusted source fills gaps only where it does
    not contradict a more trusted one on the checkpoints that have both.

    Args:
        claims: One entry per checkpoint.

    Returns:
        The axis; its unit is "order", all places None, where fewer than half of the checkpoints have one.
    """
    settled = _settle_bare_numbers(claims)
    steps, step_notes = _places(claims, settled, "step")
    epochs, epoch_notes = _places(claims, settled, "epoch")
    readable = [index for index, claim in enumerate(claims) if claim.readable]
    n_steps = sum(steps[index] is not None for index in readable)
    n_epochs = sum(epochs[index] is not None for index in readable)
    if n_steps < len(readable) and n_epochs > n_steps:
        note = f"{n_steps} of {len(readable)} checkpoints know their step, {n_epochs} their epoch: by epoch"
        return Axis("epoch", epochs, [*epoch_notes, *([note] if n_steps else [])])
    if not readable and any(steps):
        return Axis("step", steps, step_notes)
    if n_steps * 2 < len(readable) or not n_steps:
        return Axis("order", [None] * len(claims))
    return Axis("step", steps, step_notes)


def _settle_bare_numbers(claims: Sequence[Claims]) -> list[list[Count]]:
    """Call the bare number of a name (`checkpoint-12`) an epoch where the files say so, else a step."""
    pairs = []
    for claim in claims:
        number = next((count.value for count in claim.counts if count.unit == "number"), None)
        epoch = next((count.value for count in claim.counts if count.unit == "epoch"), None)
        if number is not None and epoch is not None:
            pairs.append((number, epoch))
    # Some scripts save the epoch's index, others how many are done.
    is_epoch = bool(pairs) and any(
        all(number == epoch + shift for number, epoch in pairs) for shift in (0, 1)
    )
    unit = "epoch" if is_epoch else "step"
    return [
        [
            Count(count.value, unit, count.source) if count.unit == "number" else count
            for count in claim.counts
        ]
        for claim in claims
    ]


def _places(
    claims: Sequence[Claims], counts: Sequence[Sequence[Count]], unit: str
) -> tuple[list[Count | None], list[str]]:
    """Return each checkpoint's count of one unit, and notes on sources that were set aside."""
    layers = {source: _layer(counts, unit, source) for source in SOURCES}
    chosen: dict[int, Count] = {}
    aside = []
    for source, layer in layers.items():
        both = [index for index in layer if index in chosen]
        agreeing = sum(layer[index].value == chosen[index].value for index in both)
        gaps = [index for index in layer if index not in chosen]
        is_guess = any(count.unit == "number" for index in gaps for count in claims[index].counts)
        if (
            chosen
            and gaps
            and (agreeing * 2 < len(both) or (not both and source == "file name" and is_guess))
        ):
            aside.append(source)
            continue
        chosen.update({index: layer[index] for index in gaps})
    readable = {index for index, claim in enumerate(claims) if claim.readable}
    if aside and readable - set(chosen):
        # A source that was set aside, but knows every checkpoint, gives one axis; the better ones give gaps.
        for source in aside:
            if readable <= set(layers[source]):
                note = f"ordered by {source}: better sources know {len(chosen)} of {len(claims)} checkpoints"
                return [layers[source].get(index) for index in range(len(claims))], [note]
    return [chosen.get(index) for index in range(len(claims))], []


def _layer(counts: Sequence[Sequence[Count]], unit: str, source: str) -> dict[int, Count]:
    layer = {}
    for index, own in enumerate(counts):
        first = next((c for c in own if c.unit == unit and c.source.startswith(source)), None)
        if first is not None:
            layer[index] = first
    return layer
