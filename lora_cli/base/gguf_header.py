"""What a GGUF file says of itself, read within bounds: each number in it is a stranger's.

The readers of gguf and transformers believe them.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lora_cli import limits
from lora_cli.errors import LoraError, command
from lora_cli.limits import LimitReached

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
AGAIN = "download the file again, or use the model it was made from: a folder or hub id with safetensors"


def library() -> Any:
    try:
        import gguf
    except ImportError:
        own = "or install this program with its extra: pip install '.[gguf]'"
        fix = f"{command('pip', 'install', 'gguf==0.19.0')}, {own}"
        raise LoraError("a GGUF file needs gguf, which is not installed", fix=fix) from None
    return gguf


@dataclass
class Header:
    """scalars: values that are not lists; of lists, how long they are. tensors: (type, shape, first byte, bytes)."""

    scalars: dict[str, Any]
    lengths: dict[str, int]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


class _Parts:
    """Reads a header from its start. ValueError where it goes on beyond the end."""

    def __init__(self, data: Any):
        self.data, self.at, self.items = data, 0, 0

    def take(self, form: str) -> tuple[Any, ...]:
        end = self.at + struct.calcsize(f"<{form}")
        if end > len(self.data):
            raise ValueError("it ends before its header does")
        found = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at = end
        if self.at > limits.GGUF_HEADER_BYTES:
            raise LimitReached(f"its header is longer than {limits.GGUF_HEADER_BYTES:,} bytes", fix=AGAIN)
        return found

    def text(self) -> str:
        (length,) = self.take("Q")
        return self.take(f"{min(length, len(self.data))}s")[0].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A scalar or a text; of a list, its length."""
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown kind {kind}")
        of, count = self.take("IQ")
        self.items += count
        if self.items > limits.GGUF_ITEMS:
            raise LimitReached(f"its lists have more than {limits.GGUF_ITEMS:,} items", fix=AGAIN)
        if of == _TEXT:
            for _ in range(count):
                self.text()
        else:
            self.take(f"{count}{_SCALARS[of]}")
        return range(count)


def read_header(file: Path) -> Header:
    """What the file says of itself, each number held against the file's size."""
    gguf = library()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parts = _Parts(data)
        magic, version, count, values = parts.take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as GGUF of version 2 or 3 does (little-endian)")
        found: dict[str, Any] = {}
        for _ in range(values):
            name = parts.text()
            if name in found:
                raise ValueError(f"{name} is said twice")
            found[name] = parts.value(parts.take("I")[0])
        infos: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        for _ in range(count):
            name, dims = parts.text(), parts.take("I")[0]
            if name in infos or not 1 <= dims <= 4:
                what = "is there twice" if name in infos else f"has {dims} dimensions"
                raise ValueError(f"the tensor {name[:80]!r} {what}")
            shape = parts.take(f"{dims}Q")[::-1]
            of, offset = parts.take("IQ")
            infos[name] = (gguf.GGMLQuantizationType(of), shape, offset)
        align = found.get("general.alignment", 32)
        if not isinstance(align, int) or not 0 < align <= 2**16 or align & (align - 1):
            raise ValueError(f"its alignment is {align}")
        place = start = -(-parts.at // align) * align
        tensors = {}
        for name, (of, shape, offset) in infos.items():
            block, size = gguf.GGML_QUANT_SIZES[of]
            if shape[-1] % block or not 0 < prod(shape) <= limits.GGUF_NUMBERS:
                raise ValueError(f"{name[:80]} is {' × '.join(map(str, shape))} numbers in blocks of {block}")
            tensors[name] = (of.name, shape, start + offset, prod(shape) // block * size)
            at, place = place, place + -(-tensors[name][3] // align) * align
            if start + offset != at or at + tensors[name][3] > len(data):  # as llama.cpp asks for it
                raise ValueError(f"{name[:80]} is not where it has to be: it overlaps, or the file ends too soon")
    lists = {name: len(value) for name, value in found.items() if isinstance(value, range)}
    return Header({name: value for name, value in found.items() if name not in lists}, lists, tensors)
