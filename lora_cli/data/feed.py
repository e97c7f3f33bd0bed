"""What a run trains on and is validated on, whether data were prepared or are read from a stream.

Both feeds give the examples of each micro-batch of step N, and say what a run has to know of the data they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.data.example import Example
from lora_cli.data.order import Order, split_by_length
from lora_cli.data.report import data_lines
from lora_cli.data.store import Examples, PreparedData, Summary, by_length
from lora_cli.data.stream import StreamFeed
from lora_cli.recipe import Recipe


@dataclass(frozen=True)
class PreparedFeed:
    """Prepared examples in the order of their indices: any step can be asked for, in constant time.

    by_length: the examples of a step are split by length, the longest first, so that padding costs little; which
    examples a step has does not depend on how it is split.
    """

    data: PreparedData
    recipe: Recipe
    order: Order
    by_length: bool = False

    @property
    def summary(self) -> Summary:
        """Fingerprint, files, formats, template, weights of the loss, findings; lengths of an epoch."""
        return self.data.summary

    @property
    def validation(self) -> Examples:
        return self.data.validation

    @property
    def total_steps(self) -> int:
        return self.order.total_steps(self.recipe.train.epochs, self.recipe.train.max_steps)

    @property
    def epochs(self) -> float | None:
        """How many all steps are; of a stream None."""
        return self.total_steps / self.order.steps_per_epoch

    def first(self, count: int) -> Sequence[Example]:
        """The first examples that are trained on, in the order of the data."""
        return self.data.train[:count]

    def lines(self) -> list[str]:
        """What a person should know of the data before training."""
        return data_lines(self.data, self.recipe)

    def require_fit(self, config: Any, model: str) -> None:
        """Raises LoraError for an example that the model has no embeddings or no positions for."""
        self.data.require_fit(config, model)

    def step(self, step: int) -> list[list[Example]]:
        """Examples of each micro-batch of a step, counted from 1."""
        batches = [[self.data.train[index] for index in batch] for batch in self.order.step(step)]
        return split_by_length(batches, self.order.rows_per_micro_batch) if self.by_length else batches

    def largest(self) -> list[Example]:
        """As many of the rows with most tokens as a micro-batch has: none of this run can have more tokens."""
        sums = self.order.rows.sums(self.data.train.lengths)
        most = np.argsort(-sums, kind="stable")[: self.order.rows_per_micro_batch]
        return [self.data.train[index] for row in most.tolist() for index in self.order.rows[row]]

    def position(self) -> dict[str, int]:
        """What a checkpoint has to remember beside the step: nothing."""
        return {}

    def seek(self, position: dict[str, int]) -> None:
        """Go on from a checkpoint's position: any step can be asked for."""


Feed = PreparedFeed | StreamFeed


def open_feed(recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> Feed:
    """What the recipe trains on. data: what was prepared for it; of a stream, the validation data alone.

    Opening a stream reads its first window; raises LoraError for what is wrong in it.
    """
    if recipe.data.streaming:
        return StreamFeed(recipe, data, tokenizer)
    return PreparedFeed(data, recipe, data.order(recipe), by_length(recipe))
