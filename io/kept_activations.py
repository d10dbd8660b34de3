"""Activations kept on disk: one safetensors file per checkpoint, found again by what decides them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.atomic import check_writable, remove_leftovers, write_atomically
from dynprobe.io.errors import CannotWrite, InputError, UnusableData
from dynprobe.io.hashing import content_hash
from dynprobe.io.readers.safetensors_file import load_file, read_header

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("dynprobe")

Treated = Mapping[str, "tuple[Tensor, Tensor | None, str]"]
"""By layer: values `(n_rows, n_features)`; sample of every row, None where row i is sample i; treatment."""

MARK = "dynprobe_activations"
"""Metadata that marks a file as ours; its value is the version of the layout."""

_ANEW = "Delete it: --keep-activations writes it anew."

LAYOUT = "1"
SAMPLE = "::sample"
"""What the name of a layer's map from rows to samples ends with."""


@dataclass(frozen=True)
class KeptFile:
    """What one file holds.

    Attributes:
        layers: Values, sample map and treatment by layer, in the order in which the layers fired.
        facts: Its metadata: key, input_hash, run, step, dynprobe, checksum.
    """

    layers: dict[str, tuple[Tensor, Tensor | None, str]]
    facts: dict[str, str]


class KeptActivations:
    """A folder of recorded activations that later calls need not record again.

    Files are named after run and step, with the first digits of a hash of the key; the whole key stands
    inside. Many processes may read and write at once.

    Args:
        folder: Where they are; made if need be.

    Raises:
        CannotWrite: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_writable(folder / "activations.safetensors")
        remove_leftovers(folder)

    def get(self, key: str) -> dict[str, tuple[Tensor, Tensor | None, str]] | None:
        """The layers kept under a key as (values, sample, treatment), or None if there are none.

        A file that is damaged or not ours is left as it is and counts as none, with a warning.
        """
        for path in sorted(self.folder.glob(f"*_{_digest(key)}.safetensors")):
            try:
                kept = read_kept(path)
            except InputError as error:
                log.warning("%s Its activations are recorded again.", error)
                continue
            if kept.facts.get("key") == key:
                return kept.layers
        return None

    def put(self, key: str, layers: Treated, facts: Mapping[str, Any]) -> None:
        """Keep layers under a key; where the disk does not let it, a warning says so.

        Args:
            key: Equal keys mean equal activations.
            layers: Values `(n_rows, n_features)`, sample map and treatment by layer.
            facts: `run`, `step`, `input_hash`.
        """
        run = re.sub(r"[^A-Za-z0-9.=-]+", "_", str(facts.get("run") or "")).strip("_.")[-80:] or "activations"
        step = "" if facts.get("step") is None else f"_step_{facts['step']}"
        path = self.folder / f"{run}{step}_{_digest(key)}.safetensors"
        try:
            write_atomically(path, _content(key, layers, facts))
        except CannotWrite as error:  # the measurement itself is not in danger
            log.warning("%s The activations are used, but not kept.", error.message)


def is_kept(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a safetensors file are those of kept activations."""
    return MARK in metadata


def read_kept(path: Path) -> KeptFile:
    """Read a file of kept activations.

    Raises:
        UnusableData: It is not one, or is damaged.
        UnreadableCheckpoint: It is no whole safetensors file.
    """
    try:
        _infos, facts = read_header(path)
    except OSError as error:
        raise UnusableData(
            f"{path}: cannot be read: {error.strerror or error}.", "Is the path right?"
        ) from error
    if not is_kept(facts):
        raise UnusableData(f"{path}: holds no activations that dynprobe kept.", "Move it elsewhere.")
    if facts[MARK] != LAYOUT:
        raise UnusableData(f"{path}: was written by a newer dynprobe.", "Update dynprobe to read it.")
    tensors = load_file(path)
    if _checksum(tensors, facts) != facts.get("checksum"):
        raise UnusableData(f"{path}: does not match its checksum: it was damaged or altered.", _ANEW)
    try:
        treatments = json.loads(facts["treatments"])
        # Our own order: the format sorts tensors by name.
        layers = {n: (tensors[n], tensors.get(n + SAMPLE), str(text)) for n, text in treatments.items()}
    except (KeyError, AttributeError, ValueError) as error:
        raise UnusableData(f"{path}: what it says of its layers is damaged.", _ANEW) from error
    return KeptFile(layers, facts)


def _content(key: str, layers: Treated, facts: Mapping[str, Any]) -> bytes:
    """The bytes of a file."""
    from safetensors.numpy import save

    from dynprobe import __version__

    # Of an array that is not contiguous, save() would write the memory as it lies.
    tensors = {
        name: values.detach().cpu().contiguous() for name, (values, _sample, _treatment) in layers.items()
    }
    tensors |= {
        n + SAMPLE: sample.cpu().contiguous() for n, (_v, sample, _t) in layers.items() if sample is not None
    }
    # A folder's name may hold bytes that are no UTF-8.
    metadata = {
        n: str(v).encode(errors="backslashreplace").decode() for n, v in facts.items() if v is not None
    }
    metadata |= {
        MARK: LAYOUT,
        "key": key,
        "treatments": json.dumps({name: treatment for name, (_v, _s, treatment) in layers.items()}),
        "dynprobe": __version__,
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    # Not safetensors.torch: layers that hand on their input share its memory, which that refuses.
    return save({name: tensor.numpy() for name, tensor in tensors.items()}, metadata)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    texts = {name: text for name, text in metadata.items() if name != "checksum"}
    content = content_hash(tensors) + json.dumps(texts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]
