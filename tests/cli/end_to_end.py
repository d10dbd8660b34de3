"""Small runs, analyzers of one's own, and the command in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynprobe.cli.app import main

ANALYZERS = '''"""My own."""
import numpy as np
from dynprobe.analyzers import Lines, Var, analyzer


def size(state):
    return float(sum(v.double().norm() ** 2 for v in state.values()) ** 0.5)


@analyzer(returns={"norm": Var((), "1", "Norm of all weights")}, figure=Lines(y="norm"))
def norm(state):
    """Norm of all weights."""
    return {"norm": size(state)}


def best(result):
    return {"best": np.nanmax(result["norm"])}


@analyzer(returns={"norm": Var()}, figure=Lines(y="norm"), summary=best, summary_returns={"best": Var()})
def best_norm(state, path, *, fail: str = "none"):
    """Norm with a summary.

    Args:
        fail: Part of the paths that cannot be measured.
    """
    if fail in str(path):
        raise RuntimeError("boom")
    return {"norm": size(state)}


def spread(result):
    return {"mean": result["distance"].mean(), "count": result["distance"].size}


@analyzer(
    returns={"distance": Var()},
    figure=Lines(y="distance"),
    summary=spread,
    summary_returns={"mean": Var(), "count": Var()},
)
def distance(state_a, state_b):
    """Distance between two checkpoints."""
    return {"distance": size({n: state_a[n] - state_b[n] for n in state_a})}


def mean(result):
    return {"mean": np.mean(result["norms"]), "count": result["norms"].size}


@analyzer(
    returns={"norms": Var(("checkpoint",)), "total": Var()},
    figure=Lines(y="norms"),
    summary=mean,
    summary_returns={"mean": Var(), "count": Var()},
)
def run_norm(checkpoints):
    """Norms of a run."""
    norms = [size(c.state) for c in checkpoints]
    return {"norms": norms, "total": sum(norms)}


@analyzer(returns={"count": Var()}, figure=Lines(y="count"))
def count(runs):
    """Checkpoints of several runs."""
    return {"count": sum(len(run) for run in runs)}


def oops(result, figure):
    raise KeyError("oops")


@analyzer(returns={"norm": Var()}, figure=oops)
def undrawable(state):
    """A figure that breaks."""
    return {"norm": size(state)}
'''


def save(folder: Path, weights: dict[int, float]) -> None:
    """A run with one checkpoint of a single weight for each step."""
    folder.mkdir(parents=True)
    for step, weight in weights.items():
        save_file({"w": torch.full((1,), weight)}, folder / f"step_{step}.safetensors")


def dynprobe(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    before = sys.argv
    sys.argv = ["dynprobe", *map(str, argv)]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err
