"""Onto which weights a quantized run's update is added: measured on its own held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora_cli.data.batches import collate
from lora_cli.data.example import Example
from lora_cli.evaluation.gain import paired_gain
from lora_cli.evaluation.perplexity import example_losses
from lora_cli.merging.compare import prepared_data

_MOST_HELD_OUT = 4096  # tokens


def held_out(run: Path) -> list[Example]:
    """Validation examples that a run folder keeps prepared, up to 4,096 tokens in all."""
    return kept_examples(run, "validation")


def kept_examples(run: Path, part: Literal["validation", "train"]) -> list[Example]:
    data, found, tokens = prepared_data(run), [], 0
    for example in (getattr(data, part) if data is not None else None) or ():
        tokens += len(example.ids)
        if tokens > _MOST_HELD_OUT:
            break
        if example.trained[1:].any():
            found.append(example)
    return found


def losses_of(model: Any, examples: Sequence[Example], *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """As `example_losses`. in_place: whether weights are read at each pass; there is one pass for all then."""
    lay_out = partial(collate, packed=False, pad_id=0, device=torch.device("cpu"))
    longest = max(len(each.ids) for each in examples)
    return example_losses(model, examples, lay_out, longest * len(examples) if in_place else longest)


def better_base(trained: Tensor, original: Tensor, targets: Tensor) -> tuple[str, str, dict[str, Any]]:
    """(`trained` or `original`, a sentence with the figures, the figures); `original` only where it is surely better.

    trained, original: losses of the held-out examples on these weights.
    """
    found = paired_gain(trained, original, targets)
    onto = "original" if found.low is not None and found.low > 0 else "trained"
    interval = "no interval" if found.low is None else f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
    return (
        onto,
        f"held-out loss on the trained weights {found.before:.4f}, on the original ones {found.after:.4f} "
        f"(gain {found.gain:+.4f}, {interval}): merged onto the {onto} weights",
        asdict(found),
    )
