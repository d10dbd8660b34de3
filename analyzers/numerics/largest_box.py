"""The largest box around a correction in which the network's outputs all count, with a bound on its volume.

Faces are grown as far as a complete verifier allows. Then violating points guide the search: the largest box
that avoids all known ones bounds the volume of every valid box; either it holds, or it has another one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.empty_boxes import BoxRange, EmptyBoxes
from dynprobe.analyzers.numerics.layered_network import Floats

# Parts of a box after which it counts as undecided: while growing, and for a candidate.
_MAX_GROW, _MAX_CANDIDATE = 2_000, 20_000
_N_FIRST, _N_SAMPLES, _N_SLID, _SEED = 2_048, 128, 4, 0
_MOST_PRODUCTS = 1e9  # for the first points
_STEPS = np.linspace(0.0, 1.0, 17)


@dataclass(frozen=True)
class LargestBox:
    """A verified box.

    Args:
        low: Lower corner, (k,).
        high: Upper corner, (k,).
        volume: Share of the domain's volume, over the features whose domain has a width.
        volume_bound: No box that contains the inner one, lies in the domain and holds is larger (with integer
            features: none whose faces have allowed values).
        n_boxes: Parts of boxes that were bounded.
    """

    low: Floats
    high: Floats
    volume: float
    volume_bound: float
    n_boxes: int


def largest_box(
    judgement: Judgement,
    centre: Floats,
    inner_low: Floats,
    inner_high: Floats,
    *,
    deadline: float,
    tolerance: float = 0.05,
) -> LargestBox:
    """Find a box that contains another one and holds, as large as can be had until the deadline.

    Exact to the tolerance for up to three features or so; beyond, the bound tells how far it may be off.
    Cost: some hundred verifications of a box.

    Args:
        judgement: The network, its margin, the domain, and which features are integers.
        centre: A point of the inner box, (k,).
        inner_low: Lower corner of a box that is known to hold, (k,).
        inner_high: Its upper corner, (k,).
        deadline: As `time.monotonic()` gives it.
        tolerance: End when no box is larger by more than this share.
    """
    inner_low, inner_high = np.asarray(inner_low, np.float64), np.asarray(inner_high, np.float64)
    start = time.monotonic()
    # The last tenth of the time is for the verification of what was found.
    until = start + 0.9 * (deadline - start)
    search = _Search(judgement, np.asarray(centre, np.float64), inner_low, inner_high, until)
    search.sample_domain(min(until, start + 0.15 * (deadline - start)))
    search.grow_in_several_orders(min(until, start + 0.3 * (deadline - start)))
    search.close(until, tolerance)
    return search.result(deadline)


class _Search:
    """The best box so far, and the points that every box has to avoid."""

    def __init__(
        self, judgement: Judgement, centre: Floats, inner_low: Floats, inner_high: Floats, until: float
    ) -> None:
        self.judgement, self.centre, self.until = judgement, centre, until
        self.inner_low, self.inner_high = inner_low, inner_high
        self.low, self.high = inner_low, inner_high
        self.n_boxes = 0
        self.generator = np.random.default_rng(_SEED)
        spacing = judgement.spacing
        self.whole = np.zeros(len(centre), bool) if spacing is None else spacing > 0
        self.empty = EmptyBoxes(
            judgement.low,
            judgement.high,
            inner_low,
            inner_high,
            spacing=spacing,
            origin=judgement.origin,
        )

    @property
    def volume(self) -> float:
        return self.empty.volume(self.low, self.high)

    def holds(self, low: Floats, high: Floats, deadline: float, max_boxes: int) -> bool | None:
        """Verify a box and keep the counterexample, moved to where it excludes most."""
        network, margin = self.judgement.network, self.judgement.margin
        verdict = verify(network, low, high, margin, deadline=deadline, max_boxes=max_boxes)
        self.n_boxes += verdict.n_boxes
        if verdict.counterexample is not None:
            end = min(deadline, self.until)
            self.avoid(verdict.counterexample[None], self.inner_low, self.inner_high, end)
        return verdict.holds

    def avoid(self, points: Floats, low: Floats, high: Floats, until: float) -> None:
        """Keep violating points (n, k), and the same moved towards a box, feature by feature."""
        k = points.shape[1]
        outside = int(((points < low) | (points > high)).any(0).sum())
        orders = [np.arange(k), np.arange(k)[::-1]] if outside > 1 else [np.arange(k)]
        if outside > 2:
            orders.append(self.generator.permutation(k))
        slid = (self._slide(points, low, high, order, until) for order in orders)
        self.empty.add(np.concatenate([points, *slid]))

    def _slide(self, points: Floats, low: Floats, high: Floats, order: np.ndarray, until: float) -> Floats:
        points, k = points.copy(), points.shape[1]
        for j in order:
            goal = np.clip(points[:, j], low[j], high[j])
            if (goal == points[:, j]).all():
                continue
            if time.monotonic() > until:
                break
            for _ in range(2):  # the second time between the last violating step and the next one
                path = points[:, j, None] * (1 - _STEPS) + goal[:, None] * _STEPS
                tried = np.repeat(points[:, None], len(_STEPS), 1)
                tried[:, :, j] = path
                bad = self.judgement.values(tried.reshape(-1, k)) < self.judgement.margin
                bad = bad.reshape(path.shape)
                bad[:, 0] = True
                last = len(_STEPS) - 1 - bad[:, ::-1].argmax(1)
                rows = np.arange(len(points))
                points[:, j], goal = path[rows, last], path[rows, np.minimum(last + 1, len(_STEPS) - 1)]
        return points

    def violating(self, low: Floats, high: Floats, n_points: int) -> Floats:
        """Some of the violating points among random ones and corners, nearest to the inner box first."""
        share = self.generator.random((n_points, len(low)))
        share[: n_points // 4] = np.round(share[: n_points // 4])
        points = low + share * (high - low)
        points = points[self.judgement.values(points) < self.judgement.margin]
        size = np.maximum(self.judgement.high - self.judgement.low, 1e-300)
        away = (np.maximum(self.inner_low - points, points - self.inner_high).clip(0) / size).sum(1)
        return np.asarray(points[np.argsort(away, kind="stable")])

    def sample_domain(self, until: float) -> None:
        """Find the first violating points."""
        affordable = int(_MOST_PRODUCTS / self.judgement.network.n_entries)
        n_points = min(_N_FIRST, max(affordable, _N_SAMPLES))
        points = self.violating(self.judgement.low, self.judgement.high, n_points)
        if len(points):
            chosen = np.unique(np.linspace(0, len(points) - 1, 24).astype(int))
            near = np.arange(min(8, len(points)))
            self.avoid(points[np.union1d(chosen, near)], self.inner_low, self.inner_high, until)

    # growing ------------------------------------------------------------------------------------------

    def grow_in_several_orders(self, until: float) -> None:
        """Grow the inner box in all directions at once, then face by face, in several orders."""
        domain = self.judgement.low, self.judgement.high
        wide = np.flatnonzero(domain[1] > domain[0])
        faces = [(int(j), side) for side in (True, False) for j in wide]
        start = self._grow_evenly(until)
        orders = [faces, faces[::-1]]
        orders += [[faces[i] for i in self.generator.permutation(len(faces))] for _ in range(2)]
        for first in (start, (self.inner_low, self.inner_high)):
            for order in orders:
                if time.monotonic() > until:
                    return
                self.keep(*self._grow(*first, *domain, order, until))

    def grow_within(self, node: BoxRange, until: float) -> None:
        """Grow the inner box towards a candidate, and then on."""
        room = np.maximum(node.high - self.inner_high, self.inner_low - node.low)
        order = [(int(j), side) for j in np.argsort(room) for side in (True, False)]
        low, high = self._grow(self.inner_low, self.inner_high, node.low, node.high, order, until)
        self.keep(*self._grow(low, high, self.judgement.low, self.judgement.high, order, until))

    def keep(self, low: Floats, high: Floats) -> None:
        """Keep a verified box if it is the largest, or has no volume but larger sides."""
        now, best = self.empty.volume(low, high), self.volume
        if now > best or (now == best and (high - low).sum() > (self.high - self.low).sum()):
            self.low, self.high = low, high

    def _grow_evenly(self, until: float) -> tuple[Floats, Floats]:
        done, limit, tried = 0.0, 1.0, 1.0
        best = self.inner_low, self.inner_high
        for _ in range(8):
            if time.monotonic() > until:
                break
            low = self.inner_low + tried * (self.judgement.low - self.inner_low)
            high = self.inner_high + tried * (self.judgement.high - self.inner_high)
            low, high = self.empty.inwards(low, high, self.inner_low, self.inner_high)
            if not len(self.empty.inside(low, high)) and self.holds(low, high, until, _MAX_GROW):
                done, best = tried, (low, high)
            else:
                limit = tried
            if done == limit:
                break
            tried = (done + limit) / 2
        return best

    def _grow(
        self,
        low: Floats,
        high: Floats,
        limit_low: Floats,
        limit_high: Floats,
        order: list[tuple[int, bool]],
        until: float,
    ) -> tuple[Floats, Floats]:
        for j, above in order:
            if time.monotonic() > until:
                break
            low, high = self._grow_face(low, high, limit_low, limit_high, j, above, until)
        return low, high

    def _grow_face(
        self,
        low: Floats,
        high: Floats,
        limit_low: Floats,
        limit_high: Floats,
        j: int,
        above: bool,
        until: float,
    ) -> tuple[Floats, Floats]:
        """Move one face outwards; only what is new has to be verified."""
        face = float((high if above else low)[j])
        limit, undecided = float((limit_high if above else limit_low)[j]), False
        for attempt in range(8):
            new_low, new_high = low.copy(), high.copy()
            (new_high if above else new_low)[j] = limit
            blocked = self.empty.inside(new_low, new_high)[:, j]
            goal = limit
            if len(blocked):
                limit = float(blocked.min() if above else blocked.max())
                goal = face + (limit - face) * (0.99 if attempt < 4 else 0.5)
            elif undecided:
                goal = face + (limit - face) / 2
            (new_high if above else new_low)[j] = goal
            new_low, new_high = self.empty.inwards(new_low, new_high, low, high)
            slab_low, slab_high = new_low.copy(), new_high.copy()
            (slab_low if above else slab_high)[j] = face
            if abs(slab_high[j] - slab_low[j]) < 1e-6 or time.monotonic() > until:
                break
            holds = self.holds(slab_low, slab_high, until, _MAX_GROW)
            if holds:
                return new_low, new_high
            if holds is None:
                limit, undecided = goal, True
        return low, high

    # closing the gap ----------------------------------------------------------------------------------

    def close(self, until: float, tolerance: float) -> None:
        """Verify or exclude the largest box that avoids all known violating points, again and again."""
        n_rounds = 0
        while self.volume < (1 - tolerance) * self.empty.bound and time.monotonic() < until:
            node = self.empty.largest(above=self.volume, deadline=until)
            if node is None:
                return
            n_rounds += 1
            low, high = self._smaller(node, tolerance)
            points = self.violating(low, high, _N_SAMPLES)[:_N_SLID]
            if len(points):
                self.avoid(points, self.inner_low, self.inner_high, until)
                self.avoid(points, node.inner_low, node.inner_high, until)
            else:
                holds = self.holds(low, high, until, _MAX_CANDIDATE)
                if holds:
                    self.keep(low, high)
                if holds is None and (time.monotonic() > until or not self.empty.halve(self.volume)):
                    return
            if n_rounds & (n_rounds - 1) == 0:  # less and less often
                now = time.monotonic()
                self.grow_within(node, now + 0.2 * (until - now))

    def _smaller(self, node: BoxRange, tolerance: float) -> tuple[Floats, Floats]:
        """A little off the violating points, by less than the tolerance allows."""
        part = tolerance / (2 * len(node.low))
        cut_low = (node.low > self.judgement.low) & ~self.whole
        cut_high = (node.high < self.judgement.high) & ~self.whole
        low = np.where(cut_low, node.low + part * (self.inner_low - node.low), node.low)
        high = np.where(cut_high, node.high + part * (self.inner_high - node.high), node.high)
        return low, high

    def result(self, deadline: float) -> LargestBox:
        """The box, verified once more as a whole; smaller if rounding makes a difference."""
        low, high = self.low, self.high
        for part in (0.0, 1e-9, 1e-6, 1e-3, 1.0):
            low = np.where(self.whole, self.low, self.low + part * (self.inner_low - self.low))
            high = np.where(self.whole, self.high, self.high + part * (self.inner_high - self.high))
            if part == 1.0:
                low, high = self.inner_low, self.inner_high
            # None: time ran out, and every part of the box was verified before
            if self.holds(low, high, deadline, 10 * _MAX_CANDIDATE) is not False:
                break
        volume = self.empty.volume(low, high)
        return LargestBox(low, high, volume, max(self.volume, self.empty.bound), self.n_boxes)
