"""Claims about figures: what is drawn, what is said below, and that the same numbers give the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_samples import (
    LANDSCAPE,
    THIRTEEN,
    bowl,
    contour_levels,
    declared,
    footnote,
    landscape,
    legend,
    panels,
    series,
    texts,
    titles,
)
from hypothesis import given
from hypothesis import strategies as st

from dynprobe.analyzers.core.contract import Contours, Lines
from dynprobe.analyzers.core.result import Result, Var
from dynprobe.cli.figure import check_figure, draw, figure_of
from dynprobe.cli.figure_panels import choose
from dynprobe.cli.style import DOUBLE, SINGLE, nice_levels, number
from dynprobe.io.errors import CannotWrite, InputError


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
    per_run = {"a": {"loss": "mse"}, "b": {"loss": "cross_entropy"}}
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


@pytest.mark.parametrize("edge", [0.85, 0.25, -0.15])
def test_a_plane_that_explodes_is_clipped_and_says_so(edge: float) -> None:
    def height(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
        return np.where(x > edge, 1e30, bowl(x, y, step))

    figure = figure_of(landscape(height=height), LANDSCAPE)
    assert "levels clipped, values reach 0." in footnote(figure)
    assert "to 10³⁰" in footnote(figure)
    assert sum(0.05 < v < 10 for v in contour_levels(panels(figure)[0])) >= 5


def test_a_loss_below_zero_is_drawn_on_a_linear_scale() -> None:
    figure = figure_of(landscape(height=lambda x, y, step: x - 0.5), LANDSCAPE)
    assert any(level < 0 for level in contour_levels(panels(figure)[0]))


def test_filled_and_surface_have_a_colour_bar_with_the_units() -> None:
    for style in ("filled", "surface"):
        figure = figure_of(landscape((0, 1000)), LANDSCAPE, style=style)
        bars = [a for a in figure.axes if a.get_label() == "<colorbar>"]
        assert [b.get_ylabel() for b in bars] == ["Loss (nat)"]


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
