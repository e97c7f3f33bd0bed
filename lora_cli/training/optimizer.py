"""Optimizers by name, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_cli.adapters.trained import parameters_by_group
from lora_cli.files import human_bytes
from lora_cli.recipe import TrainRecipe

_LEAST_PAGED = 100_000  # numbers; bitsandbytes 0.50, optim/optimizer.py
_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices for which torch has AdamW as one kernel over all tensors


def make_optimizer(recipe: TrainRecipe, model: nn.Module) -> Any:
    """AdamW over the adapter alone (Loshchilov & Hutter 2019, arXiv:1711.05101), with states as the recipe says.

    Two groups: A, and B with its own learning rate (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
    """
    by_group = parameters_by_group(model)
    groups = [{"params": parameters, **_settings(recipe, name)} for name, parameters in by_group.items()]
    rate, device = recipe.learning_rate, groups[0]["params"][0].device.type
    if recipe.optimizer == "adamw":
        # An adapter is hundreds of small tensors, and a loop over them costs more than the arithmetic.
        fused = device in _FUSED
        return torch.optim.AdamW(groups, lr=rate, fused=fused, foreach=not fused)
    if recipe.optimizer == "schedule_free_adamw":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(groups, lr=rate, warmup_steps=0)  # the warm-up is in learning_rate
        optimizer.train()
        return optimizer
    import bitsandbytes as bnb

    # Paging moves states between GPU and host memory; on a CPU they are in host memory already.
    paged = "Paged" if recipe.optimizer.startswith("paged") and device != "cpu" else ""
    bits = 8 if recipe.optimizer.endswith("8bit") else 32
    return getattr(bnb.optim, f"{paged}AdamW{bits}bit")(groups, lr=rate)


def _settings(recipe: TrainRecipe, group: str) -> dict[str, Any]:
    """What the recipe says of a group of `Trained.parameters_by_group`."""
    ratio = recipe.lora_plus_ratio if group == "B" else 1.0
    return {"betas": (recipe.beta1, recipe.beta2), "weight_decay": recipe.weight_decay, "rate_ratio": ratio}


def apply_settings(optimizer: Any, recipe: TrainRecipe, model: nn.Module) -> None:
    """Give an optimizer that was read from a checkpoint the recipe's settings, where these were changed on purpose."""
    for group, name in zip(optimizer.param_groups, parameters_by_group(model), strict=True):
        group.update(_settings(recipe, name))


def paging_note(name: str, sizes: Sequence[int], device: str) -> str | None:
    """What to know of a paged optimizer with tensors of these sizes: how much of its states can page at all.

    bitsandbytes pages the states of tensors of 100,000 numbers or more; an adapter's are mostly smaller. And it waits
    for the GPU after every tensor, where torch's AdamW is one kernel over all.
    """
    if not name.startswith("paged") or device == "cpu":
        return None
    share = sum(size for size in sizes if size >= _LEAST_PAGED) / sum(sizes)
    spared = f"{share:.0%} of its states can page to host memory" if share else "none of its states can page"
    return (
        f"{name}: {spared} (bitsandbytes pages tensors of {_LEAST_PAGED:,} numbers or more, until the run is resumed); "
        f"optimizer: adamw holds {human_bytes(8 * sum(sizes))} of states on the GPU and is faster"
    )


def state_after_a_step(optimizer: Any) -> dict[str, Any]:
    """The state_dict of an optimizer like this one after a step over zeros: which tensors there are, and their shapes.

    `optimizer` and its parameters stay as they are.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's is one around it
    twin = object.__new__(type(optimizer))
    groups = [
        {**group, "params": [nn.Parameter(torch.zeros_like(each)) for each in group["params"]]}
        for group in optimizer.param_groups
    ]
    vars(twin).update(vars(optimizer), state=defaultdict(dict), param_groups=groups)
    if getattr(twin, "is_paged", False):
        twin.is_paged = False  # where a tensor is does not change what it is
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return twin.state_dict()


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group its multiple of this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """Inside, the adapter holds the weights to judge and to ship: with schedule-free AdamW the average over all steps.

    Afterwards it holds those in training again, bitwise: they are copied back, because computing them from the average
    rounds. Inside itself, and with other optimizers, it does nothing.

    Source: Defazio et al. 2024, arXiv:2405.15682, where the average is x and the gradient is taken at y.
    """
    if not optimizer.param_groups[0].get("train_mode"):  # a key of schedule-free optimizers
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    in_training = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, in_training, strict=True):
                parameter.copy_(value)


def learning_rate(recipe: TrainRecipe, step: int, total_steps: int) -> float:
    """Rate of a step, counted from 1: a linear rise over warmup_ratio of all steps, then the schedule.

    cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one period. Schedule-free AdamW has none.
    """
    warmup = math.ceil(recipe.warmup_ratio * total_steps)
    if step <= warmup:
        return recipe.learning_rate * step / warmup
    if recipe.schedule == "constant" or recipe.optimizer == "schedule_free_adamw":
        return recipe.learning_rate
    # 0 at the first step after warm-up, below 1 at the last
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    falling = 1 - progress if recipe.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    low = recipe.min_learning_rate_ratio
    return recipe.learning_rate * (low + (1 - low) * falling)
