"""Curvature: dynprobe beside its peers, the same networks and data, one thread.

    python benchmarks/curvature.py
    python benchmarks/curvature.py --nets mlp --rounds 3

Every peer that can be imported runs (`pip install --no-deps pyhessian curvlinops-for-pytorch
hessian-eigenthings nngeometry`, and what these import); the others are named with the reason. All take turns,
and the best of several rounds counts, measured with the process's CPU clock in units of one gradient of the
mean loss over the same data in the same run ("grads"). Only ratios within one run mean anything.

Errors are against float64: eigenvalues from our Lanczos to 1e-10, cross-checked with scipy's eigsh on the
same products; the covariance K and Tr F from all per-sample gradients by torch.func. "oracle" is the smallest
Krylov space whose 20 largest Ritz values are all within the tolerance of the truth, which only somebody who
knows the truth could stop at. Memory is the peak beyond that of one gradient, in a process of its own for
each entrant (Linux only).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import contextlib
import copy
import functools
import importlib
import io
import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from dynprobe.analyzers.numerics.covariance import gram_matrix
from dynprobe.analyzers.numerics.density import density, quadrature
from dynprobe.analyzers.numerics.fisher_trace import exact_fisher_trace
from dynprobe.analyzers.numerics.hvp import HessianOperator
from dynprobe.analyzers.numerics.krylov import KrylovSpace
from dynprobe.analyzers.numerics.lanczos import Eigenpairs, Which, lanczos
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.numerics.per_sample import loss_gradients
from dynprobe.analyzers.numerics.trace import TraceEstimate, random_signs

Floats = NDArray[np.float64]
TOP, TOL = 20, 1e-4
TRACE_TOL, DENSITY_STEPS = 0.01, 40
LOSS = get_loss("cross_entropy")


@dataclass
class Task:
    """A trained network with its data."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """All data as one batch."""
        return [(self.inputs, self.targets)]

    @property
    def n_parameters(self) -> int:
        """Length of the vectors."""
        return sum(p.numel() for p in self.model.parameters())

    def copy(self) -> nn.Module:
        """Return the network for an entrant's own use."""
        return copy.deepcopy(self.model).eval()

    def first(self, n: int) -> Task:
        """The same network with fewer data."""
        return Task(self.name, self.model, self.inputs[:n], self.targets[:n])

    def double(self) -> Task:
        """The same in float64."""
        return Task(self.name, self.copy().double(), self.inputs.double(), self.targets)

    def gradient(self) -> None:
        """The unit of all costs."""
        value = functional.cross_entropy(self.model(self.inputs), self.targets)
        torch.autograd.grad(value, list(self.model.parameters()))


@dataclass
class Outcome:
    """What an entrant found, with how many products, and a remark."""

    values: Floats
    products: int | None = None
    remark: str = ""


Run = Callable[[Task], Outcome]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


NETS = {"mlp": (mlp, 1797, 0.0), "cnn": (cnn, 256, 0.9)}  # with how many samples, and SGD's momentum


def trained(name: str) -> Task:
    """200 steps of SGD on scikit-learn's digits, enlarged to 16x16."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    inputs = functional.interpolate((images - images.mean()) / images.std(), (16, 16), mode="bilinear")
    targets = torch.tensor(digits.target)
    order = torch.randperm(len(targets))
    inputs, targets = inputs[order], targets[order]
    build, n_samples, momentum = NETS[name]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    for _ in range(200):
        rows = torch.randint(len(targets), (128,))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Task(name, model.eval(), inputs[:n_samples].clone(), targets[:n_samples].clone())


def counting(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[None]]:
    """The function, and a list that grows by one with each call."""
    calls: list[None] = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        return function(*arguments, **keywords)

    return counted, calls


def our_operator(task: Task) -> HessianOperator:
    return HessianOperator(task.model, task.batches, LOSS, memory=4e9)


def our_pairs(
    operator: HessianOperator, *, verify: bool = True, tol: float = TOL, which: Which = "LA"
) -> Eigenpairs:
    return lanczos(
        operator.matvec,
        operator.n_parameters,
        k=TOP,
        which=which,
        tol=tol,
        dtype=operator.dtype,
        rounding=operator.rounding,
        verify=verify,
    )


# The 20 largest eigenvalues of the Hessian


def top_ours(task: Task, *, verify: bool = True) -> Outcome:
    found = our_pairs(our_operator(task), verify=verify)
    return Outcome(found.eigenvalue, found.n_matvec, f"{int(found.converged.sum())} of {TOP} converged")


def curvlinops_operator(task: Task, kind: str) -> tuple[Any, list[None]]:
    package = importlib.import_module("curvlinops")
    model = task.copy()
    build = getattr(package, f"{kind}LinearOperator")
    operator = build(model, nn.CrossEntropyLoss(), list(model.parameters()), task.batches)
    operator._matmat, calls = counting(operator._matmat)
    return operator, calls


def top_curvlinops(task: Task) -> Outcome:
    operator, calls = curvlinops_operator(task, "Hessian")
    values = eigsh(operator.to_scipy(), k=TOP, which="LA", tol=TOL)[0]
    return Outcome(values[::-1], len(calls))


def top_eigenthings(task: Task, steps: int | None = None) -> Outcome:
    package = importlib.import_module("hessian_eigenthings")
    operator = package.HessianOperator(
        task.copy(), task.batches, package.supervised_loss(nn.CrossEntropyLoss())
    )
    reorthogonalize = True if steps else None
    found = package.lanczos(
        operator, k=TOP, which="LA", tol=TOL, max_iter=steps, reorthogonalize=reorthogonalize, seed=0
    )
    remark = f"{int(found.converged.sum())} of {TOP} flagged converged"
    return Outcome(found.eigenvalues.double().numpy(), found.iterations, remark)


def top_pyhessian(task: Task) -> Outcome:
    module = importlib.import_module("pyhessian.hessian")
    original = module.hessian_vector_product
    module.hessian_vector_product, calls = counting(original)
    try:
        solver = module.hessian(task.copy(), nn.CrossEntropyLoss(), data=task.batches[0], cuda=False)
        torch.manual_seed(0)
        values, _ = solver.eigenvalues(maxIter=100, tol=TOL, top_n=TOP)
    finally:
        module.hessian_vector_product = original
    return Outcome(np.array(values), len(calls), "by magnitude")


def reference_eigenvalues(task: Task, which: Which) -> Floats:
    return our_pairs(our_operator(task.double()), tol=1e-10, which=which).eigenvalue


def cross_check(task: Task, truth: Floats) -> float:
    operator = our_operator(task.double())
    n = operator.n_parameters
    as_scipy = LinearOperator(
        (n, n), matvec=lambda v: operator(torch.from_numpy(v.ravel())).numpy(), dtype=float
    )
    return worst(eigsh(as_scipy, k=TOP, which="LA", tol=1e-9)[0][::-1], truth)


def oracle(task: Task, truth: Floats) -> int:
    """Vectors in the smallest Krylov space that holds the truth to the tolerance."""
    operator = our_operator(task)
    space = KrylovSpace(operator.matvec, operator.n_parameters, dtype=operator.dtype, device="cpu", seed=0)
    space.add_start()
    while space.size < TOP or worst(space.ritz()[0][::-1][:TOP], truth) > TOL:
        space.grow()
    return space.size


def worst(values: Floats, truth: Floats) -> float:
    return float(np.abs(values / truth - 1).max())


def top_error(task: Task, truths: dict[str, Floats], name: str, values: Floats) -> float:
    """Against the largest, or for a method that goes by magnitude against the largest in magnitude."""
    if "PyHessian" not in name:
        return worst(np.sort(values)[::-1], truths["LA"])
    if "LM" not in truths:
        truths["LM"] = reference_eigenvalues(task, "LM")
    return worst(np.sort(values)[::-1], np.sort(truths["LM"])[::-1])


def compare_top(task: Task, rounds: int) -> None:
    truths = {"LA": reference_eigenvalues(task, "LA")}
    print(f"  reference: scipy's eigsh agrees within {cross_check(task, truths['LA']):.0e}")
    vectors = oracle(task, truths["LA"])
    ours = top_ours(task).products or 0
    print(f"  oracle: {vectors} products; dynprobe {ours} ({ours / vectors:.2f} of it)")
    measure(
        f"{TOP} largest eigenvalues to {TOL:g}",
        task,
        {
            "dynprobe": top_ours,
            "dynprobe, no second start": functools.partial(top_ours, verify=False),
            "curvlinops + eigsh": top_curvlinops,
            "hessian-eigenthings": top_eigenthings,
            f"hessian-eigenthings, {vectors} steps": functools.partial(top_eigenthings, steps=vectors),
            "PyHessian": top_pyhessian,
        },
        functools.partial(top_error, task, truths),
        rounds,
    )


# Eigenvalues, trace and density together


def all_ours(task: Task, *, exact: bool) -> Outcome:
    operator = our_operator(task)
    found = our_pairs(operator)
    assert found.space is not None
    sizes = [p.numel() for p in task.model.parameters()]
    signs = random_signs(operator.n_parameters, 1, found.eigenvector)
    start = signs - (found.eigenvector @ signs) @ found.eigenvector
    probe = quadrature(operator.matvec, start, DENSITY_STEPS, found.eigenvector)
    density(found.eigenvalue, [probe], operator.n_parameters, n_grid=1001, width=0.0)
    if exact:
        value = exact_fisher_trace(task.model, task.batches, LOSS).estimate().value
        return Outcome(np.array([value]), operator.n_matvec, "trace exact")
    trace = TraceEstimate(found.space, sizes)
    trace.add(signs, start, probe.image)
    while not trace.result().reached(TRACE_TOL):
        signs = random_signs(operator.n_parameters, 1 + trace.n_probes, found.eigenvector)
        trace.add(signs, signs, operator.matvec(signs))
    result = trace.result()
    return Outcome(np.array([result.value]), operator.n_matvec, f"{result.n_probes} probes")


def all_curvlinops(task: Task, *, probes: int) -> Outcome:
    package = importlib.import_module("curvlinops")
    operator, calls = curvlinops_operator(task, "Hessian")
    values = eigsh(operator.to_scipy(), k=TOP, which="LA", tol=TOL)[0]
    for_eigsh = len(calls)
    torch.manual_seed(0)
    with torch.no_grad():
        trace = float(package.hutchpp_trace(operator, num_matvecs=probes))
        calls.clear()
        package.lanczos_approximate_spectrum(operator, DENSITY_STEPS, boundaries=(None, float(values[-1])))
    return Outcome(np.array([trace]), for_eigsh + probes + len(calls), f"{probes} for the trace")


def compare_all(task: Task, rounds: int) -> None:
    truth = np.array([exact_fisher_trace(task.double().model, task.double().batches, LOSS).estimate().value])
    measure(
        f"{TOP} largest eigenvalues, trace to {TRACE_TOL:.0%} and density of {DENSITY_STEPS} products",
        task,
        {
            "dynprobe": functools.partial(all_ours, exact=True),
            "dynprobe, trace estimated": functools.partial(all_ours, exact=False),
            "curvlinops": functools.partial(all_curvlinops, probes=99),
        },
        lambda _, values: worst(values, truth),
        rounds,
    )


# Spectrum of the gradient covariance K


def centred(gram: Floats) -> Floats:
    gram = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    values: Floats = np.linalg.eigvalsh(gram / len(gram))
    return values[::-1]


def covariance_ours(task: Task) -> Outcome:
    return Outcome(
        centred(gram_matrix([factors for factors, _ in loss_gradients(task.model, task.batches, LOSS)]))
    )


def covariance_nngeometry(task: Task) -> Outcome:
    package = importlib.import_module("nngeometry.gram")
    model = task.copy()

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(inputs), targets, reduction="none")[:, None]

    gram = package.GramMatrix(model, _loader(task), function=losses).data
    return Outcome(centred(gram.squeeze().detach().double().numpy()), remark="centred by hand")


def covariance_curvlinops(task: Task) -> Outcome:
    operator, calls = curvlinops_operator(task, "EF")
    values = eigsh(operator.to_scipy(), k=TOP, which="LA", tol=TOL)[0]
    return Outcome(values[::-1], len(calls), f"top {TOP}, not centred")


def sample_gradients(task: Task, outputs: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Gradients of a function of each sample's logits and target, (n_samples, n_parameters), float64."""
    double = task.double()
    weights = {name: p.detach() for name, p in double.model.named_parameters()}

    def value(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return outputs(torch.func.functional_call(double.model, values, (x[None],))[0], y)

    rows = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0), chunk_size=32)
    found = rows(weights, double.inputs, double.targets)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def compare_covariance(task: Task, rounds: int) -> None:
    G = sample_gradients(task, lambda z, y: functional.cross_entropy(z, y))
    gram = (G @ G.T).numpy()
    truth, uncentred = centred(gram), np.linalg.eigvalsh(gram / len(gram))[::-1]

    def error(name: str, values: Floats) -> float:
        return worst(values[:TOP], (uncentred if "curvlinops" in name else truth)[:TOP])

    measure(
        f"gradient covariance K, N = {len(task.targets)}, all eigenvalues (error over the top {TOP})",
        task,
        {
            "dynprobe": covariance_ours,
            "nngeometry GramMatrix": covariance_nngeometry,
            "curvlinops EF + eigsh": covariance_curvlinops,
        },
        error,
        rounds,
    )


# Trace of the Fisher information


def fisher_ours(task: Task) -> Outcome:
    found = exact_fisher_trace(task.model, task.batches, LOSS)
    return Outcome(np.array([found.estimate().value]), remark="also per layer and sample")


def fisher_nngeometry(task: Task, representation: str) -> Outcome:
    metrics, objects = (importlib.import_module(f"nngeometry.{name}") for name in ("metrics", "object"))
    matrix = metrics.FIM(task.copy(), _loader(task), getattr(objects, representation))
    return Outcome(np.array([float(matrix.trace())]))


def compare_fisher(task: Task, rounds: int) -> None:
    probability = task.double().model(task.double().inputs).softmax(1).detach()
    truth = np.zeros(1)
    for c in range(probability.shape[1]):
        squares = sample_gradients(task, lambda z, _, c=c: z.log_softmax(0)[c]).square().sum(1)
        truth += float((probability[:, c] * squares).mean())
    representations = ("PMatDiag", "PMatImplicit")
    peers = {
        f"nngeometry {r}": functools.partial(fisher_nngeometry, representation=r) for r in representations
    }
    measure(
        f"trace of the Fisher information, N = {len(task.targets)}",
        task,
        {"dynprobe": fisher_ours, **peers},
        lambda _, values: worst(values, truth),
        rounds,
    )


def _loader(task: Task) -> Any:
    return DataLoader(TensorDataset(task.inputs, task.targets), batch_size=len(task.targets))


# Measuring


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def extra_memory(run: Run, task: Task) -> float:
    """Megabytes of this process's peak beyond that of a gradient."""
    torch.set_num_threads(1)
    for _ in range(2):
        task.gradient()
    before = peak_memory()
    with quiet():
        run(task)
    return peak_memory() - before


def peak_memory() -> float:
    """Megabytes; `resource`'s figure would begin with the parent's own peak."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else np.nan


@contextlib.contextmanager
def quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def measure(
    title: str, task: Task, entrants: dict[str, Run], error: Callable[[str, Floats], float], rounds: int
) -> None:
    """Let all entrants take turns and print the table."""
    print(f"\n  {title}")
    runs, outcomes, memory = dict(entrants), dict[str, Outcome](), dict[str, float]()
    best = dict.fromkeys(entrants, np.inf)
    unit = min(seconds(task.gradient) for _ in range(5))
    for _ in range(rounds):
        for name, run in list(runs.items()):
            try:
                with quiet():
                    start = time.process_time()
                    outcomes[name] = run(task)
                    best[name] = min(best[name], time.process_time() - start)
            except Exception as failure:
                del runs[name]
                print(f"    {name} skipped: {(str(failure) or type(failure).__name__).splitlines()[0]}")
            unit = min(unit, *(seconds(task.gradient) for _ in range(5)))
    for name, run in runs.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory[name] = process.submit(extra_memory, run, task).result()
    header = f"{'':36}{'HVPs':>6}{'grads':>9}{'x dynprobe':>12}{'error':>9}{'extra MB':>10}"
    print(f"    one gradient takes {unit * 1e3:.1f} ms\n    {header}")
    for name in runs:
        outcome, cost = outcomes[name], best[name]
        products = str(outcome.products) if outcome.products is not None else ""
        numbers = f"{products:>6}{cost / unit:9.1f}{cost / best['dynprobe']:12.2f}"
        wrong = f"{error(name, outcome.values):9.0e}{memory[name]:10.0f}"
        print(f"    {name:36}{numbers}{wrong}   {outcome.remark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts: dict[str, Callable[[Task, int], None]] = {
        "top": compare_top,
        "all": compare_all,
        "covariance": lambda task, rounds: compare_covariance(task.first(512), rounds),
        "fisher": lambda task, rounds: compare_fisher(task.first(512), rounds),
    }
    parser.add_argument("--nets", default=",".join(NETS), help=f"of {', '.join(NETS)}")
    parser.add_argument("--parts", default=",".join(parts), help=f"of {', '.join(parts)}")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.nets.split(","):
        task = trained(name)
        with torch.no_grad():
            loss = float(functional.cross_entropy(task.model(task.inputs), task.targets))
        print(
            f"\n{name}: {task.n_parameters:,} parameters, {len(task.targets)} samples, loss {loss:.3f}",
            flush=True,
        )
        for part in options.parts.split(","):
            parts[part](task, options.rounds)


if __name__ == "__main__":
    main()
