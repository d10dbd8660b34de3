"""What follows from one declaration, and what a wrong one is told."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pytest

from dynprobe.analyzers import DeclarationError, Measurement, Range, Var, analyzer
from dynprobe.analyzers.core.contract import declaration_of, labelled

NORM = {"norm": Var((), "1", "Norm of all weights")}


def test_a_declared_analyzer_stays_the_plain_function():
    @analyzer(returns=NORM)
    def double(state):
        """Twice what it gets."""
        return {"norm": 2 * state}

    assert double(3) == {"norm": 6}


def test_keyword_parameters_become_options_with_range_default_and_help():
    @analyzer(returns=NORM)
    def weight_norm(
        state,
        *,
        order: Annotated[int, Range(min=1)] = 2,
        kind: Literal["a", "b"] = "a",
        tol: float | None = None,
    ):
        """Norm of the weights.

        More about it.

        Args:
            order: Which norm,
                1 or 2.
            kind: A or b.
            tol: Tolerance.
        """

    declaration = declaration_of(weight_norm)
    assert declaration.name == "weight-norm"
    assert declaration.line == "Norm of the weights."
    assert declaration.description == "Norm of the weights.\n\nMore about it."
    assert declaration.needs == ("state",)
    order, kind, tol = declaration.options
    assert (order.type, order.default, order.help) == (int, 2, "Which norm, 1 or 2.")
    assert order.bounds == Range(min=1)
    assert kind.type == Literal["a", "b"]
    assert tol.default is None


@pytest.mark.parametrize(
    ("needs", "grain"),
    [("state", "checkpoint"), ("state_a, state_b", "pair"), ("checkpoints", "run"), ("runs", "group")],
)
def test_leading_parameters_set_the_grain(needs, grain):
    namespace: dict = {}
    exec(f"def probe({needs}):\n    'One line.'", namespace)
    assert declaration_of(analyzer(returns=NORM)(namespace["probe"])).grain == grain


def test_a_misspelt_field_fails_at_import_with_the_list():
    with pytest.raises(DeclarationError, match=r"asks for \['modle'\].*'model'.*after '\*'"):

        @analyzer(returns=NORM)
        def wrong(modle):
            """One line."""


def test_a_pair_that_asks_for_a_single_state_is_told_to_say_which():
    with pytest.raises(DeclarationError, match="state_a or state_b"):

        @analyzer(returns=NORM)
        def wrong(state, state_b):
            """One line."""


def test_an_option_without_a_help_line_is_refused():
    with pytest.raises(DeclarationError, match="no line under Args"):

        @analyzer(returns=NORM)
        def wrong(state, *, order: int = 2):
            """One line."""


def test_an_option_without_default_and_an_undeclared_error_are_refused():
    with pytest.raises(DeclarationError, match="needs a default"):

        @analyzer(returns=NORM)
        def wrong(state, *, order: int):
            """One line.

            Args:
                order: Which.
            """

    with pytest.raises(DeclarationError, match="as its error"):

        @analyzer(returns={"norm": Var((), "", "", error="stderr")})
        def wrong_too(state):
            """One line."""


def test_var_keyword_options_are_refused_because_they_cannot_be_described():
    with pytest.raises(DeclarationError, match="cannot be described"):

        @analyzer(returns=NORM)
        def wrong(state, **options):
            """One line."""


def _surface():
    @analyzer(
        returns={
            "x": Var(("x",)),
            "loss": Var(("y", "x"), alternatives=(("x",),), error="loss_stderr"),
            "loss_stderr": Var(("y", "x"), alternatives=(("x",),), optional=True),
        }
    )
    def surface(state):
        """One line."""

    return declaration_of(surface)


def test_returned_arrays_get_the_declared_dimensions_by_their_number_of_axes():
    arrays = labelled(
        _surface(), {"x": np.arange(3.0), "loss": np.zeros((2, 3)), "loss_stderr": np.ones((2, 3))}
    )
    assert arrays["loss"].dims == ("y", "x")
    assert arrays["loss"].error == "loss_stderr"
    assert labelled(_surface(), {"x": np.arange(3.0), "loss": np.zeros(3)})["loss"].dims == ("x",)
    assert labelled(_surface(), {"x": np.arange(3.0), "loss": np.zeros(3)})["loss"].error == ""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"x": np.arange(3.0)}, r"declares \['loss'\] and did not return it"),
        (
            {"x": np.arange(3.0), "loss": np.zeros(3), "acc": 1},
            r"returned \['acc'\], which it does not declare",
        ),
        ({"x": np.arange(3.0), "loss": np.zeros(4)}, "x has 3 entries in x and 4 in loss"),
        ({"x": np.arange(3.0), "loss": np.zeros((2, 2, 3))}, "shape"),
        ({"x": np.arange(3.0), "loss": np.zeros(3) * 1j}, "complex"),
    ],
)
def test_returning_what_was_not_declared_names_the_variable(returned, message):
    with pytest.raises(DeclarationError, match=message):
        labelled(_surface(), returned)


def test_a_measurement_is_the_dictionary_it_was_given_with_its_evidence():
    measurement = Measurement(
        {"norm": 1.0}, converged=False, reason="stopped", spent={"hvps": 3}, notes=["n"]
    )
    assert measurement == {"norm": 1.0}
    assert (measurement.converged, measurement.reason, measurement.spent) == (False, "stopped", {"hvps": 3})


@pytest.mark.parametrize("name", ["status", "step", "run", "path_a", "key", "notes"])
def test_a_variable_may_not_have_the_name_of_a_label(name):
    with pytest.raises(DeclarationError, match="label of every result"):

        @analyzer(returns={name: Var((), "", "Something")})
        def wrong(state):
            """One line."""


def test_an_option_without_a_type_is_refused():
    with pytest.raises(DeclarationError, match="needs a type"):

        @analyzer(returns=NORM)
        def wrong(state, *, order=3):
            """One line.

            Args:
                order: Which.
            """


@pytest.mark.parametrize("labels", [[1.0, 1.0, 2.0], [0.0, np.nan, 1.0]])
def test_a_coordinate_must_tell_its_entries_apart(labels):
    with pytest.raises(DeclarationError, match="coordinate x"):
        labelled(_surface(), {"x": np.array(labels), "loss": np.zeros(3)})


def test_any_heading_ends_the_help_of_an_option():
    @analyzer(returns=NORM)
    def weight_norm(state, *, order: int = 2):
        """Norm of the weights.

        Args:
            order: Which norm.

        Warning:
            Not this.
        """

    assert declaration_of(weight_norm).options[0].help == "Which norm."
