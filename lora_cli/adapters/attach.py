"""Putting adapters into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_cli.adapters.layer import LoRALinear, lora_layers
from lora_cli.adapters.targets import Target


def attach(
    model: Any, targets: Sequence[Target], *, dropout: float = 0.0, init: str = "kaiming", seed: int = 0
) -> dict[str, LoRALinear]:
    """Wrap each target layer in a LoRALinear with a fresh A (from `seed`) and B = 0; returns them by module name.

    Everything but A and B is frozen.
    """
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        parent_name, _, child = target.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = LoRALinear(getattr(parent, child), target.rank, target.alpha, dropout, target.output_mask)
        layer.init_A(init, generator)
        layer.train(parent.training)
        setattr(parent, child, layer)
    trained = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return lora_layers(model)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every layer, in the model's order: all that is trained."""
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


def is_inert(model: nn.Module) -> bool:
    """Whether the adapter still changes nothing: every B is zero."""
    return not any(bool(layer.lora_B.any()) for layer in lora_layers(model).values())
