"""Weights as they are, in the compute dtype: torch's Linear, and GPT-2's Conv1D, which stores (in, out)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.base.storage.kind import Storage, is_a, whole


class Plain(Storage):
    name = "none"

    def is_layer(self, module: nn.Module) -> bool:
        """A subclass with a forward of its own computes something else: the routers of Llama 4 and Phi-3.5-MoE return
        tuples. Falcon's is the product and the bias in two steps."""
        if not isinstance(module, nn.Linear):
            return isinstance(module, Conv1D)
        return type(module).forward is nn.Linear.forward or is_a(module, "FalconLinear")

    def dense(self, layer: nn.Module) -> Tensor:
        weight = whole(layer.weight)
        return weight.T if isinstance(layer, Conv1D) else weight

    def dense_stored(self, weight: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        return weight

    def bits(self, value_bytes: int, double: bool, group_size: int = 32) -> float:
        return 8 * value_bytes
