"""What can be wrong with a user's files; each message says what, where and what to do."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used as it is; `str()` is the whole message.

    Args:
        message: What is wrong and where (file, key), in the user's words.
        tip: What to do about it; printed on a line of its own.
    """

    def __init__(self, message: str, tip: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.tip = tip


class UnreadableCheckpoint(InputError):
    """A checkpoint file is damaged, truncated, unsafe or of no known format."""


class WrongModel(InputError):
    """A checkpoint and the model it should fill do not fit."""


class UnusableData(InputError):
    """The data cannot be found, read, or used with this model and loss."""


class BadManifest(InputError):
    """A `dynprobe.toml` does not say what it should."""


class UntrustedCode(InputError):
    """Something that came with the data names code, and `--trust` was not given."""


class DamagedReport(InputError):
    """A report or one of its pieces cannot be read, or does not hold what it says."""


class CannotWrite(InputError):
    """The report, a piece or a figure cannot be written (disk full, read-only, locked)."""
