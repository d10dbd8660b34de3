"""Small networks, data with names and units, and dense grids to compare corrections with."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import nn

from dynprobe.analyzers.corrections import corrections


class Data(list):
    """Batches that know the names and units of their features.

    Args:
        values: (n_samples, n_features), in the data's own units; the network sees (value - offset) / scale.
    """

    def __init__(
        self, values, *, targets=None, names=(), offset=None, scale=None, classes=(), sizes=None, dtype=None
    ):
        values = np.asarray(values, np.float64)
        offset = np.zeros(values.shape[1]) if offset is None else np.asarray(offset, float)
        scale = np.ones(values.shape[1]) if scale is None else np.asarray(scale, float)
        inputs = torch.from_numpy((values - offset) / scale).to(dtype or torch.float64)
        labels = torch.zeros(len(values), dtype=torch.long) if targets is None else torch.as_tensor(targets)
        parts = [*(sizes or (len(values),))]
        super().__init__(zip(inputs.split(parts), labels.split(parts), strict=True))
        self.feature_names = tuple(names)
        self.feature_offset, self.feature_scale = offset, scale
        self.class_names = tuple(classes)


def net(*layers, activation=nn.ReLU):
    """A network in float64 of pairs (matrix, bias), with activations between them."""
    modules = []
    for weight, bias in layers:
        weight = torch.tensor(np.atleast_2d(weight), dtype=torch.float64)
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        linear.weight.data, linear.bias.data = weight, torch.tensor(np.atleast_1d(bias), dtype=torch.float64)
        modules += [linear, activation()]
    return nn.Sequential(*modules[:-1]).eval()


def two_classes(slopes, constant, *hidden):
    """Class 1 is decided where slopes · x + constant is positive, x what comes of the hidden layers."""
    slopes = np.asarray(slopes, float)
    return net(*hidden, (np.stack([0 * slopes, slopes]), [0.0, constant]))


def random_net(sizes, seed, activation=nn.ReLU):
    """Random weights, of the size with which networks are initialised."""
    rng = np.random.default_rng(seed)
    layers = [
        (rng.normal(size=(b, a)) * np.sqrt(3 / a), 0.5 * rng.normal(size=b))
        for a, b in itertools.pairwise(sizes)
    ]
    return net(*layers, activation=activation)


def balanced(sizes, seed, inputs, share=0.7):
    """A random network of two classes that decides for class 1 at all but this share of some inputs."""
    model = random_net(sizes, seed)
    with torch.no_grad():
        outputs = model(torch.as_tensor(inputs))
        model[-1].bias[0] += torch.quantile(outputs[:, 1] - outputs[:, 0], share)
    return model


def square(n=60, k=2, seed=0):
    """Values in the unit cube whose ranges are exactly [0, 1]."""
    values = np.random.default_rng(seed).random((n, k))
    return np.concatenate([values, np.zeros((1, k)), np.ones((1, k))])


@functools.cache
def trained(classes=2, seed=0):
    """A network on [0, 1]² that was trained on a few discs, and its data."""
    rng = np.random.default_rng(seed)
    values = square(300, seed=seed)
    centres = rng.random((4, 2))
    near = np.hypot(*(values[:, None] - centres).transpose(2, 0, 1))
    labels = np.where(near.min(1) < 0.22, 1 + near.argmin(1) % (classes - 1), 0)
    model = random_net([2, 16, 16, classes], seed)
    x, y = torch.from_numpy(values), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model, Data(values, targets=labels, names=("left", "up"))


def noisy(model, size, seed=0):
    """A copy of a network of `trained` with noise on all parameters."""
    generator = torch.Generator().manual_seed(seed)
    copy = random_net([2, 16, 16, 2], 0)
    copy.load_state_dict(
        {
            n: v + size * torch.randn(v.shape, generator=generator).double()
            for n, v in model.state_dict().items()
        }
    )
    return copy


def judged(model, batches, **options):
    """A measurement with time enough to end by its tolerance."""
    return corrections(model, batches, **{"budget": 60.0, "sampled": 200, **options})


def decided(model, points):
    """Class that a model decides for at points (n, k), in its own dtype."""
    with torch.no_grad():
        return model(torch.as_tensor(points, dtype=next(model.parameters()).dtype)).argmax(1).numpy()


def samples_of(model, batches, wanted, n=1):
    """Numbers of the first samples for which a class is decided, as the option has them."""
    points = torch.cat([x for x, _ in batches])
    return ",".join(map(str, np.flatnonzero(decided(model, points) == wanted)[:n]))


GRID = 401


@functools.cache
def axes(n=GRID):
    """All points of a grid on [0, 1]², (n * n, 2), first coordinate slowest."""
    axis = np.linspace(0, 1, n)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def best_box(good, inner_low, inner_high):
    """Area of the largest box of a grid (n, n) that is good throughout and contains an inner one, in [0, 1]².

    Args:
        good: First coordinate first.
        inner_low: Lower corner.
        inner_high: Upper corner.
    """
    n = len(good)
    low = np.floor(np.asarray(inner_low) * (n - 1) + 1e-9).astype(int)
    high = np.ceil(np.asarray(inner_high) * (n - 1) - 1e-9).astype(int)
    best = 0.0
    for a in range(low[0], -1, -1):
        for b in range(high[0], n):
            rows = good[a : b + 1].all(0)
            if not rows[low[1] + 1 : high[1]].all():
                break
            bad_below = np.flatnonzero(~rows[: low[1] + 1])
            bad_above = np.flatnonzero(~rows[high[1] :])
            first = bad_below[-1] + 1 if len(bad_below) else 0
            last = high[1] + bad_above[0] - 1 if len(bad_above) else n - 1
            best = max(best, (b - a) * (last - first) / (n - 1) ** 2)
    return best
