"""Which rows are held out, and how often the others are seen."""

from __future__ import annotations

import numpy as np

from lora_cli.errors import LoraError

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
        in_groups = f"rows in {len(sizes)} group{'s' if len(sizes) > 1 else ''}"
        what = "rows" if len(sizes) == len(groups) else in_groups
        works = [share for share in _FRACTIONS if 0 < len(chosen(share)) < len(sizes)]
        other = f"write data.validation: {works[0]:g}, or " if works else ""
        raise LoraError(
            f"data.validation: {fraction} of {len(groups)} {what} is {round(len(groups) * fraction)} rows",
            where=where,
            fix=f"{other}add data, name a file in data.validation, or write data.validation: null to hold nothing out",
        )
    return np.flatnonzero(np.isin(group_of, held))


def repeated(indices: np.ndarray, weight: float, seed: list[int]) -> list[np.ndarray]:
    """Indices to train on: all of them as often as the weight says, and of a fraction a seeded choice."""
    whole, rest = divmod(weight, 1)
    chosen = np.random.default_rng(seed).permutation(len(indices))[: round(len(indices) * rest)]
    return [*[indices] * int(whole), indices[np.sort(chosen)]]
