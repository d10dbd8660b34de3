"""What the figure of the similarity analyzers shows, by what was measured."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._pair_table import PairTable, against_last, families
from dynprobe.analyzers._similarity import SUMMARY_RETURNS, summary
from dynprobe.analyzers._similarity_figure import similarity_figure
from dynprobe.analyzers._similarity_names import tell_apart
from dynprobe.analyzers.core.result import Array, Result
from dynprobe.cli.figure_panels import small_print

Pair = dict[str, Any]


def pair(run_a: str, step_a: float, run_b: str, step_b: float, **more: Any) -> Pair:
    return {"run_a": run_a, "step_a": step_a, "run_b": run_b, "step_b": step_b, **more}


def result_of(
    pairs: list[Pair], n_layers: int = 3, low: float = 0.0, names_b: list[str] | None = None
) -> Result:
    names = [f"layer{i}" for i in range(n_layers)]
    other = names_b or names
    generator = np.random.default_rng(0)
    shape = (len(pairs), n_layers, len(other))
    value = low + (1 - low) * generator.random(shape)
    common = [n for n in names if n in other]
    effect = generator.normal(size=(len(pairs), len(common), 8))
    effect -= effect.mean(-1, keepdims=True)

    def strings(values: list[str]) -> np.ndarray:
        return np.array(values, dtype=object)

    full = ("pair", "layer_a", "layer_b")
    arrays = {
        "status": Array(("pair",), strings([p.get("status", "ok") for p in pairs])),
        "layer_a": Array(("layer_a",), strings(names)),
        "layer_b": Array(("layer_b",), strings(other)),
        "cka": Array(full, value),
        "cka_stderr": Array(full, np.full(shape, 0.01)),
        "cka_chance": Array(full, np.full(shape, 0.1)),
    }
    if common:
        arrays["layer"] = Array(("layer",), strings(common))
        arrays["block_effect"] = Array(("pair", "layer", "block"), 0.01 * effect)
    for name in ("run_a", "step_a", "path_a", "run_b", "step_b", "path_b", "group_a", "group_b"):
        if name in pairs[0]:
            column = [p[name] for p in pairs]
            arrays[name] = Array(
                ("pair",), strings(column) if isinstance(column[0], str) else np.array(column, dtype=float)
            )
    return Result("cka", "pair", arrays, {"options": {"bootstrap": 50, "permutations": 100}})


def summarised(result: Result) -> Result:
    arrays = dict(result.arrays)
    for name, value in summary("cka")(result).items():
        arrays[name] = Array(SUMMARY_RETURNS[name].dims, np.asarray(value))
    return Result(result.analyzer, result.grain, arrays, result.attributes)


def drawn(result: Result, style: str = "") -> Figure:
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    similarity_figure("cka", "linear CKA")(result, figure, style)
    figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> str:
    found = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    for panel in figure.axes:
        found += [panel.get_xlabel(), panel.get_ylabel(), panel.get_title(loc="left")]
        found += [t.get_text() for t in (*panel.get_xticklabels(), *panel.get_yticklabels())]
        legend = panel.get_legend()
        found += [t.get_text() for t in legend.get_texts()] if legend else []
    return "\n".join(found)


def final_pairs(run: str = "r", steps: tuple[int, ...] = (0, 1, 10, 100)) -> list[Pair]:
    return [pair(run, s, run, 1000) for s in steps]


def group_pairs(
    steps: tuple[int, ...] = (5,), groups: tuple[str, ...] = ("true", "shuffled"), size: int = 3
) -> list[Pair]:
    nets = [(f"{g}{i}", g) for g in groups for i in range(size)]
    return [
        pair(a, s, b, s, group_a=ga, group_b=gb) for s in steps for (a, ga), (b, gb) in combinations(nets, 2)
    ]


# ---- which curves pairs make


def test_pairs_against_the_last_step_make_a_curve_whichever_network_comes_first() -> None:
    rows = [*final_pairs(steps=(0, 10)), pair("r", 1000, "r", 5), pair("r", 1000, "r", 1000)]
    table = PairTable(result_of(rows), "cka")
    (family,) = against_last(table)
    assert family.step.tolist() == [0, 5, 10]
    assert family.rows.tolist() == [0, 2, 1]
    assert families(table)[1]


@pytest.mark.parametrize(
    ("pairs", "against"),
    [
        ([pair("r", 0, "r", s) for s in (1, 2, 3)], "with step 0"),
        ([pair("r", s, "r", s + 1) for s in (0, 1, 2)], "with the step before"),
        ([pair("r", s, "q", s) for s in (0, 1, 2)], "at the same step"),
        ([pair("r", s, "q", 7) for s in (0, 1, 2)], "with step 7 of q"),
        ([pair("r", 7, "q", s) for s in (0, 1, 2)], "with step 7 of r"),
    ],
)
def test_curve_says_what_each_step_is_compared_with(pairs: list[Pair], against: str) -> None:
    found, complete = families(PairTable(result_of(pairs), "cka"))
    assert [family.against for family in found] == [against]
    assert complete


def test_all_pairs_of_a_run_are_not_one_curve() -> None:
    rows = [pair("r", a, "r", b) for a, b in combinations(range(5), 2)]
    found, complete = families(PairTable(result_of(rows), "cka"))
    assert not complete
    assert [family.against for family in found] == ["with step 4"]


def test_failed_pairs_are_no_part_of_a_curve() -> None:
    rows = final_pairs()
    rows[0]["status"] = "failed"
    (family,) = against_last(PairTable(result_of(rows), "cka"))
    assert family.step.tolist() == [1, 10, 100]


# ---- what is drawn


def test_one_pair_is_a_map_whose_axes_say_run_and_step_of_each_network() -> None:
    figure = drawn(result_of([pair("seed0", 10, "seed1", 20)]))
    assert figure.axes[0].get_ylabel() == "seed0, step 10"
    assert figure.axes[0].get_xlabel() == "seed1, step 20"
    assert "linear CKA" in texts(figure)


def test_map_has_a_filled_dot_where_the_most_similar_layer_has_the_same_name_and_a_ring_elsewhere() -> None:
    result = result_of([pair("a", 0, "b", 0)], 2)
    result["cka"][0] = [[0.9, 0.1], [0.8, 0.2]]
    dots = drawn(result).axes[0].get_lines()
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(0, 0), (0, 1)]
    assert [dot.get_markerfacecolor() == "none" for dot in dots] == [False, True]


def test_map_marks_the_layer_of_the_same_name_where_another_is_as_similar_up_to_rounding() -> None:
    result = result_of([pair("a", 0, "a", 0)], 2)
    result["cka"][0] = [[1.0, 1.0 + 1e-7], [1.0 + 1e-7, 1.0]]
    dots = drawn(result).axes[0].get_lines()
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(0, 0), (1, 1)]
    assert all(dot.get_markerfacecolor() != "none" for dot in dots)


def renamed(result: Result, names: list[str]) -> Result:
    arrays = dict(result.arrays)
    for dim in ("layer_a", "layer_b", "layer"):
        arrays[dim] = Array((dim,), np.array(names, dtype=object))
    return Result(result.analyzer, result.grain, arrays, result.attributes)


def test_layers_of_a_transformer_are_told_apart_on_axes_and_in_the_legend() -> None:
    kinds = ("attention.self.query", "attention.output.dense", "mlp.output.dense")
    names = [f"encoder.block.{i}.{kind}" for i in (0, 1, 11) for kind in kinds]
    panel = drawn(renamed(result_of([pair("a", 0, "b", 0)], 9), names)).axes[0]
    labels = [t.get_text() for t in panel.get_yticklabels()]
    assert len(set(labels)) == 9
    assert max(map(len, labels)) <= 18
    assert labels[0] == "0.a.self.query"
    legend = drawn(renamed(result_of(final_pairs(), 9), names)).legends[0]
    assert len({t.get_text() for t in legend.get_texts()[:9]}) == 9


def test_short_names_keep_numbers_and_are_longer_only_where_they_would_be_equal() -> None:
    assert tell_apart(["layer1.conv", "fc"]) == ["layer1.conv", "fc"]
    assert tell_apart(["true_0.safetensors", "shuffled_12.safetensors"]) == ["true_0", "shuffled_12"]
    long = ["m.attention.projection.weight_matrix", "m.adapter.projection.weight_matrix"]
    assert tell_apart(long) == ["attention", "adapter"]
    alike = [f"{'a' * 20}{middle}{'b' * 20}" for middle in "xy"]
    assert len(set(tell_apart(alike))) == 2
    assert tell_apart(["block.10." + "w" * 30]) == ["b.10.www…" + "w" * 9]


def test_scale_is_zero_to_one_and_symmetric_where_values_are_negative() -> None:
    plain = drawn(result_of([pair("a", 0, "b", 0)])).axes[0].get_images()[0]
    signed = drawn(result_of([pair("a", 0, "b", 0)], low=-0.8)).axes[0].get_images()[0]
    assert plain.get_clim() == (0, 1)
    assert signed.get_clim()[0] == -signed.get_clim()[1]


def test_constant_layer_is_grey_with_a_word_and_a_layer_of_other_pairs_is_left_out() -> None:
    result = result_of([pair("a", 0, "b", 0)], 4)
    result["cka"][0, 1], result["cka"][0, :, 1] = np.nan, np.nan
    result["cka"][0, 3], result["cka"][0, :, 3] = np.nan, np.nan
    features = np.array([[8.0, 8, 8, np.nan]])
    extra = {f"n_features_{h}": Array(("pair", f"layer_{h}"), features) for h in "ab"}
    figure = drawn(Result("cka", "pair", {**result.arrays, **extra}, {}))
    assert figure.axes[0].get_images()[0].get_array().shape == (3, 3)
    assert "not defined" in texts(figure)


def test_many_layers_are_labelled_in_part_and_the_last_one_always() -> None:
    panel = drawn(result_of([pair("a", 0, "b", 0)], 60)).axes[0]
    labels = [t.get_text() for t in panel.get_yticklabels()]
    assert len(labels) <= 25
    assert labels[-1] == "layer59"


def test_networks_of_different_depth_and_no_common_layer_are_drawn() -> None:
    figure = drawn(result_of([pair("a", 0, "b", 0)], 3, names_b=["x", "y"]))
    assert figure.axes[0].get_images()[0].get_array().shape == (3, 2)


def test_pairs_against_the_final_checkpoint_are_curves_with_rings_and_chance() -> None:
    figure = drawn(summarised(result_of(final_pairs())))
    assert figure.axes[0].get_ylabel() == "linear CKA\nwith step 1000"
    assert "chance" in texts(figure)
    assert "± 2 s.e." in texts(figure)
    assert "layer0" in texts(figure)


def test_four_runs_have_a_panel_each_and_more_are_counted() -> None:
    rows = [p for run in "abcdef" for p in final_pairs(run)]
    figure = drawn(result_of(rows, 4))
    assert [panel.get_title(loc="left") for panel in figure.axes[:4]] == ["a", "b", "c", "d"]
    assert "2 more not shown" in texts(figure)


def test_all_pairs_of_many_checkpoints_are_a_matrix_with_grey_where_nothing_was_measured() -> None:
    rows = [pair("r", a, "r", b) for a, b in combinations(range(6), 2)]
    figure = drawn(summarised(result_of(rows)))
    matrix = figure.axes[0].get_images()[0].get_array()
    assert matrix.shape == (6, 6)
    assert np.ma.getmaskarray(matrix).diagonal().all()
    assert figure.axes[0].get_xlabel() == "step of r"
    assert [panel.get_title(loc="left") for panel in figure.axes[:2]] == ["mean over layers", "layer2"]
    assert "not measured" in texts(figure)


def test_networks_side_by_side_in_one_folder_are_a_matrix_of_files() -> None:
    files = [f"flat/{kind}_{i}.safetensors" for kind in ("true", "shuffled") for i in range(4)]
    steps = {file: float(file[-13]) for file in files}
    rows = [pair("flat", steps[a], "flat", steps[b], path_a=a, path_b=b) for a, b in combinations(files, 2)]
    figure = drawn(summarised(result_of(rows)))
    matrix = figure.axes[0].get_images()[0].get_array()
    assert matrix.shape == (8, 8)
    assert (~np.ma.getmaskarray(matrix)).sum() == 2 * 28
    assert figure.axes[0].get_xlabel() == "file"
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels == [f"{kind}_{i}" for kind in ("shuffled", "true") for i in range(4)]


def test_many_runs_at_the_same_steps_are_a_matrix_of_runs_at_the_last_step() -> None:
    rows = [pair(a, s, b, s) for s in (1, 2, 3) for a, b in combinations("abcdef", 2)]
    figure = drawn(result_of(rows))
    assert figure.axes[0].get_images()[0].get_array().shape == (6, 6)
    assert figure.axes[0].get_xlabel() == "run, at step 3"


def test_groups_are_curves_over_depth_and_beside_them_over_steps() -> None:
    one, several = (
        drawn(summarised(result_of(group_pairs()))),
        drawn(summarised(result_of(group_pairs((1, 2))))),
    )
    assert len(one.axes) == 1
    assert len(several.axes) == 2
    assert several.axes[0].get_title(loc="left") == "step 2"
    assert several.axes[1].get_title(loc="left") == "layer2"
    for name in ("within true", "within shuffled", "between true | shuffled"):
        assert name in texts(one)


def curves(panel: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for line in panel.get_lines():
        found.setdefault(line.get_label(), []).append(line)
    return found


def test_curves_between_three_groups_have_colours_of_their_own_and_bands_are_explained() -> None:
    figure = drawn(summarised(result_of(group_pairs(groups=("a", "b", "c")))))
    lines = curves(figure.axes[0])
    assert len(lines) == 6
    assert len({line.get_color() for (line,) in lines.values()}) == 6
    assert all((line.get_linestyle() == "--") == ("between" in name) for name, (line,) in lines.items())
    assert "95 % over networks\nand samples" in texts(figure)


def test_different_networks_at_two_steps_are_not_joined_by_a_line() -> None:
    rows = [*group_pairs((1, 2), size=4), *group_pairs((3,), size=3)]
    figure = drawn(summarised(result_of(rows)))
    within = curves(figure.axes[1])["within true"]
    assert [line.get_xdata().tolist() for line in within] == [[1, 2], [3]]


def test_groups_are_shown_by_depth_at_the_last_step_that_has_them() -> None:
    rows = [*group_pairs((1, 2)), *group_pairs((3,), groups=("true",))]
    figure = drawn(summarised(result_of(rows)))
    assert figure.axes[0].get_title(loc="left") == "step 2"
    assert "within shuffled" in texts(figure)


def test_few_steps_are_the_ticks_unless_their_labels_would_touch() -> None:
    figure = drawn(result_of(final_pairs(steps=(0, 200, 3000))))
    assert figure.axes[0].get_xticks().tolist() == [0, 200, 3000]
    figure = drawn(result_of(final_pairs(steps=(0, 1, 100, 900))))
    assert figure.axes[0].get_xticks().tolist() == [0, 1, 100, 900]
    figure = drawn(result_of(final_pairs(steps=(0, 100, 101))))
    assert figure.axes[0].get_xticks().tolist() == [0, 101]


def test_legend_of_curves_leaves_no_empty_strip_beside_it() -> None:
    figure = drawn(result_of(final_pairs()))
    legend = figure.legends[0].get_window_extent()
    panel = figure.axes[0].get_window_extent()
    assert legend.x1 > 0.97 * figure.bbox.width
    assert 0 < legend.x0 - panel.x1 < 0.05 * figure.bbox.width


def test_footer_of_pairs_gives_the_steps_of_both_networks() -> None:
    result = result_of([pair("r", s, "r", 1000) for s in (0, 10)])
    assert "steps 0 to 1000" in small_print(result, None, [])


def test_heatmap_style_shows_six_pairs_and_says_that_there_are_more() -> None:
    figure = drawn(summarised(result_of(group_pairs((1, 2, 3)), 2)), "heatmap")
    assert len([panel for panel in figure.axes if panel.get_images()]) == 6
    assert "39 more pairs not shown" in texts(figure)


def test_other_styles_are_obeyed_where_the_pairs_allow_them() -> None:
    result = summarised(result_of(group_pairs((1, 2, 3)), 2))
    assert drawn(result, "matrix").axes[0].get_images()
    assert "at the same step" in drawn(result, "curves").axes[0].get_ylabel()


@pytest.mark.parametrize("style", ["curves", "matrix", "groups"])
def test_style_that_the_pairs_do_not_allow_is_refused_with_those_that_they_do(style: str) -> None:
    with pytest.raises(OptionError) as caught:
        drawn(result_of([pair("a", 0, "b", 0)]), style)
    assert caught.value.tip == "This result can be drawn as heatmap."


def test_unknown_style_and_a_result_without_a_good_pair_are_refused() -> None:
    with pytest.raises(OptionError, match="not a style"):
        drawn(result_of([pair("a", 0, "b", 0)]), "pie")
    with pytest.raises(OptionError, match="No pair"):
        drawn(result_of([pair("a", 0, "b", 0, status="failed")]))


def test_names_that_matplotlib_reads_as_something_else_are_drawn_as_they_are() -> None:
    rows = [pair("_run$x", s, "_run$x", 9) for s in (0, 1, 2)]
    assert r"run\$x" in texts(drawn(result_of(rows)))
    drawn(result_of(rows), "heatmap")


def test_pairs_of_saved_activations_without_steps_are_drawn() -> None:
    figure = drawn(result_of([pair("a.npy", float("nan"), "b.npy", float("nan"))]))
    assert figure.axes[0].get_xlabel() == "b.npy"
    rows = [pair(a, float("nan"), b, float("nan")) for a, b in combinations("abcde", 2)]
    assert drawn(result_of(rows)).axes[0].get_images()[0].get_array().shape == (5, 5)


def test_undefined_values_everywhere_are_drawn_as_undefined() -> None:
    result = result_of(final_pairs())
    result["cka"][:] = np.nan
    for style in ("heatmap", "curves", "matrix"):
        drawn(result, style)
