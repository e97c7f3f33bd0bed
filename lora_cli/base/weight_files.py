"""Safetensors headers: what a checkpoint holds, without loading it.

Format: an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import LoraError

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
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
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LONGEST_HEADER + 1
        if length > min(_LONGEST_HEADER, size - 8):
            raise _damaged(file, f"{size} bytes, and no safetensors header in them")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            first = 8 + length
            tensors = {
                name: StoredTensor(
                    file, entry["dtype"], tuple(entry["shape"]), *(first + at for at in entry["data_offsets"])
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(file, "the header is not readable") from None
    needed = max((tensor.end for tensor in tensors.values()), default=first)
    if needed != size:
        raise _damaged(file, f"{size} bytes, but the header speaks of {needed}")
    return tensors, metadata


def _damaged(file: Path, what: str) -> LoraError:
    return LoraError(
        f"damaged or incomplete safetensors file: {what}", where=str(file), fix="download or write it again"
    )


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, as its index or the single file says."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LoraError("the weight index is not readable", where=str(index), fix="download it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise LoraError(
                f"{len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}",
                where=str(folder),
                fix="download the model again",
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".ckpt")]
    raise LoraError(
        "the model folder holds no safetensors weights" + (f" (only {', '.join(others[:3])})" if others else ""),
        where=str(folder),
        fix="use a checkpoint with model.safetensors; pickled weights are not opened because they can run code",
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in read_header(file)[0].items()}


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
