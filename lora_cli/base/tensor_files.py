"""Reading and writing safetensors files, one tensor in memory at a time; equal tensors give equal bytes.

The library's own writer orders metadata at random and, from 0.8.1 on, makes files that only their owner can read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_cli.base.weight_files import StoredTensor

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8"}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}

_PIECE = 2**16  # bytes
_NUMBERS = 2**18  # of which everything that is made of them stays in a cache


@dataclass(frozen=True)
class Entry:
    """A tensor to write: what the header says of it, and what writes its bytes. dtype: in safetensors' words."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    write: Callable[[BinaryIO], Any]


def write_entries(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for each in entries:
        header[each.name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [at, at + each.size_bytes]}
        at += each.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of 8
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for each in entries:
            each.write(out)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A file of these tensors, in their order."""
    entries = [
        Entry(name, NAMES[each.dtype], tuple(each.shape), each.nbytes, partial(put_bytes, each))
        for name, each in tensors.items()
    ]
    write_entries(path, entries, metadata)


def read_bytes(own: StoredTensor, start: int = 0, end: int | None = None) -> bytearray:
    data = bytearray((own.size_bytes if end is None else end) - start)
    with own.file.open("rb") as stream:
        stream.seek(own.start + start)
        del data[stream.readinto(data) :]
    return data


def read_tensor(own: StoredTensor) -> Tensor:
    """A tensor of a checkpoint, of one of the dtypes in NAMES, as it is stored; of blocks their numbers, fp32."""
    if own.in_blocks:
        return own.read()  # type: ignore[attr-defined]
    data = read_bytes(own)
    dtype = _DTYPES[own.dtype]
    return torch.frombuffer(data, dtype=dtype).reshape(own.shape) if data else torch.empty(own.shape, dtype=dtype)


class Rows:
    """A stored tensor of which only the rows that are asked for are read: `rows[a:b]`, or `rows[:]` for all."""

    def __init__(self, own: StoredTensor):
        self.own, self.shape = own, torch.Size(own.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        if self.own.in_blocks or not self.own.size_bytes or not self.shape:
            return read_tensor(self.own)[rows if self.shape else ...]
        first, last, _ = rows.indices(self.shape[0])
        row_bytes = self.own.size_bytes // self.shape[0]
        data = read_bytes(self.own, first * row_bytes, last * row_bytes)
        return torch.frombuffer(data, dtype=_DTYPES[self.own.dtype]).reshape(last - first, *self.shape[1:])


def some_rows(shape: Sequence[int]) -> Iterator[slice]:
    """Slices that make up all rows, of so few numbers each that a processor's cache holds what is made of them."""
    count = shape[0] if shape else 1
    each = max(1, _NUMBERS // max(1, math.prod(shape[1:])))
    return (slice(at, min(at + each, count)) for at in range(0, count, each))


def put_bytes(tensor: Tensor, out: BinaryIO) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for at in range(0, len(data), _PIECE):  # what fits into a processor's cache is written at twice the speed
        out.write(data[at : at + _PIECE])


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. Their sum tells in less time, unless it is too large itself."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
