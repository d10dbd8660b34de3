"""Whether a forward pass stays in float64, in which everything about an embedding is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynprobe.analyzers import OptionError
from dynprobe.analyzers.numerics.evaluate import Inputs, call

LOWER = (torch.float32, torch.float16, torch.bfloat16)


class _Conversions(TorchFunctionMode):
    """Notes the first dtype that a function makes of float64."""

    found: torch.dtype | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        double = any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in args)
        if self.found is None and double and isinstance(result, Tensor) and result.dtype in LOWER:
            self.found = result.dtype
        return result


def check_double(model: nn.Module, inputs: Inputs) -> None:
    """Raises unless the network computes in float64 from end to end.

    Args:
        model: Already float64, in eval mode; it is known to run in its own dtype.
        inputs: A few samples, float64 where they are no integers.

    Raises:
        OptionError: If `forward` makes float32 of its inputs, of something in between, or of its outputs.
    """
    tip = "Leave out `.float()` and `.to(torch.float32)`, or convert to the dtype of the weights."
    with torch.no_grad(), _Conversions() as seen:
        try:
            outputs = call(model, inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise OptionError(
                _message(seen.found) + f" (it failed with: {_first_line(error)})", tip
            ) from error
    if seen.found is not None or outputs.dtype != torch.float64:
        raise OptionError(_message(seen.found or outputs.dtype), tip)


def _message(dtype: torch.dtype | None) -> str:
    if dtype is None:
        return "the network does not run in float64, which embedding needs."
    return f"forward converts to {str(dtype).removeprefix('torch.')}; embedding needs float64."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
