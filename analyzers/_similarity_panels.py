"""The panels of a similarity figure: maps of layers, curves over steps, matrices of checkpoints."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynprobe.analyzers._pair_table import Checkpoint, Family, PairTable, against_last, families, most_similar
from dynprobe.analyzers._similarity_names import at_step, label_axis, short, tell_apart
from dynprobe.analyzers._steps import space_steps

Floats = NDArray[np.float64]

WIDTH, COLUMN = 6.75, 3.25
"""Inches of two columns of a paper, and of one."""
GREY, PALE = "#777777", "#D9D9D9"
MOST_PANELS = 6
MOST_CURVES = 4
MOST_NAMED = 10
"""Layers that a legend names; more are read from a colour bar."""
SIGNED = -0.1
"""A value below this gets a diverging scale; above it, it is an estimate of 0 with its error."""


def note(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """Explains marks above all panels."""
    if handles:
        where = "upper center" if figure.get_layout_engine() is None else "outside upper center"
        figure.legend(handles, labels, loc=where, ncols=len(handles), handletextpad=0.4, borderaxespad=0.2)


# ---- maps of layers


def draw_heatmaps(table: PairTable, figure: Any, label: str) -> None:
    """Every layer of one network against every layer of the other, for up to six pairs.

    Args:
        table: The pairs.
        figure: An empty matplotlib figure.
        label: What the similarity is called.
    """
    values = np.asarray(table.result[table.value], dtype=np.float64)
    chosen = np.unique(np.linspace(0, len(table) - 1, min(MOST_PANELS, len(table))).round().astype(int))
    columns = {1: 1, 2: 2, 4: 2}.get(len(chosen), 3)
    lines = math.ceil(len(chosen) / columns)
    figure.set_size_inches(
        COLUMN + 0.35 if columns == 1 else WIDTH, (3.1 if columns < 3 else 2.2) * lines + 0.15
    )
    scale = _scale(values[table.rows[chosen]])
    panels = np.array([figure.add_subplot(lines, columns, i + 1) for i in range(len(chosen))])
    missing, length = False, 24 if columns < 3 else 16
    for panel, pair in zip(panels, chosen, strict=True):
        row = int(table.rows[pair])
        names_a, names_b, inside = _present(table, row)
        shown = values[row][inside]
        image = panel.imshow(shown, **scale, aspect="auto" if shown.shape[0] != shown.shape[1] else "equal")
        missing = missing or bool(np.isnan(shown).any())
        _mark_most_similar(panel, shown, names_a, names_b, image)
        label_axis(panel.xaxis, names_b)
        label_axis(panel.yaxis, names_a)
        panel.tick_params(axis="x", rotation=90)
        small = max(3.5, min(6.0, 110 / max(len(names_a), len(names_b))))
        panel.tick_params(labelsize=small, length=1.5)
        panel.set_xlabel(at_step(table.run_b[pair], table.step_b[pair], length))
        panel.set_ylabel(at_step(table.run_a[pair], table.step_a[pair], length))
    _colour_bar(figure, image, panels, label)
    _explain_maps(figure, missing=missing, left_out=len(table) - len(chosen))


def _present(table: PairTable, row: int) -> tuple[list[str], list[str], Any]:
    """Layers that the networks of a pair have: other pairs may have brought in names of their own."""
    found = []
    values = np.asarray(table.result[table.value], dtype=np.float64)[row]
    for half, axis in (("a", 1), ("b", 0)):
        known = np.isfinite(values).any(axis)
        if f"n_features_{half}" in table.result:
            known |= np.isfinite(np.asarray(table.result[f"n_features_{half}"], dtype=np.float64)[row])
        found.append(np.flatnonzero(known) if known.any() else np.arange(len(known)))
    names = [[str(table.result[f"layer_{h}"][i]) for i in at] for h, at in zip("ab", found, strict=True)]
    return names[0], names[1], np.ix_(*found)


def _scale(values: Floats) -> dict[str, Any]:
    """Colours shared by all panels: 0 to 1 or, for values of either sign, even around 0."""
    import matplotlib

    low = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
    high = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    signed = low < SIGNED
    colours = matplotlib.colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad=PALE)
    reach = max(-low, high)
    limits = (-reach, reach) if signed else (0.0, max(1.0, high))
    return {"cmap": colours, "vmin": limits[0], "vmax": limits[1], "interpolation": "nearest"}


def _mark_most_similar(panel: Any, shown: Floats, names_a: list[str], names_b: list[str], image: Any) -> None:
    """A dot at each row's most similar layer, filled where it has the row's own name."""
    size = max(1.2, min(3.0, 60 / max(shown.shape)))
    for i in np.flatnonzero(np.isfinite(shown).any(1)):
        j = int(np.nanargmax(shown[i]))
        own = names_b.index(names_a[i]) if names_a[i] in names_b else j
        j = own if most_similar(shown[i, own], shown[i, j]) else j
        red, green, blue, _ = image.cmap(image.norm(shown[i, j]))
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        fill = ink if names_a[i] == names_b[j] else "none"
        panel.plot(j, i, "o", markersize=size, color=ink, markerfacecolor=fill, markeredgewidth=0.5)


def _colour_bar(figure: Any, image: Any, panels: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=list(panels.ravel()), shrink=0.8, pad=0.02, aspect=25)
    bar.set_label(label)
    bar.outline.set_linewidth(0.4)


def _explain_maps(figure: Any, *, missing: bool, left_out: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    style: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 3, "markeredgewidth": 0.5}
    handles: list[Any] = [
        Line2D([], [], color="black", **style),
        Line2D([], [], color="black", markerfacecolor="none", **style),
    ]
    labels = ["row's most similar layer: same name", "another"]
    if missing:
        handles.append(Patch(facecolor=PALE))
        labels.append("not defined")
    if left_out:
        handles.append(Line2D([], [], linestyle=""))
        labels.append(f"{left_out} more pairs not shown")
    note(figure, handles, labels)


# ---- curves over steps


def draw_curves(table: PairTable, figure: Any, label: str) -> None:
    """Similarity of the layers of the same name over steps, one panel for each run or two runs.

    Args:
        table: The pairs.
        figure: An empty matplotlib figure.
        label: What the similarity is called.
    """
    found = families(table)[0]
    shown = found[:MOST_CURVES]
    columns = 1 if len(shown) == 1 else 2
    lines = math.ceil(len(shown) / columns)
    figure.set_size_inches(WIDTH if columns == 2 else 4.4, 2.3 * lines + 0.2)
    colours = _colours(len(table.layers))
    final = {family.runs: family.against for family in against_last(table)}
    for i, family in enumerate(shown):
        panel = figure.add_subplot(lines, columns, i + 1)
        panel.spines[["top", "right"]].set_visible(False)
        _draw_family(panel, table, family, colours)
        if final.get(family.runs) == family.against:
            _mark_levels(panel, table, family, colours)
        panel.set_ylabel(f"{label}\n{short(family.against, 34)}")
        panel.set_title(" | ".join(short(run, 24) for run in family.runs), loc="left")
    _explain_curves(figure, table, colours, left_out=len(found) - len(shown))


def _draw_family(panel: Any, table: PairTable, family: Family, colours: list[Any]) -> None:
    same, error = table.same[family.rows], table.of_layers(f"{table.value}_stderr")[family.rows]
    chance = table.of_layers(f"{table.value}_chance")[family.rows]
    for i, colour in enumerate(colours):
        panel.plot(family.step, same[:, i], color=colour, linewidth=0.9, marker="o", markersize=1.8)
        below, above = same[:, i] - 2 * error[:, i], same[:, i] + 2 * error[:, i]
        panel.fill_between(family.step, below, above, color=colour, alpha=0.22, linewidth=0)
        panel.plot(family.step, chance[:, i], color=colour, linewidth=0.6, linestyle=(0, (4, 2)))
    values = np.concatenate([same.ravel(), chance.ravel()])
    values = values[np.isfinite(values)]
    if values.size:
        ends = [min(float(values.min()), 1.0), max(float(values.max()), 1.0)]
        room = 0.06 * max(ends[1] - ends[0], 0.02)
        panel.set_ylim(ends[0] - room, ends[1] + room)
    panel.set_xlabel("step")
    space_steps(panel, family.step)


def _mark_levels(panel: Any, table: PairTable, family: Family, colours: list[Any]) -> None:
    """A ring where each curve has reached the asked similarity, and stays."""
    result = table.result
    if "converged_step" not in result or family.runs[0] not in result["curve_run"].astype(str):
        return
    run = result["curve_run"].astype(str).tolist().index(family.runs[0])
    names = result["curve_layer"].astype(str).tolist()
    level, size = float(table.options.get("level", 0.9)), 4.5 if len(colours) <= MOST_NAMED else 3.0
    for i, layer in enumerate(table.layers):
        step = float(result["converged_step"][run, names.index(layer)]) if layer in names else math.nan
        start = table.same[family.rows[0], i]
        if math.isfinite(step):
            panel.plot(
                step, max(start, level), "o", markersize=size, markerfacecolor="white",
                markeredgecolor=colours[i], markeredgewidth=0.9, zorder=3,
            )  # fmt: skip


def _explain_curves(figure: Any, table: PairTable, colours: list[Any], *, left_out: int) -> None:
    """Names of the layers, first at the top, and what the marks mean."""
    from matplotlib.lines import Line2D

    few = len(colours) <= MOST_NAMED
    named = range(len(colours)) if few else np.unique(np.linspace(0, len(colours) - 1, 8).round().astype(int))
    handles: list[Any] = [Line2D([], [], color=colours[i], marker="o", markersize=2) for i in named]
    short_names = tell_apart(table.layers, 16)
    labels = [short_names[i] for i in named]
    if "converged_step" in table.result and np.isfinite(table.result["converged_step"]).any():
        level = float(table.options.get("level", 0.9))
        handles.append(Line2D([], [], color=GREY, linestyle="", marker="o", markersize=4.5, fillstyle="none"))
        labels.append(f"reaches {level:g}")
    if np.isfinite(table.of_layers(f"{table.value}_chance")).any():
        handles.append(Line2D([], [], color=GREY, linewidth=0.6, linestyle=(0, (4, 2))))
        labels.append("chance")
    if np.isfinite(table.of_layers(f"{table.value}_stderr")).any():
        handles.append(Line2D([], [], color=GREY, linewidth=5, alpha=0.3))
        labels.append("± 2 s.e.")
    if left_out:
        handles.append(Line2D([], [], linestyle=""))
        labels.append(f"{left_out} more not shown")
    title = "layer" if few else f"8 of {len(colours)} layers"
    where = "center right" if figure.get_layout_engine() is None else "outside right center"
    figure.legend(handles, labels, loc=where, title=title, title_fontsize=6)


def _colours(count: int) -> list[Any]:
    """From the first layer, dark, to the last; without the yellow that vanishes on white paper."""
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0.0, 0.9, count)]


# ---- matrices of checkpoints


def draw_matrix(table: PairTable, figure: Any, label: str) -> None:
    """Checkpoints (or runs) by checkpoints: the mean over common layers, and the last of these layers.

    Args:
        table: The pairs.
        figure: An empty matplotlib figure.
        label: What the similarity is called.
    """
    rows, nodes = _nodes(table)
    same = table.same[rows]
    last = int(np.flatnonzero(np.isfinite(same).any(0))[-1]) if np.isfinite(same).any() else 0
    counts = np.isfinite(same).sum(1)
    mean = np.where(counts > 0, np.nansum(same, 1) / np.maximum(counts, 1), np.nan)
    kinds = [("mean over layers", mean)] if same.shape[1] > 1 else []
    kinds.append((tell_apart(table.layers, 24)[last], same[:, last]))
    matrices = [_matrix(table, rows, nodes, values) for _, values in kinds]
    scale = _scale(np.stack(matrices))
    figure.set_size_inches(WIDTH if len(kinds) > 1 else COLUMN + 0.35, 3.5 if len(kinds) > 1 else 3.3)
    panels = np.array([figure.add_subplot(1, len(kinds), i + 1) for i in range(len(kinds))])
    names, axis_name = _node_names(nodes)
    for panel, (title, _), matrix in zip(panels, kinds, matrices, strict=True):
        image = panel.imshow(matrix, **scale)
        panel.set_title(title, loc="left")
        label_axis(panel.xaxis, names)
        label_axis(panel.yaxis, names)
        panel.tick_params(axis="x", rotation=90)
        panel.tick_params(labelsize=max(4.0, min(6.0, 130 / len(names))), length=1.5)
        panel.set_xlabel(axis_name)
    panels[0].set_ylabel(axis_name)
    _colour_bar(figure, image, panels, label)
    if any(np.isnan(matrix).any() for matrix in matrices):
        from matplotlib.patches import Patch

        note(figure, [Patch(facecolor=PALE)], ["not measured, or not defined"])


def _nodes(table: PairTable) -> tuple[NDArray[np.intp], list[Checkpoint]]:
    """The pairs to draw and their checkpoints; of several runs at the same steps, only the last step."""
    rows = np.arange(len(table))
    apart = table.run_a != table.run_b
    if apart.any() and (table.step_a[apart] == table.step_b[apart]).all():
        last = table.step_a[apart].max()
        rows = np.flatnonzero((table.step_a == last) & (table.step_b == last))
    found = dict.fromkeys(end for i in rows for end in table.ends[i])
    runs = list(dict.fromkeys(run for run, _, _ in found))
    in_order = table.runs_in_order()
    order = {run: (1, 2) if run in in_order else (2, 1) for run in runs}  # by step, else by file
    return rows, sorted(found, key=lambda node: (runs.index(node[0]), *(node[i] for i in order[node[0]])))


def _matrix(table: PairTable, rows: NDArray[np.intp], nodes: list[Checkpoint], values: Floats) -> Floats:
    at = {node: i for i, node in enumerate(nodes)}
    matrix = np.full((len(nodes), len(nodes)), np.nan)
    for i, value in zip(rows, values, strict=True):
        a, b = (at[node] for node in table.ends[i])
        matrix[a, b] = matrix[b, a] = value
    return matrix


def _node_names(nodes: list[Checkpoint]) -> tuple[list[str], str]:
    runs, steps = {run for run, _, _ in nodes}, {step for _, step, _ in nodes}
    if len({node[:2] for node in nodes}) < len(nodes):
        files = [file.replace("\\", "/").rsplit("/", 1)[-1] for _, _, file in nodes]
        unique = len(set(files)) == len(files)
        return (files, "file") if unique else ([file for _, _, file in nodes], "file")
    if len(runs) == 1:
        run = next(iter(runs))
        return [f"{step:g}" for _, step, _ in nodes], f"step of {short(run)}" if run else "step"
    if len(steps) == 1:
        step = next(iter(steps))
        return [run for run, _, _ in nodes], f"run, at step {step:g}" if math.isfinite(step) else "network"
    return [at_step(run, step) for run, step, _ in nodes], "run and step"
