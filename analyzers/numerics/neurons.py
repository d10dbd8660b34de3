"""The input weights of every neuron, one row each, of the linear and convolutional layers of a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

Vectors = dict[str, Tensor]


def layer_neurons(layer: nn.Module) -> Tensor:
    """Returns the input weights and bias of every neuron, or filter, of a layer: shape (n_neurons, fan_in).

    The bias, where there is one, is the last column: a neuron without it is one of fewer dimensions, not one
    whose bias is 0.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if isinstance(layer, TRANSPOSED) or _is_gpt2(layer):
        weight = weight.transpose(0, 1)
    bias = layer.bias
    return _rows(weight, bias.detach() if isinstance(bias, Tensor) else None)


def _rows(weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = weight.flatten(1)
    return rows if bias is None else torch.cat([rows, bias[:, None].to(rows.dtype)], 1)


def _is_gpt2(layer: nn.Module) -> bool:
    """GPT-2's `Conv1D` is a linear layer whose weight is stored input first."""
    weight = getattr(layer, "weight", None)
    return type(layer).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def model_neurons(model: nn.Module) -> tuple[Vectors, list[str]]:
    """Returns the neurons of every linear and convolutional layer by the layer's name, and what was left out.

    Args:
        model: Read only.

    Returns:
        Tensors of shape (n_neurons, fan_in), which may share memory with the model; and sentences about
        layers that are left out: grouped convolutions, whose filters see different inputs, weights that a
        forward pass computes, and the second owner of a shared weight.
    """
    found: Vectors = {}
    notes: list[str] = []
    seen: set[int] = set()
    for name, layer in model.named_modules():
        if not (isinstance(layer, LAYERS) or _is_gpt2(layer)):
            continue
        name = name or "model"
        weight = layer._parameters.get("weight")
        if getattr(layer, "groups", 1) != 1:
            notes.append(f"{name} is left out: the filters of a grouped convolution see different inputs")
        elif weight is None and not parametrize.is_parametrized(layer, "weight"):
            notes.append(f"{name} is left out: its weight is computed in the forward pass")
        elif weight is not None and id(weight) in seen:
            notes.append(f"{name} is left out: its weight is that of another layer")
        else:
            seen.add(id(weight))
            found[name] = layer_neurons(layer)
    return found, notes


def state_neurons(state: Mapping[str, Tensor]) -> Vectors:
    """Returns the neurons of a state without its model, from names and shapes alone.

    Every `NAME.weight` with two or more dimensions counts as a layer whose first dimension is its neurons,
    which is right for linear layers and convolutions; `NAME.bias` belongs to it if it has one entry each.
    Embeddings and transposed convolutions cannot be told apart from them.
    """
    found: Vectors = {}
    for key, weight in state.items():
        prefix, _, last = key.rpartition(".")
        if last != "weight" or weight.dim() < 2 or not weight.is_floating_point():
            continue
        bias = state.get(f"{prefix}.bias" if prefix else "bias")
        fits = bias is not None and bias.shape == weight.shape[:1]
        found[prefix or "model"] = _rows(weight, bias if fits else None)
    return found
