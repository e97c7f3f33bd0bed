"""Packing: which examples share a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Groups:
        members = np.fromiter((index for group in lists for index in group), np.int64)
        return cls(members, np.cumsum([len(group) for group in lists], dtype=np.int64))


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


def rows_to_shuffle(lengths: np.ndarray, *, packing: bool, max_seq_len: int, tokens: int | None, seed: int) -> Groups:
    """What the order shuffles: packed rows, groups of similar length that fill `tokens`, or single examples."""
    if packing:
        return pack(lengths, max_seq_len)
    if tokens is not None:
        return similar_lengths(lengths, tokens, seed)
    return Groups(np.arange(len(lengths)), np.arange(1, len(lengths) + 1))


def similar_lengths(lengths: np.ndarray, tokens: int, seed: int, *, pool: int = 4096) -> Groups:
    """Groups of examples of similar length, as many as fit, padded to the longest, into `tokens`.

    Examples are shuffled by the seed and sorted within pools: which of them share a group stays a matter of chance
    beyond their length.
    """
    shuffled = np.random.default_rng([seed, 0xB0C]).permutation(len(lengths))
    members, sizes = [], []
    for start in range(0, len(shuffled), pool):
        part = shuffled[start : start + pool]
        part = part[np.argsort(-lengths[part], kind="stable")]
        members.append(part)
        at = 0
        while at < len(part):
            size = min(max(1, tokens // int(lengths[part[at]])), len(part) - at)
            sizes.append(size)
            at += size
    return Groups(np.concatenate([np.empty(0, np.int64), *members]), np.cumsum(sizes, dtype=np.int64))
