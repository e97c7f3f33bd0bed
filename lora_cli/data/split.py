"""Which rows are held out, and how often the others are seen."""

from __future__ import annotations

import numpy as np

from lora_cli.errors import LoraError


def hold_out(groups: np.ndarray, fraction: float, seed: int, where: str | None = None) -> np.ndarray:
    """Rows to hold out, by a seeded choice of whole groups, until they are the fraction. groups: one number a row."""
    count = round(len(groups) * fraction)
    _, first, group_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    by_appearance = np.argsort(first, kind="stable")
    shuffled = by_appearance[np.random.default_rng([seed, 0x5EED]).permutation(len(sizes))]
    held = shuffled[: int(np.searchsorted(np.cumsum(sizes[shuffled]), count)) + 1] if count else shuffled[:0]
    if not 0 < len(held) < len(sizes):
        what = "rows" if len(sizes) == len(groups) else f"rows in {len(sizes)} groups"
        raise LoraError(
            f"validation: {fraction} of {len(groups)} {what} is {count} rows",
            where=where,
            fix="use another fraction, more data, or a validation file",
        )
    return np.flatnonzero(np.isin(group_of, held))


def repeated(indices: np.ndarray, weight: float, seed: list[int]) -> list[np.ndarray]:
    """Indices to train on: all of them as often as the weight says, and of a fraction a seeded choice."""
    whole, rest = divmod(weight, 1)
    chosen = np.random.default_rng(seed).permutation(len(indices))[: round(len(indices) * rest)]
    return [*[indices] * int(whole), indices[np.sort(chosen)]]
