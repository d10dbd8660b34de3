"""Puts together what a landscape returns: values, the evidence for them, and what the reader should know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dynprobe.analyzers import Measurement
from dynprobe.analyzers._planes import Plane
from dynprobe.analyzers._sampling import Floats, Sampler, Table
from dynprobe.analyzers.numerics.grid import Refined, slice_curvature
from dynprobe.analyzers.numerics.surface import Surface


class Assembly:
    """Collects what a landscape returns, with the evidence and the notes."""

    def __init__(self, table: Table, planes: list[Plane], x: Floats, y: Floats, *, line: bool) -> None:
        self.values: dict[str, Any] = {**table, "x": x}
        if not line:
            self.values["y"] = y
        self.line = line
        self.notes = [note for plane in planes for note in plane.notes]
        self.problems = [plane.problem for plane in planes if plane.problem]
        self.spent: dict[str, int] = {}
        for name in planes[0].values:
            each = [plane.values[name] for plane in planes]
            self.values[name] = np.stack(each) if len(planes) > 1 else each[0]
        centre = (int(np.flatnonzero(x == 0)[0]),) if line else (len(y) // 2, len(x) // 2)
        for name in ("loss", "loss_stderr"):
            self.values[f"center_{name}"] = float(table[name][centre])

    def note_surface(self, samplers: Sequence[Sampler], batchnorm: str) -> None:
        """Says how many planes there were, what is not finite, and how fast the evaluation could go."""
        n_planes = len(samplers)
        if n_planes > 1:
            self.notes.append(
                f"mean of {n_planes} planes; loss_stderr is over samples, loss_spread over planes"
            )
        bad = int((~np.isfinite(self.values["loss"])).sum())
        if bad:
            self.notes.append(
                f"the loss is NaN or infinite at {bad} of {self.values['loss'].size} grid points"
            )
        if batchnorm == "recompute":
            self.notes.append("BatchNorm statistics re-estimated on the data at every point")
        self.notes += [note for s in samplers for note in s.surface.notes]

    def note_variances(self, model: nn.Module, plane: Plane, batchnorm: str) -> None:
        """Says where a path that goes on beyond its ends makes running variances negative, hence NaN."""
        if batchnorm == "recompute":
            return
        x = self.values["x"]
        bad = np.zeros(len(x), dtype=bool)
        for name, centre in model.named_buffers():
            if name.endswith("running_var"):
                step = plane.directions[0][name].double()
                bad |= [bool((centre.double() + a * step < 0).any()) for a in x.tolist()]
        if bad.any():
            self.notes.append(
                f"beyond the ends, running variances are negative at {int(bad.sum())} of {len(x)} points: "
                "the loss there is NaN; batchnorm recompute estimates them from the data"
            )

    def add_refinement(self, refined: Sequence[Refined], tol: float) -> None:
        """The mask of what was evaluated, and what held-out points say about the rest."""
        evaluated = np.all([r.evaluated for r in refined], axis=0)
        residuals = [r.heldout_residual for r in refined if np.isfinite(r.heldout_residual)]
        worst = max((r.heldout_residual for r in refined), key=lambda r: -1.0 if np.isnan(r) else r)
        kind = "of the value" if all(r.relative for r in refined) else "of the range"
        self.values["evaluated"] = (evaluated[0] if self.line else evaluated).astype(np.int8)
        self.values["heldout_residual"] = worst
        text = f"evaluated {int(evaluated.sum())} of {evaluated.size} grid points"
        self.notes.append(
            f"{text}; largest error at held-out points {worst:.2g} {kind}" if residuals else text
        )
        if worst > tol:
            self.problems.append(f"interpolation is off by {worst:.2g} at held-out points, more than {tol:g}")

    def add_barrier(self, far: Surface, prefixes: Sequence[str]) -> None:
        """Far end exactly as saved, and the barrier between the ends with its paired error."""
        x = self.values["x"]
        between = np.flatnonzero((x >= 0) & (x <= 1))
        start, end = between[0], between[-1]
        peaks = [int(between[np.argmax(self.values[f"{p}loss"][between])]) for p in prefixes]
        before = far.forwards
        row = far.row(0.0, [0.0, *(float(x[peak] - 1.0) for peak in peaks)])
        self.spent["forwards"] += round(far.forwards - before)
        for name in row:
            if name in self.values and not name.endswith("difference_stderr"):
                self.values[name][end] = row[name][0]
        for i, (prefix, peak) in enumerate(zip(prefixes, peaks, strict=True)):
            curve, error = self.values[f"{prefix}loss"], self.values[f"{prefix}loss_difference_stderr"]
            higher_end = np.maximum(curve[start], curve[end])
            from_far = row[f"{prefix}loss_difference_stderr"][1 + i]
            self.values[f"{prefix}barrier"] = np.maximum(curve[peak], higher_end) - higher_end
            self.values[f"{prefix}barrier_stderr"] = error[peak] if curve[start] >= curve[end] else from_far
            self.values[f"{prefix}barrier_at"] = x[peak] if np.isfinite(curve[between]).all() else np.nan

    def add_convexity(self, rows: Table, x: Floats, y: Floats, *, frozen: bool, n_planes: int) -> None:
        """The convexity map, and the curvature of the slice, which costs nothing."""
        for name in ("lambda_max", "lambda_min", "lambda_max_residual", "lambda_min_residual"):
            self.values[name] = self._flat(rows[name])
        with np.errstate(divide="ignore", invalid="ignore"):
            self.values["convexity"] = np.abs(self.values["lambda_min"] / self.values["lambda_max"])
        self.values["convexity_converged"] = self._flat(rows["converged"]).astype(np.int8)
        self.values["convexity_x"] = x
        if not self.line:
            self.values["convexity_y"] = y
        self.spent["hvps"] += int(rows["hvps"].sum())
        finite = np.isfinite(rows["lambda_max"])
        late = int((finite & (rows["converged"] == 0)).sum())
        if late:
            self.problems.append(
                f"Lanczos missed its tolerance at {late} of {finite.size} points of the convexity map"
            )
        if not finite.all():
            self.notes.append(f"no finite Hessian at {int((~finite).sum())} points of the convexity map")
        if not frozen:
            self.notes.append("the convexity map uses the checkpoint's own BatchNorm statistics")
        if n_planes > 1:
            self.notes.append("the convexity map is of the first plane")
        high, low = slice_curvature(self.values["loss"], self.values.get("y"), self.values["x"])
        self.values |= {"slice_curvature_max": high, "slice_curvature_min": low}

    def _flat(self, rows: NDArray[Any]) -> NDArray[Any]:
        return rows[0] if self.line else rows

    def measurement(self) -> Measurement:
        """What the analyzer returns."""
        if not self.spent["hvps"]:
            del self.spent["hvps"]
        return Measurement(
            self.values,
            converged=not self.problems,
            reason="; ".join(self.problems),
            spent=self.spent,
            notes=list(dict.fromkeys(self.notes)),
        )
