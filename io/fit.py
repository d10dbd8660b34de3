"""Does a checkpoint fit a model? Every name and shape is checked before anything is computed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynprobe.io.errors import WrongModel
from dynprobe.io.names import nearest, shortlist
from dynprobe.io.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

_MEMORY = "dynprobe_built_from"
_CLASS_ARGUMENTS = ("classes", "num_classes", "n_classes", "num_labels")
_AVERAGED = re.compile(r"ema|average|avg|swa|teacher|target", re.IGNORECASE)
_MAX_LINES = 20


@dataclass(frozen=True)
class BuiltFrom:
    """How a model was made, kept with it so that an error can say which option to change.

    Args:
        spec: What was built.
        parameters: Names of the arguments it takes.
    """

    spec: Spec
    parameters: tuple[str, ...]

    def remember(self, model: nn.Module) -> None:
        """Attach this to the model."""
        vars(model)[_MEMORY] = self

    @staticmethod
    def of(model: nn.Module) -> BuiltFrom | None:
        """How `model` was made, if it was made by `build_model`."""
        found = vars(model).get(_MEMORY)
        return found if isinstance(found, BuiltFrom) else None


def fit_state(
    model: nn.Module, state: Mapping[str, Tensor], *, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Match a checkpoint's tensors to a model's names, or say all that does not fit.

    Prefixes (`module.`, `_orig_mod.`, Lightning's `net.` …) are stripped, or added, where that makes the
    names those of the model. A tied weight stored once serves all its names. BatchNorm counters that old
    checkpoints lack are zero. Values keep the dtype of the checkpoint.

    Args:
        model: The module to fill; not changed.
        state: Name → tensor of one checkpoint.
        where: The checkpoint, as the user would name it.

    Returns:
        The tensors under exactly the names of `model.state_dict()`, in its order, and notes on what was done.

    Raises:
        WrongModel: Names or shapes do not fit. The message lists all of them, with the nearest names.
    """
    import torch

    expected = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    given, notes = _rename(expected, state, where)
    given = _without_ignored(model, expected, given)
    problems = _nothing_in_common(expected, given)
    if not problems:
        given = _complete(expected, given, notes)
        problems = _problems(expected, given)
    if problems:
        shown = problems[:_MAX_LINES]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more.")
        text = shown[0] if len(shown) == 1 else "\n  " + "\n  ".join(shown)
        raise WrongModel(f"{where}: {text}", _guess(model, expected, given))
    return {name: given[name] for name in expected}, notes


def _without_ignored(
    model: nn.Module, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Without entries that are no weights, and those that a transformers model says may be left over."""
    patterns = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]

    def ignored(name: str) -> bool:
        return name.endswith("_extra_state") or any(pattern.search(name) for pattern in patterns)

    return {name: tensor for name, tensor in given.items() if name in expected or not ignored(name)}


def _rename(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The state under the model's names: one prefix stripped or added, if that fits more names."""
    strip = _prefix_counts(state, expected)
    add = _prefix_counts(expected, state)
    plain = sum(name in expected for name in state)
    best = max([plain, *strip.values(), *add.values()])
    # A prefix that explains only few names is a coincidence; the plain names make the clearer error.
    if best == plain or 2 * best < len(expected):
        return dict(state), []
    prefixes = [prefix for prefix, count in strip.items() if count == best]
    if prefixes:
        prefix = _only(prefixes, where)
        inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        notes = [f"stripped the prefix {prefix!r}"]
        if len(inside) < len(state):
            outside = [name for name in state if not name.startswith(prefix)]
            notes.append(f"ignored {len(outside)} entries outside it: {shortlist(outside, 4)}")
        return inside, notes
    prefix = _only([prefix for prefix, count in add.items() if count == best], where)
    return {prefix + name if prefix + name in expected else name: t for name, t in state.items()}, [
        f"added the prefix {prefix!r}"
    ]


def _prefix_counts(long: Iterable[str], short: Mapping[str, Tensor]) -> Counter[str]:
    """How many names of `long` are one of `short` behind a prefix, by prefix (each ends with a dot)."""
    counts: Counter[str] = Counter()
    for name in long:
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in short:
                counts[name[: dot.end()]] += 1
    return counts


def _only(prefixes: list[str], where: str) -> str:
    """The one prefix to use; of a model and its moving average, the model.

    Raises:
        WrongModel: Several fit equally well.
    """
    plain = [prefix for prefix in prefixes if not _AVERAGED.search(prefix)]
    choice = plain or prefixes
    if len(choice) > 1:
        raise WrongModel(
            f"{where}: holds the model more than once, under {shortlist(sorted(choice))}.",
            "Save the one to be analysed in a file of its own.",
        )
    return choice[0]


def _complete(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Fill in what a checkpoint may leave out: tied copies and BatchNorm counters."""
    import torch

    complete = dict(given)
    counters = 0
    for names in _tied(expected):
        source = next((name for name in names if name in given), None)
        for name in names:
            if name not in given and source:
                complete[name] = given[source]
                notes.append(f"{name!r} is tied to {source!r}")
            elif name not in given and name.endswith("num_batches_tracked"):
                complete[name] = torch.zeros_like(expected[name], device="cpu")
                counters += 1
    if counters:
        notes.append(f"{counters} BatchNorm counters (num_batches_tracked) are missing and set to 0")
    return complete


def _tied(expected: Mapping[str, Tensor]) -> list[list[str]]:
    """The names, grouped by the tensor they name."""
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _nothing_in_common(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    if not expected or any(name in given for name in expected):
        return []
    return [
        f"none of the model's {len(expected)} names is in the checkpoint. "
        f"The model has {shortlist(expected, 4)}; the checkpoint has {shortlist(given, 4)}."
    ]


def _problems(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """One line for each thing that does not fit; empty if all does."""
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    lines = [_misshapen(name, given[name], tensor) for name, tensor in expected.items() if name in given]
    lines += [f"{name!r} is missing{_near(name, unknown, 'the checkpoint')}." for name in missing]
    lines += [f"{name!r} is not in the model{_near(name, missing, 'the model')}." for name in unknown]
    lines += _untied(expected, given)
    return [line for line in lines if line]


def _misshapen(name: str, found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"{name!r} is {tuple(found.shape)}, the model expects {tuple(wanted.shape)}."
    if found.is_floating_point() != wanted.is_floating_point():
        return f"{name!r} is {found.dtype}, the model expects {wanted.dtype}.".replace("torch.", "")
    return ""


def _near(name: str, candidates: list[str], owner: str) -> str:
    match = nearest(name, candidates)
    return f"; the nearest left in {owner} is {match!r}" if match else ""


def _untied(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Names that are one tensor in the model, but have different values in the checkpoint."""
    lines = []
    for first, *others in _tied(expected):
        for other in others:
            a, b = given.get(first), given.get(other)
            if a is not None and b is not None and a is not b and a.shape == b.shape and not a.equal(b):
                lines.append(
                    f"{first!r} and {other!r} are one tensor in the model, but differ in the checkpoint."
                )
    return lines


def _guess(model: nn.Module, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What the user may have meant, as the option to type; "" if nothing suggests itself."""
    built = BuiltFrom.of(model)
    if built and built.spec.name.startswith("builtin:"):
        tip = _guess_builtin(built.spec, given)
        if tip:
            return tip
    shapes = {
        (given[name].shape[0], tensor.shape[0])
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape and given[name].ndim == tensor.ndim > 0
        if given[name].shape[1:] == tensor.shape[1:]
    }
    if len(shapes) != 1 or any(name not in given for name in expected):
        return ""
    ((classes, _),) = shapes
    known = built.parameters if built else ()
    argument = next((name for name in _CLASS_ARGUMENTS if name in known), "classes")
    return f"Was it trained with {classes} classes? Try --model-arg {argument}={classes}."


def _guess_builtin(spec: Spec, given: Mapping[str, Tensor]) -> str:
    """The built-in network and the arguments that these shapes belong to."""
    from dynprobe.io.infer import builtin_candidates, infer_arguments

    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    name = spec.name.removeprefix("builtin:")
    args = infer_arguments(name, shapes)
    if args is None:
        others = builtin_candidates(shapes)
        if not others:
            return ""
        other, args = others[0]
        options = "".join(f" --model-arg {key}={value}" for key, value in args.items())
        return f"These are the names and shapes of another model. Try --model builtin:{other}{options}."
    changed = _changed(spec, name, args)
    options = " ".join(f"--model-arg {key}={str(value).lower()}" for key, value in changed.items())
    question = f"Was it trained with {args['classes']} classes? " if list(changed) == ["classes"] else ""
    return f"{question}Try {options}."


def _changed(spec: Spec, name: str, args: Mapping[str, object]) -> dict[str, object]:
    """The arguments that differ from what was asked for, given or by default."""
    import inspect

    from dynprobe.io.nets import BUILTIN

    changed: dict[str, object] = {}
    for key, parameter in inspect.signature(BUILTIN[name]).parameters.items():
        asked = spec.args.get(key, parameter.default)
        inferred = args.get(key, parameter.default if isinstance(parameter.default, bool) else asked)
        if inferred != asked:
            changed[key] = inferred
    return changed
