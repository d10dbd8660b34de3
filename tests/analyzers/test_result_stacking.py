"""Pieces → result → pieces: aligned by label, missing is NaN, nothing is invented or lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprobe.analyzers.core.result import FAILED, NOT_CONVERGED, Array, Piece, Result, stack, tidy, unstack


def array(*values: Any, dims: tuple[str, ...] = ("layer",), **about: str) -> Array:
    text = bool(values) and isinstance(values[0], str)
    return Array(dims, np.array(values, dtype=object if text else None), **about)


def piece(key: str = "k", step: int | None = 0, run: str = "a", **arrays: Array) -> Piece:
    return Piece(key, {"run": run, "step": step}, arrays)


def assert_same(a: Piece, b: Piece) -> None:
    assert (a.key, a.index, a.status, a.reason) == (b.key, b.index, b.status, b.reason)
    assert (a.seconds, a.spent, a.notes) == (b.seconds, b.spent, b.notes)
    assert set(a.arrays) == set(b.arrays)
    for name in b.arrays:
        assert a.arrays[name].dims == b.arrays[name].dims
        np.testing.assert_array_equal(a.arrays[name].values, b.arrays[name].values)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)
STATUSES = st.sampled_from(["ok", NOT_CONVERGED, FAILED])


@st.composite
def equal_pieces(draw: st.DrawFn) -> list[Piece]:
    """Pieces whose coordinates agree, as those of one analyzer usually do."""
    n_layers, n_grid = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    layer = array(*[f"layer{i}" for i in range(n_layers)])
    pieces = []
    for i in range(draw(st.integers(1, 4))):
        status = draw(STATUSES)
        values = np.array(draw(st.lists(NUMBERS, min_size=n_layers * n_grid, max_size=n_layers * n_grid)))
        arrays = {
            "layer": layer,
            "loss": Array(("layer", "grid"), values.reshape(n_layers, n_grid), "nat", "loss", "loss_stderr"),
            "loss_stderr": Array(("layer", "grid"), np.zeros((n_layers, n_grid))),
            "count": Array((), np.array(float(i))),
        }
        pieces.append(
            Piece(
                f"key{i}",
                {"run": draw(st.sampled_from("ab")), "step": i, "path": f"{i}.pt"},
                arrays if status != FAILED else {},
                status,
                draw(st.text(max_size=5)),
                draw(st.floats(0, 10)),
                {"forwards": i},
                tuple(draw(st.lists(st.sampled_from(["one", "two"]), max_size=2))),
            )
        )
    return pieces


@settings(max_examples=60, deadline=None)
@given(equal_pieces(), st.sampled_from(["checkpoint", "pair"]))
def test_unstack_undoes_stack(pieces: list[Piece], grain: str) -> None:
    back = unstack(stack("a", grain, pieces, {"seed": 0}))
    for found, expected in zip(back, pieces, strict=True):
        assert_same(found, expected)


@settings(max_examples=60, deadline=None)
@given(equal_pieces())
def test_stacking_what_was_unstacked_gives_the_same_result(pieces: list[Piece]) -> None:
    once = stack("a", "checkpoint", pieces, {"seed": 0})
    twice = stack("a", "checkpoint", unstack(once), {"seed": 0})
    assert set(once.arrays) == set(twice.arrays)
    assert once.attributes == twice.attributes
    for name in once.arrays:
        np.testing.assert_array_equal(once[name], twice[name])


LABELS = st.lists(st.sampled_from(["conv1", "conv2", "fc", "head"]), min_size=1, max_size=4, unique=True)
GRID = st.lists(st.integers(-5, 5), min_size=1, max_size=4, unique=True).map(sorted)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(LABELS, GRID), min_size=1, max_size=4))
def test_every_value_stands_at_its_own_labels_and_all_else_is_nan(axes: list[tuple[Any, Any]]) -> None:
    def value(i: int, layer: str, x: float) -> float:
        return 1000 * (i + 1) + 10 * len(layer) + x

    pieces = [
        piece(
            f"k{i}",
            i,
            layer=array(*layers),
            x=array(*grid, dims=("x",)),
            v=Array(("layer", "x"), np.array([[value(i, la, x) for x in grid] for la in layers])),
        )
        for i, (layers, grid) in enumerate(axes)
    ]
    result = stack("a", "checkpoint", pieces, {})
    layers, xs = result["layer"].tolist(), result["x"].tolist()
    assert sorted(layers) == sorted(set(layers))
    assert xs == sorted(set(xs))
    for i, (own_layers, own_grid) in enumerate(axes):
        for j, layer in enumerate(layers):
            for k, x in enumerate(xs):
                found = result["v"][i, j, k]
                if layer in own_layers and x in own_grid:
                    assert found == value(i, layer, x)
                else:
                    assert np.isnan(found)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32, np.float64])
def test_a_missing_number_is_nan_and_never_zero(dtype: type) -> None:
    full = piece("a", 0, v=Array(("rank",), np.array([1, 2], dtype=dtype)))
    failed = Piece("b", {"run": "a", "step": 1}, status=FAILED, reason="truncated")
    result = stack("a", "checkpoint", [full, failed], {})
    assert result["v"][0].tolist() == [1, 2]
    assert np.isnan(result["v"][1]).all()


def test_missing_text_is_empty() -> None:
    pieces = [piece("a", 0, word=array("x", dims=("n",))), piece("b", 1)]
    assert stack("a", "checkpoint", pieces, {})["word"].tolist() == [["x"], [""]]


def test_a_dimension_without_labels_is_as_long_as_the_longest_piece_whichever_variable_has_it() -> None:
    pieces = [
        piece(
            "a",
            0,
            eigenvalue=array(1.0, 2.0, 3.0, dims=("rank",)),
            extra=array(7.0, 8.0, 9.0, dims=("rank",)),
        ),
        piece("b", 1, eigenvalue=array(1.0, 2.0, 3.0, 4.0, dims=("rank",))),
    ]
    result = stack("a", "checkpoint", pieces, {})
    np.testing.assert_array_equal(result["eigenvalue"][0], [1, 2, 3, np.nan])
    np.testing.assert_array_equal(result["extra"], [[7, 8, 9, np.nan], [np.nan] * 4])


def test_two_entries_with_one_label_cannot_be_aligned_and_say_so() -> None:
    pieces = [piece("a", 0, layer=array("fc", "fc")), piece("b", 1, layer=array("fc", "head"))]
    with pytest.raises(ValueError, match="layer: two entries have one label"):
        stack("a", "checkpoint", pieces, {})


def test_a_variable_with_two_kinds_of_dimensions_is_refused() -> None:
    pieces = [piece("a", 0, v=array(1.0)), piece("b", 1, v=array(1.0, dims=("rank",)))]
    with pytest.raises(ValueError, match="v: dimensions"):
        stack("a", "checkpoint", pieces, {})


def test_nothing_to_stack_is_an_error() -> None:
    with pytest.raises(ValueError, match="no piece"):
        stack("a", "checkpoint", [], {})


def test_an_unknown_step_among_numbers_is_nan_and_comes_back_unknown() -> None:
    result = stack("a", "checkpoint", [piece("a", 10), piece("b", None)], {})
    np.testing.assert_array_equal(result["step"], [10, np.nan])
    assert [p.index["step"] for p in unstack(result)] == [10, None]


def test_tidy_gives_integers_floats_or_text_and_never_mixes_them() -> None:
    assert tidy([1, True, np.int8(3)]).dtype == np.int64
    assert tidy([1, 2.5]).dtype == np.float64
    assert tidy(["a", None, 1]).tolist() == ["a", "", "1"]
    assert tidy([None, None]).tolist() == ["", ""]


def run_piece(name: str, steps: list[int], components: int = 2, **more: Array) -> Piece:
    n = len(steps)
    arrays = {
        "coordinate": Array(
            ("checkpoint", "component"), np.arange(n * components, dtype=float).reshape(n, -1)
        ),
        "loss": Array(("checkpoint",), np.array([float(s) for s in steps])),
        "explained_variance": Array(("component",), np.full(components, 1 / components)),
        "step": Array(("checkpoint",), tidy(list(steps))),
        "path": Array(("checkpoint",), tidy([f"{name}/{s}.pt" for s in steps])),
        "checkpoint_run": Array(("checkpoint",), tidy([name] * n)),
    }
    return Piece(f"key-{name}", {"run": name}, {**arrays, **more})


def test_a_single_run_has_no_leading_dimension() -> None:
    result = stack("trajectory", "run", [run_piece("a", [0, 1, 5])], {})
    assert result.lead == ""
    assert result.arrays["coordinate"].dims == ("checkpoint", "component")
    assert result.arrays["explained_variance"].dims == ("component",)
    assert {"step", "path"} <= set(result.coordinates)
    assert_same(unstack(result)[0], run_piece("a", [0, 1, 5]))


def test_several_runs_are_concatenated_along_checkpoint_and_come_apart_again() -> None:
    pieces = [run_piece("a", [0, 1, 5]), run_piece("b", [0, 2], components=3)]
    result = stack("trajectory", "run", pieces, {})
    assert result.lead == "run"
    assert result["step"].tolist() == [0, 1, 5, 0, 2]
    assert result["checkpoint_run"].tolist() == ["a", "a", "a", "b", "b"]
    assert result["coordinate"].shape == (5, 3)
    assert np.isnan(result["coordinate"][:3, 2]).all()
    assert result["explained_variance"].shape == (2, 3)
    first, second = unstack(result)
    assert_same(second, pieces[1])
    np.testing.assert_array_equal(first.arrays["loss"].values, [0, 1, 5])
    assert first.index == {"run": "a"}


def test_a_failed_run_among_others_brings_no_checkpoints() -> None:
    failed = Piece("", {"run": "b"}, status=FAILED, reason="one checkpoint")
    result = stack("trajectory", "run", [run_piece("a", [0, 1]), failed, run_piece("c", [7])], {})
    assert result["step"].tolist() == [0, 1, 7]
    assert np.isnan(result["explained_variance"][1]).all()
    assert [len(p.arrays) for p in unstack(result)] == [6, 0, 6]
    assert result.failures() == [("b", "failed: one checkpoint")]


def test_run_level_numbers_added_after_stacking_belong_to_no_piece() -> None:
    plain = stack("a", "checkpoint", [piece("k0", 0, v=array(1.0)), piece("k1", 1, v=array(2.0))], {})
    added = {
        "summary_run": Array(("summary_run",), np.array(["a", "b"], dtype=object)),
        "break_even": Array(("summary_run",), np.array([3.0, 4.0])),
    }
    whole = Result("a", "checkpoint", {**plain.arrays, **added}, plain.attributes)
    assert [set(p.arrays) for p in unstack(whole)] == [{"v"}, {"v"}]


def test_failures_are_named_by_path_else_by_run_and_step() -> None:
    bad = Piece("", {"run": "a", "step": 3, "path": "a/3.pt"}, status=FAILED, reason="NaN")
    assert stack("a", "checkpoint", [bad], {}).failures() == [("a/3.pt", "failed: NaN")]
    unnamed = Piece("", {"run": "a", "step": 3}, status=NOT_CONVERGED, reason="slow")
    assert stack("a", "checkpoint", [unnamed], {}).failures() == [("a | 3", "not converged: slow")]


def test_select_keeps_the_chosen_pieces_and_the_coordinates() -> None:
    pieces = [piece(f"k{i}", i, layer=array("fc"), v=array(float(i))) for i in range(4)]
    result = stack("a", "checkpoint", pieces, {})
    odd = result.select(result["step"] % 2 == 1)
    assert odd["v"].ravel().tolist() == [1, 3]
    assert odd["layer"].tolist() == ["fc"]
    assert result.select(np.array([2, 0]))["step"].tolist() == [2, 0]


def test_a_mask_of_the_wrong_length_is_refused() -> None:
    pieces = [Piece(str(i), {"step": i}, {"v": Array((), np.array(1.0))}) for i in range(3)]
    with pytest.raises(ValueError, match="1 truth values for 3 entries of checkpoint"):
        stack("norm", "checkpoint", pieces, {}).select(np.array([True]))
