"""Boxes of corrections beside Marabou, another complete verifier (`pip install maraboupy`)."""

import itertools
import time
from functools import cache
from typing import Any

import numpy as np
import pytest

from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.largest_box import largest_box
from dynprobe.analyzers.numerics.layered_network import Floats, Layer, LayeredNetwork, piecewise
from dynprobe.analyzers.numerics.nearest_correction import NearestSearch

core: Any = pytest.importorskip("maraboupy.MarabouCore")

MARGIN = 1e-3
# Marabou's points miss its own constraints by up to 1e-5: a counterexample is what fails by more.
SLACK = 1e-4
SEEDS = range(12)


def judgement(seed: int) -> Judgement:
    """A random ReLU network of two or three features and two rivals, judged at a corner of the domain."""
    generator = np.random.default_rng(seed)
    sizes = (2 + seed % 2, 12, 12, 2)
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weights = generator.standard_normal((n_out, n_in)) * np.sqrt(2 / n_in) * (3 if i == 0 else 1)
        bias = -weights @ np.full(n_in, 0.5) if i == 0 else generator.standard_normal(n_out) / 4
        layers.append(Layer(((i, weights),), bias, piecewise(0.0, 1.0, n_out) if i < 2 else None))
    network = LayeredNetwork(sizes[0], tuple(layers))
    points = generator.random((2000, sizes[0]))
    # Four tenths of the domain are corrections, and the judged point is none.
    network = network.combined(np.eye(2), -float(np.quantile(network(points).min(1), 0.6)))
    start = points[network(points).min(1).argmin()]
    k = sizes[0]
    return Judgement(network, start, np.zeros(k), np.ones(k), np.ones(k), np.full(k, 0.025), MARGIN)


@cache
def verified_box(seed: int) -> tuple[Floats, Floats]:
    case = judgement(seed)
    deadline = time.monotonic() + 20
    found = NearestSearch(case).run(deadline=deadline, tolerance=0.05)
    assert found.centre is not None
    box = largest_box(case, found.centre, *case.box_around(found.centre), deadline=deadline, tolerance=0.2)
    return box.low, box.high


def finds_counterexample(case: Judgement, low: Floats, high: Floats) -> bool:
    """Whether Marabou finds a point of a box at which an output misses the margin by its tolerance."""
    answers = {ask(case.network, row, low, high) for row in range(case.network.n_outputs)}
    assert answers <= {"sat", "unsat"}
    return "sat" in answers


def ask(network: LayeredNetwork, row: int, low: Floats, high: Floats) -> str:
    query = core.InputQuery()
    query.setNumberOfVariables(network.n_inputs + sum(2 * layer.n_neurons for layer in network.layers))
    values = [list(range(network.n_inputs))]
    for i in values[0]:
        query.setLowerBound(i, float(low[i]))
        query.setUpperBound(i, float(high[i]))
        query.markInputVariable(i, i)
    n_used = network.n_inputs
    for layer in network.layers:
        before = list(range(n_used, n_used + layer.n_neurons))
        after = [z + layer.n_neurons for z in before]
        n_used += 2 * layer.n_neurons
        for i, z in enumerate(before):
            equation = core.Equation()
            for j, matrix in layer.sources:
                for variable, weight in zip(values[j], matrix[i], strict=True):
                    equation.addAddend(float(weight), variable)
            equation.addAddend(-1.0, z)
            equation.setScalar(-float(layer.bias[i]))
            query.addEquation(equation)
            if layer.activation is not None:
                core.addReluConstraint(query, z, after[i])
                query.setLowerBound(after[i], 0.0)
        values.append(after)
    query.setUpperBound(before[row], MARGIN - SLACK)
    options = core.Options()
    options._verbosity, options._timeoutInSeconds = 0, 20
    return str(core.solve(query, options, "")[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_marabou_finds_no_counterexample_in_a_verified_box(seed: int) -> None:
    case = judgement(seed)
    assert not finds_counterexample(case, *verified_box(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_marabou_finds_a_counterexample_where_a_box_is_stretched_beyond_one(seed: int) -> None:
    case = judgement(seed)
    low, high = verified_box(seed)
    middle, half = (low + high) / 2, (high - low) / 2
    for stretch in (1.1, 1.3, 2.0, 4.0, 100.0):
        wider = np.maximum(middle - stretch * half, case.low), np.minimum(middle + stretch * half, case.high)
        if verify(case.network, *wider, MARGIN - 2 * SLACK).holds is False:
            break
    assert finds_counterexample(case, *wider)
