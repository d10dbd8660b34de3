"""Corrections: branch and bound beside MILP refinement, brute force, DiCE and Marabou; one thread.

    python benchmarks/corrections.py
    python benchmarks/corrections.py --quick --parts speed,area
    python benchmarks/corrections.py --polaris DIR   # a checkout of xinpl/Polaris: the authors' own network

Networks are trained here on tables that scikit-learn ships; samples, features that may change and classes to
be decided for are drawn at random, and none is left out but where it says so. Everything is in units of the
features' ranges: a correction is stable if it holds within 2.5 % of each. Peers that can be imported run
(`pip install --no-deps dice-ml maraboupy` and what dice-ml needs); the others are named with the reason.
Times are of the process's CPU clock, limits are wall time as a user would give them; only ratios within one
run mean anything.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import _corrections_peers as peers
import numpy as np
import torch
from _corrections_tasks import (
    AUTHORS_FEATURES,
    Case,
    Net,
    authors_net,
    brute_force_area,
    cases,
    pairs,
    trained,
)
from _versions import versions

from dynprobe.analyzers._corrections_search import nearest
from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.correction_milp import nearest_by_milp
from dynprobe.analyzers.numerics.correction_problem import Bounds, Judgement
from dynprobe.analyzers.numerics.largest_box import LargestBox, largest_box
from dynprobe.analyzers.numerics.layered_network import Floats
from dynprobe.analyzers.numerics.linear_bounds import bound
from dynprobe.analyzers.numerics.nearest_correction import NearestSearch

T = TypeVar("T")

TOLERANCE = 0.01
SMALL = [(table, width) for width in ((16, 16), (32, 32)) for table in ("wine", "iris", "breast_cancer")]
DEEP = (100,) * 8
# Of diabetes: body mass, blood pressure and three of the blood's values; age and sex are left alone.
DIABETES_FEATURES = (2, 3, 4, 7, 8)
N_SAMPLED, CHUNK = 200_000, 20_000
# Judgements of the deep network that a MILP is tried on: each takes all of its time.
N_HOPELESS = 3


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds and what was found."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def branch_and_bound(judgement: Judgement, seconds: float) -> Bounds:
    return NearestSearch(judgement).run(deadline=time.monotonic() + seconds, tolerance=TOLERANCE)


def milp_refinement(judgement: Judgement, seconds: float) -> Bounds:
    return nearest_by_milp(
        judgement, known=Bounds(0.0, math.inf), deadline=time.monotonic() + seconds, tolerance=TOLERANCE
    )


def box_around(judgement: Judgement, centre: Floats, seconds: float) -> LargestBox:
    return largest_box(judgement, centre, *judgement.box_around(centre), deadline=time.monotonic() + seconds)


def agree(a: Bounds, b: Bounds) -> bool:
    """Whether two answers can both be right: neither found what the other excludes."""
    slack = 1e-6
    return a.lower <= b.upper + slack and b.lower <= a.upper + slack


# 1. Branch and bound beside MILP refinement


def compare_speed(n_cases: int, seconds: float) -> None:
    """Stable corrections of 3 to 5 features, each way alone, up to the same gap."""
    print(f"\nstable corrections, gap 1 %, limit {seconds:g} s: branch and bound beside MILP refinement")
    print(
        "network          features  solved by each of   no correction   CPU s: B&B   MILP   median of ratios"
    )
    everything: list[tuple[float, float, Bounds, Bounds]] = []
    for n_features in (3, 4, 5):
        for table, width in SMALL:
            if table == "iris" and n_features == 5:
                continue
            net = trained(table, width)
            rows = []
            for case in cases(net, n_features, n_cases):
                ours, a = timed(lambda case=case: branch_and_bound(case.judgement, seconds))
                theirs, b = timed(lambda case=case: milp_refinement(case.judgement, seconds))
                rows.append((ours, theirs, a, b))
            say_speed(f"{net.name:22}{n_features}", rows)
            everything += rows
    say_speed("all", everything)
    n_agreeing = sum(agree(a, b) for _, _, a, b in everything)
    print(f"both intervals have a distance in common (or both prove that there is none): {n_agreeing} of "
          f"{len(everything)}")  # fmt: skip
    both = [row for row in everything if row[2].closed(TOLERANCE) and row[3].closed(TOLERANCE)]
    say_speed("solved by both", both)


def say_speed(title: str, rows: Sequence[tuple[float, float, Bounds, Bounds]]) -> None:
    solved = [sum(row[i].closed(TOLERANCE) for row in rows) for i in (2, 3)]
    none = sum(math.inf in (a.lower, b.lower) for _, _, a, b in rows)
    ours, theirs = sum(row[0] for row in rows), sum(row[1] for row in rows)
    ratio = np.median([row[1] / row[0] for row in rows]) if rows else math.nan
    print(
        f"{title:26} {solved[0]:3} {solved[1]:3} of {len(rows):3} {none:12} {ours:15.2f} {theirs:8.2f} "
        f"(x{theirs / max(ours, 1e-9):.1f}) {ratio:10.1f}",
        flush=True,
    )


# 2. Eight layers of 100


def compare_deep(net: Net, features: Sequence[int], target: int, n_cases: int, seconds: float) -> None:
    """The nearest stable correction over all pairs of five features, of the first rejected samples."""
    rejected = np.flatnonzero(net.decides(net.points) != target)[:n_cases]
    times, found, boxes, unstable = [], [], [], []
    for sample in rejected:
        both = pairs(net, int(sample), features, target)
        ways = [way for _, way in both]
        spent, answer = timed(
            lambda ways=ways: nearest(
                ways, stable=True, deadline=time.monotonic() + seconds, tolerance=TOLERANCE, seed=0
            )
        )
        times.append(spent)
        found.append(answer)
        unstable += [int(n_unstable(way.judgement)) for way in ways]
        if answer.way is not None:
            judgement, centre = answer.way.judgement, answer.centre
            boxes.append(timed(lambda j=judgement, c=centre: box_around(j, c, 5.0)))
    outcomes = [answer.outcome(TOLERANCE, smooth=False) for answer in found]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in sorted(set(outcomes)))
    print(
        f"\n{net.name}: nearest stable correction over all {len(ways)} pairs of {len(features)} features, "
        f"{len(rejected)} rejected samples (limit {seconds:g} s)\n"
        f"  CPU s: median {np.median(times):.2f}, 90 % {np.quantile(times, 0.9):.2f}, most {max(times):.2f}; "
        f"{counts}\n"
        f"  up to {max(unstable)} of {net.network.n_hidden} neurons change their slope in a pair's domain",
        flush=True,
    )
    if boxes:
        close = sum(box.volume >= 0.95 * box.volume_bound for _, box in boxes)
        spent, volume = (np.median(values) for values in zip(*((t, b.volume) for t, b in boxes), strict=True))
        print(
            f"  largest box: CPU s median {spent:.2f}, median volume {volume:.3f}; {close} of {len(boxes)} "
            "within 5 % of the bound"
        )
    hard = [answer.way.judgement for answer in found if answer.way is not None][:N_HOPELESS]
    n_solved = sum(milp_refinement(judgement, seconds).closed(TOLERANCE) for judgement in hard)
    print(
        f"  MILP refinement, told the right pair: {n_solved} of {len(hard)} within the same limit", flush=True
    )


def n_unstable(judgement: Judgement) -> int:
    k = judgement.n_features
    return int(bound(judgement.network, np.zeros((k, 1)), np.ones((k, 1))).n_unstable[0])


# 3. Volume beside brute force


def corrected(nets: Sequence[Net], n_features: Sequence[int], seed: int) -> Iterator[tuple[Case, Bounds]]:
    """Cases with a stable correction, of each network and number of features in turn, without end."""
    queues = [iter(cases(net, k, 1000, seed)) for k in n_features for net in nets]
    while True:
        for queue in queues:
            for case in queue:
                found = branch_and_bound(case.judgement, 1.0)
                if found.centre is not None:
                    yield case, found
                    break


def compare_area(n_cases: int, n_grid: int, seconds: float) -> None:
    """The verified box of two features beside the best rectangle of valid grid points."""
    ratios, bounds, times = [], [], []
    for case, found in itertools.islice(corrected(small_nets(), [2], 1), n_cases):
        judgement = case.judgement
        spent, box = timed(lambda j=judgement, c=found.centre: box_around(j, c, seconds))
        best = brute_force_area(judgement, *judgement.box_around(found.centre), n_grid)
        times.append(spent)
        ratios.append(box.volume / best)
        bounds.append(box.volume_bound / best)
    print(
        f"\nlargest box of two features beside the best rectangle of valid points of a {n_grid} x {n_grid} "
        f"grid,\n{n_cases} judgements; volume over brute force: least {min(ratios):.3f}, median "
        f"{np.median(ratios):.3f}, {sum(ratio >= 0.95 for ratio in ratios)} at least 0.95\n"
        f"  bound over brute force: least {min(bounds):.3f}, median {np.median(bounds):.3f}; CPU s: median "
        f"{np.median(times):.2f}, most {max(times):.2f}",
        flush=True,
    )


def small_nets() -> list[Net]:
    return [trained(table, width) for table, width in SMALL]


# 4. Boxes: sampled, and decided by another verifier


def check_boxes(n_boxes: int, n_marabou: int, n_samples: int, *, marabou: bool) -> None:
    """Samples in the model's own dtype; Marabou on the box, and on one stretched beyond a counterexample."""
    n_failed = n_tried = 0
    volumes = []
    answers: list[tuple[str, str]] = []
    for i, (case, found) in enumerate(itertools.islice(corrected(small_nets(), [2, 3, 4], 2), n_boxes)):
        judgement = case.judgement
        box = box_around(judgement, found.centre, 0.5)
        volumes.append(box.volume)
        failed = failures(case, box, n_samples, i)
        n_failed, n_tried = n_failed + failed, n_tried + n_samples
        if marabou and len(answers) < n_marabou:
            answers += peers.decided_by_marabou(judgement, box)
    print(
        f"\n{n_boxes} boxes of 2 to 4 features (median volume {np.median(volumes):.3f}): {n_failed} of "
        f"{n_tried:,} samples fail in float32",
        flush=True,
    )
    if marabou:
        own, stretched = ([pair[i] for pair in answers] for i in (0, 1))
        print(
            f"  Marabou finds a counterexample in {own.count('sat')} of {len(own)} boxes and excludes one in "
            f"{own.count('unsat')}; it finds one in {stretched.count('sat')} of the same boxes stretched"
        )


def failures(case: Case, box: LargestBox, n_samples: int, seed: int) -> int:
    """How many points of a box the model does not decide for the target; a quarter are on its boundary."""
    generator = np.random.default_rng(seed)
    corners = np.array(list(itertools.product((0.0, 1.0), repeat=len(box.low))))
    n_edge, failed = CHUNK // 4, 0
    for _ in range(0, n_samples, CHUNK):
        t = generator.random((CHUNK, len(box.low)))
        to_edge = generator.random((n_edge, len(box.low))) < generator.random((n_edge, 1))
        t[:n_edge] = np.where(to_edge, np.round(t[:n_edge]), t[:n_edge])
        t[: len(corners)] = corners
        points = case.inputs(box.low + t * (box.high - box.low))
        failed += int((case.net.decides(points) != case.target).sum())
    return failed


# 5. DiCE


def compare_dice(n_cases: int, seconds: float) -> None:
    """Distance and stability of DiCE's nearest counterfactual, wherever there is a correction."""
    drawn = [case for net in small_nets() for k in (2, 3, 4) for case in cases(net, k, n_cases, seed=3)]
    points = [timed(lambda c=case: branch_and_bound(c.judgement.for_points(), seconds)) for case in drawn]
    n_none = sum(found.lower == math.inf for _, found in points)
    some = [i for i, (_, found) in enumerate(points) if found.centre is not None]
    drawn, points = [drawn[i] for i in some], [points[i] for i in some]
    print(
        f"\ncounterfactuals of 2 to 4 features: {len(some)} judgements with a correction ({n_none} others "
        "provably have none)\n"
        "                           found   distance over the nearest   stable     CPU s",
        flush=True,
    )
    least = [found.upper for _, found in points]
    say_dice("dynprobe, nearest", drawn, least, [(spent, found.centre) for spent, found in points])
    stable = [timed(lambda c=case: branch_and_bound(c.judgement, seconds)) for case in drawn]
    say_dice("dynprobe, nearest stable", drawn, least, [(spent, found.centre) for spent, found in stable])
    for method in ("random", "genetic"):
        answers = [timed(lambda c=case, m=method: peers.dice(c, m)) for case in drawn]
        say_dice(f"DiCE, {method}", drawn, least, answers)


def say_dice(
    title: str, drawn: Sequence[Case], least: Sequence[float], answers: Sequence[tuple[float, Floats | None]]
) -> None:
    ratios, n_stable = [], 0
    for case, distance, (_, point) in zip(drawn, least, answers, strict=True):
        if point is not None:
            judgement = case.judgement
            ratios.append(float(judgement.distance(point)) / distance)
            n_stable += bool(verify(judgement.network, *judgement.box_around(point), judgement.margin).holds)
    low, middle, high = np.quantile(ratios, (0.0, 0.5, 1.0))
    print(
        f"{title:25}{len(ratios):3} of {len(drawn):3}   {middle:5.2f} ({low:.2f} to {high:5.2f}) "
        f"{n_stable:8} of {len(ratios):3} {np.median([spent for spent, _ in answers]):9.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="speed,deep,area,boxes,dice")
    parser.add_argument("--quick", action="store_true", help="a few judgements of each part")
    parser.add_argument("--seconds", type=float, default=5.0, help="limit of one solve of the first part")
    parser.add_argument("--polaris", type=Path, help="checkout of xinpl/Polaris, for the authors' network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    missing = peers.find_peers()
    print(time.strftime("%d %B %Y"), "|", versions(peers.PACKAGES), "|", "python", " ".join(sys.argv))
    for name, reason in missing.items():
        if reason:
            print(f"{name} is skipped: {reason}")
    quick = options.quick
    n_deep = 3 if quick else 20
    parts = {
        "speed": lambda: compare_speed(1 if quick else 3, options.seconds),
        "deep": lambda: [compare_deep(*task, n_deep, 15.0) for task in deep_tasks(options.polaris)],
        "area": lambda: compare_area(4 if quick else 24, 201 if quick else 401, 2.0),
        "boxes": lambda: check_boxes(
            6 if quick else 100,
            3 if quick else 30,
            20_000 if quick else N_SAMPLED,
            marabou=not missing["maraboupy"],
        ),
        "dice": lambda: compare_dice(1 if quick else 2, 3.0) if not missing["dice-ml"] else None,
    }
    for name in options.parts.split(","):
        parts[name]()


def deep_tasks(polaris: Path | None) -> Iterator[tuple[Net, Sequence[int], int]]:
    yield trained("diabetes", DEEP, 150), DIABETES_FEATURES, 1
    if polaris is not None:
        yield authors_net(polaris), AUTHORS_FEATURES, 0


if __name__ == "__main__":
    main()
