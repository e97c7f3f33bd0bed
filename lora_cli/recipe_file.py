"""Reading and writing recipe files: positions, overrides, suggestions, paths.

Every problem of a file is found before any is reported, each with its line and column.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lora_cli.contradictions import contradictions
from lora_cli.errors import LoraError, RecipeErrors
from lora_cli.files import human_bytes, require_regular
from lora_cli.recipe import NUMBER, PATHS, Recipe, SourceRecipe

_LARGEST_RECIPE = 256 << 10  # bytes; every layer of the largest models can be named in that
# What PyYAML lets through of a value that looks like a date or is tagged as a number, and is none
_NO_VALUE = (ValueError, LookupError, TypeError, AttributeError)

_DEEPEST = 255  # parts of a path; the standard library makes missing folders by recursion

KeyPath = tuple[str, ...]
Positions = dict[KeyPath, str]  # where a key stands, such as "run.yaml:3:5" or "--set train.seed"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in `path` with `--set key.path=value` overrides applied, all paths in it made absolute.

    Raises RecipeErrors with every problem: syntax, unknown or mistyped keys, wrong values, contradictions.
    """
    values, positions, problems = _read_yaml(path)
    overridden: set[KeyPath] = set()
    for override in overrides or []:
        try:
            key = _apply_override(values, override)
        except LoraError as error:
            problems.append(error)
        else:
            positions[key] = f"--set {'.'.join(key)}"
            overridden.add(key)
    for section, name, key in _path_places(values):
        base = Path.cwd() if any(key[: len(known)] == known for known in overridden) else path.resolve().parent
        problems += _resolve_path(section, name, key, base, positions, str(path))
    recipe, found = _validate(values, positions, str(path))
    problems += found
    if problems or recipe is None:
        raise problems[0] if len(problems) == 1 else RecipeErrors(sorted(problems, key=_place))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved, complete recipe as YAML; reading it back gives an equal one."""
    values = recipe_values(recipe)
    for section, name, _ in _path_places(values):
        section[name] = section[name].replace("$", "$$")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """All settings as plain values, defaults included, less those that another setting rules out."""
    values = recipe.model_dump(mode="json")
    if recipe.adapter.target_modules != "attention":
        del values["adapter"]["projections"]
    if recipe.quantization != "nf4" and recipe.double_quantization:
        del values["double_quantization"]
    if recipe.train.tokens_per_micro_batch is not None:
        del values["train"]["micro_batch_size"]
    if recipe.train.batch_size is not None:
        del values["train"]["gradient_accumulation_steps"]
    if recipe.data.streaming:
        del values["train"]["epochs"]
    if recipe.train.optimizer == "schedule_free_adamw" and recipe.train.schedule != "constant":
        del values["train"]["schedule"]
    return values


def differences(old: Recipe, new: Recipe) -> list[tuple[KeyPath, Any, Any]]:
    """(key, value in old, value in new) of every setting that differs."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    return [(key, before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)]


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
        nested = isinstance(value, dict) and key not in ("rank_pattern", "alpha_pattern", "columns")
        found += _leaves(value, (*at, key)) if nested else [((*at, key), value)]
    return found


# ── YAML with positions ─────────────────────────────────────────────────────────────────────────────────────────


def _read_yaml(path: Path) -> tuple[dict[str, Any], Positions, list[LoraError]]:
    """Values, where each key stands, and keys that stand twice. Raises LoraError for what cannot be read at all."""
    text = _text_of(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise LoraError("the recipe is empty", where=str(path), fix="start from one of configs/*.yaml")
        if not isinstance(node, yaml.MappingNode):
            raise LoraError(
                "a recipe is a mapping of keys to values", where=str(path), fix="start from one of configs/*.yaml"
            )
        positions: Positions = {}
        twice = _locate(node, (), str(path), positions)
        values = loader.construct_document(node)
        if not isinstance(values, dict):  # by a tag, such as !!set
            raise LoraError(f"a recipe is a mapping, not {node.tag}", where=str(path), fix="remove the tag")
        return values, positions, twice
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise LoraError(
            f"not valid YAML: {error.problem}", where=where, fix="check indentation, colons and quotes"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise LoraError(
            f"not valid YAML: character {error.character:#06x} is not allowed", where=f"{path}:{line}", fix="remove it"
        ) from None
    except RecursionError:
        raise LoraError(
            "nested too deeply, or an alias (*name) stands inside its own anchor (&name)",
            where=str(path),
            fix="write the value out where the alias stands; a recipe has sections and keys in them, no deeper levels",
        ) from None
    except _NO_VALUE as error:
        raise LoraError(f"not valid YAML: {error}", where=str(path), fix="put the value in quotes") from None


def _text_of(path: Path) -> str:
    """Raises LoraError for what is no recipe by its kind or size, before any of it is read: a device has no end."""
    try:
        entry = path.stat()
        if stat.S_ISDIR(entry.st_mode):
            raise LoraError("this is a folder, not a recipe", where=str(path), fix="name the YAML file")
        require_regular(path)  # besides, paths in a recipe start at its folder, which a pipe does not have
        if entry.st_size > _LARGEST_RECIPE:
            what = f"{human_bytes(entry.st_size)} are too much for a recipe"
            raise LoraError(what, where=str(path), fix="check the path; a recipe is a page of YAML")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoraError("no such recipe", where=str(path), fix=_nearby_file(path)) from None
    except OSError as error:
        raise LoraError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check path and permissions"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise LoraError("not UTF-8 text", where=f"{path}:{line}", fix="save it as UTF-8") from None


def _nearby_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path(".")
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else "check the path; configs/ holds examples"


def _locate(node: yaml.MappingNode, at: KeyPath, file: str, positions: Positions) -> list[LoraError]:
    """Fills `positions`, of list items too; returns an error for every key that stands twice."""
    twice: list[LoraError] = []
    for key_node, value_node in node.value:
        mark = key_node.start_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise LoraError("a key must be a plain word", where=where, fix="write it as key: value")
        if key_node.tag != "tag:yaml.org,2002:merge":
            key_node.tag = "tag:yaml.org,2002:str"  # a key is its text, also where YAML reads a number, yes or null
        key = (*at, key_node.value)
        if key in positions:
            fix = f"remove one; the other is at {positions[key]}"
            twice.append(LoraError(f"the key {'.'.join(key)} stands twice", where=where, fix=fix))
        positions.setdefault(key, where)
        if isinstance(value_node, yaml.MappingNode):
            twice += _locate(value_node, key, file, positions)
        for number, item in enumerate(value_node.value if isinstance(value_node, yaml.SequenceNode) else []):
            positions.setdefault((*key, str(number)), f"{file}:{item.start_mark.line + 1}:{item.start_mark.column + 1}")
            if isinstance(item, yaml.MappingNode):
                twice += _locate(item, (*key, str(number)), file, positions)
    return twice


def _where(key: KeyPath, positions: Positions, file: str) -> str:
    """Where a key stands; one that is missing is missing from its section."""
    inside = (where for known, where in positions.items() if known[: len(key)] == key)
    around = (positions[key[:end]] for end in range(len(key) - 1, 0, -1) if key[:end] in positions)
    return positions.get(key) or next(inside, None) or next(around, file)


def _place(problem: LoraError) -> tuple[int, int]:
    """To sort by line and column; then comes what concerns the whole file, then the command line."""
    found = re.search(r":(\d+)(?::(\d+))?$", problem.where or "")
    return (int(found[1]), int(found[2] or 0)) if found else (sys.maxsize, "--set" in str(problem))


# ── overrides and paths ─────────────────────────────────────────────────────────────────────────────────────────


_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\}|\$)")  # $NAME, ${NAME}; $$ is a dollar sign


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise LoraError(
            f"--set {override} is not of the form key.path=value", fix="for example --set train.learning_rate=1e-4"
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, *_NO_VALUE):
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


def _path_places(values: dict[str, Any]) -> list[tuple[Any, Any, KeyPath]]:
    """(container, key in it, key path) of every text in the recipe's values that may be a path."""
    places: list[tuple[Any, Any, KeyPath]] = []
    for key_text in PATHS:
        *sections, name = key_text.split(".")
        section: Any = values.get(sections[0]) if sections else values
        places.append((section, name, tuple(key_text.split("."))))
    data: Any = values.get("data")
    for name in ("train", "validation") if isinstance(data, dict) else ():
        entry = data.get(name)
        places.append((data, name, ("data", name)))
        places += [(entry, "path", ("data", name, "path"))] if isinstance(entry, dict) else []
        for at, item in enumerate(entry if isinstance(entry, list) else []):
            key = ("data", name, str(at))
            places.append((item, "path", (*key, "path")) if isinstance(item, dict) else (entry, at, key))
    return [
        (section, name, key)
        for section, name, key in places
        if (isinstance(section, list) or (isinstance(section, dict) and name in section))
        and isinstance(section[name], str)
        and section[name]
        and not (key == ("data", "validation") and NUMBER.fullmatch(section[name]))
        and not (key == ("data", "template") and re.fullmatch(r"[\w-]+", section[name]))
    ]


def _resolve_path(
    section: Any, name: Any, key: KeyPath, base: Path, positions: Positions, file: str
) -> list[LoraError]:
    value = section[name]
    variables = [found[1] or found[2] for found in _VARIABLE.finditer(value)]
    unset = [variable for variable in variables if variable and variable not in os.environ]
    if unset:
        what = f"{'.'.join(key)}: the environment variable {unset[0]} is not set"
        fix = f"export {unset[0]}=…, or write $$ for a dollar sign"
        return [LoraError(what, where=_where(key, positions, file), fix=fix)]
    expanded = _VARIABLE.sub(lambda found: os.environ.get(found[1] or found[2] or "", "$"), os.path.expanduser(value))
    path = base / expanded
    try:
        if len(path.parts) > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} folders inside each other")
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long for the file system, with a NUL character in it, …
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        what = f"{'.'.join(key)} is no path: {reason}"
        return [LoraError(what, where=_where(key, positions, file), fix=_describe(key))]
    if key == ("base_model",) and not path.exists() and Path(expanded).is_dir():
        fix = f"write {os.path.relpath(expanded, base)}, or an absolute path"
        what = f"base_model: {value} is a folder seen from here, but relative paths start at the recipe's folder"
        return [LoraError(what, where=positions.get(key, file), fix=fix)]
    is_path = key != ("base_model",) or path.exists() or expanded.startswith((".", "/", "~")) or expanded != value
    section[name] = os.path.normpath(path) if is_path else expanded
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
        for key in [
            key
            for key in by_key
            if _is_source(key) and any(other[: len(key)] == key for other in by_key if other != key)
        ]:
            del by_key[key]  # what is wrong inside a source says more than that it is no fraction either
        problems = [_problem(key, found, values, positions, file) for key, found in by_key.items()]
        recipe = _without(values, by_key)  # what is right can still contradict itself
    if recipe is not None:
        for key_text, what, fix in contradictions(recipe):
            where = _where(tuple(key_text.split(".")), positions, file)
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


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


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


def _problem(key: KeyPath, found: list[Any], values: dict[str, Any], positions: Positions, file: str) -> LoraError:
    name, where, kind = ".".join(key), _where(key, positions, file), found[0]["type"]
    if kind == "extra_forbidden":
        return LoraError(f"unknown key {name}", where=where, fix=_suggest(key))
    if kind == "missing":
        return LoraError(f"{name} is missing", where=where, fix=f"add it: {_describe(key)}")
    value = found[0]["input"]
    whole: Any = values
    for part in key if len(found) > 1 else ():  # several members of a union refused: show the whole value
        if isinstance(whole, list | dict):
            value = whole = whole[int(part)] if isinstance(whole, list) else whole.get(part)
    shown = _shown(value)
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in found))
    return LoraError(f"{name} is {shown}, but must be {wanted}", where=where, fix=_describe(key) or None)


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
        model = _section_of(field.annotation) if field else None
        if _is_source(key) and part == key[1]:
            model = SourceRecipe
    return field


def _describe(key: KeyPath) -> str:
    field = _field(key) or _field(key[:-1])
    return f"{key[-1]}: {field.description}" if field and field.description else ""


def _suggest(key: KeyPath) -> str:
    section = _field(key[:-1])
    model = SourceRecipe if _is_source(key) else _section_of(section.annotation) if section else Recipe
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
