"""Claims about figures: what is drawn, what is said below, and that the same numbers give the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_samples import LANDSCAPE, bowl, cut, declared, landscape, series
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.analyzers.core.contract import Bands, Contours, Heatmap, Lines
from dynprobe.analyzers.core.result import Array, Result, Var
from dynprobe.cli.figure import check_figure, draw, figure_of
from dynprobe.cli.figure_panels import choose
from dynprobe.cli.style import DOUBLE, SINGLE, nice_levels, number
from dynprobe.io.errors import CannotWrite, InputError

THIRTEEN = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, 700, 900, 1000)


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in figure.findobj(Text)).replace("\\$", "$")


def panels(figure: Any) -> list[Any]:
    return [a for a in figure.axes if a.get_label() != "<colorbar>"]


def titles(figure: Any) -> list[str]:
    return [a.get_title(loc="left") for a in panels(figure)]


def legend(figure: Any) -> list[str]:
    return [t.get_text() for box in figure.legends for t in box.get_texts()]


def footnote(figure: Any) -> str:
    return " ".join(figure.texts[-1].get_text().split())


def contour_levels(axes: Any) -> list[float]:
    from matplotlib.contour import QuadContourSet

    return sorted({float(v) for c in axes.collections if isinstance(c, QuadContourSet) for v in c.levels})


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "html"])
def test_same_result_gives_same_bytes_whatever_the_users_matplotlib_settings(
    tmp_path: Path, suffix: str
) -> None:
    import matplotlib

    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    draw(landscape((0, 1000)), LANDSCAPE, first)
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "axes.grid": True}):
        draw(landscape((0, 1000)), LANDSCAPE, second)
        assert matplotlib.rcParams["font.size"] == 20
    assert first.read_bytes() == second.read_bytes()


def test_pdf_embeds_truetype_fonts_and_no_date(tmp_path: Path) -> None:
    draw(landscape(), LANDSCAPE, tmp_path / "a.pdf")
    content = (tmp_path / "a.pdf").read_bytes()
    assert b"CIDFontType2" in content or b"/TrueType" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content


def test_png_has_300_dots_an_inch(tmp_path: Path) -> None:
    draw(landscape(), LANDSCAPE, tmp_path / "a.png")
    width = int.from_bytes((tmp_path / "a.png").read_bytes()[16:20], "big")
    assert width == int(SINGLE * 300)


@pytest.mark.parametrize(("steps", "width"), [((1000,), SINGLE), ((0, 1000), DOUBLE), (THIRTEEN, DOUBLE)])
def test_figures_are_one_or_two_columns_wide(steps: tuple[int, ...], width: float) -> None:
    assert figure_of(landscape(steps), LANDSCAPE).get_size_inches()[0] == width


def test_modules_import_neither_torch_nor_matplotlib_and_drawing_not_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys; import dynprobe.cli.figure as f, dynprobe.cli.paraview;"
        "assert not {'torch', 'matplotlib'} & set(sys.modules);"
        "from pathlib import Path; from figure_samples import *;"
        f"f.draw(landscape(), LANDSCAPE, Path({str(tmp_path / 'a.png')!r}));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_unknown_suffix_names_the_choices() -> None:
    with pytest.raises(InputError, match=r"\.png, \.pdf, \.svg, \.html"):
        draw(landscape(), LANDSCAPE, Path("out.gif"))


def test_unknown_style_names_styles_and_variables() -> None:
    with pytest.raises(InputError, match="'filed'") as caught:
        figure_of(landscape(), LANDSCAPE, style="filed")
    assert "contour, filled, surface" in caught.value.tip
    assert "accuracy" in caught.value.tip


def test_wrong_output_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    declaration = declared(Contours("loss", "x", "y"), {"loss": Var(("y", "x")), "accuracy": Var(("y", "x"))})
    check_figure(tmp_path / "a.png", declaration, "filled")
    check_figure(tmp_path / "a.png", declaration, "accuracy")
    with pytest.raises(InputError, match="not a style"):
        check_figure(tmp_path / "a.png", declaration, "acuracy")
    with pytest.raises(InputError, match="a figure is written as"):
        check_figure(tmp_path / "a.jpeg", declaration)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite):
        check_figure(tmp_path / "file" / "a.png", declaration)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_style_that_names_a_variable_draws_that_variable() -> None:
    figure = figure_of(landscape(), LANDSCAPE, style="accuracy")
    assert "Accuracy" in [a.get_ylabel() for a in figure.axes]
    assert figure_of(series(), declared(Lines("trace")), style="count").axes[0].get_ylabel() == "A count"


def test_all_pieces_failed_is_an_error_with_the_reason_and_no_file(tmp_path: Path) -> None:
    result = landscape((0, 1000), failed=(0, 1000))
    with pytest.raises(InputError, match="all 2 pieces failed") as caught:
        draw(result, LANDSCAPE, tmp_path / "a.png")
    assert "cnn/step_0.pt: NaN in 'conv1.weight'" in caught.value.tip
    assert list(tmp_path.iterdir()) == []


def test_no_finite_value_anywhere_is_an_error() -> None:
    with pytest.raises(InputError, match="no finite value"):
        figure_of(landscape(height=lambda x, y, step: np.full_like(x, np.nan)), LANDSCAPE)


def test_a_variable_the_result_lacks_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(InputError, match="no variable 'missing'") as caught:
        figure_of(landscape(), declared(Contours("missing", "x", "y")))
    assert "loss_stderr" in caught.value.tip


def test_nine_of_thirteen_checkpoints_are_shown_and_the_figure_says_so() -> None:
    figure = figure_of(landscape(THIRTEEN), LANDSCAPE)
    assert len(titles(figure)) == 9
    assert titles(figure)[0] == "step 0"
    assert titles(figure)[-1] == "step 1000"
    assert "9 of 13 checkpoints shown" in footnote(figure)


def test_a_failed_piece_is_left_out_and_named() -> None:
    figure = figure_of(landscape((0, 10, 1000), failed=(10,)), LANDSCAPE)
    assert titles(figure) == ["step 0", "step 1000"]
    assert "failed: step 10" in footnote(figure)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True), st.integers(2, 9))
def test_the_choice_among_steps_keeps_first_and_last(steps: list[int], count: int) -> None:
    chosen = choose(sorted(steps), count)
    assert len(chosen) == min(count, len(steps))
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] == len(steps) - 1


def test_the_choice_among_steps_is_logarithmic() -> None:
    assert choose(range(1001), 4) == [0, 9, 99, 1000]


def test_several_runs_share_the_panels_and_are_named() -> None:
    figure = figure_of(landscape(THIRTEEN, runs=("a", "b")), LANDSCAPE)
    assert titles(figure)[0] == "a, step 0"
    assert titles(figure)[-1] == "b, step 1000"
    assert sum(t.startswith("a,") for t in titles(figure)) == 4


def test_the_small_print_says_run_steps_samples_and_what_a_slice_does_not_show() -> None:
    text = footnote(figure_of(landscape((0, 1000)), LANDSCAPE))
    for part in ("run cnn", "steps 0 to 1000", "512 samples", "A slice: a non-convex picture shows"):
        assert part in text


def test_panels_share_levels_and_the_levels_are_round_and_log_spaced() -> None:
    first, second = panels(figure_of(landscape((300, 1000)), LANDSCAPE))
    shared = set(contour_levels(first)) & set(contour_levels(second))
    assert {1.0, 2.0, 3.0, 5.0} <= shared
    assert {0.1, 0.2} <= set(contour_levels(second))


def test_contour_lines_are_labelled_with_their_values() -> None:
    figure = figure_of(landscape(), LANDSCAPE)
    assert {"1", "0.5"} <= set(texts(figure).split("\n"))


@given(st.floats(1e-8, 1e8), st.floats(1.01, 1e12))
def test_levels_lie_inside_the_range_and_are_few(low: float, ratio: float) -> None:
    levels = nice_levels(low, low * ratio)
    assert np.all((levels > low) & (levels < low * ratio))
    assert np.all(np.diff(levels) > 0)
    assert len(levels) <= 16
    assert ratio < 10 or len(levels) >= 2


def test_a_plane_that_varies_along_x_only_has_vertical_contours_on_a_non_square_grid() -> None:
    result = landscape(shape=(7, 21), height=lambda x, y, step: 1.5 + x)
    axes = panels(figure_of(result, LANDSCAPE))[0]
    lines = axes.collections[0]
    for level, segments in zip(lines.levels, lines.allsegs, strict=True):
        for points in segments:
            np.testing.assert_allclose(points[:, 0], level - 1.5, atol=1e-12)


def test_a_flat_panel_gets_levels_of_its_own() -> None:
    def height(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
        return bowl(x, y, step) if step else 2.31 + 0.02 * x

    figure = figure_of(landscape((0, 1000), height=height), LANDSCAPE)
    assert any(2.29 < level < 2.33 for level in contour_levels(panels(figure)[0]))
    assert "levels of one panel" in legend(figure)


@pytest.mark.parametrize("style", ["contour", "filled", "surface"])
def test_a_constant_plane_draws(style: str) -> None:
    figure = figure_of(landscape(height=lambda x, y, step: np.ones_like(x)), LANDSCAPE, style=style)
    figure.draw_without_rendering()


@pytest.mark.parametrize("style", ["contour", "filled"])
def test_nan_and_infinity_are_marked_and_explained(style: str) -> None:
    def height(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
        z = bowl(x, y, step)
        z[:4, :4], z[-4:, -4:] = np.nan, np.inf
        return z

    figure = figure_of(landscape(height=height), LANDSCAPE, style=style)
    assert {"NaN", "infinite"} <= set(legend(figure))


def test_holes_in_a_surface_are_explained() -> None:
    def height(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
        return np.where(x + y > 1.2, np.inf, bowl(x, y, step))

    assert "holes: not finite" in footnote(figure_of(landscape(height=height), LANDSCAPE, style="surface"))


def test_the_checkpoint_is_a_cross_at_the_centre() -> None:
    figure = figure_of(landscape(), LANDSCAPE)
    crosses = [line for line in panels(figure)[0].lines if line.get_marker() == "x"]
    assert crosses
    assert all(line.get_xydata().tolist() == [[0, 0]] for line in crosses)
    assert "θ*" in legend(figure)


def test_chance_is_ln_c_for_a_cross_entropy_and_absent_for_another_loss() -> None:
    figure = figure_of(landscape(), LANDSCAPE)
    assert "chance, ln 10 = 2.303" in legend(figure)
    assert any(abs(v - np.log(10)) < 1e-12 for v in contour_levels(panels(figure)[0]))
    other = landscape(attributes={"n_classes": 10, "measured_on": {"loss": "mse"}})
    assert not any("chance" in t for t in legend(figure_of(other, LANDSCAPE)))
    per_run = [{"loss": "mse"}, {"loss": "cross_entropy"}]
    mixed = landscape(attributes={"n_classes": 10, "measured_on": {"of each run": per_run}})
    assert not any("chance" in t for t in legend(figure_of(mixed, LANDSCAPE)))


@pytest.mark.parametrize(("steps", "expected"), [((1000,), (1, 2)), ((0, 1000), (2, 2))])
def test_train_and_test_are_drawn_beside_each_other(
    steps: tuple[int, ...], expected: tuple[int, int]
) -> None:
    figure = figure_of(landscape(steps, test=True), LANDSCAPE)
    rows, columns = panels(figure)[0].get_gridspec().get_geometry()
    assert (rows, columns) == expected
    assert [t.split(",")[0] for t in titles(figure)] == ["Loss"] * len(steps) + ["Test loss"] * len(steps)


def test_a_plane_that_explodes_is_clipped_and_says_so() -> None:
    def height(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
        return np.where(x > 0.85, 1e30, bowl(x, y, step))

    figure = figure_of(landscape(height=height), LANDSCAPE)
    assert "clipped, values reach 0.02 to 10³⁰" in footnote(figure)
    assert sum(0.05 < v < 10 for v in contour_levels(panels(figure)[0])) >= 5


def test_a_loss_below_zero_is_drawn_on_a_linear_scale() -> None:
    figure = figure_of(landscape(height=lambda x, y, step: x - 0.5), LANDSCAPE)
    assert any(level < 0 for level in contour_levels(panels(figure)[0]))


def test_filled_and_surface_have_a_colour_bar_with_the_units() -> None:
    for style in ("filled", "surface"):
        figure = figure_of(landscape((0, 1000)), LANDSCAPE, style=style)
        bars = [a for a in figure.axes if a.get_label() == "<colorbar>"]
        assert [b.get_ylabel() for b in bars] == ["Loss (nat)"]


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


def test_an_analyzers_own_drawing_is_called_with_or_without_the_style() -> None:
    seen: list[Any] = []

    def plain(result: Result, figure: Any) -> None:
        seen.append(result.analyzer)
        figure.add_subplot()

    def styled(result: Result, figure: Any, style: str) -> None:
        seen.append(style)

    figure = figure_of(series(), declared(plain))
    figure_of(series(), declared(styled), style="mine")
    assert seen == ["hessian", "mine"]
    assert "run cnn" in footnote(figure)
    with pytest.raises(InputError, match="'mine'"):
        figure_of(series(), declared(plain), style="mine")


def test_a_report_of_an_unknown_analyzer_still_draws() -> None:
    assert len(panels(figure_of(landscape((0, 1000)), None))) == 2
    assert figure_of(series(), None).axes[0].get_ylabel() == "Trace (loss)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02, "0.02"),
        (1500, "1500"),
        (2e5, "2×10⁵"),
        (-1e-6, "−10⁻⁶"),
        (0, "0"),
        (np.inf, "∞"),
        (np.nan, "NaN"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
