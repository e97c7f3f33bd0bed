"""Which adapters learn from text: tried on the model, because its code may use a layer's weight and not the layer.

An indexer chooses tokens without a gradient, a cross-attention waits for pictures, Mamba multiplies by the weight of
`dt_proj` itself: an adapter there would stay as it began, and its rank and parameters would be counted all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from lora_cli.adapters.trained import Trained, trained_parameters
from lora_cli.base.trials import in_mode, model_errors
from lora_cli.errors import LoraError

_STRUCTURAL = ("attention", "all-linear")  # targets that are chosen here, not named by a person


def unreached(
    model: Any, modules: dict[str, Trained], backward: Callable[[], None], *, name: str | None = None
) -> list[str]:
    """Names of the adapters that get no gradient from `backward`, which computes a loss of text and its gradients.

    In training mode, whose kernels differ; mode and random states are as before. name: of the model, in errors.

    Experts are judged together, in each block: of few tokens not all of them get one. Gradients are gone afterwards.
    """
    parameters = trained_parameters(model)
    for parameter in parameters:
        parameter.grad = None
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    what = f"{name or type(model).__name__} cannot compute a training step"
    with torch.random.fork_rng(list(devices)), in_mode(model, training=True), model_errors(what):
        backward()
    reached = {_beside(name) for name, module in modules.items() if module.has_gradient()}
    for parameter in parameters:
        parameter.grad = None
    return [name for name in modules if _beside(name) not in reached]


def left_out_lines(target_modules: Any, names: list[str], *, some: bool = True) -> list[str]:
    """What to say of adapters that were left out. some: whether others are left.

    Raises LoraError if a person named these layers, or if nothing is left: then it is not for the program to choose.
    """
    kinds = list(dict.fromkeys(kind_of(name) for name in names))
    if not names:
        return []
    if target_modules in _STRUCTURAL and some:
        return [f"{len(names)} layers are left out, because no gradient of text reaches them: {', '.join(kinds)}"]
    patterns = ", ".join(f".*{kind}" if "\\d" in kind else kind for kind in kinds)
    raise LoraError(
        f"no gradient of text reaches {len(names)} of the layers to adapt, which would learn nothing",
        details=[f"layers: {', '.join(kinds)}"],
        fix=f"write adapter.exclude_modules: [{patterns}]" if some else "name other layers in adapter.target_modules",
    )


def kind_of(name: str) -> str:
    """The name of a layer within its block, such as self_attn.q_proj."""
    inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\b\d+\b", r"\\d+", inside)


def _beside(name: str) -> str:
    """The same name for all experts of a block."""
    block = re.match(r".*?\.\d+\.", name)
    return f"{block[0] if block else ''}{kind_of(name)}"
