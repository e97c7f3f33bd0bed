"""What is wrong with the values of a recipe, in words: what, where, how to mend it."""

from __future__ import annotations

import copy
import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lora_cli import limits
from lora_cli.errors import LoraError
from lora_cli.recipe.contradictions import contradictions
from lora_cli.recipe.schema import Recipe, SourceRecipe, all_keys, section_of
from lora_cli.recipe.yaml import KeyPath, Positions, where_of

_EXAMPLES = {  # of settings that have no default
    ("base_model",): "HuggingFaceTB/SmolLM2-135M-Instruct",
    ("data",): "{train: data/train.jsonl}",
    ("data", "train"): "data/train.jsonl",
    ("data", "validation"): "0.05",
    ("output",): "runs/my-run",
}


def validate(values: dict[str, Any], positions: Positions, file: str) -> tuple[Recipe | None, list[LoraError]]:
    """The recipe of these values if it has none of the problems, which come with their places."""
    try:
        recipe, problems = Recipe.model_validate(values), []
    except ValidationError as error:
        by_key = {}
        for found in error.errors():
            key = _known_part(tuple(str(part) for part in found["loc"]), values)
            by_key.setdefault(key, []).append(found)
        for key in [
            key
            for key in by_key
            if _is_source(key) and any(other[: len(key)] == key for other in by_key if other != key)
        ]:
            del by_key[key]  # what is wrong inside a source says more than that it is no fraction either
        problems = [
            _problem(key, found, values, positions, file, suggest=at < limits.RECIPE_SUGGESTIONS)
            for at, (key, found) in enumerate(by_key.items())
        ]
        recipe = _without(values, by_key)  # what is right can still contradict itself
    if recipe is not None:
        for key_text, what, fix in contradictions(recipe):
            where = where_of(tuple(key_text.split(".")), positions, file)
            problems.append(LoraError(f"{key_text}: {what}", where=where, fix=fix))
    return recipe, problems


def _known_part(loc: KeyPath, values: Any) -> KeyPath:
    """The part of a pydantic location that stands in the file: without union members and added list indices."""
    known: KeyPath = ()
    for part in loc:
        if isinstance(values, dict) and part in values:
            known, values = (*known, part), values[part]
        elif isinstance(values, list) and part.isdigit() and _is_source((*known, part)):
            known, values = (*known, part), values[int(part)]
        elif isinstance(values, dict) and not part.isdigit() and _field((*known, part)) is not None:
            return (*known, part)  # a missing key is named too
    return known


def _is_source(key: KeyPath) -> bool:
    return key[:2] in (("data", "train"), ("data", "validation"))


def _without(values: dict[str, Any], keys: Any) -> Recipe | None:
    pruned = copy.deepcopy(values)
    for key in keys:
        section: Any = pruned
        for part in key[: min(len(key), 2) - 1]:  # a setting goes as a whole, such as data.train with all its sources
            section = section.get(part, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section.pop(key[min(len(key), 2) - 1], None)
    data = pruned.get("data")
    pruned["data"] = {"train": "?"} | (data if isinstance(data, dict) else {})
    try:
        return Recipe.model_validate({"base_model": "?", "output": "?"} | pruned)
    except ValidationError:
        return None


def _problem(
    key: KeyPath, found: list[Any], values: dict[str, Any], positions: Positions, file: str, *, suggest: bool
) -> LoraError:
    name, where, kind = ".".join(key), where_of(key, positions, file), found[0]["type"]
    if kind == "extra_forbidden":
        return LoraError(f"unknown key {name}", where=where, fix=_suggest(key) if suggest else None)
    if kind == "missing":
        fix = _example(key).replace("write", "add", 1)
        return LoraError(f"{name} is missing", where=where, details=_meaning(key), fix=fix)
    value = found[0]["input"]
    whole: Any = values
    for part in key if len(found) > 1 else ():  # several members of a union refused: show the whole value
        if isinstance(whole, list | dict):
            value = whole = whole[int(part)] if isinstance(whole, list) else whole.get(part)
    shown = _shown(value)
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in found))
    what = f"{name} is {shown}, but must be {wanted}"
    return LoraError(
        what,
        where=where,
        details=_meaning(key),
        fix=_example(key, value if isinstance(value, str) else "") or "remove it",
    )


def _shown(value: Any, longest: int = 200) -> str:
    """A value as JSON, cut after about `longest` characters.

    Made piece by piece: aliases of YAML can make a value that is written out too long for any memory, or without end.
    """
    if isinstance(value, str):
        return json.dumps(value[:longest], ensure_ascii=False) + ("…" if len(value) > longest else "")
    if not isinstance(value, (list, tuple, dict)):
        try:
            return json.dumps(value, ensure_ascii=False, default=str)[: longest + 1]
        except ValueError:  # a whole number of thousands of digits
            return "a number too long to show"
    pairs: Any = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    pieces: list[str] = []
    for key, inner in pairs:
        left = longest - sum(map(len, pieces)) - 4 * len(pieces)
        if left < 4:
            pieces.append("…")
            break
        name = "" if key is None else f"{_shown(str(key), left // 2)}: "
        pieces.append(name + _shown(inner, left // 2))
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + ", ".join(pieces) + closing


def _wanted(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    named = {
        "int_type": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a section with keys of its own",
        "model_attributes_type": "a section with keys of its own",
        "none_required": "nothing",
        "finite_number": "a finite number",
        "too_short": "not empty",
        "string_too_short": "not empty",
    }
    bounds = {
        "greater_than": ("above", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("below", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in named:
        return named[kind]
    if kind in bounds:
        word, name = bounds[kind]
        return f"{word} {context[name]}"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    return error["msg"][0].lower() + error["msg"][1:]


def _field(key: KeyPath) -> Any:
    model: type[BaseModel] | None = Recipe
    field = None
    for part in key:
        if part.isdigit() and model is SourceRecipe:
            continue
        field = model.model_fields.get(part) if model else None
        model = section_of(field.annotation) if field else None
        if _is_source(key) and part == key[1]:
            model = SourceRecipe
    return field


def _meaning(key: KeyPath) -> list[str]:
    """What the setting means, for the details of an error; nothing where there is no such setting."""
    field = _field(key) or _field(key[:-1])
    return [f"{key[-1]}: {field.description}"] if field and field.description else []


def _example(key: KeyPath, found: str = "") -> str:
    """What to write for a setting, for a fix; empty where there is no such setting. found: what was written there."""
    field = _field(key)
    if field is None:
        return ""
    name, section = key[-1], section_of(field.annotation)
    if key in _EXAMPLES:
        return f"write, for example, {name}: {_EXAMPLES[key]}"
    if section is not None:
        return f"write it with keys of its own, for example {name}: {{{_first_setting(section)}}}"
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default is None:
        return f"remove {name}, which may be left out"
    options = [each for each in get_args(field.annotation) if isinstance(each, str)]
    near = difflib.get_close_matches(found[:50], options, n=1)
    return f"write, for example, {name}: {near[0] if near else _shown(default).strip(chr(34))}"


def _first_setting(section: type[BaseModel]) -> str:
    return next(
        f"{name}: {json.dumps(field.default)}"
        for name, field in section.model_fields.items()
        if not field.is_required() and field.default is not None
    )


def _suggest(key: KeyPath) -> str:
    section = _field(key[:-1])
    model = SourceRecipe if _is_source(key) else section_of(section.annotation) if section else Recipe
    here = list(model.model_fields) if model else []
    everywhere = {leaf: path for path in all_keys() if (leaf := path[-1])}
    key = (*key[:-1], key[-1][:80])  # looking for what is similar takes the square of the length
    near_here = difflib.get_close_matches(key[-1], here, n=1, cutoff=0.6)
    if near_here:
        return f"did you mean {'.'.join((*key[:-1], near_here[0]))}?"
    near = difflib.get_close_matches(key[-1], list(everywhere), n=1, cutoff=0.75)
    if near:
        return f"did you mean {'.'.join(everywhere[near[0]])}?"
    return f"known keys here: {', '.join(here)}"
