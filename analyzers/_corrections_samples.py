"""Which samples are judged."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError

Integers = NDArray[np.int64]

USUAL = 10
"""How many samples are drawn where nothing is asked for."""
_MISCLASSIFIED = re.compile(r"misclassified(?::(.*))?")


def class_labels(targets: Any, n_classes: int) -> Integers | None:
    """Classes (n_samples,) of targets (n_samples,) or (n_samples, n_outputs); None if they are no classes.

    Whole numbers below `n_classes` are classes, whatever their type; negative ones, such as -100, are -1, for
    none. Rows of several numbers are classes if they are probabilities: the likeliest one.
    """
    values = torch.as_tensor(targets).detach().cpu().double().numpy()
    numbers = values.reshape(len(values), -1)
    if not np.isfinite(numbers).all() or numbers.shape[1] not in (1, n_classes):
        return None
    if numbers.shape[1] > 1:
        are_probabilities = (numbers >= 0).all() and np.allclose(numbers.sum(1), 1, atol=1e-4)
        return numbers.argmax(1).astype(np.int64) if are_probabilities else None
    whole = np.round(numbers[:, 0])
    if (whole != numbers[:, 0]).any() or (whole >= n_classes).any() or (whole < 0).all():
        return None
    return np.maximum(whole, -1).astype(np.int64)


def choose_samples(
    labels: Integers | None, decided: Integers, *, sample: str = "", samples: str = "", seed: int = 0
) -> Integers:
    """Numbers of the samples to judge.

    Args:
        labels: Class of every sample of the data, (n_samples,), -1 where unknown; None if there are none.
        decided: Class that the network decides for, (n_samples,).
        sample: Numbers of samples, `17` or `3,17`; negative ones count from the end.
        samples: `20`: so many, drawn at random; `3,17,40`: these; `all`; `misclassified`, or
            `misclassified:20` for at most so many of them. Nothing in either: ten.
        seed: Of the draw, which has a generator of its own. A larger draw holds a smaller one.

    Returns:
        The numbers, each once, in the order given, or ascending.

    Raises:
        OptionError: If both are given, one is no such list, or a sample is not in the data or none is
            misclassified.
    """
    n = len(decided)
    if sample and samples:
        raise OptionError("sample and samples are both given.", "Give --sample 3,17, or --samples 20.")
    if sample:
        return _numbers(sample, n, "sample")
    text = samples.strip() or str(USUAL)
    if text == "all":
        return np.arange(n, dtype=np.int64)
    if wrong := _MISCLASSIFIED.fullmatch(text):
        most = n if wrong[1] is None else _count(wrong[1])
        return _draw(_misclassified(labels, decided), most, seed)
    if "," in text:
        return _numbers(text, n, "samples")
    return _draw(np.arange(n, dtype=np.int64), _count(text), seed)


def _numbers(text: str, n: int, option: str) -> Integers:
    try:
        numbers = [int(part) for part in filter(None, map(str.strip, text.split(",")))]
    except ValueError:
        raise OptionError(
            f"{option}: {text!r} are no numbers of samples.",
            "Give numbers separated by commas, such as 3,17.",
        ) from None
    for number in numbers:
        if not -n <= number < n:
            raise OptionError(
                f"{option}: there is no sample {number} in the data.",
                f"There are {n:,}, numbered from 0 to {n - 1:,}.",
            )
    if not numbers:
        raise OptionError(f"{option}: {text!r} names no sample.", "Give numbers such as 3,17.")
    return np.array(list(dict.fromkeys(number % n for number in numbers)), np.int64)


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text.strip()) or int(text) < 1:
        raise OptionError(
            f"samples: {text!r} is no number of samples.",
            "Give how many (20), which (3,17,40), misclassified, misclassified:20 or all.",
        )
    return int(text)


def _draw(numbers: Integers, count: int, seed: int) -> Integers:
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(numbers[order[:count]])


def _misclassified(labels: Integers | None, decided: Integers) -> Integers:
    if labels is None:
        raise OptionError(
            "samples: which are misclassified is unknown, as the targets are no classes.",
            "Give their numbers, or how many.",
        )
    found = np.flatnonzero((labels != decided) & (labels >= 0)).astype(np.int64)
    if not len(found):
        raise OptionError(
            f"samples: none of {len(decided):,} is misclassified at the last checkpoint.",
            "Give their numbers, or how many; or data that it was not trained on (--data).",
        )
    return found
