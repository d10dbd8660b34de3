"""Pictures of RDMs, and of units by what they respond to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import squareform

from dynprobe.analyzers.core.result import FAILED, Result
from dynprobe.analyzers.numerics.rdm_compare import Ranking

MOST_RDMS = 8
MISSING = "#dddddd"

Floats = NDArray[np.float64]


def draw_rdms(result: Result, figure: Any) -> None:
    """The RDMs of the last good piece, as percentiles of their entries.

    Args:
        result: From `rsa --save-rdms`.
        figure: An empty matplotlib figure.
    """
    from matplotlib import colormaps

    shown = _rdms(result)
    most = max(len(row) for _title, row in shown)
    figure.set_size_inches(6.75, 0.4 + 1.15 * len(shown) * -(-most // MOST_RDMS) * min(1.6, 8 / most))
    grid = figure.add_gridspec(len(shown), most)
    colours = colormaps["viridis"].with_extremes(bad=MISSING)
    panels = []
    image = None
    for i, (title, row) in enumerate(shown):
        for j, (name, rdm) in enumerate(row):
            panel = figure.add_subplot(grid[i, j])
            ranks = Ranking(rdm).ranks()
            percentile = squareform(100 * (ranks - 0.5) / len(ranks), checks=False)
            np.fill_diagonal(percentile, 0.0)
            image = panel.imshow(percentile, cmap=colours, vmin=0, vmax=100, interpolation="nearest")
            panel.set_title(_short(name, 12))
            panel.set_xticks([])
            panel.set_yticks([])
            if j == 0 and title:
                panel.set_ylabel(title)
            panels.append(panel)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=12, pad=0.02)
    bar.set_label("dissimilarity, percentile")


def _rdms(result: Result) -> list[tuple[str, list[tuple[str, Floats]]]]:
    """Rows of named RDMs, each row with a title."""
    piece = int(np.flatnonzero(np.atleast_1d(result["status"]) != FAILED)[-1])

    def row(name: str, labels: str) -> list[tuple[str, Floats]]:
        names = [str(label) for label in result[labels]]
        values = np.asarray(result[name], dtype=float)
        values = values[piece] if result.lead else values
        there = [(n, rdm) for n, rdm in zip(names, values, strict=True) if len(rdm)]
        return there[:MOST_RDMS]

    if "rdm" in result:
        return [("layers", row("rdm", "layer")), ("predictors", row("predictor_rdm", "predictor"))]
    sides = []
    for half in "ab":
        run, step = (
            np.atleast_1d(result[f"{n}_{half}"])[piece] if f"{n}_{half}" in result else ""
            for n in ("run", "step")
        )
        title = f"{_short(str(run), 16)}\nstep {step}" if str(run) else f"network {half}"
        sides.append((title, row(f"rdm_{half}", f"layer_{half}")))
    return sides


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
    panel.set_yticks(range(len(predictors)), [_short(p, 22) for p in predictors])
    known = np.nan_to_num(cluster, nan=np.inf)
    groups, starts = np.unique(known, return_index=True)
    ends = np.append(starts[1:], len(known))
    for start in starts[1:]:
        panel.axvline(start - 0.5, color="black", linewidth=0.7)
    panel.set_xticks((starts + ends - 1) / 2, [f"{g:g}" if np.isfinite(g) else "none" for g in groups])
    panel.tick_params(axis="x", length=0)
    panel.set_xlabel(f"{len(known):,} units by cluster")
    if result.n_pieces > 1:
        panel.set_title(_short(result.label(piece), 60), loc="left")
    figure.colorbar(image, ax=panel, pad=0.01, aspect=12).set_label("RDM similarity")


def _short(name: str, most: int) -> str:
    text = name if len(name) <= most else f"…{name[1 - most :]}"
    return text.replace("$", r"\$").lstrip("_") or name
