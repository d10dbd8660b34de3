"""How much of the top Hessian eigenspace two checkpoints share, along a run or between runs."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers import Lines, Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._curvature import GIGABYTE, Curvature, Problem
from dynprobe.analyzers._sampling import check_repeatable, check_seed, subset_note
from dynprobe.analyzers.numerics.evaluate import map_tensors
from dynprobe.analyzers.numerics.lanczos import Eigenpairs
from dynprobe.analyzers.numerics.losses import Loss, as_loss
from dynprobe.analyzers.numerics.params import frozen_eval

REMEMBERED = 2
"""Eigenspaces kept: of pairs in a row, (a, b) then (b, c), each has one checkpoint of the one before."""

_spaces: OrderedDict[Any, Eigenpairs] = OrderedDict()


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    del n_checkpoints
    return {"hvps": 3 * int(options.get("top_k", 5)) + 15}


@analyzer(
    returns={
        "overlap": Var((), "", "Mean squared cosine between the eigenspaces", "overlap_error"),
        "overlap_error": Var((), "", "Bound on its error from that of the eigenvectors"),
        "overlap_chance": Var((), "", "Overlap of two random spaces of that dimension"),
        "cosine": Var(("rank",), "", "Cosine of each principal angle, largest first"),
        "rank": Var(("rank",), "", "Rank"),
        "eigenvalue_a": Var(("rank",), "loss per squared parameter", "Eigenvalue at the first checkpoint"),
        "eigenvalue_b": Var(("rank",), "loss per squared parameter", "Eigenvalue at the second checkpoint"),
        "gap_a": Var((), "", "Eigenvalue after the last over the last, first checkpoint"),
        "gap_b": Var((), "", "Eigenvalue after the last over the last, second checkpoint"),
    },
    figure=Lines(y=("overlap", "overlap_chance")),
    table=("overlap", "overlap_chance", "gap_a", "gap_b"),
    cost=_cost,
)
def hessian_overlap(
    model_a: torch.nn.Module,
    model_b: torch.nn.Module,
    batches: Any,
    loss: Any,
    *,
    top_k: Annotated[int, Range(min=1)] = 5,
    tol: Annotated[float, Range(min=0)] = 1e-4,
    curvature: Curvature = "hessian",
    memory: Annotated[float, Range(min=0)] = 4.0,
    seed: int = 0,
) -> Measurement:
    """How much of the top Hessian eigenspace two checkpoints share, along a run or between runs.

    ‖V_a V_bᵀ‖²_F / k for the k eigenvectors (rows of V) of largest eigenvalue: the mean squared cosine of the
    principal angles, 1 for equal spaces, k/n_parameters for random ones (Gur-Ari et al. 2018, eq. 4). Spaces
    are compared, not vectors: in a cluster of eigenvalues single eigenvectors mean nothing. Nor does the
    space where the last eigenvalue and the one after it are close: `gap` near 1 says so.

    Between runs from different starts the parameters are not aligned: units may be permuted, and the overlap
    is at chance even between networks that compute the same. Compare runs that share a start.

    Cost: 3 to 5 Hessian-vector products per eigenvector at each checkpoint, once for pairs in a row.

    Args:
        model_a: The network at the first checkpoint.
        model_b: At the second.
        batches: Pairs (inputs, targets), re-iterable; the same for both.
        loss: The loss, or a callable such as `F.cross_entropy`.
        top_k: Dimension of the spaces.
        tol: Relative tolerance of the eigenvalues.
        curvature: hessian, ggn (generalised Gauss-Newton) or fisher.
        memory: Gigabytes for kept graphs and Krylov vectors.
        seed: Of the start vectors.

    Returns:
        Overlap with its error and its chance level, principal angles, eigenvalues.

    Raises:
        OptionError: If the networks differ in their number of parameters, or have fewer than `top_k`.

    References:
        Gur-Ari, Roberts and Dyer, "Gradient Descent Happens in a Tiny Subspace", arXiv:1812.04754.
        Davis and Kahan, "The rotation of eigenvectors by a perturbation III", SIAM J. Numer. Anal. 7 (1970).
    """
    check_seed(seed)
    loss = as_loss(loss)
    options = (top_k, tol, curvature, memory, seed)
    spent = {"hvps": 0}
    a, b = (_eigenspace(model, batches, loss, options, spent) for model in (model_a, model_b))
    if a.eigenvector.shape != b.eigenvector.shape:
        raise OptionError(
            f"the networks have {a.eigenvector.shape[1]:,} and {b.eigenvector.shape[1]:,} parameters: their "
            "eigenspaces cannot be compared.",
            "Compare runs of one architecture.",
        )
    reasons = [
        f"{_trouble(found, top_k)} at the {name} checkpoint"
        for name, found in (("first", a), ("second", b))
        if _trouble(found, top_k)
    ]
    cosine = np.full(top_k, np.nan)
    if np.isfinite(a.eigenvalue).all() and np.isfinite(b.eigenvalue).all():
        product = a.eigenvector[:top_k].double() @ b.eigenvector[:top_k].double().T
        cosine = torch.linalg.svdvals(product).clamp(max=1.0).cpu().numpy()
    return Measurement(
        {
            "overlap": float((cosine**2).mean()),
            # tr(P_a P_b)/k changes by at most the norm of what either projection changes by
            "overlap_error": min(_rotation(a, top_k) + _rotation(b, top_k), 1.0),
            "overlap_chance": top_k / a.eigenvector.shape[1],
            "cosine": cosine,
            "rank": np.arange(1, top_k + 1),
            "eigenvalue_a": a.eigenvalue[:top_k],
            "eigenvalue_b": b.eigenvalue[:top_k],
            "gap_a": _gap(a, top_k),
            "gap_b": _gap(b, top_k),
        },
        converged=not reasons,
        reason="; ".join(reasons),
        spent=spent,
        notes=subset_note(batches),
    )


def _eigenspace(
    model: torch.nn.Module, batches: Any, loss: Loss, options: tuple[Any, ...], spent: dict[str, int]
) -> Eigenpairs:
    """The pairs of a checkpoint, and one more for the gap; remembered for the next pair."""
    top_k, tol, curvature, memory, seed = options
    key = (_digest(model, batches), loss, options)
    if key not in _spaces:
        with frozen_eval(model):
            check_repeatable(model, batches)
            problem = Problem(model, loss, curvature, memory=memory * GIGABYTE)
            operator = problem.operator(list(batches))
            k = min(top_k + 1, operator.n_parameters) if top_k <= operator.n_parameters else top_k
            found = problem.eigenpairs(operator, k, tol=tol, seed=seed, reserved=REMEMBERED * k)
        spent["hvps"] += found.n_matvec
        _spaces[key] = replace(found, space=None)  # the pairs alone: the space holds the graphs as well
        while len(_spaces) > REMEMBERED:
            _spaces.popitem(last=False)
    _spaces.move_to_end(key)
    return _spaces[key]


def _digest(model: torch.nn.Module, batches: Any) -> bytes:
    """Of all that decides the eigenspace: the network's make and tensors, and the data."""
    digest = hashlib.blake2b(f"{type(model)} {model!r}".encode(), digest_size=16)

    def add(tensor: Tensor) -> Tensor:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return tensor

    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        add(tensor)
    for inputs, targets in batches:
        map_tensors(add, (inputs, targets))
    return digest.digest()


def _trouble(found: Eigenpairs, k: int) -> str:
    """Why the space is not what it should be; empty if it is."""
    if not np.isfinite(found.eigenvalue).all():
        return "a product is NaN or infinite"
    if not found.converged[:k].all():
        return "eigenvalues missed the tolerance"
    if len(found.eigenvalue) > k and _separation(found, k) <= 0:
        return "the last eigenvalue is not separated from the next"
    return ""


def _separation(found: Eigenpairs, k: int) -> float:
    """The gap that is certain between the last eigenvalue of the space and the next."""
    return float(found.eigenvalue[k - 1] - found.eigenvalue[k] - found.error_bound[k - 1 : k + 1].sum())


def _rotation(found: Eigenpairs, k: int) -> float:
    """Sine of the angle between the found space and the true one, at most (Davis and Kahan, sin Θ)."""
    if len(found.eigenvalue) == k:
        return 0.0
    separation = _separation(found, k)
    off = float(np.hypot(np.linalg.norm(found.residual[:k]), found.discrepancy))
    return off / separation if separation > 0 else 1.0


def _gap(found: Eigenpairs, k: int) -> float:
    if len(found.eigenvalue) == k:
        return 0.0
    return float(found.eigenvalue[k] / found.eigenvalue[k - 1]) if found.eigenvalue[k - 1] else math.nan
