"""Results as analyzers make them, small, for the tests of figures, pages and ParaView files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynprobe.analyzers.core.contract import Contours, Declaration, Figure
from dynprobe.analyzers.core.result import FAILED, OK, Array, Piece, Result, Var, stack

CROSS_ENTROPY = {"n_classes": 10, "n_samples": 512, "measured_on": {"loss": "cross_entropy"}}

THIRTEEN = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, 700, 900, 1000)

Height = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def bowl(x: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
    """A loss that falls from 2.3 to 0.02 at the centre and rises to about 10 at the rim."""
    t = np.log1p(step) / np.log1p(1000)
    return 2.3 * (1 - t) + 0.02 * t + (0.5 + 4 * t) * (1.3 * x**2 + y**2 + 0.4 * x * y)


def declared(
    figure: Figure | None, returns: dict[str, Var] | None = None, name: str = "probe"
) -> Declaration:
    return Declaration(name, bowl, "A line about it", "", ("model",), "checkpoint", (), returns or {}, figure)


LANDSCAPE = declared(Contours(z="loss", x="x", y="y"), name="landscape")


def landscape(
    steps: Sequence[float] = (1000,),
    *,
    shape: tuple[int, int] = (21, 21),
    height: Height = bowl,
    test: bool = False,
    failed: Sequence[float] = (),
    runs: Sequence[str] = ("cnn",),
    attributes: dict[str, Any] | None = None,
) -> Result:
    """Surfaces over `shape` = (n_y, n_x) points."""
    y, x = np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1])
    pieces = []
    for run in runs:
        for step in steps:
            z = height(*np.meshgrid(x, y), step)
            arrays = {
                "x": Array(("x",), x, "1", "Along the first direction"),
                "y": Array(("y",), y, "1", "Along the second direction"),
                "loss": Array(("y", "x"), z, "nat", "Loss", "loss_stderr"),
                "loss_stderr": Array(("y", "x"), 0.05 * z, "nat", "Standard error over samples"),
                "accuracy": Array(("y", "x"), np.exp(-z), "", "Accuracy"),
            }
            if test:
                arrays["test_loss"] = Array(("y", "x"), 2 * z, "nat", "Test loss")
            pieces.append(_piece(run, step, arrays, step in failed))
    return stack("landscape", "checkpoint", pieces, CROSS_ENTROPY if attributes is None else attributes)


def cut(
    steps: Sequence[float] = (1000,),
    *,
    n: int = 21,
    height: Height = bowl,
    extra: dict[str, Array] | None = None,
    attributes: dict[str, Any] | None = None,
    x: np.ndarray | None = None,
) -> Result:
    """A landscape along one direction, with loss and accuracy."""
    places = np.linspace(-1, 1, n) if x is None else x
    pieces = []
    for step in steps:
        z = height(places, np.zeros_like(places), step)
        arrays = {
            "x": Array(("x",), places, "1", "Along the first direction"),
            "loss": Array(("x",), z, "nat", "Loss", "loss_stderr"),
            "loss_stderr": Array(("x",), 0.05 * z, "nat", "Standard error over samples"),
            "accuracy": Array(("x",), np.exp(-z), "", "Accuracy"),
            **(extra or {}),
        }
        pieces.append(_piece("cnn", step, arrays, False))
    return stack("landscape", "checkpoint", pieces, CROSS_ENTROPY if attributes is None else attributes)


def series(
    steps: Sequence[float] = (0, 100, 200, 300, 400),
    *,
    runs: Sequence[str] = ("cnn",),
    failed: Sequence[float] = (),
    ranks: int = 3,
) -> Result:
    """A number, a few eigenvalues and a signed matrix for every step."""
    pieces = []
    for k, run in enumerate(runs):
        for step in steps:
            trace = 50 / (1 + step / 300) + 10 * k
            arrays = {
                "trace": Array((), np.array(trace), "loss", "Trace", "trace_stderr"),
                "trace_stderr": Array((), np.array(2.0), "loss", "Standard error of the trace"),
                "half": Array((), np.array(trace / 2), "loss", "Half of it"),
                "count": Array((), np.array(7), "", "A count"),
                "eigenvalue": Array(("rank",), trace / (1.0 + np.arange(ranks)), "loss", "Eigenvalue"),
                "rank": Array(("rank",), np.arange(ranks)),
                "layer": Array(("layer",), np.array(["conv1", "fc"], dtype=object)),
                "alignment": Array(("layer", "rank"), np.linspace(-1, 2, 2 * ranks).reshape(2, ranks)),
            }
            pieces.append(_piece(run, step, arrays, step in failed))
    return stack("hessian", "checkpoint", pieces, {"n_samples": 64})


def _piece(run: str, step: float, arrays: dict[str, Array], failed: bool) -> Piece:
    index = {"run": run, "step": step, "path": f"{run}/step_{step}.pt"}
    if failed:
        return Piece(f"{run}{step}", index, {}, FAILED, "NaN in 'conv1.weight' & <more>")
    return Piece(f"{run}{step}", index, arrays, OK, "", 1.5, {"forwards": 9})


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(t.get_text() for t in figure.findobj(Text)).replace("\\$", "$")


def panels(figure: Any) -> list[Any]:
    return [a for a in figure.axes if a.get_label() != "<colorbar>"]


def titles(figure: Any) -> list[str]:
    return [a.get_title(loc="left") for a in panels(figure)]


def legend(figure: Any) -> list[str]:
    return [t.get_text() for box in figure.legends for t in box.get_texts()]


def footnote(figure: Any) -> str:
    return " ".join(figure.texts[-1].get_text().split())


def contour_levels(axes: Any) -> list[float]:
    from matplotlib.contour import QuadContourSet

    return sorted({float(v) for c in axes.collections if isinstance(c, QuadContourSet) for v in c.levels})
