"""What is trained, as a value: the contract between the mathematics of an adapter and everything around it.

Optimizer, checkpoints, adapter file, report, merging, planning and sharding know adapters through `Trained` alone: a
new kind of adapter is a new subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

ALL = slice(None)


class Trained(nn.Module, ABC):
    """A module in the place of one of the base's: `base_layer`, which stays frozen, and what is trained beside it.

    Parameters and buffers that lie directly in this module are the adapter's, those inside `base_layer` the base's. A
    fresh one is neutral: it computes what `base_layer` computes, bit for bit.

    Each module holds one adapter. Several on one base, for use and not for training, are held by `several.py`.
    """

    peft_parts: ClassVar[Mapping[str, int]]  # its tensors in PEFT's layout: name within the module → dimensions
    peft_settings: Mapping[str, Any] = {}  # what adapter_config.json has to say of it
    peft_keys: ClassVar[Collection[str]] = ()  # beside these, what it may say there of each module

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.active = True  # whether forward adds what was trained; see `adapters_disabled`

    @abstractmethod
    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by the optimizer's group: `A`, or `B`, whose learning rate LoRA+ multiplies."""

    def has_gradient(self) -> bool:
        """Whether a gradient of any text arrives here."""
        parameters = [each for group in self.parameters_by_group().values() for each in group]
        return any(each.grad is not None and bool(each.grad.any()) for each in parameters)

    @abstractmethod
    def is_neutral(self) -> bool:
        """Whether the model still computes what its base computes."""

    @abstractmethod
    def merged(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        """The weight of a plain layer that computes the same, in fp32.

        weight: that of `base_layer`, dense, in any dtype: (out_features, in_features), or some `rows` of it, as is the
        result.
        """

    def update_norm(self, weight: Tensor) -> float:
        """Frobenius norm of `merged(weight) - weight`."""
        return torch.linalg.vector_norm(self.merged(weight).detach() - weight.float()).item()

    @abstractmethod
    def to_peft(self, alpha: float) -> dict[str, Tensor]:
        """Tensors as PEFT stores them, by their names within the module, for a file whose lora_alpha is `alpha`."""

    @classmethod
    @abstractmethod
    def of_peft(cls, name: str, tensors: Mapping[str, Tensor], alpha: float, config: Mapping[str, Any]) -> Any:
        """What `attach` makes a module of, for tensors as `to_peft` gives them and PEFT's configuration."""

    @classmethod
    @abstractmethod
    def misfit(cls, base_layer: nn.Module | None, tensors: Mapping[str, Tensor]) -> str | None:
        """Why these tensors cannot be around this layer of the base; None if they can."""

    @abstractmethod
    def from_peft(self, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """A `state`, of tensors as `to_peft` gives them, from a file in which this module's lora_alpha is `alpha`."""

    def state(self) -> dict[str, Tensor]:
        """All that is trained, as it is in training, by parameter name; on the CPU."""
        return {name: each.detach().cpu().contiguous() for name, each in self.named_parameters(recurse=False)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state`, whose names and shapes must be this module's."""
        for name, parameter in self.named_parameters(recurse=False):
            parameter.copy_(state[name])

    def leave_meta(self) -> None:
        """Give what is trained room on the CPU where the base is on the device meta."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.is_meta:
                room = torch.empty_like(parameter, device="cpu")
                setattr(self, name, nn.Parameter(room, requires_grad=parameter.requires_grad))

    def hold_cast(self, dtype: torch.dtype | None) -> None:
        """Keep what is trained in a compute dtype as well, as long as it does not change; None: no longer."""

    def hold_token_keys(self, name: str, tokens: Tensor | None) -> None:
        """Draw dropout for a micro-batch with these keys in a module of this name; None: no longer."""


def trained_modules(model: nn.Module) -> dict[str, Trained]:
    """By the module name that `base_layer` has in the base model, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Trained)}


def parameters_by_group(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All that is trained, by the optimizer's group; within a group in the model's order."""
    groups: dict[str, list[nn.Parameter]] = {}
    for module in trained_modules(model).values():
        for group, parameters in module.parameters_by_group().items():
            groups.setdefault(group, []).extend(parameters)
    return groups


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that is trained, in the model's order."""
    modules = trained_modules(model).values()
    return [each for module in modules for group in module.parameters_by_group().values() for each in group]


def is_neutral(model: nn.Module) -> bool:
    return all(module.is_neutral() for module in trained_modules(model).values())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of every trained module, as `<module>.<parameter>`."""
    modules = trained_modules(model)
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state().items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Go back to what `state_of` gave."""
    for name, module in trained_modules(model).items():
        module.load({key: state[f"{name}.{key}"] for key in module.state()})


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes as its base model."""
    modules = list(trained_modules(model).values())
    before = [module.active for module in modules]
    for module in modules:
        module.active = False
    try:
        yield
    finally:
        for module, active in zip(modules, before, strict=True):
            module.active = active


@contextmanager
def dropout_keys(modules: Mapping[str, Trained], tokens: Tensor | None) -> Iterator[None]:
    """Within this block dropout is drawn for a micro-batch with these token keys: (tokens,) int32, padding included.

    The block must hold the backward pass as well when activations are recomputed in it.
    """
    if tokens is None:  # nothing drops
        yield
        return
    for name, module in modules.items():
        module.hold_token_keys(name, tokens)
    try:
        yield
    finally:
        for name, module in modules.items():
            module.hold_token_keys(name, None)


@contextmanager
def cast_once(modules: Mapping[str, Trained], dtype: torch.dtype) -> Iterator[None]:
    """Within this block nothing that is trained may change: it is cast to the compute dtype once for all."""
    for module in modules.values():
        module.hold_cast(dtype)
    try:
        yield
    finally:
        for module in modules.values():
            module.hold_cast(None)
