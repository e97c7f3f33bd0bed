"""The weights of a merged folder: the base checkpoint's tensors under their own names, some of them made anew.

transformers renames tensors on loading and would save them under other names, in one dtype, without those that its
class does not use. So nothing goes through its saving: every tensor of the base is copied as it is, but for those that
the merge changes and those that only a quantized form needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from lora_cli.base.source import BaseSource
from lora_cli.base.storage.registry import part_of
from lora_cli.base.tensor_files import NAMES, Entry, Rows, is_finite, put_bytes, read_tensor, some_rows, write_entries
from lora_cli.base.weight_files import StoredTensor, read_header, weight_files
from lora_cli.errors import CheckFailed, LoraError, refuse_if

INDEX = "model.safetensors.index.json"
FLOATS = {name: dtype for dtype, name in NAMES.items() if dtype.is_floating_point}
SHARD_SIZE = "5GB"  # transformers' own when it saves
_PIECE = 2**20  # bytes copied at a time


def parse_shard_size(text: str) -> int:
    """Bytes, of a size such as 5GB, 500MB or 2GiB. Raises LoraError for a text that is not one."""
    from accelerate.utils import convert_file_size_to_int

    try:
        size = convert_file_size_to_int(text.strip().upper())
    except (ValueError, OverflowError):
        size = 0
    fix = f"write one such as {SHARD_SIZE}, 500MB or 2GiB"
    refuse_if(size < 1, f"--max-shard-size {text} is not a size of files", fix=fix)
    return size


@dataclass(frozen=True)
class Fresh:
    """A tensor that the merge makes: its shape as stored, and what computes it, some rows at a time, in fp32 or wider.

    A few rows stay in the processor's cache from reading to writing.
    """

    shape: tuple[int, ...]
    make: Callable[[], Iterator[Tensor]]

    def whole(self) -> Tensor:
        return torch.cat([*self.make()])


class _Replayed:
    """In the place of a file to write: raises CheckFailed where the written file holds other bytes."""

    def __init__(self, written: BinaryIO, name: str):
        self.written, self.name = written, name

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), _PIECE):
            piece = view[at : at + _PIECE]
            if self.written.read(len(piece)) != piece:
                what = f"{self.name} was not written as base and adapter give it"
                raise CheckFailed(what, fix="nothing was written; check disk and memory, and merge again")


def replay_weights(
    source: BaseSource, place: Path, fresh: Mapping[str, Fresh], *, dtype: torch.dtype | None, dense: torch.dtype
) -> int:
    """Make every tensor that `write_weights` wrote again and compare it bit for bit; returns how many there are."""
    return replay_entries(place, _entries(source, fresh, dtype, dense))


def replay_entries(place: Path, made: Iterable[Entry]) -> int:
    """Compare every tensor in the files of `place` with what its entry writes, bit for bit; returns how many."""
    entries = {each.name: each for each in made}
    written = {name: each for file in weight_files(place) for name, each in read_header(file)[0].items()}
    if written.keys() != entries.keys():
        name = min(written.keys() ^ entries.keys())
        raise CheckFailed(f"{name} is in one of base and merged model alone", fix="nothing was written; report this")
    for name, each in written.items():
        with each.file.open("rb") as stream:
            stream.seek(each.start)
            entries[name].write(_Replayed(stream, name))  # type: ignore[arg-type]
    return len(written)


def write_weights(
    source: BaseSource,
    place: Path,
    fresh: Mapping[str, Fresh],
    *,
    dtype: torch.dtype | None,
    dense: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write the base's tensors into `place`, with the fresh ones in place of its own.

    dtype: of every floating-point tensor; nothing keeps each one's own. dense: for a fresh tensor whose own is a
    quantized form. shard_bytes: the most of one file, but for a tensor that is larger, which gets a file of its own;
    names and index are those of transformers. Raises CheckFailed for a number that its new dtype cannot hold.
    """
    write_files(
        source.folder, place, {each.name: [each] for each in _entries(source, fresh, dtype, dense)}, shard_bytes
    )


def write_files(source: Path, place: Path, groups: Mapping[str, Sequence[Entry]], shard_bytes: int) -> None:
    """Weight files and their index, with the metadata of those in `source`. A group's tensors are in one file."""
    split = split_state_dict_into_shards_factory(
        dict(groups),
        get_storage_size=lambda group: sum(each.size_bytes for each in group),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    metadata = {}
    for file in weight_files(source):
        metadata |= read_header(file)[1]
    for name, tensors in split.filename_to_tensors.items():
        write_entries(place / name, [entry for each in tensors for entry in groups[each]], metadata)
    if split.is_sharded:
        files = {entry.name: file for name, file in split.tensor_to_filename.items() for entry in groups[name]}
        index = {"metadata": split.metadata, "weight_map": files}
        (place / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _entries(
    source: BaseSource, fresh: Mapping[str, Fresh], dtype: torch.dtype | None, dense: torch.dtype
) -> Iterator[Entry]:
    for file in weight_files(source.folder):
        yield from _plan(read_header(file)[0], fresh, dtype, dense)


def _plan(
    stored: Mapping[str, StoredTensor], fresh: Mapping[str, Fresh], dtype: torch.dtype | None, dense: torch.dtype
) -> Iterator[Entry]:
    for name, own in stored.items():
        if name not in fresh and is_beside(name, fresh):
            continue
        if name in fresh:
            target = dtype or FLOATS.get(own.dtype, dense)
            shape, make = fresh[name].shape, fresh[name].make
        elif own.in_blocks:
            target, shape, make = dtype or FLOATS.get(own.dtype, dense), own.shape, partial(_read, own)
        elif dtype is not None and own.dtype in FLOATS and FLOATS[own.dtype] != dtype:
            target, shape, make = dtype, own.shape, partial(_read, own)
        else:
            yield as_stored(name, own)
            continue
        size = torch.Size(shape).numel() * target.itemsize
        yield Entry(name, NAMES[target], shape, size, partial(_write_tensor, name, make, target))


def as_stored(name: str, own: StoredTensor) -> Entry:
    """A tensor of a checkpoint as it is."""
    return Entry(name, own.dtype, own.shape, own.size_bytes, partial(_copy, own))


def is_beside(name: str, fresh: Collection[str]) -> bool:
    """Whether a stored tensor is part of the quantized form of a weight that is written dense."""
    part = part_of(name)
    return part is not None and part.weight in fresh


def _copy(own: StoredTensor, out: BinaryIO) -> None:
    with own.file.open("rb") as stream:
        stream.seek(own.start)
        left = own.size_bytes
        while left:
            piece = stream.read(min(left, _PIECE))
            if not piece:
                raise LoraError("the file was cut short while it was read", where=str(own.file), fix="start again")
            out.write(piece)
            left -= len(piece)


def _read(own: StoredTensor) -> Iterator[Tensor]:
    if own.in_blocks:
        return iter([read_tensor(own)])
    return map(Rows(own).__getitem__, some_rows(own.shape))


def _write_tensor(name: str, make: Callable[[], Iterator[Tensor]], target: torch.dtype, out: BinaryIO) -> None:
    for value in make():
        cast = value.to(target).contiguous()
        if not is_finite(cast) and (torch.isfinite(value) & ~torch.isfinite(cast)).any():
            kind, limit = str(target).removeprefix("torch."), torch.finfo(target).max
            raise CheckFailed(
                f"{name} holds {value.abs().max().item():.3g}, but the largest number of {kind} is {limit:.5g}",
                fix="nothing was written; use --dtype fp32" + (" or --dtype bf16" if target == torch.float16 else ""),
            )
        put_bytes(cast, out)
