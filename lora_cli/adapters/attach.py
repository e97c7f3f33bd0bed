"""Putting adapters into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lora_cli.adapters.layer import Target
from lora_cli.adapters.trained import Trained, trained_modules, trained_parameters


def attach(
    model: Any, targets: Sequence[Target], *, dropout: float = 0.0, init: str = "kaiming", seed: int = 0
) -> dict[str, Trained]:
    """Wrap each target layer in a fresh adapter, drawn from `seed`; returns these by module name.

    Everything but what is trained is frozen.
    """
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        base_layer = model.get_submodule(target.name)
        model.set_submodule(target.name, target.wrap(base_layer, dropout, init, generator))
    trained = {id(parameter) for parameter in trained_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return trained_modules(model)


def leave_out(model: Any, names: Iterable[str]) -> dict[str, Trained]:
    """Take these adapters out again; returns the others."""
    for name in names:
        model.set_submodule(name, model.get_submodule(name).base_layer)
    return trained_modules(model)
