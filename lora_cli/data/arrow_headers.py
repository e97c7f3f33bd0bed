"""How large the batches of an Arrow file are when they are unpacked, by their headers.

pyarrow unpacks a batch whole, and a few compressed bytes can hold gigabytes. Every compressed buffer begins with its
own length (Arrow format specification, "Recordbatch body compression"); the headers that say where the buffers are, are
FlatBuffers (Message.fbs and File.fbs of the format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lora_cli import limits
from lora_cli.limits import LimitReached, Unpacked

_MAGIC = b"ARROW1"
_CONTINUED = 0xFFFFFFFF  # in front of the length of a header
_DICTIONARY, _BATCH = 2, 3  # kinds of messages
_DEEPEST = 1 << 31  # of a header; more is none


def require_modest_batches(path: Path) -> None:
    """Raises LimitReached for a batch, or all of them, of more bytes than a file of this size may hold.

    ValueError and struct.error for headers that point outside the file.
    """
    size = path.stat().st_size
    counted, most = Unpacked(path), limits.UNPACKED_WHOLE + limits.UNPACKED_WHOLE_TIMES * size
    with path.open("rb") as file:
        for place in _blocks(file, size) if file.read(6) == _MAGIC else _sequence(file):
            unpacked = _unpacked(file, place)
            counted.add(unpacked)
            if unpacked > most:
                what = f"a batch has {unpacked:,} bytes, unpacked; {most:,} is the limit"
                raise LimitReached(what, where=str(path), fix="write it in smaller batches")


def _sequence(file: IO[bytes]) -> Iterator[int]:
    """Where the messages of a stream begin, one behind the other."""
    at = 0
    while header := _header(file, at):
        yield at
        data, body = header
        at = body + (_number(data, _root(data), 3, "q") or 0)


def _blocks(file: IO[bytes], size: int) -> Iterator[int]:
    """Where the messages of a file begin, by its footer: those of dictionaries, and of batches."""
    length = struct.unpack("<i", _read(file, size - 10, 4))[0]
    data = _read(file, size - 10 - length, length)
    for field in (2, 3):
        at = _field(data, _root(data), field)
        for block in _structs(data, at, 24):
            yield struct.unpack_from("<q", data, block)[0]


def _unpacked(file: IO[bytes], place: int) -> int:
    """Bytes of the compressed buffers of a message when they are unpacked; 0 where it has none."""
    header = _header(file, place)
    if header is None:
        return 0
    data, body = header
    batch, kind = _field(data, _root(data), 2), _number(data, _root(data), 1, "B")
    if batch is None or kind not in (_DICTIONARY, _BATCH):
        return 0
    batch = _follow(data, batch)
    if kind == _DICTIONARY:
        inside = _field(data, batch, 1)
        if inside is None:
            return 0
        batch = _follow(data, inside)
    if _field(data, batch, 3) is None:  # not compressed, so no larger than the file
        return 0
    total = 0
    for at in _structs(data, _field(data, batch, 2), 16):
        offset, length = struct.unpack_from("<qq", data, at)
        if length > 0:
            unpacked = struct.unpack("<q", _read(file, body + offset, 8))[0]
            total += length if unpacked < 0 else unpacked  # -1: as it is
    return total


def _header(file: IO[bytes], at: int) -> tuple[bytes, int] | None:
    """The header of a message, and where its body begins; None at the end."""
    file.seek(at)
    start = file.read(8)
    if len(start) < 8:
        return None
    first, second = struct.unpack("<Ii", start)
    begin, length = (at + 8, second) if first == _CONTINUED else (at + 4, first)
    return (_read(file, begin, length), begin + length) if length else None


def _read(file: IO[bytes], at: int, length: int) -> bytes:
    if at < 0 or not 0 <= length < _DEEPEST:
        raise ValueError("a header points outside the file")
    file.seek(at)
    data = file.read(length)
    if len(data) < length:
        raise ValueError("a header points outside the file")
    return data


# ── FlatBuffers ─────────────────────────────────────────────────────────────────────────────────────────────────


def _root(data: bytes) -> int:
    return _follow(data, 0)


def _follow(data: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", data, at)[0]


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a table is, if it is set."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    size, at = struct.unpack_from("<H", data, fields)[0], 4 + 2 * number
    offset = struct.unpack_from("<H", data, fields + at)[0] if at < size else 0
    return table + offset if offset else None


def _number(data: bytes, table: int, number: int, kind: str) -> Any:
    at = _field(data, table, number)
    return None if at is None else struct.unpack_from(f"<{kind}", data, at)[0]


def _structs(data: bytes, at: int | None, size: int) -> range:
    """Where the members of a vector begin."""
    if at is None:
        return range(0)
    vector = _follow(data, at)
    return range(vector + 4, vector + 4 + size * struct.unpack_from("<I", data, vector)[0], size)
