"""Results as `dynprobe corrections` returns them, of judgements solved on a grid."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import minimum_filter

from dynprobe.analyzers.core.result import FAILED, Array, Piece, stack

GRID = 61
LOW, HIGH = np.array([0.0, 300.0]), np.array([63.0, 850.0])
RADIUS = 0.05
CLASSES = np.array(["malignant", "benign"], dtype=object)
PER_SAMPLE = (
    *("distance", "lower_bound", "stable_distance", "stable_lower_bound", "decided", "label", "target"),
    *("volume", "volume_bound", "margin", "n_unstable", "n_boxes", "n_sampled", "sampled_failures"),
    *("previous_holds", "overlap"),
)
TEXTS = ("outcome", "nearest_outcome", "solver")
PER_FEATURE = ("value", "nearest", "corrected", "box_low", "box_high", "changed")


def margin_of(progress, tilt):
    """A margin over the unit square with two regions of the target that grow with training."""
    y, x = np.mgrid[0 : 1 : GRID * 1j, 0 : 1 : GRID * 1j]
    first = 0.32 + 0.1 * progress - np.hypot(x - 0.55 - 0.1 * tilt, 1.3 * (y - 0.85))
    second = 0.15 - np.hypot(x - 0.05, y - 0.1 - 0.2 * tilt)
    return np.maximum(first, second) + 0.02 * np.sin(9 * x + 4 * y)


def solve(margin, start):
    """Nearest point, centre of the nearest stable square, and a box about it, all by search on the grid."""
    grid = np.linspace(0, 1, GRID)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    cost = np.abs(x - start[0]) + np.abs(y - start[1])
    half = round(RADIUS * (GRID - 1))
    stable = minimum_filter(margin, size=2 * half + 1, mode="nearest") >= 0
    candidates = (margin >= 0, stable)
    places = [np.unravel_index(np.where(good, cost, np.inf).argmin(), cost.shape) for good in candidates]
    (j, i) = places[1]
    low, high = np.array([i - half, j - half]), np.array([i + half, j + half])
    low, high = np.maximum(low, 0), np.minimum(high, GRID - 1)
    for axis in (1, 0):
        for end, sign in ((low, -1), (high, 1)):
            while True:
                end[axis] += sign
                inside = 0 <= end[axis] < GRID
                if not (inside and (margin[low[1] : high[1] + 1, low[0] : high[0] + 1] >= 0).all()):
                    end[axis] -= sign
                    break
    return [np.array([grid[i], grid[j]]) for j, i in places], grid[low], grid[high], [cost[p] for p in places]


def two_features(run="wine", n_checkpoints=1, n_samples=1, tilt=0.0, others=(), outcomes=None):
    """Pieces of one run with two features named dti and credit."""
    pieces, previous = [], {}
    generator = np.random.default_rng(3)
    starts = np.stack([generator.uniform(0.3, 0.9, n_samples), generator.uniform(0.05, 0.35, n_samples)], 1)
    starts[0] = [0.7, 0.25]
    for t in range(n_checkpoints):
        arrays = blank(n_samples, ["dti", "credit"], LOW, HIGH)
        arrays["margin_map"] = Array(("sample", "grid_y", "grid_x"), np.full((n_samples, GRID, GRID), np.nan))
        for s in range(n_samples):
            progress = t / max(n_checkpoints - 1, 1)
            margin = margin_of(progress, tilt + 0.3 * (starts[s, 0] - 0.7))
            outcome = outcomes[s] if outcomes else "optimal"
            fill(arrays, s, outcome, starts[s], margin, previous)
        if others:
            holds = generator.integers(0, 2, (n_samples, len(others))).astype(float)
            holds[:, [name == run for name in others]] = np.nan
            arrays["other"] = Array(("other",), np.array(others, dtype=object))
            arrays["transfer"] = Array(("sample", "other"), holds)
        pieces.append(Piece(f"{run}{t}", {"run": run, "step": 100 * t, "path": f"{run}/{t}.pt"}, arrays))
    return pieces


def fill(arrays, s, outcome, start, margin, previous):
    """Solve one judgement and write it where it belongs."""

    def put(name, value):
        arrays[name].values[s] = value

    shown = lambda u: LOW + (HIGH - LOW) * np.asarray(u)  # noqa: E731
    put("outcome", outcome)
    put("nearest_outcome", outcome)
    put("decided", 0)
    put("label", 1)
    put("target", 1)
    put("value", shown(start))
    if outcome == "already_target":
        return
    put("margin_map", margin)
    (nearest, centre), low, high, (distance, stable) = solve(margin, start)
    if outcome in ("timeout", "none_exists"):
        put("lower_bound", 0.12 if outcome == "timeout" else np.inf)
        put("stable_lower_bound", 0.13 if outcome == "timeout" else np.inf)
        return
    put("distance", distance)
    put("lower_bound", distance * 0.995)
    put("stable_distance", stable)
    put("stable_lower_bound", stable * (0.993 if outcome == "optimal" else 0.7))
    put("volume", np.prod(high - low))
    for name, value in {"nearest": nearest, "corrected": centre, "box_low": low, "box_high": high}.items():
        put(name, shown(value))
    put("changed", 1.0)
    put("n_sampled", 200_000)
    put("sampled_failures", 0)
    if s in previous:
        before = previous[s]
        both = np.prod(np.clip(np.minimum(high, before[1]) - np.maximum(low, before[0]), 0, None))
        put("overlap", both / (np.prod(high - low) + np.prod(before[1] - before[0]) - both))
        put("previous_holds", float(bool((margin >= 0).mean() > 0.15)))
    previous[s] = (low, high)


def blank(n_samples, features, low, high):
    """All variables, NaN or empty."""
    n = len(features)
    arrays = {
        "sample": Array(("sample",), 3 + 7 * np.arange(n_samples)),
        "feature": Array(("feature",), np.array(features, dtype=object)),
        "class": Array(("class",), CLASSES),
        "feature_low": Array(("feature",), np.asarray(low, dtype=float)),
        "feature_high": Array(("feature",), np.asarray(high, dtype=float)),
        "feature_weight": Array(("feature",), 1 / (np.asarray(high) - low)),
        "stability": Array(("feature",), RADIUS * (np.asarray(high) - low)),
        "feature_index": Array(("feature",), np.arange(n)),
    }
    for name in PER_SAMPLE:
        arrays[name] = Array(("sample",), np.full(n_samples, np.nan))
    for name in TEXTS:
        arrays[name] = Array(("sample",), np.full(n_samples, "", dtype=object))
    for name in PER_FEATURE:
        arrays[name] = Array(("sample", "feature"), np.full((n_samples, n), np.nan))
    return arrays


def many_features(n_samples=3, n_features=6, n_changed=3, shape=None):
    """One checkpoint whose corrections change some of many features; of an image where a shape is given."""
    generator = np.random.default_rng(0)
    names = [f"mean {w}" for w in ("radius", "texture", "perimeter", "area", "smoothness", "symmetry")]
    names = names[:n_features] if n_features <= len(names) else [f"pixel[{i}]" for i in range(n_features)]
    low = np.zeros(n_features)
    high = np.geomspace(0.2, 2000, n_features) if shape is None else np.ones(n_features)
    arrays = blank(n_samples, names, low, high)
    if shape is not None:
        y, x = np.mgrid[-1 : 1 : shape[-2] * 1j, -1 : 1 : shape[-1] * 1j]
        image = np.exp(-8 * (np.hypot(x, y) - 0.6) ** 2)
        image = np.broadcast_to(image, shape).ravel()
        arrays["input"] = Array(("sample", "entry"), np.tile(image, (n_samples, 1)))
        arrays["input_shape"] = Array(("input_axis",), np.array(shape))
    for s in range(n_samples):
        u = generator.uniform(0.1, 0.9, n_features) if shape is None else image[:n_features]
        where = np.sort(generator.permutation(n_features)[:n_changed])
        centre = u.copy()
        centre[where] = np.clip(u[where] + generator.choice([-0.4, 0.4], n_changed), 0.05, 0.95)
        box = np.zeros(n_features)
        box[where] = generator.uniform(0.02, 0.05, n_changed)
        arrays["changed"].values[s] = np.isin(range(n_features), where)
        values = {"value": u, "corrected": centre, "nearest": centre, "box_low": centre - box}
        for name, value in {**values, "box_high": centre + box}.items():
            arrays[name].values[s] = low + value * (high - low)
        numbers = {"distance": 0.6, "lower_bound": 0.6, "stable_distance": 0.8, "stable_lower_bound": 0.7}
        for name, value in {**numbers, "decided": 0, "target": 1, "outcome": "bounded"}.items():
            arrays[name].values[s] = value
    return [Piece("a", {"run": "breast", "step": 400, "path": "breast/4.pt"}, arrays)]


def with_polygons(pieces):
    """The same with an octagon in every box."""
    corner = np.array([[0.3, 0], [0.7, 0], [1, 0.3], [1, 0.7], [0.7, 1], [0.3, 1], [0, 0.7], [0, 0.3]])
    for piece in pieces:
        low, high = (piece.arrays[f"box_{end}"].values[:, None] for end in ("low", "high"))
        piece.arrays["polygon"] = Array(("sample", "vertex", "axis"), low + corner * (high - low))
    return pieces


def with_facts(result, **facts):
    """With variables that reports of earlier versions lack."""
    dims = {"max_changed": (), "direction": ("feature",)}
    for name, value in facts.items():
        own = dims.get(name, ("sample", "feature"))
        result.arrays[name] = Array(("checkpoint", *own), np.array([value], dtype=float))
    return result


def stacked(*runs):
    """Runs, each a list of pieces, as one result."""
    return stack("corrections", "checkpoint", [piece for run in runs for piece in run], {})


def failed(run="wine", step=999):
    """A checkpoint that could not be analysed."""
    return [Piece("f", {"run": run, "step": step, "path": "f.pt"}, {}, FAILED, "NaN in fc.weight")]
