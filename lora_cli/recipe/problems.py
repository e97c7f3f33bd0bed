"""What is wrong with the values of a recipe, in words: what, where, how to fix it."""

from __future__ import annotations

import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lora_cli import limits
from lora_cli.errors import LoraError
from lora_cli.recipe.keys import all_keys, meaning, section_of
from lora_cli.recipe.peers import hint, hints_inside
from lora_cli.recipe.schema import Recipe, SourceRecipe
from lora_cli.recipe.yaml import KeyPath, Places

_EXAMPLES = {  # of settings that have no default
    ("base_model",): "HuggingFaceTB/SmolLM2-135M-Instruct",
    ("data",): "{train: data/train.jsonl}",
    ("data", "train"): "data/train.jsonl",
    ("data", "validation"): "0.05",
    ("output",): "runs/my-run",
}
_WANTED = {  # what pydantic refuses a value for: what it must be
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
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
}


def validate(values: dict[str, Any], places: Places) -> Recipe | list[LoraError]:
    """The recipe of these values, or every problem of them with its place."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        by_key: dict[KeyPath, list[Any]] = {}
        for found in error.errors():
            by_key.setdefault(_known_part(tuple(map(str, found["loc"])), values), []).append(found)
    # What is wrong inside a source says more than that the source is not a fraction either.
    outer = [key for key in by_key if _is_source(key) and any(other[: len(key)] == key != other for other in by_key)]
    return [
        _problem(key, found, values, places, suggest=at < limits.RECIPE_SUGGESTIONS)
        for at, (key, found) in enumerate((key, found) for key, found in by_key.items() if key not in outer)
    ]


def _known_part(loc: KeyPath, values: Any) -> KeyPath:
    """The part of a pydantic location that is in the file: without union members and added list indices."""
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


def _problem(key: KeyPath, found: list[Any], values: dict[str, Any], places: Places, *, suggest: bool) -> LoraError:
    name, where, kind = ".".join(key), places.of(key), found[0]["type"]
    if kind == "extra_forbidden":
        fix = hint(key[-1]) or (_suggest(key) if suggest else None)
        if _is_source(key) and key[-1] in ("template", "template_arguments"):
            fix = f"write data.{key[-1]}: a run has one chat template, for all its sources"
        return LoraError(f"unknown key {name}", where=where, fix=fix, details=hints_inside(found[0]["input"]))
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
    fix = _example(key, value if isinstance(value, str) else "") or "remove it"
    return LoraError(f"{name} is {shown}, but must be {wanted}", where=where, details=_meaning(key), fix=fix)


def _shown(value: Any, longest: int = 200) -> str:
    """A value as JSON, cut after `longest` characters. Without aliases none is much longer than the file."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except TypeError:  # a date as a key, on the right of --set
        text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _wanted(error: Any) -> str:
    named = _WANTED.get(error["type"], "")
    return named.format(**error.get("ctx", {})) or error["msg"][0].lower() + error["msg"][1:]


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
    return [f"{key[-1]}: {meaning(field)}"] if field and field.description else []


def _example(key: KeyPath, found: str = "") -> str:
    """What to write for a setting, for a fix; empty where there is no such setting. found: what was written there."""
    field = _field(key)
    if field is None:
        return ""
    name, section = key[-1], section_of(field.annotation)
    if key in _EXAMPLES:
        return f"write, for example, {name}: {_EXAMPLES[key]}"
    if section is not None:
        settings = [(each, one.default) for each, one in section.model_fields.items() if not one.is_required()]
        first, value = next(each for each in settings if each[1] is not None)
        return f"write it with keys of its own, for example {name}: {{{first}: {json.dumps(value)}}}"
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default is None:
        return f"remove {name}, which may be left out"
    options = [each for each in get_args(field.annotation) if isinstance(each, str)]
    near = difflib.get_close_matches(found[:50], options, n=1)
    return f"write, for example, {name}: {near[0] if near else _shown(default).strip(chr(34))}"


def _suggest(key: KeyPath) -> str:
    section = _field(key[:-1])
    model = SourceRecipe if _is_source(key) else section_of(section.annotation) if section else Recipe
    here = list(model.model_fields) if model else []
    everywhere = {leaf: path for path in all_keys() if (leaf := path[-1])}
    if tuple(key[-1].split(".")) in all_keys():
        section, _, leaf = key[-1].partition(".")
        return f"write {leaf} in the section {section}:, indented"
    wanted = key[-1][:80]  # looking for what is similar takes the square of the length
    for names, cutoff in ({name: (*key[:-1], name) for name in here}, 0.6), (everywhere, 0.75):
        if near := difflib.get_close_matches(wanted, list(names), n=1, cutoff=cutoff):
            return f"did you mean {'.'.join(names[near[0]])}?"
    return f"known keys here: {', '.join(here)}"
