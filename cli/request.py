"""What every analyzer takes beside its own options: one table of shared options."""

# ruff: noqa: RUF009 -- _option() gives dataclasses.field(), which is what a default here must be
from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Format = Literal["table", "json", "csv"]
Pairs = Literal["auto", "consecutive", "first", "last", "all", "same-step", "self"]


def _option(
    default: Any,
    *flags: str,
    help: str,  # noqa: A002
    panel: str,
    needs: str = "",
    min: int | None = None,  # noqa: A002
) -> Any:
    metadata = {"flags": flags, "help": help, "panel": panel, "needs": needs, "min": min}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


WHICH, WHAT, HOW, OUT = "Which checkpoints", "Model, data, loss", "How to run", "Results"


@dataclass
class Request:
    """One call of an analyzer: the runs, the shared options, and the analyzer's own.

    Picklable, so that worker processes prepare the same work from it.
    """

    analyzer: str
    runs: list[str]
    options: dict[str, Any] = field(default_factory=dict)

    steps: str = _option(
        "all",
        "--steps",
        panel=WHICH,
        help="last, first, all, 0,100,200, ::5 (every fifth), 100:2000 (range).",
    )
    key: str | None = _option(
        None, "--key", panel=WHICH, help="Where in the file the weights are: model.state_dict."
    )
    ema: bool = _option(False, "--ema", panel=WHICH, help="Prefer the averaged (EMA) copy of the weights.")
    step_pattern: str | None = _option(
        None,
        "--step-pattern",
        panel=WHICH,
        help="Regular expression with one group: the step in a file's name.",
    )
    pairs: Pairs = _option(
        "auto",
        "--pairs",
        panel=WHICH,
        needs="pair",
        help="Which checkpoints to compare; auto: same-step between runs, consecutive within one.",
    )
    against: str | None = _option(
        None,
        "--against",
        panel=WHICH,
        needs="pair",
        help="Compare every checkpoint with this one: final, first, a step of its run, or a file.",
    )
    group: list[str] = _option(
        (),
        "--group",
        panel=WHICH,
        needs="activations",
        help="NAME=GLOB puts the runs that match into a group, repeat for more; or a key of the manifests' "
        "[groups]. Groups are compared layer by layer.",
    )
    transpose: bool = _option(
        False,
        "--transpose",
        panel=WHICH,
        needs="activations",
        help="Saved activations are (n_features, n_samples).",
    )

    model: str | None = _option(
        None,
        "--model",
        panel=WHAT,
        needs="model",
        help="builtin:NAME, module:callable, file.py:callable, torchvision:NAME, timm:NAME, hf, a.pt2.",
    )
    model_arg: list[str] = _option(
        (), "--model-arg", panel=WHAT, needs="model", help="width=16; repeat for more."
    )
    data: str | None = _option(
        None,
        "--data",
        panel=WHAT,
        needs="batches",
        help="sklearn:NAME, a .npz/.safetensors/.h5/.pt/.csv file, package.module:callable.",
    )
    data_arg: list[str] = _option(
        (), "--data-arg", panel=WHAT, needs="batches", help="split=train; repeat for more."
    )
    test_data: str | None = _option(
        None, "--test-data", panel=WHAT, needs="test_batches", help="Test data, given like --data."
    )
    test_data_arg: list[str] = _option(
        (), "--test-data-arg", panel=WHAT, needs="test_batches", help="split=test; repeat for more."
    )
    loss: str | None = _option(
        None,
        "--loss",
        panel=WHAT,
        needs="loss",
        help="cross_entropy, mse, bce_with_logits, causal_lm, package.module:callable.",
    )
    samples: int | None = _option(
        None,
        "--samples",
        min=1,
        panel=WHAT,
        needs="batches",
        help="Measure on this many samples, a fixed seeded subset.",
    )
    batch_size: int = _option(
        1024, "--batch-size", min=1, panel=WHAT, needs="batches", help="Samples in one forward pass."
    )
    trust: bool = _option(
        False,
        "--trust",
        panel=WHAT,
        needs="code",
        help="Run code that a manifest names. What you type here is trusted anyway.",
    )

    device: str = _option("cpu", "--device", panel=HOW, needs="model", help="cpu, cuda, cuda:1, mps.")
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = _option(
        "float32", "--dtype", panel=HOW, needs="model", help="Floating-point type of model and data."
    )
    seed: int = _option(
        0,
        "--seed",
        min=0,
        panel=HOW,
        needs="random",
        help="Seed of everything random: subset, directions, probes.",
    )
    workers: int = _option(1, "--workers", min=1, panel=HOW, help="Processes on this machine.")
    threads: int | None = _option(
        None,
        "--threads",
        min=1,
        panel=HOW,
        needs="model",
        help="CPU threads. [default: as many as a trial shows to help]",
    )
    shard: str | None = _option(
        None,
        "--shard",
        panel=HOW,
        help="I/N: the I-th of N parts, from 0; join them with dynprobe report merge.",
    )
    fresh: bool = _option(
        False, "--fresh", panel=HOW, help="Measure again, and replace an older report's numbers."
    )
    dry_run: bool = _option(
        False, "--dry-run", panel=HOW, help="Say what would be done and what it would cost."
    )

    keep_activations: str | None = _option(
        None,
        "--keep-activations",
        panel=HOW,
        needs="activations",
        help="Folder that keeps what was recorded: later calls read it instead of running the networks.",
    )

    output: str | None = _option(
        None, "--output", "-o", panel=OUT, help="HDF5 report. [default: dynprobe-RUN.h5 in this folder]"
    )
    figure: str | None = _option(
        None,
        "--figure",
        panel=OUT,
        needs="figure",
        help=".png, .pdf, .svg, .html, .vts or .vtp. [default: a .png beside the report]",
    )
    no_figure: bool = _option(False, "--no-figure", panel=OUT, needs="figure", help="Draw no figure.")
    style: str = _option(
        "",
        "--style",
        panel=OUT,
        needs="figure",
        help="How to draw it; for surfaces contour, filled, surface.",
    )
    format: Format = _option("table", "--format", panel=OUT, help="What goes to stdout.")
    quiet: bool = _option(False, "--quiet", "-q", panel=OUT, help="Only errors on stderr.")
    verbose: bool = _option(False, "--verbose", "-v", panel=OUT, help="More on stderr, tracebacks too.")


def shared_options() -> list[Any]:
    """The fields of `Request` that are command-line options."""
    return [f for f in fields(Request) if "flags" in f.metadata]
