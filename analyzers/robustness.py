"""Adversarial robustness beside curvature, with checks for gradient masking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch

from dynprobe.analyzers import Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._masking import Probe
from dynprobe.analyzers._robustness import BASELINE, FRACTIONS, KINDS, Campaign, Effort, Outcome
from dynprobe.analyzers._robustness_figure import draw_robustness
from dynprobe.analyzers._robustness_report import Eigenvalue, Report, largest_eigenvalue
from dynprobe.analyzers._sampling import Floats, Meter, check_seed, chosen_metrics
from dynprobe.analyzers.numerics.losses import as_loss
from dynprobe.analyzers.numerics.params import frozen_eval

DAMPING, CG_ITERATIONS, PGD_STEPS = 0.01, 20, 20
HVPS = 30  # Lanczos products for one eigenvalue, typically

PER_SIZE = ("attack", "level")
ATTACK = ("attack",)
CURVATURE = "loss per squared parameter"
INPUT = "input units"
SLOPE = "loss per input unit"

RETURNS = {
    "attack": Var(ATTACK, "", "Attack"),
    "epsilon": Var(PER_SIZE, INPUT, "Size of the perturbation, in the attack's own norm"),
    "accuracy": Var(PER_SIZE, "", "Accuracy under attack", optional=True),
    "accuracy_low": Var(PER_SIZE, "", "Wilson 95 % interval, lower end", optional=True),
    "accuracy_high": Var(PER_SIZE, "", "Wilson 95 % interval, upper end", optional=True),
    "loss": Var(PER_SIZE, "", "Loss under attack", "loss_stderr"),
    "loss_stderr": Var(PER_SIZE, "", "Standard error over samples"),
    "clean_accuracy": Var((), "", "Accuracy without attack", optional=True),
    "clean_accuracy_low": Var((), "", "Wilson 95 % interval, lower end", optional=True),
    "clean_accuracy_high": Var((), "", "Wilson 95 % interval, upper end", optional=True),
    "clean_loss": Var((), "", "Loss without attack", "clean_loss_stderr"),
    "clean_loss_stderr": Var((), "", "Standard error over samples"),
    "robust_radius": Var(ATTACK, INPUT, "Size at which accuracy falls to half the clean one", optional=True),
    "robust_radius_low": Var(ATTACK, INPUT, "Largest size surely before the fall", optional=True),
    "robust_radius_high": Var(ATTACK, INPUT, "Smallest size surely after the fall", optional=True),
    "input_gradient_norm": Var((), SLOPE, "Mean ‖∇_x ℓ‖₂", "input_gradient_norm_stderr"),
    "input_gradient_norm_stderr": Var((), SLOPE, "Standard error over samples"),
    "input_gradient_l1": Var((), SLOPE, "Mean ‖∇_x ℓ‖₁", "input_gradient_l1_stderr"),
    "input_gradient_l1_stderr": Var((), SLOPE, "Standard error over samples"),
    "zero_gradient_share": Var((), "", "Share of samples without an input gradient"),
    "lambda_max": Var((), CURVATURE, "Largest Hessian eigenvalue (weights)", "lambda_max_residual", True),
    "lambda_max_residual": Var((), CURVATURE, "‖Hv − λmax v‖", optional=True),
    "check": Var(("check",), "", "Check for gradient masking"),
    "check_passed": Var(("check",), "", "1 passed, 0 failed, NaN not applicable"),
    "masking_warnings": Var((), "", "Failed checks for gradient masking"),
    "longer_epsilon": Var(ATTACK, INPUT, "Size at which twice the steps were tried", optional=True),
    "longer_accuracy": Var(ATTACK, "", "Accuracy there with twice the steps", optional=True),
    "longer_loss": Var(ATTACK, "", "Loss there with twice the steps", optional=True),
    "unbounded_accuracy": Var(ATTACK, "", "Accuracy with the whole range within reach", optional=True),
    "input_curvature": Var(
        (), "loss per squared input unit", "Mean largest eigenvalue of H_x", "input_curvature_stderr", True
    ),
    "input_curvature_stderr": Var(
        (), "loss per squared input unit", "Standard error over samples", optional=True
    ),
    "newton_residual": Var((), "", "Mean ‖(H_x + μ)s − g‖/‖g‖", optional=True),
    "newton_residual_max": Var((), "", "Largest ‖(H_x + μ)s − g‖/‖g‖", optional=True),
    "newton_truncated_share": Var((), "", "Share of samples of non-positive curvature", optional=True),
    "clip_low": Var((), INPUT, "Inputs are clipped from here", optional=True),
    "clip_high": Var((), INPUT, "to here", optional=True),
    "attacked_samples": Var((), "", "Samples attacked"),
}

TABLE = (
    "clean_accuracy",
    "clean_loss",
    "robust_radius",
    "input_gradient_norm",
    "lambda_max",
    "masking_warnings",
)


def _names(attacks: str) -> list[str]:
    """The attacks asked for, in order, and the noise of each norm they use.

    Raises:
        OptionError: A name is not known, or none is given.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in attacks.split(",") if name.strip()))
    offered = [name for name in KINDS if KINDS[name].source != "noise"]
    unknown = [name for name in names if name not in offered]
    if unknown or not names:
        what = f"attacks: {unknown[0]!r} is not known." if unknown else "attacks names none."
        raise OptionError(what, f"Attacks: {', '.join(offered)}; noise of the same size is always added.")
    return names + [BASELINE[n] for n in BASELINE if any(KINDS[name].norm == n for name in names)]


def _sizes(option: str, text: str) -> list[float] | None:
    """Sizes as typed, None for auto.

    Raises:
        OptionError: They are no positive numbers.
    """
    if text.strip().lower() == "auto":
        return None
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(0 <= size < math.inf for size in sizes) or not any(sizes):
        raise OptionError(
            f"{option} {text!r} is no list of sizes.", "Give positive numbers, as 0.01,0.03,0.1, or auto."
        )
    return sizes


def _range(text: str) -> str | tuple[float, float]:
    """`auto`, `none` or the two ends of the range to clip to.

    Raises:
        OptionError: It is none of these.
    """
    word = text.strip().lower()
    if word in ("auto", "none"):
        return word
    try:
        low, high = (float(part) for part in word.split(":"))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise OptionError(f"clip {text!r} is no range.", "Give auto, none, or LOW:HIGH, as 0:1.")
    return low, high


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    del n_checkpoints
    names = _names(str(options.get("attacks", "fgsm,pgd-linf,pgd-l2")))
    steps, restarts = int(options.get("pgd_steps", PGD_STEPS)), int(options.get("restarts", 1))
    cost = {"forwards": 0, "gradients": 1, "hvps": HVPS if options.get("curvature", True) else 0}
    for name in names:
        option = "epsilons" if KINDS[name].norm == "linf" else "epsilons_l2"
        n_sizes = len([s for s in _sizes(option, str(options.get(option, "auto"))) or FRACTIONS if s])
        if KINDS[name].source == "steps":
            cost["gradients"] += (n_sizes + 3) * steps * restarts  # once unbounded, once twice the steps
            cost["forwards"] += (n_sizes + 2) * restarts
        else:
            cost["forwards"] += n_sizes
    if any(KINDS[name].source == "newton" for name in names):
        cost |= {"input_hvps": int(options.get("cg_iterations", CG_ITERATIONS)) + 1}
    return cost


def _skips(options: Mapping[str, Any]) -> Sequence[str]:
    if not options.get("test", False):
        return ["test_batches"]
    return [] if options.get("curvature", True) else ["batches"]


@analyzer(returns=RETURNS, figure=draw_robustness, cost=_cost, table=TABLE, skips=_skips)
def robustness(
    model: torch.nn.Module,
    batches: Any,
    loss: Any,
    test_batches: Any = None,
    partial: Any = None,
    progress: Any = None,
    *,
    attacks: str = "fgsm,pgd-linf,pgd-l2",
    epsilons: str = "auto",
    epsilons_l2: str = "auto",
    clip: str = "auto",
    pgd_steps: Annotated[int, Range(min=1)] = PGD_STEPS,
    restarts: Annotated[int, Range(min=1)] = 1,
    damping: Annotated[float, Range(min=0)] = DAMPING,
    cg_iterations: Annotated[int, Range(min=1)] = CG_ITERATIONS,
    test: bool = False,
    curvature: bool = True,
    seed: int = 0,
) -> Measurement:
    """Accuracy and loss under attacks on the inputs, beside the largest Hessian eigenvalue.

    An attack moves every input by at most ε, in the largest entry (L∞) or in length (L2), and clips it to the
    range of the data. What it leaves of the accuracy is an upper bound on robustness, never a certificate.
    Noise of the same size stands beside it, and six checks say whether the gradients that the attacks follow
    can be trusted; if one fails the status is "not converged: possible gradient masking".

    Cost: `pgd_steps` gradients over the data per size of a PGD attack, one forward pass per size of any
    other, and some 30 Hessian-vector products for λ_max.

    Args:
        model: The network; found unchanged afterwards, which is checked.
        batches: Pairs (inputs, targets), re-iterable, with one floating-point input.
        loss: The loss, or a callable such as `F.cross_entropy`.
        test_batches: Test data, for `test`.
        partial: Where finished attacks are kept.
        progress: Called with (done, total, what).
        attacks: Comma-separated: fgsm, pgd-linf and fhsm bound the largest entry, l2grad, pgd-l2 and l2hess
            the length; fhsm and l2hess follow H⁻¹∇ℓ.
        epsilons: Sizes for L∞, in units of the inputs, as 0.01,0.1; auto takes 0.002 to 0.2 of their range.
        epsilons_l2: Sizes for L2; auto takes the same shares of the range times √d.
        clip: auto clips to the smallest and largest entry of the inputs; none; or LOW:HIGH.
        pgd_steps: Gradient steps of PGD, of size 2.5 ε / steps.
        restarts: Random starts of PGD; the worst counts.
        damping: Of fhsm and l2hess, relative to the curvature along the gradient.
        cg_iterations: Conjugate gradient steps of fhsm and l2hess.
        test: Attack the test data instead; the curvature stays that of the training loss.
        curvature: Compute the largest eigenvalue of the loss Hessian with respect to the weights.
        seed: Of random starts, noise and Lanczos vectors.

    Returns:
        Accuracy and loss for every attack and size with their errors; see the report's long names.

    Raises:
        OptionError: If the options contradict each other or the data, or the inputs are not floating-point.

    References:
        Yao, Gholami, Lei, Keutzer and Mahoney, "Hessian-based Analysis of Large Batch Training and Robustness
        to Adversaries", NeurIPS 2018.
        Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
        Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to Adversarial
        Attacks", ICLR 2018.
        Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018.
        Carlini et al., "On Evaluating Adversarial Robustness", arXiv:1902.06705 (2019).
    """
    check_seed(seed)
    names = _names(attacks)
    wanted = {"linf": _sizes("epsilons", epsilons), "l2": _sizes("epsilons-l2", epsilons_l2)}
    _check_effect(names, wanted, pgd_steps, restarts, damping, cg_iterations)
    box = _range(clip)
    if test and test_batches is None:
        raise OptionError("there are no test data.", "Name them with --test-data, or leave --test out.")
    attacked = test_batches if test else batches
    loss = as_loss(loss)
    with frozen_eval(model):
        classifies = "accuracy" in chosen_metrics("auto", attacked, loss, model)
        campaign = Campaign(
            model,
            attacked,
            loss,
            classifies=classifies,
            clip=box,
            effort=Effort(pgd_steps, restarts, damping, cg_iterations),
            seed=seed,
        )
        grids = {name: campaign.levels(KINDS[name].norm, wanted[KINDS[name].norm]) for name in names}
        eigenvalue = largest_eigenvalue(model, batches, loss, seed) if curvature else Eigenvalue()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        iterated = sum(len(grids[n]) + 3 for n in names if KINDS[n].source == "steps")
        meter = Meter(progress, sum(len(grid) for grid in grids.values()) + iterated * pgd_steps * restarts)
        outcomes = {name: _attack(campaign, name, grids[name], partial, meter) for name in names}
        probes, left = _probe(campaign, outcomes, grids, meter)
    report = Report(campaign, outcomes, grids, eigenvalue)
    report.add_probes(probes, left)
    report.judge(probes, left)
    return report.measurement()


def _check_effect(
    names: list[str],
    wanted: Mapping[str, list[float] | None],
    pgd_steps: int,
    restarts: int,
    damping: float,
    cg_iterations: int,
) -> None:
    """No option is accepted and ignored."""
    if not damping < math.inf:
        raise OptionError(f"damping {damping:g} is not finite.", "0.01 is one percent of the curvature.")
    kinds = [KINDS[name] for name in names]
    for option, given, used, by in (
        ("epsilons", wanted["linf"] is not None, any(k.norm == "linf" for k in kinds), "fgsm or pgd-linf"),
        ("epsilons-l2", wanted["l2"] is not None, any(k.norm == "l2" for k in kinds), "l2grad or pgd-l2"),
        ("pgd-steps", pgd_steps != PGD_STEPS, any(k.source == "steps" for k in kinds), "pgd-linf or pgd-l2"),
        ("restarts", restarts != 1, any(k.source == "steps" for k in kinds), "pgd-linf or pgd-l2"),
        ("damping", damping != DAMPING, any(k.source == "newton" for k in kinds), "fhsm or l2hess"),
        (
            "cg-iterations",
            cg_iterations != CG_ITERATIONS,
            any(k.source == "newton" for k in kinds),
            "fhsm or l2hess",
        ),
    ):
        if given and not used:
            raise OptionError(
                f"{option} would have no effect: no attack uses it.",
                f"Add {by} to --attacks, or leave it out.",
            )


def _attack(campaign: Campaign, name: str, levels: Floats, partial: Any, meter: Meter) -> Outcome:
    """One attack at all its sizes; finished ones with steps come from the store of parts."""
    keep = partial is not None and KINDS[name].source == "steps"
    stored = partial.get(name) if keep else None
    if stored is not None:
        meter.add(len(levels), name)
        return Outcome(np.asarray(stored["loss"]), stored.get("accuracy"))
    outcome = campaign.attack(name, levels, meter)
    if keep:
        part = {"loss": outcome.loss} | ({} if outcome.accuracy is None else {"accuracy": outcome.accuracy})
        partial.put(name, part)
    return outcome


def _probe(
    campaign: Campaign, outcomes: Mapping[str, Outcome], grids: Mapping[str, Floats], meter: Meter
) -> tuple[list[Probe], dict[str, Floats]]:
    """PGD with twice the steps where it has taken half the accuracy, and with everything within reach."""
    probes, left = [], {}
    for name in (n for n in outcomes if KINDS[n].source == "steps"):
        outcome = outcomes[name]
        level = len(grids[name]) // 2
        if outcome.accuracy is not None:
            mean = outcome.accuracy.mean(1)
            level = 1 + int(np.abs(mean[1:] - mean[0] / 2).argmin())
        size = grids[name][level : level + 1]
        longer = campaign.attack(name, size, meter, steps=2 * campaign.effort.steps)
        probes.append(Probe(name, float(size[0]), outcome.score[level], longer.score[0], longer))
        if outcome.accuracy is not None:
            left[name] = _left_within_reach(campaign, name, outcome, meter)
    return probes, left


def _left_within_reach(campaign: Campaign, name: str, outcome: Outcome, meter: Meter) -> Floats:
    """What PGD leaves of each sample with every point of the range within reach; NaN without a range."""
    reach = campaign.whole_range(KINDS[name].norm)
    if math.isnan(reach):
        return np.full(campaign.n_samples, math.nan)
    found = campaign.attack(name, np.array([reach]), meter).score
    # What a smaller ball reached is within reach too.
    return np.asarray(np.minimum(found[0], outcome.score.min(0)))
