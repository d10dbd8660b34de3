"""`trajectory` against plain numpy on runs small enough to hold, and planted paths."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.core.contract import declaration_of, labelled
from dynprobe.analyzers.core.loop import Job, MemoryStore, measure, run_unit
from dynprobe.analyzers.core.result import Array, Piece, Result, stack, tidy
from dynprobe.analyzers.core.workspace import Run, Setup
from dynprobe.analyzers.numerics.directions import random_directions
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.trajectory import trajectory

CROSS_ENTROPY = get_loss("cross_entropy")
STEPS = [0, 10, 20, 40, 80]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double().eval()


def data(sizes: list[int] | None = None) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(19, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (19,), generator=generator)
    sizes = sizes or [8, 8, 3]
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


class Checkpoints(list):
    """Checkpoints that refill one shared model, as those of a run do, and count how often they are read."""

    def __init__(self, states: list[dict], steps: list, build=network) -> None:
        self.shared, self.reads = build(), 0
        super().__init__(_Checkpoint(self, s, t) for s, t in zip(states, steps, strict=True))


class _Checkpoint:
    def __init__(self, owner: Checkpoints, state: dict, step) -> None:
        self.owner, self.state, self.step = owner, state, step

    @property
    def model(self) -> nn.Module:
        self.owner.reads += 1
        self.owner.shared.load_state_dict(self.state)
        return self.owner.shared


def moved(flat: np.ndarray) -> dict:
    model = network()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(flat), model.parameters())
    return copy.deepcopy(model.state_dict())


def start() -> np.ndarray:
    return torch.nn.utils.parameters_to_vector(network().parameters()).detach().numpy()


def walk(n: int = 5, seed: int = 0, scale: float = 0.3) -> np.ndarray:
    steps = np.random.default_rng(seed).standard_normal((n, start().size)) * scale
    return start() + np.cumsum(steps, axis=0)


def run_of(rows: np.ndarray, steps: list | None = None) -> Checkpoints:
    return Checkpoints([moved(row) for row in rows], steps or STEPS[: len(rows)])


def own_loss(flat: np.ndarray) -> Tensor:
    model = network()
    model.load_state_dict(moved(flat))
    inputs, targets = (torch.cat(part) for part in zip(*data(), strict=True))
    with torch.no_grad():
        return functional.cross_entropy(model(inputs), targets, reduction="none")


def test_coordinates_variance_and_distances_equal_the_svd_of_the_rows() -> None:
    rows = walk()
    found = trajectory(run_of(rows), data(), CROSS_ENTROPY, grid=0)
    _, singular, right = np.linalg.svd(rows - rows[-1], full_matrices=False)
    expected = (rows - rows[-1]) @ right[:2].T
    sign = np.sign((expected * found["coordinate"]).sum(0))
    np.testing.assert_allclose(found["coordinate"], expected * sign, atol=1e-10)
    np.testing.assert_allclose(found["explained_variance"], (singular**2 / (singular**2).sum())[:2])
    left = (rows - rows[-1]) - expected @ right[:2]
    np.testing.assert_allclose(found["off_plane_distance"], np.linalg.norm(left, axis=1), atol=1e-10)
    np.testing.assert_allclose(found["distance"], np.linalg.norm(rows - rows[-1], axis=1))
    share = found["off_plane_share"]
    np.testing.assert_allclose(share[:-1] * found["distance"][:-1], found["off_plane_distance"][:-1])
    assert math.isnan(share[-1])


def test_the_true_loss_stands_beside_that_of_the_place_on_the_plane() -> None:
    """The loss in the plane is not the checkpoint's loss, and a picture shows only the former."""
    rows = walk(scale=0.8)
    found = trajectory(run_of(rows), data(), CROSS_ENTROPY, grid=0)
    for i, row in enumerate(rows):
        own = own_loss(row)
        assert found["loss"][i] == pytest.approx(float(own.mean()), rel=1e-12)
        assert found["loss_stderr"][i] == pytest.approx(float(own.std()) / math.sqrt(19), rel=1e-10)
    _, _, right = np.linalg.svd(rows - rows[-1], full_matrices=False)
    places = rows[-1] + (rows - rows[-1]) @ right[:2].T @ right[:2]
    expected = [float(own_loss(place).mean()) for place in places]
    np.testing.assert_allclose(found["plane_loss"], expected, rtol=1e-9)
    assert found["plane_loss"][-1] == pytest.approx(found["loss"][-1], rel=1e-12)
    assert np.abs(found["plane_loss"] / found["loss"] - 1)[:-1].max() > 0.01


def test_a_run_inside_a_plane_has_its_own_loss_there_and_no_distance() -> None:
    generator = np.random.default_rng(2)
    angle = np.linspace(0, 2, 5)
    rows = start() + np.column_stack([np.cos(angle), angle]) @ generator.standard_normal((2, start().size))
    found = trajectory(run_of(rows), data(), CROSS_ENTROPY, grid=0)
    assert found["explained_variance"].sum() == pytest.approx(1.0, abs=1e-12)
    assert found["off_plane_distance"].max() < 1e-12
    np.testing.assert_allclose(found["plane_loss"], found["loss"], rtol=1e-10)


def test_landscape_plane_places_by_least_squares_in_units_of_its_directions() -> None:
    """Filter-normalised directions are not of unit length: <D, d>/‖d‖ is off by a factor ‖d‖."""
    rows = walk()
    model = network()
    model.load_state_dict(moved(rows[-1]))
    directions = random_directions(model, 2, seed=4)
    flat = np.stack([torch.cat([t.flatten() for t in d.values()]).numpy() for d in directions])
    rows[1] = rows[-1] + 0.25 * flat[0] - 0.5 * flat[1]
    found = trajectory(run_of(rows), data(), CROSS_ENTROPY, plane="landscape", seed=4, grid=0)
    np.testing.assert_allclose(found["coordinate"][1], [0.25, -0.5], atol=1e-12)
    assert found["off_plane_distance"][1] < 1e-12
    expected, *_ = np.linalg.lstsq(flat.T, (rows - rows[-1]).T, rcond=None)
    np.testing.assert_allclose(found["coordinate"], expected.T, atol=1e-12)
    np.testing.assert_allclose(found["direction_norm"], np.linalg.norm(flat, axis=1))
    shown = 1 - (found["off_plane_distance"] ** 2).sum() / (found["distance"] ** 2).sum()
    assert found["explained_variance"].sum() == pytest.approx(shown)
    assert "random_walk" not in found


def test_random_walk_stands_beside_explained_variance_at_the_runs_own_steps() -> None:
    generator = np.random.default_rng(0)
    steps = [0, 1, 2, 4, 8, 16, 32, 64]
    wide = nn.Linear(200, 100, bias=False).double()
    jumps = torch.from_numpy(
        generator.standard_normal((7, 100, 200)) * np.sqrt(np.diff(steps))[:, None, None]
    )
    weights = torch.cat([torch.zeros(1, 100, 200, dtype=torch.float64), torch.cumsum(jumps, 0)])
    run = Checkpoints([{"weight": w} for w in weights], steps, build=lambda: copy.deepcopy(wide))
    batch = (torch.randn(4, 200, dtype=torch.float64), torch.zeros(4, 100, dtype=torch.float64))
    found = trajectory(run, [batch], get_loss("mse"), grid=0)
    np.testing.assert_allclose(found["explained_variance"], found["random_walk"], atol=0.02)
    centred = trajectory(run, [batch], get_loss("mse"), grid=0, center="mean")
    np.testing.assert_allclose(centred["explained_variance"], centred["random_walk"], atol=0.02)
    assert abs(centred["random_walk"][0] - found["random_walk"][0]) > 0.05


def test_surface_holds_the_whole_path_and_agrees_with_it() -> None:
    rows = walk()
    found = trajectory(run_of(rows), data(), CROSS_ENTROPY, grid=7)
    x, y = found["x"], found["y"]
    assert found["surface"].shape == found["surface_stderr"].shape == (7, 7)
    for axis, path in ((x, found["coordinate"][:, 0]), (y, found["coordinate"][:, 1])):
        assert axis[0] < path.min()
        assert axis[-1] > path.max()
        assert 0.0 in axis
    assert found["surface"][y == 0, x == 0][0] == pytest.approx(found["loss"][-1], rel=1e-12)
    assert found.spent["forwards"] >= 5 + 5 + 49


def test_more_components_are_reported_and_the_plane_stays_that_of_the_first_two() -> None:
    rows = walk()
    two = trajectory(run_of(rows), data(), CROSS_ENTROPY, grid=0)
    four = trajectory(run_of(rows), data(), CROSS_ENTROPY, grid=0, components=4)
    assert four["coordinate"].shape == (5, 4)
    assert four["component"].tolist() == [1, 2, 3, 4]
    assert four["explained_variance"].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(four["off_plane_distance"], two["off_plane_distance"], atol=1e-12)
    np.testing.assert_allclose(four["plane_loss"], two["plane_loss"], rtol=1e-12)


def test_two_checkpoints_lie_on_a_line_and_it_says_so() -> None:
    found = trajectory(run_of(walk(2)), data(), CROSS_ENTROPY)
    assert found["coordinate"].shape == (2, 1)
    assert found["off_plane_distance"].max() < 1e-12
    assert "surface" not in found
    assert any("straight line" in note for note in found.notes)
    labelled(declaration_of(trajectory), found)


@pytest.mark.parametrize("rows", [walk(1), np.stack([start()] * 3)])
def test_a_run_without_a_path_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(OptionError, match=r"at least two|same point"):
        trajectory(run_of(rows), data(), CROSS_ENTROPY)


@pytest.mark.parametrize("options", [
    {"grid": 2}, {"seed": -1}, {"normalize": "none"}, {"ignore_1d": False},
    {"plane": "landscape", "components": 3}, {"plane": "landscape", "center": "mean"},
])  # fmt: skip
def test_options_without_effect_or_sense_are_refused_before_any_checkpoint_is_read(options: dict) -> None:
    run = run_of(walk())
    with pytest.raises(OptionError):
        trajectory(run, data(), CROSS_ENTROPY, **options)
    assert run.reads == 0


def test_nan_checkpoint_is_named_when_called_without_the_framework() -> None:
    rows = walk()
    rows[2, 3] = np.nan
    with pytest.raises(OptionError, match=r"positions \[2\]"):
        trajectory(run_of(rows), data(), CROSS_ENTROPY)


def test_a_killed_run_resumes_to_the_same_numbers() -> None:
    class Parts(dict):
        limit: int | None = None

        def put(self, name: str, arrays) -> None:
            if self.limit is not None and len(self) >= self.limit:
                raise KeyboardInterrupt
            self[name] = {k: np.array(v) for k, v in arrays.items()}

    whole = trajectory(run_of(walk()), data(), CROSS_ENTROPY, grid=5)
    parts = Parts()
    for limit in (3, 8):
        parts.limit = limit
        with pytest.raises(KeyboardInterrupt):
            trajectory(run_of(walk()), data(), CROSS_ENTROPY, partial=parts, grid=5)
    parts.limit = None
    seen: list[tuple[int, int]] = []
    resumed = trajectory(
        run_of(walk()),
        data(),
        CROSS_ENTROPY,
        partial=parts,
        progress=lambda done, total, what: seen.append((done, total)),
        grid=5,
    )
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)
    assert seen[-1] == (35, 35)


def test_unknown_steps_fall_back_to_an_evenly_spaced_null() -> None:
    known = trajectory(run_of(walk(), [0, 1, 2, 3, 4]), data(), CROSS_ENTROPY, grid=0)
    unknown = trajectory(run_of(walk(), [None] * 5), data(), CROSS_ENTROPY, grid=0)
    np.testing.assert_allclose(known["random_walk"], unknown["random_walk"])


def test_batchnorm_plane_uses_the_last_checkpoints_statistics_and_says_so() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()

    states = []
    for seed in range(4):
        model = build()
        torch.manual_seed(seed)
        model(torch.randn(16, 6, dtype=torch.float64) * (seed + 1))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, dtype=torch.float64)
        states.append(model.state_dict())
    run = Checkpoints(states, [0, 1, 2, 3], build)
    frozen = trajectory(run, data(), CROSS_ENTROPY, grid=0)
    assert any("BatchNorm" in note for note in frozen.notes)
    fresh = trajectory(run, data(), CROSS_ENTROPY, grid=0, batchnorm="recompute")
    np.testing.assert_array_equal(frozen["loss"], fresh["loss"])
    assert not np.allclose(frozen["plane_loss"], fresh["plane_loss"])
    assert all(torch.equal(v, states[-1][k]) for k, v in run.shared.state_dict().items())


def test_every_checkpoint_is_read_four_times_however_long_the_run() -> None:
    run = run_of(walk(9), list(range(9)))
    trajectory(run, data(), CROSS_ENTROPY, grid=0)
    assert run.reads <= 4 * len(run) + 5


def make_run(rows: np.ndarray, name: str = "r") -> Run:
    def loaded(i: int) -> SimpleNamespace:
        return SimpleNamespace(state=moved(rows[i]), hash=f"{name}{i}", notes=[])

    checkpoints = [
        SimpleNamespace(path=Path(f"{name}/{i}.pt"), run=name, step=STEPS[i], load=partial(loaded, i))
        for i in range(len(rows))
    ]
    return Run(name, checkpoints, Setup(
        make_model=network, fit=lambda model, state, where: (state, []), make_batches=data,
        make_test_batches=lambda: None, make_loss=lambda: CROSS_ENTROPY, open_other=lambda path: None,
        device=torch.device("cpu"), dtype=torch.float64,
    ))  # fmt: skip


def through_the_framework(*runs: Run, **options) -> Result:
    declaration = declaration_of(trajectory)
    job = Job(declaration, {o.name: o.default for o in declaration.options} | {"grid": 5} | options)
    pieces = [p for p, _ in measure(job, [run_unit(r, r.checkpoints) for r in runs], MemoryStore())]
    return stack("trajectory", "run", pieces, {})


@pytest.mark.parametrize("options", [{}, {"plane": "landscape"}, {"grid": 0}, {"components": 3}])
def test_through_the_framework_it_has_the_names_and_dims_that_reports_rely_on(options: dict) -> None:
    result = through_the_framework(make_run(walk()), **options)
    assert str(result["status"]) == "ok", result["reason"]
    dims = {name: result.arrays[name].dims for name in result.arrays}
    assert dims["coordinate"] == ("checkpoint", "component")
    assert dims["explained_variance"] == ("component",)
    assert dims["off_plane_distance"] == dims["loss"] == dims["plane_loss"] == ("checkpoint",)
    assert result["step"].tolist() == STEPS
    plain = trajectory(run_of(walk()), data(), CROSS_ENTROPY, **{"grid": 5} | options)
    np.testing.assert_allclose(result["coordinate"], plain["coordinate"], rtol=1e-12)


def test_a_broken_checkpoint_is_left_out_and_the_rest_is_measured() -> None:
    rows = walk()
    rows[1, 0] = np.nan
    result = through_the_framework(make_run(rows))
    assert "incomplete" in str(result["status"])
    assert result["step"].tolist() == [0, 20, 40, 80]
    assert np.isfinite(result["loss"]).all()


@pytest.mark.parametrize("style", ["", "contour", "filled", "relief"])
@pytest.mark.parametrize("n_runs", [1, 2])
def test_figure_draws_one_row_per_run_with_the_warning(style: str, n_runs: int) -> None:
    from matplotlib.figure import Figure

    result = through_the_framework(*[make_run(walk(seed=i), f"run{i}") for i in range(n_runs)])
    figure = Figure(layout="constrained")
    declaration_of(trajectory).figure(result, figure, style)
    figure.canvas.draw()
    texts = " ".join(a.get_xlabel() + a.get_ylabel() for a in figure.axes)
    assert "loss ± s.e." in texts
    assert "never the converse" in figure.get_suptitle()
    if style != "relief":
        assert "random walk" in texts


def test_figure_draws_without_a_surface_and_with_unknown_steps_and_infinite_losses() -> None:
    from matplotlib.figure import Figure

    found = trajectory(run_of(walk()), data(), CROSS_ENTROPY, grid=5)
    found["surface"][0] = np.inf
    found["surface"][1, 1] = np.nan
    arrays = labelled(declaration_of(trajectory), found)
    arrays["step"] = Array(("checkpoint",), tidy([None] * 5))
    for drop in ((), ("surface", "surface_stderr", "x", "y")):
        kept = {name: array for name, array in arrays.items() if name not in drop}
        result = stack(
            "trajectory", "run", [Piece("k", {"run": "r"}, kept)], {"n_classes": 3, "loss": "cross_entropy"}
        )
        figure = Figure(layout="constrained")
        declaration_of(trajectory).figure(result, figure, "filled")
        figure.canvas.draw()
    with pytest.raises(OptionError, match="'cubist'"):
        declaration_of(trajectory).figure(result, Figure(), "cubist")
