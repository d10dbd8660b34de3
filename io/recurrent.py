"""Recurrent classifiers whose loops are written out.

`torch.nn.LSTM` would be shorter, but CuDNN's kernel behind it cannot be differentiated twice and allows no
backward pass in `eval()` mode, and the CPU's has no batching rule: `vmap` warns and loops over the samples.
Parameter names, shapes and initialisation are those of `torch.nn.RNN` and `torch.nn.LSTM`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Recurrent(nn.Module):
    """`torch.nn.RNN` (tanh) or `torch.nn.LSTM` with `batch_first=True`, without the fused kernels.

    Args:
        kind: `"rnn"` or `"lstm"`.
        inputs: Features per step.
        width: Units of each layer's state.
        depth: Number of layers.
    """

    def __init__(self, kind: str, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.kind, self.width, self.depth = kind, width, depth
        gates = 4 if kind == "lstm" else 1
        for layer in range(depth):
            fan_in = inputs if layer == 0 else width
            shapes = {
                "weight_ih": (gates * width, fan_in),
                "weight_hh": (gates * width, width),
                "bias_ih": (gates * width,),
                "bias_hh": (gates * width,),
            }
            for name, shape in shapes.items():
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(torch.empty(shape)))
        bound = width**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, steps, inputs)` to the last layer's state at every step, `(n, steps, width)`."""
        for layer in range(self.depth):
            x = self._layer(x, layer)
        return x

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        recurrent = getattr(self, f"weight_hh_l{layer}")
        bias = getattr(self, f"bias_ih_l{layer}") + getattr(self, f"bias_hh_l{layer}")
        # The inputs' part does not depend on the state: one large product instead of one per step.
        driven = linear(x, getattr(self, f"weight_ih_l{layer}"), bias)
        hidden = x.new_zeros(x.shape[0], self.width)
        cell = hidden
        states = []
        for step in driven.unbind(1):
            gates = step + linear(hidden, recurrent)
            if self.kind == "lstm":
                enter, forget, candidate, leave = gates.chunk(4, dim=1)
                cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(candidate)
                hidden = torch.sigmoid(leave) * torch.tanh(cell)
            else:
                hidden = torch.tanh(gates)
            states.append(hidden)
        return torch.stack(states, dim=1)


class RowClassifier(nn.Module):
    """A recurrent layer `rnn` over the steps of a sequence, then `fc` on its last state.

    Args:
        kind: `"rnn"` or `"lstm"`.
        inputs: Features per step; for an image, the pixels of one row.
        width: Units of each layer's state.
        depth: Number of recurrent layers.
        classes: Number of outputs.
    """

    def __init__(self, kind: str, inputs: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.rnn = Recurrent(kind, inputs, width, depth)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, steps, inputs)` sequences, or anything that reshapes to them, to `(n, classes)`."""
        states = self.rnn(x.reshape(x.shape[0], -1, self.inputs))
        return self.fc(states[:, -1])  # type: ignore[no-any-return]
