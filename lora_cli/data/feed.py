"""What the loop trains on: the examples of each micro-batch of step N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_cli.data.example import Example
from lora_cli.data.order import Order
from lora_cli.data.store import Examples


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

    def largest(self) -> list[Example]:
        """As many of the rows with most tokens as a micro-batch has: none of this run is larger."""
        lengths = np.asarray(self.lengths)
        most = np.argsort(-self.order.rows.sums(lengths), kind="stable")[: self.order.rows_per_micro_batch]
        return [self.examples[index] for row in most.tolist() for index in self.order.rows[row]]

    @property
    def lengths(self) -> Sequence[int] | np.ndarray:
        examples = self.examples
        return examples.lengths if isinstance(examples, Examples) else [len(example.ids) for example in examples]

    def position(self) -> dict[str, int]:
        """What a checkpoint has to remember beside the step: nothing, where any step can be asked for."""
        return {}

    def seek(self, position: dict[str, int]) -> None:
        pass
