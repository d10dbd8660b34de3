"""Embedding principle: split a neuron of a checkpoint, and see what becomes of its critical point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from torch import nn

from dynprobe.analyzers import Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._embedding_dropout import dropout
from dynprobe.analyzers._embedding_figure import draw_embedding
from dynprobe.analyzers._embedding_parts import NULL_KINDS, SAME, Chain, Widening
from dynprobe.analyzers._embedding_scale import loss_scale
from dynprobe.analyzers._sampling import check_repeatable, check_seed, subset_note
from dynprobe.analyzers.numerics.losses import as_loss
from dynprobe.analyzers.numerics.params import frozen_eval

GRADIENT = "loss per parameter"
CURVATURE = "loss per squared parameter"
HALF = 0.5
SOFT = 10.0
"""A count of zeros is said to be soft where an eigenvalue lies within this factor above the tolerance."""


def _each(what: str, units: str = "", error: str = "", *, optional: bool = False) -> Var:
    return Var(("added",), units, what, error, optional)


def _at_split(what: str, units: str = "") -> Var:
    return Var(("split",), units, what)


def _one(what: str, units: str = "", error: str = "", *, optional: bool = False) -> Var:
    return Var((), units, what, error, optional)


RETURNS = {
    "added": _each("Neurons added"),
    "split": _at_split("Step"),
    "neuron": _at_split("Neuron that was split at this step"),
    "n_parameters": _each("Parameters"),
    "loss": _each("Loss", "", "loss_stderr"),
    "loss_stderr": _each("Standard error over samples"),
    "output_difference": _one("Largest difference of an output from that of the narrow network"),
    "output_relative_difference": _one("The same over the largest output"),
    "gradient_norm": _each("Norm of the gradient", GRADIENT),
    "gradient_residual": _at_split(
        "Distance of the gradient from what the chain rule predicts of a split", GRADIENT
    ),
    "gradient_threshold": _one("Norm of the gradient up to which a point is called critical", GRADIENT),
    "loss_scale": _one("Least loss of outputs that are the same for every sample"),
    "critical": _each("1 where the gradient is within the threshold"),
    "verdict": _one("Whether the checkpoint is a critical point and the wider network still is"),
    "negative": _each("Negative eigenvalues of the Hessian; where a bound, at least so many", optional=True),
    "negative_is_bound": _each("1 where there may be more negative ones", optional=True),
    "zero": _each("Eigenvalues within the tolerance", optional=True),
    "positive": _each("Positive eigenvalues", optional=True),
    "zero_tolerance": _each("Magnitude up to which an eigenvalue is zero", CURVATURE, optional=True),
    "smallest": _each("Smallest eigenvalue", CURVATURE, "smallest_error", optional=True),
    "smallest_error": _each("Bound on its error", CURVATURE, optional=True),
    "smallest_nonzero": _each("Least magnitude above the tolerance", CURVATURE, optional=True),
    "added_negative": _at_split("Negative eigenvalues that the split adds"),
    "added_zero": _at_split("Zero eigenvalues that the split adds"),
    "added_positive": _at_split("Positive eigenvalues that the split adds"),
    "block_eigenvalue": Var(
        ("split", "block_rank"), CURVATURE, "Eigenvalue of the block that the split adds", optional=True
    ),
    "predicted_negative": _each("Negative eigenvalues: those of the checkpoint and those added"),
    "predicted_zero": _each("Zero eigenvalues: those of the checkpoint and those added"),
    "predicted_positive": _each("Positive eigenvalues: those of the checkpoint and those added"),
    "eigenvalue": Var(("added", "rank"), CURVATURE, "Eigenvalue, ascending", optional=True),
    "dropout_term": _one(
        "R₁: what dropout before the last layer adds to the loss", "", "dropout_term_stderr"
    ),
    "dropout_term_stderr": _one("Standard error over samples"),
    "dropout_gap": _one("The same by Monte Carlo", "", "dropout_gap_stderr"),
    "dropout_gap_stderr": _one("Standard error over draws, for these samples"),
}

TABLE = (
    "verdict",
    "output_relative_difference",
    "gradient_norm",
    "negative",
    "negative_is_bound",
    "zero",
    "added_negative",
    "added_zero",
    "dropout_term",
    "dropout_gap",
)

Kind = Literal["one-step", "multi-step", "null", "null-zero"]


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    """For a network of some 2,000 parameters; a larger one takes as many products as it has, or Lanczos."""
    del n_checkpoints
    networks = 1 + _count(str(options.get("kind", "one-step")), int(options.get("splits", 0)))
    lanczos = 30 * bool(options.get("smallest", 1))
    products = min(int(options.get("max_dense", 1000)), 1000) or lanczos
    return {"forwards": 3 * networks + 1, "hvps": products * networks}


@analyzer(returns=RETURNS, figure=draw_embedding, table=TABLE, cost=_cost)
def embedding(
    model: nn.Module,
    batches: Any,
    loss: Any,
    progress: Any = None,
    *,
    kind: Kind = "one-step",
    layer: str = "",
    neuron: Annotated[int, Range(min=-1)] = -1,
    alpha: float = HALF,
    splits: Annotated[int, Range(min=0)] = 0,
    gradient_tol: Annotated[float, Range(min=0)] = 1e-6,
    zero_tol: Annotated[float, Range(min=0)] = 1e-10,
    max_dense: Annotated[int, Range(min=0)] = 1000,
    smallest: Annotated[int, Range(min=0)] = 1,
    keep: Annotated[float, Range(min=0, max=1)] = 0.9,
    draws: Annotated[int, Range(min=0)] = 100,
    seed: int = 0,
) -> Measurement:
    """Embedding principle: split a neuron of a checkpoint, and see what becomes of its critical point.

    A neuron with incoming weights w and outgoing ones a becomes two, (w, (1 − α)a) and (w, αa): a wider
    network that computes the same function. Where the gradient of the narrow network is zero, so is that of
    the wide one, and the Hessian gains at least one zero eigenvalue, often negative ones too: a minimum can
    become a saddle point. Everything is done in float64 on a copy. A checkpoint is called critical only if
    the norm of its gradient is within a stated tolerance, and a network in training hardly ever is.

    Cost: a gradient and, for every parameter, a Hessian-vector product per network up to `max_dense`
    parameters, above some 30 products for the smallest eigenvalue; and, for every weight into and out of the
    neuron, a product with the Hessian of the two layers. Convolutions are slow in float64.

    Args:
        model: The network; found unchanged afterwards, which is checked.
        batches: Pairs (inputs, targets), re-iterable.
        loss: The loss.
        progress: Called with (done, total, what).
        kind: one-step splits one neuron; multi-step splits again and again, each time any of the neurons
            there are; null adds neurons with random incoming weights that nothing reads; null-zero with
            incoming weights of zero.
        layer: The layer whose neuron is split: linear or a convolution, followed by one that reads it. Empty
            for the last one that can be split.
        neuron: Its output unit or channel, from 0; -1 draws one.
        alpha: The part of the outgoing weights that the copy takes; may lie outside 0 and 1.
        splits: Neurons to add; 0 for 1, with multi-step for 2.
        gradient_tol: Norm of the gradient, over the loss scale, up to which a point is called critical.
        zero_tol: Magnitude of an eigenvalue, over the largest, up to which it counts as zero.
        max_dense: Up to how many parameters all eigenvalues are computed; also how many weights into and out
            of a neuron the block of a split may have. 0 for neither.
        smallest: For more parameters, how many of the smallest eigenvalues Lanczos looks for; 0 for none.
        keep: p of the dropout regulariser: the probability that a feature is *kept* (torch's Dropout takes
            1 − p).
        draws: Random masks per sample that check it; 0 for none.
        seed: Of the neurons, weights and masks that are drawn, and of Lanczos.

    Returns:
        Loss, gradient and numbers of eigenvalues, narrow network first; see the report's long names.

    Raises:
        OptionError: If the options contradict each other, or no wider network computes the same.

    References:
        Zhang, Zhang, Luo and Xu, "Embedding Principle of Loss Landscape of Deep Neural Networks", NeurIPS
        2021, theorems 1 and 2.
        Zhang, Li, Zhang, Luo and Xu, "Embedding Principle: a hierarchical structure of loss landscape of deep
        neural networks", Journal of Machine Learning 1 (2022).
        Zhang and Xu, "Implicit Regularization of Dropout", IEEE TPAMI 2024.
    """
    check_seed(seed)
    _check_options(kind, neuron, alpha, splits, keep, draws)
    own = as_loss(loss)
    with frozen_eval(model):
        check_repeatable(model, batches)
        widening = Widening(kind, layer, neuron, alpha, _count(kind, splits), seed)
        chain = Chain(model, batches, own, widening, max_dense, smallest, zero_tol, progress)
        values = chain.measure()
        found, notes, reasons = dropout(chain.narrow, chain.data, chain.few, own, keep, draws, seed)
        values |= found
        chain.notes += notes
        chain.reasons += reasons
        scale = loss_scale(chain.narrow, chain.data, own, float(values["loss"][0]))
        chain.spent["forwards"] += 1
    for name in ("output_difference", "output_relative_difference"):
        values[name] = float(np.max(values[name]))
    threshold = gradient_tol * scale
    values |= {
        "added": np.arange(widening.count + 1),
        "split": np.arange(1, widening.count + 1),
        "loss_scale": scale,
        "gradient_threshold": threshold,
        "critical": (values["gradient_norm"] <= threshold).astype(int),
        "verdict": _verdict(values["gradient_norm"], threshold, kind),
    }
    if values["output_relative_difference"] > SAME:
        chain.reasons.append(
            f"outputs of the wider network differ by {values['output_relative_difference']:.1e}, relatively"
        )
    return Measurement(
        values,
        converged=not chain.reasons,
        reason="; ".join(dict.fromkeys(chain.reasons)),
        spent=chain.spent,
        notes=[*subset_note(batches), *_notes(chain, values), *dict.fromkeys(chain.notes)],
    )


def _count(kind: str, splits: int) -> int:
    return splits or (2 if kind == "multi-step" else 1)


def _check_options(kind: str, neuron: int, alpha: float, splits: int, keep: float, draws: int) -> None:
    if kind == "one-step" and splits > 1:
        raise OptionError(f"a one-step embedding adds one neuron, not {splits}.", "Give --kind multi-step.")
    if kind in NULL_KINDS and (neuron >= 0 or alpha != HALF):
        raise OptionError(
            "a null embedding splits no neuron: --neuron and --alpha have no meaning there.",
            "Leave them out, or give --kind one-step.",
        )
    if not math.isfinite(alpha):
        raise OptionError(f"alpha {alpha} is no number to multiply weights with.", "Give, say, --alpha 0.3.")
    if keep == 0:
        raise OptionError("with --keep 0 no feature is ever kept.", "Give a probability above 0.")
    if draws == 1:
        raise OptionError("one draw has no standard error.", "Give --draws 2 or more, or 0 for none.")


def _verdict(gradient: Any, threshold: float, kind: str) -> str:
    within = gradient <= threshold
    if not within[0]:
        return "not critical"
    if within.all():
        return "critical, kept"
    # A split multiplies parts of the gradient, so that a norm near the threshold can pass it by that alone.
    return "critical, lost" if kind in NULL_KINDS else "undecided"


def _notes(chain: Chain, values: Mapping[str, Any]) -> list[str]:
    kind, hidden, gradient = chain.widening.kind, chain.hidden, values["gradient_norm"]
    first = values["neuron"][0]
    what = "" if first != first else f", neuron {first:.0f} first"
    notes = [
        f"layer {hidden.name!r} of {hidden.width} neurons, read by {hidden.reader!r}{what}",
        f"gradient norm {gradient[0]:.3g} against a threshold of {values['gradient_threshold']:.3g} "
        f"(tolerance times loss scale {values['loss_scale']:.3g})",
    ]
    if kind in NULL_KINDS:
        notes.append("what a null neuron adds to the eigenvalues is not predicted: its block is not separate")
    if "negative_is_bound" in values and values["negative_is_bound"].any():
        notes.append(
            f"for over {chain.max_dense:,} parameters the numbers of negative eigenvalues are lower bounds, "
            "by Lanczos and by what the splits add, and those of zeros are not known; what a split adds does "
            "not depend on that"
        )
    close = np.divide(values.get("smallest_nonzero", math.nan), values.get("zero_tolerance", 1.0))
    if np.any(close < SOFT):
        notes.append("the number of zero eigenvalues is soft: one lies within ten times the tolerance")
    if "zero" in values:
        pairs = [(values[n], values[f"predicted_{n}"]) for n in ("negative", "zero")]
        if any(bool((a != b)[np.isfinite(a) & np.isfinite(b)].any()) for a, b in pairs):
            notes.append("the counted eigenvalues are not those predicted: some are near the tolerance")
    return notes
