"""What `rsa` takes from the data: the stimuli that samples are repeats of, their classes and inputs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynprobe.analyzers._predictors import read_labels
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.rdm import Integers, condition_means


@dataclass(frozen=True)
class Conditions:
    """Which samples are repeats of one stimulus.

    Attributes:
        label: Condition of each sample, shape (n_samples,); None where every sample is a stimulus.
        names: Of the conditions.
        n_samples: How many samples there are.
    """

    label: Integers | None
    names: list[str]
    n_samples: int

    @property
    def n_stimuli(self) -> int:
        """Conditions, or samples."""
        return self.n_samples if self.label is None else len(self.names)

    @property
    def digest(self) -> str:
        """Tells these conditions from others."""
        text = b"" if self.label is None else self.label.tobytes()
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Patterns of the stimuli, (n_samples, n_features) to (n_stimuli, n_features)."""
        return values if self.label is None else condition_means(values, self.label)


def conditions_of(option: str, batches: Any, n_samples: int) -> Conditions:
    """What `--conditions` says.

    Args:
        option: "", targets, or a file.
        batches: The data, for targets.
        n_samples: Of the activations.

    Raises:
        OptionError: If there are no classes to read, or the file does not fit.
    """
    if not option:
        return Conditions(None, [], n_samples)
    if option != "targets":
        label, names = read_labels(option, n_samples)
    else:
        found, label = np.unique(class_targets(batches, "conditions targets"), return_inverse=True)
        label, names = label.astype(np.int64), [str(name) for name in found]
    if len(names) < 3:
        raise OptionError(
            f"conditions {option}: {len(names)} conditions, and an RDM needs 3 to be compared.",
            "Leave out --conditions to take every sample as a stimulus.",
        )
    return Conditions(label, names, n_samples)


def class_targets(batches: Any, option: str) -> Integers:
    """The class of every sample.

    Raises:
        OptionError: If there are no data, or targets are no classes.
    """
    if batches is None:
        raise OptionError(
            f"{option} needs the data, and saved activations come without.",
            "Give a .npy or .csv file with one label for each sample.",
        )
    targets = torch.cat([torch.as_tensor(targets) for _inputs, targets in batches]).cpu()
    if targets.ndim != 1 or targets.is_floating_point():
        raise OptionError(
            f"{option}: the targets are {targets.dtype} of shape {tuple(targets.shape)}, no classes.",
            "Give a .npy or .csv file with one label for each sample.",
        )
    return targets.numpy().astype(np.int64)


def input_vectors(batches: Any) -> torch.Tensor:
    """The first input of every sample as a vector, shape (n_samples, n_values).

    Raises:
        OptionError: If there are no data, or they are no numbers that have distances.
    """
    if batches is None:
        raise OptionError(
            "predictors pixels needs the data, and saved activations come without.",
            "Give the inputs as a .npy table instead.",
        )
    parts: list[torch.Tensor] = []
    for inputs, _targets in batches:
        tensors: list[torch.Tensor] = []
        map_tensors(lambda t, to=tensors: to.append(t) or t, inputs)  # type: ignore[misc]
        floating = [t for t in tensors if t.is_floating_point()]
        if not floating:
            raise OptionError(
                "predictors pixels: the inputs are integers (tokens), which have no distances.",
                "Give a table of features instead.",
            )
        parts.append(floating[0].flatten(1).cpu())
    return torch.cat(parts)
