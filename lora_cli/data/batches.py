"""Micro-batches: the tensors that a model is given for some examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.adapters.dropout import token_keys
from lora_cli.base.attention import packed_inputs
from lora_cli.data.example import Example


@dataclass(frozen=True)
class MicroBatch:
    """What one forward gets. inputs: the model's keyword arguments. targets: ids of the tokens to predict, flat.

    positions: for each target, the flat index (row · tokens + column) of the token before it, whose hidden state
    predicts it. weights: of the loss on each target; None where all are 1.
    """

    inputs: dict[str, Any]
    positions: Tensor  # (targets,)
    targets: Tensor  # (targets,)
    weights: Tensor | None  # (targets,)
    tokens: int  # without padding
    dropout_keys: Tensor | None = None  # (rows · tokens,) int32, padding included


def collate(
    examples: Sequence[Example],
    *,
    packed: bool,
    pad_id: int,
    device: torch.device,
    dropout: tuple[int, int] | None = None,
) -> MicroBatch:
    """Tensors for one forward: all examples on one row, or one padded row each.

    Padding is known by its position, never by its id, so a pad token that equals the end token does no harm. dropout:
    seed and step to draw dropout for.
    """
    lengths = [len(example.ids) for example in examples]
    if packed:
        ids = np.concatenate([np.asarray(example.ids) for example in examples])[None]  # (1, tokens)
        inputs = packed_inputs(lengths, device)
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        width = max(lengths)
        ids = np.full((len(examples), width), pad_id)
        mask = np.zeros((len(examples), width), np.int64)
        for row, example in enumerate(examples):
            ids[row, : lengths[row]] = example.ids
            mask[row, : lengths[row]] = 1
        inputs = {"attention_mask": torch.from_numpy(mask).to(device)}
        starts = np.arange(len(examples)) * width
    weights = [example.weights for example in examples]
    targets = [np.flatnonzero(weight[1:]) + 1 for weight in weights]  # the first token has nothing before it
    positions = np.concatenate([start + at - 1 for start, at in zip(starts, targets, strict=True)])
    aimed = np.concatenate([np.asarray(e.ids)[at] for e, at in zip(examples, targets, strict=True)])
    weight = np.concatenate([each[at] for each, at in zip(weights, targets, strict=True)])

    keys = None
    if dropout is not None:
        keys = np.ones(ids.shape, np.int32)
        for row, example in enumerate(examples):
            at = (0, slice(starts[row], starts[row] + lengths[row])) if packed else (row, slice(0, lengths[row]))
            keys[at] = token_keys(*dropout, np.asarray(example.ids))

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    return MicroBatch(
        {"input_ids": tensor(ids), **inputs},
        tensor(positions),
        tensor(aimed),
        None if (weight == 1).all() else torch.from_numpy(weight).to(device),
        sum(lengths),
        None if keys is None else torch.from_numpy(keys.reshape(-1)).to(device),
    )


def similar_length_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Batches of examples of similar length, each of at most `max_tokens` positions with padding; longest first."""
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        if not batches or width * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches
