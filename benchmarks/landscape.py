"""Loss surfaces: dynprobe beside its peers, the same network, data and grid, one thread.

    python benchmarks/landscape.py --tomgoldstein DIR      # a checkout of tomgoldstein/loss-landscape
    python benchmarks/landscape.py --nets mlp,cnn --rounds 5

Every peer that can be imported runs (`pip install --no-deps loss-landscapes loss-landscape-3d gradfield
nngeom losscape`); the others are named with the reason. All take turns, a grid each, and the best of several
rounds counts, measured with the process's CPU clock; so does the sgemm peak. "x limit" is the time per point
over the forward pass's FLOPs at that peak. Only ratios within one run mean anything. What is measured is the
evaluation of the grid; drawing directions and preparing (shown for dynprobe) come once on top.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import contextlib
import copy
import importlib
import io
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from dynprobe.analyzers.numerics.directions import random_directions
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.numerics.surface import Surface
from dynprobe.io.resnets import CifarResNet

Grid = np.ndarray
Runner = Callable[[Grid], Grid | None]  # axis → values[y, x], None where the peer chooses its own directions


@dataclass
class Task:
    """One network with its data, directions and grid."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    resolution: int

    def __post_init__(self) -> None:
        self.model.eval()
        self.directions = random_directions(self.model, 2, seed=0)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.model(self.inputs)
        self.flops = counter.get_total_flops()
        self.batches = [(self.inputs, self.targets)]

    def copy(self) -> nn.Module:
        """Return the network for an entrant's own use."""
        return copy.deepcopy(self.model)

    def lists(self) -> list[list[Tensor]]:
        """Return the directions as lists in the parameters' order."""
        return [list(direction.values()) for direction in self.directions]


def resnet20() -> Task:
    return _task("ResNet-20, 64 examples", CifarResNet(20), (64, 3, 32, 32), 5)


def cnn() -> Task:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return _task("CNN, 512 examples of 8x8", model, (512, 1, 8, 8), 25)


def mlp() -> Task:
    return _task("MLP 64-256-256-10, 512 examples", _mlp(64, 256, 256), (512, 64), 25)


def wide() -> Task:
    return _task("MLP 784-100-64-10, 512 examples", _mlp(784, 100, 64), (512, 784), 25)


TASKS = {"resnet20": resnet20, "cnn": cnn, "mlp": mlp, "wide": wide}


def _mlp(*widths: int) -> nn.Module:
    first, second, third = widths
    hidden = [nn.Linear(first, second), nn.ReLU(), nn.Linear(second, third), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(third, 10))


def _task(name: str, model: nn.Module, shape: tuple[int, ...], resolution: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no zeros: loss-landscapes divides by the norms of biases
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for _ in range(3):
            model.train()(inputs)  # running statistics that fit the data
    targets = torch.randint(10, (shape[0],), generator=generator)
    return Task(name, model, inputs, targets, resolution)


def dynprobe(*metrics: str) -> Callable[[Task], Runner]:
    def prepare(task: Task) -> Runner:
        start = time.process_time()
        loss = get_loss("cross_entropy")
        surface = Surface(task.model, task.batches, loss, task.directions, metrics=metrics)
        surface.row(0.0, [0.0])
        seconds = time.process_time() - start
        print(f"  dynprobe ({', '.join(metrics)}) prepared in {seconds:.2f} s: {'; '.join(surface.notes)}")
        return lambda axis: np.stack([surface.row(y, axis.tolist())["loss"] for y in axis.tolist()])

    return prepare


class Tomgoldstein:
    """Its own `crunch`, as `plot_surface.py` runs it, and its functions alone on data already in memory."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        # What its modules import but a surface does not use: MPI, torchvision's data, its plots and zoo.
        for name in (
            "mpi4py",
            "torchvision",
            "dataloader",
            "model_loader",
            "projection",
            "plot_1D",
            "plot_2D",
        ):
            sys.modules.setdefault(name, types.ModuleType(name))
        self.plotter = importlib.import_module("net_plotter")
        self.evaluation = importlib.import_module("evaluation")
        self.h5_util = importlib.import_module("h5_util")
        self.surface = importlib.import_module("plot_surface")

    def check_directions(self, task: Task) -> None:
        """Say whether its random directions are ours."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = [self.plotter.create_random_direction(task.model, "weights") for _ in range(2)]
        same = all(
            torch.equal(a, b)
            for d, e in zip(task.lists(), theirs, strict=True)
            for a, b in zip(d, e, strict=True)
        )
        print(f"  directions equal tomgoldstein/loss-landscape's bit for bit: {same}")

    def crunch(self, task: Task) -> Runner:
        """Its loop: a loader run and an HDF5 file written at every point."""
        import h5py

        model = task.copy()
        weights = self.plotter.get_weights(model)
        loader = DataLoader(TensorDataset(task.inputs, task.targets), batch_size=len(task.inputs))
        options = types.SimpleNamespace(dir_type="weights", loss_name="crossentropy", cuda=False, ngpu=1)
        folder = Path(tempfile.mkdtemp())
        with h5py.File(folder / "directions.h5", "w") as file:
            for name, direction in zip(("xdirection", "ydirection"), task.lists(), strict=True):
                self.h5_util.write_list(file, name, direction)
        directions = self.plotter.load_directions(str(folder / "directions.h5"))

        def run(axis: Grid) -> Grid:
            path = folder / "surface.h5"
            with h5py.File(path, "w") as file:
                file["xcoordinates"] = file["ycoordinates"] = axis
            with contextlib.redirect_stdout(io.StringIO()):
                self.surface.crunch(
                    str(path), model, weights, None, directions, loader, "loss", "acc", None, 0, options
                )
            with h5py.File(path) as file:
                values: Grid = file["loss"][:]
            return values

        return run

    def functions(self, task: Task) -> Runner:
        """Its arithmetic without its loop: the kindest way to use it."""
        model = task.copy()
        weights = self.plotter.get_weights(model)
        directions = [[step.numpy() for step in direction] for direction in task.lists()]
        criterion = nn.CrossEntropyLoss()

        def at(x: float, y: float) -> float:
            self.plotter.set_weights(model, weights, directions, (x, y))
            return float(self.evaluation.eval_loss(model, criterion, task.batches)[0])

        return lambda axis: np.array([[at(x, y) for x in axis] for y in axis])


def loss_landscapes(task: Task) -> Runner:
    package = importlib.import_module("loss_landscapes")
    metrics = importlib.import_module("loss_landscapes.metrics")
    metric = metrics.Loss(nn.CrossEntropyLoss(), task.inputs, task.targets)
    model = task.copy()

    def run(axis: Grid) -> None:
        package.random_plane(model, metric, distance=1, steps=len(axis), normalization="filter")

    return run


def loss_landscape_3d(task: Task) -> Runner:
    package = importlib.import_module("loss_landscape_3d")
    calculator = package.LossLandscapeCalculator(task.copy(), task.batches, nn.CrossEntropyLoss())
    state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}

    def run(axis: Grid) -> Grid:
        values: Grid = calculator.calculate(axis, axis, *task.directions, state)
        return values.T

    return run


def gradfield(task: Task) -> Runner:
    package = importlib.import_module("gradfield.torch_adapter")
    function = package.model_loss_fn(task.model, functional.cross_entropy, task.inputs, task.targets)

    def run(axis: Grid) -> None:
        function(*np.meshgrid(axis, axis))

    return run


def nngeom(task: Task) -> Runner:
    models = importlib.import_module("nngeom.models")
    lossland = importlib.import_module("nngeom.lossland")
    model = models.Model(
        task.copy(), lambda module, batch: functional.cross_entropy(module(batch[0]), batch[1])
    )
    directions = [torch.cat([d.flatten() for d in direction]).double().numpy() for direction in task.lists()]

    def run(axis: Grid) -> Grid:
        plane = lossland.plane_slice_2d(model, task.batches[0], steps=len(axis), directions=directions)
        values: Grid = plane.losses
        return values

    return run


def losscape(task: Task) -> Runner:
    landscape = importlib.import_module("losscape.create_landscape")
    model = task.copy()
    weights = [p.data for p in model.parameters()]

    def at(x: float, y: float) -> float:
        landscape._set_weights(model, weights, task.lists(), np.array([x, y]))
        return float(landscape.compute_loss(model, task.batches, None))

    return lambda axis: np.array([[at(x, y) for x in axis] for y in axis])


def landscaper(task: Task) -> Runner:
    compute = importlib.import_module("landscaper.compute")

    def scalar(model: nn.Module, batch: Any) -> float:
        return float(functional.cross_entropy(model(batch[0]), batch[1]))

    model = task.copy()

    def run(axis: Grid) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            compute.compute_loss_landscape(
                model,
                task.batches[0],
                task.lists(),
                scalar,
                steps=len(axis),
                distance=1.0,
                dim=2,
                device="cpu",
            )

    return run


def loss_landscape_anim(task: Task) -> Runner:  # noqa: ARG001 - imported to say why it does not run
    importlib.import_module("loss_landscape_anim")
    raise ImportError("evaluates only models of its own class")


PEERS: dict[str, Callable[[Task], Runner]] = {
    "loss-landscapes": loss_landscapes,
    "loss-landscape-3d": loss_landscape_3d,
    "gradfield": gradfield,
    "nngeom": nngeom,
    "losscape": losscape,
    "landscaper": landscaper,
    "loss-landscape-anim": loss_landscape_anim,
}


def sgemm_peak(seconds: float = 0.2) -> float:
    """FLOP per second of a square float32 matrix product that fits the cache."""
    a, b, c = (torch.randn(1024, 1024) for _ in range(3))
    best, end = 0.0, time.process_time() + seconds
    while time.process_time() < end:
        start = time.process_time()
        torch.mm(a, b, out=c)
        best = max(best, 2 * 1024**3 / (time.process_time() - start))
    return best


def reference(task: Task, x: float, y: float) -> float:
    """The loss at one point in float64, tensor by tensor."""
    model = task.copy().double()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor += x * task.directions[0][name].double() + y * task.directions[1][name].double()
        return float(functional.cross_entropy(model(task.inputs.double()), task.targets))


def check(task: Task, axis: Grid, values: Grid | None) -> str:
    """The largest relative difference from float64 at five points."""
    if values is None:
        return "own directions"
    last = len(axis) - 1
    points = [(0, 0), (0, last), (last // 2, last // 2), (last, last // 3), (last, last)]
    errors = [abs(values[j, i] / reference(task, axis[i], axis[j]) - 1) for j, i in points]
    return f"{max(errors):.0e}"


def measure(task: Task, entrants: dict[str, Callable[[Task], Runner]], rounds: int) -> None:
    """Let all entrants take turns and print the table."""
    axis = np.linspace(-1, 1, task.resolution)
    n_parameters = sum(p.numel() for p in task.model.parameters())
    size = f"{n_parameters:,} parameters, {task.flops / 1e9:.3f} GFLOP a point"
    print(f"\n{task.name}: {size}, {len(axis)}x{len(axis)} points")
    runners: dict[str, Runner] = {}
    errors: dict[str, str] = {}
    for name, prepare in entrants.items():
        try:
            runners[name] = prepare(task)
            errors[name] = check(task, axis, runners[name](axis))
        except Exception as error:
            runners.pop(name, None)
            print(f"  {name} skipped: {(str(error) or type(error).__name__).splitlines()[0]}")
    best = dict.fromkeys(runners, np.inf)
    peak = 0.0
    for _ in range(rounds):
        peak = max(peak, sgemm_peak())
        for name, run in runners.items():
            start = time.process_time()
            run(axis)
            best[name] = min(best[name], (time.process_time() - start) / len(axis) ** 2)
    limit = task.flops / peak
    ours = best["dynprobe"]
    print(f"  sgemm peak {peak / 1e9:.0f} GFLOP/s: limit {limit * 1e3:.3f} ms a point")
    print(f"  {'':34}{'ms a point':>11}{'x limit':>9}{'x dynprobe':>12}   max. error against float64")
    for name, seconds in sorted(best.items(), key=lambda item: item[1]):
        print(
            f"  {name:34}{seconds * 1e3:11.3f}{seconds / limit:9.2f}{seconds / ours:12.2f}   {errors[name]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tomgoldstein", type=Path, metavar="DIR", help="a checkout of its repository")
    parser.add_argument("--nets", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tomgoldstein = Tomgoldstein(options.tomgoldstein) if options.tomgoldstein else None
    entrants = {"dynprobe": dynprobe("loss"), "dynprobe, loss and accuracy": dynprobe("loss", "accuracy")}
    if tomgoldstein:
        entrants["tomgoldstein"] = tomgoldstein.crunch
        entrants["tomgoldstein, its functions only"] = tomgoldstein.functions
    else:
        print("tomgoldstein/loss-landscape skipped: give --tomgoldstein DIR")
    for name in options.nets.split(","):
        task = TASKS[name]()
        if tomgoldstein:
            tomgoldstein.check_directions(task)
        measure(task, entrants | PEERS, options.rounds)


if __name__ == "__main__":
    main()
