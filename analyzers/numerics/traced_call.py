"""One operation of a forward pass that is followed, as the rules for operations see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dynprobe.analyzers.numerics.affine_form import Affine, constant_form
from dynprobe.analyzers.numerics.layered_network import Activation, Floats

Dropped = Literal["", "softmax", "sigmoid", "log_softmax", "log_sigmoid"]


class Refused(Exception):
    """An operation has no exact counterpart; the text completes "net.3 is GELU, which …"."""


class Undecidable(Exception):
    """The forward pass uses values of the input outside of tensors."""


class Final(Refused):
    """An operation that is refused unless the network ends with it, as it does not change the decision.

    Args:
        dropped: Its name.
        outputs: What it is applied to.
    """

    def __init__(self, dropped: Dropped, outputs: Affine) -> None:
        super().__init__("is only analysed as the last operation of a network")
        self.dropped, self.outputs = dropped, outputs


class Forms(Protocol):
    """Who knows what every tensor is."""

    def form_of(self, tensor: Tensor) -> Affine:
        """The form of a tensor, flattened."""

    def activate(self, form: Affine, activation: Activation) -> Affine:
        """Add a layer and return its output."""


class Call:
    """One operation of the forward pass, as a rule sees it: arguments by name, tensors as affine forms.

    Args:
        forms: Of all tensors.
        func: The aten operation.
        args: Positional arguments.
        kwargs: Keyword arguments.
        result: What it gave for the values that were followed.
    """

    def __init__(
        self, forms: Forms, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        self._forms, self.func, self.args, self.kwargs, self.result = forms, func, args, kwargs, result
        named = zip(func._schema.arguments, args, strict=False)
        self._values = {argument.name: value for argument, value in named} | dict(kwargs)
        self._defaults = {argument.name: argument.default_value for argument in func._schema.arguments}

    @property
    def name(self) -> str:
        """Of the operation, like `leaky_relu`."""
        return operation_name(self.func)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its (first) result."""
        first = self.result if isinstance(self.result, Tensor) else self.result[0]
        return tuple(first.shape)

    def __getitem__(self, name: str) -> Any:
        """An argument as it was given, or its default."""
        return self._values.get(name, self._defaults[name])

    def get(self, name: str) -> Any:
        """The same; None if this variant of the operation has no such argument."""
        return self[name] if name in self._defaults else None

    def form(self, tensor: Tensor) -> Affine:
        """What a tensor is, flattened."""
        return self._forms.form_of(tensor)

    def operand(self, name: str) -> Affine:
        """An argument, a tensor or a number, as a form broadcast to the shape of the result."""
        return self.broadcast(self[name])

    def broadcast(self, value: Any) -> Affine:
        """A tensor or a number as a form of the shape of the result."""
        if isinstance(value, complex):
            raise Refused("computes with complex numbers")
        if not isinstance(value, Tensor):
            return constant_form(np.full(int(np.prod(self.shape)), float(value)))
        index = torch.arange(value.numel()).reshape(value.shape).expand(self.shape)
        return self.form(value).rows(index.reshape(-1).numpy())

    def constant(self, name: str) -> Floats | None:
        """An argument that must not depend on the input, in its own shape; None stays.

        Raises:
            Refused: It depends on it.
        """
        value = self[name]
        if value is None:
            return None
        form = self.form(value)
        if not form.is_constant:
            raise Refused("has weights that depend on the input")
        return form.constant.reshape(tuple(value.shape))

    def activate(self, form: Affine, activation: Activation) -> Affine:
        """Apply an activation, which adds a layer."""
        return self._forms.activate(form, activation)


Rule = Callable[[Call], Affine]


def operation_name(func: Any) -> str:
    """Name of an aten operation without the underscore of those in place."""
    name: str = func._schema.name.split("::")[-1]
    return name[:-1] if writes_in_place(func) else name


def writes_in_place(func: Any) -> bool:
    """Whether an operation changes its first argument. Others that may write are refused, having no rule."""
    return bool(func._schema.is_mutable) and func._schema.name.endswith("_")
