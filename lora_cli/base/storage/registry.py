"""All ways of storing weights, asked by a recipe's word, by module, or by what a checkpoint says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_cli.base.storage.bnb4 import Bnb4
from lora_cli.base.storage.bnb8 import Bnb8
from lora_cli.base.storage.int4 import Int4
from lora_cli.base.storage.kind import Storage
from lora_cli.base.storage.plain import Plain
from lora_cli.base.storage.q8_0 import AsInFile

PLAIN, INT4, AS_IN_FILE = Plain(), Int4(), AsInFile()
KINDS: tuple[Storage, ...] = (Bnb4(), Bnb8(), INT4, AS_IN_FILE, PLAIN)
_BY_NAME = {kind.name: kind for kind in KINDS}


def storage_named(quantization: str) -> Storage:
    """By the word of a recipe or an adapter file."""
    return _BY_NAME[quantization]


def is_known(quantization: str | None) -> bool:
    return quantization in _BY_NAME


def storage_of(module: nn.Module) -> Storage | None:
    """How a linear layer stores its weight; None of a module that is not one that an adapter can wrap."""
    return next((kind for kind in KINDS if kind.is_layer(module)), None)


def storage_stated(settings: dict[str, Any]) -> str | None:
    """What a checkpoint's quantization_config says, in the word of a recipe; of others, their own; None if nothing."""
    own = (kind.stated(settings) for kind in KINDS)
    method = settings.get("quant_method")
    return next((name for name in own if name), method if isinstance(method, str) and method else None)


@dataclass(frozen=True)
class Part:
    """A tensor that a checkpoint stores beside a weight, by names of tensors. name: which part it is."""

    kind: Storage
    weight: str
    name: str


def part_of(name: str) -> Part | None:
    """What a stored tensor of this name is part of; None for weights, and for tensors that belong to none."""
    found = ((kind, kind.beside(name)) for kind in KINDS)
    return next((Part(kind, *names) for kind, names in found if names is not None), None)
