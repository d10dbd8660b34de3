"""From an analyzer's declaration to its command: every option with help, range and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dynprobe.analyzers.core.contract import Declaration
from dynprobe.cli.request import Request, shared_options

REPLACEABLE = {"samples"}
"""Shared options that an analyzer may have in its own way: one that looks at single samples chooses them."""

RUNS_HELP = "Folders of checkpoints, checkpoint files, globs, or - for paths on stdin."


def command(declaration: Declaration, analyzer: str = "") -> Callable[..., None]:
    """A function whose signature Typer turns into the command of an analyzer.

    Args:
        declaration: The analyzer.
        analyzer: How `Request.analyzer` names it; its name by default.
    """
    own = [o for o in declaration.options if o.name != "seed"]
    replaced = {o.name for o in own} & REPLACEABLE
    shared = [
        f for f in shared_options() if _applies(declaration, f.metadata["needs"]) and f.name not in replaced
    ]
    taken = {f.name for f in shared}
    if clash := [o.name for o in own if o.name in taken]:
        raise TypeError(
            f"{declaration.name}: the option {clash[0]!r} is shared by all analyzers; rename yours"
        )

    def invoke(**values: Any) -> None:
        from dynprobe.cli.run import run

        options = {o.name: values.pop(o.name) for o in own}
        if any(o.name == "seed" for o in declaration.options):
            options["seed"] = values["seed"]
        raise typer.Exit(run(Request(analyzer or declaration.name, options=options, **values)))

    parameters = [
        _parameter(
            "runs", list[str], ..., typer.Argument(help=RUNS_HELP, metavar="RUN...", show_default=False)
        )
    ]
    for option in own:
        bounds = option.bounds
        info = typer.Option(
            *_flags(option.name, option.type),
            help=option.help,
            min=bounds.min if bounds else None,
            max=bounds.max if bounds else None,
            rich_help_panel=f"What {declaration.name} measures",
        )
        parameters.append(_parameter(option.name, option.type, option.default, info))
    for each in shared:
        meta = each.metadata
        default = each.default_factory() if callable(each.default_factory) else each.default
        if each.name == "seed":
            default = next((o.default for o in declaration.options if o.name == "seed"), default)
        info = typer.Option(
            *meta["flags"],
            help=meta["help"],
            min=meta["min"],
            rich_help_panel=meta["panel"],
            show_default=default not in (None, "", [], False),
        )
        parameters.append(_parameter(each.name, _HINTS[each.name], default, info))
    invoke.__name__ = declaration.name.replace("-", "_")
    invoke.__doc__ = _help(declaration)
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    return invoke


def _hints() -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(Request)


_HINTS = _hints()


def _applies(declaration: Declaration, needs: str) -> bool:
    """Whether a shared option means anything to this analyzer: no option is accepted and ignored."""
    model = declaration.builds_model(available=True)
    batches = declaration.wants("batches") or declaration.wants("activations")
    special = {
        "": True,
        "pair": declaration.grain == "pair",
        "model": model,
        "batches": batches,
        "code": model or batches or declaration.wants("loss"),
        "random": batches or any(o.name == "seed" for o in declaration.options),
        "figure": declaration.figure is not None,
    }
    return special[needs] if needs in special else declaration.wants(needs)


def _flags(name: str, kind: Any) -> tuple[str, ...]:
    flag = "--" + name.replace("_", "-")
    return (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)


def _parameter(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=empty if default is ... else default,
        annotation=Annotated[kind, info],
    )


def _help(declaration: Declaration) -> str:
    """The description, with what it returns: the names to look for in the report."""
    rows = []
    for name, var in declaration.returns.items():
        dims = ", ".join(var.dims)
        units = f" [{var.units}]" if var.units else ""
        rows.append(f"- `{name}`{f' ({dims})' if dims else ''}: {var.long_name}{units}")
    return f"{declaration.description}\n\nReturns:\n\n" + "\n".join(rows)
