"""A `dynprobe.toml` proposed from what a run holds: what can be told is filled in, the rest is a comment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynprobe.io.data_files import READERS
from dynprobe.io.errors import InputError

if TYPE_CHECKING:
    from dynprobe.io.checkpoints import Checkpoint, Sequence

# Facts as training scripts name them → as the manifest does.
_FACTS = {
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "bs": "batch_size",
    "optimizer": "optimizer",
    "optim": "optimizer",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "seed": "seed",
}
_WHOLE, _NUMBERS = ("batch_size", "seed"), ("learning_rate", "momentum", "weight_decay")
_HF_LOSSES = {"CausalLM": "causal_lm", "LMHeadModel": "causal_lm", "Classification": "cross_entropy"}


def propose_manifest(sequence: Sequence) -> str:
    """Propose a manifest for a run.

    Args:
        sequence: The run; only headers are read.

    Returns:
        The text of a `dynprobe.toml` that can be read as it is. What cannot be told from the checkpoints (the
        data, often the model) stands in it as a comment to fill in.

    Raises:
        InputError: No checkpoint of the run can be read.
    """
    readable = [checkpoint for checkpoint in sequence.checkpoints if not checkpoint.problem]
    if not readable:
        raise InputError(f"{sequence.root}: none of its checkpoints can be read.", "See: dynprobe check")
    last = readable[-1]
    header = last.header()
    shapes = {name: tuple(info.shape) for name, info in header.tensors.items()}
    config = _hf_config(sequence.root, last)
    candidates = [] if config else _candidates(shapes)
    parts = [
        f"# Proposed by `dynprobe init` from {last.path.name}. Check it; fill in what is commented out.\n",
        _model(config, candidates, shapes, header.metadata),
        _data(sequence.root, candidates),
        _loss(config, candidates),
        _training(header.metadata),
        '# Labels by which runs are compared.\n# [groups]\n# seed = 0\n# labels = "true"\n',
    ]
    parts += [_checkpoints(sequence)] if sequence.unit == "order" or sequence.manifest.checkpoints else []
    return "\n".join(parts)


def _checkpoints(sequence: Sequence) -> str:
    """What an earlier manifest said is kept: without it the run might not be read at all."""
    if known := sequence.manifest.checkpoints:
        return "[checkpoints]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in known.items())
    return (
        "# Nothing tells the steps. Say where the number is in the file names.\n"
        "# [checkpoints]\n# step = 'it(\\d+)'\n"
    )


def _hf_config(root: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The transformers configuration beside the weights, if there is one."""
    for folder in (checkpoint.path, root):
        path = folder / "config.json"
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
            if isinstance(config, dict) and "model_type" in config:
                return config
    return None


def _candidates(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, dict[str, Any]]]:
    """Built-in networks that fit, also behind a prefix that all names share (`net.`, `module.`)."""
    from dynprobe.io.infer import builtin_candidates

    while True:
        found = builtin_candidates(shapes)
        firsts = {name.partition(".")[0] for name in shapes}
        if found or len(firsts) != 1 or any("." not in name for name in shapes):
            return found
        shapes = {name.partition(".")[2]: shape for name, shape in shapes.items()}


def _model(
    config: dict[str, Any] | None,
    candidates: list[tuple[str, dict[str, Any]]],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, Any],
) -> str:
    if config:
        kind = (config.get("architectures") or [config["model_type"]])[0]
        return f'# {kind}, from the config.json beside the weights.\n[model]\nfactory = "hf"\n'
    if not candidates:
        names = list(shapes)
        return (
            f"# No built-in network has these {len(names)} tensors, from {_entry(shapes, names[0])} to "
            f"{_entry(shapes, names[-1])}.\n"
            "# Name the code that builds it (running it needs --trust), or a torch.export program arch.pt2.\n"
            '# [model]\n# factory = "package.module:callable"\n# args = { }\n'
        )
    (name, args), *others = candidates
    args = {**args, **_unseen(name, metadata)}
    lines = [
        "# Names and shapes are those of this built-in network.",
        f'[model]\nfactory = "builtin:{name}"\nargs = {_inline(args)}',
        *(f'# This fits as well: factory = "builtin:{a}", args = {_inline(more)}' for a, more in others),
    ]
    if name == "mlp" and "activation" not in args:
        lines.append('# Shapes do not show the activation; "relu" unless args say otherwise.')
    if name.startswith("resnet"):
        lines.append("# Shapes do not show whether it has shortcuts; if not: shortcut = false.")
    return "\n".join(lines) + "\n"


def _unseen(name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that shapes do not show, where the checkpoint's own hyper-parameters name them."""
    wanted = {"mlp": "activation"}.get(name, "shortcut")
    value = _hyper_parameters(metadata).get(wanted)
    return {} if value is None else {wanted: value}


def _hyper_parameters(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Facts by their last name: `hyper_parameters.optim.lr` is `lr`; the first of a name counts."""
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        found.setdefault(key.rpartition(".")[2], value)
    return found


def _entry(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"{name} {tuple(shapes[name])}"


def _data(root: Path, candidates: list[tuple[str, dict[str, Any]]]) -> str:
    """A data file in or beside the run is likely its data; a comment otherwise."""
    folder = root if root.is_dir() else root.parent
    files = [
        path
        for place in (folder, folder.absolute().parent)
        for path in sorted(place.iterdir())
        if path.suffix in READERS and path.suffix not in (".pt", ".pth", ".safetensors") and path.is_file()
    ]
    files = [
        path for path in files if not (path.suffix == ".csv" and "log" in path.stem) and not _report(path)
    ]
    prefix = {folder: "", folder.absolute().parent: "../"}
    sources = [f"{prefix[path.parent]}{path.name}" for path in files]
    if candidates and candidates[0][1].get("inputs") == 64:
        sources.insert(0, "sklearn:digits")
    source = (sources or ["file.npz"])[0]
    lines = ["# Checkpoints do not say what they were trained on. For example:"]
    lines += [f'# [data]\n# source = "{source}"\n# args = {{ split = "train" }}']
    lines += [f'# [test_data]\n# source = "{source}"\n# args = {{ split = "test" }}']
    return "\n".join(lines) + "\n"


def _report(path: Path) -> bool:
    """Whether a file is one of our own reports."""
    import h5py

    if path.suffix not in (".h5", ".hdf5") or not h5py.is_hdf5(path):
        return False
    with h5py.File(path, locking=False) as file:
        return "dynprobe_layout" in file.attrs


def _loss(config: dict[str, Any] | None, candidates: list[tuple[str, dict[str, Any]]]) -> str:
    """By what the outputs are; a guess, and said to be one."""
    if config:
        kind = str((config.get("architectures") or [""])[0])
        name = next((loss for part, loss in _HF_LOSSES.items() if part in kind), None)
    else:
        classes = candidates[0][1].get("classes") if candidates else None
        name = None if classes is None else "mse" if classes == 1 else "cross_entropy"
    if name is None:
        return '# [loss]\n# name = "cross_entropy"\n'
    return f'# A guess from the outputs.\n[loss]\nname = "{name}"\n'


def _training(metadata: Mapping[str, Any]) -> str:
    """Facts that the checkpoint itself states."""
    facts: dict[str, Any] = {}
    for key, value in _hyper_parameters(metadata).items():
        name = _FACTS.get(key)
        if name and name not in facts and _usable(name, value):
            facts[name] = value
    if not facts:
        return (
            "# Facts that some analyzers use.\n"
            '# [training]\n# learning_rate = 0.1\n# batch_size = 64\n# optimizer = "sgd"\n'
        )
    lines = [f"{name} = {json.dumps(value)}" for name, value in facts.items()]
    return "# As the checkpoint says.\n[training]\n" + "\n".join(lines) + "\n"


def _usable(name: str, value: object) -> bool:
    """Whether the manifest would take it: safetensors metadata, for one, holds only text."""
    if isinstance(value, bool):
        return False
    if name in _WHOLE:
        return isinstance(value, int)
    return isinstance(value, (int, float) if name in _NUMBERS else str)


def _inline(args: Mapping[str, Any]) -> str:
    """An inline TOML table; JSON writes numbers, switches and text alike."""
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in args.items()) + " }"
