"""Draws corrections: planes, intervals or images of single judgements, curves over the steps, transfer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._corrections_curves import (
    draw_distances,
    draw_holding,
    draw_outcomes,
    draw_transfer,
    has_distances,
    outcome_handles,
)
from dynprobe.analyzers._corrections_panels import (
    GREY,
    change_of_picture,
    draw_intervals,
    draw_picture,
    interval_handles,
    picture_shape,
    plain,
    rows_of_intervals,
    title_of,
)
from dynprobe.analyzers._corrections_planes import (
    axes_of_plane,
    draw_plane,
    earlier_boxes,
    has_target,
    plane_handles,
)
from dynprobe.analyzers._corrections_runs import (
    ALREADY_TARGET,
    NEAREST,
    STABLE,
    UNSUPPORTED,
    JudgedRun,
    judged_runs,
)
from dynprobe.analyzers.core.result import Result

STYLES = ("auto", "plane", "intervals", "images", "steps", "transfer")
MOST_JUDGEMENTS, MOST_BESIDE_RUNS, MOST_RUNS = 6, 3, 3
WIDTH = 6.75
TOLD = {
    "plane": "judgements with two features and a map of the margin",
    "intervals": "judgements to correct",
    "images": "images to correct",
    "transfer": "boxes verified on other runs",
}
TIPS = {
    "plane": "Measure with two --features.",
    "intervals": "Choose a --target that is not decided already.",
    "images": "Measure data of images, towards a --target that is not decided already.",
    "transfer": "Give several runs.",
}

Judgement = tuple[JudgedRun, int]


def draw_corrections(result: Result, figure: Any, style: str = "") -> None:
    """Single judgements at the last checkpoint above curves over the steps and transfer between runs.

    Args:
        result: From `corrections`.
        figure: An empty matplotlib figure.
        style: auto (default) draws what the result holds; plane (two features), intervals (of any number),
            images, steps, or transfer draw only that.

    Raises:
        OptionError: If the style is not known, or the result does not hold what it shows.
    """
    style = style or STYLES[0]
    if style not in STYLES:
        raise OptionError(f"{style!r} is not a style of this figure.", f"Styles: {', '.join(STYLES)}.")
    runs = judged_runs(result)
    judgements = _judgements(runs)
    drawable = {name: _drawable(name, judgements) for name in ("plane", "images", "intervals")}
    with_transfer = "transfer" in result and bool(np.isfinite(result["transfer"].astype(float)).any())
    if (style in drawable and not drawable[style]) or (style == "transfer" and not with_transfer):
        raise OptionError(f"the report holds no {TOLD[style]}.", TIPS[style])
    single = next((name for name, some in drawable.items() if some), "") if style == "auto" else style
    bands: list[_Band] = []
    if single in drawable:
        most = MOST_BESIDE_RUNS if style == "auto" and len(runs) > 1 else MOST_JUDGEMENTS
        bands.append(_SINGLE[single](drawable[single], most, len(judgements)))
    over_steps = any(len(run.step) > 1 for run in runs)
    if all(_nothing_to_correct(run) for run in runs):
        bands.append(_Nothing(runs))
    elif style == "steps" or (style == "auto" and (over_steps or not bands)):
        bands.append(_Steps(runs))
    if style in ("auto", "transfer") and with_transfer:
        bands.append(_Transfer(runs, [str(name) for name in result["other"]]))
    _lay_out(figure, bands)


def _nothing_to_correct(run: JudgedRun) -> bool:
    return bool(np.isin(run.outcomes(), ("", ALREADY_TARGET)).all())


def _judgements(runs: list[JudgedRun]) -> list[Judgement]:
    """Those to correct at the last checkpoint, sample by sample; first those with a stable correction.

    Then those with a nearest one only.
    """
    order = (STABLE, NEAREST, "")
    told = [
        (run, i)
        for i in range(len(runs[0].samples))
        for run in runs
        if run.outcomes()[-1, i] not in ("", ALREADY_TARGET)
        and (run.outcomes()[-1, i] != UNSUPPORTED or run.correction(i))
    ]
    return sorted(told, key=lambda judgement: order.index(judgement[0].correction(judgement[1])))


def _drawable(name: str, judgements: list[Judgement]) -> list[Judgement]:
    if name == "plane":
        return [(run, i) for run, i in judgements if axes_of_plane(run, i)]
    if name == "images":
        return [(run, i) for run, i in judgements if picture_shape(run)]
    return [(run, i) for run, i in judgements if rows_of_intervals(run, i)]


def _lay_out(figure: Any, bands: list[_Band]) -> None:
    """One band below the other."""
    figure.set_size_inches(max(band.width for band in bands), min(sum(band.height for band in bands), 8.5))
    places = figure.add_gridspec(len(bands), 1, height_ratios=[band.height for band in bands])
    for band, place in zip(bands, places, strict=True):
        band.draw(figure, place)


class _Band(Protocol):
    """A part of the figure as wide as the figure; sizes in inches."""

    width: float
    height: float

    def draw(self, figure: Any, place: Any) -> None:
        """Draw it at a place of the figure's grid."""


class _Judgements:
    """The first judgements, one panel each."""

    width = WIDTH
    space: float | None = None

    def __init__(
        self, n_all: int, shown: list[Judgement], columns: int, height: float, legend: float
    ) -> None:
        self.all, self.shown = n_all, shown
        self.columns = min(columns, len(shown))
        self.rows = math.ceil(len(self.shown) / self.columns)
        self.heights = [height] * self.rows
        self.height = self.rows * height + legend

    def panels(self, figure: Any, place: Any) -> list[Any]:
        grid = place.subgridspec(self.rows, self.columns, height_ratios=self.heights, wspace=self.space)
        return [figure.add_subplot(grid[divmod(k, self.columns)]) for k in range(len(self.shown))]

    def title(self, run: JudgedRun, sample: int) -> str:
        """Which judgement a panel shows, wrapped to its width."""
        return title_of(run, sample, int(16 * self.width / self.columns))

    def add_legend(self, figure: Any, handles: dict[str, Any]) -> None:
        """Above all panels, with a word on what is left out."""
        title = f"{len(self.shown)} of {self.all} judgements, at the last checkpoint"
        widths = [3.4 * len(name) + 26 for name in handles]  # points, about
        room = 72 * figure.get_size_inches()[0]
        columns = len(handles) if sum(widths) <= room else int(room // max(widths))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=columns,
            title=title if self.all > len(self.shown) else None,
            title_fontsize=7,
        )


class _Planes(_Judgements):
    def __init__(self, judgements: list[Judgement], most: int, n_all: int) -> None:
        # an empty plane is all that there is to see where the target is nowhere decided
        shown = [(run, i) for run, i in judgements if has_target(run, i)][:most] or judgements[:most]
        many = len(shown) > 1
        super().__init__(n_all, shown, 2 if len(shown) in (2, 4) else 3, 2.2 if many else 2.9, 0.35)
        self.width = WIDTH if many else 3.6

    def draw(self, figure: Any, place: Any) -> None:
        """One plane a judgement, with the boxes of earlier checkpoints coloured by step."""
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        steps = np.concatenate([run.step for run, _ in self.shown])
        # without the yellow end, which vanishes on white
        scale = ScalarMappable(
            Normalize(steps.min(), max(steps.max(), steps.min() + 1)),
            ListedColormap(colormaps["viridis"](np.linspace(0.85, 0.15, 64))),
        )
        panels = self.panels(figure, place)
        for panel, (run, i) in zip(panels, self.shown, strict=True):
            draw_plane(panel, run, i, scale.to_rgba)
            # room for a judged point on the upper edge
            panel.set_title(self.title(run, i), loc="left", pad=5.5)
        same = len({tuple(axes_of_plane(run, i)) for run, i in self.shown}) == 1
        for k, panel in enumerate(panels if same else []):
            if k % self.columns:
                panel.set_ylabel("")
            if k + self.columns < len(panels):
                panel.set_xlabel("")
        if any(len(earlier_boxes(run, i)) for run, i in self.shown):
            step_name = self.shown[0][0].step_name
            label = f"thin: box of an earlier {step_name}"
            figure.colorbar(scale, ax=panels, label=label, aspect=35, pad=0.02)
        self.add_legend(figure, plane_handles(self.shown))


class _Intervals(_Judgements):
    space = 0.08  # numbers right of a panel are not to touch the names of the next

    def __init__(self, judgements: list[Judgement], most: int, n_all: int) -> None:
        shown = judgements[:most]
        super().__init__(n_all, shown, 2, 0.0, 0.25)
        counts = [len(rows_of_intervals(run, i)) for run, i in shown]
        self.rooms = [max(2, *counts[k : k + self.columns]) for k in range(0, len(shown), self.columns)]
        self.heights = [0.5 + 0.19 * room for room in self.rooms]
        self.height += sum(self.heights)
        self.width = WIDTH if len(shown) > 1 else 4.2

    def draw(self, figure: Any, place: Any) -> None:
        """One panel a judgement, one row a feature."""
        for k, (panel, (run, i)) in enumerate(zip(self.panels(figure, place), self.shown, strict=True)):
            draw_intervals(panel, run, i, self.rooms[k // self.columns])
            panel.set_title(self.title(run, i), loc="left")
        self.add_legend(figure, interval_handles(self.shown))


class _Pictures(_Judgements):
    def __init__(self, judgements: list[Judgement], most: int, n_all: int) -> None:
        super().__init__(n_all, judgements[:most], 3, 2.3, 0.2)
        self.width = WIDTH if self.columns > 1 else 3.6

    def draw(self, figure: Any, place: Any) -> None:
        """One image a judgement, with one scale for the change in all of them."""
        largest = max(float(np.abs(change_of_picture(*judgement)).max()) for judgement in self.shown) or 1.0
        panels = self.panels(figure, place)
        pairs = zip(panels, self.shown, strict=True)
        drawn = [draw_picture(panel, run, i, largest) for panel, (run, i) in pairs]
        for panel, (run, i) in zip(panels, self.shown, strict=True):
            panel.set_title(self.title(run, i), loc="left")
        if any(run.correction(i) for run, i in self.shown):
            figure.colorbar(drawn[0], ax=panels, label="change by the correction", aspect=30, pad=0.02)
        if self.all > len(self.shown):
            text = f"{len(self.shown)} of {self.all} judgements, at the last checkpoint"
            figure.suptitle(text, fontsize="medium", color=GREY, x=0.01, ha="left")


class _Steps:
    width = WIDTH

    def __init__(self, runs: list[JudgedRun]) -> None:
        self.runs, self.all = runs[:MOST_RUNS], len(runs)
        self.followed = any(np.isfinite(run.numbers("previous_holds")).any() for run in self.runs)
        self.height = 2.25 * len(self.runs)

    def draw(self, figure: Any, place: Any) -> None:
        """A row for each run: distances, outcomes, and whether boxes hold at the next checkpoint."""
        some = any(has_distances(run) for run in self.runs)
        columns = [draw_distances] * some + [draw_outcomes] + [draw_holding] * self.followed
        grid = place.subgridspec(len(self.runs), len(columns))
        for row, run in enumerate(self.runs):
            for column, draw in enumerate(columns):
                panel = figure.add_subplot(grid[row, column])
                draw(panel, run)
                if column == 0 and run.name:
                    panel.set_ylabel(f"{plain(_short(run.name))}\n{panel.get_ylabel()}")
                if row == 0:
                    _legend_above(panel, outcome_handles(self.runs) if draw is draw_outcomes else {})
        if self.all > len(self.runs):
            text = f"over the steps: the first {len(self.runs)} of {self.all} runs"
            figure.suptitle(text, fontsize="medium", color=GREY, x=0.01, ha="left")


def _short(name: str, characters: int = 30) -> str:
    """A name with its middle left out where it is longer than a panel."""
    half = characters // 2
    return name if len(name) <= characters else f"{name[:half]}…{name[1 - half :]}"


def _legend_above(panel: Any, handles: dict[str, Any]) -> None:
    """Over the panel, so that it hides no curve; of what it holds where no handles are given."""
    if not handles:
        own, labels = panel.get_legend_handles_labels()
        handles = dict(zip(labels, own, strict=True))  # one for each label
    panel.legend(
        list(handles.values()),
        list(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        borderaxespad=0.2,
        ncols=2,
        columnspacing=0.8,
        handlelength=1.3,
    )


class _Transfer:
    def __init__(self, runs: list[JudgedRun], others: list[str]) -> None:
        self.runs, self.others = runs, others
        self.height = 0.9 + 0.28 * len(runs)
        self.width = 4.2

    def draw(self, figure: Any, place: Any) -> None:
        """A row for each run, a column for each other one."""
        share = min(1.0, self.width / figure.get_size_inches()[0])
        place = place.subgridspec(1, 2, width_ratios=(share, 1 - share))[0, 0] if share < 1 else place
        draw_transfer(figure, figure.add_subplot(place), self.runs, self.others)


class _Nothing:
    width, height = 3.6, 0.5

    def __init__(self, runs: list[JudgedRun]) -> None:
        self.judged = max(int((run.outcomes() == ALREADY_TARGET).sum(1).max()) for run in runs)

    def draw(self, figure: Any, place: Any) -> None:
        """In words, instead of empty panels."""
        panel = figure.add_subplot(place)
        panel.set_axis_off()
        one = self.judged == 1
        words = "the sample is" if one else f"all {self.judged} samples are"
        text = f"{words} the target already: there is nothing to correct"
        panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=GREY)


_SINGLE: dict[str, Callable[[list[Judgement], int, int], _Band]] = {
    "plane": _Planes,
    "intervals": _Intervals,
    "images": _Pictures,
}
