"""GGUF files whose weights are in blocks that the converters do not write: made of a file of theirs, and read back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lora_cli.errors import CheckFailed, LoraError

BLOCK = 32
_ENDS = ("token_embd.weight", "output.weight")  # embeddings and head: kept in q8_0, as they matter most
_LEVELS = 16  # of 4 bits
_LOOKED_AT = 2**14  # numbers of a matrix that tell whether it is on a grid


def in_blocks(source: Path, target: Path, kind: str, *, on_grid: bool = False) -> tuple[float, int]:
    """Write `source`, a GGUF file in f16 or f32, with matrices in blocks of `kind`, as gguf's own quantizers make them.

    on_grid: matrices that lie on a grid of 4 bits, as those of a merged QA-LoRA adapter do, become the Q4_1 blocks of
    the same numbers, bit for bit, and others f16. Returns the error, ‖W - Q‖ / ‖W‖ over all matrices, and how many
    matrices are in blocks of `kind`. Raises CheckFailed where the file does not read back as it was written.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    types = [_type_of(gguf, each, kind, on_grid) for each in reader.tensors]
    architecture = reader.fields["general.architecture"].contents()
    with closing(gguf.GGUFWriter(target, architecture, endianess=reader.endianess)) as writer:
        _copy_fields(gguf, reader, writer, kind)
        for tensor, of in zip(reader.tensors, types, strict=True):
            shape, dtype = tensor.data.shape, tensor.data.dtype
            if of != tensor.tensor_type:
                is_f16 = of == gguf.GGMLQuantizationType.F16
                shape = shape if is_f16 else gguf.quant_shape_to_byte_shape(shape, of)
                dtype = np.dtype(np.float16 if is_f16 else np.uint8)
            writer.add_tensor_info(tensor.name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        lost = total = 0.0
        digests = []
        for tensor, of in zip(reader.tensors, types, strict=True):
            data = tensor.data
            if of != tensor.tensor_type:
                values = data.astype(np.float32)
                data = _as_type(gguf, tensor.name, values, of, on_grid)
                lost += float(np.square(gguf.dequantize(data, of).reshape(values.shape) - values).sum(dtype=np.float64))
                total += float(np.square(values).sum(dtype=np.float64))
            digests.append(_digest(data))
            writer.write_tensor_data(np.ascontiguousarray(data), tensor_endianess=reader.endianess)
    for tensor, digest, of in zip(gguf.GGUFReader(target).tensors, digests, types, strict=True):
        if tensor.tensor_type != of or _digest(tensor.data) != digest:
            raise CheckFailed(f"{tensor.name} does not read back as it was written", fix="try again, on another disk")
    return (lost / total) ** 0.5 if total else 0.0, types.count(gguf.GGMLQuantizationType[kind.upper()])


def _as_type(gguf: Any, name: str, values: np.ndarray, of: Any, on_grid: bool) -> np.ndarray:
    if of == gguf.GGMLQuantizationType.F16:
        return values.astype(np.float16)
    if not on_grid:
        return gguf.quantize(values, of)
    blocks = _grid_blocks(values)
    if blocks is None:
        raise CheckFailed(f"{name} is partly on the grid of 4 bits that QA-LoRA trains on", fix="report this")
    return blocks


def require_blocks(source: Path, kind: str) -> None:
    """Raises LoraError, before anything is written, where no matrix of a GGUF file can be held in these blocks."""
    import gguf

    types = gguf.GGMLQuantizationType
    matrices = [each for each in gguf.GGUFReader(source).tensors if _type_of(gguf, each, kind, False) != types.F32]
    matrices = [each for each in matrices if len(each.shape) > 1]
    whole = [each for each in matrices if each.shape[0] % BLOCK == 0]
    if len(whole) < len(matrices):
        odd = next(each for each in matrices if each.shape[0] % BLOCK)
        raise LoraError(
            f"{len(matrices) - len(whole)} of {len(matrices)} matrices have rows that are not whole blocks of {BLOCK}, "
            f"the first is {odd.name} ({odd.shape[0]}): they cannot be held in {kind}",
            fix="use --type f16",
        )


def require_finite(file: Path) -> None:
    """Raises CheckFailed where a number of a GGUF file is NaN or infinity: f16 ends at 65,504, bf16 does not."""
    import gguf

    for each in gguf.GGUFReader(file).tensors:
        numbers = each.data
        if each.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            numbers = numbers.reshape(-1, 34)[:, :2].copy().view(np.float16)
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            what = f"{each.name} holds NaN, infinity, or numbers too large for {each.tensor_type.name}"
            raise CheckFailed(what, fix="nothing was written; use --type bf16")


def _type_of(gguf: Any, tensor: Any, kind: str, on_grid: bool) -> Any:
    types = gguf.GGMLQuantizationType
    if len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight"):
        return tensor.tensor_type
    if on_grid:  # some rows tell; all are looked at when they are written
        some = tensor.data[: max(1, _LOOKED_AT // tensor.data.shape[-1])].astype(np.float32)
        return types.Q4_1 if _grid_blocks(some) is not None else types.F16
    if tensor.tensor_type != types.F16 or tensor.name.startswith("rope"):  # what the converter keeps in f32: routers
        return tensor.tensor_type
    return types.Q8_0 if tensor.name in _ENDS else types[kind.upper()]


def _grid_blocks(values: np.ndarray) -> np.ndarray | None:
    """Q4_1 blocks of exactly these fp32 numbers, d · q + m with d and m in fp16; None if there are none."""
    if values.ndim != 2 or values.shape[-1] % BLOCK:
        return None
    x = values.reshape(-1, BLOCK)
    d, m, q, done = _grids(x)
    if not done.all():  # d may be below 0, as in a base that was Q4_0
        left = np.flatnonzero(~done)
        d[left], m[left], q[left], done[left] = _grids(-x[left])
        d[left], m[left] = -d[left], -m[left]
    if not done.all():
        return None
    scales = np.stack([d, m], 1).view(np.uint8)  # little-endian, as GGUF is
    blocks = np.concatenate([scales, q[:, : BLOCK // 2] | q[:, BLOCK // 2 :] << 4], 1)
    return blocks.reshape(values.shape[0], -1)


def _grids(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d above 0, m and q of each block, and whether they give exactly its numbers.

    d is the least distance of two numbers of a block, or a half or a third of it; m is what makes all of it exact.
    """
    ordered = np.sort(x, 1)
    steps = np.diff(ordered, axis=1)
    span = (ordered[:, -1] - ordered[:, 0]).astype(np.float64)
    least = np.where(steps > 1e-4 * span[:, None] / 15, steps, np.inf).min(1)
    least = np.where(np.isfinite(least), least, 0).astype(np.float64)
    done = np.zeros(len(x), bool)
    d, m = np.zeros(len(x), np.float16), np.zeros(len(x), np.float16)
    q = np.zeros(x.shape, np.uint8)
    for part in (1, 2, 3):
        levels = np.round(span / np.where(least > 0, least / part, 1))
        fine = np.where(levels > 0, span / np.maximum(levels, 1), 0).astype(np.float16)
        for shift in range(_LEVELS):
            todo = np.flatnonzero(~done & (levels + shift < _LEVELS))
            if not len(todo):
                continue
            step = fine[todo].astype(np.float32)
            low = (ordered[todo, 0] - shift * step).astype(np.float16)
            level = np.where(step > 0, (x[todo].T - low) / np.where(step > 0, step, 1), 0).T.round()
            same = (level * step[:, None] + low.astype(np.float32)[:, None] == x[todo]).all(1)
            same &= (level.min(1) >= 0) & (level.max(1) < _LEVELS)
            at = todo[same]
            d[at], m[at], q[at], done[at] = fine[at], low[same], level[same].astype(np.uint8), True
    return d, m, q, done


def _digest(data: np.ndarray) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(data).tobytes())


def _copy_fields(gguf: Any, reader: Any, writer: Any, kind: str) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        of = field.types[0]
        sub = field.types[-1] if of == gguf.GGUFValueType.ARRAY else None
        if field.name != "general.quantization_version":
            writer.add_key_value(field.name, field.contents(), of, sub_type=sub)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
