"""The loss: summed over target tokens, with logits for those tokens alone, a chunk of them at a time."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_cli.base.cross_entropy import LogitRule, cross_entropy_of_each, linear_cross_entropy
from lora_cli.base.text import text_config
from lora_cli.base.trials import same_logits, with_head_hook
from lora_cli.data.batches import MicroBatch

_rules: WeakKeyDictionary[Any, LogitRule | None] = WeakKeyDictionary()


def summed_loss(model: Any, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropy of all target tokens of a micro-batch, times their weights, in nats, fp32.

    A sum and not a mean: divided once by the target tokens of the whole step, the gradient does not depend on how the
    step is split. The output head sees only the hidden states that predict a target, so logits of prompts and padding
    are never made.
    """
    return training_loss(model, batch)[0]


def training_loss(model: Any, batch: MicroBatch, *, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """(what is minimized, the cross-entropy in it), both as `summed_loss`. z_loss: see `linear_cross_entropy`."""
    weights, rule = batch.weights, logit_rule(model)
    if rule is not None:
        head, hidden = model.get_output_embeddings(), _target_hidden(model, batch)
        return linear_cross_entropy(head, hidden, batch.targets, weights, rule=rule, z_loss=z_loss)
    logits = target_logits(model, batch).float()
    cross_entropy = F.cross_entropy(logits, batch.targets, reduction="none")
    loss = cross_entropy + z_loss * logits.logsumexp(-1) ** 2 if z_loss else cross_entropy
    if weights is not None:
        loss, cross_entropy = loss * weights, cross_entropy * weights
    return loss.sum(), cross_entropy.detach().sum()


@torch.no_grad()
def target_losses(model: Any, batch: MicroBatch) -> Tensor:
    """Cross-entropy of each target of a micro-batch, in nats: (targets,) in fp32, unweighted, without a gradient."""
    rule = logit_rule(model)
    if rule is None:
        return F.cross_entropy(target_logits(model, batch).float(), batch.targets, reduction="none")
    head = model.get_output_embeddings()
    return cross_entropy_of_each(head, _target_hidden(model, batch), batch.targets, rule=rule)


def target_logits(model: Any, batch: MicroBatch) -> Tensor:
    """Logits at the positions that predict a target, by the model's own code: (targets, vocabulary).

    Where the head does not take the hidden state of each token, as ProphetNet's takes those of several streams, logits
    of all tokens are made.
    """
    tokens = batch.inputs["input_ids"].shape

    def select(_head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if inputs[0].shape[:-1] != tokens:
            return inputs
        hidden = inputs[0].flatten(0, 1).index_select(0, batch.positions)  # (targets, hidden)
        return (hidden.unsqueeze(0), *inputs[1:])

    logits = with_head_hook(model, select, batch.inputs).logits
    if logits.shape[:2] == (1, len(batch.targets)):
        return logits[0]
    assert logits.shape[:2] == tokens, "the model gives no logits for each token"
    return logits.flatten(0, 1).index_select(0, batch.positions)


def logit_rule(model: Any) -> LogitRule | None:
    """What the model does to its head's output, tried on the model; None if it is unknown here.

    Then the model's own code makes the logits of all targets at once: as correct, but it takes more memory.
    """
    if model not in _rules:
        rule = _stated_rule(text_config(model.config))
        _rules[model] = rule if same_logits(model, rule.apply_) else None
    return _rules[model]


def _stated_rule(config: Any) -> LogitRule:
    multiplier = getattr(config, "logit_scale", None) or 1.0  # Cohere
    multiplier *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    multiplier /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    return LogitRule(multiplier, next((cap for name in caps if (cap := getattr(config, name, None))), None))


def _target_hidden(model: Any, batch: MicroBatch) -> Tensor:
    """Hidden states that predict a target, as the output head would get them: (targets, hidden)."""
    taken: list[Tensor] = []

    def take(_head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(inputs[0].flatten(0, 1).index_select(0, batch.positions))
        return (inputs[0][:, :0], *inputs[1:])  # the head gets no tokens

    with_head_hook(model, take, batch.inputs)
    return taken[0]
