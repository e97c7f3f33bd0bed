"""Packing: which examples share a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of example indices, each of at most `capacity` tokens: best-fit decreasing.

    Every index appears once. The longest examples come first, each into the fullest row that still has room; within
    22 % of the fewest rows possible in the worst case, far closer in practice (Johnson 1974, Worst-case performance
    bounds for simple one-dimensional packing algorithms). Deterministic: ties go by index.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, above the capacity of {capacity}")
        at = bisect_left(room, (length, -1))
        if at == len(room):
            rows.append([index])
            insort(room, (capacity - length, len(rows) - 1))
        else:
            free, row = room.pop(at)
            rows[row].append(index)
            insort(room, (free - length, row))
    return rows
