"""From what the user typed and the manifest to runs whose model, data and loss can be made."""

from __future__ import annotations

import functools
import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.analyzers.core.workspace import CheckpointLike, Run, Setup, State
from dynprobe.io.errors import InputError
from dynprobe.io.manifest import EXAMPLE, Manifest, Spec, merge_spec, parse_args

if TYPE_CHECKING:
    import torch

    from dynprobe.analyzers.core.activations import Kept
    from dynprobe.analyzers.core.contract import Declaration
    from dynprobe.cli.request import Request
    from dynprobe.io.checkpoints import Sequence as Checkpoints
    from dynprobe.io.data import Dataset


@dataclass
class PreparedRun:
    """A run with what it needs, and its chosen checkpoints."""

    run: Run
    chosen: Sequence[CheckpointLike]
    notes: list[str]
    warnings: list[str]
    specs: Specs
    shared: SharedData

    @property
    def dataset(self) -> Dataset | None:
        """Its data, if anything says which."""
        return self.shared.dataset(self.specs.data) if self.specs.data else None


@dataclass(frozen=True)
class Specs:
    """What the command line and the manifest together say about one run."""

    where: str
    manifest: Manifest
    model: Spec | None
    data: Spec | None
    test_data: Spec | None
    loss: Spec | None

    @classmethod
    def of(cls, request: Request, sequence: Checkpoints) -> Specs:
        """Command line first, then the manifest, then what the format itself says."""
        manifest = sequence.manifest
        model = merge_spec(request.model, parse_args(request.model_arg), manifest.model, "--model")
        if model is None or model.name == "hf":
            model = _from_config(sequence, model)
        return cls(
            sequence.name,
            manifest,
            model,
            merge_spec(request.data, parse_args(request.data_arg, "--data-arg"), manifest.data, "--data"),
            merge_spec(
                request.test_data,
                parse_args(request.test_data_arg, "--test-data-arg"),
                manifest.test_data,
                "--test-data",
            ),
            merge_spec(request.loss, {}, manifest.loss, "--loss"),
        )

    def require(self, kinds: Sequence[str]) -> None:
        """Check that something says all of these: of `model`, `data` and `loss`.

        Raises:
            InputError: If not; names all that is missing, the options, and a manifest to copy.
        """
        missing = [kind for kind in kinds if getattr(self, kind) is None]
        if not missing:
            return
        what = {"model": "how to build the model", "data": "which data to use", "loss": "which loss"}
        options = ", ".join(f"--{kind}" for kind in missing)
        raise InputError(
            f"{self.where}: a checkpoint does not say {' and '.join(what[kind] for kind in missing)}, "
            "and there is no dynprobe.toml that does.",
            f"Give {options}, or put a dynprobe.toml into the run folder "
            f"(`dynprobe init` proposes one):\n{EXAMPLE}",
        )

    def need(self, kind: str) -> Spec:
        """The spec of a kind.

        Raises:
            InputError: As `require`.
        """
        self.require([kind])
        spec = getattr(self, kind)
        assert isinstance(spec, Spec)
        return spec


def _from_config(sequence: Checkpoints, typed: Spec | None) -> Spec | None:
    """A Hugging Face `config.json` beside the weights builds the model without being asked."""
    for folder in (sequence.checkpoints[-1].path, sequence.root, sequence.checkpoints[-1].path.parent):
        config = folder / "config.json"
        if config.is_file():
            args = {**(typed.args if typed else {})}
            args.setdefault("config", str(config))
            return Spec("hf", args, typed.origin if typed else str(config))
    return typed


def prepare(request: Request, declaration: Declaration | None = None) -> list[PreparedRun]:
    """Open the runs of a request and say how each one's model, data and loss are made; nothing is built yet.

    Args:
        request: The call.
        declaration: What is to be measured: where it asks for activations, saved ones may stand for runs.

    Raises:
        InputError: If a run or step does not exist, or an option cannot be parsed.
    """
    if declaration is None or not declaration.wants("activations"):
        prepared = _prepare_networks(request, request.runs, SharedData(request))
        for each in prepared:
            each.run.others = [other.run for other in prepared]
        return prepared
    from dynprobe.cli.saved import prepare_saved, told_apart

    shared = SharedData(request, one_model=not declaration.wants("model"))
    prepared = []
    for runs, files in told_apart(request):
        prepared += prepare_saved(request, files, shared) if files else []
        prepared += _prepare_networks(request, runs, shared) if runs else []
    networks = {each.run.name for each in prepared if not each.run.setup.saved}
    for each in prepared:
        if each.run.setup.saved and each.run.name in networks:  # kept of a run that is there itself
            each.run.name = f"{Path(each.run.checkpoints[0].path).parent.name}/{each.run.name}"
    return prepared


def _prepare_networks(request: Request, runs: list[str], shared: SharedData) -> list[PreparedRun]:
    from dynprobe.io.checkpoints import open_runs

    sequences = open_runs(runs, key=request.key, ema=request.ema, step_pattern=request.step_pattern)
    prepared = []
    for sequence in sequences:
        specs = Specs.of(request, sequence)
        run = Run(sequence.name, sequence.checkpoints, _setup(request, specs, shared))
        prepared.append(
            PreparedRun(
                run,
                sequence.select(request.steps),
                list(sequence.notes),
                list(sequence.warnings),
                specs,
                shared,
            )
        )
    return prepared


class SharedData:
    """Data sets by specification: runs that use the same data load it once.

    Args:
        request: The call.
        one_model: Whether runs of one model may fill the same module, one after the other.
    """

    def __init__(self, request: Request, *, one_model: bool = False) -> None:
        self._request = request
        self._one_model = one_model
        self._models: dict[str, dict[str, torch.nn.Module]] = {}
        self._datasets: dict[str, Dataset] = {}
        self._batches: dict[str, Any] = {}
        self._input_hashes: dict[str, str] = {}

    def dataset(self, spec: Spec) -> Dataset:
        """The data of a specification, the seeded subset where one was asked for."""
        from dynprobe.io.data import load_data

        request = self._request
        key = f"{spec.name} {sorted(spec.args.items())}"
        if key not in self._datasets:
            self._datasets[key] = load_data(
                spec, trust=request.trust, samples=request.samples, seed=request.seed
            )
        return self._datasets[key]

    def batches(self, spec: Spec) -> Any:
        """The same as batches, on the requested device."""
        key = f"{spec.name} {sorted(spec.args.items())}"
        if key not in self._batches:
            request = self._request
            self._batches[key] = self.dataset(spec).batches(
                request.batch_size, device=self.device, dtype=self.dtype
            )
        return self._batches[key]

    def models(self, spec: Spec | None) -> dict[str, torch.nn.Module]:
        """Where modules of this specification are held."""
        if spec is None or not self._one_model:
            return {}
        return self._models.setdefault(f"{spec.name} {sorted(spec.args.items())}", {})

    def input_hash(self, spec: Spec) -> str:
        """Hash of the inputs as the networks see them, whatever the targets are."""
        from dynprobe.analyzers.numerics.activations import input_hash

        key = f"{spec.name} {sorted(spec.args.items())}"
        if key not in self._input_hashes:
            self._input_hashes[key] = input_hash(self.batches(spec))
        return self._input_hashes[key]

    @cached_property
    def kept(self) -> Kept | None:
        """The folder of recorded activations that the request names."""
        folder = self._request.keep_activations
        if not folder:
            return None
        from dynprobe.io.kept_activations import KeptActivations

        return KeptActivations(Path(folder))

    @cached_property
    def device(self) -> torch.device:
        """The requested device.

        Raises:
            InputError: If this machine does not have it.
        """
        import torch

        name = self._request.device
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"--device {name}: {str(error).splitlines()[0]}",
                "cpu works everywhere; cuda needs a CUDA build of torch.",
            ) from error
        return device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The requested floating-point type."""
        import torch

        found = getattr(torch, self._request.dtype)
        assert isinstance(found, torch.dtype)
        return found


def _setup(request: Request, specs: Specs, shared: SharedData) -> Setup:
    from dynprobe.io.models import build_model, fit_state

    def model() -> torch.nn.Module:
        return build_model(specs.need("model"), trust=request.trust)

    def fit(module: torch.nn.Module, state: State, where: str) -> tuple[State, list[str]]:
        return fit_state(module, state, where=where)

    def batches() -> Any:
        return shared.batches(specs.need("data"))

    def test_batches() -> Any:
        return shared.batches(specs.test_data) if specs.test_data else None

    def loss() -> Any:
        return make_loss(specs.need("loss"), trust=request.trust)

    def other(path: str) -> CheckpointLike:
        from dynprobe.io.checkpoints import open_runs

        found = open_runs([path], key=request.key, ema=request.ema, step_pattern=request.step_pattern)[0]
        return found.checkpoints[-1]

    def facts(needs: Sequence[str]) -> Mapping[str, Any]:
        return _facts(request, specs, shared, needs)

    return Setup(
        make_model=model,
        fit=fit,
        make_batches=batches,
        make_test_batches=test_batches,
        make_loss=loss,
        open_other=other,
        device=shared.device,
        dtype=shared.dtype,
        facts=facts,
        training=specs.manifest.training,
        groups=specs.manifest.groups,
        has_model=specs.model is not None,
        make_input_hash=lambda: shared.input_hash(specs.need("data")),
        kept=shared.kept,
        fresh=request.fresh,
        models=shared.models(specs.model),
    )


def make_loss(spec: Spec, *, trust: bool) -> Any:
    """The loss of a specification: one of the named ones, or the user's callable.

    Raises:
        InputError: If no loss has that name.
    """
    from dynprobe.analyzers.numerics.losses import as_loss, get_loss
    from dynprobe.io.code import names_code, resolve_callable

    if names_code(spec.name):
        function = resolve_callable(spec, trust=trust)
        name = str(getattr(function, "__name__", spec.name))
        return as_loss(functools.partial(function, **spec.args) if spec.args else function, name)
    if spec.args:
        raise InputError(
            f"{spec.origin}: the loss {spec.name} takes no arguments, and {sorted(spec.args)} were given.",
            'Name a function that takes them: name = "torch.nn.functional:cross_entropy".',
        )
    try:
        return get_loss(spec.name)
    except (ValueError, LookupError) as error:
        raise InputError(f"--loss {spec.name}: {error}".replace("'", "")) from error


def _facts(request: Request, specs: Specs, shared: SharedData, needs: Sequence[str]) -> dict[str, Any]:
    """What decides the numbers beside checkpoint and options; nothing that names a machine or a path."""
    names = {need.removesuffix("_a").removesuffix("_b") for need in needs}
    whole_run = bool(names & {"checkpoints", "runs"})
    facts: dict[str, Any] = {}
    if specs.model and (names & {"model", "activations"} or whole_run):
        facts["model"] = _described(specs.model)
        facts["dtype"] = request.dtype
    if specs.data and "batches" in names:
        facts["data"] = shared.dataset(specs.data).hash
    if specs.data and "names" in names:
        facts["names"] = shared.dataset(specs.data).names_hash
    if specs.data and "activations" in names:
        facts["inputs"] = shared.input_hash(specs.data)
    if specs.test_data and "test_batches" in names:
        facts["test_data"] = shared.dataset(specs.test_data).hash
    if specs.loss and "loss" in names:
        facts["loss"] = _described(specs.loss)
    if "training" in names:
        facts["training"] = dict(specs.manifest.training)
    if "groups" in names:
        facts["groups"] = dict(specs.manifest.groups)
    return facts


def _described(spec: Spec) -> str:
    """Name and arguments, without the folder that a file happens to lie in, with a hash of what it holds."""
    name = Path(spec.name).name if "/" in spec.name else spec.name
    args = ", ".join(f"{k}={v}" for k, v in sorted(spec.args.items()) if k != "config")
    text = f"{name}({args})" if args else name
    sources = _source_files(spec)
    if not sources:
        return text
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return f"{text} [{digest.hexdigest()[:12]}]"


def _source_files(spec: Spec) -> list[Path]:
    """The files that decide what a name means, once it was loaded: code, a program, a configuration.

    Of a package of the user's own, all its modules that were loaded: a model's layers may be defined in
    another file than the model.
    """
    if "config" in spec.args:
        config = Path(str(spec.args["config"]))
        candidates = [config, config / "config.json"]
    else:
        name = spec.name.rpartition(":")[0]
        loaded = getattr(sys.modules.get(name), "__file__", None)
        candidates = [Path(spec.name), Path(name), Path(loaded or "")]
        package = name.partition(".")[0]
        if loaded and not {"site-packages", "dist-packages"} & set(Path(loaded).parts):
            files = {
                getattr(m, "__file__", None) for n, m in sys.modules.items() if n.partition(".")[0] == package
            }
            return sorted(Path(file) for file in files if file and Path(file).is_file())
    return [path for path in candidates if path.is_file()][:1]


def command_line(argv: Sequence[str]) -> str:
    """What was typed, as a shell would read it again."""
    return shlex.join(["dynprobe", *argv])
