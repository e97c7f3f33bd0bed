"""Which encoding a text file is in: UTF-8, what a byte order mark says, or Windows-1252 where it can be that."""

from __future__ import annotations

import codecs
import io
import re
from pathlib import Path
from typing import Any, BinaryIO

from lora_cli.errors import LoraError

NAMES = {"utf-16": "UTF-16", "utf-32": "UTF-32", "cp1252": "Windows-1252"}
_MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32")  # the first begins as UTF-16's does
_MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16")
_AT_ONCE = 1 << 20
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_ASCII, _UNUSED = bytes(range(128)), b"\x81\x8d\x8f\x90\x9d"  # which Windows-1252 has no characters for
_MOST_FOREIGN = 0.5  # of Western texts' letters, far above any; a text in Cyrillic or Greek has nearly no others


def marked(stream: BinaryIO) -> str | None:
    """What the byte order mark says; None without one, and for UTF-8."""
    start = stream.read(4)
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)


def is_utf8(stream: BinaryIO) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while part := stream.read(_AT_ONCE):
            decoder.decode(part)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def is_western(stream: BinaryIO) -> bool:
    """Whether bytes that are not UTF-8 can be Windows-1252, as Excel saves CSV: not UTF-8 with damage, nor Cyrillic."""
    foreign = utf8 = letters = 0
    while part := stream.read(_AT_ONCE):
        rest, found = _UTF8.subn(b"", part)
        others = rest.translate(None, _ASCII)
        if others.translate(None, _UNUSED) != others:
            return False
        foreign, utf8 = foreign + len(others), utf8 + found
        letters += sum(map(part.lower().count, b"abcdefghijklmnopqrstuvwxyz"))
    return utf8 < foreign <= _MOST_FOREIGN * letters


class Recoded(io.RawIOBase):
    """The bytes of a text as UTF-8. Raises LoraError where it is damaged."""

    def __init__(self, stream: BinaryIO, encoding: str, path: Path):
        self._text, self._path, self._name = io.TextIOWrapper(stream, encoding, newline=""), path, NAMES[encoding]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._text.read(max(1, len(buffer) // 4)).encode()
        except UnicodeError as error:
            what = f"damaged {self._name} text: {getattr(error, 'reason', error)}"
            raise LoraError(what, where=str(self._path), fix="save it again, as UTF-8") from None
        buffer[: len(data)] = data
        return len(data)
