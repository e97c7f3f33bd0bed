"""A model that computes without its weights in memory: those of a decoder block are read when it is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_cli.base.linear import stored_transposed
from lora_cli.merging.streamed import Skeleton


class _Place(NamedTuple):
    """A parameter: its module, its name there, and in the model without adapters."""

    module: nn.Module
    key: str
    name: str


def compute_in_place(found: Skeleton, dtype: torch.dtype | None) -> Any | None:
    """The skeleton's model, which computes in fp32 on the CPU; one block at a time is in memory.

    dtype: what weights are rounded to that are not quantized, as where the model is loaded in it. Nothing where a
    parameter is not stored as one tensor of its own. What the model's code reads past its modules' calls is NaN.
    """
    model: Any = found.model
    one_of = {id(_get(model, now)): name for name, now in found.places.parameters.items() if name in found.own}
    units = [
        (unit, [_Place(each, key, one_of.get(id(value), "")) for each in modules for key, value in _on_meta(each)])
        for unit, modules in _units(model)
    ]
    if not all(place.name for _, places in units for place in places):
        return None
    for name, now in found.places.parameters.items():
        if name in found.own and not isinstance(buffer := _get(model, now), nn.Parameter):
            buffer.copy_(found.read(found.own[name]))
    for unit, places in (each for each in units if each[1]):
        _empty(places)
        unit.register_forward_pre_hook(lambda *_, places=places: _fill(found, dtype, places))
        unit.register_forward_hook(lambda *_, places=places: _empty(places), always_call=True)
    return model.eval()


def _get(model: Any, name: str) -> Tensor:
    module, _, key = name.rpartition(".")
    return getattr(model.get_submodule(module), key)


def _on_meta(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((key, value) for key, value in module.named_parameters(recurse=False) if value.is_meta)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[nn.Module]]]:
    """What is read together: the members of the outermost lists whole, outside them each module's own parameters."""
    yield module, [module]
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from ((block, list(block.modules())) for block in child)
        else:
            yield from _units(child)


def _fill(found: Skeleton, dtype: torch.dtype | None, places: Sequence[_Place]) -> None:
    for module, key, name in places:
        layer, _, last = name.rpartition(".")
        if last == "weight":
            value = found.weight_of(module, layer)[:]
            value = value.T if stored_transposed(module) else value
        else:
            value = found.read(found.own[name])
        quantized = last == "weight" and layer in found.rounded  # its bias is not
        if dtype is not None and not quantized:
            value = value.to(dtype)
        setattr(module, key, nn.Parameter(value.float(), requires_grad=False))


def _empty(places: Sequence[_Place]) -> None:
    for module, key, _ in places:
        shape = getattr(module, key).shape
        setattr(module, key, nn.Parameter(torch.tensor(torch.nan).expand(shape), requires_grad=False))
