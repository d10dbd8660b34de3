"""One checkpoint with its model, data and loss, each made only when an analyzer asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from dynprobe.analyzers.core.contract import OptionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dynprobe.analyzers.core.activations import Activations, Kept

State = dict[str, "Tensor"]


class Loaded(Protocol):
    """What a checkpoint gives when it is read."""

    @property
    def state(self) -> State:
        """The tensors by name, on the CPU."""
        ...

    @property
    def notes(self) -> list[str]:
        """What was chosen, stripped or skipped."""
        ...

    @property
    def hash(self) -> str:
        """Hash of the content, the same in every file format."""
        ...


class CheckpointLike(Protocol):
    """What a workspace needs of a checkpoint; `dynprobe.io.checkpoints.Checkpoint` is one."""

    path: Path
    run: str
    step: int | float | None

    def load(self) -> Loaded:
        """Read the tensors, on the CPU."""
        ...


@dataclass
class Setup:
    """What the checkpoints of a run share. Everything is made once, on first use.

    Args:
        make_model: Builds the module; raises a message for the user where nothing says how.
        fit: `(model, state, where)` gives the state under the model's own names, and notes.
        make_batches: Loads the data.
        make_test_batches: Loads the test data; returns None where there is none.
        make_loss: Builds the loss.
        open_other: Opens a checkpoint outside the run by its path.
        device: Where models and data live.
        dtype: Floating-point type of models and data.
        facts: What decides the numbers beside the checkpoint: model, data hash, loss, dtype, as JSON-able
            values; called with the names of the fields the analyzer asks for.
        training: The manifest's `[training]`.
        groups: The manifest's `[groups]`.
        has_model: Whether something says how to build the model.
        make_input_hash: Hash of the data's inputs; computed from the batches by default.
        kept: Where recorded activations are kept beyond the call, or None.
        fresh: Whether what is kept is to be recorded again.
        saved: Whether the checkpoints are activations that were saved, and no weights.
        models: Modules by slot; shared by runs of one model where never two networks are looked at at once.
    """

    make_model: Callable[[], torch.nn.Module]
    fit: Callable[[torch.nn.Module, State, str], tuple[State, list[str]]]
    make_batches: Callable[[], Any]
    make_test_batches: Callable[[], Any]
    make_loss: Callable[[], Any]
    open_other: Callable[[str], CheckpointLike]
    device: Any
    dtype: Any
    facts: Callable[[Sequence[str]], Mapping[str, Any]] = lambda _needs: {}
    training: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Any] = field(default_factory=dict)
    has_model: bool = True
    make_input_hash: Callable[[], str] | None = None
    kept: Kept | None = None
    fresh: bool = False
    saved: bool = False
    models: dict[str, torch.nn.Module] = field(default_factory=dict)

    @cached_property
    def input_hash(self) -> str:
        """Hash of the inputs and their order, whatever the targets are."""
        if self.make_input_hash is not None:
            return self.make_input_hash()
        from dynprobe.analyzers.numerics.activations import input_hash

        return input_hash(self.batches)

    @cached_property
    def batches(self) -> Any:
        """The data, loaded once."""
        return self.make_batches()

    @cached_property
    def test_batches(self) -> Any:
        """The test data, loaded once, or None."""
        return self.make_test_batches()

    @cached_property
    def loss(self) -> Any:
        """The loss."""
        return self.make_loss()

    def model(self, slot: str = "") -> torch.nn.Module:
        """The module of a slot (`""`, `"a"`, `"b"`), built once and refilled per checkpoint."""
        if slot not in self.models:
            import torch

            with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and then replaced
                model = self.make_model().to(self.device)
            # not model.to(dtype), which would drop the imaginary part of complex parameters
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(self.dtype)
            self.models[slot] = model
        return self.models[slot]


@dataclass
class Run:
    """The whole sequence a checkpoint belongs to: what the field `run` gives.

    States are read when asked for and not kept: memory stays at one checkpoint.

    Args:
        name: What it is called in this call.
        checkpoints: All of them, in order, whichever are measured.
        setup: What they share.
        others: All runs of the call, itself included.
    """

    name: str
    checkpoints: Sequence[CheckpointLike]
    setup: Setup
    others: Sequence[Run] = field(default=(), repr=False)
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> list[int | float | None]:
        """Steps of all checkpoints, in order."""
        return [c.step for c in self.checkpoints]

    def __len__(self) -> int:
        return len(self.checkpoints)

    def resolve(self, which: int | str) -> CheckpointLike:
        """The checkpoint that a position (int) or a word names: `first`, `last`, a step, a path.

        Raises:
            OptionError: If it names none; the tip lists the run's steps.
        """
        if isinstance(which, int):
            return self.checkpoints[which]
        if which in ("first", "last"):
            return self.checkpoints[0 if which == "first" else -1]
        for checkpoint in self.checkpoints:
            if checkpoint.step is not None and which == f"{checkpoint.step}":
                return checkpoint
        if Path(which).exists():
            return self.setup.open_other(which)
        steps = ", ".join(str(s) for s in self.steps)
        raise OptionError(
            f"{which!r} is no checkpoint of {self.name}.", f"Give first, last, a file, or a step: {steps}."
        )

    def content_hashes(self, which: int | str) -> list[str]:
        """Content hashes of what `which` names, or of `all`; remembered while the file is the same.

        `others` stands for the last checkpoint of every run of the call, with the name of the run. Where the
        last one cannot be used those before it count too, up to one that can and may stand in for it.

        A checkpoint that cannot be read counts as such: an analyzer may go on without it.
        """
        if which == "others":
            return [f"{run.name} {' '.join(run.content_hashes('last'))}" for run in self.others]
        if which == "last":
            return self._hashes_from_the_last()
        names: list[int | str] = list(range(len(self))) if which == "all" else [which]
        return [self._content(name)[0] for name in names]

    def _hashes_from_the_last(self) -> list[str]:
        found = []
        for position in reversed(range(len(self))):
            content, usable = self._content(position)
            found.append(content)
            if usable:
                break
        return found

    def _content(self, which: int | str) -> tuple[str, bool]:
        """Hash of a checkpoint, or what is wrong with it; and whether its numbers are all finite."""
        checkpoint = self.resolve(which)
        stamp = ("content hash", str(checkpoint.path), _stamp(checkpoint.path))
        if stamp in self._cache and stamp[-1]:
            return cast("tuple[str, bool]", self._cache[stamp])
        try:
            loaded = checkpoint.load()
        except Exception as error:
            return f"broken: {error}", False
        floats = [
            t.float() if t.element_size() == 1 else t for t in loaded.state.values() if t.is_floating_point()
        ]
        self._cache[stamp] = str(loaded.hash), all(bool(t.isfinite().all()) for t in floats)
        return cast("tuple[str, bool]", self._cache[stamp])

    def state(self, which: int | str) -> State:
        """The tensors of one checkpoint under the model's own names, on the CPU."""
        checkpoint = self.resolve(which)
        state = checkpoint.load().state
        return self.setup.fit(self.setup.model(), state, str(checkpoint.path))[0]

    def model(self, which: int | str) -> torch.nn.Module:
        """The module filled with one checkpoint, in eval mode; not the one that is being measured."""
        model = self.setup.model("other")
        model.load_state_dict(self.state(which))
        return model.eval()

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, remembered under `key` for the other checkpoints of this run."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


LARGE = 2 * 2**30
"""Bytes above which a checkpoint is not read ahead while another one is measured."""


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when a file does."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


class Workspace:
    """One checkpoint, lazily: `step`, `path`, `state`, `model`, and what its run shares.

    Args:
        checkpoint: The checkpoint.
        run: Its run.
        slot: Which of two models it fills, for analyzers of pairs.
        shelf: Workspaces of which only the one last looked at keeps its tensors, itself included;
            an analyzer of whole runs walks them with one checkpoint in memory.

    Attributes:
        notes: What was chosen, stripped or skipped when it was read.
        visited: Whether it was let go of once: its hash is known, and what was recorded of it.
        pairs: In how many units it still stands, of those that share it.
    """

    def __init__(
        self, checkpoint: CheckpointLike, run: Run, slot: str = "", shelf: list[Workspace] | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.run = run
        self.slot = slot
        self.shelf = shelf
        self.notes: list[str] = []
        self._loaded: Loaded | None = None
        self._hash = ""
        self._non_finite: str | None = None
        self.visited = False
        self.pairs = 0

    @property
    def step(self) -> int | float | None:
        """The checkpoint's step."""
        return self.checkpoint.step

    @property
    def path(self) -> str:
        """The checkpoint's file, as found."""
        return str(self.checkpoint.path)

    @property
    def loaded(self) -> Loaded:
        """The checkpoint, read once and kept until `release`."""
        if self._loaded is None:
            for other in self.shelf or ():
                other.release()
            self._loaded = self.checkpoint.load()
            self.notes += [note for note in self._loaded.notes if note not in self.notes]
            self._hash = self._loaded.hash
        return self._loaded

    @property
    def is_large(self) -> bool:
        """Whether two such checkpoints in memory may be one too many."""
        return int(getattr(self.checkpoint, "size", 0)) > LARGE

    @property
    def state(self) -> State:
        """Its tensors by the names the file gives them, on the CPU."""
        return self.loaded.state

    @property
    def model(self) -> torch.nn.Module:
        """The module filled with this checkpoint, in eval mode; shared with the run's other checkpoints."""
        setup = self.run.setup
        model = setup.model(self.slot)
        state, notes = setup.fit(model, self.state, self.path)
        model.load_state_dict(state)
        model.eval()
        self.notes += [note for note in notes if note not in self.notes]
        return model

    @cached_property
    def activations(self) -> Activations:
        """What its layers compute on the data; recorded when asked for."""
        from dynprobe.analyzers.core.activations import Activations, SavedArrays

        setup = self.run.setup
        key = json.dumps([self.hash, dict(setup.facts(("activations",)))], sort_keys=True, default=str)
        if setup.saved:
            held: Any = lambda: self.loaded  # noqa: E731 -- what was loaded is activations here
            return SavedArrays(
                self.path, key, held, device=setup.device, dtype=setup.dtype, again=lambda: self.pairs > 1
            )
        return Activations(
            self.path,
            key,
            model=lambda: self.model,
            batches=lambda: setup.batches,
            input_hash=lambda: setup.input_hash,
            kept=setup.kept,
            fresh=setup.fresh,
            facts={"run": self.run.name, "step": self.step},
            again=lambda: self.pairs > 1,
        )

    @property
    def hash(self) -> str:
        """Hash of the checkpoint's content, the same in every file format."""
        return self._hash or self.loaded.hash

    def release(self) -> None:
        """Let go of the tensors."""
        self._loaded = None
        self.visited = True
        self.pairs -= 1

    def non_finite(self) -> str:
        """A sentence naming the first tensor that holds NaN or infinity, or an empty string."""
        if self._non_finite is None:
            self._non_finite = self._first_non_finite()
        return self._non_finite

    def _first_non_finite(self) -> str:
        for name, tensor in self.state.items():
            if tensor.is_floating_point() or tensor.is_complex():
                values = tensor.float() if tensor.element_size() == 1 else tensor  # float8 knows no isfinite
                bad = int((~values.isfinite()).sum())
                if bad:
                    return f"{name!r} holds {bad} values that are NaN or infinite (of {tensor.numel()})"
        return ""
