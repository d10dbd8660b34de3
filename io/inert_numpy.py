"""What a pickle says of numpy arrays, kept as raw parts until they are seen to fit together."""

from __future__ import annotations

from typing import Any


class NumpyDtype:
    """A numpy dtype's letter code and byte order, as pickled."""

    __slots__ = ("code", "order")

    def __init__(self, code: object) -> None:
        self.code = code if isinstance(code, str) else ""
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order if order in ("<", ">", "|", "=") else "<"


class NumpyArray:
    """A pickled numpy array: its raw parts, made an array only where they fit together."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> Any:
        """Return the numpy array; None for object arrays and parts that do not fit."""
        import numpy

        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, dtype, fortran, data = self.state
        if isinstance(data, str):
            data = data.encode("latin1", "replace")
        if not isinstance(dtype, NumpyDtype) or not isinstance(data, bytes):
            return None
        if dtype.code[:1] not in tuple("biufc"):
            return None
        try:
            flat = numpy.frombuffer(data, numpy.dtype(dtype.code).newbyteorder(dtype.order))  # type: ignore[arg-type]
            return flat.reshape(shape, order="F" if fortran else "C")
        except (TypeError, ValueError):
            return None
