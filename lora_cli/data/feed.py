"""What the loop trains on: the examples of each micro-batch of step N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lora_cli.data.example import Example
from lora_cli.data.order import Order


class Feed(Protocol):
    def step(self, step: int) -> list[list[Example]]:
        """The examples of each micro-batch of a step, counted from 1."""
        ...


@dataclass(frozen=True)
class IndexedFeed:
    """Prepared examples in the order of their indices: any step can be asked for, in constant time."""

    examples: Sequence[Example]
    order: Order

    def step(self, step: int) -> list[list[Example]]:
        return [[self.examples[index] for index in batch] for batch in self.order.step(step)]
