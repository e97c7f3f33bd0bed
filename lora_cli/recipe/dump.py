"""Writing a recipe down: complete, and so that reading it back gives an equal one."""

from __future__ import annotations

import json
from typing import Any

import yaml

from lora_cli.recipe.contradictions import idle_keys
from lora_cli.recipe.keys import holder_of, path_places
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.yaml import KeyPath

_MAPPINGS = ("rank_pattern", "alpha_pattern")  # settings that are one value


def dump_recipe(recipe: Recipe) -> str:
    """The resolved, complete recipe as YAML; reading it back gives an equal one."""
    values = recipe_values(recipe)
    for section, name, _ in path_places(values):
        section[name] = section[name].replace("$", "$$")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """All settings as plain values, defaults included, except those that another setting makes idle."""
    values = recipe.model_dump(mode="json")
    for key in idle_keys(recipe):
        holder_of(key, values).pop(key[-1], None)
    return values


def differences(old: Recipe, new: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """(key, value in old, value in new) of every setting that differs."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    return [(key, before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)]


def json_schema() -> str:
    """JSON Schema of the recipe, for editors."""
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lora recipe"}
    return json.dumps(Recipe.model_json_schema() | named, indent=2).replace("\\n", " ")  # line ends inside descriptions


def _leaves(values: dict[str, Any], at: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    found: list[tuple[KeyPath, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, dict) and key not in _MAPPINGS and at != ("data",)  # a source is one value
        found += _leaves(value, (*at, key)) if nested else [((*at, key), value)]
    return found
