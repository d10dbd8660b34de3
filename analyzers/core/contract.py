"""The one declaration: what an analyzer needs, which options it has, what it returns and shows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from dynprobe.analyzers.core.result import BOOKKEEPING, Array, Result, Var

FIELDS = {
    "step": "the checkpoint's step",
    "path": "the checkpoint's file",
    "state": "its tensors by name",
    "model": "the module, filled with the checkpoint, in eval mode",
    "batches": "the data as (inputs, targets) batches in a fixed order",
    "test_batches": "the test data likewise, None where there is none",
    "loss": "the loss: loss(outputs, targets), loss.per_sample(outputs, targets)",
    "activations": "what its layers compute on the data, recorded once for all its pairs, or saved before",
    "previous": "the run's previous measurement, None at the first",
    "training": "facts from the manifest's [training]",
    "groups": "labels from the manifest's [groups]",
    "run": "the whole sequence the checkpoint belongs to",
    "partial": "a store for parts of a piece that survive a kill",
    "progress": "progress(done, total, what)",
}
"""What an analyzer's leading parameters may name."""

RESERVED = BOOKKEEPING | {
    *("run", "step", "path", "hash", "runs", "checkpoint_run", "summary_run", "checkpoint", "pair"),
    *(f"{name}_{half}" for name in ("run", "step", "path", "hash", "group") for half in "ab"),
}
"""Names that the framework gives to labels, so that no variable may have them."""

PAIRABLE = ("step", "path", "state", "model", "batches", "activations")
MARKER = "__dynprobe_analyzer__"

Function = TypeVar("Function", bound=Callable[..., Any])


class DeclarationError(TypeError):
    """An analyzer's declaration contradicts itself or asks for what a workspace does not have."""


class OptionError(ValueError):
    """An analyzer's options contradict each other or what it was given; raised by the analyzer.

    Args:
        message: What is wrong, in the user's words.
        tip: What to do about it.
    """

    def __init__(self, message: str, tip: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.tip = tip


@dataclass(frozen=True)
class Range:
    """Bounds of a numeric option, inclusive."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class InputFile:
    """Marks a text option that names files, separated by commas: their contents decide the numbers too."""


@dataclass(frozen=True)
class Setting:
    """Marks an option that decides no number of a piece: a limit on memory, or one of the summary alone."""


@dataclass(frozen=True)
class Lines:
    """Curves of `y` against `x` (default: the step), one per entry of any further dimension.

    The variable's declared `error` is drawn as a band.
    """

    y: str | tuple[str, ...]
    x: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Bands:
    """A curve of `y` between `low` and `high` against `x` (default: the step)."""

    y: str
    low: str
    high: str
    x: str = ""
    log_y: bool = False


@dataclass(frozen=True)
class Heatmap:
    """`z` as colours over `x` and `y`, one panel per piece."""

    z: str
    x: str
    y: str
    log_z: bool = False


@dataclass(frozen=True)
class Contours:
    """`z` as contour lines over `x` and `y`, one panel per piece, on a scale shared by all.

    Styles: `contour` (labelled lines), `filled` (with a colour bar), `surface` (three-dimensional).
    """

    z: str
    x: str
    y: str
    log_z: bool = True


Figure = Lines | Bands | Heatmap | Contours | Callable[..., Any]


@dataclass(frozen=True)
class Option:
    """A keyword-only parameter as the command line sees it."""

    name: str
    type: Any
    default: Any
    help: str
    bounds: Range | None = None
    is_file: bool = False
    is_setting: bool = False


@dataclass(frozen=True)
class Declaration:
    """All that follows from `@analyzer`; the framework reads this and nothing else.

    Args:
        name: As typed on the command line, hyphens for underscores.
        function: The plain callable.
        line: One line for the listing.
        description: The docstring up to its first section.
        needs: Leading parameters, in order.
        grain: `checkpoint`, `pair`, `run` or `group`.
        options: Keyword-only parameters.
        returns: Declared variables by name.
        figure: How to draw a result.
        summary: `summary(result) -> {name: value}`, run-level numbers.
        summary_returns: Their declarations.
        cost: `cost(options, n_checkpoints) -> {"forwards": …}` per piece, for `--dry-run`.
        reads: `reads(options)`, the other checkpoints a measurement depends on.
        table: Variables the table on the screen shows; empty for all.
        skips: `skips(options)`, the needs that these options make superfluous.
        summary_of: What `summary` sees at once: a `run` (or the pairs of two runs), or the whole `call`.
        matrix: A variable of two dimensions that the screen shows as a matrix under the table.
        under: `under(options)`, another grain and other returns under these options; empty for none.
        names: Whether the names and units of the data's features and classes decide what is returned.
    """

    name: str
    function: Callable[..., Any]
    line: str
    description: str
    needs: tuple[str, ...]
    grain: str
    options: tuple[Option, ...]
    returns: Mapping[str, Var]
    figure: Figure | None = None
    summary: Callable[[Result], Mapping[str, Any]] | None = None
    summary_returns: Mapping[str, Var] = field(default_factory=dict)
    cost: Callable[[Mapping[str, Any], int], Mapping[str, int]] | None = None
    reads: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    table: tuple[str, ...] = ()
    skips: Callable[[Mapping[str, Any]], Sequence[str]] | None = None
    summary_of: Literal["run", "call"] = "run"
    matrix: str = ""
    under: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    names: bool = False

    def resolved(self, options: Mapping[str, Any]) -> Declaration:
        """The declaration as it is under these options."""
        return replace(self, **self.under(options)) if self.under else self

    def deciding(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that decide the numbers of a piece."""
        settings = {option.name for option in self.options if option.is_setting}
        return {name: value for name, value in options.items() if name not in settings}

    def needed(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """What the function needs under these options; anything else it is given as None."""
        skipped = self.skips(options) if self.skips else ()
        return tuple(need for need in self.needs if need not in skipped)

    def decided_by(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Of what the facts about a run decide the numbers: its needs, and the names in the data."""
        return (*self.needed(options), *(["names"] if self.names else []))

    def builds_model(self, *, available: bool) -> bool:
        """Whether it may use a model, given whether something says how to build one."""
        may = self.wants("activations") or self.grain in ("run", "group")
        return self.wants("model") or (may and available)

    @property
    def group(self) -> str:
        """Its group in a report."""
        return self.name

    def wants(self, name: str) -> bool:
        """Whether the function asks for a workspace field, alone or as half of a pair."""
        return any(need == name or (need[:-2] == name and need[-2:] in ("_a", "_b")) for need in self.needs)


class Measurement(dict[str, Any]):
    """What an analyzer returns: values by declared name, with the evidence for them.

    Args:
        values: Arrays, tensors or numbers by the names declared in `returns`.
        converged: False if an iteration stopped before its tolerance.
        reason: Why not, in one sentence.
        spent: Counts: `{"forwards": 25, "hvps": 10}`.
        notes: Sentences the reader should see.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        converged: bool = True,
        reason: str = "",
        spent: Mapping[str, int] | None = None,
        notes: tuple[str, ...] | list[str] = (),
    ) -> None:
        super().__init__(values)
        self.converged = converged
        self.reason = reason
        self.spent = dict(spent or {})
        self.notes = tuple(notes)


def analyzer(
    *,
    returns: Mapping[str, Var],
    figure: Figure | None = None,
    name: str = "",
    summary: Callable[[Result], Mapping[str, Any]] | None = None,
    summary_returns: Mapping[str, Var] | None = None,
    cost: Callable[[Mapping[str, Any], int], Mapping[str, int]] | None = None,
    reads: Callable[[Mapping[str, Any]], Sequence[str]] | None = None,
    table: Sequence[str] = (),
    skips: Callable[[Mapping[str, Any]], Sequence[str]] | None = None,
    summary_of: Literal["run", "call"] = "run",
    matrix: str = "",
    under: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    names: bool = False,
) -> Callable[[Function], Function]:
    """Declare a plain function to be an analyzer; it stays the plain function.

    Args:
        returns: What it returns, by name.
        figure: Lines, Bands, Heatmap, Contours, or a `draw(result, figure, style)` of your own.
        name: Its name as typed; the function's by default.
        summary: Adds run-level numbers after stacking, from the results of one run.
        summary_returns: Their declarations.
        cost: Work per piece, for `--dry-run`: `cost(options, n_checkpoints)` gives counts by name.
        reads: For an analyzer that asks for `run`: what else it looks at under these options, as
            `run.state` takes it (`"all"`, `"last"`, a step, a path), or `"others"` for the last checkpoint
            of every run of the call; part of the key for resuming.
        table: Names of the variables that the table on the screen shows, in order; all by default. The
            report, JSON and CSV always hold everything.
        skips: Names of leading parameters that are not needed under these options: they are not made, are
            no part of the key for resuming, and the function gets None.
        summary_of: What `summary` is given at once: the results of a `run` (of the pairs of two runs), or of
            the whole `call`, where it compares runs.
        matrix: A returned variable of two dimensions; the screen shows it as a matrix under the table.
        under: For an analyzer that measures pairs or, under some options, single checkpoints:
            `under(options)` gives the `grain` and `returns` that hold then, or nothing. Of
            `activations_a, activations_b` a single checkpoint fills the first; the second is None.
        names: Whether it looks at the names and units of the data's features and classes: they are then part
            of the key for resuming.

    Raises:
        DeclarationError: At import, if the declaration cannot be followed.
    """

    def declare(function: Function) -> Function:
        declaration = _declaration(
            function,
            name,
            returns,
            figure=figure,
            summary=summary,
            summary_returns=dict(summary_returns or {}),
            cost=cost,
            reads=reads,
            table=tuple(table),
            skips=skips,
            summary_of=summary_of,
            matrix=matrix,
            under=under,
            names=names,
        )
        setattr(function, MARKER, declaration)
        return function

    return declare


def declaration_of(function: Callable[..., Any]) -> Declaration:
    """The declaration of a declared analyzer.

    Raises:
        DeclarationError: If the function was never declared.
    """
    found = getattr(function, MARKER, None)
    if not isinstance(found, Declaration):
        raise DeclarationError(
            f"{getattr(function, '__name__', function)} is not an analyzer: "
            "decorate it with @analyzer(returns=…)"
        )
    return found


def _declaration(
    function: Callable[..., Any], name: str, returns: Mapping[str, Var], **extras: Any
) -> Declaration:
    title = name or function.__name__.replace("_", "-")
    description, arguments = _docstring(function, title)
    hints = get_type_hints(function, include_extras=True)
    needs, options = [], []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise DeclarationError(
                f"{title}: *{parameter.name} cannot be described to a user; name every option"
            )
        if parameter.kind is parameter.KEYWORD_ONLY:
            options.append(_option(title, parameter, hints.get(parameter.name, str), arguments))
        else:
            needs.append(parameter.name)
    grain = _grain(title, needs)
    _check_returns(title, returns, grain)
    if unknown := [n for n in extras["table"] if n not in {*returns, *extras["summary_returns"]}]:
        raise DeclarationError(f"{title}: table= names {unknown}, which it does not return")
    if extras["matrix"] and len(returns.get(extras["matrix"], Var()).dims) != 2:
        raise DeclarationError(
            f"{title}: matrix= names {extras['matrix']!r}, which is not returned as a matrix"
        )
    line = description.split("\n")[0]
    return Declaration(
        name=title,
        function=function,
        line=line,
        description=description,
        needs=tuple(needs),
        grain=grain,
        options=tuple(options),
        returns=dict(returns),
        **extras,
    )


def _grain(title: str, needs: list[str]) -> str:
    def unknown(wrong: list[str], known: list[str]) -> DeclarationError:
        return DeclarationError(
            f"{title} asks for {wrong}, which a workspace does not have; its fields are {known}. "
            "Make it an option by placing it after '*'."
        )

    if "runs" in needs or "checkpoints" in needs:
        shared = {
            "runs",
            "checkpoints",
            "batches",
            "test_batches",
            "loss",
            "training",
            "groups",
            "partial",
            "progress",
        }
        if wrong := [n for n in needs if n not in shared]:
            raise unknown(wrong, sorted(shared))
        return "group" if "runs" in needs else "run"
    halves = [f"{n}{half}" for n in PAIRABLE for half in ("_a", "_b")]
    known = [*FIELDS, *halves, "checkpoints", "runs"]
    if wrong := [n for n in needs if n not in known]:
        raise unknown(wrong, known)
    if any(n in halves for n in needs):
        if wrong := [n for n in needs if n in {*PAIRABLE, "run", "previous"} - {"batches"}]:
            raise DeclarationError(
                f"{title} is measured on pairs, so {wrong} is ambiguous: say {wrong[0]}_a or {wrong[0]}_b."
            )
        return "pair"
    return "checkpoint"


def _check_returns(title: str, returns: Mapping[str, Var], grain: str) -> None:
    if not returns:
        raise DeclarationError(f"{title} declares nothing in returns=")
    for name, var in returns.items():
        if name in RESERVED:
            raise DeclarationError(
                f"{title}: {name!r} is a label of every result; return it under another name"
            )
        if not name.isidentifier():
            raise DeclarationError(f"{title}: {name!r} is not a name for a variable")
        if var.error and var.error not in returns:
            raise DeclarationError(f"{title}: {name} names {var.error!r} as its error, which is not returned")
        reserved = {"checkpoint", "pair", "run"} - ({"checkpoint"} if grain == "run" else set())
        if bad := reserved & {d for dims in (var.dims, *var.alternatives) for d in dims}:
            raise DeclarationError(
                f"{title}: {name} may not have the dimension {sorted(bad)[0]!r}; "
                "the leading dimension is added by the framework"
            )


def _option(title: str, parameter: inspect.Parameter, hint: Any, arguments: Mapping[str, str]) -> Option:
    if parameter.default is inspect.Parameter.empty:
        raise DeclarationError(f"{title}: option {parameter.name} needs a default")
    if parameter.annotation is inspect.Parameter.empty:
        raise DeclarationError(f"{title}: option {parameter.name} needs a type: {parameter.name}: int = …")
    if parameter.name not in arguments:
        raise DeclarationError(
            f"{title}: option {parameter.name} has no line under Args: in the docstring; "
            "it becomes the --help text"
        )
    marks = getattr(hint, "__metadata__", ())
    bounds = next((m for m in marks if isinstance(m, Range)), None)
    is_file, is_setting = (any(isinstance(m, kind) for m in marks) for kind in (InputFile, Setting))
    base = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    inner = (
        [a for a in get_args(base) if a is not NoneType] if get_origin(base) in (Union, UnionType) else [base]
    )
    kinds = (int, float, str, bool)
    if len(inner) != 1 or (inner[0] not in kinds and get_origin(inner[0]) is not Literal):
        raise DeclarationError(
            f"{title}: option {parameter.name} is {hint}; an option is one of "
            "int, float, str, bool, Literal[…], or one of these | None"
        )
    text = arguments[parameter.name]
    return Option(parameter.name, base, parameter.default, text, bounds, is_file, is_setting)


_SECTION = re.compile(r"^([A-Z][A-Za-z ]{2,30}):[ \t]*$", re.M)


def _docstring(function: Callable[..., Any], title: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the `Args` entries by name, each on one line."""
    text = inspect.getdoc(function) or ""
    if not text:
        raise DeclarationError(f"{title} needs a docstring: its first line is what users see in the list")
    sections = _SECTION.split(text)
    arguments: dict[str, str] = {}
    for heading, body in zip(sections[1::2], sections[2::2], strict=True):
        if heading in ("Args", "Arguments"):
            current = ""
            for raw in body.splitlines():
                match = re.match(r"^    (\w+)(?:\s*\([^)]*\))?:\s*(.*)$", raw)
                if match:
                    current = match[1]
                    arguments[current] = match[2].strip()
                elif current and raw.strip():
                    arguments[current] += " " + raw.strip()
    return sections[0].strip(), arguments


def labelled(declaration: Declaration, returned: Mapping[str, Any]) -> dict[str, Array]:
    """The values a function returned as labelled arrays, checked against its declaration.

    Raises:
        DeclarationError: If a name, a shape or a dtype is not as declared.
    """
    returns, title = declaration.returns, declaration.name
    if extra := set(returned) - set(returns):
        raise DeclarationError(f"{title} returned {sorted(extra)}, which it does not declare")
    if missing := {n for n, var in returns.items() if not var.optional} - set(returned):
        raise DeclarationError(f"{title} declares {sorted(missing)} and did not return it")
    for name, value in returned.items():
        if name in returns and returns[name].dims == (name,):
            _check_coordinate(title, name, _numeric(value))
    arrays, sizes = {}, dict[str, tuple[int, str]]()
    for name, value in returned.items():
        values = _numeric(value)
        dims = returns[name].dims_for(values.ndim)
        if dims is None or values.dtype.kind not in "ifuOU":
            raise DeclarationError(
                f"{title} declares {name} as {returns[name].dims} and returned an array "
                f"of shape {values.shape} and type {values.dtype}"
            )
        for dim, size in zip(dims, values.shape, strict=True):
            first, owner = sizes.setdefault(dim, (size, name))
            if first != size:
                raise DeclarationError(f"{title}: {dim} has {first} entries in {owner} and {size} in {name}")
        var = returns[name]
        arrays[name] = Array(
            dims, values, var.units, var.long_name, var.error if var.error in returned else ""
        )
    return arrays


def _check_coordinate(title: str, name: str, values: np.ndarray) -> None:
    """Pieces are aligned by their coordinates: these must be labels that tell entries apart."""
    labels = values.ravel().tolist()
    if len(set(labels)) < len(labels) or any(label != label for label in labels):
        raise DeclarationError(f"{title}: the coordinate {name} has NaN or one label twice")


def _numeric(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind == "b":
        array = array.astype(np.int8)  # an HDF5 boolean vanishes in netCDF readers
    return array.astype(object) if array.dtype.kind in "US" else array
