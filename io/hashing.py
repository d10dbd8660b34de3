"""Hashes of weights by content: the same numbers under the same names, whatever the file format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of a tensor's bytes in row-major order.

    Shape and dtype are not part of it.
    """
    import torch

    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    digest = hashlib.sha256()
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def content_hash(state: Mapping[str, torch.Tensor], tensor_hashes: Mapping[str, str] | None = None) -> str:
    """Return 32 hexadecimal digits over the sorted names, dtypes, shapes and bytes of a state.

    Args:
        state: Name → tensor.
        tensor_hashes: Hashes by `tensor_hash` where they are known already.

    Returns:
        The same for the same weights in every format.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        inner = tensor_hash(tensor) if tensor_hashes is None else tensor_hashes[name]
        shape = "x".join(str(size) for size in tensor.shape)
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0{inner}\n".encode())
    return digest.hexdigest()[:32]
