"""What the loop trains on: the examples of each micro-batch of step N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_cli.data.example import Example
from lora_cli.data.order import Order


def split_by_length(batches: list[list[Example]], size: int) -> list[list[Example]]:
    """The same examples in micro-batches of `size`, of similar length each."""
    examples = sorted((example for batch in batches for example in batch), key=lambda each: -len(each.ids))
    return [examples[at : at + size] for at in range(0, len(examples), size)]


@dataclass(frozen=True)
class IndexedFeed:
    """Prepared examples in the order of their indices: any step can be asked for, in constant time.

    by_length: the examples of a step are split by length, the longest first, so that padding costs little; which
    examples a step has does not depend on how it is split.
    """

    examples: Sequence[Example]
    order: Order
    by_length: bool = False

    def step(self, step: int) -> list[list[Example]]:
        batches = [[self.examples[index] for index in batch] for batch in self.order.step(step)]
        return split_by_length(batches, self.order.rows_per_micro_batch) if self.by_length else batches

    def position(self) -> dict[str, int]:
        """What a checkpoint has to remember beside the step: nothing, where any step can be asked for."""
        return {}

    def seek(self, position: dict[str, int]) -> None:
        pass
