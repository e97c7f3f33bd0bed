"""Loss and perplexity, weighted by target tokens: they do not depend on batch size, order or padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.base.trials import in_mode
from lora_cli.data.batches import MicroBatch, similar_length_batches
from lora_cli.data.example import Example
from lora_cli.data.store import Examples
from lora_cli.errors import CheckFailed
from lora_cli.evaluation.gain import Gain, paired_gain
from lora_cli.evaluation.generation import require_token
from lora_cli.evaluation.loss import target_losses

Collate = Callable[[list[Example]], MicroBatch]


@dataclass(frozen=True)
class Score:
    """loss: nats per target token. perplexity: exp of it. bits_per_byte: bits over the UTF-8 bytes of the targets.

    examples: losses and target counts of each example, as of `example_losses`.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    target_tokens: int
    examples: tuple[Tensor, Tensor] = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, float | int]:
        return {name: value for name, value in vars(self).items() if name != "examples"}

    def gain_over(self, before: Score) -> Gain:
        """Compared example by example; both scores are of the same."""
        return paired_gain(before.examples[0], self.examples[0], self.examples[1])


class EvaluationStopped(Exception):
    """An evaluation ended before its last batch, as `should_stop` asked, and has no result."""


def example_losses(
    model: Any,
    examples: Sequence[Example],
    collate: Collate,
    max_tokens: int,
    *,
    should_stop: Callable[[], bool] | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """(losses, targets): nats summed over each example's target tokens, and their number; (examples,) on the CPU.

    float64 and int64, in the order of the examples, each target counted once whatever its weight in training. Batches
    and packing change nothing but rounding. Leaves training mode and random state as they were.

    max_tokens: positions of one forward, unless one example has more. share: (process, processes); only this process's
    batches are computed, the entries of the others are zero, so that summed over processes they are complete. Every
    process makes the same number of forwards, because a sharded model computes each of them together.
    should_stop: asked before each forward, and must say the same on every process; then EvaluationStopped is raised.
    """
    losses = torch.zeros(len(examples), dtype=torch.float64)
    targets = torch.zeros(len(examples), dtype=torch.int64)
    process, processes = share
    require_token(max((int(np.max(example.ids)) for example in examples), default=0), model)
    lengths = examples.lengths if isinstance(examples, Examples) else [len(e.ids) for e in examples]
    batches = similar_length_batches(lengths, max_tokens)
    with in_mode(model, training=False):
        for first in range(0, len(batches), processes):
            if should_stop is not None and should_stop():
                raise EvaluationStopped
            at = first + process
            batch = batches[min(at, len(batches) - 1)]
            chosen = [examples[index] for index in batch]
            each = target_losses(model, collate(chosen)).cpu().double()
            if at < len(batches):  # else it was computed because the others needed this process
                counts = torch.tensor([np.count_nonzero(example.weights[1:]) for example in chosen])
                where = torch.tensor(batch)
                targets[where] = counts
                losses.index_add_(0, where.repeat_interleave(counts), each)
    return losses, targets


def score(
    model: Any, examples: Sequence[Example], collate: Collate, max_tokens: int, text_bytes: int, name: str
) -> Score:
    """Raises CheckFailed if the loss is NaN or infinite. name: of what is measured, for the message."""
    losses, targets = example_losses(model, examples, collate, max_tokens)
    count = int(targets.sum())
    loss = losses.sum().item() / count
    if not math.isfinite(loss):
        what = f"the loss of the {name} is {loss}: its weights are damaged, or too large for its dtype"
        raise CheckFailed(what, fix="try --dtype fp32; if that does not help, copy or download it again")
    bits_per_byte = loss * count / math.log(2) / text_bytes if text_bytes else math.inf
    return Score(loss, math.exp(min(loss, 700)), bits_per_byte, count, (losses, targets))
