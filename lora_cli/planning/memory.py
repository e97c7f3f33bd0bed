"""How much memory a run needs: shapes and what blocks keep, added up; an estimate, not measured on a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from lora_cli.adapters.targets import linear_layers
from lora_cli.base.cross_entropy import CHUNK_BYTES
from lora_cli.base.linear import features
from lora_cli.base.offload import pinned_bytes
from lora_cli.base.storage.registry import storage_named
from lora_cli.base.text import hidden_size, vocabulary
from lora_cli.errors import refuse_if
from lora_cli.planning.blocks import Block, measure_blocks
from lora_cli.planning.skeleton import BaseModel
from lora_cli.quantization import DEFAULT

GIB = 2**30
_MOST = 2**40  # bytes; above it a size without unit is likely MiB
_UNITS = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": 2**20, "mb": 2**20, "mib": 2**20, "t": 2**40, "tb": 2**40}
OVERHEAD = GIB  # context and kernels of the device, fragmentation: a guess


@dataclass(frozen=True)
class ModelShape:
    """The numbers that memory follows from. The first four count parameters."""

    quantizable: int  # of linear layers, without the output head
    other: int  # embeddings, output head, norms, experts that are not linear layers
    largest_layer: int  # of the linear layers
    adapter: int
    vocabulary: int
    hidden: int
    blocks: tuple[Block, ...]
    bits: float | None = None  # of a quantizable weight, where a GGUF file decides it

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return self.quantizable + self.other


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by what they hold."""

    weights: int
    adapter: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def estimate_memory(
    shape: ModelShape,
    *,
    quantization: str,
    tokens: int,
    target_tokens: int,
    gradient_checkpointing: str = "none",
    double_quantization: bool = True,
    value_bytes: int = 2,
    optimizer_bytes: int = 8,
    scores: int = 0,
) -> Memory:
    """Peak memory of a step; nothing of it is measured on a GPU.

    With b = value_bytes (2 for bf16 and fp16, 4 for fp32), everything in bytes:

    weights      quantizable · bits / 8 + other · b, with the bits of base/storage or of a GGUF file; and while a
                 quantized layer computes, its dense weight: largest_layer · b
    adapter      adapter · (4 fp32 + 4 gradient + optimizer_bytes (8: two Adam moments) + b while it is applied)
    activations  tokens · Σ over blocks (token_bytes + scores · pair_bytes), measured by planning/blocks.py; with
                 gradient checkpointing `full` tokens · (blocks · hidden · b + the same of the largest block alone);
                 with `offload` tokens · (2 · hidden · b + the largest block), and `offloaded_bytes` in host memory
    logits       of the target tokens of one chunk: 64 MiB in fp32, and b for each value beside it
    overhead     1 GiB

    tokens, target_tokens: of a micro-batch. scores: tokens of a row, where attention scores are kept; 0 where a fused
    kernel computes attention. Not counted: what a kernel needs while it runs.
    """
    own = shape.bits if quantization != "none" else None
    bits = own or storage_named(quantization).bits(value_bytes, double_quantization)
    dequantized = shape.largest_layer * value_bytes if quantization != "none" else 0
    block_bytes = [block.token_bytes + scores * block.pair_bytes for block in shape.blocks]
    kept = sum(block_bytes)
    if gradient_checkpointing != "none":
        inputs = len(block_bytes) if gradient_checkpointing == "full" else min(2, len(block_bytes))
        kept = min(kept, inputs * shape.hidden * value_bytes + max(block_bytes, default=0))
    return Memory(
        weights=round(shape.quantizable * bits / 8) + shape.other * value_bytes + dequantized,
        adapter=shape.adapter * (4 + 4 + optimizer_bytes + value_bytes),
        activations=round(tokens * kept),
        logits=min(target_tokens * shape.vocabulary, CHUNK_BYTES // 4) * (value_bytes + 4),
        overhead=OVERHEAD,
    )


def offloaded_bytes(shape: ModelShape, tokens: int, value_bytes: int = 2) -> int:
    """Of host memory, for `gradient_checkpointing: offload` on a GPU: the inputs of all blocks, each pinned."""
    return len(shape.blocks) * pinned_bytes(tokens * shape.hidden * value_bytes)


def shape_of(
    base: BaseModel,
    ranks: dict[str, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    quantization: str = DEFAULT,
    device: str = "cuda",
) -> ModelShape:
    """Shapes of a model without weights, with what its blocks keep. ranks: of the adapted layers, by module name.

    dtype: the compute dtype. quantization, device: which layers would be quantized, for some are not on a CPU.
    """
    model, kind = base.skeleton, storage_named(quantization)
    sizes = {name: features(module) for name, module in linear_layers(model).items()}
    held = {name: kind for name, (inputs, _) in sizes.items() if kind.same_on(inputs, device)}
    if base.source.gguf is not None:
        held = {name.removesuffix(".weight"): each for name, each in base.source.gguf.kept(quantization).items()}
    quantizable = sum(math.prod(sizes[name]) for name in held)
    bits = sum(math.prod(sizes[name]) * each.bits(dtype.itemsize, True) for name, each in held.items())
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(
        quantizable=quantizable,
        other=total - quantizable,
        largest_layer=max((a * b for a, b in sizes.values()), default=0),
        adapter=sum(rank * sum(sizes[name]) for name, rank in ranks.items()),
        vocabulary=vocabulary(model.config),
        hidden=hidden_size(model),
        blocks=measure_blocks(base, ranks, dtype),
        bits=bits / quantizable if base.source.gguf is not None and quantizable else None,
    )


def parse_size(text: str) -> int:
    """Bytes of a GPU's memory as people write it: 12, 12GB, 12GiB, 8g, 24564MiB. Raises LoraError for anything else.

    GB means GiB: a card that is sold as 12 GB has 12 GiB.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    size = round(float(found[1]) * unit) if found and unit else 0
    fix = "write what the GPU has, such as 12GB, 24GB or 24564MiB"
    refuse_if(not 0 < size <= _MOST, f"--gpu {text} is not an amount of memory", fix=fix)
    return size
