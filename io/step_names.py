"""What the name of a file or folder says about its step, under the conventions of training scripts."""

from __future__ import annotations

import re
from pathlib import PurePath

from dynprobe.io.header import Count

_SUFFIX = re.compile(
    r"\.(pt2?|pth|bin|ckpt|chkpt|safetensors|t7|tar|gz|pkl|pickle|model|mdl|weights|state|checkpoint|distcp)$",
    re.IGNORECASE,
)
_SHARD = re.compile(r"[-_]?\d+[-_]of[-_]\d+", re.IGNORECASE)
# torchvision and hub files end with the first 8 (or more) digits of their sha256.
_HASH = re.compile(r"(?<=[-_.])(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{7,64}(?=$|[-_.])", re.IGNORECASE)
_DATE = re.compile(
    r"(?<!\d)(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T ]\d{2}[-_:.]?\d{2}(?:[-_:.]?\d{2})?)?(?!\d)"
)

_STEP_WORDS = {
    "step", "steps", "globalstep", "iter", "iters", "iteration", "iterations", "itr", "it", "update",
    "updates", "ba", "batch", "batches", "numupdates",
}  # fmt: skip
_EPOCH_WORDS = {"epoch", "epochs", "ep", "eps"}
_PLAIN_WORDS = {
    "", "checkpoint", "checkpoints", "ckpt", "chkpt", "chk", "cp", "model", "models", "net", "network",
    "weights", "weight", "w", "state", "states", "snapshot", "save", "saved", "params", "backup", "after",
    "at", "t",
}  # fmt: skip
# Numbers after these are never the training axis.
_OTHER_WORDS = {
    "seed", "rank", "fold", "lr", "bs", "batchsize", "loss", "acc", "accuracy", "val", "valid", "test",
    "train", "top", "v", "version", "width", "depth", "dim", "layer", "layers", "head", "heads", "gpu",
    "gpus", "part", "of", "shard", "run", "exp", "trial", "wd", "mom", "momentum", "map", "miou", "iou", "f",
    "auc", "ppl", "bleu", "psnr", "r", "k", "d", "h", "n", "cuda", "worker", "cv", "split", "rev", "size",
    "res", "best", "alpha", "beta", "gamma",
}  # fmt: skip

_SCALE = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_NUMBER = re.compile(
    r"(?P<word>[A-Za-z]*)(?P<gap>[-_=. @]{0,3})"
    r"(?P<number>\d+(?:\.\d+)?(?:e\d{1,2}(?![A-Za-z0-9]))?)(?P<scale>[kKmMbB](?![A-Za-z]))?"
    r"(?=(?:[-_ ]?(?P<after>[A-Za-z]+))?)"
)
_ALIAS = re.compile(
    r"(^|[-_.])(last|latest|best|final|newest|current)([-_.]|$)|^(model|checkpoint|ckpt)$", re.IGNORECASE
)


def counts_in_name(name: str) -> list[Count]:
    """Return the step, the epoch, or the bare number in a checkpoint's name.

    Traps that are stepped around: shard numbers (`model-00001-of-00006`), hash suffixes
    (`resnet18-f37072fd`), dates, `seed3_step200`, metrics (`val_loss=0.25`), `-v1`, and decimals with a scale
    (`ckpt-1.2M` is 1,200,000). Of several parts of a path, the last one that says anything counts.

    Args:
        name: File or folder name, or several joined by "/".

    Returns:
        At most one count of each unit "step", "epoch"; a lone "number" only where neither is there.
    """
    for part in reversed(PurePath(name).parts):
        counts = _counts_in_part(part)
        if counts:
            return counts
    return []


def is_alias(name: str) -> bool:
    """Whether a name says which checkpoint it is without a step: `last`, `model_best`, `final`, `model`."""
    return _ALIAS.search(_stem(PurePath(name).name)) is not None


def _stem(part: str) -> str:
    while True:
        shorter = _SUFFIX.sub("", part)
        if shorter == part:
            return part
        part = shorter


def _counts_in_part(part: str) -> list[Count]:
    text = _SHARD.sub("", _stem(part))
    text = _DATE.sub("", text)
    text = _HASH.sub("", text)
    named: dict[str, int | float] = {}
    bare: list[int | float] = []
    for match in _NUMBER.finditer(text):
        unit = _unit(match)
        value = float(match["number"]) * _SCALE[(match["scale"] or "").lower()]
        value = int(value) if value == int(value) else value
        if unit in ("step", "epoch"):
            named.setdefault(unit, value)
        elif unit == "number":
            bare.append(value)
    if named:
        return [Count(value, unit, "file name") for unit, value in named.items()]
    # `weights.05-0.12`: a decimal beside a whole number is a metric; `checkpoint_3_10000`: the last counts.
    whole = [value for value in bare if isinstance(value, int)]
    return [Count((whole or bare)[-1], "number", "file name")] if bare else []


def _unit(match: re.Match[str]) -> str:
    """Classify one number of a name by the word before it, or (`500steps`) right after it."""
    word = match["word"].lower()
    after = (match["after"] or "").lower()
    if word in _STEP_WORDS:
        return "step"
    if word in _EPOCH_WORDS:
        return "epoch"
    if word not in _OTHER_WORDS and after in _STEP_WORDS | _EPOCH_WORDS and _belongs(match):
        return "step" if after in _STEP_WORDS else "epoch"
    if word in _OTHER_WORDS:
        return ""
    if word in _PLAIN_WORDS or match["gap"]:
        # "mynet_300": an unknown word, set off from the number; "resnet18" is a name.
        return "number"
    return ""


def _belongs(match: re.Match[str]) -> bool:
    """Whether the word after the number is its own (`500steps`), not the next number's (`10_step_5`)."""
    rest = match.string[match.end("after") :]
    return re.match(r"[-_=. @]{0,3}\d", rest) is None
