"""`lora combine`: a weighted sum of adapters of one base, as one adapter."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_cli.adapters.low_rank import Factors, decomposed, factors_of, nearest, product_norm
from lora_cli.errors import home_expanded, refuse_if
from lora_cli.studies.made import Layer, Made, Part, common_group, open_part, require_one_base, write_made

Method = Literal["linear", "ties", "dare"]
DENSITIES = {"ties": 0.2, "dare": 0.5}  # that of TIES is its paper's
_NOTHING = 1e-6  # of what went in: no more than fp32 leaves of numbers that cancel each other


def weighted(word: str) -> tuple[str, float]:
    """ADAPTER:WEIGHT as its parts; weight 1 where there is none. A folder of the whole name is that folder.

    Raises LoraError for a weight that is 0 or not a finite number.
    """
    source, colon, text = word.rpartition(":")
    if not colon or Path(home_expanded(word)).is_dir():
        return word, 1.0
    try:
        weight = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
    except ValueError:
        if not Path(home_expanded(source)).is_dir():  # such as C:\\adapter
            return word, 1.0
        weight = math.nan
    wrong = not math.isfinite(weight) or weight == 0
    refuse_if(wrong, f"{word}: {text!r} is not a weight", fix=f"write a finite number other than 0, as in {source}:0.7")
    return source, weight


def combine(
    words: Sequence[str], output: Path, *, rank: int | None, method: Method, density: float | None, seed: int
) -> Made:
    """Write one adapter with the update Σ weight · ΔW in every layer, whatever ranks, alphas and layers they have.

    linear: exact, by concatenating A and B; with `rank`, the nearest matrix of that rank. ties, dare: on the dense
    update of each layer, one at a time, then its largest `rank` directions. Nothing is opened but adapters. Raises
    LoraError for adapters of different bases or shapes, and where nothing is left.
    """
    parts = [open_part(source, output, weight) for source, weight in map(weighted, words)]
    require_one_base(parts)
    dense: Callable[[str], Tensor] | None = None
    group, kept = common_group(parts), density or DENSITIES.get(method, 1.0)
    if method != "linear":
        refuse_if(rank is None, f"--method {method} needs a rank", fix="add --rank 16: its result has full rank")
        merged = _ties if method == "ties" else partial(_dare, seed=seed)
        dense = partial(_dense, parts, group, merged, kept)
    layers: list[Layer] = []
    apart: list[float] = []  # ‖ΔW‖ of every layer that went in
    ranks = _ranks(parts, group, rank, exact=dense is None)

    def make(name: str) -> Factors:
        own = [each.factors(name, group) for each in parts if name in each.pairs]
        apart.extend(product_norm(*each) for each in own)
        made, norm, lost = _low_rank(own, ranks[name]) if dense is None else nearest(dense(name), ranks[name])
        layers.append(Layer(name, sum(len(A) for A, _ in own), ranks[name], norm, lost))
        return made

    def measured() -> list[str]:
        what = "nothing is left of these adapters: they cancel each other, or none of them changes anything"
        fix = "choose other weights" + (", or a higher --density" if dense is not None else "")
        refuse_if(Made(layers).norm("norm") <= _NOTHING * math.hypot(*apart), what, fix=fix)
        return Made(layers).lines()

    made_of = " + ".join(f"{each.weight:g} × {each.name}" for each in parts).replace("+ -", "- ")
    if method != "linear":
        made_of += f", by {method} with density {kept:g}"
    notes = write_made(output, parts, ranks, make, made_of=made_of, measured=measured)
    facts = {"method": method, "parts": [{"name": each.name, "weight": each.weight} for each in parts]}
    return Made(layers, notes, facts)


def _ranks(parts: Sequence[Part], group: int, rank: int | None, *, exact: bool) -> dict[str, int]:
    """By layer, the rank that is written."""
    ranks = {}
    for name in dict.fromkeys(name for each in parts for name in each.pairs):
        shapes = [each.shape(name) for each in parts if name in each.pairs]
        bounds = [shapes[0][1] // group, shapes[0][2]] + [sum(each[0] for each in shapes)] * exact
        ranks[name] = min([*bounds, rank or bounds[0]])
    return ranks


def _low_rank(own: Sequence[Factors], rank: int) -> tuple[Factors, float, float]:
    """The sum of the products, exactly where it fits, else its nearest of that rank; ‖ΔW‖, and what is lost of it."""
    A, B = torch.cat([each[0] for each in own]), torch.cat([each[1] for each in own], 1)
    if len(A) <= rank:
        return (A, B), product_norm(A, B), 0.0
    U, values, V = decomposed(A, B, 1.0)
    return factors_of(U, values, V, rank), values.norm().item(), values[rank:].norm().item()


def _dense(parts: Sequence[Part], group: int, merged: Any, density: float, name: str) -> Tensor:
    own = [each for each in parts if name in each.pairs]
    updates = []
    for each in own:
        A, B = each.factors(name, group)
        updates.append((B @ A, each.pairs[name]))
    return merged(updates, density)


def _ties(updates: Sequence[tuple[Tensor, Factors]], density: float) -> Tensor:
    """Trim, elect sign and merge (Yadav et al. 2023, arXiv:2306.01708, algorithm 1), on the dense weighted updates.

    Of each update the `density` largest entries stay; the sign of their sum is elected; the mean of the entries with
    that sign remains. They are trimmed within a layer, not over the whole model as in the paper: layers are streamed.
    """
    trimmed = [_trimmed(update, density) for update, _ in updates]
    elected = torch.stack(trimmed).sum(0).sign()
    agreeing = [torch.where(each.sign() == elected, each, 0.0) for each in trimmed]
    return sum(agreeing) / sum((each != 0).float() for each in agreeing).clamp(min=1)  # type: ignore[union-attr]


def _trimmed(update: Tensor, density: float) -> Tensor:
    left_out = update.numel() - round(density * update.numel())
    if left_out == update.numel():
        return torch.zeros_like(update)
    smallest = np.partition(update.abs().numpy().ravel(), left_out)[left_out]
    return torch.where(update.abs() >= float(smallest), update, 0.0)


def _dare(updates: Sequence[tuple[Tensor, Factors]], density: float, seed: int) -> Tensor:
    """Drop and rescale (Yu et al. 2023, arXiv:2311.03099), on the dense weighted updates; then their sum.

    Each entry stays with probability `density` and is divided by it. What is dropped follows from the seed and the
    adapter's own numbers, so that it depends neither on the order nor on the weights.
    """
    total = torch.zeros_like(updates[0][0])
    for update, factors in updates:
        key = seed
        for each in factors:
            key = zlib.crc32(each.contiguous().view(torch.uint8).numpy().data, key)
        drawn = torch.rand(update.shape, generator=torch.Generator().manual_seed(key))
        total += torch.where(drawn < density, update / density, 0.0)
    return total
