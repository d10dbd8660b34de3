"""A model's parameters: which there are, where their filters lie, and a guard that leaves them untouched."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FilterAxis(int):
    """The dimension of a weight that indexes its filters.

    A filter is the set of weights that feed one output unit or channel. In a transposed convolution with
    groups, whose weight is `(in, out / groups, ...)`, one slice along dim 1 holds the filters of `groups`
    output channels, one in each block of `in / groups` rows; `groups` says so and is 1 everywhere else.
    """

    groups: int

    def __new__(cls, axis: int, groups: int = 1) -> FilterAxis:  # noqa: D102
        self = super().__new__(cls, axis)
        self.groups = groups
        return self


def weight_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by name, in order, detached and sharing memory; a tied tensor appears once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def filter_axis(model: nn.Module) -> dict[str, FilterAxis | None]:
    """Return for each parameter which dimension indexes its filters, None for those without (dim <= 1).

    Dim 0, one slice per output unit (or per token of an embedding), except where a module stores its weight
    input first: transposed convolutions and GPT-2's `Conv1D` (known by its class name, so that transformers
    need not be installed) have their outputs along dim 1.
    """
    owners = {
        id(parameter): (module, name)
        for module in reversed(list(model.modules()))  # a tied tensor belongs to its first owner
        for name, parameter in module.named_parameters(recurse=False)
    }
    return {
        name: _filter_axis(*owners[id(parameter)], parameter) for name, parameter in model.named_parameters()
    }


def _filter_axis(owner: nn.Module, name: str, parameter: Tensor) -> FilterAxis | None:
    if parameter.dim() <= 1:
        return None
    if isinstance(owner, _TRANSPOSED) and parameter.dim() == len(owner.kernel_size) + 2:
        return FilterAxis(1, owner.groups)
    if type(owner).__name__ == "Conv1D" and name == "weight" and parameter.dim() == 2:
        return FilterAxis(1)
    return FilterAxis(0)


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group parameter names by the module they belong to, in order: `conv1.weight`, `conv1.bias` → `conv1`.

    A parameter of the model itself is a layer of its own name. What a parametrised tensor is computed from
    (`conv1.parametrizations.weight.original0`) stands in its place (`conv1.weight`).
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        module, parametrised, rest = f".{name}".partition(".parametrizations.")
        plain = f"{module[1:]}.{rest.partition('.')[0]}".lstrip(".") if parametrised else name
        layers.setdefault(plain.rpartition(".")[0] or plain, []).append(name)
    return layers


def set_eval(model: nn.Module) -> None:
    """Put the model in eval mode; a `torch.export` program has its mode built in and is left alone."""
    with contextlib.suppress(NotImplementedError):
        model.eval()


def private_copy(model: nn.Module) -> nn.Module:
    """Deep-copy a model, also one that holds computed tensors (old-style `weight_norm`, `spectral_norm`).

    `copy.deepcopy` refuses tensors that are the result of a computation; they are copied as plain values and
    recomputed by the module's own hooks.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(_as_bytes(a), _as_bytes(b))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Lend the model in eval mode; whatever is done to it, on any exit it is as it was, and that is checked.

    Restored: parameters, buffers, `requires_grad`, `.grad`, the train/eval mode of every submodule, and the
    global random state of the CPU and of every initialised CUDA device. Costs one copy of the state.

    Raises:
        RuntimeError: Something could not be put back, for example a parameter was replaced by another object.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    values = {name: tensor.detach().clone() for name, tensor in (tensors | buffers).items()}
    gradients = {name: (tensor.requires_grad, tensor.grad) for name, tensor in tensors.items()}
    modes = [(module, module.training) for module in model.modules()]
    cpu_random = torch.get_rng_state()
    cuda_in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_random = torch.cuda.get_rng_state_all() if cuda_in_use else []
    set_eval(model)
    try:
        yield model
    finally:
        torch.set_rng_state(cpu_random)
        if cuda_random:
            torch.cuda.set_rng_state_all(cuda_random)
        for module, training in modes:
            module.training = training
        for name, tensor in (tensors | buffers).items():
            if not same_bits(tensor, values[name]):
                tensor.data = values[name]
        for name, (required, gradient) in gradients.items():
            tensors[name].requires_grad_(required)
            tensors[name].grad = gradient
        _verify(model, tensors | buffers, values)


def _verify(model: nn.Module, tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    now = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for name in sorted(now.keys() | tensors.keys()):
        if now.get(name) is not tensors.get(name):
            raise RuntimeError(f"the model's {name!r} was replaced, added or removed while it was analysed")
        if not same_bits(now[name], values[name]):
            raise RuntimeError(
                f"the model's {name!r} changed while it was analysed and could not be restored"
            )
