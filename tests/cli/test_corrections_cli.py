"""`dynprobe corrections` as a user types it, on the tabular sample runs."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end import dynprobe
from safetensors.torch import save_file
from sklearn.datasets import load_breast_cancer

from dynprobe.analyzers import Var, analyzer
from dynprobe.analyzers.core.contract import declaration_of
from dynprobe.cli.command import command
from dynprobe.io.report import read_report

RUNS = Path(__file__).resolve().parents[2] / "sample_checkpoints" / "tabular"
TWO = ("--features", "worst_area,worst_texture", "--sampled", "1000", "--no-figure", "--quiet")
LAST = ("corrections", RUNS / "seed0", "--steps", "last", *TWO)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def report():
    return read_report(Path("report.h5"))["corrections"]


def test_a_table_and_sentences_say_what_flips_it_in_the_units_of_the_data(capsys):
    code, out, err = dynprobe(capsys, *LAST, "--sample", "151", "-o", "report.h5")
    assert code == 0, err
    assert "distance_median" in out
    assert "sample 151 (malignant → benign): worst_area" in out
    assert "0 of 1,000 samples fail" in out
    found = report()
    assert found["outcome"][0].tolist() == ["optimal"]
    names, data = found["feature"].tolist(), load_breast_cancer()
    ends = {
        m[0]: (float(m[1]), float(m[2]))
        for m in re.findall(r"(worst_\w+) [\d.]+ → \[([\d.]+), ([\d.]+)\]", out)
    }
    assert set(ends) == set(names)
    for i, name in enumerate(names):
        low, high = found["box_low"][0, 0, i], found["box_high"][0, 0, i]
        assert low <= ends[name][0] < ends[name][1] <= high  # printed inwards
        column = data.data[:, data.feature_names.tolist().index(name.replace("_", " "))]
        assert np.isclose(column, found["value"][0, 0, i], rtol=1e-5).any()  # not standardised


def test_json_is_one_document(capsys):
    code, out, err = dynprobe(capsys, *LAST, "--sample", "151,136", "--format", "json")
    assert code == 0, err

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(out, parse_constant=refuse)
    outcomes = find(document, "outcome")
    assert "optimal" in json.dumps(outcomes)
    assert "none_exists" in json.dumps(outcomes)


def find(document, key):
    """The first value of a key, at any depth."""
    if isinstance(document, dict):
        if key in document:
            return document[key]
        document = list(document.values())
    found = [find(part, key) for part in document] if isinstance(document, list) else []
    return next((part for part in found if part is not None), None)


def test_what_was_judged_is_not_judged_again(capsys):
    assert dynprobe(capsys, *LAST, "--sample", "151", "-o", "report.h5")[0] == 0
    first = report()
    assert dynprobe(capsys, *LAST, "--sample", "151", "-o", "report.h5")[0] == 0
    again = report()
    assert again["seconds"].tolist() == first["seconds"].tolist()
    np.testing.assert_array_equal(again["stable_distance"], first["stable_distance"])


def test_its_own_samples_option_replaces_the_shared_one(capsys):
    code, out, _ = dynprobe(capsys, "corrections", "--help")
    assert code == 0
    assert len(re.findall(r"--samples\b", out.split("Returns")[-1])) >= 1
    assert "misclassified:20" in out
    assert "a fixed seeded subset" not in out
    _, others, _ = dynprobe(capsys, "hessian", "--help")
    assert "a fixed seeded subset" in " ".join(others.replace("│", " ").split())
    code, _, err = dynprobe(capsys, *LAST, "--samples", "2", "-o", "report.h5")
    assert code == 0, err
    found = report()
    assert found["sample"].size == 2
    # ranges are those of all data, whatever is judged
    assert found["feature_low"][0].tolist() == pytest.approx([185.2, 12.02])


def test_only_options_that_may_be_replaced_can_be_had_in_ones_own_way():
    @analyzer(returns={"norm": Var()})
    def mine(batches, *, samples: str = "few"):
        """Mine.

        Args:
            samples: Which.
        """

    parameters = inspect.signature(command(declaration_of(mine))).parameters
    assert parameters["samples"].default == "few"

    @analyzer(returns={"norm": Var()})
    def clash(batches, *, batch_size: int = 1):
        """Clash.

        Args:
            batch_size: How many.
        """

    with pytest.raises(TypeError, match="'batch_size' is shared by all analyzers"):
        command(declaration_of(clash))


@pytest.mark.parametrize(
    ("options", "said", "tip"),
    [
        (["--features", "worst_aera"], "worst_aera", "worst_area"),
        (["--target", "harmless"], "--target harmless", "benign"),
        (["--sample", "9999"], "9999", "454"),
        (["--sample", "1", "--samples", "2"], "both", ""),
        (["--samples", "few"], "few", "misclassified"),
        (["--threshold", "0.5"], "2 outputs", "--threshold"),
        (["--shape", "polygon", "--max-changed", "1"], "two features", "--max-changed 2"),
        (["--ranges", "5:1"], "5", ""),
        (["--feature-file", "nowhere.toml"], "nowhere.toml", ""),
    ],
)
def test_what_cannot_be_meant_ends_with_2_and_says_what_to_do(capsys, options, said, tip):
    code, out, err = dynprobe(capsys, *LAST, *options)
    assert code == 2
    assert not out
    message = " ".join(err.split())
    assert said in message
    assert tip in message
    assert "Traceback" not in err


def test_boxes_are_tried_on_the_runs_of_the_call(capsys):
    runs = ("corrections", RUNS / "seed0", RUNS / "seed1", "--steps", "last", "--transfer", *TWO)
    code, _, err = dynprobe(capsys, *runs, "--sample", "83,151", "-o", "report.h5")
    assert code == 0, err
    found = report()
    other = found["other"].tolist()
    assert len(other) == len(set(other)) == 2
    for i in range(2):  # on its own checkpoint every box holds
        own = found["transfer"][i][:, other.index(found["run"][i])]
        assert set(own[np.isfinite(own)]) <= {1.0}
        assert np.isfinite(found["transfer"]).any()


MODEL = """
from torch import nn

def gelu():
    return nn.Sequential(nn.Linear(30, 4), nn.GELU(), nn.Linear(4, 2))
"""


def test_a_network_with_gelu_is_refused_by_name(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "run").mkdir()
    shapes = {"0.weight": (4, 30), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(state, tmp_path / "run" / "step_1.safetensors")
    data = ("--data", "sklearn:breast_cancer", "--data-arg", "standardize=true")
    asked = ("corrections", "run", "--model", "mine:gelu", *data, "--sample", "1")
    code, out, err = dynprobe(capsys, *asked)
    assert code == 2
    assert not out
    assert "GELU" in err
    assert "ReLU" in err
