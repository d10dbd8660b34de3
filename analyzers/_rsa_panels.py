"""Pictures of RDMs, and of units by what they respond to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import squareform

from dynprobe.analyzers._similarity_names import at_step, short, tell_apart
from dynprobe.analyzers._steps import step_axis
from dynprobe.analyzers.core.contract import OptionError
from dynprobe.analyzers.core.result import FAILED, Result
from dynprobe.analyzers.numerics.rdm_compare import ranking

MOST_RDMS = 8
MOST_RUNS = 4
MISSING = "#dddddd"

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


# ---- what is drawn where not everything can be


def runs_of(result: Result) -> list[tuple[str, Rows]]:
    """Rows of the good checkpoints of each run, in the order of their steps."""
    good = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)
    names = np.atleast_1d(result["run"]).astype(str) if "run" in result else np.full(result.n_pieces, "")
    place = step_axis(result)[0]
    found = []
    for name in dict.fromkeys(names[good].tolist()):
        rows = good[names[good] == name]
        found.append((name, rows[np.argsort(place[rows], kind="stable")]))
    return found


def layers_of(result: Result, row: np.intp) -> Rows:
    """Layers that the network of a checkpoint has: others may have brought in names of their own."""
    return np.flatnonzero(np.isfinite(values_of(result, "n_features", np.array([row]))[0]))


def values_of(result: Result, name: str, rows: Rows) -> Floats:
    """A variable of some pieces; of the only one where there is no leading dimension."""
    values = np.asarray(result[name], dtype=float)
    return values[rows] if result.lead else values[None]


def spread(count: int, most: int) -> Rows:
    """At most so many of several things in order, evenly spread with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.intp))


def chosen_predictors(result: Result, most: int) -> Rows:
    """At most so many predictors: stacks with a ceiling and whole tables before single columns."""
    names = [str(name) for name in result["predictor"]]
    subjects = np.atleast_2d(np.asarray(result["n_subjects"], dtype=float))
    several = np.nanmax(subjects, axis=0) > 1
    later = [not (several[i] or name.endswith("(all)")) for i, name in enumerate(names)]
    return np.sort(np.argsort(later, kind="stable")[:most])


def say_left_out(figure: Any, **shown: tuple[int, int]) -> None:
    """A line under the figure for each kind of thing of which a part is shown.

    Args:
        figure: A matplotlib figure.
        shown: How many of how many, by the name of the kind.
    """
    parts = [f"{some} of {count} {kind}" for kind, (some, count) in shown.items() if some < count]
    if parts:
        figure.supxlabel(f"{', '.join(parts)} shown", fontsize="small")


# ---- RDMs


def draw_rdms(result: Result, figure: Any) -> None:
    """RDMs as percentiles of their entries: of each run's last checkpoint, or of the last pair.

    Args:
        result: From `rsa --save-rdms`.
        figure: An empty matplotlib figure.

    Raises:
        OptionError: If there are none.
    """
    from matplotlib import colormaps

    shown = _rdms(result)
    if not shown:
        raise OptionError("no layer has an RDM.", "The notes of `dynprobe report show` say why.")
    most = max(len(row) for _title, row, _count in shown)
    figure.set_size_inches(6.75, 0.6 + 1.15 * len(shown) * min(1.6, 8 / most))
    grid = figure.add_gridspec(len(shown), most)
    colours = colormaps["viridis"].with_extremes(bad=MISSING)
    panels = []
    image = None
    for i, (title, row, _count) in enumerate(shown):
        names = tell_apart([name for name, _rdm in row], 12)
        for j, (name, (_whole, rdm)) in enumerate(zip(names, row, strict=True)):
            panel = figure.add_subplot(grid[i, j])
            ranks = ranking(rdm).ranks()
            percentile = squareform(100 * (ranks - 0.5) / len(ranks), checks=False)
            np.fill_diagonal(percentile, 0.0)
            image = panel.imshow(percentile, cmap=colours, vmin=0, vmax=100, interpolation="nearest")
            panel.set_title(name)
            panel.set_xticks([])
            panel.set_yticks([])
            if j == 0 and title:
                panel.set_ylabel(title)
            panels.append(panel)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=12, pad=0.02)
    bar.set_label("dissimilarity, percentile")
    figure.align_ylabels(panels)
    _say_rdms(result, figure, shown)


Named = list[tuple[str, Floats]]


def _say_rdms(result: Result, figure: Any, shown: list[tuple[str, Named, int]]) -> None:
    counts = {title: (len(row), count) for title, row, count in shown}
    predictors = counts.pop("predictors", (0, 0))
    left_out = {"layers": max(counts.values(), key=lambda of: of[1])} if counts else {}
    if "rdm_a" in result:
        good = int((np.atleast_1d(result["status"]) != FAILED).sum())
        say_left_out(figure, **left_out, pairs=(1, good))
    else:
        runs = len(runs_of(result))
        say_left_out(figure, **left_out, predictors=predictors, runs=(min(runs, MOST_RUNS), runs))


def _rdms(result: Result) -> list[tuple[str, Named, int]]:
    """Rows of named RDMs, each row with a title and the number of RDMs that there are."""
    if "rdm" in result:
        found, last = [], np.intp(0)
        for run, rows in runs_of(result)[:MOST_RUNS]:
            last = rows[-1]
            row, count = _row(result, "rdm", "layer", last)
            found.append((_title(run, _step(result, "step", last)), row, count))
        row, _count = _row(result, "predictor_rdm", "predictor", last, chosen_predictors(result, MOST_RDMS))
        found.append(("predictors", row, len(result["predictor"])))
    else:
        last = np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)[-1]
        found = []
        for half in "ab":
            run = str(np.atleast_1d(result[f"run_{half}"])[last]) if f"run_{half}" in result else ""
            title = _title(run or f"network {half}", _step(result, f"step_{half}", last))
            found.append((title, *_row(result, f"rdm_{half}", f"layer_{half}", last)))
    return [row for row in found if row[1]]


def _row(result: Result, name: str, labels: str, piece: np.intp, at: Rows | None = None) -> tuple[Named, int]:
    """The RDMs of a piece that are there, evenly spread over the layers, and how many there are."""
    rdms, names = values_of(result, name, np.array([piece]))[0], [str(label) for label in result[labels]]
    there = np.flatnonzero(np.isfinite(rdms).any(1)) if rdms.shape[1] else np.array([], dtype=np.intp)
    chosen = there[spread(len(there), MOST_RDMS)] if at is None and len(there) else there
    chosen = chosen if at is None else np.intersect1d(at, there)
    return [(names[i], rdms[i]) for i in chosen], len(there)


def _title(run: str, step: float) -> str:
    return at_step(run, step, 16).replace(", ", "\n")


def _step(result: Result, name: str, piece: np.intp) -> float:
    steps = np.atleast_1d(result[name]) if name in result else np.array([np.nan])
    return float(steps[piece if result.lead else 0]) if steps.dtype.kind in "iuf" else np.nan


# ---- single units


def draw_units(result: Result, figure: Any) -> None:
    """Every unit against every predictor, units sorted by cluster.

    Args:
        result: From `rsa --predictors … --units`.
        figure: An empty matplotlib figure.
    """
    from matplotlib import colormaps

    piece = int(np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)[-1])
    similarity, cluster = (
        np.asarray(result[n], dtype=float)[piece] if result.lead else np.asarray(result[n], dtype=float)
        for n in ("unit_similarity", "unit_cluster")
    )
    predictors = [str(p) for p in result["predictor"]]
    order = np.lexsort((-np.nan_to_num(similarity).max(1), np.nan_to_num(cluster, nan=np.inf)))
    cluster = cluster[order]
    figure.set_size_inches(6.75, 0.9 + 0.18 * max(len(predictors), 4))
    panel = figure.add_subplot()
    largest = max(float(np.nanmax(np.abs(similarity), initial=0.0)), 1e-3)
    image = panel.imshow(
        similarity[order].T,
        cmap=colormaps["RdBu_r"].with_extremes(bad=MISSING),
        vmin=-largest,
        vmax=largest,
        aspect="auto",
        interpolation="nearest",
    )
    panel.set_yticks(range(len(predictors)), tell_apart(predictors, 22))
    known = np.nan_to_num(cluster, nan=np.inf)
    groups, starts = np.unique(known, return_index=True)
    ends = np.append(starts[1:], len(known))
    for start in starts[1:]:
        panel.axvline(start - 0.5, color="black", linewidth=0.7)
    panel.set_xticks((starts + ends - 1) / 2, [f"{g:g}" if np.isfinite(g) else "none" for g in groups])
    panel.tick_params(axis="x", length=0)
    panel.set_xlabel(f"{len(known):,} units by cluster")
    if result.n_pieces > 1:
        panel.set_title(short(result.label(piece), 60), loc="left")
    figure.colorbar(image, ax=panel, pad=0.01, aspect=12).set_label("RDM similarity")
