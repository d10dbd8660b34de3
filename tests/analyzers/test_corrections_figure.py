"""The figures of `dynprobe corrections`."""

from __future__ import annotations

from dataclasses import replace

import _correction_results as made
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._corrections_figure import STYLES, draw_corrections
from dynprobe.cli.style import paper

MIXED = ["optimal", "bounded", "timeout", "none_exists", "already_target", "optimal"]


def figure_of(result, style=""):
    """Drawn to the end, so that a mark that cannot be laid out is noticed."""
    with paper():
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw_corrections(result, figure, style)
        figure.canvas.draw()
    return figure


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def test_two_features_show_boundary_box_and_both_corrections():
    result = made.stacked(made.two_features())
    (panel,) = figure_of(result).axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("dti", "credit")
    assert panel.get_xlim() == (0, 63)
    assert panel.get_ylim() == (300, 850)
    boxes = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    corners = {(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in boxes}
    low, high = result["box_low"][0, 0], result["box_high"][0, 0]
    assert (*low, *(high - low)) in corners
    drawn = [tuple(np.ravel(line.get_xydata())) for line in panel.lines]
    for name in ("value", "nearest", "corrected"):
        assert tuple(result[name][0, 0]) in drawn


def test_the_box_of_stability_is_clipped_to_the_allowed_ranges():
    result = made.stacked(made.two_features())
    result["corrected"][0, 0] = [63, 840]
    (panel,) = figure_of(result).axes
    dashed = next(
        p for p in panel.patches if isinstance(p, Rectangle) and p.get_linestyle() != "-" and p.zorder == 4
    )
    assert dashed.get_bbox().x1 == pytest.approx(63)
    assert dashed.get_bbox().y1 == pytest.approx(850)
    assert dashed.get_bbox().x0 == pytest.approx(63 - made.RADIUS * 63)


def handles(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_box_of_stability_is_clipped_to_what_directions_allow_and_the_rest_is_hatched():
    result = made.stacked(made.two_features())
    result["corrected"][0, 0] = result["value"][0, 0] + [0, 200]
    figure = figure_of(made.with_facts(result, direction=[-1, 1]))
    (panel,) = figure.axes
    dashed = next(
        p for p in panel.patches if isinstance(p, Rectangle) and p.get_linestyle() != "-" and p.zorder == 4
    )
    assert dashed.get_bbox().x1 == pytest.approx(result["value"][0, 0, 0])
    assert dashed.get_bbox().x0 == pytest.approx(result["value"][0, 0, 0] - made.RADIUS * 63)
    hatched = [patch.get_bbox() for patch in panel.patches if patch.get_hatch()]
    assert (hatched[1].x0, hatched[1].x1) == (pytest.approx(result["value"][0, 0, 0]), 63)
    assert "out of reach (direction)" in handles(figure)
    assert "out of reach (direction)" not in handles(figure_of(made.stacked(made.two_features())))


def test_the_region_of_the_target_is_drawn_over_the_ranges_of_the_sample():
    result = made.stacked(made.two_features())
    ranges = {"allowed_low": [[-7.0, 300.0]], "allowed_high": [[63.0, 900.0]]}
    (panel,) = figure_of(made.with_facts(result, **ranges)).axes
    assert (panel.get_xlim(), panel.get_ylim()) == ((-7, 63), (300, 900))
    region = panel.collections[0].get_datalim(panel.transData)
    assert region.y1 > 850


def test_a_judged_point_on_the_upper_edge_does_not_touch_the_title():
    result = made.stacked(made.two_features())
    result["value"][0, 0, 1] = 850
    figure = figure_of(result)
    (panel,) = figure.axes
    title = panel._left_title.get_window_extent()
    top = panel.transData.transform(result["value"][0, 0])[1]
    assert title.y0 - top > 2 * figure.dpi / 72  # the radius of the mark in points


def test_the_nearest_point_is_drawn_where_there_is_no_stable_correction():
    for outcome, words in (("none_exists", "no stable correction"), ("timeout", "undecided")):
        result = made.stacked(made.two_features())
        result["outcome"][0, 0] = outcome
        figure = figure_of(result)
        (panel,) = figure.axes
        drawn = [tuple(np.ravel(line.get_xydata())) for line in panel.lines]
        assert tuple(result["nearest"][0, 0]) in drawn
        assert tuple(result["corrected"][0, 0]) not in drawn
        assert f"{words}; nearest point {result['distance'][0, 0]:.3g}" in " ".join(titles(figure))
        assert "nearest correction" in handles(figure)
        assert not {"stable correction", "verified box"} & set(handles(figure))


def test_a_plane_of_nearest_points_is_that_of_the_two_features_they_change():
    pieces = made.two_features()
    arrays = pieces[0].arrays
    for name, array in arrays.items():
        if "feature" in array.dims:
            extra = np.array(["age"]) if name == "feature" else np.ones((*array.values.shape[:-1], 1))
            arrays[name] = replace(array, values=np.concatenate([array.values, extra], -1))
    arrays["feature_high"].values[2] = 2
    arrays["changed"].values[:] = 0
    arrays["outcome"].values[:] = "timeout"
    arrays["nearest"].values[0, :2] = arrays["value"].values[0, :2] + 5
    (panel,) = figure_of(made.stacked(pieces)).axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("dti", "credit")


def test_a_title_says_where_nothing_stable_can_be_verified_and_tells_the_nearest_point():
    result = made.stacked(made.many_features(n_samples=1))
    result["outcome"][:] = "unsupported"
    for name in ("stable_distance", "corrected", "box_low", "box_high"):
        result[name][:] = np.nan
    text = " ".join(titles(figure_of(result))).replace("\n", " ")
    assert "nothing stable can be verified" in text
    assert f"nearest point {result['distance'][0, 0]:.3g}" in text


def test_a_title_names_no_more_than_was_searched():
    result = made.stacked(made.many_features(n_samples=2, n_features=61))
    result["outcome"][0] = result["nearest_outcome"][0] = ["none_exists", "timeout"]
    result["distance"][:] = np.nan
    text = " ".join(titles(figure_of(made.with_facts(result, max_changed=2)))).replace("\n", " ")
    assert "no correction by at most two of 61 features exists" in text
    assert "undecided: nothing by at most two of 61 features found in time" in text


def test_intervals_of_a_nearest_point_are_marks_with_numbers():
    result = made.stacked(made.many_features(n_samples=1))
    result["outcome"][:] = "timeout"
    figure = figure_of(result)
    assert "nearest correction" in handles(figure)
    assert "verified box" not in handles(figure)
    assert all("→ " in text.get_text() and "[" not in text.get_text() for text in figure.axes[0].texts)


def test_numbers_of_the_left_panel_do_not_touch_names_of_the_right_one():
    figure = figure_of(made.stacked(made.many_features(n_samples=2)))
    left, right = figure.axes
    ends = max(text.get_window_extent().x1 for text in left.texts)
    starts = min(label.get_window_extent().x0 for label in right.get_yticklabels())
    assert starts - ends > 6 * figure.dpi / 72  # points: the size of the letters


def test_an_interval_panel_shows_what_must_change_and_counts_what_may():
    result = made.stacked(made.many_features(n_samples=1, n_features=30, n_changed=2))
    still = result["changed"][0, 0] == 0
    result["box_low"][0, 0, still] -= 0.1
    result["box_high"][0, 0, still] += 0.1
    panel = figure_of(result).axes[0]
    assert len(panel.get_yticklabels()) == 2
    assert panel.get_xlabel() == "and 28 more may vary"


def test_a_judged_point_outside_the_ranges_is_still_seen():
    result = made.stacked(made.two_features())
    result["value"][0, 0] = [70, 280]
    (panel,) = figure_of(result).axes
    assert panel.get_xlim() == (0, 70)
    assert panel.get_ylim() == (280, 850)


def test_a_polygon_is_drawn_where_it_was_measured():
    (panel,) = figure_of(made.stacked(made.with_polygons(made.two_features()))).axes
    assert any(isinstance(patch, Polygon) and len(patch.get_xy()) == 9 for patch in panel.patches)


def test_boxes_of_earlier_checkpoints_are_outlined():
    one, four = (figure_of(made.stacked(made.two_features(n_checkpoints=n)), "plane").axes[0] for n in (1, 4))
    assert len(four.patches) == len(one.patches) + 3


def test_a_nearest_point_that_lies_in_no_drawn_plane_is_left_out():
    pieces = made.two_features()
    for name, array in pieces[0].arrays.items():
        if "feature" in array.dims:
            extra = np.array(["age"]) if name == "feature" else np.ones((*array.values.shape[:-1], 1))
            values = np.concatenate([array.values, extra], -1)
            pieces[0].arrays[name] = replace(array, values=values)
    pieces[0].arrays["changed"].values[0, 2] = 0
    pieces[0].arrays["feature_high"].values[2] = 2
    marks = [len(figure_of(made.stacked(pieces)).axes[0].lines)]
    pieces[0].arrays["nearest"].values[0, 2] = 0.5
    marks.append(len(figure_of(made.stacked(pieces)).axes[0].lines))
    assert marks == [3, 2]


def test_planes_without_any_target_are_left_out_where_there_are_others():
    result = made.stacked(made.two_features(n_samples=2, outcomes=["none_exists", "optimal"]))
    result["margin_map"][0, 0] = -1
    assert len(titles(figure_of(result))) == 1
    result["margin_map"][0, 1] = -1
    assert len(titles(figure_of(result))) == 2


def test_six_of_more_judgements_are_shown_those_with_a_correction_first_and_the_title_says_so():
    result = made.stacked(made.two_features(n_samples=9, outcomes=["none_exists", *["optimal"] * 8]))
    figure = figure_of(result, "plane")
    assert len(titles(figure)) == 6
    assert "sample 3:" not in " ".join(titles(figure))
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "6 of 9 judgements, at the last checkpoint"


def test_a_title_says_how_far_or_that_there_is_none():
    found = " ".join(titles(figure_of(made.stacked(made.two_features(n_samples=6, outcomes=MIXED)), "plane")))
    for text in ("(optimal)", "needed)", "undecided: nothing found in time", "no correction exists"):
        assert text in found
    assert "sample 31" not in found, "it is the target already"


def test_with_several_checkpoints_the_curves_stand_below():
    figure = figure_of(made.stacked(made.two_features(n_checkpoints=4, n_samples=6, outcomes=MIXED)))
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert "distance (bold: median)" in labels
    assert "judgements" in labels
    assert "boxes of the step before" in labels


def test_the_bold_curve_is_the_median_of_the_corrections_found():
    result = made.stacked(made.two_features(n_checkpoints=3, n_samples=3))
    result["outcome"][1] = "none_exists"
    panel = figure_of(result, "steps").axes[0]
    median = next(line for line in panel.lines if line.get_label() == "stable correction").get_ydata()
    assert median[0] == pytest.approx(np.median(result["stable_distance"][0]))
    assert np.isnan(median[1])


def test_columns_of_outcomes_add_up_to_the_judgements():
    figure = figure_of(made.stacked(made.two_features(n_checkpoints=2, n_samples=6, outcomes=MIXED)), "steps")
    panel = next(axes for axes in figure.axes if axes.get_ylabel() == "judgements")
    assert sum(bar.get_height() for bar in panel.patches) == 12


def test_many_features_show_intervals_with_their_numbers():
    result = made.stacked(made.many_features(n_samples=2))
    figure = figure_of(result)
    assert len(titles(figure)) == 2
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "mean radius",
        "mean perimeter",
        "mean area",
    ]
    assert all("→ [" in text.get_text() for text in panel.texts)


def test_an_interval_panel_counts_the_features_it_leaves_out():
    figure = figure_of(made.stacked(made.many_features(n_samples=1, n_features=30, n_changed=9)))
    assert figure.axes[0].get_xlabel() == "and 3 more features"


def test_a_change_of_an_image_is_drawn_at_its_pixels():
    result = made.stacked(made.many_features(n_samples=1, n_features=64, n_changed=9, shape=(1, 8, 8)))
    figure = figure_of(result)
    overlay = figure.axes[0].images[1].get_array()
    change = np.where(result["changed"][0, 0] == 1, result["corrected"][0, 0] - result["value"][0, 0], 0)
    assert np.array_equal(overlay.filled(0), change.reshape(8, 8))


def test_images_without_a_stable_correction_are_drawn_as_images():
    result = made.stacked(made.many_features(n_samples=2, n_features=64, n_changed=9, shape=(1, 8, 8)))
    result["outcome"][:] = "timeout"
    result["distance"][0, 1] = np.nan
    figure = figure_of(result)
    nearest, nothing = figure.axes[:2]
    assert np.count_nonzero(nearest.images[1].get_array().filled(0)) == 9
    assert np.count_nonzero(nothing.images[1].get_array().filled(0)) == 0
    assert "nearest point" in nearest.get_title(loc="left")
    assert "nothing found" in nothing.get_title(loc="left")


def test_images_without_any_correction_have_no_scale_of_changes():
    result = made.stacked(made.many_features(n_samples=1, n_features=64, n_changed=9, shape=(1, 8, 8)))
    result["outcome"][:] = "timeout"
    result["distance"][:] = np.nan
    assert len(figure_of(result).axes) == 1


def distances(result):
    figure = figure_of(result, "steps")
    panel = next(axes for axes in figure.axes if "distance" in axes.get_ylabel())
    return panel, [text.get_text() for text in panel.get_legend().get_texts()]


def test_curves_have_room_above_and_marks_where_a_step_stands_alone():
    result = made.stacked(made.two_features(n_checkpoints=5, n_samples=2))
    result["outcome"][1:4, 0] = ["none_exists", "optimal", "none_exists"]
    panel, _ = distances(result)
    assert panel.get_ylim()[1] >= 1.05 * np.nanmax(result["stable_distance"])
    assert panel.lines[0].get_markevery() == [0, 2, 4]
    assert panel.lines[1].get_marker() == "None"


def test_a_legend_of_distances_names_only_what_is_drawn():
    result = made.stacked(made.two_features(n_checkpoints=3, n_samples=2))
    assert distances(result)[1] == ["one judgement", "stable correction", "nearest point"]
    result["outcome"][:, 0] = "already_target"
    assert distances(result)[1] == ["stable correction", "nearest point"]
    result["outcome"][:, 1] = "timeout"
    panel, names = distances(result)
    assert names == ["nearest point"]
    assert panel.texts[0].get_text() == "no stable correction found"


def test_a_column_of_none_is_named_after_stable_ones_where_these_were_asked_for():
    result = made.stacked(
        made.two_features(n_checkpoints=2, n_samples=2, outcomes=["optimal", "none_exists"])
    )
    named = []
    for stability in (1, 0):
        result["stability"][:] = stability
        figure = figure_of(result, "steps")
        panel = next(axes for axes in figure.axes if axes.get_ylabel() == "judgements")
        named.append([text.get_text() for text in panel.get_legend().get_texts()])
    assert named == [["optimal", "no stable correction"], ["optimal", "none exists"]]


def test_transfer_shows_the_share_of_each_pair_of_runs():
    others = ["wine", "b"]
    runs = [made.two_features(name, n_samples=4, others=others) for name in others]
    result = made.stacked(*runs)
    result["transfer"][0, :, 1] = [1, 1, 1, 0]
    figure = figure_of(result, "transfer")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:2] == ["–", "0.75"]


def test_runs_are_named_and_counted():
    others = [f"run_{i}" for i in range(5)]
    result = made.stacked(*[made.two_features(name, n_checkpoints=2, others=others) for name in others])
    figure = figure_of(result)
    assert figure.get_suptitle() == "" or "first 3 of 5 runs" in figure.get_suptitle()
    assert any(axes.get_ylabel() == "run_0\ndistance" for axes in figure.axes)


def test_a_result_without_anything_to_correct_still_draws():
    result = made.stacked(made.two_features(n_samples=2, outcomes=["already_target"] * 2))
    for style in ("", "steps"):
        (panel,) = figure_of(result, style).axes
        assert (
            panel.texts[0].get_text() == "all 2 samples are the target already: there is nothing to correct"
        )
    result["outcome"][0, 0] = "unsupported"
    assert [axes.get_ylabel() for axes in figure_of(result).axes] == ["judgements"]


def test_names_with_signs_of_mathematics_are_taken_literally():
    pieces = made.two_features("cost_$a$")
    pieces[0].arrays["feature"].values[:] = ["price $", "$_x"]
    assert figure_of(made.stacked(pieces)).axes[0].get_xlabel() == r"price \$"


@pytest.mark.parametrize("style", STYLES)
def test_every_style_draws_or_says_what_is_missing(style):
    others = ["wine", "b"]
    result = made.stacked(*[made.two_features(name, n_checkpoints=2, others=others) for name in others])
    if style == "images":
        with pytest.raises(OptionError, match="no images to correct"):
            figure_of(result, style)
    else:
        assert figure_of(result, style).axes


def test_a_style_that_does_not_fit_the_result_is_refused():
    result = made.stacked(made.many_features())
    for style, reason in (("plane", "two features"), ("transfer", "other runs"), ("images", "images")):
        with pytest.raises(OptionError, match=reason):
            figure_of(result, style)
    with pytest.raises(OptionError, match="no judgements to correct"):
        figure_of(made.stacked(made.two_features(outcomes=["already_target"])), "intervals")
    with pytest.raises(OptionError, match="'pie' is not a style"):
        figure_of(result, "pie")
