"""The model as a function of its parameters, to be differentiated twice and left untouched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.params import set_eval, weight_parameters

Mode = Literal["eval", "train"]


class NoSecondDerivative(RuntimeError):
    """An operation of the model has no second derivative in this version of torch."""


class Caller(nn.Module):
    """Makes `call(model, inputs)` a module, which `functional_call` can fill with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        """Outputs of the model."""
        return call(self.model, inputs)


class _PlainWeightNorm(TorchFunctionMode):
    """Replaces the fused weight norm by its formula: the second derivative of torch 2.13's is wrong.

    Without a word: Hessians come out off by a third, and not symmetric.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        direction, length, dim = (*args, 0)[:3]
        others = [d for d in range(direction.dim()) if d != dim]
        return direction * (length / torch.linalg.vector_norm(direction, dim=others, keepdim=True))


class ModelFunction:
    """The model as a function of some of its parameters, the others and the buffers held fixed.

    Works on copies, so the model's parameters, buffers and `.grad` fields are never written, and each
    module's training flag is put back after every pass. Fused attention and cuDNN's recurrent layers, which
    cannot be differentiated twice, and the fused weight norm, whose second derivative is wrong, are replaced
    by their plain forms.

    Args:
        model: The module.
        parameters: Names of the parameters that may vary; all when None.
        at: Other values for (some of) the parameters and buffers, by name.
        mode: "eval", or "train" for BatchNorm (and InstanceNorm) layers with the statistics of each batch.
            Dropout is off in both: what is measured must be the same function every time.

    Attributes:
        leaves: The parameters that may vary, by name: detached copies that require gradients.
        fixed: Everything else, by name.

    Raises:
        ValueError: A name that the model lacks, or a mode that it cannot have.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Sequence[str] | None = None,
        at: Mapping[str, Tensor] | None = None,
        mode: Mode = "eval",
    ) -> None:
        weights = weight_parameters(model)
        buffers = dict(model.named_buffers())
        at = dict(at or {})
        _refuse_unknown("parameters", parameters or (), weights)
        _refuse_unknown("at", at, {**weights, **buffers})
        if mode not in ("eval", "train"):
            raise ValueError(f"`mode` must be eval or train, got {mode!r}.")
        self._caller = Caller(model)
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._normalising = normalising_layers(model) if mode == "train" else []
        self.fixed = {name: at.get(name, value).detach() for name, value in buffers.items()}
        self.leaves: dict[str, Tensor] = {}
        chosen = set(weights if parameters is None else parameters)
        for name, value in weights.items():
            copy = at.get(name, value).detach().to(value).clone()
            if name in chosen:
                self.leaves[name] = copy.requires_grad_()
            else:
                self.fixed[name] = copy

    def __call__(self, inputs: Any, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs of the model with its leaves, or with `values` in the place of some of them."""
        fixed = self.fixed
        if self._normalising:  # running statistics are written in a pass: each gets its own copy of them
            fixed = {name: value.clone() for name, value in fixed.items()}
        tensors = {**fixed, **self.leaves, **(values or {})}
        filled = {f"model.{name}": tensor for name, tensor in tensors.items()}
        with (
            self._modes(),
            sdpa_kernel(SDPBackend.MATH),
            # cuDNN's recurrent layers have no second derivative; convolutions do, but not in TF32's rounding
            torch.backends.cudnn.flags(enabled=not self._recurrent, deterministic=True, allow_tf32=False),
            _PlainWeightNorm(),
        ):
            outputs: Tensor = torch.func.functional_call(self._caller, filled, (inputs,), strict=False)
        return outputs

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """The mode asked for inside; every module's own training flag afterwards."""
        with _training_flags_restored(self._caller):
            set_eval(self._caller)
            for module in self._normalising:
                module.training = True
            yield

    def refuse_single(self, n_samples: int) -> None:
        """Raise a ValueError for a batch of one sample under BatchNorm in train mode."""
        if n_samples == 1 and any("BatchNorm" in _class_name(layer) for layer in self._normalising):
            raise ValueError(
                "BatchNorm in train mode needs at least two samples in every batch, and one batch has a "
                "single sample. Choose a batch size that leaves no sample alone, or use mode='eval'."
            )


def _refuse_unknown(what: str, names: Iterable[str], known: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"`{what}` names what the model does not have: {', '.join(unknown)}.")


def _class_name(module: nn.Module) -> str:
    """A module's class; for TorchScript the class it was made from."""
    return str(getattr(module, "original_name", type(module).__name__))


def normalising_layers(model: nn.Module) -> list[nn.Module]:
    """Layers with statistics of the batch: BatchNorm (SyncBatchNorm too) and InstanceNorm."""
    with _training_flags_restored(model):
        try:
            model.eval()
        except NotImplementedError as error:
            raise ValueError(
                "A torch.export program has its mode built in, which mode='train' cannot change."
            ) from error
    classes = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return [
        module
        for module in model.modules()
        if isinstance(module, classes) or _class_name(module).startswith(("BatchNorm", "InstanceNorm"))
    ]


@contextmanager
def _training_flags_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def explaining() -> Iterator[None]:
    """Turns torch's error about a missing derivative into a `NoSecondDerivative` that says what to do."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        text = str(error)
        if "derivative for" in text and "not implemented" in text:
            operation = text.split("derivative for")[1].split("is not implemented")[0].strip(" '")
            raise NoSecondDerivative(
                f"The model uses an operation without a second derivative in torch {torch.__version__}: "
                f"{operation}. Attention is handled; EmbeddingBag is not: use Embedding followed by a mean."
            ) from error
        raise
