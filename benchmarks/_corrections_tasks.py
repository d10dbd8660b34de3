"""Networks, judgements and brute force that `corrections.py` measures with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import h5py
import numpy as np
import torch
from sklearn import datasets
from torch import nn
from torch.nn import functional

from dynprobe.analyzers._corrections_search import Way
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.extract_network import deviation, extract
from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork

RADIUS = 0.025
"""Half-width of the surroundings in which a correction must hold, as a share of each feature's range."""

AUTHORS_FEATURES = (0, 1, 2, 8, 10)
"""What may change in the authors' theorem prover: three shares of clauses, their average length and depth."""


@dataclass(frozen=True, eq=False)
class Net:
    """A trained classifier of a table that scikit-learn ships.

    Args:
        name: Of the table and the hidden layers.
        model: In float32, of standardised features.
        network: Its layers in float64.
        points: Standardised features of all samples in float64 that float32 represents, (n, n_features).
        labels: (n,).
        low: Least allowed value of every feature, (n_features,).
        high: Largest allowed value, (n_features,).
        margin: Least lead of the target that counts: twice the largest measured rounding error.
    """

    name: str
    model: nn.Module
    network: LayeredNetwork
    points: Floats
    labels: np.ndarray
    low: Floats
    high: Floats
    margin: float

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.network.n_outputs

    def outputs(self, points: Floats) -> Floats:
        """Of the model itself in float32, (n, n_classes)."""
        with torch.inference_mode():
            return np.asarray(self.model(torch.from_numpy(points).float()).double().numpy())

    def decides(self, points: Floats) -> np.ndarray:
        """Class that the model itself decides for, (n,)."""
        return np.asarray(self.outputs(points).argmax(1))

    def leads(self, target: int) -> LayeredNetwork:
        """The network of the target's leads over every other class."""
        rows = -np.delete(np.eye(self.n_classes), target, axis=0)
        rows[:, target] = 1.0
        return self.network.combined(rows)


@dataclass(frozen=True, eq=False)
class Case:
    """One judged sample, the features that may change, and the class to be decided."""

    net: Net
    sample: int
    features: tuple[int, ...]
    target: int
    judgement: Judgement

    @property
    def point(self) -> Floats:
        """The judged input, (n_features,)."""
        return np.asarray(self.net.points[self.sample])

    @property
    def edges(self) -> tuple[Floats, Floats]:
        """Values at 0 and at 1 in units of the ranges, (k,) each; the judged value always is allowed."""
        low, high = np.minimum(self.net.low, self.point), np.maximum(self.net.high, self.point)
        return low[list(self.features)], high[list(self.features)]

    def inputs(self, units: Floats) -> Floats:
        """Inputs of the network for points (n, k) of the judgement."""
        low, high = self.edges
        found = np.repeat(self.point[None], len(units), 0)
        found[:, list(self.features)] = low + units * (high - low)
        return found


@cache
def table(name: str) -> tuple[Floats, np.ndarray]:
    """Standardised features and classes; of `diabetes` whether the disease has progressed less than usual."""
    data = getattr(datasets, f"load_{name}")()
    labels = data.target if name != "diabetes" else (data.target < np.median(data.target)).astype(int)
    points = (data.data - data.data.mean(0)) / data.data.std(0)
    return points.astype(np.float32).astype(np.float64), labels.astype(np.int64)


@cache
def trained(name: str, hidden: tuple[int, ...], steps: int = 300) -> Net:
    """A ReLU network trained by full-batch Adam; seeded."""
    points, labels = table(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = (points.shape[1], *hidden, int(labels.max()) + 1)
        pairs = list(itertools.pairwise(sizes))
        layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    inputs, targets = torch.from_numpy(points).float(), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if len(hidden) < 4 else 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    width = "x".join(str(n) for n in hidden) if len(hidden) < 4 else f"{len(hidden)}x{hidden[0]}"
    return net_of(f"{name} {width}", model, points, labels, points.min(0), points.max(0))


def net_of(name: str, model: nn.Module, points: Floats, labels: np.ndarray, low: Floats, high: Floats) -> Net:
    """A model with its layers, and how far these are from it on the samples and on corners of the ranges."""
    model = model.eval().requires_grad_(False)
    inputs = torch.from_numpy(points).float()
    extracted = extract(model, inputs[:1], check=inputs[:1000])
    corners = np.where(np.random.default_rng(0).random((2000, points.shape[1])) < 0.5, low, high)
    error = deviation(extracted, model, torch.from_numpy(np.concatenate([points, corners])).float())
    return Net(name, model, extracted.network, points, labels, low, high, 2 * error)


def authors_net(folder: Path) -> Net:
    """The authors' theorem prover network, its test data, and the ranges that they allow.

    Args:
        folder: A checkout of xinpl/Polaris.
    """
    proof = folder / "proof"
    raw = np.delete(np.loadtxt(proof / "data/ml-prove/all-data-raw.csv", delimiter=","), [5, 21], axis=1)
    data = np.loadtxt(proof / "data/ml-prove/test.csv", delimiter=",")
    points, labels = data[:, :-6].astype(np.float32).astype(np.float64), (data[:, -1] > 0).astype(np.int64)
    layers: list[nn.Module] = []
    with h5py.File(proof / "models/8x100.h5") as file:
        weights = file["model_weights"]
        for name in (f"dense_{i}" for i in range(1, 10)):
            kernel, bias = (torch.from_numpy(weights[name][name][key][()]) for key in ("kernel:0", "bias:0"))
            linear = nn.Linear(*kernel.shape)
            linear.weight.data, linear.bias.data = kernel.T.contiguous(), bias
            layers += [linear, nn.ReLU()]
    mean, std = (stat[: points.shape[1]] for stat in (raw[:3059].mean(0), raw[:3059].std(0, ddof=1)))
    low, high = points.min(0), points.max(0)
    for features, most in ((AUTHORS_FEATURES[:3], 1.0), (AUTHORS_FEATURES[3:], 10.0)):
        for i in features:
            low[i], high[i] = -mean[i] / std[i], (most - mean[i]) / std[i]
    return net_of("authors' 8x100", nn.Sequential(*layers[:-1]), points, labels, low, high)


def judged(net: Net, sample: int, features: Sequence[int], target: int, radius: float = RADIUS) -> Case:
    """Every chosen feature may take any value of the data's range, which also is the unit of its cost."""
    k, chosen = len(features), list(features)
    point = net.points[sample]
    low, high = np.minimum(net.low, point)[chosen], np.maximum(net.high, point)[chosen]
    judgement = Judgement(
        net.leads(target).restricted(point, chosen, low, high),
        (point[chosen] - low) / (high - low),
        np.zeros(k),
        np.ones(k),
        np.ones(k),
        np.full(k, radius),
        net.margin,
    )
    return Case(net, sample, tuple(chosen), target, judgement)


def cases(net: Net, n_changed: int, n_cases: int, seed: int = 0) -> list[Case]:
    """Samples, features that may change and classes to be decided for, all drawn at random."""
    generator = np.random.default_rng([seed, n_changed, net.network.n_hidden])
    found = []
    decided = net.decides(net.points)
    while len(found) < n_cases:
        sample = int(generator.integers(len(net.points)))
        others = [c for c in range(net.n_classes) if c != decided[sample]]
        features = np.sort(generator.permutation(net.points.shape[1])[:n_changed])
        found.append(judged(net, sample, features.tolist(), int(generator.choice(others))))
    return found


def pairs(net: Net, sample: int, features: Sequence[int], target: int) -> list[tuple[Case, Way]]:
    """One judgement for every two of the features."""
    found = []
    for two in itertools.combinations(features, 2):
        case = judged(net, sample, two, target)
        made = partial(replace, case.judgement)
        found.append((case, Way(two, made, case.point, 0.0, target, "l1", True)))
    return found


def brute_force_area(judgement: Judgement, inner_low: Floats, inner_high: Floats, n_grid: int) -> float:
    """The largest rectangle with only valid grid points that contains another one: every one is compared.

    For each row of the grid: how far it is valid to the left and to the right of the inner rectangle. A
    rectangle of some rows extends as far as the worst of them.

    Args:
        judgement: Of two features.
        inner_low: Lower corner of a rectangle that is all valid, (2,).
        inner_high: Its upper corner, (2,).
        n_grid: Points along each axis; the inner rectangle's edges are added.

    Returns:
        Its area, which is above that of the best valid rectangle by what the grid does not see, and below it
        by at most one cell in each direction.
    """
    x, y = (
        np.union1d(np.linspace(judgement.low[i], judgement.high[i], n_grid), [inner_low[i], inner_high[i]])
        for i in (0, 1)
    )
    valid = np.stack(
        [judgement.values(np.stack([x, np.full_like(x, row)], 1)) >= judgement.margin for row in y]
    )
    first, last = np.searchsorted(x, [inner_low[0], inner_high[0]])
    inside = valid[:, first : last + 1].all(1)
    n_left = np.cumprod(valid[:, first::-1], 1).sum(
        1
    )  # valid points from the inner rectangle on, with its edge
    n_right = np.cumprod(valid[:, last:], 1).sum(1)
    left = np.where(inside, x[first - np.maximum(n_left, 1) + 1], np.inf)
    right = np.where(inside, x[last + np.maximum(n_right, 1) - 1], -np.inf)
    bottom, top = np.searchsorted(y, [inner_low[1], inner_high[1]])
    middle = slice(bottom, top + 1)
    down_left = np.maximum.accumulate(np.r_[left[middle].max(), left[:bottom][::-1]])
    down_right = np.minimum.accumulate(np.r_[right[middle].min(), right[:bottom][::-1]])
    up_left = np.maximum.accumulate(np.r_[left[middle].max(), left[top + 1 :]])
    up_right = np.minimum.accumulate(np.r_[right[middle].min(), right[top + 1 :]])
    width = np.minimum.outer(down_right, up_right) - np.maximum.outer(down_left, up_left)
    height = y[top:][None, :] - y[bottom::-1][:, None]
    size = np.where(np.isfinite(width), width, 0.0).clip(0) * height
    return float(size.max() / np.prod(judgement.high - judgement.low))
