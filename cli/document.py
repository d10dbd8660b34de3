"""A result as one JSON document."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.analyzers.core.result import INTERNAL, Result


def document(result: Result) -> dict[str, Any]:
    """Everything a result holds, for JSON.

    `pieces` has one entry a piece, with its labels, status and `values`, and for a run `checkpoints`, the
    step and path of each; `variables` describes the values; `coordinates` labels their dimensions; `summary`
    has the numbers that belong to no single piece.
    """
    lead = result.lead
    inner = {lead, "checkpoint"} if result.grain == "run" else {lead}
    described = {
        name: {"dims": [d for d in a.dims if d != lead], "units": a.units, "long_name": a.long_name}
        | ({"error": a.error} if a.error else {})
        for name, a in result.variables.items()
    }
    own = [n for n, a in result.arrays.items() if not lead or inner & set(a.dims)]
    pieces = [_piece(result.select(np.array([i])), own) for i in range(result.n_pieces)]
    coordinates = {
        n: {"units": a.units, "values": a.values}
        for n, a in result.arrays.items()
        if a.dims == (n,) and n != lead
    }
    summary = {n: result[n] for n in described if n not in own}
    return {
        "analyzer": result.analyzer,
        "grain": result.grain,
        "provenance": {k: v for k, v in result.attributes.items() if k not in INTERNAL},
        "coordinates": coordinates,
        "variables": described,
        "pieces": pieces,
        "summary": summary,
    }


def _piece(result: Result, own: list[str]) -> dict[str, Any]:
    """One piece: a result that was cut down to it."""

    def along(names: list[str], *dims: str) -> dict[str, Any]:
        return {n: result[n] for n in names if result.arrays[n].dims == dims}

    lead = (result.lead,) if result.lead else ()
    coordinates = [n for n in own if n in result.coordinates]
    row = {n: np.atleast_1d(values)[0] for n, values in along(coordinates, *lead).items()}
    row["notes"] = str(row["notes"]).splitlines()
    if checkpoints := along(coordinates, "checkpoint") if result.grain == "run" else {}:
        row["checkpoints"] = checkpoints
    row["values"] = {
        n: result[n][0] if lead and result.arrays[n].dims[:1] == lead else result[n]
        for n in own
        if n not in coordinates
    }
    return row
