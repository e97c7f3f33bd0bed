"""QA-LoRA: an adapter that sees one sum for each group of an int4 base, and merges into the groups' offsets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.trained import ALL
from lora_cli.base.linear import features
from lora_cli.base.storage.int4 import Int4Linear, with_offsets
from lora_cli.errors import LoraError


class QALoRALinear(LoRALinear):
    """base_layer(x) + scaling · B A P dropout(x), where P sums the inputs of each group of the base.

    A is (rank, in_features / group_size). That is LoRA with each column of A repeated for its group (`spread_A`), which
    is how it is computed and stored on disk. The update s · B A P is the same for all weights of a group, so that
    W + s · B A P = d · q + (m + s · B A): the merged weight has the same q and d.

    Source: Xu et al. 2023, arXiv:2309.14717, algorithm 1, where P is the mean times the group's size, AvgPool(x) ·
    (D_in // L): a sum. PEFT's `use_qalora` takes the mean times the number of groups, another strength.
    """

    grouped: ClassVar = True

    def __init__(self, base_layer: nn.Module, *settings: Any):
        if not isinstance(base_layer, Int4Linear):
            raise LoraError(
                "adapter.method: qa_lora changes the offsets of int4 groups, and a layer that it is to adapt is not "
                "held in int4, but as transformers keeps it",
                fix="leave such layers out with adapter.exclude_modules; with method: lora, lora check --model says "
                "how many they are",
            )
        super().__init__(base_layer, *settings)
        self.group_size = base_layer.group_size
        self.grid = (base_layer.d, base_layer.m)  # kept where a merge makes the base plain

    @classmethod
    def columns(cls, base_layer: nn.Module) -> int:
        return features(base_layer)[0] // base_layer.group_size  # type: ignore[operator]

    def spread_A(self) -> Tensor:
        return self.lora_A.repeat_interleave(self.group_size, 1)

    def merged_offsets(self, rows: slice = ALL) -> Tensor:
        """m + scaling · B A, rounded to fp16: (out_features, groups). With it `q4_1_blocks` is the merged weight."""
        change = self.scaling * (self._masked_B()[rows] @ self.lora_A)
        return (self.grid[1][rows].float() + change.detach().float()).half()

    def merged(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        """d · q + merged_offsets: what a file of 4 bits holds."""
        d, m = self.grid
        return with_offsets(weight, d[rows], m[rows], self.merged_offsets(rows))

    @classmethod
    def misfit(cls, base_layer: nn.Module | None, tensors: Mapping[str, Tensor]) -> str | None:
        if not isinstance(base_layer, Int4Linear):
            return "it was trained with qa_lora on int4, which this layer is not: leave out --quantization"
        A = tensors["lora_A.weight"]
        groups = A.unflatten(1, (-1, base_layer.group_size)) if A.shape[1] % base_layer.group_size == 0 else None
        if groups is None or not torch.equal(groups, groups[..., :1].expand_as(groups)):
            return f"its A is not constant within groups of {base_layer.group_size}, as qa_lora trains it"
        return super().misfit(base_layer, tensors)

    def from_peft(self, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        state = super().from_peft(tensors, alpha)
        return state | {"lora_A": state["lora_A"][:, :: self.group_size].contiguous()}
