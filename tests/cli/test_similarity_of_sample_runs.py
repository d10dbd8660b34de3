"""What the papers report of representations is found again in the sample runs, each with its error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dynprobe.cli.app import main
from dynprobe.io.report import read_report

SAMPLES = Path(__file__).resolve().parents[2] / "sample_checkpoints"


def measured(analyzer, *arguments, folder, monkeypatch):
    """The result of a call, as its report has it."""
    report = folder / "report.h5"
    argv = ["dynprobe", analyzer, *map(str, arguments), "-o", str(report), "--no-figure", "--quiet"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    return read_report(report)[analyzer]


def test_the_most_similar_layer_of_another_seed_is_the_same_layer(tmp_path, monkeypatch):
    """Kornblith et al. (2019), section 6.1, for CKA."""
    runs = [SAMPLES / "bn_cnn_seed0", SAMPLES / "bn_cnn_seed1"]
    asked = (*runs, "--steps", "last", "--samples", "400")
    found = measured("cka", *asked, folder=tmp_path, monkeypatch=monkeypatch)
    assert found["same_layer"][0] == 1
    assert found["same_layer_stderr"][0] < 0.05
    same = np.diagonal(found["cka"][0])
    assert (same > 0.85).all()
    assert (np.diagonal(found["cka_stderr"][0]) < 0.03).all()


def test_layers_converge_from_the_bottom_up(tmp_path, monkeypatch):
    """Raghu et al. (2017), section 4.1."""
    asked = (SAMPLES / "bn_cnn_seed0", "--against", "final", "--layers", "all", "--samples", "300")
    found = measured("cka", *asked, folder=tmp_path, monkeypatch=monkeypatch)
    assert found["depth_tau"][0] > 0.6
    assert found["depth_tau_stderr"][0] < 0.1
    assert found["depth_tau_p"][0] < 0.01
    steps = dict(zip(found["curve_layer"].tolist(), found["converged_step"][0], strict=True))
    assert steps["conv1"] < steps["relu2"] < steps["conv3"] < steps["fc"]
    assert found["finding"][0].startswith("bottom-up")


@pytest.mark.parametrize(("analyzer", "statistic"), [("cka", "cka"), ("cca", "pwcca")])
def test_networks_that_generalise_are_closer_to_each_other_than_networks_that_memorise(
    analyzer, statistic, tmp_path, monkeypatch
):
    """Morcos et al. (2018), section 3.1: in the late layers, and not in the first."""
    runs = sorted((SAMPLES / "memorisation").iterdir())
    asked = (*runs, "--group", "labels", "--steps", "last", "--samples", "300", "--layers", "conv1,fc")
    if analyzer == "cca":
        asked += ("--jackknife-blocks", "4", "--chance-permutations", "0")
    found = measured(analyzer, *asked, folder=tmp_path, monkeypatch=monkeypatch)
    assert found[statistic].shape == (45, 2, 2)
    pairs, layers = found["group_pair"].tolist(), found["group_layer"].tolist()
    value, error = found["group_similarity"][0], found["group_similarity_stderr"][0]
    late = layers.index("fc")
    true, shuffled = pairs.index("true"), pairs.index("shuffled")
    difference = value[late, true] - value[late, shuffled]
    assert difference > 4 * np.hypot(error[late, true], error[late, shuffled])
    contrast = next(i for i, name in enumerate(found["contrast"].tolist()) if "within" not in name)
    assert found["contrast_p"][0, late, contrast] < 0.01
    first = layers.index("conv1")
    assert abs(value[first, true] - value[first, shuffled]) < 0.2 * difference
