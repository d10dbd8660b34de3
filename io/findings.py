"""What an audit says, and what it remembers of a checkpoint after its weights are let go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynprobe.io.checkpoints import Checkpoint


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a sequence.

    Attributes:
        kind: "damaged", "not finite", "drift", "duplicate", "mixed", "missing", "order" or "step mismatch".
        run: The run's name.
        path: The file concerned; empty where it is the run as a whole.
        message: What is wrong, in one line.
    """

    kind: str
    run: str
    path: str
    message: str


@dataclass
class Seen:
    """What is kept of a checkpoint.

    Attributes:
        checkpoint: Which one.
        hash: Its content hash.
        tensors: Name → hash of the tensor.
        telling: Names of the tensors whose equality means the same moment of training.
    """

    checkpoint: Checkpoint
    hash: str
    tensors: dict[str, str] = field(default_factory=dict)
    telling: set[str] = field(default_factory=set)


def place_of(checkpoint: Checkpoint) -> str:
    """Return "step 300", or the file's name where there is no step."""
    return checkpoint.path.name if checkpoint.step is None else f"{checkpoint.step_unit} {checkpoint.step}"
