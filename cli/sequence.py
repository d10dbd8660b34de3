"""`dynprobe inspect` and `dynprobe check`: what is in a run, and is it sound."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynprobe.cli.plain_table import print_csv, print_rows
from dynprobe.io.plain_json import dumps

if TYPE_CHECKING:
    from dynprobe.io.checkpoints import Checkpoint, Sequence


class OutputFormat(StrEnum):
    """How results are written to stdout."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


Runs = Annotated[
    list[str],
    typer.Argument(
        help="Folders of checkpoints, checkpoint files, globs, or - for paths on stdin.", metavar="RUN"
    ),
]
Key = Annotated[
    str | None, typer.Option(help="Where the weights are inside each file, e.g. model.state_dict.")
]
Ema = Annotated[
    bool, typer.Option("--ema", help="Prefer an averaged copy of the weights (EMA, SWA, teacher).")
]
StepPattern = Annotated[
    str | None,
    typer.Option(help=r"Regular expression whose group is the step in a file's path, e.g. 'it(\d+)'."),
]
Format = Annotated[OutputFormat, typer.Option("--format", help="How to write the result.")]


def inspect(
    runs: Runs,
    key: Key = None,
    ema: Ema = False,
    step_pattern: StepPattern = None,
    output_format: Format = OutputFormat.TABLE,
    with_hash: Annotated[bool, typer.Option("--hash", help="Add content hashes; reads all weights.")] = False,
) -> None:
    """List the checkpoints of runs: step, format, parameters, dtype, size. Reads no weights."""
    from dynprobe.cli.errors import warn
    from dynprobe.io.checkpoints import open_runs

    sequences = open_runs(runs, key=key, ema=ema, step_pattern=step_pattern)
    facts = [[_facts(checkpoint, with_hash) for checkpoint in sequence] for sequence in sequences]
    if output_format is OutputFormat.JSON:
        documents = [_run_document(s, rows) for s, rows in zip(sequences, facts, strict=True)]
        print(dumps({"runs": documents}, indent=2))
    elif output_format is OutputFormat.CSV:
        columns = ["run", *_COLUMNS, *(["hash"] if with_hash else []), "problem"]
        print_csv(columns, [[row[column] for column in columns] for rows in facts for row in rows])
    else:
        _print_table(sequences, facts, with_hash=with_hash)
    _print_notes(sequences)
    problems = [row["problem"] for rows in facts for row in rows if row["problem"]]
    for problem in problems:
        warn(f"unreadable: {problem}")
    if problems:
        raise typer.Exit(1)


def check(
    runs: Runs,
    key: Key = None,
    ema: Ema = False,
    step_pattern: StepPattern = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Look for what is wrong with runs: damaged files, duplicates, gaps, order, mixed shards, NaN, drift.

    Reads all weights, one checkpoint at a time. Prints one line for each finding and exits 1 if there is any.
    """
    from dynprobe.cli.errors import note
    from dynprobe.io.audit import audit
    from dynprobe.io.checkpoints import open_runs

    sequences = open_runs(runs, key=key, ema=ema, step_pattern=step_pattern)
    progress = _report_progress if sys.stderr.isatty() else None
    found = [audit(sequence, progress) for sequence in sequences]
    if progress is not None:
        print("\r\033[K", end="", file=sys.stderr)
    findings = [finding for in_run in found for finding in in_run]
    if output_format is OutputFormat.JSON:
        names = zip(sequences, found, strict=True)
        document = [
            {"run": s.name, "n_checkpoints": len(s), "findings": [vars(f) for f in in_run]}
            for s, in_run in names
        ]
        print(dumps({"n_findings": len(findings), "runs": document}, indent=2))
    elif output_format is OutputFormat.CSV:
        columns = ["kind", "run", "path", "message"]
        print_csv(columns, [[getattr(finding, column) for column in columns] for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.kind}: {finding.message}")
    _print_notes(sequences)
    if findings:
        raise typer.Exit(1)
    count = sum(len(sequence) for sequence in sequences)
    note(f"{count} checkpoint{'s' * (count != 1)}: nothing found")


_COLUMNS = ("step", "unit", "source", "format", "parameters", "dtype", "bytes", "path")


def _facts(checkpoint: Checkpoint, with_hash: bool) -> dict[str, Any]:
    """Return one checkpoint's row, numbers as numbers."""
    header = None if checkpoint.problem else checkpoint.header()
    row: dict[str, Any] = {
        "run": checkpoint.run,
        "step": checkpoint.step,
        "unit": checkpoint.step_unit,
        "source": checkpoint.step_source,
        "format": checkpoint.format,
        "parameters": header.n_parameters if header else None,
        "dtype": header.dtype if header else None,
        "bytes": checkpoint.size,
        "path": str(checkpoint.path),
        "problem": checkpoint.problem,
    }
    if with_hash:
        row["hash"] = _hash(checkpoint, row)
    return row


def _hash(checkpoint: Checkpoint, row: dict[str, Any]) -> str | None:
    from dynprobe.io.errors import InputError

    if checkpoint.problem:
        return None
    try:
        return checkpoint.load().hash
    except InputError as error:
        row["problem"] = error.message
        return None


def _run_document(sequence: Sequence, rows: list[dict[str, Any]]) -> dict[str, Any]:
    checkpoints = [{name: value for name, value in row.items() if name != "run"} for row in rows]
    return {
        "run": sequence.name,
        "root": str(sequence.root),
        "unit": sequence.unit,
        "notes": sequence.notes,
        "warnings": sequence.warnings,
        "checkpoints": checkpoints,
    }


def _print_table(sequences: list[Sequence], facts: list[list[dict[str, Any]]], *, with_hash: bool) -> None:
    unit = sequences[0].unit if len({sequence.unit for sequence in sequences}) == 1 else "step"
    columns = [
        unit,
        "from",
        "format",
        "parameters",
        "dtype",
        "size",
        *(["hash"] if with_hash else []),
        "file",
    ]
    if len(sequences) > 1:
        columns.insert(0, "run")
    lines = []
    for row in (row for rows in facts for row in rows):
        cells = [
            _shown(row["step"]),
            row["source"] or "–",
            row["format"] or "–",
            "–" if row["parameters"] is None else f"{row['parameters']:,}",
            row["dtype"] or "–",
            human_size(row["bytes"]),
            *([(row["hash"] or "–")[:12]] if with_hash else []),
            row["path"] + (" (unreadable)" if row["problem"] else ""),
        ]
        lines.append([row["run"], *cells] if len(sequences) > 1 else cells)
    print_rows(columns, lines, right=(unit, "parameters", "size"))


def _shown(step: float | None) -> str:
    return "–" if step is None else f"{step:g}" if isinstance(step, float) else str(step)


def human_size(n_bytes: int) -> str:
    """Return a size in binary units with three digits: "12.3 KiB"."""
    size, units = float(n_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.3g} {units[0]}"


def _print_notes(sequences: list[Sequence]) -> None:
    from dynprobe.cli.errors import note, warn

    for sequence in sequences:
        for text in sequence.notes:
            note(f"{sequence.name}: {text}")
        for text in sequence.warnings:
            warn(f"{sequence.name}: {text}")


def _report_progress(checkpoint: Checkpoint) -> None:
    print(f"\r\033[Kreading {checkpoint.path.name}", end="", file=sys.stderr, flush=True)
