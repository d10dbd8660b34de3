"""Walk over a pickle's instructions before any of them runs."""

from __future__ import annotations

import pickletools
from typing import BinaryIO

from dynprobe.io.errors import UnreadableCheckpoint

MAX_OPCODES = 20_000_000

_EXTENSION_OPCODES = {"EXT1", "EXT2", "EXT4"}
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}


def scan_pickle(stream: BinaryIO, where: str) -> int:
    """Walk over one pickle without running it and return its length in bytes.

    Args:
        stream: Opened at the pickle's first byte; read to just after its STOP.
        where: The file's name, for messages.

    Raises:
        UnreadableCheckpoint: A length reaches outside the file, a memo index is absurd (the C unpickler
            would allocate a table of that size), or an instruction has no place in a checkpoint.
    """
    start = stream.tell()
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            if count > MAX_OPCODES:
                raise UnreadableCheckpoint(f"{where}: the pickle inside has over {MAX_OPCODES} instructions.")
            if opcode.name in _MEMO_OPCODES and int(argument or 0) > count:
                raise UnreadableCheckpoint(f"{where}: the pickle inside asks for an absurdly large memo.")
            if opcode.name in _EXTENSION_OPCODES:
                raise UnreadableCheckpoint(f"{where}: the pickle inside uses the extension registry.")
    except (ValueError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise UnreadableCheckpoint(
            f"{where}: the pickle inside is cut off or damaged ({error}).",
            tip="The file is truncated, still being written, or not a checkpoint.",
        ) from error
    return stream.tell() - start
