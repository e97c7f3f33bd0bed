"""Settings that no longer exist. Recipes that name them are still around: a run folder stores every setting."""

from __future__ import annotations

from typing import Any, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.recipe.keys import holder_of
from lora_cli.recipe.yaml import KeyPath, Places


class Retired(NamedTuple):
    """default: the value with which the setting did nothing. instead: what to write now, for a fix."""

    default: Any
    instead: str


RETIRED: dict[KeyPath, Retired] = {
    ("train", "offload_activations"): Retired(
        False,
        "remove it, which does not change the result; to save memory write train.gradient_checkpointing: selective",
    )
}


def drop_retired(values: dict[str, Any], places: Places) -> list[LoraError]:
    """Remove retired settings from a recipe's values; returns an error for each that was not at its default."""
    problems: list[LoraError] = []
    for key, (default, instead) in RETIRED.items():
        if holder_of(key, values).pop(key[-1], default) != default:
            problems.append(LoraError(f"{'.'.join(key)} is no longer a setting", where=places.of(key), fix=instead))
    return problems
