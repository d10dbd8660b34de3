"""Walk over a pickle's instructions before any of them runs."""

from __future__ import annotations

import mmap
import pickletools

from dynprobe.io.errors import UnreadableCheckpoint

MAX_OPCODES = 20_000_000

_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}
_MEMO = {"BINPUT", "LONG_BINPUT"}
_LINE_PAIRS = {"GLOBAL", "INST"}
_STOP = ord(".")
_PUT = ord("p")

_FIXED: dict[int, int] = {}
_PREFIXED: dict[int, int] = {}
_LINES: dict[int, int] = {}
_MEMO_CODES: set[int] = set()
for _opcode in pickletools.opcodes:
    _code = ord(_opcode.code)
    _length = 0 if _opcode.arg is None else _opcode.arg.n
    if _opcode.name in _EXTENSIONS:
        continue  # the extension registry: an unknown instruction here
    if _length >= 0:
        _FIXED[_code] = _length
    elif _length == pickletools.UP_TO_NEWLINE:
        _LINES[_code] = 2 if _opcode.name in _LINE_PAIRS else 1
    else:
        _PREFIXED[_code] = {
            pickletools.TAKEN_FROM_ARGUMENT1: 1,
            pickletools.TAKEN_FROM_ARGUMENT4: 4,
            pickletools.TAKEN_FROM_ARGUMENT4U: 4,
            pickletools.TAKEN_FROM_ARGUMENT8U: 8,
        }[_length]
    if _opcode.name in _MEMO:
        _MEMO_CODES.add(_code)


def scan_pickle(data: bytes | mmap.mmap, where: str, start: int = 0) -> int:
    """Walk over one pickle without running it; returns where it ends.

    Like `pickletools.genops`, five times as fast, since the arguments are stepped over unread.

    Args:
        data: Holds the pickle.
        where: The file's name, for messages.
        start: Position of its first byte.

    Returns:
        The position after its STOP.

    Raises:
        UnreadableCheckpoint: A length reaches outside the data, a memo index is absurd (the C unpickler
            would allocate a table of that size), or an instruction has no place in a checkpoint.
    """
    position, count = start, 0
    try:
        while (code := data[position]) != _STOP:
            position += 1
            count += 1
            if (length := _FIXED.get(code)) is not None:
                index = (
                    int.from_bytes(data[position : position + length], "little") if code in _MEMO_CODES else 0
                )
                position += length
            elif (size := _PREFIXED.get(code)) is not None:
                position += size + int.from_bytes(data[position : position + size], "little")
                index = 0
            else:
                begin = position
                for _ in range(_LINES[code]):
                    position = _after_line(data, position)
                index = int(data[begin:position]) if code == _PUT else 0
            if index > count or count > MAX_OPCODES:
                raise UnreadableCheckpoint(f"{where}: the pickle inside asks for absurdly much memory.")
    except (IndexError, KeyError, OverflowError, ValueError) as error:
        raise UnreadableCheckpoint(
            f"{where}: the pickle inside is cut off or damaged at byte {position - start}.",
            tip="The file is truncated, still being written, or not a checkpoint.",
        ) from error
    return position + 1


def _after_line(data: bytes | mmap.mmap, position: int) -> int:
    end = data.find(b"\n", position)
    if end < 0:
        raise ValueError("no end of line")
    return end + 1
