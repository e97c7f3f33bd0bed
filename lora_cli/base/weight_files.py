"""Safetensors headers: what a checkpoint holds, without loading it.

Format: an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli import limits
from lora_cli.errors import LoraError

# Of one number of each dtype; others may come, and are not checked
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # first byte in the file
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name, and the metadata. Raises LoraError for a file that is damaged or cut short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else limits.HEADER_BYTES + 1
        if length > min(limits.HEADER_BYTES, size - 8):
            raise _damaged(file, f"{size} bytes, and no safetensors header in them")
        try:
            header: Any = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            tensors = {name: _stored(file, entry, 8 + length) for name, entry in header.items()}
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, OverflowError):
            raise _damaged(file, "the header is not readable") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda each: (each.start, each.end)):
        if tensor.start != end:
            raise _damaged(file, "the header has gaps between tensors, or tensors that overlap")
        end = tensor.end
    if end != size:
        raise _damaged(file, f"{size} bytes, but the header describes {end}")
    return tensors, metadata


def _stored(file: Path, entry: Any, first: int) -> StoredTensor:
    """Raises ValueError, KeyError or TypeError for an entry that no tensor can have."""
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not all(type(each) is int and each >= 0 for each in (*shape, *offsets)) or len(offsets) != 2:
        raise ValueError
    start, end = offsets
    bits = _BITS.get(dtype)
    if start > end or (bits is not None and math.prod(shape) * bits != 8 * (end - start)):
        raise ValueError
    return StoredTensor(file, str(dtype), tuple(shape), first + start, first + end)


def _damaged(file: Path, what: str) -> LoraError:
    return LoraError(
        f"damaged or incomplete safetensors file: {what}", where=str(file), fix="download or write it again"
    )


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, as its index or the single file says. Raises LoraError where both do."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.exists():
        if single.is_file():
            return [single]
        others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".ckpt")]
        raise LoraError(
            "the model folder holds no safetensors weights" + (f" (only {', '.join(others[:3])})" if others else ""),
            where=str(folder),
            fix="use a checkpoint with model.safetensors; pickled weights are not opened because they can run code",
        )
    names = sorted(set(_weight_map(index).values()))
    if single.exists() and names != [single.name]:  # programs differ in which of them they load
        raise LoraError(
            f"the model folder has both {single.name} and an index that names other files",
            where=str(folder),
            fix=f"remove the one that is left over: {single.name}, or {index.name} with its files",
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise LoraError(
            f"{len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}",
            where=str(folder),
            fix="download the model again",
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file. Raises LoraError for an index that is damaged, empty, or names a file of another folder."""
    fix = "download it again"
    try:
        if index.stat().st_size > limits.HEADER_BYTES:
            raise ValueError
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(found.values())
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        raise LoraError("the weight index is not readable", where=str(index), fix=fix) from None
    if not names:
        raise LoraError("the weight index names no tensors", where=str(index), fix=fix)
    outside = next((name for name in names if name in (".", "..") or re.search(r"[/\\\0]|^[A-Za-z]:", name)), None)
    if outside is not None:
        raise LoraError(f"the weight index names a file outside its folder: {outside}", where=str(index), fix=fix)
    return found


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint. Raises LoraError if a file is damaged, or its index and the files disagree."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors, _ = read_header(file)
        twice = next((name for name in tensors if name in found), None)
        if twice is not None:
            what = f"the tensor {twice} is in two files: {found[twice].file.name} and {file.name}"
            raise LoraError(what, where=str(folder), fix="download the model again")
        found |= tensors
    index = folder / "model.safetensors.index.json"
    wrong = [
        name
        for name, file in (_weight_map(index) if index.exists() else {}).items()
        if name not in found or found[name].file.name != file
    ]
    if wrong or not found:
        what = f"the weight index and its files disagree, first on {wrong[0]}" if wrong else "there are no tensors"
        raise LoraError(what, where=str(folder), fix="download the model again")
    return found


def fingerprint(folder: Path) -> str:
    """Hash that tells one base model from another: names, dtypes and shapes of all tensors, and a sample of each.

    The sample (4 KiB from the middle of every tensor) tells a fine-tuned model from its ancestor, whose header is the
    same. How tensors are spread over files does not matter. Reads a few MB even of a large model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start + max(0, (tensor.size_bytes - _SAMPLE_BYTES) // 2))
            digest.update(stream.read(min(_SAMPLE_BYTES, tensor.size_bytes)))
    return digest.hexdigest()
