"""The peers of `corrections.py`: DiCE for counterfactuals, Marabou for boxes."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from typing import Any

import numpy as np
import torch
from _corrections_tasks import Case
from torch import Tensor, nn

from dynprobe.analyzers.numerics.box_verifier import verify
from dynprobe.analyzers.numerics.correction_problem import Judgement
from dynprobe.analyzers.numerics.largest_box import LargestBox
from dynprobe.analyzers.numerics.layered_network import Floats, LayeredNetwork

PACKAGES = {"dice-ml": "dice_ml", "maraboupy": "maraboupy.MarabouCore"}
# Counterfactuals that DiCE is asked for, of which the nearest counts, and decimals of a feature's range.
_N_ASKED, _DECIMALS = 4, 3
# A fifth of what its genetic search may take by default, which is minutes where it does not settle.
_MAX_ITERATIONS = 100
# Marabou's points miss its own constraints by up to 1e-5: a counterexample is what fails by more.
_SLACK = 1e-4


def find_peers() -> dict[str, str]:
    """Name → "" or the reason why it is skipped."""
    found = {}
    for name, module in PACKAGES.items():
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                importlib.import_module(module)
            found[name] = ""
        except Exception as error:
            found[name] = (str(error) or type(error).__name__).splitlines()[0]
    return found


class _Chance(nn.Module):
    """The chance of the target as a function of what may change, as DiCE wants a binary classifier."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, units: Tensor) -> Tensor:
        outputs = self.case.net.outputs(self.case.inputs(units.double().numpy()))
        others = np.delete(outputs, self.case.target, 1)
        lead = outputs[:, self.case.target] - others.max(1)
        return torch.sigmoid(torch.from_numpy(lead).float())[:, None]


def dice(case: Case, method: str) -> Floats | None:
    """The nearest of DiCE's valid counterfactuals in units of the ranges, (k,); None where it has none.

    It is given the features that may change and nothing else: none can be changed that must not be.
    """
    dice_ml: Any = importlib.import_module("dice_ml")
    pandas: Any = importlib.import_module("pandas")
    low, high = case.edges
    names = [f"u{i}" for i in range(len(case.features))]
    units = (case.net.points[:, list(case.features)] - low) / (high - low)
    frame = pandas.DataFrame(units.round(_DECIMALS), columns=names)
    frame["target"] = (case.net.labels == case.target).astype(int)
    np.random.seed(0)
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), quiet[0], quiet[1]:
        warnings.simplefilter("ignore")
        data = dice_ml.Data(
            dataframe=frame,
            continuous_features=names,
            outcome_name="target",
            continuous_features_precision=dict.fromkeys(names, _DECIMALS),
        )
        explainer = dice_ml.Dice(data, dice_ml.Model(model=_Chance(case), backend="PYT"), method=method)
        query = pandas.DataFrame([case.judgement.start], columns=names)
        options = {"random_seed": 0} if method == "random" else {"maxiterations": _MAX_ITERATIONS}
        try:
            found = explainer.generate_counterfactuals(
                query,
                total_CFs=_N_ASKED,
                desired_class=1,
                permitted_range={name: [0.0, 1.0] for name in names},
                **options,
            )
            frame = found.cf_examples_list[0].final_cfs_df
        except Exception as error:
            if "No counterfactuals" not in str(error):
                raise
            return None
    if frame is None or not len(frame):
        return None
    points = frame[names].to_numpy(float)
    valid = points[case.net.decides(case.inputs(points)) == case.target]
    return valid[case.judgement.distance(valid).argmin()] if len(valid) else None


def decided_by_marabou(judgement: Judgement, box: LargestBox) -> list[tuple[str, str]]:
    """Its answers for a box, and for the least of some stretched ones in which there is a counterexample."""
    network, level = judgement.network, judgement.margin - _SLACK
    for stretch in (1.02, 1.1, 1.3, 2.0, 4.0, 100.0):
        middle, half = (box.low + box.high) / 2, stretch * (box.high - box.low) / 2
        low, high = np.maximum(middle - half, judgement.low), np.minimum(middle + half, judgement.high)
        if verify(network, low, high, level - _SLACK).holds is False:
            break
    else:
        return []  # nothing in the domain fails
    return [(marabou(network, box.low, box.high, level), marabou(network, low, high, level))]


def marabou(network: LayeredNetwork, low: Floats, high: Floats, most: float, seconds: int = 20) -> str:
    """Whether some output of a ReLU network is at most `most` somewhere in a box.

    Args:
        network: k inputs, r outputs.
        low: Lower corner, (k,).
        high: Upper corner, (k,).
        most: What one of the outputs is to be at most.
        seconds: After which a query is given up.

    Returns:
        `sat` if so, `unsat` if not, else what Marabou says.
    """
    answers = [_query(network, row, low, high, most, seconds) for row in range(network.n_outputs)]
    return "sat" if "sat" in answers else next((a for a in answers if a != "unsat"), "unsat")


def _query(network: LayeredNetwork, row: int, low: Floats, high: Floats, most: float, seconds: int) -> str:
    core: Any = importlib.import_module("maraboupy.MarabouCore")
    query = core.InputQuery()
    query.setNumberOfVariables(network.n_inputs + sum(2 * layer.n_neurons for layer in network.layers))
    values = [np.arange(network.n_inputs)]
    for i in values[0]:
        query.setLowerBound(int(i), float(low[i]))
        query.setUpperBound(int(i), float(high[i]))
        query.markInputVariable(int(i), int(i))
    n_used = network.n_inputs
    for layer in network.layers:
        before = n_used + np.arange(layer.n_neurons)
        after = before + layer.n_neurons
        n_used += 2 * layer.n_neurons
        for i, z in enumerate(before):
            equation = core.Equation()
            for j, matrix in layer.sources:
                for variable, weight in zip(values[j], matrix[i], strict=True):
                    equation.addAddend(float(weight), int(variable))
            equation.addAddend(-1.0, int(z))
            equation.setScalar(-float(layer.bias[i]))
            query.addEquation(equation)
            if layer.activation is not None:
                core.addReluConstraint(query, int(z), int(after[i]))
                query.setLowerBound(int(after[i]), 0.0)
        values.append(after)
    query.setUpperBound(int(before[row]), most)
    options = core.Options()
    options._verbosity, options._timeoutInSeconds = 0, seconds
    answer, _, _ = core.solve(query, options, "")
    return str(answer)
