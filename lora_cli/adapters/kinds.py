"""The kinds of trained modules that an adapter file may hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.qa_lora import QALoRALinear
from lora_cli.adapters.trained import Trained

KINDS: dict[str, type[Trained]] = {
    "lora": LoRALinear,
    "qa_lora": QALoRALinear,
}  # by the `method` of the file's metadata
PARTS = {name: dimensions for kind in KINDS.values() for name, dimensions in kind.peft_parts.items()}
SETTINGS = {key for kind in KINDS.values() for key in kind.peft_settings}
COMPUTED = SETTINGS.union(*(kind.peft_keys for kind in KINDS.values()))  # settings of PEFT that some kind stands for


def kind_of(parts: Collection[str], config: Mapping[str, Any]) -> type[Trained] | None:
    """The kind of module that has exactly these tensors in PEFT's layout, and these settings in adapter_config.json."""
    said = {key: config[key] for key in SETTINGS if config.get(key)}
    found = (each for each in KINDS.values() if each.peft_parts.keys() == set(parts) and each.peft_settings == said)
    return next(found, None)
