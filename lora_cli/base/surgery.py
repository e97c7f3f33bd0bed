"""The one way in which a module's forward is replaced: layer by layer, in an order that is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]

# From the module's own code outwards: compiling sees the kernels, and checkpointing recomputes what was compiled.
LAYERS = ("kernel", "recomputation", "compilation", "checkpointing")
_RECORD = "_forward_layers"


def replace_forward(module: nn.Module, layer: str, make: Callable[[Forward], Forward]) -> None:
    """Put `make(module.forward)` in place of a module's forward. layer: which of LAYERS this is.

    Raises ValueError where that layer, or one further out, is in place already.
    """
    before = forward_layers(module)
    if before and LAYERS.index(layer) <= LAYERS.index(before[-1]):
        raise ValueError(f"{type(module).__name__}.forward has {before[-1]} already: {layer} comes too late")
    module.forward = make(module.forward)
    vars(module)[_RECORD] = (*before, layer)


def forward_layers(module: nn.Module) -> tuple[str, ...]:
    """Which of LAYERS lie around a module's own forward, from the inside out."""
    return vars(module).get(_RECORD, ())
