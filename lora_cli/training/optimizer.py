"""Optimizers by name, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_cli.recipe import TrainRecipe


def make_optimizer(recipe: TrainRecipe, parameters: Sequence[nn.Parameter]) -> Any:
    """AdamW over the adapter alone (Loshchilov & Hutter 2019, arXiv:1711.05101), with states as the recipe says."""
    options = {"lr": recipe.learning_rate, "betas": (recipe.beta1, recipe.beta2), "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes as bnb

    # Paging moves states between GPU and host memory; on a CPU they are in host memory already.
    paged = recipe.optimizer.startswith("paged") and parameters[0].device.type != "cpu"
    if recipe.optimizer.endswith("8bit"):
        return (bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit)(parameters, **options)
    return (bnb.optim.PagedAdamW32bit if paged else bnb.optim.AdamW32bit)(parameters, **options)


def learning_rate(recipe: TrainRecipe, step: int, total_steps: int) -> float:
    """Rate of a step, counted from 1: a linear rise over warmup_ratio of all steps, then the schedule.

    cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one period.
    """
    warmup = math.ceil(recipe.warmup_ratio * total_steps)
    if step <= warmup:
        return recipe.learning_rate * step / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    progress = (step - 1 - warmup) / max(
        1, total_steps - warmup
    )  # 0 at the first step after warm-up, below 1 at the last
    falling = 1 - progress if recipe.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    low = recipe.min_learning_rate_ratio
    return recipe.learning_rate * (low + (1 - low) * falling)
