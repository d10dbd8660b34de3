"""What the tests of checkpoint reading share: a small model and ways to save it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file


def small_model(seed: int = 0) -> torch.nn.Sequential:
    """Linear, BatchNorm, Linear: parameters, float and integer buffers."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def small_state(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in small_model(seed).state_dict().items()}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits (NaN and -0.0 included)."""
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert state[name].shape == tensor.shape
        mine, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (state[name], tensor))
        assert torch.equal(mine, theirs), name


def save_huggingface(folder: Path, state: dict[str, torch.Tensor], step: int | None, shards: int = 1) -> None:
    """Write what Hugging Face's Trainer does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    if step is not None:
        trainer = {"global_step": step, "epoch": step / 10, "log_history": []}
        (folder / "trainer_state.json").write_text(json.dumps(trainer))
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: state[name] for name in names[shard::shards]}
        save_file(own, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_distributed(folder: Path, tree: dict[str, object]) -> None:
    """Write a torch.distributed.checkpoint folder in one process."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=folder, no_dist=True)
