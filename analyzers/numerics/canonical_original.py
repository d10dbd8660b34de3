"""PWCCA as the code published with the paper computes it, for comparison with numbers that came from it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def original_pwcca(x: Floats, y: Floats) -> tuple[float, bool]:
    """Computes the published code's projection-weighted mean of canonical correlations.

    It is not what the paper defines. The directions are u_i'(x − μ) + μ_i: u_i lacks the whitening, and the
    mean of *neuron* i is added to *direction* i. They are made orthonormal in their order and projected on
    activations that are not centred. So the number changes with the order of the neurons, with a shift
    of the activations, and with the sign that the singular vectors happen to have. All neurons are kept and
    nothing is added to the covariances: the published code's `epsilon = 0`, its default.

    Args:
        x: Activations of the first layer, `(n_rows, n_features_a)`.
        y: Of the second, `(n_rows, n_features_b)`.

    Returns:
        The number, NaN where neurons are linearly dependent and the computation breaks down; and whether it
        is that of the first layer: the one with fewer neurons, the first where both have as many.

    References:
        Morcos, Raghu and Bengio, "Insights on representational similarity in neural networks with canonical
        correlation", arXiv:1806.05759; the code at github.com/google/svcca.
    """
    first = x.shape[1] <= y.shape[1]
    size = x.shape[1]
    with np.errstate(all="ignore"):
        joint = np.cov(np.ascontiguousarray(x.T), np.ascontiguousarray(y.T))
        own_x, own_y, cross = joint[:size, :size], joint[size:, size:], joint[:size, size:]
        top_x, top_y = np.abs(own_x).max(), np.abs(own_y).max()
        try:
            white_x, white_y = _inverse_root(own_x / top_x), _inverse_root(own_y / top_y)
            u, rho, v_t = np.linalg.svd(white_x @ (cross / math.sqrt(top_x * top_y) @ white_y))
        except np.linalg.LinAlgError:
            return math.nan, first
    rows, values = (u.T, x) if first else (v_t, y)
    mean = values.mean(0)
    direction = (values - mean) @ rows.T + mean
    orthonormal, _ = np.linalg.qr(direction)
    weight = np.abs(orthonormal.T @ values).sum(1)
    return float((weight * rho).sum() / weight.sum()), first


def _inverse_root(matrix: Floats) -> Floats:
    value, vector = np.linalg.eigh(np.linalg.pinv(matrix))
    root: Floats = vector @ (np.sqrt(value)[:, None] * vector.T)
    return root
