"""Merges neurons that have condensed: a smaller network that computes nearly, or exactly, the same."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dynprobe.analyzers.numerics.neurons import layer_neurons
from dynprobe.analyzers.numerics.outgoing import Link, n_neurons, outgoing

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def merge(model: nn.Module, link: Link, threshold: float, least_amplitude: float = 0.0) -> Bools:
    """Lets one neuron of each direction stand for all of them, in place.

    By amplitude |a||w|, each neuron j that is left takes over all those of its direction:

        a_j ← Σ_k s_k (|w_k|/|w_j|) a_k,

    where the activation is positively homogeneous, s_k = −1 for those of opposite direction if it is odd as
    well. This is exact for neurons that are parallel. For other activations neurons are taken over only where
    the vectors themselves, not their directions, are as close as the threshold lets unit vectors be,
    |w_k − s_k w_j| ≤ √(2 (1 − threshold)) |w_j|, with a_j ← Σ_k s_k a_k, exact for equal neurons.

    Neurons that were taken over are read with weight 0: the outputs are those of the smaller network.

    Args:
        model: Its reader's weights are written over.
        link: The layer and its reader, from `outgoing.links`.
        threshold: Cosine above which two neurons have one direction.
        least_amplitude: Neurons below this part of the largest amplitude are cut off.

    Returns:
        Which neurons are left, shape (n_neurons,).

    References:
        Zhang, Li, Zhang, Luo and Xu, "Embedding principle of loss landscape of deep neural networks",
        NeurIPS 2021, fig. 5.
    """
    layer, reader = model.get_submodule(link.layer), model.get_submodule(link.reader)
    vectors = layer_neurons(layer).cpu().double().numpy()
    columns = outgoing(reader, n_neurons(layer)).cpu().double().numpy().copy()
    length, reading = np.linalg.norm(vectors, axis=1), np.sqrt((columns**2).sum((0, 2)))
    amplitude = length * reading
    # An activation that is 0 at 0 makes nothing of a neuron whose weights are 0; a sigmoid makes a constant.
    silent = (reading == 0) | ((length == 0) & (link.homogeneous or link.odd))
    free = ~silent & (amplitude >= least_amplitude * amplitude.max(initial=0.0))
    columns[:, ~free] = 0
    kept = np.zeros(len(vectors), dtype=bool)
    for j in np.argsort(-amplitude, kind="stable").tolist():
        if not free[j]:
            continue
        factor = _factors(vectors, length, j, threshold, link)
        taken = free & (factor != 0)
        column = (columns[:, taken] * factor[taken][None, :, None]).sum(1)
        columns[:, taken] = 0
        columns[:, j] = column
        free &= ~taken
        kept[j] = True
    with torch.no_grad():
        weight = reader.weight
        assert isinstance(weight, torch.Tensor)
        weight.copy_(torch.from_numpy(columns).reshape(weight.shape))
    return kept


def _factors(vectors: Floats, length: Floats, j: int, threshold: float, link: Link) -> Floats:
    """How often neuron j's output stands for that of each neuron; 0 for those it does not stand for."""
    inner = vectors @ vectors[j]
    sign = np.where((inner < 0) & link.odd, -1.0, 1.0)
    if link.homogeneous:
        close = (sign * inner > threshold * length * length[j]) & (length > 0)
        factor = sign * length / (length[j] or 1.0)
    else:
        difference = np.linalg.norm(vectors - sign[:, None] * vectors[j], axis=1)
        close = difference <= math.sqrt(2 * (1 - threshold)) * length[j]
        factor = sign
    factor = np.where(close, factor, 0.0)
    factor[j] = 1.0
    return factor
