"""How much memory a run needs, by arithmetic on shapes: an estimate, not measured on a GPU."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_cli.adapters.targets import Target, block_lists, linear_layers
from lora_cli.base.cross_entropy import CHUNK_BYTES
from lora_cli.base.linear import features, is_linear
from lora_cli.base.recompute import is_gated, is_rms_norm
from lora_cli.base.storage.registry import storage_named
from lora_cli.base.text import hidden_size, largest, text_config, vocabulary
from lora_cli.errors import LoraError
from lora_cli.quantization import DEFAULT

GIB = 2**30
_MOST = 2**40  # bytes; above it a size without unit is likely MiB
_UNITS = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": 2**20, "mb": 2**20, "mib": 2**20, "t": 2**40, "tb": 2**40}
OVERHEAD = GIB  # context and kernels of the device, fragmentation: a guess
# How many results more than its input autograd keeps of an activation function: three where it is written out in
# Python; ReLU keeps its result, which is the next layer's input, instead of its input.
_KEPT_BY_ACTIVATION = {"gelu_new": 3, "gelu_fast": 3, "gelu_python_tanh": 3, "relu": -1}


@dataclass(frozen=True)
class Block:
    """What autograd keeps of one transformer block for a token: values in the compute dtype, and in fp32."""

    values: int
    fp32_values: int


@dataclass(frozen=True)
class ModelShape:
    """The numbers that memory follows from. All but `vocabulary`, `hidden` and `heads` count parameters."""

    quantizable: int  # of linear layers, without the output head
    other: int  # embeddings, output head, norms, experts that are no linear layers
    largest_layer: int  # of the linear layers
    adapter: int
    vocabulary: int
    hidden: int
    heads: int
    blocks: tuple[Block, ...]

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
        return self.weights + self.adapter + self.activations + self.logits + self.overhead

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def estimate_memory(
    shape: ModelShape,
    *,
    quantization: str,
    tokens: int,
    target_tokens: int,
    gradient_checkpointing: bool,
    double_quantization: bool = True,
    value_bytes: int = 2,
    optimizer_bytes: int = 8,
    scores: int = 0,
) -> Memory:
    """Peak memory of a step, estimated from shapes; nothing of it is measured on a GPU.

    With b = value_bytes (2 for bf16 and fp16, 4 for fp32), everything in bytes:

    weights      quantizable · bits / 8 + other · b, with the bits of base/storage; and while a quantized layer
                 computes, its dense weight: largest_layer · b
    adapter      adapter · (4 fp32 + 4 gradient + optimizer_bytes (8: two Adam moments) + b while it is applied)
    activations  tokens · Σ over blocks (b · values + 4 · fp32_values + heads · scores · 8); with gradient checkpointing
                 tokens · (blocks · hidden · b + the same of the largest block alone)
    logits       of the target tokens of one chunk: 64 MiB in fp32, and b for each value beside it
    overhead     1 GiB

    tokens, target_tokens: of a micro-batch. scores: how many attention scores are kept for each token and head: none
    where a fused kernel computes attention, the tokens of a row where it does not. Not counted: what a kernel needs
    while it runs, and the copies that an architecture makes beside its layers and norms.
    """
    bits = storage_named(quantization).bits(value_bytes, double_quantization)
    dequantized = shape.largest_layer * value_bytes if quantization != "none" else 0
    block_bytes = [
        block.values * value_bytes + block.fp32_values * 4 + shape.heads * scores * 8 for block in shape.blocks
    ]
    kept = sum(block_bytes)
    if gradient_checkpointing:
        kept = min(kept, len(block_bytes) * shape.hidden * value_bytes + max(block_bytes, default=0))
    return Memory(
        weights=round(shape.quantizable * bits / 8) + shape.other * value_bytes + dequantized,
        adapter=shape.adapter * (4 + 4 + optimizer_bytes + value_bytes),
        activations=tokens * kept,
        logits=min(target_tokens * shape.vocabulary, CHUNK_BYTES // 4) * (value_bytes + 4),
        overhead=OVERHEAD,
    )


def shape_of(model: Any, ranks: dict[str, int], *, quantization: str = DEFAULT, device: str = "cuda") -> ModelShape:
    """Shapes of a model, which may have no weights (device meta). ranks: of the adapted layers, by module name.

    quantization, device: decide which layers would be quantized; some are not on a CPU.
    """
    linear, kind = linear_layers(model), storage_named(quantization)
    sizes = {name: features(module) for name, module in linear.items()}
    quantizable = sum(a * b for a, b in sizes.values() if kind.same_on(a, device))
    total = sum(parameter.numel() for parameter in model.parameters())
    config, width = text_config(model.config), hidden_size(model)
    names = [name for outer in block_lists(model) for name in _children(model, outer)]
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    extra = _KEPT_BY_ACTIVATION.get(str(activation), 0)
    experts = largest(model.config, "num_experts_per_tok") or 0
    blocks = [_block(model.get_submodule(name), width, set(ranks), name, extra, experts) for name in names]
    return ModelShape(
        quantizable=quantizable,
        other=total - quantizable,
        largest_layer=max((a * b for a, b in sizes.values()), default=0),
        adapter=sum(Target(name, rank, rank).size(linear[name]) for name, rank in ranks.items()),
        vocabulary=vocabulary(model.config),
        hidden=width,
        heads=largest(model.config, "num_attention_heads") or 1,
        blocks=tuple(blocks),
    )


def _children(model: Any, outer: str) -> Iterable[str]:
    return (f"{outer}.{name}" for name, _ in model.get_submodule(outer).named_children())


def _block(block: nn.Module, hidden: int, adapted: Collection[str], prefix: str, extra: int, experts: int) -> Block:
    """What autograd keeps of a block for one token. Base weights are frozen, so their inputs are not kept for them.

    Inputs of adapted layers (A's gradient needs them), once where layers beside each other share one; outputs of all
    layers (attention and activation function need them); in a gated MLP that base/recompute.py does not know the
    activated gate; inputs of norms. Within 15 % of what torch keeps on a CPU, for ten kinds (tests/test_init.py).
    """
    linear = {name: features(module) for name, module in block.named_modules() if is_linear(module)}
    outputs = sum(out for _, out in linear.values())
    inputs = sum(
        size for _, size in {(_parent(name), linear[name][0]) for name in linear if f"{prefix}.{name}" in adapted}
    )
    values = inputs + outputs
    if linear:
        down = max(linear, key=lambda name: linear[name][0])
        width = linear[down][0]
        beside = sum(out for name, (_, out) in linear.items() if _parent(name) == _parent(down) and name != down)
        gated = beside >= 2 * width
        recomputed = any(is_gated(module) for module in block.modules())
        values += width * (gated and not recomputed) + width * extra
    stacked = [parameter for parameter in block.parameters() if parameter.dim() == 3]  # one tensor for all experts
    if stacked and experts:
        width = sum(parameter[0].numel() for parameter in stacked) // (3 * hidden)
        values += experts * (3 * width + 2 * hidden)
    norms = [each for each in block.modules() if "norm" in type(each).__name__.lower() and not [*each.children()]]
    wide = sum(not isinstance(norm, nn.LayerNorm) and not is_rms_norm(norm) for norm in norms)  # kept in fp32
    return Block(values + (len(norms) - wide) * hidden, wide * hidden)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def parse_size(text: str) -> int:
    """Bytes of a GPU's memory as people write it: 12, 12GB, 12GiB, 8g, 24564MiB. Raises LoraError for anything else.

    GB means GiB: a card that is sold as 12 GB has 12 GiB.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    size = round(float(found[1]) * unit) if found and unit else 0
    if not 0 < size <= _MOST:
        raise LoraError(
            f"--gpu {text} is not an amount of memory", fix="write what the GPU has, such as 12GB, 24GB or 24564MiB"
        )
    return size
