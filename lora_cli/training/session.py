"""A run before its first step: what it trains, on what, and what the passes found out about the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_cli.adapters.targets import block_lists
from lora_cli.adapters.trained import Trained
from lora_cli.base.activations import ActivationPlan
from lora_cli.base.source import BaseSource
from lora_cli.data.batches import MicroBatch, collate
from lora_cli.data.example import Example
from lora_cli.data.feed import Feed
from lora_cli.evaluation.forgetting import GeneralText
from lora_cli.evaluation.samples import Prompt
from lora_cli.recipe import Recipe


@dataclass
class Session:
    """device: where it trains; a base that is to be sharded is on the CPU at first. say: prints a line.

    The last three are set by passes. side_by_side: whether examples share a row, without padding.
    """

    recipe: Recipe
    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    feed: Feed
    model: Any
    device: torch.device
    why_dtype: str
    say: Callable[[str], None]
    general_text: GeneralText | None = None
    prompts: list[Prompt] = field(default_factory=list)
    layers: dict[str, Trained] = field(default_factory=dict)
    side_by_side: bool = False
    activations: ActivationPlan = field(default_factory=lambda: ActivationPlan((), (), 0.0))

    @property
    def total_steps(self) -> int:
        return self.feed.total_steps

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in the model's order."""
        return [block for name in block_lists(self.model) for block in self.model.get_submodule(name)]

    def collate(
        self, examples: Sequence[Example], *, dropout: tuple[int, int] | None = None, device: torch.device | None = None
    ) -> MicroBatch:
        """On `device`, or where the run trains."""
        pad_id: Any = self.tokenizer.eos_token_id
        device = device or self.device
        return collate(examples, packed=self.side_by_side, pad_id=pad_id, device=device, dropout=dropout)
