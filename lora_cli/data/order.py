"""Order: which rows make up step N. A function of the seed and of N alone, found without looking at the steps before.

So it is the same for any number of workers and processes, and a resumed run jumps to its place.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lora_cli.data.packing import Groups

_ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """A seeded permutation of range(size), any place of which is computed by itself.

    A Feistel network over the next even number of bits; places beyond `size` walk on along their cycle until they fall
    inside (Black and Rogaway 2002, Ciphers with arbitrary finite domains, section 4). Its rounds are keyed by BLAKE2.
    """

    size: int
    seed: tuple[int, ...]

    def __getitem__(self, at: int) -> int:
        if not 0 <= at < self.size:
            raise IndexError(at)
        while True:
            at = self._cipher(at)
            if at < self.size:
                return at

    def _cipher(self, value: int) -> int:
        half = self._half_bits
        left, right = value >> half, value & ((1 << half) - 1)
        for key in self._keys:
            digest = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & ((1 << half) - 1))
        return left << half | right

    @cached_property
    def _half_bits(self) -> int:
        return max(1, -(-max(self.size - 1, 1).bit_length() // 2))

    @cached_property
    def _keys(self) -> list[bytes]:
        name = "/".join(map(str, self.seed))
        return [hashlib.blake2b(f"{name}/{number}".encode(), digest_size=16).digest() for number in range(_ROUNDS)]


@lru_cache(maxsize=2)
def _permutation(size: int, seed: tuple[int, ...]) -> Permutation:
    """The one of the last step again, with its keys."""
    return Permutation(size, seed)


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
        shuffled = _permutation(len(self.rows), (self.seed, epoch))
        first, last = at * self.rows_per_step, min((at + 1) * self.rows_per_step, len(self.rows))
        rows = [self.rows[shuffled[place]] for place in range(first, last)]
        return [
            [example for row in rows[start : start + self.rows_per_micro_batch] for example in row]
            for start in range(0, len(rows), self.rows_per_micro_batch)
        ]
