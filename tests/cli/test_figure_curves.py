"""Claims about figures of curves over steps and directions, and about heat maps."""

from __future__ import annotations

import numpy as np
import pytest
from figure_samples import (
    LANDSCAPE,
    THIRTEEN,
    bowl,
    cut,
    declared,
    footnote,
    legend,
    panels,
    series,
    texts,
    titles,
)

from dynprobe.analyzers.core.contract import Bands, Heatmap, Lines
from dynprobe.analyzers.core.result import Array
from dynprobe.cli.figure import figure_of
from dynprobe.io.errors import InputError


def test_a_cut_has_a_log_panel_for_the_loss_and_a_linear_one_for_the_accuracy() -> None:
    loss, accuracy = panels(figure_of(cut((0, 1000)), LANDSCAPE))
    assert (loss.get_ylabel(), loss.get_yscale()) == ("Loss (nat)", "log")
    assert (accuracy.get_ylabel(), accuracy.get_yscale()) == ("Accuracy", "linear")


def test_the_band_of_a_cut_is_the_declared_error() -> None:
    result = cut()
    axes = panels(figure_of(result, LANDSCAPE))[0]
    band = axes.collections[0].get_paths()[0].vertices
    at_centre = band[np.abs(band[:, 0]) < 1e-12][:, 1]
    loss = result["loss"][0, 10]
    np.testing.assert_allclose([at_centre.min(), at_centre.max()], [0.95 * loss, 1.05 * loss])


def test_the_spread_between_directions_takes_the_place_of_the_sampling_error() -> None:
    spread = Array(("x",), np.full(21, 0.01), "nat", "Standard deviation between planes")
    figure = figure_of(cut(extra={"loss_spread": spread}), LANDSCAPE)
    assert "band of loss: ± standard deviation between planes" in footnote(figure)
    band = panels(figure)[0].collections[0].get_paths()[0].vertices
    at_centre = band[np.abs(band[:, 0]) < 1e-12][:, 1]
    np.testing.assert_allclose(np.ptp(at_centre), 0.02)


def test_a_seed_dimension_is_drawn_as_mean_and_range() -> None:
    losses = np.stack([np.full(21, 1.0), np.full(21, 3.0)])
    result = cut(extra={"each": Array(("seed", "x"), losses)})
    axes = panels(figure_of(result, declared(Lines("each", x="x"))))[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 2.0)
    assert {*axes.collections[0].get_paths()[0].vertices[:, 1]} == {1.0, 3.0}


def test_few_checkpoints_have_a_legend_and_many_a_colour_bar_with_their_steps() -> None:
    assert legend(figure_of(cut((0, 10, 1000)), LANDSCAPE))[:3] == ["step 0", "step 10", "step 1000"]
    many = figure_of(cut(THIRTEEN), LANDSCAPE)
    bar = next(a for a in many.axes if a.get_label() == "<colorbar>")
    labels = [t.get_text() for t in bar.get_yticklabels()]
    assert bar.get_ylabel() == "step"
    assert labels[0] == "0"
    assert labels[-1] == "1000"


def test_points_of_a_cut_that_are_not_finite_are_marked() -> None:
    def height(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
        z = bowl(x, y, step)
        z[0], z[-2:] = np.nan, np.inf
        return z

    figure = figure_of(cut(height=height), LANDSCAPE)
    assert {"NaN", "infinite"} <= set(legend(figure))
    marks = {
        m.get_marker(): m.get_xdata().tolist() for m in panels(figure)[0].lines if m.get_marker() in "x^"
    }
    assert marks["x"] == [-1.0]
    np.testing.assert_allclose(marks["^"], [0.9, 1.0])


def test_the_path_to_a_checkpoint_names_both_ends() -> None:
    attributes = {"options": {"directions": "to:last"}}
    figure = figure_of(cut(attributes=attributes, x=np.linspace(-0.5, 1.5, 21)), LANDSCAPE)
    marks = {t.get_text(): t.xy[0] for t in panels(figure)[0].texts}
    assert marks == {"θ*": 0.0, "last": 1.0}


def test_lines_run_over_the_step_with_a_gap_and_a_mark_where_a_piece_failed() -> None:
    figure = figure_of(series(failed=(200,)), declared(Lines("trace")))
    axes = figure.axes[0]
    curve, mark = axes.lines
    assert np.isnan(curve.get_ydata()).tolist() == [False, False, True, False, False]
    assert mark.get_xdata().tolist() == [200]
    assert "failed: step 200" in footnote(figure)
    assert "standard error of the trace" in footnote(figure)
    assert axes.get_xlabel() == "step"


def test_lines_are_sorted_by_step() -> None:
    axes = figure_of(series((300, 0, 100)), declared(Lines("trace"))).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0, 100, 300]


def test_each_entry_of_a_further_dimension_is_a_curve() -> None:
    figure = figure_of(series(), declared(Lines("eigenvalue")))
    assert legend(figure) == ["rank 0", "rank 1", "rank 2"]
    many = figure_of(series(ranks=12), declared(Lines("eigenvalue")))
    assert next(a for a in many.axes if a.get_label() == "<colorbar>").get_ylabel() == "rank"


def test_variables_in_the_same_units_share_their_axes_and_others_do_not() -> None:
    together = figure_of(series(), declared(Lines(("trace", "half"))))
    assert legend(together) == ["Trace", "Half of it"]
    assert len(together.axes) == 1
    assert len(figure_of(series(), declared(Lines(("trace", "count")))).axes) == 2


def test_runs_are_told_apart_and_their_names_are_printed_literally() -> None:
    figure = figure_of(series(runs=("small", "big_$x_1$")), declared(Lines("trace")))
    figure.draw_without_rendering()
    assert "big_$x_1$" in texts(figure)
    assert len([line for line in figure.axes[0].lines if len(line.get_xdata()) == 5]) == 2


def test_steps_saved_at_growing_intervals_get_a_logarithmic_axis() -> None:
    assert figure_of(series(THIRTEEN), declared(Lines("trace"))).axes[0].get_xscale() == "symlog"
    assert figure_of(series(), declared(Lines("trace"))).axes[0].get_xscale() == "linear"
    assert figure_of(series((1, 10, 100)), declared(Lines("trace", log_x=True))).axes[0].get_xscale() == "log"


def test_bands_lie_between_their_declared_edges() -> None:
    figure = figure_of(series(), declared(Bands("trace", "half", "trace")))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [50 / (1 + 4 / 3) / 2, 50])


def test_a_signed_heat_map_is_centred_at_zero_and_labelled_with_names() -> None:
    figure = figure_of(series((0, 100)), declared(Heatmap("alignment", x="rank", y="layer")))
    mesh = panels(figure)[0].collections[0]
    assert mesh.norm.vmin == -mesh.norm.vmax == -2.0
    assert [t.get_text() for t in panels(figure)[0].get_yticklabels()] == ["conv1", "fc"]
    assert titles(figure) == ["step 0", "step 100"]


def test_a_heat_map_over_the_steps_is_one_panel_with_grey_where_a_piece_failed() -> None:
    figure = figure_of(series(failed=(200,)), declared(Heatmap("eigenvalue", x="step", y="rank", log_z=True)))
    assert len(panels(figure)) == 1
    assert "grey: not finite" in footnote(figure)


def test_a_cut_without_any_value_says_so() -> None:
    nothing = cut(height=lambda x, _y, _step: np.full_like(x, np.nan))
    with pytest.raises(InputError, match="loss has no value in any piece"):
        figure_of(nothing, LANDSCAPE)


def test_a_cut_whose_loss_alone_has_no_value_still_shows_the_accuracy() -> None:
    result = cut(height=lambda x, _y, _step: np.full_like(x, np.nan), extra={"accuracy": ACCURACY})
    assert [panel.get_ylabel() for panel in panels(figure_of(result, LANDSCAPE))] == [
        "Loss (nat)",
        "Accuracy",
    ]


ACCURACY = Array(("x",), np.linspace(0, 1, 21), "", "Accuracy")
