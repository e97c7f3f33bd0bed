"""The loss: summed over target tokens, with logits for those tokens alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_cli.data.batches import MicroBatch


def summed_loss(model: Any, batch: MicroBatch, *, weighted: bool = True) -> Tensor:
    """Sum of the cross-entropy of all target tokens of a micro-batch, in nats, fp32; times their weights if asked for.

    A sum and not a mean: divided once by the target tokens of the whole step, the gradient does not depend on how the
    step is split. The output head sees only the hidden states that predict a target, so logits of prompts and padding
    are never made; what an architecture does to its logits afterwards (soft-capping, scaling) still happens.
    """
    logits = target_logits(model, batch)
    if batch.weights is None or not weighted:
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return (F.cross_entropy(logits.float(), batch.targets, reduction="none") * batch.weights).sum()


def target_logits(model: Any, batch: MicroBatch) -> Tensor:
    """Logits at the positions that predict a target: (targets, vocabulary)."""

    def select(_head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0].flatten(0, 1).index_select(0, batch.positions)  # (targets, hidden)
        return (hidden.unsqueeze(0), *inputs[1:])

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select)
    try:
        logits = model(**batch.inputs, use_cache=False).logits
    finally:
        hook.remove()
    assert logits.shape[:2] == (1, len(batch.targets)), "the output head did not make the logits"
    return logits[0]
