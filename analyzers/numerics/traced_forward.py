"""Follow a forward pass operation by operation and keep what every value is in terms of the input.

What is kept belongs to the memory of a tensor, not to the tensor: views of it need no treatment of their own,
and what is written in place is seen through all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from dynprobe.analyzers.numerics.affine_form import (
    Affine,
    TooLarge,
    constant_form,
    source_form,
    stacked,
)
from dynprobe.analyzers.numerics.layered_network import Activation, Layer
from dynprobe.analyzers.numerics.traced_call import (
    Call,
    Dropped,
    Final,
    Refused,
    Rule,
    Undecidable,
    operation_name,
    writes_in_place,
)


@dataclass(frozen=True)
class Refusal:
    """Why a value cannot be analysed; `outputs` are those of a final softmax, which need not be."""

    message: str
    outputs: Affine | None = None
    dropped: Dropped = ""


class AsFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute in float64 whatever dtype the forward pass asks for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch loads its compiler at the first operation, which takes seconds; nothing is compiled here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation with every floating-point dtype and tensor made float64."""
        return run_in_float64(func, args, kwargs or {})


def run_in_float64(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on float64 tensors, to float64 tensors."""

    def to_double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    wanted = {
        name: torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
        for name, value in kwargs.items()
    }
    args, wanted = tree_map(to_double, (args, wanted))
    return tree_map(to_double, func(*args, **wanted))


_DECIDING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tracer(AsFloat64):  # type: ignore[no-untyped-call]
    """Runs a forward pass and keeps the form of every value, and the layers.

    Args:
        rules: By name of the operation.
        inputs: One input, float64, on the CPU.
    """

    def __init__(self, rules: Mapping[str, Rule], inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[Layer] = []
        self._rules = rules
        # Memory by its address; that it is held here keeps the address from being used again.
        self._known: dict[int, tuple[Any, Affine | Refusal]] = {}
        self._modules: list[tuple[str, nn.Module]] = []
        self._keep(inputs, source_form(0, inputs.numel()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and keep what its results are."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        followed = [tensor for tensor in tensors if self._record(tensor) is not None]
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random and operation_name(func) != "rrelu_with_noise":
            return self._random(func, args, kwargs)
        if not followed:
            return run_in_float64(func, args, kwargs)
        if not _DECIDING.isdisjoint(func.tags) and not self._picks_by_constants(func, args):
            raise Undecidable(f"{self._place(operation_name(func))}: what it computes depends on the data")
        if torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        if writes_in_place(func):
            return self._write(func, args, kwargs)
        if func._schema.is_mutable and operation_name(func) != "rrelu_with_noise":
            return self._give_up(func, args, kwargs)
        result = run_in_float64(func, args, kwargs)
        first = next((value for value in tree_iter(result) if isinstance(value, Tensor)), None)
        if first is None:
            raise Undecidable(f"{self._place(operation_name(func))}: what it computes depends on the data")
        if first.numel() and self._record(first) is None:
            self._note(result, self._follow(func, args, kwargs, result))
        return result

    def activate(self, form: Affine, activation: Activation) -> Affine:
        """Add a layer for an activation of a form, and return its output; constants make none."""
        if form.is_constant:
            return constant_form(activation(form.constant[:, None]))
        self.layers.append(Layer(tuple(form.parts.items()), form.constant, activation, self._subject()))
        return source_form(len(self.layers), len(form))

    def form_of(self, tensor: Tensor) -> Affine:
        """The form of a tensor, flattened.

        Raises:
            Refused: It has none.
        """
        record = self._record(tensor)
        if tensor.is_complex():
            raise Refused("computes with complex numbers")
        if record is None:
            return constant_form(tensor.detach().double().numpy())
        if isinstance(record, Refusal):
            raise Refused(record.message)
        if len(record) != _memory_size(tensor):
            raise Refused("reads numbers in another format than they were written in")
        return record.rows(_positions(tensor))

    def outcome(self, tensor: Tensor) -> Affine | Refusal:
        """The form of a network's outputs, or why there is none."""
        record = self._record(tensor)
        if isinstance(record, Refusal):
            covers = record.outputs is not None and np.array_equal(
                _positions(tensor), np.arange(len(record.outputs))
            )
            return record if covers else Refusal(record.message)
        return self.form_of(tensor)

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Know by which module each operation is called."""
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # has no hooks
                continue

            def enter(module: nn.Module, _inputs: Any, name: str = name) -> None:
                self._modules.append((name, module))

            def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
                self._modules.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> Affine | Refusal:
        """What the result of an operation is."""
        name = operation_name(func)
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor) and isinstance(record := self._record(value), Refusal):
                if record.outputs is not None and name == "log" and record.dropped == "softmax":
                    return Refusal(record.message, record.outputs, "log_softmax")
                return Refusal(record.message)
        try:
            if name not in self._rules:
                raise Refused(
                    "is not piecewise linear and has no bounds here; ReLU-like activations, tanh and sigmoid "
                    "can be analysed"
                )
            return self._rules[name](Call(self, func, args, kwargs, result))
        except Final as final:
            return Refusal(f"{self._place(name)}, which {final}", final.outputs, final.dropped)
        except Refused as refused:
            return Refusal(f"{self._place(name)}, which {refused}")
        except TooLarge:
            return Refusal(f"{self._place(name)}, which is too large to be analysed as a matrix")

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation in place: the one that is not, and then its result is written."""
        target, name = args[0], operation_name(func)
        functional = _functional(func)
        if functional is None or not isinstance(target, Tensor) or not target.is_floating_point():
            return self._give_up(func, args, kwargs)
        if name == "copy":
            result = args[1].double().expand(target.shape)
            values = self._copied(args[1].expand(target.shape))
        else:
            result = run_in_float64(functional, args, kwargs)
            values = self._follow(functional, args, kwargs, result)
        self._set(target, values)
        target.copy_(result)
        return target

    def _give_up(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation that may write to any of its arguments: none of them is known afterwards."""
        refusal = Refusal(f"{self._place(operation_name(func))}, which cannot be followed")
        result = func(*args, **kwargs)
        for value in tree_iter((args, kwargs, result)):
            if isinstance(value, Tensor):
                self._keep(value, refusal)
        return result

    def _picks_by_constants(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether an operation takes entries by a mask or by indices that do not depend on the input."""
        chosen = [value for value in tree_iter(args[1:]) if isinstance(value, Tensor)]
        return operation_name(func) in ("index", "masked_select") and all(
            self._record(tensor) is None for tensor in chosen
        )

    def _copied(self, tensor: Tensor) -> Affine | Refusal:
        try:
            return self.form_of(tensor)
        except Refused as refused:
            return Refusal(str(refused))

    def _set(self, target: Tensor, values: Affine | Refusal) -> None:
        """Keep that the entries of a tensor, which may be a part of a larger one, have these values."""
        if isinstance(values, Refusal):
            return self._keep(target, values)
        positions = _positions(target)
        n = _memory_size(target)
        if len(positions) == n:
            return self._keep(target, values.rows(np.argsort(positions)))
        record = self._record(target)
        if isinstance(record, Refusal):
            return None
        if record is None:
            whole = target.new_empty(0).set_(target.untyped_storage())
            record = constant_form(whole.double().numpy())
        index = np.arange(n)
        index[positions] = n + np.arange(len(values))
        return self._keep(target, stacked([record, values]).rows(index))

    def _random(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = run_in_float64(func, args, kwargs)
        refusal = Refusal(f"{self._place(operation_name(func))}, which draws random numbers")
        self._note(result, refusal)
        return result

    def _note(self, result: Any, values: Affine | Refusal) -> None:
        """Keep the first result of an operation; others, such as positions of maxima, are not followed."""
        tensors = [value for value in tree_iter(result) if isinstance(value, Tensor)]
        self._set(tensors[0], values)
        for other in tensors[1:]:
            if other.numel():
                message = f"{self._place('a further result')}, which is not followed"
                self._keep(other, values if isinstance(values, Refusal) else Refusal(message))

    def _keep(self, tensor: Tensor, values: Affine | Refusal) -> None:
        storage = tensor.untyped_storage()
        self._known[storage.data_ptr()] = (storage, values)

    def _record(self, tensor: Tensor) -> Affine | Refusal | None:
        if not tensor.numel():
            return None
        known = self._known.get(tensor.untyped_storage().data_ptr())
        return known[1] if known else None

    def _subject(self, operation: str = "") -> str:
        """The module at work."""
        if not self._modules:
            return operation
        name, module = self._modules[-1]
        kind = type(module).__name__
        return f"{name} ({kind})" if name else kind

    def _place(self, operation: str) -> str:
        """What is at work, as the beginning of a sentence: "net.3 is GELU" or "net (Block) uses gelu"."""
        if self._modules:
            name, module = self._modules[-1]
            if type(module).__module__.startswith("torch.nn") and not list(module.children()):
                return f"{name or 'the model'} is {type(module).__name__}"
        return f"{self._subject() or 'the model'} uses {operation}"


def _functional(func: Any) -> Any:
    """The operation that gives what one in place writes, or None."""
    packet = getattr(torch.ops.aten, operation_name(func), None)
    return getattr(packet, func._overloadname or "default", None) if packet is not None else None


def _positions(tensor: Tensor) -> np.ndarray:
    """Where in its memory each entry of a tensor lies, (n,)."""
    whole = torch.arange(_memory_size(tensor))
    index = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return np.asarray(index.reshape(-1).numpy())


def _memory_size(tensor: Tensor) -> int:
    """How many entries the memory has in which a tensor lies."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()
