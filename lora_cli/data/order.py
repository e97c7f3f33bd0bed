"""Order: which rows make up step N. A function of the seed and of N alone, found without looking at the steps before.

So it is the same for any number of workers and processes, and a resumed run jumps to its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lora_cli.data.example import Example
from lora_cli.data.packing import Groups


@lru_cache(maxsize=1)
def permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
    """range(size) as NumPy shuffles it, (size,) int64; kept for the steps of one epoch: 8 bytes a row."""
    shuffled = np.random.default_rng(seed).permutation(size)
    shuffled.flags.writeable = False
    return shuffled


@dataclass(frozen=True)
class Order:
    """Which examples form each micro-batch of each step.

    rows: the units that are shuffled anew each epoch, each a list of example indices: packed ones, or a whole
    micro-batch of similar length.
    """

    rows: Groups
    rows_per_micro_batch: int
    gradient_accumulation_steps: int
    seed: int

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_micro_batch * self.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        steps = max(1, math.ceil(self.steps_per_epoch * epochs - 1e-9))
        return steps if max_steps is None else min(steps, max_steps)

    def step(self, step: int) -> list[list[int]]:
        """Example indices of each micro-batch of a step, counted from 1. The last step of an epoch may be smaller."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        shuffled = permutation(len(self.rows), (self.seed, epoch))
        first, last = at * self.rows_per_step, min((at + 1) * self.rows_per_step, len(self.rows))
        rows = [self.rows[shuffled[place]] for place in range(first, last)]
        return [
            [example for row in rows[start : start + self.rows_per_micro_batch] for example in row]
            for start in range(0, len(rows), self.rows_per_micro_batch)
        ]


def split_by_length(batches: list[list[Example]], size: int) -> list[list[Example]]:
    """The same examples in micro-batches of `size`, of similar length each, the longest first."""
    examples = sorted((example for batch in batches for example in batch), key=lambda each: -len(each.ids))
    return [examples[at : at + size] for at in range(0, len(examples), size)]
