"""What every analyzer must satisfy. A new one is tested here without a line being written.

An analyzer whose defaults take long gets small options in `QUICK`; nothing else is special to any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dynprobe.analyzers.core import registry
from dynprobe.analyzers.core.contract import labelled
from dynprobe.analyzers.core.loop import (
    Job,
    MemoryStore,
    checkpoint_units,
    group_unit,
    measure,
    pair_unit,
    run_unit,
)
from dynprobe.analyzers.core.result import FAILED, stack
from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.cli.figure import draw
from dynprobe.io.report import read_report, write_result

QUICK: dict[str, dict] = {
    "corrections": {"sample": "0,5", "features": "3,9", "sampled": 500},
    "embedding": {"max_dense": 80, "draws": 10},
    "landscape": {"resolution": "5x3"},
    "robustness": {"epsilons": "0.05,0.5", "epsilons_l2": "0.5,3", "pgd_steps": 4},
    "trajectory": {"grid": 3},
    "gradient-covariance": {"minibatch": 4, "top_k": 3},
}

EVERY = sorted(name for name, entry in registry.listing().items() if entry.origin.startswith("dynprobe."))
SAMPLES, CLASSES = 23, 3


@dataclass
class Loaded:
    state: dict
    hash: str
    notes: list = field(default_factory=list)


@dataclass
class InMemory:
    """A checkpoint without a file."""

    state: dict
    step: int
    run: str

    @property
    def path(self):
        return Path(f"{self.run}/step_{self.step}.pt")

    def load(self):
        return Loaded(dict(self.state), f"{self.run} {self.step}")


def network() -> nn.Module:
    """Everything that is easily disturbed: BatchNorm, dropout, a bias, a convolution."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 16, CLASSES),
    )


def data(sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 1, 4, 4, generator=generator).to(dtype)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def make_run(name="run", *, seed=0, sizes=(8, 8, 7), broken=False, dtype=torch.float32) -> Run:
    generator = torch.Generator().manual_seed(seed)
    checkpoints = []
    model = network()
    for step in (0, 10, 100):
        state = {}
        for key, value in model.state_dict().items():
            noise = torch.rand(value.shape, generator=generator)
            state[key] = noise * 0.5 + 0.1 if value.is_floating_point() else value
        if broken:
            state["0.weight"] = torch.full_like(state["0.weight"], math.nan)
        checkpoints.append(InMemory(state, step, name))
    setup = Setup(
        make_model=network,
        fit=lambda model, state, where: (state, []),
        make_batches=lambda: data(list(sizes), dtype),
        make_test_batches=lambda: data(list(sizes), dtype),
        make_loss=lambda: get_loss("cross_entropy"),
        open_other=lambda path: checkpoints[0],
        device=torch.device("cpu"),
        dtype=dtype,
        training={"learning_rate": 0.1, "batch_size": 8},
    )
    return Run(name, checkpoints, setup)


def units_of(declaration, run):
    first, *_, last = run.checkpoints
    return {
        "checkpoint": lambda: checkpoint_units(run, [first, last]),
        "pair": lambda: [pair_unit(run, first, run, last)],
        "run": lambda: [run_unit(run, run.checkpoints)],
        "group": lambda: [group_unit([(r, r.checkpoints) for r in (run, make_run("other", seed=1))])],
    }[declaration.grain]()


def job_of(declaration, **options):
    defaults = {o.name: o.default for o in declaration.options}
    return Job(declaration, defaults | QUICK.get(declaration.name, {}) | options)


def measured(name, run=None, **options):
    declaration = registry.load(name)
    run = run or make_run()
    pieces = [
        p for p, _ in measure(job_of(declaration, **options), units_of(declaration, run), MemoryStore())
    ]
    assert [p.reason for p in pieces if p.status == FAILED] == []
    return declaration, pieces


def result_of(name):
    declaration, pieces = measured(name)
    return declaration, stack(declaration.name, declaration.grain, pieces, {"n_classes": CLASSES})


def numbers(pieces):
    return [{n: a.values for n, a in p.arrays.items() if a.values.dtype.kind in "if"} for p in pieces]


@pytest.mark.parametrize("name", EVERY)
def test_it_returns_what_it_declares(name):
    declaration, pieces = measured(name)
    for piece in pieces:
        returned = {n: a.values for n, a in piece.arrays.items() if n in declaration.returns}
        assert labelled(declaration, returned).keys() == returned.keys()
        assert all(a.values.dtype.kind in "ifuOU" for a in piece.arrays.values())


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_numbers(name):
    _, once = measured(name)
    torch.manual_seed(99)
    torch.randn(5)
    _, again = measured(name)
    for a, b in zip(numbers(once), numbers(again), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


ROUNDING = ("error", "residual", "discrepancy", "orthogonality", "asymmetry")
"""Words in the names of variables that measure rounding itself: in float32 it is another at every split."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_it_does_not_matter_how_the_same_samples_are_split_into_batches(name, dtype):
    _, whole = measured(name, make_run(sizes=(23,), dtype=dtype))
    _, split = measured(name, make_run(sizes=(10, 9, 3, 1), dtype=dtype))
    for a, b in zip(numbers(whole), numbers(split), strict=True):
        for key in a:
            if dtype == torch.float32 and any(word in key for word in ROUNDING):
                continue
            # sums in another order: relative to the size of the array, not of each entry
            scale = np.abs(a[key][np.isfinite(a[key])]).max(initial=1e-6)
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-4 * scale, err_msg=key)


@pytest.mark.parametrize("name", EVERY)
def test_model_mode_and_random_state_are_untouched(name):
    declaration = registry.load(name)
    if not (declaration.wants("model") or declaration.grain in ("run", "group")):
        return
    run = make_run()
    model, *_ = [run.setup.model(slot) for slot in ("", "a", "b")]  # building one draws its first weights
    random_state = torch.get_rng_state()
    units = units_of(declaration, run)
    last = units[-1].workspaces[-1]
    pieces = [p for p, _ in measure(job_of(declaration), units, MemoryStore())]
    assert all(p.status != FAILED for p in pieces)
    assert torch.equal(torch.get_rng_state(), random_state)
    slot = run.setup.model(last.slot)
    filled = slot.state_dict()
    if declaration.grain in ("checkpoint", "pair"):
        for key, value in last.checkpoint.state.items():
            assert torch.equal(filled[key], value), key
    assert not any(m.training for m in slot.modules())
    assert all(p.requires_grad and p.grad is None for p in slot.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("name", EVERY)
def test_nan_weights_fail_with_a_reason_and_do_not_crash(name):
    declaration = registry.load(name)
    run = make_run(broken=True)
    pieces = [p for p, _ in measure(job_of(declaration), units_of(declaration, run), MemoryStore())]
    if declaration.grain == "group":
        assert all(p.status == "incomplete" for p in pieces)
        return
    assert all(p.status == FAILED and "NaN" in p.reason for p in pieces)
    stack(declaration.name, declaration.grain, pieces, {})


@pytest.mark.parametrize("name", EVERY)
def test_its_report_reads_back_as_it_was(name, tmp_path):
    declaration, result = result_of(name)
    write_result(tmp_path / "report.h5", result)
    back = read_report(tmp_path / "report.h5")[declaration.group]
    assert back.arrays.keys() == result.arrays.keys()
    for key, array in result.arrays.items():
        assert back.arrays[key].dims == array.dims, key
        np.testing.assert_array_equal(back[key], array.values, err_msg=key)


@pytest.mark.parametrize("name", EVERY)
def test_every_option_and_every_variable_is_explained(name):
    declaration = registry.load(name)
    assert declaration.line == registry.listing()[name].line or len(declaration.line) > 10
    for option in declaration.options:
        assert len(option.help) > 5, option.name
    for variable, var in declaration.returns.items():
        assert var.long_name, variable


@pytest.mark.parametrize("name", EVERY)
def test_its_figure_draws(name, tmp_path):
    declaration, result = result_of(name)
    if declaration.figure is not None:
        draw(result, declaration, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5000
