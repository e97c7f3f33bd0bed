"""The keys of a recipe: which there are, the section that holds each, and which may hold paths."""

from __future__ import annotations

import re
from typing import Any

from pydantic.fields import FieldInfo

from lora_cli.recipe.schema import NUMBER, Recipe, Section

_PATHS: list[tuple[str, ...]] = [("data", name) for name in ("template", "general_text", "cache")]
_PATHS += [("train", "samples"), ("output",), ("base_model",), ("tokenizer",)]


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def meaning(field: FieldInfo) -> str:
    """What a setting means, on one line."""
    return " ".join((field.description or "").split())


def all_keys() -> list[tuple[str, ...]]:
    """Every setting of the recipe, sections left out."""
    found: list[tuple[str, ...]] = []
    for name, field in Recipe.model_fields.items():
        section = section_of(field.annotation)
        found += [(name, inner) for inner in section.model_fields] if section else [(name,)]
    return found


def holder_of(key: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """The section of a recipe's values that a key belongs to; an empty one where it is missing or not a section."""
    holder: Any = values
    for part in key[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    return holder if isinstance(holder, dict) else {}


def path_places(values: dict[str, Any]) -> list[tuple[Any, Any, tuple[str, ...]]]:
    """(container, key in it, key path) of every text in the recipe's values that may be a path."""
    places: list[tuple[Any, Any, tuple[str, ...]]] = []
    for key in _PATHS:
        places.append((holder_of(key, values), key[-1], key))
    data = holder_of(("data", ""), values)
    for name in ("train", "validation"):
        entry = data.get(name)
        places.append((data, name, ("data", name)))
        places += [(entry, "path", ("data", name, "path"))] if isinstance(entry, dict) else []
        for at, item in enumerate(entry if isinstance(entry, list) else []):
            key = ("data", name, str(at))
            places.append((item, "path", (*key, "path")) if isinstance(item, dict) else (entry, at, key))
    return [
        (section, name, key)
        for section, name, key in places
        if (isinstance(section, list) or name in section)
        and isinstance(section[name], str)
        and section[name]
        and not (key == ("data", "validation") and NUMBER.fullmatch(section[name]))
        and not (key == ("data", "template") and re.fullmatch(r"[\w-]+", section[name]))
    ]
