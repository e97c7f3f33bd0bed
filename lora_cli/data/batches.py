"""Order and micro-batches: which examples make up step N, and the tensors a model is given for them.

The order is a function of seed and step alone: it is the same for any number of processes, and any step can be asked
for directly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.base.attention import packed_inputs
from lora_cli.data.examples import Example
from lora_cli.data.packing import pack


@dataclass(frozen=True)
class MicroBatch:
    """What one forward gets. inputs: the model's keyword arguments. targets: ids of the tokens to predict, flat.

    positions: for each target, the flat index (row · tokens + column) of the token before it, whose hidden state
    predicts it.
    """

    inputs: dict[str, Any]
    positions: Tensor  # (targets,)
    targets: Tensor  # (targets,)
    tokens: int  # without padding


@dataclass(frozen=True)
class Order:
    """Which examples form each micro-batch of each step.

    rows: the units that are shuffled, each a list of example indices: one example, or several packed ones.
    """

    rows: list[list[int]]
    micro_batch_size: int
    gradient_accumulation_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / (self.micro_batch_size * self.gradient_accumulation_steps))

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        steps = max(1, math.ceil(self.steps_per_epoch * epochs - 1e-9))
        return steps if max_steps is None else min(steps, max_steps)

    def step(self, step: int) -> list[list[int]]:
        """Example indices of each micro-batch of a step, counted from 1. The last step of an epoch may be smaller."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        size = self.micro_batch_size * self.gradient_accumulation_steps
        rows = shuffled[at * size : (at + 1) * size]
        return [
            [example for row in rows[start : start + self.micro_batch_size] for example in self.rows[row]]
            for start in range(0, len(rows), self.micro_batch_size)
        ]


def order_rows(lengths: Sequence[int], *, packing: bool, max_seq_len: int) -> list[list[int]]:
    return pack(lengths, max_seq_len) if packing else [[index] for index in range(len(lengths))]


def collate(examples: Sequence[Example], *, packed: bool, pad_id: int, device: torch.device) -> MicroBatch:
    """Tensors for one forward: all examples on one row, or one padded row each.

    Padding is known by its position, never by its id, so a pad token that equals the end token does no harm.
    """
    if packed:
        ids = torch.tensor([token for example in examples for token in example.ids]).unsqueeze(0)  # (1, tokens)
        inputs = {"input_ids": ids.to(device), **packed_inputs([len(example.ids) for example in examples], device)}
        starts = np.cumsum([0, *(len(example.ids) for example in examples)])
    else:
        width = max(len(example.ids) for example in examples)
        ids = torch.full((len(examples), width), pad_id)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            mask[row, : len(example.ids)] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        starts = np.arange(len(examples)) * width
    positions, targets = [], []
    for start, example in zip(starts, examples, strict=False):
        for at in range(1, len(example.ids)):
            if example.trained[at]:
                positions.append(int(start) + at - 1)
                targets.append(example.ids[at])
    return MicroBatch(
        inputs,
        torch.tensor(positions, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        sum(len(example.ids) for example in examples),
    )


def similar_length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Batches of examples of similar length, each of at most `max_tokens` positions with padding; longest first."""
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        if not batches or width * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches
