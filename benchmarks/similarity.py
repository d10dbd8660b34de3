"""Representation similarity: dynprobe beside its peers, the same networks and data, one thread.

    python benchmarks/similarity.py
    python benchmarks/similarity.py --svcca DIR --netrep DIR --anatome DIR   # checkouts of their repositories
    python benchmarks/similarity.py --parts pair,checkpoints --rounds 5

Every peer that can be imported runs (`pip install pytorch-cka cka-pytorch torch-cka rsatoolbox repsim`); the
others are named with the reason. All take turns and the best of several rounds counts, measured with the
process's CPU clock. "x limit" is the time over that of the multiplications that the task needs, of symmetric
products one half, at the sgemm (or dgemm) peak of the same run; decompositions are not counted. Memory is the
peak beyond that of a forward pass of both networks, in a process of its own for each entrant (Linux only).
Only ratios within one run mean anything.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import contextlib
import copy
import functools
import io
import itertools
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import _similarity_peers as peers
import numpy as np
import torch
from _versions import versions
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dynprobe.analyzers.cca import cca
from dynprobe.analyzers.cka import cka
from dynprobe.analyzers.core.activations import Activations, as_activations
from dynprobe.analyzers.numerics.activations import recut
from dynprobe.analyzers.numerics.rdm import dissimilarities
from dynprobe.analyzers.numerics.rdm_compare import similarities
from dynprobe.io.resnets import CifarResNet

Floats = NDArray[np.float64]
Batches = list[tuple[Tensor, Tensor]]

N_SAMPLES, BATCH = 1792, 256
CHECKPOINTS = (10, 20, 30, 40, 50)
N_RUNS = 40


@dataclass
class Task:
    """Checkpoints of one training run, the data, and 20 layers."""

    networks: list[nn.Module]
    inputs: Tensor
    targets: Tensor
    layers: list[str]

    @property
    def batches(self) -> Batches:
        """In the order of the data."""
        return list(zip(self.inputs.split(BATCH), self.targets.split(BATCH), strict=True))

    @property
    def minibatches(self) -> Batches:
        """Those that dynprobe draws, for peers to be compared with it."""
        order = np.random.default_rng(0).permutation(len(self.targets))
        return list(recut(self.batches, BATCH, torch.as_tensor(order)))

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The first and the last checkpoint."""
        return self.networks[0], self.networks[-1]

    def small(self) -> Task:
        """The same on few data, to have everything imported and initialised."""
        return Task(self.networks, self.inputs[:32], self.targets[:32], self.layers)

    def forward(self, networks: Sequence[nn.Module]) -> None:
        """What no entrant can do without."""
        with torch.inference_mode():
            for network in networks:
                for inputs, _ in self.batches:
                    network(inputs)

    def activations(self, network: nn.Module) -> Activations:
        """Not recorded yet."""
        return as_activations((network, self.batches))


@dataclass
class Entrant:
    """How to run, what its values are to be compared with (None: not at all), a remark."""

    run: Callable[[], Floats | None]
    truth: Floats | None = None
    remark: str = ""
    scale: float = 1.0


def resnets() -> Task:
    """ResNet-20, no operation in place, on scikit-learn's digits enlarged to 16x16."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    inputs = functional.interpolate((images - images.mean()) / images.std(), (16, 16), mode="bilinear")
    targets = torch.tensor(digits.target)
    network = CifarResNet(20, channels=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    kept = []
    for step in range(1, CHECKPOINTS[-1] + 1):
        rows = torch.randint(len(targets), (64,))
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        if step in CHECKPOINTS:
            kept.append(copy.deepcopy(network).eval().requires_grad_(False))
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return Task(kept, inputs[:N_SAMPLES].clone(), targets[:N_SAMPLES].clone(), layers)


# CKA of networks


def ours_of_pair(task: Task, minibatch: int) -> Floats:
    a, b = ((network, task.batches) for network in task.pair())
    return ours_of_activations(task, a, b, minibatch)


def ours_of_activations(task: Task, a: Any, b: Any, minibatch: int) -> Floats:
    found: Floats = cka(a, b, layers=",".join(task.layers), minibatch=minibatch)["cka"]
    return found


def peer_of_pair(name: str, task: Task) -> Floats:
    return peers.NETWORKS[name](*task.pair(), task.minibatches, task.layers)


def forward_of_pair(task: Task) -> None:
    task.forward(task.pair())


def minibatch_truth(task: Task) -> Floats:
    """From the dense formula in float64, on the activations of the float32 networks."""
    terms = [
        dense_hsic([kernels(grabbed(network, inputs, task.layers)) for network in task.pair()])
        for inputs, _ in task.minibatches
    ]
    return ratio([sum(parts) for parts in zip(*terms, strict=True)])


def full_truth(task: Task) -> Floats:
    """The same for all samples at once; Grams one network at a time, 0.5 GB each."""
    both = []
    for network in task.pair():
        parts = [grabbed(network, inputs, task.layers) for inputs, _ in task.batches]
        both.append(kernels(torch.cat(layer) for layer in zip(*parts, strict=True)))
    return ratio(dense_hsic(both))


def grabbed(network: nn.Module, inputs: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Flattened outputs by a plain hook that copies."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _module, _inputs, output: found.__setitem__(name, output.flatten(1).clone())

    modules = dict(network.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in layers]
    with torch.inference_mode():
        network(inputs)
    for handle in handles:
        handle.remove()
    return [found[name] for name in layers]


def kernels(features: Any) -> Tensor:
    """U-centred Grams in float64, (layers, n·n), by the definition."""
    made = []
    for x in features:
        x = x.double()
        x = x - x.mean(0)
        k = x @ x.T
        n = len(k)
        k.fill_diagonal_(0)
        row = k.sum(0)
        k = k - row[:, None] / (n - 2) - row / (n - 2) + row.sum() / ((n - 1) * (n - 2))
        made.append(k.fill_diagonal_(0).flatten())
    return torch.stack(made)


def dense_hsic(pair: Sequence[Tensor]) -> list[Any]:
    """Cross and own terms; the common factor 1/(n(n - 3)) cancels for batches of one size."""
    k, q = pair
    return [(k @ q.T).numpy(), k.square().sum(1).numpy(), q.square().sum(1).numpy()]


def ratio(terms: Sequence[Any]) -> Floats:
    cross, own_a, own_b = terms
    found: Floats = cross / np.sqrt(np.outer(own_a, own_b))
    return found


def forward_flops(task: Task) -> float:
    """Of one network on all data."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.networks[0](task.inputs)
    return float(counter.get_total_flops())


def gram_flops(task: Task, rows: int) -> tuple[float, float]:
    """Of the Grams of one network in batches of so many rows, and of the products of a pair."""
    width = sum(layer.shape[1] for layer in grabbed(task.networks[0], task.inputs[:1], task.layers))
    n, depth = len(task.targets), len(task.layers)
    return float(n * rows * width), float(n * rows * depth**2)


def compare_pair(task: Task, rounds: int) -> None:
    n = len(task.targets)
    forward, peak = 2 * forward_flops(task), gemm_peak(torch.float32)
    gram, cross = gram_flops(task, BATCH)
    full_gram, full_cross = gram_flops(task, n)
    truth = minibatch_truth(task)
    runs = {
        "dynprobe": Entrant(functools.partial(ours_of_pair, task, BATCH), truth, "with errors"),
        "forward passes alone": Entrant(functools.partial(forward_of_pair, task)),
    }
    limits = dict.fromkeys(peers.NETWORKS, forward + 2 * gram + cross)
    limits |= {"dynprobe": limits["pytorch-cka"], "forward passes alone": forward}
    for name in peers.NETWORKS:
        runs[name] = Entrant(functools.partial(peer_of_pair, name, task), truth)
    runs["dynprobe, all samples at once"] = Entrant(
        functools.partial(ours_of_pair, task, 0), full_truth(task), "exact, with errors"
    )
    limits["dynprobe, all samples at once"] = forward + 2 * full_gram + full_cross
    memory = {
        "dynprobe": functools.partial(ours_of_pair, minibatch=BATCH),
        **{name: functools.partial(peer_of_pair, name) for name in peers.NETWORKS},
        "dynprobe, all samples at once": functools.partial(ours_of_pair, minibatch=0),
    }
    title = f"unbiased CKA of a pair, {len(task.layers)} x {len(task.layers)} layers, flattened, n = {n:,}"
    measure(
        f"{title}, batches of {BATCH}",
        runs,
        rounds,
        {name: flops / peak for name, flops in limits.items()},
        {name: lambda run=run: fresh(extra_memory, run, task) for name, run in memory.items()},
    )


def ours_of_checkpoints(task: Task) -> Floats:
    held = [task.activations(network) for network in task.networks]
    return np.stack([ours_of_activations(task, a, b, BATCH) for a, b in itertools.combinations(held, 2)])


def peer_of_checkpoints(task: Task) -> Floats:
    pairs, batches = itertools.combinations(task.networks, 2), task.minibatches
    return np.stack([peers.pytorch_cka(a, b, batches, task.layers) for a, b in pairs])


def compare_checkpoints(task: Task, rounds: int) -> None:
    pairs = list(itertools.combinations(task.networks, 2))
    truth = np.stack(
        [minibatch_truth(Task(list(pair), task.inputs, task.targets, task.layers)) for pair in pairs]
    )
    gram, cross = gram_flops(task, BATCH)
    one = forward_flops(task) + gram
    peak = gemm_peak(torch.float32)
    measure(
        f"the same unbiased CKA, all {len(pairs)} pairs of {len(task.networks)} checkpoints",
        {
            "dynprobe": Entrant(functools.partial(ours_of_checkpoints, task), truth, "with errors"),
            "forward passes alone": Entrant(functools.partial(task.forward, task.networks)),
            "pytorch-cka": Entrant(functools.partial(peer_of_checkpoints, task), truth, "pair by pair"),
        },
        rounds,
        {"dynprobe": (len(task.networks) * one + len(pairs) * cross) / peak},
    )


# Canonical correlations of layers


def pooled(task: Task) -> list[dict[str, Floats]]:
    """Every layer of a pair, averaged over positions."""
    found = []
    for network in task.pair():
        recorded = task.activations(network).features(layers=",".join(task.layers), maps="average")
        found.append({name: layer.values.double().numpy() for name, layer in recorded.items()})
    return found


def ours_cca(layers: Sequence[dict[str, Floats]], statistic: str, **options: Any) -> Floats:
    found: Floats = cca(layers[0], layers[1], **options)[statistic]
    return found


def compare_layers(task: Task, rounds: int) -> None:
    layers = pooled(task)
    a, b = (list(side.values()) for side in layers)
    n, widths = len(a[0]), [x.shape[1] for x in a]
    plain: dict[str, Any] = {"jackknife_blocks": 0, "chance_permutations": 0}
    truth = {name: ours_cca(layers, name, **plain) for name in ("mean_rho", "svcca", "pwcca", "procrustes")}
    original = ours_cca(layers, "pwcca", pwcca="original", **plain)

    def ours(**options: Any) -> Callable[[], Floats]:
        return lambda: ours_cca(layers, "svcca", **options)

    def theirs(*functions: Callable[..., Floats]) -> Callable[[], Floats]:
        def run() -> Floats:
            first, *_others = [function(a, b) for function in functions]
            return first

        return run

    defaults = {"jackknife_blocks": 10, "chance_permutations": 20}
    limit = n * (2.0 * sum(widths)) ** 2 / gemm_peak(torch.float64)
    measure(
        f"canonical correlations of {len(a)} x {len(b)} pooled layers of {min(widths)} to {max(widths)} "
        f"features, n = {n:,}; differences from dynprobe",
        {
            "dynprobe": Entrant(ours(**plain), None, "all statistics, no errors"),
            "dynprobe, errors": Entrant(ours(jackknife_blocks=10, chance_permutations=0), None, "10 blocks"),
            "dynprobe, errors and chance": Entrant(ours(**defaults), None, "the default, 20 permutations"),
            "google, CCA": Entrant(theirs(peers.google_cca), truth["mean_rho"]),
            "google, SVCCA": Entrant(theirs(peers.google_svcca), truth["svcca"], "as its tutorial"),
            "google, SVCCA, SVDs once": Entrant(theirs(peers.google_svcca_once), truth["svcca"]),
            "google, PWCCA": Entrant(theirs(peers.google_pwcca), original, "beside our --pwcca original"),
            "google, SVCCA and PWCCA": Entrant(
                theirs(peers.google_svcca, peers.google_pwcca), truth["svcca"], "difference of SVCCA"
            ),
            "anatome, SVCCA": Entrant(theirs(peers.anatome_svcca), truth["svcca"]),
            "anatome, PWCCA": Entrant(theirs(peers.anatome_pwcca), truth["pwcca"]),
            "netrep, Procrustes": Entrant(theirs(peers.netrep_procrustes), truth["procrustes"]),
        },
        rounds,
        {"dynprobe": limit},
    )


# Many runs, one layer


def many_runs() -> dict[str, Floats]:
    """What 40 networks might compute: half in common, half their own."""
    generator = np.random.default_rng(0)
    common = generator.standard_normal((800, 64))
    return {
        f"run{i}": common @ generator.standard_normal((64, 128)) / 8 + generator.standard_normal((800, 128))
        for i in range(N_RUNS)
    }


def compare_runs(task: Task, rounds: int) -> None:
    del task
    runs = {name: torch.from_numpy(x).float() for name, x in many_runs().items()}
    features, doubles = list(runs.values()), list(many_runs().values())
    centred = kernels(features)
    truth = ratio(dense_hsic([centred, centred]))
    biased = cka(many_runs(), many_runs(), estimator="biased")["cka"]

    def ours_at_once() -> Floats:
        held = as_activations(runs)
        found: Floats = cka(held, held)["cka"]
        return found

    def ours_by_pair() -> Floats:
        held = [as_activations(x) for x in features]
        found = np.eye(N_RUNS)
        for i, j in itertools.combinations(range(N_RUNS), 2):
            found[i, j] = found[j, i] = float(cka(held[i], held[j])["cka"][0, 0])
        return found

    n, width = features[0].shape
    limit = (N_RUNS * n * n * width + n * n * N_RUNS**2 / 2) / gemm_peak(torch.float32)
    part = 4
    measure(
        f"linear CKA of {N_RUNS} x {N_RUNS} runs, one layer of {width} features, n = {n}",
        {
            "dynprobe": Entrant(ours_at_once, truth, "with errors"),
            "dynprobe, pair by pair": Entrant(ours_by_pair, truth, "as from the command line"),
            "pytorch-cka": Entrant(lambda: peers.pytorch_cka_features(features, features), truth),
            "repsim": Entrant(
                lambda: peers.repsim_cka(doubles[:part]), biased[:part, :part], "biased, scaled", 820 / 10
            ),
            "netrep": Entrant(
                lambda: peers.netrep_cka(doubles[:part], doubles),
                biased[:part],
                "biased; scaled",
                19.5 / part,
            ),
        },
        rounds,
        {"dynprobe": limit},
    )


# RDMs


def compare_rdms(task: Task, rounds: int) -> None:
    del task
    patterns = [torch.from_numpy(x[:300]) for x in many_runs().values()]
    rdms = np.stack([dissimilarities(x, "sqeuclidean") for x in patterns])
    limit = rdms.shape[1] * N_RUNS**2 / gemm_peak(torch.float64)
    methods = {
        "spearman": "spearman", "rho-a": "rho-a", "pearson": "corr", "cosine": "cosine",
        "whitened": "cosine_cov",
    }  # fmt: skip
    for ours, theirs in methods.items():
        name: Any = ours
        measure(
            f"{N_RUNS} x {N_RUNS} RDMs of 300 conditions, {ours}; differences from dynprobe",
            {
                "dynprobe": Entrant(lambda name=name: similarities(rdms, rdms, name)),
                "rsatoolbox": Entrant(
                    lambda theirs=theirs: peers.rsatoolbox_compare(rdms, theirs),
                    similarities(rdms, rdms, name),
                ),
            },
            rounds,
            {"dynprobe": limit},
        )


# Agreement, in float64


def compare_values(task: Task, rounds: int) -> None:
    """Largest differences on the pooled layers of the trained networks."""
    del rounds
    layers = pooled(task)
    a, b = (list(side.values()) for side in layers)
    plain: dict[str, Any] = {"jackknife_blocks": 0, "chance_permutations": 0}
    found = cca(layers[0], layers[1], **plain)
    full = np.outer(found["rank_a"] == found["n_features_a"], found["rank_b"] == found["n_features_b"])
    unbiased, biased = (cka(*layers, estimator=e)["cka"] for e in ("unbiased", "biased"))
    dense = ratio(dense_hsic([kernels([torch.from_numpy(x) for x in side]) for side in (a, b)]))
    print("\n  largest differences in float64 on the pooled layers, where the peer has a value")
    print(f"    pairs of layers with full ranks: {int(full.sum())} of {full.size}")
    patterns = a[-2][:300]
    checks: dict[str, Callable[[], tuple[Floats, Floats]]] = {
        "unbiased CKA, dense formula": lambda: (unbiased, dense),
        "unbiased CKA, pytorch-cka": lambda: (
            unbiased,
            peers.pytorch_cka_features([torch.from_numpy(x) for x in a], [torch.from_numpy(x) for x in b]),
        ),
        "biased CKA, netrep": lambda: (biased, peers.netrep_cka(a, b)),
        "mean rho at full ranks, google": lambda: (
            np.where(full, found["mean_rho"], np.nan),
            peers.google_cca(a, b),
        ),
        "SVCCA, google": lambda: (found["svcca"], peers.google_svcca(a, b)),
        "--pwcca original at full ranks, google": lambda: (
            np.where(full, cca(*layers, pwcca="original", **plain)["pwcca"], np.nan),
            peers.google_pwcca(a, b),
        ),
        "Procrustes, netrep": lambda: (found["procrustes"], peers.netrep_procrustes(a, b)),
    }
    for ours, theirs in {"sqeuclidean": "euclidean", "correlation": "correlation"}.items():
        measure_name: Any = ours
        checks[f"RDM {ours}, rsatoolbox"] = lambda name=measure_name, theirs=theirs: (
            dissimilarities(torch.from_numpy(patterns), name),
            peers.rsatoolbox_rdm(patterns, theirs),
        )
    for name, both in checks.items():
        try:
            with quiet():
                ours_value, theirs_value = both()
            wrong, known = difference(theirs_value, ours_value)
            print(f"    {name:42}{wrong:9.0e}   {known} of {theirs_value.size} values", flush=True)
        except ImportError as error:
            print(f"    {name:42} skipped: {error}")


# Measuring


def gemm_peak(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP per second of a large square matrix product."""
    a, b, c = (torch.randn(1024, 1024, dtype=dtype) for _ in range(3))
    best, end = 0.0, time.process_time() + seconds
    while time.process_time() < end:
        start = time.process_time()
        torch.mm(a, b, out=c)
        best = max(best, 2 * 1024**3 / (time.process_time() - start))
    return best


def fresh(function: Callable[..., float], *arguments: Any) -> float:
    """The function's value in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def extra_memory(run: Callable[[Task], Any], task: Task) -> float:
    """Megabytes of this process's peak beyond that of forward passes of both networks."""
    torch.set_num_threads(1)
    with quiet():
        run(task=task.small())
        forward_of_pair(task)
        before = peak_memory()
        run(task=task)
    return peak_memory() - before


def peak_memory() -> float:
    """Megabytes; `resource`'s figure would begin with the parent's own peak."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else np.nan


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        warnings.simplefilter("ignore")
        yield


def difference(values: Floats, truth: Floats) -> tuple[float, int]:
    """The largest, and of how many values."""
    if values.shape != truth.shape:
        return np.nan, 0
    both = np.isfinite(values) & np.isfinite(truth)
    return float(np.abs(values - truth)[both].max(initial=0.0)), int(both.sum())


def measure(
    title: str,
    entrants: dict[str, Entrant],
    rounds: int,
    limits: dict[str, float],
    memory: dict[str, Callable[[], float]] | None = None,
) -> None:
    """Let all entrants take turns and print the table; "dynprobe" is the unit."""
    print(f"\n  {title}")
    running, found = dict(entrants), dict[str, Floats | None]()
    best = dict.fromkeys(entrants, np.inf)
    for _ in range(rounds):
        for name, entrant in list(running.items()):
            try:
                with quiet():
                    start = time.process_time()
                    found[name] = entrant.run()
                    best[name] = min(best[name], (time.process_time() - start) * entrant.scale)
            except Exception as failure:
                del running[name]
                why = (str(failure) or type(failure).__name__).splitlines()[0]
                print(f"    {name} skipped: {why}")
    if "dynprobe" in limits:
        print(f"    limit {limits['dynprobe'] * 1e3:.3g} ms, dynprobe {best['dynprobe'] * 1e3:.4g} ms")
    extra = {name: run() for name, run in (memory or {}).items() if name in running}
    heads = f"{'x dynprobe':>12}{'x limit':>9}{'extra MB':>10}{'difference':>12}"
    print(f"    {'':34}{heads}")
    for name, entrant in running.items():
        values, truth, cells = found[name], entrant.truth, f"{best[name] / best['dynprobe']:12.2f}"
        cells += f"{best[name] / limits[name]:9.2f}" if name in limits else " " * 9
        cells += f"{extra[name]:10.0f}" if name in extra else " " * 10
        remark = entrant.remark
        if values is not None and truth is not None:
            wrong, known = difference(values, truth)
            cells += f"{wrong:12.0e}" if known else " " * 12
            if known < truth.size:
                remark += f" {known} of {truth.size} values"
        else:
            cells += " " * 12
        print(f"    {name:34}{cells}   {remark}", flush=True)


PARTS = {
    "pair": compare_pair,
    "checkpoints": compare_checkpoints,
    "layers": compare_layers,
    "runs": compare_runs,
    "rdms": compare_rdms,
    "values": compare_values,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in peers.CHECKOUTS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"a checkout of {name}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(versions(peers.PACKAGES))
    for name, why in peers.find_peers({name: getattr(options, name) for name in peers.CHECKOUTS}).items():
        if why:
            print(f"{name} skipped: {why}")
    peaks = (gemm_peak(dtype) / 1e9 for dtype in (torch.float32, torch.float64))
    print("sgemm peak {:.0f}, dgemm peak {:.0f} GFLOP/s, one thread".format(*peaks))
    task = resnets()
    for name in options.parts.split(","):
        PARTS[name](task, options.rounds)


if __name__ == "__main__":
    main()
