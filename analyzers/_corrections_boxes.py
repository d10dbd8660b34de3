"""Boxes of corrections in the features' own units: verified as they are reported, sampled, compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers._corrections_columns import Columns
from dynprobe.analyzers._corrections_model import Classifier
from dynprobe.analyzers.numerics.box_verifier import Verdict, verify
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.polygon_verifier import verify_polygon

_CHUNK = 8192
"""Points in one forward pass."""


@dataclass(frozen=True)
class ReportedBox:
    """A box in the features' own units, with every reported column.

    Args:
        low: (n_reported,).
        high: (n_reported,); equal to `low` where a feature does not change.
    """

    low: Floats
    high: Floats

    @property
    def is_known(self) -> bool:
        """Whether there is one."""
        return bool(np.isfinite(self.low).all())


def holds(
    classifier: Classifier,
    columns: Columns,
    point: Floats,
    box: ReportedBox,
    target: int,
    margin: float,
    deadline: float,
) -> Verdict:
    """Whether a box, exactly as reported, is all target with the margin, by the complete verifier.

    The network is cut to the box anew from the numbers of the report: nothing of the search is reused.

    Args:
        classifier: Whose decisions are meant.
        columns: What the report shows.
        point: The judged input, (n_inputs,).
        box: In the features' own units.
        target: The class.
        margin: Least output that counts.
        deadline: As `time.monotonic()` gives it.
    """
    low, high, index = box_inputs(columns, point, box)
    moving = np.flatnonzero(low != high)
    fixed = place(point, index, low)
    network = classifier.margins(target).restricted(fixed, index[moving].tolist(), low[moving], high[moving])
    k = len(moving)
    return verify(network, np.zeros(k), np.ones(k), margin, deadline=deadline)


def box_inputs(columns: Columns, point: Floats, box: ReportedBox) -> tuple[Floats, Floats, np.ndarray]:
    """Corners of a box as inputs of the network, with their positions; what does not move keeps its bits."""
    index = columns.index
    own = columns.shown(point)
    low, high = columns.inputs(box.low), columns.inputs(box.high)
    still = (box.low == own) & (box.high == own)
    return np.where(still, point[index], low), np.where(still, point[index], high), index


def place(point: Floats, index: np.ndarray, values: Floats) -> Floats:
    """A copy of an input with some entries replaced."""
    changed = point.copy()
    changed[index] = values
    return changed


def sample_box(
    classifier: Classifier,
    columns: Columns,
    point: Floats,
    box: ReportedBox,
    target: int,
    n_samples: int,
    seed: int,
    deadline: float,
) -> tuple[int, int]:
    """How many points of a box were tried in the model's own dtype, and how many of them are not the target.

    A quarter of them lies on faces, edges and corners, where failures would be.

    Returns:
        Number tried, which is less than `n_samples` where time ran out, and number of failures.
    """
    low, high, index = box_inputs(columns, point, box)
    generator = np.random.default_rng(seed)

    def draw(n: int, tried: int) -> Floats:
        t = generator.random((n, len(index)))
        edge = generator.random((n, 1)) < 0.25
        at_edge = edge & (generator.random((n, len(index))) < generator.random((n, 1)))
        t = np.where(at_edge, np.round(t), t)
        if not tried:
            corners = min(n, 2 ** min(len(index), 12))
            t[:corners] = (np.arange(corners)[:, None] >> np.arange(len(index)) % 12) & 1
        return np.asarray(low + t * (high - low))

    return _tried(classifier, point, index, draw, target, n_samples, deadline)


def _tried(
    classifier: Classifier,
    point: Floats,
    index: np.ndarray,
    draw: Callable[[int, int], Floats],
    target: int,
    n_samples: int,
    deadline: float,
) -> tuple[int, int]:
    """Try points that `draw(n, already drawn)` gives for some columns of an input, until time runs out."""
    tried = failed = 0
    while tried < n_samples and time.monotonic() < deadline:
        n = min(_CHUNK, n_samples - tried)
        points = np.repeat(point[None], n, 0)
        points[:, index] = draw(n, tried)
        failed += int((classifier.decides(points) != target).sum())
        tried += n
    return tried, failed


def polygon_holds(
    classifier: Classifier,
    columns: Columns,
    point: Floats,
    changing: Sequence[int],
    vertices: Floats,
    target: int,
    margin: float,
    deadline: float,
) -> Verdict:
    """Whether a convex polygon, exactly as reported, is all target with the margin: as `holds`.

    Args:
        classifier: Whose decisions are meant.
        columns: What the report shows.
        point: The input with this correction's category, (n_inputs,).
        changing: The two reported columns.
        vertices: In the features' own units, (n, 2).
        target: The class.
        margin: Least output that counts.
        deadline: As `time.monotonic()` gives it.
    """
    chosen = list(changing)
    inputs = (vertices - columns.offset[chosen]) / columns.scale[chosen]
    low, high = inputs.min(0), inputs.max(0)
    width = np.where(high > low, high - low, 1.0)
    index = columns.index[chosen].tolist()
    network = classifier.margins(target).restricted(point, index, low, low + width)
    return verify_polygon(network, (inputs - low) / width, margin, deadline=deadline)


def sample_polygon(
    classifier: Classifier,
    columns: Columns,
    point: Floats,
    changing: Sequence[int],
    vertices: Floats,
    target: int,
    n_samples: int,
    seed: int,
    deadline: float,
) -> tuple[int, int]:
    """As `sample_box`, for a convex polygon (n, 2) in two features."""
    chosen = list(changing)
    generator = np.random.default_rng(seed)

    def draw(n: int, tried: int) -> Floats:
        # mixtures of three vertices; a quarter of them of two that are neighbours, on an edge
        first = generator.integers(0, len(vertices), n)
        others = generator.integers(0, len(vertices), (2, n))
        shares = generator.dirichlet(np.ones(3), n)
        edge = generator.random(n) < 0.25
        others[0][edge] = (first[edge] + 1) % len(vertices)
        shares[edge, 2] = 0.0
        shares /= shares.sum(1, keepdims=True)
        mixed = (
            shares[:, :1] * vertices[first]
            + shares[:, 1:2] * vertices[others[0]]
            + shares[:, 2:] * vertices[others[1]]
        )
        if not tried:
            mixed[: len(vertices)] = vertices[:n]
        return np.asarray((mixed - columns.offset[chosen]) / columns.scale[chosen])

    return _tried(classifier, point, columns.index[chosen], draw, target, n_samples, deadline)


def overlap(a: ReportedBox, b: ReportedBox) -> float:
    """Intersection over union of two boxes; NaN where one is missing, 0 where they change other features."""
    if not (a.is_known and b.is_known):
        return float("nan")
    moving = a.low != a.high
    if (moving != (b.low != b.high)).any() or (a.low != b.low)[~moving].any():
        return 0.0
    low, high = np.maximum(a.low, b.low)[moving], np.minimum(a.high, b.high)[moving]
    shared = float(np.prod(np.maximum(high - low, 0.0)))
    each = [float(np.prod((box.high - box.low)[moving])) for box in (a, b)]
    union = sum(each) - shared
    return shared / union if union > 0 else float("nan")
