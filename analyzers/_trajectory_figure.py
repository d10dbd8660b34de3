"""Draws a trajectory: its path over the plane's loss, and what the plane does not show."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._steps import space_steps
from dynprobe.analyzers.core.result import FAILED, Result

STYLES = ("contour", "filled", "relief")
MANTISSAS: tuple[tuple[float, ...], ...] = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
MAXIMAL_LEVELS = 12
SLICE = "A slice: a non-convex picture shows a non-convex loss, never the converse"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
MAXIMAL_RUNS = 4

Floats = NDArray[np.float64]


def draw_trajectory(result: Result, figure: Any, style: str = "") -> None:
    """One row per run: path over contours, losses on and off the plane, distance from the plane.

    Args:
        result: From `trajectory`.
        figure: An empty matplotlib figure.
        style: contour (default), filled or relief (three-dimensional).

    Raises:
        OptionError: If the style is not known.
    """
    style = style or STYLES[0]
    if style not in STYLES:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
    status = np.atleast_1d(result["status"])
    runs = [i for i in range(len(status)) if status[i] != FAILED][:MAXIMAL_RUNS]
    figure.set_size_inches(6.75, 2.5 * len(runs))
    places = figure.add_gridspec(2 * len(runs), 2, width_ratios=(1.25, 1.0))
    for row, run in enumerate(runs):
        path = _Path(result, run)
        panel = figure.add_subplot(
            places[2 * row : 2 * row + 2, 0], projection="3d" if style == "relief" else None
        )
        _draw_plane(figure, panel, path, style)
        losses = figure.add_subplot(places[2 * row, 1])
        distances = figure.add_subplot(places[2 * row + 1, 1], sharex=losses)
        _draw_losses(losses, path)
        _draw_distances(distances, path)
    figure.suptitle(SLICE, fontsize=5, color=GREY)


class _Path:
    """One run's part of a result."""

    def __init__(self, result: Result, run: int) -> None:
        name = str(np.atleast_1d(result["run"])[run]) if "run" in result else ""
        several = bool(result.lead)
        mine = slice(None)
        if several and "checkpoint_run" in result:
            mine = np.flatnonzero(result["checkpoint_run"] == name)  # type: ignore[assignment]
        self._result, self._run, self._mine, self._several = result, run, mine, several
        self.title = name if several else ""
        self.coordinate = self.along("coordinate")
        raw = self.along("step") if "step" in result else np.arange(len(self.coordinate))
        numeric = raw.dtype.kind in "if"
        self.step = raw.astype(float) if numeric else np.arange(len(self.coordinate), dtype=float)
        self.step_name = "step" if numeric else "checkpoint"
        self.chance = _chance(result)

    def along(self, name: str) -> NDArray[Any]:
        """A variable of the checkpoints."""
        values: NDArray[Any] = self._result[name][self._mine]
        return values

    def of_run(self, name: str) -> NDArray[Any] | None:
        """A variable of the run as a whole, None where it is not there."""
        if name not in self._result:
            return None
        values: NDArray[Any] = self._result[name]
        return values[self._run] if self._several else values

    def surface(self) -> tuple[Floats, Floats, Floats] | None:
        """x, y and the loss on them; runs side by side have gaps where only another run has points."""
        loss = self.of_run("surface")
        if loss is None:
            return None
        keep_y, keep_x = ~np.isnan(loss).all(axis=1), ~np.isnan(loss).all(axis=0)
        if keep_y.sum() < 2 or keep_x.sum() < 2:
            return None
        return self._result["x"][keep_x], self._result["y"][keep_y], loss[np.ix_(keep_y, keep_x)]


def _chance(result: Result) -> float | None:
    """Cross-entropy of a uniform guess, ln C, where the number of classes is known."""
    classes = result.attributes.get("n_classes")
    facts = result.attributes.get("measured_on", {})
    named = "cross_entropy" in (result.attributes.get("loss"), facts.get("loss"))
    return math.log(int(classes)) if named and classes else None


def _levels(loss: Floats) -> tuple[Floats, bool]:
    """Round levels, evenly spaced on a log scale where the loss is positive and more than doubles."""
    finite = loss[np.isfinite(loss)]
    if finite.size == 0 or finite.max() <= finite.min():
        return np.array([]), False
    low, high = float(finite.min()), float(finite.max())
    if low <= 0 or high <= 2 * low:
        levels = np.linspace(low, high, MAXIMAL_LEVELS + 2)[1:-1]
        return np.unique([float(f"{level:.3g}") for level in levels]), False
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in MANTISSAS:
        levels = np.array([float(f"{m}e{d}") for d in decades for m in mantissas])
        levels = levels[(levels > low) & (levels < high)]
        if len(levels) <= MAXIMAL_LEVELS:
            break
    return levels[:: math.ceil(len(levels) / MAXIMAL_LEVELS) or 1], True


def _draw_plane(figure: Any, panel: Any, path: _Path, style: str) -> None:
    sheet = path.surface()
    if style == "relief":
        _draw_relief(panel, path, sheet)
    else:
        if sheet is not None:
            _draw_contours(figure, panel, sheet, filled=style == "filled")
        _draw_path(figure, panel, path)
    brief = style == "relief"  # long labels run into each other in three dimensions
    panel.set_xlabel("first direction" if brief else _axis_name(path, 0))
    panel.set_ylabel("second direction" if brief else _axis_name(path, 1))
    if path.title:
        panel.set_title(path.title.replace("$", r"\$"), loc="left")


def _draw_contours(figure: Any, panel: Any, sheet: tuple[Floats, Floats, Floats], *, filled: bool) -> None:
    from matplotlib.colors import LogNorm, Normalize

    x, y, loss = sheet
    levels, log = _levels(loss)
    if not len(levels):
        return
    shown = np.ma.masked_invalid(loss)
    norm = LogNorm(loss[np.isfinite(loss)].min(), levels[-1]) if log else Normalize(shown.min(), levels[-1])
    if filled:
        edges = np.concatenate([[float(shown.min())], levels])
        drawn = panel.contourf(x, y, shown, edges, norm=norm, cmap="viridis", extend="max")
        bar = figure.colorbar(drawn, ax=panel, label="loss", ticks=levels[:: max(1, len(levels) // 6)])
        bar.ax.set_yticklabels([f"{level:.2g}" for level in levels[:: max(1, len(levels) // 6)]])
        bar.ax.minorticks_off()
    else:
        drawn = panel.contour(x, y, shown, levels, norm=norm, cmap="viridis", linewidths=0.6)
        panel.clabel(drawn, fmt="%.2g", fontsize=4.5)


def _draw_path(figure: Any, panel: Any, path: _Path) -> None:
    x, y = (
        path.coordinate[:, 0],
        path.coordinate[:, 1] if path.coordinate.shape[1] > 1 else np.zeros(len(path.step)),
    )
    panel.plot(x, y, color="black", linewidth=0.7, zorder=3)
    order = np.arange(len(x))
    dots = panel.scatter(x, y, c=order, cmap="plasma", s=11, edgecolors="white", linewidths=0.4, zorder=4)
    panel.plot(x[-1], y[-1], marker="*", color="black", markersize=6, markeredgecolor="white", zorder=5)
    ticks = np.unique(np.linspace(0, len(x) - 1, min(len(x), 5)).round().astype(int))
    bar = figure.colorbar(dots, ax=panel, ticks=ticks, label=path.step_name, aspect=30, pad=0.02)
    bar.ax.set_yticklabels([f"{path.step[i]:g}" for i in ticks])


def _draw_relief(panel: Any, path: _Path, sheet: tuple[Floats, Floats, Floats] | None) -> None:
    """The plane's loss as a landscape in three dimensions, with the path on it."""
    if sheet is not None:
        x, y, loss = sheet
        log = _levels(loss)[1]
        height = np.where(np.isfinite(loss), np.log10(loss) if log else loss, np.nan)
        grid = np.meshgrid(x, y)
        panel.plot_surface(*grid, height, cmap="viridis", alpha=0.8, linewidth=0, rasterized=True)
        panel.set_zlabel("log10 loss" if log else "loss")
        plane_loss = path.along("plane_loss")
        if path.coordinate.shape[1] > 1:
            with np.errstate(divide="ignore", invalid="ignore"):
                level = np.log10(plane_loss) if log else plane_loss
            panel.plot(
                path.coordinate[:, 0], path.coordinate[:, 1], level, color="black", marker="o", zorder=5
            )


def _axis_name(path: _Path, axis: int) -> str:
    names = ("first", "second")
    explained, walk = path.of_run("explained_variance"), path.of_run("random_walk")
    if explained is None or axis >= len(explained):
        return ""
    text = f"{names[axis]} direction: {100 * explained[axis]:.1f} % of the path"
    return f"{text}\n(a random walk: {100 * walk[axis]:.1f} %)" if walk is not None else text


def _draw_losses(panel: Any, path: _Path) -> None:
    for name, text, colour in (
        ("loss", "checkpoint", BLUE),
        ("plane_loss", "its place on the plane", ORANGE),
    ):
        mean, error = path.along(name), path.along(f"{name}_stderr")
        panel.plot(path.step, mean, color=colour, label=text, marker="o", markersize=2)
        panel.fill_between(path.step, mean - error, mean + error, color=colour, alpha=0.22, linewidth=0)
    if path.chance is not None:
        panel.axhline(path.chance, color=GREY, linewidth=0.6, linestyle=":", label="chance")
    positive = path.along("loss")
    if np.nanmin(positive) > 0:
        panel.set_yscale("log")
    panel.set_ylabel("loss ± s.e.")
    panel.legend()
    panel.tick_params(labelbottom=False)
    space_steps(panel, path.step)


def _draw_distances(panel: Any, path: _Path) -> None:
    panel.plot(
        path.step, path.along("distance"), color=GREY, label="from the last checkpoint", linestyle="--"
    )
    off = path.along("off_plane_distance")
    panel.plot(path.step, off, color=BLUE, label="from the plane", marker="o", markersize=2)
    panel.set_ylabel("distance")
    panel.set_xlabel(path.step_name)
    panel.set_ylim(0, 1.5 * max(float(np.nanmax(path.along("distance"))), 1e-30))
    panel.legend(loc="upper right", ncols=2)
    space_steps(panel, path.step)
