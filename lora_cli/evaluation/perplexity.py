"""Loss and perplexity, weighted by target tokens: they do not depend on batch size, order or padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_cli.data.batches import MicroBatch, similar_length_batches
from lora_cli.data.example import Example
from lora_cli.data.store import Examples
from lora_cli.errors import CheckFailed
from lora_cli.evaluation.loss import summed_loss


@dataclass(frozen=True)
class Score:
    """loss: nats per target token. perplexity: exp of it. bits_per_byte: bits over the UTF-8 bytes of the targets."""

    loss: float
    perplexity: float
    bits_per_byte: float
    target_tokens: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def mean_loss(
    model: Any, examples: Sequence[Example], collate: Callable[[list[Example]], MicroBatch], max_tokens: int
) -> tuple[float, int]:
    """(nats per target token, target tokens), each counted once whatever its weight in training.

    Leaves training mode and random state as they were.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            lengths = examples.lengths if isinstance(examples, Examples) else [len(e.ids) for e in examples]
            for batch in similar_length_batches(lengths, max_tokens):
                micro_batch = collate([examples[index] for index in batch])
                total += summed_loss(model, micro_batch, weighted=False).double().item()
                count += len(micro_batch.targets)
    finally:
        model.train(training)
    return total / count, count


def score(
    name: str,
    model: Any,
    examples: Sequence[Example],
    collate: Callable[[list[Example]], MicroBatch],
    max_tokens: int,
    text_bytes: int,
) -> Score:
    """Raises CheckFailed where the loss is no number; name: of what is measured, for the message."""
    loss, count = mean_loss(model, examples, collate, max_tokens)
    if not math.isfinite(loss):
        raise CheckFailed(
            f"the loss of the {name} is {loss}: its weights are damaged, or too large for its dtype",
            fix="try --dtype fp32; if that does not help, copy or download it again",
        )
    bits = loss * count / math.log(2)
    return Score(loss, math.exp(min(loss, 700)), bits / text_bytes if text_bytes else math.inf, count)
