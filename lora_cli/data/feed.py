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

    def position(self) -> dict[str, int]:
        """What a checkpoint has to remember, beside the step, to go on from here."""
        ...

    def seek(self, position: dict[str, int]) -> None:
        """Go on where a checkpoint stopped."""
        ...


@dataclass(frozen=True)
class IndexedFeed:
    """Prepared examples in the order of their indices: any step can be asked for, in constant time."""

    examples: Sequence[Example]
    order: Order

    def step(self, step: int) -> list[list[Example]]:
        return [[self.examples[index] for index in batch] for batch in self.order.step(step)]

    def position(self) -> dict[str, int]:
        return {}

    def seek(self, position: dict[str, int]) -> None:
        pass
