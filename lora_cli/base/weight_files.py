"""Safetensors headers: what a checkpoint holds, without loading it.

Format: an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open

from lora_cli import limits
from lora_cli.errors import LoraError, reading

_AGAIN = "download the model again"
_SAMPLE_BYTES = 4096
_GGUF = "model.gguf"  # the name under which a folder made for a GGUF file has that file's tensors
_OF_GGUF: dict[Path, dict[str, StoredTensor]] = {}


@dataclass(frozen=True)
class StoredTensor:
    in_blocks: ClassVar = False  # whether it is quantized blocks of GGUF, whose numbers `read` gives

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
    if file in _OF_GGUF:
        return _OF_GGUF[file], {"format": "pt"}
    what = f"damaged or incomplete safetensors file ({file.stat().st_size} bytes)"
    with reading(what, file, "download or write it again"), file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > limits.HEADER_BYTES:
            raise ValueError(f"no safetensors header of up to {limits.HEADER_BYTES:,} bytes in it")
        with safe_open(file, "np"):  # refuses gaps, overlaps, and a file that is not as long as its header says
            header: Any = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None) or {}
    first = 8 + length
    return {
        name: StoredTensor(file, own["dtype"], tuple(own["shape"]), *(first + at for at in own["data_offsets"]))
        for name, own in header.items()
    }, metadata


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, as its index or the single file says. Raises LoraError where both do."""
    if folder / _GGUF in _OF_GGUF:
        return [folder / _GGUF]
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.exists():
        if single.is_file():
            return [single]
        others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".ckpt")]
        only = f" (only {', '.join(others[:3])})" if others else ""
        fix = "use a checkpoint with model.safetensors; pickled weights are not opened because they can run code"
        raise LoraError(f"the model folder holds no safetensors weights{only}", where=str(folder), fix=fix)
    names = sorted(set(_weight_map(index).values()))
    if single.exists() and names != [single.name]:  # programs differ in which of them they load
        what = f"the model folder has both {single.name} and an index that names other files"
        fix = f"remove the one that is left over: {single.name}, or {index.name} with its files"
        raise LoraError(what, where=str(folder), fix=fix)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        what = f"{len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
        raise LoraError(what, where=str(folder), fix=_AGAIN)
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file. Raises LoraError for an index that is damaged, or names a file of another folder."""
    with reading("the weight index is not readable", index, _AGAIN):
        if index.stat().st_size > limits.HEADER_BYTES:
            raise ValueError("it is too large")
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name in set(found.values()):
            if re.search(r"^\.{,2}$|[/\\\0]|^[A-Za-z]:", name):
                raise ValueError(f"it names a file outside its folder: {name}")
    return found


def stand_for(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Let a folder of this process, which holds no weights, have these tensors of a GGUF file."""
    _OF_GGUF[folder / _GGUF] = dict(tensors)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint. Raises LoraError if a file is damaged, or its index and the files disagree."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors, _ = read_header(file)
        twice = next((name for name in tensors if name in found), None)
        if twice is not None:
            what = f"the tensor {twice} is in two files: {found[twice].file.name} and {file.name}"
            raise LoraError(what, where=str(folder), fix=_AGAIN)
        found |= tensors
    index = folder / "model.safetensors.index.json"
    placed = _weight_map(index) if index.exists() else {}
    wrong = [name for name, file in placed.items() if name not in found or found[name].file.name != file]
    if wrong or not found:
        what = f"the weight index and its files disagree, first on {wrong[0]}" if wrong else "there are no tensors"
        raise LoraError(what, where=str(folder), fix=_AGAIN)
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
