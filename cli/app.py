"""The `dynprobe` group: lists analyzers without importing them, imports only the one invoked."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dynprobe import __version__
from dynprobe.cli import errors

ANALYZERS, FILES = "Analyzers: measure something", "Checkpoints and reports"


class LazyCommand(TyperCommand):
    """Shows one line in the list; becomes the analyzer's real command when it is invoked."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the analyzer, build its command, and go on as that command."""
        from dynprobe.analyzers.core import registry
        from dynprobe.cli.command import command

        assert self.name is not None
        return _typer_command(self.name, command(registry.load(self.name))).make_context(
            info_name, args, parent, **extra
        )


class Commands(TyperGroup):
    """The commands that stand in this file, then every analyzer there is."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        from dynprobe.analyzers.core import registry

        own = dict(self.commands)
        self.commands.clear()  # analyzers come first in the list
        for name, entry in registry.listing().items():
            if name not in own:
                self.add_command(
                    LazyCommand(name, help=entry.line, callback=lambda: None, rich_help_panel=ANALYZERS)
                )
        self.commands.update(own)


def _typer_command(name: str, function: Any) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(name)(function)
    return typer.main.get_command(app)


app = typer.Typer(
    name="dynprobe",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure how a network learned, from its saved checkpoints: with error bars and provenance.",
    epilog="`dynprobe landscape RUN` measures one run; `dynprobe COMMAND --help` tells what a command needs.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dynprobe {__version__}")
        raise typer.Exit


@app.callback()
def _dynprobe(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command("analyzers", rich_help_panel=FILES)
def list_analyzers() -> None:
    """The list of analyzers, one line each, plug-ins included."""
    from dynprobe.analyzers.core import registry

    for clash in registry.clashes():
        errors.warn(clash)
    entries = registry.listing().values()
    width = max(len(e.name) for e in entries)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.line}")


@app.command(
    "run",
    rich_help_panel=FILES,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def run_file(
    context: typer.Context,
    analyzer: Annotated[str, typer.Argument(metavar="FILE.py[:FUNCTION]", help="An analyzer of your own.")],
) -> None:
    """Run an analyzer from a file: `dynprobe run mine.py:my_analyzer RUN... [options]`.

    Its options follow from its declaration: `dynprobe run mine.py:my_analyzer --help`.
    """
    from dynprobe.cli.command import command
    from dynprobe.cli.work import find_analyzer

    if analyzer in ("-h", "--help"):
        print(context.get_help())
        raise typer.Exit
    declaration = find_analyzer(analyzer)
    inner = _typer_command(declaration.name, command(declaration, analyzer))
    raise typer.Exit(inner.main(context.args, f"dynprobe run {analyzer}", standalone_mode=False) or 0)


def _mount() -> None:
    from dynprobe.cli.init import init
    from dynprobe.cli.reports import report_app
    from dynprobe.cli.sequence import check, inspect

    app.command("inspect", rich_help_panel=FILES)(inspect)
    app.command("check", rich_help_panel=FILES)(check)
    app.command("init", rich_help_panel=FILES)(init)
    app.add_typer(report_app, name="report", rich_help_panel=FILES)


_mount()


def main() -> None:
    """Entry point of the `dynprobe` command."""
    from dynprobe.analyzers.core.contract import DeclarationError, OptionError
    from dynprobe.analyzers.core.registry import UnknownAnalyzer
    from dynprobe.io.errors import InputError

    try:
        app(prog_name="dynprobe")
    except (InputError, UnknownAnalyzer, DeclarationError, OptionError) as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            raise
        sys.exit(errors.report_error(error))
    except errors.Interrupted as stopped:
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
