"""How the sample runs are saved: one function per kind of checkpoint found in the wild."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

Writer = Callable[[Path, int, int, nn.Module, torch.optim.Optimizer, list[dict[str, Any]]], None]


def write_safetensors(
    folder: Path, step: int, _epoch: int, model: nn.Module, _optimizer: object, _rows: object
) -> None:
    """Weights only; the step in the metadata."""
    path = folder / f"step_{step:06d}.safetensors"
    save_file(model.state_dict(), path, metadata={"step": str(step)})


def write_state_dict(
    folder: Path, step: int, _epoch: int, model: nn.Module, _optimizer: object, _rows: object
) -> None:
    """A bare state dict; only the file's name says the step."""
    torch.save(model.state_dict(), folder / f"step={step}.pth")


def write_training_dict(
    folder: Path,
    step: int,
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[dict[str, Any]],
) -> None:
    """What a typical training loop writes to go on later."""
    content = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "step": step,
        "epoch": epoch,
        "train_loss": rows[-1]["train_loss"],
    }
    torch.save(content, folder / f"checkpoint_{step:05d}.pt")


def write_lightning(
    folder: Path, step: int, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, _rows: object
) -> None:
    """As PyTorch Lightning does, for a module that holds the network as `self.net`."""
    content = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
        "loops": {},
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 32, "depth": 2, "activation": "tanh", "learning_rate": 0.1},
    }
    torch.save(content, folder / f"epoch={epoch}-step={step}.ckpt")


def write_hugging_face(
    folder: Path, step: int, epoch: int, model: nn.Module, _optimizer: object, rows: list[dict[str, Any]]
) -> None:
    """As the transformers Trainer does: a folder per checkpoint."""
    target = folder / f"checkpoint-{step}"
    target.mkdir()
    save_file(model.state_dict(), target / "model.safetensors", metadata={"format": "pt"})
    history = [
        {"step": row["step"], "loss": row["train_loss"], "eval_loss": row["test_loss"]} for row in rows
    ]
    state = {"epoch": float(epoch), "global_step": step, "max_steps": 2000, "log_history": history}
    (target / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


WRITERS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "state_dict": write_state_dict,
    "training_dict": write_training_dict,
    "lightning": write_lightning,
    "hugging_face": write_hugging_face,
}
