"""The peers of `similarity.py`, each called as its own documentation shows, or kinder."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

Floats = NDArray[np.float64]
Batches = list[tuple[Tensor, Tensor]]

PACKAGES = {"pytorch-cka": "cka", "cka-pytorch": "cka_pytorch", "torch-cka": "torch_cka", "repsim": "repsim",
            "rsatoolbox": "rsatoolbox"}  # fmt: skip
CHECKOUTS = {"svcca": "pwcca", "netrep": "netrep.metrics", "anatome": "anatome.distance"}


def find_peers(folders: dict[str, Path | None]) -> dict[str, str]:
    """Imports every peer; says which versions there are, and of the others why not.

    Args:
        folders: Checkouts of peers that are not on PyPI, by name.

    Returns:
        Name → "" or the reason why it is skipped.
    """
    for folder in folders.values():
        if folder is not None:
            sys.path.insert(0, str(folder))  # worker processes are given it too
    missing: dict[str, str] = {}
    for name, module in (PACKAGES | CHECKOUTS).items():
        if name in CHECKOUTS and folders.get(name) is None:
            missing[name] = f"give --{name} FOLDER"
            continue
        try:
            with _without_torchvision() if name == "anatome" else contextlib.nullcontext():
                importlib.import_module(module)
            missing[name] = ""
        except Exception as error:
            missing[name] = (str(error) or type(error).__name__).splitlines()[0]
    return missing


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """Distances of anatome do not need torchvision, its feature extractor does; a broken one is no reason."""
    try:
        importlib.import_module("torchvision.models.feature_extraction")
    except Exception:
        stub = types.ModuleType("torchvision.models.feature_extraction")
        stub.get_graph_node_names = stub.create_feature_extractor = None
        names = ["torchvision", "torchvision.models", stub.__name__]
        kept = {name: sys.modules.get(name) for name in names}
        sys.modules.update(dict.fromkeys(names, stub))
        try:
            yield
        finally:
            for name, module in kept.items():
                sys.modules.pop(name)
                if module is not None:
                    sys.modules[name] = module
        return
    yield


# Networks in, CKA of all layers out


def pytorch_cka(a: nn.Module, b: nn.Module, batches: Batches, layers: Sequence[str]) -> Floats:
    package = importlib.import_module("cka")
    loader: Any = DataLoader(batches, batch_size=None)
    found = package.compute_cka(a, b, loader, layers=list(layers), device="cpu", progress=False)[0]
    return found.double().numpy()


def cka_pytorch(a: nn.Module, b: nn.Module, batches: Batches, layers: Sequence[str]) -> Floats:
    package = importlib.import_module("cka_pytorch")
    calculator = package.CKACalculator(a, b, list(layers), list(layers), hook_recursive=False, verbose=False)
    return np.asarray(calculator.calculate_cka_matrix(batches, num_epochs=1), dtype=np.float64)


def torch_cka(a: nn.Module, b: nn.Module, batches: Batches, layers: Sequence[str]) -> Floats:
    package = importlib.import_module("torch_cka")
    a, b = copy.deepcopy(a), copy.deepcopy(b)  # it leaves its hooks behind
    compared = package.CKA(a, b, "a", "b", model1_layers=list(layers), model2_layers=list(layers))
    compared.compare(DataLoader(batches, batch_size=None))
    return compared.hsic_matrix.double().numpy()


NETWORKS: dict[str, Callable[[nn.Module, nn.Module, Batches, Sequence[str]], Floats]] = {
    "pytorch-cka": pytorch_cka,
    "cka-pytorch": cka_pytorch,
    "torch-cka": torch_cka,
}


# Layers as arrays (n_samples, n_features) in, one number for every pair out


def _every_pair(xs: Sequence[Floats], ys: Sequence[Floats], of: Callable[[Floats, Floats], float]) -> Floats:
    """NaN where the peer fails, as it may on dependent neurons."""
    found = np.full((len(xs), len(ys)), np.nan)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            with contextlib.suppress(np.linalg.LinAlgError, IndexError, RuntimeError, ValueError):
                found[i, j] = of(x, y)
    return found


def _google_cca(x: Floats, y: Floats) -> float:
    core = importlib.import_module("cca_core")
    found = core.get_cca_similarity(x, y, epsilon=0.0, compute_coefs=False, verbose=False)
    return float(np.mean(found["cca_coef1"]))  # its own "mean" leaves out some


def _neurons_first(layers: Sequence[Floats]) -> list[Floats]:
    """In memory too: the signs of singular vectors, on which its PWCCA depends, go with the last digits."""
    return [np.ascontiguousarray(x.T) for x in layers]


def google_cca(xs: Sequence[Floats], ys: Sequence[Floats]) -> Floats:
    return _every_pair(_neurons_first(xs), _neurons_first(ys), _google_cca)


def google_pwcca(xs: Sequence[Floats], ys: Sequence[Floats]) -> Floats:
    module = importlib.import_module("pwcca")
    return _every_pair(
        _neurons_first(xs), _neurons_first(ys), lambda x, y: float(module.compute_pwcca(x, y, epsilon=0.0)[0])
    )


def _principal(x: Floats) -> Floats:
    """Components with 99 % of the variance, neurons first, as its tutorial makes them."""
    centred = x.T - x.T.mean(1, keepdims=True)
    _, sigma, axes = np.linalg.svd(centred, full_matrices=False)
    part = np.cumsum(sigma**2) / np.sum(sigma**2)
    k = int((part < 0.99).sum()) + 1
    return sigma[:k, None] * axes[:k]


def google_svcca(xs: Sequence[Floats], ys: Sequence[Floats]) -> Floats:
    """Pair by pair, as its tutorial."""
    return _every_pair(xs, ys, lambda x, y: _google_cca(_principal(x), _principal(y)))


def google_svcca_once(xs: Sequence[Floats], ys: Sequence[Floats]) -> Floats:
    """The decomposition of each layer once: what a careful user of its code would write."""
    return _every_pair([_principal(x) for x in xs], [_principal(y) for y in ys], _google_cca)


def _anatome(method: str, **options: Any) -> Callable[[Sequence[Floats], Sequence[Floats]], Floats]:
    def every_pair(xs: Sequence[Floats], ys: Sequence[Floats]) -> Floats:
        distance = getattr(importlib.import_module("anatome.distance"), f"{method}_distance")

        def of(x: Floats, y: Floats) -> float:
            return 1 - float(distance(torch.from_numpy(x), torch.from_numpy(y), **options))

        return _every_pair(xs, ys, of)

    return every_pair


anatome_svcca = _anatome("svcca", accept_rate=0.99, backend="svd")
anatome_pwcca = _anatome("pwcca", backend="svd")


def netrep_procrustes(xs: Sequence[Floats], ys: Sequence[Floats]) -> Floats:
    """The cosine of its angular distance."""
    metric = importlib.import_module("netrep.metrics").LinearMetric(alpha=1.0)
    return _every_pair(xs, ys, lambda x, y: float(np.cos(metric.fit_score(x, y))))


def netrep_cka(xs: Sequence[Floats], ys: Sequence[Floats]) -> Floats:
    """The cosine of its distance: biased linear CKA."""
    metric = importlib.import_module("netrep.metrics").LinearCKA()
    return _every_pair(xs, ys, lambda x, y: float(np.cos(metric.score(x, y))))


def pytorch_cka_features(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Floats:
    package = importlib.import_module("cka.cka")
    return package.cka_from_features(list(xs), list(ys)).double().numpy()


def repsim_cka(xs: Sequence[Floats]) -> Floats:
    return np.asarray(importlib.import_module("repsim").cka(list(xs), "linear", "gretton"))


# RDMs


def rsatoolbox_compare(rdms: Floats, method: str) -> Floats:
    package = importlib.import_module("rsatoolbox.rdm")
    held = package.RDMs(rdms)
    return np.asarray(package.compare(held, held, method=method))


def rsatoolbox_rdm(patterns: Floats, method: str) -> Floats:
    dataset = importlib.import_module("rsatoolbox.data").Dataset(patterns)
    calc = importlib.import_module("rsatoolbox.rdm").calc_rdm
    return np.asarray(calc(dataset, method=method).get_vectors()[0])
