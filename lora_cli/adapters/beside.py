"""Layers beside each other, such as q, k and v: one tensor is the input of all, and what they compute of it is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.trained import Trained


@contextmanager
def watch_inputs(modules: Iterable[Trained]) -> Iterator[list[list[LoRALinear]]]:
    """Within this context, see which layers get the same tensor, in the order of their calls.

    The list is complete when the context ends. A layer that is called with others at one time and without them at
    another is in none of its groups.
    """
    calls: dict[int, list[LoRALinear]] = {}
    alive: list[Tensor] = []  # so that no other tensor takes the place of one that is gone
    groups: list[list[LoRALinear]] = []

    def note(layer: Any, inputs: tuple[Any, ...]) -> None:
        calls.setdefault(id(inputs[0]), []).append(layer)
        alive.append(inputs[0])

    handles = [each.register_forward_pre_hook(note) for each in modules if isinstance(each, LoRALinear)]
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()
    found = {tuple(map(id, layers)): layers for layers in calls.values()}  # again the same in a second forward pass
    times = Counter(each for layers in found for each in layers)
    groups.extend(found[layers] for layers in found if len(layers) > 1 and all(times[each] == 1 for each in layers))


def join(groups: Iterable[list[LoRALinear]], modules: Iterable[Trained]) -> None:
    """Let the first layer of each group compute A x for all of those that are still among these modules."""
    held = {id(each) for each in modules}
    for group in groups:
        layers = [each for each in group if id(each) in held]
        for each in layers:
            each.beside = layers
