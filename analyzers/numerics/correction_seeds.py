"""Corrections found by searching downhill: upper bounds of the distance, without proof of being nearest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np

from dynprobe.analyzers.numerics.box_verifier import Verdict, verify
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.layered_network import Activation, Floats, LayeredNetwork, product
from dynprobe.analyzers.numerics.linear_bounds import bound

# Up to so many features random points and all corners of a box are worth their cost.
_FEW = 4
_POINTS = 200
_RESTARTS = 4
_STEPS = 300
_BISECTIONS = 12


def holds(judgement: Judgement, centre: Floats, *, deadline: float, max_boxes: int = 2000) -> Verdict:
    """Whether a centre is a stable correction, by the complete verifier.

    Args:
        judgement: With k features.
        centre: (k,), within the domain.
        deadline: As `time.monotonic()` gives it.
        max_boxes: Give up after so many parts of the box.
    """
    if not judgement.is_stable:
        good = bool(judgement.values(centre[None])[0] >= judgement.margin)
        return Verdict(good, None if good else centre, 1)
    low, high = judgement.box_around(centre)
    return verify(judgement.network, low, high, judgement.margin, deadline=deadline, max_boxes=max_boxes)


def suspects(judgement: Judgement, centres: Floats) -> Floats:
    """Points of the boxes around centres (n, k) where the outputs may be least, (n, n_points, k).

    The centre, and for few features all corners; otherwise the corner down the gradient.
    """
    low, high = judgement.box_around(centres)
    moved = np.flatnonzero(judgement.radius > 0)
    if not len(moved):
        return centres[:, None]
    if len(moved) > _FEW:
        _, slopes = least_output(judgement.network, centres)
        return np.stack([centres, np.where(slopes > 0, low, high)], 1)
    corners = []
    for signs in itertools.product((False, True), repeat=len(moved)):
        corner = centres.copy()
        upper = np.array(signs)
        corner[:, moved] = np.where(upper, high[:, moved], low[:, moved])
        corners.append(corner)
    return np.stack([centres, *corners], 1)


def least_output(network: LayeredNetwork, points: Floats) -> tuple[Floats, Floats]:
    """The least output at points (n, k) and its gradient: shapes (n,) and (n, k)."""
    values = [np.ascontiguousarray(points.T)]
    slopes: list[Floats] = []
    for layer in network.layers:
        z = np.asarray(sum(product(matrix, values[j]) for j, matrix in layer.sources)) + layer.bias[:, None]
        if layer.activation is None:
            values.append(z)
        else:
            values.append(layer.activation(z))
            slopes.append(_derivative(layer.activation, z, values[-1]))
    outputs = values[-1]
    worst = outputs.argmin(0)
    columns = np.arange(len(points))
    factors = np.zeros_like(outputs)
    factors[worst, columns] = 1.0
    pending: dict[int, Floats] = {len(network.layers): factors}
    for i in range(len(network.layers), 0, -1):
        if i not in pending:
            continue
        layer = network.layers[i - 1]
        back = pending.pop(i)
        if layer.activation is not None:
            back = back * slopes[i - 1]
        for j, matrix in layer.sources:
            part = product(matrix.T, back)
            pending[j] = pending[j] + part if j in pending else part
    gradient = pending.get(0, np.zeros_like(values[0]))
    return outputs[worst, columns], np.asarray(gradient.T)


def _derivative(activation: Activation, z: Floats, value: Floats) -> Floats:
    if activation.kind == "tanh":
        return np.asarray(1 - value**2)
    if activation.kind == "sigmoid":
        return np.asarray(value * (1 - value))
    return np.where(z >= 0, activation.above[:, None], activation.below[:, None])


def scattered_seeds(
    judgement: Judgement, generator: np.random.Generator, *, n_seeds: int = 3
) -> list[Floats]:
    """The nearest of many random points whose surroundings look good: for few features.

    Args:
        judgement: With k features.
        generator: Source of the points.
        n_seeds: How many to return, nearest first.
    """
    low, high = judgement.low, judgement.high
    points = low + (high - low) * generator.random((_POINTS, judgement.n_features))
    # As many again nearer to the start, where the nearest correction is looked for.
    nearer = judgement.start + (points - judgement.start) * generator.random((_POINTS, 1))
    points = judgement.on_grid(np.concatenate([judgement.start[None], points, nearer]))
    points = points[judgement.values(points) >= judgement.margin]
    points = points[np.argsort(judgement.distance(points), kind="stable")]
    around = suspects(judgement, points) if len(points) else points[:, None]
    n, n_around, k = around.shape
    if not n:
        return []
    good = (judgement.values(around.reshape(-1, k)).reshape(n, n_around) >= judgement.margin).all(1)
    return list(points[good][:n_seeds])


def polished(
    judgement: Judgement, centre: Floats, accepts: Callable[[Floats], bool], *, deadline: float
) -> Floats:
    """A correction moved towards the start, as far as it stays one.

    For `l1` needless changes are dropped first, those of least use before the others. Then all are shrunk
    together along the line to the start, and for `l1` every one by itself.

    Args:
        judgement: With k features.
        centre: A correction, (k,).
        accepts: Whether a centre is a correction.
        deadline: As `time.monotonic()` gives it.
    """
    home = judgement.on_grid(judgement.start)

    def nearer(best: Floats, towards: Floats) -> Floats:
        if (best == towards).all():
            return best
        if accepts(towards):
            return towards
        near, far = 0.0, 1.0  # parts of the way that are known to be none and one
        for _ in range(_BISECTIONS):
            if time.monotonic() > deadline:
                break
            middle = (near + far) / 2
            trial = judgement.on_grid(towards + middle * (best - towards))
            if accepts(trial):
                far = middle
            else:
                near = middle
        found = judgement.on_grid(towards + far * (best - towards))
        return found if judgement.distance(found) < judgement.distance(best) else best

    if judgement.norm == "linf":
        return nearer(centre, home)
    slopes = least_output(judgement.network, centre[None])[1][0]
    order = np.argsort(np.abs(slopes) / judgement.weights, kind="stable")
    best = centre
    for j in order:
        trial = best.copy()
        trial[j] = home[j]
        if time.monotonic() < deadline and best[j] != home[j] and accepts(trial):
            best = trial
    best = nearer(best, home)
    for j in order:
        towards = best.copy()
        towards[j] = home[j]
        if time.monotonic() < deadline:
            best = nearer(best, towards)
    return best


def nearest_by_heuristic(judgement: Judgement, *, deadline: float, seed: int) -> Floats | None:
    """A near stable correction (k,) found by following gradients, or None: also for hundreds of features.

    A point is moved up the gradient of its least output from several starts, in few features for `l1` and in
    all for `linf`, until it reaches the margin; then it is moved back as far as it stays a correction. With a
    radius, the margin is raised until the box around the point is verified.

    Args:
        judgement: With k features.
        deadline: As `time.monotonic()` gives it; what was found until then is returned.
        seed: Of the random starts.
    """
    if not judgement.is_possible:
        return None
    generator = np.random.default_rng(seed)
    best: Floats | None = None
    raised = 0.0
    for restart in range(_RESTARTS):
        if time.monotonic() > deadline and (best is not None or restart):
            break
        start = judgement.on_grid(judgement.start)
        if restart:
            low, high = judgement.low, judgement.high
            start = judgement.on_grid(
                start + 0.3 * generator.random() * (generator.uniform(low, high) - start)
            )
        found, raised = _stable_from(judgement, start, raised, deadline)
        if found is None:
            continue
        found = polished(judgement, found, lambda c: _certain(judgement, c, deadline), deadline=deadline)
        if best is None or judgement.distance(found) < judgement.distance(best):
            best = found
    return best


def _certain(judgement: Judgement, centre: Floats, deadline: float) -> bool:
    """Whether a centre is a stable correction, as far as can be decided quickly."""
    points = suspects(judgement, centre[None])[0]
    if (judgement.values(points) < judgement.margin).any():
        return False
    if not judgement.is_stable:
        return True
    n_parts = 500 if judgement.n_features <= _FEW else 1
    verdict = holds(judgement, centre, deadline=deadline, max_boxes=n_parts)
    return verdict.holds is True


def _stable_from(
    judgement: Judgement, start: Floats, raised: float, deadline: float
) -> tuple[Floats | None, float]:
    """Climb to the margin and beyond it, until the box around the point is verified."""
    for _ in range(8):
        point = None
        if judgement.norm == "l1":
            now = time.monotonic()
            point = _climb_few(judgement, start, judgement.margin + raised, now + (deadline - now) / 2)
        if point is None:  # what no few features reach, all of them may; needless changes are dropped later
            point = _climb_all(judgement, start, judgement.margin + raised, deadline)
        if point is None:
            return None, raised / 2
        if _certain(judgement, point, deadline):
            return point, raised * 0.9
        if not judgement.is_stable or time.monotonic() > deadline:
            return None, raised
        low, high = judgement.box_around(point)
        lowest = bound(judgement.network, low[:, None], high[:, None]).low.min()
        raised += 1.1 * float(judgement.margin - lowest) + 1e-9
        start = point
    return None, raised


def _climb_few(judgement: Judgement, start: Floats, goal: float, deadline: float) -> Floats | None:
    """Move one feature at a time, the one that gains most for its cost, with a line search."""
    point = start.copy()
    tried = np.array([1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.005])
    for _ in range(_STEPS):
        value, slopes = least_output(judgement.network, point[None])
        if value[0] >= goal:
            return point
        if time.monotonic() > deadline:
            return None
        up = slopes[0] > 0
        room = np.where(up, judgement.high - point, point - judgement.low)
        gain = np.where(room > 1e-12, np.abs(slopes[0]) / judgement.weights, 0.0)
        for j in np.argsort(-gain, kind="stable")[:5]:
            if gain[j] == 0:
                return None
            trials = np.repeat(point[None], len(tried), 0)
            trials[:, j] += (1.0 if up[j] else -1.0) * room[j] * tried
            trials = judgement.on_grid(trials)
            values = judgement.values(trials)
            reached = np.flatnonzero(values >= goal)
            if len(reached):
                return np.asarray(trials[reached[-1]])
            better = (values - value[0]) / np.maximum(np.abs(trials[:, j] - point[j]), 1e-12)
            # The longest step that gains at least half of what the best rate promises.
            useful = np.flatnonzero((better > 0) & (better >= better.max() / 2))
            if len(useful):
                point = trials[useful[0]]
                break
        else:
            return None
    return None


def _climb_all(judgement: Judgement, start: Floats, goal: float, deadline: float) -> Floats | None:
    """Move all features by their sign, within the least distance for which that reaches the goal."""

    def within(level: float, point: Floats) -> Floats | None:
        reach = level / judgement.weights
        low = np.maximum(judgement.low, judgement.start - reach)
        high = np.minimum(judgement.high, judgement.start + reach)
        point = np.clip(point, low, high)
        for share in (2.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1, 0.05, 0.05):
            value, slopes = least_output(judgement.network, judgement.on_grid(point)[None])
            if value[0] >= goal:
                return judgement.on_grid(point)
            point = np.clip(point + share * reach * np.sign(slopes[0]), low, high)
        point = judgement.on_grid(point)
        return point if judgement.values(point[None])[0] >= goal else None

    furthest = judgement.weights * np.maximum(
        judgement.high - judgement.start, judgement.start - judgement.low
    )
    far = float(max(furthest.max(), 0.0))
    best = within(far, start)
    near = 0.0
    for _ in range(_BISECTIONS):
        if time.monotonic() > deadline:
            break
        middle = (near + far) / 2
        found = within(middle, start if best is None else best)
        if found is not None:
            best, far = found, middle
        elif best is None:
            far = middle  # a shorter way may climb where a long one overshoots
        else:
            near = middle
    return best
