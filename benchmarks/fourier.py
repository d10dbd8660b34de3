"""Frequency-resolved errors: dynprobe beside the published computations, the same data, one thread.

    python benchmarks/fourier.py
    python benchmarks/fourier.py --parts filter,spectrum --rounds 5
    python benchmarks/fourier.py --parts filter --wide          # 5,000 samples of 784 features as well

No package computes this from saved checkpoints, so the peers are the published computations written anew, in
the form that favours them: float32, the target filtered once, no loop in Python but that over checkpoints and
widths. finufft takes part where it can be imported. All take turns and the best of several rounds counts,
measured with the process's CPU clock; memory is the peak beyond that before the run, in a process of its own
which has loaded everything (Linux only). Errors are the largest over checkpoints and widths, against float64
with exact distances, or against the Fourier sum with phases in extended precision. Only ratios within one run
mean anything.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import functools
import importlib
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from dynprobe.analyzers.numerics.fourier_sums import fourier_sums
from dynprobe.analyzers.numerics.gaussian_filter import (
    centred,
    filter_energies,
    sample_blocks,
    sampled_rows,
)

Floats = NDArray[np.float64]

CHECKPOINTS, OUTPUTS, DELTAS = 20, 10, 8
BLOCKS = 20
"""Blocks of samples that the filter's standard errors leave out in turn."""


@dataclass
class Task:
    """Inputs, one-hot labels and the outputs of checkpoints, all float32.

    Attributes:
        inputs: Shape (n, d).
        target: Shape (n, c).
        output: Shape (t, n, c).
        deltas: Widths of the filter.
    """

    inputs: Tensor
    target: Tensor
    output: Tensor
    deltas: list[float]

    def first(self, n: int) -> Task:
        """The same with fewer samples."""
        return Task(self.inputs[:n], self.target[:n], self.output[:, :n], self.deltas)


def digits(n: int, side: int) -> Task:
    """Digits, repeated with noise where more are wanted, and softmax outputs that approach their labels."""
    generator = torch.Generator().manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    rows = torch.arange(n) % len(images)
    inputs = (
        images[rows] if side == 8 else functional.interpolate(images, (side, side), mode="bilinear")[rows]
    )
    inputs = inputs.flatten(1)
    for copies in inputs[len(images) :].split(10_000):
        copies.add_(torch.randn(copies.shape, generator=generator), alpha=0.1)
    target = functional.one_hot(torch.tensor(data.target)[rows]).float()
    output = torch.empty(CHECKPOINTS, n, OUTPUTS)
    for t, sharpness in enumerate(np.linspace(0, 8, CHECKPOINTS)):
        noise = torch.randn(n, OUTPUTS, generator=generator)
        output[t] = (sharpness * target + 0.5 * noise).softmax(1)
    some = inputs[: min(n, 1500)].double()
    median = float(torch.pdist(some).square().median())
    return Task(inputs, target, output, [median / w for w in np.geomspace(4, 32, DELTAS)])


def relative(low: Floats, high: Floats) -> Floats:
    """e_low and e_high from energies (delta, 1 + t) of the target and the residuals, shape (2, t, delta)."""
    return np.stack([np.sqrt(part[:, 1:] / part[:, :1]).T for part in (low, high)])


# The Gaussian filter


def streamed(task: Task, *, rows: int | None = None, errors: bool = False) -> Floats:
    """Ours: one pass for all checkpoints, outputs and widths."""
    n = len(task.inputs)
    functions = torch.empty(n, 1 + len(task.output), task.target.shape[1])
    functions[:, 0] = task.target
    torch.sub(task.output, task.target, out=functions.movedim(0, 1)[1:])
    found = filter_energies(
        centred(task.inputs),
        functions,
        task.deltas,
        rows=sampled_rows(n, rows or n, 0),
        blocks=sample_blocks(n, BLOCKS, 0),
        **({} if errors else {"influence_rows": 0}),
    )
    return relative(found.low, found.high)


def squared_distances(x: Tensor) -> Tensor:
    size = x.square().sum(1)
    return (size[:, None] + size).addmm_(x, x.T, alpha=-2)


def stored(task: Task) -> Floats:
    """The authors' way: kernels of all widths are kept and multiplied with the outputs of each checkpoint."""
    distance = squared_distances(task.inputs - task.inputs.mean(0))
    kernels = []
    for delta in task.deltas:
        kernel = torch.exp(distance / (-2 * delta))
        kernels.append(kernel.div_(kernel.sum(1, keepdim=True)))
    target_low = [kernel @ task.target for kernel in kernels]
    found = np.empty((2, len(task.output), len(task.deltas)))
    for t, output in enumerate(task.output):
        for d, kernel in enumerate(kernels):
            found[:, t, d] = _errors(task.target, target_low[d], output, kernel @ output)
    return found


def recomputed(task: Task, *, distances: Callable[[Tensor], Tensor]) -> Floats:
    """A kernel for every checkpoint and width."""
    found = np.empty((2, len(task.output), len(task.deltas)))
    for t, output in enumerate(task.output):
        for d, delta in enumerate(task.deltas):
            kernel = torch.exp(distances(task.inputs) / (-2 * delta))
            kernel /= kernel.sum(1, keepdim=True)
            target, h = task.target.to(kernel.dtype), output.to(kernel.dtype)
            found[:, t, d] = _errors(target, kernel @ target, h, kernel @ h)
    return found


def _errors(target: Tensor, target_low: Tensor, output: Tensor, output_low: Tensor) -> tuple[float, float]:
    low = (target_low - output_low).norm() / target_low.norm()
    target_high = target - target_low
    high = (target_high - (output - output_low)).norm() / target_high.norm()
    return float(low), float(high)


def exact_distances(x: Tensor) -> Tensor:
    return torch.from_numpy(cdist(x.double().numpy(), x.double().numpy(), "sqeuclidean"))


def compare_filter(n: int, side: int, rounds: int) -> None:
    task = digits(n, side)
    print(
        f"\n  Gaussian filter: {n:,} samples of {side * side} features, "
        f"{CHECKPOINTS} checkpoints, {OUTPUTS} outputs, {DELTAS} widths"
    )
    # each pass costs the same, so the recomputed forms are measured on one and multiplied
    t, d = CHECKPOINTS // 2, DELTAS // 2
    alone = Task(task.inputs, task.target, task.output[t : t + 1], task.deltas[d : d + 1])
    passes = CHECKPOINTS * DELTAS
    naive = f"one of {passes} kernel passes, x{passes}"
    entrants: dict[str, tuple[Callable[[Task], Floats], Task]] = {
        "dynprobe": (streamed, task),
        "dynprobe with standard errors": (functools.partial(streamed, errors=True), task),
        "dynprobe, 500 random rows": (functools.partial(streamed, rows=500), task),
        "stored kernels (authors), float32": (stored, task),
        f"{naive}, float32": (functools.partial(recomputed, distances=squared_distances), alone),
        f"{naive}, float64": (functools.partial(recomputed, distances=exact_distances), alone),
    }
    distance = exact_distances(task.inputs)
    truth = recomputed(task, distances=lambda _: distance)

    def error(found: Floats) -> float:
        reference = truth if found.shape == truth.shape else truth[:, t : t + 1, d : d + 1]
        return float(np.abs(found / reference - 1).max())

    measure(entrants, error, rounds, times={name: passes for name in entrants if name.startswith(naive)})


def large(rounds: int) -> None:
    """Row sampling where kernels of all samples would take 115 GB."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        cost, whole, extra, apart = process.submit(_large, rounds).result()
    print("\n  Gaussian filter: 60,000 samples of 784 features, 2,000 random rows, with standard errors")
    print(f"    {cost:.1f} CPU seconds; peak {whole:.0f} MB with the data, {extra:.0f} MB beyond them")
    print(f"    two draws of rows differ by {apart[0]:.0e} in e_low and {apart[1]:.0e} in e_high")


def _large(rounds: int) -> tuple[float, float, float, Floats]:
    torch.set_num_threads(1)
    task = digits(60_000, 28)
    streamed(task.first(200), rows=100)
    data = peak_memory(anew=True)
    cost = np.inf
    for _ in range(max(1, rounds // 3)):
        start = time.process_time()
        found = streamed(task, rows=2000, errors=True)
        cost = min(cost, time.process_time() - start)
    peak = peak_memory()
    other = Task(task.inputs.flip(0), task.target.flip(0), task.output.flip(1), task.deltas)
    again = streamed(other, rows=2000)
    return cost, peak, peak - data, np.abs(again / found - 1).max((1, 2))


# The Fourier sum along a direction


@dataclass
class Sums:
    """Places in cycles, shape (n,), columns, shape (m, n, c), and the number of frequencies."""

    phase: Tensor
    columns: Tensor
    n_frequencies: int

    def first(self, n: int) -> Sums:
        """The same with fewer samples."""
        return Sums(self.phase[:n], self.columns[:, :n], self.n_frequencies)

    @property
    def matrix(self) -> Tensor:
        """Columns side by side, shape (n, m·c)."""
        return self.columns.movedim(0, 1).flatten(1)


def ours(task: Sums) -> NDArray[np.complex128]:
    return fourier_sums(task.phase, task.matrix.__getitem__, task.n_frequencies)


def as_published(task: Sums) -> NDArray[np.complex128]:
    """`get_ft_multi`: the matrix of complex exponentials for each array that is transformed."""
    k = 2 * np.pi * np.arange(1, task.n_frequencies + 1)[None]
    x = task.phase.numpy()[:, None]
    parts = [one.numpy().T @ np.exp(-1j * (x @ k)) for one in task.columns.double()]
    return np.concatenate(parts).T / len(x)


def one_product(task: Sums) -> NDArray[np.complex128]:
    """Cosines and sines of all frequencies once, two matrix products in float64."""
    k = torch.arange(1, task.n_frequencies + 1, dtype=torch.float64)
    angle, y = 2 * np.pi * k[:, None] * task.phase, task.matrix.double()
    return ((angle.cos() @ y).numpy() - 1j * (angle.sin() @ y).numpy()) / len(y)


def with_finufft(task: Sums, *, tolerance: float) -> NDArray[np.complex128]:
    finufft = importlib.import_module("finufft")
    y = np.ascontiguousarray(task.matrix.double().numpy().T) + 0j
    x = 2 * np.pi * (task.phase.numpy() - 0.5)
    modes = 2 * task.n_frequencies + 1
    found = finufft.nufft1d1(x, y, modes, eps=tolerance, isign=-1, nthreads=1)
    k = np.arange(1, task.n_frequencies + 1)
    return (found[:, task.n_frequencies + 1 :] * (-1.0) ** k).T / len(x)


def compare_sums(n: int, n_frequencies: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(n, generator=generator, dtype=torch.float64)
    columns = torch.randn(CHECKPOINTS + 1, n, OUTPUTS, generator=generator)
    single, double = (Sums(phase, part, n_frequencies) for part in (columns, columns.double()))
    print(
        f"\n  Fourier sums: {n:,} samples, {(CHECKPOINTS + 1) * OUTPUTS} columns, {n_frequencies} frequencies"
    )
    every_tenth = np.arange(0, n_frequencies, 10)
    angle = 2 * np.pi * np.outer(every_tenth + 1, phase.numpy().astype(np.longdouble))
    some = double.matrix[:, ::7].numpy()
    truth = (np.cos(angle) @ some - 1j * (np.sin(angle) @ some)) / n

    def error(found: NDArray[np.complex128]) -> float:
        return float(np.abs(found[every_tenth][:, ::7] - truth).max())

    entrants = {
        "dynprobe": (ours, single),
        "dynprobe, float64": (ours, double),
        "one product of cosines and sines, float64": (one_product, double),
        "published helper, array by array": (as_published, double),
        "finufft, tolerance 1e-12": (functools.partial(with_finufft, tolerance=1e-12), double),
        "finufft, tolerance 1e-6": (functools.partial(with_finufft, tolerance=1e-6), double),
    }
    measure(entrants, error, rounds)


# Measuring


def peak_memory(*, anew: bool = False) -> float:
    """Megabytes; `resource`'s figure would begin with the parent's own peak.

    Args:
        anew: Forget the peak so far first: what is returned is the memory in use.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if anew and reset.exists():
        reset.write_text("5")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else np.nan


def extra_memory(run: Callable[[Any], object], task: Any) -> float:
    """Megabytes of this process's peak beyond what it holds before; a run on 200 samples loads libraries."""
    torch.set_num_threads(1)
    run(task.first(200))
    before = peak_memory(anew=True)
    run(task)
    return peak_memory() - before


def measure(
    entrants: Mapping[str, tuple[Callable[[Any], Any], Any]],
    error: Callable[[Any], float],
    rounds: int,
    times: dict[str, int] | None = None,
) -> None:
    """Let all entrants take turns and print the table.

    Args:
        entrants: Function and data by name, ours first.
        error: Of what a function returns.
        rounds: How many turns.
        times: How often an entrant's work would have to be done.
    """
    runs, found, best = dict(entrants), dict[str, Any](), dict.fromkeys(entrants, np.inf)
    for _ in range(rounds):
        for name, (run, task) in list(runs.items()):
            try:
                start = time.process_time()
                found[name] = run(task)
                cost = (time.process_time() - start) * (times or {}).get(name, 1)
                best[name] = min(best[name], cost)
            except ImportError as failure:
                del runs[name]
                print(f"    {name} skipped: {failure}")
    print(f"    {'':54}{'CPU s':>10}{'x dynprobe':>12}{'error':>9}{'extra MB':>10}")
    ours = best[next(iter(entrants))]
    for name, (run, task) in runs.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory = process.submit(extra_memory, run, task).result()
        numbers = f"{best[name]:10.4f}{best[name] / ours:12.2f}{error(found[name]):9.0e}{memory:10.0f}"
        print(f"    {name:54}{numbers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="filter,large,spectrum", help="which comparisons")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--wide", action="store_true", help="the filter on 5,000 samples of 784 features too")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts = chosen.parts.split(",")
    if "filter" in parts:
        compare_filter(1797, 8, chosen.rounds)
        if chosen.wide:
            compare_filter(5000, 28, chosen.rounds)
    if "large" in parts:
        large(chosen.rounds)
    if "spectrum" in parts:
        compare_sums(2000, 64, chosen.rounds)
        compare_sums(20_000, 64, chosen.rounds)


if __name__ == "__main__":
    main()
