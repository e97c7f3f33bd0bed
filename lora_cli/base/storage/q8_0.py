"""Linear layers as a GGUF file holds them: in Q8_0 as here, in Q4_0 and Q4_1 as in int4.py, others as plain ones.

Q8_0: w = d · q, with q of 8 bits and d of 32 weights in fp16; without an offset that QA-LoRA could change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.base.storage.blocks import BLOCK, LAYERS, BlockLinear, dense_of
from lora_cli.base.storage.kind import Storage
from lora_cli.errors import LoraError


class AsInFile(Storage):
    name = "gguf"

    def is_layer(self, module: nn.Module) -> bool:
        return isinstance(module, Q8Linear)

    def dense(self, layer: nn.Module) -> Tensor:
        return dense_of(layer)

    def prepare(self, layer: Any) -> None:
        """Raises LoraError for a scale that is NaN or infinity."""
        if not bool(layer.d.isfinite().all()):
            what = "a scale in the GGUF file's Q8_0 blocks is NaN or infinity"
            raise LoraError(what, fix="download the file again, or use another")

    def dense_stored(self, weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        raise AssertionError("no checkpoint but a GGUF file stores weights so")

    def bits(self, value_bytes: int, double: bool, group_size: int = BLOCK) -> float:
        """Of a layer in Q8_0."""
        return 8 + 16 / BLOCK


class Q8Linear(BlockLinear):
    """W = d · q. weight: (out, in) of int8; d: (out, in / 32) of fp16."""

    weight: nn.Parameter
    d: nn.Parameter
    names = ("weight", "d")

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None):
        super().__init__(
            in_features,
            bias,
            weight=torch.empty(out_features, in_features, dtype=torch.int8),
            d=torch.empty(out_features, in_features // BLOCK, dtype=torch.float16),
        )

    @staticmethod
    def dequantized(*parts: Tensor) -> Tensor:
        q, d = parts
        return (q.float().view(len(q), -1, BLOCK) * d.float().unsqueeze(-1)).view(len(q), -1)


LAYERS[AsInFile.name] = Q8Linear


def of_q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(q, d) of the bytes of GGUF's Q8_0, (out_features, in_features / 32 · 34), as they are."""
    each = blocks.reshape(len(blocks), -1, 2 + BLOCK)
    d = each[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return each[..., 2:].flatten(1).view(torch.int8), d
