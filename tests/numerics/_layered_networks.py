"""Layered networks to bound and to search."""

from __future__ import annotations

import itertools

import numpy as np

from dynprobe.analyzers.numerics.layered_network import Layer, LayeredNetwork, piecewise


def random_network(sizes, *, seed=0, activation=None):
    """Random weights of a usual size; ReLU by default."""
    rng = np.random.default_rng(seed)
    activation = activation or (lambda n: piecewise(0.0, 1.0, n))
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weight = rng.normal(size=(n_out, n_in)) * np.sqrt(2 / n_in)
        last = i == len(sizes) - 2
        layers.append(
            Layer(((i, weight),), 0.3 * rng.normal(size=n_out), None if last else activation(n_out))
        )
    return LayeredNetwork(sizes[0], tuple(layers))
