"""Reading and writing recipe files: positions, overrides, suggestions, paths.

Every problem of a file is found before any is reported, each with its line and column.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lora_cli.errors import LoraError, RecipeErrors
from lora_cli.recipe import PATHS, Recipe, contradictions

KeyPath = tuple[str, ...]
Positions = dict[KeyPath, str]  # where a key stands, such as "run.yaml:3:5" or "--set train.seed"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in `path` with `--set key.path=value` overrides applied, all paths in it made absolute.

    Raises RecipeErrors with every problem: syntax, unknown or mistyped keys, wrong values, contradictions.
    """
    values, positions = _read_yaml(path)
    problems: list[LoraError] = []
    overridden: set[KeyPath] = set()
    for override in overrides or []:
        try:
            key = _apply_override(values, override)
        except LoraError as error:
            problems.append(error)
        else:
            positions[key] = f"--set {'.'.join(key)}"
            overridden.add(key)
    for key_text in PATHS:
        key = tuple(key_text.split("."))
        base = Path.cwd() if key in overridden else path.resolve().parent
        problems += _resolve_path(values, key, base, positions, str(path))
    recipe, found = _validate(values, positions, str(path))
    problems += found
    if problems or recipe is None:
        raise problems[0] if len(problems) == 1 else RecipeErrors(problems)
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """The resolved, complete recipe; reading it back gives an equal one."""
    path.write_text(dump_recipe(recipe), encoding="utf-8")


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """All settings as plain values, defaults included, less those that another setting rules out."""
    values = recipe.model_dump(mode="json")
    if recipe.adapter.target_modules != "attention":
        del values["adapter"]["projections"]
    if recipe.quantization != "nf4":
        del values["double_quantization"]
    return values


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lines `key: old → new` for every setting that differs."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    return [
        f"{'.'.join(key)}: {before.get(key)} → {after.get(key)}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def json_schema() -> str:
    """JSON Schema of the recipe, for editors."""
    schema = Recipe.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora recipe",
    }
    return json.dumps(schema, indent=2)


def _leaves(values: dict[str, Any], at: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    found: list[tuple[KeyPath, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, dict) and key not in ("rank_pattern", "alpha_pattern")
        found += _leaves(value, (*at, key)) if nested else [((*at, key), value)]
    return found


# ── YAML with positions ─────────────────────────────────────────────────────────────────────────────────────────


def _read_yaml(path: Path) -> tuple[dict[str, Any], Positions]:
    if path.is_dir():
        raise LoraError("this is a folder, not a recipe", where=str(path), fix="name the YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoraError("no such recipe", where=str(path), fix=_nearby_file(path)) from None
    except UnicodeDecodeError as error:
        raise LoraError(f"not UTF-8 text (byte {error.start})", where=str(path), fix="save it as UTF-8") from None
    except OSError as error:
        raise LoraError(f"cannot be read: {error.strerror}", where=str(path)) from None
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise LoraError("the recipe is empty", where=str(path), fix="start from one of configs/*.yaml")
        if not isinstance(node, yaml.MappingNode):
            raise LoraError("a recipe is a mapping of keys to values", where=str(path))
        positions: Positions = {}
        _locate(node, (), str(path), positions)
        return loader.construct_document(node), positions
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise LoraError(
            f"not valid YAML: {error.problem}", where=where, fix="check indentation, colons and quotes"
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise LoraError(f"not valid YAML: {error}", where=str(path)) from None


def _nearby_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path(".")
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else "check the path; configs/ holds examples"


def _locate(node: yaml.MappingNode, at: KeyPath, file: str, positions: Positions) -> None:
    for key_node, value_node in node.value:
        mark = key_node.start_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise LoraError("a key must be a plain word", where=where)
        key = (*at, key_node.value)
        if key in positions:
            raise LoraError(
                f"the key {'.'.join(key)} stands twice",
                where=where,
                fix=f"remove one; the other is at {positions[key]}",
            )
        positions[key] = where
        if isinstance(value_node, yaml.MappingNode):
            _locate(value_node, key, file, positions)


# ── overrides and paths ─────────────────────────────────────────────────────────────────────────────────────────


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise LoraError(
            f"--set {override} is not of the form key.path=value", fix="for example --set train.learning_rate=1e-4"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise LoraError(f"--set {override}: the value is not valid YAML", fix="quote it") from None
    at = values
    for part in key[:-1]:
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise LoraError(
                f"--set {override}: {part} is not a section", fix="name a key inside a section, such as train.seed"
            )
    at[key[-1]] = value
    return key


def _resolve_path(values: dict[str, Any], key: KeyPath, base: Path, positions: Positions, file: str) -> list[LoraError]:
    section: Any = values
    for part in key[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    value = section.get(key[-1]) if isinstance(section, dict) else None
    if not isinstance(value, str) or not value:
        return []
    if key == ("data", "validation") and re.fullmatch(r"[\d.eE+-]+", value):
        return []
    expanded = os.path.expanduser(os.path.expandvars(value))
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        where = positions.get(key, file)
        return [
            LoraError(
                f"{'.'.join(key)}: the environment variable {unset[1]} is not set",
                where=where,
                fix=f"export {unset[1]}=…",
            )
        ]
    path = base / expanded
    is_path = key != ("base_model",) or path.exists() or expanded.startswith((".", "/", "~")) or expanded != value
    section[key[-1]] = os.path.normpath(path) if is_path else expanded
    return []


# ── validation ──────────────────────────────────────────────────────────────────────────────────────────────────


def _validate(values: dict[str, Any], positions: Positions, file: str) -> tuple[Recipe | None, list[LoraError]]:
    try:
        recipe, problems = Recipe.model_validate(values), []
    except ValidationError as error:
        by_key = {}
        for found in error.errors():
            key = _known_part(tuple(str(part) for part in found["loc"]), values)
            by_key.setdefault(key, []).append(found)
        problems = [_problem(key, found, values, positions, file) for key, found in by_key.items()]
        recipe = _without(values, by_key)  # what is right can still contradict itself
    if recipe is not None:
        for key_text, what, fix in contradictions(recipe):
            where = positions.get(tuple(key_text.split(".")), file)
            problems.append(LoraError(f"{key_text}: {what}", where=where, fix=fix))
    return recipe, problems


def _known_part(loc: KeyPath, values: Any) -> KeyPath:
    """The part of a pydantic location that names a key: union members and list indices are cut off."""
    key: list[str] = []
    model: type[BaseModel] | None = Recipe
    for part in loc:
        key.append(part)
        field = model.model_fields.get(part) if model else None
        model = _section_of(field.annotation) if field else None
        if model is None:
            break
    return tuple(key)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _without(values: dict[str, Any], keys: Any) -> Recipe | None:
    pruned = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for key in keys:
        section: Any = pruned
        for part in key[:-1]:
            section = section.get(part, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section.pop(key[-1], None)
    data = pruned.get("data")
    pruned["data"] = {"train": "?"} | (data if isinstance(data, dict) else {})
    try:
        return Recipe.model_validate({"base_model": "?", "output": "?"} | pruned)
    except ValidationError:
        return None


def _problem(key: KeyPath, found: list[Any], values: dict[str, Any], positions: Positions, file: str) -> LoraError:
    name, where, kind = ".".join(key), positions.get(key, file), found[0]["type"]
    if kind == "extra_forbidden":
        return LoraError(f"unknown key {name}", where=where, fix=_suggest(key))
    if kind == "missing":
        return LoraError(f"{name} is missing", where=where, fix=f"add it: {_describe(key)}")
    value = found[0]["input"]
    for part in key if len(found) > 1 else ():  # several members of a union refused: show the whole value
        values = values.get(part, {}) if isinstance(values, dict) else {}
        value = values
    shown = json.dumps(value, ensure_ascii=False, default=str)
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in found))
    return LoraError(f"{name} is {shown}, but must be {wanted}", where=where, fix=_describe(key) or None)


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
    }
    bounds = {
        "greater_than": "above",
        "greater_than_equal": "at least",
        "less_than": "below",
        "less_than_equal": "at most",
    }
    if kind in named:
        return named[kind]
    if kind in bounds:
        return f"{bounds[kind]} {context[{'greater_than': 'gt', 'greater_than_equal': 'ge', 'less_than': 'lt', 'less_than_equal': 'le'}[kind]]}"
    if kind == "literal_error":
        return f"one of {context['expected']}"
    return error["msg"][0].lower() + error["msg"][1:]


def _field(key: KeyPath) -> Any:
    model: type[BaseModel] | None = Recipe
    field = None
    for part in key:
        field = model.model_fields.get(part) if model else None
        model = _section_of(field.annotation) if field else None
    return field


def _describe(key: KeyPath) -> str:
    field = _field(key)
    return f"{key[-1]}: {field.description}" if field and field.description else ""


def _suggest(key: KeyPath) -> str:
    section = _field(key[:-1])
    model = _section_of(section.annotation) if section else Recipe
    here = list(model.model_fields) if model else []
    everywhere = {leaf: path for path in all_keys() if (leaf := path[-1])}
    near_here = difflib.get_close_matches(key[-1], here, n=1, cutoff=0.6)
    if near_here:
        return f"did you mean {'.'.join((*key[:-1], near_here[0]))}?"
    near = difflib.get_close_matches(key[-1], list(everywhere), n=1, cutoff=0.75)
    if near:
        return f"did you mean {'.'.join(everywhere[near[0]])}?"
    return f"known keys here: {', '.join(here)}"


def all_keys() -> list[KeyPath]:
    """Every setting of the recipe, sections left out."""
    found: list[KeyPath] = []
    for name, field in Recipe.model_fields.items():
        section = _section_of(field.annotation)
        found += [(name, inner) for inner in section.model_fields] if section else [(name,)]
    return found
