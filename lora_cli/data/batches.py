"""Micro-batches: the tensors that a model is given for some examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.adapters.dropout import token_keys
from lora_cli.base.attention import packed_inputs
from lora_cli.data.example import Example
from lora_cli.data.order import Groups, sizes_that_fit


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

    def pinned(self) -> MicroBatch:
        """The same in memory of the host that a GPU reads by itself, so that nothing waits for the copy."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; to a GPU without waiting for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        def changed(values: dict[str, Any]) -> dict[str, Any]:
            return {name: change(each) if isinstance(each, Tensor) else each for name, each in values.items()}

        return replace(self, **changed(vars(self)) | {"inputs": changed(self.inputs)})


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
    lengths = np.array([len(example.ids) for example in examples])
    width = int(lengths.sum() if packed else lengths.max())
    starts = np.cumsum(lengths) - lengths if packed else np.arange(len(examples)) * width
    places = np.concatenate([np.arange(length) + start for start, length in zip(starts, lengths, strict=True)])

    def flat(values: Sequence[Any], padding: int) -> np.ndarray:
        """One value a token of each example, on their rows: (rows · tokens,)."""
        own = np.concatenate(values)
        rows = np.full(width * (1 if packed else len(examples)), padding, own.dtype)
        rows[places] = own
        return rows

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    own_ids = [np.asarray(example.ids, np.int64) for example in examples]
    ids = flat(own_ids, pad_id)
    weights = flat([example.weights for example in examples], 0)
    weights[starts] = 0  # the first token of an example has nothing before it
    targets = np.flatnonzero(weights)
    if packed:
        inputs = packed_inputs(lengths.tolist(), device)
    else:
        mask = flat([np.ones_like(each) for each in own_ids], 0)
        inputs = {"attention_mask": tensor(mask.reshape(-1, width))}
    keys = None if dropout is None else flat([token_keys(*dropout, each) for each in own_ids], 1)
    return MicroBatch(
        {"input_ids": tensor(ids.reshape(-1, width)), **inputs},
        tensor(targets - 1),
        tensor(ids[targets]),
        None if (weights[targets] == 1).all() else tensor(weights[targets]),
        int(lengths.sum()),
        None if keys is None else tensor(keys),
    )


def similar_length_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Batches of examples of similar length, each of at most `max_tokens` positions with padding; longest first."""
    lengths = np.asarray(lengths)
    longest_first = np.argsort(-lengths, kind="stable")
    batches = Groups(longest_first, np.cumsum(sizes_that_fit(lengths[longest_first], max_tokens), dtype=np.int64))
    return [batches[at] for at in range(len(batches))]
