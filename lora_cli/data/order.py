"""Order: which examples share a row, which rows make up step N, and which are held out.

All of it is a function of the seed and of N, so it is the same for any number of processes, and a resumed run jumps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lora_cli.data.example import Example
from lora_cli.errors import LoraError

FEW_STEPS = 20  # optimizer steps; a run with fewer is hardly trained


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


# ── packing: which examples share a row ───────────────────────────────────────────────────────────────────────────────


_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Groups:
    """Lists of indices in two arrays: group i is members[ends[i - 1] : ends[i]]."""

    members: np.ndarray  # (indices,) int64
    ends: np.ndarray  # (groups,) int64

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at: int) -> list[int]:
        start = self.ends[at - 1] if at else 0
        return self.members[start : self.ends[at]].tolist()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of the values of each group's members: (groups,)."""
        up_to = np.concatenate([[0], np.cumsum(values[self.members])])
        return np.diff(up_to[np.concatenate([[0], self.ends])])


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Groups:
    """Rows of example indices, each of at most `capacity` tokens: best-fit decreasing.

    Every index appears once. The longest examples come first, each into the fullest row that still has room; within
    22 % of the fewest rows possible in the worst case, far closer in practice (Johnson 1974, Worst-case performance
    bounds for simple one-dimensional packing algorithms). Deterministic: ties go by index. Rows with the same room are
    kept on a stack, and a bit set says which rooms there are: time and memory grow with the number of examples alone.
    """
    lengths = np.asarray(lengths, np.int32)
    if len(lengths) and lengths.max() > capacity:
        longest = int(lengths.argmax())
        raise ValueError(f"example {longest} has {lengths[longest]} tokens, above the capacity of {capacity}")
    capacity = min(capacity, int(lengths.sum(dtype=np.int64)))  # all on one row need no more
    by_length = np.argsort(-lengths, kind="stable").astype(np.int32)
    row_of = np.empty(len(lengths), np.int32)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room
    rooms = 0  # bit set of the rooms that have an open row
    rows = 0
    for start in range(0, len(lengths), _AT_ONCE):  # numbers of Python are large: not all of them at once
        part = by_length[start : start + _AT_ONCE]
        placed = []
        for length in lengths[part].tolist():
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = open_rows[room].pop()
                if not open_rows[room]:
                    rooms ^= 1 << room
            else:
                room, row, rows = capacity, rows, rows + 1
            placed.append(row)
            left = room - length
            if left:
                open_rows[left].append(row)
                rooms |= 1 << left
        row_of[part] = placed
    members = np.argsort(row_of, kind="stable")
    return Groups(members, np.cumsum(np.bincount(row_of, minlength=rows), dtype=np.int64))


def rows_to_shuffle(lengths: np.ndarray, packed: int | None, tokens: int | None, seed: int) -> Groups:
    """What the order shuffles: rows of `packed` tokens, groups of similar length that fill `tokens`, or examples."""
    if packed is not None:
        return pack(lengths, packed)
    if tokens is not None:
        return similar_lengths(lengths, tokens, seed)
    return Groups(np.arange(len(lengths)), np.arange(1, len(lengths) + 1))


def similar_lengths(lengths: np.ndarray, tokens: int, seed: int, *, pool: int = 4096) -> Groups:
    """Groups of examples of similar length, as many as fit, padded to the longest, into `tokens`.

    Examples are shuffled by the seed and sorted within pools: which of them share a group stays a matter of chance
    beyond their length.
    """
    shuffled = np.random.default_rng([seed, 0xB0C]).permutation(len(lengths))
    members, sizes = [np.empty(0, np.int64)], []
    for start in range(0, len(shuffled), pool):
        part = shuffled[start : start + pool]
        members.append(part[np.argsort(-lengths[part], kind="stable")])
        sizes += sizes_that_fit(lengths[members[-1]], tokens)
    return Groups(np.concatenate(members), np.cumsum(sizes, dtype=np.int64))


def sizes_that_fit(lengths: np.ndarray, tokens: int) -> list[int]:
    """How many neighbours at a time, padded to the first, fit into `tokens`; one where none does. Longest first."""
    sizes, at = [], 0
    while at < len(lengths):
        sizes.append(min(max(1, tokens // int(lengths[at])), len(lengths) - at))
        at += sizes[-1]
    return sizes


# ── which rows are held out ───────────────────────────────────────────────────────────────────────────────────────────


_FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)  # that an error suggests, where one of them works


def hold_out(groups: np.ndarray, fraction: float, seed: int, where: str | None = None) -> np.ndarray:
    """Rows to hold out, by a seeded choice of whole groups, until they are the fraction. groups: one number a row."""
    _, first, group_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    by_appearance = np.argsort(first, kind="stable")
    shuffled = by_appearance[np.random.default_rng([seed, 0x5EED]).permutation(len(sizes))]

    def chosen(share: float) -> np.ndarray:
        count = round(len(groups) * share)
        return shuffled[: int(np.searchsorted(np.cumsum(sizes[shuffled]), count)) + 1] if count else shuffled[:0]

    held = chosen(fraction)
    if not 0 < len(held) < len(sizes):
        what = "rows" if len(sizes) == len(groups) else f"rows in {len(sizes)} group{'s' if len(sizes) > 1 else ''}"
        works = [share for share in _FRACTIONS if 0 < len(chosen(share)) < len(sizes)]
        other = f"write data.validation: {works[0]:g}, or " if works else ""
        fix = f"{other}add data, name a file in data.validation, or write data.validation: null to hold nothing out"
        said = f"data.validation: {fraction} of {len(groups)} {what} is {round(len(groups) * fraction)} rows"
        raise LoraError(said, where=where, fix=fix)
    return np.flatnonzero(np.isin(group_of, held))


def repeated(indices: np.ndarray, weight: float, seed: list[int]) -> list[np.ndarray]:
    """Indices to train on: all of them as often as the weight says, and of a fraction a seeded choice."""
    whole, rest = divmod(weight, 1)
    chosen = np.random.default_rng(seed).permutation(len(indices))[: round(len(indices) * rest)]
    return [*[indices] * int(whole), indices[np.sort(chosen)]]
