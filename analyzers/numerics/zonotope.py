"""Neurons as affine forms of the inputs and of shared error terms: bounds that remember what cancels.

A neuron is c + a.t + g.e + d with t and e in [-1, 1] and |d| at most a rest of its own. Every neuron that may
change its slope adds an error term, which later layers add up with its sign; bounds that keep one linear
function above and one below each neuron (forwards) add up absolute values instead, and are wider by orders of
magnitude after some layers (Singh, Gehr, Mirman, Püschel and Vechev, "Fast and effective robustness
certification", NeurIPS 2018). Arrays have the boxes last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dynprobe.analyzers.numerics.layered_network import Activation, Floats, Layer, product


@dataclass(frozen=True)
class Zonotope:
    """What n_neurons may be on n boxes.

    Args:
        form: Constant, slopes of t and slopes of the error terms, (n_neurons, 1 + k + n_errors, n).
        rest: Largest size of what else may be added, (n_neurons, n); None for nothing.
    """

    form: Floats
    rest: Floats | None = None

    def spread(self, k: int) -> Floats:
        """Largest size of what is not a function of t, (n_neurons, n)."""
        errors = np.abs(self.form[:, 1 + k :]).sum(1)
        return np.asarray(errors if self.rest is None else errors + self.rest)


def inputs(centre: Floats, radius: Floats) -> Zonotope:
    """The inputs themselves: centre + radius t, both (k, n)."""
    k, n = centre.shape
    form = np.zeros((k, k + 1, n))
    form[:, 0] = centre
    form[np.arange(k), np.arange(k) + 1] = radius
    return Zonotope(form)


def affine(layer: Layer, values: Sequence[Zonotope]) -> Zonotope:
    """What a layer computes of earlier values, before its activation."""
    n_boxes = values[0].form.shape[2]
    widest = max((values[j].form.shape[1] for j, _ in layer.sources), default=1)
    parts = [(j, matrix, product(matrix, values[j].form)) for j, matrix in layer.sources]
    if len(parts) == 1:
        form = parts[0][2]
    else:
        form = np.zeros((layer.n_neurons, widest, n_boxes))
        for _, _, part in parts:
            form[:, : part.shape[1]] += part
    rest: Floats | None = None
    for j, matrix, _ in parts:
        if (known := values[j].rest) is not None:
            added = product(abs(matrix), known)
            rest = added if rest is None else rest + added
    form[:, 0] += layer.bias[:, None]
    return Zonotope(form, rest)


def activated(
    activation: Activation, z: Zonotope, least: Floats, most: Floats, *, n_columns: int
) -> Zonotope:
    """What an activation makes of z within [least, most].

    Args:
        activation: Of these neurons.
        z: What it is applied to.
        least: (n_neurons, n).
        most: (n_neurons, n).
        n_columns: No more error terms are kept than fit into so many columns of the form; the smallest
            become part of the rest.
    """
    slope, offset, error = _strip(activation, least, most)
    form = z.form * slope[:, None]
    form[:, 0] += offset
    rest = None if z.rest is None else z.rest * np.abs(slope)
    n_used = form.shape[1]
    n_new = min(int((error > 0).sum(0).max(initial=0)), max(n_columns - n_used, 0))
    if n_new:
        chosen = np.argsort(-error, axis=0, kind="stable")[:n_new]  # (n_new, n)
        grown = np.zeros((form.shape[0], n_used + n_new, form.shape[2]))
        grown[:, :n_used] = form
        columns, boxes = np.arange(n_used, n_used + n_new)[:, None], np.arange(form.shape[2])[None]
        grown[chosen, columns, boxes] = np.take_along_axis(error, chosen, 0)
        form = grown
        np.put_along_axis(error, chosen, 0.0, 0)
    if error.any():
        rest = error if rest is None else rest + error
    return Zonotope(form, rest)


def _strip(activation: Activation, least: Floats, most: Floats) -> tuple[Floats, Floats, Floats]:
    """Slope, offset and half-width of a strip that contains the activation on [least, most]."""
    if activation.is_smooth:
        at_least, at_most = activation(least), activation(most)
        # No derivative in between is smaller, so that σ(z) - slope z grows with z.
        slope = np.minimum(_smooth_slope(activation, at_least), _smooth_slope(activation, at_most))
        bottom, top = at_least - slope * least, at_most - slope * most
        return slope, (bottom + top) / 2, np.maximum(top - bottom, 0) / 2
    below, above = activation.below[:, None], activation.above[:, None]
    unstable = (least < 0) & (most > 0)
    width = np.where(unstable, most - least, 1.0)
    stable_slope = np.where(least >= 0, above, below)
    slope = np.where(unstable, (above * most - below * least) / width, stable_slope)
    gap = np.where(unstable, (below - slope) * least, 0.0)
    return slope, gap / 2, np.abs(gap) / 2


def _smooth_slope(activation: Activation, value: Floats) -> Floats:
    return np.asarray(1 - value**2 if activation.kind == "tanh" else value * (1 - value))


def extremes(z: Zonotope, k: int, reach: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
    """Least and largest value of every neuron, (n_neurons, n) each.

    Args:
        z: The neurons.
        k: Number of inputs.
        reach: For slopes (n_neurons, k, n) the largest value of slopes · t.
    """
    spread = z.spread(k)
    slopes = z.form[:, 1 : 1 + k]
    return (
        np.asarray(z.form[:, 0] - reach(-slopes) - spread),
        np.asarray(z.form[:, 0] + reach(slopes) + spread),
    )
