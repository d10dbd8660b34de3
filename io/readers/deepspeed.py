"""DeepSpeed folders `global_stepN/`: whole weights in `mp_rank_00_model_states.pt` up to ZeRO stage 2."""

from __future__ import annotations

from pathlib import Path

from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.header import OpenedCheckpoint
from dynprobe.io.readers import torch_zip

NAME = "deepspeed"


def sniff(path: Path) -> bool:
    """Whether the folder holds DeepSpeed's model states."""
    return path.is_dir() and any(path.glob("*mp_rank_*_model_states.pt"))


def open(path: Path, key: str | None = None, ema: bool = False) -> OpenedCheckpoint:  # noqa: A001
    """Read the pickle of the one file that holds the whole model.

    Raises:
        UnreadableCheckpoint: The weights are spread over ranks (ZeRO stage 3, tensor parallel).
    """
    files = weight_files(path)
    if len(files) > 1 or files[0].name.startswith("zero_pp_rank"):
        raise UnreadableCheckpoint(
            f"{path}: the weights are spread over {len(files)} files, one rank's part in each.",
            tip="Join them with the zero_to_fp32.py that DeepSpeed writes beside the checkpoints.",
        )
    return torch_zip.open_as(NAME, files[0], key, ema)


def weight_files(path: Path) -> list[Path]:
    """Return the folder's files of model states, sorted."""
    return sorted(path.glob("*mp_rank_*_model_states.pt"))
