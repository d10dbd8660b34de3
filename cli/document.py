"""A result as one JSON document."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynprobe.analyzers.core.result import INTERNAL, Result


def document(result: Result) -> dict[str, Any]:
    """Everything a result holds, for JSON.

    `pieces` has one entry a piece, with its labels, status and `values`; `variables` describes these;
    `coordinates` labels their dimensions; `summary` has the numbers that belong to no single piece.
    """
    lead = result.lead
    described = {
        name: {"dims": [d for d in a.dims if d != lead], "units": a.units, "long_name": a.long_name}
        | ({"error": a.error} if a.error else {})
        for name, a in result.variables.items()
    }
    stacked = (lead,) if lead else ()
    own = {n: a for n, a in result.arrays.items() if a.dims[:1] == stacked or not lead}
    labels = {n: a for n, a in own.items() if n in result.coordinates and a.dims == stacked}
    values = {n: a for n, a in own.items() if n in described}
    pieces = []
    for i in range(result.n_pieces):
        row = {n: np.atleast_1d(a.values)[i] for n, a in labels.items()}
        row["notes"] = str(row["notes"]).splitlines()
        row["values"] = {n: a.values[i] if lead else a.values for n, a in values.items()}
        pieces.append(row)
    coordinates = {
        n: {"units": a.units, "values": a.values}
        for n, a in result.arrays.items()
        if a.dims == (n,) and n != lead
    }
    summary = {n: result[n] for n in result.variables if n not in own}
    return {
        "analyzer": result.analyzer,
        "grain": result.grain,
        "provenance": {k: v for k, v in result.attributes.items() if k not in INTERNAL},
        "coordinates": coordinates,
        "variables": described,
        "pieces": pieces,
        "summary": summary,
    }
