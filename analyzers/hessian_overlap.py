"""How much of the top Hessian eigenspace two checkpoints share, along a run or between runs."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch

from dynprobe.analyzers import Lines, Measurement, OptionError, Range, Var, analyzer
from dynprobe.analyzers._curvature import GIGABYTE, Curvature, Problem
from dynprobe.analyzers._sampling import check_seed, subset_note
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
    product = a.eigenvector[:top_k].double() @ b.eigenvector[:top_k].double().T
    cosine = torch.linalg.svdvals(product).clamp(max=1.0).cpu().numpy()
    angle = _rotation(a, top_k) + _rotation(b, top_k)
    missed = [name for name, found in (("first", a), ("second", b)) if not found.converged[:top_k].all()]
    return Measurement(
        {
            "overlap": float((cosine**2).mean()),
            # tr(P_a P_b)/k changes by at most the norm of what either projection changes by
            "overlap_error": min(angle, 1.0),
            "overlap_chance": top_k / a.eigenvector.shape[1],
            "cosine": cosine,
            "rank": np.arange(1, top_k + 1),
            "eigenvalue_a": a.eigenvalue[:top_k],
            "eigenvalue_b": b.eigenvalue[:top_k],
            "gap_a": _gap(a, top_k),
            "gap_b": _gap(b, top_k),
        },
        converged=not missed,
        reason=f"eigenvalues of the {' and the '.join(missed)} checkpoint missed the tolerance"
        if missed
        else "",
        spent=spent,
        notes=subset_note(batches),
    )


def _eigenspace(
    model: torch.nn.Module, batches: Any, loss: Loss, options: tuple[Any, ...], spent: dict[str, int]
) -> Eigenpairs:
    """The pairs of a checkpoint, and one more for the gap; remembered for the next pair."""
    top_k, tol, curvature, memory, seed = options
    digest = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    key = (digest.digest(), id(batches), loss, options)
    if key not in _spaces:
        with frozen_eval(model):
            problem = Problem(model, loss, curvature, memory=memory * GIGABYTE)
            operator = problem.operator(list(batches))
            k = min(top_k + 1, operator.n_parameters) if top_k <= operator.n_parameters else top_k
            found = problem.eigenpairs(operator, k, tol=tol, seed=seed)
        spent["hvps"] += found.n_matvec
        _spaces[key] = found
        while len(_spaces) > REMEMBERED:
            _spaces.popitem(last=False)
    _spaces.move_to_end(key)
    return _spaces[key]


def _rotation(found: Eigenpairs, k: int) -> float:
    """Sine of the angle between the found space and the true one, at most (Davis and Kahan, sin Θ)."""
    if len(found.eigenvalue) == k:
        return 0.0
    gap = float(found.eigenvalue[k - 1] - found.eigenvalue[k])
    return float(np.linalg.norm(found.residual[:k])) / gap if gap > 0 else 1.0


def _gap(found: Eigenpairs, k: int) -> float:
    return float(found.eigenvalue[k] / found.eigenvalue[k - 1]) if len(found.eigenvalue) > k else 0.0
