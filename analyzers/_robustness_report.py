"""Puts together what robustness returns: values, the evidence for them, and what the reader should know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dynprobe.analyzers import Measurement
from dynprobe.analyzers._curvature import Problem
from dynprobe.analyzers._masking import (
    CHECKS,
    Probe,
    Verdict,
    check_gradients,
    check_pairs,
    check_rise,
    check_steps,
    check_unbounded,
)
from dynprobe.analyzers._robustness import Campaign, Outcome, half_radius, stderr, table_of
from dynprobe.analyzers._sampling import Floats
from dynprobe.analyzers.numerics.attacks import wilson
from dynprobe.analyzers.numerics.losses import Loss
from dynprobe.analyzers.numerics.model_function import NoSecondDerivative


class Eigenvalue:
    """λ_max of the weights' Hessian, empty where it was not asked for."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.problem = ""
        self.notes: list[str] = []
        self.hvps = 0


def largest_eigenvalue(model: torch.nn.Module, batches: Any, loss: Loss, seed: int) -> Eigenvalue:
    """Largest eigenvalue of the Hessian of the mean loss with respect to the weights, by Lanczos."""
    found = Eigenvalue()
    try:
        problem = Problem(model, loss)
        pairs = problem.eigenpairs(problem.operator(list(batches)), 1, seed=seed)
    except NoSecondDerivative as error:
        found.values = {"lambda_max": math.nan, "lambda_max_residual": math.nan}
        found.notes.append(f"lambda_max is missing: {error}")
        return found
    found.values = {
        "lambda_max": float(pairs.eigenvalue[0]),
        "lambda_max_residual": float(pairs.residual[0]),
    }
    found.hvps = pairs.n_matvec
    if not pairs.converged.all():
        found.problem = (
            f"lambda_max missed its tolerance after {pairs.n_matvec} products "
            f"(residual {found.values['lambda_max_residual']:.2g})"
        )
    return found


class Report:
    """Collects what is returned, with the evidence and the notes."""

    def __init__(
        self,
        campaign: Campaign,
        outcomes: dict[str, Outcome],
        grids: dict[str, Floats],
        eigenvalue: Eigenvalue,
    ) -> None:
        self.campaign, self.outcomes, self.grids, self.eigenvalue = campaign, outcomes, grids, eigenvalue
        self.values: dict[str, Any] = {"attack": np.array(list(outcomes)), **table_of(outcomes, grids)}
        self.values |= eigenvalue.values
        self.notes = list(eigenvalue.notes)
        self.problems = [eigenvalue.problem] if eigenvalue.problem else []
        self._add_clean()
        self._add_gradients()
        if campaign.newton_evidence:
            self._add_newton()

    def _add_clean(self) -> None:
        campaign, clean = self.campaign, self.campaign.clean
        n = campaign.n_samples
        self.values |= {
            "clean_loss": float(clean.loss.mean()),
            "clean_loss_stderr": float(stderr(clean.loss[0])),
            "attacked_samples": n,
        }
        if math.isfinite(campaign.box.low):
            self.values |= {"clip_low": campaign.box.low, "clip_high": campaign.box.high}
        if lost := int(np.isnan(clean.loss[0]).sum()):
            self.notes.append(
                f"{lost} of {n} samples have no loss (NaN), as where a target is ignored: so has no mean"
            )
        if clean.accuracy is None:
            self.notes.append("the targets are no classes: there is a loss under attack, but no accuracy")
            return
        accuracy = float(clean.accuracy.mean())
        low, high = wilson(np.array(accuracy), n)
        self.values |= {
            "clean_accuracy": accuracy,
            "clean_accuracy_low": float(low),
            "clean_accuracy_high": float(high),
        }
        radii = [
            half_radius(self.grids[name], self.values["accuracy"][i, : len(self.grids[name])], accuracy, n)
            for i, name in enumerate(self.outcomes)
        ]
        for column, name in enumerate(("robust_radius", "robust_radius_low", "robust_radius_high")):
            self.values[name] = np.array([radius[column] for radius in radii])
        missing = [n for n, radius in zip(self.outcomes, radii, strict=True) if math.isnan(radius.value)]
        if missing:
            self.notes.append(
                f"robust_radius is missing for {', '.join(missing)}: at no size does accuracy fall to half"
            )

    def _add_gradients(self) -> None:
        for name, order in (("input_gradient_norm", 2), ("input_gradient_l1", 1)):
            sample_norms = self.campaign.gradient_norms(order)
            self.values[name] = float(sample_norms.mean())
            self.values[f"{name}_stderr"] = float(stderr(sample_norms))
        self.values["zero_gradient_share"] = float(self.campaign.without_gradient().mean())

    def _add_newton(self) -> None:
        evidence = self.campaign.newton_evidence
        curvature = evidence["eigenvalue"][np.isfinite(evidence["eigenvalue"])]
        residual = evidence["residual"][np.isfinite(evidence["residual"])]
        self.values |= {
            "input_curvature": float(curvature.mean()) if curvature.size else math.nan,
            "input_curvature_stderr": float(stderr(curvature)) if curvature.size else math.nan,
            "newton_residual": float(residual.mean()) if residual.size else math.nan,
            "newton_residual_max": float(residual.max()) if residual.size else math.nan,
            "newton_truncated_share": float(evidence["truncated"].mean()),
        }
        n = self.campaign.n_samples
        if curvature.size < n:
            self.notes.append(f"input_curvature is over the {curvature.size} of {n} samples that have one")

    def add_probes(self, probes: Sequence[Probe], left: Mapping[str, Floats]) -> None:
        """Numbers behind the checks on steps and reach."""
        if not probes:
            return
        of = {probe.attack: probe for probe in probes}
        nothing = math.nan

        def column(value: Any) -> Floats:
            return np.array([value(name) if name in of else nothing for name in self.outcomes])

        self.values["longer_epsilon"] = column(lambda name: of[name].epsilon)
        self.values["longer_loss"] = column(lambda name: of[name].outcome.loss.mean())
        if left:
            self.values["longer_accuracy"] = column(lambda name: of[name].longer.mean())
            self.values["unbounded_accuracy"] = column(lambda name: left[name].mean())

    def judge(self, probes: list[Probe], left: Mapping[str, Floats]) -> None:
        """Run the checks for gradient masking."""
        verdict, outcomes, grids = Verdict(), self.outcomes, self.grids
        n = self.campaign.n_samples
        check_gradients(verdict, self.values["zero_gradient_share"], n)
        check_rise(verdict, outcomes, grids)
        check_pairs(verdict, "noise-not-stronger", outcomes, grids, "noise", ("gradient", "steps"))
        check_pairs(verdict, "iterative-not-weaker", outcomes, grids, "gradient", ("steps",))
        check_steps(verdict, probes)
        classifies = self.campaign.clean.accuracy is not None
        accuracies = {name: float(values.mean()) for name, values in left.items()}
        check_unbounded(verdict, accuracies, n, classifies=classifies)
        self.values["check"] = np.array(CHECKS)
        self.values["check_passed"] = np.array([verdict.passed[name] for name in CHECKS])
        self.values["masking_warnings"] = len(verdict.sentences)
        self.notes += verdict.skipped
        if verdict.sentences:
            self.problems.insert(0, f"possible gradient masking: {'; '.join(verdict.sentences)}")
        self.problems += [probe.unfinished for probe in probes if probe.unfinished]

    def measurement(self) -> Measurement:
        """All of it, with what it cost."""
        spent = {**self.campaign.spent(), "hvps": self.eigenvalue.hvps}
        return Measurement(
            self.values,
            converged=not self.problems,
            reason="; ".join(self.problems),
            spent={name: count for name, count in spent.items() if count},
            notes=self.notes,
        )
